"""Placeholder, replaced with the kernels."""
