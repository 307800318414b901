"""
Full variants of tiny random checkpoints of the families that vLLM's Transformers backend is tried with, and what
`generate` answers. Heads have 32 channels, since its attention on CPUs has no smaller ones.

Run as a script, since most of the processors need torchvision: with the folder that it was installed to, the folder to
write to, and families. Each gets `<family>`, the variant, `<family>.pickle`, the questions, and `<family>.json`, the
ids of their prompts and answers; `<family>-<kind>` a variant of `KINDS` alone.
"""

import json
import pickle
import sys
from pathlib import Path


if __name__ == "__main__":
    from torchvision_shim import add_torchvision

    library = add_torchvision(sys.argv[1])

import numpy as np
import torch
import transformers
from families import IMAGE, ROWS, VIDEO, VISION_END, VISION_START
from PIL import Image
from tiny_checkpoint import CHAT_TEMPLATE
from tiny_processors import PROCESSORS, SIZE, pil, tokenizer, video, with_names

import modeling_prunesid
from modeling_prunesid.family import stock_class


# What an engine cannot serve, as `<family>-<kind>`.
KINDS = {"thin": {"thin": True}, "dynamic": {"dynamic": True, "reference_information": 0.6}, "original": {}}
KINDS["fixed"] = {}
KINDS["question"] = {"method": "spread", "method_settings": {"question": True}}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
GRID = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
PIXELS = {"shortest_edge": 256, "longest_edge": 1024}


def qwen_parts(name: str) -> dict:
    words = {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>", VISION_START: "<|vision_start|>"}
    words[VISION_END] = "<|vision_end|>"
    clips = "Qwen3VLVideoProcessor" if name == "qwen3_vl" else "Qwen2VLVideoProcessor"
    return {
        "image_processor": pil("Qwen2VLImageProcessor", **GRID, size=PIXELS),
        "tokenizer": tokenizer(words, image_token=words[IMAGE], video_token=words[VIDEO]),
        "video_processor": video(clips, **GRID),
    }


def glm_parts() -> dict:
    words = {IMAGE: "<|image|>", VIDEO: "<|video|>", VISION_START: "<|begin_of_image|>"}
    words[VISION_END] = "<|end_of_image|>"
    return {
        "image_processor": pil("Glm4vImageProcessor", **GRID, size=PIXELS),
        "tokenizer": tokenizer(words, image_token=words[IMAGE], video_token=words[VIDEO]),
        "video_processor": video("Glm4vVideoProcessor", **GRID),
    }


def llava_parts() -> dict:
    return {
        "image_processor": pil("CLIPImageProcessor", size={"shortest_edge": 32}, crop_size=SIZE),
        "tokenizer": tokenizer({IMAGE: "<image>"}),
        "patch_size": 4,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }


def llava_next_parts() -> dict:
    crops = pil("LlavaNextImageProcessor", size={"shortest_edge": 32}, crop_size=SIZE, image_grid_pinpoints=PINPOINTS)
    return {**llava_parts(), "image_processor": crops}


def gemma3_parts() -> dict:
    return {**PROCESSORS["gemma3"][0](), "image_processor": pil("Gemma3ImageProcessor", size=SIZE)}


# The type of tokens that see none behind them.
CAUSAL = {"gemma3": 0, "paligemma": 1}


QWEN = "<|vision_start|> <|image_pad|> <|vision_end|>"
# Family: what makes the parts of its processor, and what stands for an image in a prompt.
PARTS = {
    "llava": (llava_parts, "<image>"),
    "llava_next": (llava_next_parts, "<image>"),
    "internvl": (PROCESSORS["internvl"][0], "<IMG_CONTEXT>"),
    "paligemma": (PROCESSORS["paligemma"][0], "<image>"),
    "gemma3": (gemma3_parts, "<start_of_image>"),
    "mistral3": (PROCESSORS["mistral3"][0], "[IMG]"),
    "smolvlm": (PROCESSORS["smolvlm"][0], "<image>"),
    "idefics2": (PROCESSORS["idefics2"][0], "<image>"),
    "idefics3": (PROCESSORS["idefics3"][0], "<image>"),
    "aya_vision": (PROCESSORS["aya_vision"][0], "<image>"),
    "llava_onevision": (PROCESSORS["llava_onevision"][0], "<image>"),
    "qwen2_vl": (lambda: qwen_parts("qwen2_vl"), QWEN),
    "qwen2_5_vl": (lambda: qwen_parts("qwen2_5_vl"), QWEN),
    "qwen3_vl": (lambda: qwen_parts("qwen3_vl"), QWEN),
    "glm4v": (glm_parts, "<|begin_of_image|> <|image|> <|end_of_image|>"),
}


def picture(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def questions(name: str) -> list[tuple[str, list[Image.Image]]]:
    """Prompts with two, one, three and no pictures, of several sizes."""
    token = PARTS[name][1]
    start = "" if name == "paligemma" else "<s> "  # whose processor writes it behind the images
    pictures = [picture(64, 40, 0), picture(30, 33, 1), picture(90, 30, 2), picture(32, 64, 3)]
    asked = [[0, 1], [0], [1], [3, 2, 0], [2], [0]]  # what an engine encodes together, it later finds one by one
    if name != "paligemma":  # whose stock processor takes no text alone
        asked.append([])
    return [
        (f"{start}word{20 + index} " + f"{token} word9 " * len(chosen) + "word21", [pictures[each] for each in chosen])
        for index, chosen in enumerate(asked)
    ]


def as_engines_ask(folder: Path, asked: list[tuple[str, list]]) -> list[tuple[str, list]]:
    """The questions with what PaliGemma's processor adds to a prompt, which engines take as it is."""
    if folder.name != "paligemma":
        return asked
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    return [(processor.prepare_inputs_layout(pictures, [text])[1][0], pictures) for text, pictures in asked]


def with_wide_heads(name: str) -> dict:
    """The configuration of `families.py`, with heads of 32 channels."""
    config = dict(ROWS[name].config)
    text = {**config["text_config"], "hidden_size": 128, "intermediate_size": 128, "initializer_range": 0.1}
    text["head_dim"] = 32
    vision = dict(config["vision_config"])
    if "rope_parameters" in text:
        text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [8, 4, 4]}
        if "out_hidden_size" in vision:
            vision["out_hidden_size"] = 128
        else:
            vision["hidden_size"] = 128
    if name in ("gemma3", "paligemma", "aya_vision"):  # with tied embeddings a random model repeats its last token
        config["tie_word_embeddings"] = text["tie_word_embeddings"] = False
        text["initializer_range"] = 0.4  # so that it matters which tokens see each other
    for fields in (config, vision):
        if "projection_dim" in fields and name == "paligemma":
            fields["projection_dim"] = 128
    return {**config, "text_config": text, "vision_config": vision}


def save_base(name: str, folder: Path) -> Path:
    row = ROWS[name]
    torch.manual_seed(0)
    stock = stock_class(row.head)
    model = stock(stock.config_class(**with_wide_heads(name)))
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.std() == 0:  # Gemma 3 would be blind
            torch.nn.init.normal_(parameter, std=0.1)
    head = model.get_output_embeddings().weight.data
    head[:4], head[90:] = 0, 0  # no answer holds a placeholder, tag or end
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    parts = PARTS[name][0]()
    parts["tokenizer"] = with_names(parts["tokenizer"])
    prefix = {"paligemma": "PaliGemma", "mistral3": "Pixtral"}.get(name, modeling_prunesid.families.FAMILIES[name])
    processor = getattr(transformers, f"{prefix}Processor")(**parts, chat_template=CHAT_TEMPLATE)
    processor.save_pretrained(folder)
    return folder


def save_variant(name: str, base: Path, folder: Path, thin: bool = False, **settings) -> Path:
    model = ROWS[name].head.from_pretrained(base, dtype=torch.float32, prunesid_config={"budget": 5, **settings})
    model.save_pretrained(folder, thin=thin)
    return folder


def answers(folder: Path, asked: list[tuple[str, list]], max_new_tokens: int = 6, **kwargs) -> list[list[list[int]]]:
    """The prompt's ids and the new tokens of `generate`, for each question."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    ).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    found = []
    for text, pictures in asked:
        inputs = processor(text=text, images=pictures or None, return_tensors="pt", add_special_tokens=False, **kwargs)
        if "token_type_ids" in inputs:  # what sees what is behind it; in vLLM on CPUs nothing does
            inputs["token_type_ids"].fill_(CAUSAL[model.config.model_type.removeprefix("prunesid_")])
        length = inputs["input_ids"].shape[1]
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0].tolist()
        found.append([ids[:length], ids[length:]])
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for variant in sys.argv[3:]:
        family, _, kind = variant.partition("-")
        place = Path(sys.argv[2], variant)
        settings = KINDS.get(kind, {"mrope_positions": "contiguous"} if ROWS[family].mrope else {})
        save_variant(family, save_base(family, place.with_suffix(".base")), place, **settings)
        if not kind:
            asked = questions(family)
            expected = answers(place, asked)
            others = [(text, [picture(*image.size, 9) for image in pictures]) for text, pictures in asked]
            assert answers(place, others) != expected  # not blind
            place.with_suffix(".pickle").write_bytes(pickle.dumps(as_engines_ask(place, asked)))
            place.with_suffix(".json").write_text(json.dumps(expected))
