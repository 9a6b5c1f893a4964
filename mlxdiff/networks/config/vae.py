"""VAEs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mlxdiff.networks.config.reader import MOST_LAYERS, ConfigReader, is_int

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
        reader = ConfigReader(data, where, ("AutoencoderKL",))
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
        if not is_int(sample_size):
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
        reader = ConfigReader(data, where, ("AutoencoderTiny",))
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
