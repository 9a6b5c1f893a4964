"""Write what transformers' CLIPModel says of pictures and texts, for tests/clip_files.py.

Needs torch and transformers. Run from the repository:

    PYTHONPATH=tests python tests/golden/make_clip_goldens.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from clip_files import FORMS, TEXTS, write_clip
from golden_data import photo
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

HERE = Path(__file__).resolve().parent
SIZES = (28, 28), (40, 61), (90, 33), (20, 25)


@torch.no_grad()
def main() -> None:
    arrays = {}
    for form in FORMS:
        with tempfile.TemporaryDirectory() as name:
            folder = write_clip(Path(name) / "clip", form)
            model = CLIPModel.from_pretrained(folder, torch_dtype=torch.float32)
            tokenizer = CLIPTokenizer.from_pretrained(folder)
            processor = CLIPImageProcessorPil.from_pretrained(folder)
        ids = tokenizer(TEXTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
        pictures = [Image.fromarray(photo(*size)) for size in SIZES]
        pixels = processor(pictures, return_tensors="pt").pixel_values
        out = model(input_ids=ids, pixel_values=pixels)
        arrays[f"{form}/logits"] = out.logits_per_image.numpy()
        arrays[f"{form}/shares"] = out.logits_per_image.softmax(1).numpy()
        images = out.image_embeds / out.image_embeds.norm(dim=-1, keepdim=True)
        arrays[f"{form}/cosines"] = (images @ images.T).numpy()
        print(form, arrays[f"{form}/logits"].round(2).tolist())
    np.savez_compressed(HERE / "clip.npz", **arrays)


if __name__ == "__main__":
    main()
