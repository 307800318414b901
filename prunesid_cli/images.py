"""How every script opens an image."""

import contextlib
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from transformers.image_utils import load_image


def open_image(source: str | Path | bytes, name: str | None = None) -> Image.Image:
    """
    An image in RGB as a viewer shows it: turned as its EXIF says, the first frame of an animation, 16 bits a channel
    brought to 8. Transparency is dropped, as Transformers drops it.

    Args:
        source: a path, a URL or the bytes of a file.
        name: what the error calls it; by default the path or URL.

    Raises:
        `ValueError`: if it is no image, broken or cut off, or has more pixels than Pillow takes for harmless.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, str) and source.startswith(("http://", "https://", "data:image/")):
                return _as_rgb(load_image(source))
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                image.load()
                return _as_rgb(image)
    except Exception as error:  # whatever the decoder of a format raises
        shown = name or (f"{len(source)} bytes" if isinstance(source, bytes) else str(source)[:200])
        raise ValueError(f"{shown} is not a readable image: {error or type(error).__name__}") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):  # EXIF that cannot be read turns nothing
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")
