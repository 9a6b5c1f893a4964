"""``mlxdiff train unconditional`` as a function."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mlxdiff.loading import load
from mlxdiff.networks.params import expected_parameters
from mlxdiff.run.table import make
from mlxdiff.training import plan, session
from mlxdiff.training.data import open_pixels
from mlxdiff.training.options import TrainUnconditionalOptions
from mlxdiff.training.process import Process
from mlxdiff.training.run import Done, run, silent
from mlxdiff.training.unconditional import Unconditional, new_model

SIDE = 64
"""Side of the pictures, in pixels, if nothing else is said."""


def train_unconditional(folder: str | Path, **given: Any) -> Done:
    """Train a new model of pixels on a folder of pictures, from scratch.

    Args:
        folder: the pictures (docs/training.md); with ``classes``, a sub-folder for each class.
        given: the options of ``training.options.TrainUnconditionalOptions`` by name.
    Raises: UsageError, CheckpointError; OSError if the disk fails.
    """
    options = make(TrainUnconditionalOptions, given)
    say = options.say or silent
    opened = session.begin(Path(folder), None, options, "unconditional")
    width, height = options.resolution or (SIDE, SIDE)
    data = open_pixels(
        folder,
        resolution=(width, height),
        classes=options.classes,
        flip=options.flip,
        crop=options.crop,
        skip_faulty=options.skip_faulty,
    )
    source = new_model(
        width,
        height,
        channels=options.channels,
        layers=options.layers,
        attention=options.attention,
        classes=len(data.classes),
        noise=options.noise,
        prediction=options.prediction_type,
    )
    trained = sum(math.prod(shape) for shape in expected_parameters(source.config("unet")).values())
    expected = plan.expect(source.config("unet"), data, opened.options, 0, trained, False)
    return run(
        opened,
        data,
        Process.from_config(source.scheduler_config),
        expected,
        lambda: Unconditional(source, data.classes, options.seed),
        open_result=lambda files: load(model=files[0], low_memory=True),
        say=say,
    )
