"""``mlxdiff train controlnet`` as a function."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from mlxdiff.errors import UsageError, argument
from mlxdiff.loading import load
from mlxdiff.networks.params import expected_parameters
from mlxdiff.run.table import make
from mlxdiff.training import plan, session
from mlxdiff.training.controlnet import TrainControlNet
from mlxdiff.training.data import LatentData, open_asked
from mlxdiff.training.lora import check_trainable
from mlxdiff.training.options import TrainControlNetOptions
from mlxdiff.training.process import Process
from mlxdiff.training.run import Done, run, silent

_LOOKED_AT = 16  # control images that decide the scale of the first weights


def train_controlnet(folder: str | Path, **given: Any) -> Done:
    """Train a ControlNet for a model on pictures with captions and control images.

    Args:
        folder: the pictures (docs/training.md).
        given: the options of ``training.options.TrainControlNetOptions`` by name.
    Raises: UsageError, CheckpointError, ConfigError, HubError; OSError if the disk fails.
    """
    options = make(TrainControlNetOptions, given)
    if options.control is None:
        raise UsageError(
            f"no control images: give {argument('control', 'edges')} (or grey, tile), "
            f"{argument('control', 'metadata')}, or {argument('control', 'FOLDER')}"
        )
    if options.validate_every is not None:
        raise UsageError(
            f"{argument('validate_every')}: a ControlNet draws along a picture, which validation "
            "does not have; draw with it when it is trained"
        )
    opened = session.begin(Path(folder), options, options, "controlnet")
    assert opened.pipe is not None
    model = check_trainable(opened.pipe.model)
    data = open_asked(
        folder,
        model,
        options,
        opened.cache(options.cache),
        control=options.control,
    )
    config = model.source.config("unet")
    frozen = plan.frozen_bytes(model, "unet", opened.options)
    trained = sum(
        math.prod(shape)
        for name, shape in expected_parameters(config).items()
        if not name.startswith(("up_blocks", "conv_norm_out", "conv_out"))
    )
    return run(
        opened,
        data,
        Process.from_config(model.source.scheduler_config),
        plan.expect(config, data, opened.options, frozen, trained, False),
        lambda: TrainControlNet(model, _some_hints(data), options.seed),
        open_result=lambda files: load(model=options.model, controlnets=[files[0]]),
        say=options.say or silent,
        control=options.control,
    )


def _some_hints(data: LatentData) -> np.ndarray:
    """Return control images of one size: (N, H, W, 3)."""
    hint = data.batch(0, _LOOKED_AT, 0).hint
    assert hint is not None
    return hint
