"""Measure how often a model draws everything in its prompts.

    python evaluate.py MODEL                          # the table by row set and attribute
    python evaluate.py MODEL --sweep guidance         # or: --sweep steps
    python evaluate.py MODEL --sheet sheet.png        # 48 unpicked prompts
    python evaluate.py MODEL --through mlxdiff        # a converted folder ("" is the built-in one)
    python evaluate.py "" --through mlxdiff --demo 10 # the documented prompts, seeds 0 to 9

MODEL is a diffusers folder by default. Prompts and seeds are fixed: fresh draws of the training
distribution and of the held-out pairs and combinations, in varying words, with no facts omitted.
"Right" means everything in the prompt, by `checker.py`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np

try:
    from . import checker, data
except ImportError:  # for a script, Python puts this folder on the path
    import checker
    import data

Generate = Callable[[Sequence[str], Sequence[int]], list[np.ndarray]]
"""A function from prompts and seeds to pictures, which are (H, W, 3) uint8 arrays."""

ROWS = {
    "1 object": (1, "train"),
    "1 object, held-out pair": (1, "pair"),
    "2 objects": (2, "train"),
    "2 objects, held-out pair": (2, "pair"),
    "2 objects, held-out combination": (2, "combination"),
}
DEMO = "a small red circle left of a large blue square on a yellow background"
DEMOS = (  # prompts of the project's documentation with their settings: prompt, steps, guidance
    (DEMO, 12, 4.0),
    (DEMO, 20, 4.0),
    ("a small red circle left of a large blue square", 20, 4.0),
    ("a small green triangle above a large purple square", 10, 4.0),
    ("a large yellow star on a blue background", 8, 4.0),
    ("a large red circle on the left on a blue background", 12, 4.0),
    ("a red circle on a blue background", 20, 7.5),
)


def through_diffusers(
    folder: str, steps: int = 12, guidance: float = 4.0, spacing: str | None = None
) -> Generate:
    """Generate with diffusers in float32, 32 pictures at a time."""
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, requires_safety_checker=False, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    changed = {"timestep_spacing": spacing} if spacing else {}
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, **changed
    )

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        pictures: list[np.ndarray] = []
        for start in range(0, len(prompts), 32):
            some = slice(start, start + 32)
            drawn = pipeline(
                list(prompts[some]),
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[some]],
                output_type="np",
            ).images
            pictures += list(np.round(drawn * 255).astype(np.uint8))
        return pictures

    return generate


def through_mlxdiff(
    folder: str | None,
    steps: int = 12,
    guidance: float = 4.0,
    sampler: str = "auto",
    schedule: str = "auto",
    **load,
) -> Generate:
    """Generate with this package. `load` goes to `mlxdiff.load` (backend, quantize, ...)."""
    import mlxdiff

    pipe = mlxdiff.load(folder or None, **load)
    options = {"steps": steps, "guidance": guidance, "sampler": sampler, "schedule": schedule}

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        return [
            np.asarray(pipe.generate(p, seed=s, **options).images[0])
            for p, s in zip(prompts, seeds, strict=True)
        ]

    return generate


def prompts_of(row: str, size: int) -> list[str]:
    """Return the fixed prompts of a row (the first `size` of an endless list)."""
    count, kind = ROWS[row]
    rng = np.random.default_rng((77, list(ROWS).index(row)))
    return [data.caption(data.random_spec(rng, count, kind), rng, True) for _ in range(size)]


def measure(generate: Generate, row: str, size: int = 256) -> dict[str, float]:
    """Return the right fractions in one row of the table: 'right' and every attribute."""
    prompts = prompts_of(row, size)
    return checker.score(generate(prompts, range(size)), prompts)


def error_of(fraction: float, size: int) -> float:
    """Return the standard error of a fraction, in percent."""
    return 100 * float(np.sqrt(max(fraction * (1 - fraction), 1e-9) / size))


def table(generate: Generate, size: int, rows: Sequence[str] = tuple(ROWS)) -> None:
    """Print a Markdown table in percent: a line for each row set, a column for each attribute."""
    names = ("right", *checker.ATTRIBUTES)
    print(f"| {size} prompts a row | " + " | ".join(names) + " | s.e. of right |")
    print("|---|" + "---|" * (len(names) + 1))
    for row in rows:
        result = measure(generate, row, size)
        cells = [f"{100 * result[name]:.1f}" if name in result else "–" for name in names]
        error = error_of(result["right"], size)
        print(f"| {row} | " + " | ".join(cells) + f" | {error:.1f} |", flush=True)


def sheet(generate: Generate, path: str, seed: int = 0) -> None:
    """Draw 48 unpicked prompts on one PNG (half one object, half two; every third held out)."""
    from PIL import Image, ImageDraw, ImageFont

    rng = np.random.default_rng(48)
    prompts = []
    for i in range(48):
        count = 1 + i % 2
        kind = ("pair", "combination")[count - 1] if i % 3 == 2 else "train"
        prompts.append(data.caption(data.random_spec(rng, count, kind), rng, True))
    pictures = generate(prompts, range(seed, seed + 48))
    wide, high, columns = 136, 190, 8
    image = Image.new("RGB", (wide * columns, high * 6), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(9)
    for i, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        x, y = i % columns * wide + 4, i // columns * high + 4
        image.paste(Image.fromarray(picture).resize((128, 128), Image.Resampling.NEAREST), (x, y))
        lines, line = [], ""
        for word in prompt.split():
            if pen.textlength(f"{line} {word}", font) > 128:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}".strip()
        right = checker.check(picture, prompt).right
        text = "\n".join([*lines, line])
        pen.multiline_text((x, y + 131), text, "black" if right else "red", font, spacing=1)
    image.save(path, optimize=True)
    verdicts = [checker.check(p, q).right for p, q in zip(pictures, prompts, strict=True)]
    print(f"{path}: {sum(verdicts)} of 48 right (prompts of wrong ones in red)")


def demos(generator: Callable[[int, float], Generate], seeds: int) -> None:
    """Print the number of seeds with the right picture, for each prompt in the documentation."""
    for prompt, steps, guidance in DEMOS:
        pictures = generator(steps, guidance)([prompt] * seeds, range(seeds))
        wrong = [
            i for i, picture in enumerate(pictures) if not checker.check(picture, prompt).right
        ]
        print(
            f"{prompt!r}, {steps} steps, guidance {guidance:g}: {seeds - len(wrong)} of {seeds} "
            f"seeds right{f', wrong: {wrong}' if wrong else ''}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--through", choices=("diffusers", "mlxdiff"), default="diffusers")
    parser.add_argument("--prompts", type=int, default=256, help="prompts a row")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--spacing", help="another timestep_spacing (diffusers only)")
    parser.add_argument("--rows", nargs="+", type=int, help="numbers of the rows (from 1)")
    parser.add_argument("--sweep", choices=("steps", "guidance"), help="by steps or by guidance")
    parser.add_argument("--sheet", metavar="PNG", help="draw 48 unpicked prompts")
    parser.add_argument(
        "--demo", type=int, metavar="N", help="score the documented prompts, N seeds"
    )
    parser.add_argument("--sampler", default="auto", help="mlxdiff only; diffusers: dpmpp-2m")
    parser.add_argument("--schedule", default="auto", help="mlxdiff only")
    parser.add_argument("--quantize", type=int, help="bits (mlxdiff only)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.through == "diffusers":
        import torch

        torch.set_num_threads(args.threads)

    def generator(steps: int, guidance: float) -> Generate:
        if args.through == "mlxdiff":
            more = {"quantize": args.quantize} if args.quantize else {}
            more |= {"sampler": args.sampler, "schedule": args.schedule}
            return through_mlxdiff(args.model, steps, guidance, backend="numpy", **more)
        return through_diffusers(args.model, steps, guidance, args.spacing)

    started = time.time()
    if args.sheet:
        sheet(generator(args.steps, args.guidance), args.sheet)
    elif args.demo:
        demos(generator, args.demo)
    elif args.sweep:
        rows = ("1 object, held-out pair", "2 objects, held-out combination")
        settings = {
            "steps": [(n, args.guidance) for n in (4, 6, 8, 12, 20, 50)],
            "guidance": [(args.steps, g) for g in (1.0, 2.0, 4.0, 7.5)],
        }
        print("| steps | guidance | " + " | ".join(rows) + " |\n|---|---|---|---|")
        for n, g in settings[args.sweep]:
            results = [measure(generator(n, g), row, args.prompts)["right"] for row in rows]
            cells = [f"{100 * r:.1f} ± {error_of(r, args.prompts):.1f}" for r in results]
            print(f"| {n} | {g:g} | " + " | ".join(cells) + " |", flush=True)
    else:
        rows = [list(ROWS)[i - 1] for i in args.rows] if args.rows else list(ROWS)
        table(generator(args.steps, args.guidance), args.prompts, rows)
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
