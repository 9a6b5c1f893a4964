"""Watch a picture while it is drawn: every step of ``Pipeline.stream``, side by side."""

from PIL import Image

import mlxdiff

pipe = mlxdiff.load()
previews = []
for step in pipe.stream("a large yellow star on a blue background", seed=1, steps=8, guidance=4):
    previews.append(step.preview())
    print(f"step {step.index + 1} of {step.total}: {step.seconds:.3f} s")

width, height = previews[0].size
strip = Image.new("RGB", (width * len(previews), height))
for i, preview in enumerate(previews):
    strip.paste(preview, (i * width, 0))
strip.save("steps.png")
print("steps.png")
