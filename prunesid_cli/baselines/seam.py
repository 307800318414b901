"""Methods that choose by one finished view, as the package's own do: run by the model's own `get_image_features`.

So they run in every family that has what they need, and a model that is saved with one carries it:

    register_method("divprune", baselines.divprune)
    model.config.prunesid_config.method = "divprune"
    model.save_pretrained("llava-divprune")
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from modeling_prunesid import PruneSIDConfig, register_method
from modeling_prunesid.methods import METHODS, MODULES


# What a model's own configuration says of its views, budgets and positions, whatever the method.
OF_THE_MODEL = ("budget_scope", "layer", "reference_information", "min_budget", "max_budget", "mrope_positions")


def preset(module: ModuleType | None = None, **settings: Any) -> Callable:
    """
    The context in which a model runs with `settings` of `PruneSIDConfig`, all others the paper's but `OF_THE_MODEL`.

    Args:
        module: the method, where it is none of the package's; `settings` name its own `method_settings`.
    """

    @contextmanager
    def install(model: Any, budget: int | float) -> Iterator[None]:
        own = model.config.prunesid_config
        fields = {"budget": budget, **{name: getattr(own, name) for name in OF_THE_MODEL}, **settings}
        with registered(module) as name:
            try:  # a setting that does not fit the tower is refused when it is there
                model.config.prunesid_config = PruneSIDConfig(**fields, **({} if name is None else {"method": name}))
                yield
            finally:
                model.config.prunesid_config = own

    return install


@contextmanager
def registered(module: ModuleType | None) -> Iterator[str | None]:
    """A method that `prunesid_config.method` can name within, and that name."""
    if module is None:
        yield None
        return
    name = module.__name__.rpartition(".")[2]
    is_new = METHODS.get(name) is not module.select
    if is_new:
        register_method(name, module)
    try:
        yield name
    finally:
        if is_new:
            del METHODS[name], MODULES[name]
