import subprocess
import sys

import pytest
import torch
from tiny import build, stock_twin


torch.set_num_threads(1)
TORCHVISION = "torchvision==0.28.0"


@pytest.fixture
def ours():
    """A tiny random model that keeps 8 of 49 tokens."""
    return build()


@pytest.fixture
def stock(ours):
    """The stock class with the weights of `ours`."""
    return stock_twin(ours)


@pytest.fixture(scope="session")
def torchvision_folder(request):
    """Video processors need torchvision, which the rest of the project does not: installed once, apart from it."""
    cache = request.config.cache.mkdir(TORCHVISION)
    folder = cache / "site"
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(cache / "new")]
        subprocess.run([*command, TORCHVISION], check=True)
        (cache / "new").rename(folder)
    return folder
