"""
Selection that knows the question: `method_settings={"question": True}`, ours and not the paper's.

The words of a row's question weigh the tokens of its images: `relevance`. A `Question` finds the words in the prompt
while its views are encoded, and a `QuestionReader` of the processor says which columns they are. A repository whose
method does not read the question does not have this file.
"""

import math
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from .context import ASKED, VIEWS_AT_ONCE
from .exact import cross, is_batched, mean_of_whole, squares, without_autocast
from .prompts import IGNORED_LABEL
from .similarity import RESOLUTION, inverse_lengths, within_one


@torch.no_grad()
def relevance(tokens: torch.Tensor, words: torch.Tensor, lengths: list[int] | None = None) -> torch.Tensor:
    """
    How near each token is to the question.

    The cosine of a token with each word, less that word's mean over the view: a word that is near all tokens says
    nothing. Of the words the nearest counts. The least relevant token of a view has 0 and the most relevant one 1; in
    a view without words, or whose tokens are all alike, each has 1. Non-finite tokens have 0 and take no part. It is
    computed in integers: the same bits in any batch and on any device.

    Args:
        tokens (`torch.Tensor` of shape `(views, tokens, hidden_size)`): as the language model gets them.
        words (`torch.Tensor` of shape `(views, words, hidden_size)`): embeddings of words. Zeros are no word.
        lengths (`list[int]`, *optional*): tokens of each view, where views are padded.

    Returns:
        `torch.FloatTensor` of shape `(views, tokens)`, in [0, 1].
    """
    views, most, _ = tokens.shape
    size = VIEWS_AT_ONCE if is_batched(tokens) else 1
    parts = []
    with without_autocast(tokens.device):
        for first in range(0, views, size):
            own = tokens[first : first + size]
            valid = None
            if lengths is not None and set(lengths) != {most}:
                ends = torch.tensor(lengths[first : first + size]).to(tokens.device, non_blocking=True)
                valid = torch.arange(most, device=tokens.device) < ends[:, None]
            parts.append(_relevance(own, words[first : first + size].to(tokens.device), valid))
    return torch.cat(parts)


def _relevance(tokens: torch.Tensor, words: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    _, scaled, finite = within_one(tokens, valid)
    _, asked, are_words = within_one(words)
    lengths = squares(asked)
    are_words = are_words & (lengths > 0)
    cosines = cross(scaled, asked) * inverse_lengths(squares(scaled))[..., None] * inverse_lengths(lengths)[:, None]
    # In whole steps of 2^-20 the mean is a sum of whole numbers: no order of summation changes it.
    steps = (cosines * RESOLUTION).round() * finite[..., None]
    steps = steps - mean_of_whole(steps, finite.sum(1)[:, None, None].clamp(min=1), 1)
    nearest = steps.masked_fill(~are_words[:, None], -math.inf).amax(2)
    low = nearest.masked_fill(~finite, math.inf).amin(1, keepdim=True)
    high = nearest.masked_fill(~finite, -math.inf).amax(1, keepdim=True)
    differ = (high > low) & low.isfinite()
    scaled = (nearest - low) / torch.where(differ, high - low, 1.0)
    return torch.where(differ, scaled, 1.0).masked_fill(~finite, 0.0)


class Question:
    """
    What the rows of a prompt ask, while their views are encoded.

    Args:
        words (`torch.Tensor` of shape `(batch, words, hidden_size)`): embeddings of the words; zeros are none.
        placeholders (`dict[str, list[list[int]]]`):
            For each modality how many placeholders each row has: of all, and of those that may be in no cache yet.
    """

    def __init__(self, words: torch.Tensor, placeholders: dict[str, list[list[int]]]):
        self.words, self.placeholders = words, placeholders
        self.modality = ""
        # The rows of the inputs of each modality, as they were taken, and as their features have shown that they are.
        self.taken: dict[str, list[int]] = {}
        self.found: dict[str, list[int]] = {}

    def weigh(
        self, tokens: torch.Tensor, lengths: list[int], num_tokens: Sequence[Sequence[int]], totals: list[int]
    ) -> torch.Tensor:
        """
        The relevance `(views, tokens)` of projected tokens `(views, tokens, hidden_size)` for the question of the row
        that each input stands in. The others are those of `choose_tokens`.
        """
        rows = self.found.get(self.modality)
        if rows is None:
            rows = self._guess_rows([sum(own) for own in num_tokens], totals)
        self.taken[self.modality] = rows
        of_views = [row for row, own in zip(rows, num_tokens) for _ in own]
        if tokens.shape[-1] != self.words.shape[-1]:
            raise ValueError(
                f"method_settings['question'] compares tokens with word embeddings, which have {tokens.shape[-1]} and "
                f"{self.words.shape[-1]} features in this model. Set it to False."
            )
        words = self.words
        if of_views != list(range(len(words))):
            words = words[torch.tensor(of_views).to(words.device, non_blocking=True)]
        return relevance(tokens.detach(), words, lengths)

    def _guess_rows(self, sizes: list[int], totals: list[int]) -> list[int]:
        """
        The row of each input, by the tokens that it has or keeps. Upstream may write more placeholders than that (ends
        of lines), which `check` finds out.
        """
        candidates = self.placeholders[self.modality]
        for counts in candidates:
            for own in (sizes, totals):
                rows = rows_of_inputs(own, counts)
                if rows is not None:
                    return rows
        counts, share = candidates[0], sum(candidates[0]) / max(sum(sizes), 1)
        ends, end, rows = torch.tensor(counts).cumsum(0).tolist(), 0.0, []
        for size in sizes:
            middle = (end + size / 2) * share
            rows.append(next((row for row, last in enumerate(ends) if middle < last), len(counts) - 1))
            end += size
        return rows

    def check(self, outputs: dict[str, Any]) -> bool:
        """Whether each input was weighed by its own row; if not, the right rows are known from then on."""
        is_right = True
        for modality, rows in self.taken.items():
            output = outputs[modality]
            sizes, kept = output.get("num_placeholders"), output.get("keep_indices")
            if not sizes:
                continue
            readings = (
                rows_of_inputs(own, counts)
                for counts in self.placeholders[modality]
                for own in (sizes, [len(indices) for indices in kept])
            )
            right = next((reading for reading in readings if reading is not None), rows)
            is_right = is_right and right == rows
            self.found[modality] = right
        return is_right


def rows_of_inputs(sizes: list[int], counts: list[int]) -> list[int] | None:
    """The row of each input, where rows with so many placeholders hold whole inputs of these sizes; else None."""
    rows, row, held = [], 0, 0
    for size in sizes:
        while row < len(counts) and held == counts[row]:
            row, held = row + 1, 0
        if row == len(counts) or held + size > counts[row]:
            return None
        rows.append(row)
        held += size
    is_whole = row < len(counts) and held == counts[row] and not any(counts[row + 1 :])
    return rows if is_whole else None


@torch.compiler.disable
def encode_views_asked(model: Any, inputs: dict[str, Any], plan: Any, cache: Any) -> dict[str, Any]:
    """
    `model.encode_views` of the arguments of `forward`, whose `question_mask` `(batch, length)` marks the words of each
    row's question.

    Args:
        model: a [`CompressedModelMixin`].
        inputs (`dict`): arguments of `forward`, by name.
        plan (`Plan`): what was read of them.
        cache: that of keys and values among them, or None.

    Raises:
        `ValueError`: without a mask of that shape.
    """
    inputs = dict(inputs)
    mask, columns = inputs.pop("question_mask", None), inputs.get("input_ids")
    columns = columns if columns is not None else inputs["inputs_embeds"]
    if mask is None:
        raise ValueError(
            "method_settings['question'] chooses tokens by the words of each row's question, but question_mask=None "
            "does not say which these are. Take the model's own processor with question=True, which writes it, or "
            "pass a mask of shape (batch, length) with 1 for each of these words."
        )
    if not isinstance(mask, torch.Tensor) or mask.shape != columns.shape[:2]:
        got = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(
            f"question_mask must have the shape (batch, length) = {tuple(columns.shape[:2])} of the prompt, got "
            f"{got}. Pass a column for each of its columns."
        )
    is_word = plan.question
    for placeholders in plan.placeholders.values():
        is_word = is_word & ~placeholders
    with torch.no_grad():
        question = Question(_words_of(model, columns, is_word), _count(plan, cache))
    token = ASKED.set(question)
    try:
        encoded = model.encode_views(inputs)
        if not question.check(encoded.get("mm_encoder_outputs") or {}):
            encoded = model.encode_views(inputs)
    finally:
        ASKED.reset(token)
    return encoded


def _words_of(model: Any, columns: torch.Tensor, is_word: torch.BoolTensor) -> torch.Tensor:
    """Embeddings `(batch, words, hidden_size)` of the marked columns, zeros behind the words of shorter rows."""
    most = max(int(is_word.sum(1).max()), 1)
    places = (~is_word).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    given = is_word.gather(1, places).to(columns.device, non_blocking=True)
    places = places.to(columns.device, non_blocking=True)
    if columns.dim() == 3:
        words = columns.gather(1, places[..., None].expand(-1, -1, columns.shape[2]))
    else:
        words = columns.gather(1, places).masked_fill(~given, 0)
        words = model.get_input_embeddings()(words)
    return words.masked_fill(~given.to(words.device)[..., None], 0)


def _count(plan: Any, cache: Any) -> dict[str, list[list[int]]]:
    """Of each modality the placeholders of each row: all of them, and those behind what is in a cache."""
    starts, cached = [0], 0 if cache is None else int(cache.get_seq_length())
    if cached:
        earlier = getattr(cache, "_prunesid_prompt", None)
        starts.append(cached)
        if earlier is not None:
            starts.append(earlier.prompt.full_length + max(cached - earlier.prompt.length, 0))
    return {name: [own[:, start:].sum(1).tolist() for start in starts] for name, own in plan.placeholders.items()}


def check_kept(settings: Any, cache_name: str) -> None:
    """
    Raise a `ValueError` for a conversation that goes on, on a cache whose visual tokens were chosen for the question
    before, unless the settings say that these are kept.
    """
    if (settings.method_settings or {}).get("question") != "keep":
        raise ValueError(
            f"{cache_name} holds visual tokens that were chosen for an earlier question. Pass the whole conversation "
            "with its images and without the cache, which chooses anew, or set method_settings['question']='keep', "
            "which goes on with the earlier choice."
        )


class QuestionReader:
    """
    Which columns of a prompt are the words of its last question, for a processor.

    The last user's turn is what stands behind the last head of a user's turn, up to the tail that the chat template
    writes behind it; both are learnt from the processor's own template, filled with words that are known. Where the
    prompt has no head (it was written without the template), the whole prompt is the turn. Of the turn, the words are
    those behind its last placeholder, or before its first where none are behind it: no placeholders, special tokens
    or white space.

    Args:
        processor: a stock processor with a tokenizer.

    Raises:
        `ValueError`: for a chat template whose turns cannot be told from the words in them.
    """

    def __init__(self, processor: Any):
        self.template = _template_of(processor)
        self.head: list[int] = []
        self.tail: list[int] = []
        self._is_blank: dict[int, bool] = {}
        if self.template:
            self._learn(processor)

    def _learn(self, processor: Any) -> None:
        tokenizer = processor.tokenizer
        first, second = _two_words(tokenizer)

        def ids(*texts: str) -> list[int]:
            turns = [
                {"role": "assistant" if turn % 2 else "user", "content": [{"type": "text", "text": text}]}
                for turn, text in enumerate(texts)
            ]
            prompt = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=len(turns) % 2 == 1)
            return tokenizer(prompt, add_special_tokens=False)["input_ids"]

        one, three = ids(first), ids(first, first, first)
        begin, end = _where_they_differ(one, ids(second))
        answer, answer_end = _where_they_differ(three, ids(first, second, first))
        last, _ = _where_they_differ(three, ids(first, first, second))
        _, asked_end = _where_they_differ(three, ids(second, first, first))
        self.head = _common_end(one[:begin], three[answer_end:last])
        self.tail = _common_end(one[end:][::-1], three[asked_end:answer][::-1])[::-1]
        for prompt, words in (
            (one, [*range(begin, end)]),
            (three, [*range(last, last + end - begin)]),
            (ids(first, second), [*range(begin, end)]),
        ):
            if self.columns_of(tokenizer, prompt, set()) != words:
                raise ValueError(
                    "The chat template of the processor does not show where the words of a user begin and end, so "
                    "that question=True cannot find the question. Set it to False, and pass question_mask of shape "
                    "(batch, length) to the model."
                )

    def mask(self, processor: Any, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """1 for each word of the last question of each of the rows of ids, 0 for all else."""
        placeholders = _placeholders_of(processor)
        words = [set(self.columns_of(processor.tokenizer, list(row), placeholders)) for row in rows]
        return [[int(column in own) for column in range(len(row))] for row, own in zip(rows, words)]

    def columns_of(self, tokenizer: Any, ids: list[int], placeholders: set[int]) -> list[int]:
        """The columns of a row that are words of its last question."""
        begin = _find_last(ids, self.head)
        begin = 0 if begin is None else begin + len(self.head)
        end = _find_first(ids, self.tail, begin)
        turn = range(begin, len(ids) if end is None else end)
        places = [column for column in turn if ids[column] in placeholders]
        skipped = placeholders | set(tokenizer.all_special_ids)
        words = [column for column in turn if ids[column] not in skipped and not self._blank(tokenizer, ids[column])]
        behind = [column for column in words if not places or column > places[-1]]
        return behind if behind or not places else [column for column in words if column < places[0]]

    def _blank(self, tokenizer: Any, token: int) -> bool:
        if token not in self._is_blank:
            self._is_blank[token] = not tokenizer.decode([token]).strip()
        return self._is_blank[token]


def mark_question(processor: Any, output: Any) -> Any:
    """What the processor returns, with `question_mask`, in the form of its `input_ids`."""
    reader = processor._question_reader
    if reader is None or reader.template != _template_of(processor):
        reader = processor._question_reader = QuestionReader(processor)
    ids, labels = output["input_ids"], output.get("labels")
    rows = torch.as_tensor(ids).tolist() if not isinstance(ids, list) else ids
    is_single = bool(rows) and not isinstance(rows[0], list)
    mask: Any = reader.mask(processor, [rows])[0] if is_single else reader.mask(processor, rows)
    if not isinstance(ids, list):
        mask = torch.tensor(mask)
        if labels is not None:  # answers are no words of the question
            mask = mask * (torch.as_tensor(labels) == IGNORED_LABEL)
        mask = mask if isinstance(ids, torch.Tensor) else mask.numpy()
    output["question_mask"] = mask
    return output


def _placeholders_of(processor: Any) -> set[int]:
    """The ids of a processor's placeholders, by the names that upstream gives them."""
    tokenizer, found = processor.tokenizer, set()
    for modality in ("image", "video", "audio"):
        token = getattr(processor, f"{modality}_token", None)
        ids = [
            getattr(processor, f"{modality}_token_id", None),
            *(getattr(processor, f"{modality}_token_ids", None) or ()),
        ]
        if isinstance(token, str):
            ids.append(tokenizer.convert_tokens_to_ids(token))
        found |= {own for own in ids if isinstance(own, int)}
    return found - {tokenizer.unk_token_id}


def _two_words(tokenizer: Any) -> tuple[str, str]:
    """Two words of the vocabulary, of a single token each where it has such."""
    unknown, found = tokenizer.unk_token_id, []
    for word in ("red", "blue", *sorted(tokenizer.get_vocab(), key=len)):
        ids = tokenizer(word, add_special_tokens=False)["input_ids"] if word.isalnum() else []
        if ids and unknown not in ids and not set(ids) & set(tokenizer.all_special_ids):
            found.append(word)
        if len(found) == 2:
            return found[0], found[1]
    raise ValueError("question=True needs a tokenizer with two words. Set it to False.")


def _template_of(processor: Any) -> Any:
    return getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)


def _where_they_differ(ids: list[int], others: list[int]) -> tuple[int, int]:
    """Where what `ids` have in common with `others` before and behind a word ends and begins again."""
    shorter, first, last = min(len(ids), len(others)), 0, 0
    while first < shorter and ids[first] == others[first]:
        first += 1
    while last < shorter - first and ids[-1 - last] == others[-1 - last]:
        last += 1
    return first, len(ids) - last


def _common_end(ids: list[int], others: list[int]) -> list[int]:
    return list(os.path.commonprefix([ids[::-1], others[::-1]]))[::-1]


def _find_first(ids: list[int], part: list[int], start: int) -> int | None:
    places = range(start, len(ids) - len(part) + 1) if part else ()
    return next((place for place in places if ids[place : place + len(part)] == part), None)


def _find_last(ids: list[int], part: list[int]) -> int | None:
    places = range(len(ids) - len(part), -1, -1) if part else ()
    return next((place for place in places if ids[place : place + len(part)] == part), None)


# What the other files call; see `parts.py`.
PARTS = SimpleNamespace(encode_views=encode_views_asked, check_kept=check_kept, mark=mark_question)
