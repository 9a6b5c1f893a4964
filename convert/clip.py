"""CLIP as a judge: both encoders, the tokenizer and the preparation of pictures, from one folder.

A folder as transformers writes a CLIPModel: OpenAI's models, and OpenCLIP's in the same form.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

from mlxdiff.convert.checkpoint import find_weights, map_component
from mlxdiff.convert.component import Component
from mlxdiff.convert.keymap import DIFFUSERS
from mlxdiff.convert.preprocessor import read_colors
from mlxdiff.errors import CheckpointError
from mlxdiff.machine.disk import read_json
from mlxdiff.networks.config import CLIPTextConfig, CLIPVisionConfig
from mlxdiff.store import hub
from mlxdiff.store.cache import snapshot_of
from mlxdiff.store.folder import PREPROCESSOR, Progress
from mlxdiff.store.reference import parse
from mlxdiff.tokenizer import Tokenizer
from mlxdiff.weights.files import open_file
from mlxdiff.weights.tensors import LazyTensor, open_weights

_IMAGE = ("vision_model.", "visual_projection.")
_SCALE = "logit_scale"
_FILES = "config.json, weights, preprocessor_config.json and the tokenizer"


@dataclass(frozen=True)
class Clip:
    """A CLIP, opened.

    Attributes:
        text, image: its encoders, each with its projection.
        tokenizer: of its texts.
        scale: what cosines are multiplied by (100 in OpenAI's models).
        mean, std: of the colors of pictures, in [0, 1].
        provenance: source and, from the hub, revision.
    """

    text: Component
    image: Component
    tokenizer: Tokenizer
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    provenance: dict[str, Any]


def open_clip(
    path: str | os.PathLike[str],
    variant: str | None = None,
    progress: Progress | None = None,
) -> Clip:
    """Open a CLIP.

    Args:
        path: its folder, or a hub id.
        variant: weights variant.
        progress: called while files are fetched.
    Raises: CheckpointError, ConfigError, HubError.
    """
    folder, provenance = _find(path, variant, progress)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: is not the folder of a CLIP model; expected {_FILES} (for example "
            "openai/clip-vit-large-patch14)"
        )
    text, image = _configs(folder)
    whole = folder.resolve()
    entries, _ = find_weights(whole.parent, {whole.name: whole}, variant, ("", "fp16"))
    entry = entries[whole.name]
    tensors = open_weights(entry, lambda file: open_file(file).tensors)
    if _SCALE not in tensors:
        raise CheckpointError(
            f"{entry}: has no {_SCALE}; it is not a whole CLIP model, but one of its encoders"
        )
    parts: dict[bool, dict[str, LazyTensor]] = {True: {}, False: {}}
    for name, tensor in tensors.items():
        if name != _SCALE:
            parts[name.startswith(_IMAGE)][name] = tensor
    text_files = map_component(
        entry, parts[False], DIFFUSERS["text_encoder"], text, f"{entry} (text)"
    )
    image_files = map_component(
        entry, parts[True], DIFFUSERS["image_encoder"], image, f"{entry} (pictures)"
    )
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.check_fits(text.vocab_size, text.max_position_embeddings, str(folder))
    mean, std = read_colors(folder / PREPROCESSOR, image.image_size)
    return Clip(
        text=Component(text, lambda: text_files.read(text), provenance),
        image=Component(image, lambda: image_files.read(image), provenance),
        tokenizer=tokenizer,
        scale=exp(float(tensors[_SCALE].read().reshape(-1)[0])),
        mean=mean,
        std=std,
        provenance=provenance,
    )


def _find(
    path: str | os.PathLike[str], variant: str | None, progress: Progress | None
) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a CLIP, fetched if necessary, and its provenance."""
    place = snapshot_of(Path(path))
    reference = None if os.path.exists(place) else parse(str(path))
    if reference is None:
        return place, {"source": place.resolve().name}
    folder = hub.resolve_clip(str(path), variant, progress=progress)
    return folder, {"source": reference.name, "revision": folder.name}


def _configs(folder: Path) -> tuple[CLIPTextConfig, CLIPVisionConfig]:
    """Read the configs of both encoders. Raises: CheckpointError, ConfigError."""
    where = str(folder / "config.json")
    data = read_json(folder / "config.json")
    if data.get("model_type") != "clip" or "vision_config" not in data:
        found = (data.get("architectures") or [data.get("model_type") or "network"])[0]
        raise CheckpointError(
            f"{folder}: is a {found}, not a CLIP model; expected a CLIPModel (OpenAI's CLIP, or "
            "OpenCLIP in transformers' form)"
        )
    width = {"projection_dim": data.get("projection_dim", 512)}
    # Old files have each part twice; as in transformers, the second one counts, if it is there.
    parts = []
    for name in ("text_config", "vision_config"):
        own, second = data.get(name), data.get(f"{name}_dict")
        parts.append({**((own if second is None else second) or {}), **width})
    for part in parts:
        part.pop("architectures", None)
    return (
        CLIPTextConfig.from_dict(parts[0], f"{where} (text_config)", with_projection=True),
        CLIPVisionConfig.from_dict(parts[1], f"{where} (vision_config)"),
    )
