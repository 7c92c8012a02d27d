"""Recipes (which tensor gets how many bits), quantisers and scoring."""
