"""A repo carries the code of its own model: which parts travel, what loads without them, and what the others say."""

import copy
import json
from pathlib import Path

import oracle_family
import pytest
import tiny_qwen
import torch
from clean_process import LOAD, run_clean
from tiny import BUDGET, pixels
from tiny_checkpoint import save_checkpoint
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import modeling_prunesid
from modeling_prunesid import PruneSIDLlavaForConditionalGeneration
from modeling_prunesid.methods import module_of
from modeling_prunesid.repo_code import carried_parts
from prunesid_cli.repo_check import check_repo


# The name in `parts.py`, and its file.
PARTS = {
    "ATTENTION": "attention", "CLS": "cls_attention", "DYNAMIC": "dynamic", "GROUPING": "grouping",
    "QUESTION": "question", "THIN": "thin",
}  # fmt: skip
SOURCE = Path(modeling_prunesid.__file__).with_name("parts.py").read_text()
# Settings, and the parts that they need.
SETTINGS = {
    "paper": ({}, set()),
    "kmeans": ({"method_settings": {"grouping": "kmeans"}}, {"GROUPING"}),
    "random": (
        {"method": "release", "method_settings": {"grouping": "random", "score": "component"}},
        {"GROUPING", "CLS"},
    ),
    "psca": ({"method_settings": {"grouping": "psca"}}, set()),
    "question": ({"method_settings": {"question": True}}, {"QUESTION"}),
    "attention": ({"method": "spread", "method_settings": {"score": "attention"}}, {"ATTENTION", "CLS"}),
    "cls": ({"method": "release"}, {"CLS"}),
    "dynamic": ({"dynamic": True, "reference_information": 0.9}, {"DYNAMIC"}),
}
# What a repo without the package says of what only the package has.
REFUSED = """
import json, sys

sys.modules["modeling_prunesid"] = None
from transformers import AutoConfig

config, refused = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True), []
for value in ("llava_1.5_64", {"score": "cls_attention"}, {"grouping": "kmeans"}):
    try:
        config.prunesid_config = value
    except ValueError as error:
        refused.append(str(error))
try:
    type(config).from_dict({"model_type": "llava_next"})
    type(config).from_pretrained(sys.argv[2])
except ValueError as error:
    refused.append(str(error))
print(json.dumps(refused))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A stock checkpoint."""
    return save_checkpoint(tmp_path_factory.mktemp("base"))


def from_base(base, **settings):
    return PruneSIDLlavaForConditionalGeneration.from_pretrained(base, prunesid_config={"budget": BUDGET, **settings})


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """A variant with weights, and a thin one."""
    folder = tmp_path_factory.mktemp("variants")
    for name in ("full", "thin"):
        from_base(base).save_pretrained(folder / name, thin=name == "thin")
    return {name: folder / name for name in ("full", "thin")}


def of_repo(folder, name="modeling_prunesid_llava.PruneSIDLlavaForConditionalGeneration"):
    """A class of the code in a folder."""
    own = get_class_from_dynamic_module(name, str(folder))
    assert own.__module__.startswith("transformers_modules.")
    return own


def parts_in(folder):
    """The parts that a folder carries: each is imported and has its file, and each of the others is None."""
    source = (folder / "parts.py").read_text()
    carried = {name for name, file in PARTS.items() if f"from .{file} import " in source}
    assert all((f"{name} = None\n" in source) is (name not in carried) for name in PARTS)
    assert {name for name, file in PARTS.items() if (folder / f"{file}.py").exists()} == carried
    assert (folder / "repo_files.py").exists() is ("THIN" in carried)
    return carried


def test_each_part_is_written_and_left_out_alone():
    for needed in (set(), *({name} for name in PARTS), set(PARTS)):
        source = carried_parts(needed, SOURCE)
        compile(source, "parts.py", "exec")
        assert {name for name in PARTS if f"{name} = None" not in source.split("\n")} == needed
        assert carried_parts(PARTS, source) == SOURCE


@pytest.mark.parametrize("name", SETTINGS)
def test_a_repo_carries_the_parts_that_its_settings_need_and_names_what_it_lacks(base, tmp_path, name):
    settings, needed = SETTINGS[name]
    model = from_base(base, **settings)
    model.save_pretrained(tmp_path)
    assert parts_in(tmp_path) == needed
    assert check_repo(str(tmp_path))[1] == []
    loaded = of_repo(tmp_path).from_pretrained(tmp_path)
    if "QUESTION" not in needed:
        found, expected = (each.get_image_features(pixels(2)).keep_indices for each in (loaded, model))
        assert all(map(torch.equal, found, expected))
    assert type(loaded.config)().prunesid_config.method == settings.get("method", "paper")
    processor = of_repo(tmp_path, "modeling_prunesid_llava.PruneSIDLlavaProcessor").from_pretrained(tmp_path)
    assert processor.num_visual_tokens == (None if "DYNAMIC" in needed else BUDGET)
    own = loaded.config.prunesid_config
    lacking = {"QUESTION": {"question": True}, "GROUPING": {"grouping": "kmeans"}, "ATTENTION": {"score": "attention"}}
    lacking |= {"CLS": {"score": "cls_attention"}}
    for part, method_settings in lacking.items():
        own.method_settings = {**settings.get("method_settings", {}), **method_settings}
        if part in needed:
            own.check()
        elif method_settings.keys() <= module_of(own.method).RULES.keys():
            with pytest.raises(ValueError, match="method_settings=.* needs code that this model was saved without"):
                own.check()
    own.method_settings, own.dynamic, own.reference_information = settings.get("method_settings"), True, 0.9
    if "DYNAMIC" in needed:
        own.check()
    else:
        with pytest.raises(ValueError, match="dynamic=True needs code that this model was saved without"):
            own.check()


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "llava_next", "internvl", "paligemma"])
@torch.no_grad()
def test_settings_changed_after_loading_are_refused_wherever_they_are_read(family, tmp_path):
    ours, _, row = oracle_family.build(family)
    own = {"score": "component", "keep_cls": False}
    model = copy.deepcopy(ours)
    model.config.prunesid_config = {"budget": row.budget, **row.settings, "method": "spread", "method_settings": own}
    model.save_pretrained(tmp_path)
    loaded = of_repo(tmp_path, f"{type(ours).__module__.rpartition('.')[2]}.{type(ours).__name__}")
    loaded = loaded.from_pretrained(tmp_path).double()
    inputs = oracle_family.prompt(row)
    first = loaded.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    settings = loaded.config.prunesid_config

    def second_turn():
        ids = torch.nn.functional.pad(first.sequences, (0, 2), value=7)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
        loaded.generate(ids, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=1)

    encode = loaded.get_image_features
    images = row.inputs(oracle_family.rows_of(row))
    entrances = [
        lambda: encode(**images),
        lambda: encode(**images, num_visual_tokens=list(row.kept)),
        lambda: loaded(**inputs),
        lambda: loaded.generate(**inputs, max_new_tokens=1),
    ]
    towers = {"vision_tower", "visual"}
    tower = next(module for name, module in loaded.named_modules() if name.rpartition(".")[2] in towers)
    tower.register_forward_pre_hook(lambda *_: pytest.fail("the tower runs"))
    for changed in ({"question": True}, {"question": "keep"}, {"score": "attention"}):
        settings.method_settings = {**own, **changed}
        for enter in [*entrances, *([second_turn] if "question" in changed else [])]:
            with pytest.raises(ValueError, match="method_settings=.* needs code that this model was saved without"):
                enter()
    settings.method_settings, settings.dynamic, settings.reference_information = own, True, 0.9
    for enter in entrances:
        with pytest.raises(ValueError, match="dynamic=True needs code that this model was saved without"):
            enter()


@pytest.mark.parametrize("method", ["release", "spread"])
def test_a_method_whose_defaults_do_not_fit_the_family_is_carried_with_settings_that_do(tmp_path, method):
    """In Transformers 5.18 a configuration has its defaults before it has what it is given."""
    model = tiny_qwen.build("Qwen2VL")
    settings = {"budget": BUDGET, "method": method, "method_settings": {"score": "component", "keep_cls": False}}
    model.config.prunesid_config = settings
    model.save_pretrained(tmp_path)
    loaded = of_repo(tmp_path, f"modeling_prunesid_qwen2_vl.{type(model).__name__}").from_pretrained(tmp_path)
    assert loaded.config.prunesid_config.to_dict() == model.config.prunesid_config.to_dict()
    assert type(loaded.config)().prunesid_config.method == method
    with pytest.raises(ValueError, match="needs cls_attention of a vision tower with a CLS token"):
        loaded.config.prunesid_config = {"budget": BUDGET}


def test_thin_variants_alone_carry_what_loads_them(folders):
    assert (parts_in(folders["full"]), parts_in(folders["thin"])) == (set(), {"THIN"})
    assert check_repo(str(folders["thin"]))[1] == []
    tokenizer = json.loads((folders["thin"] / "tokenizer_config.json").read_text())
    assert tokenizer["auto_map"]["AutoTokenizer"] == [None, "thin.BaseTokenizer"]


@pytest.mark.parametrize("thin", [True, False], ids=["thin", "full"])
@pytest.mark.parametrize("of", ["full", "thin"])
def test_code_of_a_repo_saves_either_kind(folders, base, tmp_path, of, thin):
    loaded = of_repo(folders[of]).from_pretrained(folders[of])
    if of == "full":
        loaded.config.prunesid_config.base_model_name_or_path = str(base)
    loaded.save_pretrained(tmp_path, thin=thin)
    assert parts_in(tmp_path) == ({"THIN"} if thin else set())
    again = of_repo(tmp_path).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in loaded.state_dict().items())
    processor = of_repo(tmp_path, "modeling_prunesid_llava.PruneSIDLlavaProcessor").from_pretrained(tmp_path)
    assert processor.num_visual_tokens == BUDGET


def test_weights_over_a_thin_variant_by_code_that_loads_none(folders, tmp_path):
    loaded = of_repo(folders["full"]).from_pretrained(folders["full"])
    loaded.config.prunesid_config.base_model_name_or_path = str(folders["full"])
    loaded.save_pretrained(tmp_path, thin=True)
    loaded.save_pretrained(tmp_path)
    assert parts_in(tmp_path) == set()


def test_a_part_that_a_repo_lacks_comes_from_the_package_when_it_is_saved_with_that(folders, tmp_path):
    loaded = of_repo(folders["full"]).from_pretrained(folders["full"])
    loaded.config.prunesid_config.method_settings = {"grouping": "random"}
    loaded.save_pretrained(tmp_path)
    assert parts_in(tmp_path) == {"GROUPING"}
    again = of_repo(tmp_path).from_pretrained(tmp_path)
    assert len(again.get_image_features(pixels(1)).keep_indices[0]) == BUDGET


@pytest.mark.parametrize("name", ["PruneSIDLlavaForConditionalGeneration", "PruneSIDLlavaProcessor"])
def test_code_of_a_full_variant_says_what_loads_a_thin_one(folders, name, tmp_path):
    own = of_repo(folders["full"], f"modeling_prunesid_llava.{name}")
    with pytest.raises(ValueError, match="Loading .*thin, a thin variant, needs code that this model was saved wit"):
        own.from_pretrained(folders["thin"])
    with pytest.raises(OSError, match=f"{tmp_path}"):
        own.from_pretrained(tmp_path)


@pytest.mark.contract
@pytest.mark.parametrize("kind", ["full", "thin"])
def test_both_kinds_answer_without_the_package(folders, tmp_path, kind):
    found = run_clean(LOAD, tmp_path / "home", folders[kind])
    assert (found["config"], found["processor"]) == ("PruneSIDLlavaConfig", "PruneSIDLlavaProcessor")
    assert found["length"] == BUDGET + 2
    for auto_class in ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        assert found[auto_class]["keys"] == []
        assert len(found[auto_class]["answer"][0]) == found["length"] + 6
    assert found["one chat"].split()


@pytest.mark.contract
def test_what_only_the_package_has_is_named_without_it(folders, base, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llava_next"}')
    preset, retired, grouping, stock = run_clean(REFUSED, tmp_path / "home", folders["full"], other)
    assert "Presets come with the package prunesid-transformers, which is not installed" in preset
    for name, refused in (("score", retired), ("grouping", grouping)):
        assert f"prunesid_config has no field '{name}'. Its fields are: " in refused
        assert refused.endswith("For those of version 0.1.0 install prunesid-transformers.")
    assert "PruneSIDLlava classes load those of 'llava'. Load it with AutoModelForImageTextToText." in stock
