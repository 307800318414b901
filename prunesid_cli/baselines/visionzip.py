"""VisionZip, dominant and contextual tokens, https://arxiv.org/abs/2412.04467.

Dominant are CLS and the patches that it attends to most in layer -2; of the others, evenly strided ones become
contextual tokens, which add the mean of those most similar to them by their keys. 27 of 32 tokens are dominant, as in
all settings of the paper, and CLS counts.

CLS comes first (`keep_cls`), the others follow in raster order; the release has the contextual tokens last.
VisionZip-Dyn (PruneSID, section 4.2), which is `dynamic`, gives each image the tokens that PruneSID's information
score gives it.
"""

from typing import Any

import torch

from modeling_prunesid.context import Context
from modeling_prunesid.single_views import highest, view_by_view


CONTEXTUAL_SHARE = 5 / 32

DEFAULTS = {"keep_cls": True}
RULES = {"keep_cls": (lambda value: isinstance(value, bool), "True or False")}


def needs(method_settings: dict) -> frozenset[str]:
    """What of a [`Context`] is read."""
    return frozenset({"cls_attention", "keys", "features"})


@view_by_view
def select(view: torch.Tensor, count: int, settings: Any, context: Context) -> tuple[torch.LongTensor, torch.Tensor]:
    """Ascending indices `(count,)` of the tokens to keep of a view `(T, dim)`, and their features."""
    num_contextual = int(CONTEXTUAL_SHARE * (count + context.extra_kept) + 0.5)
    return zip_tokens(context, count - num_contextual, num_contextual)


def zip_tokens(context: Context, num_dominant: int, num_contextual: int) -> tuple[torch.LongTensor, torch.Tensor]:
    """`num_dominant` patches and `num_contextual` merged ones, in raster order, and their features."""
    dominant = highest(context.attention, num_dominant)
    features: Any = context.features
    is_rest = torch.ones(len(features), dtype=torch.bool, device=dominant.device)
    is_rest[dominant] = False
    rest = is_rest.nonzero()[:, 0]
    stride = max(1, len(rest) // max(num_contextual, 1))
    is_target = torch.zeros_like(rest, dtype=torch.bool)
    is_target[::stride][:num_contextual] = True
    targets, others = rest[is_target], rest[~is_target]

    features = context.features.float()
    contextual = features[targets]
    if num_contextual:
        metric = torch.nn.functional.normalize(context.keys.float().mean(1), dim=-1)
        nearest = (metric[others] @ metric[targets].T).argmax(1)
        assigned = torch.nn.functional.one_hot(nearest, num_contextual).float()
        contextual = contextual + assigned.T @ features[others] / assigned.sum(0).clamp(min=1)[:, None]
    indices, order = torch.cat([dominant, targets]).sort()
    return indices, torch.cat([features[dominant], contextual])[order].to(context.features.dtype)
