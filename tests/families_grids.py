"""The rows of the contract for families with grids: images of any size, videos of temporal slices."""

from collections.abc import Callable
from typing import Any

import torch
from families import (
    BOTH_TILES,
    GRIDS,
    IMAGE,
    MINICPM,
    QWEN_IDS,
    TEXT,
    VIDEO,
    VISION_END,
    VISION_START,
    add,
    is_at_least,
    language,
    patches,
    slices,
    tiny,
    types_of,
)
from families import MROPE as ROPE


CLIPS = [[2, 8, 8], [1, 4, 8], [3, 4, 8]]
INTERLEAVED = {**ROPE, "mrope_interleaved": True}
VISION = tiny(
    "depth hidden_size out_hidden_size intermediate_size num_heads patch_size "
    "spatial_merge_size temporal_patch_size initializer_range"
)
QWEN3_VISION = {**VISION, "num_position_embeddings": 64}
DEEPSTACK = {**QWEN3_VISION, "deepstack_visual_indexes": (0, 1)}
WINDOWED = {**VISION, "window_size": 16, "fullatt_block_indexes": [1]}
GLM_VISION = {**VISION, "image_size": 32}
NAMED_LAYERS = tiny("hidden_size intermediate_size num_hidden_layers num_attention_heads patch_size initializer_range")
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
INDICES = {"image_token_index": IMAGE, "video_token_index": VIDEO}
VIDEO_START, VIDEO_END, SECONDS = 104, 105, 12
GLM_IDS = {
    **IDS,
    "image_start_token_id": VISION_START,
    "image_end_token_id": VISION_END,
    "video_start_token_id": VIDEO_START,
    "video_end_token_id": VIDEO_END,
}
HEADS = {**TEXT, "head_dim": 8}
UNTIED = {**HEADS, "tie_word_embeddings": False}
TWO_KINDS = ["sliding_attention", "full_attention"]
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = tiny(
    "linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim",
    layer_types=["linear_attention", "full_attention"],
)
LINEAR_MOE = {**HEADS, **LINEAR, **MOE, "shared_expert_intermediate_size": 32, "rope_parameters": INTERLEAVED}
LINEAR_MOE = {name: value for name, value in LINEAR_MOE.items() if name != "intermediate_size"}


def tagged(num_tokens: int, index: int, token: int) -> list[int]:
    """An image, or a video in one run, between its tags."""
    return [VISION_START, *[token] * num_tokens, VISION_END]


def sliced(num_tokens: int, index: int, token: int) -> list[int]:
    """A video as Qwen3-VL writes it: a timestamp before each slice."""
    slices = CLIPS[index][0]
    return [id_ for at in range(slices) for id_ in (SECONDS + at, *tagged(num_tokens // slices, index, token))]


def glm_video(num_tokens: int, index: int, token: int) -> list[int]:
    """A video as GLM writes it: slices as images, a timestamp behind each."""
    slices = CLIPS[index][0]
    frames = [id_ for at in range(slices) for id_ in (*tagged(num_tokens // slices, index, token), SECONDS + at)]
    return [VIDEO_START, *frames, VIDEO_END]


def add_grids(
    name: str,
    config: dict[str, Any],
    *dim: int,
    video: Callable | None = sliced,
    video_token: int = VIDEO,
    newlines: bool = False,
    merged_frames: int = 1,
    video_inputs: dict[str, Any] | None = None,
    along: Callable = types_of,
    **columns: Any,
) -> None:
    """A row for images and one for videos."""

    def size_of(frames, height, width):
        return frames * (height // 2) * (width // 2 + newlines)

    common: dict[str, Any] = {"prepare": settle, "settings": {"min_budget": None}, "view": "temporal slice", **columns}
    tokens = tuple(size_of(*grid) for grid in GRIDS)
    if columns.get("mrope", False):
        common["along"] = along(IMAGE, 1)
    add(name, config, patches(GRIDS, *dim), **{"write": tagged, "tokens": tokens, "kept": (5, 5, 5), **common})
    if video is None:
        return
    if columns.get("mrope", False):
        common["along"] = along(video_token, 2)
    clips = [[merged_frames * frames, height, width] for frames, height, width in CLIPS]
    inputs = patches(clips, *dim, pixels="pixel_values_videos", grid="video_grid_thw", **(video_inputs or {}))
    add(
        f"{name} video",
        config,
        inputs,
        modality="video",
        token=video_token,
        tokens=tuple(size_of(*clip) for clip in CLIPS),
        kept=(10, 5, 15),
        write=video,
        **common,
    )


def settle(model: torch.nn.Module) -> None:
    """No answer holds a placeholder or tag. Experts one by one: upstream's grouped product has no float64."""
    if model.get_output_embeddings() is not None:
        model.get_output_embeddings().weight.data[[IMAGE, VIDEO, VISION_START, VISION_END]] = 0
    for module in model.modules():
        if getattr(getattr(module, "config", None), "_experts_implementation", None) is not None:
            module.config._experts_implementation = "eager"


def no_types(token: int, kind: int) -> Callable:
    return lambda ids: {}


for name, vision, text in (
    ("qwen3_vl_moe", DEEPSTACK, {**HEADS, **MOE, "rope_parameters": INTERLEAVED}),
    ("qwen3_5", QWEN3_VISION, {**HEADS, **LINEAR, "rope_parameters": INTERLEAVED}),
    ("qwen3_5_moe", QWEN3_VISION, LINEAR_MOE),
    (
        "qwen4_exp",
        QWEN3_VISION,
        {
            **LINEAR_MOE,
            "hc_count": 2,
            "hc_lowrank": 8,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
        },
    ),
    ("cosmos3_omni", DEEPSTACK, {**HEADS, "rope_parameters": INTERLEAVED}),
    (
        "cohere_compass",
        DEEPSTACK,
        {
            **TEXT,
            "sliding_window": 64,
            "layer_types": TWO_KINDS,
            "rope_parameters": {kind: INTERLEAVED for kind in TWO_KINDS},
        },
    ),
):
    add_grids(name, {"vision_config": vision, "text_config": text, **QWEN_IDS}, 96, mrope=True)

add_grids(
    "cosmos3_edge",
    {
        "vision_config": {**NAMED_LAYERS, "num_patches": 64, "spatial_merge_size": 2},
        "text_config": {**UNTIED, "rope_parameters": INTERLEAVED},
        "projector_hidden_size": 32,
        **QWEN_IDS,
    },
    48,
    mrope=True,
    since="5.23.0",
)
add_grids(
    "paddleocr_vl",
    {
        "vision_config": {**NAMED_LAYERS, "image_size": 32, "spatial_merge_size": 2},
        "text_config": {**UNTIED, "rope_parameters": ROPE},
        "tie_word_embeddings": False,
        **QWEN_IDS,
    },
    *(3, 4, 4),
    video=None,
    mrope=True,
)
GLM_MOE = tiny(
    "n_routed_experts num_experts_per_tok moe_intermediate_size n_shared_experts n_group "
    "topk_group first_k_dense_replace"
)
for name, text in (("glm4v", {}), ("glm4v_moe", GLM_MOE), ("glm46v", {}), ("glmga", {}), ("glm_ocr", {})):
    add_grids(
        name,
        {"vision_config": GLM_VISION, "text_config": {**HEADS, "rope_parameters": ROPE, **text}, **GLM_IDS},
        96,
        video=glm_video,
        video_token=IMAGE,
        mrope=True,
    )
for name, audio in (
    ("qwen2_5_omni_thinker", {"encoder_ffn_dim": 64}),
    ("qwen3_omni_moe_thinker", {"encoder_ffn_dim": 64, "downsample_hidden_size": 16}),
):
    is_moe = "moe" in name
    add_grids(
        name,
        {
            "vision_config": DEEPSTACK if is_moe else WINDOWED,
            "audio_config": {
                "d_model": 32,
                "encoder_layers": 1,
                "encoder_attention_heads": 4,
                "output_dim": 32,
                "num_mel_bins": 16,
                **audio,
            },
            "text_config": {**HEADS, **MOE, "rope_parameters": INTERLEAVED}
            if is_moe
            else {**TEXT, "rope_parameters": ROPE},
            **({**IDS, "audio_token_id": 109} if is_moe else {**INDICES, "audio_token_index": 109}),
            "vision_start_token_id": VISION_START,
            "vision_end_token_id": VISION_END,
            "audio_start_token_id": 110,
            "audio_end_token_id": 111,
        },
        96,
        video=tagged,
        video_inputs={"video_second_per_grid": [1.5, 1.0, 0.5]},
        along=no_types,
        mrope=True,
        needs_types=False,
        since="5.23.0",
    )
add_grids(
    "ernie4_5_vl_moe",
    {
        "vision_config": {
            **{
                name: value for name, value in VISION.items() if name not in ("out_hidden_size", "temporal_patch_size")
            },
            "temporal_merge_size": 2,
        },
        "text_config": {
            **TEXT,
            "moe_intermediate_size": [32, 32],
            "moe_k": 2,
            "moe_num_experts": 4,
            "moe_num_shared_experts": 1,
            "mlp_layer_types": ["dense", "sparse"],
            "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]},
            "tie_word_embeddings": False,
        },
        "tie_word_embeddings": False,
        **GLM_IDS,
    },
    48,
    video=tagged,
    merged_frames=2,
    along=lambda token, kind: (
        lambda ids: {
            **types_of(token, kind)(ids),
            "moe_mm_token_type_ids": ((ids == token) | (ids == VISION_START) | (ids == VISION_END)).long(),
        }
    ),
    mrope=True,
    cached_chat=is_at_least("5.23.0"),  # before, the stock class raises
)
add_grids(
    "hunyuan_vl",
    {
        "vision_config": {
            **NAMED_LAYERS,
            **tiny(
                "num_key_value_heads out_hidden_size text_hidden_size spatial_merge_size max_image_size",
                img_max_token_num=64,
                min_image_size=16,
                max_vit_seq_len=256,
            ),
        },
        "text_config": {
            **UNTIED,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1] * 4},
        },
        "image_token_id": IMAGE,
        "tie_word_embeddings": False,
    },
    48,
    video=None,
    tokens=(4 * 5 + 2, 2 * 5 + 2, 4 * 5 + 2),
    cached_chat=False,  # new images alone are refused
    rows=(3,),  # upstream numbers the images of a batch through, so that a row depends on those before it
    mrope=True,
    since="5.23.0",
)
add_grids(
    "hy_v4_vl",
    {
        "vision_config": {**NAMED_LAYERS, "out_hidden_size": 32, "spatial_merge_size": 2, "max_image_size": 64},
        "text_config": {
            **UNTIED,
            **tiny(
                "moe_intermediate_size n_routed_experts num_experts_per_tok q_lora_rank kv_lora_rank "
                "qk_nope_head_dim qk_rope_head_dim v_head_dim index_topk index_head_dim index_n_heads "
                "hc_mult",
                rope_parameters=ROPE,
            ),
        },
        **IDS,
    },
    48,
    video=tagged,
    newlines=True,
    mrope=True,
    since="5.24.0",
)
MUSE_VISION = {
    **NAMED_LAYERS,
    "pos_emb_height": 8,
    "pos_emb_width": 8,
    "patch_temporal": 2,
    "merge_size": 2,
    "max_position_embeddings": 64,
}
SLIDING = {**HEADS, "sliding_window": 16, "layer_types": TWO_KINDS}
add_grids(
    "muse_glimmer",
    {"vision_config": MUSE_VISION, "text_config": SLIDING, "out_hidden_size": 128, "projector_hidden_size": 32, **IDS},
    96,
)
add_grids(
    "muse_spark",
    {
        "vision_config": MUSE_VISION,
        "audio_config": {
            "patch_sizes": [4, 2],
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "num_hidden_layers": 2,
            "out_hidden_size": 32,
        },
        "text_config": {
            **SLIDING,
            "moe_intermediate_size": 32,
            "moe_hidden_size": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        "out_hidden_size": 128,
        "projector_hidden_size": 32,
        "audio_token_id": 109,
        **IDS,
    },
    96,
    since="5.23.0",
)
add_grids(
    "minimax_m3_vl",
    {
        "vision_config": {**NAMED_LAYERS, "image_size": 32, "temporal_patch_size": 2, "spatial_merge_size": 2},
        "text_config": {
            **HEADS,
            "num_experts_per_tok": 2,
            "num_local_experts": 4,
            "dense_intermediate_size": 64,
            "shared_intermediate_size": 32,
            "rotary_dim": 4,
            "mlp_layer_types": ["dense", "sparse"],
            "layer_types": ["full_attention", "full_attention"],
        },
        "projector_hidden_size": 32,
        **INDICES,
    },
    96,
    since="5.23.0",  # before, upstream's masks hide tokens of padded rows and of second turns
)
add_grids(
    "exaone4_5",
    {
        "vision_config": {**WINDOWED, "num_heads": 4, "num_key_value_heads": 2},
        "text_config": {**TEXT, "model_type": "exaone4", "sliding_window": 16, "layer_types": TWO_KINDS},
        **IDS,
    },
    96,
)
add_grids(
    "hyperclovax_vision_v2",
    {
        "vision_config": WINDOWED,
        "text_config": {**TEXT, "model_type": "hyperclovax"},
        "tie_word_embeddings": False,
        **IDS,
    },
    96,
)
add_grids(
    "lfm3_vl",
    {
        "vision_config": {
            **NAMED_LAYERS,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_key_value_heads": 2,
            "layer_types": ["conv", "full_attention"],
        },
        "text_config": {**TEXT, "model_type": "lfm3", "layer_types": ["conv", "full_attention"]},
        "projector_hidden_size": 32,
        "tie_word_embeddings": False,
        **QWEN_IDS,
    },
    96,
    since="5.23.0",
)
add_grids(
    "dots3_note",
    {
        "vision_config": {
            **NAMED_LAYERS,
            **tiny(
                "moe_intermediate_size spatial_merge_size num_local_experts num_experts_per_tok adapter_out_dim",
                mlp_layer_types=["dense", "sparse"],
                router_scaling_factor=1.0,
                adapter_in_dim=32,
            ),
        },
        "audio_config": tiny(
            "hidden_size intermediate_size num_attention_heads adapter_out_dim",
            num_hidden_layers=1,
            downsample_hidden_size=8,
            adapter_input_size=32,
        ),
        "text_config": language(
            "num_key_value_heads moe_intermediate_size n_routed_experts num_experts_per_tok "
            "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim index_topk "
            "index_head_dim index_n_heads",
            head_dim=16,
            shared_experts_intermediate_size=32,
            mlp_layer_types=["dense", "sparse"],
        ),
        "audio_token_id": 109,
        **IDS,
    },
    48,
    since="5.23.0",
)
add_grids(
    "glm5_next",
    {
        "vision_config": {**GLM_VISION, "projection_intermediate_size": 64},
        "text_config": language(
            "num_key_value_heads moe_intermediate_size n_routed_experts num_experts_per_tok "
            "q_lora_rank kv_lora_rank qk_nope_head_dim v_head_dim index_topk index_head_dim "
            "index_n_heads hc_mult",
            mlp_layer_types=["dense", "sparse"],
            layer_types=["linear_attention", "indexed_attention"],
            linear_head_dim=8,
            linear_num_heads=4,
            index_kpool=4,
        ),
        **GLM_IDS,
    },
    96,
    video=glm_video,
    video_token=IMAGE,
)
MINICPM_4_7 = {
    **MINICPM,
    "image_start_id": VISION_START,
    "image_end_id": VISION_END,
    "slice_start_id": 106,
    "slice_end_id": 107,
    "newline_id": 108,
}


def with_slices(num_tokens: int, index: int, token: int) -> list[int]:
    """A thumbnail, and a slice of it if there are tokens of two."""
    rest = num_tokens // 4 - 1
    return [VISION_START, *[token] * 4, VISION_END, *[106, *[token] * 4, 107] * rest]


for modality in ("image", "video"):
    add(
        "minicpmv4_7" if modality == "image" else "minicpmv4_7 video",
        MINICPM_4_7,
        slices(modality == "video"),
        modality=modality,
        tokens=(8, 4, 4),
        kept=(4, 2, 2),
        budget=2,
        view="slice" if modality == "image" else "slice of a frame",
        write=with_slices,
        along=types_of(IMAGE, 1) if modality == "image" else types_of(VIDEO, 2),
        prepare=settle,
        mrope=True,
        ours=BOTH_TILES,
    )
