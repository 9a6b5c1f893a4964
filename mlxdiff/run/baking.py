"""LoRAs in the weights of a model that is converted (``convert.convert``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from mlxdiff.adapters.lora import Baked, Given, Lora, configs_of, open_all
from mlxdiff.backends.numpy import NumPyBackend
from mlxdiff.errors import UsageError, argument
from mlxdiff.run.opening import make_model
from mlxdiff.store.folder import ModelSource
from mlxdiff.store.recipes import is_quantized


@dataclass(frozen=True)
class Baking:
    """Puts LoRAs into the weights of a model, for the argument ``change`` of ``convert.convert``.

    Attributes:
        given: the LoRAs.
    Raises: UsageError for a model that takes no LoRA, and for a quantized one, which cannot hold
        the sum; the errors of ``adapters.lora.open_all``.
    """

    given: Sequence[Given]

    @property
    def files(self) -> list[Path]:
        """The files and folders that are read."""
        paths = [one[0] if isinstance(one, tuple) else one for one in self.given]
        return [one.file.path if isinstance(one, Lora) else Path(one) for one in paths]

    def __call__(self, model: ModelSource) -> ModelSource:
        make_model(model, NumPyBackend()).require("lora")
        if is_quantized(model):
            raise UsageError(
                f"{model.path}: is quantized, and a LoRA in its weights would be rounded away; "
                f"convert the original with the LoRA and {argument('quantize')}"
            )
        configs = configs_of(model)
        return cast(ModelSource, Baked(model, open_all(self.given, configs, model.family)))
