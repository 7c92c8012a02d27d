"""Answers aloud: a text that streams becomes sound while it is written."""
