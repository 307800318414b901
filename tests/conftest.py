import pytest
import torch
from tiny import build, stock_twin


torch.set_num_threads(1)


@pytest.fixture
def ours():
    """A tiny random model that keeps 8 of 49 tokens."""
    return build()


@pytest.fixture
def stock(ours):
    """The stock class with the weights of `ours`."""
    return stock_twin(ours)
