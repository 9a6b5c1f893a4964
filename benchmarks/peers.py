"""Compare mlxdiff's MLX path with mlx-examples' stable_diffusion: same weights, same MLX, one run.

    git clone https://github.com/ml-explore/mlx-examples
    python benchmarks/peers.py mlx-examples/stable_diffusion [--parts unet graph picture decode]
        [--threads 1] [--rounds 2] [--sizes 256 512]

Stable Diffusion 1.5 at full size, random weights, float32. Nothing is downloaded. The two sides
take turns, each in its own process.

unet     seconds of a step (64x64 latents, batch 2): wall and CPU, after one warm-up step
graph    nodes of a step's graph for a GPU: attention and layer norm are one node each
picture  peak memory above the weights of a whole picture, 512x512, one step
decode   peak memory above the weights of the VAE's decoder, at each of --sizes; then mlxdiff's
         alone at 1024x1024, with the other's scaled by pixels from the size before

On Linux, preload a BLAS (LD_PRELOAD=libopenblas.so.0). The one in MLX's wheel is slow and would
dominate the figures. Prints a table and a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy_unet_step import processor
from random_model import config, random_tensor

from mlxdiff.networks.params import expected_parameters

SIDES = ("mlxdiff", "mlx-examples")
PARTS = ("unet", "graph", "picture", "decode")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
MODEL = "sd15"


def inputs(size: int) -> tuple[Any, Any]:
    """Return latents (2, size, size, 4) and text states (2, 77, 768)."""
    import mlx.core as mx

    random = np.random.default_rng(1)
    shapes = (2, size, size, 4), (2, 77, 768)
    sample, text = (mx.array(random.standard_normal(s, np.float32)) for s in shapes)
    mx.eval(sample, text)
    return sample, text


# -------------------------------------------------------------------------------------- the sides


def our_network(component: str) -> Any:
    from mlxdiff.backends.mlx import MLXBackend
    from mlxdiff.weights.tensors import LazyTensor

    chosen = config(MODEL, component)
    tensors = {
        name: LazyTensor(shape, "F32", lambda n=name, s=shape: random_tensor(n, s))
        for name, shape in expected_parameters(chosen).items()
    }
    return MLXBackend().load(chosen, tensors)


def our_step(size: int = 64) -> Callable[[], Any]:
    import mlx.core as mx

    from mlxdiff.networks.condition import Condition

    unet = our_network("unet")
    sample, states = inputs(size)
    # Made once for a run: keys and values, and the timestep's part of each resnet.
    text, temb = unet.read(states), Condition(unet.embed(mx.array([501.0, 501.0])))
    unet.predict(sample, temb, text)
    mx.eval([made for condition in (text, temb) for _, made in condition._made.values()])
    return lambda: unet.predict(sample, temb, text)


def their_network(component: str) -> Any:
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten
    from stable_diffusion import clip, model_io, unet, vae
    from stable_diffusion import config as configs

    if component == "unet":
        network = unet.UNetModel(
            configs.UNetConfig(
                num_attention_heads=(8,) * 4,
                cross_attention_dim=(768,) * 4,
                up_block_types=configs.UNetConfig.up_block_types[::-1],  # like its loader
            )
        )
        rename = model_io.map_unet_weights
        for name, module in network.named_modules():
            if re.search(r"(attentions\.\d|mid_blocks\.1)\.norm$", name):
                module.eps = 1e-6  # diffusers' value; its own is 1e-5
    elif component == "vae":
        network = vae.Autoencoder(configs.AutoencoderConfig())
        rename = model_io.map_vae_weights
    else:
        network = clip.CLIPTextModel(
            configs.CLIPTextModelConfig(num_layers=12, model_dims=768, num_heads=12)
        )
        rename = model_io.map_clip_text_encoder_weights
    expected = {name for name, _ in tree_flatten(network.parameters())}
    weights = []
    for name, shape in expected_parameters(config(MODEL, component)).items():
        value = mx.array(random_tensor(name, shape))
        if value.ndim == 4:
            value = value.transpose(0, 3, 1, 2)  # as in its files
        for new, array in rename(name, value):
            array = mx.contiguous(array)
            mx.eval(array)
            weights.append((new, array))
    network.update(tree_unflatten(weights))
    if expected != {name for name, _ in weights}:
        raise AssertionError(f"names differ: {expected ^ {name for name, _ in weights}}")
    return network


def their_step(size: int = 64) -> Callable[[], Any]:
    import mlx.core as mx

    unet = their_network("unet")
    sample, text = inputs(size)
    return lambda: unet(sample, mx.array([501.0, 501.0]), text)


# ------------------------------------------------------------------------------------- the parts


def measure_unet(side: str, file: str, size: int) -> dict[str, Any]:
    import mlx.core as mx

    step = {"mlxdiff": our_step, "mlx-examples": their_step}[side]()
    out = step()
    mx.eval(out)
    np.save(file, np.array(out))
    del out
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    wall, cpu = time.perf_counter(), time.process_time()
    mx.eval(step())
    return {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "peak": mx.get_peak_memory() - held,
    }


def measure_graph(side: str, file: str, size: int) -> dict[str, Any]:
    import mlx.core as mx

    def one_node(first: Any, *others: Any, **options: Any) -> Any:
        others = [x for x in others if isinstance(x, mx.array)]
        return mx.depends([first], others)[0]

    gpu = mx.Device(mx.gpu)
    mx.default_device = lambda: gpu
    mx.metal.is_available = lambda: True
    mx.fast.scaled_dot_product_attention = mx.fast.layer_norm = one_node
    step = {"mlxdiff": our_step, "mlx-examples": their_step}[side](64)
    mx.export_to_dot(file, step())
    text = Path(file).read_text(encoding="utf-8")
    names = re.findall(r'label ?="([A-Za-z]\w*)[^"]*", shape=rectangle', text)
    views = {"Reshape", "Transpose", "Broadcast", "Slice", "Split", "ExpandDims", "Squeeze",
             "AsStrided", "Unflatten", "Flatten", "BroadcastAxes", "View"}  # fmt: skip
    kinds = {name: names.count(name) for name in sorted(set(names))}
    return {
        "nodes": len(names),
        "kernels": sum(n for name, n in kinds.items() if name not in views),
        "kinds": kinds,
    }


def measure_picture(side: str, file: str, size: int) -> dict[str, Any]:
    import mlx.core as mx

    weights = []

    def held() -> int:
        return mx.get_active_memory()

    if side == "mlxdiff":
        from random_model import make

        import mlxdiff

        folder = make(MODEL, Path(tempfile.gettempdir()) / f"mlxdiff-random-{MODEL}")
        pipe = mlxdiff.load(folder, backend="mlx", dtype="float32")
        for name in ("text_encoder", "unet", "vae"):
            pipe.model.component(name)
        weights = held()
        mx.reset_peak_memory()
        pipe.generate("a red circle", seed=0, steps=1, width=512, height=512)
        return {"weights": weights, "peak": mx.get_peak_memory() - weights}
    from stable_diffusion import StableDiffusion
    from stable_diffusion.config import DiffusionConfig
    from stable_diffusion.sampler import SimpleEulerSampler

    sd = StableDiffusion.__new__(StableDiffusion)
    sd.dtype = mx.float32
    sd.diffusion_config = DiffusionConfig()
    sd.sampler = SimpleEulerSampler(sd.diffusion_config)
    sd.unet, sd.autoencoder = their_network("unet"), their_network("vae")
    sd.text_encoder = their_network("text_encoder")
    sd._tokenize = lambda *_: mx.array([[49406] + 76 * [49407]] * 2)
    sd.tokenizer = None
    weights = held()
    mx.reset_peak_memory()
    # Like its txt2image.py, without the deletions there: mlxdiff keeps its networks here too.
    for x in sd.generate_latents("a red circle", num_steps=1, seed=0):
        mx.eval(x)
    mx.eval(sd.decode(x))
    return {"weights": weights, "peak": mx.get_peak_memory() - weights}


def measure_decode(side: str, file: str, size: int) -> dict[str, Any]:
    import mlx.core as mx

    z = mx.array(np.random.default_rng(1).standard_normal((1, size // 8, size // 8, 4), np.float32))
    if side == "mlxdiff":
        from mlxdiff.networks.tiling import decode

        vae = our_network("vae")
        run = lambda: decode(vae, z)  # noqa: E731
    else:
        vae = their_network("vae")
        run = lambda: vae.decode(z * vae.scaling_factor)  # noqa: E731
    mx.eval(z)
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    wall, cpu = time.perf_counter(), time.process_time()
    out = run()
    mx.eval(out)
    result = {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "peak": mx.get_peak_memory() - held,
    }
    np.save(file, np.array(out)[:, ::8, ::8])
    return result


# ------------------------------------------------------------------------------------- the report


def take_turns(options: argparse.Namespace) -> dict[str, Any]:
    environment = os.environ | dict.fromkeys(THREADS, str(options.threads))
    paths = [str(options.checkout.resolve()), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    results: dict[str, Any] = {}
    turns = [(part, 512, SIDES) for part in options.parts if part != "decode"]
    if "decode" in options.parts:
        turns += [("decode", size, SIDES) for size in options.sizes] + [("decode", 1024, SIDES[:1])]
    with tempfile.TemporaryDirectory() as folder:
        for part, size, chosen in turns:
            name = f"decode {size}" if part == "decode" else part
            sides = results[name] = {side: [] for side in SIDES}
            for number in range(options.rounds if part == "unet" else 1):
                for side in chosen:
                    print(f"{name}, turn {number + 1}: {side}", file=sys.stderr)
                    file = str(Path(folder) / f"{side}.npy")
                    command = [sys.executable, __file__, str(options.checkout)]
                    command += ["--measure", part, side, file, str(size)]
                    done = subprocess.run(
                        command, env=environment, check=True, stdout=subprocess.PIPE
                    )
                    sides[side].append(json.loads(done.stdout.splitlines()[-1]))
            if part in ("unet", "decode") and chosen == SIDES:
                ours, theirs = (np.load(Path(folder) / f"{side}.npy") for side in SIDES)
                difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
                results[name]["largest_difference"] = difference
    return {
        "benchmark": "peers",
        "threads": options.threads,
        "results": results,
        "preload": os.environ.get("LD_PRELOAD", ""),
        "machine": {
            "system": platform.platform(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        "versions": {name: version(name) for name in ("mlxdiff", "mlx")},
    }


def report(result: dict[str, Any]) -> None:
    machine = result["machine"]
    print(f"{machine['processor']}, {result['threads']} thread(s), mlx {result['versions']['mlx']}")
    for part, sides in result["results"].items():
        if not sides[SIDES[1]]:
            by_pixels(result["results"])
            continue
        for key in sides[SIDES[0]][0]:
            values = [
                statistics.median(turn[key] for turn in sides[side])
                for side in SIDES
                if isinstance(sides[side][0][key], (int, float))
            ]
            if len(values) == 2:
                unit = 2**20 if key in ("peak", "weights") else 1
                name = f"{part}, {key}" + (" (MiB)" if unit > 1 else "")
                ours, theirs = (value / unit for value in values)
                print(f"{name:24}{ours:12.2f}{theirs:12.2f}{ours / theirs:8.2f}x")
        if "largest_difference" in sides:
            print(f"{part}, largest relative difference: {sides['largest_difference']:.1e}")
    print(json.dumps(result))


def by_pixels(results: dict[str, Any]) -> None:
    """Return the last decode's peak, and the other side's peak scaled from the decode before."""
    (small, before), (large, last) = [x for x in results.items() if x[0].startswith("decode")][-2:]
    pixels = [int(name.split()[1]) ** 2 for name in (small, large)]
    theirs = before[SIDES[1]][0]["peak"] * pixels[1] / pixels[0] / 2**20
    ours = last[SIDES[0]][0]["peak"] / 2**20
    print(f"{large + ', peak (MiB)':24}{ours:12.2f}{theirs:12.2f}{ours / theirs:8.2f}x (derived)")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", type=Path, help="mlx-examples' folder stable_diffusion")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        part, side, file, size = options.measure
        print(json.dumps(globals()[f"measure_{part}"](side, file, int(size))))
    else:
        report(take_turns(options))


if __name__ == "__main__":
    main()
