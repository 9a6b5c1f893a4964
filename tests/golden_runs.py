"""Golden pictures drawn again: models opened once, what a case adds to them, the comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lora_files
import numpy as np
from adapter_files import ADAPTERS, write_adapter, write_encoder
from control_files import NETS, write_controlnet, write_union
from golden_data import (
    GOLDEN,
    assert_latents_close,
    assert_picture_close,
    checkpoint,
    mask,
    photo,
)
from lllite_files import write_lllite
from motion_files import write_motion
from t2i_files import write_t2i_adapter

import mlxdiff
from mlxdiff.pipeline import Pipeline, Result

NAMED = "motion_adapter controlnets t2i_adapters ip_adapters loras embeddings vae refiner".split()
"""What a case names beside arguments of ``generate``."""


class Opened:
    """The tiny models in float32, each opened once, and files of what can be added to them.

    Args:
        folder: where these are written when they are first asked for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pipes: dict[Any, Pipeline] = {}

    def __call__(
        self,
        name: str,
        backend: str = "numpy",
        *,
        quantize: int | None = None,
        motion_adapter: str | None = None,
        controlnets: Sequence[str] = (),
        t2i_adapters: Sequence[str] = (),
        ip_adapters: Sequence[str] = (),
        loras: Sequence[tuple[str, float]] = (),
        embeddings: Sequence[str] = (),
        **parts: str,
    ) -> Pipeline:
        """A model with these additions, by the names that cases have for them, and no others.

        Args:
            quantize: bits; None: as it is.
            parts: other models by what they are to it (vae, refiner).
        """
        key = name, backend, quantize, *parts.items()
        if key not in self._pipes:
            given = {part: checkpoint(of) for part, of in parts.items()}
            self._pipes[key] = mlxdiff.load(
                checkpoint(name), backend=backend, dtype="float32", quantize=quantize, **given
            )
        pipe = self._pipes[key]
        motion = None if motion_adapter is None else self.motion_adapter(name, motion_adapter)
        pipe.set_motion_adapter(motion)
        pipe.set_controlnets([self.controlnet(name, net) for net in controlnets])
        pipe.set_t2i_adapters([self.t2i_adapter(name, one) for one in t2i_adapters])
        pipe.set_ip_adapters([self.adapter(name, adapter) for adapter in ip_adapters])
        pipe.set_loras([(self.lora(file), scale) for file, scale in loras])
        words = [one.partition(":") for one in embeddings]
        pipe.set_embeddings([(GOLDEN / "prompts" / file, word or None) for file, _, word in words])
        return pipe

    def draw(
        self,
        case: dict[str, Any],
        backend: str,
        model: str | None = None,
        quantize: int | None = None,
    ) -> Result:
        """A case's pictures.

        Args:
            model: that of a case which names none.
        """
        arguments = with_pictures(case["arguments"])
        name: str = arguments.pop("model", model)
        named = {part: arguments.pop(part) for part in NAMED if part in arguments}
        return self(name, backend, quantize=quantize, **named).generate(**arguments)

    def controlnet(self, model: str, name: str) -> Path:
        """One of control_files.NETS, "union" or "lllite"."""
        if name == "lllite":
            return write_lllite(self.folder / model / "lllite.safetensors", model)
        path = self.folder / model / name
        if path.exists():
            return path
        if name == "union":
            return write_union(path)
        seed, changes = NETS[name]
        return write_controlnet(path, model, seed, **changes)

    def motion_adapter(self, model: str, name: str) -> Path:
        """One of motion_files.ADAPTERS, as a folder."""
        path = self.folder / model / f"motion-{name}"
        if not path.exists():
            write_motion(path, name, model)
        return path

    def t2i_adapter(self, model: str, name: str) -> Path:
        """One of t2i_files.ADAPTERS, as a folder."""
        path = self.folder / model / f"t2i-{name}"
        if not path.exists():
            write_t2i_adapter(path, name, model)
        return path

    def adapter(self, model: str, name: str) -> Path:
        """One of adapter_files.ADAPTERS, its image encoder beside it."""
        path = self.folder / model / f"{name}.safetensors"
        if not path.exists():
            kind, seed = ADAPTERS[name]
            write_adapter(path, kind, checkpoint(model), seed)
        if not (path.parent / "image_encoder").exists():
            write_encoder(path.parent / "image_encoder")
        return path

    def lora(self, name: str) -> Path:
        """One of lora_files.FILES."""
        return lora_files.write(name, self.folder)


def with_pictures(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a case, pictures in place of their sizes."""
    arguments = dict(arguments)
    if "image" in arguments:
        arguments["image"] = photo(*arguments["image"])
    if "depth_image" in arguments:
        arguments["depth_image"] = photo(*arguments["depth_image"])[..., 0]
    if "mask" in arguments:
        arguments["mask"] = mask(*arguments["mask"])
    if "ip_image" in arguments:
        arguments["ip_image"] = [photo(*size) for size in arguments["ip_image"]]
    if "control_image" in arguments:  # all but the first upside down
        first, *others = (photo(*size) for size in arguments["control_image"])
        arguments["control_image"] = [first, *(one[::-1, ::-1] for one in others)]
    return arguments


def assert_drawn_again(
    opened: Opened, case: dict[str, Any], backend: str, model: str | None = None
) -> None:
    """A golden picture within its bounds; for the arguments see `Opened.draw`."""
    result = opened.draw(case, backend, model)
    assert_latents_close(result.latents, case["latents"])
    assert_picture_close(np.stack([np.asarray(i) for i in result.images]), case["image"])
