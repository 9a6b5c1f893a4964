"""Distribution matching (Yin et al. 2023): pull a student's pictures to where the teacher's lie.

For a picture x_0 of the student, noised to x_t, the guided teacher and a second network say which
picture they see. The second one, the "fake" network, learns what the student's own pictures are
like. Where the two differ, the student's pictures are too common or too rare; x_0 moves along the
difference.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np

from mlxdiff.training.process import Process

LEVELS = (20, 980)  # timesteps at which the two networks are compared
UPDATES = 2  # of the fake network for each of the student


class Matching:
    """The teacher, the fake network and its optimizer.

    Args:
        unet: diffusers' U-Net with the teacher's weights.
        config: of the scheduler; the model predicts v.
        empty: states of the empty text, (1, L, D).
        guidance: scale of the teacher.
        lr: rate of the fake network.
        path: where its state is kept.
    """

    def __init__(self, unet, config: dict, empty, guidance: float, lr: float, path: Path) -> None:
        import torch

        self.torch, self.path, self.guidance = torch, path, guidance
        self.teacher = copy.deepcopy(unet).eval().requires_grad_(False)
        self.fake = copy.deepcopy(unet).train()
        self.optimizer = torch.optim.AdamW(
            self.fake.parameters(), lr=lr, betas=(0.0, 0.99), weight_decay=0, fused=True
        )
        self.process, self.empty = Process.from_config(config), empty
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.fake.load_state_dict(state["fake"])
            self.optimizer.load_state_dict(state["optimizer"])

    def save(self) -> None:
        state = {"fake": self.fake.state_dict(), "optimizer": self.optimizer.state_dict()}
        partial = self.path.with_suffix(".part")
        self.torch.save(state, partial)
        partial.replace(self.path)

    def loss(self, x0, text, rng: np.random.Generator):
        """Return a loss whose gradient moves x_0, (B, C, h, w), towards the teacher's pictures."""
        torch = self.torch
        with torch.no_grad():
            noisy, t, (signal, sigma), _ = self._noised(x0, rng)
            both = torch.cat([text, self.empty.expand(len(text), -1, -1)])
            with_text, without = (
                self.teacher(torch.cat([noisy] * 2), torch.cat([t] * 2), both)
                .sample.float()
                .chunk(2)
            )
            real = signal * noisy - sigma * (without + self.guidance * (with_text - without))
            fake = signal * noisy - sigma * self.fake(noisy, t, text).sample.float()
            scale = (x0 - real).abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-3)
            goal = x0 - (fake - real) / scale
        return 0.5 * (x0 - goal).square().mean()

    def update(self, x0, text, rng: np.random.Generator) -> float:
        """Teach the fake network what the student's pictures are like; return its loss."""
        x0 = x0.detach()
        for _ in range(UPDATES):
            noisy, t, _, target = self._noised(x0, rng)
            self.optimizer.zero_grad()
            loss = (self.fake(noisy, t, text).sample.float() - target).square().mean()
            loss.backward()
            self.optimizer.step()
        return float(loss.detach())

    def _noised(self, x0, rng: np.random.Generator):
        torch = self.torch
        t = rng.integers(*LEVELS, size=len(x0))
        signal, sigma = (torch.from_numpy(one) for one in self.process.factors(t))
        noise = torch.from_numpy(rng.standard_normal(x0.shape, np.float32))
        return (
            signal * x0 + sigma * noise,
            torch.from_numpy(t),
            (signal, sigma),
            signal * noise - sigma * x0,
        )
