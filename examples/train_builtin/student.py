"""A student of few steps, the teacher's runs that it learns from, and what its loss is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlxdiff import samplers
from mlxdiff.training.process import Process

OFTEN = 3.0  # how many times as often runs come whose prompt has the word of --hard


def steps_of(config: dict, count: int) -> tuple[list[int], list[tuple[float, float]]]:
    """Return the timesteps of DDIM (trailing), and each step as factors of x and of the output.

    As diffusers has it, a step of 6 leads to t - 1000 // 6, not to the next timestep.
    """
    plan = samplers.plan(config, "ddim", "trailing", count)
    factors = [
        (row.scale + row.weights[0] * row.data[0], row.output + row.weights[0] * row.data[1])
        for row in plan.rows
    ]
    return [int(t) for t in plan.timesteps], factors


def steps_at(config: dict, times: Sequence[int]) -> tuple[list[int], list[tuple[float, float]]]:
    """Return given timesteps, and DDIM's steps from each to the next one, as `steps_of` does."""
    process = Process.from_config(config)
    signal, sigma = (one.ravel() for one in process.factors(np.array([*times, 0])))
    if config.get("set_alpha_to_one", True):
        signal[-1], sigma[-1] = 1.0, 0.0
    factors = [
        (float(a * later + s * after), float(a * after - s * later))
        for a, s, later, after in zip(signal, sigma, signal[1:], sigma[1:], strict=False)
    ]
    return list(times), factors


class Student:
    """A U-Net that draws in few steps of DDIM, without guidance.

    Args:
        unet: diffusers' U-Net; it predicts v.
        times, factors: as `steps_of` returns them.
    """

    def __init__(self, unet, times: list[int], factors: list[tuple[float, float]]) -> None:
        self.unet, self.times, self.factors = unet, times, factors

    def draw(self, x, text, first: int = 0, end: int | None = None) -> list:
        """Go the steps from `first` on, before `end`, from x (B, C, h, w); return x after each."""
        found, steps = [], list(zip(self.times, self.factors, strict=True))
        for t, (keep, turn) in steps[first:end]:
            x = keep * x + turn * self.unet(x, t, text).sample.float()
            found.append(x)
        return found

    def single(self, x, text, at: np.ndarray):
        """Return the squared error in v of a step of each run, from its x at `at` on, (B,)."""
        import torch

        rows = torch.arange(len(at))
        keep, turn = (
            torch.tensor([self.factors[i][k] for i in at])[:, None, None, None] for k in (0, 1)
        )
        now, then = x[rows, at], x[rows, at + 1]
        v = self.unet(now, torch.tensor([self.times[i] for i in at]), text).sample.float()
        return (v - (then - keep * now) / turn).square().mean((1, 2, 3))

    def error(self, runs: Runs) -> float:
        """Return the error of the ends of the runs that are held out, in their deviation."""
        import torch

        x, text = (torch.from_numpy(part.astype(np.float32)) for part in runs.held[:2])
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            end = self.draw(x[:, 0], text)[-1]
        return float((end - x[:, -1]).square().mean().sqrt() / x[:, -1].std())


class Runs:
    """The teacher's runs: x at `times` and at the end, the states of the text, and pictures.

    The first file is kept for the error of the student.

    Args:
        right: leave out runs whose picture does not show the prompt, as `check` says.
        drawn: only runs for which `check` has drawn a picture, with it.
        hard: a word; runs whose prompt has it come more often.
    """

    def __init__(
        self,
        folder: Path,
        times: list[int],
        right: bool = False,
        drawn: bool = False,
        hard: str = "",
    ) -> None:
        self.right, self.drawn, self.hard = right, drawn, hard
        grid = json.loads((folder / "solver.json").read_text())["grid"]
        self.times, self.folder = np.array(times), folder
        self.places = [*(grid.index(t) for t in times), len(grid)]
        self._known: dict[Path, tuple[np.ndarray, ...]] = {}
        self.update()

    def update(self) -> None:
        """Read files that came since."""
        for file in sorted(self.folder.glob("runs-*[0-9].npz")):
            number, found = file.stem[5:], []
            verdict, pictures = (
                self.folder / name for name in (f"right-{number}.npy", f"drawn-{number}.npz")
            )
            waits = (self.drawn and not pictures.exists()) or (self.right and not verdict.exists())
            if file in self._known or waits:
                continue
            kept = slice(None)
            if self.drawn:
                with np.load(pictures) as one:
                    kept = one["known"]
                    found = [one["pictures"].transpose(0, 3, 1, 2), one["weights"]]
            elif self.right and self._known:
                kept = np.load(verdict)
            with np.load(file) as one:
                x = one["x"][self.places].transpose(1, 0, 4, 2, 3)  # (N, L, C, h, w)
                hard = [self.hard in prompt for prompt in one["prompts"][kept]]
                self._known[file] = x[kept], one["text"][kept], np.array(hard), *found
        self.held, *others = self._known.values()
        self.x, self.text, hard, *self.drawings = (
            np.concatenate(parts) for parts in zip(*others, strict=True)
        )
        chances = np.where(hard, OFTEN, 1.0)  # all are hard where no word is given
        self.chances = chances / chances.sum()

    def __len__(self) -> int:
        return len(self.x)

    def choose(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return np.sort(rng.choice(len(self), count, p=self.chances))

    def rows(self, chosen: np.ndarray):
        import torch

        return (
            torch.from_numpy(self.x[chosen].astype(np.float32)),
            torch.from_numpy(self.text[chosen].astype(np.float32)),
        )

    def shown(self, chosen: np.ndarray):
        """Return drawn pictures, (B, 3, H, W) in [-1, 1], and their pixels' weights."""
        import torch

        pictures, weights = (part[chosen].astype(np.float32) for part in self.drawings)
        return torch.from_numpy(pictures / 127.5 - 1), torch.from_numpy(weights[:, None])


class Distillation:
    """The loss along the teacher's runs: first of single steps, then of whole runs.

    Args:
        student, runs: what learns, and from what.
        asked: the options of "train".
        decode: from latents to pictures; None: pictures are not compared.
        matching: see matching.py.
    """

    def __init__(
        self, student: Student, runs: Runs, asked: argparse.Namespace, decode=None, matching=None
    ) -> None:
        self.student, self.runs, self.asked = student, runs, asked
        self.decode, self.matching = decode, matching

    def __call__(self, rng: np.random.Generator, step: int, progress: float) -> tuple:
        """Return the loss, the evaluations that it took, and figures to show."""
        if progress < self.asked.forced:
            return self._of_steps(rng)
        asked, student = self.asked, self.student
        chosen, own = self.runs.choose(rng, asked.batch), asked.own
        x, text = self.runs.rows(chosen)
        ends = student.draw(x[:, own], text, own)
        each = [
            (end - goal).square().mean()
            for end, goal in zip(ends, x.unbind(1)[own + 1 :], strict=True)
        ]
        loss, evaluations = each[-1] + asked.between * sum(each[:-1]), len(x) * len(ends)
        shown = {"end": each[-1].detach().sqrt()}
        if own:  # the steps before stay as they are
            at = rng.integers(own, size=len(x) // 2)
            kept = student.single(x[: len(at)], text[: len(at)], at).mean()
            loss, evaluations = loss + kept, evaluations + len(at)
            shown["before"] = kept.detach()
        if self.decode is not None:
            apart = self._pictures_apart(ends[-1], x[:, -1], chosen)
            loss = loss + asked.pixels * apart
            shown["pixels"] = apart.detach()
        if self.matching is not None:
            pulled, shown["fake"] = self._matched(rng, step)
            loss = loss + asked.match * pulled
        return loss, evaluations, shown

    def _of_steps(self, rng: np.random.Generator) -> tuple:
        import torch

        times, factors = self.student.times, self.student.factors
        chosen = self.runs.choose(rng, self.asked.batch * len(times) // 2)
        at = rng.permutation(len(chosen)) % len(times)
        missed = self.student.single(*self.runs.rows(chosen), at)
        turn = torch.tensor([abs(factors[i][1]) for i in at])
        first, last = (missed[torch.from_numpy(at == i)] for i in (0, len(times) - 1))
        shown = {"first": first.mean().detach(), "last": last.mean().detach()}
        return (missed * turn).mean(), len(chosen), shown

    def _pictures_apart(self, x, goal, chosen: np.ndarray):
        import torch

        with torch.no_grad():
            pictures, weights = self.decode(goal).float(), 1.0
            if self.runs.drawn:
                pictures, weights = self.runs.shown(chosen)
        return ((self.decode(x).float() - pictures).abs() * weights).mean()

    def _matched(self, rng: np.random.Generator, step: int) -> tuple:
        import torch

        text = self.runs.rows(self.runs.choose(rng, self.asked.match_batch))[1]
        noise = torch.randn(len(text), *self.runs.x.shape[2:])
        drawn = self.student.draw(noise, text)[-1]
        ready = min(step / 300, 1.0)  # first the fake network must learn
        loss = ready * self.matching.loss(drawn, text, rng)
        return loss, self.matching.update(drawn, text, rng)

    def after(self, step: int) -> None:
        """Keep what is needed to go on; called after each update."""
        if self.matching is not None and step % 200 == 0:
            self.matching.save()


def adapt(unet, rank: int) -> dict:
    """Give all layers but the first and last ones a low-rank change; return it by module."""
    import torch
    from torch.nn.utils import parametrize

    class Change(torch.nn.Module):
        def __init__(self, weight) -> None:
            super().__init__()
            out, inner = weight.shape[0], weight[0].numel()
            self.down = torch.nn.Parameter((torch.rand(rank, inner) * 2 - 1) / inner**0.5)
            self.up = torch.nn.Parameter(torch.zeros(out, rank))

        def forward(self, weight):
            return weight + (self.up @ self.down).view_as(weight)

    unet.requires_grad_(False)
    found = {}
    for name, module in list(unet.named_modules()):
        kind = isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        if not kind or name.startswith(("conv_in", "conv_out", "time_embedding")):
            continue
        change = Change(module.weight)
        parametrize.register_parametrization(module, "weight", change)
        found[name] = change
    return found
