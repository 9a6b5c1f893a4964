"""The golden data of tests/golden (see its README.md) and the bounds of agreement with it.

Arrays are float32 in our layout: (batch, height, width, channels). Nothing here needs torch.
"""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("sd15", "sd21v", "sdxl")


def checkpoint(name: str) -> Path:
    """The diffusers folder of a tiny model."""
    return GOLDEN / name / "checkpoint"


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


# --------------------------------------------------------------------------- bounds (design, part 3)


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


# -------------------------------------------------------------------------- the same model, otherwise


def respelled(name: str, folder: Path, *, text_prefix: bool, old_vae_names: bool) -> Path:
    """Copy a tiny model with its text encoders and VAE in the given spelling of names.

    Args:
        name: sd15, sd21v or sdxl.
        folder: where to; it must not exist.
        text_prefix: names with ``text_model.`` (and the position_ids that went with it), or without
            (transformers >= 5.6).
        old_vae_names: attention called query, key, value, proj_attn, or to_q, to_k, to_v, to_out.0.
    """
    from safetensors import safe_open
    from safetensors.numpy import save_file

    shutil.copytree(checkpoint(name), folder)
    for component in ("text_encoder", "text_encoder_2", "vae"):
        for path in (folder / component).glob("*.safetensors"):
            with safe_open(path, "np") as file:
                weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if component == "vae":
                weights = {_vae_name(k, old_vae_names): v for k, v in weights.items()}
            else:
                weights = {_text_name(k, text_prefix): v for k, v in weights.items()}
                weights.pop("text_model.embeddings.position_ids", None)
                weights.pop("embeddings.position_ids", None)
                if text_prefix:
                    positions = np.arange(77, dtype=np.int64)[None]
                    weights["text_model.embeddings.position_ids"] = positions
            save_file(weights, path, {"format": "pt"})
    return folder


def _text_name(key: str, prefix: bool) -> str:
    key = key.removeprefix("text_model.")
    return f"text_model.{key}" if prefix and key != "text_projection.weight" else key


def _vae_name(key: str, old: bool) -> str:
    pairs = [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")]
    for new, former in pairs:
        source, target = (new, former) if old else (former, new)
        key = key.replace(f".{source}.", f".{target}.")
    return key
