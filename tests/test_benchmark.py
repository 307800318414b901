"""The benchmark's cases, limits and last line, and the way of the release that it compares selection with."""

import importlib
import json

import pytest
import torch
from random_tokens import tokens_like_a_tower

from modeling_prunesid.select_tokens import select_tokens
from prunesid_cli.command import main


@pytest.fixture
def benchmark(monkeypatch):
    module = importlib.import_module("prunesid_cli.benchmark")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    monkeypatch.setitem(module.TEXT, "vocab_size", module.IMAGE + 1)
    monkeypatch.setattr(module, "CLIP_L", {**module.CLIP_L, **small, "num_hidden_layers": 2})
    monkeypatch.setattr(module, "SMALL", {**small, "num_hidden_layers": 12})
    monkeypatch.setattr(module, "SEVEN_B", module.SMALL)
    return module


def test_all_ways_hold_the_same_share_of_the_cache(benchmark, capsys):
    figures = benchmark.compare_models(False, [64], rounds=1, inside=True)
    text = benchmark.TEXT_TOKENS + 1
    expected = (576 + text) / (64 + text)
    for budget in ("64", "64_llm_budget", "64_vitcop"):
        assert figures["kv_cache_ratio"][budget] == pytest.approx(expected, rel=0.01)
        assert figures["kv_cache_limit"][budget] == pytest.approx(figures["kv_cache_ratio"][budget])
        assert all(figures[f"{name}_ratio"][budget] > 0 for name in ("ttft", "prefill", "decode", "peak_memory"))
    assert figures["kv_cache_ratio"]["64"] == pytest.approx(expected)
    stock = benchmark.operations(1, 2, [576 + text] * 12)
    assert figures["ttft_limit"]["64"] == pytest.approx(stock / benchmark.operations(1, 1, [64 + text] * 12))
    weights = 12 * (4 * 16 * 16 + 3 * 16 * 16 + 2 * 16)
    held = [12 * 2 * tokens * 16 for tokens in (576 + text, 64 + text)]
    assert figures["decode_limit"]["64"] == pytest.approx((weights + held[0]) / (weights + held[1]))
    shown = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[-4:]]
    assert shown == ["stock", "1 x 64", "96, mean 64", "ViTCoP 64"]


def test_the_last_line_has_the_names_that_are_promised(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "tokens_of_photographs", lambda count: torch.rand(count, 200, 64))
    main(["benchmark", "--quick"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("selection_time_ratio", "selection_memory_ratio"):
        assert {f"{name}_b5_n192", f"{name}_b1_n64"} <= set(report)
    assert {"machine", "selection_share_of_tower_n64", "cls_row_share_of_tower", "tower_time_ratio"} <= set(report)
    for measure in ("ttft", "prefill", "decode", "kv_cache"):
        assert set(report[f"{measure}_ratio"]) == set(report[f"{measure}_limit"]) == {"64"}
    shares = report["selection_stage_shares_b1_n64"]
    assert set(shares) == {"principal_components", "similarity_and_nms", "rest"}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-4)


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


def test_the_agreement_of_groups_is_a_share_of_the_tokens(benchmark, monkeypatch):
    tokens = torch.stack([tokens_like_a_tower(144, 160, seed) for seed in range(2)])
    assert benchmark.compare_groups(tokens, [16, 32]) == {"16": 1, "32": 1}
    turned = select_tokens(tokens, 16, return_details=True)
    turned.groups[0, :36] = -1
    monkeypatch.setattr(benchmark, "select_tokens", lambda *arguments, **options: turned)
    assert benchmark.compare_groups(tokens, [16]) == {"16": 1 - 36 / 288}


@pytest.fixture
def exact_components(monkeypatch):
    """`torch.pca_lowrank` without its chance: all singular vectors of the matrix, centred over its rows."""

    def exact(matrix, q):
        left, values, right = torch.linalg.svd(matrix - matrix.mean(-2, keepdim=True), full_matrices=False)
        return left[..., :q], values[..., :q], right.mT[..., :q]

    monkeypatch.setattr(torch, "pca_lowrank", exact)


def best_components(tokens, groups):
    """Group and score `(batch, tokens)` of each token by the release's PCA."""
    best = torch.pca_lowrank(tokens.sigmoid().mT, q=groups)[2].abs().max(-1)
    return best.indices, best.values


def mean_similarity(view):
    units = torch.nn.functional.normalize(view, dim=-1)
    return (units @ units.T)[torch.ones(len(view), len(view)).triu(1) > 0].mean()


@pytest.mark.parametrize("budget", [16, 30, 64, 100])
def test_the_way_of_the_release_keeps_what_our_release_options_keep(benchmark, exact_components, budget):
    tokens = torch.stack([tokens_like_a_tower(144, 160, seed) + 0.1 * seed for seed in range(8)])
    ours = select_tokens(tokens, budget, center="features", quota="bounded")
    for indices, expected in zip(benchmark.release_style(tokens, budget), ours.indices):
        assert sorted(indices) == expected.tolist()


@pytest.mark.parametrize("budget", [16, 30, 64, 100])
@pytest.mark.parametrize("spread", [0.1, 0.5, 2])
def test_the_way_of_the_release_suppresses_and_shares_by_its_rules(benchmark, exact_components, budget, spread):
    generator = torch.Generator().manual_seed(budget)
    tokens = torch.randn(1, 1, 160, generator=generator) + spread * torch.randn(4, 144, 160, generator=generator)
    group, score = best_components(tokens, budget // 4)
    for image, indices in enumerate(benchmark.release_style(tokens, budget)):
        groups = group[image][indices]
        assert len(set(indices)) == len(indices) == budget and set(indices) <= set(range(144))
        assert set(groups.tolist()) == set(group[image].tolist())
        assert groups.tolist() == sorted(groups.tolist())
        tau = budget / 32 * mean_similarity(tokens[image])
        for number in groups.unique():
            mine = [token for token, of in zip(indices, groups) if of == number]
            survivors = reference_survivors(tokens[image], (group[image] == number).nonzero()[:, 0], score[image], tau)
            first, filled = mine[: len(survivors)], mine[len(survivors) :]
            assert first == survivors[: len(first)]
            assert filled == sorted(filled, key=lambda token: -score[image, token])


def reference_survivors(view, members, scores, tau):
    """Greedy NMS as the paper words it, best first."""
    kept = []
    for token in sorted(members.tolist(), key=lambda token: -scores[token]):
        if all(torch.cosine_similarity(view[token], view[other], dim=0) < tau for other in kept):
            kept.append(token)
    return kept
