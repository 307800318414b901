"""
Choosing tokens in the vision tower, as the paper does, while upstream's own encoder runs.

Hooks read the hidden states that are compared when the tower has run; when the projector's turn comes, tokens are
chosen, and only the kept ones go through it.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch

from .budgets import Budgets, View, choose_tokens, request_budgets, view_information
from .tower import TowerStates, count_prefix, project_rows, resolve_layer, watch_tower


def as_views(views: list[int] | list[View]) -> list[View]:
    """Views given by their lengths, one behind the other, as [`View`]s."""
    if views and isinstance(views[0], int):
        rows = torch.arange(sum(views)).split(views)
        return [View(part) for part in rows]
    return list(views)


def with_rows(output: Any, images: list[torch.Tensor], kept: list[torch.LongTensor]) -> Any:
    """
    Upstream's output with some rows of each input alone, and which ones they are.

    Args:
        output (`ModelOutput`): upstream's.
        images (`list[torch.Tensor]`, each of shape `(T, hidden_size)`): the features of each input.
        kept (`list[torch.LongTensor]`): ascending rows of each.
    """
    sizes = [len(image) for image in images]
    output.pooler_output = [image[rows] for image, rows in zip(images, kept)]
    if output.get("deepstack_features") is not None:
        output.deepstack_features = [
            [view[rows.to(view.device)] for view, rows in zip(torch.cat(list(layer)).split(sizes), kept)]
            for layer in output.deepstack_features
        ]
    output["keep_indices"], output["num_placeholders"] = kept, sizes
    return output


class TowerEncoding:
    """
    One run of upstream's encoder.

    Args:
        model: a [`PrunedModelMixin`].
        modality (`str`): `"image"` or `"video"`.
        num_visual_tokens: what the caller asks for in place of the configured budget.
        inputs (`dict`): what upstream's method is called with.
    """

    def __init__(self, model: Any, modality: str, num_visual_tokens: Any, inputs: dict[str, Any]):
        self.inputs, self.settings = inputs, model.config.prunesid_config
        if self.keeps_fed:  # a PruneSIDConfig
            model.config.check_settings()
        self.projector = getattr(model, model.projector)
        self.lambda_of_a_share = model.lambda_of_a_share
        self.information = model.video_information if modality == "video" else view_information
        self.tower = getattr(model, model.towers[modality]) if model.towers else None
        self.num_prefix = self.num_fed = 0  # tokens before the patches: in the tower, and fed to the language model
        if self.tower is not None:
            self._find_layers(model, modality)
        self.has_own_cls = self.keeps_cls and self.num_fed < self.num_prefix
        self.num_fixed = self.num_fed if self.keeps_fed else 0
        self.num_extra = self.num_fixed + self.has_own_cls

        self.views = [self._lay_out(own) for own in model.views(modality, inputs, None)]
        self.num_tokens = [[len(view.rows) + self.num_fixed for view in own] for own in self.views]
        self.full_view = max(itertools.chain(*self.num_tokens), default=0)
        self.budgets: Budgets | None = request_budgets(
            self.settings, num_visual_tokens, self.num_tokens, self.full_view, self.num_extra
        )
        # The kept patches of each view of each input; None for an input that keeps all of its tokens.
        self.kept: list[list[torch.LongTensor] | None] = []

    def _lay_out(self, views: list[int] | list[View]) -> list[View]:
        """Views given by their patches, each behind the tokens before them, as [`View`]s."""
        if not isinstance(views[0], int):
            if self.num_fed:
                raise ValueError(
                    f"vision_feature_select_strategy leaves no whole grid of patches: the language model is fed "
                    f"{self.num_fed} tokens before them. Use 'default' for a tower with a CLS token, 'full' for one "
                    "without."
                )
            return list(views)
        laid, start = [], 0
        for length in views:
            patches = torch.arange(length)
            laid.append(View(patches + start + self.num_fed, patches))
            start += length + self.num_fed
        return laid

    def _find_layers(self, model: Any, modality: str) -> None:
        """Which hidden states are compared and which are projected; how many tokens come before the patches."""
        num_layers = self.tower.config.num_hidden_layers
        self.selection_layer = resolve_layer(self.settings.layer, num_layers, "prunesid_config.layer")
        layers = self.inputs.get("vision_feature_layer")
        layers = model.config.vision_feature_layer if layers is None else layers
        layers = [layers] if isinstance(layers, int) else layers
        self.feature_layers = [resolve_layer(layer, num_layers, "vision_feature_layer") for layer in layers]
        self.num_prefix = self.num_fed = count_prefix(self.tower)
        strategy = self.inputs.get("vision_feature_select_strategy") or model.config.vision_feature_select_strategy
        if strategy == "default" and modality == "image":
            self.num_fed = self.num_prefix - 1
        if self.num_fed < 0:
            raise ValueError(
                f"vision_feature_select_strategy='default' drops the first token, which is a patch in a "
                f"{self.tower.config.model_type} tower: it has no CLS token. Set it to 'full'."
            )
        if self.keeps_cls and not self.num_prefix:
            raise ValueError("prunesid_config.keep_cls=True needs a vision tower with a CLS token. Set it to False.")

    @property
    def keeps_cls(self) -> bool:
        """Whether the CLS token of a view is one of its N."""
        return self.settings.keep_cls

    # Tokens before the patches that upstream feeds to the language model (CLS of a frame, registers) stay within N.
    keeps_fed = True

    @property
    def needs_cls_attention(self) -> bool:
        """Whether tokens are ranked by the attention that the CLS token pays."""
        return self.settings.score == "cls_attention"

    @property
    def compares_projected(self) -> bool:
        """Whether tokens are compared as the language model would get them, so that all of them are projected."""
        return self.settings.quota == "spread"

    @property
    def runs_whole(self) -> bool:
        """Whether the caller wants more of the tower than selection needs."""
        return bool(self.inputs.get("output_hidden_states") or self.inputs.get("output_attentions"))

    def run(self, encode: Callable) -> Any:
        """Upstream's output for the kept tokens; all of it if nothing is to be dropped."""
        if self.budgets is None:
            return encode(**self.inputs)
        needs_hooks = self.tower is None or self.has_own_cls or self.needs_cls_attention or self.compares_projected
        if torch.compiler.is_compiling() and not needs_hooks:
            return self._run_without_hooks(encode)
        return self._run_watched(encode)

    def _run_without_hooks(self, encode: Callable) -> Any:
        """In a compiled graph, which does not look for hooks: all tokens are projected."""
        output = encode(**{**self.inputs, "output_hidden_states": True})
        compared = output.hidden_states[self.selection_layer][:, self.num_prefix :]
        self._choose(compared)
        return self._finish(output, None)

    @torch.compiler.disable
    def _run_watched(self, encode: Callable) -> Any:
        if self.tower is None:
            with project_rows(self.projector, self._choose_rows) as result:
                output = encode(**self.inputs)
            return self._finish(output, None)
        watched = watch_tower(
            self.tower,
            [*self.feature_layers, self.selection_layer],
            self.selection_layer if self.needs_cls_attention else None,
            self.runs_whole,
        )
        with watched as self.states, project_rows(self.projector, self._choose_rows) as result:
            output = encode(**self.inputs)
        return self._finish(output, result["projected"][:, 0] if self.has_own_cls else None)

    def _choose_rows(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.LongTensor]:
        """
        The rows that are projected, of all views' features `(views, tokens, dim)`, with the CLS tokens before them if
        these are kept and upstream left them out.
        """
        compared, attention = features[:, self.num_fed :], None
        if self.tower is not None:
            states: TowerStates = self.states
            compared = states.hidden_states[self.selection_layer][:, self.num_prefix :]
            if states.cls_attention is not None:
                attention = states.cls_attention[:, self.num_prefix :]
            if self.has_own_cls:
                cls = torch.cat([states.hidden_states[layer][:, :1] for layer in self.feature_layers], dim=-1)
                features = torch.cat([cls, features], dim=1)
        projected = None
        if self.compares_projected:
            with torch.no_grad():
                # One view at a time, because matrix products round differently in other batch sizes.
                projected = torch.cat([self.projector(view) for view in features[:, -compared.shape[1] :].split(1)])
        self._choose(compared, attention, projected)

        length, rows, first = features.shape[1], [], 0
        extra, before_patches = torch.arange(self.num_extra, device=features.device), self.num_fed + self.has_own_cls
        for own, kept in zip(self.views, self.kept):
            before = extra if kept is not None else extra[self.num_extra - self.num_fixed :]
            for index, view in enumerate(own):
                patches = view.patches if kept is None else kept[index]
                if len(view.rows):
                    start = (first + index) * length
                    rows += [before + start, patches.to(features.device) + start + before_patches]
            first += len(own)
        return features, torch.cat(rows)

    def _choose(
        self, compared: torch.Tensor, attention: torch.Tensor | None = None, projected: torch.Tensor | None = None
    ) -> None:
        """Chooses the patches of each view, from what is compared of all patches `(views, patches, dim)`."""
        first = 0
        for own, num_tokens, total in zip(self.views, self.num_tokens, self.budgets.totals):
            shown = [view.patches.to(compared.device) for view in own]

            def of_views(features, first=first, shown=shown):
                return None if features is None else [features[first + i][rows] for i, rows in enumerate(shown)]

            kept = None
            if self.budgets.rule == "reference" or total < sum(num_tokens):
                chosen = choose_tokens(
                    self.settings,
                    of_views(compared),
                    num_tokens,
                    total,
                    self.budgets.rule,
                    full_view=self.full_view,
                    extra_kept=self.num_extra,
                    lambda_of_a_share=self.lambda_of_a_share,
                    cls_attention=of_views(attention),
                    projected=of_views(projected),
                    information=self.information,
                )
                kept = [patches[rows] for patches, rows in zip(shown, chosen)]
            self.kept.append(kept)
            first += len(own)

    def _finish(self, output: Any, projected_cls: torch.Tensor | None) -> Any:
        """Takes the kept rows, and the CLS tokens `(views, hidden_size)`, out of upstream's output."""
        images = output.pooler_output
        if isinstance(images, torch.Tensor):
            images = images.reshape(len(self.views), -1, images.shape[-1])
        if not self.runs_whole:
            output = type(output)(**{name: value for name, value in output.items() if name != "hidden_states"})
        pooled, indices, first = [], [], 0
        for image, own, kept in zip(images, self.views, self.kept):
            rows = torch.arange(len(image), device=image.device)
            if kept is not None:
                rows, image = self._take(image, own, kept, projected_cls, first)
            pooled.append(image)
            indices.append(rows)
            first += len(own)
        output["num_placeholders"] = [len(image) for image in images]
        output.pooler_output, output["keep_indices"] = pooled, indices
        return output

    def _take(self, image, own, kept, projected_cls, first) -> tuple[torch.LongTensor, torch.Tensor]:
        """The ascending rows of `image` `(T, hidden_size)` that are kept, -1 for a CLS token, and their features."""
        rows, cls_rows = [], []
        for index, view in enumerate(own):
            if not len(view.rows):
                continue
            start = int(view.rows[0])
            rows.append(torch.arange(start - self.num_fixed, start))
            rows.append(view.rows[torch.searchsorted(view.patches, kept[index].cpu())])
            if projected_cls is not None:
                cls_rows.append((start - self.num_fixed if view.cls_at is None else view.cls_at, first + index))
        rows = torch.cat(rows).to(image.device)
        if not cls_rows:
            rows = rows.sort().values
            return rows, image[rows]
        places, sources = rows.new_tensor(cls_rows).T
        order = torch.cat([2 * places, 2 * rows + 1]).argsort(stable=True)
        features = torch.cat([projected_cls.to(image.device)[sources], image[rows]])
        return torch.cat([torch.full_like(places, -1), rows])[order], features[order]
