"""The one model behind the page: what it keeps of a picture or clip, and its answers as they are written."""

import contextlib
import functools
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
from transformers import StoppingCriteria, StoppingCriteriaList

from modeling_prunesid import PruneSIDForImageTextToText
from modeling_prunesid.methods import DEFAULT_METHOD, METHODS, module_of
from modeling_prunesid.upstream import cache_of
from modeling_prunesid.visualize import Explanation, explain_views
from prunesid_cli import baselines
from prunesid_cli.baselines.encoder import replaced
from prunesid_cli.clip_frames import ask_about_clip
from prunesid_cli.generate import ask, load_processor


MAX_NEW_TOKENS = 48
REMEMBERED = 64  # explanations
FEW = 4  # squares, of a look that is about the picture and not about what is kept
INSIDE = ("llm", "both")  # the places of methods that drop tokens inside the language model
Picture = Image.Image | tuple[Image.Image, ...]  # or the frames of a clip


class Choice(NamedTuple):
    """
    What a visitor chose. `budget` None keeps all; `method` is one for `prunesid_config.method`, or a compared one;
    `dynamic` gives busy pictures more of the budget and plain ones less.
    """

    budget: int | None
    method: str = DEFAULT_METHOD
    dynamic: bool = False

    @property
    def is_compared(self) -> bool:
        """Whether the method is one that `prunesid_cli.baselines.applied` installs."""
        return self.method not in METHODS

    @property
    def reads_question(self) -> bool:
        """Whether what is kept depends on the question."""
        compared = baselines.METHODS.get(self.method)
        return self.is_compared and compared is not None and (compared.reads_question or compared.place in INSIDE)


@dataclass
class Answer:
    """
    An answer while it is written. The numbers are None until they are known.

    Attributes:
        text (`str`): so far.
        visual_tokens (`int`, *optional*):
            What the language model read of the picture; the mean of its layers, of methods that drop inside it.
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
        self.processor = load_processor(name, self.model, trust_remote_code=False)
        if hasattr(self.processor, "num_visual_tokens"):
            self.processor.num_visual_tokens = None  # full prompts, which any budget accepts
        settings = self.model.config.prunesid_config
        self.own_method, self.own_method_settings = settings.method, settings.method_settings
        self.own_budget, self.own_reference = settings.budget, settings.reference_information
        # Whether a clip can be asked about as a whole, and not one of its frames.
        self.reads_clips = getattr(self.processor, "video_processor", None) is not None
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._seen: OrderedDict[Any, list[Explanation]] = OrderedDict()
        seen = [self.look(picture, Choice(FEW))[0] for picture in pictures]
        self.grid, self.is_cropped = seen[0].grid, seen[0].is_cropped
        self.has_one_grid = len({one.grid for one in seen}) == 1
        self.num_patches = self.grid[0] * self.grid[1]
        self.reference = self.own_reference or sum(1 - float(one.rho or 0) for one in seen) / len(seen)
        for _ in self.answer(pictures[0], "what is in the picture?", Choice(FEW, self.own_method)):
            pass  # the first run of all is slower than those that are shown

    def grid_of(self, picture: Picture) -> tuple[int, int]:
        """Rows and columns of the patches of a picture, or of each of its crops or tiles, or frames."""
        if self.has_one_grid and isinstance(picture, Image.Image):
            return self.grid
        return self.look(picture, Choice(FEW))[0].grid

    def fits(self, method: str, picture: Image.Image) -> bool:
        """Whether the model has what a method reads."""
        try:
            self.look(picture, Choice(FEW, method), "what is it?")
        except ValueError:
            return False
        return True

    def settings_of(self, choice: Choice) -> dict[str, Any]:
        """The fields of `prunesid_config` that make a choice; of a compared method, those that are off."""
        if choice.is_compared:
            return {"budget": None}
        fields: dict[str, Any] = {"budget": choice.budget, "method": choice.method}
        if choice.method == self.own_method:
            pass
        elif (
            hasattr(self.model.config, "_has_no_cls")
            and {"score", "keep_cls"} <= module_of(choice.method).DEFAULTS.keys()
        ):
            fields["method_settings"] = {"score": "component", "keep_cls": False}
        elif self.own_method_settings:
            fields["method_settings"] = None
        if choice.dynamic:
            fields |= {"dynamic": True, "reference_information": self.reference}
        return fields

    def look(self, picture: Picture, choice: Choice, question: str = "") -> list[Explanation]:
        """
        What is kept of a picture, or of each of its views (crops or tiles, frames of a clip), and why.

        Raises:
            `ValueError`: if the budget keeps all, or the method does not fit the model.
        """
        frames = (picture,) if isinstance(picture, Image.Image) else picture
        digest = hashlib.sha256(b"".join(frame.tobytes() for frame in frames)).hexdigest()
        key = digest, tuple(frame.size for frame in frames), choice, question * choice.reads_question
        if key not in self._seen:
            self._stop.set()  # what still runs has been left by its visitor: the queue lets one in at a time
            with self._lock, self._settled(choice):
                if choice.is_compared and not baselines.METHODS[choice.method].any_family:
                    self._seen[key] = [self._look_inside(picture, question or "what is it?")]
                else:
                    self._seen[key] = explain_views(self.model, self.processor, picture)
            while len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)
        return self._seen[key]

    @torch.no_grad()
    def _look_inside(self, picture: Picture, question: str) -> Explanation:
        """What reaches the last layer, of a method that looks into the tower, at the question or at the answer."""
        inputs = self._ask(picture, question)
        base, found = self.model.model, []
        encode = base.get_image_features

        @functools.wraps(encode)
        def watched(*args, **kwargs):
            found.append(encode(*args, **kwargs))
            return found[-1]

        with replaced(base, "get_image_features", watched):
            output = self.model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
        kept = found[0].get("keep_indices")
        kept = torch.arange(self.num_patches) if kept is None else kept[0].cpu()
        later = getattr(cache_of(output), "_prunesid_columns", None)
        if later is not None:  # columns of the shortened prompt
            first = int((inputs["input_ids"][0] == self.model.config.image_token_id).nonzero()[0])
            places = later.columns[max(later.columns)][0].cpu() - first
            kept = kept[places[(places >= 0) & (places < len(kept))]]
        return Explanation(kept[kept >= 0].unique(), None, None, None, self.grid, self.is_cropped)

    def answer(self, picture: Picture, question: str, choice: Choice) -> Iterator[Answer]:
        """
        The greedy answer, again and again as it grows; the last one has all numbers. A new call, or the end of the
        iteration, stops the model after its next token.
        """
        self._stop.set()
        self._stop = stop = threading.Event()
        events: queue.Queue = queue.Queue()

        def work() -> None:
            try:
                with self._lock, self._settled(choice) as run:
                    self._generate(picture, question, stop, events, run)
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
    def _settled(self, choice: Choice) -> Iterator[baselines.Run | None]:
        """Inside, the model runs as chosen. Yields what is measured where tokens are dropped in the language model."""
        if choice.is_compared:
            if choice.dynamic:
                raise ValueError(
                    "This method keeps as many squares of every picture. Untick “More for busy pictures”."
                )
            is_inside = choice.method in baselines.METHODS and baselines.METHODS[choice.method].place in INSIDE
            with baselines.applied(self.model, choice.method, choice.budget or 1.0) as run:
                yield run if is_inside else None
            return
        settings = self.model.config.prunesid_config
        before = {name: getattr(settings, name) for name in ("budget", "method", "dynamic", "reference_information")}
        own = settings.method_settings
        fields = {"dynamic": False, "method_settings": None} | self.settings_of(choice)
        if choice.method == self.own_method:
            fields["method_settings"] = own
        try:
            settings.method_settings = None
            for name in sorted(fields, key="method_settings".__eq__):  # after its method
                setattr(settings, name, fields[name])
            yield None
        finally:
            settings.method_settings = None
            for name, value in before.items():
                setattr(settings, name, value)
            settings.method_settings = own

    def _ask(self, picture: Picture, question: str) -> Any:
        if isinstance(picture, Image.Image):
            inputs = ask(self.processor, picture, question)
        else:
            inputs = ask_about_clip(self.processor, picture, question)
        return inputs.to(self.model.device, self.model.dtype)

    @torch.no_grad()
    def _generate(
        self, picture: Picture, question: str, stop: threading.Event, events: queue.Queue, run: baselines.Run | None
    ) -> None:
        inputs, config = self._ask(picture, question), self.model.config
        found, tokens, lengths = Answer(), [], []

        class Streamer:
            def put(self, ids: torch.Tensor) -> None:
                if ids.dim() > 1:  # the prompt
                    return
                if found.first_token_seconds is None:
                    found.first_token_seconds = time.perf_counter() - start
                    found.visual_tokens = lengths[0] - inputs["input_ids"].shape[1] + placeholders
                    if run is not None:
                        found.visual_tokens = round(run.measured_tokens)
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

        kinds = [getattr(config, f"{kind}_token_id", None) for kind in ("image", "video")]
        kinds = torch.tensor([kind for kind in kinds if kind is not None])
        placeholders = int(torch.isin(inputs["input_ids"].cpu(), kinds).sum())
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
