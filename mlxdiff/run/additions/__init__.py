"""Additions to a model: what they have in common. Each kind has a file of its own in this folder.

An addition is opened and matched to a model (``open``, a class method of each kind), and then never
changes. ``Additions`` holds all additions of a model, and never changes either: to add or remove
something is to make another ``Additions``. So a run keeps the additions that it began with.

To add a kind: a file here with a subclass of ``Addition``, an entry in ``run.kind`` (which models
lack a part for it), a ``set_`` method of ``Pipeline``, and an argument of ``mlxdiff.load``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

from mlxdiff.convert import Component
from mlxdiff.networks.condition import Change, Condition
from mlxdiff.run.kind import Network
from mlxdiff.run.memory import Device, UNetRun, Work
from mlxdiff.store.folder import Progress

Path = str | os.PathLike[str]


class Fetch(NamedTuple):
    """Options for finding the files of an addition.

    Attributes:
        variant: weights variant, such as "fp16"; None: whichever is there.
        progress: called while files are fetched from the hub.
    """

    variant: str | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class Prompted:
    """A U-Net and one prompt, before the first evaluation.

    Attributes:
        settings: ``run.settings.Settings`` of the run.
        backend: what it computes on.
        component, take: load a network, as ``Model.component`` and ``Model.take`` do.
        unet: the U-Net.
        states: (B, T, D), the text; the prompt is the last row.
        text: the same, read by the U-Net. Additions may put more beside it.
        conditions: the U-Net's other inputs, (B, ...) each.
        batch: B.
        controls: the picture of each addition that follows one (``additions.control.Control``).
    """

    settings: Any
    backend: Any
    component: Callable[..., Any]
    take: Callable[..., Any]
    unet: Any
    states: Any
    text: Condition
    conditions: Mapping[str, Any]
    batch: int
    controls: Mapping[Any, Any]


@dataclass(frozen=True)
class Added:
    """What is added inside the U-Net in one evaluation.

    Attributes:
        residuals: to the outputs of its way down, the mid block last; of a shallow evaluation, to
            the first of them. None: nothing.
        features: to each block of its way down, and to the mid block. None: nothing.
        changes: module, name of its layer, change of the input of this layer.
    """

    residuals: list[Any] | None = None
    features: list[Any] | None = None
    changes: tuple[tuple[object, str, Change], ...] = ()

    def __add__(self, other: Added) -> Added:
        return Added(
            _sum(self.residuals, other.residuals),
            _sum(self.features, other.features),
            self.changes + other.changes,
        )


def _sum(one: list[Any] | None, other: list[Any] | None) -> list[Any] | None:
    if one is None or other is None:
        return other if one is None else one
    return [a + b for a, b in zip(one, other, strict=True)]


class Acting(Protocol):
    """Additions of one kind that take part in the evaluations of a prompt."""

    def counting(self, index: int, total: int) -> list[int]:
        """Positions of those that take part in an evaluation."""

    def __call__(
        self, x: Any, t: float, index: int, total: int, guided: bool, shallow: bool
    ) -> Added | None:
        """Return what they add; None: nothing.

        Args:
            x: latents (1, h, w, C), as the U-Net takes them; (F, h, w, C) of a video.
            t, index, total: the evaluation.
            guided: there is a prediction for the negative prompt, too.
            shallow: only the first part of the U-Net runs; return what is added to it, alone.
        """


@dataclass(frozen=True, eq=False)
class Addition:
    """Something that is added to a model, opened and matched to it. Compared by identity.

    Attributes:
        part: what a model must have a part for, as ``run.kind.Kind.lacks`` names it.
        adds_layers: it gives a network more layers, which other kinds can change: it comes first.
    """

    part: ClassVar[str]
    adds_layers: ClassVar[bool] = False

    @property
    def networks(self) -> Mapping[str, Component]:
        """Networks of its own, by name."""
        return {}

    @property
    def changes(self) -> Collection[str]:
        """Names of the model's own networks that it changes."""
        return ()

    def work(self, run: UNetRun) -> Work:
        """Memory that it takes in a run, beside the weights of its networks."""
        return Work()

    def stages(self, device: Device, height: int, width: int, low_memory: bool) -> dict[str, int]:
        """Memory of stages of its own after a picture is drawn: name -> bytes beside weights.

        Args:
            device: what computes.
            height, width: of the picture that is drawn.
            low_memory: save memory rather than time.
        """
        return {}

    @classmethod
    def change(cls, items: Sequence[Any], name: str, component: Component) -> Component:
        """Return a network of the model with these additions in it: config, tensors, or both.

        Args:
            items: the additions of this kind that change the network, in order.
            name: of the network.
        """
        return component

    @classmethod
    def describe(cls, items: Sequence[Any], settings: Any) -> dict[str, Any]:
        """Return metadata of a picture: option names -> JSON values.

        Args:
            items: the additions of this kind.
            settings: ``run.settings.Settings`` of the run.
        """
        return {}

    @classmethod
    def act(cls, items: Sequence[Any], prompted: Prompted) -> Sequence[Acting]:
        """Get ready for a prompt. Return what takes part in each evaluation."""
        return ()


AdditionT = TypeVar("AdditionT", bound=Addition)


@dataclass(frozen=True, eq=False)
class Additions:
    """All additions of a model, in order.

    Attributes:
        items: the additions.
    """

    items: tuple[Addition, ...] = ()

    def of(self, kind: type[AdditionT]) -> tuple[AdditionT, ...]:
        """Return the additions of one kind; the index is the position."""
        return tuple(one for one in self.items if isinstance(one, kind))

    def replaced(self, kind: type[AdditionT], items: Iterable[AdditionT]) -> Additions:
        """Return the same with these of a kind in place of all others of it."""
        others = (one for one in self.items if not isinstance(one, kind))
        return Additions((*others, *items))

    def makers(self, network: Network) -> tuple[Addition, ...]:
        """The additions that decide what a network is: a network must be loaded anew if they
        change."""
        if network.position is None:
            return tuple(one for one in self.items if network.name in one.changes)
        owner, _ = self.networks[network]
        return (owner,)

    def change(self, name: str, component: Component) -> Component:
        """Return one of the model's own networks as it is with all additions."""
        for kind, items in sorted(self._by_kind(), key=lambda pair: not pair[0].adds_layers):
            if changing := [one for one in items if name in one.changes]:
                component = kind.change(changing, name, component)
        return component

    @property
    def networks(self) -> dict[Network, tuple[Addition, Component]]:
        """The networks that were added, and to which addition each belongs.

        A network that several additions share counts once.
        """
        found: dict[Network, tuple[Addition, Component]] = {}
        for one in self.items:
            for name, component in one.networks.items():
                same = [c for network, (_, c) in found.items() if network.name == name]
                if not any(component is other for other in same):
                    found[Network(name, len(same))] = one, component
        return found

    def work(self, run: UNetRun) -> Work:
        """Memory that they take in a run, beside the weights of their networks."""
        works = [one.work(run) for one in self.items]
        return Work(
            before=max((work.before for work in works), default=0),
            beside=sum(work.beside for work in works),
        )

    def describe(self, settings: Any) -> dict[str, Any]:
        """Return metadata of a picture: option names -> JSON values; see ``Addition.describe``."""
        said: dict[str, Any] = {}
        for kind, items in self._by_kind():
            said |= kind.describe(items, settings)
        return said

    def act(self, prompted: Prompted) -> list[Acting]:
        """Get ready for a prompt; see ``Addition.act``."""
        return [one for kind, items in self._by_kind() for one in kind.act(items, prompted)]

    def _by_kind(self) -> list[tuple[type[Addition], list[Addition]]]:
        kinds = dict.fromkeys(type(one) for one in self.items)
        return [(kind, [one for one in self.items if type(one) is kind]) for kind in kinds]


def named(provenance: Mapping[str, Any]) -> str:
    """``source@revision``, as hub ids are given."""
    revision = provenance.get("revision")
    return f"{provenance['source']}@{revision}" if revision else str(provenance["source"])
