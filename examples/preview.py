"""Show the model's estimate of the picture after each step: ``Step.sketch``, side by side."""

from PIL import Image

import mlxdiff

pipe = mlxdiff.load()
prompt = "a large (yellow:1.2) [star|heart] on a blue background"
sketches = []
for step in pipe.stream(prompt, prompt_syntax="a1111", seed=1, steps=8, guidance=4):
    sketches.append(step.sketch().resize((64, 64), Image.Resampling.BICUBIC))
    print(f"step {step.index + 1} of {step.total}: sketched")

strip = Image.new("RGB", (64 * len(sketches), 64))
for i, sketch in enumerate(sketches):
    strip.paste(sketch, (64 * i, 0))
strip.save("sketches.png")
print("sketches.png")
