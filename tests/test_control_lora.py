"""Control-LoRA: the same ControlNet as U-Net + up @ down, computed here in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from control_files import controlnet_config, controlnet_tensors
from golden_data import checkpoint, photo
from safetensors.numpy import save_file

import mlxdiff
from mlxdiff.convert import open_controlnet, open_source
from mlxdiff.convert.keymap import ldm_controlnet
from mlxdiff.errors import CheckpointError
from mlxdiff.networks.config import ControlNetConfig
from mlxdiff.report.info import describe

Tensors = dict[str, np.ndarray]
SMALL = {"seed": 0, "width": 32, "height": 32, "steps": 2}


def made(model: str) -> tuple[Tensors, Tensors]:
    """A Control-LoRA, and the weights of the ControlNet that it stands for (PyTorch's layout)."""
    data = controlnet_config(model)
    tensors = controlnet_tensors(data, 5)
    unet = open_source(checkpoint(model)).tensors("unet")
    random = np.random.default_rng(0)
    file: Tensors = {"lora_controlnet": np.zeros(0, np.float32)}
    whole: Tensors = {}
    names = ldm_controlnet(ControlNetConfig.from_dict(data)).names or {}
    for i, (name, (piece,)) in enumerate(names.items()):
        own = unet.get(piece.target)
        if own is None or len(own.shape) == 1:
            if own is not None and i % 3 == 0:
                whole[piece.target] = own.read().astype(np.float64)  # not in the file
                continue
            file[name] = whole[piece.target] = tensors[piece.target]
            continue
        base = own.read().astype(np.float64)
        base = base.transpose(0, 3, 1, 2) if base.ndim == 4 else base
        tail = (1,) * (base.ndim - 2)
        up = random.standard_normal((len(base), 3, *tail)).astype(np.float32) * 0.1
        down = random.standard_normal((3, *base.shape[1:])).astype(np.float32) * 0.1
        stem = name.removesuffix(".weight")
        file |= {f"{stem}.up": up, f"{stem}.down": down}
        product = up.reshape(len(up), 3).astype(np.float64) @ down.reshape(3, -1)
        whole[piece.target] = base + product.reshape(base.shape)
    return file, whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("control-lora")
    for model in ("sd15", "sdxl"):
        save_file(
            {n: np.ascontiguousarray(a) for n, a in made(model)[0].items()},
            folder / f"{model}.safetensors",
        )
    return folder


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_it_is_the_unet_and_the_difference(model: str, folder: Path) -> None:
    source = open_source(checkpoint(model))
    path = folder / f"{model}.safetensors"
    found = open_controlnet(
        path, source.config("unet"), unet_tensors=lambda: source.tensors("unet")
    )
    expected = made(model)[1]
    tensors = found.tensors()
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        values = tensor.read()
        values = values.transpose(0, 3, 1, 2) if values.ndim == 4 else values
        bound = 1e-6 * np.abs(expected[name]).max()
        np.testing.assert_allclose(values, expected[name], rtol=0, atol=bound)


def test_a_picture_is_that_of_the_whole_controlnet(
    folder: Path, tmp_path: Path, backend: str
) -> None:
    whole = {name: array.astype(np.float32) for name, array in made("sdxl")[1].items()}
    save_file(
        {n: np.ascontiguousarray(a) for n, a in whole.items()}, tmp_path / "whole.safetensors"
    )
    pictures = [
        mlxdiff.load(checkpoint("sdxl"), backend=backend, dtype="float32", controlnets=[path])
        .generate("a", control_image=photo(32, 32), **SMALL)
        .latents
        for path in (folder / "sdxl.safetensors", tmp_path / "whole.safetensors")
    ]
    np.testing.assert_allclose(*pictures, rtol=0, atol=1e-4 * np.abs(pictures[1]).max())


def test_what_does_not_fit(folder: Path, tmp_path: Path) -> None:
    path = folder / "sdxl.safetensors"
    with pytest.raises(CheckpointError, match="Control-LoRA"):
        mlxdiff.load(checkpoint("sd15"), backend="numpy", controlnets=[path])
    file = made("sd15")[0]
    for change, words in (
        ({"input_hint_block.0.weight": np.zeros((4, 4, 3, 3), np.float32)}, "without the layers"),
        ({"input_blocks.1.0.in_layers.2.up": np.zeros((5, 3, 1, 1), np.float32)}, "misshapen"),
        ({"odd": np.zeros(1, np.float32)}, "1 unknown tensor: odd"),
        ({"zero_convs.0.0.bias": np.zeros(3, np.float32)}, "misshapen"),
    ):
        save_file(
            {n: np.ascontiguousarray(a) for n, a in (file | change).items()},
            tmp_path / "x.safetensors",
        )
        with pytest.raises(CheckpointError, match=words):
            mlxdiff.load(
                checkpoint("sd15"), backend="numpy", controlnets=[tmp_path / "x.safetensors"]
            )
    del file["zero_convs.0.0.weight"]
    save_file({n: np.ascontiguousarray(a) for n, a in file.items()}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="1 missing tensor: zero_convs"):
        mlxdiff.load(checkpoint("sd15"), backend="numpy", controlnets=[tmp_path / "x.safetensors"])
    with pytest.raises(CheckpointError, match="is a Control-LoRA, a difference"):
        open_controlnet(path, open_source(checkpoint("sdxl")).config("unet"))
    assert describe(str(path))["kind"] == "a Control-LoRA"
