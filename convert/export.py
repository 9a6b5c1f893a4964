"""Write a model in the forms of other programs: a diffusers folder, or one file in LDM naming.

Both hold the same values as the model, in the layout of PyTorch. The tables of ``keymap`` are read
backwards, so that what is written here is what is read there.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlxdiff._version import __version__
from mlxdiff.convert.keymap import Layout, Piece, ldm_unet, ldm_vae, openclip_text
from mlxdiff.convert.transforms import (
    conv_among_frames_to_linear,
    linear_to_conv1x1,
    oihw_to_ohwi,
    thirds,
)
from mlxdiff.errors import UsageError, argument
from mlxdiff.networks.config import AutoencoderKLConfig, UNet2DConditionConfig
from mlxdiff.networks.params import expected_parameters
from mlxdiff.networks.spatio_temporal import AMONG_FRAMES
from mlxdiff.store.folder import (
    IMAGE_ENCODER,
    SHARD_BYTES,
    ModelSource,
    Progress,
    json_bytes,
    new_folder,
    split_into_shards,
)
from mlxdiff.weights.tensors import DTYPES, LazyTensor, Shape, stored_bytes, write_safetensors

TARGETS = ("mlxdiff", "diffusers", "single")
"""Forms that a model can be written in."""

CARD = "README.md"
_SUFFIX = ".safetensors"
_STEMS = dict.fromkeys(
    ("unet", "vae", "image_normalizer", "cc_projection"), "diffusion_pytorch_model"
)
_PYTORCH = {"format": "pt"}

_Prefixes = Mapping[str, tuple[str, str]]
# Family -> component -> prefix in the file, naming.
_PLACES: dict[str, _Prefixes] = {
    "sd1": {"text_encoder": ("cond_stage_model.transformer.", "clip")},
    "sd2": {"text_encoder": ("cond_stage_model.model.", "openclip")},
    "sdxl": {
        "text_encoder": ("conditioner.embedders.0.transformer.", "clip"),
        "text_encoder_2": ("conditioner.embedders.1.model.", "openclip"),
    },
    "sdxl-refiner": {"text_encoder_2": ("conditioner.embedders.0.model.", "openclip")},
}
_COMMON: _Prefixes = {
    "unet": ("model.diffusion_model.", "ldm"),
    "vae": ("first_stage_model.", "ldm"),
}
_ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl-refiner": "stable-diffusion-xl-v1-refiner",
}


def check_target(model: ModelSource, to: str, dest: str | os.PathLike[str], force: bool) -> None:
    """Check that a model can be written in this form at this place. Raises: UsageError."""
    if to not in TARGETS:
        raise UsageError(f"to {to!r} is unknown; choose one of {', '.join(TARGETS)}")
    if to != "single":
        return
    dest = Path(dest)
    if dest.suffix != _SUFFIX:
        raise UsageError(f"{dest}: one file is written; give a name that ends in {_SUFFIX}")
    if os.path.lexists(dest) and not (force and dest.is_file() and not dest.is_symlink()):
        raise UsageError(
            f"{dest} already exists; give another name, or replace the file with "
            f"{argument('force', True)}"
        )
    families, diffusers = ", ".join(_PLACES), argument("to", "diffusers")
    if beside := set(model.components) - {"text_encoder", "text_encoder_2", "unet", "vae"}:
        parts = " and ".join(sorted(beside))
        raise UsageError(
            f"{model.path}: its {parts} cannot be written in one file; use {diffusers}"
        )
    if model.family not in _PLACES or not isinstance(model.config("unet"), UNet2DConditionConfig):
        raise UsageError(f"{model.path}: one file is for {families} only; use {diffusers}")
    pipeline = str(model.model_index.get("_class_name"))
    if pipeline.startswith("Marigold"):
        raise UsageError(
            f"{model.path}: one file cannot say that the model makes maps ({pipeline}); use "
            f"{diffusers}"
        )
    noise = str(model.scheduler_config.get("_class_name"))
    if noise.startswith("EDM"):
        raise UsageError(
            f"{model.path}: one file cannot say that its noise is EDM's ({noise}); use {diffusers}"
        )
    if not isinstance(model.config("vae"), AutoencoderKLConfig):
        raise UsageError(f"{model.path}: its tiny VAE has no place in one file; use {diffusers}")


def write_diffusers(
    model: ModelSource,
    dest: str | os.PathLike[str],
    dtype: str,
    *,
    card: str = "",
    force: bool = False,
    check: Callable[[], None] = lambda: None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a diffusers folder. A failure or an interruption leaves nothing behind.

    Args:
        model: the model. Quantized tensors are written as the values that they stand for.
        dest: folder to make.
        dtype: type of all weights: "float16", "bfloat16" or "float32".
        card: text of the model card.
        force, check, progress, shard_bytes: see ``store.folder.write_folder``.
    Raises: UsageError, CheckpointError.
    """
    tensors = {
        component: {name: _in_diffusers(name, t) for name, t in model.tensors(component).items()}
        for component in model.components
    }
    total = sum(stored_bytes(t, dtype) for part in tensors.values() for t in part.values())
    advance = _counter(total, progress)
    with new_folder(Path(dest), total, force) as folder:
        files = dict(model.documents())
        for component, part in tensors.items():
            (folder / component).mkdir()
            stem = _STEMS.get(component, "model")
            shards = split_into_shards(part, dtype, shard_bytes, stem)
            for file, members in shards.items():
                write_safetensors(
                    folder / component / file, members, dtype, advance, metadata=_PYTORCH
                )
            if len(shards) > 1:
                index = {
                    "metadata": {"total_size": sum(stored_bytes(t, dtype) for t in part.values())},
                    "weight_map": {n: file for file, members in shards.items() for n in members},
                }
                files[f"{component}/{stem}.safetensors.index.json"] = json_bytes(index)
        if card:
            files[CARD] = card.encode()
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        check()


def write_single(
    model: ModelSource,
    dest: str | os.PathLike[str],
    dtype: str,
    *,
    check: Callable[[], None] = lambda: None,
    progress: Progress | None = None,
) -> str:
    """Write one file in the naming of latent diffusion, as A1111, ComfyUI and others read it.

    A v-prediction model gets the marks that ComfyUI knows (``v_pred``, ``ztsnr``).

    Args:
        model, dtype, check, progress: see ``write_diffusers``.
        dest: file to write.
    Returns: sha256 of the file.
    Raises: UsageError, CheckpointError.
    """
    dest = Path(dest)
    tensors: dict[str, LazyTensor] = {}
    for component in model.components:
        prefix, naming = {**_COMMON, **_PLACES[model.family]}[component]
        part = _in_ldm_names(model.config(component), naming, model.tensors(component))
        tensors |= {prefix + name: tensor for name, tensor in part.items()}
    scheduler = model.scheduler_config
    prediction = scheduler.get("prediction_type", "epsilon")
    marks = {
        "v_pred": prediction == "v_prediction",
        "ztsnr": scheduler.get("rescale_betas_zero_snr"),
    }
    for mark in (name for name, given in marks.items() if given):
        tensors[mark] = LazyTensor((0,), DTYPES[dtype], lambda: np.zeros(0, np.float32))
    unet, vae = model.config("unet"), model.config("vae")
    metadata = _PYTORCH | {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _ARCHITECTURES[model.family],
        "modelspec.implementation": f"mlxdiff {__version__}",
        "modelspec.title": str(model.provenance.get("source", dest.stem)),
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else prediction,
    }
    if unet.sample_size:
        height, width = (side * vae.factor for side in unet.sample_size)
        metadata["modelspec.resolution"] = f"{width}x{height}"
    advance = _counter(sum(stored_bytes(t, dtype) for t in tensors.values()), progress)
    temporary = dest.with_name(f".{dest.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        dest.absolute().parent.mkdir(parents=True, exist_ok=True)
        digest = write_safetensors(temporary, tensors, dtype, advance, metadata=metadata)
        check()
        temporary.replace(dest)
    except OSError as error:
        raise UsageError(f"{dest}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def _counter(total: int, progress: Progress | None) -> Callable[[int, str], None]:
    done = 0

    def advance(size: int, name: str) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total, name)

    return advance


def _made(
    tensor: LazyTensor, shape: Shape, change: Callable[[np.ndarray], np.ndarray]
) -> LazyTensor:
    kind = "F32" if tensor.dtype not in DTYPES.values() else tensor.dtype
    return LazyTensor(shape, kind, lambda: change(tensor.read()))


def _in_diffusers(name: str, tensor: LazyTensor) -> LazyTensor:
    """Return a tensor of ours in PyTorch's layout, as diffusers has a tensor of this name."""
    if not AMONG_FRAMES.search(name):
        return in_pytorch(tensor)
    out, inputs = tensor.shape
    back = conv_among_frames_to_linear.inverse
    assert back is not None
    return _made(tensor, (out, inputs // 3, 3, 1, 1), back)


def in_pytorch(tensor: LazyTensor) -> LazyTensor:
    """Return a tensor of ours in PyTorch's layout, without quantization."""
    if len(tensor.shape) != 4:
        return _made(tensor, tensor.shape, lambda values: values)
    out, height, width, inputs = tensor.shape
    back = oihw_to_ohwi.inverse
    assert back is not None
    return _made(tensor, (out, inputs, height, width), back)


def _in_ldm_names(
    config: Any, naming: str, tensors: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor]:
    """Return the tensors of a component under the names and in the layout of a single file."""
    if naming == "clip":
        return {name: in_pytorch(tensor) for name, tensor in tensors.items()}
    is_vae = isinstance(config, AutoencoderKLConfig)
    if naming == "openclip":
        layout = openclip_text(config)
    else:
        layout = ldm_vae(config) if is_vae else ldm_unet(config)
    result = {}
    for name, pieces in _backwards(layout, config).items():
        parts = [tensors[piece.target] for piece in pieces]
        if pieces[0].transform in thirds:
            result[name] = _joined(parts)
        elif pieces[0].transform is not None:
            inverse = pieces[0].transform.inverse
            shape = pieces[0].transform.shape(parts[0].shape)
            assert inverse is not None and shape is not None
            result[name] = _made(parts[0], shape, inverse)
        elif is_vae and ".attn_1." in name and len(parts[0].shape) == 2:  # 1x1 convolutions there
            forward = linear_to_conv1x1.forward
            widened = _made(parts[0], (parts[0].shape[0], 1, 1, parts[0].shape[1]), forward)
            result[name] = in_pytorch(widened)
        else:
            result[name] = in_pytorch(parts[0])
    return result


def _backwards(layout: Layout, config: Any) -> dict[str, tuple[Piece, ...]]:
    """Return file name -> pieces, with one name for each parameter: the first in the table."""
    chosen: dict[str, tuple[Piece, ...]] = {}
    seen: set[str] = set()
    for name, pieces in (layout.names or {}).items():
        wanted = [piece.target for piece in pieces]
        if not seen & set(wanted):
            chosen[name] = pieces
            seen |= set(wanted)
    if missing := set(expected_parameters(config)) - seen:
        raise AssertionError(f"no name in a single file for {sorted(missing)[:3]}")
    return chosen


def _joined(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Stack queries, keys and values, as OpenCLIP keeps them."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return _made(parts[0], shape, lambda _: np.concatenate([part.read() for part in parts]))


# ------------------------------------------------------------------------------------- model card


def model_card(
    model: ModelSource, to: str, dtype: str, recipe: str | None, provenance: Mapping[str, Any]
) -> str:
    """Return the model card of a written folder: source, hashes, recipe, how to load it.

    The same model gives the same text. It names no folder of this machine.
    """
    source, revision = str(provenance.get("source", "unknown")), provenance.get("revision")
    form = dtype if recipe is None else f"{recipe} and {dtype}"
    task = "image-to-image" if IMAGE_ENCODER in model.components else "text-to-image"
    lines = ["---", f"library_name: {to}", "tags:", f"- {task}", f"- {model.family}"]
    if source.count("/") == 1 and not source.endswith(_SUFFIX):
        lines.append(f"base_model: {source}")
    lines += ["---", "", f"# {source.rsplit('/', 1)[-1]} for {to}", ""]
    lines += [f"Written by mlxdiff {__version__}; family {model.family}, weights in {form}.", ""]
    led = IMAGE_ENCODER in model.components  # by a picture in place of a prompt
    if to == "mlxdiff":
        given = 'image="photo.png"' if led else '"a lighthouse"'
        load = f'import mlxdiff\n\nmlxdiff.load("FOLDER").generate({given}).save("picture.png")'
    else:
        load = "from diffusers import DiffusionPipeline\n\n"
        load += 'DiffusionPipeline.from_pretrained("FOLDER")'
        load += "" if led else '("a lighthouse").images[0].save("picture.png")'
    lines += ["```python", load, "```", "", "## Source", ""]
    lines.append(f"- {source}" + (f", revision {revision}" if revision else ""))
    for lora in provenance.get("loras", ()):
        lines.append(f"- with the LoRA {lora['name']} at {lora['scale']}, sha256 {lora['sha256']}")
    lines.append("- The licence is that of the source.")
    if hashes := provenance.get("sha256"):
        lines += ["", "| file of the source | sha256 |", "|---|---|"]
        lines += [f"| {name} | `{digest}` |" for name, digest in sorted(hashes.items())]
    if to == "mlxdiff":
        lines += [
            "",
            "`mlxdiff info FOLDER --verify` compares this folder with the hashes in mlxdiff.json.",
        ]
    return "\n".join(lines) + "\n"
