"""Kept tokens of pictures that come again, while what stands behind a frozen tower trains."""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_prunesid.encoding import TowerEncoding
from modeling_prunesid.tower import project_rows


LIMIT = 2 * 2**30


def is_alike_again(base: Any) -> bool:
    """Whether a picture's kept tokens are the same whenever it comes: the tower is frozen, without dropout."""
    if getattr(base, "encoding_class", None) is not TowerEncoding or "image" not in base.towers:
        return False
    tower = getattr(base, base.towers["image"])
    drops = [value for name, value in tower.config.to_dict().items() if "drop" in name and isinstance(value, float)]
    is_trained = any(own.requires_grad for own in tower.parameters())
    return not (is_trained or any(drops) or base.reads_question)


@contextmanager
def remembered_pictures(base: Any, limit: int = LIMIT) -> Iterator[None]:
    """
    Within, a base model's tower and selection run once for each picture, where that changes nothing: what enters the
    projector is kept, at most `limit` bytes of it. Elsewhere nothing is remembered.
    """
    if not is_alike_again(base):
        yield
        return
    known: dict[bytes, _Kept] = {}

    def build(*arguments: Any) -> TowerEncoding:
        while sum(kept.rows.nbytes for kept in known.values()) > limit:
            del known[next(iter(known))]
        found = _Remembering(known, *arguments)
        return found if found.is_by_picture() else TowerEncoding(*arguments)

    base.encoding_class = build
    try:
        yield
    finally:
        del base.encoding_class


class _Kept:
    """
    Args:
        rows (`torch.Tensor` of shape `(N, dim)`): what enters the projector, by `indices` `(N,)` into the patches.
        shape (`torch.Size`): `(tokens, dim)` of the tower's hidden states.
    """

    def __init__(self, rows: torch.Tensor, indices: torch.LongTensor, shape: torch.Size):
        self.rows, self.indices, self.shape = rows, indices, shape


class _Learning(TowerEncoding):
    """A run for one picture, whose kept rows are known afterwards."""

    def _choose_rows(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.LongTensor]:
        features, rows = super()._choose_rows(features)
        shape = self.states[self.feature_layers[0]].shape[1:]
        with torch.inference_mode(False):  # they take part in training, whoever met them first
            kept, indices = features.detach().flatten(0, 1).clone()[rows.clone()], self.indices[0].clone()
        self.kept = _Kept(kept, indices, shape)
        return features, rows


class _Remembering(TowerEncoding):
    """A run that takes the kept rows of each picture from `known`, after those that it lacks were learnt."""

    def __init__(self, known: dict[bytes, _Kept], model: Any, modality: str, num_visual_tokens: Any, inputs: dict):
        super().__init__(model, modality, num_visual_tokens, inputs)
        self.known, self.model, self.modality = known, model, modality

    def run(self, encode: Callable) -> Any:
        pixels = self.inputs["pixel_values"]
        totals = self.budgets.totals
        names = [_name(picture, total) for picture, total in zip(pixels, totals)]
        for place, name in enumerate(names):
            if name not in self.known:  # alone, because a tower rounds differently in other batches
                inputs = {**self.inputs, "pixel_values": pixels[place : place + 1]}
                learning = _Learning(self.model, self.modality, totals[place : place + 1], inputs)
                learning.run(encode)
                self.known[name] = learning.kept
        self.kept = [self.known[name] for name in names]
        with _idle(self.tower, len(pixels), self.kept[0]), project_rows(self.projector, self._choose_rows):
            output = encode(**self.inputs)
        return self._finish(output, None)

    def is_by_picture(self) -> bool:
        """Whether the inputs are pictures of one view each, of which a known number of tokens is chosen."""
        tensors = [name for name, value in self.inputs.items() if isinstance(value, torch.Tensor)]
        is_one_view = tensors == ["pixel_values"] and all(len(own) == 1 for own in self.views)
        is_chosen = self.expected_counts is not None and not any(self.is_whole)
        return is_one_view and is_chosen and not self.num_extra and not self.runs_whole

    def _choose_rows(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.LongTensor]:
        self.counts = [len(kept.indices) for kept in self.kept]
        self.indices = nn.utils.rnn.pad_sequence([kept.indices for kept in self.kept], batch_first=True)
        views, length = list(itertools.chain(*self.views)), features.shape[1]
        rows = torch.cat(
            [
                view.patches.to(features.device)[kept.indices] + place * length + self.num_prefix_rows
                for place, (view, kept) in enumerate(zip(views, self.kept))
            ]
        )
        values = torch.cat([kept.rows for kept in self.kept])
        return features.flatten(0, 1).index_copy(0, rows, values).view_as(features), rows


def _name(picture: torch.Tensor, total: int) -> bytes:
    pixels = picture.detach().contiguous().view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(pixels, digest_size=16).digest() + total.to_bytes(8, "big")


@contextmanager
def _idle(tower: nn.Module, batch: int, kept: _Kept) -> Iterator[None]:
    """Within, the tower does not run, and gives zeros."""
    zeros = kept.rows.new_zeros(1, *kept.shape).expand(batch, -1, -1)
    states = (zeros,) * (tower.config.num_hidden_layers + 1)
    own = vars(tower).get("forward")
    tower.forward = lambda *_, **__: BaseModelOutputWithPooling(zeros, zeros[:, 0], hidden_states=states)
    try:
        yield
    finally:
        del tower.forward
        if own is not None:
            tower.forward = own
