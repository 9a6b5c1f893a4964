"""Map the tensor names of LoRA files to weights, by a table of whole names.

A name consists of a module and a part. The rules in PARTS split a name; each rule matches a whole
name. Modules are looked up in a table made for the model at hand: it lists every spelling that
known tools use for each weight. Nothing is replaced within a name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from mlxdiff.convert.keymap import Ignored, Layout, ldm_unet, openclip_text
from mlxdiff.convert.transforms import thirds
from mlxdiff.networks.params import expected_parameters
from mlxdiff.weights.tensors import Shape


@dataclass(frozen=True)
class Part:
    """A rule: a name that fully matches ``pattern`` is this part.

    Group 1 of the pattern is the module. A group "network" is the name of one of several networks
    in the file.
    """

    pattern: str
    part: str


class Named(NamedTuple):
    """The parsed name of a tensor: its part, its module, and the network in the file."""

    module: str
    part: str
    network: str = ""


_NETWORK = r"(?:\.(?P<network>\w+))?"


def _lora(down: str, up: str) -> tuple[Part, Part]:
    return Part(down, "down"), Part(up, "up")


PARTS: tuple[Part, ...] = (
    # PEFT, with or without the adapter's name
    *_lora(rf"(.+)\.lora_A{_NETWORK}\.weight", rf"(.+)\.lora_B{_NETWORK}\.weight"),
    Part(rf"(.+)\.lora_B{_NETWORK}\.bias", "lora_bias"),
    Part(r"(.+)\.lora_magnitude_vector(?:\.weight)?", "magnitude"),
    Part(rf"(.+)\.lora_magnitude_vector{_NETWORK}(?:\.weight)?", "magnitude"),
    Part(r"(.+)\.ia3_l(?:\.\w+)?", "factor"),
    # diffusers before PEFT, and its attention processors before that
    *_lora(
        r"(.+)\.lora(?:_linear_layer)?\.down\.weight", r"(.+)\.lora(?:_linear_layer)?\.up\.weight"
    ),
    *_lora(r"(.+_lora)\.down\.weight", r"(.+_lora)\.up\.weight"),
    # kohya and LyCORIS
    *_lora(r"(.+)\.lora_down\.weight", r"(.+)\.lora_up\.weight"),
    Part(r"(.+)\.lora_mid\.weight", "mid"),
    *(Part(rf"(.+)\.hada_{part}", part) for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(
        Part(rf"(.+)\.lokr_{written}", part)
        for written, part in (
            ("w1", "k1"),
            ("w1_a", "k1_a"),
            ("w1_b", "k1_b"),
            ("w2", "k2"),
            ("w2_a", "k2_a"),
            ("w2_b", "k2_b"),
            ("t2", "kt2"),
        )
    ),
    *(Part(rf"(.+)\.{part}\.weight", part) for part in ("a1", "a2", "b1", "b2", "bm")),
    Part(r"(.+)\.oft_blocks", "blocks"),
    Part(r"(.+)\.oft_diag", "diag"),
    Part(r"(.+)\.rescale", "rescale"),
    Part(r"(.+)\.(?:diff|w_norm)", "diff"),
    Part(r"(.+)\.(?:diff_b|b_norm)", "diff_b"),
    Part(r"(.+)\.on_input", "on_input"),
    Part(r"(lora_(?:unet|te\d?)_.+|lycoris_.+)\.weight", "weight"),  # (IA)^3
    # cloneofsimo's: numbered modules
    *_lora(r"((?:unet|text_encoder):\d+):down", r"((?:unet|text_encoder):\d+):up"),
    Part(r"(.+)\.dora_scale", "dora_scale"),
    Part(r"(.+)\.alpha", "alpha"),
)

IGNORED: tuple[Ignored, ...] = (
    Ignored(
        r"bundle_emb\..+|<[^<>]+>",
        "a textual inversion in the LoRA file; to use it, give the file as an embedding, too",
    ),
    Ignored(
        r"lora_te2?_transformer_resblocks_(?:23|31)_.+",
        "the last layer of the text encoder, which the model does not use",
    ),
)
"""Names that may stay unused, each with the reason."""

# Name patterns of other models, for error messages.
_FOREIGN = (
    (r"(?:transformer\.|lora_transformer_|diffusion_model\.|base_model\.model\.)?"
     r"(?:single_transformer_blocks|double_blocks|single_blocks)[._].+", "Flux"),
    (r"lora_unet_(?:double_blocks|single_blocks)_.+", "Flux"),
    (r"(?:transformer|lora_transformer|lora_unet|diffusion_model)[._]"
     r"(?:joint_blocks|transformer_blocks|layers|blocks)[._].+", "a diffusion transformer"),
    (r"lora_prior_.+", "Stable Cascade"),
    (r"(?:unet\.)?.*(?:motion_modules|temporal_transformer_blocks)[._].+", "AnimateDiff"),
    (r"lora_controlnet|(?:input_blocks|time_embed)\..+\.(?:down|up)", "ControlNet (Control-LoRA)"),
)  # fmt: skip
_WIDTHS = {
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    2048: "SDXL",
    1280: "SDXL's refiner",
}
_FAMILIES = {
    "sd1": _WIDTHS[768],
    "sd2": _WIDTHS[1024],
    "sdxl": _WIDTHS[2048],
    "sdxl-refiner": _WIDTHS[1280],
}
_CROSS_ATTENTION = re.compile(r".+attn2[._](?:processor\.)?to_[kv](?:_lora)?")
_SECOND_ENCODER = re.compile(
    r"(?:text_encoder_2\.|lora_te2_|text_encoders\.clip_g\.|conditioner\.embedders\.1\.).+"
)


_COMPILED = tuple((re.compile(rule.pattern), rule.part) for rule in PARTS)


def split(name: str) -> Named | None:
    """Split a tensor's name; return None if no rule matches."""
    for pattern, part in _COMPILED:
        if match := pattern.fullmatch(name):
            return Named(match[1], part, match.groupdict().get("network") or "")
    return None


@dataclass(frozen=True)
class Target:
    """A weight that a module name refers to.

    Attributes:
        component: "unet", "text_encoder" or "text_encoder_2".
        parameter: name of the weight in the component.
        shape: shape of the weight, in our layout.
        third: index of its third in a fused tensor (OpenCLIP's queries, keys, values), or None.
    """

    component: str
    parameter: str
    shape: Shape
    third: int | None = None

    def bias(self, shapes: Mapping[str, Shape]) -> Target | None:
        """Return the bias beside the weight, or None if the layer has none.

        Args:
            shapes: parameter -> shape, for all of the component.
        """
        name = self.parameter.removesuffix("weight") + "bias"
        return replace(self, parameter=name, shape=shapes[name]) if name in shapes else None

    @property
    def inputs(self) -> int:
        """The number of input channels; 1 for a vector."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def matrix(self) -> Shape:
        """The shape as a matrix: (out, in * kH * kW)."""
        out, *kernel = self.shape
        size = 1
        for side in kernel:
            size *= side
        return out, size


def spellings(configs: Mapping[str, Any]) -> dict[str, tuple[Target, ...]]:
    """Build the table of module names: every spelling of each weight that a LoRA can change.

    Args:
        configs: component -> config.
    Returns: spelling -> the weights it refers to.
    """
    table: dict[str, tuple[Target, ...]] = {}
    for component, config in configs.items():
        names = _unet if component == "unet" else _text_encoder
        weights = {
            name.removesuffix(".weight"): Target(component, name, shape)
            for name, shape in expected_parameters(config).items()
            if name.endswith(".weight")
        }
        for spelled, module, third in names(component, config, weights):
            target = weights[module]
            if third is not None:
                target = Target(component, target.parameter, target.shape, third)
            if target not in table.get(spelled, ()):
                table[spelled] = (*table.get(spelled, ()), target)
    return table


Spelled = tuple[str, str, int | None]

_MOTION = re.compile(
    r"(.+\.motion_modules\.\d+)\.(transformer_blocks\.\d+)\.attn([12])\.(to_[qkv]|to_out)(?:\.0)?"
)


def _unet(component: str, config: Any, weights: Iterable[str]) -> Iterator[Spelled]:
    weights = set(weights)
    for module in weights:
        flat = module.replace(".", "_")
        yield f"lora_unet_{flat}", module, None  # kohya, LyCORIS
        yield f"lycoris_{flat}", module, None  # LyCORIS without kohya
        for prefix in ("unet.", "", "base_model.model.", "unet.base_model.model."):
            yield prefix + module, module, None  # diffusers, PEFT
        if match := re.fullmatch(r"(.+\.attn[12])\.(to_[qkv]|to_out)(?:\.0)?", module):
            for prefix in ("unet.", ""):  # diffusers' attention processors
                yield f"{prefix}{match[1]}.processor.{match[2]}_lora", module, None
                yield f"{prefix}{match[1]}.{match[2]}_lora", module, None
        if match := _MOTION.fullmatch(module):  # AnimateDiff's MotionLoRA
            block = f"{match[1]}.temporal_transformer.{match[2]}.attention_blocks"
            yield f"{block}.{int(match[3]) - 1}.processor.{match[4]}_lora", module, None
    # The original code has no motion modules.
    for place, module, _ in _places(ldm_unet(replace(config, motion=None)), weights):
        yield f"lora_unet_{place.replace('.', '_')}", module, None  # kohya's SDXL
        yield f"diffusion_model.{place}", module, None  # ComfyUI, OneTrainer
        yield place, module, None  # OneTrainer's "original"


# Places of a text encoder in whole checkpoints and in ComfyUI's saves: of the first (or only)
# encoder, and of the second. Names below them are transformers', then OpenCLIP's.
_CLIP_PLACES = (
    (
        "text_encoders.clip_l.transformer",
        "text_encoders.clip_h.transformer",
        "cond_stage_model.transformer",
        "conditioner.embedders.0.transformer",
    ),
    ("text_encoders.clip_g.transformer",),
)
_OPENCLIP_PLACES = (("cond_stage_model.model",), ("conditioner.embedders.1.model",))


def _text_encoder(component: str, config: Any, weights: Iterable[str]) -> Iterator[Spelled]:
    weights = set(weights)
    second = component == "text_encoder_2"
    kohya = ("lora_te2_",) if second else ("lora_te_", "lora_te1_")
    for module in weights:
        for place in _CLIP_PLACES[second]:  # ComfyUI, OneTrainer
            yield f"{place}.{module}", module, None
        short = module.removeprefix("text_model.")
        for prefix in kohya:
            yield prefix + module.replace(".", "_"), module, None
        for name in dict.fromkeys((module, short)):  # transformers >= 5.6 has no text_model
            yield f"{component}.{name}", module, None
            yield f"{component}.base_model.model.{name}", module, None  # PEFT
            if match := re.fullmatch(r"(.+\.self_attn)\.(q|k|v|out)_proj", name):
                yield f"{component}.{match[1]}.to_{match[2]}_lora", module, None  # old diffusers
    # OpenCLIP's names. kohya uses lora_te_ for the single encoder of SD 2.
    for place, module, third in _places(openclip_text(config), weights):
        for prefix in kohya:
            yield prefix + place.replace(".", "_"), module, third
        for prefix in _OPENCLIP_PLACES[second]:
            yield f"{prefix}.{place}", module, third


def _places(layout: Layout, weights: Iterable[str]) -> Iterator[Spelled]:
    """Yield (name in the layout, module, third) for each weight in a single-file layout."""
    known = set(weights)
    for place, pieces in (layout.names or {}).items():
        for piece in pieces:
            module = piece.target.removesuffix(".weight")
            if piece.target.endswith(".weight") and module in known and piece.transform is None:
                yield place.removesuffix(".weight"), module, None
            elif module in known and piece.transform in thirds:
                place = re.sub(r"in_proj_weight$", "in_proj", place)
                yield place, module, thirds.index(piece.transform)


# Classes of diffusers and transformers whose linear layers and convolutions cloneofsimo's LoRA
# changes -> the layers, in the order of the modules there. GEGLU stands between the attentions
# before diffusers 0.15, and after them since.
_ATTENTION = tuple(f"{{}}.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0"))
_RESNET = ("conv1", "time_emb_proj", "conv2", "conv_shortcut")
_CLIP_ATTENTION = tuple(f"self_attn.{part}_proj" for part in ("k", "v", "q", "out"))


def numbered(component: str, classes: Sequence[str], weights: Collection[str]) -> list[list[str]]:
    """Return the possible orders of the modules that cloneofsimo's LoRA numbers.

    Args:
        component: "unet" or "text_encoder".
        classes: the classes of the changed modules, from the file.
        weights: modules of the component.
    Raises: ValueError that names an unknown class.
    """
    known = {"unet": _UNET_CLASSES, "text_encoder": ("CLIPAttention",)}[component]
    if unknown := [name for name in classes if name not in known]:
        raise ValueError(f"it changes layers of {', '.join(unknown)}; known: {', '.join(known)}")
    if component == "text_encoder":
        layers = _indices("text_model.encoder.layers", weights)
        return [[f"{layer}.{part}" for layer in layers for part in _CLIP_ATTENTION]]
    attends = "CrossAttention" in classes or "Attention" in classes
    orders = []
    for inner in (("attn1", "ff", "attn2"), ("attn1", "attn2", "ff")):
        found = []
        blocks = [*_indices("down_blocks", weights), *_indices("up_blocks", weights), "mid_block"]
        for block in blocks:
            for attention in _indices(f"{block}.attentions", weights):
                for layer in _indices(f"{attention}.transformer_blocks", weights):
                    for part in inner:
                        if part == "ff" and "GEGLU" in classes:
                            found.append(f"{layer}.ff.net.0.proj")
                        elif part != "ff" and attends:
                            found += [f"{layer}.{one.format(part)}" for one in _ATTENTION]
            if "ResnetBlock2D" in classes:
                for resnet in _indices(f"{block}.resnets", weights):
                    found += [f"{resnet}.{part}" for part in _RESNET]
        orders.append([name for name in found if name in weights])
    return orders


_UNET_CLASSES = ("CrossAttention", "Attention", "GEGLU", "ResnetBlock2D")


def _indices(place: str, weights: Collection[str]) -> list[str]:
    """Return ``place.0``, ``place.1``, ... as far as there are modules inside."""
    count = {
        name[len(place) + 1 :].split(".")[0] for name in weights if name.startswith(f"{place}.")
    }
    return [f"{place}.{i}" for i in sorted(int(n) for n in count if n.isdecimal())]


def place(module: str) -> str:
    """Guess the component of a module from its spelling alone."""
    if _SECOND_ENCODER.fullmatch(f"{module}."):
        return "text_encoder_2"
    if re.fullmatch(
        r"(?:text_encoder[._:s]|lora_te1?_|text_model\.|cond_stage_model\.|conditioner\.).+", module
    ):
        return "text_encoder"
    return "unet"


def ignored(name: str) -> str | None:
    """Return the reason why a name may stay unused, or None if it must be used."""
    return next((entry.reason for entry in IGNORED if re.fullmatch(entry.source, name)), None)


def made_for(shapes: Mapping[str, Shape]) -> str | None:
    """Name the model that a file was made for, or return None if it cannot be recognised.

    Args:
        shapes: tensor name -> shape.
    """
    for pattern, words in _FOREIGN:
        if any(re.fullmatch(pattern, name) for name in shapes):
            return words
    widths = set()
    for name, shape in shapes.items():
        module, part, _ = split(name) or Named("", "")
        if part == "down" and _CROSS_ATTENTION.fullmatch(module) and len(shape) > 1:
            widths.add(shape[1])
    if len(widths) == 1:
        width = widths.pop()
        return f"{_WIDTHS.get(width, 'a model')} (text {width} wide)"
    if any(_SECOND_ENCODER.fullmatch(name) for name in shapes):
        return "SDXL (it changes a second text encoder)"
    return None


def family_words(family: str, unet: Any) -> str:
    """Describe a model: its family (``detect.family``) and the width of its text embeddings."""
    widths = "/".join(map(str, sorted(set(unet.cross_attention_dim))))
    return f"{_FAMILIES.get(family, family)} (text {widths} wide)"
