"""Confidential inference: evidence and its appraisal, sealed artifacts, encrypted prompts. An extra of its own."""
