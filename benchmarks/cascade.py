"""Peak memory by stage of a cascade: prompt, small picture, large picture, in one process.

    python benchmarks/cascade.py --upscaler FILE [--backend numpy] [--low-memory] [--size 64]

Linux. A thread reads the resident memory of the process every 2 ms. What Python and the libraries
take before anything is loaded is subtracted.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlxdiff
from mlxdiff.run import drawing


class Watch:
    """The most memory of each stage.

    Attributes:
        stage: what runs now.
        most: stage -> bytes.
    """

    def __init__(self) -> None:
        self.stage, self.most = "", dict[str, int]()
        self.idle, self.done = _resident(), False
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self.done:
            if self.stage:
                self.most[self.stage] = max(self.most.get(self.stage, 0), _resident() - self.idle)
            time.sleep(0.002)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--upscaler", required=True)
    parser.add_argument("--backend", default="numpy")
    parser.add_argument("--low-memory", action="store_true")
    parser.add_argument("--size", type=int, default=None)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    watch, turn = Watch(), drawing._Work.turn

    @contextmanager
    def watched(self: Any, stage: str | None = None) -> Iterator[None]:
        before, watch.stage = watch.stage, stage or watch.stage
        try:
            with turn(self, stage):
                yield
        finally:
            watch.stage = "unet" if before in ("", "text_encoder") else before

    drawing._Work.turn = watched  # type: ignore[method-assign]
    pipe = mlxdiff.load(
        args.model, backend=args.backend, upscaler=args.upscaler, low_memory=args.low_memory
    )
    watch.thread.start()
    result = pipe.generate(
        "a red circle on a blue background",
        seed=7,
        steps=args.steps,
        width=args.size,
        height=args.size,
    )
    watch.done = True
    expected = pipe.memory(result.settings).stages
    print(f"{'stage':14} {'measured MB':>12} {'expected MB':>12} {'seconds':>8}")
    for stage, size in watch.most.items():
        seconds = result.timings.get(stage, 0.0)
        print(f"{stage:14} {size / 1e6:12.1f} {expected.get(stage, 0) / 1e6:12.1f} {seconds:8.2f}")
    print("result", result.images[0].size)


if __name__ == "__main__":
    main()
