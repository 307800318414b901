"""A ViTCoP folder, with weights and thin, in a process that cannot import our package."""

import json
from pathlib import Path

import pytest
from clean_process import LOAD, run_clean
from tiny import NUM_PATCHES
from tiny_checkpoint import save_checkpoint

from modeling_prunesid import ViTCoPConfig, ViTCoPLlavaForConditionalGeneration
from prunesid_cli.repo_check import check_repo


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def loaded(base):
    """A stock checkpoint in our class; its language model has two layers, so that more tokens are needed."""
    model, info = ViTCoPLlavaForConditionalGeneration.from_pretrained(
        base, vitcop_config=ViTCoPConfig(budget=20), output_loading_info=True
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@pytest.mark.contract
@pytest.mark.parametrize("thin", [False, True], ids=["weights", "thin"])
def test_a_clean_process_answers(base, loaded, tmp_path, thin):
    folder = tmp_path / "variant"
    loaded.save_pretrained(folder, thin=thin)
    assert check_repo(str(folder))[1] == []
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["ViTCoPLlavaForConditionalGeneration"]
    assert config["auto_map"]["AutoConfig"] == "modeling_vitcop_llava.ViTCoPLlavaConfig"
    assert config["auto_map"]["AutoProcessor"] == "modeling_vitcop_llava.ViTCoPLlavaProcessor"
    assert config["vitcop_config"]["budget"] == 20 and "prunesid_config" not in config
    assert "with ViTCoP" in (folder / "README.md").read_text()
    modules = {path.stem for path in folder.glob("*.py")}
    for path in folder.glob("*.py"):
        for line in path.read_text().splitlines():
            if line.strip().startswith("from ."):
                assert line.split()[1].removeprefix(".") in modules, f"{path.name}: {line}"
    assert bool(list(folder.glob("*.safetensors"))) is not thin
    if not thin:
        assert Path(folder, "model.safetensors").read_bytes() == Path(base, "model.safetensors").read_bytes()

    found = run_clean(LOAD, tmp_path / "home", folder)
    assert (found["config"], found["processor"]) == ("ViTCoPLlavaConfig", "ViTCoPLlavaProcessor")
    assert found["length"] == NUM_PATCHES + 2
    for auto_class in ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        assert found[auto_class]["class"] == "ViTCoPLlavaForConditionalGeneration"
        assert found[auto_class]["keys"] == []
        assert found[auto_class]["answer"] == found["AutoModel"]["answer"]
        assert len(found[auto_class]["answer"][0]) == found["length"] + 6
    assert found["AutoModel"]["from_config"] == "ViTCoPLlavaModel"
    assert found["two chats"] == [found["one chat"]] * 2
