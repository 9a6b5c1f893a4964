"""LoRA and its kin: changes of a model's weights (``adapters.lora``)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from mlxdiff.adapters import lora
from mlxdiff.convert import Component
from mlxdiff.run.additions import Addition
from mlxdiff.run.kind import Kind
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
        cls, given: Iterable[lora.Given], model: Kind, in_prompt: bool = False
    ) -> tuple[LoRA, ...]:
        """Open LoRAs for a model. Raises: UsageError, CheckpointError."""
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
            entry |= {"sha256": one.file.sha256, "short_hash": one.file.short_hash}
            said.append(entry)
        return {"loras": said}


def asked_for(prompt: str, syntax: str, folder: Path) -> tuple[lora.Given, ...]:
    """The LoRAs that a prompt asks for (``<lora:name:0.8>``), which must lie in a folder.

    Raises: UsageError.
    """
    if syntax == "plain":
        return ()
    return tuple(
        (lora.find(one.name, folder), (one.unet, one.text_encoder))
        for one in a1111.networks(prompt)[1]
    )
