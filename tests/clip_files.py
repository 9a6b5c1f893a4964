"""Tiny CLIPs with random weights, in the forms of OpenAI's and OpenCLIP's folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from adapter_files import random_values
from folders import VOCAB, stored, write_json, write_tokenizer
from safetensors.numpy import save_file

from mlxdiff.networks.config import CLIPTextConfig, CLIPVisionConfig
from mlxdiff.networks.params import expected_parameters

SIDE = 28
TEXT: dict[str, Any] = {
    "vocab_size": len(VOCAB),
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 6,
}
IMAGE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 7,
}
COLORS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.25, 0.2]}
# Form -> what its config and its preparation of pictures say of their own.
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "openai": (
        {
            "text_config": {**TEXT, "num_hidden_layers": 5, "projection_dim": 512},
            "text_config_dict": {**TEXT, "eos_token_id": 2, "projection_dim": 512},
            "vision_config": {**IMAGE, "projection_dim": 512},
            "vision_config_dict": None,
        },
        {"size": SIDE, "crop_size": SIDE},
        4.6052,
    ),
    "openclip": (
        {
            "text_config": {**TEXT, "eos_token_id": 7, "pad_token_id": 0, "hidden_act": "gelu"},
            "vision_config": {**IMAGE, "hidden_act": "gelu"},
        },
        {
            "size": {"shortest_edge": SIDE},
            "crop_size": {"height": SIDE, "width": SIDE},
            **COLORS,
        },
        3.0,
    ),
}
TEXTS = ["a b", "b", "b a a b !", ""]


def config_of(form: str) -> dict[str, Any]:
    """The content of its config.json."""
    own, _, _ = FORMS[form]
    return {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 16, **own}


def tensors_of(form: str) -> dict[str, np.ndarray]:
    """Under transformers' names, in PyTorch's layout."""
    own, _, scale = FORMS[form]
    width = {"projection_dim": 16}
    said = own.get("text_config_dict", own["text_config"])
    text = CLIPTextConfig.from_dict({**said, **width}, with_projection=True)
    image = CLIPVisionConfig.from_dict({**own["vision_config"], **width})
    found = {
        name: random_values(5, name, stored(shape))
        for config in (text, image)
        for name, shape in expected_parameters(config).items()
    }
    return found | {"logit_scale": np.array(scale, np.float32)}


def write_clip(folder: Path, form: str = "openai") -> Path:
    """Write a CLIP; return its folder."""
    write_json(folder / "config.json", config_of(form))
    write_json(folder / "preprocessor_config.json", {"resample": 3, **FORMS[form][1]})
    write_tokenizer(folder)
    pad = {"openai": "<|endoftext|>", "openclip": "!"}[form]
    tokens = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": pad}
    write_json(
        folder / "tokenizer_config.json",
        {**tokens, "unk_token": "<|endoftext|>", "model_max_length": 77},
    )
    positions = {"text_model.embeddings.position_ids": np.arange(77)[None]}
    save_file(tensors_of(form) | positions, folder / "model.safetensors", {"format": "pt"})
    return folder
