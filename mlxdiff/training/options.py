# ruff: noqa: RUF009 - `option` returns dataclasses.field(...), which is what a field is made by.
"""Every option of ``mlxdiff train``, once. See ``run.options``: the same kind of tables.

Data options (pictures, captions, sizes) are ``DataOptions``; those of one command alone have a
table of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

from mlxdiff.run import values
from mlxdiff.run.options import DType, File, Flag, Place, Positive, Quantization, Scale, Text, Whole
from mlxdiff.run.table import Options, option
from mlxdiff.training.data_buckets import CROPS
from mlxdiff.training.process import PREDICTIONS

SECTIONS = (
    "Model",
    "Data",
    "LoRA",
    "Distillation",
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

OPTIMIZERS = ("adamw", "adafactor", "prodigy")
RATE_SCHEDULES = ("constant", "linear", "cosine")

DEFAULT_RATES = {"adamw": 1e-4, "adafactor": 1e-4, "prodigy": 1.0}
"""Learning rates where none is given. Prodigy finds its own; its rate is a factor of that."""

TARGETS = ("attention", "transformer", "all")
FORMS = ("diffusers", "kohya", "both")
SOLVERS = ("ddim", "dpm-solver")

WORD_FORMS = ("diffusers", "a1111")
BETAS: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "scaled-linear": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
"""Noise schedules of new models: Ho et al. 2020, Rombach et al. 2022, Nichol and Dhariwal 2021."""


@dataclass(frozen=True)
class Square(values.Numbers):
    """Two numbers; one stands for both."""

    def accept(self, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            value = (value, value)
        return super().accept(value)

    def parse(self, word: str) -> Any:
        return super().parse(f"{word}x{word}" if word.isdecimal() else word)


@dataclass(frozen=True)
class Channels(values.Anything):
    """Channels of each level of a network, such as 64,128,128."""

    expected = "one to six whole numbers of at least 4, such as 64,128,128"
    metavar = "N,N,..."

    def accept(self, value: Any) -> Any:
        fits = isinstance(value, (tuple, list)) and 1 <= len(value) <= 6
        if not fits or not all(type(one) is int and 4 <= one <= 8192 for one in value):
            raise values.Unfit(value, self.expected)
        return tuple(value)

    def parse(self, word: str) -> Any:
        try:
            return self.accept([int(part) for part in word.split(",")])
        except ValueError:
            raise values.Unfit(word, self.expected) from None


Rate = Annotated[float, values.Number(above=0, words="a number above 0, such as 1e-4")]
Share = Annotated[float, values.Number(least=0, most=1)]
Above = Annotated[float, values.Number(above=0)]
Optimizer = Annotated[str, values.Choice(OPTIMIZERS)]
Schedule = Annotated[str, values.Choice(RATE_SCHEDULES)]
Targets = Annotated[str, values.Choice(TARGETS)]
Form = Annotated[str, values.Choice(FORMS)]
Crop = Annotated[str, values.Choice(CROPS)]
Size = Annotated[tuple[int, int], Square("WxH", values.Whole(least=8))]
Levels = Annotated[tuple[int, ...], Channels()]
Noise = Annotated[str, values.Choice(tuple(BETAS))]
Prediction = Annotated[str, values.Choice(PREDICTIONS)]
WordForm = Annotated[str, values.Choice(WORD_FORMS)]
Prompts = Annotated[str | Sequence[str], values.Each(values.Text())]

_model = partial(option, section="Model", key=None)
_data = partial(option, section="Data", key=None)
_training = partial(option, section="Training", key=None)
_loss = partial(option, section="Loss", key=None)
_machine = partial(option, section="Machine", key=None)
_checks = partial(option, section="Checks", key=None)
_output = partial(option, section="Output", key=None)
_lora = partial(option, section="LoRA", key=None)
_distil = partial(option, section="Distillation", key=None)
_word = partial(option, section="Word", key=None)
_control = partial(option, section="ControlNet", key=None)
_network = partial(option, section="Network", key=None)


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
        "--resume",
        default=False,
        help="Go on from the last saved state; start where there is none.",
    )
    force: Flag = _output("--force", default=False, help="Replace what is there.")
    output: File | None = _output(
        "-o",
        "--output",
        metavar="OUT",
        help="What to write. State, log and plot go into the folder OUT-training beside it. "
        "Default: named after FOLDER.",
    )


@dataclass(frozen=True, kw_only=True)
class PictureOptions(Options):
    """What is done with every picture."""

    crop: Crop = _data(
        "--crop",
        default="center",
        help="Where a picture is cut that is wider or taller: center (default) or random.",
    )
    flip: Flag = _data("--flip", default=False, help="Mirror half of the pictures.")
    skip_faulty: Flag = _data(
        "--skip-faulty", default=False, help="Leave out pictures that cannot be used."
    )


@dataclass(frozen=True, kw_only=True)
class DataOptions(PictureOptions):
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
    cache: File | None = _data(
        "--cache",
        metavar="FOLDER",
        help="Where encoded pictures and captions are kept. Default: in OUT-training.",
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
class RankOptions(Options):
    """The changes of a LoRA, and its file."""

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
class LoraOptions(RankOptions):
    """Options of ``mlxdiff train lora`` alone."""

    text_encoder: Flag = _lora(
        "--text-encoder", default=False, help="Train the text encoders, too."
    )


@dataclass(frozen=True)
class Scales(values.Anything):
    """A guidance scale, or the range of scales that one is drawn from."""

    expected = "a number of at least 1, or two as LOW,HIGH"
    metavar = "SCALE or LOW,HIGH"

    def accept(self, value: Any) -> Any:
        found = (value, value) if isinstance(value, (int, float)) else value
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            raise values.Unfit(value, self.expected)
        number = values.Number(least=1)
        try:
            low, high = (number.accept(one) for one in found)
        except values.Unfit:
            raise values.Unfit(value, self.expected) from None
        if high < low:
            raise values.Unfit(value, self.expected)
        return float(low), float(high)

    def parse(self, word: str) -> Any:
        try:
            found = [float(part) for part in word.split(",")]
        except ValueError:
            raise values.Unfit(word, self.expected) from None
        return self.accept(found * 2 if len(found) == 1 else found)


@dataclass(frozen=True, kw_only=True)
class DistillOptions(Options):
    """Options of ``mlxdiff train distill`` alone: latent consistency (Luo et al. 2023)."""

    whole: Flag = _distil(
        "--whole",
        default=False,
        help="Train all weights, with the guidance scale as an input: a folder. Default: a LoRA.",
    )
    guidance: Annotated[tuple[float, float], Scales()] | None = _distil(
        "--guidance",
        help="Guidance scale of the teacher; with --whole a range, such as 3,15, that is learnt "
        "as a whole. Default: 7.5; with --whole 3,15.",
        elsewhere="w_min",
    )
    solver: Annotated[str, values.Choice(SOLVERS)] = _distil(
        "--solver",
        default="ddim",
        help="How the teacher goes a step: ddim (default), or dpm-solver: of second order, two "
        "evaluations.",
    )
    solver_steps: Annotated[int, values.Whole(least=2)] = _distil(
        "--solver-steps",
        default=50,
        metavar="N",
        help="Timesteps of the teacher; a step skips all between two of them. Default: 50.",
        elsewhere="num_ddim_timesteps",
    )
    huber: Above | None = _distil(
        "--huber",
        metavar="C",
        help="Where the pseudo-Huber loss turns from square to linear, such as 0.001. "
        "Default: the squared error.",
        elsewhere="huber_c",
    )


@dataclass(frozen=True, kw_only=True)
class TrainLoraOptions(LoraOptions, TrainOptions, PriorOptions, DataOptions, ModelOptions):
    """All options of ``mlxdiff train lora``."""

    taken_by: ClassVar[str] = "mlxdiff.training.train_lora"

    say: Callable[[str], None] | None = option(
        key=None, doc="called with lines about the progress."
    )


@dataclass(frozen=True, kw_only=True)
class WordOptions(Options):
    """Options of ``mlxdiff train embedding`` alone."""

    word: Text | None = _word(
        "--word",
        help="The word to teach, as prompts will have it, such as <robot>. It must be in every "
        "caption.",
        elsewhere="placeholder_token",
    )
    init_word: Text | None = _word(
        "--init-word",
        metavar="TEXT",
        help="Start from the meaning of this text, such as: toy. Default: from a random vector.",
        elsewhere="initializer_token",
    )
    vectors: Annotated[int, values.Whole(least=1, most=75)] = _word(
        "--vectors",
        default=1,
        metavar="N",
        help="Vectors that the word stands for: each takes a token of the prompt. Default: 1.",
        elsewhere="num_vectors",
    )
    form: WordForm = _word(
        "--form",
        default="diffusers",
        help="diffusers (default): the file holds the word. a1111: the file's name is the word.",
    )


@dataclass(frozen=True, kw_only=True)
class ControlOptions(Options):
    """Options of ``mlxdiff train controlnet`` alone."""

    control: File | None = _control(
        "--control",
        help="Control images: made by edges, grey or tile; or metadata, those that metadata.jsonl "
        "names as conditioning_image; or a folder with a picture of the same name for each.",
        elsewhere="conditioning_data_dir",
    )


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(Options):
    """The new model of ``mlxdiff train unconditional``."""

    channels: Levels = _network(
        "--channels",
        default=(64, 128, 128),
        help="Channels of each level; each after the first has half the side of the one before. "
        "Default: 64,128,128.",
        elsewhere="block_out_channels",
    )
    layers: Annotated[int, values.Whole(least=1, most=8)] = _network(
        "--layers",
        default=2,
        help="Blocks of each level. Default: 2.",
        elsewhere="layers_per_block",
    )
    attention: Whole = _network(
        "--attention",
        default=16,
        metavar="SIDE",
        help="Self-attention at levels of this side, in pixels, or less. Default: 16.",
    )
    noise: Noise = _network(
        "--noise",
        default="linear",
        help="Noise schedule: linear (default, Ho et al.), scaled-linear (Stable Diffusion) or "
        "cosine (better for small pictures).",
        elsewhere="beta_schedule",
    )
    prediction_type: Prediction = _network(
        "--prediction-type",
        default="epsilon",
        help="What the network learns to predict: epsilon (default, the noise), v_prediction or "
        "sample.",
    )
    classes: Flag = _network(
        "--classes", default=False, help="Each sub-folder is a class; draw one with --label."
    )


@dataclass(frozen=True, kw_only=True)
class PixelOptions(PictureOptions):
    """The pictures of ``mlxdiff train unconditional``."""

    resolution: Size | None = _data(
        "--resolution",
        metavar="WxH",
        help="Size of the model's pictures, as WIDTHxHEIGHT or one number. Default: 64.",
    )


@dataclass(frozen=True, kw_only=True)
class TrainEmbeddingOptions(WordOptions, TrainOptions, DataOptions, ModelOptions):
    """All options of ``mlxdiff train embedding``."""

    taken_by: ClassVar[str] = "mlxdiff.training.train_embedding"

    say: Callable[[str], None] | None = option(
        key=None, doc="called with lines about the progress."
    )


@dataclass(frozen=True, kw_only=True)
class TrainControlNetOptions(ControlOptions, TrainOptions, DataOptions, ModelOptions):
    """All options of ``mlxdiff train controlnet``."""

    taken_by: ClassVar[str] = "mlxdiff.training.train_controlnet"

    say: Callable[[str], None] | None = option(
        key=None, doc="called with lines about the progress."
    )


@dataclass(frozen=True, kw_only=True)
class TrainFinetuneOptions(TrainOptions, DataOptions, ModelOptions):
    """All options of ``mlxdiff train finetune``."""

    taken_by: ClassVar[str] = "mlxdiff.training.train_finetune"

    say: Callable[[str], None] | None = option(
        key=None, doc="called with lines about the progress."
    )


@dataclass(frozen=True, kw_only=True)
class TrainUnconditionalOptions(NetworkOptions, TrainOptions, PixelOptions):
    """All options of ``mlxdiff train unconditional``."""

    taken_by: ClassVar[str] = "mlxdiff.training.train_unconditional"

    say: Callable[[str], None] | None = option(
        key=None, doc="called with lines about the progress."
    )


@dataclass(frozen=True, kw_only=True)
class TrainDistillOptions(DistillOptions, RankOptions, TrainOptions, DataOptions, ModelOptions):
    """All options of ``mlxdiff train distill``."""

    taken_by: ClassVar[str] = "mlxdiff.training.train_distill"

    say: Callable[[str], None] | None = option(
        key=None, doc="called with lines about the progress."
    )
