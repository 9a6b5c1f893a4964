"""Networks of a model that are loaded, kept between runs."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlxdiff.convert import Component
from mlxdiff.run.additions import Additions
from mlxdiff.run.kind import Network, stage_of
from mlxdiff.weights.tensors import LazyTensor

logger = logging.getLogger("mlxdiff")

_LONG_TO_LOAD = 200_000_000  # bytes that take about a second from a disk


@dataclass(frozen=True)
class _Kept:
    """Something that is kept, and the additions that decided what it is."""

    value: Any
    makers: tuple[Any, ...]


class NetworkCache:
    """Loads networks when they are first needed, and keeps them.

    A network is loaded anew for a run whose additions make another of it.

    Attributes:
        backend: what they compute on.
        load_seconds: time spent on reading weights so far.
        on_load: called with the name of a network before it is read, and with "" when it is there;
            None: nobody is told. Set during a turn of a run, and only for that turn.
        low_memory: keep the networks of one stage at a time, of text encoders one, and their
            weights as they are stored.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.load_seconds = 0.0
        self.on_load: Callable[[str], object] | None = None
        self.low_memory = False
        self._loaded: dict[Network, _Kept] = {}
        self._derived: dict[str, _Kept] = {}
        self._wide: dict[Network, Any] = {}  # networks that need float32, and their makers

    @property
    def loaded(self) -> set[Network]:
        """The networks that are in memory."""
        return set(self._loaded)

    def load(self, network: Network, component: Component, additions: Additions) -> Any:
        """Return a network on the backend.

        Args:
            component: its config and tensors, with the additions in them.
            additions: of the run.
        """
        if self.low_memory:
            self._release_stages_before(network)
        makers = additions.makers(network)
        kept = self._loaded.get(network)
        if kept is None or kept.makers != makers:
            self._loaded.pop(network, None)
            del kept  # the old network leaves memory before the new one comes
            start = time.perf_counter()
            config = component.config
            tensors = component.tensors()
            self._announce(network, tensors)
            tell = self.on_load
            if tell is not None:
                tell(network.name)
            dtype = self._dtype(network, config, makers)
            stored = True if self.low_memory else None
            loaded = self.backend.load(config, tensors, dtype, stored)
            self.keep(network, loaded, additions)
            self.load_seconds += time.perf_counter() - start
            if tell is not None:
                tell("")
            return loaded
        return kept.value

    def _announce(self, network: Network, tensors: Mapping[str, LazyTensor]) -> None:
        """Say why nothing seems to happen: weights are read; a GPU then compiles its kernels."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        gpu = self.backend.has_gpu()
        if gpu or size >= _LONG_TO_LOAD:
            then = "; its first use compiles kernels for the GPU" if gpu else ""
            logger.info("loading %s, %.1f GB%s", network.name, size / 1e9, then)

    def widen(self, network: Network, additions: Additions) -> bool:
        """Compute a network in float32 from now on; return whether it was otherwise before."""
        makers = additions.makers(network)
        before = self._wide.get(network)
        self._wide[network] = makers
        kept = self._loaded.get(network)
        if before == makers or kept is None or kept.value.dtype == kept.value.nn.float32:
            return False
        self.release(network)
        return True

    def _dtype(self, network: Network, config: Any, makers: Any) -> str | None:
        """The type that a network is computed in; None: the backend's.

        A VAE is computed in float32 if its config asks for it. If the config says nothing, float16
        is tried first (``widen``); bfloat16 is too coarse for pixels, and for those of an upscaler.
        """
        if stage_of(network) == "upscaler":
            coarse = self.backend.dtype == "bfloat16" or self._wide.get(network) == makers
            return "float32" if coarse else None
        if network.name != "vae":
            return None
        asks = config.force_upcast
        if asks is None:
            asks = self.backend.dtype != "float16" or self._wide.get(network) == makers
        return "float32" if asks else None

    def keep(self, network: Network, loaded: Any, additions: Additions) -> None:
        """Keep a network that is loaded, for runs with these additions."""
        self._loaded[network] = _Kept(loaded, additions.makers(network))

    def release(self, network: Network) -> None:
        """Let a network leave memory."""
        self._loaded.pop(network, None)

    def release_all(self) -> None:
        """Let all networks leave memory."""
        self._loaded.clear()
        self.backend.clear_cache()

    def release_others(self, additions: Additions) -> None:
        """Let the networks leave memory that are others with these additions."""
        added = additions.networks
        for network, kept in list(self._loaded.items()):
            own = network.position is None or network in added
            if not own or kept.makers != additions.makers(network):
                del self._loaded[network]

    def derived(
        self, name: str, network: Network, additions: Additions, make: Callable[[], Any]
    ) -> Any:
        """Return what was made of a network, made anew if the network is another one.

        Args:
            name: of what is made.
            network: of which it is made.
        """
        makers = additions.makers(network)
        kept = self._derived.get(name)
        if kept is None or kept.makers != makers:
            kept = self._derived[name] = _Kept(make(), makers)
        return kept.value

    def _release_stages_before(self, network: Network) -> None:
        """Let all networks leave memory that are not needed at the same time as this one."""
        alone = stage_of(network) != "unet"
        for other in list(self._loaded):
            if other != network and (alone or stage_of(other) != "unet"):
                del self._loaded[other]
        gc.collect()  # a traceback that is kept may hold a U-Net in a circle of references
        self.backend.clear_cache()
