"""Write the tiny checkpoints and pictures of the families beside sd15, sd21v and sdxl.

    python tests/golden/make_family_goldens.py [sdxl-refiner lcm ssd-1b ... img2img]

Each folder has cases.json and pictures.npz as make_goldens.py writes them, and either a whole
checkpoint or, where a published model differs from a family that is there already only in its
scheduler (Turbo), the name of that family and the files that differ. Arguments that are left out
are left to diffusers' own defaults. A refiner gets the base model's VAE, as diffusers' guide does.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderTiny,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from drawing import (
    HERE,
    TREE,
    Drawn,
    case,
    draw,
    generator,
    nhwc,
    opened,
    pictures,
    prepare,
    words,
    write_pictures,
)
from golden_data import checkpoint, photo
from make_checkpoints import (
    BETAS,
    END,
    enliven,
    make_text,
    make_unet,
    make_vae,
    write_json,
    write_tokenizer,
)
from sampler_cases import EDM_CONFIGS
from transformers import CLIPTextModel, CLIPTextModelWithProjection

DOWN, CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
UP, CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"
WIDTH = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 32}
SMALL_CLIP = WIDTH | {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": "quick_gelu"}
SMALL_OPENCLIP = SMALL_CLIP | {"hidden_act": "gelu", "num_hidden_layers": 3}
SDXL = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 16),
    "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN],
    "up_block_types": [CROSS_UP, CROSS_UP, UP],
    "attention_head_dim": [1, 2, 4],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
}
# As published: the keys of stabilityai/sd-turbo and sdxl-turbo, scheduler/scheduler_config.json.
TURBO = BETAS | {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.24.0.dev0",
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


# -------------------------------------------------------------------------------------- checkpoints


def make_vae_small(seed: int, **config: Any) -> Any:
    """An AutoencoderKL of one layer a block."""
    small = {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "sample_size": 64}
    return make_vae(seed, **small, **config)


def sd1(kind: type, folder: Path, seed: int, scheduler: Any, **unet: Any) -> None:
    """A model with SD 1's text encoder."""
    tokenizer = write_tokenizer(folder / "tokenizer", END, "bpe")
    settings = {"sample_size": 8, "block_out_channels": (8, 16, 16, 16), "attention_head_dim": 4}
    parts = {
        "text_encoder": make_text(CLIPTextModel, seed, len(tokenizer), 2, **SMALL_CLIP),
        "unet": make_unet(seed + 1, 32, **settings | unet),
        "vae": make_vae_small(seed + 2, scaling_factor=0.18215),
    }
    kind(
        **parts,
        scheduler=scheduler,
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16).save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer", END, "bpe")


def make_lcm(folder: Path) -> None:
    """SimianLuo/LCM_Dreamshaper_v7: SD 1.5 that is told the guidance scale."""
    scheduler = LCMScheduler(**BETAS, set_alpha_to_one=True, steps_offset=1)
    sd1(LatentConsistencyModelPipeline, folder, 110, scheduler, time_cond_proj_dim=64)


def make_bk_sdm_small(folder: Path) -> None:
    """nota-ai/bk-sdm-small: no mid block."""
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)
    sd1(StableDiffusionPipeline, folder, 120, scheduler, layers_per_block=1, mid_block_type=None)


def make_bk_sdm_tiny(folder: Path) -> None:
    """nota-ai/bk-sdm-tiny: no mid block and no lowest level."""
    sd1(
        StableDiffusionPipeline,
        folder,
        130,
        PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
        block_out_channels=(8, 16, 16),
        down_block_types=[CROSS_DOWN] * 3,
        up_block_types=[CROSS_UP] * 3,
        layers_per_block=1,
        mid_block_type=None,
    )


def sdxl(folder: Path, seed: int, **unet: Any) -> None:
    """A model with SDXL's text encoders and a U-Net of its own."""
    tokenizer = write_tokenizer(folder / "tokenizer", END, "bpe")
    tokenizer_2 = write_tokenizer(folder / "tokenizer_2", "!", "bpe")
    size = len(tokenizer)
    StableDiffusionXLPipeline(
        text_encoder=make_text(CLIPTextModel, seed, size, 2, **SMALL_CLIP),
        text_encoder_2=make_text(CLIPTextModelWithProjection, seed + 1, size, 2, **SMALL_OPENCLIP),
        unet=make_unet(seed + 2, 64, **SDXL | unet),
        vae=make_vae_small(seed + 3, scaling_factor=0.13025, force_upcast=True),
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        add_watermarker=False,
    ).to(torch.float16).save_pretrained(folder)
    for name, pad in (("tokenizer", END), ("tokenizer_2", "!")):
        shutil.rmtree(folder / name)
        write_tokenizer(folder / name, pad, "bpe")


def make_ssd_1b(folder: Path) -> None:
    """segmind/SSD-1B: SDXL with layers left out, a different depth in every attention."""
    sdxl(
        folder,
        140,
        mid_block_type="UNetMidBlock2D",
        transformer_layers_per_block=[1, [2, 2], [4, 4]],
        reverse_transformer_layers_per_block=[[4, 4, 10], [2, 1, 1], 1],
    )


def make_segmind_vega(folder: Path) -> None:
    """segmind/Segmind-Vega."""
    sdxl(
        folder,
        150,
        mid_block_type="UNetMidBlock2D",
        transformer_layers_per_block=[1, [1, 1], [2, 2]],
        reverse_transformer_layers_per_block=[[2, 2, 2], [1, 1, 1], 1],
    )


def make_sdxl_refiner(folder: Path) -> None:
    """stabilityai/stable-diffusion-xl-refiner-1.0: the second text encoder alone, four levels."""
    tokenizer = write_tokenizer(folder / "tokenizer_2", "!", "bpe")
    StableDiffusionXLImg2ImgPipeline(
        text_encoder=None,
        text_encoder_2=make_text(
            CLIPTextModelWithProjection, 160, len(tokenizer), 2, **SMALL_OPENCLIP
        ),
        unet=make_unet(
            161,
            32,
            **SDXL
            | {
                "block_out_channels": (8, 16, 16, 16),
                "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
                "up_block_types": [UP, CROSS_UP, CROSS_UP, UP],
                "attention_head_dim": [1, 2, 4, 4],
                "transformer_layers_per_block": 4,
                "projection_class_embeddings_input_dim": 32 + 5 * 8,
            },
        ),
        vae=make_vae_small(162, scaling_factor=0.13025, force_upcast=True),
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        tokenizer=None,
        tokenizer_2=tokenizer,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    ).to(torch.float16).save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer_2")
    write_tokenizer(folder / "tokenizer_2", "!", "bpe")


def make_turbo(folder: Path, base: str, scheduler: str) -> None:
    """The files in which a Turbo model differs from its base."""
    (folder / "scheduler").mkdir(parents=True)
    write_json(folder / "scheduler/scheduler_config.json", TURBO | {"_class_name": scheduler})
    index = json.loads((checkpoint(base) / "model_index.json").read_text())
    write_json(folder / "model_index.json", index | {"scheduler": ["diffusers", scheduler]})


def make_sd_turbo(folder: Path) -> None:
    """stabilityai/sd-turbo: SD 2.1 with another scheduler."""
    make_turbo(folder, "sd21v", "EulerDiscreteScheduler")


def make_sdxl_turbo(folder: Path) -> None:
    """stabilityai/sdxl-turbo: SDXL with another scheduler."""
    make_turbo(folder, "sdxl", "EulerAncestralDiscreteScheduler")


def make_playground(folder: Path) -> None:
    """playgroundai/playground-v2.5: SDXL with EDM's noise and latents of unlike size.

    The numbers of the latents suit the tiny VAE; the published ones are as many.
    """
    make_turbo(folder, "segmind-vega", "EDMDPMSolverMultistepScheduler")
    write_json(folder / "scheduler/scheduler_config.json", EDM_CONFIGS["playground"])
    (folder / "vae").mkdir()
    config = json.loads((checkpoint("segmind-vega") / "vae/config.json").read_text())
    latents = {
        "scaling_factor": 0.5,
        "latents_mean": [-0.3, 0.4, -0.2, 0.5],
        "latents_std": [1.7, 1.2, 1.3, 1.05],
    }
    write_json(folder / "vae/config.json", config | latents)


def make_cosxl(folder: Path) -> None:
    """stabilityai/cosxl: SDXL with EDM's noise and v-prediction."""
    make_turbo(folder, "segmind-vega", "EDMEulerScheduler")
    write_json(folder / "scheduler/scheduler_config.json", EDM_CONFIGS["cosxl"])


@torch.no_grad()
def make_taesd(folder: Path) -> None:
    """madebyollin/taesd, narrower: the VAE alone."""
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8)
    ).eval()
    enliven(vae, 170)
    image = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = vae.encode(image).latents
    vae.encoder.layers[-1].weight.data /= latents.std()
    vae.encoder.layers[-1].bias.data -= latents.mean() / latents.std()
    noise = 2 * torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    decoded = vae.decode(noise).sample
    vae.decoder.layers[-1].weight.data *= 0.45 / decoded.std()
    vae.decoder.layers[-1].bias.data += 0.5 - 0.5 * (vae.decode(noise).sample.mean() + 1)
    vae.to(torch.float16).save_pretrained(folder)


MAKERS = {
    "sdxl-refiner": make_sdxl_refiner,
    "lcm": make_lcm,
    "ssd-1b": make_ssd_1b,
    "segmind-vega": make_segmind_vega,
    "bk-sdm-small": make_bk_sdm_small,
    "bk-sdm-tiny": make_bk_sdm_tiny,
    "sd-turbo": make_sd_turbo,
    "sdxl-turbo": make_sdxl_turbo,
    "playground": make_playground,
    "cosxl": make_cosxl,
    "taesd": make_taesd,
}
BASES = {
    "sd-turbo": "sd21v",
    "sdxl-turbo": "sdxl",
    "playground": "segmind-vega",
    "cosxl": "segmind-vega",
}


# ------------------------------------------------------------------------------------- the pictures


SQUARE = {"width": 64, "height": 64}
PHOTO = {"image": [64, 64]}
SPLIT = {"refiner": "sdxl-refiner", "steps": 10, "denoising_end": 0.7, "model": "sdxl"}
PICTURES: dict[str, dict[str, dict[str, Any]]] = {
    "sdxl-refiner": {
        "alone": case(image=[64, 96], sampler="checkpoint", steps=10, negative_prompt="blurry"),
        "alone-scores": case(
            **PHOTO, sampler="dpmpp-2m", aesthetic_score=7.5, negative_aesthetic_score=1.0
        ),
        "alone-from": case(**PHOTO, sampler="checkpoint", steps=10, denoising_start=0.6),
        "alone-two": case(**PHOTO, sampler="euler-a", strength=0.5, count=2, guidance=3.0),
        "second-half": case(**SPLIT, **SQUARE, sampler="checkpoint"),
        "second-half-karras": case(
            **SPLIT, **SQUARE, sampler="dpmpp-2m", schedule="karras", negative_prompt="blurry"
        ),
        "second-half-ancestral": case(**SPLIT, **SQUARE, sampler="euler-a", count=2, seed=3),
        "second-half-heun": case(**SPLIT, **SQUARE, sampler="heun"),
        "second-half-image": case(**SPLIT, **PHOTO, sampler="checkpoint", strength=0.8),
    },
    "lcm": {
        "checkpoint": case(**SQUARE, steps=4, sampler="checkpoint"),
        "auto": case(TREE, **SQUARE, steps=4, count=2, seed=5),
        "guidance": case(**SQUARE, steps=2, guidance=1.0),
        "image": case(**PHOTO, steps=4),
        "image-strength": case(**PHOTO, steps=3, strength=0.35, guidance=4.0),
    },
    "ssd-1b": {
        "checkpoint": case(**SQUARE, sampler="checkpoint"),
        "karras": case(TREE, **SQUARE, sampler="dpmpp-2m", schedule="karras", guidance=9.0),
    },
    "segmind-vega": {
        "checkpoint": case(**SQUARE, sampler="checkpoint"),
        "negative": case(TREE, **SQUARE, sampler="dpmpp-2m", negative_prompt="blurry"),
    },
    "bk-sdm-small": {
        "checkpoint": case(**SQUARE, sampler="checkpoint"),
        "odd": case(TREE, width=72, height=56, sampler="dpmpp-2m", negative_prompt="blurry"),
    },
    "bk-sdm-tiny": {
        "checkpoint": case(**SQUARE, sampler="checkpoint"),
        "image": case(TREE, **PHOTO, sampler="dpmpp-2m", strength=0.6),
    },
    "sd-turbo": {
        "one-step": case(**SQUARE, steps=1, guidance=0.0),
        "four-steps": case(TREE, **SQUARE, steps=4, guidance=0.0),
        "image": case(**PHOTO, steps=4, guidance=0.0, strength=0.5),
    },
    "sdxl-turbo": {
        "one-step": case(**SQUARE, steps=1, guidance=0.0),
        "four-steps": case(TREE, **SQUARE, steps=4, guidance=0.0, seed=8, count=2),
        "image": case(**PHOTO, steps=4, guidance=0.0, strength=0.5),
    },
    "playground": {
        "checkpoint": case(**SQUARE, sampler="checkpoint", negative_prompt="blurry"),
        "steps": case(TREE, width=96, height=64, steps=20, sampler="dpmpp-2m"),
        "third-order": case(**SQUARE, sampler="dpmpp-3m", schedule="exponential", steps=16),
        "sde-two": case(**SQUARE, sampler="dpmpp-2m-sde", count=2, seed=5, guidance=3.0),
        "euler": case(**SQUARE, sampler="euler", guidance=1.0),
        "image": case(**PHOTO, sampler="checkpoint", steps=10, strength=0.6),
        "image-euler-two": case(TREE, **PHOTO, sampler="euler", count=2, seed=2),
    },
    "cosxl": {
        "checkpoint": case(**SQUARE, sampler="checkpoint", negative_prompt="blurry"),
        "dpmpp-2m": case(TREE, **SQUARE, sampler="dpmpp-2m", steps=20),
        "karras": case(**SQUARE, sampler="euler", schedule="karras", count=2),
        "image": case(**PHOTO, sampler="checkpoint", steps=10, strength=0.6),
    },
    "taesd": {
        "text": case(**SQUARE, vae="taesd", sampler="dpmpp-2m"),
        "image": case(**PHOTO, vae="taesd", sampler="dpmpp-2m", count=2),
    },
    "img2img": {
        "sd15-checkpoint": case(**PHOTO, sampler="checkpoint"),
        "sd15-two": case(**PHOTO, sampler="dpmpp-2m", count=2, seed=11, negative_prompt="blurry"),
        "sd15-rounded-down": case(TREE, image=[70, 101], sampler="dpmpp-2m", schedule="karras"),
        "sd15-full": case(**PHOTO, sampler="ddim", strength=1.0),
        "sd15-eta": case(**PHOTO, sampler="ddim", strength=0.5, eta=0.6),
        "sd15-one-step": case(**PHOTO, sampler="euler", strength=0.2),
        "sd15-heun": case(**PHOTO, sampler="heun", strength=0.7),
        "sd15-unipc": case(**PHOTO, sampler="unipc", strength=0.7),
        "sd15-sde": case(**PHOTO, sampler="dpmpp-2m-sde", strength=0.7),
        "sd15-ddpm": case(**PHOTO, sampler="ddpm", strength=0.7, steps=8),
        "sd15-lcm": case(**PHOTO, sampler="lcm", strength=0.7, guidance=1.0),
        "sd21v-ddim": case(**PHOTO, model="sd21v", sampler="checkpoint"),
        "sd21v-euler-a": case(TREE, **PHOTO, model="sd21v", sampler="euler-a", strength=0.6),
        "sdxl-default": case(**PHOTO, model="sdxl", sampler="checkpoint", steps=10),
        "sdxl-from": case(**PHOTO, model="sdxl", sampler="dpmpp-2m", denoising_start=0.4),
        "sdxl-between": case(
            **PHOTO, model="sdxl", sampler="euler", denoising_start=0.2, denoising_end=0.8
        ),
        "sdxl-end": case(**SQUARE, model="sdxl", sampler="dpmpp-2m", denoising_end=0.6),
    },
}
for name in ("img2img", "taesd"):
    PICTURES[name] = {k: {"model": "sd15"} | v for k, v in PICTURES[name].items()}
TO_IMAGE = {
    StableDiffusionPipeline: StableDiffusionImg2ImgPipeline,
    StableDiffusionXLPipeline: StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline: StableDiffusionXLImg2ImgPipeline,
    LatentConsistencyModelPipeline: LatentConsistencyModelImg2ImgPipeline,
}


def load(name: str, arguments: dict[str, Any]) -> Any:
    """diffusers' pipeline for a case: the class for its task, with its sampler."""
    pipe = opened(name)
    if "image" in arguments:
        pipe = TO_IMAGE[type(pipe)].from_pipe(pipe)
    return prepare(pipe, arguments)


def run(family: str, arguments: dict[str, Any], seed: int) -> Drawn:
    """One picture, as diffusers' pipeline makes it."""
    pipe, prompt = load(arguments.get("model", family), arguments), arguments["prompt"]
    given = words(arguments) | {"generator": generator(seed)}
    if "image" in arguments:
        (given["image"],) = pictures(photo, [arguments["image"]])
    else:
        given |= {side: arguments[side] for side in ("width", "height")}
    if "refiner" not in arguments:
        return draw(pipe, prompt, **given)
    half = draw(pipe, prompt, output_type="latent", **given)
    refiner = load(arguments["refiner"], {**arguments, "image": True})
    refiner.vae = pipe.vae
    for name in ("width", "height", "strength", "denoising_end"):
        given.pop(name, None)
    given |= {"image": half, "denoising_start": arguments["denoising_end"]}
    return draw(refiner, prompt, **given)


def taesd_arrays() -> dict[str, np.ndarray]:
    """The tiny VAE both ways, on pictures that are not square."""
    vae = AutoencoderTiny.from_pretrained(checkpoint("taesd"), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    image = torch.rand((2, 3, 56, 72), generator=generator) * 2 - 1
    latents = 2 * torch.randn((2, 4, 9, 7), generator=generator)
    return {
        "vae/image": nhwc(image),
        "vae/encoded": nhwc(vae.encode(image).latents),
        "vae/latents": nhwc(latents),
        "vae/decoded": nhwc(vae.decode(latents).sample),
    }


def unet_arrays(name: str) -> dict[str, np.ndarray]:
    """The U-Net on an odd-sided batch of two at two times, with all that it can be told."""
    pipe = DiffusionPipeline.from_pretrained(checkpoint(name), dtype=torch.float32)
    config, generator = pipe.unet.config, torch.Generator().manual_seed(2)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    inputs = {
        "sample": randn(2, config.in_channels, 9, 7),
        "timesteps": torch.tensor([999, 261]),
        "encoder_hidden_states": randn(2, 77, config.cross_attention_dim),
    }
    if config.addition_embed_type:
        count = config.projection_class_embeddings_input_dim - 32
        inputs["text_embeds"] = randn(2, 32)
        ids = torch.tensor([[72.0, 56, 0, 8, 6.0, 1024], [1024, 768, 16, 0, 2.5, 512]])
        inputs["time_ids"] = ids[:, : count // config.addition_time_embed_dim]
    if config.time_cond_proj_dim:
        inputs["timestep_cond"] = randn(2, config.time_cond_proj_dim)
    added = {k: inputs[k] for k in ("text_embeds", "time_ids") if k in inputs} or None
    output = pipe.unet(
        inputs["sample"],
        inputs["timesteps"],
        inputs["encoder_hidden_states"],
        timestep_cond=inputs.get("timestep_cond"),
        added_cond_kwargs=added,
    ).sample
    arrays = {f"unet/{k}": v.numpy() for k, v in inputs.items()}
    arrays["unet/timesteps"] = arrays["unet/timesteps"].astype(np.float32)
    return arrays | {"unet/sample": nhwc(inputs["sample"]), "unet/output": nhwc(output)}


@torch.no_grad()
def main(names: list[str]) -> None:
    """Write each family's checkpoint, components.npz, pictures.npz and cases.json."""
    for name in names or list(PICTURES):
        folder = HERE / name
        if name in MAKERS:
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
            MAKERS[name](folder / "checkpoint")
        if name == "taesd":
            np.savez_compressed(folder / "components.npz", **taesd_arrays())
        elif name in MAKERS and name not in BASES:
            np.savez_compressed(folder / "components.npz", **unet_arrays(name))
        more = {"base": BASES[name]} if name in BASES else {}
        write_pictures(folder, PICTURES[name], partial(run, name), **more)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main(sys.argv[1:])
