"""Make a full-size model with random weights as a converted folder, to measure size and memory.

    python benchmarks/random_model.py MODEL DEST [--dtype float16] [-q BITS]

MODEL is sd15, sdxl, x4-upscaler or sd15-shallow. Nothing is downloaded. The configs are the
published ones; sd15-shallow has one layer in a block in place of two, which halves the time and
hardly changes the peak of memory. The tokenizer is the built-in model's. The pictures are noise.
"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import mlxdiff
from mlxdiff.networks.config import (
    AutoencoderKLConfig,
    CLIPTextConfig,
    ComponentConfig,
    MotionAdapterConfig,
    UNet2DConditionConfig,
)
from mlxdiff.networks.params import expected_parameters
from mlxdiff.store.folder import ModelSource, open_folder, write_folder
from mlxdiff.store.recipes import find_recipe, quantized_model
from mlxdiff.weights.tensors import LazyTensor

_SDXL_UNET = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "layers_per_block": 2,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_CLIP = {
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 77,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "vocab_size": 49408,
}
_CLIP_2 = _CLIP | {
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
_CLIP_H = _CLIP | {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
}
_UPSCALER_UNET = {
    "attention_head_dim": 8,
    "block_out_channels": [256, 512, 512, 1024],
    "cross_attention_dim": 1024,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
    "in_channels": 7,
    "num_class_embeds": 1000,
    "only_cross_attention": [True, True, True, False],
    "sample_size": 128,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
    "use_linear_projection": True,
}
_UPSCALER_VAE = {
    "block_out_channels": [128, 256, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "layers_per_block": 2,
    "scaling_factor": 0.08333,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
# Differences of the published configs from diffusers' and transformers' defaults.
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        "text_encoder": _CLIP,
        "unet": {"cross_attention_dim": 768, "sample_size": 64},
        "vae": _VAE | {"scaling_factor": 0.18215, "force_upcast": False},
    },
    "sd15-shallow": {
        "text_encoder": _CLIP,
        "unet": {"cross_attention_dim": 768, "sample_size": 64, "layers_per_block": 1},
        "vae": _VAE | {"scaling_factor": 0.18215, "force_upcast": False},
    },
    "sdxl": {
        "text_encoder": _CLIP,
        "text_encoder_2": _CLIP_2,
        "unet": _SDXL_UNET,
        "vae": _VAE | {"scaling_factor": 0.13025, "force_upcast": True},
    },
    "x4-upscaler": {
        "text_encoder": _CLIP_H,
        "unet": _UPSCALER_UNET,
        "vae": _UPSCALER_VAE,
    },
}
# As of the published adapters for it.
_MOTION: dict[str, dict[str, Any]] = {
    "sd15": {},
    "sd15-shallow": {"motion_layers_per_block": 1},
    "sdxl": {"block_out_channels": [320, 640, 1280], "use_motion_mid_block": False},
}
_FAMILIES = {"sd15": "sd1", "sd15-shallow": "sd1", "x4-upscaler": "sd2"}
_BUILTIN = Path(mlxdiff.__file__).parent / "builtin"


def config(model: str, component: str) -> ComponentConfig:
    """Return the config of a component of a model."""
    data = MODELS[model][component]
    if component == "unet":
        return UNet2DConditionConfig.from_dict(data)
    if component == "vae":
        return AutoencoderKLConfig.from_dict(data)
    return CLIPTextConfig.from_dict(data, with_projection=component == "text_encoder_2")


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return values in our layout that keep activations near unit size; always the same."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    values = random.standard_normal(shape, np.float32)
    if len(shape) == 1:
        values *= 0.1
        values += float("norm" in name and name.endswith("weight"))
    elif "embedding" in name and "time" not in name and "add" not in name:
        values *= 0.02
    else:
        values *= float(np.prod(shape[1:])) ** -0.5
    return values


class RandomModel:
    """A ModelSource (see mlxdiff.store.folder)."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.path = Path(f"random-{model}")
        self.family = _FAMILIES.get(model, model)
        self.components = tuple(MODELS[model])
        self.provenance: dict[str, Any] = {"source": f"random weights, {model}"}
        self.scheduler_config = {
            "_class_name": "PNDMScheduler",
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "num_train_timesteps": 1000,
            "steps_offset": 1,
        }
        self.image_noise_config: dict[str, Any] = {}
        kind = {"sdxl": "XL", "x4-upscaler": "Upscale"}.get(model, "")
        classes = {
            "scheduler": ["diffusers", "PNDMScheduler"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
        }
        if model == "sdxl":
            classes["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
            classes["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
        if model == "x4-upscaler":
            betas = {"beta_end": 0.02, "beta_schedule": "scaled_linear", "beta_start": 0.0001}
            self.image_noise_config = {"_class_name": "DDPMScheduler", **betas}
            classes["low_res_scheduler"] = ["diffusers", "DDPMScheduler"]
        pipeline = f"StableDiffusion{kind}Pipeline"
        self.model_index: dict[str, Any] = {"_class_name": pipeline, **classes}

    def config(self, component: str) -> ComponentConfig:
        return config(self.model, component)

    def tensors(self, component: str) -> dict[str, LazyTensor]:
        shapes = expected_parameters(self.config(component))
        return {
            name: LazyTensor(shape, "F32", lambda n=name, s=shape: random_tensor(n, s))
            for name, shape in shapes.items()
        }

    def tokenizer(self, name: str = "tokenizer") -> Any:
        raise NotImplementedError

    def documents(self) -> dict[str, bytes]:
        files = {
            f"{name}/config.json": json.dumps(data).encode()
            for name, data in MODELS[self.model].items()
        }
        files["model_index.json"] = json.dumps(self.model_index).encode()
        files["scheduler/scheduler_config.json"] = json.dumps(self.scheduler_config).encode()
        if low_res := self.image_noise_config:
            files["low_res_scheduler/scheduler_config.json"] = json.dumps(low_res).encode()
        for name in (n for n in self.model_index if n.startswith("tokenizer")):
            for file in (_BUILTIN / "tokenizer").iterdir():
                files[f"{name}/{file.name}"] = file.read_bytes()
        return files


def make(model: str, dest: Path, dtype: str = "float16", quantize: str | None = None) -> Path:
    """Return the folder of this model. Make it if it does not exist."""
    if not dest.is_dir():
        source: ModelSource = RandomModel(model)
        recipe = None if quantize is None else find_recipe(quantize)
        if recipe is not None:
            source = quantized_model(source, recipe)
        write_folder(source, dest, dtype, recipe=None if recipe is None else recipe.name)
    open_folder(dest)
    return dest


def make_motion_adapter(model: str, dest: Path) -> Path:
    """Return the folder of a motion adapter for this model. Make it if it does not exist."""
    path = dest / "diffusion_pytorch_model.safetensors"
    if not path.is_file():
        dest.mkdir(parents=True, exist_ok=True)
        data = {"_class_name": "MotionAdapter"} | _MOTION[model]
        (dest / "config.json").write_text(json.dumps(data))
        shapes = expected_parameters(MotionAdapterConfig.from_dict(data))
        rng = np.random.default_rng(0)
        tensors = {n: (0.02 * rng.standard_normal(s)).astype(np.float16) for n, s in shapes.items()}
        save_file(tensors, path)
    return dest


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("dest", type=Path)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("-q", "--quantize")
    options = parser.parse_args()
    print(make(options.model, options.dest, options.dtype, options.quantize))


if __name__ == "__main__":
    main()
