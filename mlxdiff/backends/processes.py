"""The processes that ``mlx.launch`` has started together, on one machine or on several."""

from __future__ import annotations

import os
from typing import Any

from mlxdiff.errors import UsageError, one_line

_STARTED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Variables of the environment of a process that was started with others."""


class Processes:
    """Processes that share work.

    Attributes:
        rank: of this one, from 0.
        count: of all.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank: int = 0 if group is None else group.rank()
        self.count: int = 1 if group is None else group.size()

    def agree(self, number: int) -> int:
        """Return the number of the first process, below 2**64, in each of them."""
        parts = [number >> (16 * i) & 0xFFFF for i in range(4)]
        mine = parts if self.rank == 0 else [0] * 4
        return sum(part << (16 * i) for i, part in enumerate(self.add(mine)))

    def add(self, numbers: list[int]) -> list[int]:
        """Return the sums of these numbers over all processes. Waits for all of them.

        Raises: UsageError if one of them has ended.
        """
        if self._group is None:
            return numbers
        import mlx.core as mx

        mine = mx.array(numbers, mx.int32)
        total: Any
        try:
            total = mx.distributed.all_sum(mine, group=self._group, stream=mx.cpu).tolist()
        except RuntimeError as error:
            raise UsageError(
                f"mlx.launch: another process has ended before its time ({one_line(error)})"
            ) from None
        return [int(one) for one in total]


def started_together() -> Processes:
    """Return the processes that were started with this one. Raises: UsageError without MLX."""
    if not any(name in os.environ for name in _STARTED):
        return Processes()
    try:
        import mlx.core as mx
    except ImportError:
        raise UsageError("mlx.launch: MLX is not installed in this Python") from None
    return Processes(mx.distributed.init())
