"""
Processors that write short prompts: one placeholder for each kept token.

A fixed budget is known before any image is seen, so engines that size prompts up front, static caches and exporters
can have prompts of the final length. Each run of placeholders that the stock processor writes is shortened, and the
text between them (tags, breaks, timestamps) stays. For a dynamic budget of each view the full prompt is written, which
the models accept as well.
"""

import inspect
import re
from typing import Any, TypedDict

import numpy as np
import torch
from transformers import PretrainedConfig
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessorMixin, VideosKwargs

from .budgets import request_budgets, share_total
from .checks import warn_once
from .configuration_prunesid import PruneSIDConfig, check_budget
from .methods import reads_question
from .parts import QUESTION, THIN, missing_part, missing_thin
from .runs import share_over_runs


OF_VIDEOS = "num_visual_tokens_of_videos"
FULL_PROMPTS = "full"  # asks for them by name, in place of a budget
_TYPED_DICT: Any = TypedDict
_BUDGET_ARGUMENTS = ("num_visual_tokens", "budget_scope", "min_budget", "dynamic", "mrope_positions", "question")
# What is returned as one number for each input, whatever its rows of pixels are.
_OF_INPUTS = ("num_visual_tokens", "num_tiles", "num_video_tiles")
_MOST_TOKENS = 1_000_000  # that a request can ask for: more than any input has


class VariantProcessorMixin:
    """For a processor that is published with a model."""

    # The thin variant that it was loaded from.
    _thin_variant: str | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *, base_trust_remote_code: bool = False, **kwargs):
        """
        Upstream's `from_pretrained`. That of a thin variant is its base's processor with the variant's budget;
        `revision`, `subfolder` and `trust_remote_code` are said of the variant alone. None is the saved budget.

        Args:
            base_trust_remote_code (`bool`, defaults to `False`):
                Also run Python files of the base of a thin variant, where its tokenizer or image processor has some.

        Raises:
            `ValueError`: if the base needs Python files of its own, or `processor_config.json` of the variant does not
                hold what it should.
        """
        check_request(kwargs.get("num_visual_tokens"))
        names = cls._budget_arguments()
        kwargs = {name: value for name, value in kwargs.items() if name not in names or value is not None}
        name, load, trust = pretrained_model_name_or_path, super().from_pretrained, base_trust_remote_code
        processor = load(name, **kwargs) if THIN is None else THIN.load_processor(load, name, names, trust, kwargs)
        # Upstream hands a processor's arguments to its tokenizer too, whose copy would outrank what is set later.
        for name in names:
            processor.tokenizer.init_kwargs.pop(name, None)
        return processor

    @classmethod
    def get_processor_dict(cls, name, **kwargs):
        """Upstream's. `ValueError` for that of a thin variant, in a repo that does not load them."""
        fields, kwargs = super().get_processor_dict(name, **kwargs)
        if THIN is None and fields.get("base_model_name_or_path") is not None:
            raise missing_thin(name)
        return fields, kwargs

    @classmethod
    def arguments_for(cls, settings: PretrainedConfig) -> dict:
        """The arguments of a processor that fits a model with these settings (`PruneSIDConfig`)."""
        varies = settings.dynamic and settings.budget_scope == "view"
        values = {
            "num_visual_tokens": None if varies else settings.budget,
            "budget_scope": getattr(settings, "budget_scope", "view"),
            "min_budget": getattr(settings, "min_budget", None),
            "dynamic": varies,
            "mrope_positions": getattr(settings, "mrope_positions", "original"),
            "question": hasattr(settings, "method") and reads_question(settings),
        }
        return {name: values[name] for name in cls._budget_arguments()}

    @classmethod
    def _budget_arguments(cls) -> list[str]:
        parameters = inspect.signature(cls.__init__).parameters
        return [name for name in _BUDGET_ARGUMENTS if name in parameters]


class PrunedProcessorMixin(VariantProcessorMixin):
    r"""
    For a stock processor. It writes a placeholder for each kept token and returns their numbers as
    `num_visual_tokens`, a tensor of shape `(num_images + num_videos,)` that the model obeys: first the images, then
    the videos.

    Args:
        num_visual_tokens (`int`, `float` or `"full"`, *optional*):
            The `budget` of the model's `prunesid_config`. `"full"` (for a dynamic budget of each view, or off) writes
            the full prompts of the stock processor, which leave the budget to the model, and is what None means here.
            A call may pass another value; None in a call, and in `from_pretrained`, is the saved one.
        budget_scope (`"view"` or `"image"`, defaults to `"view"`), min_budget (`int`, *optional*):
            Those of the model's `prunesid_config`.
        dynamic (`bool`, defaults to `False`), mrope_positions (`str`, defaults to `"original"`):
            Whether the model gives each view a dynamic budget of its own, and its `mrope_positions`: what engines
            that size prompts cannot serve, see [`~PrunedProcessorMixin._get_num_multimodal_tokens`].
        question (`bool`, defaults to `False`):
            Whether the model chooses tokens by the question: then a `question_mask` of shape `(batch, length)` says
            which columns of `input_ids` are the words of each row's last question, see `QuestionReader`.

    Raises:
        `ValueError`: for an invalid budget, or a chat template in which questions cannot be found.
    """

    # Whether the family's model has three-dimensional positions, hands visual features to later layers of the language
    # model too (deepstack), and lets placeholders see those behind them. `register_family` says so.
    has_mrope = has_deepstack = is_mm_prefix_lm = False
    # Whether the model chooses tokens by the question, and what finds it.
    question = False
    _question_reader: Any = None

    _auto_class = "AutoProcessor"

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        processors = (base for base in cls.__mro__[1:] if issubclass(base, ProcessorMixin))
        stock = next((base for base in processors if not issubclass(base, VariantProcessorMixin)), None)
        if stock is None:  # a mixin of several families
            return

        def __init__(
            self,
            *args,
            num_visual_tokens=None,
            budget_scope="view",
            min_budget=None,
            dynamic=False,
            mrope_positions="original",
            question=False,
            **kwargs,
        ):
            num_visual_tokens = None if _is_full(num_visual_tokens) else num_visual_tokens
            check_budget(num_visual_tokens, name="num_visual_tokens")
            settings = PruneSIDConfig(
                budget=num_visual_tokens,
                budget_scope=budget_scope,
                min_budget=min_budget,
                mrope_positions=mrope_positions,
            )
            self.num_visual_tokens, self.budget_scope = settings.budget, settings.budget_scope
            self.min_budget, self.dynamic = settings.min_budget, bool(dynamic)
            self.mrope_positions = settings.mrope_positions
            if question:  # not saved by processors that do not read it
                self.question = True
            stock.__init__(self, *args, **kwargs)

        signature = inspect.signature(stock.__init__)
        ours = list(inspect.signature(__init__).parameters.values())[2:-1]
        theirs = list(signature.parameters.values())
        if theirs[-1].kind is not theirs[-1].VAR_KEYWORD:
            theirs.append(inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD))
        # Upstream reads the names of a processor's parts and settings from its signature.
        __init__.__signature__ = signature.replace(parameters=[*theirs[:-1], *ours, theirs[-1]])
        cls.__init__ = __init__
        cls.valid_processor_kwargs = _with_budget(stock.valid_processor_kwargs)

    @classmethod
    def validate_init_kwargs(cls, processor_config, valid_kwargs):
        """Upstream's, for the arguments in the signature; upstream reads them from code that only passes them on."""
        return super().validate_init_kwargs(processor_config, [*inspect.signature(cls.__init__).parameters][1:-1])

    @classmethod
    def from_args_and_dict(cls, args, processor_dict, **kwargs):
        """Upstream's, with a caller's own parts (vLLM's `tokenizer=`) in place of those that were loaded."""
        names = [*inspect.signature(cls.__init__).parameters][1 : 1 + len(args)]
        args = [kwargs.pop(name, part) for name, part in zip(names, args)]
        return super().from_args_and_dict(args, processor_dict, **kwargs)

    def view_lengths(self, modality: str, inputs: dict, index: int, runs: list[int]) -> list[int]:
        """
        The tokens of each view of one input.

        Args:
            modality (`str`): `"image"` or `"video"`.
            inputs (`dict`): what the stock image or video processor returned.
            index (`int`): which of its inputs.
            runs (`list[int]`): the lengths of the runs of placeholders that the stock processor writes for it.

        Returns:
            `list[int]`: one behind the other, with the sum of `runs`. By default each run is a view.
        """
        return runs

    # Whether a share of a view is taken of the largest of them, because the others may lack rows of padding.
    _has_padded_views = False

    def _placeholder(self, modality: str) -> str:
        """The placeholder as text; some families begin an image in a prompt by another token."""
        token_id = getattr(self, f"{modality}_token_id", None)
        return (
            getattr(self, f"{modality}_token") if token_id is None else self.tokenizer.convert_ids_to_tokens(token_id)
        )

    def _kept_of_views(self, views: list[int], num_visual_tokens: int | float | None) -> list[int] | None:
        """N of each view of one input; None where nothing is dropped."""
        if self._writes_full(num_visual_tokens):
            return None
        own_budget = None if _is_full(self.num_visual_tokens) else self.num_visual_tokens
        settings = PruneSIDConfig(budget=own_budget, budget_scope=self.budget_scope, min_budget=self.min_budget)
        full_view = max(views) if self._has_padded_views else None
        budgets = request_budgets(settings, num_visual_tokens, [views], full_view)
        return None if budgets is None else share_total(budgets.totals[0], [1.0] * len(views), views)

    def _shorten(
        self, text: str, modality: str, inputs: dict, index: int, num_visual_tokens: int | float | None
    ) -> str:
        """The text that stands for one input, with its runs of placeholders shortened."""
        token, runs = self._placeholder(modality), self._runs(text, modality)
        views = self.view_lengths(modality, inputs, index, runs)
        kept = self._kept_of_views(views, num_visual_tokens)
        if kept is None:
            return text
        kept_of_runs = iter(share_over_runs(runs, views, kept))
        return re.sub(f"(?:{re.escape(token)})+", lambda run: token * next(kept_of_runs), text)

    def _runs(self, text: str, modality: str) -> list[int]:
        """
        The lengths of the runs of placeholders in the text that stands for one input.

        Raises:
            `ValueError`: if there are none, because the processor and its tokenizer name other placeholders.
        """
        token = self._placeholder(modality)
        runs = [len(run) // len(token) for run in re.findall(f"(?:{re.escape(token)})+", text)]
        if not runs:
            raise ValueError(
                f"The stock processor writes {text[:80]!r} for this {modality}, which does not hold the placeholder "
                f"{token!r} of {type(self).__name__}. Set `tokenizer.{modality}_token` and "
                f"`tokenizer.{modality}_token_id` to what the checkpoint's tokenizer has."
            )
        return runs

    def _process_images(self, images, num_visual_tokens: int | float | None = None, **kwargs):
        inputs, texts = super()._process_images(images, **kwargs)
        return self._write("image", inputs, texts, num_visual_tokens)

    def _process_videos(self, videos, num_visual_tokens: int | float | None = None, **kwargs):
        inputs, texts = super()._process_videos(videos, **kwargs)
        return self._write("video", inputs, texts, num_visual_tokens)

    def _write(self, modality: str, inputs: dict, texts: list[str], num_visual_tokens: int | float | None):
        """The stock processor's texts, shortened, and what it returns besides, with the budget of each input."""
        texts = [self._shorten(text, modality, inputs, index, num_visual_tokens) for index, text in enumerate(texts)]
        if not self._writes_full(num_visual_tokens):
            name = "num_visual_tokens" if modality == "image" else OF_VIDEOS
            inputs[name] = [text.count(self._placeholder(modality)) for text in texts]
        return inputs, texts

    def __call__(self, *args, **kwargs):
        for arguments in (kwargs, kwargs.get("images_kwargs"), kwargs.get("videos_kwargs")):
            check_request((arguments or {}).get("num_visual_tokens"))
        output = super().__call__(*args, **kwargs)
        of_images, of_videos = output.get("num_visual_tokens"), output.pop(OF_VIDEOS, None)
        if of_videos is not None and of_images is not None:
            is_tensor = isinstance(of_videos, torch.Tensor)
            of_videos = torch.cat([torch.as_tensor(of_images), of_videos]) if is_tensor else [*of_images, *of_videos]
        if of_videos is not None:
            output["num_visual_tokens"] = of_videos
        # vLLM, which asks where each input's text is, gives an input its rows of pixels of a tensor, and of a list its
        # entry. Chats whose answers are marked ask for it too, with the offsets of their tokens.
        if kwargs.get("return_text_replacement_offsets") and not kwargs.get("return_offsets_mapping"):
            for name in _OF_INPUTS:
                if isinstance(output.get(name), torch.Tensor):
                    output[name] = list(output[name])
        if not self.question or "input_ids" not in output:
            return output
        if QUESTION is None:
            raise missing_part("question=True")
        return QUESTION.mark(self, output)

    def _merge_kwargs(self, ModelProcessorKwargs=None, *args, **kwargs):
        """Upstream's. PaliGemma's processor of Transformers 5.18 names its own arguments, without ours."""
        return super()._merge_kwargs(self.valid_processor_kwargs, *args, **kwargs)

    def _get_num_multimodal_tokens(self, image_sizes=None, num_visual_tokens=None, **kwargs) -> MultiModalData:
        """
        Upstream's counts of tokens for images of these sizes, less the placeholders that are not written. Engines call
        it when they start.

        Raises:
            `ValueError`: for an invalid budget, and for models that engines cannot serve.
        """
        check_request(num_visual_tokens)
        self._check_is_served(num_visual_tokens)
        if not hasattr(super(), "_get_num_multimodal_tokens"):
            raise ValueError(
                "Engines that size prompts before they see an image cannot serve this model: the stock processor of "
                f"{type(self).__name__} does not say how many tokens an image gets. Use `prunesid generate`."
            )
        data = super()._get_num_multimodal_tokens(image_sizes=image_sizes, **kwargs)
        if data.num_image_tokens is not None:
            settings = self._merge_kwargs(self.valid_processor_kwargs, **kwargs)["images_kwargs"]
            data.num_image_tokens = [
                tokens - self._num_dropped_of_size(tokens, size, num_visual_tokens, settings)
                for tokens, size in zip(data.num_image_tokens, image_sizes)
            ]
        return data

    def _check_is_served(self, num_visual_tokens: int | float | None) -> None:
        """Raise a `ValueError` for what engines, which load weights and size prompts themselves, fail at later."""
        if self._thin_variant is not None:
            raise THIN.not_served(self._thin_variant)
        if self.has_deepstack:
            raise ValueError(
                "vLLM's Transformers backend cannot serve this model: it gives the language model what enters its "
                "first layer alone, without the deepstack features of later ones. Use `transformers serve`."
            )
        if self.is_mm_prefix_lm:
            warn_once(
                "placeholders that see each other",
                "The placeholders of an image see each other in this model, but not in vLLM on CPUs; in PaliGemma so "
                "do the words of a prompt, but never in vLLM. Its answers can differ from those of `generate`.",
            )
        advice = "Engines that size prompts before they see an image cannot serve this model"
        if self.dynamic:
            raise ValueError(
                f"{advice}: prunesid_config.dynamic=True with budget_scope='view' gives each view a budget by what it "
                "shows. Save the model with budget_scope='image', whose totals are exact, or with dynamic=False."
            )
        if self.question and not self._writes_full(num_visual_tokens):
            raise ValueError(
                f"{advice}: prunesid_config.method_settings['question'] makes the tokens of an image depend on text "
                "behind it, and engines share those of a prefix. Save the model with question=False."
            )
        if self.has_mrope and self.mrope_positions == "original" and not self._writes_full(num_visual_tokens):
            raise ValueError(
                f"{advice}: with prunesid_config.mrope_positions='original' positions follow from which tokens are "
                "kept. Save the model with mrope_positions='contiguous'."
            )

    def _num_dropped_of_size(self, num_tokens: int, size, num_visual_tokens, settings: dict) -> int:
        views = self.view_lengths_of_size(num_tokens, size)
        if views is None:
            images, *_ = self.prepare_inputs_layout(images=[np.zeros((*size, 3), dtype=np.uint8)])
            inputs, [text] = super()._process_images(images, **settings)
            runs = self._runs(text, "image")
            num_tokens, views = sum(runs), self.view_lengths("image", inputs, 0, runs)
        kept = self._kept_of_views(views, num_visual_tokens)
        return 0 if kept is None else num_tokens - sum(kept)

    def view_lengths_of_size(self, num_tokens: int, image_size: tuple[int, int]) -> list[int] | None:
        """
        As `view_lengths`, of an image of this height and width that the stock processor writes `num_tokens` for, where
        a family can tell without its image processor; None runs that on an empty image.
        """
        return None

    @property
    def model_input_names(self) -> list[str]:
        names = super().model_input_names
        names = names if self._writes_full(None) else [*names, "num_visual_tokens"]
        return [*names, "question_mask"] if self.question else names

    def _writes_full(self, num_visual_tokens: int | float | str | None) -> bool:
        """Whether a call with this budget gets full prompts."""
        return _is_full(self.num_visual_tokens if num_visual_tokens is None else num_visual_tokens)


def _is_full(num_visual_tokens: Any) -> bool:
    return num_visual_tokens is None or (isinstance(num_visual_tokens, str) and num_visual_tokens == FULL_PROMPTS)


def check_request(num_visual_tokens: Any) -> None:
    """
    Raise a `ValueError` for what a request must not ask for, before upstream raises errors of other types. None is the
    saved budget, and `"full"` asks for full prompts.
    """
    if _is_full(num_visual_tokens):
        return
    check_budget(num_visual_tokens, name="num_visual_tokens")
    if num_visual_tokens > _MOST_TOKENS:
        raise ValueError(
            f"num_visual_tokens must be at most {_MOST_TOKENS}, got {num_visual_tokens}. Write 1.0 to keep all tokens."
        )


def _with_budget(upstream: Any) -> Any:
    """Upstream's type of keyword arguments, with `num_visual_tokens` for images and for videos."""
    fields = dict(upstream.__annotations__)
    for name, default in (("images_kwargs", ImagesKwargs), ("videos_kwargs", VideosKwargs)):
        own = fields.get(name, default)
        fields[name] = _TYPED_DICT(
            own.__name__, {**own.__annotations__, "num_visual_tokens": int | float | str | None}, total=False
        )
    extended = _TYPED_DICT(upstream.__name__, fields, total=False)
    extended._defaults = getattr(upstream, "_defaults", {})
    return extended
