"""Add a style to a model: the built-in model with a LoRA that draws outlines, at four scales.

examples/train_lora/train.py trained the LoRA in a few minutes on one core.
"""

from pathlib import Path

from PIL import Image

import mlxdiff

OUTLINE = Path(__file__).parent / "train_lora" / "outline.safetensors"
PROMPTS = (
    "a large blue star on a white background",
    "a small red circle left of a large green square on a yellow background",
    "a large pink heart on a black background",
)
SCALES = (0.0, 0.5, 1.0, 1.3)

pipe = mlxdiff.load()
rows = []
for scale in SCALES:
    pipe.set_loras([(OUTLINE, scale)] if scale else [])  # replaces all earlier LoRAs
    drawn = [pipe.generate(text, seed=1, steps=12, guidance=4).images[0] for text in PROMPTS]
    rows.append(drawn)
    print(pipe.loras[0].report() if scale else "the model without a LoRA")

side = rows[0][0].width
sheet = Image.new("RGB", (len(PROMPTS) * side, len(SCALES) * side))
for y, drawn in enumerate(rows):
    for x, picture in enumerate(drawn):
        sheet.paste(picture, (x * side, y * side))
sheet.save("style_lora.png")
print("style_lora.png: one row for each scale:", ", ".join(map(str, SCALES)))
