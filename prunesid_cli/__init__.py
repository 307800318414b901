"""The command `prunesid`, and what its subcommands are made of. `command.py` has the list of them."""
