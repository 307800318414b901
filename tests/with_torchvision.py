"""A plugin (`pytest -p with_torchvision`): this process has the torchvision of the folder that a variable names."""

import os

from torchvision_shim import add_torchvision


KEPT = add_torchvision(os.environ["TORCHVISION_FOLDER"])
