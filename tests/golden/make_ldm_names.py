"""Names and shapes in real single files, in the naming of latent diffusion: ldm-names/*.json.gz.

    python tests/golden/make_ldm_names.py

Built up in the order in which the code of the published models builds its modules (openaimodel.py,
attention.py, model.py of CompVis and Stability AI; OpenCLIP's text transformer), from the numbers
in their published yaml configs. Held here against diffusers: its own conversion of these names must
give exactly the names and shapes of names/*.json.gz, which diffusers' classes made. It has none for
Stable Video Diffusion: those names are equal to the state of Stability AI's own classes (VideoUNet,
Encoder, Decoder, VideoDecoder of generative-models), built from scripts/sampling/configs/svd.yaml.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.loaders import single_file_utils as reference

HERE = Path(__file__).parent
Names = dict[str, list[int]]


def linear(names: Names, name: str, inputs: int, outputs: int, bias: bool = True) -> None:
    names[f"{name}.weight"] = [outputs, inputs]
    if bias:
        names[f"{name}.bias"] = [outputs]


def conv(names: Names, name: str, inputs: int, outputs: int, kernel: int = 3) -> None:
    names[f"{name}.weight"] = [outputs, inputs, kernel, kernel]
    names[f"{name}.bias"] = [outputs]


def norm(names: Names, name: str, width: int) -> None:
    names[f"{name}.weight"] = [width]
    names[f"{name}.bias"] = [width]


def conv_among_frames(names: Names, name: str, width: int) -> None:
    names[f"{name}.weight"] = [width, width, 3, 1, 1]
    names[f"{name}.bias"] = [width]


def time_stack(names: Names, name: str, width: int, embedding: int | None) -> None:
    """The ResBlock among frames of a VideoResBlock; in the VAE without an embedding."""
    norm(names, f"{name}.in_layers.0", width)
    conv_among_frames(names, f"{name}.in_layers.2", width)
    if embedding is not None:
        linear(names, f"{name}.emb_layers.1", embedding, width)
    norm(names, f"{name}.out_layers.0", width)
    conv_among_frames(names, f"{name}.out_layers.3", width)


def res_block(
    names: Names, name: str, inputs: int, outputs: int, embedding: int, frames: bool = False
) -> None:
    norm(names, f"{name}.in_layers.0", inputs)
    conv(names, f"{name}.in_layers.2", inputs, outputs)
    linear(names, f"{name}.emb_layers.1", embedding, outputs)
    norm(names, f"{name}.out_layers.0", outputs)
    conv(names, f"{name}.out_layers.3", outputs, outputs)
    if inputs != outputs:
        conv(names, f"{name}.skip_connection", inputs, outputs, 1)
    if frames:
        time_stack(names, f"{name}.time_stack", outputs, embedding)
        names[f"{name}.time_mixer.mix_factor"] = [1]


def feed_forward(names: Names, name: str, width: int) -> None:
    linear(names, f"{name}.net.0.proj", width, 8 * width)
    linear(names, f"{name}.net.2", 4 * width, width)


def transformer(
    names: Names,
    name: str,
    width: int,
    context: int,
    depth: int,
    is_linear: bool,
    only_cross: bool = False,
    frames: bool = False,
) -> None:
    norm(names, f"{name}.norm", width)
    for place in ("proj_in", "proj_out"):
        if is_linear:
            linear(names, f"{name}.{place}", width, width)
        else:
            conv(names, f"{name}.{place}", width, width, 1)
    stacks = ("transformer_blocks", "time_stack") if frames else ("transformer_blocks",)
    for block in (f"{name}.{stack}.{i}" for stack in stacks for i in range(depth)):
        for attention, source in (("attn1", context if only_cross else width), ("attn2", context)):
            linear(names, f"{block}.{attention}.to_q", width, width, False)
            linear(names, f"{block}.{attention}.to_k", source, width, False)
            linear(names, f"{block}.{attention}.to_v", source, width, False)
            linear(names, f"{block}.{attention}.to_out.0", width, width)
        feed_forward(names, f"{block}.ff", width)
        for n in (1, 2, 3):
            norm(names, f"{block}.norm{n}", width)
        if ".time_stack." in block:
            norm(names, f"{block}.norm_in", width)
            feed_forward(names, f"{block}.ff_in", width)
    if frames:
        linear(names, f"{name}.time_pos_embed.0", width, 4 * width)
        linear(names, f"{name}.time_pos_embed.2", 4 * width, width)
        names[f"{name}.time_mixer.mix_factor"] = [1]


def unet(
    channels: int,
    multiples: list[int],
    depth_in: list[int],
    depth_out: list[int],
    depth_middle: int | None,
    context: int,
    is_linear: bool,
    inputs: int = 4,
    labels: int | None = None,
    classes: int | None = None,
    only_cross: tuple[int, ...] = (),
    frames: bool = False,
) -> Names:
    """UNetModel. Depths: one for each res block, 0 for no transformer; of the middle block None
    where it is one res block alone. only_cross: levels without self-attention. frames: VideoUNet,
    which has layers among frames."""
    names: Names = {}
    embedding = 4 * channels
    linear(names, "time_embed.0", channels, embedding)
    linear(names, "time_embed.2", embedding, embedding)
    if labels is not None:
        linear(names, "label_emb.0.0", labels, embedding)
        linear(names, "label_emb.0.2", embedding, embedding)
    if classes is not None:
        names["label_emb.weight"] = [classes, embedding]
    conv(names, "input_blocks.0.0", inputs, channels)
    skips, width, place = [channels], channels, 1
    depths = iter(depth_in)
    for level, multiple in enumerate(multiples):
        for _ in range(2):
            block = f"input_blocks.{place}.0"
            res_block(names, block, width, multiple * channels, embedding, frames)
            width = multiple * channels
            if depth := next(depths):
                block, cross = f"input_blocks.{place}.1", level in only_cross
                transformer(names, block, width, context, depth, is_linear, cross, frames)
            skips.append(width)
            place += 1
        if level < len(multiples) - 1:
            conv(names, f"input_blocks.{place}.0.op", width, width)
            skips.append(width)
            place += 1
    res_block(names, "middle_block.0", width, width, embedding, frames)
    if depth_middle is not None:
        block = "middle_block.1"
        transformer(names, block, width, context, depth_middle, is_linear, frames=frames)
        res_block(names, "middle_block.2", width, width, embedding, frames)
    place, depths = 0, iter(depth_out)
    for level, multiple in reversed(list(enumerate(multiples))):
        for i in range(3):
            inner = f"output_blocks.{place}"
            wide = width + skips.pop()
            res_block(names, f"{inner}.0", wide, multiple * channels, embedding, frames)
            width = multiple * channels
            nth = 1
            if depth := next(depths):
                cross = level in only_cross
                block = f"{inner}.1"
                transformer(names, block, width, context, depth, is_linear, cross, frames)
                nth = 2
            if level and i == 2:
                conv(names, f"{inner}.{nth}.conv", width, width)
            place += 1
    norm(names, "out.0", width)
    conv(names, "out.2", width, 4)
    return names


def vae(levels: int = 4) -> Names:
    """AutoencoderKL: 128 channels, multiples 1 2 4 (4), two res blocks, 4 latent channels."""
    names: Names = {}
    widths = [128, 256, 512, 512][:levels]

    def block(name: str, inputs: int, outputs: int) -> None:
        norm(names, f"{name}.norm1", inputs)
        conv(names, f"{name}.conv1", inputs, outputs)
        norm(names, f"{name}.norm2", outputs)
        conv(names, f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(names, f"{name}.nin_shortcut", inputs, outputs, 1)

    def middle(half: str) -> None:
        block(f"{half}.mid.block_1", 512, 512)
        norm(names, f"{half}.mid.attn_1.norm", 512)
        for part in ("q", "k", "v", "proj_out"):
            conv(names, f"{half}.mid.attn_1.{part}", 512, 512, 1)
        block(f"{half}.mid.block_2", 512, 512)

    conv(names, "encoder.conv_in", 3, 128)
    width = 128
    for i, out in enumerate(widths):
        for j in range(2):
            block(f"encoder.down.{i}.block.{j}", width, out)
            width = out
        if i < levels - 1:
            conv(names, f"encoder.down.{i}.downsample.conv", out, out)
    middle("encoder")
    norm(names, "encoder.norm_out", 512)
    conv(names, "encoder.conv_out", 512, 8)
    conv(names, "decoder.conv_in", 4, 512)
    middle("decoder")
    for i, out in reversed(list(enumerate(widths))):
        for j in range(3):
            block(f"decoder.up.{i}.block.{j}", width, out)
            width = out
        if i:
            conv(names, f"decoder.up.{i}.upsample.conv", out, out)
    norm(names, "decoder.norm_out", 128)
    conv(names, "decoder.conv_out", 128, 3)
    conv(names, "quant_conv", 8, 8, 1)
    conv(names, "post_quant_conv", 4, 4, 1)
    return names


def svd_vaes() -> Names:
    """The VAEs of Stable Video Diffusion, with their prefixes: the conditioner's, and the first
    stage's, whose decoder is a VideoDecoder and which has no quant_conv."""
    plain = vae()
    names = put("conditioner.embedders.3.encoder.", plain)
    names |= put("first_stage_model.", {n: s for n, s in plain.items() if "quant_conv" not in n})
    decoder = "first_stage_model.decoder."
    for name in [n for n in names if n.startswith(decoder) and n.endswith(".norm1.weight")]:
        block = name.removesuffix(".norm1.weight")
        width = names[f"{block}.conv1.weight"][0]
        time_stack(names, f"{block}.time_stack", width, None)
        names[f"{block}.mix_factor"] = [1]
    conv_among_frames(names, f"{decoder}conv_out.time_mix_conv", 3)
    return names


def openclip(width: int, layers: int) -> Names:
    """The text half of an OpenCLIP model; its projection is square."""
    names: Names = {"positional_embedding": [77, width], "text_projection": [width, width]}
    names["logit_scale"] = []
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        norm(names, f"{block}.ln_1", width)
        names[f"{block}.attn.in_proj_weight"] = [3 * width, width]
        names[f"{block}.attn.in_proj_bias"] = [3 * width]
        linear(names, f"{block}.attn.out_proj", width, width)
        norm(names, f"{block}.ln_2", width)
        linear(names, f"{block}.mlp.c_fc", width, 4 * width)
        linear(names, f"{block}.mlp.c_proj", 4 * width, width)
    names["token_embedding.weight"] = [49408, width]
    norm(names, "ln_final", width)
    return names


def clip_vision(width: int, layers: int, text: int, embedding: int) -> Names:
    """A CLIP without its text transformer: FrozenCLIPImageEmbedder, FrozenOpenCLIPImageEmbedder.

    text: width of what is left of the text encoder.
    """
    names: Names = {"positional_embedding": [77, text], "text_projection": [text, embedding]}
    names["logit_scale"] = []
    names["visual.class_embedding"] = [width]
    names["visual.positional_embedding"] = [257, width]
    names["visual.proj"] = [width, embedding]
    names["visual.conv1.weight"] = [width, 3, 14, 14]
    norm(names, "visual.ln_pre", width)
    for i in range(layers):
        block = f"visual.transformer.resblocks.{i}"
        norm(names, f"{block}.ln_1", width)
        names[f"{block}.attn.in_proj_weight"] = [3 * width, width]
        names[f"{block}.attn.in_proj_bias"] = [3 * width]
        linear(names, f"{block}.attn.out_proj", width, width)
        norm(names, f"{block}.ln_2", width)
        linear(names, f"{block}.mlp.c_fc", width, 4 * width)
        linear(names, f"{block}.mlp.c_proj", 4 * width, width)
    norm(names, "visual.ln_post", width)
    names["token_embedding.weight"] = [49408, text]
    norm(names, "ln_final", text)
    return names


def golden(name: str) -> Names:
    """Names and shapes of one component, as diffusers or transformers has them."""
    data = gzip.decompress((HERE / "names" / f"{name}.json.gz").read_bytes())
    return dict(json.loads(data)["shapes"])


def clip_l() -> Names:
    """OpenAI's text encoder, which LDM takes from transformers of 2022."""
    return golden("text_encoder.sd15") | {"text_model.embeddings.position_ids": [1, 77]}


def schedule() -> Names:
    """The buffers of LatentDiffusion.register_schedule that v1 and v2 files have."""
    names = """betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod
    sqrt_one_minus_alphas_cumprod log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod
    sqrt_recipm1_alphas_cumprod posterior_variance posterior_log_variance_clipped
    posterior_mean_coef1 posterior_mean_coef2""".split()
    return {name: [1000] for name in names}


def low_scale_schedule() -> Names:
    """The buffers of AbstractLowScaleModel, by which an upscaler's picture is noised."""
    return {name: shape for name, shape in schedule().items() if not name.startswith("posterior")}


def put(prefix: str, names: Names) -> Names:
    return {f"{prefix}{name}": shape for name, shape in names.items()}


SD = {
    "channels": 320,
    "multiples": [1, 2, 4, 4],
    "depth_in": [1] * 6 + [0] * 2,
    "depth_out": [0] * 3 + [1] * 9,
    "depth_middle": 1,
}
SD1 = SD | {"context": 768, "is_linear": False}
SD2 = SD | {"context": 1024, "is_linear": True}
UPSCALER = {
    "channels": 256,
    "multiples": [1, 2, 2, 4],
    "depth_in": [0] * 2 + [1] * 6,
    "depth_out": [1] * 9 + [0] * 3,
    "depth_middle": 1,
    "context": 1024,
    "is_linear": True,
    "inputs": 7,
    "classes": 1000,
    "only_cross": (0, 1, 2),
}
XL = {
    "channels": 320,
    "multiples": [1, 2, 4],
    "depth_in": [0, 0, 2, 2, 10, 10],
    "depth_out": [10, 10, 10, 2, 2, 2, 0, 0, 0],
    "depth_middle": 10,
    "context": 2048,
    "is_linear": True,
    "labels": 2816,
}
REFINER = {
    "channels": 384,
    "multiples": [1, 2, 4, 4],
    "depth_in": [0, 0, 4, 4, 4, 4, 0, 0],
    "depth_out": [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0],
    "depth_middle": 4,
    "context": 1280,
    "is_linear": True,
    "labels": 2560,
}
VIDEO = SD2 | {"inputs": 8, "labels": 768, "frames": True}
PRUNED = XL | {"depth_middle": None}
SSD_1B = PRUNED | {"depth_in": [0, 0, 2, 2, 4, 4], "depth_out": [4, 4, 10, 2, 1, 1, 0, 0, 0]}
VEGA = PRUNED | {"depth_in": [0, 0, 1, 1, 2, 2], "depth_out": [2, 2, 2, 1, 1, 1, 0, 0, 0]}


NO_SCHEDULE = ("sdxl", "sdxl-inpainting", "sdxl-refiner", "ssd-1b", "segmind-vega", "svd")


def models() -> dict[str, Names]:
    """Every model, with the prefixes of its file."""
    clip = put("cond_stage_model.transformer.", clip_l())
    h = put("cond_stage_model.model.", openclip(1024, 24))
    xl_text = put("conditioner.embedders.0.transformer.", clip_l())
    xl_text |= put("conditioner.embedders.1.model.", openclip(1280, 32))
    texts = {"sd15": clip, "sd2": h, "sdxl": xl_text}
    image = put("cond_stage_model.model.", clip_vision(1024, 24, 768, 768))
    texts["image"] = image
    texts["camera"] = image | {"cc_projection.weight": [768, 772], "cc_projection.bias": [768]}
    texts["unclip"] = h | put("embedder.model.", clip_vision(1280, 32, 1024, 1024))
    picture = clip_vision(1280, 32, 1024, 1024)
    texts["video"] = put("conditioner.embedders.0.open_clip.model.", picture)
    texts["refiner"] = put("conditioner.embedders.0.model.", openclip(1280, 32))
    which: dict[str, tuple[dict[str, Any], str]] = {
        "sd15": (SD1, "sd15"),
        "sd15-inpainting": (SD1 | {"inputs": 9}, "sd15"),
        "instruct-pix2pix": (SD1 | {"inputs": 8}, "sd15"),
        "sd21": (SD2, "sd2"),
        "sd2-inpainting": (SD2 | {"inputs": 9}, "sd2"),
        "x4-upscaler": (UPSCALER, "sd2"),
        "sdxl": (XL, "sdxl"),
        "sdxl-inpainting": (XL | {"inputs": 9}, "sdxl"),
        "sdxl-refiner": (REFINER, "refiner"),
        "ssd-1b": (SSD_1B, "sdxl"),
        "segmind-vega": (VEGA, "sdxl"),
        "sd21-unclip-h": (SD2 | {"labels": 2048}, "unclip"),
        "image-variation": (SD1, "image"),
        "zero123": (SD1 | {"inputs": 8}, "camera"),
        "svd": (VIDEO, "video"),
    }
    result = {}
    for name, (numbers, text) in which.items():
        names = put("model.diffusion_model.", unet(**numbers)) | texts[text]
        upscaler = name == "x4-upscaler"
        if name == "svd":
            names |= svd_vaes()
        else:
            names |= put("first_stage_model.", vae(3 if upscaler else 4))
        names |= schedule() if name not in NO_SCHEDULE else {}
        if name == "sd21-unclip-h":
            names |= put("noise_augmentor.", low_scale_schedule())
        result[name] = names | (put("low_scale_model.", low_scale_schedule()) if upscaler else {})
    return result


# ------------------------------------------------------------------------------ against diffusers


def check(model: str, names: Names) -> None:
    """diffusers' conversion of the names gives the names of its classes."""
    if model == "svd":
        return  # diffusers has none; see above
    tensors = {n: torch.empty(shape, device="meta") for n, shape in names.items()}
    same_unet = {"image-variation": "sd15", "zero123": "instruct-pix2pix"}.get(model, model)
    data = gzip.decompress((HERE / "names" / f"unet.{same_unet}.json.gz").read_bytes())
    config = json.loads(data)["config"]
    same(reference.convert_ldm_unet_checkpoint(dict(tensors), config), f"unet.{same_unet}")
    kind, levels = ("x4-upscaler", 3) if model == "x4-upscaler" else ("sd15", 4)
    blocks = {"down_block_types": [0] * levels, "up_block_types": [0] * levels}
    same(reference.convert_ldm_vae_checkpoint(dict(tensors), blocks), f"vae.{kind}")
    for prefix, text in (
        ("cond_stage_model.model.", "text_encoder.sd21"),
        ("conditioner.embedders.0.model.", "text_encoder.sdxl-2"),
        ("conditioner.embedders.1.model.", "text_encoder.sdxl-2"),
    ):
        if f"{prefix}transformer.resblocks.0.ln_1.weight" in names:
            model_of = SimpleNamespace(config=SimpleNamespace(hidden_size=1024))
            same(reference.convert_open_clip_checkpoint(model_of, tensors, prefix), text)


def same(converted: dict[str, Any], name: str) -> None:
    found = {k: list(v.shape) for k, v in converted.items()}
    expected = golden(name)
    missing, extra = set(expected) - set(found), set(found) - set(expected)
    assert found == expected, (name, sorted(missing)[:5], sorted(extra)[:5])


def main() -> None:
    """Write one file for each model."""
    folder = HERE / "ldm-names"
    folder.mkdir(exist_ok=True)
    for model, names in models().items():
        check(model, names)
        data = json.dumps(names, separators=(",", ":")).encode()
        path = folder / f"{model}.json.gz"
        path.write_bytes(gzip.compress(data, 9, mtime=0))
        print(f"{model}: {len(names)} tensors, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
