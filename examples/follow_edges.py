"""A picture's edges, for a ControlNet to follow.

    python follow_edges.py
    python follow_edges.py MODEL CONTROLNET PICTURE "a prompt"

The first draws a picture with the built-in model and writes its edges beside it. The second draws
what the prompt says along the edges of a picture, with a model and a ControlNet made for it, such
as sd15 and lllyasviel/control_v11p_sd15_canny.
"""

import sys

import numpy as np
from PIL import Image

import mlxdiff
from mlxdiff.preprocess import edges

if len(sys.argv) == 1:
    drawn = mlxdiff.load().generate("a red circle on a blue background", seed=0, guidance=4)
    drawn.images[0].save("circle.png")
    lines = edges(np.asarray(drawn.images[0]))
    Image.fromarray(lines).save("circle-edges.png")
    print(f"circle-edges.png: {(lines > 0).mean():.1%} of the picture is edge")
else:
    model, controlnet, picture, prompt = sys.argv[1:]
    pipe = mlxdiff.load(model, controlnets=[controlnet])
    result = pipe.generate(prompt, control_image=picture, control_preprocess="edges", seed=0)
    result.images[0].save("followed.png")
    print(f"followed.png along the edges of {picture}")
