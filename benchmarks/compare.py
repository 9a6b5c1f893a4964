"""Compare pictures with those of other tools: one small model, one noise, the same prompts.

    python benchmarks/compare.py [--tokenizer FOLDER] [--with NAME=PYTHON ...] [--keep FOLDER]

A small Stable Diffusion 1.5 (its structure, 32 groups in its norms, random weights) is written as
a diffusers folder. Each tool draws from it: Euler, trailing timesteps, 10 steps, guidance 7.5,
float32. diffusers on torch is the reference. NAME is one of

    diffusers      diffusers and torch; always needed
    diffuse-mlx    from PyPI; unmodified, but its downloads lead to the folder, its noise is given
    mlx-examples   the same code as Apple publishes it; put stable_diffusion on PYTHONPATH

PYTHON is the interpreter that has the tool; mlxdiff itself runs in this one, on NumPy and on MLX.
FOLDER of --tokenizer holds vocab.json and merges.txt of CLIP; without it the built-in model's small
vocabulary serves. Prints two tables in Markdown and a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

PROMPTS = (
    "a cat",
    "a small red circle left of a large blue square on a yellow background, oil painting",
)
STRINGS = ("a cat", "it\u2019s", "\u201cquoted\u201d", "cat \u2014 dog", "caf\u00e9", "na\u00efve",
           "\u65e5\u672c\u306e\u57ce", "a cat \U0001f63a", "\ufb01ne art")  # fmt: skip
STEPS, GUIDANCE, SIZE, VAE_FACTOR = 10, 7.5, 128, 8
SMALL = {
    "text_encoder": {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4,
                     "num_hidden_layers": 4},
    "unet": {"block_out_channels": [64, 96, 128, 128], "cross_attention_dim": 64,
             "sample_size": SIZE // VAE_FACTOR},
    "vae": {"block_out_channels": [32, 64, 64, 64]},
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "text_encoder": {"architectures": ["CLIPTextModel"]},
    "unet": {"attention_head_dim": 8, "in_channels": 4, "layers_per_block": 2,
             "norm_num_groups": 32, "out_channels": 4,
             "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
             "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3},
    "vae": {"in_channels": 3, "latent_channels": 4, "norm_num_groups": 32, "out_channels": 3},
}  # fmt: skip

# ------------------------------------------------------------------------------- the sides
# Each returns, by prompt: states (2, 77, C) negative first; latents and picture (H, W, C); and the
# tokens of STRINGS, None where the tool stops.


def side_mlxdiff(folder: Path, noise: np.ndarray, backend: str) -> dict[str, Any]:
    import mlxdiff
    from mlxdiff.store.folder import open_folder  # noqa: F401 - a clear error if it is broken

    pipe = mlxdiff.load(folder, backend=backend, dtype="float32")
    found: dict[str, Any] = {"tokens": []}
    tokenizer = pipe.source.tokenizer()
    for text in STRINGS:
        padded = list(map(int, tokenizer.encode(text)))
        found["tokens"].append(padded[: len(tokenizer.encode(text, pad=False)) + 2])
    for index, prompt in enumerate(PROMPTS):
        result = pipe.generate(prompt, noise=noise, sampler="euler", schedule="trailing",
                               steps=STEPS, guidance=GUIDANCE, width=SIZE, height=SIZE)  # fmt: skip
        found[f"latents{index}"] = result.latents[0]
        found[f"picture{index}"] = np.asarray(result.images[0]) / 255
    return found


def side_diffusers(folder: Path, noise: np.ndarray) -> dict[str, Any]:
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing"
    )
    pipe.set_progress_bar_config(disable=True)
    found: dict[str, Any] = {"tokens": [pipe.tokenizer(text).input_ids for text in STRINGS]}
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    for index, prompt in enumerate(PROMPTS):
        how = dict(num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=latents,
                   width=SIZE, height=SIZE)  # fmt: skip
        raw = pipe(prompt, output_type="latent", **how).images[0]
        found[f"latents{index}"] = raw.numpy().transpose(1, 2, 0)
        found[f"picture{index}"] = np.asarray(pipe(prompt, output_type="np", **how).images[0])
    return found


def side_apple(
    folder: Path, noise: np.ndarray, package: str, padded: bool = False
) -> dict[str, Any]:
    import importlib

    import mlx.core as mx

    module = importlib.import_module(package)
    loading = importlib.import_module(f"{package}.model_io")
    loading.hf_hub_download = lambda key, name: str(folder / name)  # type: ignore[attr-defined]
    name = next(key for key, files in loading._MODELS.items() if "text_encoder_2" not in files)
    pipe = module.StableDiffusion(name)
    first = pipe.sampler._sigmas[-1]
    start = mx.array(noise) * first * (first.square() + 1).rsqrt()
    pipe.sampler.sample_prior = lambda *_, **__: start
    if padded:

        def tokenize(own: Any, text: str, negative: str | None = None) -> mx.array:
            rows = [own.tokenize(one) for one in (text, negative) if one is not None]
            return mx.array([row + [row[-1]] * (77 - len(row)) for row in rows])

        pipe._tokenize = tokenize
    found: dict[str, Any] = {"tokens": []}
    for text in STRINGS:
        try:
            found["tokens"].append(list(map(int, pipe.tokenizer.tokenize(text))))
        except Exception as error:
            found["tokens"].append(type(error).__name__)
    for index, prompt in enumerate(PROMPTS):
        *_, latents = pipe.generate_latents(
            prompt, num_steps=STEPS, cfg_weight=GUIDANCE, latent_size=noise.shape[1:3], seed=0
        )
        found[f"latents{index}"] = np.asarray(latents[0])
        found[f"picture{index}"] = np.asarray(pipe.decode(latents)[0])
    return found


SIDES = {
    "mlxdiff, NumPy": lambda folder, noise: side_mlxdiff(folder, noise, "numpy"),
    "mlxdiff, MLX": lambda folder, noise: side_mlxdiff(folder, noise, "mlx"),
    "diffusers": side_diffusers,
    "diffuse-mlx": lambda folder, noise: side_apple(folder, noise, "diffuse_mlx.stable_diffusion"),
    "diffuse-mlx, prompts padded to 77 tokens": lambda folder, noise: side_apple(
        folder, noise, "diffuse_mlx.stable_diffusion", padded=True
    ),
    "mlx-examples": lambda folder, noise: side_apple(folder, noise, "stable_diffusion"),
}


def run_side(name: str, folder: Path, out: Path) -> None:
    """Draw in this process and write what came out."""
    found = SIDES[name](folder, np.load(folder / "noise.npy"))
    tokens = found.pop("tokens")
    np.savez(out, tokens=np.array(json.dumps(tokens)), **found)


# ------------------------------------------------------------------------------- the model


def make_model(folder: Path, tokenizer: Path | None) -> None:
    """Write the small model as a diffusers folder, and the noise."""
    from random_model import MODELS, RandomModel

    from mlxdiff.convert import convert

    for part, changes in SMALL.items():
        MODELS["sd15"][part] = MODELS["sd15"][part] | changes
    vocabulary = tokenizer or Path(__import__("mlxdiff").__file__).parent / "builtin/tokenizer"
    count = len(json.loads((vocabulary / "vocab.json").read_text("utf-8")))
    ends = {"bos_token_id": count - 2, "eos_token_id": count - 1}
    MODELS["sd15"]["text_encoder"] |= {"vocab_size": count} | ends

    class Small(RandomModel):
        def documents(self) -> dict[str, bytes]:
            files = super().documents()
            for name in ("vocab.json", "merges.txt"):
                files[f"tokenizer/{name}"] = (vocabulary / name).read_bytes()
            files.pop("tokenizer/tokenizer.json")
            settings = json.loads(files["tokenizer/tokenizer_config.json"])
            settings.pop("known_words")
            files["tokenizer/tokenizer_config.json"] = json.dumps(settings).encode()
            return files

    from mlxdiff.store.folder import write_folder

    with tempfile.TemporaryDirectory() as work:
        write_folder(Small("sd15"), Path(work) / "small", "float32")
        convert(Path(work) / "small", folder, dtype="float32", to="diffusers")
    for name, defaults in DEFAULTS.items():  # the readers of other tools need them written out
        path = folder / name / "config.json"
        path.write_text(json.dumps(defaults | json.loads(path.read_text("utf-8"))), "utf-8")
    side = SIZE // VAE_FACTOR
    noise = np.random.default_rng(5).standard_normal((1, side, side, 4), np.float32)
    np.save(folder / "noise.npy", noise)


# ------------------------------------------------------------------------------- the tables


def compared(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Return tokens that agree, and per prompt the error of latents and PSNR of the picture."""
    tokens = [json.loads(str(one["tokens"])) for one in (found, reference)]
    pairs = [(ours, theirs) for ours, theirs in zip(*tokens, strict=True)]
    row: dict[str, Any] = {"tokens": sum(ours == theirs for ours, theirs in pairs)}
    for index in range(len(PROMPTS)):
        true = reference[f"latents{index}"].astype(np.float64)
        off = found[f"latents{index}"].astype(np.float64) - true
        row[f"latents{index}"] = float(np.sqrt(np.mean(off**2)) / true.std())
        pictures = [np.round(255 * one[f"picture{index}"]) for one in (found, reference)]
        error = float(np.mean((pictures[0] - pictures[1]) ** 2))
        row[f"psnr{index}"] = float("inf") if error == 0 else 10 * np.log10(255**2 / error)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--with", dest="others", nargs="*", default=["diffusers"])
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        name, folder, out = options.side
        return run_side(name, Path(folder), Path(out))
    pythons = {"mlxdiff, NumPy": sys.executable, "mlxdiff, MLX": sys.executable}
    for other in options.others:
        name, _, python = other.partition("=")
        pythons |= {one: python or sys.executable for one in SIDES if one.startswith(name)}
    if "diffusers" not in pythons:
        sys.exit("diffusers is the reference: --with diffusers[=PYTHON] ...")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary) / "model"
        if not folder.exists():
            make_model(folder, options.tokenizer)
        found = {}
        for name, python in pythons.items():
            out = Path(temporary) / f"{len(found)}.npz"
            command = [python, __file__, "--side", name, str(folder), str(out)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            found[name] = dict(np.load(out))
    rows = {name: compared(one, found["diffusers"]) for name, one in found.items()}
    titles = [f"latents, prompt {i + 1} | PSNR, prompt {i + 1}" for i in range(len(PROMPTS))]
    print(f"| tool | tokens of {len(STRINGS)} strings | {' | '.join(titles)} |")
    print("|---" * (2 + 2 * len(PROMPTS)) + "|")
    for name, row in rows.items():
        if name != "diffusers":
            cells = [f"{row['tokens']} equal"]
            for i in range(len(PROMPTS)):
                cells += [f"{row[f'latents{i}']:.1e}", f"{row[f'psnr{i}']:.1f} dB"]
            print(f"| {name} | {' | '.join(cells)} |")
    print("\n| string | " + " | ".join(found) + " |\n|---" + "|---" * len(found) + "|")
    tokens = {name: json.loads(str(one["tokens"])) for name, one in found.items()}
    for index, text in enumerate(STRINGS):
        cells = []
        for name in found:
            own, true = tokens[name][index], tokens["diffusers"][index]
            same = "equal" if own == true else "other tokens"
            cells.append(own if isinstance(own, str) else same)
        print(f"| {text} | {' | '.join(cells)} |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
