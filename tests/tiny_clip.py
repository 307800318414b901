"""A clip of given frames."""

import av


def save_clip(path, pictures):
    """A file of the format that its name says, whose frames are the pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx" if path.suffix == ".webm" else "mpeg4", rate=2)
        stream.width, stream.height = (side // 2 * 2 for side in pictures[0].size)
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture.resize((stream.width, stream.height)))))
        container.mux(stream.encode())
