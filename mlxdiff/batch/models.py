"""Models that stay loaded: as many as fit into memory together; the least recently used leave."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlxdiff.loading import ADDITIONS, add, load
from mlxdiff.run.memory import PROCESS
from mlxdiff.run.options import LoadOptions
from mlxdiff.run.table import entries, make

_DEFAULTS = {name: entry.default for name, entry in entries(LoadOptions).items()}


@dataclass
class _Warm:
    """A pipeline that is loaded.

    Attributes:
        pipe: the pipeline.
        name: of its model.
        additions: that are set, by the name of the option.
        settings: of its last run; None: it has not drawn yet.
        used: when it was last asked for, by the monotonic clock.
    """

    pipe: Any
    name: str
    additions: dict[str, Any] = field(default_factory=dict)
    settings: Any = None
    used: float = field(default_factory=time.monotonic)

    @property
    def held(self) -> int:
        """Bytes of the weights that it keeps between runs, by the estimate."""
        if self.settings is None:
            return 0
        estimate = self.pipe.memory(self.settings)
        return 0 if estimate.low_memory else sum(estimate.weights.values())


class Models:
    """Opens models when they are first asked for, and keeps them. For one thread.

    Args:
        loading: options of ``mlxdiff.load`` for every model.
        keep_alive: seconds after which a model that nobody asks for leaves memory; None: never.
    """

    def __init__(
        self, loading: Mapping[str, Any] | None = None, keep_alive: float | None = None
    ) -> None:
        self.loading = dict(loading or {})
        self.keep_alive = keep_alive
        self._warm: dict[str, _Warm] = {}  # the most recently used last

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models that are loaded, the most recently used last."""
        return tuple(one.name for one in list(self._warm.values()))

    def get(
        self,
        options: Mapping[str, Any],
        *,
        name: str = "",
        progress: Callable[[int, int, str], None] | None = None,
        on_load: Callable[[], None] = lambda: None,
    ) -> Any:
        """Return the pipeline of some options of loading, with these additions and no others.

        Args:
            options: of ``mlxdiff.load``.
            name: of the model, for ``names``.
            progress: called while files are fetched.
            on_load: called before something is loaded.
        Raises: UsageError, CheckpointError, ConfigError, HubError.
        """
        asked = {**self.loading, **options}
        own = {key: value for key, value in asked.items() if key not in ADDITIONS}
        key = repr(sorted((one, str(value)) for one, value in own.items()))
        warm = self._warm.pop(key, None)
        if warm is None:
            on_load()
            warm = _Warm(load(**own, progress=progress), name)
        self._warm[key] = warm  # now the last
        warm.used = time.monotonic()
        wanted = {one: asked.get(one, _DEFAULTS[one]) or _DEFAULTS[one] for one in ADDITIONS}
        changed = [
            one for one in ADDITIONS if wanted[one] != warm.additions.get(one, _DEFAULTS[one])
        ]
        if changed:
            on_load()
            every = make(LoadOptions, {**own, **wanted, "progress": progress})
            for one in changed:
                add(warm.pipe, every, [one])
                warm.additions[one] = wanted[one]
        return warm.pipe

    def make_room(self, pipe: Any, settings: Any) -> None:
        """Let the least recently used models leave memory until a run fits beside the others.

        Args:
            pipe, settings: of the run. What does not fit even alone was refused with its settings.
        """
        held: dict[str, int] = {}  # by the others
        for key, one in self._warm.items():
            if one.pipe is pipe:
                one.settings = settings
            else:
                held[key] = one.held
        size = pipe.backend.memory_size()
        most = size if pipe.memory_limit is None else int(pipe.memory_limit * 1e9)
        if not held or most is None:
            return
        needed = pipe.memory(settings).peak + PROCESS
        for key in list(held):
            if needed + sum(held.values()) <= most:
                return
            del held[key]
            self.unload(key)

    def unload_idle(self) -> None:
        """Let models leave memory that nobody has asked for during ``keep_alive``."""
        if self.keep_alive is None:
            return
        end = time.monotonic() - self.keep_alive
        for key in [key for key, one in self._warm.items() if one.used <= end]:
            self.unload(key)

    @property
    def seconds_to_idle(self) -> float | None:
        """Seconds until a model will have been idle for ``keep_alive``; None: there is none."""
        if self.keep_alive is None or not self._warm:
            return None
        first = min(one.used for one in self._warm.values())
        return max(0.0, first + self.keep_alive - time.monotonic())

    def unload(self, key: str) -> None:
        """Let a model leave memory."""
        backend = self._warm.pop(key).pipe.backend
        gc.collect()
        backend.clear_cache()

    def unload_all(self) -> None:
        """Let all models leave memory."""
        for key in list(self._warm):
            self.unload(key)
