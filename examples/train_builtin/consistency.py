"""Consistency distillation (Song et al. 2023; Luo et al. 2023), on the teacher's own runs.

From every x of a run the student says where the run ends. For two x that follow each other the
answers must be the same: the one nearer to the picture, of averaged weights, is held fixed. At the
end of a run the answer is the picture itself.
"""

from __future__ import annotations

import copy

import numpy as np

from mlxdiff.training.process import Process

try:
    from .student import Runs
except ImportError:  # for a script, Python puts this folder on the path
    from student import Runs


class Consistency:
    """The averaged network, and the loss; see `student.Distillation`.

    Args:
        unet: diffusers' U-Net; it predicts v.
        config: of the scheduler.
        runs: with x at all timesteps of the teacher.
        batch: pairs of x at a time.
        decay: of the averages.
    """

    def __init__(self, unet, config: dict, runs: Runs, batch: int, decay: float = 0.95) -> None:
        import torch

        self.torch, self.unet, self.runs = torch, unet, runs
        self.batch, self.decay = batch, decay
        self.averaged = copy.deepcopy(unet).eval().requires_grad_(False)
        self.process = Process.from_config(config)

    def __call__(self, rng: np.random.Generator, step: int, progress: float) -> tuple:
        """Return the loss, the evaluations that have a gradient, and figures to show."""
        torch, times = self.torch, self.runs.times
        x, text = self.runs.rows(self.runs.choose(rng, self.batch))
        at, rows = rng.integers(len(times), size=len(x)), torch.arange(len(x))
        with torch.no_grad():
            goal, inner = x[rows, at + 1], torch.from_numpy(at + 1 < len(times))
            after = times[np.minimum(at + 1, len(times) - 1)]
            said = self._end(self.averaged, goal, after, text)
            goal = torch.where(inner[:, None, None, None], said, goal)
        loss = (self._end(self.unet, x[rows, at], times[at], text) - goal).square().mean()
        return loss, len(x), {}

    def after(self, step: int) -> None:
        """Move the averages towards the student."""
        pairs = zip(self.averaged.parameters(), self.unet.parameters(), strict=True)
        with self.torch.no_grad():
            for mean, now in pairs:
                mean.lerp_(now, 1 - self.decay)

    def _end(self, unet, x, t: np.ndarray, text):
        signal, sigma = (self.torch.from_numpy(one) for one in self.process.factors(t))
        return signal * x - sigma * unet(x, self.torch.from_numpy(t), text).sample.float()
