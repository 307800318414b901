"""`python -m prunesid_cli` is the command `prunesid`."""

from .command import entry_point


entry_point()
