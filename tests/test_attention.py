"""The attention that tokens receive in one layer of a tower, against upstream's own eager weights in float64."""

import contextlib
import itertools
import sys
import threading

import oracle_family as contract
import pytest
import torch
from families import every_row
from oracle_family import settings_of
from tiny import build as build_llava
from tiny import pixels
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_prunesid import attention
from modeling_prunesid.attention import encode_with_attention, received_attention, watch_attention
from modeling_prunesid.family import PrunedModelMixin
from modeling_prunesid.patches import tower_of
from modeling_prunesid.tower import layers_of
from modeling_prunesid.views import View, as_views


# Families whose towers have no attention to read, or whose tokens are queries, which stand for no patches.
WITHOUT = {
    "aria",
    "deepseek_ocr2",
    "fast_vlm",
    "gemma3n",
    "gemma4_unified",
    "got_ocr2",
    "granite4_vision",
    "idefics2",
    "inkling_mm_model",
    "perception_lm",
    "pp_chart2table",
}


def has_attention(row):
    """A row whose tokens are compared as they enter the language model, and whose patches attend to each other."""
    return "projector_name" not in row.mechanisms and row.family not in WITHOUT


every_tower = every_row(has_attention)


def weights_of(queries, keys, scaling, mask=None):
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    logits = torch.einsum("bhqd,bhkd->bhqk", queries, keys) * scaling
    return (logits if mask is None else logits + mask).softmax(-1)


@pytest.mark.parametrize("at_once", [1, 100, 2**24])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["none", "bool", "added"])
def test_it_is_the_mean_over_heads_and_queries_in_any_parts(monkeypatch, at_once, key_heads, kind):
    monkeypatch.setattr(attention, "_LOGITS_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 4, 13, 8, dtype=torch.float64, generator=generator)
    keys = torch.randn(2, key_heads, 13, 8, dtype=torch.float64, generator=generator)
    attends = (torch.arange(13) < torch.tensor([13, 9])[:, None])[:, None, None]
    added = torch.zeros(attends.shape, dtype=torch.float64).masked_fill(~attends, -torch.inf)
    mask = {"none": None, "bool": attends, "added": added}[kind]
    expected = weights_of(queries, keys, 0.3, None if mask is None else added).mean((1, 2))
    got = received_attention(queries, keys, 0.3, mask)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got.sum(1), torch.ones(2, dtype=torch.float64))
    low = received_attention(queries.bfloat16(), keys.bfloat16(), 0.3, attends if kind != "none" else None)
    assert low.dtype == torch.float32


def test_no_matrix_of_all_pairs_is_formed(monkeypatch):
    monkeypatch.setattr(attention, "_LOGITS_AT_ONCE", 2**14)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            output = function(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor):
                largest = max(largest, output.numel())
            return output

    queries = torch.randn(1, 2, 1024, 4)
    with Largest():
        received_attention(queries, queries)
    assert 2**13 < largest <= 2**14


@contextlib.contextmanager
def eager_weights(layer):
    """
    What upstream's own eager attention of a layer, the function of its file, is given and gives: the mean weights that
    each key receives, by its queries and keys in float64 and by its own weights, which are in float32.
    """
    module = attention._attention_of(layer)
    file, found = sys.modules[type(module).__module__], []
    name = "vision_eager_attention_forward" if "llama4" in file.__name__ else "eager_attention_forward"
    own, implementation = getattr(file, name), module.config._attn_implementation

    def record(watched, query, key, value, attention_mask=None, **kwargs):
        output = own(watched, query, key, value, attention_mask, **kwargs)
        if watched is module:
            scaling = kwargs["scaling"] or query.shape[-1] ** -0.5
            weights = weights_of(query.double(), key.double(), scaling, attention_mask)
            found.append((weights.mean((1, 2)).flatten(), output[1].double().mean((1, 2)).flatten()))
        return output

    setattr(file, name, record)
    module.config._attn_implementation = "eager"
    try:
        yield found
    finally:
        setattr(file, name, own)
        module.config._attn_implementation = implementation


def last_layer_of(ours):
    """A layer that attends to whole images, and its index among hidden states."""
    layers = layers_of(tower_of(ours))
    return layers[-1], len(layers)


def arguments_of(row):
    return {**row.inputs(contract.rows_of(row)), "return_dict": True}


def read_last_layer(ours, row):
    """The attention that the patches of our own model receive in its last layer, and what the tower is given there."""
    layer, index = last_layer_of(ours.model)
    encode = getattr(super(PrunedModelMixin, ours.model), f"get_{row.modality}_features")
    inputs = contract.for_stock(row, arguments_of(row))
    inputs.pop("video_compression_mask", None)
    # Off, because upstream's encoder of videos may call that of images, which is ours.
    with settings_of(ours, budget=None):
        with watch_attention(layer) as received:
            encode(**inputs)
        with settings_of(ours, layer=index):
            _, patches = encode_with_attention(ours.model, row.modality, encode, inputs)
    return patches, received


def views_of(ours, row, output):
    """The rows of each view of all inputs, among upstream's features of them."""
    sizes = [len(own) for own in ours.model.features_of(output)]
    given = ours.model.views(row.modality, row.inputs(contract.rows_of(row)), sizes)
    if not isinstance(given[0][0], View):
        sizes = [sum(own) for own in given]
    starts = itertools.accumulate(sizes, initial=0)
    return [[view.rows + start for view in as_views(own)] for own, start in zip(given, starts)]


@every_tower
@torch.no_grad()
def test_patches_receive_what_upstream_s_weights_say(name):
    ours, reference, row = contract.build(name)
    tower = reference_tower(ours, reference)
    with eager_weights(layers_of(tower)[-1]) as weights:
        contract.encode(reference, row)
    expected, of_upstream = zip(*weights)
    torch.testing.assert_close(torch.cat(of_upstream), torch.cat(expected), rtol=1e-5, atol=1e-7)
    # Eager as the other: otherwise the layers before it round differently.
    with eager_weights(last_layer_of(ours.model)[0]):
        got, received = read_last_layer(ours, row)
    shapes = [part.shape for part in received]
    expected = [part.view(shape) for part, shape in zip(expected, shapes, strict=True)]
    expected = torch.cat([ours.model.patches_of(part).flatten() for part in expected])
    if got.dtype == torch.float64:
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-14)
    else:  # upstream rotates in float32
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-7)


def reference_tower(ours, reference):
    """The stock model's tower, which is where ours has it."""
    base = contract.base_of(reference)
    paths = {id(module): path for path, module in ours.model.named_modules()}
    return base.get_submodule(paths[id(tower_of(ours.model))])


@contextlib.contextmanager
def one_patch_is_another(layers, place):
    """The first of some layers of a tower changes the token `place`, and the others return what they are given."""
    seen = 0

    def replace(layer):
        run = layer.forward

        def forward(*args, **kwargs):
            nonlocal seen
            output = run(*args, **kwargs)
            hidden = args[0] if args else kwargs.get("hidden_states", kwargs.get("hidden_state"))
            if layer is layers[0]:
                hidden = (output[0] if isinstance(output, tuple) else output).clone(
                    memory_format=torch.contiguous_format
                )
                tokens = hidden.view(-1, hidden.shape[-1])
                if 0 <= place - seen < len(tokens):
                    tokens[place - seen] += torch.linspace(1, -2, tokens.shape[1], dtype=tokens.dtype)
                seen += len(tokens)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        layer.forward = forward

    for layer in layers:
        replace(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@every_tower
@torch.no_grad()
def test_a_token_receives_the_mean_of_the_patches_that_it_is_merged_from(name):
    """A patch that is another one changes the tokens that it is merged into, and no others."""
    ours, reference, row = contract.build(name)
    _, received = read_last_layer(ours, row)
    layers = layers_of(reference_tower(ours, reference))
    layers = (
        list(layers)[-1:] if row.family.startswith("minicpm") else list(layers)
    )  # whose tower merges in its middle
    places = torch.arange(sum(part.numel() for part in received)).split([part.numel() for part in received])
    places = [ours.model.patches_of(own.view(part.shape)).flatten() for own, part in zip(places, received)]
    places = torch.cat(places).tolist()  # of the patches among all tokens of a layer
    with one_patch_is_another(layers, -1):
        output = contract.encode(reference, row)
    before, rows = row.features(output), torch.cat(list(itertools.chain(*views_of(ours, row, output))))
    inputs = row.inputs(contract.rows_of(row))

    def pool(patches):
        return ours.model.pool_attention(patches, row.modality, inputs, len(rows))

    for patch in range(0, len(places), max(len(places) // 24, 1) | 1):
        with one_patch_is_another(layers, places[patch]):
            changed = (row.features(contract.encode(reference, row)) - before).abs().amax(1) > 1e-9
        only = torch.zeros(len(places), dtype=torch.float64)
        only[patch] = 1
        got = rows[pool(only).nonzero()[:, 0]].sort().values.tolist()
        assert got == [token for token in changed.nonzero()[:, 0].tolist() if token in rows]
    ones = torch.ones(len(places), dtype=torch.float64)
    torch.testing.assert_close(pool(ones), torch.ones(len(rows), dtype=torch.float64))


@every_tower
@torch.no_grad()
def test_the_token_of_most_attention_is_kept_first(name):
    ours, reference, row = contract.build(name)
    patches, _ = read_last_layer(ours, row)
    views = views_of(ours, row, contract.encode(reference, row))
    lengths = [len(view) for own in views for view in own]
    inputs = row.inputs(contract.rows_of(row))
    scores = iter(ours.model.pool_attention(patches, row.modality, inputs, sum(lengths)).split(lengths))
    starts = list(itertools.accumulate(row.tokens[: row.num_inputs], initial=0))
    best = [int(view[next(scores).argmax()]) for own in views for view in own]
    best = [sorted(place - first for place in best if first <= place < end) for first, end in zip(starts, starts[1:])]
    _, index = last_layer_of(ours.model)
    for method in ("spread", "release"):
        options = {"score": "attention", "keep_cls": False}
        with settings_of(ours, layer=index, budget=1, method=method, method_settings=options):
            kept = contract.encode_ours(ours, row)["keep_indices"]
        assert [own.tolist() for own in kept] == best


@every_row(lambda row: row.family in WITHOUT)
@torch.no_grad()
def test_a_tower_without_attention_of_patches_is_refused(name):
    ours, _, row = contract.build(name)
    settings = settings_of(ours, layer=-1, method="spread", method_settings={"score": "attention"})
    with settings, pytest.raises(ValueError, match="score='attention'.*Use score='component'"):
        contract.encode_ours(ours, row)


def test_a_layer_that_attends_within_windows_is_refused():
    ours, _, row = contract.build("qwen2_5_vl")
    inputs = row.inputs(contract.rows_of(row))
    messages = {1: r"layer=1 does not attend .* to the whole image.*Set layer=2\.", 0: "nearest layer that does is 2"}
    for layer, message in messages.items():
        settings = settings_of(ours, layer=layer, method="spread", method_settings={"score": "attention"})
        with settings, pytest.raises(ValueError, match=message):
            ours.model.get_image_features(**inputs)


@torch.no_grad()
def test_a_family_whose_tokens_are_patches():
    ours, reference, row = contract.build("paligemma")
    with eager_weights(layers_of(reference.model.vision_tower)[-2]) as weights:
        contract.encode(reference, row)
    best = torch.cat([part[0].view(-1, 64) for part in weights]).argmax(1)
    with settings_of(ours, budget=1, method="spread", method_settings={"score": "attention"}):
        kept = contract.encode(ours, row)["keep_indices"]
    assert torch.equal(torch.cat(list(kept)), best)


@pytest.mark.parametrize("tower", ["siglip", "clip"])
@pytest.mark.parametrize("layer", [-2, 1])
@torch.no_grad()
def test_a_tower_that_tokens_are_compared_in(tower, layer):
    options = {"score": "attention", "keep_cls": False}
    vision = {"model_type": f"{tower}_vision_model"}
    ours = build_llava(1, vision=vision, layer=layer, method="spread", method_settings=options)
    if tower == "siglip":
        ours.config.vision_feature_select_strategy = "full"
    images = pixels(3).double()
    kept = ours.model.get_image_features(images).keep_indices
    vision = ours.model.vision_tower
    vision.set_attn_implementation("eager")
    weights = vision(images, output_attentions=True).attentions
    received = weights[layer % (len(weights) + 1) - 1].mean((1, 2))[:, int(tower == "clip") :]
    assert [own.tolist() for own in kept] == [[place] for place in received.argmax(1).tolist()]
    assert torch.equal(torch.cat(ours.model.get_image_features(images).keep_indices), torch.cat(list(kept)))


def test_the_configuration_is_the_module_s_own_again():
    ours, _, row = contract.build("qwen3_vl")
    layer, _ = last_layer_of(ours.model)
    module = attention._attention_of(layer)
    own = module.config
    with pytest.raises(RuntimeError), watch_attention(layer):
        assert module.config is not own
        raise RuntimeError
    assert module.config is own and not attention._watched


def test_threads_read_their_own_images():
    ours, _, row = contract.build("qwen3_vl")
    _, index = last_layer_of(ours.model)
    encode = super(PrunedModelMixin, ours.model).get_image_features
    results = {}

    def run(place):
        inputs = {**row.inputs([[place]]), "return_dict": True}
        with torch.no_grad():
            results[place] = [encode_with_attention(ours.model, "image", encode, inputs)[1] for _ in range(5)]

    with settings_of(ours, layer=index):
        threads = [threading.Thread(target=run, args=(place,)) for place in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        together = results
        results = {}
        for place in range(3):
            run(place)
    assert all(torch.equal(*pair) for place in range(3) for pair in zip(together[place], results[place]))
    assert not attention._watched


@pytest.mark.parametrize("score", ["component", "attention"])
def test_a_repo_carries_what_reads_attention_only_where_its_method_does(score, tmp_path):
    model = build_llava(method="spread", method_settings={"score": score})
    model.save_pretrained(tmp_path)
    assert (tmp_path / "attention.py").exists() is (score == "attention")
    name = "modeling_prunesid_llava.PruneSIDLlavaForConditionalGeneration"
    loaded = get_class_from_dynamic_module(name, str(tmp_path)).from_pretrained(tmp_path)
    found, expected = (each.get_image_features(pixels(2)).keep_indices for each in (loaded, model))
    assert all(map(torch.equal, found, expected))
    settings = loaded.config.prunesid_config
    if score == "component":
        with pytest.raises(ValueError, match="needs code that this model was saved without"):
            settings.method_settings = {"score": "attention"}
            settings.check()
