"""Textual inversion: words of a prompt with vectors of their own (``adapters``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mlxdiff.adapters import textual_inversion
from mlxdiff.run.additions import Addition
from mlxdiff.run.kind import Kind


@dataclass(frozen=True, eq=False)
class WordVectors(Addition):
    """A word that stands for vectors. The model's text encoders match it when they take it."""

    part: ClassVar[str] = "embedding"

    embedding: textual_inversion.TextualInversion

    @classmethod
    def open(cls, given: Iterable[textual_inversion.Given], model: Kind) -> tuple[WordVectors, ...]:
        """Open textual inversions. Raises: CheckpointError, UsageError."""
        return tuple(cls(one) for one in textual_inversion.open_all(given))

    @property
    def fits_refiner(self) -> bool:
        """True if there are vectors for SDXL's second text encoder, the only one of a refiner."""
        return "clip_g" in self.embedding.vectors

    @classmethod
    def describe(cls, items: Sequence[WordVectors], settings: Any) -> dict[str, Any]:
        """See ``Addition.describe``."""
        words = [item.embedding for item in items]
        return {
            "embeddings": [
                {"token": one.token, "name": one.path.name, "sha256": one.sha256} for one in words
            ]
        }
