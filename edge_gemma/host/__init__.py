"""The machine and this Python: files, folders, CPUs, signals, optional packages."""
