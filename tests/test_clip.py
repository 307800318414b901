"""The clip of the demo: frames as upstream samples them, and what is measured on a tiny Video-LLaVA."""

import av
import numpy as np
import pytest
import torch
from tiny import batch
from tiny_video_llava import BUDGET, FED, FRAMES, VIDEO, build, clips, rows

from prunesid_cli import clip


def write_video(path, num_frames):
    """A video whose frames are ever brighter greys."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(num_frames):
            grey = np.full((64, 64, 3), 6 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize("suffix", ["avi", "mkv"], ids=["length known", "length unknown"])
@pytest.mark.parametrize(("num_frames", "count"), [(40, 8), (37, 8), (8, 8), (5, 8)])
def test_frames_are_sampled_as_upstream_does(tmp_path, num_frames, count, suffix):
    path = tmp_path / f"clip.{suffix}"
    write_video(path, num_frames)
    shades = [np.asarray(frame).mean() / 6 for frame in clip.read_frames(path, count)]
    expected = sorted(set(np.arange(0, num_frames, num_frames / count).astype(int).tolist()))
    assert np.abs(np.array(shades) - expected).max() < 0.5
    assert len(shades) == len(expected)


@pytest.mark.parametrize("content", [None, b"", b"no video at all"])
def test_a_file_that_is_no_video(tmp_path, content):
    if content is not None:
        (tmp_path / "clip.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=r"--video must be .*clip\.mp4"):
        clip.read_frames(tmp_path / "clip.mp4")


def test_rows_of_the_table(tmp_path):
    model = build()
    inputs = {**batch(rows(0, FRAMES * FED, [((0, 1), [9, 4])])), "pixel_values_videos": clips(1)}
    assert int((inputs["input_ids"] == VIDEO).sum()) == FRAMES * FED
    cases = clip.cases_of([BUDGET], FRAMES)
    found = {row["case"]: row["tokens_of_frames"] for row in clip.measure(model, inputs, cases)}
    assert found["stock class"] == found["PruneSID off"] == [FED] * FRAMES
    assert found[f"{BUDGET} a frame"] == [BUDGET] * FRAMES
    assert sum(found[f"{BUDGET * FRAMES} a clip"]) == BUDGET * FRAMES
    selections = {}
    for name, settings in cases.items():
        model.config.prunesid_config = settings
        selections[name] = clip.kept_tokens(model, inputs["pixel_values_videos"])
        assert selections[name].sum(1).tolist() == found[name]
    clip.draw(tmp_path / "frames.png", torch.rand(FRAMES, 3, 28, 28), selections)
    assert (tmp_path / "frames.png").stat().st_size > 0
