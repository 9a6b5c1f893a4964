"""How the rounding of a network is measured: the networks, their inputs, the measure.

A case is one network of the tiny models. Its inputs are random, the same on every machine.
test_rounding.py and golden/make_rounding.py use it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from adapter_files import ADAPTERS, ENCODER
from golden_data import GOLDEN, arrays, checkpoint, photo
from golden_runs import Opened

from mlxdiff.convert import open_controlnet, open_ip_adapter, open_source, open_vae
from mlxdiff.loading import make_backend
from mlxdiff.machine.disk import read_json
from mlxdiff.networks.condition import Condition
from mlxdiff.networks.config import UNet2DConditionConfig

CASES: dict[str, tuple[str, ...]] = {
    "text encoder": (
        "sd15/text_encoder",
        "sd21v/text_encoder",
        "sdxl/text_encoder",
        "sdxl/text_encoder_2",
    ),
    "U-Net": ("sd15", "sd21v", "sdxl", "sdxl-refiner"),
    "ControlNet": ("sd15", "sdxl"),
    "VAE encoder": ("sd15", "sdxl", "sdxl-refiner"),
    "VAE decoder": ("sd15", "sdxl", "sdxl-refiner"),
    "TAESD encoder": ("taesd",),
    "TAESD decoder": ("taesd",),
    "CLIP image encoder": ("encoder",),
    "IP-Adapter": tuple(ADAPTERS),
    "U-Net of pixels": ("ddpm", "ddpm-labels"),
}
"""The networks of each component, by the names of the tiny models."""

Inputs = dict[str, np.ndarray]
Network = Callable[[Inputs], Mapping[str, np.ndarray]]
"""Computes outputs by name from inputs by name, both in our layout."""


def inputs(component: str, case: str) -> Iterator[tuple[str, Inputs]]:
    """Names and inputs of each run of a network, float32 and int32."""
    random = np.random.RandomState(zlib.crc32(f"{component} {case}".encode()))

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    def pictures(height: int, width: int, low: float) -> np.ndarray:
        """One as a camera makes it, one of noise; values in [low, 1]."""
        noise = random.uniform(size=(height, width, 3))
        both = np.stack([photo(height, width) / 255, noise])
        return (low + (1 - low) * both).astype(np.float32)

    sizes = {"square": (8, 8), "tall": (12, 4), "wide": (4, 16), "large": (12, 12)}
    if component == "text encoder":
        model, name = case.split("/")
        yield "prompts", {"ids": arrays(model)[f"{name}/input_ids"]}
    elif component == "CLIP image encoder":
        side = ENCODER["image_size"]
        for size in ("first", "second"):
            yield size, {"pixels": normal(2, side, side, 3)}
    elif component == "IP-Adapter":
        shape = (ENCODER["projection_dim"],) if case == "image" else (17, ENCODER["hidden_size"])
        yield "features", {"features": normal(8, *shape)}
    elif component.endswith("encoder"):
        for size, (height, width) in sizes.items():
            yield size, {"image": pictures(8 * height, 8 * width, -1 if "VAE" in component else 0)}
    elif component.endswith("decoder"):
        for size, (height, width) in sizes.items():
            yield size, {"latents": 3 * normal(2, height, width, 4)}
    else:
        golden = _first_golden(case)
        shape = golden["sample"].shape[3]
        for size, (height, width) in sizes.items():
            made = {name: normal(*array.shape) for name, array in golden.items()}
            made |= {name: golden[name] for name in ("time_ids", "class_labels") if name in golden}
            made["sample"] = normal(2, height, width, shape)
            made["timesteps"] = random.randint(0, 1000, 2).astype(np.float32)
            if component == "ControlNet":
                made["image"] = pictures(8 * height, 8 * width, 0)
            yield size, made


def _first_golden(model: str) -> Inputs:
    """Inputs of a U-Net, by argument."""
    prefix = "unet" if "unet/sample" in arrays(model) else "unet.square"
    found = {k.split("/")[1]: v for k, v in arrays(model).items() if k.startswith(f"{prefix}/")}
    del found["output"]
    return found


def run(network: Network, component: str, case: str) -> dict[str, np.ndarray]:
    """What a network says of all its inputs, by ``input/output``."""
    return {
        f"{size}/{name}": output
        for size, given in inputs(component, case)
        for name, output in network(given).items()
    }


def drawn(kind: str, seed: int, side: int = 64) -> np.ndarray:
    """A picture (1, side, side, 3) in [-1, 1]: "noise", "waves" or "flat shapes"."""
    random = np.random.RandomState(seed)
    if kind == "noise":
        picture = random.uniform(-1, 1, (side, side, 3))
    elif kind == "waves":
        y, x = np.mgrid[:side, :side] / side
        a, b, c = 6 * random.uniform(size=(3, 3))
        picture = np.sin(a * x[..., None] + b * y[..., None] + c)
    else:
        ground, shape = random.uniform(-1, 1, (2, 3))
        top, bottom, left, right = random.randint(0, side, 4)
        picture = np.tile(ground, (side, side, 1))
        picture[min(top, bottom) : max(top, bottom), min(left, right) : max(left, right)] = shape
    return picture[None].astype(np.float32)


def thinned(outputs: Mapping[str, np.ndarray], most: int = 1000) -> dict[str, np.ndarray]:
    """At most so many values of each output, evenly spread: what is stored."""
    return {name: x.reshape(-1)[:: 2 * (x.size // (2 * most)) + 1] for name, x in outputs.items()}


def error(actual: Mapping[str, np.ndarray], exact: Mapping[str, np.ndarray]) -> float:
    """The error of a network: root mean square, in standard deviations of an output.

    Over its outputs it is the geometric mean. How much an input enlarges rounding is a factor that
    all float32 runs share; with a geometric mean it cancels in the ratio of two errors, and no
    single input rules.
    """
    assert actual.keys() == exact.keys()
    return _geometric_mean(
        float(np.sqrt(np.mean(np.square(actual[name].astype(np.float64) - x)) / np.var(x)))
        for name, x in exact.items()
    )


def _geometric_mean(values: Iterable[float]) -> float:
    return float(np.exp(np.mean(np.log(list(values)))))


# ------------------------------------------------------------------------------------------- ours


def unet_of(model: str) -> UNet2DConditionConfig:
    return UNet2DConditionConfig.from_dict(read_json(checkpoint(model) / "unet/config.json"))


def network(component: str, case: str, backend: str, opened: Opened) -> Network:
    """One of our networks."""
    chosen = make_backend(backend, "float32")
    to, back = chosen.asarray, chosen.to_numpy

    def moved(inputs: Inputs) -> dict[str, Any]:
        return {name: to(x) for name, x in inputs.items()}

    def of_model(model: str, name: str) -> Any:
        source = open_source(checkpoint(model))
        return chosen.load(source.config(name), source.tensors(name))

    def of_part(part: Any) -> Any:
        return chosen.load(part.config, part.tensors())

    def of_adapter(name: str) -> tuple[Any, Any]:
        adapter, encoder = open_ip_adapter(opened.adapter("sd15", name), unet_of("sd15"))
        return of_part(adapter), of_part(encoder)

    def text_encoder() -> Network:
        text = of_model(*case.split("/"))

        def read(inputs: Inputs) -> Inputs:
            out = text(to(inputs["ids"]))
            pooled = out.pooled if out.text_embeds is None else out.text_embeds
            return {"penultimate": back(out.hidden_states[-2]), "pooled": back(pooled)}

        return read

    def unet() -> Network:
        net = of_model(case, "unet")
        return lambda inputs: {"output": back(net(**moved(inputs)))}

    def controlnet() -> Network:
        net = of_part(open_controlnet(opened.controlnet(case, "first"), unet_of(case)))

        def predict(inputs: Inputs) -> Inputs:
            given = moved(inputs)
            sample, image = given.pop("sample"), net.embed_image(given.pop("image"))
            text = net.read(given.pop("encoder_hidden_states"))
            found = net.predict(sample, Condition(net.embed(**given)), text, image)
            return {str(i): back(x) for i, x in enumerate(found)}

        return predict

    def image_encoder() -> Network:
        _, encoder = of_adapter("image")

        def see(inputs: Inputs) -> Inputs:
            out = encoder(to(inputs["pixels"]))
            penultimate = back(out.hidden_states[-2])
            return {"image_embeds": back(out.image_embeds), "penultimate": penultimate}

        return see

    def ip_adapter() -> Network:
        adapter, _ = of_adapter(case)
        return lambda inputs: {"keys": back(adapter(to(inputs["features"]))[0][0])}

    def vae_encoder() -> Network:
        vae = of_part(open_vae(checkpoint(case)))
        return lambda inputs: {"mean": back(vae.encode(to(inputs["image"]))[0])}

    def vae_decoder() -> Network:
        vae = of_part(open_vae(checkpoint(case)))
        return lambda inputs: {"image": back(vae.decode(to(inputs["latents"])))}

    return {
        "text encoder": text_encoder,
        "U-Net": unet,
        "U-Net of pixels": unet,
        "ControlNet": controlnet,
        "VAE encoder": vae_encoder,
        "VAE decoder": vae_decoder,
        "TAESD encoder": vae_encoder,
        "TAESD decoder": vae_decoder,
        "CLIP image encoder": image_encoder,
        "IP-Adapter": ip_adapter,
    }[component]()


@lru_cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "rounding.npz") as file:
        return dict(file)


def errors(component: str, backend: str, opened: Opened) -> tuple[float, float]:
    """The errors of a component, ours and torch's: geometric mean over its networks."""
    found: list[tuple[float, float]] = []
    for case in CASES[component]:
        name = f"{component}/{case}"
        exact = {
            key.removeprefix(f"float64/{name}/"): x
            for key, x in golden().items()
            if key.startswith(f"float64/{name}/")
        }
        outputs = run(network(component, case, backend, opened), component, case)
        torch = float(golden()[f"torch/{name}"])
        found.append((error(thinned(outputs), exact), torch))
    ours, theirs = (_geometric_mean(column) for column in zip(*found, strict=True))
    return ours, theirs
