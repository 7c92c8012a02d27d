"""Attention: scores, softmax and weighted values, in blocks."""
