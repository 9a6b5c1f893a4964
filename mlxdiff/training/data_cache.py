"""Arrays that training needs again and again, kept on the disk: latents and states of the text.

An entry is named after everything that it depends on: the content of the picture (or the words),
how it was cut, and the weights that encoded it. So it can never be an old one. Each is one
safetensors file, written under another name and then renamed: a killed process leaves no half.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlxdiff.errors import CheckpointError, UsageError
from mlxdiff.machine.temporary import FILES, remove_leftovers, temporary_file
from mlxdiff.store.folder import ModelSource
from mlxdiff.weights.tensors import LazyTensor, open_weights, write_safetensors

_FORM = 1  # changes whenever the same key would give other arrays

Arrays = dict[str, np.ndarray]


class ArrayCache:
    """A folder of arrays by key.

    Args:
        folder: made when the first entry is written.
    Attributes:
        folder: the folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        remove_leftovers(self.folder, f"*/{FILES}")

    def get(self, key: Mapping[str, Any], make: Callable[[], Arrays]) -> Arrays:
        """Return an entry; make and keep it if there is none, or if its file is damaged.

        Args:
            key: what the arrays depend on, in JSON's types.
            make: computes them.
        Returns: name -> float32 array.
        Raises: UsageError if the entry cannot be written; the errors of ``make``.
        """
        found = self.find(key)
        if found is None:
            found = {name: np.asarray(values, np.float32) for name, values in make().items()}
            self.put(key, found)
        return found

    def find(self, key: Mapping[str, Any]) -> Arrays | None:
        """Return an entry, or None if there is none that can be read."""
        try:
            return {
                name: np.asarray(tensor.read(), np.float32)
                for name, tensor in open_weights(self._place(key)).items()
            }
        except (CheckpointError, OSError):
            return None

    def put(self, key: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Write an entry. Raises: UsageError, for a full disk for example."""
        place = self._place(key)
        tensors = {
            name: LazyTensor(values.shape, "F32", lambda values=values: values)  # type: ignore[misc]
            for name, values in arrays.items()
        }
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with temporary_file(place.parent) as (temporary, _):
                write_safetensors(temporary, tensors, "float32")
                os.replace(temporary, place)
        except OSError as error:
            raise UsageError(
                f"{self.folder}: cannot be written ({error.strerror or error}); make room, or keep "
                "the encoded pictures elsewhere (--cache FOLDER)"
            ) from error

    def __contains__(self, key: Mapping[str, Any]) -> bool:
        return self._place(key).is_file()

    def _place(self, key: Mapping[str, Any]) -> Path:
        text = json.dumps({"form": _FORM, **key}, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"


def digest_of(source: ModelSource, component: str) -> str:
    """Return a hash of a component's weights, whatever files they lie in, in hex."""
    digest = hashlib.sha256()
    for name, tensor in sorted(source.tensors(component).items()):
        values = np.ascontiguousarray(tensor.read())
        digest.update(f"{name} {tensor.dtype} {values.shape} ".encode())
        digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
