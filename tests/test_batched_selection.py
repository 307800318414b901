"""Selection of all views at once, as on a GPU: what it costs, what it waits for, and that it changes nothing."""

import inspect
import math
import os
import threading

import pytest
import skimage.data
import torch
from pretended_device import Pretended
from random_tokens import Settings, extreme_views, smooth
from skimage.transform import resize
from sklearn.datasets import load_sample_images

from modeling_prunesid import components, methods
from modeling_prunesid.context import Context, counts_on
from modeling_prunesid.dynamic import information_budgets, redundancy
from modeling_prunesid.exact import gram, product
from modeling_prunesid.methods import METHODS, check_method, method_of
from modeling_prunesid.repo_code import carried_source
from modeling_prunesid.retired import method_of_saved
from modeling_prunesid.selection import NMS_ROUNDS, survivors


CASES = {
    "paper": ("paper", Settings()),
    "auto": ("paper", Settings(nms_lambda="auto")),
    "kmeans": ("paper", Settings(method_settings={"grouping": "kmeans"})),
    "random": ("paper", Settings(method_settings={"grouping": "random"})),
    "release": ("release", Settings()),
    "release_plain": ("release", Settings(method_settings={"quota": "proportional", "center": "tokens"})),
    "spread": ("spread", Settings()),
    "spread_component": ("spread", Settings(method_settings={"score": "component"})),
}
cases = pytest.mark.parametrize("case", CASES)


def photographs(side=24, patch=14, dim=256):
    """Patches `(pictures, side^2, dim)` of photographs behind a fixed random embedding of two layers."""
    pictures = [*load_sample_images().images, skimage.data.astronaut(), skimage.data.coffee()]
    generator = torch.Generator().manual_seed(0)
    inner = torch.randn(3 * patch**2, dim, generator=generator) / math.sqrt(3) / patch
    outer = torch.randn(dim, dim, generator=generator) / math.sqrt(dim)
    place = torch.nn.functional.avg_pool2d(torch.randn(dim, side, side, generator=generator), 5, 1, 2).flatten(1).T
    tokens = []
    for picture in pictures:
        square = picture[: min(picture.shape[:2]), : min(picture.shape[:2])]
        pixels = torch.tensor(resize(square, (side * patch, side * patch), anti_aliasing=True)).float()
        pixels = (pixels - pixels.mean()) / pixels.std()
        patches = pixels.view(side, patch, side, patch, 3).transpose(1, 2).reshape(side**2, -1)
        tokens.append((2 * patches @ inner + place).relu() @ outer * 2)
    return torch.stack(tokens)


def attention_of(views):
    return views.float().sigmoid().mean(-1) ** 4


def choose(case, views, counts, device=None, **context):
    """A method's selection of `counts`, one each view; its tensors on the pretended `device` where one is given."""
    name, settings = CASES[case]
    attention = attention_of(views)
    if device is not None:
        views, attention = device.put(views), device.put(attention)
    given = Context(counts=list(counts), attention=attention, details=True, **context)
    return METHODS[name](views, counts_on(views.device, list(counts)), settings, given)


def on_cpu(tensor):
    return getattr(tensor, "data_on_cpu", tensor)


def rows(selection):
    counts = on_cpu(selection.counts).tolist()
    return [row[:count].tolist() for row, count in zip(on_cpu(selection.indices), counts, strict=True)]


def share(first, second):
    """Tokens that both selections keep, as a share of the first."""
    both = sum(len(set(a) & set(b)) for a, b in zip(rows(first), rows(second), strict=True))
    return both / sum(map(len, rows(first)))


@cases
def test_a_fixed_number_of_operations_and_no_wait(case):
    counted = set()
    for batch in (1, 5, 8, 32):
        with Pretended() as device:
            choose(case, smooth(batch, 60, 32), [16] * batch, device)
        assert not device.waits, dict(device.waits)
        counted.add(sum(device.operations.values()))
    assert len(counted) == 1
    assert counted.pop() < (1150 if case == "auto" else 750)


@cases
def test_counts_that_differ_cost_one_copy_that_does_not_block(case):
    with Pretended() as device:
        out = choose(case, smooth(4, 60, 32), [5, 16, 1, 60], device, lengths=[60, 50, 30, 60])
    assert not device.waits, dict(device.waits)
    assert [len(row) for row in rows(out)] == [5, 16, 1, 60]
    assert (on_cpu(out.indices)[1, 16:] == 60).all()


def test_dynamic_budgets_cost_one_copy_of_the_counts():
    views = smooth(5, 60, 32)
    with Pretended() as device:
        held = device.put(views)
        counts = information_budgets(redundancy(held), 16, 60, reference=0.9)
        assert not device.waits, dict(device.waits)
        known = counts.tolist()
        METHODS["paper"](held, counts, Settings(), Context(counts=known))
    assert sum(device.waits.values()) == 1
    assert known == information_budgets(redundancy(views), 16, 60, reference=0.9).tolist()


def test_a_wait_is_named():
    with Pretended() as device:
        information_budgets(device.put(torch.zeros(2)), 16, 60, 0.9)
        device.put(torch.ones(3)).sum().item()
    assert list(device.waits) == ["_local_scalar_dense ?"]


def exact(matrices, count):
    eigenvalues, eigenvectors = torch.linalg.eigh(matrices.double())
    return eigenvalues.flip(-1)[..., :count].float(), eigenvectors.flip(-1)[..., :count].float()


@pytest.mark.contract
@pytest.mark.parametrize("fp64", [True, False])
@pytest.mark.parametrize("case", ["paper", "auto", "release", "spread", "spread_component"])
def test_photographs_keep_the_tokens_of_an_exact_solver(case, fp64, monkeypatch):
    views = photographs()
    for budget in (32, 64, 192):
        with Pretended(fp64) as device:
            batched = choose(case, views, [budget] * len(views), device)
        assert not device.waits
        with monkeypatch.context() as patched:
            patched.setattr(components, "top_eigenvectors", lambda f, count: exact(f @ f.T, count))
            alone = choose(case, views, [budget] * len(views))
        assert share(alone, batched) >= 0.99
        if not case.startswith("spread"):
            same = on_cpu(batched.groups) == alone.groups
            assert same.double().mean() >= (0.9995 if fp64 else 0.97)
        torch.testing.assert_close(on_cpu(batched.rho), alone.rho, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [2, 16, 48])
@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0, 2.0, 4.0])
def test_the_batched_solver_whatever_the_decay(decay, count):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(2, 200, 200, generator=generator, dtype=torch.float64)).Q
    values = torch.arange(1, 201, dtype=torch.float64) ** -decay * (1 - 0.002 * torch.arange(200))
    matrices = ((vectors * values) @ vectors.mT).float()
    with Pretended() as device:
        lengths = device.put(torch.full((2, 1), 200))
        found = components.iterated_eigenvectors(device.put(matrices), count, lengths)
    eigenvalues, eigenvectors = (on_cpu(part).double() for part in found)
    expected, directions = exact(matrices, count)
    seen = expected[0] > 1e-4
    torch.testing.assert_close(
        eigenvalues[:, seen], expected[:, seen].double(), rtol=0.02 if decay == 0 else 1e-4, atol=0
    )
    if decay > 0:
        off = (eigenvectors.abs() - directions.abs()).norm(dim=1)[:, seen]
        assert off.max() < 0.05


def test_white_noise_is_grouped_like_by_an_exact_solver():
    noise = torch.randn(2, 300, 200, generator=torch.Generator().manual_seed(0))
    with Pretended() as device:
        batched = choose("paper", noise, [64, 64], device)
    alone = choose("paper", noise, [64, 64])
    assert (on_cpu(batched.groups) == alone.groups).double().mean() > 0.97


def test_products_do_not_depend_on_the_order_of_summation_or_on_precision():
    features = smooth(3, 50, 300).clamp(-0.999, 0.999)
    shuffled = features[..., torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    found = gram(features)
    assert torch.equal(found, gram(shuffled)) and torch.equal(found[1:2], gram(features[1:2]))
    torch.testing.assert_close(found.double(), features.double() @ features.double().mT, rtol=0, atol=1e-4)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(found, gram(features))
        wide = features[0].double()  # where all is computed in float64, as the contract does
        assert torch.equal(product(wide, wide.T), wide @ wide.T)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.timeout(0 if "PRUNESID_BATCHES" in os.environ else 300)
@cases
def test_a_view_gets_the_same_tokens_in_any_batch(case):
    """`PRUNESID_BATCHES=10000` makes that many random batches, however long they take."""
    generator = torch.Generator().manual_seed(0)
    views = smooth(12, 49, 32)
    views[3] = 0
    views[4, 7] = math.nan
    counts = torch.randint(1, 50, (12,), generator=generator).tolist()
    alone = rows(choose(case, views, counts))
    with Pretended() as device:
        on_device = [rows(choose(case, views[i : i + 1], counts[i : i + 1], device))[0] for i in range(12)]
    for number in range(int(os.environ.get("PRUNESID_BATCHES", 10))):
        chosen = torch.randint(
            0, 12, (int(torch.randint(1, 10, (), generator=generator)),), generator=generator
        ).tolist()
        taken = [counts[i] for i in chosen]
        assert rows(choose(case, views[chosen], taken)) == [alone[i] for i in chosen]
        if number % 5 == 0:
            with Pretended() as device:
                assert rows(choose(case, views[chosen], taken, device)) == [on_device[i] for i in chosen]


@cases
def test_padding_changes_nothing(case):
    views, lengths, counts = smooth(3, 64, 32), [64, 40, 9], [12, 12, 5]
    padded = views.clone()
    for view, length in zip(padded, lengths, strict=True):
        view[length:] = 7.0
    expected = [rows(choose(case, view[None, :length], [n]))[0] for view, length, n in zip(views, lengths, counts)]
    assert rows(choose(case, padded, counts, lengths=lengths)) == expected
    if case not in ("random", "kmeans"):  # whose shuffles are of the padded length
        with Pretended() as device:
            assert rows(choose(case, padded, counts, device, lengths=lengths)) == expected


def test_threads_with_other_precision_settings_change_nothing():
    views = smooth(1, 300, 64)
    expected, failures, stop = rows(choose("paper", views, [40])), [], threading.Event()
    before = torch.get_float32_matmul_precision()

    def disturb(precision):
        while not stop.is_set():
            torch.set_float32_matmul_precision(precision)
            stop.wait(0.001)

    def select():
        for _ in range(20):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                if rows(choose("paper", views, [40])) != expected:
                    failures.append(1)

    others = [threading.Thread(target=disturb, args=(precision,)) for precision in ("medium", "high", "highest")]
    ours = [threading.Thread(target=select) for _ in range(4)]
    try:
        for thread in others + ours:
            thread.start()
        for thread in ours:
            thread.join()
    finally:
        stop.set()
        for thread in others:
            thread.join()
        torch.set_float32_matmul_precision(before)
    assert not failures


@cases
def test_any_numbers_give_n_tokens_and_a_finite_rho(case):
    views = extreme_views()
    batch = torch.stack([view.float() for view in views.values()])
    for fp64 in (True, False):
        with Pretended(fp64) as device:
            batched = choose(case, batch, [13] * len(batch), device)
        alone = choose(case, batch, [13] * len(batch))
        for out in (batched, alone):
            assert on_cpu(out.rho).isfinite().all() and (on_cpu(out.rho).abs() <= 1 + 1e-5).all()
            for row in rows(out):
                assert len(set(row)) == 13 and row == sorted(row) and row[0] >= 0 and row[-1] < 40
            budgets = information_budgets(on_cpu(out.rho), 16, 40, reference=0.9)
            assert (budgets >= 1).all() and (budgets <= 40).all()
        torch.testing.assert_close(on_cpu(batched.rho), alone.rho, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fp64", [True, False])
def test_long_chains_of_nms(fp64):
    """Each token reaches tau with the next one only: every second one survives. What 31 rounds settle is right."""
    tokens = 101
    similarity = torch.full((1, tokens, tokens), -1.0)
    index = torch.arange(tokens - 1)
    similarity[0, index + 1, index] = similarity[0, index, index + 1] = 0.9
    greedy = torch.arange(tokens) % 2 == 0
    tau = torch.tensor([[0.5]])
    assert torch.equal(survivors(similarity, tau)[0, 0], greedy)
    with Pretended(fp64) as device:
        batched = on_cpu(survivors(device.put(similarity), device.put(tau)))[0, 0]
        short = on_cpu(survivors(device.put(similarity[:, :NMS_ROUNDS, :NMS_ROUNDS]), device.put(tau)))[0, 0]
    assert torch.equal(batched[:NMS_ROUNDS], greedy[:NMS_ROUNDS]) and torch.equal(short, greedy[:NMS_ROUNDS])
    assert not (batched & ~greedy).any()


class Selecting(torch.nn.Module):
    def __init__(self, case, most):
        super().__init__()
        self.case, self.most = case, most

    def forward(self, views, counts, attention):
        name, settings = CASES[self.case]
        return METHODS[name](views, counts, settings, Context(max_count=self.most, attention=attention)).indices


@pytest.mark.contract
@pytest.mark.parametrize(
    "case", ["paper", "spread", *[pytest.param(case, marks=pytest.mark.slow) for case in ("auto", "release")]]
)
def test_compiles_and_exports_for_any_batch(case):
    module = Selecting(case, 16)

    def inputs(batch, seed):
        views = smooth(batch, 100, 48, seed)
        return views, torch.full((batch,), 16), attention_of(views)

    compiled = torch.compile(module, fullgraph=True, backend="eager", dynamic=True)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(module, inputs(3, 0), dynamic_shapes=({0: batch}, {0: batch}, {0: batch})).module()
    for size, seed in ((3, 1), (5, 2)):
        views, counts, attention = inputs(size, seed)
        with Pretended() as device:
            expected = on_cpu(module(device.put(views), device.put(counts), device.put(attention)))
        assert torch.equal(compiled(views, counts, attention), expected)
        assert torch.equal(exported(views, counts, attention), expected)


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, ("paper", {})),
        ({"grouping": "kmeans", "seed": 3}, ("paper", {"grouping": "kmeans", "seed": 3})),
        ({"score": "cls_attention", "center": "features", "quota": "bounded", "keep_cls": True}, ("release", {})),
        (
            {"score": "cls_attention"},
            ("release", {"center": "tokens", "quota": "proportional", "keep_cls": False}),
        ),
        ({"score": "cls_attention", "quota": "spread"}, ("spread", {})),
        ({"quota": "spread", "keep_cls": True}, ("spread", {"score": "component", "keep_cls": True})),
        (
            {"quota": "bounded", "seed": 1},
            ("release", {"score": "component", "center": "tokens", "keep_cls": False, "seed": 1}),
        ),
    ],
)
def test_saved_configurations_keep_their_meaning(fields, expected):
    assert method_of_saved(fields) == expected
    check_method(*expected)


def test_methods_are_looked_up_by_name():
    with pytest.raises(
        ValueError, match=r"prunesid_config.method must be one of \('paper', 'release', 'spread'\).*'best'"
    ):
        method_of("best")
    with pytest.raises(ValueError, match=r"'paper' may have \('grouping', 'seed', 'question'\), got 'score'"):
        check_method("paper", {"score": "component"})
    with pytest.raises(ValueError, match=r"\['center'\] must be one of 'tokens', 'features', got 'both'"):
        check_method("release", {"center": "both"})


@pytest.mark.parametrize("name", METHODS)
def test_a_repository_carries_one_method(name):
    source = carried_source(name, inspect.getsource(methods))
    compile(source, "methods.py", "exec")
    assert [other for other in METHODS if f"from .method_{other} import" in source] == [name]
    assert [other for other in METHODS if f'    "{other}": {other},' in source] == [name]
