"""A server for the tests, on a free port of this machine, with a pipeline that draws at once."""

from __future__ import annotations

import http.client
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from PIL import Image

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from mlxdiff.batch import models as models_module
from mlxdiff.errors import UsageError
from mlxdiff.pictures.image import png_bytes
from mlxdiff.pictures.metadata import Metadata
from mlxdiff.serve.desk import Desk
from mlxdiff.serve.engine import Engine
from mlxdiff.serve.gallery import Gallery
from mlxdiff.serve.guard import Policy
from mlxdiff.serve.http import listen, server
from mlxdiff.serve.request import Limits
from mlxdiff.serve.shelf import Shelf


class FakePipeline:
    """Draws a plain picture in 4 steps, or as many as it is asked for. Keeps what it was given.

    The prompt "fail" is refused; "fault" is a fault; "note" warns; "slow" takes 20 ms a step.
    """

    made: ClassVar[list[FakePipeline]] = []
    memory_size: ClassVar[int] = 1_000_000_000_000

    def __init__(self, model: Any, **loading: Any) -> None:
        self.place, self.loading = model, loading
        self.calls: list[dict[str, Any]] = []
        self.added: dict[str, Any] = {}
        self.lora_folder: Any = None
        self.backend = SimpleNamespace(
            clear_cache=lambda: None, memory_size=lambda: self.memory_size
        )
        self.memory_limit = None
        self.model = SimpleNamespace(lacks=lambda part: "it has no part for that")
        FakePipeline.made.append(self)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("set_"):
            raise AttributeError(name)

        def setter(value: Any, **how: Any) -> None:
            self.added[name.removeprefix("set_")] = value

        return setter

    def memory(self, settings: Any) -> Any:
        """A gigabyte of weights, and one of work."""
        return SimpleNamespace(peak=2_000_000_000, weights={"unet": 10**9}, low_memory=False)

    def stream(self, *, seed: int, count: int, on_progress: Any, **options: Any) -> FakeRun:
        self.calls.append(options | {"seed": seed})
        prompt = options.get("prompt")
        if prompt == "fail":
            raise UsageError("steps is 3; expected another number")
        if prompt == "fault":
            raise ZeroDivisionError("nobody expected this")
        if prompt == "note":
            logging.getLogger("mlxdiff").warning("%s has no effect", "eta")
        return FakeRun(seed, options)


class FakeRun:
    """A run of a FakePipeline."""

    def __init__(self, seed: int, options: Mapping[str, Any]) -> None:
        self.settings = SimpleNamespace()
        self.seed, self.options = seed, options
        self.size = options.get("width", 64), options.get("height", 64)
        self.image = Image.new("RGB", self.size, (seed % 256, 0, 0))

    def __iter__(self) -> Iterator[Any]:
        steps = self.options.get("steps", 4)
        for index in range(steps):
            if self.options.get("prompt") == "slow":
                time.sleep(0.02)
            yield SimpleNamespace(index=index, total=steps, seconds=0.001, sketch=self.image.copy)

    def close(self) -> None:
        pass

    @property
    def result(self) -> Any:
        metadata = Metadata(
            prompt=self.options.get("prompt") or "",
            seed=self.seed,
            steps=self.options.get("steps", 4),
            width=self.size[0],
            height=self.size[1],
            model="builtin",
            sampler="euler",
            version="0",
        )
        return SimpleNamespace(
            images=[self.image],
            metadata=[metadata],
            png=lambda: png_bytes(self.image, metadata.chunks()),
        )


@dataclass
class Server:
    """A server that runs, and a plain client of it."""

    port: int
    desk: Desk

    @property
    def engine(self) -> Engine:
        return self.desk.engine

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 60,
    ) -> tuple[int, Any, Mapping[str, str]]:
        """Status, body (parsed where it is JSON) and headers of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
            connection.request(method, path, data, dict(headers or {}))
            answer = connection.getresponse()
            text = answer.read()
            found = {key.lower(): value for key, value in answer.getheaders()}
            if found.get("content-type", "").startswith("application/json"):
                return answer.status, json.loads(text), found
            return answer.status, text, found
        finally:
            connection.close()

    def finished(self, job: str, seconds: float = 60) -> dict[str, Any]:
        """A job, when it has ended."""
        found = self.engine.job(job)
        assert found is not None and found.wait(seconds)
        return found.to_dict()


@contextmanager
def running(
    folder: Path,
    *,
    policy: Policy | None = None,
    limits: Limits | None = None,
    shelf: Shelf | None = None,
    limit: int = 10_000_000,
    loading: Mapping[str, Any] | None = None,
    **engine: Any,
) -> Iterator[Server]:
    """Run a server."""
    listener = listen("127.0.0.1", 0)
    made = Engine(Gallery(folder, limit), loading, **engine)
    desk = Desk(made, shelf or Shelf(), limits or Limits())
    runner = server(desk, policy or Policy())
    thread = threading.Thread(target=lambda: runner.run(sockets=[listener]), daemon=True)
    thread.start()
    while not runner.started:
        time.sleep(0.005)
    try:
        yield Server(listener.getsockname()[1], desk)
    finally:
        runner.should_exit = True
        thread.join(30)
        listener.close()
        made.close()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakePipeline]:
    """Let the engine load pipelines that draw at once."""
    FakePipeline.made = []
    monkeypatch.setattr(models_module, "load", FakePipeline)
    return FakePipeline
