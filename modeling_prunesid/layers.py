"""The layers of a vision tower, and the tokens that it has before its patches."""

from torch import nn


# What towers call the embedding of their CLS token: CLIP, DINOv2.
_CLS_EMBEDDINGS = ("class_embedding", "cls_token")


def resolve_layer(layer: int, num_layers: int, name: str) -> int:
    """
    The non-negative index of a hidden state of a tower of `num_layers` layers, which has `num_layers + 1`.

    Raises:
        `ValueError`: if there is no such hidden state.
    """
    if not -num_layers - 1 <= layer <= num_layers:
        raise ValueError(
            f"{name} must lie in [{-num_layers - 1}, {num_layers}] for a vision tower of {num_layers} layers, got "
            f"{layer}. The paper uses -2."
        )
    return layer % (num_layers + 1)


def find_layers(tower: nn.Module) -> nn.ModuleList | None:
    """The list of a tower's layers; None if it has none."""
    num_layers = getattr(tower.config, "num_hidden_layers", None) or getattr(tower.config, "depth", None)
    for module in tower.modules():
        is_list = isinstance(module, nn.ModuleList) and len(module) == num_layers
        if is_list and any("Attention" in type(part).__name__ for part in module.modules()):  # no list of mergers
            return module
    return None


def has_cls(tower: nn.Module) -> bool:
    """Whether a tower has a CLS token."""
    return any(name.rsplit(".", 1)[-1] in _CLS_EMBEDDINGS for name, _ in tower.named_parameters())


def count_prefix(tower: nn.Module) -> int:
    """How many tokens a tower has before its patches: CLS and registers."""
    return int(has_cls(tower)) + getattr(tower.config, "num_register_tokens", 0)
