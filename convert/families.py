"""The published families: their configs, and the configs that a single file's tensors imply.

A single file has no configs. Its names and shapes give the structure: widths, layers, depths of the
transformers (which pruned models change). The family gives the rest: heads, schedule, scale of the
latents. The tables are the config files of the published repositories without the keys that the
shapes decide.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlxdiff.convert.keymap import SVD_DECODER, SVD_ENCODER
from mlxdiff.errors import CheckpointError, argument
from mlxdiff.store.folder import (
    CC_PROJECTION,
    FEATURE_EXTRACTOR,
    IMAGE_ENCODER,
    IMAGE_NORMALIZER,
)
from mlxdiff.weights.tensors import Shape

Shapes = Mapping[str, Shape]
Config = dict[str, Any]

_SCHEDULE: Config = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "trained_betas": None,
}
_PNDM = _SCHEDULE | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
_DDIM = _SCHEDULE | {"_class_name": "DDIMScheduler"}
_EULER = _SCHEDULE | {
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "sample_max_value": 1.0,
    "skip_prk_steps": True,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
_SVD_EULER = _SCHEDULE | {
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "sigma_max": 700.0,
    "sigma_min": 0.002,
    "skip_prk_steps": True,
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
}
_CLIP_L: Config = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 768,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_OPENCLIP_H = _CLIP_L | {"hidden_act": "gelu", "projection_dim": 512}
_OPENCLIP_G = _OPENCLIP_H | {
    "architectures": ["CLIPTextModelWithProjection"],
    "projection_dim": 1280,
}
_VAE: Config = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
_XL_UNET = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}


@dataclass(frozen=True)
class Family:
    """The common properties of all models of a family.

    Attributes:
        name: see ModelSource.family.
        words: usual name of the family.
        text_encoders: component -> config, without the keys that the shapes decide.
        unet, vae: configs, likewise.
        head_width: channels of each attention head in the U-Net, or None for 8 heads at every
            width.
        size: side of the training pictures, in pixels.
        scheduler: scheduler_config.json for epsilon prediction.
        v_scheduler: scheduler_config.json for v-prediction.
        pipeline: class without "Pipeline", for example "StableDiffusion".
        index: settings in model_index.json.
        prediction: prediction type if the file does not give one.
        image_noise: see ModelSource.image_noise_config.
        parts: components beside text encoders, U-Net and VAE.
    """

    name: str
    words: str
    text_encoders: Mapping[str, Config]
    unet: Config
    vae: Config
    head_width: int | None
    size: int
    scheduler: Config
    v_scheduler: Config
    pipeline: str
    index: Config = field(default_factory=dict)
    prediction: str = "epsilon"
    image_noise: Config = field(default_factory=dict)
    parts: tuple[str, ...] = ()


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="sd1",
            words="Stable Diffusion 1",
            text_encoders={"text_encoder": _CLIP_L},
            unet={},
            vae=_VAE,
            head_width=None,
            size=512,
            scheduler=_PNDM,
            v_scheduler=_DDIM,
            pipeline="StableDiffusion",
        ),
        Family(
            name="sd2",
            words="Stable Diffusion 2",
            text_encoders={"text_encoder": _OPENCLIP_H},
            unet={"upcast_attention": True},
            vae=_VAE,
            head_width=64,
            size=512,
            scheduler=_PNDM,
            v_scheduler=_DDIM,
            pipeline="StableDiffusion",
        ),
        Family(
            name="sdxl",
            words="SDXL",
            text_encoders={"text_encoder": _CLIP_L, "text_encoder_2": _OPENCLIP_G},
            unet=_XL_UNET,
            vae=_VAE | {"scaling_factor": 0.13025, "force_upcast": True},
            head_width=64,
            size=1024,
            scheduler=_EULER,
            v_scheduler=_EULER,
            pipeline="StableDiffusionXL",
            index={"force_zeros_for_empty_prompt": True},
        ),
        Family(
            name="sdxl-refiner",
            words="the SDXL refiner",
            text_encoders={"text_encoder_2": _OPENCLIP_G},
            unet=_XL_UNET,
            vae=_VAE | {"scaling_factor": 0.13025, "force_upcast": True},
            head_width=64,
            size=1024,
            scheduler=_EULER,
            v_scheduler=_EULER,
            pipeline="StableDiffusionXL",
            index={"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
        ),
    )
}


_UPSCALER_BETAS: Config = {
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0001,
    "num_train_timesteps": 1000,
    "trained_betas": None,
}
_UPSCALER_DDIM = _DDIM | _UPSCALER_BETAS
UPSCALER = replace(
    FAMILIES["sd2"],
    words="the Stable Diffusion x4 upscaler",
    # If text and layer have the same width, shapes do not show which attention reads the text.
    unet={"only_cross_attention": [True, True, True, False]},
    vae=_VAE | {"scaling_factor": 0.08333},
    head_width=None,
    scheduler=_UPSCALER_DDIM,
    v_scheduler=_UPSCALER_DDIM,
    index={"max_noise_level": 350},
    prediction="v_prediction",
    image_noise=_UPSCALER_BETAS
    | {
        "_class_name": "DDPMScheduler",
        "clip_sample": True,
        "prediction_type": "epsilon",
        "variance_type": "fixed_small",
    },
)
"""A variant of SD 2 with its own U-Net. It has SD 2's text encoder, so its family is "sd2"."""


UNCLIP = replace(
    FAMILIES["sd2"],
    words="Stable unCLIP 2.1",
    unet=FAMILIES["sd2"].unet | {"class_embed_type": "projection"},
    size=768,
    scheduler=_DDIM,
    pipeline="StableUnCLIPImg2Img",
    prediction="v_prediction",
    image_noise={
        "_class_name": "DDPMScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "num_train_timesteps": 1000,
    },
    parts=(IMAGE_ENCODER, IMAGE_NORMALIZER),
)
"""A variant of SD 2 that takes CLIP's embedding of a picture beside the text."""
VARIATION = replace(
    FAMILIES["sd1"],
    words="a Stable Diffusion image variation model",
    text_encoders={},
    pipeline="StableDiffusionImageVariation",
    parts=(IMAGE_ENCODER,),
)
"""A variant of SD 1 that reads CLIP's embedding of a picture in place of a text."""
ZERO123 = replace(
    VARIATION,
    words="Zero-1-to-3",
    size=256,
    scheduler=_DDIM,
    pipeline="Zero1to3StableDiffusion",
    parts=(IMAGE_ENCODER, CC_PROJECTION),
)
"""A variant of that with a camera."""
SVD = Family(
    name="svd",
    words="Stable Video Diffusion",
    text_encoders={},
    unet={},
    vae=_VAE | {"_class_name": "AutoencoderKLTemporalDecoder", "force_upcast": True},
    head_width=64,
    size=768,
    scheduler=_SVD_EULER,
    v_scheduler=_SVD_EULER,
    pipeline="StableVideoDiffusion",
    prediction="v_prediction",
    parts=(IMAGE_ENCODER,),
)
"""A picture that moves. The numbers of its U-Net are frames a second, motion and noise."""
PART_CLASSES = {
    IMAGE_ENCODER: ["transformers", "CLIPVisionModelWithProjection"],
    IMAGE_NORMALIZER: ["stable_diffusion", "StableUnCLIPImageNormalizer"],
    CC_PROJECTION: ["pipeline_zero1to3", "CCProjection"],
    FEATURE_EXTRACTOR: ["transformers", "CLIPImageProcessor"],
}
"""Part -> library and class, as model_index.json has them."""


class Unrepresentable(Exception):
    """No config describes these names and shapes. The text gives the reason."""


# Input channels of a U-Net -> the end of the pipeline's class.
_PIPELINES = {5: "Depth2ImgPipeline", 8: "InstructPix2PixPipeline", 9: "InpaintPipeline"}


def pipeline_class(family: Family, unet: Mapping[str, Any]) -> str:
    """Return the pipeline class for model_index.json."""
    if unet.get("time_cond_proj_dim") is not None and family.name == "sd1":
        return "LatentConsistencyModelPipeline"
    if family.name == "sdxl-refiner":
        return f"{family.pipeline}Img2ImgPipeline"
    if family.parts:
        return f"{family.pipeline}Pipeline"
    if family is UPSCALER:
        return f"{family.pipeline}UpscalePipeline"
    return family.pipeline + _PIPELINES.get(unet.get("in_channels", 4), "Pipeline")


# ------------------------------------------------------------------ structure from names and shapes


def _count(shapes: Shapes, pattern: str) -> int:
    """Count the numbers 0, 1, 2, ... that a pattern's group finds at the start of names."""
    found = {int(m[1]) for name in shapes if (m := re.match(pattern, name))}
    count = 0
    while count in found:
        count += 1
    if len(found) != count:
        raise Unrepresentable(f"the numbers of {pattern.replace(chr(92), '')} have a gap")
    return count


def _shape(shapes: Shapes, name: str, dimensions: int) -> Shape:
    shape = shapes.get(name)
    if shape is None or len(shape) < dimensions:
        raise Unrepresentable(f"{name} is {'missing' if shape is None else shape}")
    return shape


@dataclass
class _Level:
    """The blocks at one resolution: width, and the transformer depth (or 0) of each layer."""

    width: int
    depths: list[int]


def _depth(shapes: Shapes, place: str) -> int:
    """Count the transformer blocks of an attention in LDM naming; 0 if there is no attention."""
    if f"{place}.norm.weight" not in shapes:
        return 0
    depth = _count(shapes, rf"{re.escape(place)}\.transformer_blocks\.(\d+)\.")
    if depth == 0:
        raise Unrepresentable(f"the attention {place} has no blocks")
    return depth


def _levels(shapes: Shapes, side: str, first: int) -> list[_Level]:
    """Return the levels of ``input_blocks`` (from block 1) or ``output_blocks`` (from block 0)."""
    levels: list[_Level] = []
    change = True
    for n in range(first, _count(shapes, rf"{side}\.(\d+)\.")):
        block = f"{side}.{n}"
        if f"{block}.0.op.weight" in shapes:
            change = True
            continue
        width = _shape(shapes, f"{block}.0.in_layers.2.weight", 4)[0]
        if change:
            levels.append(_Level(width, []))
        if width != levels[-1].width:
            raise Unrepresentable(f"{block} changes the width inside a level")
        levels[-1].depths.append(_depth(shapes, f"{block}.1"))
        change = any(f"{block}.{i}.conv.weight" in shapes for i in (1, 2))
    if not levels:
        raise Unrepresentable(f"{side} is empty")
    return levels


def _types(levels: list[_Level], way: str) -> list[str]:
    if any(0 in level.depths and any(level.depths) for level in levels):
        raise Unrepresentable(
            f"a level of the {way.lower()} path has attention in only some layers"
        )
    return [f"CrossAttn{way}Block2D" if level.depths[0] else f"{way}Block2D" for level in levels]


def _simplest(values: list[Any]) -> Any:
    """Return one value if all are equal, else the list."""
    return values[0] if all(v == values[0] for v in values) else values


# Tensors of a U-Net that decide one value of its config -> name, in each naming.
_LDM_UNET = {
    "first": "input_blocks.0.0.weight",
    "last": "out.2.weight",
    "middle": "middle_block.0.in_layers.0.weight",
    "middle attention": "middle_block.1",
    "sizes": "label_emb.0.0.weight",
    "classes": "label_emb.weight",
    "guidance": "time_embed.cond_proj.weight",
}
_DIFFUSERS_UNET = {
    "first": "conv_in.weight",
    "last": "conv_out.weight",
    "middle": "mid_block.resnets.0.norm1.weight",
    "middle attention": "mid_block.attentions.0",
    "sizes": "add_embedding.linear_1.weight",
    "classes": "class_embedding.weight",
    "guidance": "time_embedding.cond_proj.weight",
}


SIZES = frozenset((_LDM_UNET["sizes"], _DIFFUSERS_UNET["sizes"]))
"""Names of a weight of the U-Nets of SDXL and its refiner. Of others only Stable unCLIP has it."""


def unet_structure(shapes: Shapes) -> Config:
    """Return the part of a U-Net's config that its shapes decide, in either naming, no prefix.

    Raises: Unrepresentable.
    """
    ldm = "conv_in.weight" not in shapes
    names = _LDM_UNET if ldm else _DIFFUSERS_UNET
    if ldm:
        down = _levels(shapes, "input_blocks", 1)
        up = _levels(shapes, "output_blocks", 0)
    else:
        down = _diffusers_levels(shapes, "down_blocks")
        up = _diffusers_levels(shapes, "up_blocks")
    middle = None
    if names["middle"] in shapes:
        middle = (_depth if ldm else _diffusers_depth)(shapes, names["middle attention"])
    if [level.width for level in down] != [level.width for level in reversed(up)]:
        raise Unrepresentable("the down and up paths have different widths")
    if [len(level.depths) + 1 for level in down] != [len(level.depths) for level in reversed(up)]:
        raise Unrepresentable("the down and up paths have different numbers of layers")
    # The depth of a level without attention has no meaning, with one exception: the middle block
    # uses the depth of the last level.
    depths = [level.depths if level.depths[0] else [1] * len(level.depths) for level in down]
    if middle:
        if not down[-1].depths[0]:
            depths[-1] = [middle] * len(depths[-1])
        elif down[-1].depths[0] != middle:
            raise Unrepresentable("the middle block and the last level have different depths")
    up_depths = [level.depths if level.depths[0] else [1] * len(level.depths) for level in up]
    mirrored = all(
        len({*d, *u}) == 1 or not (low.depths[0] or high.depths[0])
        for d, u, low, high in zip(reversed(depths), up_depths, reversed(down), up, strict=True)
    )
    contexts = {s[-1] for name, s in shapes.items() if name.endswith(".attn2.to_k.weight") and s}
    if len(contexts) != 1:
        raise Unrepresentable(f"the text has the widths {sorted(contexts)}; expected one width")
    projections = {len(s) for name, s in shapes.items() if name.endswith(".proj_in.weight")}
    first = _shape(shapes, names["first"], 4)
    config: Config = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": first[1],
        "out_channels": _shape(shapes, names["last"], 4)[0],
        "block_out_channels": [level.width for level in down],
        "down_block_types": _types(down, "Down"),
        "up_block_types": _types(up, "Up"),
        "mid_block_type": {None: None, 0: "UNetMidBlock2D"}.get(middle, "UNetMidBlock2DCrossAttn"),
        "layers_per_block": _simplest([len(level.depths) for level in down]),
        "transformer_layers_per_block": _simplest([_simplest(d) for d in depths]),
        "cross_attention_dim": contexts.pop(),
        "use_linear_projection": projections == {2},
    }
    if not mirrored:
        config["transformer_layers_per_block"] = depths
        config["reverse_transformer_layers_per_block"] = up_depths
    if names["sizes"] in shapes:
        config["projection_class_embeddings_input_dim"] = _shape(shapes, names["sizes"], 2)[1]
    if names["classes"] in shapes:
        config["num_class_embeds"] = _shape(shapes, names["classes"], 2)[0]
    if names["guidance"] in shapes:
        config["time_cond_proj_dim"] = _shape(shapes, names["guidance"], 2)[1]
    return _among_frames(config) if any(".time_stack." in name for name in shapes) else config


_SVD_NUMBERS = 3  # that the U-Net takes beside the timestep


def _among_frames(config: Config) -> Config:
    """Return the structure of a U-Net with layers among frames, from that of its pictures' half.

    Raises: Unrepresentable for SV3D, whose U-Net takes other numbers.
    """
    width = config.get("projection_class_embeddings_input_dim", 0)
    if not width or width % _SVD_NUMBERS:
        raise Unrepresentable(
            f"its U-Net takes {width} values of a video; Stable Video Diffusion's takes "
            f"{_SVD_NUMBERS} numbers, SV3D's others"
        )
    for way in ("down", "up"):
        types = config[f"{way}_block_types"]
        config[f"{way}_block_types"] = [name.replace("2D", "SpatioTemporal") for name in types]
    for key in ("mid_block_type", "use_linear_projection"):
        del config[key]
    return config | {
        "_class_name": "UNetSpatioTemporalConditionModel",
        "addition_time_embed_dim": width // _SVD_NUMBERS,
    }


def controlnet_structure(shapes: Shapes) -> Config:
    """Return the part of a ControlNet's config that its shapes decide, in either naming, no prefix.

    Raises: Unrepresentable.
    """
    if "input_hint_block.0.weight" in shapes:
        down = _levels(shapes, "input_blocks", 1)
        middle = _depth(shapes, "middle_block.1")
        first, label = "input_blocks.0.0.weight", "label_emb.0.0.weight"
        hint, projection = r"input_hint_block\.(\d+)\.weight", ".1.proj_in.weight"
        start = "input_hint_block.0.weight"
    else:
        down = _diffusers_levels(shapes, "down_blocks")
        middle = _diffusers_depth(shapes, "mid_block.attentions.0")
        first, label = "conv_in.weight", "add_embedding.linear_1.weight"
        hint, projection = r"controlnet_cond_embedding\.blocks\.(\d+)\.weight", ".proj_in.weight"
        start = "controlnet_cond_embedding.conv_in.weight"
    depths = [level.depths if level.depths[0] else [1] * len(level.depths) for level in down]
    if middle and not down[-1].depths[0]:
        depths[-1] = [middle] * len(depths[-1])
    elif middle and down[-1].depths[0] != middle:
        raise Unrepresentable("the middle block and the last level have different depths")
    if any(len(set(d)) > 1 for d in depths):
        raise Unrepresentable("the transformers of a level have different depths")
    contexts = {s[-1] for name, s in shapes.items() if name.endswith(".attn2.to_k.weight") and s}
    if len(contexts) != 1:
        raise Unrepresentable(f"the text has the widths {sorted(contexts)}; expected one width")
    # Convolutions of the control picture: one, then pairs that first keep and then widen.
    names = {int(m[1]): name for name in shapes if (m := re.fullmatch(hint, name))}
    row = [names[i] for i in sorted(names)]
    row = row[:-1] if start in row else [start, *row]  # LDM's list includes the last convolution
    widths = [_shape(shapes, name, 4)[0] for name in row[::2]]
    config: Config = {
        "_class_name": "ControlNetModel",
        "in_channels": _shape(shapes, first, 4)[1],
        "conditioning_channels": _shape(shapes, start, 4)[1],
        "conditioning_embedding_out_channels": widths,
        "block_out_channels": [level.width for level in down],
        "down_block_types": _types(down, "Down"),
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D",
        "layers_per_block": _simplest([len(level.depths) for level in down]),
        "transformer_layers_per_block": [d[0] for d in depths],
        "cross_attention_dim": contexts.pop(),
        "use_linear_projection": {len(s) for n, s in shapes.items() if n.endswith(projection)}
        == {2},
    }
    if label in shapes:
        config["projection_class_embeddings_input_dim"] = _shape(shapes, label, 2)[1]
    return config


def _diffusers_depth(shapes: Shapes, place: str) -> int:
    return _count(shapes, rf"{re.escape(place)}\.transformer_blocks\.(\d+)\.")


def _diffusers_levels(shapes: Shapes, side: str) -> list[_Level]:
    """Return the levels of ``down_blocks`` or ``up_blocks``."""
    levels = []
    for i in range(_count(shapes, rf"{side}\.(\d+)\.")):
        block = f"{side}.{i}"
        layers = _count(shapes, rf"{re.escape(block)}\.resnets\.(\d+)\.")
        width = _shape(shapes, f"{block}.resnets.0.conv1.weight", 4)[0]
        depths = [_diffusers_depth(shapes, f"{block}.attentions.{j}") for j in range(layers)]
        levels.append(_Level(width, depths))
    if not levels or not levels[0].depths:
        raise Unrepresentable(f"{side} is empty")
    return levels


def vae_structure(shapes: Shapes) -> Config:
    """Return the part of a VAE's config that its shapes decide, in either naming, no prefix.

    Raises: Unrepresentable.
    """
    ldm = any(name.startswith("encoder.down.") for name in shapes)
    place, block = ("encoder.down", "block") if ldm else ("encoder.down_blocks", "resnets")
    levels = _count(shapes, rf"{re.escape(place)}\.(\d+)\.")
    widths = [_shape(shapes, f"{place}.{i}.{block}.0.conv1.weight", 4)[0] for i in range(levels)]
    if not widths:
        raise Unrepresentable("its encoder has no levels")
    return {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": _count(shapes, rf"{re.escape(place)}\.0\.{block}\.(\d+)\."),
        "latent_channels": _shape(shapes, "decoder.conv_in.weight", 4)[1],
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def svd_vae_structure(shapes: Shapes) -> Config:
    """Return the part of the config of Stable Video Diffusion's VAE that its shapes decide.

    Args:
        shapes: of both halves, with their prefixes.
    Raises: Unrepresentable.
    """
    halves = ((SVD_ENCODER, ("encoder.", "quant_conv.")), (SVD_DECODER, ("decoder.",)))
    own = {
        name.removeprefix(prefix): shape
        for prefix, parts in halves
        for name, shape in shapes.items()
        if name.startswith(tuple(prefix + part for part in parts))
    }
    if "decoder.conv_out.time_mix_conv.weight" not in own:
        raise Unrepresentable(
            "its VAE has no layers among frames (svd_image_decoder); use svd.safetensors or "
            "svd_xt.safetensors"
        )
    structure = vae_structure(own)
    kept = ("block_out_channels", "down_block_types", "layers_per_block", "latent_channels")
    return {key: structure[key] for key in kept}


PENULTIMATE = 23
"""Used layers of SD 2's text encoder: it reads the output of layer 23 of 24."""


def text_structure(shapes: Shapes, family: str) -> Config:
    """Return the part of a text encoder's config that its shapes decide.

    Names are OpenCLIP's, or transformers' with or without ``text_model.``.
    """
    if "positional_embedding" in shapes:
        tokens, positions = "token_embedding.weight", "positional_embedding"
        layers, inner = r"transformer\.resblocks\.", "transformer.resblocks.0.mlp.c_fc.weight"
    else:
        base = "text_model." if any(name.startswith("text_model.") for name in shapes) else ""
        tokens = f"{base}embeddings.token_embedding.weight"
        positions = f"{base}embeddings.position_embedding.weight"
        layers, inner = rf"{re.escape(base)}encoder\.layers\.", f"{base}encoder.layers.0.mlp.fc1"
        inner += ".weight"
    count = _count(shapes, layers + r"(\d+)\.")
    vocabulary, width = _shape(shapes, tokens, 2)
    config = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": _shape(shapes, positions, 2)[0],
        "num_hidden_layers": min(count, PENULTIMATE) if family == "sd2" else count,
        "intermediate_size": _shape(shapes, inner, 2)[0],
        "num_attention_heads": max(1, width // 64),
    }
    if family.startswith("sdxl"):
        for name, out in (("text_projection", 1), ("text_projection.weight", 0)):
            if name in shapes:
                config["projection_dim"] = _shape(shapes, name, 2)[out]
    return config


def vision_structure(shapes: Shapes) -> Config:
    """Return the config of CLIP's image encoder in OpenCLIP's names (``visual.*``).

    The shapes do not show the heads and the activation: OpenAI's ViT-L/14 and OpenCLIP's ViT-H/14
    have 16 heads, and OpenAI's models have quick_gelu.
    """
    width, _, patch, _ = _shape(shapes, "visual.conv1.weight", 4)
    projection = _shape(shapes, "visual.proj", 2)[1]
    side = math.isqrt(_shape(shapes, "visual.positional_embedding", 2)[0] - 1)
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": _shape(shapes, "visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "projection_dim": projection,
        "num_hidden_layers": _count(shapes, r"visual\.transformer\.resblocks\.(\d+)\."),
        "num_attention_heads": 16,
        "image_size": patch * side,
        "patch_size": patch,
        "hidden_act": "quick_gelu" if projection == OPENAI_WIDTH else "gelu",
    }


OPENAI_WIDTH = 768
"""Width of the embeddings of OpenAI's ViT-L/14; OpenCLIP's ViT-H/14 has 1024."""


def unet_config(family: Family, structure: Config, text_width: int = 1280) -> Config:
    """Combine the structure of a U-Net with the values of its family.

    Args:
        family: family of the model.
        structure: result of ``unet_structure``.
        text_width: width of the pooled text of an SDXL U-Net.
    Raises: CheckpointError if the family's rule for the number of heads does not fit.
    """
    widths = structure["block_out_channels"]
    heads: Any = 8
    if family.head_width is not None:
        heads = [width // family.head_width for width in widths]
        if any(width % family.head_width for width in widths):
            raise CheckpointError(
                f"its U-Net has the widths {widths}, which do not fit {family.words}; "
                f"give the model's configs with {argument('config', form='FOLDER')}"
            )
    config = family.unet | structure
    config["num_attention_heads" if family is SVD else "attention_head_dim"] = heads
    if family.name.startswith("sdxl") and "projection_class_embeddings_input_dim" in structure:
        # The input is pooled text and a sine embedding of each of 6 sizes (refiner: 5).
        numbers = 5 if family.name == "sdxl-refiner" else 6
        rest = structure["projection_class_embeddings_input_dim"] - text_width
        if rest > 0 and rest % numbers == 0:
            config["addition_time_embed_dim"] = rest // numbers
    return config


def guess(structure: Config, text: str | None, parts: Collection[str] = ()) -> Family:
    """Return the family of a U-Net.

    Args:
        structure: result of ``unet_structure``.
        text: naming of the first text encoder in the file: "clip", "openclip", or None if absent.
        parts: the components in the file.
    """
    if structure["_class_name"] == "UNetSpatioTemporalConditionModel":
        return SVD
    if IMAGE_ENCODER in parts:
        if "projection_class_embeddings_input_dim" in structure:
            return UNCLIP
        return ZERO123 if CC_PROJECTION in parts else VARIATION
    if "projection_class_embeddings_input_dim" in structure:
        refiner = text == "openclip" or (text is None and structure["cross_attention_dim"] == 1280)
        return FAMILIES["sdxl-refiner" if refiner else "sdxl"]
    if "num_class_embeds" in structure and structure["in_channels"] == 7:
        return UPSCALER
    width = structure["cross_attention_dim"]
    if width in (768, 1024):
        return FAMILIES["sd1" if width == 768 else "sd2"]
    second = text == "openclip" if text is not None else structure["use_linear_projection"]
    return FAMILIES["sd2" if second else "sd1"]
