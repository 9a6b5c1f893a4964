"""Measure the cost of quantization: pictures of the built-in model, and sizes of full-size models.

    python benchmarks/quantization.py                 # the table of docs/quantization.md, and sizes
    python benchmarks/quantization.py --sensitivity   # the effect of rounding each kind of layer
    python benchmarks/quantization.py --sizes         # sizes only: needs no weights

Each recipe is compared with the float32 model, with the same seeds: PSNR of the 8-bit pictures (the
mean over pictures, and the lowest tenth), PSNR of the latents after one step (Apple's measure,
where the signal is the largest latent), and the share of pictures that show everything in their
prompt, by examples/train_builtin/checker.py. Prompts and seeds are the fixed ones of
examples/train_builtin/evaluate.py, which include held-out ones.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlxdiff import convert, samplers
from mlxdiff.loading import BUILTIN
from mlxdiff.networks.config import CLIPTextConfig, UNet2DConditionConfig, read_vae
from mlxdiff.networks.params import expected_parameters
from mlxdiff.store.recipes import Recipe, find_recipe, quantized_model
from mlxdiff.weights.quantization import Quantization, dequantize, fits, packed_shapes, quantize

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples" / "train_builtin"), str(ROOT / "benchmarks")]
import checker  # noqa: E402
import evaluate  # noqa: E402
import numpy_unet_step  # noqa: E402
import teacher  # noqa: E402

DOCS = ROOT / "docs" / "quantization.md"
RECIPES = (
    "uniform-8-64", "mixed-6", "uniform-6-64", "mixed-5", "uniform-5-64", "mixed-4", "uniform-4-64",
    "uniform-4-32", "linear-4-64", "uniform-mxfp8-32", "uniform-mxfp4-32", "uniform-nvfp4-16",
    "mixed-3", "uniform-3-64", "uniform-2-64",
)  # fmt: skip
GUIDANCE, STEPS = 4.0, 12


class Bench:
    """The built-in model in float32, its pictures, and its pictures with other weights."""

    def __init__(self, model: str | None, prompts: int, steps: int = STEPS) -> None:
        self.network = teacher.Network(model, backend="numpy")
        rows = list(evaluate.ROWS)
        self.prompts = [
            evaluate.prompts_of(rows[i % len(rows)], i // len(rows) + 1)[-1] for i in range(prompts)
        ]
        self.noise = self.network.noise(range(prompts))
        config = self.network.config
        self.plan = samplers.plan(config, "auto", "auto", steps, family="sd1", guidance=GUIDANCE)
        self.parameters = {
            name: dict(self.component(name).parameters()) for name in ("unet", "text_encoder")
        }
        self.first, self.latents = self.draw()
        self.pictures = self.decode(self.latents)

    def component(self, name: str) -> Any:
        return self.network.pipe.model.component(name)

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the latents after the first step, and the final latents."""
        network, plan = self.network, self.plan
        network.embeddings.clear()
        x, state = np.float32(plan.init_noise_sigma) * self.noise, plan.start()
        first = None
        for t in plan.timesteps:
            output = network(plan.scale_model_input(x, state), t, self.prompts, GUIDANCE)
            x, state = plan.step(x, output, state)
            first = x if first is None else first
        return first, x

    def decode(self, latents: np.ndarray) -> np.ndarray:
        return np.stack([np.asarray(one) for one in self.network.pipe.decode(latents)])

    def put(self, weights: dict[str, dict[str, np.ndarray]]) -> None:
        for component, tensors in weights.items():
            for name, value in tensors.items():
                self.component(component).put(name, value)

    def right(self, pictures: np.ndarray) -> float:
        return checker.score(list(pictures), self.prompts)["right"]

    def row(self, recipe: Recipe) -> dict[str, Any]:
        """Measure the effect of a recipe on the pictures."""
        source = quantized_model(convert.open_source(BUILTIN), recipe)
        tensors = {name: source.tensors(name) for name in self.parameters}
        rounded = {
            component: {name: np.array(tensor.read(), np.float32) for name, tensor in part.items()}
            for component, part in tensors.items()
        }
        self.put(rounded)
        first, latents = self.draw()
        self.put(self.parameters)
        pictures = self.decode(latents)
        each = psnr(pictures, self.pictures)
        bits = [8 * t.nbytes for t in tensors["unet"].values()]
        error = float(np.sqrt(((first - self.first) ** 2).mean()))
        return {
            "bits": sum(bits) / sum(t.size for t in tensors["unet"].values()),
            "psnr": float(each.mean()),
            "low": float(np.quantile(each, 0.1)),
            "one step": 20 * math.log10(float(np.abs(self.first).max()) / error),
            "right": self.right(pictures),
        }


def psnr(pictures: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the PSNR of each picture in dB. An identical picture counts as 60."""
    error = ((pictures.astype(float) - reference) ** 2).mean((1, 2, 3))
    return np.minimum(60.0, 10 * np.log10(255**2 / np.maximum(error, 1e-9)))


KINDS = {
    "time": "time_emb", "attn1 q k": r"attn1\.to_[qk]", "attn1 v": r"attn1\.to_v",
    "attn1 out": r"attn1\.to_out", "attn2 q": r"attn2\.to_q", "attn2 k v": r"attn2\.to_[kv]",
    "attn2 out": r"attn2\.to_out", "ff in": r"ff\.net\.0", "ff out": r"ff\.net\.2",
    "proj_in": "proj_in", "proj_out": "proj_out", "conv1": "conv1", "conv2": "conv2",
    "shortcut": "shortcut", "down": "downsamplers", "up": "upsamplers", "conv_out": "^conv_out",
}  # fmt: skip


def sensitivity(bench: Bench) -> None:
    """Return the squared error of the final latents per million weights, by place and kind."""
    how, groups = Quantization(4), {}
    weights = bench.parameters["unet"]
    for name, weight in weights.items():
        if name.endswith(".weight") and weight.ndim > 1 and fits(weight.shape, how):
            place = re.match(r"(down|mid|up)_block[s.]*(\d*)", name)
            kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, name))
            groups.setdefault((place[0] if place else "-", kind), []).append(name)
    deviation = bench.latents.std()
    for (place, kind), names in groups.items():
        rounded = {n: dequantize(quantize(weights[n].astype(np.float16), how)) for n in names}
        bench.put({"unet": rounded})
        _, latents = bench.draw()
        bench.put({"unet": {n: weights[n] for n in names}})
        each = np.sqrt(((latents - bench.latents) ** 2).mean((1, 2, 3))) / deviation
        size = sum(weights[n].size for n in names)
        error = float(np.median(each))
        print(
            f"{place:14s} {kind:10s} {size:8d} {error:.5f} {error**2 / size * 1e9:10.4f}",
            flush=True,
        )


# ------------------------------------------------------------------------------------------- sizes


def text_config(width: int, layers: int, **more: Any) -> CLIPTextConfig:
    data = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    data |= {"num_attention_heads": width // 64, "projection_dim": width, **more}
    return CLIPTextConfig.from_dict(data, "text", with_projection=width == 1280)


def full_size(model: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes of all tensors of a published model, by component."""
    vae = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    unet = UNet2DConditionConfig.from_dict(numpy_unet_step.MODELS[model], model)
    configs = {"text_encoder": text_config(768, 12), "unet": unet, "vae": read_vae(vae, "vae")}
    if model == "sdxl":
        configs["text_encoder_2"] = text_config(1280, 32, hidden_act="gelu")
    return {name: expected_parameters(config) for name, config in configs.items()}


def stored_bytes(component: str, shapes: dict[str, tuple[int, ...]], recipe: Recipe | None) -> int:
    plan = {} if recipe is None else recipe.plan(component, shapes)
    total = 0
    for name, shape in shapes.items():
        if name in plan:
            for part, packed in packed_shapes(shape, plan[name]).items():
                total += math.prod(packed) * (4 if part == "weight" else 2)
        else:
            total += 2 * math.prod(shape)
    return total


def sizes(recipes: Sequence[str]) -> list[str]:
    lines = [
        "| recipe | SD 1.5 U-Net | SD 1.5 whole | SDXL U-Net | SDXL whole |",
        "|---|---|---|---|---|",
    ]
    for name in ("", *recipes):
        recipe = find_recipe(name) if name else None
        cells = []
        for model in ("sd15", "sdxl"):
            parts = {c: stored_bytes(c, s, recipe) for c, s in full_size(model).items()}
            cells += [f"{parts['unet'] / 1e6:.0f} MB", f"{sum(parts.values()) / 1e6:.0f} MB"]
        lines.append(f"| {name or 'float16'} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--sensitivity", action="store_true")
    parser.add_argument("--sizes", action="store_true")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--write", action="store_true", help="put the tables into the docs")
    args = parser.parse_args()
    affine = [name for name in args.recipes if "fp" not in name]
    tables = {"sizes": sizes(affine)}
    print("\n".join(tables["sizes"]), flush=True)
    if args.sizes:
        return
    bench = Bench(None, args.prompts)
    if args.sensitivity:
        sensitivity(bench)
        return
    lines = [
        "| recipe | bits a weight | PSNR of pictures | lowest tenth | latents, 1 step | right |",
        "|---|---|---|---|---|---|",
        f"| float32 | 32 | | | | {100 * bench.right(bench.pictures):.1f} % |",
    ]
    for name in args.recipes:
        start, row = time.time(), bench.row(find_recipe(name))
        lines.append(
            f"| {name} | {row['bits']:.2f} | {row['psnr']:.1f} dB | {row['low']:.1f} dB | "
            f"{row['one step']:.1f} dB | {100 * row['right']:.1f} % |"
        )
        print(lines[-1], f" {time.time() - start:.0f} s", flush=True)
    tables["pictures"] = lines
    if args.write:
        text = DOCS.read_text(encoding="utf-8")
        for name, table in tables.items():
            mark = f"<!-- {name}: benchmarks/quantization.py -->\n"
            before, _, rest = text.partition(mark)
            text = before + mark + "\n".join(table) + "\n" + rest[rest.index("\n\n") + 1 :]
        DOCS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
