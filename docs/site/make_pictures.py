"""Draw the pictures of docs/pictures.md with the built-in model.

    python docs/site/make_pictures.py [NAME ...]

The built-in model draws 64x64 pixels. Pictures are enlarged without smoothing, so that every pixel
shows. Takes about two minutes of one core.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

import mlxdiff

FOLDER = Path(__file__).resolve().parent.parent / "pictures"
PROMPT = "a small red circle left of a large blue square on a yellow background"
OTHER = "a purple star above an orange heart on a white background"
SIZE, EDGE, TITLE = 128, 8, 24  # pixels: of a picture, between two, of a line of text
FONT = ImageFont.load_default(15)


def sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], titles: Sequence[str], left: int = 0
) -> Image.Image:
    """Return rows of pictures with a title above each column and at the left of each row."""
    width = left + len(titles) * (SIZE + EDGE) + EDGE
    height = TITLE + len(rows) * (SIZE + EDGE) + EDGE
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        x = left + EDGE + column * (SIZE + EDGE)
        draw.text((x + SIZE // 2, TITLE // 2 + 2), title, "black", FONT, anchor="mm")
    for index, (name, pictures) in enumerate(rows):
        y = TITLE + index * (SIZE + EDGE)
        if left:
            draw.text((EDGE, y + SIZE // 2), name, "black", FONT, anchor="lm")
        for column, picture in enumerate(pictures):
            large = picture.resize((SIZE, SIZE), Image.Resampling.NEAREST)
            canvas.paste(large, (left + EDGE + column * (SIZE + EDGE), y))
    return canvas


def draw(pipe: mlxdiff.Pipeline, prompt: str = PROMPT, **options: Any) -> Image.Image:
    """Return one picture."""
    return pipe.generate(prompt, **({"seed": 0, "guidance": 4, "steps": 12} | options)).images[0]


def guidance(pipe: mlxdiff.Pipeline) -> Image.Image:
    scales = (1, 2, 4, 7, 12)
    rows = [
        (f"seed {seed}", [draw(pipe, OTHER, guidance=g, seed=seed, steps=20) for g in scales])
        for seed in (3, 5)
    ]
    return sheet(rows, [f"-g {g}" for g in scales], 70)


def samplers(pipe: mlxdiff.Pipeline) -> Image.Image:
    steps = (2, 4, 6, 10, 20)
    names = ("dpmpp-2m", "unipc", "euler", "ddim", "euler-a", "heun")
    rows = [(name, [draw(pipe, sampler=name, steps=n) for n in steps]) for name in names]
    return sheet(rows, [f"{n} steps" for n in steps], 90)


def strength(pipe: mlxdiff.Pipeline) -> Image.Image:
    start = draw(pipe)
    values = (0.2, 0.4, 0.6, 0.8, 1.0)
    drawn = [draw(pipe, OTHER, image=start, strength=s, seed=1, steps=20) for s in values]
    return sheet([("", [start, *drawn])], ["the picture", *(f"{s}" for s in values)])


def quantization(pipe: mlxdiff.Pipeline) -> Image.Image:
    bits = (None, 8, 6, 4, 3, 2)
    pipes = [pipe if one is None else mlxdiff.load(quantize=one) for one in bits]
    rows = [
        (f"seed {seed}", [draw(one, prompt, seed=seed) for one in pipes])
        for seed, prompt in ((0, PROMPT), (3, OTHER))
    ]
    return sheet(rows, ["float32", *(f"-q {one}" for one in bits[1:])], 70)


def seeds(pipe: mlxdiff.Pipeline) -> Image.Image:
    first = [draw(pipe, seed=seed) for seed in range(6)]
    second = [draw(pipe, OTHER, seed=seed) for seed in range(6)]
    return sheet([("", first), ("", second)], [f"seed {seed}" for seed in range(6)])


def steps(pipe: mlxdiff.Pipeline) -> Image.Image:
    run = pipe.stream(PROMPT, seed=0, guidance=4, steps=12)
    shown = [pipe.decode(step.denoised[None])[0] for step in run]
    every = range(0, 12, 2)
    pictures = [*(shown[i] for i in every), run.result.images[0]]
    return sheet([("", pictures)], [*(f"step {i + 1}" for i in every), "finished"])


SHEETS: dict[str, Callable[[mlxdiff.Pipeline], Image.Image]] = {
    "seeds": seeds,
    "guidance": guidance,
    "samplers": samplers,
    "steps": steps,
    "strength": strength,
    "quantization": quantization,
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    pipe = mlxdiff.load()
    for name in sys.argv[1:] or SHEETS:
        path = FOLDER / f"{name}.png"
        SHEETS[name](pipe).quantize(128).save(path, optimize=True)
        print(path.name, path.stat().st_size, flush=True)


if __name__ == "__main__":
    main()
