# ruff: noqa: RUF009 - `option` returns dataclasses.field(...), which is what a field is made by.
"""Every option of ``mlxdiff train``, once. See ``run.options``: the same kind of tables.

Data options (pictures, captions, sizes) are ``DataOptions``; those of one command alone have a
table of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

from mlxdiff.run import values
from mlxdiff.run.options import DType, File, Flag, Place, Positive, Quantization, Scale, Text, Whole
from mlxdiff.run.table import Options, option
from mlxdiff.training.data_buckets import CROPS
from mlxdiff.training.optimizers import OPTIMIZERS, SCHEDULES

SECTIONS = (
    "Model",
    "Data",
    "LoRA",
    "Word",
    "ControlNet",
    "Network",
    "Training",
    "Loss",
    "Machine",
    "Checks",
    "Output",
)
"""Titles in ``--help``, in order."""

TARGETS = ("attention", "transformer", "all")
FORMS = ("diffusers", "kohya", "both")

Rate = Annotated[float, values.Number(above=0, words="a number above 0, such as 1e-4")]
Share = Annotated[float, values.Number(least=0, most=1)]
Above = Annotated[float, values.Number(above=0)]
Optimizer = Annotated[str, values.Choice(OPTIMIZERS)]
Schedule = Annotated[str, values.Choice(SCHEDULES)]
Targets = Annotated[str, values.Choice(TARGETS)]
Form = Annotated[str, values.Choice(FORMS)]
Crop = Annotated[str, values.Choice(CROPS)]
Size = Annotated[tuple[int, int], values.Numbers("WxH", values.Whole(least=8))]
Prompts = Annotated[str | Sequence[str], values.Each(values.Text())]

_model = partial(option, section="Model", key=None)
_data = partial(option, section="Data", key=None)
_training = partial(option, section="Training", key=None)
_loss = partial(option, section="Loss", key=None)
_machine = partial(option, section="Machine", key=None)
_checks = partial(option, section="Checks", key=None)
_output = partial(option, section="Output", key=None)
_lora = partial(option, section="LoRA", key=None)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """The model that training starts from."""

    model: Place | None = _model(
        "-m",
        "--model",
        help="Model to start from: a folder, a file, a hub id or a short name. "
        "Default: the built-in one.",
    )
    quantize: Quantization | None = _model(
        "-q",
        "--quantize",
        help="Keep the frozen weights quantized to these bits (QLoRA): less memory. "
        "Default: as they are stored.",
    )


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Options):
    """Options of every kind of training."""

    steps: Positive = _training("--steps", default=1000, help="Number of updates. Default: 1000.")
    batch: Positive = _training(
        "--batch", default=1, help="Pictures at a time, for each process. Default: 1."
    )
    accumulate: Positive = _training(
        "--accumulate",
        default=1,
        metavar="N",
        help="Batches that make one update: as a batch N times as large, in the memory of one. "
        "Default: 1.",
    )
    learning_rate: Rate | None = _training(
        "--learning-rate",
        "--lr",
        help="Learning rate. Default: 1e-4; 1 for prodigy, which finds its own.",
        elsewhere="lr",
    )
    optimizer: Optimizer = _training(
        "--optimizer",
        default="adamw",
        help="adamw (default); adafactor: less memory; prodigy: finds the learning rate.",
    )
    weight_decay: Scale = _training(
        "--weight-decay", default=0.01, help="Decoupled weight decay. Default: 0.01."
    )
    rate_schedule: Schedule = _training(
        "--rate-schedule",
        default="constant",
        help="Learning rate after the warm-up: constant (default), linear or cosine (to 0).",
        elsewhere="lr_scheduler",
    )
    warmup: Whole = _training(
        "--warmup",
        default=0,
        metavar="N",
        help="Steps over which the learning rate grows to its value. Default: 0.",
        elsewhere="lr_warmup_steps",
    )
    clip: Scale = _training(
        "--clip",
        default=1.0,
        help="Largest norm of all gradients together; 0: no limit. Default: 1.",
        elsewhere="max_grad_norm",
    )
    ema: Share = _training(
        "--ema",
        default=0.0,
        metavar="DECAY",
        help="Keep moving averages of what is trained, such as 0.999, and write those. "
        "Default: 0, none.",
    )
    seed: Whole = _training(
        "--seed", default=0, help="Seed of order, noise and first weights. Default: 0."
    )
    min_snr_gamma: Above | None = _loss(
        "--min-snr-gamma",
        metavar="GAMMA",
        help="Weight timesteps by min-SNR (Hang et al. 2023); 5 is usual. Default: all alike.",
        elsewhere="snr_gamma",
    )
    debias: Flag = _loss(
        "--debias", default=False, help="Weight timesteps as Yu et al. 2024 (debiased estimation)."
    )
    offset_noise: Scale = _loss(
        "--offset-noise",
        default=0.0,
        metavar="STRENGTH",
        help="Add a noise that is the same for a whole channel, for dark and bright pictures; "
        "0.05 is usual. Default: 0.",
        elsewhere="noise_offset",
    )
    caption_dropout: Share = _loss(
        "--caption-dropout",
        default=0.0,
        metavar="SHARE",
        help="Share of examples that are trained without their caption, for guidance. Default: 0.",
    )
    dtype: DType | None = _machine(
        "--dtype",
        help="Type to compute in; what is trained stays float32. Default: float16 on a GPU, "
        "float32 on a CPU.",
    )
    checkpointing: Flag | None = _machine(
        "--checkpointing/--no-checkpointing",
        help="Compute each block again for its gradient: far less memory, about a third slower. "
        "Default: only if the memory would not suffice.",
        elsewhere="gradient_checkpointing",
    )
    save_every: Positive = _output(
        "--save-every",
        default=100,
        metavar="N",
        help="Steps from one saved state to the next. Default: 100.",
        elsewhere="checkpointing_steps",
    )
    validate_every: Positive | None = _checks(
        "--validate-every", metavar="N", help="Draw validation pictures every N steps."
    )
    validation_prompts: Prompts | None = _checks(
        "--validation-prompt",
        metavar="TEXT",
        help="Prompt of a validation picture; its seed is fixed. Repeat it for several.",
    )
    validation_steps: Positive = _checks(
        "--validation-steps", default=20, help="Sampling steps of validation pictures. Default: 20."
    )
    dry_run: Flag = _checks(
        "--dry-run",
        default=False,
        help="Say how many steps, how much memory and about how much time it takes; train nothing.",
    )
    resume: Flag = _output(
        "--resume", default=False, help="Go on with the run in the output folder."
    )
    force: Flag = _output("--force", default=False, help="Replace the run in the output folder.")
    output: File | None = _output(
        "-o", "--output", metavar="FOLDER", help="Folder of the run. Default: named after FOLDER."
    )


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """The pictures and their captions."""

    resolution: Size | None = _data(
        "--resolution",
        metavar="WxH",
        help="Size of training pictures, as WIDTHxHEIGHT or one number. Default: the model's own.",
    )
    buckets: Flag = _data(
        "--buckets/--no-buckets",
        default=True,
        help="Let pictures keep their aspect ratio, at the area of the resolution. Default: yes.",
    )
    caption: Text | None = _data(
        "--caption",
        metavar="TEXT",
        help="Caption of pictures that have none. Default: such a picture is an error.",
    )
    crop: Crop = _data(
        "--crop",
        default="center",
        help="Where a picture is cut that is wider or taller: center (default) or random.",
    )
    flip: Flag = _data("--flip", default=False, help="Mirror half of the pictures.")
    skip_faulty: Flag = _data(
        "--skip-faulty", default=False, help="Leave out pictures that cannot be used."
    )
    cache: File | None = _data(
        "--cache",
        metavar="FOLDER",
        help="Where encoded pictures and captions are kept. Default: in the output folder.",
    )


@dataclass(frozen=True, kw_only=True)
class PriorOptions(Options):
    """What keeps a model from forgetting the class of a subject (Ruiz et al. 2023, DreamBooth)."""

    prior_folder: File | None = _data(
        "--prior-folder",
        metavar="FOLDER",
        help="Pictures of the subject's class, trained beside the others. With --prior-caption, "
        "the model draws those that are missing.",
    )
    prior_caption: Text | None = _data(
        "--prior-caption", metavar="TEXT", help="Caption of these pictures, such as: a dog."
    )
    prior_count: Positive = _data(
        "--prior-count", default=100, help="How many of them to have. Default: 100."
    )
    prior_weight: Scale = _data(
        "--prior-weight", default=1.0, help="Weight of their loss. Default: 1."
    )


@dataclass(frozen=True, kw_only=True)
class LoraOptions(Options):
    """Options of ``mlxdiff train lora`` alone."""

    rank: Positive = _lora("--rank", default=8, help="Rank of the changes. Default: 8.")
    alpha: Above | None = _lora(
        "--alpha", help="Factor alpha / rank of the changes. Default: alpha is the rank."
    )
    targets: Targets = _lora(
        "--targets",
        default="attention",
        help="Layers to change: attention (default), transformer (feed-forward and projections "
        "too), all (convolutions too).",
    )
    text_encoder: Flag = _lora(
        "--text-encoder", default=False, help="Train the text encoders, too."
    )
    dora: Flag = _lora(
        "--dora", default=False, help="Learn the norm of each row, too (Liu et al. 2024)."
    )
    form: Form = _lora(
        "--form",
        default="diffusers",
        help="Names in the file: diffusers (default), kohya (for A1111, ComfyUI), or both files.",
    )
    licence: Text | None = _lora(
        "--licence", help="Licence of the LoRA, for its metadata.", elsewhere="license"
    )


@dataclass(frozen=True, kw_only=True)
class TrainLoraOptions(LoraOptions, TrainOptions, PriorOptions, DataOptions, ModelOptions):
    """All options of ``mlxdiff train lora``."""

    taken_by: ClassVar[str] = "mlxdiff.training.train_lora"

    say: Callable[[str], None] | None = option(
        key=None, doc="called with lines about the progress."
    )
