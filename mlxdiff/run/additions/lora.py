"""LoRA and its kin: changes of a model's weights (``adapters.lora``)."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from mlxdiff.adapters import lora
from mlxdiff.convert import Component
from mlxdiff.errors import HubError
from mlxdiff.run.additions import Addition
from mlxdiff.run.kind import Kind
from mlxdiff.store import cache, hub
from mlxdiff.store.folder import Progress
from mlxdiff.store.reference import parse
from mlxdiff.text import a1111


@dataclass(frozen=True, eq=False)
class LoRA(Addition):
    """A LoRA at a scale.

    Attributes:
        matched: its file, matched to the model.
        in_prompt: the prompt of the run asks for it.
    """

    part: ClassVar[str] = "lora"

    matched: lora.Lora
    in_prompt: bool = False

    @classmethod
    def open(
        cls,
        given: Iterable[lora.Given],
        model: Kind,
        in_prompt: bool = False,
        progress: Progress | None = None,
    ) -> tuple[LoRA, ...]:
        """Open LoRAs for a model.

        Args:
            given: as ``adapters.lora.open_all`` takes them; a path may be a hub id.
            in_prompt: the prompt asks for them.
            progress: called while files are fetched from the hub.
        Raises: UsageError, CheckpointError, HubError.
        """
        if not isinstance(given, (str, bytes, os.PathLike)):  # else open_all says what is wrong
            given = [_fetched(one, progress) for one in given]
        names = [name for name in model.source.components if name != "vae"]
        configs = {name: model.source.config(name) for name in names}
        opened = lora.open_all(given, configs, model.source.family)
        return tuple(cls(one, in_prompt) for one in opened)

    @property
    def changes(self) -> Collection[str]:
        """See ``Addition.changes``."""
        return [name for name, deltas in self.matched.deltas.items() if deltas]

    @classmethod
    def change(cls, items: Sequence[LoRA], name: str, component: Component) -> Component:
        """See ``Addition.change``. The changes are summed, each against the weight as it was."""
        loras = [one.matched for one in items]
        return replace(component, tensors=lambda: lora.changed(loras, name, component.tensors()))

    @classmethod
    def describe(cls, items: Sequence[LoRA], settings: Any) -> dict[str, Any]:
        """See ``Addition.describe``."""
        said = []
        for item in items:
            one = item.matched
            entry: dict[str, Any] = {"name": one.name, "scale": one.scale}
            if one.text_scale != one.scale:
                entry["text_scale"] = one.text_scale
            if item.in_prompt:
                entry["in_prompt"] = True
            if (source := cache.origin(one.file.path)) is not None:
                entry["source"] = source
            entry |= {"sha256": one.file.sha256, "short_hash": one.file.short_hash}
            said.append(entry)
        return {"loras": said}


def _fetched(one: lora.Given, progress: Progress | None) -> lora.Given:
    """Return a LoRA on this disk: a hub id becomes the path of its file. Raises: HubError."""
    path = one[0] if isinstance(one, tuple) and one else one
    if not isinstance(path, str) or Path(path).expanduser().exists() or parse(path) is None:
        return one
    try:
        file = hub.resolve_lora(path, progress=progress)
    except HubError as error:
        raise HubError(f"{path}: no such LoRA file or folder, and from the hub: {error}") from None
    return (file, *one[1:]) if isinstance(one, tuple) else file


def asked_for(
    prompt: str, syntax: str, folder: Path
) -> tuple[tuple[Path, tuple[float, float]], ...]:
    """The LoRAs that a prompt asks for (``<lora:name:0.8>``), which must lie in a folder.

    Raises: UsageError.
    """
    if syntax == "plain":
        return ()
    return tuple(
        (lora.find(one.name, folder), (one.unet, one.text_encoder))
        for one in a1111.networks(prompt)[1]
    )
