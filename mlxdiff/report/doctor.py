"""Find what is slow or broken on this machine, and say what to do about it.

Each check examines one thing and reports what it found. No check installs or changes anything, or
uses the network unless requested.
"""

from __future__ import annotations

import ctypes.util
import glob
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxdiff import library, loading
from mlxdiff.convert.report import human_bytes
from mlxdiff.errors import MlxdiffError, UsageError
from mlxdiff.machine import probe
from mlxdiff.machine.disk import free_space
from mlxdiff.machine.threads import one_blas_thread
from mlxdiff.run.additions.lora import LoRA, few_step_for
from mlxdiff.store import cache, hub
from mlxdiff.store.catalogue import SHIPPED

OK, ADVICE, FAULT = "ok", "advice", "fault"
_MATRIX_SECONDS = 0.3
_SLOW = 4.0  # MLX's products this many times slower than NumPy's mean a non-optimised BLAS
_ROOM = 10_000_000_000  # bytes for a model from the hub and its converted copy


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        topic: "mlx", "memory", ...; a stable id for programs.
        state: "ok"; "advice" if something can be improved; "fault" if mlxdiff cannot run.
        text: description of what was found.
        remedy: what to do, or "" if nothing.
    """

    topic: str
    state: str
    text: str
    remedy: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return the fields as a dictionary, for JSON."""
        return {"topic": self.topic, "state": self.state, "text": self.text, "remedy": self.remedy}


def examine(online: bool = False) -> Iterator[Finding]:
    """Run all checks and yield each finding as soon as it is known.

    Args:
        online: if True, also try to reach the hub.
    """
    checks: list[Callable[[], Iterator[Finding]]] = [
        _versions,
        _python,
        _shipped,
        _numpy,
        _mlx,
        _compiler,
        _temporary_folder,
        _threads,
        _busy,
        _memory,
        _folders,
        lambda: _hub(online),
    ]
    for check in checks:
        try:
            yield from check()
        except Exception as error:  # a failed check must not hide the others
            topic = getattr(check, "__name__", "hub").strip("_")
            yield Finding(
                topic,
                ADVICE,
                f"This check failed ({type(error).__name__}: {error}).",
                "please report it",
            )


def _versions() -> Iterator[Finding]:
    found = probe.versions()
    names = {"mlxdiff": "mlxdiff", "python": "Python", "numpy": "NumPy", "mlx": "MLX"}
    listed = ", ".join(f"{label} {found[key] or 'none'}" for key, label in names.items())
    yield Finding("versions", OK, f"{listed}; {probe.system()}, {probe.processor()}.")


def _python() -> Iterator[Finding]:
    if probe.is_translated():
        yield Finding(
            "python",
            ADVICE,
            "This Python is built for Intel and runs under Rosetta on Apple silicon; MLX cannot "
            "be installed in it.",
            "install Python for arm64 (python.org, Homebrew in /opt/homebrew), and mlxdiff in it",
        )


def _shipped() -> Iterator[Finding]:
    try:
        for folder in SHIPPED.values():
            pipe = loading.load(folder, backend="numpy")
            for name in pipe.source.components:
                pipe.model.component(name)
            way = few_step_for(pipe.model)
            if way is not None and way.is_shipped:
                LoRA.open([way.place], pipe.model)
    except (MlxdiffError, OSError) as error:
        yield Finding(
            "installation",
            FAULT,
            f"A model of the package cannot be read: {error}",
            "install mlxdiff again (pip install --force-reinstall --no-deps mlxdiff)",
        )
    else:
        yield Finding(
            "installation", OK, f"The models of the package are complete: {', '.join(SHIPPED)}."
        )


def _numpy() -> Iterator[Finding]:
    rate = _numpy_rate()
    slow = rate < 4e9 * probe.usable_cores()  # a core with vector units reaches 30 and more
    yield Finding(
        "numpy",
        ADVICE if slow else OK,
        f"NumPy multiplies matrices with {probe.blas()}, at {_giga(rate)}.",
        "if the machine is otherwise idle, this NumPy has no fast BLAS; install the wheel from "
        "PyPI (pip install --force-reinstall numpy)"
        if slow
        else "",
    )


def _numpy_rate() -> float:
    backend = loading.make_backend("numpy")
    return probe.matmul_rate(backend, "float32", _MATRIX_SECONDS)


def _mlx() -> Iterator[Finding]:
    try:
        backend = loading.make_backend("mlx")
    except UsageError as error:
        yield from _without_mlx(str(error))
        return
    device = backend.device()
    if backend.has_gpu():
        rate = probe.matmul_rate(backend, backend.dtype, _MATRIX_SECONDS)
        yield Finding(
            "mlx", OK, f"MLX computes on {device}, matrices in {backend.dtype} at {_giga(rate)}."
        )
        return
    if sys.platform == "darwin":
        yield Finding(
            "mlx",
            ADVICE,
            "MLX finds no Metal device (a virtual machine, or a session without the GPU?) and "
            "computes on the CPU.",
            "run mlxdiff directly on the Mac; until then it uses NumPy",
        )
    else:
        yield Finding("mlx", OK, "MLX computes on the CPU here; --backend auto uses NumPy.")
        yield from _nvidia()
    yield from _mlx_blas(backend)


def _without_mlx(error: str) -> Iterator[Finding]:
    arm_mac = sys.platform == "darwin" and platform.machine() == "arm64"
    linux = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
    installed = importlib.util.find_spec("mlx") is not None
    if not (arm_mac or linux or installed):
        yield Finding("mlx", OK, "MLX is not available for this platform; mlxdiff uses NumPy.")
    elif arm_mac:
        yield Finding("mlx", ADVICE, f"The GPU is not used: {error}.", "pip install -U mlx")
    else:
        yield Finding(
            "mlx",
            ADVICE if installed else OK,
            f"mlxdiff uses NumPy: {error}.",
            "pip install -U --force-reinstall 'mlx[cpu]'" if installed else "",
        )
        yield from _nvidia()


def _nvidia() -> Iterator[Finding]:
    if Path("/proc/driver/nvidia/version").exists():
        yield Finding(
            "gpu",
            ADVICE,
            "This machine has an NVIDIA GPU, which this MLX cannot use.",
            "install MLX for CUDA: pip install 'mlx[cuda13]'",
        )


def _mlx_blas(backend: Any) -> Iterator[Finding]:
    """Check if MLX's matrix products on the CPU use a slow library."""
    ours, theirs = probe.matmul_rate(backend, "float32", _MATRIX_SECONDS), _numpy_rate()
    if ours * _SLOW >= theirs:
        yield Finding("mlx-blas", OK, f"MLX multiplies matrices on the CPU at {_giga(ours)}.")
        return
    if (library_ := _openblas()) is None:
        how = "install OpenBLAS (Debian, Ubuntu: sudo apt install libopenblas0), then run"
        library_ = "libopenblas.so.0"
    else:
        how = "run"
    yield Finding(
        "mlx-blas",
        ADVICE,
        f"MLX multiplies matrices on the CPU at {_giga(ours)}, NumPy at {_giga(theirs)}: the "
        "library in MLX's Linux wheel is a slow reference implementation.",
        f"nothing, if you let mlxdiff choose: it uses NumPy here; for --backend mlx {how} "
        f"mlxdiff with LD_PRELOAD={library_} before the command",
    )


def _openblas() -> str | None:
    """Find an OpenBLAS library of the system; return None if there is none."""
    patterns = ("/usr/lib/*/openblas-*/libopenblas.so.0", "/usr/lib*/libopenblas*.so.0")
    found = sorted(path for pattern in patterns for path in glob.glob(pattern))
    return found[0] if found else ctypes.util.find_library("openblas")


def _compiler() -> Iterator[Finding]:
    """Check for g++: without it, MLX on a Linux CPU silently runs compiled functions uncompiled."""
    if sys.platform != "linux" or importlib.util.find_spec("mlx") is None:
        return
    if shutil.which("g++") is None:
        yield Finding(
            "compiler",
            OK,
            "There is no g++, so mx.compile silently does nothing on this CPU. mlxdiff does not "
            "need it there; your own MLX code might.",
        )


def _temporary_folder() -> Iterator[Finding]:
    folder = os.environ.get("TMPDIR") or "/tmp" if os.name == "posix" else tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        yield Finding(
            "temporary-folder",
            ADVICE,
            f"The temporary folder {folder} is not writable ({error.strerror}); programs that use "
            "it fail, and so do MLX's compiled functions on a CPU.",
            "set TMPDIR to a writable folder",
        )


def _threads() -> Iterator[Finding]:
    cores = probe.usable_cores()
    given = {n: os.environ[n] for n in probe.THREAD_VARIABLES if os.environ.get(n)}
    said = ", ".join(f"{name}={value}" for name, value in given.items())
    counts = [int(value) for value in given.values() if value.isdecimal()]
    if counts and min(counts) < cores:
        yield Finding(
            "threads",
            ADVICE,
            f"{said}: NumPy uses fewer threads than the {cores} available cores.",
            f"unset {' '.join(given)} for full speed",
        )
    elif counts and max(counts) > cores:
        yield Finding(
            "threads",
            ADVICE,
            f"{said}: NumPy uses more threads than the {cores} available cores, which slows it "
            "down.",
            f"export {' '.join(f'{name}={cores}' for name in given)}",
        )
    elif (os.cpu_count() or 1) > cores and not counts and not one_blas_thread.possible:
        yield Finding(
            "threads",
            ADVICE,
            f"This process may use {cores} of {os.cpu_count()} cores; NumPy's BLAS may not know "
            "this.",
            f"export OPENBLAS_NUM_THREADS={cores}",
        )
    else:
        yield Finding("threads", OK, f"{cores} cores, all used.")


def _busy() -> Iterator[Finding]:
    load, cores = probe.load_average(), probe.usable_cores()
    if load is not None and load > 1.5 * cores:
        yield Finding(
            "load",
            ADVICE,
            f"Other programs keep this machine busy (load {load:.1f} on {cores} cores).",
            "expect pictures to take longer, and do not trust times that you measure now",
        )


def _memory() -> Iterator[Finding]:
    total, free = probe.memory_bytes(), probe.available_bytes()
    if total is None:
        return
    now = "" if free is None else f", {human_bytes(free)} of it free"
    small = total < 4_000_000_000
    yield Finding(
        "memory",
        ADVICE if small else OK,
        f"{human_bytes(total)} of memory{now}.",
        "use small models (mlxdiff models --known shows their sizes)" if small else "",
    )


def _folders() -> Iterator[Finding]:
    for topic, folder, variable in (
        ("library", library.folder(), "MLXDIFF_HOME"),
        ("hub-cache", cache.cache_folder(), "HF_HUB_CACHE"),
    ):
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        free, shown = free_space(folder), _from_home(folder)
        if not os.access(existing, os.W_OK) or not existing.is_dir():
            yield Finding(
                topic,
                ADVICE,
                f"{shown} is not writable, so models from the hub cannot be kept there.",
                f"set {variable} to a writable folder",
            )
        elif free < _ROOM:
            yield Finding(
                topic,
                ADVICE,
                f"{shown} has room for {human_bytes(free)}; SDXL takes 7 GB, and its converted "
                "copy another 7 GB.",
                f"make room (mlxdiff models remove NAME), or set {variable} to another disk",
            )
        else:
            yield Finding(topic, OK, f"{shown} has room for {human_bytes(free)}.")


def _hub(online: bool) -> Iterator[Finding]:
    if cache.is_offline():
        yield Finding(
            "hub",
            OK,
            "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set: only models that are already on "
            "this machine can be used.",
        )
    elif not online:
        yield Finding("hub", OK, "The hub was not tried; mlxdiff doctor --online tries it.")
    else:
        start = time.perf_counter()
        try:
            hub.reach()
        except MlxdiffError as error:
            yield Finding(
                "hub",
                ADVICE,
                f"{error}.",
                "check the network, and HTTPS_PROXY or HF_ENDPOINT if you need them; models that "
                "are already on this machine work offline",
            )
        else:
            yield Finding("hub", OK, f"The hub answers ({time.perf_counter() - start:.1f} s).")


def _from_home(folder: Path) -> str:
    """Write a path relative to ~, because a posted report must not show the user's name."""
    try:
        return f"~/{folder.relative_to(Path.home()).as_posix()}"
    except (ValueError, RuntimeError):
        return str(folder)


def _giga(rate: float) -> str:
    return f"{rate / 1e9:.3g} GFLOP/s"
