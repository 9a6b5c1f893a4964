"""Draw many pictures through one server process: does it stay flat, and what does its queue add?

    python benchmarks/serve.py [PICTURES]      one after the other, without HTTP
    python benchmarks/serve.py --load [N]      N requests (200) of 8 clients over HTTP

The built-in model, one step a picture. Both print memory, open files and threads on the way and at
the end, and the time from accepted to started with the worker idle. The load has a queue of four,
so that most clients meet 429, and one request in ten is cancelled; it fails if a request is lost or
drawn twice, or if the gates of the queue are missed (50 % in 5 ms, 99 % in 50 ms). Linux.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from mlxdiff.loading import BUILTIN
from mlxdiff.serve.desk import Desk
from mlxdiff.serve.engine import Engine, Job, Order
from mlxdiff.serve.gallery import Gallery
from mlxdiff.serve.guard import Policy
from mlxdiff.serve.http import listen, server
from mlxdiff.serve.shelf import Shelf

CLIENTS = 8
GATE_MS = {0.5: 5.0, 0.99: 50.0}
OPTIONS = {"prompt": "a red circle", "steps": 1, "guidance": 1.0}


def state() -> str:
    """Resident memory, open files and threads of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    memory = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    files = len(os.listdir("/proc/self/fd"))
    return f"{memory:.1f} MB, {files} files, {threading.active_count()} threads"


def share(values: list[float], part: float) -> float:
    """The value that this part of all values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


def draw(pictures: int) -> None:
    """Draw one picture after the other, and report."""
    waits = []
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(Gallery(Path(folder), 1_000_000))
        for index in range(pictures):
            job = engine.submit(Order("builtin", BUILTIN, OPTIONS, seed=index))
            job.wait()
            assert job.state == "done" and job.started is not None, job.error
            waits.append(1000 * (job.started - job.created))
            if index + 1 in (max(1, pictures // 10), pictures):
                print(f"after {index + 1} pictures: {state()}", flush=True)
        engine.close()
    print(f"accepted to started: p50 {share(waits, 0.5):.2f} ms, p99 {share(waits, 0.99):.2f} ms")


class Client:
    """Asks a server; one connection that is kept alive."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        self._connection.request(method, path, None if body is None else json.dumps(body))
        answer = self._connection.getresponse()
        return answer.status, json.loads(answer.read())


def load(requests: int) -> None:
    """Draw for many clients at a time, and report."""
    jobs: dict[int, Job] = {}
    refused = Counter[int]()

    def client(number: int) -> None:
        own = Client(port)
        for index in range(requests // CLIENTS):
            seed = number * 10_000 + index
            asked = {**OPTIONS, "seed": seed, "save": False}
            while (answer := own.ask("POST", "/api/jobs", asked))[0] == 429:
                refused[number] += 1
                time.sleep(0.05)
            status, job = answer
            assert status == 202, job
            found = engine.job(job["id"])
            assert found is not None
            jobs[seed] = found
            if len(jobs) == requests // 2:
                print(f"after {len(jobs)} requests: {state()}", flush=True)
            if index % 10 == 9:
                own.ask("DELETE", f"/api/jobs/{job['id']}")

    with tempfile.TemporaryDirectory() as folder, listen("127.0.0.1", 0) as listener:
        engine = Engine(Gallery(Path(folder), 1_000_000), queue_length=4)
        runner = server(Desk(engine, Shelf()), Policy())
        port = listener.getsockname()[1]
        running = threading.Thread(target=lambda: runner.run(sockets=[listener]), daemon=True)
        running.start()
        while not runner.started:
            time.sleep(0.01)
        engine.submit(Order("builtin", BUILTIN, OPTIONS, seed=0, save=False)).wait()  # warm
        print(f"before: {state()}", flush=True)
        start = time.perf_counter()
        threads = [threading.Thread(target=client, args=(i,)) for i in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ends = Counter[str]()
        for seed, job in jobs.items():
            assert job.wait(60), f"seed {seed} is lost"
            ends[job.state] += 1
            if job.state == "done":
                assert [one.seed for one in job.drawn] == [seed], f"seed {seed} is drawn twice"
        seconds = time.perf_counter() - start
        said = ", ".join(f"{count} {how}" for how, count in sorted(ends.items()))
        print(f"{len(jobs)} requests of {CLIENTS} clients in {seconds:.1f} s: {said}; "
              f"{refused.total()} times 429")  # fmt: skip
        print(f"after {len(jobs)} requests: {state()}", flush=True)

        waits, own = [], Client(port)  # the worker is idle at each of these
        for seed in range(100):
            _, job = own.ask("POST", "/api/jobs", {**OPTIONS, "seed": seed, "save": False})
            found = engine.job(job["id"])
            assert found is not None and found.wait(60) and found.started is not None
            waits.append(1000 * (found.started - found.created))
        runner.should_exit = True
        running.join(30)
        engine.close()
    assert len(jobs) == requests // CLIENTS * CLIENTS
    print(f"accepted to started: p50 {share(waits, 0.5):.2f} ms, p99 {share(waits, 0.99):.2f} ms")
    for part, gate in GATE_MS.items():
        assert share(waits, part) <= gate, f"{part:.0%} of the requests took more than {gate} ms"


def main(arguments: list[str]) -> None:
    """Read the arguments, and measure."""
    numbers = [int(word) for word in arguments if word.isdecimal()]
    if "--load" in arguments:
        load(numbers[0] if numbers else 200)
    else:
        draw(numbers[0] if numbers else 1000)


if __name__ == "__main__":
    main(sys.argv[1:])
