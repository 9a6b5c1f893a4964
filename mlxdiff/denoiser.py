"""What the sampler asks at each evaluation: the U-Net with all that it is told, and guidance.

One object for one prompt: what is the same in every evaluation is put together once, here. Whatever
takes part in an evaluation (guidance, and later more inputs or networks) has its place here; the
loop in ``pipeline`` knows nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxdiff.model import Model, PromptEmbeddings
from mlxdiff.pixels import PixelModel
from mlxdiff.samplers.guidance import guidance_scale_embedding, guide, guided_evaluations
from mlxdiff.settings import Settings


@dataclass(frozen=True)
class Evaluation:
    """Which evaluation of a run this is.

    Attributes:
        t: the timestep.
        index: 0 for the first of this model's plan.
        total: evaluations of the plan.
        beside: what the U-Net of this picture sees beside x, (1, h, w, C'); None: nothing.
    """

    t: float
    index: int
    total: int
    beside: Any = None


class Denoiser:
    """Predictions of a model that draws from text: one, or two and guidance between them.

    Args:
        model: whose U-Net is asked.
        text: the prompts, embedded.
        settings: of the run.
    """

    def __init__(self, model: Model, text: PromptEmbeddings, settings: Settings) -> None:
        self.backend = model.backend
        self.unet = model.component("unet")
        self.settings = settings
        self.guided = model.is_guided(settings.guidance)
        self.conditions: dict[str, Any] = {
            "encoder_hidden_states": self._both(text.negative_prompt_embeds, text.prompt_embeds)
        }
        if (time_ids := settings.time_ids(model)) is not None:
            negative_ids, ids = np.array(time_ids, np.float32)[:, None]
            self.conditions["text_embeds"] = self._both(
                text.negative_pooled_prompt_embeds, text.pooled_prompt_embeds
            )
            self.conditions["time_ids"] = self._both(negative_ids, ids)
        if (dim := model.unet_config.time_cond_proj_dim) is not None:
            embedding = guidance_scale_embedding(settings.guidance, dim)
            self.conditions["timestep_cond"] = self.backend.asarray(embedding)
        self._positive = {k: v[1:] for k, v in self.conditions.items()} if self.guided else None
        self._deep: list[Any] = []

    def _both(self, negative: np.ndarray | None, positive: np.ndarray | None) -> Any:
        """One batch of what is said beside the negative and the positive prompt."""
        if positive is None:
            return None
        if self.guided and negative is not None:
            positive = np.concatenate([negative, positive])
        return self.backend.asarray(positive)

    def __call__(self, x: Any, evaluation: Evaluation) -> Any:
        """The model's output at x_t, after guidance: (1, h, w, C) float32 -> the same."""
        guided = self.guided and self._within(evaluation)
        sample = x
        if evaluation.beside is not None:
            sample = self.backend.concatenate([x, evaluation.beside], -1)
        if guided:
            sample = self.backend.concatenate([sample, sample], 0)
        conditions = self.conditions if guided or self._positive is None else self._positive
        deep = self._features(evaluation, len(sample))
        out = self.unet(sample, evaluation.t, **conditions, deep=deep)
        if not guided:
            return out
        return guide(out[:1], out[1:], self.settings.guidance, self.settings.guidance_rescale)

    def _within(self, evaluation: Evaluation) -> bool:
        """Whether there is guidance in this evaluation."""
        if self.settings.guidance_interval is None:
            return True
        first, end = guided_evaluations(self.settings.guidance_interval, evaluation.total)
        return first <= evaluation.index < end

    def _features(self, evaluation: Evaluation, batch: int) -> list[Any] | None:
        """The U-Net's ``deep``: empty where all of it is to run; None: features are not kept."""
        every = self.settings.feature_reuse
        if every is None:
            return None
        if evaluation.index % every == 0 or len(self._deep[0]) < batch:
            self._deep = []
        else:
            self._deep = [features[-batch:] for features in self._deep]  # the prompt's come last
        return self._deep


class PixelDenoiser:
    """Predictions of a model without text.

    Args:
        model: whose U-Net is asked.
        label: the class to draw, for a model that has classes.
    """

    def __init__(self, model: PixelModel, label: int | None = None) -> None:
        self.unet = model.component("unet")
        self.labels = None
        if label is not None:
            dtype = np.int32 if model.unet_config.class_embed_type is None else np.float32
            self.labels = model.backend.asarray(np.array([label], dtype))

    def __call__(self, x: Any, evaluation: Evaluation) -> Any:
        """The model's output at x_t: (1, H, W, C) float32 -> the same."""
        return self.unet(x, evaluation.t, self.labels)


class EditedDenoiser:
    """Predictions for a prompt that changes in the course of a run (A1111's prompt editing).

    Args:
        denoisers: (last, denoiser) in order, as ``Model.prompt_timeline`` gives the prompts.
        before: evaluations of the run that another model made before this one's first.
    """

    def __init__(self, denoisers: list[tuple[int, Denoiser]], before: int) -> None:
        self.denoisers, self.before = denoisers, before

    def __call__(self, x: Any, evaluation: Evaluation) -> Any:
        """The model's output at x_t, after guidance: (1, h, w, C) float32 -> the same."""
        index = self.before + evaluation.index
        found = next((d for last, d in self.denoisers if index <= last), self.denoisers[-1][1])
        return found(x, evaluation)


def make_denoiser(
    model: Model | PixelModel, settings: Settings, before: int = 0
) -> Denoiser | EditedDenoiser | PixelDenoiser:
    """The denoiser of a run; runs the text encoders.

    Args:
        before: evaluations of the run that another model makes before this one's first.
    """
    if isinstance(model, PixelModel):
        return PixelDenoiser(model, settings.label)
    timeline = model.prompt_timeline(
        settings.prompt,
        settings.negative_prompt,
        settings.prompt_2,
        settings.negative_prompt_2,
        guided=model.is_guided(settings.guidance),
        clip_skip=settings.clip_skip,
        prompt_syntax=settings.prompt_syntax,
        steps=settings.evaluations,
    )
    if len(timeline) == 1:
        return Denoiser(model, timeline[0][1], settings)
    made: dict[tuple[bytes | None, ...], Denoiser] = {}  # what comes back is not made again
    denoisers = []
    for last, text in timeline:
        key = tuple(None if array is None else array.tobytes() for array in text)
        if key not in made:
            made[key] = Denoiser(model, text, settings)
        denoisers.append((last, made[key]))
    return EditedDenoiser(denoisers, before)
