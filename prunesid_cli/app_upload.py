"""Pictures and clips from strangers: files and addresses, within limits, and what is wrong as sentences."""

import http.client
import io
import ipaddress
import socket
import time
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from PIL import Image

from prunesid_cli.clip_frames import read_frames
from prunesid_cli.images import open_image


MAX_BYTES = 20 * 2**20
MAX_SIDE = 2048  # pixels; larger pictures are made smaller
MAX_RATIO = 20  # of the sides
MAX_FRAME = 4096 * 2304  # pixels of a frame of a clip
CLIP_SECONDS = 30.0  # to read a clip
SECONDS = 10
REDIRECTS = 3
STILL_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")  # pictures in the container of MP4


def read_file(content: bytes, name: str) -> Image.Image | tuple[Image.Image, ...]:
    """A picture, or the frames of a clip. `ValueError` in a sentence for a visitor."""
    container_format = clip_format(content)
    if container_format is None:
        return read_picture(content, name)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{name} is larger than {MAX_BYTES // 2**20} MB. Choose a smaller clip.")
    try:
        frames = read_frames(
            io.BytesIO(content), container_format=container_format, seconds=CLIP_SECONDS, max_pixels=MAX_FRAME
        )
    except ValueError as error:
        if "Choose" in str(error):
            raise ValueError(f"{name} {error}") from error
        raise ValueError(f"{name} cannot be read as a clip. Choose an MP4, MOV, WebM or AVI file.") from error
    for frame in frames:
        frame.thumbnail((MAX_SIDE, MAX_SIDE))
    return tuple(frames)


def clip_format(content: bytes) -> str | None:
    """
    The container of a clip, by its first bytes; None of what is no clip. FFmpeg then reads that format alone, and none
    whose files name others, such as playlists.
    """
    if content[4:8] == b"ftyp" and content[8:12] not in STILL_BRANDS:
        return "mp4"
    if content[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    return "avi" if content[:4] == b"RIFF" and content[8:12] == b"AVI " else None


def read_picture(content: bytes, name: str) -> Image.Image:
    """
    Raises:
        `ValueError`: for what is no picture, too large or too narrow, in a sentence for a visitor.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"{name} is larger than {MAX_BYTES // 2**20} MB. Choose a smaller picture.")
    if not content:
        raise ValueError(f"{name} is empty. Choose a picture.")
    try:
        picture = open_image(content, name)
    except ValueError as error:
        if isinstance(error.__cause__, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
            raise ValueError(f"{name} has too many pixels. Choose a smaller picture.") from error
        raise ValueError(
            f"{name} cannot be read as a picture. Choose a PNG, JPEG, WebP or GIF file, or an "
            "MP4, MOV, WebM or AVI clip."
        ) from error
    if max(picture.size) > MAX_RATIO * min(picture.size):
        raise ValueError(
            f"{name} is {picture.width} x {picture.height} pixels, a strip. Choose a picture whose longer side is at "
            f"most {MAX_RATIO} times its shorter side."
        )
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    return picture


def read_upload(path: str) -> Image.Image | tuple[Image.Image, ...]:
    """The picture or clip in a file that the server has stored for a visitor."""
    with open(path, "rb") as file:
        return read_file(file.read(MAX_BYTES + 1), f"“{Path(path).name[:80]}”")


def read_address(address: str) -> Image.Image | tuple[Image.Image, ...]:
    """
    The picture or clip at a public http(s) address. A visitor's address never reaches the server's own network: the
    number that is connected to is the one that is checked, at every redirect.
    """
    return read_file(fetch(address.strip()), "The file at this address")


def fetch(address: str) -> bytes:
    """What a public address holds. `ValueError` for any other, and for one that does not answer."""
    for _ in range(REDIRECTS + 1):
        try:
            parts = urlsplit(address)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("This is no address of a picture. It must begin with http:// or https://.")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname, port, timeout=SECONDS)
        connection._create_connection = connect_in_public  # type: ignore[attr-defined]
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", path, headers={"User-Agent": "prunesid"})
            response = connection.getresponse()
            if response.status in (301, 302, 303, 307, 308) and response.headers.get("Location"):
                address = urljoin(address, response.headers["Location"])
                continue
            if response.status != 200:
                raise ValueError(f"{parts.hostname} answers with error {response.status}. Check the address.")
            content, end = b"", time.monotonic() + 3 * SECONDS
            while len(content) <= MAX_BYTES and (part := response.read1(2**16)):
                content += part
                if time.monotonic() > end:
                    raise ValueError(f"{parts.hostname} is too slow. Save the picture and drop it in.")
            return content
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise ValueError(
                f"{parts.hostname} cannot be reached from here. Check the address, or save the picture and drop it in."
            ) from error
        finally:
            connection.close()
    raise ValueError("This address leads from one to the next and to no picture. Save the picture and drop it in.")


def connect_in_public(address: tuple[str, int], timeout: float | None = None, source_address=None) -> socket.socket:
    """`socket.create_connection` to addresses of the public internet alone."""
    failure: OSError = OSError("no address")
    for family, kind, protocol, _, found in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
        if not is_public(str(found[0])):
            raise ValueError(f"{address[0]} is not on the public internet. Save the picture and drop it in.")
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(timeout)
            connection.connect(found)
            return connection
        except OSError as error:
            connection.close()
            failure = error
    raise failure


def is_public(number: str) -> bool:
    address = ipaddress.ip_address(number.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    return address.is_global and not address.is_multicast
