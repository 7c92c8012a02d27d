"""What this machine and this Python offer, or lack: files, places, CPUs, signals, packages that come with an extra."""
