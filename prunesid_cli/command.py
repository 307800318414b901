"""
The command `prunesid`: one parser, one way to fail, and one line of JSON at the end of a command that reports.

A subcommand is a module of this package with a line in `COMMANDS`. It has a docstring (its help),
`add_arguments(parser)` and `run(arguments)`, which returns what the last line says (a `dict`) or None. Bad input is a
`ValueError` or an `OSError`: one sentence on stderr, exit status 2. Modules are imported only when their command is
called.
"""

import argparse
import importlib
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from safetensors import SafetensorError


# name: (what it does, the extra whose packages it needs)
COMMANDS = {
    "demo": ("answers, kept patches, speed and memory at several budgets", "demo"),
    "generate": ("answer a question about an image, or a file of questions", None),
    "convert": ("write a variant of a checkpoint, verify it and publish it", None),
    "calibrate": ("calibrate dynamic budgets on your own images", "demo"),
    "tune": ("train the projector under a budget on your own questions", "train"),
    "evaluate": ("accuracy of every method at every budget on synthetic scenes", "demo"),
    "benchmark": ("measure the cost of selection and the speed-up", "demo"),
    "presets": ("list the presets, or show one", None),
    "app": ("see in a browser which tokens are kept", "app"),
    "push-space": ("publish the page of `prunesid app` as a Space", None),
    "doctor": ("versions, what works on this machine, and what to fix", None),
}
OWN_PACKAGES = ("modeling_prunesid", "prunesid_cli")


def build_parser(chosen: str | None = None, module: Any = None) -> argparse.ArgumentParser:
    """The parser of all commands. Only that of `chosen` has its arguments, which its module adds."""
    parser = argparse.ArgumentParser(
        prog="prunesid", description="Visual token pruning for Hugging Face Transformers models.", allow_abbrev=False
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (summary, _) in COMMANDS.items():
        own = subparsers.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        if name == chosen:
            own.description = module.__doc__
            module.add_arguments(own)
    return parser


def import_command(name: str):
    return importlib.import_module(f".{name.replace('-', '_')}", __package__)


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run a command.

    Raises:
        `SystemExit`: with status 2 for bad input, whose message is on stderr.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    name = next((word for word in argv[:1] if word in COMMANDS), None)
    try:
        module = None if name is None else import_command(name)
        arguments = build_parser(name, module).parse_args(argv)
        report = module.run(arguments)
    except ModuleNotFoundError as error:
        missing, extra = str(error.name).partition(".")[0], None if name is None else COMMANDS[name][1]
        if extra is None or missing in OWN_PACKAGES:
            raise
        fail(
            f"prunesid {name}: this command needs the package {missing!r}, which is not installed. Install the extra "
            f"{extra!r} of the checkout or wheel that you have: pip install -e '.[{extra}]', or pip install "
            f"'NAME.whl[{extra}]'"
        )
    except ImportError as error:
        if str(error).startswith("PruneSID needs"):  # another Transformers
            fail(f"prunesid {name}: {error}")
        missing_backend = re.search(r"(\w+) requires the (\w+) library", str(error))
        if missing_backend is None:
            raise
        wanted = missing_backend[2].lower()
        fail(
            f"prunesid {name}: {missing_backend[1]} of this checkpoint needs the package {wanted!r}, which is not "
            f"installed. Install it: pip install {wanted}"
        )
    except BrokenPipeError:
        raise
    except (ValueError, OSError, SafetensorError) as error:
        fail(f"prunesid {name}: {error}")
    if report is not None:
        print(json.dumps(report))


def fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(2)


def entry_point() -> None:
    """`main`, for a process of its own: one that is stopped cleans up, and says no more."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # its reader, such as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
