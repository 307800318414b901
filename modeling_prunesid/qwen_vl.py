"""What the Qwen-VL families share: images of any size, merged patches, three-dimensional positions."""

from .configuration_prunesid import NestsPruneSIDConfig
from .family import PrunedModelMixin
from .mrope import MRoPEModelMixin
from .processing import PrunedProcessorMixin


class GridConfigMixin(NestsPruneSIDConfig):
    """
    For images of any number of tokens: the budget is a share by default, a third of the tokens and at least 16 (the
    authors' release for Qwen2-VL), of each image and of each temporal slice of a video, or with `budget_scope="image"`
    of each image and video. `layer` has no meaning here: tokens are compared as they leave the patch merger.
    """

    _has_no_cls = "its vision tower has no CLS token"

    def _with_defaults(self, settings):
        settings = {"budget": 1 / 3, **settings}
        return settings if settings.get("budget_scope") == "image" else {"min_budget": 16, **settings}


class GridModelMixin(MRoPEModelMixin, PrunedModelMixin):
    """
    A view is a temporal slice of a grid. K is N/4 and lambda 18 N/T, which is N/32 at 576 tokens. The release for
    Qwen2-VL has the same, but lambda never falls below 1, and its rho is about half the true one.
    """

    lambda_of_share = True

    def views(self, modality, inputs, sizes):
        slices = inputs[f"{modality}_grid_thw"][:, 0].tolist()
        return [[size // count] * count for size, count in zip(sizes, slices)]


class GridProcessorMixin(PrunedProcessorMixin):
    """A view is a temporal slice of a grid, each with a run of its own or all in one."""

    def view_lengths(self, modality, inputs, index, runs):
        slices = int(inputs[f"{modality}_grid_thw"][index][0])
        return [sum(runs) // slices] * slices
