"""VisionZip, dominant and contextual tokens, https://arxiv.org/abs/2412.04467.

Dominant are CLS and the patches that it attends to most in layer -2; of the others, evenly strided ones become
contextual tokens, which add the mean of those most similar to them by their keys. 27 of 32 tokens are dominant, as in
all settings of the paper, and CLS counts.

CLS comes first, then the dominant patches in raster order, then the contextual tokens in raster order.
VisionZip-Dyn (PruneSID, section 4.2) gives each image the tokens that PruneSID's information score gives it.
"""

import torch

from modeling_prunesid.selection import information_budgets, redundancy

from .encoder import Kept, View, top


CONTEXTUAL_SHARE = 5 / 32


def choose(view: View, budget: int) -> Kept:
    """
    Args:
        view (`View`): for its CLS feature, CLS attention and keys.
        budget (`int`): N.
    """
    num_contextual = int(CONTEXTUAL_SHARE * budget + 0.5)
    return zip_tokens(view, budget - num_contextual, num_contextual)


def choose_dynamic(view: View, budget: int) -> Kept:
    """
    Args:
        view (`View`): also for the features that PruneSID compares.
        budget (`int`): N of an image whose information is `prunesid_config.reference_information`.
    """
    if view.reference_information is None:
        raise ValueError(
            "prunesid_config.reference_information must be the mean information score of typical images for a dynamic "
            "method, got None. `prunesid calibrate` measures it."
        )
    num_tokens = len(view.features)
    rho = redundancy(view.compared[None])
    own = int(information_budgets(rho, budget, num_tokens, view.reference_information))
    return view.keep(torch.arange(num_tokens, device=rho.device)) if own == num_tokens else choose(view, own)


def zip_tokens(view: View, num_dominant: int, num_contextual: int) -> Kept:
    """CLS and `num_dominant` - 1 patches, and `num_contextual` merged tokens."""
    dominant = top(view.cls_attention, num_dominant - 1)
    is_rest = torch.ones(len(view.features), dtype=torch.bool, device=dominant.device)
    is_rest[dominant] = False
    rest = is_rest.nonzero()[:, 0]
    stride = max(1, len(rest) // max(num_contextual, 1))
    is_target = torch.zeros_like(rest, dtype=torch.bool)
    is_target[::stride][:num_contextual] = True
    targets, others = rest[is_target], rest[~is_target]

    features = view.features.float()
    contextual = features[targets]
    if num_contextual:
        metric = view.patch_keys.float().unflatten(-1, (view.num_heads, -1)).mean(1)
        metric = torch.nn.functional.normalize(metric, dim=-1)
        nearest = (metric[others] @ metric[targets].T).argmax(1)
        assigned = torch.nn.functional.one_hot(nearest, num_contextual).float()
        contextual = contextual + assigned.T @ features[others] / assigned.sum(0).clamp(min=1)[:, None]
    cls_place = dominant.new_tensor([-1])
    return Kept(
        torch.cat([view.cls_feature[None].float(), features[dominant], contextual]).to(view.features.dtype),
        torch.cat([cls_place, dominant, targets]),
    )
