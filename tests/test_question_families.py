"""Selection that knows the question, in every family: each image has the question of its row, and nothing waits."""

import pytest
import tiny_llava_next as next_
import torch
from families import IMAGE, PAD, every_row
from oracle_family import build as build_row
from oracle_family import prompt as prompt_of_row
from oracle_family import rows_of
from oracle_waits import batch_of, pair, put
from oracle_waits import waits as count_waits

from modeling_prunesid.question import Question


ASKS = {"method": "spread", "method_settings": {"question": True}}


@torch.no_grad()
def test_rows_of_images_whose_placeholders_are_more_than_their_tokens():
    """Any-resolution images have ends of lines, so that the row of an image shows when it is encoded."""
    model, seen = next_.build(**ASKS), []
    check = Question.check

    def watch(self, outputs):
        is_right = check(self, outputs)
        seen.append((is_right, {**self.taken}, {**self.found}))
        return is_right

    inputs = next_.full_batch()
    mask = (inputs["input_ids"] != PAD) & (inputs["input_ids"] != IMAGE)
    expected = [row for row, (shown, _) in enumerate(next_.ROWS) for _ in shown]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Question, "check", watch)
        keep = model(**inputs, question_mask=mask.long()).keep_mask
        patch.setattr(Question, "_guess_rows", lambda self, sizes, totals: [0] * len(sizes))
        again = model(**inputs, question_mask=mask.long()).keep_mask
    assert seen[0][2]["image"] == seen[1][2]["image"] == expected
    assert seen[1][0] is False and torch.equal(again, keep)


@every_row()
@torch.no_grad()
def test_every_family_reads_the_question(name):
    ours, _, row = build_row(name)
    settings, rows = ours.config.prunesid_config, []
    kept = settings.method, settings.method_settings
    check = Question.check

    def watch(self, outputs):
        is_right = check(self, outputs)
        rows.append({**self.taken, **self.found}[row.modality])
        return is_right

    inputs = prompt_of_row(row)
    mask = torch.isin(inputs["input_ids"], torch.tensor([7, 8, 9])).long()
    try:
        settings.method, settings.method_settings = "spread", {"score": "component", "question": True}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Question, "check", watch)
            output = ours(**inputs, question_mask=mask)
        with pytest.raises(ValueError, match="question_mask=None"):
            ours(**inputs)
    finally:
        settings.method, settings.method_settings = kept
    assert rows[-1] == [place for place, own in enumerate(rows_of(row)) for _ in own]
    remaining = (inputs["input_ids"] == row.token) & output.keep_mask
    assert int(remaining.sum()) == sum(row.kept)


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_host_waits_no_oftener(call, count):
    found = []
    for settings in ({"method": "spread"}, ASKS):
        _, ours, _ = pair("LLaVA", **settings)
        inputs = batch_of(pair("LLaVA")[0], count)
        if settings is ASKS:
            inputs["question_mask"] = torch.isin(inputs["input_ids"], torch.tensor([7, 8, 9])).long()
        run, options = (ours, {}) if call == "forward" else (ours.generate, {"max_new_tokens": 1, "do_sample": False})
        given = {**put(inputs), **options}
        found.append(count_waits(lambda run=run, given=given: run(**given)))
    assert found[1].total() <= found[0].total(), found[1] - found[0]
