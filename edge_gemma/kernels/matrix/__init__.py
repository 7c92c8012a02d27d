"""Matrix products: packed weights by rounded activations, and float weights."""
