"""SDXL's refiner: a second model that does the last part of the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from mlxdiff.errors import UsageError
from mlxdiff.run.additions import Addition, named
from mlxdiff.run.additions.word_vectors import WordVectors
from mlxdiff.run.model import Model


@dataclass(frozen=True, eq=False)
class Refiner(Addition):
    """A model that does the last part of the way."""

    part: ClassVar[str] = "refiner"

    model: Model

    @classmethod
    def open(cls, refiner: Model, model: Model) -> Refiner:
        """Match a refiner to a model. Raises: UsageError."""
        refiner.require("refiner")
        if refiner.vae_config.latent_channels != model.vae_config.latent_channels:
            raise UsageError(f"{refiner.source.path}: its latents are not those of the model")
        own, other = model.backend, refiner.backend
        if (other.name, other.dtype) != (own.name, own.dtype):
            raise UsageError("the refiner must be loaded with the same backend and dtype")
        return cls(refiner)

    def with_words(self, words: Sequence[WordVectors]) -> Refiner:
        """The same, reading these words of the model. Raises: UsageError."""
        fitting = [word for word in words if word.fits_refiner]
        additions = self.model.additions.replaced(WordVectors, fitting)
        return replace(self, model=self.model.with_additions(additions))

    @classmethod
    def describe(cls, items: Sequence[Refiner], settings: Any) -> dict[str, Any]:
        """See ``Addition.describe``."""
        return {"refiner": named(items[-1].model.source.provenance)}


def refiner_of(model: Model) -> Model | None:
    """The refiner that was added to a model, if there is one."""
    return next((one.model for one in model.additions.of(Refiner)), None)
