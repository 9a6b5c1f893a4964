"""A judge that scores finished pictures, and chooses the best of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mlxdiff.convert import Component
from mlxdiff.convert.clip import Clip, open_clip
from mlxdiff.run.additions import Addition, Fetch, Path, named
from mlxdiff.run.judge import BATCH, Judge
from mlxdiff.run.memory import Device, activation_bytes
from mlxdiff.run.model import Model
from mlxdiff.text import a1111

TEXT, IMAGE = "judge_text", "judge_image"


@dataclass(frozen=True, eq=False)
class PictureJudge(Addition):
    """A CLIP that scores each finished picture for its prompt."""

    part: ClassVar[str] = "judge"

    clip: Clip

    @classmethod
    def open(cls, path: Path, fetch: Fetch) -> PictureJudge:
        """Open a judge. Raises: CheckpointError, ConfigError, HubError."""
        return cls(open_clip(path, fetch.variant, fetch.progress))

    @property
    def networks(self) -> Mapping[str, Component]:
        """See ``Addition.networks``."""
        return {TEXT: self.clip.text, IMAGE: self.clip.image}

    def stages(self, device: Device, height: int, width: int, low_memory: bool) -> dict[str, int]:
        """See ``Addition.stages``."""
        one = activation_bytes(self.clip.image.config, device)
        return {"judge": max(one, activation_bytes(self.clip.text.config, device, batch=BATCH))}

    @classmethod
    def describe(cls, items: Sequence[PictureJudge], settings: Any) -> dict[str, Any]:
        """See ``Addition.describe``."""
        return {"judge": named(items[-1].clip.provenance)}


def judge_of(model: Model) -> PictureJudge | None:
    """The judge of finished pictures, if there is one."""
    return next(iter(model.additions.of(PictureJudge)), None)


def score(model: Model, picture: Any, settings: Any) -> float:
    """Score a finished picture for the prompt of its run.

    Args:
        model: what drew it, with its judge.
        settings: ``run.settings.Settings`` of the run.
    """
    judge = judge_of(model)
    assert judge is not None
    words = Judge(judge.clip, model.backend, lambda name: model.component(name, 0))
    return float(words.scores([picture], [plain_text(settings)])[0, 0])


def plain_text(settings: Any) -> str:
    """The prompt as a person reads it: without weights and names of LoRAs."""
    prompt: str = settings.prompt
    if settings.prompt_syntax == "plain":
        return prompt
    return "".join(piece.text or " " for piece in a1111.weigh(a1111.networks(prompt)[0])).strip()
