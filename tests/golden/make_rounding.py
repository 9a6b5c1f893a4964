"""Write rounding.npz: what float64 says of the networks in tests/rounding_cases.py.

    python tests/golden/make_rounding.py

The networks are diffusers' and transformers'. They compute in float64, with weights and inputs of
float32: ``float64/COMPONENT/CASE/INPUT/OUTPUT``. ``torch/COMPONENT/CASE`` is the error of the same
networks in float32 on this machine (rounding_cases.error). Then the script prints the tables
of docs/numerics.md.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from additions import controlnet, encoder
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.utils import logging
from make_goldens import nhwc
from transformers import CLIPTextModel, CLIPTextModelWithProjection

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from adapter_files import ADAPTERS, adapter_tensors  # noqa: E402
from golden_data import checkpoint  # noqa: E402
from golden_runs import Opened  # noqa: E402
from rounding_cases import CASES, Inputs, Network, drawn, error, errors, run, thinned  # noqa: E402
from rounding_cases import network as ours  # noqa: E402


def array(x: torch.Tensor) -> np.ndarray:
    return nhwc(x) if x.ndim == 4 else x.numpy()


def network(component: str, case: str, dtype: torch.dtype) -> Network:
    """A network of diffusers or transformers, in our layout."""

    def given(x: np.ndarray) -> torch.Tensor:
        if x.dtype != np.float32:
            return torch.from_numpy(x).long()
        return torch.from_numpy(x.transpose(0, 3, 1, 2) if x.ndim == 4 else x).to(dtype)

    def opened(kind: Any, folder: Path, name: str) -> Any:
        return kind.from_pretrained(folder / name, dtype=torch.float32).to(dtype).eval()

    def unet_inputs(inputs: Inputs) -> dict[str, Any]:
        made: dict[str, Any] = {name: given(x) for name, x in inputs.items()}
        made["timestep"] = made.pop("timesteps")
        added = {name: made.pop(name) for name in ("text_embeds", "time_ids") if name in made}
        return made | ({"added_cond_kwargs": added} if added else {})

    if component == "text encoder":
        model, name = case.split("/")
        kind = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
        text = opened(kind, checkpoint(model), name)

        def read(inputs: Inputs) -> Inputs:
            out = text(given(inputs["ids"]), output_hidden_states=True)
            pooled = out.text_embeds if name == "text_encoder_2" else out.pooler_output
            return {"penultimate": array(out.hidden_states[-2]), "pooled": array(pooled)}

        return read
    if component in ("U-Net", "U-Net of pixels"):
        folder = checkpoint(case) if (checkpoint(case) / "unet").exists() else None
        kind = UNet2DModel if component == "U-Net of pixels" else UNet2DConditionModel
        unet = opened(kind, folder or checkpoint(case), "unet" if folder else "")
        return lambda inputs: {"output": array(unet(**unet_inputs(inputs)).sample)}
    if component == "ControlNet":
        net = controlnet(case, "first").to(dtype)

        def control(inputs: Inputs) -> Inputs:
            made = unet_inputs(inputs)
            down, mid = net(controlnet_cond=made.pop("image"), **made, return_dict=False)
            return {str(i): array(x) for i, x in enumerate([*down, mid])}

        return control
    if component.startswith(("VAE", "TAESD")):
        kind, name = (AutoencoderTiny, "") if case == "taesd" else (AutoencoderKL, "vae")
        vae = opened(kind, checkpoint(case), name)
        if component == "TAESD encoder":
            return lambda inputs: {"mean": array(vae.encode(given(inputs["image"])).latents)}
        if component == "VAE encoder":
            return lambda inputs: {
                "mean": array(vae.encode(given(inputs["image"])).latent_dist.mean)
            }
        return lambda inputs: {"image": array(vae.decode(given(inputs["latents"])).sample)}
    if component == "CLIP image encoder":
        eyes = encoder().to(dtype)

        def see(inputs: Inputs) -> Inputs:
            out = eyes(given(inputs["pixels"]), output_hidden_states=True)
            penultimate = array(out.hidden_states[-2])
            return {"image_embeds": array(out.image_embeds), "penultimate": penultimate}

        return see
    # An IP-Adapter: diffusers builds its projection inside a U-Net, under an attention processor
    # for each layer.
    pipe = StableDiffusionPipeline.from_pretrained(checkpoint("sd15"), dtype=torch.float32)
    state: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    kind, seed = ADAPTERS[case]
    for key, values in adapter_tensors(kind, checkpoint("sd15"), seed).items():
        table, _, rest = key.partition(".")
        state[table][rest] = torch.from_numpy(values)
    pipe.load_ip_adapter([state], subfolder="", weight_name=[""], image_encoder_folder=None)
    (projection,) = pipe.unet.encoder_hid_proj.image_projection_layers
    keys = state["ip_adapter"]["1.to_k_ip.weight"].to(dtype)
    projection = projection.to(dtype)

    def show(inputs: Inputs) -> Inputs:
        return {"keys": array(projection(given(inputs["features"])) @ keys.T)}

    return show


@contextmanager
def exact_sines() -> Iterator[None]:
    """Take sines and cosines in float64, of angles in float32.

    diffusers embeds timesteps in float32 whatever the network's dtype is. The angles are part of
    what a model has learned; the rounding of their sines is not.
    """
    sin, cos = torch.sin, torch.cos
    with (
        patch("torch.sin", lambda x: sin(x.double())),
        patch("torch.cos", lambda x: cos(x.double())),
    ):
        yield


@torch.no_grad()
def write() -> None:
    """Compute and store everything."""
    stored: dict[str, Any] = {}
    for component, cases in CASES.items():
        for case in cases:
            with exact_sines():
                exact = run(network(component, case, torch.float64), component, case)
            single = run(network(component, case, torch.float32), component, case)
            assert all(x.dtype == np.float64 for x in exact.values())
            assert all(x.dtype == np.float32 for x in single.values())
            stored[f"torch/{component}/{case}"] = error(single, exact)
            for name, x in thinned(exact).items():
                stored[f"float64/{component}/{case}/{name}"] = x
    np.savez_compressed(HERE / "rounding.npz", **stored)


def report() -> None:
    """Print the errors of torch, NumPy and MLX."""
    print("| | torch | NumPy | times torch | MLX | times torch |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        opened = Opened(Path(folder))
        for component in CASES:
            ours = {backend: errors(component, backend, opened) for backend in ("numpy", "mlx")}
            cells = [f"{found:.1e} | {found / theirs:.2f}" for found, theirs in ours.values()]
            print(f"| {component} | {ours['numpy'][1]:.1e} | {' | '.join(cells)} |", flush=True)


@torch.no_grad()
def report_pictures(count: int = 20) -> None:
    """Print how far a VAE encoder is from float64 at most, by kind of picture."""
    component, case = "VAE encoder", "sdxl-refiner"
    kinds = ("noise", "waves", "flat shapes")
    print(f"| | {' | '.join(kinds)} |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        networks = {
            backend: ours(component, case, backend, Opened(Path(folder)))
            for backend in ("numpy", "mlx")
        }
        networks["torch"] = network(component, case, torch.float32)
        judge = network(component, case, torch.float64)
        for name, one in networks.items():
            worst = []
            for kind in kinds:
                given = [{"image": drawn(kind, seed)} for seed in range(count)]
                pairs = [(one(x)["mean"], judge(x)["mean"]) for x in given]
                worst.append(max(np.abs(a - b).max() / b.std() for a, b in pairs))
            print(f"| {name} | {' | '.join(f'{x:.1e}' for x in worst)} |", flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for library in (logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    write()
    report()
    report_pictures()
