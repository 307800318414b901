"""The model card of a saved variant: valid metadata, usage to copy, the settings and the citation."""

import functools
import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import PretrainedConfig
from transformers.utils import cached_file


_TAG = "prunesid"
_LICENSE_FIELDS = ("license", "license_name", "license_link")
_NO_SETTINGS = ("model_type", "transformers_version", "base_model_name_or_path", "base_model_revision")

_TEXT = """# {title}

{base} with {method}: {budget} {weights}

## Usage

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

repo = "{repo}"
model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)

image = {{"type": "image", "url": "photo.jpg"}}
question = {{"type": "text", "text": "What is shown in this image?"}}
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": [image, question]}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, model.dtype)
output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

`trust_remote_code=True` runs the Python files of this repo{base_code}; pass `revision="<commit>"` to pin what you have
read. With the package prunesid-transformers, `prunesid doctor {repo}` compares them with its own.{engines}
For another budget, load the model with `{settings_name}={{"budget": 32}}`{and_processor}.

## Settings

| `{settings_name}` | value |
|---|---|
{settings}

## Citation

```bibtex
{citation}
```
"""
_ENGINES = """ Engines that do not call `from_pretrained`, such as vLLM, need the weights in the folder:
`model.save_pretrained("full")` writes a variant that has them."""
_PRUNESID = """@inproceedings{fang2026prunesid,
  title     = {Prune Redundancy, Preserve Essence: Vision Token Compression in {VLMs} via Synergistic
               Importance-Diversity},
  author    = {Fang, Zhengyao and Lyu, Pengyuan and Zhang, Chengquan and Lu, Guangming and Yu, Jun and Pei, Wenjie},
  booktitle = {International Conference on Learning Representations},
  year      = {2026}
}"""
_VITCOP = """@misc{vitcop2026,
  title         = {ViTCoP: Visual and Textual Semantic Collaborative Pruning},
  eprint        = {2601.17818},
  archivePrefix = {arXiv},
  year          = {2026}
}"""


def write_card(
    folder: str | os.PathLike,
    config: PretrainedConfig,
    base: str | None,
    thin: bool,
    repo_id: str | None = None,
    tags: list[str] | None = None,
    base_revision: str | None = None,
) -> None:
    """
    Write `README.md`, in place of an earlier card of ours; a card that somebody else wrote is left alone.

    Args:
        folder: where the variant was saved.
        config: the model's configuration.
        base: the checkpoint that the variant was made from, a name on the Hub or a folder.
        thin: the weights are the base's, and not in the folder.
        repo_id: the name that the usage shows; by default the folder.
        tags: further tags.
        base_revision: commit of the base, or None for the newest.
    """
    path = Path(folder, "README.md")
    if path.exists() and _TAG not in (ModelCard.load(path, ignore_metadata_errors=True).data.tags or []):
        return
    is_on_hub = base is not None and not os.path.isdir(base)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=base if is_on_hub else None,
        base_model_relation=("adapter" if thin else "finetune") if is_on_hub else None,
        tags=[_TAG, "visual-token-pruning", *(tags or [])],
        **(_license(base, base_revision) if base is not None else {}),
    )
    repo = repo_id or str(folder)
    settings = config.prunesid_config.to_dict()
    is_vitcop = config.prunesid_config.model_type == "vitcop"
    text = _TEXT.format(
        method="ViTCoP" if is_vitcop else "PruneSID",
        settings_name=config.prunesid_config.base_config_key,
        and_processor=" and the processor with `num_visual_tokens=32`" if _has_short_prompts(folder) else "",
        citation=_VITCOP if is_vitcop else _PRUNESID,
        title=repo.rstrip("/").rsplit("/", 1)[-1],
        base=f"`{base or config.model_type}`",
        budget=_describe_budget(config.prunesid_config),
        base_code=_describe_base_code(base, base_revision) if thin else "",
        engines=_ENGINES if thin else "",
        weights="This repo holds no weights: they are taken from the base when it is loaded." if thin else "",
        repo=repo,
        settings="\n".join(
            f"| `{name}` | `{value}` |" for name, value in settings.items() if name not in _NO_SETTINGS
        ),
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(path)


def _describe_base_code(base: str | None, revision: str | None) -> str:
    """What else runs, and does not run, when a thin variant is loaded."""
    pinned = f"commit `{revision}`" if revision is not None else "its newest commit"
    return (
        f" and no other: weights, tokenizer and image processor come from `{base}` at {pinned}, and Python files that "
        "it may have run only with `base_trust_remote_code=True` as well"
    )


def _has_short_prompts(folder: str | os.PathLike) -> bool:
    """Whether the processor in the folder writes prompts by a budget of its own."""
    path = Path(folder, "processor_config.json")
    return path.exists() and "num_visual_tokens" in json.loads(path.read_text(encoding="utf-8"))


def _describe_budget(settings: PretrainedConfig) -> str:
    if settings.budget is None:
        return "no token is dropped unless a call asks for it."
    if isinstance(settings.budget, int):
        amount = f"{settings.budget} visual tokens"
    else:
        amount = f"{settings.budget:.1%} of the visual tokens"
    if settings.model_type == "vitcop":
        return f"{amount} of each image, in the mean over the layers of the language model."
    scope = "encoded view (image, crop or frame)" if settings.budget_scope == "view" else "image or clip"
    adjusted = ", adjusted to how much it shows" if settings.dynamic else ""
    return f"it keeps {amount} of each {scope}{adjusted}. The other visual tokens never reach the language model."


@functools.lru_cache
def _license(base: str, revision: str | None) -> dict[str, Any]:
    """The license fields in the card of the base; none where it has no card, or the card cannot be reached."""
    try:
        path = cached_file(base, "README.md", revision=revision)
        data = ModelCard.load(path, ignore_metadata_errors=True).data
    except (OSError, ValueError):
        return {}
    return {name: data.get(name) for name in _LICENSE_FIELDS if data.get(name) is not None}
