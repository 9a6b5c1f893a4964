"""One update of a LoRA by all processes that started this script together (test_training.py).

python training_ranks.py OUT.npz                        one process, a batch of 2
mlx.launch -n 2 --backend ring python training_ranks.py OUT.npz     two, a batch of 1 each
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import training_cases as cases  # noqa: E402

import mlxdiff  # noqa: E402
from mlxdiff.training.data import Batch, Data, Text  # noqa: E402
from mlxdiff.training.loop import Ranks, Trainer  # noqa: E402
from mlxdiff.training.lora import LoRA  # noqa: E402
from mlxdiff.training.options import LoraOptions, TrainOptions  # noqa: E402
from mlxdiff.training.process import Process  # noqa: E402


class _Data(Data):
    def __init__(self, width: int) -> None:
        self.digest, self.size = "", 2
        self._given = cases.lora_batches(1, width)[0]

    def batch(self, index: int, size: int, seed: int) -> Batch:
        given = self._given
        ones = np.array([1.0, 0.5], np.float32)
        return Batch(given["latents"], None, ones, Text(given["text"], None))


def update(ranks: Ranks) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of the first step, of all processes together."""
    pipe = mlxdiff.load(HERE / "golden" / "sd15" / "checkpoint", backend="mlx")
    options = TrainOptions(batch=2 // ranks.size, learning_rate=1e-2, optimizer="adamw", clip=0.0)
    process = Process.from_config(pipe.model.source.scheduler_config)
    task = LoRA(pipe.model, LoraOptions(rank=2))
    width = pipe.model.source.config("unet").cross_attention_dim[0]
    loss, gradients, _ = Trainer(task, _Data(width), process, options, ranks).gradients(0)
    return loss, gradients


if __name__ == "__main__":
    together = Ranks.launched()
    loss, gradients = update(together)
    if together.rank == 0:
        np.savez(sys.argv[1], loss=loss, **{n: np.array(v) for n, v in gradients.items()})
