"""Measuring: speed, memory, hearing, wrong words."""
