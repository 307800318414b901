"""What each frame of a clip shows, by which `dynamic` shares the total of a clip."""

import torch

from .dynamic import redundancy


def frame_information(views: torch.Tensor, lengths: list[int], first_views: list[int]) -> list[float]:
    """
    What each frame of a clip shows: its information score 1 - rho, but no more than its change, the mean cosine
    distance of its patches to the same patches of the frame before. This is ours: a static frame has none. Arguments
    are those of `view_information`, for frames of equal lengths.
    """
    scores = 1 - redundancy(views, lengths)
    directions = torch.nn.functional.normalize(views.float(), dim=-1)
    change = 1 - (directions[1:] * directions[:-1]).sum(-1).mean(-1)
    changed = torch.cat([scores[:1], torch.minimum(scores[1:], change.nan_to_num(0))])
    alone, changing = torch.stack([scores, changed]).tolist()
    return [alone[view] if view in first_views else changing[view] for view in range(len(views))]
