import gc
import os
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from tiny import build, stock_twin
from tiny_checkpoint import load_variant


torch.set_num_threads(1)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # xdist's processes: threads that wait leave the cores to others
huggingface_hub.constants.HF_HUB_OFFLINE = True  # where the network is missing, each try at it takes half a minute
TORCHVISION = "torchvision==0.28.0"
OTHER_TIERS = {"slow", "engines", "app"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """
    What is in no other tier is quick, and what is slow is not of the contract besides. With xdist, a file runs in one
    process, and so do the tests of a family.
    """
    for item in items:
        tiers = {marker.name for marker in item.iter_markers()} & {"contract", *OTHER_TIERS}
        if not tiers:
            item.add_marker("quick")
        if tiers & OTHER_TIERS:
            item.own_markers = [marker for marker in item.own_markers if marker.name != "contract"]
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_collection_finish():
    """What is imported by now stays, and collections of garbage, for which Trainer and compilers ask, skip it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """What a file has imported and made stays as well."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture
def ours():
    """A tiny random model that keeps 8 of 49 tokens."""
    return build()


@pytest.fixture
def stock(ours):
    """The stock class with the weights of `ours`."""
    return stock_twin(ours)


@pytest.fixture(scope="module")
def saved_thin(base, tmp_path_factory):
    """A thin variant of a file's `base`, which nobody changes."""
    folder = tmp_path_factory.mktemp("variants") / "thin"
    load_variant(base).save_pretrained(folder, thin=True)
    return folder


@pytest.fixture
def thin(saved_thin, tmp_path):
    """A thin variant."""
    return shutil.copytree(saved_thin, tmp_path / "thin")


@pytest.fixture(scope="session")
def torchvision_folder(request):
    """Video processors need torchvision, which the rest of the project does not: installed once, apart from it."""
    cache = request.config.cache.mkdir(TORCHVISION)
    folder, own = cache / "site", cache / f"new-{os.getpid()}"
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(own)]
        subprocess.run([*command, TORCHVISION], check=True)
        try:
            own.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(own)
    return folder
