"""``mlxdiff train lora`` as a function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxdiff.loading import load
from mlxdiff.pipeline import Pipeline
from mlxdiff.run.latent_model import LatentModel
from mlxdiff.run.table import make
from mlxdiff.training import plan, session
from mlxdiff.training.data import LatentData, open_asked
from mlxdiff.training.lora import LoRA, check_trainable
from mlxdiff.training.options import TrainLoraOptions
from mlxdiff.training.process import Process
from mlxdiff.training.run import Done, Say, run, silent

PICTURES = {".png", ".jpg", ".jpeg", ".webp"}


def train_lora(folder: str | Path, **given: Any) -> Done:
    """Train a LoRA on a folder of pictures with captions.

    Args:
        folder: the pictures (docs/training.md).
        given: the options of ``training.options.TrainLoraOptions`` by name.
    Raises: UsageError, CheckpointError, ConfigError, HubError; OSError if the disk fails.
    """
    options = make(TrainLoraOptions, given)
    say = options.say or silent
    opened = session.begin(Path(folder), options, options, "lora", ".safetensors")
    assert opened.pipe is not None
    model = check_trainable(opened.pipe.model)
    process = Process.from_config(model.source.scheduler_config)
    data = _data(Path(folder), opened, options, model, say)
    expected = plan.plan(model, data, opened.options, options)
    dtype, again = str(opened.options.dtype), expected.checkpointing
    return run(
        opened,
        data,
        process,
        expected,
        lambda: LoRA(model, options, options.seed, dtype, again),
        open_result=lambda files: _with_lora(options, files[0]),
        say=say,
        rank=options.rank,
    )


def _with_lora(options: TrainLoraOptions, file: Path) -> Pipeline:
    """The model with a LoRA."""
    return load(model=options.model, quantize=options.quantize, loras=[file], low_memory=True)


def _data(
    folder: Path,
    opened: session.Session,
    options: TrainLoraOptions,
    model: LatentModel,
    say: Say,
) -> LatentData:
    """The training set. Pictures of the class that are missing are drawn."""
    prior = None if options.prior_folder is None else Path(options.prior_folder)
    if prior is not None and options.prior_caption is not None and not options.dry_run:
        _draw_missing(opened, prior, options, say)
    return open_asked(
        folder,
        model,
        options,
        opened.cache(options.cache),
        prior_folder=prior,
        prior_caption=options.prior_caption,
        prior_weight=options.prior_weight,
        tokens=options.text_encoder,
    )


def _draw_missing(
    opened: session.Session, prior: Path, options: TrainLoraOptions, say: Say
) -> None:
    """Draw pictures of a class with the model itself until there are enough."""
    assert opened.pipe is not None and options.prior_caption is not None
    prior.mkdir(parents=True, exist_ok=True)
    there = sum(path.suffix.lower() in PICTURES for path in prior.rglob("*"))
    for number in range(there, options.prior_count):
        place = prior / f"class-{number:04}.png"
        say(f"drawing {place.name} of the class ({number + 1} of {options.prior_count})")
        found = opened.pipe.generate(options.prior_caption, seed=options.seed + number)
        found.images[0].save(place)
