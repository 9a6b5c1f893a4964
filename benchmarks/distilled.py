"""Compare students of few steps with their teacher, on the built-in model.

    python benchmarks/distilled.py --torch --cache FOLDER --student 4=LORA --student 6=MODEL

For each number of evaluations: the teacher at guidance 4 (DDIM, trailing: what the students start
from), the fitted sampler at guidance 4, and the students without guidance (the same DDIM). A guided
evaluation runs the network twice. Two measures:

1. The share of pictures that show everything in their prompt (examples/train_builtin/checker.py),
of prompts with one and with two objects, half of them held-out kinds. All methods have the same
prompts and seeds, so the difference from the teacher's 20 steps has a paired standard error. With
--torch these pictures are computed in bfloat16.
2. The error of the final latents as in benchmarks/few_step.py: of its prompts, from a fine solution
of the teacher's guided ODE.

--cache keeps all pictures, so a second call, or a call for more prompts, is cheap.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mlxdiff import samplers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "train_builtin"))
import checker  # noqa: E402
import evaluate  # noqa: E402
import teacher  # noqa: E402

GUIDANCE = 4.0
COUNTS = (1, 2, 4, 6, 8)
ROWS = {
    "one": ("1 object", "1 object, held-out pair"),
    "two": ("2 objects", "2 objects, held-out combination"),
}
CHUNK = 32
REFERENCE = "teacher, 20 steps"


def prompts_of(objects: str, size: int) -> tuple[list[str], list[int]]:
    """Return prompts with one or two objects, in turn from both rows, and their seeds."""
    rows = [evaluate.prompts_of(row, size // 2) for row in ROWS[objects]]
    prompts = [prompt for pair in zip(*rows, strict=True) for prompt in pair]
    return prompts, [i // 2 for i in range(size)]


def error_prompts(count: int) -> tuple[list[str], list[int]]:
    """Return the prompts of few_step.py, and their seeds."""
    rows = list(evaluate.ROWS)
    prompts = [
        evaluate.prompts_of(rows[i % len(rows)], i // len(rows) + 1)[-1] for i in range(count)
    ]
    return prompts, list(range(count))


class Method:
    """A sampler at a number of evaluations, through the teacher or a student.

    Args:
        name, count: what the table says.
        plan: of the sampler.
        guidance: scale; 1: none.
        student: a LoRA or a model; None: the teacher.
    """

    networks: ClassVar[dict[str | None, teacher.Network]] = {}

    def __init__(
        self, name: str, count: int, plan: samplers.Plan, guidance: float, student: str | None
    ) -> None:
        self.name, self.count, self.plan = name, count, plan
        self.guidance, self.student = guidance, student

    def network(self, torch: bool) -> teacher.Network:
        if self.student not in self.networks:
            path = self.student
            if path is not None and path.endswith(".safetensors"):
                made = teacher.Network(None, torch=torch, backend="numpy", loras=[path])
            else:
                made = teacher.Network(path, torch=torch, backend="numpy")
            self.networks[path] = made
        return self.networks[self.student]

    def latents(
        self, prompts: Sequence[str], seeds: Sequence[int], args: Any, exact: bool = True
    ) -> np.ndarray:
        """Return the final latents, (B, h, w, C); not exact: torch computes in bfloat16."""
        network, found = self.network(args.torch), []
        said = repr((self.plan.rows, self.guidance, self._digest()) + (() if exact else ("half",)))
        for start in range(0, len(prompts), CHUNK):
            some, own = prompts[start : start + CHUNK], seeds[start : start + CHUNK]
            key = hashlib.sha256((said + repr((some, own))).encode()).hexdigest()[:20]

            def draw(some: Sequence[str] = some, own: Sequence[int] = own) -> Any:
                with half(args.torch and not exact):
                    return {"x": run(some, own)}

            def run(some: Sequence[str], own: Sequence[int]) -> np.ndarray:
                x, state = network.noise(own), self.plan.start()
                for t in self.plan.timesteps:
                    scaled = self.plan.scale_model_input(x, state)
                    x, state = self.plan.step(x, network(scaled, t, some, self.guidance), state)
                return x

            found.append(teacher.cached(args.cache, f"run-{key}", draw)["x"])
        return np.concatenate(found)

    def _digest(self) -> str:
        if self.student is None:
            return ""
        path = Path(self.student)
        files = [path] if path.is_file() else sorted(path.glob("unet/*.safetensors"))
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def methods_of(args: Any, config: dict[str, Any]) -> list[Method]:
    def plan(sampler: str, schedule: str, count: int, guidance: float) -> samplers.Plan:
        return samplers.plan(config, sampler, schedule, count, family="sd1", guidance=guidance)

    found = [Method(REFERENCE, 20, plan("auto", "auto", 20, GUIDANCE), GUIDANCE, None)]
    for count in args.counts:
        ddim = plan("ddim", "trailing", count, GUIDANCE)
        found.append(Method("teacher", count, ddim, GUIDANCE, None))
        if count >= 4:
            found.append(
                Method("fitted", count, plan("auto", "auto", count, GUIDANCE), GUIDANCE, None)
            )
        if count in args.students:
            found.append(Method("distilled", count, ddim, 1.0, args.students[count]))
    return found


def measure(args: Any) -> dict[str, Any]:
    network = teacher.Network(None, torch=args.torch, backend="numpy")
    Method.networks[None] = network
    config, rows = network.config, []
    methods = methods_of(args, config)
    prompts, seeds = error_prompts(args.errors)
    fine = samplers.plan(config, "dpmpp-2m", "linspace", args.reference, family="sd1")
    reference = Method("", 0, fine, GUIDANCE, None).latents(prompts, seeds, args)
    checks = Method("DDIM", 25, samplers.plan(config, "ddim", "normal", 25), GUIDANCE, None)
    right: dict[str, dict[str, np.ndarray]] = {"one": {}, "two": {}}
    for method in (*methods, checks):
        line: dict[str, Any] = {"method": method.name, "count": method.count}
        each = teacher.distances(method.latents(prompts, seeds, args), reference)
        line |= {"error": float(np.sqrt((each**2).mean())), "median": float(np.median(each))}
        key = method.name if method.name == REFERENCE else f"{method.name} {method.count}"
        size = args.prompts if key in args.exact else args.fewer
        size = args.teacher if key == REFERENCE else size
        for objects in right if method is not checks else ():
            asked, own = prompts_of(objects, size)
            pictures = network.pipe.decode(method.latents(asked, own, args, exact=False))
            verdicts = [
                checker.check(np.asarray(picture), prompt).right
                for picture, prompt in zip(pictures, asked, strict=True)
            ]
            right[objects][key] = found = np.array(verdicts, float)
            line[objects] = share(found)
            if key != REFERENCE:
                both = min(len(found), len(right[objects][REFERENCE]))
                beside = found[:both] - right[objects][REFERENCE][:both]
                line[f"{objects} beside 20"] = share(beside)
        rows.append(line)
        print(json.dumps(line), flush=True)
    if args.sheet:
        student = next(one for one in methods if one.name == "distilled" and one.count == 4)
        draw_sheet(args.sheet, student, methods[0], args)
    return {"prompts": args.prompts, "rows": rows}


def draw_sheet(path: Path, student: Method, reference: Method, args: Any) -> None:
    """Draw 48 unpicked prompts, the first of both kinds: the student's above the teacher's.

    A red line marks a picture that the checker does not take.
    """
    from PIL import Image

    columns, size = 12, 64
    sheet = np.full((48 // columns * (2 * size + 8), columns * (size + 4), 3), 255, np.uint8)
    (one, its), (two, theirs) = (prompts_of(objects, 24) for objects in ROWS)
    asked, own = one + two, its + theirs
    for row, method in enumerate((student, reference)):
        pictures = reference.network(args.torch).pipe.decode(
            method.latents(asked, own, args, exact=False)
        )
        for i, (picture, prompt) in enumerate(zip(pictures, asked, strict=True)):
            y = i // columns * (2 * size + 8) + row * (size + 2)
            x = i % columns * (size + 4)
            shown = np.array(picture)
            if not checker.check(shown, prompt).right:
                shown[:3] = 255, 0, 0
            sheet[y : y + size, x : x + size] = shown
    Image.fromarray(sheet).save(path)


@contextmanager
def half(on: bool) -> Iterator[None]:
    """Let torch compute in bfloat16."""
    if not on:
        yield
        return
    import torch

    with torch.autocast("cpu", torch.bfloat16):
        yield


def share(values: np.ndarray) -> tuple[float, float, int]:
    """Return mean and standard error in percent, and the number of prompts."""
    return 100 * values.mean(), 100 * values.std() / len(values) ** 0.5, len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=512, help="of each number of objects")
    parser.add_argument("--teacher", type=int, default=512, help="of them for its 20 steps")
    parser.add_argument("--fewer", type=int, default=128, help="for rows that are not in --exact")
    parser.add_argument("--exact", nargs="*", default=["distilled 4", "distilled 6"])
    parser.add_argument("--errors", type=int, default=16, help="prompts for the latents' error")
    parser.add_argument("--reference", type=int, default=1000, help="steps of the fine solution")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--student", action="append", default=[], metavar="COUNT=PATH")
    parser.add_argument("--torch", action="store_true", help="through diffusers' U-Net")
    parser.add_argument("--cache", type=Path, help="a folder that keeps every run")
    parser.add_argument("--sheet", type=Path, help="draw 48 prompts at 4 evaluations there")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    pairs = (one.split("=", 1) for one in args.student)
    args.students = {int(count): path for count, path in pairs}
    found = measure(args)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
