"""Hearing: waveform to features, features to soft tokens, speech to text."""
