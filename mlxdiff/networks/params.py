"""What a checkpoint must hold, exactly: name and shape of every tensor, worked out from the config.

Names are diffusers' and transformers' parameter names (the text encoder's with the ``text_model.``
prefix of published files). Shapes are in the layout of the converted folder: linear (out, in),
convolution (out, kH, kW, in). The converter, both model implementations and the tests are held to
this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

from mlxdiff.networks.config import (
    AutoencoderKLConfig,
    AutoencoderTinyConfig,
    BlockSpec,
    CLIPTextConfig,
    CLIPVisionConfig,
    ComponentConfig,
    ControlNetConfig,
    IPAdapterConfig,
    UNet2DConditionConfig,
    UNet2DConfig,
    UNetConfig,
)
from mlxdiff.weights.tensors import Shape, raise_faults


class _Names:
    """Collects names and shapes; each method adds one kind of layer."""

    def __init__(self) -> None:
        self.shapes: dict[str, Shape] = {}

    def linear(self, name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        self.shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            self.shapes[f"{name}.bias"] = (outputs,)

    def conv(
        self, name: str, inputs: int, outputs: int, kernel: int = 3, bias: bool = True
    ) -> None:
        self.shapes[f"{name}.weight"] = (outputs, kernel, kernel, inputs)
        if bias:
            self.shapes[f"{name}.bias"] = (outputs,)

    def norm(self, name: str, channels: int) -> None:
        self.shapes[f"{name}.weight"] = (channels,)
        self.shapes[f"{name}.bias"] = (channels,)

    def resnet(
        self, name: str, inputs: int, outputs: int, temb: int | None, scale_shift: bool = False
    ) -> None:
        self.norm(f"{name}.norm1", inputs)
        self.conv(f"{name}.conv1", inputs, outputs)
        if temb is not None:
            self.linear(f"{name}.time_emb_proj", temb, (1 + scale_shift) * outputs)
        self.norm(f"{name}.norm2", outputs)
        self.conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            self.conv(f"{name}.conv_shortcut", inputs, outputs, 1)

    def attention(self, name: str, width: int, context: int, bias: bool = False) -> None:
        self.linear(f"{name}.to_q", width, width, bias)
        self.linear(f"{name}.to_k", context, width, bias)
        self.linear(f"{name}.to_v", context, width, bias)
        self.linear(f"{name}.to_out.0", width, width)

    def transformer(
        self, name: str, block: BlockSpec, layers: int, linear_projection: bool
    ) -> None:
        width = block.out_channels
        text = block.cross_attention_dim
        self.norm(f"{name}.norm", width)
        project = self.linear if linear_projection else lambda n, i, o: self.conv(n, i, o, 1)
        project(f"{name}.proj_in", width, width)
        for i in range(layers):
            inner = f"{name}.transformer_blocks.{i}"
            self.norm(f"{inner}.norm1", width)
            self.attention(f"{inner}.attn1", width, text if block.only_cross_attention else width)
            self.norm(f"{inner}.norm2", width)
            self.attention(f"{inner}.attn2", width, text)
            self.norm(f"{inner}.norm3", width)
            self.linear(f"{inner}.ff.net.0.proj", width, 8 * width)  # GEGLU: values and gates
            self.linear(f"{inner}.ff.net.2", 4 * width, width)
        project(f"{name}.proj_out", width, width)


def clip_parameters(config: CLIPTextConfig) -> dict[str, Shape]:
    """Parameters of CLIPTextModel, or of CLIPTextModelWithProjection."""
    names, width = _Names(), config.hidden_size
    names.shapes["text_model.embeddings.token_embedding.weight"] = (config.vocab_size, width)
    names.shapes["text_model.embeddings.position_embedding.weight"] = (
        config.max_position_embeddings,
        width,
    )
    _clip_layers(names, "text_model", config)
    names.norm("text_model.final_layer_norm", width)
    if config.with_projection:
        names.linear("text_projection", width, config.projection_dim, bias=False)
    return names.shapes


def clip_vision_parameters(config: CLIPVisionConfig) -> dict[str, Shape]:
    """Parameters of CLIPVisionModelWithProjection."""
    names, width, patch = _Names(), config.hidden_size, config.patch_size
    embeddings = "vision_model.embeddings"
    names.shapes[f"{embeddings}.class_embedding"] = (width,)
    names.conv(f"{embeddings}.patch_embedding", 3, width, patch, bias=False)
    tokens = (config.image_size // patch) ** 2 + 1
    names.shapes[f"{embeddings}.position_embedding.weight"] = (tokens, width)
    names.norm("vision_model.pre_layrnorm", width)
    _clip_layers(names, "vision_model", config)
    names.norm("vision_model.post_layernorm", width)
    names.linear("visual_projection", width, config.projection_dim, bias=False)
    return names.shapes


def _clip_layers(names: _Names, half: str, config: CLIPTextConfig | CLIPVisionConfig) -> None:
    width = config.hidden_size
    for i in range(config.num_hidden_layers):
        layer = f"{half}.encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            names.linear(f"{layer}.self_attn.{part}", width, width)
        names.norm(f"{layer}.layer_norm1", width)
        names.linear(f"{layer}.mlp.fc1", width, config.intermediate_size)
        names.linear(f"{layer}.mlp.fc2", config.intermediate_size, width)
        names.norm(f"{layer}.layer_norm2", width)


def ip_adapter_parameters(config: IPAdapterConfig) -> dict[str, Shape]:
    """Parameters of an IP-Adapter, its projection under diffusers' names."""
    names, text = _Names(), config.cross_attention_dim
    if config.kind == "image":
        names.linear("image_proj.image_embeds", config.feature_dim, config.num_tokens * text)
        names.norm("image_proj.norm", text)
    elif config.kind == "full":
        names.linear("image_proj.ff.net.0.proj", config.feature_dim, config.feature_dim)
        names.linear("image_proj.ff.net.2", config.feature_dim, text)
        names.norm("image_proj.norm", text)
    else:
        dim, inner = config.hidden_dim, config.inner_dim
        names.shapes["image_proj.latents"] = (1, config.num_tokens, dim)
        names.linear("image_proj.proj_in", config.feature_dim, dim)
        for i in range(config.depth):
            layer = f"image_proj.layers.{i}"
            names.norm(f"{layer}.ln0", dim)
            names.norm(f"{layer}.ln1", dim)
            for part in ("to_q", "to_k", "to_v"):
                names.linear(f"{layer}.attn.{part}", dim, inner, bias=False)
            names.linear(f"{layer}.attn.to_out.0", inner, dim, bias=False)
            names.norm(f"{layer}.ff.0", dim)
            names.linear(f"{layer}.ff.1.net.0.proj", dim, config.ff_dim, bias=False)
            names.linear(f"{layer}.ff.1.net.2", config.ff_dim, dim, bias=False)
        names.linear("image_proj.proj_out", dim, text)
        names.norm("image_proj.norm_out", text)
    for i, width in enumerate(config.layer_widths):
        for part in ("to_k_ip", "to_v_ip"):
            names.linear(f"ip_adapter.{2 * i + 1}.{part}", text, width, bias=False)
    return names.shapes


def unet_parameters(config: UNet2DConditionConfig) -> dict[str, Shape]:
    """Parameters of UNet2DConditionModel."""
    names, first = _unet_with_text(config), config.block_out_channels[0]
    names.norm("conv_norm_out", first)
    names.conv("conv_out", first, config.out_channels, config.conv_out_kernel)
    return names.shapes


def controlnet_parameters(config: ControlNetConfig) -> dict[str, Shape]:
    """Parameters of ControlNetModel."""
    names, first = _unet_with_text(config), config.block_out_channels[0]
    embedding, widths = "controlnet_cond_embedding", config.conditioning_embedding_out_channels
    names.conv(f"{embedding}.conv_in", config.conditioning_channels, widths[0])
    for i, (width, out) in enumerate(pairwise(widths)):
        names.conv(f"{embedding}.blocks.{2 * i}", width, width)
        names.conv(f"{embedding}.blocks.{2 * i + 1}", width, out)
    names.conv(f"{embedding}.conv_out", widths[-1], first)
    for i, channels in enumerate(config.residual_channels):
        names.conv(f"controlnet_down_blocks.{i}", channels, channels, 1)
    last = config.block_out_channels[-1]
    names.conv("controlnet_mid_block", last, last, 1)
    return names.shapes


def _unet_with_text(config: UNet2DConditionConfig) -> _Names:
    """What a U-Net and a ControlNet have in common."""
    names, temb = _Names(), config.time_embed_dim
    first = config.block_out_channels[0]
    names.conv("conv_in", config.in_channels, first, config.conv_in_kernel)
    names.linear("time_embedding.linear_1", first, temb)
    if config.time_cond_proj_dim is not None:
        names.linear("time_embedding.cond_proj", config.time_cond_proj_dim, first, bias=False)
    names.linear("time_embedding.linear_2", temb, temb)
    if config.projection_class_embeddings_input_dim is not None and config.addition_embed_type:
        names.linear("add_embedding.linear_1", config.projection_class_embeddings_input_dim, temb)
        names.linear("add_embedding.linear_2", temb, temb)
    if config.num_class_embeds is not None:
        names.shapes["class_embedding.weight"] = (config.num_class_embeds, temb)

    def add_attentions(name: str, block: BlockSpec) -> None:
        for i, layers in enumerate(block.transformer_layers):
            names.transformer(f"{name}.attentions.{i}", block, layers, config.use_linear_projection)

    _unet_path(names, config, add_attentions)
    return names


def unet_2d_parameters(config: UNet2DConfig) -> dict[str, Shape]:
    """Parameters of UNet2DModel, with the attention names of today's diffusers."""
    names, temb = _Names(), config.time_embed_dim
    first = config.block_out_channels[0]
    names.conv("conv_in", config.in_channels, first)
    names.linear("time_embedding.linear_1", first, temb)
    names.linear("time_embedding.linear_2", temb, temb)
    if config.class_embed_type == "timestep":
        names.linear("class_embedding.linear_1", first, temb)
        names.linear("class_embedding.linear_2", temb, temb)
    elif config.class_embed_type is None and config.num_class_embeds is not None:
        names.shapes["class_embedding.weight"] = (config.num_class_embeds, temb)

    def add_attentions(name: str, block: BlockSpec) -> None:
        count = {"UNetMidBlock2DAttn": 1, "AttnDownBlock2D": block.num_layers}
        count["AttnUpBlock2D"] = block.num_layers
        for i in range(count.get(block.type, 0)):
            if name != "mid_block" or config.mid_norm_num_groups is not None:
                names.norm(f"{name}.attentions.{i}.group_norm", block.out_channels)
            names.attention(
                f"{name}.attentions.{i}", block.out_channels, block.out_channels, bias=True
            )

    _unet_path(names, config, add_attentions)
    names.norm("conv_norm_out", first)
    names.conv("conv_out", first, config.out_channels)
    return names.shapes


def _unet_path(
    names: _Names, config: UNetConfig, add_attentions: Callable[[str, BlockSpec], None]
) -> None:
    """The down path, the mid block and the up path of a U-Net."""
    scale_shift = config.resnet_time_scale_shift == "scale_shift"

    def add_block(name: str, block: BlockSpec) -> None:
        channels = block.in_channels
        for i, skip in enumerate(block.skip_channels or (0,) * block.num_layers):
            names.resnet(
                f"{name}.resnets.{i}",
                channels + skip,
                block.out_channels,
                config.time_embed_dim,
                scale_shift,
            )
            channels = block.out_channels
        add_attentions(name, block)

    for i, block in enumerate(config.down_blocks):
        add_block(f"down_blocks.{i}", block)
        if block.resample:
            names.conv(
                f"down_blocks.{i}.downsamplers.0.conv", block.out_channels, block.out_channels
            )
    if config.mid_block is not None:
        add_block("mid_block", config.mid_block)
    for i, block in enumerate(config.up_blocks):
        add_block(f"up_blocks.{i}", block)
        if block.resample:
            names.conv(f"up_blocks.{i}.upsamplers.0.conv", block.out_channels, block.out_channels)


def vae_parameters(config: AutoencoderKLConfig) -> dict[str, Shape]:
    """Parameters of AutoencoderKL, with the attention names of today's diffusers."""
    names, widths = _Names(), config.block_out_channels
    latent = config.latent_channels

    def add_mid(name: str, width: int) -> None:
        for i in range(2):
            names.resnet(f"{name}.mid_block.resnets.{i}", width, width, None)
        if config.mid_block_add_attention:
            names.norm(f"{name}.mid_block.attentions.0.group_norm", width)
            names.attention(f"{name}.mid_block.attentions.0", width, width, bias=True)

    names.conv("encoder.conv_in", config.in_channels, widths[0])
    width = widths[0]
    for i, out in enumerate(widths):
        for j in range(config.layers_per_block):
            names.resnet(f"encoder.down_blocks.{i}.resnets.{j}", width, out, None)
            width = out
        if i < len(widths) - 1:
            names.conv(f"encoder.down_blocks.{i}.downsamplers.0.conv", out, out)
    add_mid("encoder", width)
    names.norm("encoder.conv_norm_out", width)
    names.conv("encoder.conv_out", width, 2 * latent)  # mean and log-variance
    if config.use_quant_conv:
        names.conv("quant_conv", 2 * latent, 2 * latent, 1)
    if config.use_post_quant_conv:
        names.conv("post_quant_conv", latent, latent, 1)
    width = widths[-1]
    names.conv("decoder.conv_in", latent, width)
    add_mid("decoder", width)
    for i, out in enumerate(reversed(widths)):
        for j in range(config.layers_per_block + 1):
            names.resnet(f"decoder.up_blocks.{i}.resnets.{j}", width, out, None)
            width = out
        if i < len(widths) - 1:
            names.conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", out, out)
    names.norm("decoder.conv_norm_out", width)
    names.conv("decoder.conv_out", width, config.out_channels)
    return names.shapes


def tiny_vae_parameters(config: AutoencoderTinyConfig) -> dict[str, Shape]:
    """Parameters of AutoencoderTiny; activations and upsampling have a place, but no names."""
    names, latent = _Names(), config.latent_channels

    def add_blocks(half: str, place: int, count: int, width: int) -> int:
        for i in range(place, place + count):
            for conv in (0, 2, 4):
                names.conv(f"{half}.layers.{i}.conv.{conv}", width, width)
        return place + count

    place = 0
    width = config.encoder_block_out_channels[0]
    for level, count in enumerate(config.num_encoder_blocks):
        if level == 0:
            names.conv("encoder.layers.0", config.in_channels, width)
        else:
            names.conv(f"encoder.layers.{place}", width, width, bias=False)
        place = add_blocks("encoder", place + 1, count, width)
    names.conv(f"encoder.layers.{place}", width, latent)

    width = config.decoder_block_out_channels[0]
    names.conv("decoder.layers.0", latent, width)
    place = 2
    for count in config.num_decoder_blocks[:-1]:
        place = add_blocks("decoder", place, count, width)
        names.conv(f"decoder.layers.{place + 1}", width, width, bias=False)
        place += 2
    place = add_blocks("decoder", place, config.num_decoder_blocks[-1], width)
    names.conv(f"decoder.layers.{place}", width, config.out_channels)
    return names.shapes


def expected_parameters(config: ComponentConfig) -> dict[str, Shape]:
    """Name and shape of every parameter that a component with this config has."""
    if isinstance(config, CLIPTextConfig):
        return clip_parameters(config)
    if isinstance(config, CLIPVisionConfig):
        return clip_vision_parameters(config)
    if isinstance(config, IPAdapterConfig):
        return ip_adapter_parameters(config)
    if isinstance(config, ControlNetConfig):
        return controlnet_parameters(config)
    if isinstance(config, UNet2DConditionConfig):
        return unet_parameters(config)
    if isinstance(config, UNet2DConfig):
        return unet_2d_parameters(config)
    if isinstance(config, AutoencoderTinyConfig):
        return tiny_vae_parameters(config)
    return vae_parameters(config)


def check_parameters(found: Mapping[str, Shape], config: ComponentConfig, where: str) -> None:
    """Hold tensors against ``expected_parameters(config)``: every name, every shape, nothing else.

    Raises: CheckpointError that lists at most ten names of each kind of fault, and how many there
        are.
    """
    expected = expected_parameters(config)
    raise_faults(
        where,
        missing=[name for name in expected if name not in found],
        unknown=[name for name in found if name not in expected],
        misshapen=[
            f"{name} is {found[name]}, expected {shape}"
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != shape
        ],
    )
