"""Map the tensors of a checkpoint to our parameters, with one table of whole-name rules per layout.

A rule matches a whole name or nothing. Each source name must be used exactly once, or ignored for a
stated reason. Each parameter must be produced exactly once. Anything else is an error. Our names
are those of current diffusers, so the tables hold the older spellings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mlxdiff.convert.transforms import Transform, choose, halves, thirds, transpose
from mlxdiff.networks.config import (
    AutoencoderKLConfig,
    AutoencoderKLTemporalDecoderConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    ControlNetConfig,
    IPAdapterConfig,
    UNet2DConditionConfig,
)
from mlxdiff.networks.params import expected_parameters
from mlxdiff.weights.tensors import Shape, raise_faults


@dataclass(frozen=True)
class Rule:
    """A spelling: names that match ``source`` as a whole become ``target`` (syntax of re.sub)."""

    source: str
    target: str


@dataclass(frozen=True)
class Ignored:
    """Names that may occur but are not used, with the reason."""

    source: str
    reason: str


@dataclass(frozen=True)
class Piece:
    """A parameter made from a tensor, alone or with others.

    Attributes:
        target: name of the parameter.
        transform: layout change, or None if the shapes decide.
    """

    target: str
    transform: Transform | None = None


@dataclass(frozen=True)
class Layout:
    """All names that one kind of file may have.

    Attributes:
        rules: rules for names. A name that no rule matches stays the same.
        ignored: names that may be unused.
        names: the whole table, in place of rules: source name -> parameters.
    """

    rules: tuple[Rule, ...] = ()
    ignored: tuple[Ignored, ...] = ()
    names: Mapping[str, tuple[Piece, ...]] | None = None


_NO_PROJECTION = "this encoder's class is CLIPTextModel, which has no projection"
_POSITIONS = "a buffer that counts 0, 1, 2, ...; not a weight"
_IMAGE_HALF = "belongs to the image half of CLIP, which text-to-image does not use"


def _attention_block(place: str) -> tuple[Rule, ...]:
    """Return rules for the attention of diffusers < 0.18 (AttentionBlock). Places match as a whole.

    Weights are (C, C), or (C, C, 1, 1) in early conversions.
    """
    new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return tuple(
        Rule(rf"({place})\.{old}\.(weight|bias)", rf"\1.{name}.\2") for old, name in new.items()
    )


# Only the U-Net without text has attention in these places.
DIFFUSERS_UNET = Layout(
    rules=_attention_block(r"(?:(?:down|up)_blocks\.\d+|mid_block)\.attentions\.\d+")
)

DIFFUSERS_VAE = Layout(rules=_attention_block(r"(?:encoder|decoder)\.mid_block\.attentions\.0"))

TRANSFORMERS_CLIP_TEXT = Layout(
    # transformers >= 5.6 writes CLIPTextModel without the prefix.
    rules=(Rule(r"((?:embeddings|encoder|final_layer_norm)\..+)", r"text_model.\1"),),
    ignored=(
        Ignored(r"(?:text_model\.)?embeddings\.position_ids", _POSITIONS),
        Ignored(
            r"(?:text_model\.)?text_projection(?:\.weight)?",
            _NO_PROJECTION,
        ),
        Ignored(
            r"logit_scale|(?:vision_model|visual_projection)\..+",
            _IMAGE_HALF,
        ),
    ),
)

MOTION_POSITIONS = (
    r"(?:(?:down|up)_blocks\.\d+|mid_block)\.motion_modules\.\d+\.(?:temporal_transformer\.)?"
    r"transformer_blocks\.\d+\.(?:pos_embed|attention_blocks\.\d+\.pos_encoder)\.pe"
)
"""Names of a motion adapter's tables of positions."""

_MOTION_IGNORED = (
    Ignored(MOTION_POSITIONS, "sines and cosines of the numbers of the frames; not a weight"),
)
_MOTION_PLACE = r"((?:(?:down|up)_blocks\.\d+|mid_block)\.motion_modules\.\d+)"
_MOTION_BLOCK = rf"{_MOTION_PLACE}\.temporal_transformer\.(transformer_blocks\.\d+)"
MOTION_ORIGINAL = Layout(
    rules=(
        *(
            Rule(rf"{_MOTION_BLOCK}\.{old}\.(.+)", rf"\1.\2.{new}.\3")
            for old, new in (
                (r"attention_blocks\.0", "attn1"),
                (r"attention_blocks\.1", "attn2"),
                (r"norms\.0", "norm1"),
                (r"norms\.1", "norm2"),
                ("ff_norm", "norm3"),
                ("ff", "ff"),
            )
        ),
        Rule(rf"{_MOTION_PLACE}\.temporal_transformer\.((?:norm|proj_in|proj_out)\..+)", r"\1.\2"),
    ),
    ignored=_MOTION_IGNORED,
)
"""A motion adapter in the names of the original code."""

DIFFUSERS: dict[str, Layout] = {
    # torch's attention joins queries, keys and values under names of its own.
    "controlnet": Layout(
        rules=(Rule(r"(transformer_layes\.\d+\.attn\.in_proj)_(weight|bias)", r"\1.\2"),)
    ),
    "motion_adapter": Layout(ignored=_MOTION_IGNORED),
    "t2i_adapter": Layout(),
    "image_encoder": Layout(
        ignored=(Ignored(r"vision_model\.embeddings\.position_ids", _POSITIONS),)
    ),
    "image_normalizer": Layout(),
    "cc_projection": Layout(),
    "text_encoder": TRANSFORMERS_CLIP_TEXT,
    "text_encoder_2": TRANSFORMERS_CLIP_TEXT,
    "unet": DIFFUSERS_UNET,
    "vae": DIFFUSERS_VAE,
}
"""The layout of each component of a diffusers folder."""


# ------------------------------------------------------------------------------ single files (LDM)
# Our modules -> their places in the code of latent diffusion (Rombach et al. 2022), derived block
# by block from the config. Below a place in such a table, both use the same names. Places of layers
# among frames are those of Stability AI's code (VideoUNet, VideoDecoder); other models have none.

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_LDM_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v"}


def _resnet(places: dict[str, str], ours: str, theirs: str) -> None:
    for part, place in _RESNET.items():
        places[f"{ours}.{part}"] = f"{theirs}.{place}"
        places[f"{ours}.spatial_res_block.{part}"] = f"{theirs}.{place}"
        places[f"{ours}.temporal_res_block.{part}"] = f"{theirs}.time_stack.{place}"
    places[f"{ours}.time_mixer"] = f"{theirs}.time_mixer"


def _attention(places: dict[str, str], ours: str, theirs: str) -> None:
    places[ours] = theirs
    places[f"{ours}.temporal_transformer_blocks"] = f"{theirs}.time_stack"
    places[f"{ours}.time_pos_embed.linear_1"] = f"{theirs}.time_pos_embed.0"
    places[f"{ours}.time_pos_embed.linear_2"] = f"{theirs}.time_pos_embed.2"


def _ldm_down(config: UNet2DConditionConfig) -> dict[str, str]:
    """Return the places of a U-Net's first half. A ControlNet has the same."""
    places = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "time_embedding.cond_proj": "time_embed.cond_proj",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "class_embedding": "label_emb",
        "class_embedding.linear_1": "label_emb.0.0",
        "class_embedding.linear_2": "label_emb.0.2",
    }
    n = 1
    for i, block in enumerate(config.down_blocks):
        for j in range(block.num_layers):
            _resnet(places, f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n}.0")
            _attention(places, f"down_blocks.{i}.attentions.{j}", f"input_blocks.{n}.1")
            n += 1
        if block.resample:
            places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
            n += 1
    _resnet(places, "mid_block.resnets.0", "middle_block.0")
    _attention(places, "mid_block.attentions.0", "middle_block.1")
    _resnet(places, "mid_block.resnets.1", "middle_block.2")
    return places


def ldm_unet(config: UNet2DConditionConfig) -> Layout:
    """Return the layout of a U-Net in ``model.diffusion_model`` (without that prefix)."""
    places = _ldm_down(config) | {"conv_norm_out": "out.0", "conv_out": "out.2"}
    n = 0
    for i, block in enumerate(config.up_blocks):
        for j in range(block.num_layers):
            _resnet(places, f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n}.0")
            _attention(places, f"up_blocks.{i}.attentions.{j}", f"output_blocks.{n}.1")
            n += 1
        # The upsampler follows the last layer, in the next free place.
        free = 2 if block.transformer_layers else 1
        places[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{n - 1}.{free}.conv"
    return Layout(names=_table(expected_parameters(config), places))


def ldm_controlnet(config: ControlNetConfig) -> Layout:
    """Return the layout of a ControlNet in ``control_model`` (without that prefix).

    LDM keeps the convolutions and activations of the control picture in one list, and the zero
    convolutions in a list of their own.
    """
    places = _ldm_down(config) | {"controlnet_mid_block": "middle_block_out.0"}
    hint, blocks = "controlnet_cond_embedding", 2 * len(config.conditioning_embedding_out_channels)
    places[f"{hint}.conv_in"] = "input_hint_block.0"
    for i in range(blocks - 2):
        places[f"{hint}.blocks.{i}"] = f"input_hint_block.{2 * i + 2}"
    places[f"{hint}.conv_out"] = f"input_hint_block.{2 * blocks - 2}"
    for i in range(len(config.residual_channels)):
        places[f"controlnet_down_blocks.{i}"] = f"zero_convs.{i}.0"
    return Layout(names=_table(expected_parameters(config), places))


def ip_adapter(config: IPAdapterConfig) -> Layout:
    """Return the layout of an IP-Adapter in its authors' names or in diffusers' names."""
    expected = expected_parameters(config)
    pieces: dict[str, tuple[Piece, ...]] = {name: (Piece(name),) for name in expected}
    places = {
        "image": {"proj": "image_embeds"},
        "full": {"proj.0": "ff.net.0.proj", "proj.2": "ff.net.2", "proj.3": "norm"},
        "plus": {},
    }[config.kind]
    for i in range(config.depth):
        ours, theirs = f"layers.{i}", f"layers.{i}"
        places |= {
            f"{theirs}.0.norm1": f"{ours}.ln0",
            f"{theirs}.0.norm2": f"{ours}.ln1",
            f"{theirs}.0.to_q": f"{ours}.attn.to_q",
            f"{theirs}.0.to_out": f"{ours}.attn.to_out.0",
            f"{theirs}.1.0": f"{ours}.ff.0",
            f"{theirs}.1.1": f"{ours}.ff.1.net.0.proj",
            f"{theirs}.1.3": f"{ours}.ff.1.net.2",
        }
        for spelling in ("0.to_kv", "attn.to_kv"):
            targets = [f"image_proj.{ours}.attn.{part}.weight" for part in ("to_k", "to_v")]
            pieces[f"image_proj.{theirs}.{spelling}.weight"] = tuple(map(Piece, targets, halves))
    for place, module in places.items():
        for kind in ("weight", "bias"):
            if (target := f"image_proj.{module}.{kind}") in expected:
                pieces[f"image_proj.{place}.{kind}"] = (Piece(target),)
    return Layout(names=pieces)


def ldm_vae(config: AutoencoderKLConfig) -> Layout:
    """Return the layout of a VAE in ``first_stage_model``. Its up path is numbered backwards."""
    levels = len(config.block_out_channels)
    places = {name: name for name in ("quant_conv", "post_quant_conv")}
    for half in ("encoder", "decoder"):
        places |= {f"{half}.conv_in": f"{half}.conv_in", f"{half}.conv_out": f"{half}.conv_out"}
        places[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        for i in range(2):
            places[f"{half}.mid_block.resnets.{i}"] = f"{half}.mid.block_{i + 1}"
        attention = f"{half}.mid_block.attentions.0"
        for ours, theirs in (*_LDM_ATTENTION.items(), ("to_out.0", "proj_out")):
            places[f"{attention}.{ours}"] = f"{half}.mid.attn_1.{theirs}"
    for i in range(levels):
        up = levels - 1 - i
        for j in range(config.layers_per_block + 1):
            places[f"encoder.down_blocks.{i}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
            places[f"decoder.up_blocks.{i}.resnets.{j}"] = f"decoder.up.{up}.block.{j}"
        places[f"encoder.down_blocks.{i}.downsamplers.0"] = f"encoder.down.{i}.downsample"
        places[f"decoder.up_blocks.{i}.upsamplers.0"] = f"decoder.up.{up}.upsample"
    for ours, theirs in [pair for pair in places.items() if ".resnets." in pair[0]]:
        for spatial in (ours, f"{ours}.spatial_res_block"):
            places[spatial] = theirs
            places[f"{spatial}.conv_shortcut"] = f"{theirs}.nin_shortcut"
        for part, place in _RESNET.items():
            places[f"{ours}.temporal_res_block.{part}"] = f"{theirs}.time_stack.{place}"
        places[f"{ours}.time_mixer"] = theirs
    places["decoder.time_conv_out"] = "decoder.conv_out.time_mix_conv"
    targets = expected_parameters(config)
    # Converters that know only diffusers' old names leave to_q and similar names unchanged.
    kept = places | {
        f"{half}.mid_block.attentions.0.{part}": f"{half}.mid.attn_1.{part}"
        for half in ("encoder", "decoder")
        for part in ("to_q", "to_k", "to_v", "to_out.0")
    }
    training = Ignored(r"(?:loss|model_ema)\..+", "the VAE's training state; not a weight")
    return Layout(names=_table(targets, places) | _table(targets, kept), ignored=(training,))


SVD_ENCODER, SVD_DECODER = "conditioner.embedders.3.encoder.", "first_stage_model."
"""Prefixes of the two halves of Stable Video Diffusion's VAE: what encodes the picture that moves,
and what decodes the frames. Each stands in a whole VAE, whose other half is not used."""


def svd_vae(config: AutoencoderKLTemporalDecoderConfig) -> Layout:
    """Return the layout of the VAE in a file of Stable Video Diffusion, with the prefixes.

    Source: Stability-AI/generative-models, scripts/sampling/configs/svd.yaml (the conditioner's
    AutoencoderKLModeOnly encodes the picture, the first stage's VideoDecoder decodes).
    """
    names = {
        (SVD_DECODER if source.startswith("decoder.") else SVD_ENCODER) + source: pieces
        for source, pieces in (ldm_vae(config).names or {}).items()
    }
    return Layout(
        names=names,
        ignored=(
            Ignored(
                rf"{re.escape(SVD_DECODER)}encoder\..+",
                "encodes videos in training; the picture has an encoder of its own",
            ),
            Ignored(
                rf"{re.escape(SVD_ENCODER)}(?:decoder|post_quant_conv)\..+",
                "decodes pictures; the frames have a decoder of their own",
            ),
        ),
    )


def openclip_text(config: CLIPTextConfig) -> Layout:
    """Return the layout of OpenCLIP's text encoder.

    Its places are ``cond_stage_model.model`` and ``conditioner.embedders.1``. It keeps queries,
    keys and values in one tensor, and its projection is transposed.
    """
    places = {
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.final_layer_norm": "ln_final",
        "text_projection": "text_projection",
    }
    pieces: dict[str, tuple[Piece, ...]] = {
        "positional_embedding": (Piece("text_model.embeddings.position_embedding.weight"),)
    }
    fused = set()
    for i in range(config.num_hidden_layers):
        ours, theirs = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        places |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in _OPENCLIP_LAYER.items()}
        for kind in ("weight", "bias"):
            parts = [f"{ours}.self_attn.{part}_proj.{kind}" for part in "qkv"]
            fused |= set(parts)
            pieces[f"{theirs}.attn.in_proj_{kind}"] = tuple(map(Piece, parts, thirds))
    if config.with_projection:
        pieces["text_projection"] = (Piece("text_projection.weight", transpose),)
    fused.add("text_model.embeddings.position_embedding.weight")
    pieces |= _table((t for t in expected_parameters(config) if t not in fused), places)
    ignored = [
        Ignored(r"logit_scale|attn_mask|visual\..+", _IMAGE_HALF),
        Ignored(r"(?:.+\.)?position_ids", _POSITIONS),
        Ignored(
            rf"transformer\.resblocks\.{config.num_hidden_layers}\..+",
            "the last layer: the model reads the output of the layer before it",
        ),
    ]
    if not config.with_projection:
        ignored.append(Ignored(r"text_projection(?:\.weight)?", _NO_PROJECTION))
    return Layout(names=pieces, ignored=tuple(ignored))


def openclip_vision(config: CLIPVisionConfig) -> Layout:
    """Return the layout of the image encoder of OpenAI's CLIP and of OpenCLIP.

    Its place is ``embedder.model`` (Stable unCLIP), ``cond_stage_model.model`` (image variations)
    or ``conditioner.embedders.0.open_clip.model`` (Stable Video Diffusion). Parts of the text
    encoder stand beside it there.
    """
    ours, theirs = "vision_model.encoder.layers", "visual.transformer.resblocks"
    places = {
        "vision_model.embeddings.patch_embedding": "visual.conv1",
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
    }
    pieces: dict[str, tuple[Piece, ...]] = {
        "visual.class_embedding": (Piece("vision_model.embeddings.class_embedding"),),
        "visual.positional_embedding": (
            Piece("vision_model.embeddings.position_embedding.weight"),
        ),
        "visual.proj": (Piece("visual_projection.weight", transpose),),
    }
    for i in range(config.num_hidden_layers):
        places |= {f"{ours}.{i}.{a}": f"{theirs}.{i}.{b}" for a, b in _OPENCLIP_LAYER.items()}
        for kind in ("weight", "bias"):
            parts = [f"{ours}.{i}.self_attn.{part}_proj.{kind}" for part in "qkv"]
            pieces[f"{theirs}.{i}.attn.in_proj_{kind}"] = tuple(map(Piece, parts, thirds))
    done = {piece.target for row in pieces.values() for piece in row}
    pieces |= _table((t for t in expected_parameters(config) if t not in done), places)
    text = Ignored(
        r"logit_scale|attn_mask|positional_embedding|text_projection|token_embedding\.weight"
        r"|ln_final\..+|transformer\.resblocks\..+",
        "belongs to the text half of CLIP, which the model does not read",
    )
    return Layout(names=pieces, ignored=(text,))


CC_PROJECTION_FILE = Layout(
    names={kind: (Piece(f"projection.{kind}"),) for kind in ("weight", "bias")}
)
"""The layout of ``cc_projection`` in a single file (without that prefix)."""
NORMALIZER_FILE = Layout(
    names={
        "data_mean": (Piece("mean"),),
        "data_std": (Piece("std"),),
    }
)
"""The layout of the mean and deviation in ``noise_augmentor`` (without that prefix)."""


# stable-diffusion.cpp stores OpenCLIP's encoder under transformers' names, with OpenCLIP's joined
# queries, keys and values and its projection -> OpenCLIP's names.
_STABLE_DIFFUSION_CPP = (
    Rule(r"text_model\.embeddings\.token_embedding\.weight", "token_embedding.weight"),
    Rule(r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    Rule(r"text_model\.final_layer_norm\.(\w+)", r"ln_final.\1"),
    Rule(r"text_model\.text_projection", "text_projection"),
    Rule(
        r"text_model\.encoder\.layers\.(\d+)\.self_attn\.in_proj\.(\w+)",
        r"transformer.resblocks.\1.attn.in_proj_\2",
    ),
    *(
        Rule(
            rf"text_model\.encoder\.layers\.(\d+)\.{re.escape(ours)}\.(\w+)",
            rf"transformer.resblocks.\1.{theirs}.\2",
        )
        for ours, theirs in _OPENCLIP_LAYER.items()
    ),
)


def openclip_names(names: Iterable[str]) -> dict[str, str]:
    """Return name -> OpenCLIP's name for an encoder in stable-diffusion.cpp's naming."""
    result = {}
    for name in names:
        matches = ((rule, re.fullmatch(rule.source, name)) for rule in _STABLE_DIFFUSION_CPP)
        found = next((m.expand(rule.target) for rule, m in matches if m), name)
        result[name] = found
    return result


def _table(targets: Iterable[str], places: Mapping[str, str]) -> dict[str, tuple[Piece, ...]]:
    """Return source name -> target for every target. The longest known module prefix counts."""
    table: dict[str, tuple[Piece, ...]] = {}
    for target in targets:
        parts = target.split(".")
        depth = next(n for n in range(len(parts) - 1, 0, -1) if ".".join(parts[:n]) in places)
        source = ".".join([places[".".join(parts[:depth])], *parts[depth:]])
        table[source] = (Piece(target),)
    return table


def ema_names(names: Iterable[str]) -> dict[str, str]:
    """Return name under ``model_ema`` -> name of the averaged weight.

    LDM removes the dots from the names of modules. Two equal results would be ambiguous.
    """
    flat: dict[str, str] = {}
    for name in names:
        short = "diffusion_model" + name.replace(".", "")
        if short in flat:
            raise AssertionError(f"{name} and {flat[short]} have the same moving average")
        flat[short] = name
    return flat


FILE_IGNORED: tuple[Ignored, ...] = (
    Ignored(
        r"(?:(?:low_scale_model|noise_augmentor)\.)?(?:sqrt_|log_)?(?:one_minus_)?"
        r"(?:betas|alphas_cumprod(?:_prev)?)"
        r"|(?:(?:low_scale_model|noise_augmentor)\.)?sqrt_recipm?1?_alphas_cumprod"
        r"|posterior_(?:variance|log_variance_clipped|mean_coef[12])"
        r"|lvlb_weights|logvar|denoiser\.(?:sigmas|log_sigmas)",
        "the noise schedule; the scheduler's config gives it",
    ),
    Ignored(r"scale_factor", "the VAE's config has it"),
    Ignored(r"(?:embedder|cond_stage_model)\.(?:mean|std)", "the colours of CLIP's pictures"),
    Ignored(
        r"v_pred|ztsnr|edm_mean|edm_std|edm_vpred\.sigma_(?:max|min)",
        "a mark of the training; it was read",
    ),
    Ignored(
        r"(?:model_ema|model|ema)\.(?:decay|num_updates)|global_step|epoch|iteration|state\.step"
        r"|(?:optimizers?|optimizer_states?|lr_schedulers?|callbacks|loops|grad_scaler|scaler)\..+"
        r"|loss\..+",
        "training state; not a weight",
    ),
    Ignored(
        r"(?:unet_ema|ema_unet|ema_model|ema)\..+",
        "moving averages in the form of another tool; the plain weights are used",
    ),
    Ignored(r"safety_checker\..+", "a picture classifier; it does not draw"),
    Ignored(
        r"depth_model\..+", "makes depth maps of pictures (MiDaS); a map is given in its place"
    ),
    Ignored(r"embedding_manager\..+", "training state of textual inversion; not a weight"),
    Ignored(
        r"(?:cond_stage_model|conditioner\.embedders\.\d)(?:\.transformer)?\.logit_scale",
        _IMAGE_HALF,
    ),
    Ignored(
        r"(?:cond_stage_model|conditioner\.embedders\.\d)\.text_projection(?:\.weight)?",
        "left over by ComfyUI; the text encoder's own projection stands among its weights",
    ),
)
"""Names in a single file that belong to no component."""


STRAY = re.compile(r"(?:.+\.)?(?:position_ids|logit_scale|attn_mask|text_projection(?:\.weight)?)")
"""Names that other tools leave behind under the prefix of a text encoder that is not there."""


@dataclass(frozen=True)
class Use:
    """The use of one tensor: its name in the source and its transform."""

    source: str
    transform: Transform


@dataclass(frozen=True)
class Mapped:
    """The mapping of a component: parameter -> use (in our order), and unused names.

    ``ignored`` holds (name, reason).
    """

    uses: dict[str, Use]
    ignored: tuple[tuple[str, str], ...]


def targets(layout: Layout, name: str) -> Iterable[str]:
    """Yield the possible parameters of a source name. With rules: itself and each match."""
    if layout.names is not None:
        yield from (piece.target for piece in layout.names.get(name, ()))
        return
    yield name
    for rule in layout.rules:
        if match := re.fullmatch(rule.source, name):
            yield match.expand(rule.target)


def map_names(
    found: Mapping[str, Shape], expected: Mapping[str, Shape], layout: Layout, where: str
) -> Mapped:
    """Map all tensors of a component to its parameters.

    Args:
        found: name -> shape in the source.
        expected: parameter -> shape in our layout.
        layout: allowed spellings.
        where: name of the component in messages.
    Raises: CheckpointError with every missing, unknown, duplicated and misshapen tensor.
    """
    uses: dict[str, Use] = {}
    ignored: list[tuple[str, str]] = []
    unknown: list[str] = []
    duplicated: list[str] = []
    misshapen: list[str] = []
    seen: dict[str, str] = {}
    for name, shape in found.items():
        if layout.names is not None:
            pieces = [p for p in layout.names.get(name, ()) if p.target in expected]
        else:
            pieces = [Piece(target) for target in targets(layout, name) if target in expected]
        if not pieces:
            reason = ignored_for(name, layout.ignored)
            if reason is None:
                unknown.append(name)
            else:
                ignored.append((name, reason))
        elif layout.names is None and len(pieces) > 1:
            duplicated.append(f"{name} and {pieces[0].target}")
            seen.setdefault(pieces[0].target, name)
        else:
            for piece in pieces:
                target = piece.target
                if target in seen:
                    duplicated.append(f"{name} and {seen[target]}")
                    continue
                seen[target] = name
                transform = piece.transform or choose(shape, expected[target])
                if transform is None or transform.shape(shape) != expected[target]:
                    misshapen.append(f"{name} is {shape}, expected {_expected(piece, expected)}")
                else:
                    uses[target] = Use(name, transform)
    raise_faults(
        where,
        missing=[target for target in expected if target not in seen],
        unknown=unknown,
        duplicated=duplicated,
        misshapen=misshapen,
    )
    return Mapped({target: uses[target] for target in expected}, tuple(ignored))


def ignored_for(name: str, ignored: Iterable[Ignored]) -> str | None:
    """Return the reason to ignore a name, or None if it is not ignored."""
    return next((entry.reason for entry in ignored if re.fullmatch(entry.source, name)), None)


def _expected(piece: Piece, expected: Mapping[str, Shape]) -> Shape:
    """Return the shape in PyTorch of the source tensor of a parameter."""
    shape = expected[piece.target]
    if piece.transform in halves:
        return (2 * shape[0], *shape[1:])
    if piece.transform in thirds:
        return (3 * shape[0], *shape[1:])
    if piece.transform is transpose:
        return shape[::-1]
    return (shape[0], shape[3], shape[1], shape[2]) if len(shape) == 4 else shape
