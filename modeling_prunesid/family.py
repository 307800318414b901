"""
A family is a declaration: the stock classes of a model with a compressing `get_image_features`.

Upstream's own `get_image_features` runs, and a family says only what upstream does not know: which of the features
that go into the prompt form one view (image, tile, crop or frame), and where tokens are compared, in the vision tower
as in the paper or as they enter the language model. Heads, Auto classes, signatures and conversions follow from that.
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

from .budgets import View, choose_tokens, request_budgets, view_information
from .checks import resolve_budget
from .compression import CompressedModelMixin
from .encoding import TowerEncoding, as_views, keep_rows, rows_of, rows_of_features, table_of
from .generation import CompressedGenerationMixin
from .hub import AutoModelMixin, HubModelMixin
from .methods import needs_of, reads_question
from .parts import ATTENTION
from .tower import count_prefix
from .upstream import PIXELS, like_upstream


# In place of `num_visual_tokens`: all of them, where upstream's encoder of videos calls that of images.
_ALL_TOKENS = object()
_OVERRIDES = ("forward", "get_image_features", "get_video_features", "get_rope_index")

logger = logging.get_logger(__name__)

NumVisualTokens: TypeAlias = int | float | list[int] | torch.LongTensor | None


class PrunedModelMixin(CompressedModelMixin, HubModelMixin):
    """
    For a stock base model (vision tower, projector and language model). Modifications:
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
    # The vision tower of each modality, where tokens are compared in it.
    towers: dict[str, str] = {}
    # The module that maps each token for itself, so that only kept tokens need to go through it. Without a tower,
    # tokens are compared as they enter it; without either, as they enter the language model. Not `projector`: that
    # is what several stock models call the module itself.
    projector_name: str | None = None
    # How tokens are chosen before the projector.
    encoding_class = TowerEncoding
    # Further arguments of ours that `forward` and `get_*_features` take, which `views` reads.
    own_arguments: Sequence[str] = ()
    # The path of the vision tower whose attention is read, where it is not called as in other families.
    tower_name: str | None = None
    # The modalities of which each view is a run of placeholders of its own, with tags or text between them.
    views_apart: Sequence[str] = ()
    # Of upstream's code: whether its encoder of videos calls that of images by the name that we override, and the
    # modalities whose encoder gets all further arguments of `forward`.
    _videos_are_images = False
    _shown: Sequence[str] = ()
    # What `dynamic` shares the total of a clip by.
    video_information = staticmethod(view_information)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls._auto_map = {"AutoModel": cls.__name__}
        _take_signatures(cls)
        stock = stock_class(cls)
        if stock is None:  # a mixin of several families
            return
        encode = getattr(stock, "get_video_features", None)
        cls._videos_are_images = encode is not None and "self.get_image_features(" in inspect.getsource(encode)
        cls._shown = [name for name in PIXELS if _hands_on_arguments(stock, f"get_{name}_features")]

    @property
    def reads_question(self) -> bool:
        """Whether the tokens that are kept depend on the question of the prompt."""
        return reads_question(self.config.prunesid_config)

    def is_off(self, num_visual_tokens: NumVisualTokens) -> bool:
        """Whether nothing is to be dropped, whatever the input."""
        return num_visual_tokens is None and self.config.prunesid_config.budget is None

    def views(
        self, modality: str, inputs: dict[str, Any], sizes: list[int] | None
    ) -> list[list[int]] | list[list[View]]:
        """
        The views of each input.

        Args:
            modality (`str`): `"image"` or `"video"`.
            inputs (`dict`): what our method was called with.
            sizes (`list[int]`, *optional*):
                Tokens of each entry of upstream's output, most often an input; None where tokens are compared in the
                tower, which has not run yet.

        Returns:
            For each input the tokens of each of its views, one view behind the other, or [`View`]s. Tokens of no view
            (newlines, separators) leave with the first token that is dropped. By default an input is a single view, or
            in a tower one for each frame.
        """
        if sizes is not None:
            return [[size] for size in sizes]
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
        # A tower that stops early has not even what upstream reads of it for itself, and returns unasked.
        stops_early = bool(self.towers) and not self.is_off(None)
        return stops_early or modality in self._shown

    def expected_counts(self, modality: str, inputs: dict[str, Any]) -> tuple[list[int], list[int]] | None:
        inputs, settings = dict(inputs), self.config.prunesid_config
        requested = inputs.pop("num_visual_tokens", None)
        if self.projector_name is not None:
            return self.encoding_class(self, modality, requested, inputs).expected_counts
        sizes = self.sizes_of(modality, inputs)
        if sizes is None:
            return None
        views = self.views(modality, inputs, sizes)
        lengths = [own if isinstance(own[0], int) else [len(view.rows) for view in own] for own in views]
        sizes = [sum(own) for own in lengths] if isinstance(views[0][0], int) else sizes
        budgets = request_budgets(settings, requested, lengths)
        if budgets is None or budgets.rule == "reference":
            return None
        whole = budgets.keep_all(lengths)
        return sizes, [size if all_of_it else total for size, total, all_of_it in zip(sizes, budgets.totals, whole)]

    def sizes_of(self, modality: str, inputs: dict[str, Any]) -> list[int] | None:
        """Tokens of each entry of upstream's output, where they are known before its encoder runs."""
        merged = self.patches_per_token()
        if merged is None:
            return None
        patches: Any = PrunedModelMixin.views(self, modality, inputs, None)
        return [sum(own) // merged for own in patches]

    def patches_per_token(self) -> int | None:
        """How many patches of the pixels become a token, where it is the same number for all."""
        return None

    def _encode(self, modality: str, encode, num_visual_tokens: NumVisualTokens, inputs: dict[str, Any]):
        return_dict, given = inputs.get("return_dict"), inputs
        inputs = {name: value for name, value in inputs.items() if name not in self.own_arguments}
        inputs["return_dict"] = True
        if isinstance(inputs.get("image_sizes"), torch.Tensor) and not self.is_off(num_visual_tokens):
            inputs["image_sizes"] = inputs["image_sizes"].cpu()  # once, as upstream reads them one by one
        if num_visual_tokens is _ALL_TOKENS:
            return encode(**inputs)
        if self.is_off(num_visual_tokens):
            output = encode(**inputs)
        elif self.projector_name is not None:
            output = self.encoding_class(self, modality, num_visual_tokens, inputs).run(encode)
        else:
            self.config.check_settings()
            is_nested = modality == "video" and self._videos_are_images
            arguments, patches = {**inputs, **({"num_visual_tokens": _ALL_TOKENS} if is_nested else {})}, None
            if "attention" in needs_of(self.config.prunesid_config):
                output, patches = ATTENTION.encode(self, modality, encode, arguments)
            else:
                output = encode(**arguments)
            output = self.keep_tokens(modality, output, num_visual_tokens, given, patches)
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

    def patches_of(self, attention: torch.Tensor) -> torch.Tensor:
        """That of `attention` `(batch, tokens)` which patches receive: by default without what comes before them."""
        return attention[:, count_prefix(ATTENTION.tower_of(self)) :]

    def patch_grids(self, modality: str, inputs: dict[str, Any], num_patches: int) -> torch.LongTensor | None:
        """
        Grids `(t, h, w)` of patches in raster order, of which each square is merged into a token; None where tokens
        are not merged from squares.
        """
        return None

    def pool_attention(
        self, patches: torch.Tensor, modality: str, inputs: dict[str, Any], num_tokens: int
    ) -> torch.Tensor:
        """
        The attention `(num_tokens,)` that the tokens of all views receive, of that of the patches `(patches,)` of the
        tower, in the tower's order. By default each token is a patch, or a square of `patch_grids`.

        Raises:
            `ValueError`: where no token is merged from patches of its own.
        """
        if len(patches) == num_tokens:
            return patches
        grids = self.patch_grids(modality, inputs, len(patches))
        if grids is None:
            raise ValueError(
                f"score='attention' is not declared for {type(self).__name__}: its {num_tokens} tokens are not merged "
                f"from patches of their own, of which the tower has {len(patches)}. Use score='component'."
            )
        return ATTENTION.pool(patches, grids, num_tokens)

    def keep_tokens(
        self,
        modality: str,
        output: Any,
        num_visual_tokens: NumVisualTokens,
        inputs: dict[str, Any],
        patches: torch.Tensor | None = None,
    ):
        """
        Upstream's output with the kept rows alone, chosen by the features that enter the language model, and by the
        attention that the `patches` `(patches,)` of the tower receive, if the method reads it. lambda is 18 N/T where
        the configuration has none, in place of N/32, which the paper tuned for 576 CLIP tokens.
        """
        settings, features = self.config.prunesid_config, self.features_of(output)
        sizes = [len(own) for own in features]
        given = self.views(modality, inputs, sizes)
        if not isinstance(given[0][0], View):
            sizes = [sum(own) for own in given]
        views = [as_views(own) for own in given]
        num_tokens = [[len(view.rows) for view in own] for own in views]
        budgets = request_budgets(settings, num_visual_tokens, num_tokens)
        if budgets is None:
            return output
        starts = list(itertools.accumulate(sizes, initial=0))
        rows = [view.rows + start for own, start in zip(views, starts) for view in own]
        table, lengths = table_of(rows), [len(own) for own in rows]
        compared, attention = torch.cat(features).detach(), None
        if patches is not None:
            attention = self.pool_attention(patches, modality, inputs, sum(lengths)).split(lengths)
            attention = torch.nn.utils.rnn.pad_sequence(attention, batch_first=True)
        indices, counts, merged = choose_tokens(
            settings,
            compared[table.to(compared.device, non_blocking=True)],
            lengths,
            num_tokens,
            budgets,
            seen={} if attention is None else {"attention": attention},
            lambda_of_share=True,
            information=self.video_information if modality == "video" else view_information,
        )
        if merged is not None:
            places = rows_of(table[merged.views], merged.indices, merged.counts)
            values = rows_of_features(merged.features, merged.counts)
            whole = torch.cat(features)
            features = whole.index_copy(0, places, values.to(whole.dtype)).split(sizes)
        kept = iter(counts)
        of_inputs = [sum(next(kept) for _ in own) for own in views]
        all_kept = zip(budgets.keep_all(num_tokens), num_tokens, sizes)
        is_whole = [whole and sum(own) < size for whole, own, size in all_kept]
        if any(is_whole):  # with their tokens of no view
            of_inputs = [size if whole else count for size, count, whole in zip(sizes, of_inputs, is_whole)]
            whole_of_view = [whole for own, whole in zip(views, is_whole) for _ in own]
            chosen = [0 if whole else count for count, whole in zip(counts, whole_of_view)]
            known = [torch.arange(start, start + size) for start, size, whole in zip(starts, sizes, is_whole) if whole]
            known = torch.cat(known).to(indices.device, non_blocking=True)
            rows = torch.cat([rows_of(table, indices, chosen), known])
        else:
            rows = rows_of(table, indices, counts)

        def keep(entries):
            return list(keep_rows(list(torch.cat(list(entries)).split(sizes)), rows, of_inputs)[0])

        output["keep_indices"] = list(keep_rows(list(compared.split(sizes)), rows, of_inputs)[1])
        output["num_placeholders"] = sizes
        if not isinstance(given[0][0], View):
            kept = iter(counts)
            output["view_lengths"] = given
            output["num_kept_of_views"] = [[next(kept) for _ in own] for own in views]
        self.put_features(output, keep)
        return output


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
