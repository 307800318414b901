"""
Lets video processors, which need torchvision, run beside a torch build that its compiled operators do not fit: they
resize frames and use none of these operators. For subprocesses of tests; run before transformers is imported.
"""

import sys
from pathlib import Path

import torch


OPERATORS = ("nms", "qnms", "roi_align", "qroi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d")


def add_torchvision(folder):
    """Make the torchvision that was installed into `folder` importable; the returned object must be kept."""
    sys.path.append(str(folder))
    try:
        torch.ops.load_library(str(next(Path(folder, "torchvision").glob("_C*.so"))))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for operator in OPERATORS:
            library.define(f"{operator}(Tensor input) -> Tensor")
            library.define(f"_{operator}_backward(Tensor input) -> Tensor")
        return library
