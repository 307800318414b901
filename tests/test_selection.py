"""Token selection: the fp64 oracle, and properties that hold for any input."""

import math
from itertools import combinations

import pytest
import torch
from random_tokens import tokens_like_a_tower
from reference_selection import bounded, proportional, reference_rho, reference_select
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_prunesid.components import top_eigenvectors
from modeling_prunesid.dynamic import information_budgets, redundancy
from modeling_prunesid.method_release import bounded_quotas
from modeling_prunesid.select_tokens import select_tokens
from modeling_prunesid.selection import proportional_quotas


VARIANTS = {
    "paper": {},
    "release": {"score": "cls_attention", "center": "features", "quota": "bounded", "extra_kept": 1},
    "auto": {"nms_lambda": "auto"},
    "spread": {"score": "cls_attention", "quota": "spread"},
    "kmeans": {"grouping": "kmeans"},
    "random": {"grouping": "random", "seed": 3},
    "many_groups": {"num_groups": 1000},
    "no_nms": {"nms_lambda": 1e6},
    "all_suppressed": {"nms_lambda": -1e6},
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def select(hidden_states, budget, variant, **options):
    """`select_tokens` of a batch with the options of a variant; the CLS attention is made up of the tokens."""
    options = VARIANTS[variant] | options
    if options.get("score") == "cls_attention":
        options["cls_attention"] = hidden_states.float().sigmoid().mean(-1)
    return select_tokens(hidden_states, budget, **options)


def assert_valid(kept, budget, tokens):
    """Exactly `budget` sorted, unique indices."""
    assert kept.shape == (min(budget, tokens),)
    assert (kept.diff() > 0).all()
    assert kept[0] >= 0 and kept[-1] < tokens


def random_case(seed):
    """Tokens `(tokens, dim)`, a budget and options of one case; every kind of option and size occurs."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    tokens = draw(1, (12, 60, 60, 200)[seed % 4]) if seed % 100 else draw(500, 700)
    dim = 32 * draw(1, 2) if seed % 5 == 0 else draw(1, 70)
    x = tokens_like_a_tower(tokens, dim, seed)
    if seed % 5 == 0:  # equal tokens; in whole vector registers, because PyTorch's sigmoid rounds a rest differently
        x = x[torch.randint(0, tokens, (tokens,), generator=generator)]
    if seed % 7 == 0:  # similar tokens, as of a real tower; the others have similarities of both signs
        x = x + 1
    if seed % 3 == 0:
        x = x.bfloat16()
    options = {}
    if seed % 2:
        options["cls_attention"] = torch.rand(tokens, generator=generator)
    if seed % 11 < 3:
        options["center"] = "features"
    if seed % 13 < 5:
        options["quota"] = "bounded"
    elif seed % 13 > 9:
        options["quota"] = "spread"
        if seed % 2:
            directions = torch.randn(dim, 24, generator=generator)
            options["projected"] = (x.double() @ directions.double()).float()
    if seed % 6 == 1:
        options["num_groups"] = draw(1, 2 * tokens)
    if seed % 8 < 3:
        options["nms_lambda"] = ("auto", -0.5, 2.5)[seed % 8]
    if seed % 9 == 0:
        options["extra_kept"] = 1
    return x, draw(1, min(tokens + 2, 70)), options


@pytest.mark.parametrize(
    "first", [0, 200, *(pytest.param(first, marks=pytest.mark.contract) for first in range(400, 1600, 200))]
)
def test_agrees_with_the_oracle(first):
    determined = 0
    for seed in range(first, first + 200):
        x, budget, options = random_case(seed)
        plain = {name: value.tolist() if name == "cls_attention" else value for name, value in options.items()}
        if "projected" in options:
            plain["projected"] = options["projected"].double().numpy()
            options["projected"] = options["projected"][None]
        expected, margin = reference_select(x.double().numpy(), budget, **plain)
        if "cls_attention" in options:
            options |= {"cls_attention": options["cls_attention"][None], "score": "cls_attention"}
        kept = select_tokens(x[None], budget, **options).indices[0]
        assert_valid(kept, budget, len(x))
        if margin > 1:
            determined += 1
            assert kept.tolist() == expected, f"case {seed}"
    assert determined >= 130


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_agrees_with_the_oracle_at_the_size_of_a_tower(variant):
    """Of so many tokens some are near a tie, where rounding decides: 2 in 100 may differ."""
    agreed = total = 0
    for seed, budget in enumerate((16, 64, 192)):
        x = tokens_like_a_tower(577, 640, seed)
        plain = {name: value for name, value in VARIANTS[variant].items() if name != "score"}
        if variant == "release":
            plain["cls_attention"] = x.sigmoid().mean(-1).tolist()
        expected, _ = reference_select(x.double().numpy(), budget, **plain)
        agreed += len(set(expected) & set(select(x[None], budget, variant).indices[0].tolist()))
        total += budget
    assert agreed >= 0.98 * total


def test_quotas():
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(2000):
        sizes = torch.randint(0, 40, (draw(1, 30),), generator=generator)
        sizes[0] += 1
        total = draw(1, int(sizes.sum()))
        assert proportional_quotas(sizes, total).tolist() == proportional(sizes.tolist(), total)
        held = sizes + torch.randint(0, 20, sizes.shape, generator=generator) * sizes.clamp(max=1)
        total = draw(1, int(held.sum()))
        nominal = total + draw(0, 1)
        quotas = bounded_quotas(sizes, held, total, nominal, tokens=60)
        assert quotas.tolist() == bounded(sizes.tolist(), held.tolist(), total, nominal)
        assert quotas.sum() == total and (quotas >= 0).all() and (quotas <= held).all()


def test_quotas_of_the_release_round_halves_to_even():
    """Two equal groups, three tokens: one each, and of the third the first group's share is 0.5, which is 0."""
    assert bounded_quotas(torch.tensor([2, 2]), torch.tensor([2, 2]), 3, 3, 2).tolist() == [1, 2]


def test_quotas_of_the_release_take_a_suppressed_token_before_anothers_survivor():
    """Bounds of 1 and 5 hold 6 of 8: they rise by one to 2 and 6, and the group of one survivor gives two tokens."""
    assert bounded_quotas(torch.tensor([1, 20]), torch.tensor([9, 20]), 8, 8, 20).tolist() == [2, 6]


def test_quotas_of_a_batch_are_those_of_its_rows():
    generator = torch.Generator().manual_seed(3)
    held = torch.randint(1, 20, (50, 12), generator=generator)
    survivors = (held * torch.rand(50, 12, generator=generator)).ceil().long()
    nominal = torch.randint(2, 12, (50, 1), generator=generator) * held.sum(1, keepdim=True) // 12 + 1
    together = bounded_quotas(survivors, held, nominal - 1, nominal, 20)
    for row in range(50):
        alone = bounded_quotas(survivors[row], held[row], int(nominal[row]) - 1, int(nominal[row]), 20)
        assert torch.equal(together[row], alone)


HARD_INPUTS = {
    "equal tokens": torch.ones(2, 50, 16),
    "zeros": torch.zeros(2, 50, 16),
    "one token": torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0)),
    "one feature": torch.arange(100.0).view(2, 50, 1),
    "three different tokens": torch.eye(3, 16).repeat(1, 17, 1),
    "equal clusters": torch.eye(20, 32).repeat_interleave(12, 0)[None],
    "white noise": torch.randn(1, 300, 64, generator=torch.Generator().manual_seed(0)),
    "all NaN": torch.full((1, 50, 16), math.nan),
    "one finite token": torch.full((1, 50, 16), math.inf).index_fill(1, torch.tensor([20]), 1.0),
    "too large to square": 1e30 * torch.randn(1, 50, 16, generator=torch.Generator().manual_seed(0)),
    "tiny": 1e-30 * torch.randn(1, 50, 16, generator=torch.Generator().manual_seed(0)),
    "saturated": 100 * torch.randn(1, 50, 16, generator=torch.Generator().manual_seed(0)),
    "fp16": torch.randn(1, 50, 16, generator=torch.Generator().manual_seed(0)).half(),
}


@variants
@pytest.mark.parametrize("name", HARD_INPUTS)
def test_exactly_n_whatever_the_input(name, variant):
    x = HARD_INPUTS[name]
    for budget in (1, 2, 7, 16, 49, 50, 1000, 0.3, 1.0):
        out = select(x, budget, variant)
        expected = max(math.floor(budget * x.shape[1] + 0.5), 1) if isinstance(budget, float) else budget
        for row, kept in enumerate(out.indices):
            assert_valid(kept, expected, x.shape[1])
            assert out.counts[row] == len(kept)
        assert out.rho.isfinite().all()


@pytest.mark.parametrize("name", ["equal tokens", "zeros", "all NaN"])
def test_tokens_without_differences_are_kept_in_order(name):
    assert select_tokens(HARD_INPUTS[name], 5).indices[0].tolist() == [0, 1, 2, 3, 4]


def test_equal_tokens_go_by_index():
    x = tokens_like_a_tower(40, 32)
    repeated = x.repeat(3, 1)[None]
    out = select_tokens(repeated, 40, num_groups=8, nms_lambda=1e6, return_details=True)
    for part in (out.groups, out.scores):
        assert torch.equal(part[0], part[0, :40].repeat(3))
    copies = torch.bincount(out.indices[0] % 40, minlength=40)
    for token in range(40):
        assert (out.indices[0][out.indices[0] % 40 == token] // 40).tolist() == list(range(copies[token]))


@pytest.mark.parametrize("variant, threads", [*((variant, 1) for variant in VARIANTS), ("paper", 2)])
def test_a_row_gets_the_same_tokens_alone_and_in_any_batch(variant, threads):
    rows = [tokens_like_a_tower(301, 77, seed) for seed in range(3)]
    rows += [torch.zeros(301, 77), rows[0].clone().index_fill(0, torch.tensor([3, 300]), math.nan)]
    batch = torch.stack(rows)
    parts = ("indices", "rho", "scores", *["groups"] * (variant != "spread"))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = select(batch, 40, variant, return_details=True)
        again = select(batch.flip(0).contiguous(), 40, variant, return_details=True)
        for row in range(len(rows)):
            alone = select(batch[row : row + 1].clone(), 40, variant, return_details=True)
            for part in parts:
                assert torch.equal(getattr(together, part)[row], getattr(alone, part)[0])
                assert torch.equal(getattr(again, part)[-1 - row], getattr(alone, part)[0])
    finally:
        torch.set_num_threads(before)


def test_a_strided_view_gets_the_same_tokens():
    x = torch.stack([tokens_like_a_tower(101, 33, seed) for seed in range(2)])
    expected = select_tokens(x[:, 1:].clone(), 20).indices
    assert torch.equal(select_tokens(x[:, 1:], 20).indices, expected)
    assert torch.equal(select_tokens(x[:, 1:].transpose(1, 2).contiguous().transpose(1, 2), 20).indices, expected)


@variants
def test_the_same_input_gives_the_same_tokens_again(variant):
    x = tokens_like_a_tower(200, 64)[None]
    assert torch.equal(select(x, 30, variant).indices, select(x, 30, variant).indices)


@pytest.mark.parametrize("variant", ["paper", "release", "auto", "spread", "no_nms"])
def test_order_of_the_tokens_does_not_matter(variant):
    for seed in range(10):
        x = tokens_like_a_tower(60, 32, seed)
        shuffle = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
        kept = select(x[None], 12, variant).indices[0]
        assert shuffle[select(x[shuffle][None], 12, variant).indices[0]].sort().values.tolist() == kept.tolist()


@pytest.mark.parametrize("variant", ["paper", "release", "auto", "spread"])
def test_non_finite_tokens_leave_the_others_alone(variant):
    for seed in range(10):
        x = tokens_like_a_tower(60, 32, seed)[None]
        bad = torch.tensor([0, 7, 59])
        good = torch.tensor([i for i in range(60) if i not in bad])
        spoilt = x.index_fill(1, bad, math.nan)
        spoilt[0, 7] = x[0, 7]
        spoilt[0, 7, 3] = -math.inf
        alone = select(x[:, good], 12, variant, return_details=True)
        out = select(spoilt, 12, variant, return_details=True)
        assert out.indices[0].tolist() == good[alone.indices[0]].tolist()
        if variant == "spread":
            assert out.groups is None
        else:
            assert torch.equal(out.groups[0, good], alone.groups[0]) and (out.groups[0, bad] == -1).all()
        assert (out.scores[0, bad] == -math.inf).all()
        torch.testing.assert_close(out.rho, alone.rho, rtol=1e-4, atol=1e-5)
        assert select(spoilt, 58, variant).indices[0].tolist() == sorted([*good.tolist(), 0])


def test_non_finite_attention_ranks_last():
    x = tokens_like_a_tower(20, 16)[None]
    attention = torch.rand(1, 20, generator=torch.Generator().manual_seed(0))
    attention[0, [2, 5]] = math.nan
    kept = select_tokens(x, 18, score="cls_attention", cls_attention=attention).indices[0]
    assert kept.tolist() == [i for i in range(20) if i not in (2, 5)]


def test_spread_tokens_of_equal_score_are_at_least_half_as_far_apart_as_can_be():
    """The greedy answer's bound on the max-min distance, here by its angle, against every choice of four tokens."""
    for seed in range(20):
        x = tokens_like_a_tower(11, 8, seed)
        units = torch.nn.functional.normalize(x, dim=1)
        angles = (units @ units.T).clamp(-1, 1).acos()

        def smallest(kept, angles=angles):
            return min(angles[i, j] for i, j in combinations(kept, 2))

        kept = select_tokens(x[None], 4, score="cls_attention", quota="spread", cls_attention=torch.ones(1, 11))
        best = max(smallest(four) for four in combinations(range(11), 4))
        assert smallest(kept.indices[0].tolist()) >= best / 2


def test_spread_prefers_the_better_of_equal_tokens_and_covers_every_cluster_first():
    x = torch.eye(5, 16).repeat_interleave(4, 0)[None]
    attention = torch.rand(1, 20, generator=torch.Generator().manual_seed(0)) + 0.1
    clusters = attention.view(5, 4)
    options = {"score": "cls_attention", "quota": "spread", "cls_attention": attention}
    best = (clusters.argmax(1) + 4 * torch.arange(5)).tolist()
    assert select_tokens(x, 5, **options).indices[0].tolist() == best
    others = [i for i in attention[0].argsort(descending=True).tolist() if i not in best]
    assert select_tokens(x, 9, **options).indices[0].tolist() == sorted(best + others[:4])


def test_spread_measures_the_projected_tokens():
    x, attention = tokens_like_a_tower(30, 16)[None], torch.rand(1, 30, generator=torch.Generator().manual_seed(0))
    clusters = torch.eye(5, 8).repeat_interleave(6, 0)[None]
    options = {"score": "cls_attention", "quota": "spread", "cls_attention": attention}
    kept = select_tokens(x, 5, projected=clusters, **options).indices[0]
    assert kept.tolist() == (attention.view(5, 6).argmax(1) + 6 * torch.arange(5)).tolist()
    assert (
        select_tokens(x, 5, projected=x, **options).indices.tolist() == select_tokens(x, 5, **options).indices.tolist()
    )
    others = {"score": "cls_attention", "cls_attention": attention}
    assert torch.equal(
        select_tokens(x, 5, projected=clusters, **others).indices, select_tokens(x, 5, **others).indices
    )


def test_rho_is_the_mean_of_all_pairs():
    for seed in range(20):
        x = tokens_like_a_tower(3 + 5 * seed, 24, seed) + seed / 10
        x[1] = 0
        expected = reference_rho(x.double().numpy())
        assert redundancy(x[None]).item() == pytest.approx(expected, abs=2e-6)
        assert redundancy(1000 * x[None]).item() == pytest.approx(expected, abs=2e-6)
        assert select_tokens(x[None], 1).rho.item() == redundancy(x[None]).item()


@pytest.mark.parametrize(
    "x, expected", [([[1, 0]], 0), ([[1, 0], [3, 0]], 1), ([[1, 0], [-2, 0]], -1), ([[1, 0], [0, 1]], 0)]
)
def test_rho_of_simple_tokens(x, expected):
    assert redundancy(torch.tensor([x], dtype=torch.float32)).item() == expected


def test_information_budgets():
    rho = torch.tensor([0.1, 0.25, 0.4, 0.99, -0.5])
    assert information_budgets(rho, 64, 576, reference=0.75).tolist() == [77, 64, 51, 1, 128]
    assert information_budgets(rho, 64, 576, reference=0.75, minimum=60, maximum=70).tolist() == [70, 64, 60, 60, 70]
    assert information_budgets(rho, 0.5, 100, reference=0.75).tolist() == [60, 50, 40, 1, 100]
    many = torch.rand(1000, generator=torch.Generator().manual_seed(0)) / 2
    budgets = information_budgets(many, 64, 576, reference=(1 - many).mean().item())
    assert budgets.double().mean().item() == pytest.approx(64, abs=0.05)


@pytest.mark.parametrize("variant", ["paper", "release", "auto", "spread"])
def test_a_budget_for_each_image(variant):
    x = torch.stack([tokens_like_a_tower(90, 48, seed) for seed in range(4)])
    budgets = torch.tensor([5, 40, 1, 200])
    out = select(x, budgets, variant, return_details=True)
    assert out.counts.tolist() == [5, 40, 1, 90]
    assert out.indices.shape == (4, 90)
    for row, count in enumerate(out.counts.tolist()):
        alone = select(x[row : row + 1], count, variant).indices[0]
        assert torch.equal(out.indices[row, :count], alone)
        assert (out.indices[row, count:] == 90).all()


def test_groups_and_scores():
    x = tokens_like_a_tower(100, 64)[None]
    out = select_tokens(x, 20, return_details=True)
    z = x[0].double().sigmoid()
    components = torch.linalg.svd(z - z.mean(0)).U[:, :5].abs()
    assert torch.equal(out.groups[0], components.argmax(1))
    torch.testing.assert_close(out.scores[0], components.amax(1).float(), atol=1e-4, rtol=0)
    assert select_tokens(x, 20).groups is None and select_tokens(x, 20).scores is None


def test_random_groups_are_even_and_seeded():
    x = torch.stack([tokens_like_a_tower(50, 16, seed) for seed in range(2)])
    groups = {seed: select_tokens(x, 24, grouping="random", seed=seed, return_details=True).groups for seed in (0, 1)}
    assert torch.bincount(groups[0][0]).tolist() == [9, 9, 8, 8, 8, 8]
    assert torch.equal(groups[0][0], groups[0][1])
    assert not torch.equal(groups[0], groups[1])


def test_kmeans_finds_separate_clusters():
    cluster = torch.arange(60) % 3
    x = 10 * torch.eye(3, 16)[cluster] + tokens_like_a_tower(60, 16) / 10
    groups = select_tokens(x[None], 12, grouping="kmeans", num_groups=3, return_details=True).groups[0]
    assert len({(a, b) for a, b in zip(cluster.tolist(), groups.tolist(), strict=True)}) == 3


def test_precision_settings_of_the_process_change_nothing():
    x = tokens_like_a_tower(300, 64)[None]
    expected = select_tokens(x, 30, return_details=True)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = select_tokens(x, 30, return_details=True)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(out.scores, expected.scores) and torch.equal(out.rho, expected.rho)


def eigensolver_sizes(monkeypatch, features, count):
    """`top_eigenvectors`, and the sizes of the exact problems that it solved on the way."""
    sizes, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: sizes.append(len(m)) or eigh(m))
    found = top_eigenvectors(features, count)
    monkeypatch.undo()
    return *found, sizes


@pytest.mark.parametrize("count", [4, 8, 16, 32, 48])
def test_the_fast_eigensolver_is_exact_where_the_spectrum_decays(monkeypatch, count):
    z = tokens_like_a_tower(576, 600).sigmoid()
    z = z - z.mean(0)
    eigenvalues, eigenvectors, sizes = eigensolver_sizes(monkeypatch, z, count)
    assert len(sizes) == 1 and sizes[0] < 576 / 3
    exact = torch.linalg.svd(z.double(), full_matrices=False)
    torch.testing.assert_close(eigenvalues.double(), exact.S[:count] ** 2, rtol=1e-4, atol=0)
    expected = exact.U[:, :count].abs()
    assert (eigenvectors.abs().double() - expected).norm(dim=0).max() < 1e-3
    assert (eigenvectors.abs().argmax(1) == expected.argmax(1)).double().mean() > 0.998


@pytest.mark.parametrize("count", [32, 48])
def test_the_fast_eigensolver_holds_where_the_spectrum_is_steep(monkeypatch, count):
    """Blocks made orthogonal only before they are scaled lose it again here, and the residuals fail."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, 400, generator=generator)).Q for size in (576, 400))
    singular = torch.arange(1.0, 401) ** -4
    eigenvalues, eigenvectors, sizes = eigensolver_sizes(monkeypatch, left * singular @ right, count)
    assert len(sizes) == 1 and sizes[0] < 576 / 3
    torch.testing.assert_close(eigenvalues[:5], singular[:5] ** 2, rtol=1e-2, atol=0)
    torch.testing.assert_close(eigenvectors[:, :5].abs(), left[:, :5].abs(), rtol=0, atol=1e-3)


def test_the_eigensolver_falls_back_to_the_exact_one_without_decay(monkeypatch):
    features = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    eigenvalues, eigenvectors, sizes = eigensolver_sizes(monkeypatch, features, 8)
    assert sizes[-1] == len(features)
    gram = features @ features.T
    exact = torch.linalg.eigh(gram)
    assert torch.equal(eigenvalues, exact.eigenvalues.flip(0)[:8])
    torch.testing.assert_close(
        eigenvectors, gram @ exact.eigenvectors.flip(1)[:, :8] / eigenvalues, rtol=1e-3, atol=1e-5
    )


def test_the_eigensolver_finds_no_more_components_than_there_are(monkeypatch):
    features = torch.tensor([3.0, 2.0, 1.0]).diag().repeat(100, 5)
    eigenvalues, eigenvectors, _ = eigensolver_sizes(monkeypatch, features, 8)
    torch.testing.assert_close(eigenvalues[:3], 500 * torch.tensor([9.0, 4.0, 1.0]), rtol=1e-4, atol=0)
    assert eigenvalues[3:].abs().max() < 300 * torch.finfo(torch.float32).eps * eigenvalues[0]
    torch.testing.assert_close(eigenvectors[:, :3].abs(), 0.1 * torch.eye(3).repeat(100, 1), rtol=0, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.untyped_storage().nbytes() // value.element_size())
        return out


@variants
def test_nothing_larger_than_the_tokens_of_one_image_is_allocated(variant):
    x = torch.stack([tokens_like_a_tower(400, 64, seed) for seed in range(5)])
    options = VARIANTS[variant] | {"cls_attention": torch.rand(5, 400)}
    select_tokens(x[:1], 64, **{**options, "cls_attention": options["cls_attention"][:1]})
    with LargestTensor() as seen:
        select_tokens(x, 64, **options)
    assert seen.largest <= max(400 * 400, x.numel())


@pytest.mark.parametrize(
    "variant", ["paper", *(pytest.param(v, marks=pytest.mark.contract) for v in ("release", "spread"))]
)
def test_compiles_into_one_graph_for_all_images(variant):
    x = torch.stack([tokens_like_a_tower(256, 280, seed) for seed in range(4)])
    compiled = torch.compile(lambda batch: select(batch, 16, variant).indices, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x[:2]), select(x[:2], 16, variant).indices)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(x[2:]), select(x[2:], 16, variant).indices)


@pytest.mark.parametrize(
    "options, message",
    [
        *[({"budget": bad}, r"`budget`.*got") for bad in (0, -3, 0.0, 1.5, math.nan, math.inf, True, "64", None)],
        ({"budget": torch.tensor([4])}, r"`budget`.*each of the 2 images.*\(1,\)"),
        ({"budget": torch.tensor([4.0, 4.0])}, r"`budget`.*float32"),
        ({"budget": torch.tensor([4, 0])}, r"`budget`.*got 0"),
        ({"hidden_states": torch.zeros(9, 4)}, r"`hidden_states`.*\(9, 4\)"),
        ({"hidden_states": torch.zeros(1, 0, 4)}, r"`hidden_states`.*\(1, 0, 4\)"),
        ({"hidden_states": torch.zeros(1, 9, 4, dtype=torch.long)}, r"`hidden_states`.*int64"),
        ({"num_groups": 0}, r"`num_groups`.*got 0"),
        ({"num_groups": 2.0}, r"`num_groups`.*got 2.0"),
        ({"nms_lambda": "best"}, r"`nms_lambda`.*'best'"),
        ({"nms_lambda": math.nan}, r"`nms_lambda`.*nan"),
        ({"score": "attention"}, r"`score`.*cls_attention.*'attention'"),
        ({"score": "cls_attention"}, r"`cls_attention`.*got None"),
        ({"score": "cls_attention", "cls_attention": torch.zeros(2, 8)}, r"`cls_attention`.*\(2, 9\).*\(2, 8\)"),
        ({"projected": torch.zeros(2, 8, 4)}, r"`projected`.*\(2, 9, 'dim'\).*\(2, 8, 4\)"),
        ({"center": "both"}, r"`center`.*'both'"),
        ({"quota": "equal"}, r"`quota`.*'equal'"),
        ({"grouping": "dbscan"}, r"`grouping`.*'dbscan'"),
        ({"seed": -1}, r"`seed`.*-1"),
        ({"extra_kept": -1}, r"`extra_kept`.*-1"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        select_tokens(**({"hidden_states": torch.zeros(2, 9, 4), "budget": 4} | options))


@pytest.mark.parametrize("reference", [0, -1.0, math.nan, True, "0.8"])
def test_bad_reference_is_named(reference):
    with pytest.raises(ValueError, match="`reference`"):
        information_budgets(torch.zeros(1), 8, 64, reference)


def test_bad_bounds_are_named():
    with pytest.raises(ValueError, match=r"`minimum`.*got 0"):
        information_budgets(torch.zeros(1), 8, 64, 0.8, minimum=0)
    with pytest.raises(ValueError, match=r"`maximum`.*at least 9, got 8"):
        information_budgets(torch.zeros(1), 8, 64, 0.8, minimum=9, maximum=8)
