"""Say what any weight file is: its kind, form and precision, what it fits, and how to use it here.

``detect`` knows the kinds by their tensor names; this module adds the rest. ``mlxdiff info`` and
every refusal of a file take their words from here, so they cannot contradict each other.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlxdiff.convert import detect
from mlxdiff.errors import argument
from mlxdiff.weights.files import open_file
from mlxdiff.weights.tensors import LazyTensor, open_weights

Tensors = Mapping[str, LazyTensor]
PEFT_FORM = detect.PEFT_FORM


def _lora() -> str:
    return argument("loras", form="PATH[:SCALE]")


def _controlnet() -> str:
    path = argument("controlnets", form="PATH")
    return f"give it with {path} and a picture with {argument('control_image')}"


def _other_controlnet() -> str:
    return f"not supported; use a ControlNet of the same kind ({argument('controlnets')})"


def _enlarges() -> str:
    return (
        "enlarge with it: mlxdiff upscale, or while drawing with "
        f"{argument('upscaler', form='PATH')} or {argument('hires_upscaler', form='PATH')}"
    )


# Kind (words of ``detect``, or their start) -> how to use it here, or what to use in its place.
_USES: dict[str, Callable[[], str]] = {
    "a LoRA": lambda: f"give it with {_lora()}",
    PEFT_FORM: lambda: (
        "not supported; merge it into the model with PEFT (merge_and_unload), save the model, and "
        f"give that with {argument('model')}"
    ),
    "a LyCORIS adapter": lambda: f"give it with {_lora()}",
    "a textual-inversion embedding": lambda: (
        f"give it with {argument('embeddings', form='PATH[:WORD]')}"
    ),
    "an IP-Adapter": lambda: (
        f"give it with {argument('ip_adapters', form='PATH')} and a picture with "
        f"{argument('ip_image')}"
    ),
    "a ControlNet-LLLite": _controlnet,
    "a ControlNet-Union": lambda: f"{_controlnet()}, and its type with {argument('control_mode')}",
    "a ControlNeXt": _other_controlnet,
    "a Control-LoRA": _controlnet,
    "the difference to a model": lambda: (
        f"not supported; use the whole ControlNet ({argument('controlnets')})"
    ),
    "a ControlNet": _controlnet,
    "an AnimateDiff motion adapter": lambda: (
        f"give it with {argument('motion_adapter', form='PATH')}"
    ),
    **detect.VIDEO_WAYS,
    "a T2I-Adapter": lambda: (
        f"give it with {argument('t2i_adapters', form='PATH')} and a picture with "
        f"{argument('control_image')}"
    ),
    "a style T2I-Adapter": lambda: (
        f"not supported; use an IP-Adapter, which sees the picture ({argument('ip_adapters')})"
    ),
    "a VAE, alone": lambda: f"give it with {argument('vae', form='PATH')}",
    "the VAE of a video model": lambda: (
        f"give the whole model that it belongs to ({argument('model')})"
    ),
    "a tiny VAE": lambda: f"give it with {argument('vae', form='PATH')}",
    "a whole model": lambda: f"give it with {argument('model', form='PATH')}",
    "a U-Net": lambda: (
        f"give it with {argument('model', form='PATH')} and its model with "
        f"{argument('config', form='FOLDER')}"
    ),
    "a text encoder, alone": lambda: (
        f"give the whole model that it belongs to ({argument('model')})"
    ),
    "a CLIP image encoder": lambda: (
        f"give its folder with {argument('image_encoder')}, beside {argument('ip_adapters')}"
    ),
    "an ESRGAN upscaler": _enlarges,
    "a Real-ESRGAN compact upscaler": _enlarges,
}
CLASSES = {
    "ControlNetModel": "a ControlNet",
    "ControlNetUnionModel": "a ControlNet-Union",
    "MotionAdapter": "an AnimateDiff motion adapter",
    "SparseControlNetModel": detect.SPARSE_CONTROL,
    "T2IAdapter": "a T2I-Adapter",
}
"""Class of an addition in a config.json -> its kind."""
_UNKNOWN = "weights of an unknown kind"
_OTHERWISE = "not supported; give a Stable Diffusion 1, 2 or SDXL model"

_FACES: tuple[tuple[str, str], ...] = (
    (r"(?:pulid_encoder|pulid_ca|id_adapter(?:_attn_layers)?)\..+", "PuLID"),
    (r"(?:id_encoder|fuse_module)\..+", "PhotoMaker"),
)
FACE = (
    "is {}, which needs a face recognition network and is not supported; use a Plus or Full Face "
    "IP-Adapter"
)
"""Refusal of an adapter for faces, by name."""

_CROSS = re.compile(
    r".+attn2[._](?:processor\.)?to_[kv](?:_ip|_lora)?\.(?:\w+\.)*weight|.+\.to_k_ip\.weight"
)
_BY_WIDTH = {
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    2048: "SDXL",
    1280: "SDXL's refiner",
}


def kind(tensors: Tensors) -> str:
    """Return what a file with these tensors is, in words, or "weights of an unknown kind (...)"."""
    return detect.looks_like(tensors)


def is_unknown(tensors: Tensors) -> bool:
    """Return True if no known kind of file has these tensors."""
    return kind(tensors).startswith(_UNKNOWN)


def face_adapter(tensors: Tensors) -> str | None:
    """Return the name of an adapter for faces, which is refused; None for other files."""
    for pattern, name in _FACES:
        if any(re.fullmatch(pattern, tensor) for tensor in tensors):
            return name
    if any(name.startswith("image_proj.perceiver_resampler.") for name in tensors) or (
        "image_proj.proj.2.weight" in tensors and "image_proj.proj.3.weight" not in tensors
    ):
        return "an IP-Adapter FaceID"
    first = tensors.get("image_proj.proj_in.weight")
    if first is not None and len(first.shape) == 2 and first.shape[1] == 512:
        return "InstantID"
    return None


def use(words: str) -> str:
    """Return how to use a file of this kind, or what to use in its place.

    Args:
        words: result of ``kind``.
    """
    if words.startswith(_UNKNOWN):
        return "mlxdiff does not know these tensor names"
    found = (make() for start, make in _USES.items() if words.startswith(start))
    return next(found, _OTHERWISE)


def refusal(tensors: Tensors) -> str:
    """Describe a file that was given in the wrong place, with the way out."""
    if face := face_adapter(tensors):
        return FACE.format(face)
    words = kind(tensors)
    return f"looks like {words}; {use(words)}"


def fits(tensors: Tensors) -> str | None:
    """Return the family that a file was made for, by the width of its text; None if unknown."""
    widths = {t.shape[1] for n, t in tensors.items() if len(t.shape) > 1 and _CROSS.fullmatch(n)}
    return _BY_WIDTH.get(widths.pop()) if len(widths) == 1 else None


def written(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what a file says about itself (modelspec; kohya's training), as it is written there.

    Returns: of title, made_with, base_model, prediction_type, resolution, trained_words, clip_skip,
        timestep_range, licence: those that the file has.
    """

    def first(*keys: str) -> str | None:
        found = (metadata.get(key, "").strip() for key in keys)
        return next((text for text in found if text and text != "None"), None)

    facts = {
        "title": first("modelspec.title", "ss_output_name"),
        "architecture": first("modelspec.architecture"),
        "base_model": first("ss_sd_model_name", "ss_base_model_version"),
        "prediction_type": first("modelspec.prediction_type", "modelspec.predict_key"),
        "resolution": first("modelspec.resolution", "ss_resolution"),
        "trained_words": _words(metadata),
        "clip_skip": first("modelspec.encoder_layer", "ss_clip_skip"),
        "timestep_range": first("modelspec.timestep_range"),
        "licence": first("modelspec.license"),
        "made_with": first("modelspec.implementation", "software"),
    }
    return {name: value for name, value in facts.items() if value}


def _words(metadata: Mapping[str, str]) -> list[str]:
    """Return the words that a file was trained with: its own list, or the most frequent tags."""
    if phrase := metadata.get("modelspec.trigger_phrase", "").strip():
        return [word.strip() for word in phrase.split(",") if word.strip()]
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        counts: Counter[str] = Counter()
        for tags in folders.values():
            counts.update({str(tag).strip(): int(count) for tag, count in tags.items()})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return []
    return [tag for tag, _ in counts.most_common(10) if tag]


def describe(path: Path) -> dict[str, Any]:
    """Describe a weight file as plain JSON values.

    Returns: kind, path, form, made_for, use, tensors, parameters, bytes, precision, written
        (what the file says about itself, see there).
    Raises: CheckpointError if the file cannot be read.
    """
    metadata: dict[str, str] = {}
    containers: list[str] = []

    def read(file: Path) -> Tensors:
        opened = open_file(file)
        containers.append(opened.container)
        metadata.update(opened.metadata)
        return opened.tensors

    tensors = open_weights(path, read)
    words = kind(tensors)
    face = face_adapter(tensors)
    return {
        "kind": face or words,
        "path": str(path),
        "form": containers[0],
        "made_for": fits(tensors),
        "use": use(words) if face is None else FACE.format(face),
        "tensors": len(tensors),
        "parameters": sum(t.size for t in tensors.values()),
        "bytes": sum(t.file_bytes for t in tensors.values()),
        "precision": dict(Counter(t.form or t.dtype for t in tensors.values())),
        "written": written(metadata),
    }
