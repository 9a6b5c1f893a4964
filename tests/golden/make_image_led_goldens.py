"""Write the tiny models and pictures of models that a picture's embedding leads.

    python tests/golden/make_image_led_goldens.py pipeline_zero1to3.py [unclip variation ...]

The first argument is examples/community/pipeline_zero1to3.py of diffusers' repository, which is in
no wheel. It asks kornia for a resize and a normalization; here PyTorch's own stand in for them,
which kornia calls (kornia.geometry.resize without a filter is torch.nn.functional.interpolate).

A picture is golden_data.photo, read as a path would be; of the models, "unclip" has the parts of
sd21-unclip-h (OpenCLIP's image encoder), "unclip-l" those of sd21-unclip-l (OpenAI's, and a mean
and deviation of its embeddings).
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionImageVariationPipeline, StableUnCLIPImg2ImgPipeline
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from drawing import (
    HERE,
    TREE,
    Drawn,
    draw,
    generator,
    pictures,
    prepare,
    words,
    write_pictures,
)
from drawing import case as plain_case
from golden_data import checkpoint, photo
from make_checkpoints import make_unet, write_json
from make_image_goldens import SD1
from transformers import CLIPImageProcessor

sys.path.insert(0, str(HERE.parent))
from adapter_files import ENCODER, encoder_tensors
from lora_files import write as write_lora
from safetensors.numpy import save_file
from safetensors.torch import load_file

WIDTH, SIDE = ENCODER["projection_dim"], ENCODER["image_size"]
LORAS = tempfile.TemporaryDirectory()
PROJECTION = "cc_projection/diffusion_pytorch_model.safetensors"
BASES = {
    "unclip": "sd21v",
    "unclip-l": "unclip",
    "variation": "bk-sdm-tiny",
    "zero123": "variation",
}
NOISING = {  # as published: stabilityai/stable-diffusion-2-1-unclip, image_noising_scheduler
    "_class_name": "DDPMScheduler",
    "beta_end": 0.02,
    "beta_schedule": "squaredcos_cap_v2",
    "beta_start": 0.0001,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "trained_betas": None,
    "variance_type": "fixed_small",
}
NO_TEXT = {part: [None, None] for part in ("text_encoder", "tokenizer", "safety_checker")}
VISION = {
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
}
INDEX: dict[str, dict[str, Any]] = {
    "unclip": {
        "_class_name": "StableUnCLIPImg2ImgPipeline",
        "image_noising_scheduler": ["diffusers", "DDPMScheduler"],
        "image_normalizer": ["stable_diffusion", "StableUnCLIPImageNormalizer"],
        **VISION,
    },
    "variation": {"_class_name": "StableDiffusionImageVariationPipeline", **NO_TEXT, **VISION},
    "zero123": {
        "_class_name": "Zero1to3StableDiffusionPipeline",
        "cc_projection": ["pipeline_zero1to3", "CCProjection"],
        **NO_TEXT,
        **VISION,
    },
}


def write_vision(folder: Path, **changes: Any) -> None:
    """CLIP's image encoder, and what prepares its pictures."""
    (folder / "image_encoder").mkdir(parents=True)
    write_json(folder / "image_encoder/config.json", ENCODER | changes)
    tensors = {name: values.astype(np.float16) for name, values in encoder_tensors().items()}
    save_file(tensors, folder / "image_encoder/model.safetensors", {"format": "pt"})
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(
        folder / "feature_extractor"
    )
    path = folder / "feature_extractor/preprocessor_config.json"
    write_json(path, json.loads(path.read_text()))


def write_index(name: str, folder: Path) -> None:
    index = json.loads((checkpoint(BASES[name]) / "model_index.json").read_text())
    write_json(folder / "model_index.json", index | INDEX[name])


def make_model(name: str, folder: Path) -> None:
    """The files in which a model differs from its base."""
    seed = 700 + list(BASES).index(name)
    torch.manual_seed(seed)
    if name == "unclip":
        unet = make_unet(
            seed,
            64,
            **SD1 | {"attention_head_dim": [2, 4]},
            use_linear_projection=True,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=2 * WIDTH,
        )
        unet.to(torch.float16).save_pretrained(folder / "unet")
        write_vision(folder)
        StableUnCLIPImageNormalizer(WIDTH).save_pretrained(folder / "image_normalizer")
        (folder / "image_noising_scheduler").mkdir()
        write_json(folder / "image_noising_scheduler/scheduler_config.json", NOISING)
        write_index(name, folder)
    elif name == "unclip-l":
        (folder / "image_encoder").mkdir(parents=True)
        config = ENCODER | {"hidden_act": "quick_gelu"}
        write_json(folder / "image_encoder/config.json", config)
        normalizer = StableUnCLIPImageNormalizer(WIDTH)
        normalizer.mean.data = 0.3 * torch.randn(1, WIDTH)
        normalizer.std.data = 0.5 + torch.rand(1, WIDTH)
        normalizer.save_pretrained(folder / "image_normalizer")
    elif name == "variation":
        unet = make_unet(seed, WIDTH, **SD1)
        unet.to(torch.float16).save_pretrained(folder / "unet")
        write_vision(folder, hidden_act="quick_gelu")
        write_index(name, folder)
    else:
        unet = make_unet(seed, WIDTH, in_channels=8, **SD1)
        unet.to(torch.float16).save_pretrained(folder / "unet")
        (folder / "cc_projection").mkdir()
        # The class keeps no config: published ones hold nothing, as the model has its defaults.
        write_json(
            folder / "cc_projection/config.json",
            {"_class_name": "CCProjection", "in_channel": WIDTH + 4, "out_channel": WIDTH},
        )
        projection = COMMUNITY.CCProjection(WIDTH + 4, WIDTH).to(torch.float16)
        values = {name: value.numpy() for name, value in projection.state_dict().items()}
        save_file(values, folder / PROJECTION, {"format": "pt"})
        write_index(name, folder)


# ------------------------------------------------------------------------------------- the pictures


def case(**arguments: Any) -> dict[str, Any]:
    """A case without a prompt; image is a size of golden_data.photo."""
    made = plain_case(**{"image": [40, 56]} | arguments)
    return made if "prompt" in arguments else {k: v for k, v in made.items() if k != "prompt"}


PICTURES: dict[str, dict[str, dict[str, Any]]] = {
    "unclip": {
        "checkpoint": case(prompt=TREE, sampler="checkpoint", image=[64, 64]),
        "noised": case(
            prompt=TREE,
            negative_prompt="a red circle",
            noise_level=400,
            guidance=4.0,
            sampler="euler-a",
            count=2,
            seed=3,
        ),
        "no-prompt": case(prompt="", noise_level=20, guidance=1.0, sampler="ddim", seed=1),
        "wide": case(prompt=TREE, width=72, height=56, sampler="dpmpp-2m", noise_level=999),
        "lora": case(prompt=TREE, sampler="ddim", loras=[["unclip-peft", 0.8]], seed=4),
    },
    "unclip-l": {"checkpoint": case(prompt=TREE, noise_level=300, sampler="ddim", seed=2)},
    "variation": {
        "checkpoint": case(sampler="checkpoint", count=2),
        "unguided": case(guidance=1.0, sampler="euler", image=[64, 64], seed=1),
        "wide": case(width=72, height=56, guidance=3.0, sampler="dpmpp-2m"),
    },
    "zero123": {
        "checkpoint": case(sampler="ddim", image=[64, 64]),
        "camera": case(
            sampler="ddim",
            image=[64, 64],
            elevation=20.0,
            azimuth=-135.0,
            distance=0.25,
            guidance=5.0,
            seed=2,
        ),
        "stable": case(sampler="euler-a", image=[64, 64], azimuth=90.0, picture_elevation=15.0),
        "unguided": case(sampler="ddim", image=[64, 64], azimuth=60.0, guidance=1.0, seed=1),
    },
}


def load(name: str, arguments: dict[str, Any]) -> Any:
    """diffusers' pipeline for a case."""
    folder = checkpoint(name)
    if name == "zero123":
        base = StableDiffusionImageVariationPipeline.from_pretrained(
            checkpoint("variation"), dtype=torch.float32, safety_checker=None
        )
        unet = type(base.unet).from_pretrained(folder / "unet", torch_dtype=torch.float32)
        projection = COMMUNITY.CCProjection(WIDTH + 4, WIDTH)
        projection.load_state_dict(load_file(folder / PROJECTION))
        pipe = COMMUNITY.Zero1to3StableDiffusionPipeline(
            vae=base.vae,
            image_encoder=base.image_encoder,
            unet=unet,
            scheduler=base.scheduler,
            safety_checker=None,
            feature_extractor=None,
            cc_projection=projection,
            requires_safety_checker=False,
        )
        return prepare(pipe, arguments)
    kind: Any = StableUnCLIPImg2ImgPipeline
    if name == "variation":
        kind = partial(StableDiffusionImageVariationPipeline.from_pretrained, safety_checker=None)
    else:
        kind = kind.from_pretrained
    pipe = prepare(kind(folder, dtype=torch.float32), arguments)
    for file, scale in arguments.get("loras", []):
        pipe.load_lora_weights(str(write_lora(file, Path(LORAS.name))), adapter_name=file)
        pipe.set_adapters([file], [scale])
    return pipe


def run(name: str, arguments: dict[str, Any], seed: int) -> Drawn:
    """One picture, as diffusers' pipeline makes it."""
    pipe = load(name, arguments)
    given = words(arguments) | {"generator": generator(seed)}
    given |= {side: arguments[side] for side in ("width", "height") if side in arguments}
    (image,) = pictures(photo, [arguments["image"]])
    if name.startswith("unclip"):
        return draw(pipe, image, prompt=arguments["prompt"], **given)
    if name == "variation":
        return draw(pipe, image, **given)
    last = arguments.get("distance", 0.0)
    if "picture_elevation" in arguments:
        last = float(np.deg2rad(90 - arguments["picture_elevation"]))
    pose = [-arguments.get("elevation", 0.0), arguments.get("azimuth", 0.0), last]
    return draw(pipe, image, prompt_imgs=image, poses=pose, **given)


def community(path: str) -> ModuleType:
    """The pipeline's module, with PyTorch in place of kornia."""

    def resize(x: Any, size: Any, interpolation: str, align_corners: bool, antialias: bool) -> Any:
        assert not antialias
        return torch.nn.functional.interpolate(
            x, size=(SIDE, SIDE), mode=interpolation, align_corners=align_corners
        )

    def normalize(x: Any, mean: Any, std: Any) -> Any:
        return (x - mean[None, :, None, None]) / std[None, :, None, None]

    kornia: Any = ModuleType("kornia")
    kornia.geometry, kornia.enhance = ModuleType("geometry"), ModuleType("enhance")
    kornia.geometry.resize, kornia.enhance.normalize = resize, normalize
    sys.modules["kornia"] = kornia
    spec = importlib.util.spec_from_file_location("pipeline_zero1to3", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pipeline_zero1to3"] = module
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def main(names: list[str]) -> None:
    """Write each model's checkpoint, pictures.npz and cases.json."""
    for name in names or list(PICTURES):
        folder = HERE / name
        folder.mkdir(exist_ok=True)
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        make_model(name, folder / "checkpoint")
        document = {"base": BASES[name], "prompts": [], "pictures": {}}
        (folder / "cases.json").write_text(json.dumps(document))  # for `checkpoint`
        checkpoint.cache_clear()
        write_pictures(folder, PICTURES[name], partial(run, name), base=BASES[name])


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    if len(sys.argv) < 2 or not sys.argv[1].endswith(".py"):
        sys.exit(__doc__)
    COMMUNITY = community(sys.argv[1])
    main(sys.argv[2:])
