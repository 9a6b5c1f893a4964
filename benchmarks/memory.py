"""Compare the peak memory of whole pictures with mlxdiff's estimate.

    python benchmarks/memory.py [--model sd15] [--size 512] [--backend mlx] [--dtype float32]
        [--quantize BITS] [--low-memory]

The model has the published sizes and random weights, made here tensor by tensor. Nothing is
downloaded. MLX counts its arrays. For NumPy the peak is that of the whole process. Prints one line
for each run, and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy_unet_step import MODELS

from mlxdiff.loading import BUILTIN, make_backend
from mlxdiff.machine import probe
from mlxdiff.networks.config import AutoencoderKLConfig, CLIPTextConfig, UNet2DConditionConfig
from mlxdiff.networks.params import expected_parameters
from mlxdiff.pipeline import Pipeline
from mlxdiff.run.memory import PROCESS
from mlxdiff.store.folder import open_folder
from mlxdiff.store.recipes import find_recipe, quantized_model
from mlxdiff.weights.tensors import LazyTensor, Shape

CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
}
CLIP_G: dict[str, Any] = {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "force_upcast": False,
}
SMALL = {"block_out_channels": [64, 128, 256, 256], "cross_attention_dim": 192}


class RandomModel:
    """A model of published size with random weights; see ``mlxdiff.store.folder.ModelSource``."""

    def __init__(self, name: str) -> None:
        self.path, self.provenance = Path("random"), {"source": "random weights"}
        self.family = "sdxl" if name == "sdxl" else "sd1"
        base = open_folder(BUILTIN)
        self.model_index, self.scheduler_config = {}, base.scheduler_config
        self._tokenizer = base.tokenizer
        unet = MODELS["sdxl" if name == "sdxl" else "sd15"] | (SMALL if name == "small" else {})
        vae, clip = VAE, CLIP_L
        if name == "small":
            vae = VAE | {"block_out_channels": [32, 64, 128, 128]}
            clip = CLIP_L | {"hidden_size": 192, "intermediate_size": 768}
        self._configs: dict[str, Any] = {
            "text_encoder": CLIPTextConfig.from_dict(clip),
            "unet": UNet2DConditionConfig.from_dict(unet),
            "vae": AutoencoderKLConfig.from_dict(vae),
        }
        if name == "sdxl":
            self._configs["text_encoder_2"] = CLIPTextConfig.from_dict(CLIP_G)
        self.components = tuple(sorted(self._configs))

    def config(self, component: str) -> Any:
        return self._configs[component]

    def tensors(self, component: str) -> dict[str, LazyTensor]:
        expected = expected_parameters(self._configs[component])
        return {
            name: LazyTensor(shape, "F16", partial(random_values, name, shape))
            for name, shape in expected.items()
        }

    def tokenizer(self, name: str = "tokenizer") -> Any:
        return self._tokenizer("tokenizer")

    def documents(self) -> dict[str, bytes]:
        return {}


def random_values(name: str, shape: Shape) -> np.ndarray:
    """Return weights that keep activations near unit size, repeated from one short, fast draw."""
    draw = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(8191, np.float32)
    draw *= 0.1 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5
    draw += float(len(shape) == 1 and "norm" in name and name.endswith("weight"))
    return np.resize(draw.astype(np.float16), shape)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Draw a picture. Return the expected and the measured memory."""
    source: Any = RandomModel(options.model)
    if options.quantize:
        source = quantized_model(source, find_recipe(options.quantize))
    backend = make_backend(options.backend, options.dtype)
    pipe = Pipeline(source, backend)
    pipe.save_memory(options.low_memory)
    side = {"width": options.size, "height": options.size}
    settings = pipe.settings("a circle", steps=options.steps, guidance=5.0, **side)
    estimate = pipe.memory(settings)
    # The peak so far after each stage. One process cannot separate the stages further.
    peaks: dict[str, int] = {}
    backend.reset_peak_memory()
    result = pipe.generate(
        "a circle",
        seed=0,
        steps=options.steps,
        guidance=5.0,
        on_step=lambda step: peaks.update({f"step {step.index + 1}": backend.peak_memory()}),
        **side,
    )
    measured = backend.peak_memory()
    expected = estimate.peak + (PROCESS if backend.name == "numpy" else 0)
    return {
        "benchmark": "memory",
        "model": options.model,
        "size": options.size,
        "backend": backend.name,
        "device": backend.device(),
        "dtype": backend.dtype,
        "quantize": options.quantize,
        "low_memory": options.low_memory,
        "expected": expected,
        "measured": measured,
        "ratio": round(expected / measured, 3),
        "stages": estimate.stages,
        "peaks": peaks | {"vae": measured},
        "seconds": {k: v for k, v in result.timings.items() if k != "steps"},
        "machine": probe.facts(),
        "versions": probe.versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=["small", "sd15", "sdxl"], default="sd15")
    parser.add_argument("--size", type=int, default=512, help="pixels of a side (default: 512)")
    parser.add_argument("--steps", type=int, default=1, help="of the sampler (default: 1)")
    parser.add_argument("--backend", default="mlx")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantize", help="as for mlxdiff generate")
    parser.add_argument("--low-memory", action="store_true")
    found = measure(parser.parse_args())
    print(
        f"{found['model']} {found['size']}x{found['size']} on {found['backend']} "
        f"({found['dtype']}{', ' + found['quantize'] if found['quantize'] else ''}): expected "
        f"{found['expected'] / 1e9:.3f} GB, measured {found['measured'] / 1e9:.3f} GB "
        f"({found['ratio'] - 1:+.0%})"
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
