"""Configs of components (config.json): frozen dataclasses, read strictly.

Fields carry the key names of diffusers and transformers. A key that is absent takes the default
of the reference class (as those libraries do). Every key of a file is one of three things: used,
known to have no effect on what is computed here (``*_NO_EFFECT``, with the reason beside it), or
an error. A value that would change the computation in a way that is not implemented is an error
too, by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, overload

from mlxdiff.errors import ConfigError

# Bounds on what a file may ask for, far above every real model: a damaged or hostile config must
# not make the list of its parameters, or a shape, grow without end.
MOST_LAYERS = 256
MOST_CHANNELS = 1 << 24


class _Reader:
    """Takes keys out of a config file one by one, so that what is left over is known."""

    def __init__(self, data: Mapping[str, Any], where: str, class_names: tuple[str, ...]) -> None:
        self.where = where
        self.left = {k: v for k, v in data.items() if not k.startswith("_")}
        found = data.get("_class_name")
        if found is not None and found not in class_names:
            raise ConfigError(
                f"{where}: _class_name is {found!r}, expected {' or '.join(class_names)}"
            )

    def fail(self, key: str, value: Any, expected: str) -> ConfigError:
        return ConfigError(f"{self.where}: {key} = {value!r} is not supported; expected {expected}")

    def take(self, key: str, default: Any) -> Any:
        return self.left.pop(key, default)

    def integer(
        self, key: str, default: int | None, least: int = 1, most: int = MOST_CHANNELS
    ) -> Any:
        value = self.take(key, default)
        if value is None and default is None:
            return None
        if not _is_int(value) or not least <= value <= most:
            raise self.fail(key, value, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float | None) -> Any:
        value = self.take(key, default)
        if value is None and default is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fail(key, value, "a number")
        return float(value)

    @overload
    def flag(self, key: str, default: bool) -> bool: ...

    @overload
    def flag(self, key: str, default: None) -> bool | None: ...

    def flag(self, key: str, default: bool | None) -> bool | None:
        value = self.take(key, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, value, "true or false")
        return value

    def integers(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        value = self.take(key, default)
        if not isinstance(value, (list, tuple)) or not value or not all(map(_is_int, value)):
            raise self.fail(key, value, "a list of whole numbers")
        if len(value) > MOST_LAYERS or not all(1 <= v <= MOST_CHANNELS for v in value):
            raise self.fail(key, value, f"whole numbers from 1 to {MOST_CHANNELS}")
        return tuple(value)

    def choices(
        self, key: str, default: tuple[str, ...], allowed: tuple[str, ...]
    ) -> tuple[str, ...]:
        value = self.take(key, default)
        if not isinstance(value, (list, tuple)) or not value:
            raise self.fail(key, value, "a list of block types")
        for entry in value:
            if entry not in allowed:
                raise self.fail(key, entry, " or ".join(allowed))
        return tuple(value)

    def size(self, key: str) -> tuple[int, int] | None:
        """(height, width), where the file gives one number for both, two, or null."""
        value = self.take(key, None)
        if value is None:
            return None
        sides = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
        if len(sides) != 2 or not all(_is_int(v) and 1 <= v <= MOST_CHANNELS for v in sides):
            raise self.fail(key, value, "one or two whole numbers of at least 1")
        return sides

    def per_block(
        self,
        key: str,
        default: Any,
        blocks: int,
        kind: type = int,
        most: int = MOST_CHANNELS,
    ) -> tuple[Any, ...]:
        """One value for each block, where the file gives either one for all or a list."""
        value = self.take(key, default)
        values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * blocks

        def check(v: Any) -> bool:
            return isinstance(v, bool) if kind is bool else _is_int(v) and 1 <= v <= most

        if len(values) != blocks or not all(map(check, values)):
            raise self.fail(key, value, f"one {kind.__name__}, or a list of {blocks}")
        return values

    def per_block_depths(
        self, key: str, default: int, layers: tuple[int, ...]
    ) -> tuple[tuple[int, ...], ...]:
        """Transformer depth of each layer of each block: a number, a list, or a list of lists."""
        value = self.take(key, default)
        blocks = tuple(value) if isinstance(value, (list, tuple)) else (value,) * len(layers)
        expected = f"a whole number, or a list of {len(layers)} whole numbers or lists"
        if len(blocks) != len(layers):
            raise self.fail(key, value, expected)
        depths = []
        for block, count in zip(blocks, layers, strict=True):
            depth = tuple(block) if isinstance(block, (list, tuple)) else (block,) * count
            if len(depth) != count or not all(_is_int(d) and 0 <= d <= MOST_LAYERS for d in depth):
                raise self.fail(key, value, expected)
            depths.append(depth)
        return tuple(depths)

    def only(self, key: str, default: Any, *allowed: Any) -> Any:
        """A key of which only these values are implemented."""
        value = self.take(key, default)
        if not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
            raise self.fail(key, value, " or ".join(map(repr, allowed)))
        return value

    def finish(self, no_effect: Mapping[str, str]) -> None:
        unknown = sorted(set(self.left) - set(no_effect))
        if unknown:
            shown = ", ".join(f"{k} = {self.left[k]!r}" for k in unknown[:10])
            raise ConfigError(
                f"{self.where}: {len(unknown)} unknown key(s): {shown}; it may change what the "
                "model computes, so it is not ignored (remove it if you know it has no effect)"
            )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# ------------------------------------------------------------------------------------- text encoder

_TRAINING = "only used in training"
_SETTING = "a library setting, not part of the computation"
CLIP_NO_EFFECT: dict[str, str] = {
    "attention_dropout": _TRAINING,
    "dropout": _TRAINING,
    "initializer_factor": _TRAINING,
    "initializer_range": _TRAINING,
    "logit_scale_init_value": _TRAINING,
    "gradient_checkpointing": _TRAINING,
    "architectures": "read where the class of the encoder is decided",
    "bos_token_id": "the tokenizer decides it",
    "pad_token_id": "the tokenizer decides it",
    "model_type": "checked by its value",
    "torch_dtype": "weights carry their own type",
    "dtype": "weights carry their own type",
    "transformers_version": _SETTING,
} | dict.fromkeys(
    # What transformers' PretrainedConfig writes into every file, by version.
    """add_cross_attention bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder label2id
    length_penalty max_length
    min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores prefix problem_type pruned_heads remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings
    tokenizer_class top_k top_p torchscript typical_p use_bfloat16 use_cache
    use_return_dict""".split(),
    _SETTING,
)


@dataclass(frozen=True)
class CLIPTextConfig:
    """A CLIP text encoder (Radford et al. 2021), as transformers' CLIPTextModel(WithProjection).

    ``eos_token_id`` 2 is the legacy value: the end of the text is then where the largest id stands.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    with_projection: bool = False

    @classmethod
    def from_dict(
        cls,
        data: Mapping[str, Any],
        where: str = "text_encoder/config.json",
        with_projection: bool | None = None,
    ) -> CLIPTextConfig:
        """Read a config.json.

        Args:
            data: the JSON object.
            where: the file's name in messages.
            with_projection: whether the class is CLIPTextModelWithProjection (model_index.json
                knows); None: as ``architectures`` says.
        Raises: ConfigError.
        """
        reader = _Reader(data, where, ("CLIPTextModel", "CLIPTextModelWithProjection"))
        reader.only("model_type", "clip_text_model", "clip_text_model", "clip")
        architectures = data.get("architectures") or ["CLIPTextModel"]
        known = ("CLIPTextModel", "CLIPTextModelWithProjection")
        if not isinstance(architectures, list) or architectures[0] not in known:
            raise reader.fail("architectures", architectures, " or ".join(known))
        if with_projection is None:
            with_projection = architectures[0] == "CLIPTextModelWithProjection"
        config = cls(
            vocab_size=reader.integer("vocab_size", 49408),
            hidden_size=reader.integer("hidden_size", 512),
            intermediate_size=reader.integer("intermediate_size", 2048),
            projection_dim=reader.integer("projection_dim", 512),
            num_hidden_layers=reader.integer("num_hidden_layers", 12, most=MOST_LAYERS),
            num_attention_heads=reader.integer("num_attention_heads", 8),
            max_position_embeddings=reader.integer("max_position_embeddings", 77),
            hidden_act=reader.only("hidden_act", "quick_gelu", "quick_gelu", "gelu"),
            layer_norm_eps=reader.number("layer_norm_eps", 1e-5),
            eos_token_id=reader.integer("eos_token_id", 49407, least=0),
            with_projection=with_projection,
        )
        reader.finish(CLIP_NO_EFFECT)
        if config.hidden_size % config.num_attention_heads:
            raise reader.fail(
                "num_attention_heads", config.num_attention_heads, "a divisor of hidden_size"
            )
        return config


@dataclass(frozen=True)
class CLIPVisionConfig:
    """A CLIP image encoder, as transformers' CLIPVisionModelWithProjection."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], where: str = "image_encoder/config.json"
    ) -> CLIPVisionConfig:
        """Read a config.json. Raises: ConfigError."""
        reader = _Reader(data, where, ("CLIPVisionModelWithProjection",))
        reader.only("model_type", "clip_vision_model", "clip_vision_model")
        reader.only("num_channels", 3, 3)
        config = cls(
            hidden_size=reader.integer("hidden_size", 768),
            intermediate_size=reader.integer("intermediate_size", 3072),
            projection_dim=reader.integer("projection_dim", 512),
            num_hidden_layers=reader.integer("num_hidden_layers", 12, most=MOST_LAYERS),
            num_attention_heads=reader.integer("num_attention_heads", 12),
            image_size=reader.integer("image_size", 224, most=1 << 14),
            patch_size=reader.integer("patch_size", 32),
            hidden_act=reader.only("hidden_act", "quick_gelu", "quick_gelu", "gelu"),
            layer_norm_eps=reader.number("layer_norm_eps", 1e-5),
        )
        reader.finish(CLIP_NO_EFFECT)
        for key, value, whole in (
            ("num_attention_heads", config.num_attention_heads, config.hidden_size),
            ("patch_size", config.patch_size, config.image_size),
        ):
            if whole % value:
                raise reader.fail(key, value, f"a divisor of {whole}")
        return config


@dataclass(frozen=True)
class ImageNormalizerConfig:
    """Mean and deviation of CLIP's embeddings, as diffusers' StableUnCLIPImageNormalizer."""

    embedding_dim: int = 768

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], where: str = "image_normalizer/config.json"
    ) -> ImageNormalizerConfig:
        """Read a config.json. Raises: ConfigError."""
        reader = _Reader(data, where, ("StableUnCLIPImageNormalizer",))
        config = cls(embedding_dim=reader.integer("embedding_dim", 768))
        reader.finish({})
        return config


POSE = 4
"""Numbers of a camera that Zero-1-to-3 reads beside CLIP's embedding."""


@dataclass(frozen=True)
class CCProjectionConfig:
    """What makes one token of CLIP's embedding and a camera, as CCProjection of diffusers' pipeline
    for Zero-1-to-3."""

    in_channel: int = 772
    out_channel: int = 768

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], where: str = "cc_projection/config.json"
    ) -> CCProjectionConfig:
        """Read a config.json. Raises: ConfigError."""
        reader = _Reader(data, where, ("CCProjection",))
        config = cls(
            in_channel=reader.integer("in_channel", 772, least=POSE + 1),
            out_channel=reader.integer("out_channel", 768),
        )
        reader.finish({})
        return config


# -------------------------------------------------------------------------------------------- U-Net

UNET_NO_EFFECT: dict[str, str] = {
    "dropout": _TRAINING,
    "addition_embed_type_num_heads": "belongs to addition_embed_type 'text', which is refused",
    "attention_head_dim": "num_attention_heads stands beside it and wins",
    "reverse_transformer_layers_per_block": "read with transformer_layers_per_block",
}
_DOWN_TYPES = ("DownBlock2D", "CrossAttnDownBlock2D")
_UP_TYPES = ("UpBlock2D", "CrossAttnUpBlock2D")
_MID_TYPES = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D")


@dataclass(frozen=True)
class BlockSpec:
    """One block of the U-Net, with everything that depends on its place worked out.

    Attributes:
        type: diffusers' class name; UNetMidBlock2DAttn for a UNetMidBlock2D with attention.
        in_channels: channels of the input of the first resnet (before a skip is concatenated).
        out_channels: channels of the output.
        num_layers: number of resnets.
        skip_channels: for an up block, the channels of the skip that each resnet concatenates;
            else ().
        transformer_layers: transformer blocks in the Transformer2DModel after each resnet (for the
            mid block: between its two resnets); () where there is no attention.
        num_attention_heads: heads of each attention.
        cross_attention_dim: width of encoder_hidden_states.
        only_cross_attention: attn1 attends to the text as well.
        resample: whether a down- or upsampler follows.
        motion: the motion modules after its layers; None: it has none.
    """

    type: str
    in_channels: int
    out_channels: int
    num_layers: int
    skip_channels: tuple[int, ...] = ()
    transformer_layers: tuple[int, ...] = ()
    num_attention_heads: int = 1
    cross_attention_dim: int = 0
    only_cross_attention: bool = False
    resample: bool = False
    motion: MotionSpec | None = None


def _up_path(
    widths: tuple[int, ...], layers: tuple[int, ...]
) -> Iterator[tuple[int, int, int, tuple[int, ...]]]:
    """(level, in_channels, out_channels, skip_channels) of each up block, the lowest level first.

    Args:
        widths, layers: channels and resnets of each block of the down path.
    """
    channels = widths[-1]
    for level in reversed(range(len(widths))):
        out, below = widths[level], widths[max(level - 1, 0)]
        yield level, channels, out, (out,) * layers[level] + (below,)
        channels = out


@dataclass(frozen=True)
class UNet2DConditionConfig:
    """The denoising U-Net, as diffusers' UNet2DConditionModel.

    Values that a file may give once for all blocks are tuples with one entry for each block, from
    the input down. ``num_attention_heads`` is the number of heads: files call it
    ``attention_head_dim`` (a slip of diffusers that is kept for compatibility) unless they write
    ``num_attention_heads``. ``transformer_layers_per_block`` has for each block one entry for each
    resnet; the up path's are in ``up_transformer_layers_per_block``, in the order of the up blocks.

    ``num_class_embeds`` counts the classes that it can be told: an upscaler's levels of noise. If
    ``class_embed_type`` is "projection", a class is a vector: CLIP's embedding of a picture.

    Source: Rombach et al. 2022 (SD 1.x, 2.x); Podell et al. 2023 (SDXL).
    """

    sample_size: tuple[int, int] | None
    in_channels: int
    out_channels: int
    flip_sin_to_cos: bool
    freq_shift: float
    down_block_types: tuple[str, ...]
    mid_block_type: str | None
    up_block_types: tuple[str, ...]
    block_out_channels: tuple[int, ...]
    layers_per_block: tuple[int, ...]
    downsample_padding: int
    norm_num_groups: int
    norm_eps: float
    cross_attention_dim: tuple[int, ...]
    transformer_layers_per_block: tuple[tuple[int, ...], ...]
    up_transformer_layers_per_block: tuple[tuple[int, ...], ...]
    num_attention_heads: tuple[int, ...]
    only_cross_attention: tuple[bool, ...]
    use_linear_projection: bool
    upcast_attention: bool  # asks for scores in float32, in which attention keeps them anyway
    addition_embed_type: str | None
    addition_time_embed_dim: int | None
    projection_class_embeddings_input_dim: int | None
    time_cond_proj_dim: int | None
    class_embed_type: str | None
    num_class_embeds: int | None
    conv_in_kernel: int
    conv_out_kernel: int
    motion: MotionAdapterConfig | None = field(default=None, kw_only=True)  # in no file: added
    # What UNet2DConfig has beside these, at what it means here.
    resnet_time_scale_shift: ClassVar[str] = "default"

    @property
    def time_embed_dim(self) -> int:
        """Width of the timestep embedding that the resnets are given."""
        return 4 * self.block_out_channels[0]

    @property
    def down_blocks(self) -> tuple[BlockSpec, ...]:
        """The down path, from the input on."""
        specs, channels = [], self.block_out_channels[0]
        for i, kind in enumerate(self.down_block_types):
            attends = kind == "CrossAttnDownBlock2D"
            specs.append(
                BlockSpec(
                    type=kind,
                    in_channels=channels,
                    out_channels=self.block_out_channels[i],
                    num_layers=self.layers_per_block[i],
                    transformer_layers=self.transformer_layers_per_block[i] if attends else (),
                    num_attention_heads=self.num_attention_heads[i],
                    cross_attention_dim=self.cross_attention_dim[i],
                    only_cross_attention=self.only_cross_attention[i],
                    resample=i < len(self.down_block_types) - 1,
                    motion=None if self.motion is None else self.motion.down(i),
                )
            )
            channels = self.block_out_channels[i]
        return tuple(specs)

    @property
    def mid_block(self) -> BlockSpec | None:
        """The block at the lowest resolution; None for models without one (BK-SDM small, tiny)."""
        if self.mid_block_type is None:
            return None
        attends = self.mid_block_type == "UNetMidBlock2DCrossAttn"
        return BlockSpec(
            type=self.mid_block_type,
            in_channels=self.block_out_channels[-1],
            out_channels=self.block_out_channels[-1],
            num_layers=2 if attends else 1,
            transformer_layers=self.transformer_layers_per_block[-1][:1] if attends else (),
            num_attention_heads=self.num_attention_heads[-1],
            cross_attention_dim=self.cross_attention_dim[-1],
            motion=None if self.motion is None else self.motion.mid(),
        )

    @property
    def cross_attentions(self) -> tuple[BlockSpec, ...]:
        """The block of each layer that attends to the text: on the way down, up, in the middle."""
        blocks = [*self.down_blocks, *self.up_blocks]
        if self.mid_block is not None:
            blocks.append(self.mid_block)
        return tuple(block for block in blocks for _ in range(sum(block.transformer_layers)))

    @property
    def up_blocks(self) -> tuple[BlockSpec, ...]:
        """The up path, from the lowest resolution on."""
        specs: list[BlockSpec] = []
        for level, channels, out, skips in _up_path(self.block_out_channels, self.layers_per_block):
            i = len(specs)
            attends = self.up_block_types[i] == "CrossAttnUpBlock2D"
            specs.append(
                BlockSpec(
                    type=self.up_block_types[i],
                    in_channels=channels,
                    out_channels=out,
                    num_layers=len(skips),
                    skip_channels=skips,
                    transformer_layers=self.up_transformer_layers_per_block[i] if attends else (),
                    num_attention_heads=self.num_attention_heads[level],
                    cross_attention_dim=self.cross_attention_dim[level],
                    only_cross_attention=self.only_cross_attention[level],
                    resample=level > 0,
                    motion=None if self.motion is None else self.motion.up(level),
                )
            )
        return tuple(specs)

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], where: str = "unet/config.json"
    ) -> UNet2DConditionConfig:
        """Read a config.json. Raises: ConfigError."""
        reader = _Reader(data, where, ("UNet2DConditionModel",))
        only = reader.only
        # Variants of the class that no Stable Diffusion checkpoint of these families uses.
        only("center_input_sample", False, False)
        only("act_fn", "silu", "silu", "swish")
        only("mid_block_scale_factor", 1, 1, 1.0)
        only("dual_cross_attention", False, False)
        only("resnet_time_scale_shift", "default", "default")
        only("resnet_skip_time_act", False, False)
        only("resnet_out_scale_factor", 1.0, 1.0, 1)
        only("time_embedding_type", "positional", "positional")
        only("attention_type", "default", "default")
        only("class_embeddings_concat", False, False)
        only("mid_block_only_cross_attention", None, None, False)
        for key in (
            "encoder_hid_dim encoder_hid_dim_type time_embedding_dim "
            "time_embedding_act_fn timestep_post_act cross_attention_norm"
        ).split():
            only(key, None, None)

        channels = reader.integers("block_out_channels", (320, 640, 1280, 1280))
        n = len(channels)
        down = reader.choices(
            "down_block_types", ("CrossAttnDownBlock2D",) * 3 + _DOWN_TYPES[:1], _DOWN_TYPES
        )
        up = reader.choices(
            "up_block_types", _UP_TYPES[:1] + ("CrossAttnUpBlock2D",) * 3, _UP_TYPES
        )
        for key, types in (("down_block_types", down), ("up_block_types", up)):
            if len(types) != n:
                raise reader.fail(key, list(types), f"one for each of the {n} block_out_channels")
        layers = reader.per_block("layers_per_block", 2, n, most=MOST_LAYERS)
        # Both spellings mean the number of heads; the right name wins where both are given.
        spelling = "num_attention_heads"
        if reader.left.get(spelling) is None:
            spelling = "attention_head_dim"
        heads = reader.per_block(spelling, 8, n)
        reader.left.pop("num_attention_heads", None)
        for width, count in zip(channels, heads, strict=True):
            if width % count:
                raise reader.fail(spelling, list(heads), "divisors of block_out_channels")
        depth = reader.per_block_depths("transformer_layers_per_block", 1, layers)
        up_layers = tuple(count + 1 for count in reversed(layers))
        if reader.left.get("reverse_transformer_layers_per_block") is None:
            reader.left.pop("reverse_transformer_layers_per_block", None)
            if any(len(set(d)) > 1 for d in depth):
                raise reader.fail(
                    "reverse_transformer_layers_per_block",
                    None,
                    "a list, since transformer_layers_per_block differs inside a block",
                )
            up_depth = tuple((d[0],) * c for d, c in zip(reversed(depth), up_layers, strict=True))
        else:
            up_depth = reader.per_block_depths("reverse_transformer_layers_per_block", 1, up_layers)

        groups = reader.integer("norm_num_groups", 32)
        if any(width % groups for width in channels):
            raise reader.fail("norm_num_groups", groups, "a divisor of all block_out_channels")
        embed_type = only("addition_embed_type", None, None, "text_time")
        embed_dim = reader.integer("addition_time_embed_dim", None)
        embed_in = reader.integer("projection_class_embeddings_input_dim", None)
        if embed_type is not None and (embed_dim is None or embed_in is None):
            raise reader.fail(
                "addition_embed_type",
                embed_type,
                "addition_time_embed_dim and projection_class_embeddings_input_dim beside it",
            )
        class_type = only("class_embed_type", None, None, "projection")
        classes = reader.integer("num_class_embeds", None)
        others = embed_type is not None or classes is not None
        if class_type is not None and (others or embed_in is None):
            raise reader.fail(
                "class_embed_type",
                class_type,
                "projection_class_embeddings_input_dim beside it, and neither num_class_embeds nor "
                "addition_embed_type",
            )
        kernels = [reader.integer(key, 3) for key in ("conv_in_kernel", "conv_out_kernel")]
        if any(k % 2 == 0 for k in kernels):
            raise reader.fail("conv_in_kernel, conv_out_kernel", kernels, "odd numbers")
        config = cls(
            sample_size=reader.size("sample_size"),
            in_channels=reader.integer("in_channels", 4),
            out_channels=reader.integer("out_channels", 4),
            flip_sin_to_cos=reader.flag("flip_sin_to_cos", True),
            freq_shift=reader.number("freq_shift", 0),
            down_block_types=down,
            mid_block_type=only("mid_block_type", _MID_TYPES[0], None, *_MID_TYPES),
            up_block_types=up,
            block_out_channels=channels,
            layers_per_block=layers,
            downsample_padding=only("downsample_padding", 1, 0, 1),
            norm_num_groups=groups,
            norm_eps=reader.number("norm_eps", 1e-5),
            cross_attention_dim=reader.per_block("cross_attention_dim", 1280, n),
            transformer_layers_per_block=depth,
            up_transformer_layers_per_block=up_depth,
            num_attention_heads=heads,
            only_cross_attention=reader.per_block("only_cross_attention", False, n, bool),
            use_linear_projection=reader.flag("use_linear_projection", False),
            upcast_attention=reader.flag("upcast_attention", False),
            addition_embed_type=embed_type,
            addition_time_embed_dim=embed_dim,
            projection_class_embeddings_input_dim=embed_in,
            time_cond_proj_dim=reader.integer("time_cond_proj_dim", None),
            class_embed_type=class_type,
            num_class_embeds=classes,
            conv_in_kernel=kernels[0],
            conv_out_kernel=kernels[1],
        )
        reader.finish(UNET_NO_EFFECT)
        return config


# ------------------------------------------------------------------------------------------ motion


@dataclass(frozen=True)
class MotionSpec:
    """The motion modules of a block.

    Attributes:
        layers: transformer blocks of each module.
        num_attention_heads: heads of each attention.
        norm_num_groups: of each module's norm.
    """

    layers: tuple[int, ...]
    num_attention_heads: int
    norm_num_groups: int


@dataclass(frozen=True)
class MotionAdapterConfig:
    """Motion modules for a U-Net, as diffusers' MotionAdapter.

    Values that a file may give once for all blocks are tuples with one entry for each block, from
    the input down. The way up has the same of each, and one module more.

    Attributes:
        block_out_channels: channels of each block.
        motion_layers_per_block: motion modules of each block of the way down.
        motion_transformer_layers_per_block: transformer blocks of each of them.
        motion_transformer_layers_per_mid_block: of the one in the middle.
        motion_num_attention_heads: heads of each attention.
        motion_norm_num_groups: of the norms.
        motion_max_seq_length: the most frames that it was made for.
        use_motion_mid_block: there is one in the middle.

    Source: Guo et al. 2023 (arXiv 2307.04725).
    """

    block_out_channels: tuple[int, ...]
    motion_layers_per_block: tuple[int, ...]
    motion_transformer_layers_per_block: tuple[int, ...]
    motion_transformer_layers_per_mid_block: int
    motion_num_attention_heads: tuple[int, ...]
    motion_norm_num_groups: int
    motion_max_seq_length: int
    use_motion_mid_block: bool

    def down(self, level: int) -> MotionSpec:
        """The motion modules of a block of the way down."""
        return self._spec(level, self.motion_layers_per_block[level])

    def up(self, level: int) -> MotionSpec:
        """The motion modules of the block of the way up at this level."""
        return self._spec(level, self.motion_layers_per_block[level] + 1)

    def mid(self) -> MotionSpec | None:
        """The motion modules in the middle; None: there are none."""
        if not self.use_motion_mid_block:
            return None
        layers = (self.motion_transformer_layers_per_mid_block,)
        return MotionSpec(layers, self.motion_num_attention_heads[-1], self.motion_norm_num_groups)

    def _spec(self, level: int, modules: int) -> MotionSpec:
        return MotionSpec(
            (self.motion_transformer_layers_per_block[level],) * modules,
            self.motion_num_attention_heads[level],
            self.motion_norm_num_groups,
        )

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], where: str = "motion_adapter/config.json"
    ) -> MotionAdapterConfig:
        """Read a config.json. Raises: ConfigError."""
        reader = _Reader(data, where, ("MotionAdapter",))
        # A U-Net has one layer with attention in the middle.
        reader.only("motion_mid_block_layers_per_block", 1, 1)
        # PIA's U-Net sees a picture beside the latents, through a first convolution of its own.
        reader.only("conv_in_channels", None, None)
        channels = reader.integers("block_out_channels", (320, 640, 1280, 1280))
        n = len(channels)
        config = cls(
            block_out_channels=channels,
            motion_layers_per_block=reader.per_block(
                "motion_layers_per_block", 2, n, most=MOST_LAYERS
            ),
            motion_transformer_layers_per_block=reader.per_block(
                "motion_transformer_layers_per_block", 1, n, most=MOST_LAYERS
            ),
            motion_transformer_layers_per_mid_block=reader.integer(
                "motion_transformer_layers_per_mid_block", 1, most=MOST_LAYERS
            ),
            motion_num_attention_heads=reader.per_block("motion_num_attention_heads", 8, n),
            motion_norm_num_groups=reader.integer("motion_norm_num_groups", 32),
            motion_max_seq_length=reader.integer("motion_max_seq_length", 32, most=1 << 12),
            use_motion_mid_block=reader.flag("use_motion_mid_block", True),
        )
        groups = config.motion_norm_num_groups
        for width, heads in zip(channels, config.motion_num_attention_heads, strict=True):
            if width % heads or width % 2:
                raise reader.fail(
                    "motion_num_attention_heads", heads, "divisors of block_out_channels"
                )
            if width % groups:
                raise reader.fail(
                    "motion_norm_num_groups", groups, "a divisor of all block_out_channels"
                )
        reader.finish({})
        return config


# --------------------------------------------------------------------------------------- ControlNet


@dataclass(frozen=True)
class ControlTypes:
    """What a ControlNet-Union has beside a ControlNet: it knows several types of picture.

    Attributes:
        count: number of types.
        channels: width of the vector that stands for a type.
        layers: transformer layers on it.
    """

    count: int
    channels: int
    layers: int


@dataclass(frozen=True)
class ControlNetConfig(UNet2DConditionConfig):
    """A ControlNet, as diffusers' ControlNetModel: the first half of a U-Net, and what it is shown.

    The fields of the U-Net's second half are there and mean nothing.

    Attributes:
        conditioning_channels: of the picture that it is shown.
        conditioning_embedding_out_channels: widths of the convolutions that bring the picture to
            the size of the latents; each after the first halves it.
        channel_order: "rgb", or "bgr" where the picture's channels are to be turned round.
        global_pool_conditions: what it adds is the same at every place (the mean over all).
        types: the types of picture that a ControlNet-Union knows; None for a ControlNet.

    Source: Zhang et al. 2023 (arXiv 2302.05543).
    """

    conditioning_channels: int
    conditioning_embedding_out_channels: tuple[int, ...]
    channel_order: str
    global_pool_conditions: bool
    types: ControlTypes | None

    @property
    def up_blocks(self) -> tuple[BlockSpec, ...]:
        """There are none."""
        return ()

    @property
    def residual_channels(self) -> tuple[int, ...]:
        """Channels of each output of the way down, and of the residual added to it."""
        channels = [self.block_out_channels[0]]
        for block in self.down_blocks:
            channels += [block.out_channels] * (block.num_layers + block.resample)
        return tuple(channels)

    @property
    def factor(self) -> int:
        """Pixels for each latent, along a side."""
        return int(2 ** (len(self.conditioning_embedding_out_channels) - 1))

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], where: str = "controlnet/config.json"
    ) -> ControlNetConfig:
        """Read a config.json. Raises: ConfigError."""
        reader = _Reader(data, where, ("ControlNetModel", "ControlNetUnionModel"))
        types = None
        if data.get("_class_name") == "ControlNetUnionModel":
            types = ControlTypes(
                reader.integer("num_control_type", 6),
                reader.integer("num_trans_channel", 320),
                reader.integer("num_trans_layer", 1),
            )
            reader.integer("num_trans_head", 8)  # no effect: see networks.controlnet
            reader.integer("num_proj_channel", 320)  # the first width, or the shapes do not fit
        own: dict[str, Any] = {
            "types": types,
            "conditioning_channels": reader.only("conditioning_channels", 3, 3),
            "conditioning_embedding_out_channels": reader.integers(
                "conditioning_embedding_out_channels", (16, 32, 96, 256)
            ),
            "channel_order": reader.only(
                "controlnet_conditioning_channel_order", "rgb", "rgb", "bgr"
            ),
            "global_pool_conditions": reader.flag("global_pool_conditions", False),
        }
        reader.only("num_class_embeds", None, None)
        reader.only("class_embed_type", None, None)
        down = reader.left.get("down_block_types")
        if isinstance(down, (list, tuple)):
            mirrored = [str(kind).replace("Down", "Up") for kind in reversed(down)]
            reader.left["up_block_types"] = mirrored
        if reader.left.get("mid_block_type", "") is None:
            raise reader.fail("mid_block_type", None, "a mid block")
        unet = UNet2DConditionConfig.from_dict(reader.left, where)
        return cls(**vars(unet), **own)


# -------------------------------------------------------------------------------------- T2I-Adapter

T2I_ADAPTERS = ("full_adapter", "full_adapter_xl", "light_adapter")


@dataclass(frozen=True)
class T2IAdapterConfig:
    """A T2I-Adapter, as diffusers' T2IAdapter.

    Attributes:
        in_channels: of the control picture: 3, or 1 for grey.
        channels: of the feature maps; of a light adapter without the last, which has the same.
        num_res_blocks: in each level.
        downscale_factor: pixels for each place of the largest map, along a side.
        adapter_type: a name of ``T2I_ADAPTERS``.

    Source: Mou et al. 2023 (arXiv 2302.08453).
    """

    in_channels: int
    channels: tuple[int, ...]
    num_res_blocks: int
    downscale_factor: int
    adapter_type: str

    @property
    def is_light(self) -> bool:
        """True for a light adapter."""
        return self.adapter_type == "light_adapter"

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of each feature map, the largest map first."""
        return (*self.channels, self.channels[-1]) if self.is_light else self.channels

    @property
    def halves(self) -> tuple[bool, ...]:
        """For each level, whether it halves the sides first."""
        levels = range(len(self.feature_channels))
        if self.adapter_type == "full_adapter_xl":
            return tuple(level == 2 for level in levels)
        return tuple(level > 0 for level in levels)

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], where: str = "t2i_adapter/config.json"
    ) -> T2IAdapterConfig:
        """Read a config.json. Raises: ConfigError."""
        reader = _Reader(data, where, ("T2IAdapter",))
        config = cls(
            in_channels=reader.only("in_channels", 3, 1, 3),
            channels=reader.integers("channels", (320, 640, 1280, 1280)),
            num_res_blocks=reader.integer("num_res_blocks", 2, most=MOST_LAYERS),
            downscale_factor=reader.integer("downscale_factor", 8, most=64),
            adapter_type=reader.only("adapter_type", "full_adapter", *T2I_ADAPTERS),
        )
        if config.is_light and any(width % 4 for width in config.channels):
            raise reader.fail("channels", list(config.channels), "multiples of 4")
        if config.adapter_type == "full_adapter_xl" and (
            config.channels[2:] != config.channels[2:3] * len(config.channels[2:])
        ):
            raise reader.fail("channels", list(config.channels), "the same from the third on")
        reader.finish({})
        return config


# -------------------------------------------------------------------------------- ControlNet-LLLite


@dataclass(frozen=True)
class LLLiteModuleConfig:
    """A module of a ControlNet-LLLite.

    Attributes:
        target: the linear layer of the U-Net whose input it changes, by its parameter name without
            ``.weight``.
        in_dim: width of that input.
        mlp_dim: width of the module.
        cond_emb_dim: width of the embedded control picture.
        depth: 1, 2 or 3: the picture is embedded at 1/8, 1/16 or 1/32 of its sides.
    """

    target: str
    in_dim: int
    mlp_dim: int
    cond_emb_dim: int
    depth: int

    @property
    def factor(self) -> int:
        """Pixels for each place of the embedded picture, along a side."""
        return int(4 * 2**self.depth)


@dataclass(frozen=True)
class LLLiteConfig:
    """A ControlNet-LLLite. Its files have no config: shapes tell all of it (``convert.lllite``).

    Source: networks/control_net_lllite.py of kohya's sd-scripts.
    """

    modules: tuple[LLLiteModuleConfig, ...]
    types: ClassVar[None] = None

    @property
    def factor(self) -> int:
        """Pixels of which both sides of the picture must be multiples."""
        return max(module.factor for module in self.modules)


# --------------------------------------------------------------------------------------- IP-Adapter


@dataclass(frozen=True)
class IPAdapterConfig:
    """An IP-Adapter. Its files have no config: shapes tell all of it (``convert.ip_adapter``).

    Attributes:
        kind: "image" (one vector of the picture becomes tokens), "plus" (all its vectors,
            resampled) or "full" (each becomes a token).
        feature_dim: width of CLIP's vectors: its projection_dim for "image", else its hidden_size.
        cross_attention_dim: width of the text states.
        num_tokens: for each picture; 0 for "full", where there are as many as vectors.
        layer_widths: of the U-Net's layers that attend to the text, in the order of the way down,
            the way up, the middle.
        hidden_dim, inner_dim, ff_dim, depth: of the resampler: width, that of its attention and its
            feed-forward, layers; 0 where there is none.

    Source: Ye et al. 2023 (arXiv 2308.06721).
    """

    kind: str
    feature_dim: int
    cross_attention_dim: int
    num_tokens: int
    layer_widths: tuple[int, ...]
    hidden_dim: int = 0
    inner_dim: int = 0
    ff_dim: int = 0
    depth: int = 0

    @property
    def num_attention_heads(self) -> int:
        """Heads of the resampler; all published ones are 64 wide."""
        return self.inner_dim // 64


# ------------------------------------------------------------------------------- U-Net, pixel space

UNET_2D_NO_EFFECT: dict[str, str] = {
    "dropout": _TRAINING,
    "num_train_timesteps": "belongs to time_embedding_type 'learned', which is refused",
}


@dataclass(frozen=True)
class UNet2DConfig:
    """The denoising U-Net without text, as diffusers' UNet2DModel.

    Here ``attention_head_dim`` is what it says, the width of a head; None is one head. A label, for
    the models that take one, is a number below ``num_class_embeds``, or any number
    (``class_embed_type`` timestep), or a vector as wide as the timestep embedding (identity).

    Source: Ho et al. 2020 (arXiv 2006.11239), appendix B.
    """

    sample_size: tuple[int, int] | None
    in_channels: int
    out_channels: int
    flip_sin_to_cos: bool
    freq_shift: float
    time_embedding_dim: int | None
    down_block_types: tuple[str, ...]
    mid_block_type: str | None
    up_block_types: tuple[str, ...]
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    downsample_padding: int
    attention_head_dim: int | None
    norm_num_groups: int
    attn_norm_num_groups: int | None
    norm_eps: float
    resnet_time_scale_shift: str
    add_attention: bool
    class_embed_type: str | None
    num_class_embeds: int | None

    @property
    def time_embed_dim(self) -> int:
        """Width of the timestep embedding that the resnets are given."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def takes_label(self) -> bool:
        """Return True if the model is conditioned on a class."""
        return self.class_embed_type is not None or self.num_class_embeds is not None

    @property
    def mid_norm_num_groups(self) -> int | None:
        """Groups of the group norm before the mid block's attention; None where there is none."""
        if self.attn_norm_num_groups is None and self.resnet_time_scale_shift == "default":
            return self.norm_num_groups
        return self.attn_norm_num_groups

    @property
    def down_blocks(self) -> tuple[BlockSpec, ...]:
        """The down path, from the input on."""
        specs: list[BlockSpec] = []
        channels = self.block_out_channels[0]
        for kind, width in zip(self.down_block_types, self.block_out_channels, strict=True):
            specs.append(
                BlockSpec(
                    type=kind,
                    in_channels=channels,
                    out_channels=width,
                    num_layers=self.layers_per_block,
                    num_attention_heads=self._heads(width),
                    resample=len(specs) < len(self.block_out_channels) - 1,
                )
            )
            channels = width
        return tuple(specs)

    @property
    def mid_block(self) -> BlockSpec | None:
        """The block at the lowest resolution; None for models without one."""
        if self.mid_block_type is None:
            return None
        width = self.block_out_channels[-1]
        return BlockSpec(
            type="UNetMidBlock2DAttn" if self.add_attention else "UNetMidBlock2D",
            in_channels=width,
            out_channels=width,
            num_layers=2,
            num_attention_heads=self._heads(width),
        )

    @property
    def up_blocks(self) -> tuple[BlockSpec, ...]:
        """The up path, from the lowest resolution on."""
        widths = self.block_out_channels
        path = _up_path(widths, (self.layers_per_block,) * len(widths))
        return tuple(
            BlockSpec(
                type=kind,
                in_channels=channels,
                out_channels=out,
                num_layers=len(skips),
                skip_channels=skips,
                num_attention_heads=self._heads(out),
                resample=level > 0,
            )
            for kind, (level, channels, out, skips) in zip(self.up_block_types, path, strict=True)
        )

    def _heads(self, width: int) -> int:
        return width // (self.attention_head_dim or width)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "unet/config.json") -> UNet2DConfig:
        """Read a config.json. Raises: ConfigError."""
        reader = _Reader(data, where, ("UNet2DModel",))
        only = reader.only
        # Variants of the class that belong to other models (score SDE, consistency models).
        only("center_input_sample", False, False)
        only("act_fn", "silu", "silu", "swish")
        only("mid_block_scale_factor", 1, 1, 1.0)
        only("time_embedding_type", "positional", "positional")
        only("downsample_type", "conv", "conv")
        only("upsample_type", "conv", "conv")

        channels = reader.integers("block_out_channels", (224, 448, 672, 896))
        down_kinds, up_kinds = ("DownBlock2D", "AttnDownBlock2D"), ("UpBlock2D", "AttnUpBlock2D")
        down = reader.choices("down_block_types", down_kinds[:1] + down_kinds[1:] * 3, down_kinds)
        up = reader.choices("up_block_types", up_kinds[1:] * 3 + up_kinds[:1], up_kinds)
        for key, types in (("down_block_types", down), ("up_block_types", up)):
            if len(types) != len(channels):
                raise reader.fail(
                    key, list(types), f"one for each of the {len(channels)} block_out_channels"
                )
        groups = reader.integer("norm_num_groups", 32)
        if any(width % groups for width in channels):
            raise reader.fail("norm_num_groups", groups, "a divisor of all block_out_channels")
        attention_groups = reader.integer("attn_norm_num_groups", None)
        if attention_groups is not None and channels[-1] % attention_groups:
            raise reader.fail(
                "attn_norm_num_groups", attention_groups, "a divisor of the last block_out_channels"
            )
        # An absent key is the class's 8, a null one head.
        default = None if "attention_head_dim" in data else 8
        head_dim = reader.integer("attention_head_dim", default)
        config = cls(
            sample_size=reader.size("sample_size"),
            in_channels=reader.integer("in_channels", 3),
            out_channels=reader.integer("out_channels", 3),
            flip_sin_to_cos=reader.flag("flip_sin_to_cos", True),
            freq_shift=reader.number("freq_shift", 0),
            time_embedding_dim=reader.integer("time_embedding_dim", None),
            down_block_types=down,
            mid_block_type=only("mid_block_type", "UNetMidBlock2D", None, "UNetMidBlock2D"),
            up_block_types=up,
            block_out_channels=channels,
            layers_per_block=reader.integer("layers_per_block", 2, most=MOST_LAYERS),
            downsample_padding=only("downsample_padding", 1, 0, 1),
            attention_head_dim=head_dim,
            norm_num_groups=groups,
            attn_norm_num_groups=attention_groups,
            norm_eps=reader.number("norm_eps", 1e-5),
            resnet_time_scale_shift=only(
                "resnet_time_scale_shift", "default", "default", "scale_shift"
            ),
            add_attention=reader.flag("add_attention", True),
            class_embed_type=only("class_embed_type", None, None, "timestep", "identity"),
            num_class_embeds=reader.integer("num_class_embeds", None),
        )
        reader.finish(UNET_2D_NO_EFFECT)
        blocks = (*config.down_blocks, config.mid_block, *config.up_blocks)
        for width in {b.out_channels for b in blocks if b is not None and "Attn" in b.type}:
            if width % (head_dim or width):
                raise reader.fail(
                    "attention_head_dim", head_dim, f"a divisor of the {width} block_out_channels"
                )
        return config


# ---------------------------------------------------------------------------------------------- VAE

VAE_NO_EFFECT: dict[str, str] = {}


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """The autoencoder between pixels and latents, as diffusers' AutoencoderKL.

    Latents that the U-Net sees: ``(z - shift_factor) * scaling_factor``, or, where the file gives
    ``latents_mean`` and ``latents_std``, ``(z - mean) * scaling_factor / std``.

    ``force_upcast`` asks for float32, in place of half precision; None: the file does not say.

    Source: Rombach et al. 2022.
    """

    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    norm_num_groups: int
    sample_size: int
    scaling_factor: float
    shift_factor: float | None
    latents_mean: tuple[float, ...] | None
    latents_std: tuple[float, ...] | None
    force_upcast: bool | None
    use_quant_conv: bool
    use_post_quant_conv: bool
    mid_block_add_attention: bool

    @property
    def factor(self) -> int:
        """Pixels for each latent, along a side."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], where: str = "vae/config.json"
    ) -> AutoencoderKLConfig:
        """Read a config.json. Raises: ConfigError."""
        reader = _Reader(data, where, ("AutoencoderKL",))
        channels = reader.integers("block_out_channels", (64,))
        for key, kind in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            types = reader.choices(key, (kind,), (kind,))
            if len(types) != len(channels):
                raise reader.fail(
                    key, list(types), f"one for each of the {len(channels)} block_out_channels"
                )
        reader.only("act_fn", "silu", "silu", "swish")
        groups = reader.integer("norm_num_groups", 32)
        if any(width % groups for width in channels):
            raise reader.fail("norm_num_groups", groups, "a divisor of all block_out_channels")
        latent_channels = reader.integer("latent_channels", 4)
        moments: dict[str, tuple[float, ...] | None] = {}
        for key in ("latents_mean", "latents_std"):
            value = reader.take(key, None)
            if value is not None and not (
                isinstance(value, (list, tuple))
                and len(value) == latent_channels
                and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
            ):
                raise reader.fail(key, value, f"a list of {latent_channels} numbers")
            moments[key] = None if value is None else tuple(float(v) for v in value)
        if (moments["latents_mean"] is None) != (moments["latents_std"] is None):
            raise reader.fail("latents_mean", moments["latents_mean"], "latents_std beside it")
        sample_size = reader.take("sample_size", 32)
        if isinstance(sample_size, (list, tuple)) and sample_size:
            sample_size = sample_size[0]
        if not _is_int(sample_size):
            raise reader.fail("sample_size", sample_size, "a whole number")
        config = cls(
            in_channels=reader.only("in_channels", 3, 3),
            out_channels=reader.only("out_channels", 3, 3),
            block_out_channels=channels,
            layers_per_block=reader.integer("layers_per_block", 1, most=MOST_LAYERS),
            latent_channels=latent_channels,
            norm_num_groups=groups,
            sample_size=sample_size,
            scaling_factor=reader.number("scaling_factor", 0.18215),
            shift_factor=reader.number("shift_factor", None),
            latents_mean=moments["latents_mean"],
            latents_std=moments["latents_std"],
            force_upcast=reader.flag("force_upcast", None),
            use_quant_conv=reader.flag("use_quant_conv", True),
            use_post_quant_conv=reader.flag("use_post_quant_conv", True),
            mid_block_add_attention=reader.flag("mid_block_add_attention", True),
        )
        reader.finish(VAE_NO_EFFECT)
        return config


TINY_VAE_NO_EFFECT: dict[str, str] = {
    "block_out_channels": "a copy of decoder_block_out_channels",
    "force_upcast": "always false for this class",
    "latent_magnitude": "used where latents are stored as 8-bit pictures, not in encode or decode",
    "latent_shift": "belongs to latent_magnitude",
}


@dataclass(frozen=True)
class AutoencoderTinyConfig:
    """The small autoencoder TAESD (Bohan 2023), as diffusers' AutoencoderTiny.

    All blocks of a half have the same width. Latents are those that the U-Net sees, unless the
    file gives a scaling_factor or shift_factor; they are no distribution.
    """

    in_channels: int
    out_channels: int
    encoder_block_out_channels: tuple[int, ...]
    decoder_block_out_channels: tuple[int, ...]
    num_encoder_blocks: tuple[int, ...]
    num_decoder_blocks: tuple[int, ...]
    latent_channels: int
    scaling_factor: float
    shift_factor: float
    has_encoder: bool = True
    """False for the decoder alone, which draws but cannot start from a picture."""
    # What AutoencoderKLConfig has beside these, at what it means here.
    force_upcast: ClassVar[bool] = False
    latents_mean: ClassVar[None] = None
    latents_std: ClassVar[None] = None

    @property
    def factor(self) -> int:
        """Pixels for each latent, along a side."""
        return int(2 ** (len(self.decoder_block_out_channels) - 1))

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], where: str = "vae/config.json"
    ) -> AutoencoderTinyConfig:
        """Read a config.json. Raises: ConfigError."""
        reader = _Reader(data, where, ("AutoencoderTiny",))
        reader.only("act_fn", "relu", "relu")
        reader.only("upsample_fn", "nearest", "nearest")
        reader.only("upsampling_scaling_factor", 2, 2)
        halves: dict[str, tuple[int, ...]] = {}
        for half, blocks in (("encoder", (1, 3, 3, 3)), ("decoder", (3, 3, 3, 1))):
            widths = reader.integers(f"{half}_block_out_channels", (64, 64, 64, 64))
            if len(set(widths)) > 1:
                raise reader.fail(f"{half}_block_out_channels", list(widths), "one width for all")
            halves[half] = widths
            counts = reader.integers(f"num_{half}_blocks", blocks)
            if len(counts) != len(halves["encoder"]) or len(widths) != len(halves["encoder"]):
                raise reader.fail(
                    f"num_{half}_blocks",
                    list(counts),
                    "as many entries as encoder_block_out_channels and decoder_block_out_channels",
                )
            if max(counts) > MOST_LAYERS:
                raise reader.fail(f"num_{half}_blocks", list(counts), f"at most {MOST_LAYERS}")
            halves[f"{half} blocks"] = counts
        config = cls(
            in_channels=reader.only("in_channels", 3, 3),
            out_channels=reader.only("out_channels", 3, 3),
            encoder_block_out_channels=halves["encoder"],
            decoder_block_out_channels=halves["decoder"],
            num_encoder_blocks=halves["encoder blocks"],
            num_decoder_blocks=halves["decoder blocks"],
            latent_channels=reader.integer("latent_channels", 4),
            scaling_factor=reader.number("scaling_factor", 1.0),
            shift_factor=reader.number("shift_factor", 0.0),
        )
        reader.finish(TINY_VAE_NO_EFFECT)
        return config


# ------------------------------------------------------------------------------------ upscalers


@dataclass(frozen=True)
class RRDBNetConfig:
    """An ESRGAN network (``networks.upscaler.RRDBNet``). Its files have no config: see
    ``convert.upscaler``.

    Attributes:
        width, growth: channels of the features, and of each convolution in a dense block.
        blocks: number of RRDBs.
        doublings: times that the features double their sides.
        shuffle: side of the squares of pixels that the network reads as one; 1: it reads pixels.
        plus: ESRGAN+, whose dense blocks have one more shortcut.
    """

    width: int = 64
    growth: int = 32
    blocks: int = 23
    doublings: int = 2
    shuffle: int = 1
    plus: bool = False

    @property
    def scale(self) -> int:
        """How many times larger the result is."""
        return 2**self.doublings // self.shuffle

    @property
    def reach(self) -> int:
        """Pixels of the small picture around a pixel that its results depend on, at most."""
        at_the_end = sum(2.0**-i for i in range(1, self.doublings + 1)) + 2 * 2.0**-self.doublings
        return self.shuffle * math.ceil(2 + 15 * self.blocks + at_the_end)

    @property
    def description(self) -> str:
        """Its structure in words."""
        name = "ESRGAN+" if self.plus else "ESRGAN"
        reads = f", reads squares of {self.shuffle}x{self.shuffle} pixels" * (self.shuffle > 1)
        return f"{name} (RRDBNet), {self.blocks} blocks of {self.width} channels{reads}"


@dataclass(frozen=True)
class CompactConfig:
    """A compact network of Real-ESRGAN (``networks.upscaler.CompactNet``).

    Attributes:
        width: channels of the features.
        convolutions: number of convolutions between the first and the last.
        scale: how many times larger the result is.
    """

    width: int = 64
    convolutions: int = 32
    scale: int = 4
    shuffle: ClassVar[int] = 1

    @property
    def reach(self) -> int:
        """Pixels of the small picture around a pixel that its results depend on, at most."""
        return self.convolutions + 2

    @property
    def description(self) -> str:
        """Its structure in words."""
        return (
            f"Real-ESRGAN compact (SRVGGNetCompact), {self.convolutions} convolutions of "
            f"{self.width} channels"
        )


# --------------------------------------------------------------------------- Stable Video Diffusion


@dataclass(frozen=True)
class UNetSpatioTemporalConfig(UNet2DConditionConfig):
    """The U-Net of Stable Video Diffusion, as diffusers' UNetSpatioTemporalConditionModel.

    Its blocks are those of a picture's U-Net, each with a layer among frames; ``Block2D`` in the
    names of types stands for ``BlockSpatioTemporal``.

    Attributes:
        num_frames: of the videos that it was trained on.

    Source: Blattmann et al. 2023 (arXiv 2311.15127).
    """

    num_frames: int = field(kw_only=True)

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], where: str = "unet/config.json"
    ) -> UNetSpatioTemporalConfig:
        """Read a config.json. Raises: ConfigError."""
        reader = _Reader(data, where, ("UNetSpatioTemporalConditionModel",))
        own: dict[str, Any] = {"norm_num_groups": 32, "use_linear_projection": True}
        for way, types in (("down", _DOWN_TYPES), ("up", _UP_TYPES)):
            names = tuple(name.replace("2D", "SpatioTemporal") for name in types)
            default = (names[1],) * 3 + names[:1]
            found = reader.choices(
                f"{way}_block_types", default[:: 1 if way == "down" else -1], names
            )
            own[f"{way}_block_types"] = [name.replace("SpatioTemporal", "2D") for name in found]
        for key, value in (
            ("in_channels", 8),
            ("num_attention_heads", [5, 10, 20, 20]),
            ("cross_attention_dim", 1024),
            ("addition_time_embed_dim", 256),
            ("projection_class_embeddings_input_dim", 768),
        ):
            own[key] = reader.take(key, value)
        numbers, width = (
            own["addition_time_embed_dim"],
            own["projection_class_embeddings_input_dim"],
        )
        if not _is_int(numbers) or width != 3 * numbers:
            raise reader.fail(
                "projection_class_embeddings_input_dim", width, "3 times addition_time_embed_dim"
            )
        frames = reader.integer("num_frames", 25, most=1024)
        unet = UNet2DConditionConfig.from_dict(reader.left | own, where)
        return cls(**vars(unet), num_frames=frames)


@dataclass(frozen=True)
class AutoencoderKLTemporalDecoderConfig(AutoencoderKLConfig):
    """The autoencoder of Stable Video Diffusion, as diffusers' AutoencoderKLTemporalDecoder.

    Source: Blattmann et al. 2023 (arXiv 2311.15127).
    """

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], where: str = "vae/config.json"
    ) -> AutoencoderKLTemporalDecoderConfig:
        """Read a config.json. Raises: ConfigError."""
        reader = _Reader(data, where, ("AutoencoderKLTemporalDecoder",))
        widths = reader.left.get("block_out_channels", (64,))
        count = len(widths) if isinstance(widths, (list, tuple)) else 1
        own = {"up_block_types": ["UpDecoderBlock2D"] * count, "use_post_quant_conv": False}
        own |= {"force_upcast": reader.flag("force_upcast", True)}
        for key in own.keys() & reader.left.keys():
            raise reader.fail(key, reader.left[key], "no such key in this class")
        return cls(**vars(AutoencoderKLConfig.from_dict(reader.left | own, where)))


VAEConfig = AutoencoderKLConfig | AutoencoderTinyConfig
UNetConfig = UNet2DConditionConfig | UNet2DConfig
UpscalerConfig = RRDBNetConfig | CompactConfig
ComponentConfig = (
    CLIPTextConfig
    | CLIPVisionConfig
    | ImageNormalizerConfig
    | CCProjectionConfig
    | UNetConfig
    | ControlNetConfig
    | MotionAdapterConfig
    | T2IAdapterConfig
    | LLLiteConfig
    | IPAdapterConfig
    | VAEConfig
    | UpscalerConfig
)


def read_unet(data: Mapping[str, Any], where: str = "unet/config.json") -> UNetConfig:
    """The config of a U-Net, of the class that it names. Raises: ConfigError."""
    kinds = {
        "UNet2DModel": UNet2DConfig,
        "UNetSpatioTemporalConditionModel": UNetSpatioTemporalConfig,
    }
    kind: Any = kinds.get(str(data.get("_class_name")), UNet2DConditionConfig)
    found: UNetConfig = kind.from_dict(data, where)
    return found


def read_vae(data: Mapping[str, Any], where: str = "vae/config.json") -> VAEConfig:
    """The config of a VAE, of the class that it names. Raises: ConfigError."""
    kinds = {
        "AutoencoderTiny": AutoencoderTinyConfig,
        "AutoencoderKLTemporalDecoder": AutoencoderKLTemporalDecoderConfig,
    }
    kind: Any = kinds.get(str(data.get("_class_name")), AutoencoderKLConfig)
    found: VAEConfig = kind.from_dict(data, where)
    return found
