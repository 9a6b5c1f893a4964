"""Write the tiny checkpoints and pictures of models that draw pixels (diffusers' UNet2DModel).

    python tests/golden/make_ddpm_goldens.py

The pictures are those of diffusers' DDPMPipeline and DDIMPipeline. These hand no label to a U-Net
that wants one, so it is handed to the U-Net here; nothing else differs.
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
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from golden.make_checkpoints import enliven, write_json  # noqa: E402
from golden.make_goldens import nhwc  # noqa: E402

DOWN, ATTN_DOWN, UP, ATTN_UP = "DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@torch.no_grad()
def make_unet(seed: int, label: Any = None, **config: Any) -> UNet2DModel:
    """A U-Net whose output is of half the noise's size.

    With more, a random network makes of DDIM's path a chaotic one, which no two machines follow
    alike; a trained network does not.
    """
    unet = UNet2DModel(norm_num_groups=8, **config).eval()
    enliven(unet, seed)
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn((2, unet.config.in_channels, height, width), generator=generator)
    out = unet(sample, 500, None if label is None else torch.tensor([label, label])).sample
    unet.conv_out.weight.data *= 0.5 / out.std()
    return unet


def make_ddpm(folder: Path) -> None:
    """google/ddpm-cifar10-32 as published in 2022: U-Net and scheduler in the root, old names.

    Padding, embedding and epsilon are those of the first code; float32.
    """
    unet = make_unet(
        200,
        sample_size=16,
        block_out_channels=(16, 24, 32),
        down_block_types=[DOWN, ATTN_DOWN, DOWN],
        up_block_types=[UP, ATTN_UP, UP],
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )
    unet.save_pretrained(folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for new, old in OLD.items():
        tensors = {name.replace(f".{new}.", f".{old}."): t for name, t in tensors.items()}
    save_file(tensors, path, {"format": "pt"})
    keep = """_class_name act_fn attention_head_dim block_out_channels center_input_sample
        down_block_types downsample_padding flip_sin_to_cos freq_shift in_channels layers_per_block
        mid_block_scale_factor norm_eps norm_num_groups out_channels sample_size time_embedding_type
        up_block_types""".split()
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {key: config[key] for key in keep})
    scheduler = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.1.1",
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "clip_sample": True,
        "num_train_timesteps": 1000,
        "trained_betas": None,
        "variance_type": "fixed_large",
    }
    write_json(folder / "scheduler_config.json", scheduler)
    index: dict[str, Any] = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.1.1"}
    index |= {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    write_json(folder / "model_index.json", index)


def make_ddpm_labels(folder: Path) -> None:
    """A table of classes, grey pictures that are not square, scale_shift; float16.

    As diffusers writes it today, but that the scheduler's file does not say that it clips.
    """
    unet = make_unet(
        210,
        label=3,
        sample_size=(12, 16),
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 24, 32),
        down_block_types=[DOWN, ATTN_DOWN, ATTN_DOWN],
        up_block_types=[ATTN_UP, ATTN_UP, UP],
        layers_per_block=1,
        attention_head_dim=8,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=10,
    )
    unet.class_embedding.weight.data *= 4  # so that a wrong class shows
    DDPMPipeline(unet.to(torch.float16), DDPMScheduler()).save_pretrained(folder)
    path = folder / "scheduler/scheduler_config.json"
    config = json.loads(path.read_text())
    del config["clip_sample"], config["clip_sample_range"]
    write_json(path, config)


def make_ddim_numbers(folder: Path) -> None:
    """Classes that are embedded as timesteps are; a DDIMPipeline that predicts v; bfloat16."""
    unet = make_unet(
        220,
        label=7.0,
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=[ATTN_DOWN, DOWN],
        up_block_types=[UP, ATTN_UP],
        attention_head_dim=4,
        add_attention=False,
        class_embed_type="timestep",
    )
    scheduler = DDIMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
    DDIMPipeline(unet.to(torch.bfloat16), scheduler).save_pretrained(folder)


MAKERS = {
    "ddpm": make_ddpm,
    "ddpm-labels": make_ddpm_labels,
    "ddim-numbers": make_ddim_numbers,
}
PICTURES: dict[str, dict[str, dict[str, Any]]] = {
    "ddpm": {
        "ddpm": {"seed": 0, "steps": 25},
        "ddpm-two": {"seed": 7, "steps": 10, "count": 2, "sampler": "ddpm"},
        "ddim": {"seed": 0, "steps": 8, "sampler": "ddim"},
        "ddim-eta": {"seed": 2, "steps": 12, "sampler": "ddim", "eta": 0.7},
    },
    "ddpm-labels": {
        "label-3": {"seed": 0, "steps": 20, "label": 3},
        "label-0": {"seed": 0, "steps": 20, "label": 0},
        "label-9-ddim": {"seed": 4, "steps": 5, "label": 9, "sampler": "ddim", "count": 2},
    },
    "ddim-numbers": {
        "label-0": {"seed": 0, "label": 0},
        "label-7": {"seed": 3, "steps": 9, "label": 7, "eta": 1.0},
        "label-7-ddpm": {"seed": 3, "steps": 15, "label": 7, "sampler": "ddpm"},
    },
}


def load(name: str, sampler: str | None) -> Any:
    """The pipeline of the checkpoint's own class, or that of a sampler."""
    index = json.loads((HERE / name / "checkpoint/model_index.json").read_text())
    own = {"DDPMPipeline": "ddpm", "DDIMPipeline": "ddim"}[index["_class_name"]]
    kind = {"ddpm": DDPMPipeline, "ddim": DDIMPipeline}[sampler or own]
    pipe = DDPMPipeline.from_pretrained(HERE / name / "checkpoint", dtype=torch.float32)
    if (sampler or own) == "ddpm":
        pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    pipe = kind(pipe.unet, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(name: str, arguments: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (B, H, W, C) as the sampler leaves them, and uint8 pictures."""
    pipe = load(name, arguments.get("sampler"))
    options = {"steps": "num_inference_steps", "eta": "eta"}
    given = {options[key]: value for key, value in arguments.items() if key in options}
    if "label" in arguments:
        kind = torch.float32 if pipe.unet.config.class_embed_type else torch.int64
        label = torch.tensor([arguments["label"]], dtype=kind)
        pipe.unet.forward = partial(pipe.unet.forward, class_labels=label)
    step, last, pixels, images = pipe.scheduler.step, [], [], []

    def keep(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        last[:] = [result.prev_sample]
        return result

    pipe.scheduler.step = keep
    seed = arguments["seed"]
    for one in range(seed, seed + arguments.get("count", 1)):
        generator = torch.Generator("cpu").manual_seed(one)
        image = pipe(generator=generator, output_type="np", **given).images
        pixels.append(nhwc(last[0]))
        images.append((image * 255).round().astype(np.uint8))
    return np.concatenate(pixels), np.concatenate(images)


def unet_arrays(name: str) -> dict[str, np.ndarray]:
    """The U-Net on a batch of two at two times, and of two classes."""
    unet = load(name, None).unet
    config, generator = unet.config, torch.Generator().manual_seed(3)
    inputs = {"sample": torch.randn((2, config.in_channels, 16, 8), generator=generator)}
    inputs["timesteps"] = torch.tensor([999.0, 21.0])
    if config.num_class_embeds:
        inputs["class_labels"] = torch.tensor([9, 2])
    elif config.class_embed_type == "timestep":
        inputs["class_labels"] = torch.tensor([7.0, 0.5])
    output = unet(inputs["sample"], inputs["timesteps"], inputs.get("class_labels")).sample
    arrays = {f"unet/{key}": value.numpy() for key, value in inputs.items()}
    if config.num_class_embeds:
        arrays["unet/class_labels"] = arrays["unet/class_labels"].astype(np.int32)
    return arrays | {"unet/sample": nhwc(inputs["sample"]), "unet/output": nhwc(output)}


@torch.no_grad()
def main() -> None:
    """Write each model's checkpoint, components.npz, pictures.npz and cases.json."""
    for name, make in MAKERS.items():
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        make(folder / "checkpoint")
        text = json.dumps({"prompts": [], "pictures": PICTURES[name]}, indent=1)
        (folder / "cases.json").write_text(text + "\n", encoding="utf-8")
        np.savez_compressed(folder / "components.npz", **unet_arrays(name))
        pictures: dict[str, np.ndarray] = {}
        for case, arguments in PICTURES[name].items():
            pixels, image = run(name, arguments)
            pictures[f"{case}/latents"], pictures[f"{case}/image"] = pixels, image
            clipped = np.isin(image, (0, 255)).mean()
            print(f"{name} {case}: contrast {image.std():.0f}, clipped {clipped:.1%}", flush=True)
        np.savez_compressed(folder / "pictures.npz", **pictures)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
