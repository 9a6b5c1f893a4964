"""Tiny upscalers with random weights, in every spelling that people have; the same everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from adapter_files import random_values
from folders import stored
from pickle_files import saved
from safetensors.numpy import save_file

from mlxdiff.networks.config import CompactConfig, RRDBNetConfig, UpscalerConfig
from mlxdiff.networks.params import expected_parameters

SMALL: dict[str, Any] = {"width": 8, "growth": 32, "blocks": 1}


@dataclass(frozen=True)
class Form:
    """A file.

    Attributes:
        config: of the network.
        names: "own" (Real-ESRGAN's), "old" (the first ESRGAN's) or "bsrgan".
        table: key of the table of weights in a pickle; "": none. None: the file is safetensors.
    """

    config: UpscalerConfig
    names: str = "own"
    table: str | None = None


FORMS: dict[str, Form] = {
    "esrgan-x4-old.pth": Form(RRDBNetConfig(**SMALL | {"blocks": 2}), "old", ""),
    "bsrgan-x4.pth": Form(RRDBNetConfig(**SMALL), "bsrgan", ""),
    "realesrgan-x4.pth": Form(RRDBNetConfig(**SMALL), "own", "params_ema"),
    "realesrgan-x2.safetensors": Form(RRDBNetConfig(**SMALL, shuffle=2)),
    "realesrgan-x1.safetensors": Form(RRDBNetConfig(**SMALL, shuffle=4)),
    "esrgan-x8-old.safetensors": Form(RRDBNetConfig(**SMALL, doublings=3), "old"),
    "esrgan-x2-old.safetensors": Form(RRDBNetConfig(**SMALL, doublings=1), "old"),
    "esrgan-x1-old.safetensors": Form(RRDBNetConfig(**SMALL, doublings=0), "old"),
    "esrgan-plus-x4.safetensors": Form(RRDBNetConfig(**SMALL, plus=True), "old"),
    "compact-x4.pth": Form(CompactConfig(8, 3, 4), "own", "params"),
    "compact-x2.safetensors": Form(CompactConfig(8, 2, 2)),
}


def weights_of(form: Form) -> dict[str, np.ndarray]:
    """Weights under the names of the file, in PyTorch's layout, float32."""
    found = {}
    for name, shape in expected_parameters(form.config).items():
        values = random_values(form.config.scale, name, stored(shape))
        found[_spelled(name, form)] = np.ascontiguousarray(1.3 * values, np.float32)
    return found


def _spelled(name: str, form: Form) -> str:
    config = form.config
    if form.names == "own" or isinstance(config, CompactConfig):
        return name
    first, *parts = name.split(".")
    if form.names == "bsrgan":
        for own, theirs in (
            ("conv_body", "trunk_conv"),
            ("body.", "RRDB_trunk."),
            (".rdb", ".RDB"),
            ("conv_up", "upconv"),
            ("conv_hr", "HRconv"),
        ):
            name = name.replace(own, theirs)
        return name
    ups, kind = config.doublings, parts[-1]
    if first == "body":
        block, dense, conv = parts[:3]
        return f"model.1.sub.{block}.RDB{dense[3:]}.{conv}.{'0.' * (conv != 'conv1x1')}{kind}"
    places = {
        "conv_first": "0",
        "conv_body": f"1.sub.{config.blocks}",
        "conv_hr": str(3 * ups + 2),
        "conv_last": str(3 * ups + 4),
    } | {f"conv_up{i}": str(3 * i) for i in range(1, ups + 1)}
    return f"model.{places[first]}.{kind}"


def write_upscaler(name: str, folder: Path) -> Path:
    """Write a file of ``FORMS``; return its path."""
    form, path = FORMS[name], folder / name
    weights = weights_of(form)
    if form.table is None:
        save_file(weights, path, {"format": "pt"})
        return path
    path.write_bytes(saved(weights, form.table))
    return path
