"""Tiny random models of the families with grids: their fields, and how each writes an image or a video."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


PAD, BOS, EOS, IMAGE, VIDEO, START, END = 0, 1, 2, 100, 101, 102, 103
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
INTERLEAVED = {**ROPE, "mrope_interleaved": True}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "initializer_range": 0.3,
}
QWEN3_VISION = {**VISION, "num_position_embeddings": 64}
DEEPSTACK = {**QWEN3_VISION, "deepstack_visual_indexes": (0, 1)}
WINDOWED = {**VISION, "window_size": 16, "fullatt_block_indexes": [1]}
NAMED_LAYERS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 4,
    "initializer_range": 0.3,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
QWEN_IDS = {**IDS, "vision_start_token_id": START, "vision_end_token_id": END}
GLM_IDS = {
    **IDS,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": 104,
    "video_end_token_id": 105,
}
TWO_KINDS = ("sliding_attention", "full_attention")


@dataclass
class Grids:
    """
    One family.

    Args:
        name (`str`): of its classes.
        fields (`dict`): of its configuration.
        patch (`tuple[int, ...]`): shape of the pixels of one patch.
        frames (`str`, *optional*): how a video's slices are written: "runs", each between tags; "run", all in one run.
        one_id (`bool`): videos have the placeholder of images.
        single (`bool`): upstream computes in float32 whatever the weights are.
        types (`bool`): positions need `mm_token_type_ids`.
    """

    name: str
    fields: dict
    head: str | None = None
    patch: tuple[int, ...] = (96,)
    frames: str | None = "runs"
    one_id: bool = False
    types: bool = True
    mrope: bool = True
    temporal_merge: int = 1
    single: bool = False
    extra: dict = field(default_factory=dict)
    make: Callable | None = None

    def grids_of(self, modality: str) -> list[tuple[int, int, int]]:
        """The patch grids `(t, h, w)` of three inputs."""
        frames = self.temporal_merge
        return (
            [(1, 8, 8), (1, 4, 8), (1, 8, 8)]
            if modality == "image"
            else [(2 * frames, 8, 8), (frames, 4, 8), (3 * frames, 4, 8)]
        )

    @property
    def stock(self) -> str:
        return self.head or self.name + "ForConditionalGeneration"


def _without(fields: dict, *names: str) -> dict:
    return {name: value for name, value in fields.items() if name not in names}


MOE_TEXT = {**_without(TEXT, "intermediate_size"), **LINEAR, **MOE, "shared_expert_intermediate_size": 32}
GLM_TEXT = {**TEXT, "head_dim": 8, "rope_parameters": ROPE}
GLM_MOE_TEXT = {
    **GLM_TEXT,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
GLM_VISION = {**VISION, "image_size": 32}
OMNI_AUDIO = {
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "output_dim": 32,
    "num_mel_bins": 16,
}


GRIDS = {
    "qwen3_vl_moe": Grids(
        "Qwen3VLMoe",
        {
            "vision_config": DEEPSTACK,
            "text_config": {**TEXT, **MOE, "head_dim": 8, "rope_parameters": INTERLEAVED},
            **QWEN_IDS,
        },
    ),
    "qwen3_5": Grids(
        "Qwen3_5",
        {"vision_config": QWEN3_VISION, "text_config": {**TEXT, **LINEAR, "rope_parameters": INTERLEAVED}, **QWEN_IDS},
    ),
    "qwen3_5_moe": Grids(
        "Qwen3_5Moe",
        {"vision_config": QWEN3_VISION, "text_config": {**MOE_TEXT, "rope_parameters": INTERLEAVED}, **QWEN_IDS},
    ),
    "qwen4_exp": Grids(
        "Qwen4Exp",
        {
            "vision_config": QWEN3_VISION,
            "text_config": {
                **MOE_TEXT,
                "rope_parameters": INTERLEAVED,
                "hc_count": 2,
                "hc_lowrank": 8,
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 8,
                "indexer_budget": 64,
                "indexer_compress_ratio": 4,
            },
            **QWEN_IDS,
        },
    ),
    "glm4v": Grids("Glm4v", {"vision_config": GLM_VISION, "text_config": GLM_TEXT, **GLM_IDS}, one_id=True),
    "glm4v_moe": Grids("Glm4vMoe", {"vision_config": GLM_VISION, "text_config": GLM_MOE_TEXT, **GLM_IDS}, one_id=True),
    "glm46v": Grids("Glm46V", {"vision_config": GLM_VISION, "text_config": GLM_TEXT, **GLM_IDS}, one_id=True),
    "glm_ocr": Grids("GlmOcr", {"vision_config": GLM_VISION, "text_config": GLM_TEXT, **GLM_IDS}, one_id=True),
    "paddleocr_vl": Grids(
        "PaddleOCRVL",
        {
            "vision_config": {**NAMED_LAYERS, "image_size": 32, "spatial_merge_size": 2},
            "text_config": {**TEXT, "head_dim": 8, "rope_parameters": ROPE},
            "tie_word_embeddings": False,
            **QWEN_IDS,
        },
        patch=(3, 4, 4),
        frames=None,
    ),
    "cohere_compass": Grids(
        "CohereCompass",
        {
            "vision_config": DEEPSTACK,
            "text_config": {
                **TEXT,
                "sliding_window": 64,
                "layer_types": list(TWO_KINDS),
                "rope_parameters": {kind: INTERLEAVED for kind in TWO_KINDS},
            },
            **QWEN_IDS,
        },
    ),
    "cosmos3_omni": Grids(
        "Cosmos3Omni",
        {
            "vision_config": DEEPSTACK,
            "text_config": {**TEXT, "head_dim": 8, "rope_parameters": INTERLEAVED},
            **QWEN_IDS,
        },
    ),
    "qwen2_5_omni_thinker": Grids(
        "Qwen2_5OmniThinker",
        {
            "vision_config": WINDOWED,
            "audio_config": OMNI_AUDIO,
            "text_config": {**TEXT, "rope_parameters": ROPE},
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "audio_token_index": 109,
            "vision_start_token_id": START,
            "vision_end_token_id": END,
            "audio_start_token_id": 110,
            "audio_end_token_id": 111,
        },
        frames="run",
        types=False,
        extra={"video_second_per_grid": 1.5},
    ),
    "muse_glimmer": Grids(
        "MuseGlimmer",
        {
            "vision_config": {
                **NAMED_LAYERS,
                "pos_emb_height": 8,
                "pos_emb_width": 8,
                "patch_temporal": 2,
                "merge_size": 2,
                "max_position_embeddings": 64,
            },
            "text_config": {**TEXT, "head_dim": 8, "sliding_window": 16, "layer_types": list(TWO_KINDS)},
            "out_hidden_size": 128,
            "projector_hidden_size": 32,
            **IDS,
        },
        mrope=False,
    ),
    "minimax_m3_vl": Grids(
        "MiniMaxM3VL",
        {
            "vision_config": {**NAMED_LAYERS, "image_size": 32, "temporal_patch_size": 2, "spatial_merge_size": 2},
            "text_config": {
                **TEXT,
                "head_dim": 8,
                "num_experts_per_tok": 2,
                "num_local_experts": 4,
                "dense_intermediate_size": 64,
                "shared_intermediate_size": 32,
                "rotary_dim": 4,
                "mlp_layer_types": ["dense", "sparse"],
                "layer_types": ["full_attention", "full_attention"],
            },
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "projector_hidden_size": 32,
        },
        head="MiniMaxM3SparseForConditionalGeneration",
        mrope=False,
    ),
    "exaone4_5": Grids(
        "Exaone4_5_",
        {
            "vision_config": {**WINDOWED, "num_heads": 4, "num_key_value_heads": 2},
            "text_config": {**TEXT, "model_type": "exaone4", "sliding_window": 16, "layer_types": list(TWO_KINDS)},
            **IDS,
        },
        mrope=False,
    ),
    "hyperclovax_vision_v2": Grids(
        "HyperCLOVAXVisionV2",
        {
            "vision_config": WINDOWED,
            "text_config": {**TEXT, "model_type": "hyperclovax"},
            "tie_word_embeddings": False,
            **IDS,
        },
        mrope=False,
    ),
    "lfm3_vl": Grids(
        "Lfm3Vl",
        {
            "vision_config": {
                **NAMED_LAYERS,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "num_key_value_heads": 2,
                "layer_types": None,
            },
            "text_config": {**TEXT, "model_type": "lfm3", "layer_types": ["conv", "full_attention"]},
            "projector_hidden_size": 32,
            "tie_word_embeddings": False,
            **QWEN_IDS,
        },
        mrope=False,
    ),
    "inkling2": Grids(
        "Inkling2",
        {
            "vision_config": {
                **NAMED_LAYERS,
                "spatial_merge_size": 2,
                "posemb_grid_size": 8,
                "projection_hidden_dim": 32,
                "text_hidden_size": 32,
            },
            "text_config": {
                **TEXT,
                "head_dim": 8,
                "swa_num_attention_heads": 4,
                "swa_num_key_value_heads": 2,
                "swa_head_dim": 8,
                "sliding_window_size": 16,
                "d_rel": 4,
                "rel_extent": 16,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "unpadded_vocab_size": 120,
            },
            "image_token_id": IMAGE,
        },
        patch=(8, 8, 3),
        frames=None,
        mrope=False,
    ),
}


def pixels(family: Grids, grids: list, seed: int = 0) -> torch.Tensor:
    """Pixels of the patches of grids `(t, h, w)`, one behind the other."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(t * h * w for t, h, w in grids), *family.patch, generator=generator)
