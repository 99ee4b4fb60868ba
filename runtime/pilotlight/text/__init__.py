"""Text on both sides of a model: chat template and tokenizer on the way in, detokenizer on the way out."""
