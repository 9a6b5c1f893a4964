"""Time pictures of the built-in model on NumPy: one thread and all, with the cores free and busy.

    python benchmarks/threads.py [--pictures 4] [--rounds 2] [--busy 8]

Each run is a process of its own; the runs take turns. A busy machine is made here, by processes
that count. The table gives wall and CPU seconds of a picture, the smallest of the rounds. Threads
cost nothing if CPU seconds stay the same. Prints a table and a line of JSON. The load before the
benchmark is in both: other work makes the free machine a busy one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mlxdiff.machine.probe import THREAD_VARIABLES, facts, versions

PROMPT = "a small red circle left of a large blue square on a yellow background"


def measure(pictures: int) -> None:
    """Draw in this process; print the seconds of a picture as JSON. The first one is not timed."""
    import mlxdiff
    from mlxdiff.machine import threads

    pipe = mlxdiff.load(backend="numpy")
    pipe.generate(PROMPT, seed=0, guidance=4, steps=12)
    wall, cpu = time.perf_counter(), time.process_time()
    for seed in range(1, pictures + 1):
        pipe.generate(PROMPT, seed=seed, guidance=4, steps=12)
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    print(
        json.dumps(
            {
                "wall": seconds[0] / pictures,
                "cpu": seconds[1] / pictures,
                "threads": threads.count(),
                "divides_products": threads.one_blas_thread.possible,
            }
        )
    )


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep the cores busy with this number of processes."""
    running = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)
    ]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def run(pictures: int, one_thread: bool) -> dict[str, Any]:
    """Measure in a new process, on one thread or as many as it takes by itself."""
    environment = {name: x for name, x in os.environ.items() if name not in THREAD_VARIABLES}
    if one_thread:
        environment |= dict.fromkeys(THREAD_VARIABLES, "1")
    command = [sys.executable, __file__, "--measure", str(pictures)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def take_turns(options: argparse.Namespace) -> dict[str, Any]:
    """Run all four cases, round by round. Return the values of the JSON line."""
    before = facts()
    cases: dict[str, dict[str, Any]] = {}
    for number in range(options.rounds):
        for processes in (0, options.busy):
            for one_thread in (True, False):
                name = f"{'one thread' if one_thread else 'all threads'}, {processes} busy"
                print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr)
                with busy(processes):
                    now = run(options.pictures, one_thread)
                best = cases.setdefault(name, now)
                for kind in ("wall", "cpu"):
                    best[kind] = min(best[kind], now[kind])
    free, loaded = (cases[f"all threads, {processes} busy"] for processes in (0, options.busy))
    one = cases["one thread, 0 busy"]
    return {
        "benchmark": "threads",
        "pictures": options.pictures,
        "cases": cases,
        "ratio": {
            "wall of all threads to one": free["wall"] / one["wall"],
            "CPU of all threads to one": free["cpu"] / one["cpu"],
            "CPU on the busy machine to the free one": loaded["cpu"] / free["cpu"],
        },
        "machine": before,
        "versions": versions(),
    }


def report(result: dict[str, Any]) -> None:
    machine = result["machine"]
    print(f"{machine['processor']}, {machine['cores']} cores, load before: {machine['load']}\n")
    print(f"{'':32}{'wall':>9}{'CPU':>9}{'threads':>9}")
    for name, case in result["cases"].items():
        print(f"{name:32}{case['wall']:8.2f}s{case['cpu']:8.2f}s{case['threads']:9}")
    for name, value in result["ratio"].items():
        print(f"{name:41}{value:9.2f}")
    print("\n" + json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=int, default=4, help="timed in a run (default: 4)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each case (default: 2)")
    parser.add_argument("--busy", type=int, default=8, help="busy processes (default: 8)")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        measure(options.measure)
    else:
        report(take_turns(options))


if __name__ == "__main__":
    main()
