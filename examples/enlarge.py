"""Draw small pictures; enlarge them four times by pixels, by Lanczos and by a network."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

import mlxdiff

PROMPTS = (
    "a small red star left of a large blue ring on a white background",
    "a large green heart above a small black circle on a pink background",
    "a large yellow star on a blue background",
)
FILE = Path(__file__).parent / "train_upscaler" / "shapes-x4.safetensors"

pipe = mlxdiff.load()
upscaler = mlxdiff.load_upscaler(FILE)
sheet = Image.new("RGB", (3 * 256 + 16, len(PROMPTS) * 256 + 8 * (len(PROMPTS) - 1)), "white")
for row, prompt in enumerate(PROMPTS):
    small = pipe.generate(prompt, seed=4, guidance=4).images[0]
    ways = (
        small.resize((256, 256), Image.Resampling.NEAREST),
        small.resize((256, 256), Image.Resampling.LANCZOS),
        upscaler.picture(small),
    )
    for column, large in enumerate(ways):
        sheet.paste(large, (264 * column, 264 * row))
sheet.save("enlarged.png")
print("enlarged.png: pixels, Lanczos, network")
