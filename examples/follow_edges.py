"""Draw along a picture's edges: outlines from the picture, colors from the prompt.

    python follow_edges.py
    python follow_edges.py MODEL CONTROLNET PICTURE "a prompt"

The first command uses a picture of the built-in model and the ControlNet that
examples/train_control trained for it. The second uses your own model, ControlNet and picture, for
example sd15 and lllyasviel/control_v11p_sd15_canny.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import mlxdiff
from mlxdiff.pictures.preprocess import edges

if len(sys.argv) > 1:
    model, controlnet, picture, prompt = sys.argv[1:]
    pipe = mlxdiff.load(model, controlnets=[controlnet])
    result = pipe.generate(prompt, control_image=picture, control_preprocess="edges", seed=0)
    result.save("followed.png", overwrite=True)
    print(f"followed.png follows the edges of {picture}")
    sys.exit()

EDGES = Path(__file__).parent / "train_control" / "edges"
pipe = mlxdiff.load()
prompt = "a red heart left of a blue ring on a white background"
original = pipe.generate(prompt, seed=0, guidance=4).images[0]
row = [original, Image.fromarray(edges(np.asarray(original)))]
pipe.set_controlnets([EDGES])
for prompt in (
    "a yellow heart left of a purple ring on a black background",
    "a black heart left of a green ring on a pink background",
):
    options = {"control_image": original, "control_preprocess": "edges", "seed": 1, "guidance": 4}
    row.append(pipe.generate(prompt, **options).images[0])

sheet = Image.new("RGB", (len(row) * original.width, original.height))
for i, picture in enumerate(row):
    sheet.paste(picture, (i * original.width, 0))
sheet.save("follow_edges.png")
print("follow_edges.png: a picture, its edges, and two pictures that follow them")
