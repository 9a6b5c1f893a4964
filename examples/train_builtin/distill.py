"""Distil the built-in model: a few steps without guidance in place of many with it.

    python distill.py teach --run runs/teacher --chunks 80     # can be called again, for more
    python distill.py train --run runs/four --teacher runs/teacher --steps 4 --rank 16 --minutes 30

"teach" solves the guided teacher's probability-flow ODE from noise, and keeps x at the timesteps
of a grid: the steps of DDIM (trailing) for every number in --counts, and those of ENDS. The
solver is DPM-Solver++ 2M whose numbers are fitted to a fine solution, as in fit_sampler.py.

With --student and --own, the student goes the first steps of each run, and the teacher goes on
from there: so the student learns what to do where it comes to itself, not beside its own way.

"check" marks runs whose picture shows what the prompt says; --right learns from these alone. It
also draws each picture again with ideal shapes; --pixels --drawn compares the student's with them.

"train" teaches a student, whose first weights are the teacher's, to step from each of these x to
the next with DDIM (progressive distillation without halvings; Salimans and Ho 2022). After a while
the student draws the whole way by itself, and the gradient goes through all of its steps.

`mlxdiff train distill` (latent consistency) is for any model, with MLX. On a CPU a sample takes a
fraction of its time here: this computes in bfloat16, and keeps the teacher's runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import mlxdiff
from mlxdiff.samplers.scheduler import to_x0

try:
    from . import common, data
    from .fit_sampler import _solve
    from .student import Distillation, Runs, Student, adapt, steps_at, steps_of
    from .teacher import Network, distances, solver, usual
except ImportError:  # for a script, Python puts this folder on the path
    import common
    import data
    from fit_sampler import _solve
    from student import Distillation, Runs, Student, adapt, steps_at, steps_of
    from teacher import Network, distances, solver, usual

COUNTS = (1, 2, 4, 6, 8)
ENDS = (948, 60, 12)  # more steps of the teacher, where its ODE bends most
GUIDANCE = 4.0
CHUNK = 64  # runs kept in one file
CALIBRATION = 32  # pictures that the solver is fitted to
HISTORY = 3


def captions(seed: int, count: int, more_pairs: float = 0.0) -> list[str]:
    """Return captions of the training distribution; every other one names everything.

    Half of them have two objects, and `more_pairs` of the other half.
    """
    rng, second = np.random.default_rng((19, seed)), np.random.default_rng((19, seed, 2))
    pairs = (np.arange(count) % 2 == 1) | (second.random(count) < more_pairs)
    return [
        data.caption(data.random_spec(rng, 1 + int(two)), rng, complete=i % 4 < 2)
        for i, two in enumerate(pairs)
    ]


def noise(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng((19, seed, 1)).standard_normal((count, 16, 16, 4), np.float32)


# --- the teacher -----------------------------------------------------------------------------


def run_of(network: Network, start: np.ndarray, prompts: list[str], times, weights=None):
    """Solve the teacher's ODE; return x at `times` and the end, (L + 1, B, h, w, C).

    Args:
        weights: numbers to add to those of DPM-Solver++ 2M, a list for each step.
    """
    rows = solver(network.config, times).rows if times else ()
    x, found, before = start, [start], []
    for i, (t, row) in enumerate(zip(times, rows, strict=True)):
        output = network(x, t, prompts, GUIDANCE)
        of_x, of_output = to_x0("v_prediction", *row.level)
        before = [of_x * x + of_output * output, *before][:HISTORY]
        features = np.stack([x, *before])
        numbers = usual(row, len(features))
        if weights is not None:
            numbers = numbers + weights[i]
        x = np.tensordot(numbers, features, 1).astype(np.float32)
        found.append(x)
    return np.stack(found)


def grid_of(config: dict, counts: Sequence[int]) -> list[int]:
    """Return the timesteps of the teacher's solver, from noise to the picture."""
    steps = {t for count in counts for t in steps_of(config, count)[0]}
    return sorted(steps | set(ENDS), reverse=True)


def fit(
    network: Network, fine: np.ndarray, prompts: list[str], grid: list[int]
) -> list[list[float]]:
    """Fit the solver's numbers on `grid` to a fine solution, (L + 1, B, h, w, C), along its run."""
    rows = solver(network.config, grid).rows
    x, before, fitted = fine[0], [], []
    for i, (t, row) in enumerate(zip(grid, rows, strict=True)):
        output = network(x, t, prompts, GUIDANCE)
        of_x, of_output = to_x0("v_prediction", *row.level)
        before = [of_x * x + of_output * output, *before][:HISTORY]
        features = np.stack([x, *before])
        flat = features.reshape(len(features), -1).astype(np.float64)
        numbers = usual(row, len(features))
        missed = fine[i + 1].reshape(-1) - numbers @ flat
        numbers = numbers + (more := _solve(flat @ flat.T, flat @ missed))
        x = np.tensordot(numbers, features, 1).astype(np.float32)
        fitted.append([float(f"{value:.6g}") for value in more])
    return fitted


class Start:
    """The first steps of a run: none, or those of a student.

    Args:
        network: the teacher.
        student: weights, the student.pt of "train".
        count: of the student's steps.
        own: how many of them it goes; the teacher goes on from there.
    """

    def __init__(self, network: Network, student: Path | None, count: int, own: int) -> None:
        import torch

        self.network, self.own = network, own
        unet = copy.deepcopy(network.torch_unet)
        if student is not None:
            unet.load_state_dict(torch.load(student, weights_only=True))
        self.student = Student(unet, *steps_of(network.config, count))

    def grid(self, grid: list[int]) -> list[int]:
        """Return the timesteps of `grid` that are left to the teacher."""
        left = self.student.times[self.own :]  # none, if the student goes the whole way
        return [t for t in grid if left and t <= left[0]]

    def __call__(self, noise: np.ndarray, prompts: list[str]) -> np.ndarray:
        """Return x at the first timesteps, noise first, (1 + own, B, h, w, C)."""
        import torch

        text = torch.from_numpy(np.concatenate([self.network.text(prompt) for prompt in prompts]))
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            x = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
            found = [x, *self.student.draw(x, text, end=self.own)]
        return torch.stack(found).permute(0, 1, 3, 4, 2).contiguous().numpy()


def fit_solver(network: Network, start: Start, grid: list[int], path: Path) -> None:
    """Fit the solver to a fine solution; write its timesteps, numbers and errors."""
    import torch

    if not grid:
        path.write_text(json.dumps({"grid": start.student.times, "numbers": [], "errors": []}))
        return
    dense = sorted({*np.linspace(999, 20, 100).astype(int).tolist(), 8, 4, 1, *grid})[::-1]
    dense = start.grid(dense)
    prompts = captions(0, CALIBRATION)
    x = start(noise(0, CALIBRATION), prompts)[-1]
    fine = run_of(network, x, prompts, dense)
    fine = fine[[*(dense.index(t) for t in grid), -1]]
    with torch.autocast("cpu", torch.bfloat16):
        numbers = fit(network, fine, prompts, grid)
        found = run_of(network, x, prompts, grid, numbers)
        plain = run_of(network, x, prompts, grid)
    errors = [float(np.sqrt((distances(one[-1], fine[-1]) ** 2).mean())) for one in (found, plain)]
    print(
        f"error of the teacher's solver: {errors[0]:.4f}; not fitted: {errors[1]:.4f}", flush=True
    )
    grid = [*start.student.times[: start.own], *grid]
    path.write_text(json.dumps({"grid": grid, "numbers": numbers, "errors": errors}))


def teach(args: argparse.Namespace) -> None:
    """Solve the teacher's ODE for the files of RUN that are asked for and not there."""
    import torch

    run = args.teacher
    run.mkdir(parents=True, exist_ok=True)
    network = Network(None, torch=True)
    start = Start(network, args.student, args.steps, args.own)
    fitted = run / "solver.json"
    if not fitted.exists():
        fit_solver(network, start, start.grid(grid_of(network.config, args.counts)), fitted)
    known = json.loads(fitted.read_text())
    grid, numbers = known["grid"], known["numbers"]
    for chunk in range(args.first + 1, args.first + args.chunks + 1):
        path = run / f"runs-{chunk:04}.npz"
        if path.exists():
            continue
        began = time.process_time()
        prompts = captions(chunk, CHUNK, args.more_pairs)
        *before, x = start(noise(chunk, CHUNK), prompts)
        with torch.autocast("cpu", torch.bfloat16):
            x = run_of(network, x, prompts, grid[len(before) :], numbers)
        x = np.stack([*before, *x]).astype(np.float16)
        text = np.concatenate([network.text(prompt) for prompt in prompts])
        network.embeddings.clear()
        network.text("")
        partial = path.with_suffix(".part.npz")
        np.savez(partial, x=x, text=text.astype(np.float16), prompts=np.array(prompts))
        partial.replace(path)
        print(f"{path.name}: {time.process_time() - began:.0f} s of CPU", flush=True)


def check(run: Path) -> None:
    """Say of each run of the teacher if its picture shows the prompt: RUN/right-NUMBER.npy.

    RUN/drawn-NUMBER.npz has the same picture with ideal shapes, and says of which runs: where
    nothing but a shape is wrong.
    """
    import checker
    import rectify

    pipe = mlxdiff.load(dtype="float32")
    for path in sorted(run.glob("runs-*[0-9].npz")):
        number = path.stem[5:]
        to, drawn = run / f"right-{number}.npy", run / f"drawn-{number}.npz"
        if to.exists() and drawn.exists():
            continue
        with np.load(path) as file:
            x, prompts = file["x"][-1], [str(prompt) for prompt in file["prompts"]]
        pictures = [np.asarray(one) for one in pipe.decode(x.astype(np.float32))]
        pairs = list(zip(pictures, prompts, strict=True))
        right = np.array([checker.check(*pair).right for pair in pairs])
        ideal = [rectify.redraw(*pair) for pair in pairs]
        known = np.array([one is not None for one in ideal])
        kept = [np.stack(part) for part in zip(*(one for one in ideal if one), strict=True)]
        partial = drawn.with_suffix(".part.npz")
        np.savez(partial, known=known, pictures=kept[0], weights=kept[1])
        partial.replace(drawn)
        np.save(to, right)
        print(f"{path.name}: {right.mean():.0%} right, {known.mean():.0%} drawn", flush=True)


# --- the student -----------------------------------------------------------------------------


def teach_worker(rank: int, processes: int, args: argparse.Namespace) -> None:
    teach(args)


def train_worker(rank: int, processes: int, args: argparse.Namespace) -> None:
    import torch
    from diffusers.models.attention_processor import AttnProcessor
    from torch.nn.utils import parametrize

    torch.manual_seed(rank)
    network = Network(args.start, torch=True)
    unet = network.torch_unet.train()
    unet.set_attn_processor(AttnProcessor())  # the gradient of the fused one is slower on a CPU
    changes = adapt(unet, args.rank) if args.rank else None
    student = Student(
        unet,
        *(
            steps_at(network.config, args.times)
            if args.times
            else steps_of(network.config, args.steps)
        ),
    )
    objective = objective_of(student, network, args, rank)
    if args.student is not None:
        unet.load_state_dict(torch.load(args.student, weights_only=True))
    training = common.Training(
        rank, processes, args.run, unet, args.lr, args.minutes, ema=args.ema, muon=args.muon
    )
    while not training.done:
        if training.step % 100 == 0:
            objective.runs.update()
            if rank == 0:
                print(f"{len(objective.runs)} runs", flush=True)
                if not args.consistency and training.step:
                    print(f"of held-out runs: error {student.error(objective.runs):.4f}")
        rng = np.random.default_rng((4, training.step, rank))
        with torch.autocast("cpu", torch.bfloat16), parametrize.cached():
            loss, evaluations, shown = objective(rng, training.step, training.progress)
        training.update(loss, evaluations, **shown)
        objective.after(training.step)
    training.save()
    training.use_ema()
    if rank == 0:
        if not args.consistency:
            print(f"of held-out runs: error {student.error(objective.runs):.4f}", flush=True)
        save(unet, changes, args)


def objective_of(student: Student, network: Network, args: argparse.Namespace, rank: int):
    """Return what "train" is asked to make small, see `Distillation`."""
    import torch

    if args.consistency:
        from consistency import Consistency

        grid = json.loads((args.teacher / "solver.json").read_text())["grid"]
        return Consistency(student.unet, network.config, Runs(args.teacher, grid), args.batch)
    matching = None
    if args.match:
        from matching import Matching

        empty = torch.from_numpy(network.text(""))
        fake = args.run / f"fake-{rank}.pt"
        matching = Matching(student.unet, network.config, empty, GUIDANCE, args.match_lr, fake)
    runs = Runs(args.teacher, student.times, args.right, args.drawn, args.hard)
    decode = network.torch_decoder() if args.pixels else None
    return Distillation(student, runs, args, decode, matching)


def difference(unet, args: argparse.Namespace) -> dict:
    """Return how the weights differ from those of the start, under LyCORIS' names ("full")."""
    before, found = Network(args.start, torch=True).torch_unet.state_dict(), {}
    for name, after in unet.state_dict().items():
        module, _, part = name.rpartition(".")
        part = "diff" if part == "weight" else "diff_b"
        key = f"lora_unet_{module.replace('.', '_')}.{part}"
        found[key] = (after - before[name]).half().contiguous()
    return found


def save(unet, changes, args: argparse.Namespace) -> None:
    import torch
    from safetensors.torch import save_file

    if changes is None:
        torch.save(unet.state_dict(), args.run / "student.pt")
        save_file(difference(unet, args), args.run / "lora.safetensors", {"format": "pt"})
        return
    tensors = {}
    for name, change in changes.items():
        shape = unet.get_submodule(name).parametrizations.weight.original.shape
        down, up = change.down.detach(), change.up.detach()
        tail = (1, 1) if len(shape) == 4 else ()
        tensors[f"unet.{name}.lora_A.weight"] = down.reshape(-1, *shape[1:]).half().contiguous()
        tensors[f"unet.{name}.lora_B.weight"] = up.reshape(*up.shape, *tail).half().contiguous()
    save_file(tensors, args.run / "lora.safetensors", {"format": "pt"})


def plot(run: Path, path: Path) -> None:
    """Draw the curves of RUN/log.txt: the loss of single steps, and the error of whole runs."""
    import re

    from mlxdiff.pictures.plot import curves

    shown = {
        "loss": ("loss of single steps, times 10", 10),
        "end": ("error of the steps that learn", 1),
        "pixels": ("pictures apart, times 10", 10),
    }
    lines: dict[str, list[tuple[float, float]]] = {name: [] for name, _ in shown.values()}
    held = lines["error of the whole way, held-out runs"] = []
    samples = 0
    for line in (run / "log.txt").read_text().splitlines():
        if found := re.match(r"step \d+ samples (\d+) ", line):
            samples, figures = int(found[1]), dict(re.findall(r"(\w+) ([\d.]+)", line))
            if "end" in figures:
                del figures["loss"]  # a sum of others
            for key, (name, factor) in shown.items():
                if key in figures:
                    lines[name].append((samples, factor * float(figures[key])))
        elif found := re.search(r"error (\S+)$", line):
            held.append((samples, float(found[1])))
    lines = {name: points for name, points in lines.items() if points}
    curves(lines, "distillation: against samples").save(path, "PNG")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=("teach", "check", "train", "plot"))
    parser.add_argument("--run", type=Path, required=True, help="folder of this run")
    parser.add_argument("--to", type=Path, help="plot: the picture; RUN/log.txt is what train says")
    parser.add_argument("--first", type=int, default=0, help="number before the first file")
    parser.add_argument("--chunks", type=int, default=0, help="files of 64 runs, of teach")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="teach: of steps")
    parser.add_argument("--more-pairs", type=float, default=0, help="teach: see captions")
    parser.add_argument("--teacher", type=Path, help="train: the folder of teach")
    parser.add_argument("--processes", type=int, default=2, help="train")
    parser.add_argument("--start", help="train: model to start from; default: the built-in one")
    parser.add_argument("--steps", type=int, default=4, choices=COUNTS)
    parser.add_argument("--times", type=int, nargs="+", help="train: timesteps other than --steps'")
    parser.add_argument("--rank", type=int, default=0, help="train: of a LoRA; 0: all weights")
    parser.add_argument("--batch", type=int, default=8, help="train: whole runs at a time")
    parser.add_argument("--forced", type=float, default=0.25, help="train: share of single steps")
    parser.add_argument("--between", type=float, default=0.2, help="train: weight of x on the way")
    parser.add_argument("--pixels", type=float, default=0, help="train: weight of decoded ends")
    parser.add_argument("--drawn", action="store_true", help="train: --pixels beside ideal ones")
    parser.add_argument("--consistency", action="store_true", help="train: see consistency.py")
    parser.add_argument("--hard", default="", help="train: a word; its runs come more often")
    parser.add_argument("--right", action="store_true", help="train: on right runs only; see check")
    parser.add_argument("--student", type=Path, help="student.pt to start from; teach: for --own")
    parser.add_argument(
        "--own", type=int, default=0, help="steps that the student goes alone; train: as they are"
    )
    parser.add_argument("--match", type=float, default=0, help="train: see matching.py; a weight")
    parser.add_argument("--match-batch", type=int, default=12, help="train: pictures for it")
    parser.add_argument("--match-lr", type=float, default=2e-4, help="train: of its network")
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--ema", type=float, default=0.99)
    parser.add_argument("--muon", action="store_true", help="train: matrices by Muon, not AdamW")
    parser.add_argument("--minutes", type=float, default=30)
    args = parser.parse_args()
    if args.student and args.rank:
        parser.error("--student holds all weights; leave --rank out")
    if args.stage == "teach" and args.own and not args.student:
        parser.error("--own is for the steps of a student; give --student")
    if args.own > args.steps - (args.stage == "train"):
        parser.error(f"--own {args.own} leaves none of {args.steps} steps to learn")
    if args.drawn and not args.pixels:
        parser.error("--drawn says which pictures --pixels compares; give --pixels")
    if args.consistency and (args.match or args.pixels or args.own or args.hard or args.right):
        parser.error("--consistency takes all runs, and has no other loss beside it")
    if args.stage == "train":
        if args.chunks:  # more runs than the teacher has done
            common.launch(teach_worker, args, 1)
        common.launch(train_worker, args, args.processes)
        return
    if args.stage == "check":
        check(args.run)
        return
    if args.stage == "plot":
        plot(args.run, args.to)
        return
    import torch

    torch.set_num_threads(1)
    args.teacher = args.run
    teach(args)


if __name__ == "__main__":
    main()
