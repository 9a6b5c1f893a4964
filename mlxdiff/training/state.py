"""The state of a run: what it needs to go on as if it had never stopped.

One safetensors file, replaced as a whole: a process that is killed, or a full disk, leaves the file
that was there before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxdiff.errors import CheckpointError, UsageError, argument
from mlxdiff.machine import stopping
from mlxdiff.machine.disk import require_space
from mlxdiff.machine.temporary import FILES, remove_leftovers, temporary_file
from mlxdiff.weights.tensors import LazyTensor, TensorFile, write_safetensors

FILE = "state.safetensors"
_FORM = "mlxdiff training state 1"
_PARTS = ("parameters", "optimizer", "average")


@dataclass
class State:
    """A run at the end of a step.

    Attributes:
        step: steps done.
        parameters: what is trained, float32.
        optimizer: the optimizer's arrays.
        average: moving averages of the parameters; empty without.
        numbers: other numbers that decide what follows.
    """

    step: int
    parameters: dict[str, mx.array]
    optimizer: dict[str, mx.array]
    average: dict[str, mx.array] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)

    def nbytes(self) -> int:
        """Return the size of the arrays."""
        return sum(array.nbytes for part in _PARTS for array in getattr(self, part).values())


def write(state: State, folder: Path, identity: Mapping[str, Any]) -> Path:
    """Write the state of a run into its folder.

    Args:
        identity: what must be the same when the run goes on.
    Raises: UsageError, OSError; the file that was there before is still whole then.
    """
    path = folder / FILE
    arrays = {
        f"{part}:{name}": np.array(array, np.float32)
        for part in _PARTS
        for name, array in getattr(state, part).items()
    }
    size = sum(values.nbytes for values in arrays.values())
    require_space(
        {folder: size},
        "the state of the run",
        f"free some room, and go on with {argument('resume')}",
    )
    told = {
        "format": _FORM,
        "step": str(state.step),
        "numbers": json.dumps(state.numbers),
        "identity": json.dumps(identity, sort_keys=True),
    }
    tensors = {
        name: LazyTensor(values.shape, "F32", lambda values=values: values)  # type: ignore[misc]
        for name, values in arrays.items()
    }
    with stopping.uninterrupted(), temporary_file(folder) as (temporary, file):
        write_safetensors(temporary, tensors, "float32", metadata=told)
        os.fsync(file.fileno())
        os.replace(temporary, path)
    return path


def read(folder: Path, identity: Mapping[str, Any]) -> State | None:
    """Return the state of the run in a folder; None: there is none.

    Raises: UsageError if it is another run's; CheckpointError if the file is damaged.
    """
    path = folder / FILE
    remove_leftovers(folder, FILES)
    if not path.exists():
        return None
    file = TensorFile(path)
    told = file.metadata
    try:
        if told["format"] != _FORM:
            raise KeyError("format")
        step, numbers = int(told["step"]), json.loads(told["numbers"])
        before = json.loads(told["identity"])
    except (KeyError, ValueError):
        raise CheckpointError(
            f"{path}: is not the state of a training run of this version; train into another folder"
        ) from None
    if changed := _differences(before, json.loads(json.dumps(identity))):
        raise UsageError(
            f"{folder}: its run had {changed}; go on with the same, or train into another folder"
        )
    found: dict[str, dict[str, mx.array]] = {part: {} for part in _PARTS}
    for name, tensor in file.tensors.items():
        part, _, own = name.partition(":")
        if part not in found:
            raise CheckpointError(f"{path}: holds an unknown part {part!r}; it is damaged")
        found[part][own] = mx.array(tensor.read())
    return State(step, found["parameters"], found["optimizer"], found["average"], numbers)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say what differs, in words: the other run's values."""
    parts = []
    for name in sorted(set(before) | set(now)):
        was, own = before.get(name), now.get(name)
        if was == own:
            continue
        if isinstance(was, str) and len(was) > 40:
            parts.append(f"another {name}")
        else:
            parts.append(f"{name} {json.dumps(was)} (now {json.dumps(own)})")
    return ", ".join(parts)
