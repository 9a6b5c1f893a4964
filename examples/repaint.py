"""Repaint part of a picture, then extend it beyond its edge. repaint.png shows the results."""

import numpy as np
from PIL import Image

import mlxdiff

pipe = mlxdiff.load()  # the built-in model; an inpainting model accepts the same arguments
options = {"guidance": 4, "steps": 12}
first = pipe.generate("a large red circle on the left on a blue background", seed=0, **options)
picture = first.images[0]

mask = np.zeros((picture.height, picture.width), bool)
mask[:, picture.width // 2 :] = True  # true, or white, marks the area to repaint
prompt = "a large red circle left of a small yellow star on a blue background"
inputs = {"image": picture, "mask": mask, "paste_original": True}
repainted = pipe.generate(prompt, seed=1, **inputs, **options).images[0]

half = picture.height // 2
prompt = "a large red circle above a small green square on a blue background"
inputs = {"image": picture, "outpaint": (0, 0, 0, half), "paste_original": True}
taller = pipe.generate(prompt, seed=1, **inputs, **options).images[0]

pictures = [picture, Image.fromarray(mask).convert("RGB"), repainted, taller]
strip = Image.new("RGB", (4 * picture.width + 24, picture.height + half), "gray")
for i, one in enumerate(pictures):
    strip.paste(one, (i * (picture.width + 8), 0))
strip.save("repaint.png")
same = np.array_equal(np.asarray(repainted)[~mask], np.asarray(picture)[~mask])
print(f"repaint.png; the area outside the mask is unchanged: {same}")
