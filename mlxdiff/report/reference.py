"""``mlxdiff doctor --reference``: draw what diffusers' own slow tests draw, and compare.

The cases are facts (``published``); this module runs them. It fetches nothing unless asked to. It
skips a case whose weights or files are missing, and says which.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from mlxdiff.errors import HubError, MlxdiffError, UsageError
from mlxdiff.library import open_model
from mlxdiff.loading import load, make_backend
from mlxdiff.machine import probe
from mlxdiff.pictures.image import load_image, resize
from mlxdiff.report.published import CASES, MIRRORS, Case, File
from mlxdiff.store import catalogue

SCHEMA = "mlxdiff-reference/1"
OK, MISS, SKIPPED = "ok", "miss", "skipped"
ALL = "all"


@dataclass(frozen=True)
class Outcome:
    """The result of a case.

    Attributes:
        case: the case.
        state: "ok"; "miss", further off than the test allows; "skipped".
        found: our values, in the order of the expected ones; () if a whole picture was compared or
            nothing was drawn.
        difference: by the case's measure, or None.
        seconds: time of the drawing, or None.
        reason: why the case was skipped, or "".
    """

    case: Case
    state: str
    found: tuple[float, ...] = ()
    difference: float | None = None
    seconds: float | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        case = self.case
        expected = [case.expected.url] if isinstance(case.expected, File) else list(case.expected)
        return {
            "case": case.name,
            "test": case.test,
            "model": case.model,
            "dtype": case.dtype,
            "state": self.state,
            "expected": expected,
            "found": [round(value, 5) for value in self.found],
            "difference": None if self.difference is None else float(f"{self.difference:.4g}"),
            "tolerance": case.tolerance,
            "measure": case.measure,
            "seconds": None if self.seconds is None else round(self.seconds, 2),
            "reason": self.reason,
        }


def reference(
    model: str,
    *,
    files: str | os.PathLike[str] | None = None,
    backend: str = "auto",
    exact: bool = False,
    download: bool = False,
    cases: Sequence[Case] = CASES,
    on_outcome: Callable[[Outcome], None] | None = None,
    progress: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Reproduce the published numbers of a model.

    Args:
        model: a short name, a hub id, NAME=PATH for weights of that model in another place, the
            path of a converted folder that names its source, or "all".
        files: folder with the pictures and arrays that tests fetch, each under its own name.
        backend, exact: as ``mlxdiff.load`` takes them.
        download: fetch weights that are not here.
        cases: to choose from.
        on_outcome: called with each outcome as soon as it is known.
        progress: as ``mlxdiff.load`` takes it.
    Returns: the record, JSON values only; ``state`` is "miss" if any case is.
    Raises: UsageError if the model has no published case.
    """
    chosen, place = _choose(model, cases)
    machine, device = probe.facts(), make_backend(backend)
    folder = None if files is None else Path(files)
    if folder is not None and not folder.is_dir():
        raise UsageError(
            f"{folder}: no such folder; give one with the files of the tests (--files)"
        )
    outcomes = []
    with nullcontext() if download else _offline():
        runner = _Runner(place, folder, backend, exact, device.has_gpu(), progress)
        for case in chosen:
            outcomes.append(runner.run(case))
            if on_outcome is not None:
                on_outcome(outcomes[-1])
    return {
        "schema": SCHEMA,
        "date": date.today().isoformat(),
        "machine": machine,
        "versions": probe.versions(),
        "backend": device.name,
        "device": device.device(),
        "exact": exact,
        "state": MISS if any(o.state == MISS for o in outcomes) else OK,
        "cases": [outcome.to_dict() for outcome in outcomes],
    }


def canonical(model: str) -> str:
    """Return the hub id of a model, with short names and mirrors resolved."""
    repo = str(catalogue.expand(model)).partition("@")[0]
    return MIRRORS.get(repo, repo)


def _choose(model: str, cases: Sequence[Case]) -> tuple[list[Case], str | None]:
    """Return the cases of a model, and the place of its weights, or None for the hub."""
    if model == ALL:
        return list(cases), None
    name, equals, place = model.partition("=")
    if not equals and Path(model).exists():
        name, place = str(open_model(model).provenance.get("source", "")), model
    chosen = [case for case in cases if canonical(case.model) == canonical(name)]
    if chosen:
        return chosen, place or None
    known = sorted({_shortest(case.model) for case in cases})
    if place and not equals:
        raise UsageError(
            f"{model}: does not say which published model it is; say so: --reference "
            f"NAME={model} with one of {', '.join(known)}"
        )
    raise UsageError(
        f"{name}: diffusers publishes no numbers for it that are known here; there are some for "
        f"{', '.join(known)}, or {ALL}"
    )


def _shortest(model: str) -> str:
    """Return a model's short name, or its hub id."""
    repo = canonical(model)
    return next((known.name for known in catalogue.KNOWN if known.repo == repo), repo)


@contextmanager
def _offline() -> Iterator[None]:
    """Ask the hub for nothing inside the block."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


class _Runner:
    """Run cases one after the other; keep the pipeline if the next case needs the same one."""

    def __init__(
        self,
        place: str | None,
        files: Path | None,
        backend: str,
        exact: bool,
        on_gpu: bool,
        progress: Callable[..., None] | None,
    ) -> None:
        self.place, self.files = place, files
        self.backend, self.exact, self.on_gpu = backend, exact, on_gpu
        self.progress = progress
        self._key: tuple[Any, ...] = ()
        self._pipe: Any = None

    def run(self, case: Case) -> Outcome:
        """Draw what a case says and compare."""
        try:
            paths = {file: self._path(file) for file in case.needed}
            pipe = self._load(case, paths)
            start = time.perf_counter()
            found = _drawn(pipe, case, paths)
            seconds = time.perf_counter() - start
            expected = _expected(case, paths)
            if expected.shape != found.shape:
                raise UsageError(
                    f"the picture is {found.shape}, the test's is {expected.shape}: another file?"
                )
        except MlxdiffError as error:
            return Outcome(case, SKIPPED, reason=self._explained(error))
        difference = compare(found, expected, case.measure)
        state = OK if difference <= case.tolerance else MISS
        values = () if isinstance(case.expected, File) else tuple(map(float, found.ravel()))
        return Outcome(case, state, values, difference, seconds)

    def _path(self, file: File) -> Path:
        """Return the path of a file of the user's. Raises: UsageError if it is missing."""
        if self.files is not None and (self.files / file.name).is_file():
            return self.files / file.name
        raise UsageError(f"needs {file.name} in the folder of --files ({file.url})")

    def _load(self, case: Case, paths: dict[File, Path]) -> Any:
        """Return the pipeline of a case; free the one before first."""
        # A CPU computes in float32. The weights are rounded to the test's type all the same.
        dtype = case.dtype if self.on_gpu or case.dtype == "float32" else None
        lora = None if case.lora is None else paths[case.lora]
        key = (case.model, dtype, case.controlnets, case.ip_adapter, lora)
        if key != self._key:
            self._key, self._pipe = (), None
            self._pipe = self._open(case, dtype, () if lora is None else (lora,))
            self._key = key
        return self._pipe

    def _open(self, case: Case, dtype: str | None, loras: Sequence[Path]) -> Any:
        repos = [canonical(case.model), case.model]
        places = [self.place] if self.place else list(dict.fromkeys(repos))
        for place in places:
            try:
                return load(
                    place,
                    backend=self.backend,
                    dtype=dtype,
                    exact=self.exact,
                    controlnets=case.controlnets,
                    ip_adapters=() if case.ip_adapter is None else (case.ip_adapter,),
                    loras=loras,
                    progress=self.progress,
                )
            except HubError:
                if place == places[-1]:
                    raise
        raise AssertionError("there is at least one place")

    @staticmethod
    def _explained(error: MlxdiffError) -> str:
        """Say why a case is skipped, without the name of the user: people post it."""
        if isinstance(error, HubError) and "HF_HUB_OFFLINE" in str(error):
            return f"{str(error).partition(': ')[0]} is not here; --download fetches it"
        return " ".join(str(error).split()).replace(str(Path.home()), "~")


def _drawn(pipe: Any, case: Case, paths: dict[File, Path]) -> np.ndarray:
    """Draw a case; return the values that the test compares, float64."""
    # A test keeps the checkpoint's own schedule with a scheduler that it names; "auto" may not.
    own = {} if case.arguments.get("sampler") == "checkpoint" else {"schedule": "normal"}
    arguments = own | dict(case.arguments)
    for name, file in case.files.items():
        picture = load_image(paths[file])
        arguments[name] = (
            picture if file.size is None else resize(picture, *file.size, bicubic=True)
        )
    if case.noise is not None:
        height, width, channels = pipe.model.latent_shape(arguments["height"], arguments["width"])
        random = np.random.RandomState(case.noise)
        noise = random.standard_normal((1, channels, height, width))  # in the order of torch
        arguments["noise"] = noise.transpose(0, 2, 3, 1).astype(np.float32)
    latents = np.zeros(0)
    with _changed(pipe.source.scheduler_config, case.scheduler):
        for step in pipe.stream(**arguments):
            latents = step.latents
            if step.index == case.after:
                break
    rows, columns = slice(*case.rows), slice(*case.columns)
    if case.after is not None:  # torch's latents[0, -3:, rows, -1]: channels, then rows
        return np.asarray(latents[rows, -1, -3:].T, np.float64)
    picture = np.clip(pipe.model.decode_pixels(latents) / 2 + 0.5, 0.0, 1.0).astype(np.float64)
    if isinstance(case.expected, File):
        return np.asarray(picture)
    return np.asarray(picture[rows, columns, -1])


def _expected(case: Case, paths: dict[File, Path]) -> np.ndarray:
    """Return the values that the test expects, in the shape of the compared ones."""
    if not isinstance(case.expected, File):
        return np.array(case.expected).reshape(3, 3)
    path = paths[case.expected]
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: is no array of NumPy ({error}); fetch it again") from None
    return np.asarray(values, np.float64).squeeze()


def compare(found: np.ndarray, expected: np.ndarray, measure: str) -> float:
    """Return how far two arrays are apart, as the tests measure it.

    Args:
        measure: "largest", the largest difference; "cosine", 1 minus the cosine of their angle.
    """
    if measure == "largest":
        return float(np.abs(found - expected).max())
    x, y = found.ravel(), expected.ravel()
    return float(1 - x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


@contextmanager
def _changed(config: dict[str, Any], changes: Any) -> Iterator[None]:
    """Change a config inside the block."""
    before = dict(config)
    config.update(changes)
    try:
        yield
    finally:
        config.clear()
        config.update(before)


# --------------------------------------------------------------------------------------- for people


def lines(outcome: Outcome) -> list[str]:
    """Return an outcome as text: ours beside theirs."""
    case = outcome.case
    if outcome.state == SKIPPED:
        return [f"{SKIPPED:9}{case.name}: {outcome.reason}"]
    shown = [
        f"{outcome.state:9}{case.name} ({case.model}, {case.dtype}): {case.measure} difference "
        f"{outcome.difference:.2g}, the test allows {case.tolerance:g}; {outcome.seconds:.1f} s",
        f"{'':9}tests/{case.test}",
    ]
    if not isinstance(case.expected, File):
        for whose, values in (("theirs", case.expected), ("ours", outcome.found)):
            shown.append(f"{'':9}{whose:7}" + " ".join(f"{value:8.4f}" for value in values))
    return shown
