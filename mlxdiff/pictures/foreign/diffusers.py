"""Programs that write the arguments of diffusers: Easy Diffusion, mflux, and scripts.

JSON in the EXIF comment or a text chunk, or (Easy Diffusion's PNG) one chunk for each argument.

Source: Easy Diffusion, ui/easydiffusion/utils/save_utils.py (both spellings of its keys); mflux,
src/mflux/utils/metadata (MetadataBuilder); diffusers, StableDiffusionPipeline.__call__.
"""

from __future__ import annotations

from typing import Any

from mlxdiff.pictures.foreign.record import (
    COMPEL,
    UNNAMED,
    AddedLora,
    Fields,
    Record,
    Texts,
    edges,
    file_name,
    number,
)

_SAYS_NOTHING = (
    "mflux_version",
    "generation_time_seconds",
    "created_at",
    "precision",
    "base_model",
    "output_format",
    "output_quality",
    "output_lossless",
    "save_to_disk_path",
    "metadata_output_format",
    "session_id",
    "num_outputs",
    "stream_image_progress",
    "stream_image_progress_interval",
    "show_only_filtered_image",
    "vram_usage_level",
    "used_random_seed",
    "request_id",
    "_class_name",
    "_diffusers_version",
)
_CHUNKS = ("seed", "Seed")


def read(texts: Texts) -> Record | None:
    """Read the arguments of diffusers; see ``foreign.READERS``."""
    for values in texts.documents.values():
        if "prompt" not in values and "Prompt" not in values:
            continue
        if "mflux_version" in values:
            return _read(Fields(values), "mflux")
        if "use_stable_diffusion_model" in values or "Stable Diffusion model" in values:
            return _read(Fields(values), "Easy Diffusion")
        if "num_inference_steps" in values or "guidance_scale" in values:
            return _read(Fields(values), "diffusers")
    easy = "use_stable_diffusion_model" in texts or "Stable Diffusion model" in texts
    if easy or ("prompt" in texts and "num_inference_steps" in texts):
        return _read(Fields(texts), "Easy Diffusion" if easy else "diffusers")
    return None


def _read(fields: Fields, tool: str) -> Record:
    record = Record(
        tool,
        version=fields.text("mflux_version", "_diffusers_version"),
        syntax="plain",
        prompt=fields.text("prompt", "Prompt") or "",
        negative_prompt=fields.text("negative_prompt", "Negative Prompt"),
        prompt_2=fields.text("prompt_2"),
        negative_prompt_2=fields.text("negative_prompt_2"),
        seed=fields.whole(*_CHUNKS),
        steps=fields.whole("num_inference_steps", "steps", "Steps"),
        guidance=fields.number("guidance_scale", "guidance", "Guidance Scale"),
        guidance_rescale=fields.number("guidance_rescale"),
        eta=fields.number("eta"),
        width=fields.whole("width", "Width"),
        height=fields.whole("height", "Height"),
        sampler=fields.text("sampler_name", "sampler", "Sampler", "scheduler", "scheduler_class"),
        schedule=fields.text("scheduler_name", "Scheduler"),
        model=_model(
            fields.text(
                "use_stable_diffusion_model",
                "Stable Diffusion model",
                "model",
                "Model",
                "model_id",
                "repo",
            )
        ),
        vae=file_name(fields.text("use_vae_model", "VAE model", "vae")),
        rng="cpu",
    )
    if record.width is None and (found := fields.size("resolution", "size")) is not None:
        record.width, record.height = found
    record.seamless = edges(fields.text("tiling", "Seamless Tiling"))
    _read_clip_skip(record, fields, tool)
    _read_image(record, fields)
    record.loras = _loras(fields)
    if tool == "Easy Diffusion":
        record.name_weights(COMPEL, "Compel's, such as word++ or (words)1.2")
    if tool == "mflux":
        record.rng = None
        record.name({"seed": "mflux draws the noise of a seed with MLX, which is other noise"})
    record.name(fields.left, _SAYS_NOTHING)
    return record


def _model(name: str | None) -> str | None:
    """A hub id as it is, of a path the last part."""
    return name if name is not None and name.count("/") == 1 else file_name(name)


def _read_clip_skip(record: Record, fields: Fields, tool: str) -> None:
    key = "Clip Skip" if "Clip Skip" in fields.left else "clip_skip"
    if tool == "Easy Diffusion":  # a switch: it skips one layer, as 2 does in A1111
        said = str(fields.left.pop(key, False)).lower()
        record.clip_skip = 2 if said in ("true", "1", "on", "yes") else None
    elif (skipped := fields.whole(key)) is not None:
        record.clip_skip = skipped + 1


def _read_image(record: Record, fields: Fields) -> None:
    # A strength is written for text to image as well, where it means nothing.
    strength = fields.number("prompt_strength", "Prompt Strength", "image_strength", "strength")
    image = fields.text("image_path", "init_image", "Initial Image", "image")
    if image and image != "None":
        record.image = UNNAMED if image.startswith("data:") else file_name(image) or UNNAMED
        record.strength = strength
        if fields.left.pop("mask", None) or fields.left.pop("masked_image_path", None):
            record.mask = UNNAMED


def _loras(fields: Fields) -> list[AddedLora]:
    names = fields.left.pop("use_lora_model", None) or fields.left.pop("lora_paths", None)
    names = names or fields.left.pop("LoRA model", None)
    scales: Any = fields.left.pop("lora_alpha", None) or fields.left.pop("lora_scales", None)
    names = names if isinstance(names, list) else [names]
    scales = scales if isinstance(scales, list) else [scales]
    found = []
    for place, name in enumerate(names[:40]):
        scale = number(scales[place]) if place < len(scales) else None
        if isinstance(name, str) and (file := file_name(name)) is not None:
            found.append(AddedLora(file, 1.0 if scale is None else scale))
    return found
