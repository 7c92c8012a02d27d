"""The machine and this Python: files, folders, CPUs, signals, and packages that come with an extra."""
