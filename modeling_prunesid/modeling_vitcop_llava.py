"""LLaVA-1.5 with ViTCoP: salient tokens leave the tower, and are merged and dropped inside the language model."""

import torch
from huggingface_hub.dataclasses import strict
from transformers import (
    GenerationMixin,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaProcessor,
    PretrainedConfig,
)

from .checks import resolve_budget
from .cls_attention import PARTS as CLS
from .co_pruning import CoPrunedGenerationMixin, CoPrunedModelMixin, describe_tokens
from .configuration_prunesid import (
    NestedSettings,
    as_own,
    ignored_at_inference,
    is_integer,
    is_number,
    optional_count,
    optional_name,
    read_settings,
    register_class_names,
    without_none,
)
from .encoding import TowerEncoding, TowerModelMixin
from .family import PrunedGenerationMixin, register_family
from .processing import VariantProcessorMixin
from .vitcop import (
    cluster_tokens,
    count_of_share,
    default_shares,
    merge_clusters,
    plan_counts,
    scaled_layers,
    select_salient,
)


def _optional_share():
    return lambda value: value is None or (is_number(value) and 0 < value <= 1), "a number in (0, 1] or None"


class ViTCoPConfig(NestedSettings):
    r"""
    How many visual tokens ViTCoP leaves (arXiv 2601.17818). The defaults are the paper's settings for LLaVA-1.5 at a
    mean of 64 tokens, and follow the budget and the depth of the language model.

    Args:
        budget (`int`, `float` or `None`, defaults to 64):
            The mean number of visual tokens of an image over the layers of the language model; a float in (0, 1] is
            the share of all its tokens; None, or at least all tokens, switches compression off.
        keep_share (`float`, *optional*):
            V, the share of the tokens that stage I keeps and that enter the language model. Default: 0.2 + 0.9 P for a
            budget of the share P, the line through the published 0.3, 0.4 and 0.5 at P = 1/9, 2/9 and 1/3. For smaller
            budgets and language models of few layers, as many as let stage II keep 77 of 172, as at P = 1/9.
        center_share (`float`, *optional*):
            p, cluster centres as a share of the tokens that stage I keeps. Default: 0.09 + 0.27 P (published: 0.12,
            0.15, 0.18).
        layer (`int`, defaults to -2):
            Index into the vision tower's hidden states of the layer whose CLS attention and keys stage I uses.
        merge_layer (`int`, *optional*):
            S, the layer of the language model that stage II runs in front of. Default: 2 of 32, at the same depth of
            others: `round(L / 16)`, at least 1.
        prune_layer (`int`, *optional*):
            D, the layer that stage III runs in front of; L switches it off. Default: 22 of 32, `round(11 L / 16)`.
        base_model_name_or_path, base_model_revision (`str`, *optional*):
            The checkpoint that a thin variant, which has no weights of its own, takes them from.

    Raises:
        `ValueError`: for an unknown name or an invalid value, at construction and at every later assignment.
    """

    model_type = "vitcop"
    base_config_key = "vitcop_config"
    _rules = {
        "keep_share": _optional_share(),
        "center_share": _optional_share(),
        "layer": (is_integer, "an integer index into the tower's hidden states, for example -2"),
        "merge_layer": optional_count(),
        "prune_layer": optional_count(),
        "base_model_name_or_path": optional_name(),
        "base_model_revision": optional_name(),
    }

    # What a PruneSIDConfig may say besides.
    budget_scope, dynamic, min_budget = "view", False, None

    budget: int | float | None = 64
    keep_share: int | float | None = None
    center_share: int | float | None = None
    layer: int = -2
    merge_layer: int | None = None
    prune_layer: int | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None


@strict
class ViTCoPLlavaConfig(LlavaConfig):
    """
    [`LlavaConfig`] with a nested [`ViTCoPConfig`] as `vitcop_config`, which also answers to the name
    `prunesid_config`: a dict, a `ViTCoPConfig` or the name of a preset. A dict passed to `from_pretrained` is merged
    into the saved one, and None leaves it as it was saved. Set to None later, the budget is None: off.
    """

    model_type = "vitcop_llava"
    attribute_map = {**LlavaConfig.attribute_map, "prunesid_config": "vitcop_config"}
    keys_to_ignore_at_inference = ignored_at_inference(LlavaConfig)

    vitcop_config: dict | str | PretrainedConfig | None = None

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Upstream's. A stock checkpoint is one of ours; see [`as_own`]."""
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return as_own(fields, cls, pretrained_model_name_or_path), kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Upstream's, with `vitcop_config=None` for the saved settings."""
        return super().from_dict(config_dict, **without_none(kwargs, "vitcop_config", "prunesid_config"))

    def __setattr__(self, name, value):
        if self.attribute_map.get(name, name) == "vitcop_config":
            value = read_settings(value, ViTCoPConfig, vars(self).get("vitcop_config"), self.model_type)
        super().__setattr__(name, value)


register_class_names(ViTCoPLlavaConfig)


class _SalientEncoding(TowerEncoding):
    """Stage I: keeps the tokens that the CLS token attends to most, and clusters them by their keys."""

    keeps_cls = keeps_fed = False
    needs, cls = frozenset({"cls_attention", "keys"}), CLS

    def __init__(self, model, modality, num_visual_tokens, inputs):
        super().__init__(model, modality, num_visual_tokens, inputs)
        self.model = model
        patch_size, (height, width) = model.config.vision_config.patch_size, inputs["pixel_values"].shape[-2:]
        rows, columns = height // patch_size, width // patch_size
        self.grid = torch.cartesian_prod(torch.arange(rows) / rows, torch.arange(columns) / columns)

    @property
    def is_whole(self):
        return [False] * len(self.num_tokens)

    @property
    def expected_counts(self):
        plans = [self.model.plan_tower(total, len(self.grid)) for total in self.budgets.totals] if self.budgets else []
        return (self.sizes, [count for count, _ in plans]) if plans else None

    def _choose(self, compared, seen):
        num_layers, layers = len(self.model.language_model.layers), self.model.pruning_layers()
        grid, kept = self.grid.to(compared.device, non_blocking=True), []
        self.clusters: list[torch.LongTensor] = []
        self.layer_counts, self.num_clusters = [], []
        for image, total in enumerate(self.budgets.totals):
            count, num_centers = self.model.plan_tower(total, len(grid))
            patches = select_salient(seen["attention"][image], count)
            clusters = cluster_tokens(seen["keys"][image][patches].flatten(1), grid[patches], num_centers)
            kept.append(patches)
            self.clusters.append(clusters)
            self.num_clusters.append(num_centers + 1)
            self.layer_counts.append(plan_counts(total, count, num_layers, *layers))
        self.indices, self.counts = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True), list(map(len, kept))

    def _finish(self, output, projected_cls):
        output = super()._finish(output, projected_cls)
        describe_tokens(output, self.clusters, self.layer_counts, self.num_clusters)
        return output


class ViTCoPLlavaModel(CoPrunedModelMixin, TowerModelMixin, LlavaModel):
    """
    Modifications:
        - `get_image_features` returns the features of the salient tokens alone, with their indices and clusters
          (`visual_groups`). Its `num_visual_tokens`, in place of `config.vitcop_config.budget`, is the mean over the
          layers of the language model.
        - `forward` drops the placeholders of the other tokens from the prompt, and merges and drops tokens between the
          layers of the language model.
    """

    config_class = ViTCoPLlavaConfig
    towers = {"image": "vision_tower"}
    projector_name = "multi_modal_projector"
    encoding_class = _SalientEncoding
    reads_question = False
    _first_rule = staticmethod(merge_clusters)

    def are_whole_views(self, run_lengths: list[int]) -> bool:
        vision = self.config.vision_config
        num_patches = (vision.image_size // vision.patch_size) ** 2
        full = num_patches + (self.config.vision_feature_select_strategy == "full")
        budget = self.config.vitcop_config.budget
        short = full if budget is None else self.plan_tower(resolve_budget(budget, num_patches), num_patches)[0]
        return any(all(length % tokens == 0 for length in run_lengths) for tokens in (full, short))

    def pruning_layers(self) -> tuple[int, int]:
        settings = self.config.vitcop_config
        return scaled_layers(len(self.language_model.layers), settings.merge_layer, settings.prune_layer)

    def plan_tower(self, budget: int, num_patches: int) -> tuple[int, int]:
        """How many tokens of an image stage I keeps, and how many cluster centres it takes."""
        if budget >= num_patches:
            return num_patches, num_patches
        settings = self.config.vitcop_config
        num_layers = len(self.language_model.layers)
        keep_share, center_share = default_shares(budget / num_patches, num_layers, *self.pruning_layers())
        keep_share = keep_share if settings.keep_share is None else settings.keep_share
        center_share = center_share if settings.center_share is None else settings.center_share
        count = count_of_share(keep_share, num_patches)
        if count < budget:
            raise ValueError(
                f"vitcop_config.keep_share={keep_share} keeps {count} of {num_patches} tokens, fewer than the mean of "
                f"{budget} that the budget asks for. Raise it, or lower the budget."
            )
        return count, count_of_share(center_share, count)


class ViTCoPLlavaForConditionalGeneration(
    CoPrunedGenerationMixin, PrunedGenerationMixin, LlavaForConditionalGeneration, GenerationMixin
):
    """
    [`LlavaForConditionalGeneration`] on shortened prompts. The output of `forward` has `layer_visual_tokens`, of shape
    `(batch, layers)`: how many visual tokens each layer saw. A column dropped inside the language model has the logits
    of the last column before it that is left.
    """

    model_class = ViTCoPLlavaModel


class ViTCoPLlavaProcessor(VariantProcessorMixin, LlavaProcessor):
    """
    [`LlavaProcessor`] under the name that a ViTCoP repo publishes. It writes the full prompt: most tokens are dropped
    inside the language model, where no prompt can leave them out.
    """

    _auto_class = "AutoProcessor"

    @classmethod
    def arguments_for(cls, settings: PretrainedConfig) -> dict:
        return {}


ViTCoPLlavaAutoModel = register_family(ViTCoPLlavaForConditionalGeneration, ViTCoPLlavaProcessor)
