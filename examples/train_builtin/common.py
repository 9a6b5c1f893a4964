"""Common parts of the three training scripts: processes, learning-rate schedule, checkpoints.

Each script trains with a few single-threaded processes that average their gradients (gloo). On a
machine with other work this is much faster than one process with several threads.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

# Keep large freed blocks in the process. Otherwise the kernel takes a quarter of the time.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "67108864",
    "OMP_NUM_THREADS": "1",
}


def launch(worker: Callable, args, processes: int) -> None:
    """Run `worker(rank, processes, args)` in fresh processes (they see the malloc settings)."""
    import torch.multiprocessing as mp

    os.environ.update(MALLOC)
    Path(args.run).mkdir(parents=True, exist_ok=True)
    rendezvous = Path(args.run).resolve() / "rendezvous"
    rendezvous.unlink(missing_ok=True)
    mp.spawn(_start, (worker, processes, args, f"file://{rendezvous}"), nprocs=processes)


def _start(rank: int, worker: Callable, processes: int, args, rendezvous: str) -> None:
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=processes
    )
    worker(rank, processes, args)
    torch.distributed.destroy_process_group()


class Training:
    """One resumable run of a model, annealed over a budget of wall-clock minutes.

    Every report reads the budget from the file RUN/minutes, so you can shorten or extend a run
    while it goes. The learning rate always reaches zero at the end of the budget.
    """

    def __init__(
        self, rank, processes, run, model, lr, minutes, ema=0.0, betas=(0.9, 0.99), muon=False
    ):
        import torch

        self.torch, self.rank, self.processes, self.run = torch, rank, processes, Path(run)
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        matrices, others = [], self.parameters
        if muon:
            from muon import Muon, is_matrix

            matrices = [p for p in self.parameters if is_matrix(p)]
            others = [p for p in self.parameters if not is_matrix(p)]
        adam = torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=1e-4, fused=True)
        self.optimizers = [adam]
        if matrices:
            self.optimizers.append(Muon(matrices, lr, rank, processes))
        self.lr, self.minutes, self.ema_decay = lr, minutes, ema
        self.ema = [p.detach().clone() for p in self.parameters] if ema else None
        self.step = self.samples = 0
        self.elapsed = self.progress = 0.0
        self._spent, self._mark = 0.0, time.time()
        if self.last.exists():
            state = torch.load(self.last, weights_only=True)
            with torch.no_grad():
                for p, saved in zip(self.parameters, state["parameters"], strict=True):
                    p.copy_(saved)
            if self.ema and state["ema"]:
                self.ema = [e.clone() for e in state["ema"]]
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.samples, self._spent = state["step"], state["samples"], state["spent"]
            self.elapsed = self._spent
        self._read_minutes()
        self._totals: dict[str, float] = {}
        self._count, self._since = 0, (time.time(), self.samples)
        self._saved = time.time()

    @property
    def last(self) -> Path:
        return self.run / "last.pt"

    def _read_minutes(self) -> None:
        path = self.run / "minutes"
        if path.exists():
            self.minutes = float(path.read_text())

    @property
    def done(self) -> bool:
        return self.progress >= 1

    def update(self, loss, batch: int, **shown) -> None:
        """Back-propagate, average the gradients over the processes, take one step."""
        torch = self.torch
        for p in self.parameters:
            p.grad = None
        loss.backward()
        grads = [p.grad for p in self.parameters]
        clock = torch.zeros(1)
        if self.rank == 0:
            clock[0] = min(self.elapsed / (60 * self.minutes), 1.0)
        flat = torch.cat([g.reshape(-1) for g in grads] + [clock])
        torch.distributed.all_reduce(flat)
        self.progress = float(flat[-1])  # the same in every process
        flat /= self.processes
        norm = float(flat[:-1].norm())
        flat *= min(1.0, 1.0 / (norm + 1e-6))
        at = 0
        for g in grads:
            g.copy_(flat[at : at + g.numel()].view_as(g))
            at += g.numel()
        warm = min(1.0, (self.step + 1) / 100)
        rate = warm * self.lr * (0.5 + 0.5 * math.cos(math.pi * self.progress))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.step += 1
        self.samples += batch * self.processes
        if self.ema:
            decay = min(self.ema_decay, (self.step + 1) / (self.step + 10))
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1 - decay)
        self.elapsed = self._spent + time.time() - self._mark
        if self.rank == 0:
            self._report({"loss": float(loss.detach()), **shown, "norm": norm})

    def _report(self, values: dict[str, float]) -> None:
        for key, value in values.items():
            self._totals[key] = self._totals.get(key, 0.0) + float(value)
        self._count += 1
        if self.step % 50 == 0:
            self._read_minutes()
            now = time.time()
            speed = (self.samples - self._since[1]) / (now - self._since[0])
            means = " ".join(f"{k} {v / self._count:.4f}" for k, v in self._totals.items())
            print(
                f"step {self.step} samples {self.samples} min {self.elapsed / 60:.2f} "
                f"{speed:.1f}/s {means}",
                flush=True,
            )
            self._totals, self._count, self._since = {}, 0, (now, self.samples)
        if time.time() - self._saved > 120:
            self.save()

    def save(self) -> None:
        if self.rank:
            return
        state = {
            "parameters": [p.detach() for p in self.parameters],
            "ema": self.ema,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "samples": self.samples,
            "spent": self.elapsed,
        }
        partial = self.last.with_suffix(".part")
        self.torch.save(state, partial)
        os.replace(partial, self.last)
        self._saved = time.time()

    def use_ema(self) -> None:
        """Put the averaged weights into the model (after training)."""
        if self.ema:
            with self.torch.no_grad():
                for p, e in zip(self.parameters, self.ema, strict=True):
                    p.copy_(e)
