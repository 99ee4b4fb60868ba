"""Turns a Hugging Face model into an artifact: source → optimum → fuse → quantize → verify → pack."""
