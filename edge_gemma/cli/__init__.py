"""The `edge-gemma` command."""
