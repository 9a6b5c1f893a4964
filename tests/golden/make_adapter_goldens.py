"""Write pictures that IP-Adapters have a part in: ip-adapter/cases.json, pictures.npz and clip.npz.

    python tests/golden/make_adapter_goldens.py [CASE ...]

The models are the tiny ones of this folder; adapters and image encoder are made by
tests/adapter_files.py, in the tests as here, and are not stored. The pictures that are shown are
golden_data.photo of several sizes; clip.npz has what transformers' CLIP makes of them.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np
import torch
from additions import encoder, processor, run
from drawing import HERE, TREE, case, nhwc, write_pictures
from golden_data import photo
from PIL import Image

SQUARE = {"width": 64, "height": 64, "sampler": "dpmpp-2m"}
WIDE = {"width": 72, "height": 56, "sampler": "dpmpp-2m"}
SEEN = {"ip_image": [[40, 90]]}
PICTURES: dict[str, dict[str, Any]] = {
    "sd15": case(**WIDE, **SEEN),
    "sd15-unguided": case(**SQUARE, **SEEN, guidance=1.0),
    "sd15-scale": case(TREE, **SQUARE, **SEEN, ip_scale=0.4, negative_prompt="blurry", count=2),
    "sd15-three-pictures": case(**SQUARE, ip_image=[[40, 90], [28, 28], [61, 33]]),
    "sd15-image": case(image=[64, 64], sampler="euler", strength=0.7, **SEEN),
    "sd15-plus": case(**WIDE, **SEEN, ip_adapters=["plus"], ip_scale=0.8),
    "sd15-plus-unguided": case(**SQUARE, **SEEN, ip_adapters=["plus"], guidance=1.0),
    "sd15-full": case(**SQUARE, **SEEN, ip_adapters=["full"]),
    "sd15-two": case(
        **SQUARE, ip_adapters=["image", "plus"], ip_image=[[40, 90], [61, 33]], ip_scale=[0.7, 0.3]
    ),
    "sd21v": case(**SQUARE, **SEEN, model="sd21v"),
    "sdxl": case(**WIDE, **SEEN, model="sdxl"),
    "sdxl-plus": case(TREE, **SQUARE, **SEEN, model="sdxl", ip_adapters=["plus"], count=2),
}
PICTURES = {k: {"model": "sd15", "ip_adapters": ["image"]} | v for k, v in PICTURES.items()}


def clip_arrays() -> dict[str, np.ndarray]:
    """Pixels, embeddings and penultimate states of pictures of several sizes."""
    arrays = {}
    for height, width in ((40, 90), (61, 33), (28, 28), (15, 200)):
        pixels = processor()(Image.fromarray(photo(height, width)), return_tensors="pt")
        out = encoder()(pixels.pixel_values, output_hidden_states=True)
        arrays[f"{height}x{width}/pixels"] = nhwc(pixels.pixel_values)
        arrays[f"{height}x{width}/image_embeds"] = out.image_embeds.numpy()
        arrays[f"{height}x{width}/penultimate"] = out.hidden_states[-2].numpy()
    return arrays


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    with torch.no_grad():
        write_pictures(HERE / "ip-adapter", PICTURES, run, sys.argv[1:])
        np.savez_compressed(HERE / "ip-adapter" / "clip.npz", **clip_arrays())
