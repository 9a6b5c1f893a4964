"""Detect the kind of a path: pipeline and family of a model, or a description of other files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mlxdiff.errors import CheckpointError, ConfigError, argument
from mlxdiff.machine.disk import read_json
from mlxdiff.networks.config import ComponentConfig, UNet2DConfig, UNetSpatioTemporalConfig
from mlxdiff.store import catalogue
from mlxdiff.store.folder import (
    CC_PROJECTION,
    COMPONENTS,
    FEATURE_EXTRACTOR,
    IMAGE_ENCODER,
    IMAGE_NOISING_SCHEDULER,
    IMAGE_NORMALIZER,
    LOW_RES_SCHEDULER,
    OWN_PARTS,
    TOKENIZERS,
)
from mlxdiff.weights.tensors import LazyTensor, open_weights, shown

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionUpscalePipeline",
    "StableDiffusionDepth2ImgPipeline",
    "MarigoldDepthPipeline",
    "MarigoldNormalsPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
    "StableUnCLIPImg2ImgPipeline",
    "StableDiffusionImageVariationPipeline",
    "Zero1to3StableDiffusionPipeline",
    "StableVideoDiffusionPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
    "DDPMPipeline",
    "DDIMPipeline",
    "PNDMPipeline",
)
"""Pipeline classes (``_class_name`` of model_index.json) whose weights can be opened."""

_WITHOUT_TEXT = (
    "StableDiffusionImageVariationPipeline",
    "StableVideoDiffusionPipeline",
    "Zero1to3StableDiffusionPipeline",
)
"""Pipeline classes that read a picture in place of a text."""

SPARSE_CONTROL = "a SparseCtrl encoder"
PIA = "an AnimateDiff-PIA adapter"
HOTSHOT = "a HotShot-XL motion adapter"
_LCM_I2V = "an AnimateLCM-I2V adapter"


def _moves() -> str:
    return (
        f"not supported; give an AnimateDiff adapter ({argument('motion_adapter')}) and start from "
        f"the picture ({argument('image')}), or use Stable Video Diffusion "
        f"({argument('model', 'svd')})"
    )


VIDEO_WAYS: dict[str, Callable[[], str]] = {
    SPARSE_CONTROL: lambda: (
        f"not supported; use a ControlNet ({argument('controlnets')}) and a video of control "
        f"pictures ({argument('control_image')})"
    ),
    HOTSHOT: lambda: (
        "not supported; use an AnimateDiff adapter for SDXL "
        f"({argument('motion_adapter', 'guoyww/animatediff-motion-adapter-sdxl-beta')})"
    ),
    PIA: _moves,
    _LCM_I2V: _moves,
}
"""Kind of an addition for videos that is not supported -> way out."""


def _apart() -> str:
    return (
        "a model of pictures with a motion adapter in it; give a model of pictures, and the folder "
        f"motion_adapter of this one with {argument('motion_adapter')}"
    )


_UNCLIP = "use Stable unCLIP (StableUnCLIPImg2ImgPipeline)"
_REFUSED_PIPELINES: dict[str, Callable[[], str]] = {
    "StableDiffusionLatentUpscalePipeline": lambda: (
        "the latent upscaler (sd-x2-latent-upscaler) has K-diffusion's U-Net, which is not "
        "supported; for a larger picture use the x4 upscaler "
        f"({argument('model', 'x4-upscaler')}) or {argument('hires', 2)}"
    ),
    "MarigoldIntrinsicsPipeline": lambda: (
        "Marigold's intrinsic images (albedo, shading) are not supported; its models of depth and "
        "of normals are"
    ),
    "MarigoldPipeline": lambda: (
        "this is the first form of Marigold's repository, which does not say what it predicts; "
        "use prs-eth/marigold-depth-v1-0 or later"
    ),
    "StableUnCLIPPipeline": lambda: (
        "it makes the embedding of a picture from text, with Karlo's prior, which is not "
        "supported; use the form that starts from a picture (StableUnCLIPImg2ImgPipeline, as in "
        "stable-diffusion-2-1-unclip)"
    ),
    "UnCLIPPipeline": lambda: f"Karlo's U-Nets are not supported; {_UNCLIP}",
    "UnCLIPImageVariationPipeline": lambda: f"Karlo's U-Nets are not supported; {_UNCLIP}",
    "AnimateDiffPipeline": _apart,
    "AnimateDiffSDXLPipeline": _apart,
    "AnimateDiffVideoToVideoPipeline": _apart,
    "AnimateDiffSparseControlNetPipeline": VIDEO_WAYS[SPARSE_CONTROL],
    "HotshotXLPipeline": VIDEO_WAYS[HOTSHOT],
    "PIAPipeline": VIDEO_WAYS[PIA],
    "Zero123Pipeline": lambda: (
        "this form of Zero-1-to-3 is not supported; use the one for diffusers' community pipeline "
        f"({argument('model', 'kxic/zero123-xl')}), or the original file"
    ),
}
"""Similar pipeline classes that are not supported -> reason and way out."""

CLASSES: dict[str, tuple[str, ...]] = {
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "unet": ("UNet2DConditionModel", "UNet2DModel", "UNetSpatioTemporalConditionModel"),
    "vae": ("AutoencoderKL", "AutoencoderTiny", "AutoencoderKLTemporalDecoder"),
    LOW_RES_SCHEDULER: ("DDPMScheduler",),
    IMAGE_ENCODER: ("CLIPVisionModelWithProjection",),
    IMAGE_NORMALIZER: ("StableUnCLIPImageNormalizer",),
    IMAGE_NOISING_SCHEDULER: ("DDPMScheduler",),
    FEATURE_EXTRACTOR: ("CLIPImageProcessor", "CLIPFeatureExtractor", "CLIPImageProcessorPil"),
    CC_PROJECTION: ("CCProjection",),
}
"""Component -> supported classes."""

_IN_ROOT = {"unet": "config.json", "scheduler": "scheduler_config.json"}
"""Part -> its file in the root of the first pixel-space models, which have no folders."""

SKIPPED: dict[str, str] = {
    "safety_checker": "a picture classifier; it does not draw",
    "feature_extractor": "belongs to the safety checker or an image encoder",
    "image_encoder": "only IP-Adapters use one, and they have their own",
    "depth_estimator": "makes depth maps of pictures (DPT); a depth map is given in its place",
}
"""Part that is not converted -> reason."""

_ANYWHERE = ("text_encoder", "text_encoder_2", "unet", "vae", *TOKENIZERS, "scheduler")
"""Parts that models of every pipeline class may have; ``OWN_PARTS`` has the others."""

PEFT_FORM = "an adapter of PEFT's form"
# PEFT's name of a form -> its parameters, of the forms that only PEFT has.
_PEFT_FORMS = (
    ("AdaLoRA", "lora_E|ranknum"),
    ("BOFT", "boft_[Rs]"),
    ("Bone", "bone_block"),
    ("C3A", "c3a_kernel"),
    ("DeLoRA", "delora_(?:A|B|lambda)"),
    ("FourierFT", "fourierft_spectrum"),
    ("GraLoRA", "gralora_[AB]"),
    ("HRA", "hra_u"),
    ("LN tuning", "ln_tuning_layers"),
    ("MiSS", "miss_block"),
    ("OFT", "oft_[Rr]"),
    ("RandLora", "randlora_(?:A|B|lambda|gamma)"),
    ("RoAd", "road_(?:theta|alpha)"),
    ("SHiRA", "shira_weight"),
    ("VB-LoRA", "vblora_.+"),
    ("VeRA", "vera_(?:A|B|lambda_[bd])"),
    ("WaveFT", "waveft_spectrum"),
)

_MOTION = r".*\.motion_modules\..+"
# (pattern, kind) of files that are not models. The first pattern that matches any whole tensor
# name decides. Some names occur bare and under the prefix of a whole model.
_IN = r"(?:model\.(?:diffusion_model\.)?)?"
_REFUSED: tuple[tuple[str, str], ...] = (
    (r"lora_controlnet", "a Control-LoRA"),
    (r"lllite_.+", "a ControlNet-LLLite"),
    *((rf"(?:.+\.)?(?:{names})(?:\..+)?", f"{PEFT_FORM} {form}") for form, names in _PEFT_FORMS),
    (
        r"(?:.*[._])?lora_(?:up|down|mid|A|B)(?:\..+)?|.+[._]lora\.(?:up|down)\..+|lora_.+\.alpha"
        r"|(?:unet|text_encoder):\d+:(?:up|down)",
        "a LoRA",
    ),
    (
        r".+\.(?:(?:hada|lokr)_w.+|oft_(?:blocks|diag)|on_input|diff(?:_b)?|[wb]_norm"
        r"|ia3_l(?:\..+)?)|lora_.+\.[ab][12]\.weight",
        "a LyCORIS adapter",
    ),
    (r"emb_params|string_to_param.*|clip_[lg]", "a textual-inversion embedding"),
    (r"(?:ip_adapter|image_proj)\..+", "an IP-Adapter"),
    (r"controlnext\..+", "a ControlNeXt"),
    (r"difference", "the difference to a model's U-Net, not a whole ControlNet"),
    (r"style_embedding", "a style T2I-Adapter"),
    (
        r"(?:control_model\.)?(?:task_embedding|(?:control_add_embedding|control_type_proj"
        r"|spatial_ch_projs|transformer_layes)\..+)",
        "a ControlNet-Union",
    ),
    (
        r"(?:control_model\..+|controlnet_cond_embedding\..+|(?:.+\.)?input_hint_block\..+"
        r"|controlnet_(?:down|mid)_.+)",
        "a ControlNet",
    ),
    (r"(?:adapter\.)?body\.\d+\.(?:resnets|body\.\d+|block1)\..+", "a T2I-Adapter"),
    (r".+\.temporal_attentions\.\d+\..+", HOTSHOT),
    (_MOTION, "an AnimateDiff motion adapter"),
    (r".+\.time_mix_blocks\..+", "a video model (SV4D)"),
    (
        rf"{_IN}(?:patchify_proj\..+|head\.modulation|txt_in\.individual_token_refiner\..+"
        r"|blocks\.\d+\.attn\.qkv_x\..+)|net\.x_embedder\..+",
        "a video model (LTX, Wan, Hunyuan, Mochi or Cosmos)",
    ),
    (rf"{_IN}(?:double|single_transformer)_blocks\..+", "a Flux transformer"),
    (
        r"(?:.+\.)?joint_blocks\..+|(?:.+\.)?transformer_blocks\.\d+\.attn\.add_q_proj\..+",
        "a Stable Diffusion 3 transformer",
    ),
    (
        r"(?:.+\.)?(?:clip_txt_(?:pooled_)?mapper|effnet_mapper)\..+"
        r"|(?:.+\.)?down_blocks\.\d+\.\d+\.channelwise\..+",
        "a Stable Cascade model",
    ),
    (
        rf"{_IN}(?:[xyt]_embedder|t_block|csize_embedder|adaln_single|caption_projection"
        r"|cap_embedder|cond_seq_linear|double_layers\.\d+|final_layer|(?:blocks|layers|transformer"
        r"_blocks)\.\d+\.(?:adaLN_modulation|cross_attn|scale_shift_table))(?:\..+)?",
        "a diffusion transformer (DiT, PixArt, Sana, AuraFlow, Lumina or similar)",
    ),
    (r"cond_stage_model\.mapper\..+", "Paint by Example, an image-variation model"),
    (r".+\.fuser\..+|(?:.+\.)?position_net\..+", "a GLIGEN model"),
    (
        r"cond_stage_model\.transformer\.(?:attn_layers|token_emb)\..+",
        "a latent diffusion model older than Stable Diffusion (with a BERT text encoder)",
    ),
    (
        r"encoder_hid_proj\..+|add_embedding\.(?:image|text|norm1)_?.*\..+",
        "a Kandinsky or DeepFloyd IF U-Net",
    ),
    (
        r"(?:(?:enc|dec)\.)?blk\.\d+\..+|token_embd\.weight",
        "a language model or text encoder in llama.cpp's naming",
    ),
    (
        r"(?:.+\.)?(?:model\.1\.sub|body|RRDB_trunk)\.\d+\.(?:RDB|rdb)\d\..+",
        "an ESRGAN upscaler",
    ),
    (r"(?:(?:params|params_ema|module)\.)?body\.\d+\.weight", "a Real-ESRGAN compact upscaler"),
)
# (pattern, kind) of files with motion modules and with other tensors, which are no motion adapters
# that mlxdiff has. PIA's is told by the channels of its first convolution: latents, a picture and
# one more. Sources of these and of HotShot-XL's: guoyww/AnimateDiff (sparse_controlnet.py),
# open-mmlab/PIA (i2v_pipeline.py), hotshotco/Hotshot-XL (unet_blocks.py),
# Kosinkadink/ComfyUI-AnimateDiff-Evolved (motion_module_ad.py).
_PIA_FIRST, _PIA_CHANNELS = re.compile(r"(?:module\.)?conv_in\.weight"), 9
_BESIDE_MOTION: tuple[tuple[str, str], ...] = (
    (r"(?:module\.)?controlnet_(?:cond|down|mid)_.+", SPARSE_CONTROL),
    (r"(?:module\.)?img_encoder\..+", _LCM_I2V),
)
# (pattern, kind) of parts of models.
_PARTS: tuple[tuple[str, str], ...] = (
    (
        r"model\.diffusion_model\..+\.time_stack\..+",
        "a whole model in one file (Stable Video Diffusion)",
    ),
    (
        r"model\.diffusion_model\..+|model_ema\.diffusion_model.+",
        "a whole model in one file (LDM naming)",
    ),
    (r"unet\.(?:down_blocks|mid_block)\..+", "a whole model in one file (diffusers naming)"),
    (r"(?:input_blocks|middle_block)\..+", "a U-Net in LDM naming, alone"),
    (r"(?:down_blocks|mid_block)\..+", "a U-Net in diffusers naming, alone"),
    (
        r".+\.(?:time_stack|temporal_res_block)\..+",
        "the VAE of a video model (Stable Video Diffusion)",
    ),
    (
        r"(?:first_stage_model\.|vae\.)?(?:encoder|decoder)\.(?:conv_in|mid)\..+",
        "a VAE, alone",
    ),
    (
        r"(?:(?:en|de)coder\.)?layers\.\d+\.conv\..+|(?:taesd_)?(?:en|de)coder\.\d+\..+"
        r"|\d+\.conv\.\d+\.weight",
        "a tiny VAE (TAESD)",
    ),
    (
        r"(?:text_model\.)?(?:embeddings|encoder\.layers)\..+|transformer\.resblocks\..+",
        "a text encoder, alone",
    ),
    (r"(?:vision_model|visual)\..+", "a CLIP image encoder"),
    (r"(?:noise_augmentor|embedder\.model)\..+", "an unCLIP model without its U-Net"),
    (
        r"cc_projection\..+|cond_stage_model\.model\.visual\..+",
        "an image-variation model without its U-Net",
    ),
    (r"edm_mean|edm_std", "the marks of Playground 2.5 without its weights"),
    (r"edm_vpred\..+", "the marks of CosXL without its weights"),
)
_WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def check_model_index(index: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """Check that mlxdiff can open the model that model_index.json describes.

    Args:
        index: its content.
        path: the folder, for messages.
    Returns: the omitted parts with the reasons, one line each.
    Raises: CheckpointError for an unknown pipeline, part or class, or for a missing part.
    """
    pipeline = index.get("_class_name")
    if make := _REFUSED_PIPELINES.get(str(pipeline)):
        raise CheckpointError(f"{path}: is a {pipeline}: {make()}")
    if pipeline not in PIPELINES:
        what = f"is a {pipeline}" if pipeline else "names no pipeline class in model_index.json"
        raise CheckpointError(f"{path}: {what}; supported: {', '.join(PIPELINES)}")
    notes = []
    own = OWN_PARTS.get(str(pipeline), ())
    unet = index.get("unet")
    pixels = isinstance(unet, list) and unet[1:] == ["UNet2DModel"]
    # Entries that are not lists are pipeline settings, for example force_zeros_for_empty_prompt.
    parts = {k: v for k, v in index.items() if isinstance(v, list) and not k.startswith("_")}
    for part, entry in parts.items():
        if len(entry) != 2 or not all(v is None or isinstance(v, str) for v in entry):
            raise CheckpointError(
                f"{path}: model_index.json has {part} = {entry!r}; expected [library, class]"
            )
        class_name = entry[1]
        if class_name is None:
            continue
        if part in SKIPPED and part not in own:
            notes.append(f"{part} omitted: {SKIPPED[part]}")
            continue
        if part not in (*_ANYWHERE, *own):
            raise CheckpointError(f"{path}: has an unsupported part: {part} ({class_name})")
        if class_name not in CLASSES.get(part, (class_name,)):
            raise CheckpointError(
                f"{path}: {part} is a {class_name}, which is not supported; "
                f"supported: {', '.join(CLASSES[part])}"
            )
        in_root = pixels and part in _IN_ROOT and (path / _IN_ROOT[part]).is_file()
        if not (path / part).is_dir() and not in_root:
            raise CheckpointError(
                f"{path}: the folder {part} is missing; model_index.json names it"
            )
    present = {part for part, entry in parts.items() if entry[1] is not None}
    needed = {"unet", "scheduler", *own}
    if not pixels:
        needed.add("vae")
        if pipeline not in _WITHOUT_TEXT and not present & {"text_encoder", "text_encoder_2"}:
            needed.add("text_encoder")
    elif more := sorted(present - needed - set(SKIPPED)):
        raise CheckpointError(
            f"{path}: has {' and '.join(more)} beside a UNet2DModel; supported: a UNet2DModel and "
            "a scheduler only"
        )
    for encoder, tokenizer in zip(COMPONENTS, TOKENIZERS, strict=False):
        if encoder in present:
            needed.add(tokenizer)
    if missing := sorted(needed - present):
        raise CheckpointError(f"{path}: model_index.json has no {' and no '.join(missing)}")
    used = present - (set(SKIPPED) - set(own))
    check_not_quantized(path, {part: path / part for part in COMPONENTS if part in used})
    return tuple(notes)


def family(configs: Mapping[str, ComponentConfig]) -> str:
    """Return the family of a model from its parts: "sd1", "sd2", "sdxl", "sdxl-refiner", "svd" or
    "ddpm".

    A UNet2DModel means "ddpm", a U-Net with layers among frames "svd". SDXL's U-Net has the
    text_time embedding; the refiner has no first text encoder. Of the others, version 2 has
    OpenCLIP's text encoder (gelu), version 1 OpenAI's (quick_gelu); without a text encoder the
    image encoder counts.
    """
    unet: Any = configs["unet"]
    if isinstance(unet, UNet2DConfig):
        return "ddpm"
    if isinstance(unet, UNetSpatioTemporalConfig):
        return "svd"
    if unet.addition_embed_type == "text_time":
        return "sdxl" if "text_encoder" in configs else "sdxl-refiner"
    encoders = (configs.get(name) for name in ("text_encoder", "text_encoder_2", IMAGE_ENCODER))
    text: Any = next(one for one in encoders if one is not None)
    return "sd1" if text.hidden_act == "quick_gelu" else "sd2"


def refused(tensors: Mapping[str, LazyTensor]) -> str | None:
    """Describe a file that is known not to be a supported model. Return None for other files."""
    moves = any(map(re.compile(_MOTION).fullmatch, tensors))
    if moves and any(
        _PIA_FIRST.fullmatch(name) and tensor.shape[1:2] == (_PIA_CHANNELS,)
        for name, tensor in tensors.items()
    ):
        return PIA
    for pattern, words in (*(_BESIDE_MOTION if moves else ()), *_REFUSED):
        matches = re.compile(pattern).fullmatch
        if any(matches(name) for name in tensors):
            return words
    return None


def unet_alone(names: Iterable[str]) -> str | None:
    """Return the naming of a U-Net-only file: "ldm" or "diffusers". Return None for other files."""
    names = set(names)
    if "input_blocks.0.0.weight" in names:
        return "ldm"
    if {"conv_in.weight", "time_embedding.linear_1.weight"} <= names:
        return "diffusers"
    return None


def looks_like(tensors: Mapping[str, LazyTensor]) -> str:
    """Describe a file with these tensors."""
    if words := refused(tensors):
        return words
    for pattern, words in _PARTS:
        if any(re.fullmatch(pattern, name) for name in tensors):
            return words
    return f"weights of an unknown kind ({len(tensors)} tensors)"


def is_weights(path: Path) -> bool:
    """Return True if a file should be opened as weights: by suffix or by content."""
    suffix = path.suffix.lower()
    if suffix in _WEIGHT_SUFFIXES or suffix in _PICTURES or suffix == ".dduf":
        return suffix in _WEIGHT_SUFFIXES
    with path.open("rb") as file:
        head = file.read(16)
    return head[8:9] == b"{" or head.startswith((b"GGUF", b"PK\x03\x04", b"\x80\x02\x8a\x0a"))


def not_a_model(path: Path) -> CheckpointError:
    """Return the error for a path that is not a diffusers folder. It describes the path."""
    want = (
        "give a diffusers folder (with model_index.json), a converted folder, a single file, a "
        "hub id or a short name (mlxdiff models --known)"
    )
    if not os.path.exists(path):
        near = catalogue.suggestion(str(path))
        return CheckpointError(
            f"{path}: no such file or folder, and not a hub id (org/name){near}; {want}"
        )
    is_file = os.path.isfile(path)
    return CheckpointError(
        f"{path}: {_describe_file(path) if is_file else _describe_folder(path)}; {want}"
    )


QUANTIZERS = {
    "bitsandbytes": "bitsandbytes",
    "quanto": "quanto",
    "torchao": "torchao",
    "gguf": "GGUF",
    "sdnq": "SDNQ",
    "modelopt": "NVIDIA ModelOpt",
    "nunchaku": "SVDQuant (Nunchaku)",
    "svdquant": "SVDQuant (Nunchaku)",
    "auto-round": "AutoRound",
}
"""``quant_method`` of a config -> name of the tool."""


def check_not_quantized(path: Path, folders: Mapping[str, Path]) -> None:
    """Refuse components that a library for PyTorch has quantized.

    Args:
        path: the model, for messages.
        folders: component -> its folder.
    Raises: CheckpointError that names the tool and the way out; ConfigError.
    """
    for component, folder in folders.items():
        for name, key in (("config.json", "quantization_config"), ("quantization_config.json", "")):
            file = folder / name
            data = read_json(file) if file.is_file() else {}
            settings = data.get(key) if key else data
            if not isinstance(settings, dict) or not settings:
                continue
            method = str(settings.get("quant_method", "")).lower()
            tool = QUANTIZERS.get(method) or (shown(method) if method else "another tool")
            raise CheckpointError(
                f"{path}: {component} is quantized by {tool} for PyTorch, which is not supported; "
                f"use the original model, and {argument('quantize', 4)} or 8 for small weights"
            )


def _describe_file(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix == ".dduf":
        return (
            "is a DDUF file, a zip archive of a diffusers folder; unpack it (unzip FILE -d FOLDER) "
            "and give the folder"
        )
    if suffix == ".flashpack":
        return (
            "holds weights in flashpack's form, which is not supported; use the safetensors files "
            "of the model"
        )
    if suffix in _PICTURES:
        return "is a picture, not a model"
    if path.name == "model_index.json":
        return "is one file of a model folder; give the folder"
    return "is not a model folder"


def _describe_folder(path: Path) -> str:
    entries = sorted(path.iterdir())
    if not entries:
        return "is an empty folder"
    if (path / "modular_model_index.json").is_file():
        return (
            "is a modular diffusers repository, which has no model_index.json and names parts of "
            "other repositories; use the plain repository of the model"
        )
    if (path / "mflux_model.json").is_file() or list(path.glob("*/0.safetensors")):
        return (
            "looks like a model saved by mflux, which holds other families (Flux and later) in its "
            "own form; use a Stable Diffusion model"
        )
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
        return f"has no model_index.json, but its folder {nested[0]} has one"
    return "has no model_index.json, so it is not a diffusers folder"
