"""Which families there are, which Transformers has them, and what does not fit. It does not travel with a repo."""

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES


# The declared families: their `model_type`, which ends their file's name, and the name in that of their classes.
FAMILIES = {
    "aria": "Aria",
    "aya_vision": "AyaVision",
    "cohere2_vision": "Cohere2Vision",
    "deepseek_ocr2": "DeepseekOcr2",
    "deepseek_vl": "DeepseekVL",
    "deepseek_vl_hybrid": "DeepseekVLHybrid",
    "fast_vlm": "FastVlm",
    "gemma3": "Gemma3",
    "gemma3n": "Gemma3n",
    "gemma4": "Gemma4",
    "gemma4_unified": "Gemma4Unified",
    "got_ocr2": "GotOcr2",
    "granite4_vision": "Granite4Vision",
    "granite_docling": "GraniteDocling",
    "idefics2": "Idefics2",
    "idefics3": "Idefics3",
    "inkling2": "Inkling2",
    "inkling2_loop": "Inkling2Loop",
    "internvl": "InternVL",
    "janus": "Janus",
    "kimi_k25": "Kimi_K25",
    "lfm2_vl": "Lfm2Vl",
    "lighton_ocr": "LightOnOcr",
    "llama4": "Llama4",
    "llava": "Llava",
    "llava_next": "LlavaNext",
    "llava_next_video": "LlavaNextVideo",
    "llava_onevision": "LlavaOnevision",
    "mini_gemini": "MiniGemini",
    "minicpm_ocr": "MiniCPMOcr",
    "minicpmv4_6": "MiniCPMV4_6",
    "mistral3": "Mistral3",
    "mistral_large4": "MistralLarge4",
    "molmo2": "Molmo2",
    "nemotron_h_omni": "NemotronHOmni",
    "ovis2": "Ovis2",
    "paligemma": "PaliGemma",
    "perception_lm": "PerceptionLM",
    "pp_chart2table": "PPChart2Table",
    "qianfan_ocr": "QianfanOCR",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen2_vl": "Qwen2VL",
    "qwen3_vl": "Qwen3VL",
    "smolvlm": "SmolVLM",
    "step3p7": "Step3p7",
    "unlimited_ocr": "UnlimitedOcr",
    "video_llama_3": "VideoLlama3",
    "video_llava": "VideoLlava",
    "vipllava": "VipLlava",
}

# Families of ours, which no Transformers has.
_OWN = ("mini_gemini",)
# The first release that was seen to have a family; the others are in 5.18.0, the oldest that is supported.
_RELEASES = {
    "granite_docling": "5.23.0",
    "inkling2": "5.23.0",
    "inkling2_loop": "5.24.0",
    "minicpm_ocr": "5.23.0",
    "mistral_large4": "5.22.0",
    "molmo2": "5.20.0",
    "unlimited_ocr": "5.20.0",
}

_CROSS_ATTENTION = "its language model reads the image through cross-attention, so that no token of the prompt is one"
_ENCODER_DECODER = "it is an encoder-decoder, whose prompt holds no visual tokens that could leave"
_QUERIES = "a Q-Former has made 32 tokens of the image already"
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


def release_with(family: str) -> str | None:
    """The release that has a family which the installed Transformers lacks; None where it has it."""
    if family in CONFIG_MAPPING_NAMES or family in _OWN:
        return None
    return _RELEASES.get(family, "5.18.0")
