"""T2I-Adapters: small networks that see a picture once, and add to the U-Net's way down.

As in diffusers' adapter pipelines, the feature maps are the same in every evaluation and for every
prediction of it. adapter_conditioning_scale is the scale of a control, adapter_conditioning_factor
its end.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mlxdiff.convert import open_t2i_adapter
from mlxdiff.run.additions import Acting, Added, Fetch, Prompted
from mlxdiff.run.additions.control import Control, Controlled, check_multiple
from mlxdiff.run.kind import Kind
from mlxdiff.run.memory import SIZES, UNetRun, Work, activation_bytes


@dataclass(frozen=True, eq=False)
class T2IAdapter(Controlled):
    """A network that makes feature maps of a picture, which are added to the U-Net's way down."""

    part: ClassVar[str] = "t2i_adapter"
    network: ClassVar[str] = "t2i_adapter"
    noun: ClassVar[str] = "T2I-Adapter"

    @classmethod
    def open(
        cls, paths: Iterable[str | os.PathLike[str]], model: Kind, fetch: Fetch
    ) -> tuple[T2IAdapter, ...]:
        """Open T2I-Adapters for a model.

        Args:
            paths: as ``convert.open_t2i_adapter`` takes them.
        Raises: UsageError, CheckpointError, ConfigError, HubError.
        """
        return tuple(
            cls(
                open_t2i_adapter(
                    path,
                    model.unet_config,
                    model.vae_config.factor,
                    fetch.variant,
                    fetch.progress,
                )
            )
            for path in paths
        )

    def check_size(self, width: int, height: int) -> None:
        """See ``Controlled.check_size``."""
        check_multiple(self.component.config.downscale_factor, width, height, self.noun)

    def work(self, run: UNetRun) -> Work:
        """The network runs once, before the U-Net; its feature maps stay."""
        height, width = run.size
        config = self.component.config
        maps = _map_values(config, height, width)
        return Work(
            before=activation_bytes(config, run.device, height, width),
            beside=SIZES[run.device.dtype] * maps,
        )

    @classmethod
    def act(cls, items: Sequence[T2IAdapter], prompted: Prompted) -> Sequence[Acting]:
        """See ``Addition.act``."""
        return [T2IAdapters(items, prompted)]


class T2IAdapters:
    """The T2I-Adapters of a model, in the evaluations of a prompt.

    Args:
        items: the adapters.
        prompted: the prompt.
    """

    def __init__(self, items: Sequence[T2IAdapter], prompted: Prompted) -> None:
        self.controls: list[Control] = [prompted.controls[item] for item in items]
        self.maps: list[list[Any]] = []
        backend = prompted.backend
        for i, (item, control) in enumerate(zip(items, self.controls, strict=True)):
            if control.scale == 0:
                self.maps.append([])
                continue
            grey = item.component.config.in_channels == 1
            pixels = control.grey if grey else control.pixels
            made = prompted.take(T2IAdapter.network, i)(backend.asarray(pixels))
            self.maps.append([one * control.scale for one in made])
        # What is lazy belongs to the thread that made it, and each step may run in another.
        backend.evaluate(*(one for maps in self.maps for one in maps))

    def counting(self, index: int, total: int) -> list[int]:
        """See ``Acting.counting``."""
        return [i for i, control in enumerate(self.controls) if control.counts(index, total)]

    def __call__(
        self, x: Any, t: float, index: int, total: int, guided: bool, shallow: bool
    ) -> Added | None:
        """See ``Acting``. Nothing is added to the layer that a shallow evaluation runs."""
        added = [Added(features=self.maps[i]) for i in self.counting(index, total)]
        return None if shallow or not added else sum(added, Added())


def _map_values(config: Any, height: int, width: int) -> int:
    """Number of values in all feature maps of a picture of this size."""
    rows, columns = height // config.downscale_factor, width // config.downscale_factor
    total = 0
    for channels, halves in zip(config.feature_channels, config.halves, strict=True):
        if halves:
            rows, columns = -(-rows // 2), -(-columns // 2)
        total += rows * columns * channels
    return total
