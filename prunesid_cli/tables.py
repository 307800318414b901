"""Tables for the terminal, by rich. Into a file or a pipe they are as wide as they must be."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table


PIPE_WIDTH = 400


def print_rows(rows: Sequence[dict[str, str]], title: str | None = None, left: Sequence[str] = ()) -> None:
    """
    Print rows whose columns are those of the first one.

    Args:
        rows: cells by column; a missing one is empty.
        title: a line above the table.
        left: columns of words. The first one is always such; the others are numbers, and stand to the right.
    """
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, name in enumerate(rows[0]):
        is_words = number == 0 or name in left
        shown.add_column(escape(name), justify="left" if is_words else "right", overflow="fold")
    for row in rows:
        shown.add_row(*(escape(row.get(name, "")) for name in rows[0]))
    if title:
        print(title)
    if sys.stdout.isatty():
        Console(highlight=False).print(shown)
        return
    console = Console(width=PIPE_WIDTH, highlight=False, color_system=None)
    with console.capture() as capture:
        console.print(shown)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))
