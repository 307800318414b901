"""Full prompts that were cut between two runs of placeholders, where what is left has as many as a short prompt."""

import itertools

import pytest
import torch
from families import ROWS, every_row
from oracle_family import base_of, batch, build, settings_of


def runs_of(row, index):
    """The lengths of the runs of placeholders that an input is written as."""
    written = row.write(row.tokens[index], index, row.token)
    return [len(list(ids)) for is_token, ids in itertools.groupby(id_ == row.token for id_ in written) if is_token]


def cut_behind(ids, token, num_placeholders):
    """The ids up to the run that begins behind so many placeholders."""
    seen = 0
    for column, id_ in enumerate(ids):
        if id_ == token and seen == num_placeholders:
            return ids[:column]
        seen += id_ == token
    return ids


@pytest.mark.parametrize("answer", [[], [7, 8]], ids=["cut", "answered"])
@every_row(lambda row: len(runs_of(row, 0)) > 1)
@torch.no_grad()
def test_a_prompt_cut_between_two_runs_is_no_short_one(name, answer):
    ours, _, row = build(name)
    runs = runs_of(row, 0)
    left = sum(runs[: (len(runs) + 1) // 2])
    ids = cut_behind([1, 5, *row.write(row.tokens[0], 0, row.token)], row.token, left) + answer
    inputs = batch([ids])
    arguments = {**inputs, **row.along(inputs["input_ids"]), **row.inputs([[0]])}
    assert (inputs["input_ids"] == row.token).sum() == left
    with settings_of(ours, budget=left, budget_scope="image"):
        assert base_of(ours).config.prunesid_config.budget == left
        with pytest.raises(ValueError, match="tokens do not match for certain"):
            ours(**arguments)
        with pytest.raises(ValueError, match="tokens do not match for certain"):
            ours.generate(**arguments, max_new_tokens=1)


def test_the_rows_of_several_runs_are_many():
    assert sum(len(runs_of(row, 0)) > 1 for row in ROWS.values()) > 30
