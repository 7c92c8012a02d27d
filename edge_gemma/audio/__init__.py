"""Sound: waveforms to features, features to soft tokens, speech to text."""
