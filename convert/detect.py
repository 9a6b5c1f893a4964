"""What a path holds: which pipeline and family or, where it is no model, what it looks like."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlxdiff.config import ComponentConfig, read_json
from mlxdiff.errors import CheckpointError, ConfigError
from mlxdiff.weights import COMPONENTS, TOKENIZERS, open_weights

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
)
"""Pipeline classes (``_class_name`` of model_index.json) whose weights can be opened."""

CLASSES: dict[str, tuple[str, ...]] = {
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
}
"""Classes that each component may have."""

SKIPPED: dict[str, str] = {
    "safety_checker": "a picture classifier; it has no part in making the picture",
    "feature_extractor": "belongs to the safety checker or an image encoder",
    "image_encoder": "only IP-Adapters use it; they bring their own",
}
"""Parts of a folder that are not converted, and why."""

# What a file is, told by the names in it: any name that matches as a whole. First hit decides.
_LOOKS: tuple[tuple[str, str], ...] = (
    (
        r"(?:.*[._])?lora_(?:up|down|mid|A|B)(?:\..+)?|.+\.lora\.(?:up|down)\..+|lora_.+\.alpha",
        "a LoRA",
    ),
    (r".+\.(?:hada|lokr)_w.+", "a LyCORIS adapter"),
    (r"emb_params|string_to_param.*|clip_[lg]", "a textual-inversion embedding"),
    (r"(?:ip_adapter|image_proj)\..+", "an IP-Adapter"),
    (r"(?:control_model\..+|controlnet_cond_embedding\..+|input_hint_block\..+)", "a ControlNet"),
    (r"(?:adapter\.)?body\.\d+\.(?:resnets|block1)\..+", "a T2I-Adapter"),
    (r".*\.motion_modules\..+", "an AnimateDiff motion module"),
    (
        r"(?:.+\.)?joint_blocks\..+|transformer_blocks\.\d+\.attn\.add_q_proj\..+",
        "a Stable Diffusion 3 or Flux transformer",
    ),
    (r"(?:.+\.)?double_blocks\..+|single_transformer_blocks\..+", "a Flux transformer"),
    (r"model\.diffusion_model\..+", "a whole model in one file (LDM naming)"),
    (r"(?:input_blocks|middle_block)\..+", "a U-Net in LDM naming, alone"),
    (r"(?:down_blocks|mid_block)\..+", "a U-Net in diffusers naming, alone"),
    (r"(?:first_stage_model\.)?(?:encoder|decoder)\.(?:conv_in|mid)\..+", "a VAE"),
    (r"(?:encoder|decoder)\.layers\.\d+\.conv\..+", "a tiny VAE (TAESD)"),
    (r"(?:text_model\.)?(?:embeddings|encoder\.layers)\..+", "a text encoder, alone"),
)
_WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def check_model_index(index: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """Hold model_index.json against what we can open.

    Args:
        index: its content.
        path: the folder, for messages.
    Returns: what was left out and why, one line each.
    Raises: CheckpointError for a pipeline, a part or a class that we do not know, or a part that is
        missing.
    """
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        what = f"is a {pipeline}" if pipeline else "names no pipeline class in model_index.json"
        raise CheckpointError(f"{path}: {what}; supported: {', '.join(PIPELINES)}")
    notes = []
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list):
            continue  # a setting of the pipeline, force_zeros_for_empty_prompt for example
        if len(entry) != 2 or not all(v is None or isinstance(v, str) for v in entry):
            raise CheckpointError(f"{path}: model_index.json has {part} = {entry!r}")
        class_name = entry[1]
        if class_name is None:
            continue
        if part in SKIPPED:
            notes.append(f"{part} left out: {SKIPPED[part]}")
            continue
        if part not in (*COMPONENTS, *TOKENIZERS, "scheduler"):
            raise CheckpointError(
                f"{path}: has a part that is not supported: {part} ({class_name})"
            )
        if class_name not in CLASSES.get(part, (class_name,)):
            raise CheckpointError(
                f"{path}: {part} is a {class_name}, which is not supported; "
                f"supported: {', '.join(CLASSES[part])}"
            )
        if not (path / part).is_dir():
            raise CheckpointError(
                f"{path}: the folder {part} is missing; model_index.json names it"
            )
    present = {k for k, v in index.items() if isinstance(v, list) and v[1] is not None}
    needed = {"unet", "vae", "scheduler"}
    if not present & {"text_encoder", "text_encoder_2"}:
        needed.add("text_encoder")
    for encoder, tokenizer in zip(COMPONENTS, TOKENIZERS, strict=False):
        if encoder in present:
            needed.add(tokenizer)
    if missing := sorted(needed - present):
        raise CheckpointError(f"{path}: model_index.json has no {' and no '.join(missing)}")
    return tuple(notes)


def family(configs: Mapping[str, ComponentConfig]) -> str:
    """The family of a model, by its parts: "sd1", "sd2", "sdxl" or "sdxl-refiner".

    SDXL's U-Net has the text_time embedding; its refiner has no first text encoder. Of the others,
    version 2 has OpenCLIP's text encoder (gelu), version 1 OpenAI's (quick_gelu).
    """
    unet: Any = configs["unet"]
    if unet.addition_embed_type == "text_time":
        return "sdxl" if "text_encoder" in configs else "sdxl-refiner"
    text: Any = configs.get("text_encoder") or configs["text_encoder_2"]
    return "sd1" if text.hidden_act == "quick_gelu" else "sd2"


def looks_like(names: Iterable[str]) -> str:
    """What a file with tensors of these names is, in words."""
    names = list(names)
    for pattern, words in _LOOKS:
        if any(re.fullmatch(pattern, name) for name in names):
            return words
    return f"weights of a kind that is not known here ({len(names)} tensors)"


def not_a_model(path: Path) -> CheckpointError:
    """The error for a path that is no diffusers folder: what it is, and what to give instead."""
    want = "give a diffusers folder (with model_index.json), a converted folder or a hub id"
    if not path.exists():
        return CheckpointError(f"{path}: no such file or folder, and no hub id (org/name); {want}")
    return CheckpointError(
        f"{path}: {_describe_file(path) if path.is_file() else _describe_folder(path)}; {want}"
    )


def _describe_file(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return f"looks like {looks_like(open_weights(path))}, not a model folder"
    if suffix == ".gguf":
        return "is a GGUF file, which is not supported"
    if suffix in _WEIGHT_SUFFIXES:
        return "is a PyTorch pickle, which is not supported yet"
    if suffix in _PICTURES:
        return "is a picture, not a model"
    if path.name == "model_index.json":
        return "is one file of a model folder; give the folder"
    return "is not a model folder"


def _describe_folder(path: Path) -> str:
    entries = sorted(path.iterdir())
    if not entries:
        return "is an empty folder"
    if (path / "adapter_config.json").is_file():
        return "looks like a LoRA (PEFT), not a model"
    if (path / "config.json").is_file():
        try:
            config = read_json(path / "config.json")
        except ConfigError as error:
            return f"has no model_index.json, and its config.json is unusable ({error})"
        name = config.get("_class_name") or (config.get("architectures") or [None])[0]
        name = name or config.get("model_type") or "component of unknown class"
        return f"looks like one component alone ({name}), not a whole model"
    if (path / "vocab.json").is_file() or (path / "tokenizer.json").is_file():
        return "looks like a tokenizer alone, not a model"
    files = [p for p in entries if p.suffix.lower() in _WEIGHT_SUFFIXES]
    for file in files:
        if file.suffix == ".safetensors":
            what = looks_like(open_weights(file))
            return f"has no model_index.json; {file.name} in it looks like {what}"
    if files:
        return f"has no model_index.json; it holds {files[0].name}"
    nested = [p.parent.name for p in sorted(path.glob("*/model_index.json"))]
    if nested:
        return f"has no model_index.json, but the folder {nested[0]} in it has"
    return "has no model_index.json, so it is no diffusers folder"
