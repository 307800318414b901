"""The frames of a clip, and a question about them."""

import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from transformers.video_utils import VideoMetadata

from prunesid_cli.generate import ask_about


NUM_FRAMES = 8


def read_frames(
    source: str | Path | BinaryIO,
    count: int = NUM_FRAMES,
    container_format: str | None = None,
    seconds: float | None = None,
    max_pixels: int | None = None,
) -> list[Image.Image]:
    """
    `count` evenly spaced frames of a video file, from its first one on; all of them if it has fewer.

    Args:
        source: a path, or a file that is open for reading.
        container_format (*optional*): the only one that is read, such as `"mp4"`.
        seconds (`float`, *optional*): how long it may take.
        max_pixels (`int`, *optional*): of a frame.

    Raises:
        `ValueError`: if the file cannot be read, has no video in it, or is above a limit.
    """
    import av  # of the extras that read clips

    def check_time() -> None:
        if seconds is not None and time.monotonic() - start > seconds:
            raise ValueError(f"takes longer than {seconds:g} seconds to read. Choose a shorter clip.")

    start = time.monotonic()
    file = str(source) if isinstance(source, Path) else source
    try:
        with av.open(file, format=container_format) as container:
            if not container.streams.video:
                raise ValueError("has no video stream.")
            stream = container.streams.video[0]
            if max_pixels is not None and stream.width * stream.height > max_pixels:
                raise ValueError(f"has {stream.width} x {stream.height} pixels. Choose a smaller clip.")
            total = stream.frames
            if not total:
                for _ in container.decode(stream):
                    total += 1
                    check_time()
                container.seek(0)
            wanted = sorted({int(index * total / count) for index in range(count)})
            frames = []
            for index, frame in enumerate(container.decode(stream)):
                check_time()
                if index in wanted:
                    frames.append(frame.to_image())
                if index >= wanted[-1]:
                    break
            if not frames:
                raise ValueError("has no frames.")
            return frames
    except (av.FFmpegError, OSError, IndexError) as error:
        raise ValueError(f"cannot be decoded: {error}") from error


def ask_about_clip(processor: Any, frames: tuple[Image.Image, ...] | list[Image.Image], prompt: str) -> Any:
    """The inputs for a question about a clip, by the checkpoint's chat template; all of its frames are read."""
    video = np.stack([np.asarray(frame.convert("RGB")) for frame in frames])
    metadata = VideoMetadata(total_num_frames=len(video), fps=1.0, frames_indices=list(range(len(video))))
    arguments = {"do_sample_frames": False, "video_metadata": [metadata]}
    return ask_about(processor, {"type": "video", "video": video}, prompt, processor_kwargs=arguments)
