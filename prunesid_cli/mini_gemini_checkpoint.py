"""A published Mini-Gemini checkpoint in Transformers' layout, which `prunesid convert` goes on with.

The published checkpoints (MGM) hold the language model, the projectors, and in some of them the towers as they were
trained; the other towers come from the checkpoints that MGM names: OpenAI's CLIP, and OpenCLIP's ConvNeXt
(convnext_large_d_320). Every weight of MGM has to find its place and every place its weight; otherwise nothing is
written. The language models are those of Llama, Gemma and Mistral (Mixtral is not supported).

`<image>` becomes a token of the tokenizer, with the mean of all embeddings. A tokenizer without a chat template gets
that of Vicuna, with `Image 1:`, `Image 2:` before the images of a chat that has several, as MGM writes it.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, CLIPVisionConfig, LlavaImageProcessorPil

from modeling_prunesid import MiniGeminiConfig, MiniGeminiForConditionalGeneration, MiniGeminiProcessor


LANGUAGE_MODELS = {"mgm": "llama", "mgm_gemma": "gemma", "mgm_mistral": "mistral"}
# Fields of MGM's config.json that are not the language model's.
_NOT_TEXT = re.compile(
    r"mm_|image_|tune_mm_|freeze_mm_|unfreeze_mm_|use_mm_|optimize_vision_|tokenizer_|model_path$|model_type$"
    r"|architectures$|auto_map$|torch_dtype$|transformers_version$"
)
_BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")  # older versions saved what is computed anew
_HIGH_RES = "model.high_res_vision_tower"
_STAGE = r"^model\.vision_tower_aux\.vision_stages\.(\d+)\."
# MGM's names to ours; the first that matches applies.
RENAMES = (
    (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"^model\.vlm_uni_query_projector\.", "model.patch_info_mining.query_projector."),
    (r"^model\.vlm_uni_aux_projector\.", "model.patch_info_mining.key_projector."),
    (r"^model\.vlm_uni_val_projector\.", "model.patch_info_mining.value_projector."),
    (r"^model\.vision_tower\.vision_tower\.", "model.vision_tower."),
    (r"^model\.vision_tower_aux\.vision_stem\.0\.", f"{_HIGH_RES}.embeddings.patch_embeddings."),
    (r"^model\.vision_tower_aux\.vision_stem\.1\.", f"{_HIGH_RES}.embeddings.layernorm."),
    (_STAGE + r"downsample\.", rf"{_HIGH_RES}.encoder.stages.\1.downsampling_layer."),
    (_STAGE + r"blocks\.(\d+)\.conv_dw\.", rf"{_HIGH_RES}.encoder.stages.\1.layers.\2.dwconv."),
    (_STAGE + r"blocks\.(\d+)\.norm\.", rf"{_HIGH_RES}.encoder.stages.\1.layers.\2.layernorm."),
    (_STAGE + r"blocks\.(\d+)\.mlp\.fc1\.", rf"{_HIGH_RES}.encoder.stages.\1.layers.\2.pwconv1."),
    (_STAGE + r"blocks\.(\d+)\.mlp\.fc2\.", rf"{_HIGH_RES}.encoder.stages.\1.layers.\2.pwconv2."),
    (_STAGE + r"blocks\.(\d+)\.gamma$", rf"{_HIGH_RES}.encoder.stages.\1.layers.\2.layer_scale_parameter"),
    (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
)
# Of the checkpoints of the towers alone, what MGM has of them, under the names that it gives it.
TOWERS = {
    "vision_model.": "model.vision_tower.vision_tower.vision_model.",
    "visual.trunk.stem.": "model.vision_tower_aux.vision_stem.",
    "visual.trunk.stages.": "model.vision_tower_aux.vision_stages.",
}
VICUNA_TEMPLATE = (
    "{% set images = namespace(total=0, seen=0) %}"
    "{% for message in messages %}{% if message.content is not string %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{% set images.total = images.total + 1 %}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
    "{% for message in messages %} {{ 'USER' if message.role == 'user' else 'ASSISTANT' }}: "
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{% set images.seen = images.seen + 1 %}"
    "{% if images.total > 1 %}Image {{ images.seen }}:{% endif %}<image>\n"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """
    All tensors of a checkpoint by name, without buffers.

    Raises:
        `ValueError`: if the folder holds no weights.
    """
    weights: dict[str, torch.Tensor] = {}
    if files := sorted(folder.glob("*model*.safetensors")):
        for file in files:
            weights.update(load_file(file))
    else:
        for file in sorted(folder.glob("*pytorch_model*.bin")):
            weights.update(torch.load(file, map_location="cpu", weights_only=True))
    if not weights:
        raise ValueError(f"{folder} holds no weights: neither *model*.safetensors nor *pytorch_model*.bin.")
    return {name: tensor for name, tensor in weights.items() if not name.endswith(_BUFFERS)}


def rename(name: str) -> str:
    """Our name of a weight of MGM; one that MGM does not have is left as it is."""
    for pattern, replacement in RENAMES:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def gather(checkpoint: Path, towers: list[Path]) -> dict[str, torch.Tensor]:
    """The weights of MGM by its own names, and of the towers those that it has not itself."""
    weights = {}
    for tower in towers:
        for name, tensor in read_weights(tower).items():
            for prefix, name_in_mgm in TOWERS.items():
                if name.startswith(prefix):
                    weights[name_in_mgm + name.removeprefix(prefix)] = tensor
    return weights | read_weights(checkpoint)


def build_config(
    fields: dict[str, Any], vision_tower: Path, weights: dict[str, torch.Tensor], image_token_id: int
) -> MiniGeminiConfig:
    """
    Our configuration for MGM's `fields`. The shape of the ConvNeXt is that of its weights.

    Raises:
        `ValueError`: for a language model or a projector that is not supported.
    """
    model_type = str(fields.get("model_type"))
    if model_type not in LANGUAGE_MODELS:
        raise ValueError(
            f"The checkpoint must have a model_type of {', '.join(LANGUAGE_MODELS)}, got {fields.get('model_type')!r}."
        )
    for name, supported in (("mm_projector_type", "mlp2x_gelu"), ("mm_vision_select_feature", "patch")):
        if fields.get(name, supported) != supported:
            raise ValueError(f"The checkpoint must have {name}={supported!r}, got {fields[name]!r}.")
    text = {name: value for name, value in fields.items() if not _NOT_TEXT.match(name)}
    text["vocab_size"] = len(weights["model.embed_tokens.weight"])
    blocks = [re.match(_STAGE + r"blocks\.(\d+)\.gamma$", name) for name in weights]
    places = [(int(found[1]), int(found[2]), len(weights[found[0]])) for found in blocks if found]
    if not places:
        raise ValueError("The checkpoint holds no ConvNeXt. Name its own one: --high-res-vision-tower.")
    stages = range(max(stage for stage, _, _ in places) + 1)
    return MiniGeminiConfig(
        text_config=AutoConfig.for_model(LANGUAGE_MODELS[model_type], **text),
        vision_config=CLIPVisionConfig.from_pretrained(vision_tower),
        high_res_vision_config={
            "hidden_sizes": [next(width for at, _, width in places if at == stage) for stage in stages],
            "depths": [sum(at == stage for at, _, _ in places) for stage in stages],
            "image_size": fields["image_size_aux"],
        },
        vision_feature_layer=fields.get("mm_vision_select_layer", -2),
        image_token_index=image_token_id,
        image_grid=fields.get("image_grid", 1),
        image_global=fields.get("image_global", False),
    )


def add_image_token(tokenizer, weights: dict[str, torch.Tensor]) -> int:
    """Give `<image>` an id, and rows to it that the embeddings do not have: their mean, which is never the best."""
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    token_id = tokenizer.convert_tokens_to_ids("<image>")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = weights.get(name)
        if rows is not None and len(rows) <= token_id:
            mean = rows.float().mean(0, keepdim=True).to(rows.dtype)
            weights[name] = torch.cat([rows, mean.expand(token_id + 1 - len(rows), -1)])
    return token_id


def bring_into_layout(checkpoint: Path, vision_tower: Path, high_res_vision_tower: Path | None, output: Path) -> None:
    """
    Write model and processor to the folder `output`.

    Raises:
        `ValueError`: for an unsupported or incomplete checkpoint, or weights without a place.
        `OSError`: if a checkpoint cannot be read.
    """
    fields = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    weights = gather(checkpoint, [tower for tower in (vision_tower, high_res_vision_tower) if tower is not None])
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    image_token_id = add_image_token(tokenizer, weights)
    config = build_config(fields, vision_tower, weights, image_token_id)
    model, info = MiniGeminiForConditionalGeneration.from_pretrained(
        None,
        config=config,
        state_dict={rename(name): tensor for name, tensor in weights.items()},
        dtype=weights["model.embed_tokens.weight"].dtype,
        output_loading_info=True,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = ", ".join(sorted(map(str, info[kind]))[:3])
            raise ValueError(
                f"{checkpoint} is no complete Mini-Gemini: {kind.replace('_', ' ')}, for example {names}."
            )
    size = config.high_res_vision_config.image_size
    processor = MiniGeminiProcessor(
        LlavaImageProcessorPil(
            do_pad=fields.get("image_aspect_ratio") == "pad",
            size={"shortest_edge": size},
            crop_size={"height": size, "width": size},
        ),
        tokenizer,
        patch_size=config.vision_config.patch_size,
        chat_template=tokenizer.chat_template or VICUNA_TEMPLATE,
        low_res_size=config.vision_config.image_size,
        image_grid=config.image_grid,
        image_global=config.image_global,
    )
    model.save_pretrained(output)
    processor.save_pretrained(output)
