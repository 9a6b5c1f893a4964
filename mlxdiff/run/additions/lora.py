"""LoRA and its kin: changes of a model's weights (``adapters.lora``)."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from mlxdiff import samplers
from mlxdiff.adapters import lora
from mlxdiff.convert import Component
from mlxdiff.errors import HubError, UsageError, argument
from mlxdiff.run.additions import Addition, Additions
from mlxdiff.run.kind import Kind
from mlxdiff.store import cache, hub
from mlxdiff.store.few_step import FewStep, find
from mlxdiff.store.folder import Progress
from mlxdiff.store.reference import parse
from mlxdiff.text import a1111

logger = logging.getLogger("mlxdiff")


@dataclass(frozen=True, eq=False)
class LoRA(Addition):
    """A LoRA at a scale.

    Attributes:
        matched: its file, matched to the model.
        in_prompt: the prompt of the run asks for it.
        way: for a LoRA that lets the model draw in few steps: how it is to be used.
    """

    part: ClassVar[str] = "lora"

    matched: lora.Lora
    in_prompt: bool = False
    way: FewStep | None = None

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
        # with the layers that a motion adapter adds
        configs = lora.configs_of(model.source) | {"unet": model.unet_config}
        opened = lora.open_all(given, configs, model.source.family)
        return tuple(cls(one, in_prompt) for one in opened)

    @classmethod
    def matched_again(cls, loras: Iterable[LoRA], model: Kind) -> tuple[LoRA, ...]:
        """Match LoRAs to a model that has other layers now. Raises: CheckpointError."""
        found = []
        for one in loras:
            scales = one.matched.scale, one.matched.text_scale
            (again,) = cls.open([(one.matched.file.path, scales)], model, one.in_prompt)
            found.append(replace(again, way=one.way))
        return tuple(found)

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
            if item.way is not None:
                entry["fast"] = item.way.id
            entry |= {"sha256": one.file.sha256, "short_hash": one.file.short_hash}
            said.append(entry)
        return {"loras": said, "fast": any(item.way for item in items) or None}


def few_step_of(additions: Additions) -> FewStep | None:
    """Return how the model draws in few steps; None: it has no LoRA for that."""
    return next((one.way for one in additions.of(LoRA) if one.way is not None), None)


def _draws_otherwise(model: Kind) -> bool:
    """Return True for a model that few-step LoRAs of its family are not made for."""
    return model.edits or model.upscales or model.is_led or model.takes_aesthetic_score


def few_step_for(model: Kind) -> FewStep | None:
    """Return the few-step LoRA that ``fast`` takes for a model; None: nothing fits it."""
    way = find(model.source.family, str(model.source.provenance.get("source")))
    if way is None or _draws_otherwise(model):
        return None
    predicts = model.source.scheduler_config.get("prediction_type", "epsilon")
    return way if way.only or predicts == "epsilon" else None


def open_few_step(model: Kind, progress: Progress | None = None) -> tuple[LoRA, ...]:
    """Open the few-step LoRA of a model; () for one that needs none, with a note.

    Raises: UsageError where there is none, or it is not here and cannot be fetched.
    """
    family, scheduler = model.source.family, model.source.scheduler_config
    if samplers.distilled_for(scheduler) is not None or model.default_guidance == 0.0:
        logger.warning("fast has no effect: this model draws in few steps by itself")
        return ()
    way = few_step_for(model)
    if way is None:
        predicts = scheduler.get("prediction_type", "epsilon")
        kind = f"{family} models that predict {predicts}"
        if _draws_otherwise(model):
            kind = model.description
        raise UsageError(
            f"{argument('fast')}: no few-step LoRA is published for this model ({kind}); take one "
            f"that was made for few steps, such as {argument('model', 'sd-turbo')}"
        )
    try:
        (opened,) = LoRA.open([way.place], model, progress=progress)
    except HubError as error:
        raise UsageError(
            f"fast needs {way}, which is not on this machine and cannot be fetched ({error}); "
            f"fetch it with: hf download {way.repo} {way.file}"
        ) from None
    logger.info(
        "fast: %s; %s, %d steps, guidance %g, unless you say otherwise",
        way,
        way.sampler,
        way.steps,
        way.guidance,
    )
    return (replace(opened, way=way),)


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
