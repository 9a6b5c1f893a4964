"""The prediction of one evaluation: the U-Net with all of its inputs, additions, and guidance.

There is one denoiser for one prompt. It prepares once what is the same in every evaluation. The
sampling loop in ``pipeline`` calls it and knows nothing of guidance or additions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mlxdiff.networks.condition import Condition
from mlxdiff.networks.perturbation import Blur, FreeU, Identity, Skip, blocks_named
from mlxdiff.run import animation, image_led, video
from mlxdiff.run.additions import Added, Prompted
from mlxdiff.run.composition import Merge, by_regions, by_weights
from mlxdiff.run.model import Model, PromptEmbeddings
from mlxdiff.run.reuse import Reuse
from mlxdiff.run.settings import Settings
from mlxdiff.samplers import guiders
from mlxdiff.samplers.guidance import (
    guidance_scale_embedding,
    guide_edit,
    guided_evaluations,
    rescaled,
)

logger = logging.getLogger("mlxdiff")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run.

    Attributes:
        t: the timestep.
        index: 0 for the first of this model's plan.
        total: number of evaluations of the plan.
        beside: further input channels of the U-Net for this picture, (1, h, w, C'); None: none.
        labels: the vector that the U-Net takes beside the timestep for this picture, (1, D)
            float32 NumPy; None: none.
    """

    t: float
    index: int
    total: int
    beside: Any = None
    labels: np.ndarray | None = None


class Prediction(NamedTuple):
    """What a denoiser predicts in one evaluation.

    Attributes:
        output: the model's output after guidance, (1, h, w, C) float32.
        unconditional: that for the negative prompt alone; None: there is no guidance.
    """

    output: Any
    unconditional: Any = None


class TimeEmbeddings:
    """The timestep embeddings of a run, made for many evaluations at once.

    Args:
        timesteps: of all evaluations.
        embed: gives the embeddings (N, E) of N samples, for the timesteps of N / batch evaluations.
        batch: samples in an evaluation.
    """

    AT_ONCE = 50  # the layers keep some 100 KB for each, and some runs have 1000 evaluations

    def __init__(
        self, timesteps: Sequence[float], embed: Callable[[np.ndarray], Any], batch: int
    ) -> None:
        self._timesteps = np.array(timesteps, np.float32)
        self._embed = embed
        self._batch = batch
        self._first = -1
        self._made = Condition(None)

    def at(self, index: int) -> Condition:
        """The embeddings of the batch of an evaluation."""
        first = index - index % self.AT_ONCE
        if first != self._first:
            self._first = first
            self._made = Condition(self._embed(self._timesteps[first : first + self.AT_ONCE]))
        row = (index - first) * self._batch
        return self._made.rows(row, row + self._batch)


def _embed(
    backend: Any, unet: Any, conditions: Mapping[str, Any], batch: int, timesteps: np.ndarray
) -> Any:
    """Return the time embeddings of the batches of these evaluations.

    Args:
        conditions: further inputs of a batch, (batch, ...) each.
    """
    repeated = {
        name: backend.concatenate([values] * len(timesteps)) for name, values in conditions.items()
    }
    return unet.embed(backend.asarray(timesteps.repeat(batch)), **repeated)


def _freeu(unet: Any, factors: tuple[float, float, float, float]) -> list[tuple[object, FreeU]]:
    """Return FreeU's changes, of the first two up blocks. `factors`: b1, b2, s1, s2."""
    b1, b2, s1, s2 = factors
    changes = FreeU(b1, s1), FreeU(b2, s2)
    return list(zip(unet.up_blocks[:2], changes, strict=False))


def _weakening(unet: Any, guider: guiders.Weakened) -> list[tuple[object, Any]]:
    """Return the changes that weaken the network for a guider."""
    change: Any = Identity()
    if isinstance(guider, guiders.SmoothedEnergy):
        change = Blur(guider.blur)
    elif isinstance(guider, guiders.SkippedLayers):
        change = Skip()
    return [(block, change) for block in blocks_named(unet, guider.layers)]


class Denoiser:
    """Predictions of a model that draws from text: one, or several that guidance combines.

    A batch holds the prediction for the negative prompt, then that for the prompt. For a model that
    edits a picture, a prediction for the negative prompt without the picture comes first. A model
    that turns a picture's object, or lets a picture move, does not see the picture where it reads
    the negative prompt.

    Args:
        model: the model.
        text: the prompts, embedded.
        settings: of the run.
        timesteps: of all evaluations of the plan.
        unet: the model's U-Net; None: load it.
        others: the denoisers of further prompts of the picture.
        merge: joins their predictions with this one's; None: there are no others.
    """

    def __init__(
        self,
        model: Model,
        text: PromptEmbeddings,
        settings: Settings,
        timesteps: Sequence[float],
        unet: Any = None,
        others: Sequence[Denoiser | EditedDenoiser] = (),
        merge: Merge | None = None,
    ) -> None:
        self.backend = model.backend
        self.unet = model.component("unet") if unet is None else unet
        self.settings = settings
        self.others, self.merge = others, merge
        self.guided = settings.guides(model)
        self.edits, self.blanks = model.edits, model.turns or model.animates
        self.picture_first = model.maps is not None
        self.batch = settings.batch(model)
        states = self._both(text.negative_prompt_embeds, text.prompt_embeds)
        self.frames = video.frames_of(settings, model.low_memory)
        self.text = self.unet.read(states).of_video(self.frames)
        if settings.freeu is not None:
            self.text = self.text.changed(_freeu(self.unet, settings.freeu))
        self.guider = settings.guiding
        self.scale: Any = settings.guidance
        if model.animates and self.guided:
            rows, _, _ = settings.latent_shape(model)
            self.scale = self.backend.asarray(animation.guidance_of_frames(settings, rows))
        self.memory = guiders.Memory()
        # What is lazy belongs to the thread that made it, and each step may run in another.
        self.backend.evaluate(self.text.values)
        # Inputs of the U-Net beside text and timestep, (B, ...) each.
        self.conditions: dict[str, Any] = {}
        if (time_ids := settings.time_ids(model)) is not None:
            negative_ids, ids = np.array(time_ids, np.float32)[:, None]
            if text.pooled_prompt_embeds is not None:
                self.conditions["text_embeds"] = self._both(
                    text.negative_pooled_prompt_embeds, text.pooled_prompt_embeds
                )
            self.conditions["time_ids"] = self._both(negative_ids, ids)
        if (dim := model.unet_config.time_cond_proj_dim) is not None:
            embedding = guidance_scale_embedding(settings.guidance, dim)
            self.conditions["timestep_cond"] = self.backend.asarray(embedding)
        if model.upscales:
            levels = np.full(self.batch, settings.noise_level, np.int32)
            self.conditions["class_labels"] = self.backend.asarray(levels)
        self._timesteps = timesteps
        self._labels: np.ndarray | None = None  # in the timestep embeddings
        self.times = self._embedded(self.conditions)
        self.acting = model.additions.act(
            Prompted(
                settings=settings,
                backend=self.backend,
                component=model.component,
                take=model.take,
                unet=self.unet,
                states=states,
                text=self.text,
                conditions=self.conditions,
                batch=self.batch,
                # A refiner has none of the model's additions.
                controls=dict(zip(model.controlled, settings.controls, strict=False)),
            )
        )
        self.weakened: Condition | None = None
        if isinstance(self.guider, guiders.Weakened):
            prompt = self.text.rows(self.batch - 1, self.batch)
            self.weakened = prompt.changed(_weakening(self.unet, self.guider))
        self.reuse: Reuse | None = None
        self._deep: list[Any] = []
        self._counting: list[list[int]] = []  # the additions that took part in these features

    def _embedded(self, conditions: Mapping[str, Any]) -> TimeEmbeddings:
        """The timestep embeddings of a run with these further inputs of a batch."""
        # Not a method of this object: it would keep the object in a circle of references.
        embed = partial(_embed, self.backend, self.unet, conditions, self.batch)
        return TimeEmbeddings(self._timesteps, embed, self.batch)

    def _times(self, labels: np.ndarray | None) -> TimeEmbeddings:
        """The timestep embeddings with the vector of a picture in them; zeros stand for it where
        there is the negative prompt."""
        if labels is not None and labels is not self._labels:
            given = {"class_labels": self._both(np.zeros_like(labels), labels)}
            self._labels, self.times = labels, self._embedded({**self.conditions, **given})
        return self.times

    def _both(self, negative: np.ndarray | None, positive: np.ndarray | None) -> Any:
        """One batch of an input for the negative prompt and for the prompt."""
        if positive is None:
            return None
        if self.guided and negative is not None:
            positive = np.concatenate([*[negative] * (self.batch - 1), positive])
        return self.backend.asarray(positive)

    def __call__(self, x: Any, evaluation: Evaluation) -> Prediction:
        """Return the model's output at x_t, (1, h, w, C)."""
        guided = self.guided and self._within(evaluation)
        sample = x
        if evaluation.beside is not None:
            parts = [evaluation.beside, x] if self.picture_first else [x, evaluation.beside]
            sample = self.backend.concatenate(parts, -1)
        if guided and (self.edits or self.blanks):
            blank = self.backend.concatenate([x, 0.0 * evaluation.beside], -1)
            sample = self.backend.concatenate([blank] + [sample] * (self.batch - 1), 0)
        elif guided:
            sample = self.backend.concatenate([sample, sample], 0)
        temb = self._times(evaluation.labels).at(evaluation.index).of_video(self.frames)
        text = self.text
        if self.guided and not guided:  # the prompt alone
            last = self.batch - 1, self.batch
            temb, text = temb.rows(*last), text.rows(*last)
        old = self._deep
        deep = self._features(evaluation, len(sample))
        added = self._added(x, evaluation, guided, shallow=bool(deep))
        if added.changes:
            text = text.changing(added.changes)
        whole = not deep
        out = self._predict(sample, temb, text, deep, added.residuals, added.features or ())
        if whole and self.settings.feature_reuse_error is not None:
            self._measure(evaluation, sample, temb, text, old, added, out)
        if self.reuse is not None and evaluation.index == evaluation.total - 1:
            logger.info("%s", self.reuse.said(evaluation.total))
        scale, rescale = self.scale, self.settings.guidance_rescale
        image_scale = self.settings.image_guidance
        if guided and self.edits and image_scale is not None:
            edited = guide_edit(out[:1], out[1:2], out[2:], scale, image_scale, rescale)
            return Prediction(edited, out[:1])
        cond = out[-1:]
        if self.merge is not None:
            more = [other(x, evaluation).output for other in self.others]
            cond = self.merge(out[:1] if guided else None, cond, more)
        found = cond
        if guided:
            found = self.guider.combine(out[:1], cond, scale, self._remembered(evaluation))
        away = self._away(evaluation, sample, temb, added, cond)
        if away is not None:
            found = found + away
        if guided or away is not None:
            found = rescaled(found, cond, rescale)
        return Prediction(found, out[:1] if guided else None)

    def _remembered(self, evaluation: Evaluation) -> guiders.Memory:
        """What the guider keeps of this picture; a picture begins where the index falls."""
        if evaluation.index <= self.memory.index:
            self.memory = guiders.Memory()
        self.memory.index = evaluation.index
        return self.memory

    def _away(
        self,
        evaluation: Evaluation,
        sample: Any,
        temb: Condition,
        added: Added,
        cond: Any,
    ) -> Any:
        """Return the step away from the network that the guider weakens; None: it does not act."""
        guider = self.guider
        if self.weakened is None or not isinstance(guider, guiders.Weakened):
            return None
        if not guider.acts(evaluation.index, evaluation.total):
            return None
        last = len(sample) - 1, len(sample)
        frames = self.frames.count
        residuals = added.residuals and [one[-frames:] for one in added.residuals]
        features = [one[-1:] for one in added.features or ()]
        text = self.weakened.changing(added.changes) if added.changes else self.weakened
        weakened = self._predict(sample[-1:], temb.rows(*last), text, None, residuals, features)
        return guider.scale * (cond - weakened)

    def _predict(self, sample: Any, temb: Condition, *conditions: Any) -> Any:
        """The U-Net's output, (B, rows, w, C'); the frames of a video are its samples."""
        batch, rows, width, channels = sample.shape
        count = self.frames.count
        samples = sample.reshape(batch * count, rows // count, width, channels)
        if self.frames.in_parts and batch > 1:
            out = self._predict_singly(samples, temb, *conditions)
        else:
            out = self.unet.predict(samples, temb, *conditions)
        return out.reshape(batch, rows, width, -1)

    def _predict_singly(
        self,
        samples: Any,
        temb: Condition,
        text: Condition,
        deep: Any,
        residuals: list[Any] | None,
        features: Sequence[Any],
    ) -> Any:
        """One prediction after the other: of frames in parts, each takes much memory."""
        found, count = [], self.frames.count
        for row in range(len(samples) // count):
            part = slice(row * count, (row + 1) * count)
            own = None if residuals is None else [one[part] for one in residuals]
            of_row = temb.rows(row, row + 1), text.rows(row, row + 1)
            out = self.unet.predict(samples[part], *of_row, deep, own, features)
            self.backend.evaluate(out)
            found.append(out)
        return self.backend.concatenate(found, 0)

    def _within(self, evaluation: Evaluation) -> bool:
        """Return True if there is guidance in this evaluation."""
        if self.settings.guidance_interval is None:
            return True
        first, end = guided_evaluations(self.settings.guidance_interval, evaluation.total)
        return first <= evaluation.index < end

    def _added(self, x: Any, evaluation: Evaluation, guided: bool, shallow: bool) -> Added:
        """Sum what the additions add inside the U-Net."""
        index, total = evaluation.index, evaluation.total
        _, rows, width, channels = x.shape
        x = x.reshape(self.frames.count, rows // self.frames.count, width, channels)
        made = (acting(x, evaluation.t, index, total, guided, shallow) for acting in self.acting)
        return sum((one for one in made if one is not None), Added())

    def _features(self, evaluation: Evaluation, batch: int) -> list[Any] | None:
        """The U-Net's ``deep``: empty if the whole U-Net must run; None: features are not kept."""
        every, index = self.settings.feature_reuse, evaluation.index
        if every is None and self.settings.feature_reuse_error is None:
            return None
        if index == 0:
            self._deep = []
        counting = [acting.counting(index, evaluation.total) for acting in self.acting]
        due = counting != self._counting or not self._deep or len(self._deep[0]) < batch
        if every is not None:
            due = due or index % every == 0
        else:
            due = due or not self._reuse(evaluation).skips(index, evaluation.t)
        if due:
            self._deep, self._counting = [], counting
        else:
            self._deep = [features[-batch:] for features in self._deep]  # the prompt's come last
        return self._deep

    def _reuse(self, evaluation: Evaluation) -> Reuse:
        """The decisions for this picture; a picture begins with the first evaluation."""
        if evaluation.index == 0 or self.reuse is None:
            self.reuse = Reuse(self.settings.feature_reuse_error or 0.0)
        return self.reuse

    def _measure(
        self,
        evaluation: Evaluation,
        sample: Any,
        temb: Condition,
        text: Condition,
        old: list[Any],
        added: Added,
        out: Any,
    ) -> None:
        """Measure the error that the old features would have had in a whole evaluation."""
        reuse, error = self._reuse(evaluation), None
        if evaluation.index > 0 and old and len(old[0]) >= len(sample):
            again = [features[-len(sample) :] for features in old]
            shallow = self._predict(
                sample, temb, text, again, added.residuals, added.features or ()
            )
            off, guided = shallow - out, out
            if len(out) > 1:
                scale = self.settings.guidance
                off, guided = (one[:1] + scale * (one[-1:] - one[:1]) for one in (off, out))
            size = self.backend.to_numpy((off * off).mean() / (guided * guided).mean())
            error = float(size) ** 0.5
        reuse.measure(evaluation.t, error)


class PixelDenoiser:
    """Predictions of a model without text.

    Args:
        model: the model.
        label: the class to draw, for a model that has classes.
        timesteps: of all evaluations.
    """

    def __init__(self, model: Model, label: int | None, timesteps: Sequence[float]) -> None:
        self.backend = model.backend
        self.unet = model.component("unet")
        dtype = np.int32 if model.unet_config.class_embed_type is None else np.float32
        labels = None if label is None else self.backend.asarray(np.array([label], dtype))
        conditions = {} if labels is None else {"class_labels": labels}
        embed = partial(_embed, self.backend, self.unet, conditions, 1)
        self.times = TimeEmbeddings(timesteps, embed, 1)

    def __call__(self, x: Any, evaluation: Evaluation) -> Prediction:
        """Return the model's output at x_t, (1, H, W, C)."""
        return Prediction(self.unet.predict(x, self.times.at(evaluation.index)))


class EditedDenoiser:
    """Predictions for a prompt that changes in the course of a run (A1111's prompt editing).

    Args:
        denoisers: (last, denoiser) in order, as ``Model.prompt_timeline`` gives the prompts.
        before: number of evaluations that another model makes before this one.
    """

    def __init__(self, denoisers: list[tuple[int, Denoiser]], before: int) -> None:
        self.denoisers, self.before = denoisers, before

    def __call__(self, x: Any, evaluation: Evaluation) -> Prediction:
        """Return the model's output at x_t, (1, h, w, C)."""
        index = self.before + evaluation.index
        found = next((d for last, d in self.denoisers if index <= last), self.denoisers[-1][1])
        return found(x, evaluation)


def make_denoiser(
    model: Model,
    settings: Settings,
    timesteps: Sequence[float],
    before: int = 0,
) -> Denoiser | EditedDenoiser | PixelDenoiser:
    """Make the denoiser of a run. This runs the text encoders.

    Args:
        timesteps: of all evaluations of the model's plan.
        before: number of evaluations that another model makes before this one.
    """
    if model.vae_config is None:
        return PixelDenoiser(model, settings.label, timesteps)
    # All texts first: in low memory the text encoders and the U-Net are not held together.
    alone = [
        replace(settings, prompt=prompt, guidance=1.0, region=None, guider=None, prompt_2=None)
        for prompt in settings.other_prompts
    ]
    timelines = [_timeline(model, one) for one in (settings, *alone)]
    unet = model.take("unet")
    others = [
        EditedDenoiser(_denoisers(model, one, timeline, timesteps, unet), before)
        for one, timeline in zip(alone, timelines[1:], strict=True)
    ]
    merge = _merge(model, settings)
    found = _denoisers(model, settings, timelines[0], timesteps, unet, others, merge)
    if model.low_memory:
        every = [*found, *(one for other in others for one in other.denoisers)]
        unet.absorb([denoiser.text for _, denoiser in every])
    return found[0][1] if len(found) == 1 else EditedDenoiser(found, before)


def _merge(model: Model, settings: Settings) -> Merge | None:
    """Return what joins the predictions of the picture's prompts; None: there is one prompt."""
    if settings.regions:
        height, width, _ = model.latent_shape(settings.height, settings.width)
        return by_regions(settings.regions, height, width, model.backend)
    if len(settings.prompts) > 1:
        return by_weights([weight for _, weight in settings.prompts])
    return None


def _timeline(model: Model, settings: Settings) -> list[tuple[int, PromptEmbeddings]]:
    """Embed the texts that the prompt is in the course of the run; see ``prompt_timeline``.

    A model without text reads a picture in their place.
    """
    if model.animates:
        return [(settings.evaluations, animation.picture_prompt(model, settings))]
    if model.is_led and model.lacks("prompt"):
        token = PromptEmbeddings(*image_led.picture_prompt(model, settings))
        return [(settings.evaluations, token)]
    return model.prompt_timeline(
        settings.prompts[0][0],
        settings.negative_prompt,
        settings.prompt_2,
        settings.negative_prompt_2,
        guided=settings.guides(model),
        clip_skip=settings.clip_skip,
        prompt_syntax=settings.prompt_syntax,
        steps=settings.evaluations,
    )


def _denoisers(
    model: Model,
    settings: Settings,
    timeline: Sequence[tuple[int, PromptEmbeddings]],
    timesteps: Sequence[float],
    unet: Any,
    others: Sequence[EditedDenoiser] = (),
    merge: Merge | None = None,
) -> list[tuple[int, Denoiser]]:
    """Make the denoisers of a prompt that may change in the course of the run.

    Returns: (last, denoiser) in order; see ``EditedDenoiser``.
    """
    made: dict[tuple[bytes | None, ...], Denoiser] = {}  # texts that come back are prepared once
    denoisers = []
    for last, text in timeline:
        key = tuple(None if array is None else array.tobytes() for array in text)
        if key not in made:
            made[key] = Denoiser(model, text, settings, timesteps, unet, others, merge)
        denoisers.append((last, made[key]))
    return denoisers
