"""Draw along a picture's edges: outlines from the picture, colors from the prompt.

    python follow_edges.py
    python follow_edges.py MODEL CONTROLNET PICTURE "a prompt"

The first takes a picture that the built-in model drew, and the ControlNet that
examples/train_control trained for it. The second takes a picture, a model and a ControlNet of
yours, such as sd15 and lllyasviel/control_v11p_sd15_canny.
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
    result.images[0].save("followed.png")
    print(f"followed.png along the edges of {picture}")
    sys.exit()

EDGES = Path(__file__).parent / "train_control" / "edges"
pipe = mlxdiff.load()
prompt = "a red heart left of a blue ring on a white background"
given = pipe.generate(prompt, seed=0, guidance=4).images[0]
row = [given, Image.fromarray(edges(np.asarray(given)))]
pipe.set_controlnets([EDGES])
for prompt in (
    "a yellow heart left of a purple ring on a black background",
    "a black heart left of a green ring on a pink background",
):
    told = {"control_image": given, "control_preprocess": "edges", "seed": 1, "guidance": 4}
    row.append(pipe.generate(prompt, **told).images[0])

sheet = Image.new("RGB", (len(row) * given.width, given.height))
for i, picture in enumerate(row):
    sheet.paste(picture, (i * given.width, 0))
sheet.save("follow_edges.png")
print("follow_edges.png: a picture, its edges, and two pictures drawn along them")
