"""Random tokens whose spectra decay, as those of vision towers do."""

import math
from dataclasses import dataclass, field

import torch


def tokens_like_a_tower(tokens, dim, seed=0):
    """Random tokens `(tokens, dim)` with a decaying spectrum, so that components are well defined."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(tokens, dim)
    directions = torch.randn(rank, dim, generator=generator, dtype=torch.float64) / math.sqrt(dim)
    weights = torch.randn(tokens, rank, generator=generator, dtype=torch.float64)
    return (2 * (weights * torch.arange(1, rank + 1) ** -0.7) @ directions).float()


@dataclass
class Settings:
    num_groups: int | None = None
    nms_lambda: float | str | None = None
    method_settings: dict = field(default_factory=dict)


def smooth(views, tokens, dim, seed=0):
    """Tokens `(views, tokens, dim)` whose spectrum decays."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(tokens, dim)
    directions = torch.randn(rank, dim, generator=generator) / math.sqrt(dim)
    weights = torch.randn(views, tokens, rank, generator=generator) * torch.arange(1, rank + 1) ** -0.7
    return 2 * weights @ directions


def extreme_views():
    noise = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    mixed = noise.clone()
    mixed[:10] *= 1e-42
    mixed[10:20] *= 3e37
    mixed[20] = math.inf
    mixed[21, 3] = math.nan
    return {
        "zeros": 0 * noise,
        "subnormal": 1e-42 * noise,
        "smallest normal": 1.2e-38 * noise,
        "tiny": 1e-30 * noise,
        "too large to square": 1e30 * noise,
        "largest": 3.4e38 * noise.sign(),
        "equal": torch.ones_like(noise),
        "nearly equal": 3 + 1e-7 * noise,
        "one token": torch.eye(40, 16) * (torch.arange(40) == 5)[:, None],
        "three tokens": torch.eye(3, 16).repeat(14, 1)[:40],
        "no finite": math.nan * noise,
        "one finite": torch.where(torch.arange(40)[:, None] == 9, noise, math.inf),
        "saturated": 1e4 * noise,
        "mixed": mixed,
        "half": noise.half(),
    }
