"""``mlxdiff train distill`` as a function."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxdiff.errors import UsageError, argument
from mlxdiff.loading import load
from mlxdiff.networks.params import expected_parameters
from mlxdiff.pipeline import Pipeline
from mlxdiff.run.latent_model import LatentModel
from mlxdiff.run.table import make
from mlxdiff.training import plan, session
from mlxdiff.training.consistency import Consistency, Student
from mlxdiff.training.data import open_asked
from mlxdiff.training.distill import DistilledLoRA, DistilledModel
from mlxdiff.training.lora import check_trainable
from mlxdiff.training.options import TrainDistillOptions, TrainOptions
from mlxdiff.training.process import Process
from mlxdiff.training.run import Done, run, silent

LORA_SCALES, WHOLE_SCALES = (7.5, 7.5), (3.0, 15.0)
VALIDATION = {"sampler": "lcm", "steps": 4, "guidance": 1.0}
"""How a LoRA of few steps draws."""

_OF_LORAS = ("rank", "alpha", "targets", "dora", "form", "licence", "quantize")
_FORWARD, _STEP = 1.0, 3.0  # the work of an evaluation, and of one with its gradient


def train_distill(folder: str | Path, **given: Any) -> Done:
    """Distil a model to few steps, on a folder of pictures with captions.

    Args:
        folder: the pictures (docs/training.md).
        given: the options of ``training.options.TrainDistillOptions`` by name.
    Raises: UsageError, CheckpointError, ConfigError, HubError; OSError if the disk fails.
    """
    options = make(TrainDistillOptions, given)
    say = options.say or silent
    scales = _scales(options)
    ending = "" if options.whole else ".safetensors"
    opened = session.begin(Path(folder), options, options, "distill", ending)
    assert opened.pipe is not None
    model = check_distillable(opened.pipe.model)
    process = Process.from_config(model.source.scheduler_config)
    Consistency.check(process, options)
    data = open_asked(folder, model, options, opened.cache(options.cache))
    expected = _expected(model, data, opened.options, options)
    dtype, again = str(opened.options.dtype), expected.checkpointing

    def task() -> DistilledLoRA | DistilledModel:
        if options.whole:
            return DistilledModel(model, options.solver_steps, dtype)
        return DistilledLoRA(model, options, options.seed, dtype, again)

    def objective(student: Student) -> Consistency:
        empty = data.empty
        assert empty is not None
        return Consistency(student, process, options, scales, empty)

    return run(
        opened,
        data,
        process,
        expected,
        task,
        open_result=_opener(options),
        say=say,
        objective=objective,
        drawing={"steps": VALIDATION["steps"]} if options.whole else VALIDATION,
        guidance=list(scales),
        solver=f"{options.solver}, {options.solver_steps} timesteps",
    )


def check_distillable(model: Any) -> LatentModel:
    """Return the model if it can be distilled. Raises: UsageError."""
    found = check_trainable(model)
    if found.unet_config.time_cond_proj_dim is not None:
        raise UsageError(
            f"{found.source.path.name}: this model is distilled already: it takes the guidance "
            "scale as an input; distil the model that it was made from"
        )
    return found


def _scales(options: TrainDistillOptions) -> tuple[float, float]:
    """The range of guidance scales. Raises: UsageError for options that do not go together."""
    for name in ("min_snr_gamma", "debias"):
        if getattr(options, name):
            raise UsageError(
                f"{argument(name)} weights the error of a denoiser; distillation compares "
                "two predictions of one picture: leave it out"
            )
    if options.whole:
        usual = TrainDistillOptions()
        given = [name for name in _OF_LORAS if getattr(options, name) != getattr(usual, name)]
        if given:
            raise UsageError(
                f"{argument(given[0])} is for a LoRA and {argument('whole')} trains all weights; "
                "give one of them"
            )
        return options.guidance or WHOLE_SCALES
    scales = options.guidance or LORA_SCALES
    if scales[0] != scales[1]:
        raise UsageError(
            f"{argument('guidance')} is a range, from {scales[0]:g} to {scales[1]:g}, and a LoRA "
            f"knows one scale; give one number, or {argument('whole')}"
        )
    return scales


def _expected(
    model: LatentModel, data: Any, options: TrainOptions, asked: TrainDistillOptions
) -> plan.Plan:
    """What it will take. Raises: UsageError if the memory will not suffice."""
    if asked.whole:
        config = model.source.config("unet")
        trained = sum(math.prod(shape) for shape in expected_parameters(config).values())
        frozen = plan.frozen_bytes(model, "unet", options)
        found = plan.expect(config, data, options, frozen, trained, False)
    else:
        found = plan.plan(model, data, options, asked)
    if found.seconds is None:
        return found
    teacher = 2 if asked.solver == "ddim" else 4
    work = _STEP + (teacher + 1) * _FORWARD  # and the target
    return replace(found, seconds=found.seconds * work / _STEP)


def _opener(options: TrainDistillOptions) -> Callable[[list[Path]], Pipeline]:
    """Open a pipeline with a written result."""

    def opened(files: list[Path]) -> Pipeline:
        if options.whole:
            return load(model=files[0], low_memory=True)
        return load(
            model=options.model, quantize=options.quantize, loras=[files[0]], low_memory=True
        )

    return opened
