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

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import mlxdiff
from mlxdiff.pictures import preprocess

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "examples/train_builtin"))
import checker  # noqa: E402

FOLDER = ROOT / "docs/pictures"
PROMPT = "a small red circle left of a large blue square on a yellow background"
OTHER = "a purple star above an orange heart on a white background"
SIZE, EDGE, TITLE = 128, 8, 24  # pixels: of a picture, between two, of a line of text
FONT = ImageFont.load_default(15)


def sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    titles: Sequence[str],
    left: int = 0,
    size: int = SIZE,
    filter: Image.Resampling = Image.Resampling.NEAREST,
) -> Image.Image:
    """Return rows of pictures with a title above each column and at the left of each row."""
    width = left + len(titles) * (size + EDGE) + EDGE
    height = TITLE + len(rows) * (size + EDGE) + EDGE
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        x = left + EDGE + column * (size + EDGE)
        draw.text((x + size // 2, TITLE // 2 + 2), title, "black", FONT, anchor="mm")
    for index, (name, pictures) in enumerate(rows):
        y = TITLE + index * (size + EDGE)
        if left:
            draw.text((EDGE, y + size // 2), name, "black", FONT, anchor="lm")
        for column, picture in enumerate(pictures):
            times = size / max(picture.size)
            large = picture.resize(
                (round(picture.width * times), round(picture.height * times)), filter
            )
            x = left + EDGE + column * (size + EDGE)
            draw.rectangle((x - 1, y - 1, x + large.width, y + large.height), outline="gray")
            canvas.paste(large, (x, y))
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


def repaint(pipe: mlxdiff.Pipeline) -> Image.Image:
    picture = draw(pipe, "a large red circle on the left on a blue background")
    mask = Image.new("L", picture.size)
    mask.paste(255, (picture.width // 2, 0, *picture.size))
    prompt = "a large red circle left of a small yellow star on a blue background"
    options: dict[str, Any] = {"image": picture, "paste_original": True, "seed": 1}
    repainted = draw(pipe, prompt, mask=mask, **options)
    prompt = "a large red circle left of a small green square on a blue background"
    half = picture.width // 2
    wider = draw(pipe, prompt, outpaint=(0, 0, half, 0), **options)
    titles = ["the picture", "the mask", "--mask", "--outpaint 0,0,32,0"]
    return sheet([("", [picture, mask.convert("RGB"), repainted, wider])], titles)


def control(pipe: mlxdiff.Pipeline) -> Image.Image:
    picture = draw(
        pipe, "a large red ring left of a small yellow star on a blue background", seed=4
    )
    edges = Image.fromarray(preprocess.edges(np.asarray(picture)))
    prompt = "a large green ring left of a small pink star on a black background"
    led = mlxdiff.load(controlnets=[ROOT / "examples/train_control/edges"])
    seeds = range(4)
    rows = [
        ("without", [picture, edges, *(draw(pipe, prompt, seed=one) for one in seeds)]),
        (
            "with",
            [picture, edges, *(draw(led, prompt, seed=one, control_image=edges) for one in seeds)],
        ),
    ]
    return sheet(rows, ["a picture", "its edges", *(f"seed {one}" for one in seeds)], 74)


def styles(pipe: mlxdiff.Pipeline) -> Image.Image:
    scales = (0.0, 0.25, 0.5, 0.75, 1.0)
    outline = ROOT / "examples/train_lora/outline.safetensors"
    pipes = [mlxdiff.load(loras=[(outline, one)] if one else []) for one in scales]
    rows = [
        ("", [draw(one, prompt, seed=seed) for one in pipes])
        for seed, prompt in ((0, PROMPT), (3, OTHER))
    ]
    return sheet(rows, [f":{one:g}" for one in scales])


def previews(pipe: mlxdiff.Pipeline) -> Image.Image:
    run = pipe.stream(OTHER, seed=3, guidance=4, steps=12)
    noisy, guessed, sketched = [], [], []
    every = (0, 2, 4, 6, 8, 10)
    for step in run:
        if step.index in every:
            noisy.append(step.preview())
            guessed.append(pipe.decode(step.denoised[None])[0])
            sketched.append(step.sketch())
    rows = [("--preview", sketched), ("decoded", guessed), ("with noise", noisy)]
    return sheet(rows, [f"step {one + 1}" for one in every], 90)


def judge(pipe: mlxdiff.Pipeline) -> Image.Image:
    """Two steps are too few for this prompt with most seeds: the heart comes out black."""
    prompt = "a small red heart to the left of a large orange square on a white background"
    drawn = pipe.generate(prompt, seed=100, count=6, steps=2, guidance=4).images
    right = [checker.check(np.asarray(one), prompt).right for one in drawn]
    titles = [f"{100 + i}: {'right' if one else 'wrong'}" for i, one in enumerate(right)]
    return sheet([("", drawn)], titles)


EMOJI = (
    ("a fox in a meadow", "a cat at night", "a rocket at night", "a penguin in the snow"),
    ("a whale in the sea", "a lion at sunset", "a turtle on the beach", "a small house on green"),
    ("a pizza on blue", "a strawberry on pink", "a robot on yellow", "a unicorn on purple"),
)


def emoji(pipe: mlxdiff.Pipeline) -> Image.Image:
    """Draw each prompt once, with seed 0 and the model's defaults: nothing is picked."""
    opened = mlxdiff.load("emoji")
    rows = [
        sheet(
            [("", [opened.generate(one, seed=0).images[0] for one in prompts])],
            prompts,
            size=192,
            filter=Image.Resampling.LANCZOS,
        )
        for prompts in EMOJI
    ]
    canvas = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    for index, row in enumerate(rows):
        canvas.paste(row, (0, index * row.height))
    return canvas


SHEETS: dict[str, Callable[[mlxdiff.Pipeline], Image.Image]] = {
    "seeds": seeds,
    "guidance": guidance,
    "samplers": samplers,
    "steps": steps,
    "strength": strength,
    "quantization": quantization,
    "repaint": repaint,
    "control": control,
    "styles": styles,
    "previews": previews,
    "judge": judge,
    "emoji": emoji,
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    pipe = mlxdiff.load()
    for name in sys.argv[1:] or SHEETS:
        path = FOLDER / f"{name}.png"
        SHEETS[name](pipe).quantize(256 if name == "emoji" else 128).save(path, optimize=True)
        print(path.name, path.stat().st_size, flush=True)


if __name__ == "__main__":
    main()
