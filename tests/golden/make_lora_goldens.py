"""Compute pictures of the tiny checkpoints under LoRAs with diffusers and peft.

    python tests/golden/make_lora_goldens.py [CASE ...]

The LoRA files are those of tests/lora_files.py, read by diffusers' own loader, which must use all
of each. For each picture it is printed how far it is from the one without a LoRA.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from golden_data import picture_difference  # noqa: E402
from lora_files import write  # noqa: E402
from make_goldens import TREE, load, picture, run  # noqa: E402

PICTURES: dict[str, dict[str, Any]] = {
    "peft": picture(model="sd15", loras=[["sd15-peft", 1.0]]),
    "peft-negative-scale": picture(TREE, model="sd15", loras=[["sd15-peft", -0.6]], width=96),
    "rslora": picture(model="sd15", loras=[["sd15-rslora", 1.0]], seed=1),
    "kohya": picture(model="sd15", loras=[["sd15-kohya", 0.7]], seed=2),
    "processor": picture(model="sd15", loras=[["sd15-processor", 1.0]], seed=3),
    "dora": picture(model="sd15", loras=[["sd15-dora", 1.0]], seed=4),
    "dora-scaled": picture(model="sd15", loras=[["sd15-dora", 0.5]], seed=4),
    "two": picture(model="sd15", loras=[["sd15-peft", 0.8], ["sd15-kohya", -0.5]], seed=5, count=2),
    "dora-and-kohya": picture(model="sd15", loras=[["sd15-dora", 1.0], ["sd15-kohya", 0.5]]),
    "sd21v-kohya": picture(model="sd21v", loras=[["sd21v-kohya", 0.8]], guidance=5.0),
    "sdxl-peft": picture(model="sdxl", loras=[["sdxl-peft", 1.0]], guidance=5.0),
    "sdxl-kohya": picture(model="sdxl", loras=[["sdxl-kohya", 0.7]], guidance=5.0, seed=1),
    "sdxl-sgm": picture(TREE, model="sdxl", loras=[["sdxl-sgm", 0.7]], guidance=5.0, seed=2),
    "sdxl-two": picture(
        model="sdxl", loras=[["sdxl-sgm", 0.5], ["sdxl-peft", 0.5]], guidance=5.0, height=96
    ),
}


def with_loras(arguments: dict[str, Any], folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Latents and pictures by diffusers."""
    pipe = load(arguments["model"], torch.float32)
    names, scales = [], []
    for i, (file, scale) in enumerate(arguments["loras"]):
        pipe.load_lora_weights(str(write(file, folder)), adapter_name=f"adapter_{i}")
        names.append(f"adapter_{i}")
        scales.append(scale)
    pipe.set_adapters(names, scales)
    for i, (file, _) in enumerate(arguments["loras"]):
        used = sum(
            f".adapter_{i}" in name and "lora_" in name
            for part in ("unet", "text_encoder", "text_encoder_2")
            for name in (getattr(pipe, part, None) or torch.nn.Module()).state_dict()
        )
        with safe_open(write(file, folder), "np") as opened:
            given = sum("alpha" not in name for name in opened.keys())
        assert used == given, f"{file}: diffusers used {used} of {given} tensors"
    return run(pipe, {k: v for k, v in arguments.items() if k not in ("model", "loras")})


def main() -> None:
    warnings.filterwarnings("ignore")
    target, arrays = HERE / "lora", {}
    chosen = sys.argv[1:] or list(PICTURES)
    if len(chosen) < len(PICTURES):
        arrays = dict(np.load(target / "pictures.npz"))
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            arguments = PICTURES[name]
            latents, image = with_loras(arguments, Path(folder))
            arrays[f"{name}/latents"], arrays[f"{name}/image"] = latents, image
            plain = run(
                load(arguments["model"], torch.float32),
                {k: v for k, v in arguments.items() if k not in ("model", "loras")},
            )[1]
            within, mean = picture_difference(image, plain)
            print(f"{name:20} {within:7.2%} within a level of no LoRA, mean {mean:.2f}", flush=True)
    target.mkdir(exist_ok=True)
    np.savez_compressed(target / "pictures.npz", **arrays)
    text = json.dumps({"pictures": PICTURES}, indent=2) + "\n"
    (target / "cases.json").write_text(text)


if __name__ == "__main__":
    main()
