"""Write what was trained as folders that mlxdiff and diffusers open."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlxdiff.convert.export import in_pytorch, write_diffusers
from mlxdiff.networks.params import check_parameters
from mlxdiff.store.folder import TRAINED, ModelSource, json_bytes, new_folder
from mlxdiff.weights.tensors import LazyTensor, write_safetensors

CARD = "README.md"


class TrainedModel:
    """A model with other weights for one of its components: a ``ModelSource``.

    Args:
        source: the model that was trained, or the one that training began with.
        component: the component that was trained.
        weights: all of its parameters, in our names and layout.
        facts: how it was trained, in JSON's types; ``training.json`` holds them.
        config: of the component, where training gave it another one.
    Raises: CheckpointError if the weights do not fit the component's config.
    """

    def __init__(
        self,
        source: ModelSource,
        component: str,
        weights: Mapping[str, np.ndarray],
        facts: Mapping[str, Any],
        config: Any = None,
    ) -> None:
        own = source.config(component) if config is None else config
        shapes = {name: values.shape for name, values in weights.items()}
        check_parameters(shapes, own, f"trained {component}")
        self._source, self._component, self._config = source, component, own
        self._weights, self._facts = lazy(weights), dict(facts)
        self.path, self.family, self.components = source.path, source.family, source.components
        self.model_index = source.model_index
        self.scheduler_config = source.scheduler_config
        self.image_noise_config = source.image_noise_config
        self.provenance = source.provenance

    def config(self, component: str) -> Any:
        """Return the config of a component."""
        return self._config if component == self._component else self._source.config(component)

    def tensors(self, component: str) -> dict[str, LazyTensor]:
        """Return all tensors of a component, the trained ones among them."""
        if component == self._component:
            return dict(self._weights)
        return self._source.tensors(component)

    def tokenizer(self, name: str = "tokenizer") -> Any:
        """Return a tokenizer."""
        return self._source.tokenizer(name)

    def documents(self) -> dict[str, bytes]:
        """Return all files except the weights."""
        return {**self._source.documents(), TRAINED: json_bytes(self._facts)}


def lazy(weights: Mapping[str, np.ndarray]) -> dict[str, LazyTensor]:
    """Return arrays as tensors that the writers take."""
    return {
        name: LazyTensor(values.shape, "F32", lambda values=values: values)  # type: ignore[misc]
        for name, values in weights.items()
    }


def write_model(model: ModelSource, dest: Path, dtype: str, card: str) -> None:
    """Write a whole model as a diffusers folder. A folder that training wrote there is replaced.

    Raises: UsageError, CheckpointError; nothing half-written stays.
    """
    write_diffusers(model, dest, dtype, card=card, force=True)


def write_network(
    weights: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
    dest: Path,
    dtype: str,
    card: str,
) -> None:
    """Write one network as a folder in diffusers' form: ``config.json`` and its weights.

    Args:
        weights: in our names and layout.
        config: content of config.json.
        facts, card: as for a model.
    Raises: UsageError; nothing half-written stays.
    """
    tensors = {name: in_pytorch(tensor) for name, tensor in lazy(weights).items()}
    size = sum(values.nbytes for values in weights.values())
    with new_folder(dest, size, force=True) as folder:
        file = folder / "diffusion_pytorch_model.safetensors"
        write_safetensors(file, tensors, dtype, metadata={"format": "pt"})
        (folder / "config.json").write_bytes(json_bytes(dict(config)))
        (folder / TRAINED).write_bytes(json_bytes(dict(facts)))
        (folder / CARD).write_text(card, encoding="utf-8")


def model_card(title: str, lines: list[str], facts: Mapping[str, Any]) -> str:
    """Return the text of README.md beside the weights."""
    rows = [f"| {name} | {value} |" for name, value in facts.items() if not _is_table(value)]
    return "\n".join([f"# {title}", "", *lines, "", "| | |", "|---|---|", *rows, ""])


def _is_table(value: Any) -> bool:
    return isinstance(value, (dict, list))
