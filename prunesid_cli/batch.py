"""
Answers to the rows of a JSONL file, over processes and machines, by jobs that may be killed at any moment.

A process answers every n-th row and appends each answer, as one line in one write, to a part of its own in
`OUT.parts/`. Nothing else is remembered: one that starts again reads the parts, cuts half a line off the end of its
own, and goes on with the rows that no part has. Processes meet in that folder alone, which machines share; the one
that finds every row answered writes them to `OUT`, in the order of the input.
"""

import array
import contextlib
import fcntl
import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from prunesid_cli.images import open_image


_SOURCES = ("image", "path", "url")  # of an image, in a part of a message
_JOB = "job.json"
_NOWHERE = -1
_RANK_NAMES = {
    "rank": ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK"),
    "count": ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"),
    "local_rank": (
        "LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "MPI_LOCALRANKID",
        "MV2_COMM_WORLD_LOCAL_RANK",
    ),
}


class _Progress(tqdm):
    """A bar without the lock that tqdm shares between forked processes: one killed while it holds that stops all."""

    _lock = threading.RLock()


class Shard(NamedTuple):
    """Which process of how many this is, and which of its machine."""

    rank: int = 0
    count: int = 1  # type: ignore[assignment]
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> "Shard":
        """As `torchrun`, `accelerate launch` and MPI, by which the latter spans CPUs, say it; else one process.

        Raises:
            `ValueError`: if these are no ranks.
        """
        found = {}
        for field, names in _RANK_NAMES.items():
            name = next((name for name in names if name in os.environ), None)
            if name is not None:
                found[field] = name
        try:
            shard = cls(**{field: int(os.environ[name]) for field, name in found.items()})
        except ValueError:
            shard = cls(0, 0, 0)
        if not 0 <= shard.rank < shard.count or shard.local_rank < 0:
            given = {name: os.environ[name] for name in found.values()}
            raise ValueError(f"The ranks in the environment must be those of a launcher, got {given}. Unset them.")
        return shard


class Request(NamedTuple):
    """A row: its place among the rows, its id and a conversation with its images opened."""

    row: int
    id: Any
    messages: list[dict[str, Any]]


def rows_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """Place and text of each line that is not blank."""
    with path.open("rb") as file:
        yield from enumerate(line for line in file if line.strip())


def describe(path: Path) -> tuple[int, str]:
    """How many rows a file has, and a hash of them."""
    count, digest = 0, hashlib.sha256()
    for _, line in rows_of(path):
        count += 1
        digest.update(line.strip() + b"\n")
    return count, digest.hexdigest()


def read_row(line: bytes) -> dict[str, Any]:
    """
    Raises:
        `ValueError`: if the line holds no JSON object.
    """
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The row is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"The row must be a JSON object, got {str(fields)[:80]!r}.")
    return fields


def read_messages(fields: dict[str, Any], folder: Path, prompt: str) -> list[dict[str, Any]]:
    """
    The conversation that a row stands for: its `messages`, or a question (`prompt`, by default the given one) about
    its `image` or `images`. Paths are those in `folder`, or as this process sees them.

    Raises:
        `ValueError`: if a field is not what it should be, or an image cannot be read.
    """
    images = fields.get("images", [])
    if not isinstance(images, list):
        raise ValueError(f"images must be a list of paths or URLs, got {str(images)[:80]!r}. One is an `image`.")
    images = [*([fields["image"]] if fields.get("image") is not None else []), *images]
    messages = fields.get("messages")
    if messages is None:
        text = prompt if fields.get("prompt") is None else fields["prompt"]
        if not isinstance(text, str):
            raise ValueError(f"prompt must be a string, got {str(text)[:80]!r}.")
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
    elif fields.get("prompt") is not None:
        raise ValueError("The row has a prompt and messages. Leave one of them out.")
    if not isinstance(messages, list) or not messages or not all(isinstance(own, dict) for own in messages):
        raise ValueError(f"messages must be a list of objects with a role and a content, got {str(messages)[:80]!r}.")
    remaining = iter(images)
    opened = [{**own, "content": _read_content(own.get("content"), folder, remaining)} for own in messages]
    if next(remaining, None) is not None:
        raise ValueError(f"The row has {len(images)} images, more than its messages have parts of type 'image' for.")
    return opened


def _read_content(content: Any, folder: Path, images: Iterator[Any]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ValueError(f"The content of a message must be a string or a list of parts, got {str(content)[:80]!r}.")
    read = []
    for part in content:
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            read.append(part)
        elif kind in ("image", "image_url"):
            nested = part.get("image_url")
            given = [nested.get("url") if isinstance(nested, dict) else nested, *(part.get(name) for name in _SOURCES)]
            source = next((value for value in given if value is not None), None)
            source = next(images, None) if source is None else source
            read.append({"type": "image", "image": _open(source, folder)})
        else:
            raise ValueError(f"A part must be of type 'text' (with a text), 'image' or 'image_url', got {part!r:.80}.")
    return read


def _open(source: Any, folder: Path):
    if not isinstance(source, str) or not source:
        raise ValueError(f"An image must be a path or a URL, got {str(source)[:80]!r}.")
    if source.startswith(("http://", "https://", "data:image/")):
        return open_image(source)
    with contextlib.suppress(OSError, ValueError):  # a name that no file can have
        if (folder / source).exists():
            return open_image(folder / source, source)
    return open_image(Path(source), source)


def whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Where each line begins, and the line; half a line at the end is none."""
    place = 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield place, line
            place += len(line)


def answers_in(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Row, place in the file and record of each answer in a part. What is no record, after a crash, is passed over."""
    for place, line in whole_lines(path):
        try:
            record = json.loads(line)
            row = record["row"]
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(row, int):
            yield row, place, record


class Part:
    """
    The part that this process appends to, which is locked as long as it is open. Where another process has it, as one
    that outlived its killed launcher, this one waits until it ends.
    """

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{path} is written by another process, which is waited for.", file=sys.stderr)
                fcntl.flock(self._file, fcntl.LOCK_EX)
        os.ftruncate(self._file, max((place + len(line) for place, line in whole_lines(path)), default=0))

    def append(self, record: dict[str, Any]) -> None:
        data = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        while data:
            data = data[os.write(self._file, data) :]

    def __enter__(self) -> "Part":
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self._file)


class Output:
    """The answers of a job: the file that they are merged into, and the folder of its parts."""

    def __init__(self, path: Path):
        self.path, self.folder = path, path.with_name(f"{path.name}.parts")

    def begin(self, job: dict[str, Any]) -> None:
        """
        Make the folder, or find it left by a run of the same job.

        Raises:
            `ValueError`: if it is of another job, or the file exists without it.
        """
        if self.path.is_dir():
            raise ValueError(f"--output must be a file, got the folder {self.path}.")
        if not (self.folder / _JOB).exists():
            if self.path.exists():
                raise ValueError(f"{self.path} exists and is of no job that can go on. Choose another --output.")
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / _JOB, [json.dumps(job).encode()])
        begun = self.job()
        for name, value in job.items():
            if begun.get(name) != value:
                raise ValueError(
                    f"{self.path} was begun with {name}={begun.get(name)!r}, and now it is {value!r}. Choose another "
                    f"--output, or remove {self.path} and {self.folder}."
                )

    def job(self) -> dict[str, Any]:
        """
        Raises:
            `ValueError`: if there is no job.
        """
        try:
            return json.loads((self.folder / _JOB).read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.folder} holds no job that --output={self.path} could be merged from.") from error

    def parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.jsonl"))

    def part(self, shard: Shard) -> Part:
        return Part(self.folder / f"part-{shard.rank:05}.jsonl")

    def done(self, num_rows: int) -> bytearray:
        """1 for each row that has an answer, or is known to have none."""
        done = bytearray(num_rows)
        for part in self.parts():
            for row, _, _ in answers_in(part):
                if 0 <= row < num_rows:
                    done[row] = 1
        return done

    def merge(self, num_rows: int) -> dict[str, Any]:
        """Write the answers that there are, in the order of the rows, and count them."""
        parts, files = self.parts(), array.array("l", [_NOWHERE]) * num_rows
        places, failed = array.array("q", [0]) * num_rows, 0
        for number, part in enumerate(parts):
            for row, place, record in answers_in(part):
                if 0 <= row < num_rows and files[row] == _NOWHERE:
                    files[row], places[row] = number, place
                    failed += "error" in record
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(part.open("rb")) for part in parts]

            def lines():
                for number, place in zip(files, places):
                    if number != _NOWHERE:
                        opened[number].seek(place)
                        yield opened[number].readline()

            _write(self.path, lines())
        missing = files.count(_NOWHERE)
        return {"rows": num_rows, "answered": num_rows - missing - failed, "failed": failed, "missing": missing}


def _write(path: Path, lines: Iterator[bytes] | Sequence[bytes]) -> None:
    """Write a file whole, or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            file.writelines(lines)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def answer_rows(
    source: Path,
    output: Output,
    job: dict[str, Any],
    shard: Shard,
    load: Callable[[], Callable[[list[Request]], list[str]]],
    batch_size: int = 1,
) -> dict[str, Any]:
    """
    Answer the rows of this process that have no answer yet, and merge the parts if no row is left.

    Args:
        source: rows, one JSON object a line.
        job: what the answers depend on: `rows`, `prompt` and whatever else.
        load: gives what answers several requests at once. It is called only if there is something to answer, and may
            raise a `ValueError`, which is recorded as the outcome of the row.

    Returns:
        `dict`: the rank, and numbers of rows: all, with an answer, without one (`failed`), not done (`missing`).
    """
    output.begin(job)
    own = range(shard.rank, job["rows"], shard.count)
    with output.part(shard) as part:
        done = output.done(job["rows"])
        num_done = sum(done[row] for row in own)
        if num_done < len(own):
            answer = load()
            bar = _Progress(
                total=len(own), initial=num_done, desc=f"rank {shard.rank}", unit="row", position=shard.local_rank
            )
            with bar:
                waiting: list[Request] = []
                for row, line in rows_of(source):
                    if row % shard.count != shard.rank or done[row]:
                        continue
                    request = _read_request(row, line, source.parent, job["prompt"], part)
                    waiting += [] if request is None else [request]
                    if request is None:
                        bar.update()
                    if len(waiting) == batch_size:
                        _answer(answer, waiting, part)
                        bar.update(len(waiting))
                        waiting = []
                if waiting:
                    _answer(answer, waiting, part)
                    bar.update(len(waiting))
    done = output.done(job["rows"])
    if all(done):
        return {"rank": shard.rank, **output.merge(job["rows"])}
    return {"rank": shard.rank, "rows": job["rows"], "missing": done.count(0)}


def _read_request(row: int, line: bytes, folder: Path, prompt: str, part: Part) -> Request | None:
    name: Any = row
    try:
        fields = read_row(line)
        name = fields.get("id", row)
        return Request(row, name, read_messages(fields, folder, prompt))
    except (ValueError, OSError) as error:
        part.append({"row": row, "id": name, "error": str(error)})
        return None


def _answer(answer: Callable[[list[Request]], list[str]], requests: list[Request], part: Part) -> None:
    try:
        answers = answer(requests)
    except ValueError as error:
        if len(requests) > 1:  # one of them is to blame
            for request in requests:
                _answer(answer, [request], part)
            return
        part.append({"row": requests[0].row, "id": requests[0].id, "error": str(error)})
        return
    for request, text in zip(requests, answers):
        part.append({"row": request.row, "id": request.id, "answer": text})
