"""Data preparation, training and evaluation of the small demonstration model. Development only: not installed."""
