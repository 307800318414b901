"""Where fetched files are kept."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$PRUNESID_CACHE`, or `~/.cache/prunesid`."""
    return Path(os.environ.get("PRUNESID_CACHE") or Path.home() / ".cache" / "prunesid").expanduser()
