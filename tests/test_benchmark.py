"""The benchmark's cases: the same mean number of tokens inside the language model for every way of dropping them."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    module = importlib.import_module("benchmark")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    monkeypatch.setitem(module.TEXT, "vocab_size", module.IMAGE + 1)
    monkeypatch.setattr(module, "CLIP_L", {**module.CLIP_L, **small, "num_hidden_layers": 2})
    monkeypatch.setattr(module, "SMALL", {**small, "num_hidden_layers": 12})
    monkeypatch.setattr(module, "SEVEN_B", module.SMALL)
    return module


def test_all_ways_hold_the_same_share_of_the_cache(benchmark, capsys):
    ratios = benchmark.compare_models(False, [64], rounds=1, inside=True)
    text = benchmark.TEXT_TOKENS + 1
    expected = (576 + text) / (64 + text)
    for key in ("llava_64", "llava_64_llm_budget", "llava_64_vitcop"):
        assert ratios[f"kv_cache_ratio_{key}"] == pytest.approx(expected, rel=0.01)
        assert all(ratios[f"{name}_ratio_{key}"] > 0 for name in ("ttft", "prefill", "peak_memory"))
    assert ratios["kv_cache_ratio_llava_64"] == pytest.approx(expected)
    shown = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[-4:]]
    assert shown == ["stock", "1 x 64", "96, mean 64", "ViTCoP 64"]


def test_operations_are_those_of_the_matrix_products_in_each_layer(benchmark):
    def products(tokens, inner_products):
        """Multiplications and additions of the products in one layer of width 16, by the shapes of their factors."""
        inner = [(tokens, 16, 16)] * inner_products
        attention = [(tokens, 16, tokens), (tokens, tokens, 16)]
        return sum(2 * rows * shared * columns for rows, shared, columns in [(tokens, 16, 16)] * 4 + inner + attention)

    patches_and_cls = 24 * 24 + 1
    assert benchmark.operations(5, 23, []) == 5 * 23 * products(patches_and_cls, inner_products=2)
    prefill = 6 * products(100, inner_products=3) + 6 * products(200, inner_products=3)
    assert benchmark.operations(0, 0, [100] * 6 + [200] * 6) == prefill
    assert benchmark.operations(5, 23, [100] * 6 + [200] * 6) == benchmark.operations(5, 23, []) + prefill
