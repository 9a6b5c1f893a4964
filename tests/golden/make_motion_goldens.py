"""Write videos that diffusers' AnimateDiff pipelines draw: motion/cases.json and videos.npz.

    python tests/golden/make_motion_goldens.py [CASE ...]

The adapters are made by tests/motion_files.py. The scheduler's betas are linear, as its users must
set them; mlxdiff does so by itself. A video is stored as frames (F, H, W, 3).
"""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import additions
import diffusers
import numpy as np
import torch
from drawing import HERE, TREE, case, generator, opened, pictures, prepare, words
from golden_data import photo
from motion_files import motion_lora, write_motion
from PIL import Image

SMALL = {"width": 32, "height": 32, "steps": 4}
CASES: dict[str, dict[str, Any]] = {
    "four": case(**SMALL, frames=4, sampler="ddim", guidance=7.5),
    "sixteen": case(TREE, **SMALL | {"steps": 2}, frames=16, sampler="dpmpp-2m", seed=3),
    "windows": case(**SMALL | {"steps": 2}, frames=24, motion_adapter="v1", sampler="ddim", seed=1),
    "last-window": case(
        **SMALL, frames=8, context_length=5, context_stride=2, sampler="euler", guidance=1.0
    ),
    "noisy": case(**SMALL, frames=3, sampler="euler-a", negative_prompt="blurry"),
    "lcm": case(**SMALL, frames=4, sampler="lcm", guidance=2.0),
    "sdxl": case(**SMALL, frames=4, model="sdxl", motion_adapter="xl", sampler="ddim",
                 guidance_rescale=0.5, negative_prompt="blurry"),
    "lora": case(**SMALL, frames=4, sampler="ddim", loras=[["sd15-peft", 0.8]]),
    "motion-lora": case(**SMALL, frames=4, sampler="ddim", motion_lora=0.7),
    "freeu": case(**SMALL, frames=4, sampler="ddim", freeu=[1.5, 1.6, 0.9, 0.2]),
    "video": case(**SMALL | {"steps": 6}, image=["video", 4], sampler="dpmpp-2m", strength=0.6),
    "picture": case(**SMALL, image=["picture", 4], frames=4, sampler="ddim", strength=0.8),
    "control": case(**SMALL, frames=4, sampler="ddim", controlnets=["first"],
                    control_video=[4], control_scale=0.7, control_end=0.8),
    "video-control": case(**SMALL, image=["video", 4], sampler="ddim", strength=0.75,
                          controlnets=["first"], control_video=[4]),
    "ip-adapter": case(**SMALL, frames=3, sampler="ddim", ip_adapters=["image"],
                       ip_image=[[50, 60]], ip_scale=0.7),
}  # fmt: skip
CASES = {k: {"model": "sd15", "motion_adapter": "v2"} | v for k, v in CASES.items()}
FILES = tempfile.TemporaryDirectory(prefix="mlxdiff-golden-")


def adapter(arguments: dict[str, Any]) -> diffusers.MotionAdapter:
    """The motion adapter of a case."""
    folder = Path(FILES.name) / arguments["model"] / arguments["motion_adapter"]
    if not folder.exists():
        write_motion(folder, arguments["motion_adapter"], arguments["model"])
    return diffusers.MotionAdapter.from_pretrained(folder, dtype=torch.float32).eval()


def frames_of(video: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in video]


def given_video(kind: str, count: int) -> np.ndarray:
    """A video, or a picture for each of its frames: uint8 (F, 32, 32, 3)."""
    return np.stack([photo(32 + 4 * i * (kind == "video"), 32)[:32] for i in range(count)])


def pipeline(arguments: dict[str, Any]) -> Any:
    """The pipeline of a case with all that is added."""
    pipe = opened(arguments["model"])
    xl = hasattr(pipe, "text_encoder_2")
    name = "AnimateDiff" + ("VideoToVideo" if "image" in arguments else "")
    name += "ControlNet" if "controlnets" in arguments else ""
    kind = diffusers.AnimateDiffSDXLPipeline if xl else getattr(diffusers, f"{name}Pipeline")
    known = inspect.signature(kind.__init__).parameters
    parts = {name: part for name, part in pipe.components.items() if name in known}
    if "controlnets" in arguments:
        (net,) = arguments["controlnets"]
        parts["controlnet"] = additions.controlnet(arguments["model"], net)
    pipe = kind(motion_adapter=adapter(arguments), **parts)
    if xl:
        # UNetMotionModel.from_unet2d (diffusers 0.42.1) forgets this one: it would be random.
        own = parts["unet"].add_embedding
        pipe.unet.add_embedding.load_state_dict(own.state_dict())
    pipe = prepare(pipe, arguments)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, beta_schedule="linear")
    for i, (file, scale) in enumerate(arguments.get("loras", [])):
        path = additions.write_lora(file, Path(additions.LORAS.name))
        pipe.load_lora_weights(str(path), adapter_name=f"lora_{i}")
        pipe.set_adapters([f"lora_{i}"], [scale])
    if "motion_lora" in arguments:
        tensors = motion_lora(arguments["motion_adapter"], arguments["model"])
        state = {name: torch.from_numpy(array) for name, array in tensors.items()}
        pipe.load_lora_weights(state, adapter_name="motion")
        pipe.set_adapters(["motion"], [arguments["motion_lora"]])
    if "ip_adapters" in arguments:
        additions.add_adapters(pipe, arguments)
    if "freeu" in arguments:
        b1, b2, s1, s2 = arguments["freeu"]
        pipe.unet.enable_freeu(s1=s1, s2=s2, b1=b1, b2=b2)
    length = arguments.get("context_length", 16)
    if arguments.get("frames", 0) > length:
        pipe.enable_free_noise(length, arguments.get("context_stride", 4))
    return pipe


def run(arguments: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Latents (F, h, w, C) and frames (F, H, W, 3) of a case."""
    pipe = pipeline(arguments)
    given = words(arguments) | {"generator": generator(arguments["seed"])}
    given |= {side: arguments[side] for side in ("width", "height")}
    if "image" in arguments:
        given["video"] = frames_of(given_video(*arguments["image"]))
    else:
        given["num_frames"] = arguments["frames"]
    if "control_video" in arguments:
        shown = frames_of(given_video("video", *arguments["control_video"])[:, ::-1])
        given["conditioning_frames"] = shown
        given.setdefault("controlnet_conditioning_scale", 1.0)
    if "ip_image" in arguments:
        given["ip_adapter_image"] = [pictures(photo, arguments["ip_image"])]
    last: dict[str, torch.Tensor] = {}

    def keep(pipe: Any, step: int, time: Any, state: dict[str, Any]) -> dict[str, Any]:
        last.update(state)
        return state

    (video,) = pipe(
        prompt=arguments["prompt"], output_type="np", callback_on_step_end=keep, **given
    ).frames
    latents = last["latents"][0].permute(1, 2, 3, 0).numpy()
    return latents, (video * 255).round().astype(np.uint8)


def main(names: list[str]) -> None:
    folder = HERE / "motion"
    folder.mkdir(exist_ok=True)
    text = json.dumps({"videos": CASES}, indent=1) + "\n"
    (folder / "cases.json").write_text(text, encoding="utf-8")
    arrays: dict[str, np.ndarray] = {}
    if names:
        with np.load(folder / "videos.npz") as before:
            arrays = {k: before[k] for k in before.files if k.split("/")[0] in CASES}
    for label in names or CASES:
        latents, frames = run(CASES[label])
        arrays[f"{label}/latents"], arrays[f"{label}/frames"] = latents, frames
        moving = np.abs(np.diff(frames.astype(int), axis=0)).mean()
        print(f"{label}: contrast {frames.std():.0f}, change {moving:.1f}", flush=True)
    np.savez_compressed(folder / "videos.npz", **arrays)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    with torch.no_grad():
        main(sys.argv[1:])
