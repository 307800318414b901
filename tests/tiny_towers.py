"""Tiny random vision towers."""

import torch
from copies import remembered
from tiny import VISION
from transformers import AutoConfig, AutoModel


SHAPE = {name: value for name, value in VISION.items() if name not in ("model_type", "projection_dim")}
CLIP, DINO = VISION, {"model_type": "dinov2", **SHAPE}
SIGLIP = {"model_type": "siglip_vision_model", **SHAPE}
REGISTERS = {"model_type": "dinov2_with_registers", "num_register_tokens": 4, **SHAPE}
TOWERS = {"clip": CLIP, "dinov2": DINO, "registers": REGISTERS, "siglip": SIGLIP}
WITH_CLS = ["clip", "dinov2", "registers"]


@remembered
def build_tower(name, attention="sdpa"):
    torch.manual_seed(0)
    fields = dict(TOWERS[name])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    return AutoModel.from_config(config, attn_implementation=attention).eval()
