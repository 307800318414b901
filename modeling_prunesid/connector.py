"""
Choosing tokens as they enter the language model, behind upstream's own encoder: for towers whose connector mixes
tokens, or that have no CLS token.
"""

import inspect
import itertools
from typing import Any

import torch

from .budgets import Budgets, choose_tokens, request_budgets
from .family import NumVisualTokens, PrunedModelMixin, stock_class
from .methods import needs_of
from .parts import ATTENTION
from .views import View, as_views, keep_rows, kept_rows, put_merged, table_of


# In place of `num_visual_tokens`: all of them, where upstream's encoder of videos calls that of images.
_ALL_TOKENS: Any = object()


class BehindConnectorModelMixin(PrunedModelMixin):
    """For families whose tokens are compared as they enter the language model. See [`PrunedModelMixin`]."""

    # The path of the vision tower whose attention is read, where it is not called as in other families.
    tower_name: str | None = None
    # Whether upstream's encoder of videos calls that of images by the name that we override.
    _videos_are_images = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        encode = getattr(stock_class(cls), "get_video_features", None)
        cls._videos_are_images = encode is not None and "self.get_image_features(" in inspect.getsource(encode)

    def views(self, modality: str, inputs: dict[str, Any], sizes: list[int]) -> list[list[int]] | list[list[View]]:
        """
        The views of each input.

        Args:
            modality (`str`): `"image"` or `"video"`.
            inputs (`dict`): what our method was called with.
            sizes (`list[int]`): tokens of each entry of upstream's output, most often an input.

        Returns:
            For each input the tokens of each of its views, one view behind the other, or [`View`]s. Tokens of no view
            (newlines, separators) leave with the first token that is dropped. By default an input is a single view.
        """
        return [[size] for size in sizes]

    def sizes_of(self, modality: str, inputs: dict[str, Any]) -> list[int] | None:
        """Tokens of each entry of upstream's output, where they are known before its encoder runs."""
        merged = self.patches_per_token()
        return None if merged is None else [sum(own) // merged for own in self.patch_counts(modality, inputs)]

    def patches_per_token(self) -> int | None:
        """How many patches of the pixels become a token, where it is the same number for all."""
        return None

    def expected_counts(self, modality: str, inputs: dict[str, Any]) -> tuple[list[int], list[int]] | None:
        inputs = dict(inputs)
        requested, sizes = inputs.pop("num_visual_tokens", None), self.sizes_of(modality, inputs)
        if sizes is None:
            return None
        _, sizes, budgets = self._ask(modality, requested, inputs, sizes)
        return None if budgets is None else budgets.counts_of(sizes)

    def _ask(
        self, modality: str, num_visual_tokens: NumVisualTokens, inputs: dict[str, Any], sizes: list[int]
    ) -> tuple[Any, list[int], Budgets | None]:
        """The views of each input, all of its tokens, and what it may keep."""
        views: Any = self.views(modality, inputs, sizes)
        num_tokens = [[size if isinstance(size, int) else len(size.rows) for size in own] for own in views]
        if isinstance(views[0][0], int):
            sizes = [sum(own) for own in num_tokens]
        return views, sizes, request_budgets(self.config.prunesid_config, num_visual_tokens, num_tokens)

    def _encode(self, modality, encode, num_visual_tokens, inputs):
        if num_visual_tokens is _ALL_TOKENS:
            return encode(**{**inputs, "return_dict": True})
        return super()._encode(modality, encode, num_visual_tokens, inputs)

    def encode_kept(self, modality, encode, num_visual_tokens, inputs, given):
        self.config.check_settings()
        patches = None
        if modality == "video" and self._videos_are_images:
            inputs = {**inputs, "num_visual_tokens": _ALL_TOKENS}
        if "attention" in needs_of(self.config.prunesid_config):
            output, patches = ATTENTION.encode(self, modality, encode, inputs)
        else:
            output = encode(**inputs)
        return self.keep_tokens(modality, output, num_visual_tokens, given, patches)

    def patches_of(self, attention: torch.Tensor) -> torch.Tensor:
        """That of `attention` `(batch, tokens)` which patches receive: by default without what comes before them."""
        return attention[:, ATTENTION.num_prefix(self) :]

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
    ) -> Any:
        """
        Upstream's output with the kept rows alone, chosen by the features that enter the language model, and by the
        attention that the `patches` `(patches,)` of the tower receive, if the method reads it. lambda is 18 N/T where
        the configuration has none, in place of N/32, which the paper tuned for 576 CLIP tokens.
        """
        features = self.features_of(output)
        given, sizes, budgets = self._ask(modality, num_visual_tokens, inputs, [len(own) for own in features])
        if budgets is None:
            return output
        views = [as_views(own) for own in given]
        starts = itertools.accumulate(sizes, initial=0)
        rows = [view.rows + start for own, start in zip(views, starts) for view in own]
        table, lengths, whole = table_of(rows), [len(own) for own in rows], torch.cat(features)
        seen = {}
        if patches is not None:
            attention = self.pool_attention(patches, modality, inputs, sum(lengths)).split(lengths)
            seen["attention"] = torch.nn.utils.rnn.pad_sequence(attention, batch_first=True)
        compared = whole.detach()[table.to(whole.device, non_blocking=True)]
        indices, counts, merged = choose_tokens(
            self.config.prunesid_config, compared, lengths, budgets, seen=seen, lambda_of_share=True
        )
        replaced = [] if merged is None else [put_merged(whole, table, merged)]
        kept, of_inputs = kept_rows(views, sizes, budgets.is_whole, indices, counts)

        def keep(entries):  # first of what was compared, which a method may have merged
            features = replaced.pop() if replaced else torch.cat(list(entries))
            return list(keep_rows(features, sizes, kept, of_inputs)[0])

        output["keep_indices"] = list(keep_rows(whole, sizes, kept, of_inputs)[1])
        output["num_placeholders"] = sizes
        if isinstance(given[0][0], int):
            every = iter(counts)
            output["view_lengths"] = given
            output["num_kept_of_views"] = [[next(every) for _ in own] for own in views]
        self.put_features(output, keep)
        return output
