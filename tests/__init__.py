"""Tests, in rooms as the package has them. `ROOT` is the repository's root."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
