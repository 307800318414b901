"""
A family is a declaration: the stock classes of a model with a compressing `get_image_features`.

Upstream's own `get_image_features` runs, and a family says only what upstream does not know: which of the features
that go into the prompt form one view (image, tile, crop or frame), and where tokens are compared: in the vision tower
as in the paper (`encoding.py`), or as they enter the language model (`connector.py`). Heads, Auto classes, signatures
and conversions follow from that.
"""

import functools
import inspect
import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils import logging

from .checks import resolve_budget
from .compression import CompressedModelMixin
from .generation import CompressedGenerationMixin
from .hub import AutoModelMixin, HubModelMixin
from .methods import reads_question
from .upstream import PIXELS, like_upstream


_OVERRIDES = ("forward", "get_image_features", "get_video_features", "get_rope_index")

logger = logging.get_logger(__name__)

NumVisualTokens: TypeAlias = int | float | list[int] | torch.LongTensor | None


class PrunedModelMixin(CompressedModelMixin, HubModelMixin):
    """
    For a stock base model (vision tower, projector and language model): a [`TowerModelMixin`] or a
    [`BehindConnectorModelMixin`]. Modifications:
        - `get_image_features` and `get_video_features` return the features of the kept tokens alone, with
          `keep_indices`, a list of ascending indices into upstream's T tokens of each input (-1 for a CLS token, which
          upstream leaves out), and `num_placeholders`, T of each.
        - `forward` drops the placeholders of the other tokens from the prompt.

    All of them take `num_visual_tokens` (`int`, `float`, `list[int]` or `torch.LongTensor` of shape `(num_inputs,)`,
    *optional*), N of the call in place of `config.prunesid_config.budget`; a list has one total for each input. They
    raise a `ValueError` for an invalid budget or layer, a tower that cannot give what the configuration asks for, and
    a prompt that has neither T nor N placeholders for each input.
    """

    _auto_class = "AutoModel"
    # The modalities whose features upstream's `forward` reads as one tensor, and not as a list.
    pools_tensor: Sequence[str] = ()
    # Further arguments of ours that `forward` and `get_*_features` take, which `views` reads.
    own_arguments: Sequence[str] = ()
    # The modalities of which each view is a run of placeholders of its own, with tags or text between them.
    views_apart: Sequence[str] = ()
    # Of upstream's code: the modalities whose encoder gets all further arguments of `forward`.
    _shown: Sequence[str] = ()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls._auto_map = {"AutoModel": cls.__name__}
        _take_signatures(cls)
        stock = stock_class(cls)
        if stock is not None:  # no mixin of several families
            cls._shown = [name for name in PIXELS if _hands_on_arguments(stock, f"get_{name}_features")]

    @property
    def reads_question(self) -> bool:
        """Whether the tokens that are kept depend on the question of the prompt."""
        self.config.check_settings()  # a later turn has no views, whose budgets would be checked
        return reads_question(self.config.prunesid_config)

    def is_off(self, num_visual_tokens: NumVisualTokens) -> bool:
        """Whether nothing is to be dropped, whatever the input."""
        return num_visual_tokens is None and self.config.prunesid_config.budget is None

    def patch_counts(self, modality: str, inputs: dict[str, Any]) -> list[list[int]]:
        """How many patches each frame of each input has, by the pixels; an image is a single frame."""
        pixels, patch_size = self._pixels(modality, inputs), self.config.vision_config.patch_size
        patch_size = patch_size if isinstance(patch_size, int) else patch_size[0]
        num_patches = (pixels.shape[-2] // patch_size) * (pixels.shape[-1] // patch_size)
        return [[num_patches] * (pixels.shape[1] if pixels.dim() == 5 else 1)] * len(pixels)

    def _pixels(self, modality: str, inputs: dict[str, Any]) -> torch.Tensor:
        names = ("pixel_values_videos",) if modality == "video" else ("pixel_values", "pixel_values_images")
        return next(inputs[name] for name in names if inputs.get(name) is not None)

    def tokens_of_an_image(self) -> int | None:
        """T, where it is the same for every image; with it, prompts whose image was forgotten are recognised."""
        return None

    def runs_of(self, modality: str, views: list[list[int]], inputs: dict[str, Any]) -> list[list[int]] | None:
        return views if modality in self.views_apart else None

    def are_whole_views(self, run_lengths: list[int]) -> bool:
        """Whether runs of so many placeholders each stand for whole images; False where a family cannot tell."""
        full = self.tokens_of_an_image()
        if full is None:
            return False
        short = min(resolve_budget(self.config.prunesid_config.budget, full), full)
        return any(all(length % tokens == 0 for length in run_lengths) for tokens in (full, short))

    def get_image_features(self, *, num_visual_tokens: NumVisualTokens = None, **inputs):
        """Upstream's, of the kept tokens alone. See [`PrunedModelMixin`]."""
        return self._encode("image", super().get_image_features, num_visual_tokens, inputs)

    def get_video_features(self, *, num_visual_tokens: NumVisualTokens = None, **inputs):
        """Upstream's, of the kept tokens alone. See [`PrunedModelMixin`]."""
        return self._encode("video", super().get_video_features, num_visual_tokens, inputs)

    def forward(self, *, num_visual_tokens: NumVisualTokens = None, **inputs):
        """Upstream's `forward` on the shortened prompt. See [`PrunedModelMixin`]."""
        return self.forward_compressed(self._forward_stock, num_visual_tokens=num_visual_tokens, **inputs)

    def _forward_stock(self, mm_encoder_outputs=None, **inputs):
        outputs = dict(mm_encoder_outputs or {})
        for modality in outputs.keys() & set(self.pools_tensor):
            output = outputs[modality]
            if not isinstance(output.pooler_output, torch.Tensor):
                views = list(output.pooler_output)
                is_equal = len({len(view) for view in views}) == 1
                joined = torch.stack(views) if is_equal else torch.cat(views)[None]
                outputs[modality] = type(output)(**{**output, "pooler_output": joined})
        return super().forward(mm_encoder_outputs=outputs or None, **inputs)

    def requests(self, inputs: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """A list of totals is for the images and then for the videos."""
        found, totals = super().requests(inputs), inputs.get("num_visual_tokens")
        is_list = isinstance(totals, (list, tuple)) or (isinstance(totals, torch.Tensor) and totals.dim() == 1)
        if is_list and len(found) == 2:
            num_images = self.num_images(inputs)
            found["image"]["num_visual_tokens"] = totals[:num_images]
            found["video"]["num_visual_tokens"] = totals[num_images:]
        return found

    def num_images(self, inputs: dict[str, Any]) -> int:
        """How many images there are among the arguments of `forward`."""
        names = ("image_grid_thw", "target_sizes", "image_sizes", "pixel_values", "pixel_values_images")
        return len(next(inputs[name] for name in names if inputs.get(name) is not None))

    def shows_encoder(self, modality: str) -> bool:
        return modality in self._shown

    def encode_kept(self, modality: str, encode, num_visual_tokens: NumVisualTokens, inputs, given) -> Any:
        """
        Upstream's output for the kept tokens; all of it if nothing is to be dropped.

        Args:
            modality (`str`), encode (`Callable`), inputs (`dict`): upstream's encoder, and what it is called with.
            num_visual_tokens: what the caller asks for in place of the configured budget.
            given (`dict`): what our method was called with.
        """
        raise NotImplementedError

    def _encode(self, modality: str, encode, num_visual_tokens: NumVisualTokens, inputs: dict[str, Any]):
        return_dict, given = inputs.get("return_dict"), inputs
        inputs = {name: value for name, value in inputs.items() if name not in self.own_arguments}
        inputs["return_dict"] = True
        if isinstance(inputs.get("image_sizes"), torch.Tensor) and not self.is_off(num_visual_tokens):
            inputs["image_sizes"] = inputs["image_sizes"].cpu()  # once, as upstream reads them one by one
        if self.is_off(num_visual_tokens):
            output = encode(**inputs)
        else:
            output = self.encode_kept(modality, encode, num_visual_tokens, inputs, given)
        if vars(self).pop("_says_what_it_keeps", False):
            self._say_what_is_kept(modality, output)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _say_what_is_kept(self, modality: str, output: Any) -> None:
        sizes = output.get("num_placeholders")
        if sizes:
            kept = [len(own) for own in output["keep_indices"]]
            logger.warning(f"PruneSID keeps {kept[0]} of {sizes[0]} visual tokens of the first {modality}.")
        else:
            logger.warning(f"PruneSID keeps all visual tokens of the first {modality}s: the budget is not below them.")


class PrunedGenerationMixin(CompressedGenerationMixin, HubModelMixin):
    """
    For a stock model with a language-modelling head. Modifications:
        - `model` is the family's [`PrunedModelMixin`].
        - `forward` and `generate` shorten the prompt at their entrance, labels included.
    """

    _auto_class = "AutoModelForImageTextToText"
    # The family's base model.
    model_class: Any = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.model_class is not None:
            cls.config_class = cls.model_class.config_class
        _take_signatures(cls)

    def __init__(self, config):
        super().__init__(config)
        self.model.__class__ = self.model_class  # the same modules; only methods are added

    def get_image_features(self, *, num_visual_tokens: NumVisualTokens = None, **inputs):
        """See [`PrunedModelMixin`]."""
        return self.model.get_image_features(num_visual_tokens=num_visual_tokens, **inputs)

    def get_video_features(self, *, num_visual_tokens: NumVisualTokens = None, **inputs):
        """See [`PrunedModelMixin`]."""
        return self.model.get_video_features(num_visual_tokens=num_visual_tokens, **inputs)

    def forward(self, *, num_visual_tokens: NumVisualTokens = None, **inputs):
        """
        Upstream's `forward` on the shortened prompt. See [`PrunedModelMixin`].

        Returns:
            Upstream's output. Where the prompt was shortened it also has `keep_mask`, of shape `(batch, full_length)`:
            the columns of the caller's prompt that remain. A dropped column has the logits and hidden states of the
            last one before it that remains. Attentions and caches have the short length.
        """
        return self.forward_compressed(super().forward, num_visual_tokens=num_visual_tokens, **inputs)


def stock_class(cls: type) -> Any:
    """The model class that a class of ours extends; None for a mixin."""
    ours = (CompressedModelMixin, CompressedGenerationMixin)
    models = (base for base in cls.__mro__ if issubclass(base, PreTrainedModel))
    return next((base for base in models if not issubclass(base, ours)), None)


def register_family(head: Any, processor: type | None = None) -> type:
    """
    What follows from a family's class with a head: the class that `AutoModel` makes of its repos, their `auto_map`,
    the processor that is saved with them, and the conversions by which stock checkpoints load, which Transformers
    looks up by the names of classes and model types.

    Returns:
        The Auto model class. It goes into the family's file as `PruneSID<Family>AutoModel`.
    """
    model, module = getattr(head, "model_class", head), inspect.getmodule(head)
    name, auto_model = head.__name__, head
    if model is not head:
        name = model.__name__.removesuffix("Model") + "AutoModel"
        members = {"__module__": module.__name__, "__doc__": AutoModelMixin.__doc__}
        auto_model = type(name, (AutoModelMixin, model), {**members, "_base_class": model, "_generating_class": head})
    head._auto_map = {
        "AutoModel": name,
        "AutoModelForImageTextToText": head.__name__,
        "AutoModelForMultimodalLM": head.__name__,
    }
    # Without the packages that it needs, Transformers has but a placeholder for a stock processor.
    head._processor_class = None if getattr(processor, "is_dummy", False) else processor
    if head._processor_class is not None:
        processor.has_mrope = hasattr(model, "has_text_axis")
        processor.has_deepstack = "deepstack" in inspect.getsource(stock_class(model))
        processor.is_mm_prefix_lm = getattr(head.config_class, "is_mm_prefix_lm", False)
    for ours in {head, model}:
        stock = stock_class(ours)
        names = {ours.__name__: stock.__name__, ours.config_class.model_type: stock.config_class.model_type}
        for own, theirs in names.items():
            mapping = get_checkpoint_conversion_mapping(theirs)
            if mapping is not None:
                register_checkpoint_conversion_mapping(own, mapping, overwrite=True)
    return auto_model


def _take_signatures(cls: Any) -> None:
    """Gives `cls` copies of our mixins' methods with the arguments of the stock methods that they override."""
    stock = stock_class(cls)
    further = getattr(getattr(cls, "model_class", cls), "own_arguments", ())
    for name in _OVERRIDES:
        owner = next(base for base in cls.__mro__ if name in vars(base)) if hasattr(stock, name) else cls
        if owner is cls or issubclass(owner, PreTrainedModel):
            continue
        method = vars(owner)[name]
        copy = functools.wraps(method)(lambda self, _method=method, **inputs: _method(self, **inputs))
        setattr(cls, name, like_upstream(getattr(stock, name), further)(copy))
    if stock is not None and not hasattr(cls, "reads_logits_to_keep"):
        cls.reads_logits_to_keep = "logits_to_keep" in inspect.signature(stock.forward).parameters


def _hands_on_arguments(stock: Any, name: str) -> bool:
    """Whether upstream's `forward` calls its method `name` with all further arguments that it was given."""
    _, *calls = inspect.getsource(stock.forward).split(f"self.{name}(")
    for call in calls:
        depths = itertools.accumulate({"(": 1, ")": -1}.get(letter, 0) for letter in call)
        end = next(place for place, depth in enumerate(depths) if depth < 0)
        if "**kwargs" in call[:end]:
            return True
    return False
