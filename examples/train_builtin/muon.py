"""Muon: momentum SGD that makes each momentum matrix orthogonal before the step.

Jordan et al., 2024 (https://kellerjordan.github.io/posts/muon/), with the step scaled so that its
elements have the size of AdamW's (Liu et al., arXiv:2502.16982). So both use the same rate.
"""

from __future__ import annotations

import torch

MOMENTUM = 0.95


def is_matrix(p: torch.nn.Parameter) -> bool:
    """Return True if Muon handles this parameter: inner linear layers and convolutions."""
    return p.ndim >= 2 and min(p.shape[0], p[0].numel()) > 16


def orthogonal(g: torch.Tensor) -> torch.Tensor:
    """Approximate the nearest matrix with equal singular values (5 Newton-Schulz steps)."""
    x = g.reshape(len(g), -1)
    tall = x.shape[0] > x.shape[1]
    x = (x.T if tall else x).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = (x.T if tall else x).float()
    return (0.2 * max(x.shape) ** 0.5 * x).view_as(g)


class Muon(torch.optim.Optimizer):
    """Take one step for all `params`. The processes share the work: each does every n-th matrix."""

    def __init__(self, params, lr: float, rank: int = 0, processes: int = 1) -> None:
        super().__init__(params, {"lr": lr})
        self.rank, self.processes = rank, processes

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = group["params"]
            order = sorted(range(len(params)), key=lambda i: -params[i].numel())
            mine = set(order[self.rank :: self.processes])
            steps = []
            for i, p in enumerate(params):
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
                momentum = state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
                ahead = p.grad.lerp(momentum, MOMENTUM)
                steps.append(orthogonal(ahead) if i in mine else torch.zeros_like(momentum))
            flat = torch.cat([step.reshape(-1) for step in steps])
            if self.processes > 1:
                torch.distributed.all_reduce(flat)
            for p, step in zip(params, flat.split([p.numel() for p in params]), strict=True):
                p.add_(step.view(p.shape), alpha=-group["lr"])
