"""The golden data of tests/golden (see its README.md) and the bounds of agreement with it.

Arrays are float32 in our layout: (batch, height, width, channels). Nothing here needs torch.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("sd15", "sd21v", "sdxl")
FAMILIES = (
    "sdxl-refiner",
    "lcm",
    "ssd-1b",
    "segmind-vega",
    "bk-sdm-small",
    "bk-sdm-tiny",
    "sd-turbo",
    "sdxl-turbo",
    "playground",
    "cosxl",
    "taesd",
    "img2img",
)
"""What make_family_goldens.py writes; of these, taesd is a VAE alone and img2img has no model."""
INPAINTING = (
    "inpainting",
    "edm-inpainting",
    "sd15-inpainting",
    "sdxl-inpainting",
    "only-masked",
)
"""What make_image_goldens.py writes: with a mask; the first two have no model of their own."""
EDITING = ("pix2pix", "sdxl-pix2pix", "cosxl-edit")
"""What it writes of models that edit a picture by instruction; beside these, hires."""


@lru_cache
def checkpoint(name: str) -> Path:
    """The diffusers folder of a tiny model."""
    folder, base = GOLDEN / name / "checkpoint", _cases(name).get("base")
    if base is None:
        return folder
    # The base's files with some replaced; in a temporary folder that lives as long as the process.
    whole = Path(tempfile.mkdtemp(prefix="mlxdiff-golden-")) / name
    atexit.register(shutil.rmtree, whole.parent, ignore_errors=True)
    shutil.copytree(checkpoint(base), whole)
    shutil.copytree(folder, whole, dirs_exist_ok=True)
    return whole


def photo(height: int, width: int) -> np.ndarray:
    """A picture to start from: uint8 (height, width, 3), waves of different lengths and noise."""
    y, x = np.mgrid[:height, :width]
    planes = [abs((a * x + b * y) % 512 - 255) for a, b in ((5, 2), (-3, 7), (4, 4))]
    grain = (x * 7919 + y * 104729 + x * y * 31) % 29
    return np.clip(np.stack(planes, axis=-1) - grain[..., None], 0, 255).astype(np.uint8)


def mask(kind: str, height: int, width: int) -> np.ndarray:
    """A mask: uint8 (height, width, 3), white where it is repainted.

    Args:
        kind: "disc", "half" (the right one) or "soft" (a disc that fades, in colours).
    """
    y, x = np.mgrid[:height, :width]
    if kind == "half":
        grey = np.where(x * 2 >= width, 255, 0)
    else:
        distance = np.hypot((x + 0.5) / width - 0.55, (y + 0.5) / height - 0.45)
        grey = np.where(distance < 0.3, 255, 0)
        if kind == "soft":
            grey = np.clip(255 * (1.4 - 3 * distance), 0, 255)
    tint = np.array([1.0, 0.9, 1.0]) if kind == "soft" else np.ones(3)
    return np.asarray(grey[..., None] * tint).astype(np.uint8)


@lru_cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """Inputs and outputs of the components, as ``component[.case]/what``."""
    with np.load(GOLDEN / name / "components.npz") as file:
        return {key: file[key] for key in file.files}


@lru_cache
def _pictures(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name / "pictures.npz") as file:
        return {key: file[key] for key in file.files}


def prompts(name: str) -> list[str]:
    """The prompts whose ids and embeddings are the first rows of the text encoders' arrays."""
    return list(_cases(name)["prompts"])


def cases(name: str) -> list[dict[str, Any]]:
    """Whole pictures: ``case`` (its name), ``arguments`` of ``Pipeline.generate`` by name,
    ``latents`` (B, h, w, C) float32, scaled as the U-Net sees them, ``image`` (B, H, W, 3) uint8.
    """
    return [
        {
            "case": case,
            "arguments": dict(arguments),
            "latents": _pictures(name)[f"{case}/latents"],
            "image": _pictures(name)[f"{case}/image"],
        }
        for case, arguments in _cases(name)["pictures"].items()
    ]


@lru_cache
def _cases(name: str) -> dict[str, Any]:
    return dict(json.loads((GOLDEN / name / "cases.json").read_text(encoding="utf-8")))


# -------------------------------------------------------------------------- bounds (design, part 3)


def assert_component_close(actual: np.ndarray, expected: np.ndarray, bound: float = 1e-4) -> None:
    """Within ``bound`` relative: the difference's norm against the expected norm, and its largest
    entry against the expected standard deviation."""
    difference = _difference(actual, expected)
    norm = float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))
    worst = float(np.abs(difference).max() / expected.std(dtype=np.float64))
    assert norm <= bound and worst <= bound, f"norm {norm:.2e}, worst {worst:.2e} > {bound:.0e}"


def assert_latents_close(actual: np.ndarray, expected: np.ndarray, bound: float = 1e-3) -> None:
    """Latents of a whole run: every value within ``bound`` standard deviations."""
    worst = float(np.abs(_difference(actual, expected)).max() / expected.std(dtype=np.float64))
    assert worst <= bound, f"{worst:.2e} standard deviations > {bound:.0e}"


def picture_difference(actual: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Share of 8-bit values that are within 1 level, and the mean difference in levels."""
    assert actual.dtype == np.uint8 and expected.dtype == np.uint8, (actual.dtype, expected.dtype)
    difference = np.abs(_difference(actual, expected))
    return float((difference <= 1).mean()), float(difference.mean())


def assert_picture_close(actual: np.ndarray, expected: np.ndarray) -> None:
    """The picture bound: 99.8 % of the values within 1 level, at most 0.05 levels in the mean."""
    within, mean = picture_difference(actual, expected)
    assert within >= 0.998 and mean <= 0.05, f"{within:.2%} within 1 level, mean {mean:.3f}"


def _difference(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    assert np.isfinite(actual).all(), "not finite"
    return actual.astype(np.float64) - expected.astype(np.float64)


# ------------------------------------------------------------------------ the same model, otherwise


def respelled(name: str, folder: Path, *, text_prefix: bool, old_vae_names: bool) -> Path:
    """Copy a tiny model with its text encoders and VAE in the given spelling of names.

    Args:
        name: sd15, sd21v or sdxl.
        folder: where to; it must not exist.
        text_prefix: names with ``text_model.`` (and the position_ids that went with it), or without
            (transformers >= 5.6).
        old_vae_names: attention called query, key, value, proj_attn, or to_q, to_k, to_v, to_out.0.
    """
    shutil.copytree(checkpoint(name), folder)
    positions = np.arange(77, dtype="<i8")[None]
    for component in ("text_encoder", "text_encoder_2", "vae"):
        for path in (folder / component).glob("*.safetensors"):
            if component == "vae":
                _rename(path, lambda key: _vae_name(key, old_vae_names))
            else:
                extra = {"text_model.embeddings.position_ids": positions} if text_prefix else {}
                _rename(path, lambda key: _text_name(key, text_prefix), extra)
    return folder


def _rename(
    path: Path, rename: Callable[[str], str | None], extra: Mapping[str, np.ndarray] | None = None
) -> None:
    """Rename the tensors of a safetensors file (None: leave one out), whatever their type, and add
    int64 ones."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors: dict[str, tuple[dict[str, Any], bytes]] = {}
    for key, entry in json.loads(data[8:start]).items():
        name = None if key == "__metadata__" else rename(key)
        if name is not None:
            begin, end = entry["data_offsets"]
            tensors[name] = entry, data[start + begin : start + end]
    for key, array in (extra or {}).items():
        tensors[key] = {"dtype": "I64", "shape": list(array.shape)}, array.tobytes()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, (entry, raw) in tensors.items():
        header[key] = entry | {"data_offsets": [end, end + len(raw)]}
        end += len(raw)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    body = b"".join(raw for _, raw in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def _text_name(key: str, prefix: bool) -> str | None:
    if key.endswith("position_ids"):
        return None
    key = key.removeprefix("text_model.")
    return f"text_model.{key}" if prefix and key != "text_projection.weight" else key


def _vae_name(key: str, old: bool) -> str:
    pairs = [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")]
    for new, former in pairs:
        source, target = (new, former) if old else (former, new)
        key = key.replace(f".{source}.", f".{target}.")
    return key
