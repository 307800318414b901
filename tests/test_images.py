"""Every script opens an image in one way, and says in a sentence what cannot be opened."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prunesid_cli import images
from prunesid_cli.images import open_image


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def written(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "turned.png").write_bytes(written(Image.fromarray(PIXELS), "PNG", exif=exif))
    flips = {2: lambda p: p[:, ::-1], 3: lambda p: p[::-1, ::-1], 4: lambda p: p[::-1], 5: lambda p: p.swapaxes(0, 1)}
    flips |= {6: lambda p: np.rot90(p, -1), 7: lambda p: np.rot90(p, 2).swapaxes(0, 1), 8: np.rot90}
    expected = flips.get(orientation, lambda p: p)(PIXELS)
    assert np.array_equal(np.asarray(open_image(tmp_path / "turned.png")), expected)


def test_every_mode_becomes_rgb():
    picture = Image.fromarray(PIXELS)
    for mode, form in (("RGB", "PNG"), ("RGBA", "PNG"), ("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("LA", "PNG")):
        opened = open_image(written(picture.convert(mode), form))
        assert (opened.mode, opened.size) == ("RGB", (9, 6))
    inks = picture.convert("CMYK")
    assert np.array_equal(np.asarray(open_image(written(inks, "TIFF"))), np.asarray(inks.convert("RGB")))


def test_sixteen_bits_are_brought_to_eight():
    deep = Image.fromarray(np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16))
    grey = np.asarray(open_image(written(deep, "PNG")))[..., 0]
    assert np.array_equal(grey, np.arange(256, dtype=np.uint8).reshape(16, 16))


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_an_animation_is_its_first_frame(form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    data = written(
        frames[0], form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {})
    )
    assert np.array_equal(np.asarray(open_image(data)), np.asarray(frames[0]))


def test_unreadable_exif_turns_nothing():
    data = written(Image.fromarray(PIXELS), "PNG", exif=b"Exif\0\0II*\0" + 200 * b"\xff")
    assert np.array_equal(np.asarray(open_image(data)), PIXELS)


def test_a_bomb_is_a_sentence(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for side in (11, 20):  # Pillow warns of the first, and refuses the second
        with pytest.raises(ValueError, match="picture.png is not a readable image: Image size .* decompression bomb"):
            open_image(written(Image.new("RGB", (side, side)), "PNG"), "picture.png")


def broken_files():
    for form in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"):
        data = written(Image.fromarray(np.tile(PIXELS, (9, 9, 1))), form)
        yield f"{form} cut", data[: len(data) // 2]
        yield f"{form} head", data[:20]
    yield "nothing", b""
    yield "text", b"no image"
    yield "zeros", bytes(1000)


@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in broken_files()])
def test_a_broken_file_is_a_sentence(data, tmp_path):
    (tmp_path / "broken").write_bytes(data)
    with pytest.raises(ValueError, match="broken is not a readable image: ."):
        open_image(tmp_path / "broken")


@pytest.mark.parametrize(
    "source", ["nowhere.png", "/", "http://127.0.0.1:9/picture.png", "data:image/png;base64,AAAA"]
)
def test_what_is_no_file_is_a_sentence(source):
    with pytest.raises(ValueError, match="is not a readable image: ."):
        open_image(source)


def test_no_script_opens_images_itself():
    """`images.py` does it for all of them."""
    for path in Path(images.__file__).parent.rglob("*.py"):
        if path.name != "images.py":
            assert "Image.open(" not in path.read_text() and "load_image(" not in path.read_text(), path.name
