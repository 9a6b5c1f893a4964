"""``mlxdiff train finetune`` as a function."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mlxdiff.errors import UsageError, argument
from mlxdiff.loading import load
from mlxdiff.networks.params import expected_parameters
from mlxdiff.run.table import make
from mlxdiff.training import plan, session
from mlxdiff.training.data import open_asked
from mlxdiff.training.finetune import Finetune
from mlxdiff.training.lora import check_trainable
from mlxdiff.training.options import TrainFinetuneOptions
from mlxdiff.training.process import Process
from mlxdiff.training.run import Done, run, silent


def train_finetune(folder: str | Path, **given: Any) -> Done:
    """Train all weights of a model's U-Net on a folder of pictures with captions.

    Args:
        folder: the pictures (docs/training.md).
        given: the options of ``training.options.TrainFinetuneOptions`` by name.
    Raises: UsageError, CheckpointError, ConfigError, HubError; OSError if the disk fails.
    """
    options = make(TrainFinetuneOptions, given)
    say = options.say or silent
    if options.quantize is not None:
        raise UsageError(
            f"{argument('quantize')} is for weights that do not change; finetune changes all of "
            "them: leave it out, or train a LoRA"
        )
    opened = session.begin(Path(folder), options, options, "finetune")
    assert opened.pipe is not None
    model = check_trainable(opened.pipe.model)
    data = open_asked(
        folder,
        model,
        options,
        opened.cache(options.cache),
    )
    config = model.source.config("unet")
    trained = sum(math.prod(shape) for shape in expected_parameters(config).values())
    return run(
        opened,
        data,
        Process.from_config(model.source.scheduler_config),
        plan.expect(config, data, opened.options, 0, trained, False),
        lambda: Finetune(model),
        open_result=lambda files: load(model=files[0], low_memory=True),
        say=say,
    )
