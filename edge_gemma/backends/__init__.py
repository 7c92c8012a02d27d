"""Other ways to run a model than the decoder of this package."""
