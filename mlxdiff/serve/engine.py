"""One thread that owns the pipeline, and a bounded queue of jobs before it.

A job is what one request asks for. Only the engine's thread touches a pipeline, so that one picture
is drawn at a time and a change of model waits for the picture that is being drawn. Any thread may
submit, watch, skip and cancel jobs.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

from mlxdiff.batch.jobs import Axis, expand, singly
from mlxdiff.batch.jobs import Job as Drawing
from mlxdiff.batch.models import Models
from mlxdiff.batch.wildcards import Wildcards
from mlxdiff.errors import MlxdiffError, UsageError
from mlxdiff.pictures.image import png_bytes
from mlxdiff.run.progress import Progress
from mlxdiff.run.seeds import pick_seeds
from mlxdiff.serve.gallery import Gallery

logger = logging.getLogger("mlxdiff")

KEPT_JOBS = 200
"""Finished jobs that can still be asked for."""
PREVIEW_SECONDS = 0.2
"""Least time from one preview to the next."""
PREVIEW_PIXELS = 256
"""A preview has one pixel for each latent; it is not sent larger than this."""

ENDED = frozenset({"done", "failed", "cancelled", "lost"})
"""States in which a job stays."""


_STAGES = {"load": "loading", "encode": "encoding", "step": "drawing", "decode": "saving"}
"""Stages of a run -> stages of a job."""


class QueueFull(MlxdiffError):
    """There is no place in the queue.

    Attributes:
        seconds: when to try again.
    """

    def __init__(self, length: int, seconds: int) -> None:
        super().__init__(f"the queue is full ({length} jobs wait); try again in {seconds} s")
        self.seconds = seconds


class _Stop(BaseException):
    """Ends a picture from inside its steps. No handler of errors may take it for one."""


@dataclass(frozen=True)
class Order:
    """The pictures that a job draws.

    Attributes:
        model: its name on the shelf.
        place: what ``mlxdiff.load`` takes for it.
        additions: options of loading that change from picture to picture: loras, vae, ...
        options: of ``Pipeline.generate``, but for seed and count.
        seed: of the first picture; None: random.
        count: number of pictures, for each combination of the axes.
        axes: options that take several values.
        wildcards: fill in the wildcards of prompts; None: prompts stay as they are.
        save: whether the gallery keeps the pictures.
    """

    model: str
    place: Any
    options: Mapping[str, Any]
    additions: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    count: int = 1
    axes: Sequence[Axis] = ()
    wildcards: Wildcards | None = None
    save: bool = True

    def drawings(self) -> list[Drawing]:
        """Return a job for each picture. Raises: UsageError for a wildcard without a file."""
        seed = pick_seeds(self.seed, 1)[0]
        options = {**self.options, "count": self.count}
        found = singly(expand(options, seed, axes=self.axes, wildcards=self.wildcards))
        for one in found:
            if one.fault is not None:
                raise one.fault
        return found


@dataclass(frozen=True)
class Drawn:
    """A finished picture.

    Attributes:
        id: its name in the gallery; None if the gallery does not keep it.
        png: the file.
        seed: its seed.
        labels: the value of each axis in words.
        metadata: how it was made, as JSON values.
        parameters: the same as A1111 writes it.
    """

    id: str | None
    png: bytes
    seed: int
    labels: Sequence[str]
    metadata: Mapping[str, Any]
    parameters: str


class Job:
    """A request, from the queue to its pictures. Made by ``Engine.submit``.

    Attributes:
        id: its name.
        order: what to draw; None for a job that was lost.
        state: "queued", "running", or one of ``ENDED``.
        stage: of a job that runs: "loading", "encoding", "drawing" or "saving".
        drawings: its pictures, each with its options; [] once it has ended.
        seeds: of its pictures.
        picture: index of the picture that is being drawn.
        step, steps: evaluations of the U-Net that are done for it, and all of them.
        fetched, to_fetch: bytes, while files are fetched.
        preview: PNG of the picture as it is expected to be; None: there is none yet.
        drawn: finished pictures.
        notes: warnings, such as of options without effect.
        error: why it failed; None if it did not.
        fault: whether mlxdiff is to blame, not the request.
        created, started, ended: seconds since 1970.
        ahead: jobs that come before it.
    """

    def __init__(self, order: Order | None, job_id: str | None = None) -> None:
        self.id = secrets.token_hex(8) if job_id is None else job_id
        self.order = order
        self.state = "queued"
        self.stage = ""
        self.drawings = [] if order is None else order.drawings()
        self.seeds = [one.seeds[0] for one in self.drawings]
        self.picture = self.step = self.steps = self.fetched = self.to_fetch = 0
        self.preview: bytes | None = None
        self.drawn: list[Drawn] = []
        self.notes: list[str] = []
        self.error: MlxdiffError | None = None
        self.fault = False
        self.created = time.time()
        self.started: float | None = None
        self.ended: float | None = None
        self.ahead = 0
        self._cancelled = False
        self._skipped = False
        self._step_seconds: deque[float] = deque(maxlen=8)
        self._previewed = 0.0
        self._watched_until = 0.0
        self._watchers: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._end = threading.Event()

    @property
    def has_ended(self) -> bool:
        """Return True if the job no longer changes."""
        return self.state in ENDED

    @property
    def seconds_left(self) -> float | None:
        """Expected seconds to the end; None if nothing is known yet."""
        if not self._step_seconds or self.has_ended:
            return None
        later = len(self.seeds) - self.picture - 1
        steps = self.steps - self.step + later * self.steps
        return steps * sum(self._step_seconds) / len(self._step_seconds)

    @property
    def progress(self) -> float:
        """Share that is done, 0 to 1."""
        if self.state == "done":
            return 1.0
        share = self.step / self.steps if self.steps else 0.0
        return min(1.0, (self.picture + share) / max(1, len(self.seeds)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, without pixels."""
        left = self.seconds_left
        return {
            "id": self.id,
            "state": self.state,
            "stage": self.stage,
            "ahead": self.ahead if self.state == "queued" else 0,
            "model": None if self.order is None else self.order.model,
            "prompt": None if self.order is None else self.order.options.get("prompt"),
            "seeds": self.seeds,
            "picture": self.picture,
            "pictures": len(self.seeds),
            "step": self.step,
            "steps": self.steps,
            "progress": round(self.progress, 4),
            "seconds_left": None if left is None else round(left, 2),
            "fetched": self.fetched,
            "to_fetch": self.to_fetch,
            "has_preview": self.preview is not None,
            "drawn": [
                {"id": one.id, "seed": one.seed, "labels": list(one.labels)} for one in self.drawn
            ],
            "notes": list(self.notes),
            "error": None if self.error is None else str(self.error),
            "created": self.created,
            "started": self.started,
            "ended": self.ended,
        }

    def wants_preview(self) -> None:
        """Say that somebody looks: previews are made for the next ten seconds."""
        self._watched_until = time.monotonic() + 10

    def watch(self, call: Callable[[], None]) -> Callable[[], None]:
        """Call a function after each change, in the engine's thread. Returns: what ends it."""
        with self._lock:
            self._watchers.append(call)

        def stop() -> None:
            with self._lock:
                if call in self._watchers:
                    self._watchers.remove(call)

        return stop

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the end. Returns: whether it has ended."""
        return self._end.wait(seconds)

    def skip(self) -> None:
        """End the picture that is being drawn, and go on with the next one."""
        self._skipped = True

    def _changed(self) -> None:
        with self._lock:
            watchers = list(self._watchers)
        for call in watchers:
            call()

    def _set_stage(self, stage: str) -> None:
        self.stage = stage
        self._changed()

    def _begin(self, picture: int) -> None:
        self.picture, self.step, self.preview = picture, 0, None
        self._skipped = False

    def _finish(self, state: str, error: MlxdiffError | None = None, fault: bool = False) -> None:
        self.error, self.fault = error, fault
        self.state, self.stage = state, ""
        self.preview = None
        self.ended = time.time()
        self.drawings = []
        if self.order is not None:  # uploaded pictures leave memory
            plain = {
                k: v for k, v in self.order.options.items() if isinstance(v, (str, int, float))
            }
            self.order = Order(self.order.model, None, plain)
        self._end.set()
        self._changed()

    def _fetch(self, done: int, total: int, item: str) -> None:
        if self._cancelled:
            raise _Stop
        self.fetched, self.to_fetch = done, total
        self._changed()

    def _told(self, now: Progress) -> None:
        """Show the stage of the run; a job that is cancelled ends between two stages."""
        stage = _STAGES[now.stage]
        if stage != self.stage:
            self._set_stage(stage)
        if self._cancelled:
            raise _Stop

    def _advance(self, step: Any) -> None:
        if self.stage != "drawing":
            self.stage = "drawing"
        self.step, self.steps = step.index + 1, step.total
        self._step_seconds.append(step.seconds)
        now = time.monotonic()
        if now < self._watched_until and now - self._previewed >= PREVIEW_SECONDS:
            self._previewed = now
            sketch = step.sketch()
            sketch.thumbnail((PREVIEW_PIXELS, PREVIEW_PIXELS))
            self.preview = png_bytes(sketch, compress_level=1)
        if self.step == self.steps:
            self.stage = "saving"
        self._changed()
        if self._cancelled or self._skipped:
            raise _Stop


class _Notes(logging.Handler):
    """Gives the library's warnings to the job that they are about; they may quote its prompt."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.thread: int | None = None
        self.job: Job | None = None

    def emit(self, record: logging.LogRecord) -> None:
        job, message = self.job, record.getMessage()
        if job is not None and record.thread == self.thread and message not in job.notes:
            job.notes.append(message)


class Engine:
    """Draws the pictures of jobs, one after the other.

    Args:
        gallery: keeps finished pictures, and which jobs are under way.
        loading: options of ``mlxdiff.load`` for every model: quantize, dtype, ...
        queue_length: jobs that may wait.
        keep_alive: seconds without a job after which a model leaves memory; 0: at once;
            None: never.
    """

    def __init__(
        self,
        gallery: Gallery,
        loading: Mapping[str, Any] | None = None,
        *,
        queue_length: int = 16,
        keep_alive: float | None = 300.0,
    ) -> None:
        self.gallery = gallery
        self.queue_length = queue_length
        self.models = Models(loading, keep_alive)
        self.current: Job | None = None
        self._waiting: deque[Job] = deque()
        self._jobs: dict[str, Job] = {}
        self._wake = threading.Condition()
        self._closed = False
        self._picture_seconds = 5.0
        self._notes = _Notes()
        for job_id in gallery.unfinished():
            lost = Job(None, job_id)
            lost._finish("lost", UsageError("the server was stopped before this job was done"))
            self._jobs[job_id] = lost
        gallery.remember_unfinished([])
        self._thread = threading.Thread(target=self._work, name="mlxdiff-engine", daemon=True)
        self._thread.start()

    def submit(self, order: Order) -> Job:
        """Put a job into the queue. Raises: QueueFull."""
        job = Job(order)
        with self._wake:
            if self._closed:
                raise UsageError("the server is stopping")
            if len(self._waiting) >= self.queue_length:
                seconds = max(1, round(self._picture_seconds))
                raise QueueFull(len(self._waiting), min(seconds, 600))
            self._waiting.append(job)
            self._jobs[job.id] = job
            self._count_ahead()
            self._remember()
            self._wake.notify()
        return job

    def job(self, job_id: str) -> Job | None:
        """The job of this name; None if there is none."""
        return self._jobs.get(job_id)

    def jobs(self) -> list[Job]:
        """All jobs that are known, the oldest first."""
        with self._wake:
            return list(self._jobs.values())

    @property
    def loaded(self) -> str | None:
        """The model that was used last, if it is loaded."""
        return next(reversed(self.models.names), None)

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._waiting)

    def cancel(self, job: Job) -> None:
        """End a job: at once if it waits, else after the step that is being drawn."""
        with self._wake:
            job._cancelled = True
            if job not in self._waiting:
                return
            self._waiting.remove(job)
            self._count_ahead()
            self._remember()
        job._finish("cancelled")

    def close(self) -> None:
        """Cancel all jobs, and end the thread."""
        with self._wake:
            self._closed = True
            waiting = list(self._waiting)
            if self.current is not None:
                self.current._cancelled = True
            self._wake.notify()
        for job in waiting:
            self.cancel(job)
        self._thread.join(60)

    def _count_ahead(self) -> None:
        running = self.current is not None
        for index, job in enumerate(self._waiting):
            job.ahead = index + running

    def _remember(self) -> None:
        """Write down which jobs are under way, so that a restart can say which were lost.

        What is under way when the engine is closed stays written down.
        """
        if self._closed:
            return
        now = [] if self.current is None else [self.current]
        self.gallery.remember_unfinished([job.id for job in (*now, *self._waiting)])
        ended = [job_id for job_id, job in self._jobs.items() if job.has_ended]
        for job_id in ended[: max(0, len(ended) - KEPT_JOBS)]:
            del self._jobs[job_id]

    # In the engine's thread

    def _work(self) -> None:
        notes = self._notes
        notes.thread = threading.get_ident()
        logger.addHandler(notes)
        while (job := self._next()) is not None:
            notes.job = job
            try:
                self._run(job)
            except _Stop:
                job._finish("cancelled")
            except MlxdiffError as error:
                job._finish("failed", error)
            except MemoryError:
                self.models.unload_all()
                job._finish("failed", UsageError("out of memory; try a smaller size"))
            except Exception as error:
                logger.debug("a job failed", exc_info=True)
                fault = MlxdiffError(f"a fault of mlxdiff: {type(error).__name__}: {error}")
                job._finish("failed", fault, fault=True)
            with self._wake:
                self.current = None
                self._count_ahead()
                self._remember()
            notes.job = None
            del job
        logger.removeHandler(notes)
        self.models.unload_all()

    def _next(self) -> Job | None:
        """Wait for the next job; None: the engine is closed."""
        with self._wake:
            while not self._waiting and not self._closed:
                if not self._wake.wait(self.models.seconds_to_idle) and not self._waiting:
                    self.models.unload_idle()
            if self._closed:
                return None
            job = self.current = self._waiting.popleft()
            self._count_ahead()
        job.state, job.started = "running", time.time()
        job._changed()
        return job

    def _run(self, job: Job) -> None:
        """Draw the pictures of a job, each on its own: it is what its own seed gives alone."""
        order = job.order
        assert order is not None
        pipe = self.models.get(
            {"model": order.place, **order.additions},
            name=order.model,
            progress=job._fetch,
            on_load=lambda: job._set_stage("loading"),
        )
        if job._cancelled:
            raise _Stop
        if pipe.model.lacks("video") is None:
            raise UsageError(
                f"{order.model}: this model draws videos, and the server returns pictures; use "
                "mlxdiff generate"
            )
        for picture, drawing in enumerate(job.drawings):
            start = time.perf_counter()
            job._begin(picture)
            job._set_stage("encoding")
            try:
                run = pipe.stream(**drawing.options, on_progress=job._told)
                self.models.make_room(pipe, run.settings)
                with closing(run):
                    for step in run:
                        job._advance(step)
                    result = run.result
            except _Stop:
                if job._cancelled:
                    raise
                continue
            job._set_stage("saving")
            job.drawn.append(self._drawn(order, drawing, result))
            self._picture_seconds = time.perf_counter() - start
            job._changed()
            if job._cancelled:
                raise _Stop
        job._finish("done")

    def _drawn(self, order: Order, drawing: Drawing, result: Any) -> Drawn:
        """Encode a picture, and put it into the gallery if it is to be kept."""
        metadata = result.metadata[0]
        metadata = replace(metadata, extra={**metadata.extra, **drawing.said})
        png = png_bytes(result.images[0], metadata.chunks())
        return Drawn(
            id=self.gallery.add(png) if order.save else None,
            png=png,
            seed=drawing.seeds[0],
            labels=drawing.labels,
            metadata=metadata.to_dict(),
            parameters=metadata.to_parameters(),
        )
