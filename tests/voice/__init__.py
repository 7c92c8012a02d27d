"""Answers aloud."""
