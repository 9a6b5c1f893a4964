"""Draw many pictures through one server process: does it stay flat, and what does its queue add?

    python benchmarks/serve.py [PICTURES]

The built-in model, one step a picture. Prints memory, open files and threads after a tenth of the
pictures and at the end, and the time from accepted to started with the worker idle. Linux.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from pathlib import Path

from mlxdiff.loading import BUILTIN
from mlxdiff.serve.engine import Engine, Order
from mlxdiff.serve.gallery import Gallery


def state() -> str:
    """Resident memory, open files and threads of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    memory = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    files = len(os.listdir("/proc/self/fd"))
    return f"{memory:.1f} MB, {files} files, {threading.active_count()} threads"


def main(pictures: int) -> None:
    """Draw, and report."""
    waits = []
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(Gallery(Path(folder), 1_000_000))
        for index in range(pictures):
            options = {"prompt": "a red circle", "steps": 1, "guidance": 1.0}
            job = engine.submit(Order("builtin", BUILTIN, options, seed=index))
            job.wait()
            assert job.state == "done" and job.started is not None, job.error
            waits.append(1000 * (job.started - job.created))
            if index + 1 in (max(1, pictures // 10), pictures):
                print(f"after {index + 1} pictures: {state()}", flush=True)
        engine.close()
    waits.sort()
    p50, p99 = waits[len(waits) // 2], waits[int(len(waits) * 0.99)]
    print(f"accepted to started: p50 {p50:.2f} ms, p99 {p99:.2f} ms")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
