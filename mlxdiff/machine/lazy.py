"""Submodules that are imported when they are first named: ``import mlxdiff`` stays fast."""

from __future__ import annotations

TYPE_CHECKING = False  # type checkers take it for true; typing's own takes long to import
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType


def submodules(package: str) -> Callable[[str], ModuleType]:
    """Return a package's ``__getattr__``, which imports a submodule by its name."""

    def find(name: str) -> ModuleType:
        import importlib.util

        full = f"{package}.{name}"
        if name.startswith("__") or importlib.util.find_spec(full) is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(full)

    return find
