"""Where the embedded model is: in a checkout its folder `embedded/`, else a copy of what the wheel carries."""

import shutil
from pathlib import Path

from modeling_prunesid import __version__
from prunesid_cli.cache import cache_folder


_CHECKOUT = Path(__file__).parents[1] / "embedded"
_PACKAGED = Path(__file__).with_name("embedded_model")
FOLDER = _CHECKOUT if _CHECKOUT.is_dir() else cache_folder() / f"embedded-{__version__}"


def unpack() -> None:
    """Copy what the wheel carries to a folder that may be written to, unless it is there."""
    if FOLDER == _CHECKOUT or FOLDER.is_dir():
        return
    unfinished = FOLDER.with_name(f"{FOLDER.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(_PACKAGED, unfinished)
    unfinished.replace(FOLDER)


def describe() -> str:
    """Where it is, and whether its tower has been fetched, for a reader."""
    if not FOLDER.is_dir():
        return "comes with the package; the first demo unpacks it and fetches its vision tower (88 MB)"
    is_whole = (FOLDER / "model-00002-of-00002.safetensors").exists()
    return f"{FOLDER}" + ("" if is_whole else "; the first demo fetches its vision tower (88 MB)")
