"""Text on its way in and out: tokens, messages, the prompt, the parts of a reply, conversations kept in files."""
