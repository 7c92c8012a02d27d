"""The model itself: the forward pass, its weights and caches."""
