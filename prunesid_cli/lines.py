"""Files of one record a line that grow and are never rewritten, so that a killed run loses nothing it has written."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TypeVar


T = TypeVar("T")


def read_lines(path: Path, read: Callable[[str], T]) -> Iterator[tuple[int, T]]:
    """
    Place, from 0, and what `read` makes of each line; none for a missing file. Lines that `read` cannot make anything
    of are skipped and named on stderr.
    """
    for place, line in enumerate(_split(path)):
        try:
            value = read(line.decode())
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            reason = str(error) or type(error).__name__
            print(f"{path} line {place + 1} is no record and is skipped: {reason}", file=sys.stderr)
            continue
        yield place, value


def count_lines(path: Path) -> int:
    """All lines of the file, whole or not; 0 for a missing one."""
    return len(_split(path))


def append_to(path: Path) -> IO[str]:
    """The file, opened to append whole lines; half a line that a killed run left stays one of its own."""
    is_cut = path.exists() and path.stat().st_size > 0 and not _ends_with_newline(path)
    file = path.open("a", encoding="utf-8")
    if is_cut:
        file.write("\n")
    return file


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def _split(path: Path) -> list[bytes]:
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return lines[:-1] if lines and not lines[-1] else lines
