"""Pilotlight: a function runtime for language models."""

__version__ = "0.1.0"
