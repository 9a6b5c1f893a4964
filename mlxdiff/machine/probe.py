"""Facts about this machine, and measurements of how fast its processor multiplies and copies.

People post these facts, so none of them names a person, a computer or a folder.
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


def facts() -> dict[str, Any]:
    """Return JSON values: processor, usable cores, memory (bytes), system, architecture, load."""
    return {
        "processor": processor(),
        "cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "system": system(),
        "architecture": platform.machine(),
        "load": None if (load := load_average()) is None else round(load, 2),
    }


def versions() -> dict[str, str | None]:
    """Return the versions of the packages that compute; None for missing packages."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("mlxdiff", "mlx", "numpy", "pillow", "tokenizers", "huggingface-hub"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def processor() -> str:
    """Return the name of the processor, as far as the system gives it."""
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    for line in _lines("/proc/cpuinfo"):
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def system() -> str:
    """Return the name and version of the operating system, without the kernel build."""
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    for line in _lines("/etc/os-release"):
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip().strip('"')
    return f"{platform.system()} {platform.release()}"


def usable_cores() -> int:
    """Return the number of cores that this process may use. A container's limit counts."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    quota = " ".join(_lines("/sys/fs/cgroup/cpu.max")).split()
    if len(quota) == 2 and quota[0].isdecimal():
        cores = min(cores, max(1, math.ceil(int(quota[0]) / int(quota[1]))))
    return cores


def memory_bytes() -> int | None:
    """Return the bytes of memory of the machine or its container, or None if unknown."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None
    for limit in _lines("/sys/fs/cgroup/memory.max"):
        if limit.strip().isdecimal():
            total = min(total, int(limit))
    return total


def available_bytes() -> int | None:
    """Return the bytes of memory that programs can take without swapping, or None if unknown."""
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def load_average() -> float | None:
    """Return the mean number of runnable programs in the last minute, or None if unknown."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def is_translated() -> bool:
    """Return True if this is a Python for Intel that runs on Apple silicon (Rosetta)."""
    return sys.platform == "darwin" and _sysctl("sysctl.proc_translated") == "1"


def blas() -> str:
    """Return the name and version of the library that multiplies matrices for NumPy."""
    try:
        config: Any = np.show_config(mode="dicts")
        found = config["Build Dependencies"]["blas"]
    except Exception:  # other NumPy versions have other layouts
        return "unknown"
    return f"{found.get('name', 'unknown')} {found.get('version', '')}".strip()


# ------------------------------------------------------------------------------------------- speed


def matmul_rate(backend: Any, dtype: str, seconds: float = 0.3) -> float:
    """Measure operations per second of a matrix product. A multiply-add counts as two.

    The size grows until one product takes a tenth of `seconds`. So a small processor does not wait
    long, and a large one is not measured by its overhead. Size 1024 is tried unless the size before
    it was very slow, so that a short disturbance by another program does not decide.
    """
    best, side = 0.0, 256
    while True:
        a, b = (
            backend.asarray(_random(side, seed).astype(np.float32), dtype=dtype) for seed in (0, 1)
        )
        took = _quickest(lambda a=a, b=b: backend.evaluate(a @ b), seconds)  # type: ignore[misc]
        best = max(best, 2 * side**3 / took)
        if took > (seconds / 10 if side >= 1024 else seconds) or side >= 8192:
            return best
        side *= 2


def copy_rate(backend: Any, dtype: str = "float32", seconds: float = 0.3) -> float:
    """Measure the bytes per second that an element-wise operation reads and writes in total."""
    best, values = 0.0, 1 << 24
    while True:
        x = backend.asarray(np.ones(values, np.float32), dtype=dtype)
        size = values * (4 if dtype == "float32" else 2)
        took = _quickest(lambda x=x: backend.evaluate(abs(x)), seconds)  # type: ignore[misc]
        best = max(best, 2 * size / took)
        if took > seconds / 20 or values >= 1 << 28:
            return best
        values *= 4


def _random(side: int, seed: int) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal((side, side))


def _quickest(run: Callable[[], object], seconds: float) -> float:
    """Return the shortest time of at least three runs within about this many seconds."""
    run()
    best, begin, count = math.inf, time.perf_counter(), 0
    while count < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        run()
        best, count = min(best, time.perf_counter() - start), count + 1
    return best


def _lines(path: str) -> list[str]:
    """Return the lines of a system file, or [] if it does not exist."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _sysctl(name: str) -> str | None:
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
