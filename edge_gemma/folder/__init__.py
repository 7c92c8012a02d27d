"""Model folders on disk: their files and layouts, writing them whole or not at all, finding them, their names."""
