"""The evaluation's scenes: the same picture for the same name, and answers that the picture bears out."""

import importlib
import random
from collections import Counter

import numpy as np
import pytest


@pytest.fixture(scope="module")
def scenes():
    return importlib.import_module("prunesid_cli.scenes")


@pytest.fixture(scope="module")
def drawn(scenes):
    return [scenes.make_scene(variant, "val", seed) for variant in scenes.VARIANTS for seed in range(30)]


def test_a_name_gives_one_scene(scenes):
    first, again = (scenes.make_scene("context", "train", 7) for _ in range(2))
    assert first.image.tobytes() == again.image.tobytes()
    assert scenes.ask(first) == scenes.ask(again)
    assert first.image.tobytes() != scenes.make_scene("context", "train", 8).image.tobytes()
    assert first.image.size == (336, 336)


def test_the_stream_starts_at_its_seed(scenes):
    stream = scenes.scenes("salient", "val", start=3)
    assert [next(stream).seed for _ in range(2)] == [3, 4]


def test_splits_share_no_photograph(scenes):
    names = {split: set(scenes.photographs(split)) for split in scenes.SPLITS}
    assert sum(map(len, names.values())) == len(set().union(*names.values())) >= 40


@pytest.mark.contract
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_photograph_is_large_enough(scenes, split):
    assert all(min(scenes.photograph(name).size) >= 300 for name in scenes.photographs(split))


@pytest.mark.parametrize("field, arguments", [("variant", ("loud", "val", 0)), ("split", ("salient", "dev", 0))])
def test_unknown_names_are_refused(scenes, field, arguments):
    with pytest.raises(ValueError, match=f"{field} must be one of .* got '(loud|dev)'"):
        scenes.make_scene(*arguments)


def test_drawn_things_are_apart_and_off_the_axes(drawn):
    for scene in drawn:
        boxes = [item.box for item in scene.objects + scene.texts]
        for index, (left, top, right, bottom) in enumerate(boxes):
            assert 0 <= left < right <= 336 and 0 <= top < bottom <= 336
            assert min(abs(left + right - 336), abs(top + bottom - 336)) >= 40
            for other in boxes[:index]:
                assert left >= other[2] or other[0] >= right or top >= other[3] or other[1] >= bottom


def test_objects_are_where_the_boxes_say(scenes, monkeypatch):
    """Drawing the same scene without its objects changes pixels inside the boxes only."""
    scene = scenes.make_scene("context", "val", 5)
    monkeypatch.setattr(scenes, "_draw_objects", lambda *arguments: None)
    bare = scenes.make_scene("context", "val", 5)
    changed = (np.asarray(scene.image) != np.asarray(bare.image)).any(-1)
    for item in scene.objects:
        left, top, right, bottom = item.box
        assert changed[top:bottom, left:right].mean() > 0.2
        changed[top:bottom, left:right] = False
    assert not changed.any()


def test_answers_follow_from_the_contents(scenes, drawn):
    for scene in drawn:
        counts = Counter(item.name for item in scene.objects)
        single = {item.name: item for item in scene.objects if counts[item.name] == 1}
        bands = {item.name: (item.colour, material) for item, material in scene.bands}
        for question in scenes.ask(scene):
            template, word = question.words
            if template == "presence":
                assert question.answer == ("yes" if counts[word] else "no")
            elif template == "count":
                assert question.answer == str(counts[word]) and 1 <= counts[word] <= 3
            elif template == "where":
                left, top, right, bottom = single[word].box
                vertical = "top" if (top + bottom) / 2 < 168 else "bottom"
                assert question.answer == f"{vertical} {'left' if (left + right) / 2 < 168 else 'right'}"
            elif template == "colour":
                assert question.answer == (bands[word][0] if word in bands else single[word].colour)
            elif template == "material":
                assert question.answer == bands[word][1]
            elif template == "behind":
                top, bottom = single[word].box[1::2]
                inside = [m for band, m in scene.bands if band.box[1] <= top and bottom <= band.box[3]]
                assert question.answer == (inside[0] if inside else "photograph")
            else:
                assert question.answer in [text.name for text in scene.texts]
                assert question.answer.isdigit() == (template == "digit")


def test_every_kind_is_asked_and_presence_is_balanced(scenes, drawn):
    kinds = Counter(question.kind for scene in drawn for question in scenes.ask(scene))
    assert set(kinds) == set(scenes.KINDS)
    answers = Counter(q.answer for scene in drawn for q in scenes.ask(scene) if q.kind == "presence")
    assert answers["yes"] == answers["no"] > 0


def test_only_context_has_bands(scenes, drawn):
    for scene in drawn:
        assert bool(scene.bands) == (scene.variant == "context")


def test_rephrasing_keeps_the_thing_asked_for(scenes, drawn):
    for question in scenes.ask(drawn[0]):
        words = {scenes.rephrase(question, random.Random(seed)) for seed in range(20)}
        assert question.text in words and len(words) == 2
        assert all(question.words[1] in text for text in words)
