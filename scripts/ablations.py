"""The paper's ablations: PruneSID as the paper writes it, with one setting changed at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from baselines import Method

from modeling_prunesid import PruneSIDConfig


LAMBDAS = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0)


def ablations(num_layers: int) -> dict[str, Method]:
    """
    Methods for `baselines.METHODS`: grouping (Table 5), K (Table 6), layer (Figure 4: first, second, two thirds up and
    last of the tower's `num_layers`), what scores tokens, and lambda (section 3.3): `"auto"` and values for all N.
    """
    changes: dict[str, dict[str, Any]] = {
        f"grouping {name}": {"method_settings": {"grouping": name}} for name in ("kmeans", "random")
    }
    changes |= {f"K = {count}": {"num_groups": count} for count in (8, 16, 32, 48, 60)}
    changes |= {f"layer {layer}": {"layer": layer} for layer in (0, 1, 2 * num_layers // 3, num_layers)}
    by_attention = {"center": "tokens", "quota": "proportional", "keep_cls": False}
    changes |= {"score cls_attention": {"method": "release", "method_settings": by_attention}}
    changes |= {"lambda auto": {"nms_lambda": "auto"}}
    changes |= {f"lambda {value}": {"nms_lambda": value} for value in LAMBDAS}
    return {name: Method(name, "encoder", _changed(settings)) for name, settings in changes.items()}


def _changed(settings: dict[str, Any]) -> Callable:
    @contextmanager
    def install(model: Any, budget: int | float) -> Iterator[None]:
        own = model.config.prunesid_config
        model.config.prunesid_config = PruneSIDConfig(**{"budget": budget, "layer": own.layer, **settings})
        try:
            yield
        finally:
            model.config.prunesid_config = own

    return install
