"""From the options of a run to a run that can be drawn: checked, filled in, planned."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from mlxdiff import samplers
from mlxdiff.errors import UsageError, argument, quoted
from mlxdiff.run.additions.judge import judge_of
from mlxdiff.run.additions.lora import few_step_for, few_step_of
from mlxdiff.run.additions.motion import SCHEDULE, motion_of
from mlxdiff.run.aspect import with_aspect
from mlxdiff.run.habits import note_seed
from mlxdiff.run.model import Model
from mlxdiff.run.options import RunOptions
from mlxdiff.run.rules import check_parts, check_upscaler
from mlxdiff.run.seeds import pick_seeds
from mlxdiff.run.settings import Settings
from mlxdiff.samplers.guidance import guided_evaluations
from mlxdiff.store.folder import ModelSource

logger = logging.getLogger("mlxdiff")

NO_THRESHOLD = 1e5  # as large as no prediction is


class PlannedRun(NamedTuple):
    """A run that can be drawn: checked, and planned.

    Attributes:
        model: the model, with all that is added to it for this run.
        settings: of the run.
        plans: the sampler's plan for the model, and for what comes after (``make_plans``).
        seeds: seed of each picture that is drawn.
        noise: (pictures, H/f, W/f, C) float32 in place of the first noise; None: as the seeds give.
    """

    model: Model
    settings: Settings
    plans: tuple[samplers.Plan, ...]
    seeds: list[int]
    noise: np.ndarray | None = None


def resolve(
    model: Model, refiner: Model | None = None, asked: RunOptions | None = None
) -> PlannedRun:
    """Check the options of a run, fill in the defaults, and plan it. Raises: UsageError."""
    asked = RunOptions() if asked is None else asked
    sampler, schedule = samplers.resolve(asked.sampler, asked.schedule)
    asked = replace(asked, sampler=sampler, schedule=schedule)
    note_seed(asked.seed)
    if asked.best_of > 1 and judge_of(model) is None:
        model.require("judge", "best_of")
        raise UsageError(
            f"{argument('best_of')}: there is no judge; give one ({argument('judge')})"
        )
    asked = _with_variations(model, asked)
    group = asked.best_of * asked.ensemble
    seeds = pick_seeds(asked.seed, asked.count * group, asked.vary)
    asked = _meant(model, with_aspect(model, asked))
    check_parts(model, refiner, asked)
    check_upscaler(model, asked)
    asked = _with_defaults(model, asked)
    settings = model.resolve(asked, refiner)
    plans = make_plans(settings, model, refiner)
    _check_some_guidance(settings, plans)
    _check_step_noise(settings, plans)
    settings = replace(
        settings,
        sampler=plans[0].sampler,
        schedule=plans[0].schedule,
        best_of=asked.best_of,
    )
    _check_first_noise(settings, asked, model)
    noise = _check_noise(settings, asked.noise, len(seeds), model)
    return PlannedRun(model, settings, plans, seeds, noise)


def _meant(model: Model, asked: RunOptions) -> RunOptions:
    """The same without what means nothing to a model, as metadata of its pictures may hold it: an
    empty prompt, a scale at which there is no guidance."""
    if model.lacks("prompt"):
        asked = replace(asked, prompt=asked.prompt or None)
    if model.lacks("text") and (asked.guidance or 0.0) <= 1.0:
        asked = replace(asked, guidance=None)
    return asked


def _with_defaults(model: Model, asked: RunOptions) -> RunOptions:
    """Fill in sampler, steps and guidance: as an addition asks for them, else the model's own."""
    asked = _as_advised(model, asked)
    sampler = model.default_sampler if asked.sampler == "auto" else asked.sampler
    asked = replace(asked, sampler=sampler)
    return replace(
        asked,
        steps=_steps(model, asked),
        guidance=model.default_guidance if asked.guidance is None else asked.guidance,
    )


def _with_variations(model: Model, asked: RunOptions) -> RunOptions:
    """The same with what says how many pictures to draw said once. Raises: UsageError."""
    if asked.variations is None:
        return asked
    model.require("variations", argument("variations"))
    if asked.count != asked.variations:
        raise UsageError(
            f"{argument('variations')} and {argument('count')} both say how many pictures to draw; "
            "give one of them"
        )
    return replace(asked, variations=None)


def _as_advised(model: Model, asked: RunOptions) -> RunOptions:
    """Fill in what a few-step LoRA or a motion adapter asks for, where nothing else is given."""
    motion, few = motion_of(model.additions), few_step_of(model.additions)
    plain = few is None and motion is None and asked.image is None
    if plain and asked.steps is not None:
        _note_few_steps(model, asked.steps)
    for way in (few, None if motion is None else motion.way):
        if way is None:
            continue
        asked = replace(
            asked,
            steps=way.steps if asked.steps is None else asked.steps,
            guidance=way.guidance if asked.guidance is None else asked.guidance,
        )
        if (asked.sampler, asked.schedule) == ("auto", "auto"):
            eta = way.eta if asked.eta is None else asked.eta
            asked = replace(asked, sampler=way.sampler, schedule=way.schedule, eta=eta)
    return asked


def _note_few_steps(model: Model, steps: int) -> None:
    """Say what draws better in so few steps, if it is in the package."""
    way = few_step_for(model)
    if way is not None and way.is_shipped and steps <= way.steps:
        logger.info(
            "in so few steps this model draws better with %s: %d steps without guidance",
            argument("fast"),
            way.steps,
        )


def _steps(model: Model, asked: RunOptions) -> int:
    """Number of steps: what is asked for, else that of the listed sigmas, else the model's own."""
    listed = None if asked.sigmas is None else [sigma for sigma in asked.sigmas if sigma > 0.0]
    if listed is None:
        return model.default_steps(asked.sampler) if asked.steps is None else asked.steps
    if asked.steps not in (None, len(listed)):
        raise UsageError(
            f"sigmas: they are {len(listed)} steps, and steps is {asked.steps}; leave steps out"
        )
    return max(len(listed), 1)


def make_plans(
    settings: Settings, model: Model, refiner: Model | None = None
) -> tuple[samplers.Plan, ...]:
    """Plan the sampler for the model, and for what follows: a refiner, or a hires pass."""
    source = model.source
    own_strength = (
        model.is_latent_consistency
        and settings.canvas is None  # its pipelines do not inpaint; the general one does
        and samplers.takes_distilled_strength(source.scheduler_config, settings.sampler)
    )
    process = SCHEDULE if model.draws_video else {}
    plan = samplers.plan(
        source.scheduler_config | process | _thresholding(settings),
        settings.sampler,
        settings.schedule,
        settings.steps,
        eta=settings.eta,
        family=source.family,
        strength=None if own_strength else settings.strength,
        distilled_strength=settings.strength if own_strength else None,
        denoising_start=None if settings.refined else settings.denoising_start,
        denoising_end=settings.denoising_end,
        guidance=settings.guidance,
        altered=settings.altered,
        sigmas=settings.sigmas,
    )
    if settings.dynamic_threshold is not None and not _thresholds(plan):
        raise _cannot_threshold(settings, source)
    if (enlarged := settings.enlarged) is not None:
        enlarged = replace(enlarged, sampler=plan.sampler, schedule=plan.schedule)
        try:
            return plan, *make_plans(enlarged, model)
        except UsageError as error:
            raise UsageError(f"{argument('hires')}: {error}") from None
    if refiner is None:
        return (plan,)
    second = samplers.plan(
        refiner.source.scheduler_config,
        plan.sampler,
        plan.schedule,
        settings.steps,
        eta=settings.eta,
        family=source.family,
        denoising_start=settings.denoising_start,
        sigmas=settings.sigmas,
    )
    return plan, second


def _thresholding(settings: Settings) -> dict[str, Any]:
    """Arguments of a scheduler for the dynamic thresholding that is asked for."""
    if settings.dynamic_threshold is None:
        if settings.threshold_max is not None:
            raise UsageError(
                f"{argument('threshold_max')} has no effect without {argument('dynamic_threshold')}"
            )
        return {}
    most = NO_THRESHOLD if settings.threshold_max is None else settings.threshold_max
    return {
        "thresholding": True,
        "dynamic_thresholding_ratio": settings.dynamic_threshold,
        "sample_max_value": most,
    }


def _thresholds(plan: samplers.Plan) -> bool:
    """Return True if a run brings its predictions within dynamic bounds."""
    return any(row.limit is not None and row.limit.quantile is not None for row in plan.rows)


def _cannot_threshold(settings: Settings, source: ModelSource) -> UsageError:
    """Say which samplers threshold their predictions on this model."""
    config, able = source.scheduler_config | _thresholding(settings), []
    for name in samplers.SAMPLERS:
        with contextlib.suppress(UsageError):
            if _thresholds(samplers.plan(config, name, steps=4, family=source.family)):
                able.append(name)
    return UsageError(
        f"{argument('dynamic_threshold')}: sampler {settings.sampler} does not threshold its "
        f"predictions; {', '.join(able)} do"
    )


def _check_some_guidance(settings: Settings, plans: tuple[samplers.Plan, ...]) -> None:
    """Refuse a guidance interval that no evaluation lies in."""
    if settings.guidance_interval is None:
        return
    for plan in plans:
        first, end = guided_evaluations(settings.guidance_interval, len(plan))
        if first >= end:
            start, stop = settings.guidance_interval
            raise UsageError(
                f"{argument('guidance_interval')} {start:g} to {stop:g} holds none of the run's "
                f"{len(plan)} evaluations; take a wider one, or guidance 1 for none"
            )


def _check_step_noise(settings: Settings, plans: tuple[samplers.Plan, ...]) -> None:
    """Refuse a Brownian motion for steps that belong to no interval; note what has no effect."""
    if settings.step_noise is None:
        return
    for plan in plans:
        if not plan.draws:
            logger.warning("step_noise has no effect: sampler %s draws no noise", plan.sampler)
        elif settings.step_noise == "brownian" and any(
            row.noise and not row.between for row in plan.rows
        ):
            raise UsageError(
                f"step_noise brownian: sampler {plan.sampler} draws independent noise; "
                "dpmpp-sde, dpmpp-2m-sde and dpmpp-3m-sde can take a Brownian motion"
            )


def _check_first_noise(settings: Settings, asked: RunOptions, model: Model) -> None:
    """Refuse what changes the first noise where it is given, or where there is none."""
    if asked.noise_size is not None:
        height, width = asked.noise_size
        try:
            model.check_size(width=width, height=height)
        except UsageError as error:
            raise UsageError(f"{argument('noise_size')}: {error}") from None
    changes = {"vary": asked.vary, "noise_size": asked.noise_size}
    for name, value in (changes | {"noise": asked.noise}).items():
        if value is not None and not settings.adds_noise:
            raise UsageError(
                f"{argument(name)}: this run begins without any noise "
                f"({argument('denoising_start')})"
            )
    for name, value in changes.items():
        if value is not None and asked.noise is not None:
            raise UsageError(
                f"{argument(name)} and {argument('noise')} are both given; give one of them"
            )


def _check_noise(
    settings: Settings, noise: np.ndarray | None, count: int, model: Model
) -> np.ndarray | None:
    """The noise that was given, if it fits the run."""
    if noise is None:
        return None
    expected: tuple[int, ...] = count, *model.latent_shape(*settings.drawn)
    if settings.frames is not None:
        expected = count, settings.frames, *expected[1:]
    try:
        noise = np.asarray(noise, np.float32)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"noise is {quoted(noise)}; expected an array of numbers") from None
    if noise.shape != expected:
        form = "pictures, H/f, W/f, C" if settings.frames is None else "videos, F, H/f, W/f, C"
        raise UsageError(f"noise has shape {noise.shape}; expected {expected} ({form})")
    return noise.reshape(count, *settings.latent_shape(model))
