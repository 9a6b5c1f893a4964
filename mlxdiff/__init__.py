"""Stable Diffusion on Apple Silicon and other small machines.

    import mlxdiff

    pipe = mlxdiff.load()  # the built-in model; or give a folder or a hub id
    result = pipe.generate("a red circle on a blue background", seed=0)
    result.save("circle.png")

Importing this module is cheap. Heavy modules are loaded on first use.
"""

from __future__ import annotations

from mlxdiff._version import __version__
from mlxdiff.errors import (
    Cancelled,
    CheckpointError,
    ConfigError,
    HubError,
    MlxdiffError,
    UsageError,
)
from mlxdiff.machine.lazy import submodules

TYPE_CHECKING = False  # type checkers take it for true; typing's own takes long to import
if TYPE_CHECKING:
    from typing import Any

    from mlxdiff.loading import load, load_judge, load_upscaler
    from mlxdiff.pipeline import Picture, Pipeline, Result, Run, Step
    from mlxdiff.run.progress import Cancel, Progress

__all__ = [
    "Cancel",
    "Cancelled",
    "CheckpointError",
    "ConfigError",
    "HubError",
    "MlxdiffError",
    "Picture",
    "Pipeline",
    "Progress",
    "Result",
    "Run",
    "Step",
    "UsageError",
    "__version__",
    "load",
    "load_judge",
    "load_upscaler",
]


_submodule = submodules(__name__)


def __getattr__(name: str) -> Any:
    if name in ("load", "load_judge", "load_upscaler"):
        from mlxdiff import loading

        return getattr(loading, name)
    if name in ("Picture", "Pipeline", "Result", "Run", "Step"):
        from mlxdiff import pipeline

        return getattr(pipeline, name)
    if name in ("Cancel", "Progress"):
        from mlxdiff.run import progress

        return getattr(progress, name)
    if name.endswith("Pipeline"):  # as diffusers has them
        raise AttributeError(f"module {__name__!r} has no {name}: mlxdiff.load opens every model")
    return _submodule(name)  # mlxdiff.convert, mlxdiff.pictures, ...


def __dir__() -> list[str]:
    return sorted(__all__)
