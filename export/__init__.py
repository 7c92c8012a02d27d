"""Checkpoint readers, tokenizer rebuild and the conversion pipeline: from what is published to a model folder."""
