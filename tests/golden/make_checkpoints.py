"""Write the tiny random checkpoints of this folder: real structure, small widths, no training.

    python tests/golden/make_checkpoints.py [sd15 sd21v sdxl]

diffusers and transformers (versions: README.md) write the files. Between them the three hold every
spelling in which real checkpoints come: see SPELLINGS in README.md. Random weights are scaled so
that signals keep their size through the layers, and biases and norms are random too, so that a
wrong layer, prompt, guidance scale or seed shows in the picture.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

HERE = Path(__file__).parent
TEXT = """
a small red circle left of a large blue square on a yellow background
a photograph of an astronaut riding a horse, highly detailed, sharp focus, 4k
a painting of a lighthouse above the sea at sunset, in the style of an old master
two green triangles below three purple stars; a white moon over the black mountains
portrait of a woman with golden hair and a silver crown, soft light, oil on canvas
a cat and a dog sleeping beside the fire in a quiet room, warm colours, 35mm film
the quick brown fox jumps over the lazy dog while it's raining and they're watching
blurry, low quality, bad anatomy, watermark, text, signature, cropped, out of frame
an orange tree in the garden of a stone house, spring morning, long shadows, mist
a city street at night after the rain, neon signs, reflections, wide angle, cinematic
"""
START, END = "<|startoftext|>", "<|endoftext|>"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


# ---------------------------------------------------------------------------------------- tokenizer


def bpe_files(count: int = 320) -> tuple[dict[str, int], list[str]]:
    """A byte-pair encoding of TEXT in CLIP's layout: bytes, bytes at a word's end, merges, ends.

    (Trained here because the trainer of `tokenizers` breaks ties differently from run to run.)
    """
    found = re.findall(r"'s|'t|'re|\w+|[^\s\w]+", TEXT.lower())
    words = Counter((*word[:-1], word[-1] + "</w>") for word in found)
    merges: list[tuple[str, str]] = []
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                pairs[pair] += times
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        words = Counter({_merged(word, merges[-1]): times for word, times in words.items()})
    # GPT-2's byte alphabet: printable bytes first, in order, then the others as U+0100...
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = letters + [letter + "</w>" for letter in letters] + [a + b for a, b in merges]
    return {t: i for i, t in enumerate([*tokens, START, END])}, [f"{a} {b}" for a, b in merges]


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return tuple(out)


def write_tokenizer(folder: Path, pad: str, layout: str) -> CLIPTokenizer:
    """Write a tokenizer folder: "bpe" as first published (vocab.json and merges.txt), "json" as
    transformers 5 writes it (tokenizer.json), or "both"."""
    folder.mkdir(parents=True)
    vocab, merges = bpe_files()
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[tuple(m.split()) for m in merges], pad_token=pad)
    tokenizer.model_max_length = 77
    if layout in ("json", "both"):
        tokenizer.save_pretrained(folder)
    if layout in ("bpe", "both"):
        write_json(folder / "vocab.json", vocab, indent=None)
        header = "#version: 0.2\n"
        (folder / "merges.txt").write_text(header + "\n".join(merges) + "\n", encoding="utf-8")
    if layout == "bpe":
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
        write_json(folder / "special_tokens_map.json", special)
        config = {**special, "add_prefix_space": False, "do_lower_case": True, "errors": "replace"}
        config |= {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
        write_json(folder / "tokenizer_config.json", config)
    return tokenizer


# ------------------------------------------------------------------------------------------ weights


def enliven(module: torch.nn.Module, seed: int) -> None:
    """Random weights of variance 1/fan_in; biases and norms random around their usual values."""
    generator = torch.Generator().manual_seed(seed)

    def randn(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator)

    for name, p in module.named_parameters():
        if p.ndim == 1:
            p.data = 0.1 * randn(p) + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        elif "embedding.weight" in name:
            p.data = 0.5 * randn(p)
        else:
            p.data = randn(p) / p[0].numel() ** 0.5


@torch.no_grad()
def make_unet(seed: int, cross_attention_dim: int, **config: Any) -> UNet2DConditionModel:
    """A U-Net whose output has unit variance and depends on the text."""
    unet = UNet2DConditionModel(
        cross_attention_dim=cross_attention_dim, norm_num_groups=8, **config
    ).eval()
    enliven(unet, seed)
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn((2, unet.config.in_channels, 8, 8), generator=generator)
    text = torch.randn((2, 77, cross_attention_dim), generator=generator)
    added = None
    if unet.config.addition_embed_type:
        width = unet.config.projection_class_embeddings_input_dim
        width -= 6 * unet.config.addition_time_embed_dim
        added = {"text_embeds": torch.randn((2, width), generator=generator)}
        added["time_ids"] = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    labels = torch.tensor([0, 20]) if unet.config.num_class_embeds else None
    if unet.config.class_embed_type == "projection":
        width = unet.config.projection_class_embeddings_input_dim
        labels = torch.randn((2, width), generator=generator)
    out = unet(sample, 500, text, class_labels=labels, added_cond_kwargs=added).sample
    unet.conv_out.weight.data /= out.std()
    return unet


@torch.no_grad()
def make_vae(seed: int, **config: Any) -> AutoencoderKL:
    """A VAE (8 pixels to a latent, unless told) with latents and pictures of the usual size."""
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4}
    kinds["up_block_types"] = ["UpDecoderBlock2D"] * 4
    widths = {"block_out_channels": [16, 16, 32, 32], "layers_per_block": 2, "norm_num_groups": 8}
    vae = AutoencoderKL(latent_channels=4, **(kinds | widths | config)).eval()
    enliven(vae, seed)
    generator = torch.Generator().manual_seed(seed)
    scale = vae.config.scaling_factor
    out = vae.decode(torch.randn((1, 4, 8, 8), generator=generator) / scale).sample
    vae.decoder.conv_out.weight.data *= 0.45 / out.std()
    vae.decoder.conv_out.bias.data *= 0.1
    mean = vae.encode(torch.rand((1, 3, 64, 64), generator=generator) * 2 - 1).latent_dist.mean
    vae.quant_conv.weight.data[:4] /= mean.std() * scale
    vae.quant_conv.weight.data[4:] *= 0.5
    vae.quant_conv.bias.data[4:] -= 4.0
    return vae


def make_text(kind: type, seed: int, vocab_size: int, eos_token_id: int, **config: Any) -> Any:
    """A text encoder, evaluation mode."""
    settings = CLIPTextConfig(
        vocab_size=vocab_size, bos_token_id=0, eos_token_id=eos_token_id, pad_token_id=1, **config
    )
    model = kind(settings).eval()
    enliven(model, seed)
    return model


# --------------------------------------------------------------------------------- the three models


def make_sd15(folder: Path) -> None:
    """SD 1.5 as first published: short config files, old names, vocab.json, float16."""
    tokenizer = write_tokenizer(folder / "tokenizer", END, "bpe")
    width = {"hidden_size": 32, "intermediate_size": 128, "projection_dim": 32}
    depth = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_act": "quick_gelu"}
    pipe = StableDiffusionPipeline(
        text_encoder=make_text(CLIPTextModel, 11, len(tokenizer), 2, **width, **depth),
        unet=make_unet(
            12,
            32,
            sample_size=8,
            block_out_channels=(16, 32, 32, 32),
            attention_head_dim=4,
        ),
        vae=make_vae(13, sample_size=64, scaling_factor=0.18215),
        scheduler=PNDMScheduler(
            **BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1
        ),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16)
    for name in ("text_encoder", "unet", "vae", "scheduler"):
        getattr(pipe, name).save_pretrained(folder / name)
    index = {k: v for k, v in pipe.config.items() if not k.startswith("_") and k != "image_encoder"}
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline", **index})

    # What the libraries no longer write, as the files of 2022 have it.
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    save_file({_renamed(k, old): v for k, v in load_file(path).items()}, path, {"format": "pt"})
    path = folder / "text_encoder/model.safetensors"
    weights = {"text_model." + k.removeprefix("text_model."): v for k, v in load_file(path).items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(weights, path, {"format": "pt"})
    keep = {
        "unet": """_class_name act_fn attention_head_dim block_out_channels center_input_sample
            cross_attention_dim down_block_types downsample_padding flip_sin_to_cos freq_shift
            in_channels layers_per_block mid_block_scale_factor norm_eps norm_num_groups
            out_channels sample_size up_block_types""",
        "vae": """_class_name act_fn block_out_channels down_block_types in_channels latent_channels
            layers_per_block norm_num_groups out_channels sample_size up_block_types""",
        "scheduler": """_class_name beta_end beta_schedule beta_start num_train_timesteps
            set_alpha_to_one skip_prk_steps steps_offset trained_betas""",
    }
    for name, keys in keep.items():
        path = next((folder / name).glob("*config.json"))
        config = json.loads(path.read_text())
        # Not 0.6.0: for that, diffusers takes a sample_size under 64 for a mistake and changes it.
        config = {k: config[k] for k in keys.split()} | {"_diffusers_version": "0.10.0"}
        write_json(path, config | ({"clip_sample": False} if name == "scheduler" else {}))
    config = json.loads((folder / "text_encoder/config.json").read_text())
    config["torch_dtype"] = config.pop("dtype", "float16")
    write_json(folder / "text_encoder/config.json", config | {"transformers_version": "4.22.0"})


def make_sd21v(folder: Path) -> None:
    """SD 2.1 (768-v) as the libraries write it today; bfloat16; the newer end-of-text rule.

    Here and in SDXL's second encoder stand two ids beyond the tokenizer's vocabulary, as textual
    inversion adds them: with those in a prompt the two rules for the end of the text differ.
    """
    tokenizer = write_tokenizer(folder / "tokenizer", "!", "both")
    width = {"hidden_size": 64, "intermediate_size": 256, "projection_dim": 32}
    depth = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_act": "gelu"}
    end = len(tokenizer) - 1
    StableDiffusionPipeline(
        text_encoder=make_text(CLIPTextModel, 21, len(tokenizer) + 2, end, **width, **depth),
        unet=make_unet(
            22,
            64,
            sample_size=12,
            block_out_channels=(16, 32, 48),
            down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
            attention_head_dim=[2, 4, 6],
            use_linear_projection=True,
            upcast_attention=True,
        ),
        vae=make_vae(23, sample_size=96, scaling_factor=0.18215, force_upcast=False),
        scheduler=DDIMScheduler(
            **BETAS,
            clip_sample=False,
            prediction_type="v_prediction",
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.bfloat16).save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer", "!", "both")


def make_sdxl(folder: Path) -> None:
    """SDXL base: two text encoders, size conditioning, a sharded U-Net, tokenizer.json; float16."""
    tokenizer = write_tokenizer(folder / "tokenizer", END, "json")
    tokenizer_2 = write_tokenizer(folder / "tokenizer_2", "!", "json")
    first = {"hidden_size": 32, "intermediate_size": 128, "projection_dim": 32}
    first |= {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_act": "quick_gelu"}
    second = {"hidden_size": 64, "intermediate_size": 256, "projection_dim": 48}
    second |= {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_act": "gelu"}
    size = len(tokenizer)
    pipe = StableDiffusionXLPipeline(
        text_encoder=make_text(CLIPTextModel, 31, size, 2, **first),
        text_encoder_2=make_text(CLIPTextModelWithProjection, 32, size + 2, 2, **second),
        unet=make_unet(
            33,
            96,
            sample_size=16,
            block_out_channels=(16, 24, 32),
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            attention_head_dim=[2, 3, 4],
            transformer_layers_per_block=[1, 2, 3],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=48 + 6 * 8,
        ),
        vae=make_vae(34, sample_size=128, scaling_factor=0.13025, force_upcast=True),
        scheduler=EulerDiscreteScheduler(
            **BETAS, timestep_spacing="leading", steps_offset=1, use_karras_sigmas=False
        ),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).to(torch.float16)
    pipe.save_pretrained(folder)
    path = folder / "scheduler/scheduler_config.json"  # keys of other classes, as published
    extra = {"clip_sample": False, "sample_max_value": 1.0, "set_alpha_to_one": False}
    write_json(path, json.loads(path.read_text()) | extra | {"skip_prk_steps": True})
    shutil.rmtree(folder / "unet")
    pipe.unet.save_pretrained(folder / "unet", max_shard_size="1MB")


def _renamed(name: str, table: dict[str, str]) -> str:
    """A name with its attention part replaced by the table's."""
    for new, old in table.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


def write_json(path: Path, data: dict[str, Any], indent: int | None = 2) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(data, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


MAKERS = {"sd15": make_sd15, "sd21v": make_sd21v, "sdxl": make_sdxl}

if __name__ == "__main__":
    for chosen in sys.argv[1:] or MAKERS:
        shutil.rmtree(HERE / chosen / "checkpoint", ignore_errors=True)
        MAKERS[chosen](HERE / chosen / "checkpoint")
