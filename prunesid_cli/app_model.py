"""The one model behind the page: what it keeps of a picture, and its answers as they are written."""

import contextlib
import hashlib
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import AutoProcessor, StoppingCriteria, StoppingCriteriaList

from modeling_prunesid import PruneSIDForImageTextToText, explain
from modeling_prunesid.methods import DEFAULT_METHOD
from modeling_prunesid.upstream import cache_of
from modeling_prunesid.visualize import Explanation
from prunesid_cli.generate import ask


MAX_NEW_TOKENS = 48
REMEMBERED = 64  # explanations


class Choice(NamedTuple):
    """What a visitor chose. `budget` None keeps all; `dynamic` gives busy pictures more of it and plain ones less."""

    budget: int | None
    method: str = DEFAULT_METHOD
    dynamic: bool = False


@dataclass
class Answer:
    """
    An answer while it is written. The numbers are None until they are known.

    Attributes:
        text (`str`): so far.
        visual_tokens (`int`, *optional*): what the language model read of the picture.
        first_token_seconds (`float`, *optional*): tower, selection and prefill.
        cache_bytes (`int`, *optional*): keys and values after the last token.
    """

    text: str = ""
    visual_tokens: int | None = None
    first_token_seconds: float | None = None
    cache_bytes: int | None = None


class AppModel:
    """
    A model and its processor, used by one caller at a time.

    Args:
        name (`str`, *optional*): a checkpoint of a declared family, or a variant; the embedded model by default.
        pictures (`list[Image.Image]`): typical ones. The mean of their information is what a dynamic budget is
            measured against, where the model has no `reference_information`.
    """

    def __init__(self, name: str | None, pictures: list[Image.Image]):
        self.name = name
        if name is None:
            from prunesid_cli.embedded import complete

            name = str(complete())
        device_map = "auto" if torch.cuda.is_available() else None
        self.model = PruneSIDForImageTextToText.from_pretrained(
            name, dtype="auto", device_map=device_map, trust_remote_code=False
        ).eval()
        self.processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        if hasattr(self.processor, "num_visual_tokens"):
            self.processor.num_visual_tokens = None  # full prompts, which any budget accepts
        settings = self.model.config.prunesid_config
        self.own_method, self.own_method_settings = settings.method, settings.method_settings
        self.own_budget, self.own_reference = settings.budget, settings.reference_information
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._seen: OrderedDict[Any, Explanation] = OrderedDict()
        seen = [self.look(picture, Choice(1)) for picture in pictures]
        self.grid, self.is_cropped = seen[0].grid, seen[0].is_cropped
        self.num_patches = self.grid[0] * self.grid[1]
        self.reference = self.own_reference or sum(1 - float(one.rho or 0) for one in seen) / len(seen)
        for _ in self.answer(pictures[0], "what is in the picture?", Choice(1, self.own_method)):
            pass  # the first run of all is slower than those that are shown

    def settings_of(self, choice: Choice) -> dict[str, Any]:
        """The fields of `prunesid_config` that make a choice."""
        fields: dict[str, Any] = {"budget": choice.budget, "method": choice.method}
        if self.own_method_settings and choice.method != self.own_method:
            fields["method_settings"] = None
        if choice.dynamic:
            fields |= {"dynamic": True, "reference_information": self.reference}
        return fields

    def look(self, picture: Image.Image, choice: Choice) -> Explanation:
        """
        What is kept of a picture, and why.

        Raises:
            `ValueError`: if the budget keeps all, or the method does not fit the model.
        """
        digest = hashlib.sha256(picture.tobytes()).hexdigest(), picture.size, choice
        if digest not in self._seen:
            self._stop.set()  # what still runs has been left by its visitor: the queue lets one in at a time
            with self._lock, self._settled(choice):
                self._seen[digest] = explain(self.model, self.processor, picture)
            while len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)
        return self._seen[digest]

    def answer(self, picture: Image.Image, question: str, choice: Choice) -> Iterator[Answer]:
        """
        The greedy answer, again and again as it grows; the last one has all numbers. A new call, or the end of the
        iteration, stops the model after its next token.
        """
        self._stop.set()
        self._stop = stop = threading.Event()
        events: queue.Queue = queue.Queue()

        def work() -> None:
            try:
                with self._lock, self._settled(choice):
                    self._generate(picture, question, stop, events)
                events.put(None)
            except Exception as error:
                events.put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            while (event := events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            stop.set()

    def unknown_words(self, question: str) -> list[str]:
        """Words of a question that the tokenizer has no tokens for."""
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        unknown = getattr(tokenizer, "unk_token_id", None)
        words = question.replace("?", " ").replace(".", " ").split()
        if unknown is None:
            return []
        return [word for word in words if unknown in tokenizer(word, add_special_tokens=False)["input_ids"]]

    @contextlib.contextmanager
    def _settled(self, choice: Choice):
        settings = self.model.config.prunesid_config
        before = {name: getattr(settings, name) for name in ("budget", "method", "dynamic", "reference_information")}
        own = settings.method_settings
        try:
            settings.method_settings = own if choice.method == self.own_method else None
            for name, value in ({"dynamic": False} | self.settings_of(choice)).items():
                setattr(settings, name, value)
            yield
        finally:
            settings.method_settings = None
            for name, value in before.items():
                setattr(settings, name, value)
            settings.method_settings = own

    @torch.no_grad()
    def _generate(self, picture: Image.Image, question: str, stop: threading.Event, events: queue.Queue) -> None:
        inputs = ask(self.processor, picture, question).to(self.model.device, self.model.dtype)
        found, tokens, lengths = Answer(), [], []

        class Streamer:
            def put(self, ids: torch.Tensor) -> None:
                if ids.dim() > 1:  # the prompt
                    return
                if found.first_token_seconds is None:
                    found.first_token_seconds = time.perf_counter() - start
                    found.visual_tokens = lengths[0] - inputs["input_ids"].shape[1] + placeholders
                tokens.extend(ids.tolist())
                found.text = decode(tokens)
                events.put(Answer(**vars(found)))

            def end(self) -> None:
                """The caller sees the end by the return of `generate`."""

        class Stop(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return torch.full((len(input_ids),), stop.is_set(), device=input_ids.device)

        def decode(ids: list[int]) -> str:
            return self.processor.decode(ids, skip_special_tokens=True).strip()

        placeholders = int((inputs["input_ids"] == self.model.config.image_token_id).sum())
        hook = self.model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
        start = time.perf_counter()
        try:
            output = self.model.generate(
                **inputs,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                streamer=Streamer(),
                stopping_criteria=StoppingCriteriaList([Stop()]),
                return_dict_in_generate=True,
            )
        finally:
            hook.remove()
        found.cache_bytes = cache_bytes(cache_of(output))
        events.put(found)


def cache_bytes(cache: Any) -> int:
    """The bytes of the keys and values of all layers."""
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
