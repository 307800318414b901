"""What strangers drop in: ten odd files and addresses, each a picture or a sentence; nothing of the server is read."""

import http.server
import io
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image
from tiny_clip import save_clip

from prunesid_cli import app_upload
from prunesid_cli.app_upload import MAX_BYTES, MAX_SIDE, is_public, read_address, read_file, read_picture, read_upload


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def archive():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("picture.png", b"")
    return file.getvalue()


def bomb():
    """A PNG that says it has 400 million pixels."""
    content = bytearray(saved(Image.new("L", (8, 8)), "PNG"))
    content[16:24] = (20000).to_bytes(4, "big") * 2
    import zlib

    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


SMALL = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
ODD_FILES = {
    "text": (b"#!/bin/sh\necho hello\n", "cannot be read as a picture"),
    "empty": (b"", "is empty"),
    "archive": (archive(), "cannot be read as a picture"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "cannot be read as a picture"),
    "page": (b"<html><body>404</body></html>", "cannot be read as a picture"),
    "cut off": (saved(NOISE, "PNG")[:500], "cannot be read as a picture"),
    "bomb": (bomb(), "has too many pixels"),
    "strip": (saved(Image.new("RGB", (5000, 2)), "PNG"), "is 5000 x 2 pixels, a strip"),
    "large": (b"\0" * (MAX_BYTES + 1), "is larger than 20 MB"),
    "pickle": (
        b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
        "cannot be",
    ),
}


@pytest.mark.parametrize("kind", ODD_FILES)
def test_what_is_no_picture_is_a_sentence(kind):
    content, sentence = ODD_FILES[kind]
    with pytest.raises(ValueError, match=sentence) as caught:
        read_picture(content, "The file")
    assert "Choose" in str(caught.value) and str(caught.value).startswith("The file ")


@pytest.mark.parametrize(
    "content",
    [
        saved(SMALL, "PNG"),
        saved(SMALL.convert("RGBA"), "WEBP"),
        saved(SMALL.convert("P"), "GIF", save_all=True, append_images=[SMALL.convert("P")]),
        saved(SMALL.convert("CMYK"), "JPEG"),
        saved(Image.new("I;16", (3, 3)), "PNG"),
        saved(Image.new("1", (1, 1)), "BMP"),
    ],
    ids=["png", "transparent", "animation", "cmyk", "16 bits", "one pixel"],
)
def test_odd_pictures_are_read(content):
    assert read_picture(content, "The file").mode == "RGB"


@pytest.mark.parametrize("suffix", ["mp4", "mov", "webm", "mkv", "avi"])
def test_a_clip_is_eight_even_frames(tmp_path, suffix):
    save_clip(tmp_path / f"clip.{suffix}", [Image.new("RGB", (64, 48), (6 * shade,) * 3) for shade in range(40)])
    frames = read_upload(str(tmp_path / f"clip.{suffix}"))
    assert isinstance(frames, tuple) and {frame.size for frame in frames} == {(64, 48)}
    shades = [np.asarray(frame).mean() / 6 for frame in frames]
    assert np.abs(np.array(shades) - np.arange(0, 40, 5)).max() < 1


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nSECRET\n#EXT-X-ENDLIST\n"
ODD_CLIPS = {
    "a playlist": (lambda clip, secret: PLAYLIST.replace(b"SECRET", secret), "cannot be read as a picture"),
    "a list of files": (lambda clip, secret: b"ffconcat version 1.0\nfile " + secret, "cannot be read as a picture"),
    "cut off": (lambda clip, secret: clip[: len(clip) // 3], "cannot be read as a clip. Choose an MP4"),
    "a playlist that looks like MP4": (
        lambda clip, secret: clip[:16] + PLAYLIST.replace(b"SECRET", secret),
        "cannot be read as a clip",
    ),
    "sound": (lambda clip, secret: b"RIFF" + b"\0\0\0\0AVI " + b"\0" * 64, "cannot be read as a clip"),
    "large": (lambda clip, secret: clip + b"\0" * MAX_BYTES, "is larger than 20 MB. Choose a smaller clip"),
}


@pytest.mark.parametrize("kind", ODD_CLIPS)
def test_what_is_no_clip_is_a_sentence(kind, tmp_path):
    """And no file of the server is opened because an upload names it."""
    save_clip(tmp_path / "secret.mp4", [Image.new("RGB", (64, 48))] * 9)
    change, sentence = ODD_CLIPS[kind]
    content = change((tmp_path / "secret.mp4").read_bytes(), str(tmp_path / "secret.mp4").encode())
    with pytest.raises(ValueError, match=sentence) as caught:
        read_file(content, "The file")
    assert "Choose" in str(caught.value) and str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("limit", "value", "sentence"),
    [("MAX_FRAME", 10, "has 64 x 48 pixels. Choose a smaller"), ("CLIP_SECONDS", 0.0, "Choose a shorter clip")],
)
def test_a_clip_above_a_limit_is_a_sentence(tmp_path, monkeypatch, limit, value, sentence):
    save_clip(tmp_path / "clip.mp4", [Image.new("RGB", (64, 48))] * 9)
    monkeypatch.setattr(app_upload, limit, value)
    with pytest.raises(ValueError, match=f"“clip.mp4” .*{sentence}"):
        read_upload(str(tmp_path / "clip.mp4"))


def test_a_huge_picture_is_made_smaller():
    assert max(read_picture(saved(Image.new("RGB", (4000, 3000)), "PNG"), "The file").size) == MAX_SIDE


def test_an_error_names_the_file_without_its_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"^“notes.txt” cannot be read") as caught:
        read_upload(str(tmp_path / "notes.txt"))
    assert str(tmp_path) not in str(caught.value)


class Server(http.server.BaseHTTPRequestHandler):
    pages = {"/picture.png": (200, saved(SMALL, "PNG")), "/secret": (200, b"secret"), "/gone": (404, b"")}

    def do_GET(self):
        self.server.asked.append(self.path)
        status, content = self.pages.get(self.path, (302, b""))
        self.send_response(status)
        if status == 302:
            self.send_header("Location", self.path[3:])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """A server on this machine, and the paths that it was asked for."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_addresses_of_the_servers_own_network_are_never_connected_to(server, monkeypatch):
    port = server.server_port
    for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433"):
        with pytest.raises(ValueError, match="not on the public internet|cannot be reached"):
            read_address(f"http://{host}:{port}/picture.png")
    assert server.asked == []
    for number in ("10.0.0.1", "192.168.1.1", "169.254.169.254", "::1", "fe80::1%eth0", "fd00::1", "224.0.0.1"):
        assert not is_public(number)
    assert is_public("93.184.216.34") and is_public("2606:2800:220:1::1")


def test_a_redirect_is_checked_as_well(server, monkeypatch):
    port = server.server_port
    monkeypatch.setattr(app_upload, "is_public", lambda number: number == "127.0.0.1")
    assert read_address(f" http://127.0.0.1:{port}/picture.png ").size == (2, 2)
    assert read_address(f"http://127.0.0.1:{port}/to/picture.png").size == (2, 2)
    for target, sentence in (
        ("http://127.0.0.2:80/secret", "not on the public internet"),
        ("file:///etc/passwd", "no address of a picture"),
        (f"http://127.0.0.1:{port}/gone", "answers with error 404"),
        (f"http://127.0.0.1:{port}/secret", "cannot be read as a picture"),
    ):
        with pytest.raises(ValueError, match=sentence):
            read_address(f"http://127.0.0.1:{port}/to{target}")


@pytest.mark.parametrize(
    "address", ["", "/etc/passwd", "file:///etc/passwd", "ftp://a/b.png", "picture.png", "http://", "http://a:x/"]
)
def test_what_is_no_web_address_is_a_sentence(address):
    with pytest.raises(ValueError, match="no address of a picture. It must begin with http"):
        read_address(address)
