"""Measurements: speed, memory, cost of listening, word error rates."""
