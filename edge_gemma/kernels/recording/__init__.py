"""A decoded token's kernel calls, written down once and repeated as one launch."""
