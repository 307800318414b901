"""Which families there are, which Transformers has them, and what does not fit. It does not travel with a repo."""

from packaging.version import Version
from transformers import __version__
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .checks import OLDEST_TRANSFORMERS


# The declared families: their `model_type`, which ends their file's name, and the name in that of their classes.
FAMILIES = {
    "aria": "Aria",
    "aya_vision": "AyaVision",
    "cohere2_vision": "Cohere2Vision",
    "cohere_compass": "CohereCompass",
    "cosmos3_edge": "Cosmos3Edge",
    "cosmos3_omni": "Cosmos3Omni",
    "deepseek_ocr2": "DeepseekOcr2",
    "deepseek_vl": "DeepseekVL",
    "deepseek_vl_hybrid": "DeepseekVLHybrid",
    "dots3_note": "Dots3Note",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoe",
    "exaone4_5": "Exaone4_5_",
    "fast_vlm": "FastVlm",
    "gemma3": "Gemma3",
    "gemma3n": "Gemma3n",
    "gemma4": "Gemma4",
    "gemma4_unified": "Gemma4Unified",
    "glm46v": "Glm46V",
    "glm4v": "Glm4v",
    "glm4v_moe": "Glm4vMoe",
    "glm5_next": "Glm5Next",
    "glm_ocr": "GlmOcr",
    "glmga": "Glmga",
    "got_ocr2": "GotOcr2",
    "granite4_vision": "Granite4Vision",
    "granite_docling": "GraniteDocling",
    "hunyuan_vl": "HunYuanVL",
    "hy_v4_vl": "HYV4VL",
    "hyperclovax_vision_v2": "HyperCLOVAXVisionV2",
    "idefics2": "Idefics2",
    "idefics3": "Idefics3",
    "inkling2": "Inkling2",
    "inkling2_loop": "Inkling2Loop",
    "inkling_mm_model": "Inkling",
    "internvl": "InternVL",
    "janus": "Janus",
    "kimi_k25": "Kimi_K25",
    "lfm2_vl": "Lfm2Vl",
    "lfm3_vl": "Lfm3Vl",
    "lighton_ocr": "LightOnOcr",
    "llama4": "Llama4",
    "llava": "Llava",
    "llava_next": "LlavaNext",
    "llava_next_video": "LlavaNextVideo",
    "llava_onevision": "LlavaOnevision",
    "mini_gemini": "MiniGemini",
    "minicpm_ocr": "MiniCPMOcr",
    "minicpmv4_6": "MiniCPMV4_6",
    "minicpmv4_7": "MiniCPMV4_7",
    "minimax_m3_vl": "MiniMaxM3VL",
    "mistral3": "Mistral3",
    "mistral_large4": "MistralLarge4",
    "molmo2": "Molmo2",
    "muse_glimmer": "MuseGlimmer",
    "muse_spark": "MuseSpark",
    "nemotron_h_omni": "NemotronHOmni",
    "ovis2": "Ovis2",
    "paddleocr_vl": "PaddleOCRVL",
    "paligemma": "PaliGemma",
    "perception_lm": "PerceptionLM",
    "pp_chart2table": "PPChart2Table",
    "qianfan_ocr": "QianfanOCR",
    "qwen2_5_omni_thinker": "Qwen2_5OmniThinker",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen2_vl": "Qwen2VL",
    "qwen3_5": "Qwen3_5",
    "qwen3_5_moe": "Qwen3_5Moe",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeThinker",
    "qwen3_vl": "Qwen3VL",
    "qwen3_vl_moe": "Qwen3VLMoe",
    "qwen4_exp": "Qwen4Exp",
    "smolvlm": "SmolVLM",
    "step3p7": "Step3p7",
    "unlimited_ocr": "UnlimitedOcr",
    "video_llama_3": "VideoLlama3",
    "video_llava": "VideoLlava",
    "vipllava": "VipLlava",
}

# Families of ours, which no Transformers has.
_OWN = ("mini_gemini",)
# The first release that was seen to have a family as it is declared; the others are in 5.18.0, the oldest supported.
_RELEASES = {
    "aria": "5.23.0",
    "cosmos3_edge": "5.23.0",  # generate had no text axis before
    "dots3_note": "5.23.0",
    "gemma4": "5.23.0",  # its processor cannot be imported without torchvision before
    "gemma4_unified": "5.23.0",
    "got_ocr2": "5.23.0",  # its processor does not know its number of tokens before
    "granite_docling": "5.23.0",
    "hunyuan_vl": "5.23.0",
    "hy_v4_vl": "5.24.0",
    "idefics2": "5.23.0",
    "idefics3": "5.23.0",
    "inkling2": "5.23.0",
    "inkling2_loop": "5.24.0",
    "inkling_mm_model": "5.23.0",
    "lfm3_vl": "5.23.0",
    "llava_next_video": "5.23.0",
    "minicpm_ocr": "5.23.0",
    "mistral_large4": "5.22.0",
    "molmo2": "5.20.0",
    "muse_spark": "5.23.0",
    "qwen2_5_omni_thinker": "5.23.0",  # one class for head and base before
    "qwen3_omni_moe_thinker": "5.23.0",
    "smolvlm": "5.23.0",
    "unlimited_ocr": "5.20.0",
    "vipllava": "5.23.0",
}

_CROSS_ATTENTION = "its language model reads the image through cross-attention, and its prompt holds no visual tokens"
_ENCODER_DECODER = "it is an encoder-decoder, and its prompt holds no visual tokens"
_QUERIES = "a Q-Former already reduces an image to 32 tokens"
_NO_ENCODER = "it has no vision encoder whose features replace placeholders"
_NO_PLACEHOLDERS = "its prompt has no placeholders, or its base model no get_image_features"
# Model types that the mechanism does not fit, with the reason.
UNSUPPORTED = {
    "mllama": _CROSS_ATTENTION,
    "idefics": _CROSS_ATTENTION,
    "florence2": _ENCODER_DECODER,
    "t5gemma2": _ENCODER_DECODER,
    "pix2struct": _ENCODER_DECODER,
    "udop": _ENCODER_DECODER,
    "pp_formulanet": _ENCODER_DECODER,
    "vision-encoder-decoder": _ENCODER_DECODER,
    "blip-2": _QUERIES,
    "instructblip": _QUERIES,
    "instructblipvideo": _QUERIES,
    "fuyu": _NO_ENCODER,
    "chameleon": _NO_ENCODER,
    "emu3": _NO_ENCODER,
    "apertus1p5": _NO_ENCODER,
    "git": _NO_PLACEHOLDERS,
    "blip": _NO_PLACEHOLDERS,
    "kosmos-2": _NO_PLACEHOLDERS,
    "kosmos-2.5": _NO_PLACEHOLDERS,
    "diffusion_gemma": _NO_PLACEHOLDERS,
    "evolla": _NO_PLACEHOLDERS,
    "pi0": _NO_PLACEHOLDERS,
    "mistral4": "it reads text alone",
    "shieldgemma2": "it classifies an image by a fixed prompt, and generates nothing; its parts are Gemma 3",
}


def first_release(family: str) -> str:
    """The first release of Transformers that was seen to have a family as it is declared."""
    return _RELEASES.get(family, f"{OLDEST_TRANSFORMERS}.0")


def release_with(family: str) -> str | None:
    """The release that has a family which the installed Transformers lacks; None where it has it."""
    release = first_release(family)
    is_new_enough = Version(Version(__version__).base_version) >= Version(release)
    return None if family in _OWN or (family in CONFIG_MAPPING_NAMES and is_new_enough) else release


def advise_class(model_type: str) -> str:
    """Which of our classes loads a checkpoint of this `model_type`."""
    if model_type in FAMILIES:
        return f"Load it with PruneSID{FAMILIES[model_type]}ForConditionalGeneration."
    return f"PruneSID does not support that model; it supports {', '.join(sorted(FAMILIES))}."
