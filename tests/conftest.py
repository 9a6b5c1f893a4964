"""What all tests share: the backends, what is skipped where, and no network."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from golden_runs import Opened
from hypothesis import settings

# Where a change is gated, the same examples every time, however slow the machine is just then; on
# a developer's machine, new ones.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")

if (
    importlib.util.find_spec("mlxdiff") is None
    or importlib.util.find_spec("mlxdiff.convert") is None
):
    raise pytest.UsageError("mlxdiff is not installed: run `pip install -e .` (or `make test`)")

# What each marker needs; where it is missing, its tests are skipped.
NEEDS = {"mlx": ("mlx.core",), "parity": ("torch", "diffusers", "transformers")}

# The files of `make quick` (pytest --quick): unit tests, with no network but a layer or a formula.
# Together they take less than a minute on two cores. A file that takes more than five seconds of
# processor time does not belong here.
QUICK = frozenset(
    """
    architecture config convert_keymap convert_pickles cost guidance image metadata noise packaging
    params samplers samplers_goldens samplers_orders samplers_published samplers_registry
    tensors tools
    """.split()
)

_empty_home = pytest.StashKey[tempfile.TemporaryDirectory[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Keep the tests away from the network and from the user's models."""
    home = tempfile.TemporaryDirectory(prefix="mlxdiff-tests-")
    config.stash[_empty_home] = home
    os.environ["HF_HOME"] = home.name
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        os.environ.pop(name, None)
    # A shell starts a background job with interrupts ignored; what the tests start inherits that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # New GPUs multiply float32 as TF32 by default; the goldens are float32's. MLX reads this later.
    os.environ.setdefault("MLX_ENABLE_TF32", "0")
    # NumPy on Accelerate, before 2.3.5 (Python 3.10 gets no newer one than 2.2), reports false
    # floating-point errors of matrix products.
    if sys.platform == "darwin":
        ignored = "ignore:.* encountered in matmul:RuntimeWarning"
        config.addinivalue_line("filterwarnings", ignored)
    # The gate of the macOS job: MLX on its CPU device. (Commands that tests start as processes of
    # their own say --backend numpy, or mean whatever is there.)
    if os.environ.get("MLXDIFF_TEST_DEVICE") == "cpu" and importlib.util.find_spec("mlx"):
        import mlx.core as mx

        mx.set_default_device(mx.cpu)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove what pytest_configure made."""
    if _empty_home in config.stash:
        config.stash[_empty_home].cleanup()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --quick."""
    parser.addoption("--quick", action="store_true", help="run only the unit tests, conftest.QUICK")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the files that are not quick, if only those are asked for."""
    name = collection_path.name
    if not config.getoption("--quick") or not name.startswith("test_"):
        return None
    return True if collection_path.stem.removeprefix("test_") not in QUICK else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose marker names something that is not installed."""
    for marker, modules in NEEDS.items():
        if item.get_closest_marker(marker) is not None:
            for module in modules:
                pytest.importorskip(module, exc_type=ImportError)


@pytest.fixture(params=["numpy", pytest.param("mlx", marks=pytest.mark.mlx)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of each backend in turn."""
    yield str(request.param)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Tiny models, each opened once for the tests of a file."""
    return Opened(tmp_path_factory.mktemp("additions"))
