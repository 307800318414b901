"""
Choosing tokens in the vision tower, as the paper does, while upstream's own encoder runs.

Hooks read the hidden states that are compared when the tower has run; when the projector's turn comes, tokens are
chosen, and only the kept ones go through it.
"""

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import torch

from .budgets import Merged, choose_tokens, request_budgets
from .family import NumVisualTokens, PrunedModelMixin
from .layers import count_prefix, resolve_layer
from .methods import needs_of, options_of
from .parts import ATTENTION, CLS, OF_CLS
from .tower import project_rows, watch_tower
from .upstream import SHOWN, install_capturing
from .views import View, keep_rows, kept_rows, put_merged, rows_of, table_of


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
        asked = ((inputs.get(name), getattr(model.config, name, None)) for name in SHOWN)
        # Whether the caller wants more of the tower than selection needs.
        self.runs_whole = any(own if given is None else given for given, own in asked)
        if self.keeps_fed:  # a PruneSIDConfig
            model.config.check_settings()
        self.projector = getattr(model, model.projector_name)
        self.information = model.video_information if modality == "video" else None
        self.tower = getattr(model, model.towers[modality]) if model.towers else None
        self.num_prefix = self.num_fed = 0  # tokens before the patches: in the tower, and fed to the language model
        if self.tower is not None:
            self._find_layers(model, modality)
        elif "attention" in self.needs:
            raise ValueError(
                f"score='attention' is not declared for {type(model).__name__}, whose tokens are compared as they "
                "enter the projector. Use score='component'."
            )
        self.has_own_cls = self.keeps_cls and self.num_fed < self.num_prefix
        self.num_fixed = self.num_fed if self.keeps_fed else 0
        self.num_extra = self.num_fixed + self.has_own_cls

        views = model.views(modality, inputs, None)
        self.sizes = model.sizes_of(modality, inputs)  # T of each input, where it is known before the tower runs
        if self.sizes is None and all(isinstance(length, int) for own in views for length in own):
            self.sizes = [sum(own) + len(own) * self.num_fed for own in views]
        self.views = [self._lay_out(own) for own in views]
        self.num_tokens = [[len(view.rows) + self.num_fixed for view in own] for own in self.views]
        full_view = max([0, *itertools.chain(*self.num_tokens)])
        self.budgets: Any = request_budgets(
            self.settings, num_visual_tokens, self.num_tokens, full_view, self.num_extra
        )

    def _lay_out(self, views: list[int] | list[View]) -> list[View]:
        """Views given by their patches, each behind the tokens before them, as [`View`]s."""
        if not isinstance(views[0], int):
            if self.num_fed:
                raise ValueError(
                    f"vision_feature_select_strategy={self.strategy!r} leaves no whole grid of patches: the language "
                    f"model is fed {self.num_fed} tokens before them. Use 'default' for a tower with a CLS token, "
                    "'full' for one without."
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
        if OF_CLS & self.needs:
            CLS.check(self.tower)
        self.num_prefix = self.num_fed = count_prefix(self.tower)
        given = self.inputs.get("vision_feature_select_strategy")
        self.strategy = given or model.config.vision_feature_select_strategy
        if self.strategy == "default" and modality == "image":
            self.num_fed = self.num_prefix - 1
        if self.num_fed < 0:
            raise ValueError(
                f"vision_feature_select_strategy='default' drops the first token, which is a patch in a "
                f"{self.tower.config.model_type} tower: it has no CLS token. Set it to 'full'."
            )
        if self.keeps_cls and not self.num_prefix:
            raise ValueError(
                "prunesid_config.method_settings has keep_cls=True, which needs a vision tower with a CLS token. Set "
                "it to False."
            )

    @property
    def expected_counts(self) -> tuple[list[int], list[int]] | None:
        """T and N of each input, where they are known before the tower runs."""
        return None if self.sizes is None or self.budgets is None else self.budgets.counts_of(self.sizes)

    @property
    def is_whole(self) -> list[bool]:
        """Which inputs keep all of their tokens, and with them those of no view."""
        return self.budgets.is_whole

    @property
    def keeps_cls(self) -> bool:
        """Whether the CLS token of a view is one of its N."""
        return options_of(self.settings).get("keep_cls", False)

    # Tokens before the patches that upstream feeds to the language model (CLS of a frame, registers) stay within N.
    keeps_fed = True

    @property
    def needs(self) -> frozenset[str]:
        """What the method reads of the tokens beside what it compares: of CLS, `"attention"`, `"projected"`, ..."""
        return needs_of(self.settings)

    def run(self, encode: Callable) -> Any:
        """Upstream's output for the kept tokens; all of it if nothing is to be dropped."""
        if self.budgets is None:
            return encode(**self.inputs)
        needs_hooks = self.tower is None or self.has_own_cls or self.needs
        if torch.compiler.is_compiling() and not needs_hooks:
            return self._run_without_hooks(encode)
        return self._run_watched(encode)

    def _run_without_hooks(self, encode: Callable) -> Any:
        """In a compiled graph, which does not look for hooks: all tokens are projected."""
        install_capturing(self.tower)
        output = encode(**{**self.inputs, "output_hidden_states": True})
        compared = output.hidden_states[self.selection_layer][:, self.num_prefix :]
        self._choose(compared, {})
        return self._finish(output, None)

    @torch.compiler.disable
    def _run_watched(self, encode: Callable) -> Any:
        if self.tower is None:
            with project_rows(self.projector, self._choose_rows) as result:
                output = encode(**self.inputs)
            return self._finish(output, None)
        cls: Any = contextlib.nullcontext()
        attention: Any = contextlib.nullcontext([])
        if OF_CLS & self.needs:
            cls = CLS.watch(self.tower, self.selection_layer)
        if "attention" in self.needs:
            attention = ATTENTION.watch(ATTENTION.attending_layer(self.tower, self.settings.layer))
        with (
            watch_tower(self.tower, [*self.feature_layers, self.selection_layer], self.runs_whole) as self.states,
            cls as self.cls,
            attention as self.received,
            project_rows(self.projector, self._choose_rows) as result,
        ):
            output = encode(**self.inputs)
        return self._finish(output, result["projected"][:, 0] if self.has_own_cls else None)

    def _choose_rows(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.LongTensor]:
        """
        The rows that are projected, of all views' features `(views, tokens, dim)`, with the CLS tokens before them if
        these are kept and upstream left them out.
        """
        compared, seen = features[:, self.num_fed :], {}
        if self.tower is not None:
            compared = self.states[self.selection_layer][:, self.num_prefix :]
            heads = self.tower.config.num_attention_heads
            for name in OF_CLS & self.needs:
                value = getattr(self.cls, name)[:, self.num_prefix :]
                value = value.unflatten(-1, (heads, -1)) if name == "keys" else value
                seen["attention" if name == "cls_attention" else name] = value
            if "attention" in self.needs:
                seen["attention"] = torch.cat(self.received)[:, self.num_prefix :]
            if self.has_own_cls:
                cls = torch.cat([self.states[layer][:, :1] for layer in self.feature_layers], dim=-1)
                features = torch.cat([cls, features], dim=1)
        patches = features[:, -compared.shape[1] :]
        if "features" in self.needs:
            seen["features"] = patches
        if "projected" in self.needs:
            with torch.no_grad():
                # One view at a time, because matrix products round differently in other batch sizes.
                seen["projected"] = torch.cat([self.projector(view) for view in patches.split(1)])
        merged = self._choose(compared, seen)

        views, length = list(itertools.chain(*self.views)), features.shape[1]
        starts = [view * length for view in range(len(views))]
        table = table_of([view.patches + start + self.num_prefix_rows for view, start in zip(views, starts)])
        rows = rows_of(table, self.indices, self.counts)
        if merged is not None:
            features = put_merged(features.flatten(0, 1), table, merged).view_as(features)
        if not self.num_extra:
            return features, rows
        whole_of_view = [whole for own, whole in zip(self.views, self.is_whole) for _ in own]
        extra = [
            torch.arange(start + (self.has_own_cls and whole), start + self.num_extra)
            for view, start, whole in zip(views, starts, whole_of_view)
            if len(view.rows)
        ]
        return features, torch.cat([rows, torch.cat(extra).to(features.device, non_blocking=True)]).sort().values

    @property
    def num_prefix_rows(self) -> int:
        """How many rows of the projector's features come before the patches of a view."""
        return self.num_fed + self.has_own_cls

    def _choose(self, compared: Any, seen: dict[str, torch.Tensor]) -> Merged | None:
        """
        Chooses the patches of each view, from what is compared of all patches `(views, patches, dim)`, and what else
        the method reads of them.
        """
        views: list[Any] = list(itertools.chain(*self.views))
        lengths = [len(view.patches) for view in views]
        if set(lengths) != {compared.shape[1]}:
            table = table_of([view.patches for view in views]).to(compared.device, non_blocking=True)
            view_ids = torch.arange(len(views), device=compared.device)[:, None]
            compared = compared[view_ids, table]
            seen = {name: value[view_ids, table] for name, value in seen.items()}
        self.indices, self.counts, merged = choose_tokens(
            self.settings,
            compared,
            lengths,
            self.budgets,
            seen=seen,
            information=self.information,
        )
        return merged

    def _finish(self, output: Any, projected_cls: torch.Tensor | None) -> Any:
        """Takes the kept rows, and the CLS tokens `(views, hidden_size)`, out of upstream's output."""
        images = output.pooler_output
        if isinstance(images, torch.Tensor):
            images = images.reshape(len(self.views), -1, images.shape[-1])
        if not self.runs_whole:
            output = type(output)(**{name: value for name, value in output.items() if name != "hidden_states"})
        sizes, features = [len(image) for image in images], torch.cat(list(images))
        rows, counts = kept_rows(self.views, sizes, self.is_whole, self.indices, self.counts, self.num_fixed)
        cls = None
        if projected_cls is not None:
            found, starts, index = [], itertools.accumulate(sizes, initial=0), itertools.count()
            for place, (own, start, whole) in enumerate(zip(self.views, starts, self.is_whole)):
                for view, number in zip(own, index):
                    if len(view.rows) and not whole:
                        first = int(view.rows[0]) - self.num_fixed if view.cls_at is None else view.cls_at
                        found.append((number, start + first))
                        counts[place] += 1
            of_views, places = torch.tensor(found, dtype=torch.long).view(-1, 2).T
            cls = projected_cls[of_views.to(projected_cls.device)], places
        pooled, indices = keep_rows(features, sizes, rows.to(features.device), counts, cls)
        output["num_placeholders"] = sizes
        output.pooler_output, output["keep_indices"] = list(pooled), list(indices)
        return output


class TowerModelMixin(PrunedModelMixin):
    """
    For families whose tokens are compared in the vision tower, as in the paper, or as they enter the projector, which
    maps each of them for itself, so that only kept ones go through it. See [`PrunedModelMixin`].
    """

    # The vision tower of each modality; without it, tokens are compared as they enter the projector.
    towers: dict[str, str] = {}
    # The projector. Not `projector`: that is what several stock models call the module itself.
    projector_name: str
    # How tokens are chosen before it.
    encoding_class = TowerEncoding
    # What `dynamic` shares the total of a clip by, in place of the information of each frame.
    video_information: Callable[..., list[float]] | None = None

    def views(self, modality: str, inputs: dict[str, Any], sizes: None) -> list[list[int]] | list[list[View]]:
        """
        The views of each input of what our method was called with, by how many patches they have, or as [`View`]s. By
        default a view is an image or frame.
        """
        return self.patch_counts(modality, inputs)

    def sizes_of(self, modality: str, inputs: dict[str, Any]) -> list[int] | None:
        """T of each input, where that is not the tokens of its views."""
        return None

    def shows_encoder(self, modality: str) -> bool:
        # A tower that stops early has not even what upstream reads of it for itself, and returns unasked.
        return bool(self.towers) and not self.is_off(None) or super().shows_encoder(modality)

    def expected_counts(self, modality: str, inputs: dict[str, Any]) -> tuple[list[int], list[int]] | None:
        inputs = dict(inputs)
        return self.encoding_class(self, modality, inputs.pop("num_visual_tokens", None), inputs).expected_counts

    def encode_kept(self, modality, encode, num_visual_tokens: NumVisualTokens, inputs, given):
        return self.encoding_class(self, modality, num_visual_tokens, inputs).run(encode)
