"""Pictures: files and arrays to pixels, pixels to the patches that the encoder reads."""
