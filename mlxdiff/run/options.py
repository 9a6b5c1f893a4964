# ruff: noqa: RUF009 - `option` returns dataclasses.field(...), which is what a field is made by.
"""Every option of ``mlxdiff generate``, once: of a run, of loading, of output.

From these tables come the options and the ``--help`` of the command line, the signatures and
docstrings of ``Pipeline.generate`` and ``mlxdiff.load``, the checks of single values, and what
``--from-image`` reads back from a picture. To add an option: one entry here, and its use. Rules
that join several options are in ``settings``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import numpy as np

from mlxdiff import samplers
from mlxdiff.adapters.lora import Lora
from mlxdiff.adapters.textual_inversion import TextualInversion
from mlxdiff.convert.singlefile import PREDICTIONS
from mlxdiff.noise import SEEDS, SOURCES
from mlxdiff.pictures.control_modes import MODES
from mlxdiff.pictures.hires import UPSCALERS
from mlxdiff.pictures.maps import DEPTH_FORMS
from mlxdiff.pictures.preprocess import MAPS, PREPROCESSORS
from mlxdiff.run import composition, values
from mlxdiff.run.progress import Cancel, Progress
from mlxdiff.run.table import Options, option
from mlxdiff.samplers import guiders
from mlxdiff.text.prompt import SYNTAXES
from mlxdiff.weights.quantization import AFFINE_BITS, FLOAT_MODES

SECTIONS = (
    "Prompt",
    "Model",
    "Picture",
    "From a picture",
    "Hires pass",
    "Control",
    "Video",
    "SDXL",
    "Machine",
    "Many pictures",
    "Output",
)
"""Titles in ``--help``, in order."""

BACKENDS = ("auto", "mlx", "numpy")
DTYPES = ("auto", "float32", "float16", "bfloat16")
SEED_ORDERS = ("diffusers", "a1111")

# Types of values: what a type checker sees, and the kind that checks a value at run time.
PathLike = str | os.PathLike[str]
Text = Annotated[str, values.Text()]
Flag = Annotated[bool, values.Flag()]
File = Annotated[str, values.File()]
Place = Annotated[PathLike, values.Place()]
Model = Annotated[Any, values.Place(or_pipeline=True)]
Places = Annotated[PathLike | Sequence[PathLike], values.Each(values.Place())]
Whole = Annotated[int, values.Whole()]
Seed = Annotated[
    int,
    values.Whole(
        SEEDS.start, SEEDS.stop - 1, words="a whole number, -2**63 to 2**64 - 1, as torch takes it"
    ),
]
Positive = Annotated[int, values.Whole(least=1)]
Count = Annotated[int, values.Whole(1, 100_000)]  # each takes memory before the first is drawn
Scale = Annotated[float, values.Number(least=0)]
Share = Annotated[float, values.Number(least=0, most=1)]
Bound = Annotated[float, values.Number(least=1)]
Size = Annotated[tuple[int, int], values.Numbers("HxW", values.Whole(least=0))]
Frames = Annotated[int, values.Whole(1, 1024)]
Fps = Annotated[float, values.Number(least=0.1, most=100)]
Quality = Annotated[int, values.Whole(1, 100)]
Words = Annotated[Sequence[str], values.Each(values.Text())]
ProgressForm = Annotated[str, values.Choice(("bar", "none", "json"))]
Point = Annotated[tuple[int, int], values.Numbers("Y,X", values.Whole())]
Interval = Annotated[tuple[float, float], values.Numbers("START,END", values.Number(0, 1))]
Borders = Annotated[
    tuple[int, int, int, int], values.Numbers("LEFT,TOP,RIGHT,BOTTOM", values.Whole(least=0))
]
Sampler = Annotated[
    str,
    values.Choice(
        samplers.NAMES,
        hint=". DPM adaptive finds its steps on the way, and a run here is planned before it "
        "starts: take dpmpp-2m with 30 steps",
        spelled=samplers.spelled,
    ),
]
Schedule = Annotated[str, values.Choice(samplers.SCHEDULES, spelled=samplers.find_schedule)]
Sigmas = Annotated[tuple[float, ...], values.NumberList(values.Number(least=0))]
Guider = Annotated[str, values.Worded(guiders.parse, tuple(guiders.GUIDERS))]
FreeU = Annotated[
    tuple[float, float, float, float], values.Numbers("B1,B2,S1,S2", values.Number(least=0))
]
Edges = Annotated[str, values.Choice(("x", "y", "xy"))]
Regions = Annotated[
    str | Sequence[str], values.Each(values.Worded(composition.parse, (), "AREA:PROMPT"))
]
Relative = Annotated[float, values.Number(above=0)]
Views = Annotated[int, values.Whole(2, 360)]
Degrees = Annotated[float, values.Number(least=-360, most=360)]
Relation = Annotated[float, values.Number()]
StepNoise = Annotated[str, values.Choice(("independent", "brownian"))]
Syntax = Annotated[str, values.Choice(SYNTAXES)]
Upscaler = Annotated[PathLike, values.NameOrPlace(names=UPSCALERS)]
Backend = Annotated[str, values.Choice(BACKENDS)]
DType = Annotated[str, values.Choice(DTYPES)]
PredictionType = Annotated[str, values.Choice(PREDICTIONS)]
Quantization = Annotated[int | str, values.Bits((*map(str, AFFINE_BITS), *FLOAT_MODES))]
Enlargement = Annotated[float, values.Number(above=1)]
Gigabytes = Annotated[float, values.Number(above=0, words="gigabytes, such as 4 or 6.5")]
Aspect = Annotated[tuple[int, int], values.Ratio(most=100)]
Variation = Annotated[tuple[int, float], values.SeedAndShare()]
NoiseSource = Annotated[str, values.Choice(tuple(SOURCES))]
SeedOrder = Annotated[str, values.Choice(SEED_ORDERS)]
Ensemble = Annotated[int, values.Whole(1, 100)]
DepthForm = Annotated[str, values.Choice(DEPTH_FORMS)]
Picture = Annotated[Any, values.Picture()]
Footage = Annotated[Any, values.Footage()]
# One value, or one for each ControlNet or IP-Adapter.
Pictures = Annotated[Any, values.Each(values.Picture())]
Scales = Annotated[float | Sequence[float], values.Each(values.Number())]
Shares = Annotated[float | Sequence[float], values.Each(values.Number(0, 1))]
Preprocessors = Annotated[
    str | Sequence[str],
    values.Each(
        values.Choice(
            (*PREPROCESSORS, *MAPS),
            hint=". For another kind of ControlNet give a picture that is already made for it",
        )
    ),
]
Modes = Annotated[str | Sequence[str], values.Each(values.Choice(MODES))]
Loras = Annotated[
    Iterable[PathLike | tuple[PathLike, float | tuple[float, float]] | Lora],
    values.Files("PATH[:SCALE]", Lora),
]
Embeddings = Annotated[
    Iterable[PathLike | tuple[PathLike, str | None] | TextualInversion],
    values.Files("PATH[:WORD]", TextualInversion),
]

_prompt = partial(option, section="Prompt", part="prompt")
_picture = partial(option, section="Picture")
_image = partial(option, section="From a picture", part="image")
_hires = partial(option, section="Hires pass", part="hires")
_upscaler = partial(option, section="Hires pass", part="upscaler")
_control = partial(option, section="Control", part="controlnet")
_shown = partial(option, section="Control", part="ip_adapter")
_sdxl = partial(option, section="SDXL", part="sdxl")
_video = partial(option, section="Video", part="video")
_animation = partial(option, section="Video", part="animation")


@dataclass(frozen=True)
class ValueOptions(Options):
    """Options of a run that are plain values. ``Settings`` has the same ones, filled in."""

    prompt: Text | None = _prompt(
        "-p",
        "--prompt",
        help="What to draw, in place of PROMPT; may be empty.",
        doc="what to draw; may be empty. None for a model without text.",
    )
    _: KW_ONLY
    negative_prompt: Text | None = _prompt(
        "-n", "--negative-prompt", help="What not to draw.", elsewhere="negative neg_prompt"
    )
    prompt_2: Text | None = _prompt(
        "--prompt-2",
        part="prompt_2",
        help="SDXL: prompt for the second text encoder. Default: the same prompt.",
    )
    negative_prompt_2: Text | None = _prompt(
        "--negative-prompt-2",
        part="prompt_2",
        help="SDXL: negative prompt for the second text encoder. Default: the same one.",
    )
    prompt_syntax: Syntax = _prompt(
        "--prompt-syntax",
        default="plain",
        help="plain (default): as diffusers reads prompts, cut at 77 tokens. "
        "a1111: (word:1.2), [word], BREAK, prompts that change, prompts of any length.",
    )
    clip_skip: Whole | None = _prompt(
        "--clip-skip",
        help="Skip this many layers at the end of the text encoders; A1111 counts one more.",
        elsewhere="clip_stop_at_last_layers CLIP_stop_at_last_layers",
    )
    region: Regions | None = _prompt(
        "--region",
        metavar="AREA:PROMPT",
        help="Another prompt for a part of the picture: LEFT,TOP,RIGHT,BOTTOM:PROMPT with shares "
        "of it, such as 0,0,0.5,1:a red house, or MASK.png:PROMPT. May be given several times.",
        doc='other prompts for parts of the picture, "0,0,0.5,1:a red house" or '
        '"mask.png:a red house": one or a list. AREA*WEIGHT counts more where they overlap.',
    )
    label: Whole | None = _prompt(
        "--label",
        part="label",
        help="For a model without text that has classes: the class to draw, from 0.",
        elsewhere="class_labels class_label",
    )
    width: Whole | None = _picture(
        "-W",
        "--width",
        help="Width in pixels. Default: that of --image, or the model's own.",
        doc="pixels, a multiple of the VAE factor. None: that of the image, rounded down (four "
        "times that for an upscaler), else the model's own.",
    )
    height: Whole | None = _picture(
        "-H",
        "--height",
        help="Height in pixels. Default: that of --image, or the model's own.",
        doc="as width.",
    )
    steps: Positive | None = _picture(
        "--steps",
        help="Number of sampling steps. Default: 20; 4 for models distilled to need few "
        "(LCM, Turbo).",
        doc="number of sampling steps from pure noise; a run from an image does the last of them. "
        "None: 20; 4 for a model distilled to need few; for a model without text 1000 with ddpm, "
        "else 50.",
        elsewhere="num_inference_steps sampling_steps num_steps sample_steps",
    )
    guidance: Scale | None = _picture(
        "-g",
        "--guidance",
        "--cfg-scale",
        part="text",
        help="Classifier-free guidance scale; 1 and below: no guidance. "
        "Default: 7.5, SDXL 5, LCM 8.5, x4 upscaler 9, Turbo 0.",
        doc="classifier-free guidance scale; 1 and below: no guidance. None: the default of the "
        "reference pipeline.",
        elsewhere="guidance_scale cfg_scale cfg scale",
    )
    guidance_rescale: Share = _picture(
        "--guidance-rescale",
        default=0.0,
        part="text",
        help="Rescale the guided prediction, 0 (default) to 1 (Lin et al. 2023, section 3.4).",
    )
    guidance_interval: Interval | None = _picture(
        "--guidance-interval",
        part="text",
        help="Use guidance only between these shares of the run, 0 to 1. "
        "A step without guidance costs half.",
        doc="(start, end): use guidance only between these shares of the run, 0 to 1 (with a "
        "refiner, of the part of each model). An evaluation without guidance costs half.",
    )
    guider: Guider | None = _picture(
        "--guider",
        part="text",
        metavar="NAME[:KEY=VALUE,...]",
        help="Guide in another way (docs/guidance.md): apg, cfg-zero, mimic; or with a weakened "
        "network beside the guidance: pag, seg, slg. Such as pag:scale=3,layers=mid.",
        doc="another way of guidance, see ``mlxdiff.samplers.guiders``, with its numbers: "
        '"pag:scale=3,layers=mid". None: classifier-free guidance alone.',
    )
    freeu: FreeU | None = _picture(
        "--freeu",
        part="text",
        help="FreeU: factors of the two lowest up blocks' backbone and skips, such as "
        "1.5,1.6,0.9,0.2 (SD 1.5) or 1.3,1.4,0.9,0.2 (SDXL).",
        doc="(b1, b2, s1, s2): FreeU's factors of the backbone and of the skips in the two lowest "
        "up blocks. None: off.",
    )
    seamless: Edges | None = _picture(
        "--seamless",
        part="text",
        help="Draw a picture whose edges meet when copies lie side by side: x, y or xy.",
        doc="edges that meet when copies of the picture lie side by side: x (left and right), y "
        "(top and bottom), xy. None: none.",
        elsewhere="tiling tile",
    )
    feature_reuse: Positive | None = _picture(
        "--feature-reuse",
        part="text",
        metavar="N",
        help="Run the whole U-Net only in every Nth evaluation: faster, less exact. Default: 1.",
        doc="run the whole U-Net only in every Nth evaluation; in those between, run its last "
        "layer on the deep features of the last whole one. 1: always run all of it.",
    )
    feature_reuse_error: Relative | None = _picture(
        "--feature-reuse-error",
        part="text",
        metavar="E",
        help="Run the whole U-Net only where older deep features would change its output by more "
        "than this, measured on the way: 0.05, for example. Says what it skipped.",
        doc="run the whole U-Net only where older deep features would change its output, after "
        "guidance, by more than this share, as measured on the way. None: always run all of it.",
    )
    sampler: Sampler = _picture(
        "--sampler",
        default="auto",
        help="Sampler (docs/samplers.md); A1111's and diffusers' names are understood. "
        "Default: auto.",
        doc="see ``mlxdiff.samplers``; A1111's and diffusers' names are understood.",
        elsewhere="sampler_name sampling_method sampler_index",
    )
    schedule: Schedule = _picture(
        "--schedule",
        default="auto",
        help="Noise schedule (docs/samplers.md). Default: auto.",
        doc="see ``mlxdiff.samplers``.",
        elsewhere="scheduler scheduler_name schedule_type",
    )
    sigmas: Sigmas | None = _picture(
        "--sigmas",
        help="Noise levels of the steps in place of a schedule: Karras' sigma, falling, such as "
        "14.6,7.5,4.7,2.2,0.8.",
        doc="the noise levels of the steps in place of a schedule: Karras' sigma, falling; a 0 at "
        "the end is left out. None: the schedule says them.",
        elsewhere="sigma_list",
    )
    step_noise: StepNoise | None = _picture(
        "--step-noise",
        help="Noise of stochastic steps: independent, or brownian as k-diffusion's SDE samplers "
        "draw it. Default: brownian for dpmpp-sde and dpmpp-3m-sde, else independent.",
        doc="noise of stochastic steps: independent, or the increments of one Brownian motion, as "
        "k-diffusion's SDE samplers draw it. None: brownian for dpmpp-sde and dpmpp-3m-sde.",
    )
    eta: Share | None = _picture(
        "--eta", help="Share of fresh noise, 0 (default) to 1; samplers ddim and tcd."
    )
    vary: Variation | None = _picture(
        "--vary",
        help="Go this far (0 to 1) from the seed's noise to that of another seed: A1111's "
        "variation seed. --count then counts the other seed on.",
        doc="(seed, strength): go this far, 0 to 1, from the first noise of the seed to that of "
        "this one, on a sphere; A1111's variation seed. With a count, this seed counts on and the "
        "other one stays.",
        elsewhere="subseed subseed_strength variation_seed variation_seed_strength",
    )
    noise_size: Size | None = _picture(
        "--noise-size",
        help="First noise of a picture of this size, in the middle of new noise: A1111's \"Resize "
        'seed from".',
        doc="(height, width): take the first noise of a picture of this size, in the middle of new "
        'noise; A1111\'s "Resize seed from".',
        elsewhere="seed_resize_from_h seed_resize_from_w",
    )
    rng: NoiseSource = _picture(
        "--rng",
        default="cpu",
        help="What draws the noise: cpu (default) and gpu as torch does there, or numpy.",
        doc='what draws the noise: "cpu" or "gpu", as torch does there, or "numpy".',
        elsewhere="randn_source rand_device",
    )
    sampler_rng: NoiseSource | None = _picture(
        "--sampler-rng",
        metavar="NAME",
        help="What draws the noise of the steps. Default: --rng.",
        doc="what draws the noise of the steps; None: rng.",
    )
    noise_seed_delta: Whole = _picture(
        "--noise-seed-delta",
        default=0,
        help="Draw the noise of the steps from the seed plus this: A1111's ENSD. Default: 0, which "
        "goes on after the first noise.",
        doc="draw the noise of the steps from the seed plus this; A1111's ENSD. 0: go on after the "
        "first noise, where the same generator draws both.",
        elsewhere="eta_noise_seed_delta ensd",
    )
    seed_order: SeedOrder = _picture(
        "--seed-order",
        default="diffusers",
        help="diffusers (default): one stream for the image, the first noise and the steps. a1111: "
        "each pass begins with its noise, as in A1111 and ComfyUI; the image is encoded without "
        "any.",
    )
    dynamic_threshold: Share | None = _picture(
        "--dynamic-threshold",
        part="threshold",
        metavar="SHARE",
        help="For a model that draws pixels: in each step, bring this share of the predicted "
        "values within bounds (Imagen's dynamic thresholding; 0.995 as a rule).",
        elsewhere="dynamic_thresholding_ratio thresholding",
    )
    threshold_max: Bound | None = _picture(
        "--threshold-max",
        part="threshold",
        help="Largest threshold of --dynamic-threshold, at least 1. Default: no bound.",
        elsewhere="sample_max_value",
    )
    strength: Share | None = _image(
        "--strength",
        help="How far to go from the image, 0 to 1. Default: 0.8, SDXL 0.3, with a mask 1.",
        doc="how far to go from the image, 0 to 1. None: the default of the reference pipeline; "
        "with a mask 1, which begins with pure noise there.",
        elsewhere="denoising_strength image_strength denoise",
    )
    image_guidance: Scale | None = _image(
        "--image-guidance",
        part="edits",
        help="instruct-pix2pix: how closely to keep to the image. Below 1: no guidance at all. "
        "Default: 1.5.",
        elsewhere="image_guidance_scale image_cfg_scale",
    )
    noise_level: Whole | None = _image(
        "--noise-level",
        part="noised",
        help="x4 upscaler: noise added to the image first; higher values invent more detail. "
        "Default: 20. Stable unCLIP: noise added to the image's embedding; higher values stray "
        "farther. Default: 0.",
    )
    azimuth: Degrees | None = _image(
        "--azimuth",
        part="camera",
        metavar="DEGREES",
        help="Zero-1-to-3: go this far around the object, to the right. Default: 0.",
    )
    elevation: Degrees | None = _image(
        "--elevation",
        part="camera",
        metavar="DEGREES",
        help="Zero-1-to-3: go up this far. Default: 0.",
    )
    distance: Relation | None = _image(
        "--distance",
        part="camera",
        help="Zero-1-to-3: go away from the object (below 0: towards it), in units of the model, "
        "which was trained between -0.7 and 0.7. Default: 0.",
        doc="Zero-1-to-3: go away from the object (below 0: towards it), in units of the model, "
        "which was trained between -0.7 and 0.7.",
    )
    picture_elevation: Degrees | None = _image(
        "--picture-elevation",
        part="camera",
        metavar="DEGREES",
        help="Stable Zero123: elevation of the camera that took the image, which this model reads "
        "in place of a distance. Default: 0 for a model of that name.",
    )
    processing_resolution: Whole | None = _image(
        "--processing-resolution",
        part="maps",
        metavar="PIXELS",
        help="Marigold: longer side in which the picture is looked at; 0: its own. Default: as "
        "the model says.",
    )
    ensemble: Ensemble = _image(
        "--ensemble",
        default=1,
        part="maps",
        metavar="N",
        help="Marigold: join the maps of N seeds (docs/depth.md). Default: 1.",
        doc="number of maps, of consecutive seeds, that are joined to one.",
        elsewhere="ensemble_size",
    )
    depth_as: DepthForm | None = _image(
        "--depth-as",
        part="maps",
        metavar="FORM",
        help="Marigold's depth as 16 bits of grey (grey, default), the same with near bright "
        "(near: for --depth-image and ControlNets), or in colours (colors).",
        elsewhere="color_map",
    )
    outpaint: Borders | None = _image(
        "--outpaint",
        part="mask",
        help="With --image: pixels to add around it and to paint.",
        doc="(left, top, right, bottom): pixels to add around the image and to paint, beside what "
        "the mask says. The size is then that of the wider image, rounded down.",
    )
    paste_original: Flag = _image(
        "--paste-original",
        default=False,
        part="mask",
        help="With --mask or --outpaint: put the rest of the image back exactly as it was.",
    )
    upscaler_steps: Positive | None = _upscaler(
        "--upscaler-steps",
        help="For an --upscaler that is a model: its sampling steps. Default: 20.",
    )
    upscaler_guidance: Scale | None = _upscaler(
        "--upscaler-guidance",
        help="For an --upscaler that is a model: its guidance scale. Default: 9.",
    )
    upscaler_noise_level: Whole | None = _upscaler(
        "--upscaler-noise-level",
        help="For an --upscaler that is a model: noise added to the picture first; higher values "
        "invent more detail. Default: 20.",
    )
    only_masked: Whole | None = _image(
        "--only-masked",
        part="mask",
        metavar="PADDING",
        help="With --mask: cut out what is repainted with this many pixels around it, draw that at "
        "the full size, and put it back. The result has the size of the image.",
        elsewhere="padding_mask_crop inpaint_full_res_padding inpaint_full_res "
        "inpaint_only_masked mask_padding",
    )
    guess_mode: Flag = _control(
        "--guess-mode",
        default=False,
        help="Let ControlNets lead: with guidance, they act only on the prediction for the "
        "prompt, so that the picture follows them even where the prompt is empty.",
    )
    frames: Frames | None = _video(
        "--frames",
        metavar="N",
        help="Frames of the video. Default: with a motion adapter 16, or those of the --image; "
        "Stable Video Diffusion's own number.",
        doc="frames of the video. None: with a motion adapter 16, or those of the image; Stable "
        "Video Diffusion's own number.",
        elsewhere="num_frames video_frames video_length",
    )
    fps: Fps | None = _video(
        "--fps",
        metavar="N",
        help="Frames a second in the file. Default: with a motion adapter 8; 7 for Stable Video "
        "Diffusion, which reads the number.",
        doc="frames a second in the file. None: with a motion adapter 8; 7 for Stable Video "
        "Diffusion, which reads the number.",
        elsewhere="frame_rate framerate",
    )
    context_length: Positive | None = _video(
        "--context-length",
        metavar="N",
        help="With more frames than this, the motion modules see so many at a time (FreeNoise). "
        "Default: 16.",
        doc="with more frames than this, the motion modules see so many at a time (FreeNoise). "
        "None: 16.",
    )
    context_stride: Positive | None = _video(
        "--context-stride",
        metavar="N",
        help="Frames from the start of one such window to that of the next. Default: 4.",
        doc="frames from the start of one such window to that of the next. None: 4.",
    )
    min_guidance: Scale | None = _animation(
        "--min-guidance",
        help="Stable Video Diffusion: guidance scale of the first frame; --guidance is that of the "
        "last. Default: 1.",
        elsewhere="min_guidance_scale",
    )
    motion_bucket: Whole | None = _animation(
        "--motion-bucket",
        help="Stable Video Diffusion: how much moves. Default: 127.",
        elsewhere="motion_bucket_id",
    )
    noise_augmentation: Scale | None = _animation(
        "--noise-augmentation",
        help="Stable Video Diffusion: noise added to the image first; more of it, more motion. "
        "Default: 0.02.",
        elsewhere="noise_aug_strength augmentation_level",
    )
    decode_chunk: Positive | None = _animation(
        "--decode-chunk",
        metavar="N",
        help="Stable Video Diffusion: decode so many frames at a time: less memory, and frames "
        "that fit each other less. Default: all.",
        elsewhere="decode_chunk_size",
    )
    denoising_end: Share | None = _sdxl(
        "--denoising-end",
        help="Stop after this share of the run, or hand over to the refiner there (default: 0.8).",
    )
    denoising_start: Share | None = _sdxl(
        "--denoising-start",
        help="With a refiner: where it begins (default: --denoising-end). Without one: treat the "
        "image as already denoised to this point, and add no noise.",
    )
    aesthetic_score: Scale | None = _sdxl(
        "--aesthetic-score",
        part="aesthetic_score",
        help="For the refiner: score of the prompt. Default: 6.",
    )
    negative_aesthetic_score: Scale | None = _sdxl(
        "--negative-aesthetic-score",
        part="aesthetic_score",
        help="For the refiner: score of the negative prompt. Default: 2.5.",
    )
    original_size: Size | None = _sdxl(
        "--original-size",
        help="Micro-conditioning: size of the original. Default: the size of the picture.",
        doc="(height, width), micro-conditioning. None: the size of the picture.",
    )
    target_size: Size | None = _sdxl(
        "--target-size",
        part="target_size",
        help="Micro-conditioning: size that is wanted. Default: the size of the picture.",
        doc="(height, width), micro-conditioning. None: the size of the picture.",
    )
    crop: Point | None = _sdxl(
        "--crop",
        help="Micro-conditioning: upper left corner of the crop. Default: 0,0.",
        doc="(y, x), micro-conditioning: upper left corner of the crop. None: (0, 0).",
        elsewhere="crops_coords_top_left",
    )


@dataclass(frozen=True, kw_only=True)
class FileOptions(Options):
    """Options of a run that ``settings`` opens or joins: pictures, and what belongs to them."""

    image: Footage | None = _image(
        "-i",
        "--image",
        help="Picture to start from; it is resized. A folder: each picture in it. With a motion "
        "adapter a video: a GIF, WebP, APNG or MP4, or a folder of frames.",
        doc="picture to start from: path, Pillow image or array; it is resized. With a motion "
        "adapter a video: a file, a folder of frames, a list of pictures or an array (F, H, W, 3).",
        elsewhere="init_image image_path init_img input_image",
    )
    aspect: Aspect | None = _picture(
        "--aspect",
        key=None,
        metavar="W:H",
        help="Shape of the picture, such as 16:9: the nearest size that such models are trained "
        "for, in place of --width and --height.",
        doc="(width, height), a shape such as (16, 9): the nearest size that such models are "
        "trained for, in place of width and height.",
        elsewhere="aspect_ratio ar",
    )
    mask: Picture | None = _image(
        "--mask",
        part="mask",
        help="With --image: what to repaint, in white; it is resized.",
        doc="what to repaint, in white: path, Pillow image or array; resized, made grey, cut at "
        "one half. The size of the picture is then the model's own unless given.",
        elsewhere="mask_image masked_image_path mask_path",
    )
    depth_image: Picture | None = _image(
        "--depth-image",
        part="depth",
        help="stable-diffusion-2-depth: depth map of --image, near is bright; 8 or 16 bits of grey "
        "(docs/depth.md).",
        doc="depth map of the image for a model that sees one, near is bright: path, Pillow image "
        "or array (H, W) of any numbers; only their differences count.",
        elsewhere="depth_map depth_mask",
    )
    zoom_out: Enlargement | None = _image(
        "--zoom-out",
        part="mask",
        metavar="FACTOR",
        help="With --image: make the picture smaller by this factor, and paint around it. The "
        "result has the size of the image.",
        elsewhere="zoom",
    )
    style: Text | None = _prompt(
        "--style",
        key=None,
        metavar="NAME",
        help="Put the prompt into a style (docs/upscaling.md); several with commas.",
        doc="names of styles, with commas between them, that the prompt is put into "
        "(``mlxdiff.text.styles``).",
        elsewhere="styles style_preset stylize",
    )
    hires: Enlargement | None = _hires(
        "--hires",
        metavar="SCALE",
        help="Enlarge the finished picture this many times, and draw over it at that size.",
        elsewhere="hr_scale hires_scale enable_hr hr_upscale",
    )
    hires_upscaler: Upscaler | None = _hires(
        "--hires-upscaler",
        metavar="NAME",
        help="How to enlarge: the picture (lanczos, default), its latents (latent-nearest, "
        "latent-bilinear), or the picture by a network: the file of an ESRGAN or Real-ESRGAN.",
        elsewhere="hr_upscaler",
    )
    hires_strength: Share | None = _hires(
        "--hires-strength", help="How far to go from the enlarged picture, 0 to 1. Default: 0.5."
    )
    hires_steps: Positive | None = _hires(
        "--hires-steps",
        metavar="N",
        help="Steps of the second pass. Default: --steps times --hires-strength.",
        elsewhere="hr_second_pass_steps",
    )
    control_image: Pictures | None = _control(
        "--control-image",
        help="Picture for a ControlNet or T2I-Adapter; it is resized. Give one for each, those of "
        "ControlNets first. With a motion adapter it may be a video.",
        doc="picture for a ControlNet or T2I-Adapter, resized: path, Pillow image or array; for "
        "several a list, one for each, those of ControlNets first. With a motion adapter each may "
        "be a video: a file, a folder of frames or an array (F, H, W, 3).",
        elsewhere="controlnet_image control_image_path controlnet_image_path",
    )
    control_scale: Scales | None = _control(
        "--control-scale",
        help="How strongly a ControlNet or T2I-Adapter counts; one for all or one for each. "
        "Default: 1.",
        elsewhere="controlnet_conditioning_scale controlnet_strength control_strength "
        "adapter_conditioning_scale",
    )
    control_start: Shares | None = _control(
        "--control-start",
        help="Share of the run at which a ControlNet or T2I-Adapter begins; one for all or one for "
        "each. Default: 0.",
        elsewhere="control_guidance_start",
    )
    control_end: Shares | None = _control(
        "--control-end",
        help="Share of the run at which a ControlNet or T2I-Adapter ends; one for all or one for "
        "each. Default: 1.",
        elsewhere="control_guidance_end adapter_conditioning_factor",
    )
    control_preprocess: Preprocessors | None = _control(
        "--control-preprocess",
        metavar="NAME",
        help="What to make of its picture first: none (default), edges, grey, tile; depth or "
        "normal with a --map-model; one for all or one for each.",
    )
    control_mode: Modes | None = _control(
        "--control-mode",
        metavar="NAME",
        help="Type of its picture, for a ControlNet-Union: openpose, depth, sketch, canny (also "
        "line art), normal, segment, tile or repaint; one for all or one for each.",
        elsewhere="control_type",
    )
    ip_image: Pictures | None = _shown(
        "--ip-image",
        help="Picture for an IP-Adapter to follow. Give one for each --ip-adapter, or several "
        "for one.",
        doc="picture for an IP-Adapter to follow: path, Pillow image or array; with one adapter "
        "also a list of pictures to see together; with several adapters a list, one for each.",
        elsewhere="ip_adapter_image",
    )
    ip_scale: Scales | None = _shown(
        "--ip-scale",
        help="How strongly an IP-Adapter counts; one for all or one for each. Default: 1.",
        elsewhere="ip_adapter_scale",
    )


@dataclass(frozen=True, kw_only=True)
class SeedOptions(Options):
    """Options of a run that say which pictures of its kind to draw."""

    seed: Seed | None = _picture(
        "-s",
        "--seed",
        help="Seed, as torch takes it. Default: random, printed.",
        doc="seed, as torch takes it; picture i has seed + i. None: random.",
        elsewhere="generator manual_seed",
    )
    count: Count = _picture(
        "-b",
        "--count",
        default=1,
        key=None,
        metavar="N",
        help="Pictures for each prompt, with seeds s, s+1, ... Default: 1.",
        doc="number of pictures.",
        elsewhere="num_images_per_prompt batch_size n_iter batch_count num_images n",
    )
    variations: Count | None = _image(
        "--variations",
        part="variations",
        key=None,
        metavar="N",
        help="Stable unCLIP, image variations: draw N variations of the image; the same as "
        "--count N.",
        doc="number of variations of the image; the same as count, for a model that a picture "
        "leads.",
    )
    best_of: Positive = _picture(
        "--best-of",
        default=1,
        part="judge",
        key=None,
        metavar="N",
        help="Draw N pictures for each one, and keep the one that the --judge scores highest.",
        doc="draw so many pictures for each one, and keep the one that the judge scores highest. "
        "Picture i is the best of the seeds from seed + i * best_of on; its metadata name all.",
    )
    noise: np.ndarray | None = option(
        key=None,
        doc="(count, H/f, W/f, C) float32, standard normal, in place of the first noise that the "
        "seed gives.",
        elsewhere="latents",
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions(SeedOptions, FileOptions, ValueOptions):
    """All options of a run. A number of variations is the number of pictures."""

    taken_by: ClassVar[str] = "Pipeline.stream"

    def __post_init__(self) -> None:
        if self.variations is not None and self.count == 1:
            object.__setattr__(self, "count", self.variations)


@dataclass(frozen=True, kw_only=True)
class StreamOptions(RunOptions):
    """All options of a run, and who watches and stops it."""

    taken_by: ClassVar[str] = "Pipeline.stream"

    on_progress: Callable[[Progress], object] | None = option(
        key=None,
        doc="called with a ``mlxdiff.Progress`` when a stage begins and after each step.",
        elsewhere="progress_callback",
    )
    cancel: Cancel | None = option(
        key=None,
        doc="a ``mlxdiff.Cancel``, which stops the run from another thread: it raises "
        "``mlxdiff.Cancelled``.",
    )


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(StreamOptions):
    """All options of a run, and who is called in it."""

    taken_by: ClassVar[str] = "Pipeline.generate"

    on_step: Callable[[Any], object] | None = option(
        key=None,
        doc="called with each Step.",
        elsewhere="callback callback_on_step_end step_callback",
    )


_model = partial(option, section="Model", key=None)
_machine = partial(option, section="Machine", key=None)


@dataclass(frozen=True)
class LoadOptions(Options):
    """Options of loading: the model, what is added to it, and what computes."""

    taken_by: ClassVar[str] = "mlxdiff.load"

    model: Place | None = _model(
        "-m",
        "--model",
        key="model",
        help="Folder, single file, hub id org/name[@revision], or short name "
        "(see mlxdiff models --known). Default: the built-in model.",
        doc="a folder or file, a hub id ``org/name[@revision]`` or a short name (fetched and "
        "converted at first use, see ``mlxdiff.library``). None: the built-in model.",
        elsewhere="pretrained_model_name_or_path checkpoint model_path model_id sd_model",
    )
    _: KW_ONLY
    vae: Place | None = _model(
        "--vae",
        key="vae",
        part="vae",
        help="Another VAE or a TAESD: its folder, or a model to take it from.",
        doc="another VAE: the folder of an AutoencoderKL or an AutoencoderTiny (TAESD), or a "
        "model to take it from.",
    )
    refiner: Model | None = _model(
        "--refiner",
        key="refiner",
        part="refiner",
        metavar="PATH",
        help="SDXL: a model, as for -m, that draws the last part of the run.",
        doc="an SDXL model that draws the last part of the run: as for ``model``, or a Pipeline "
        "of the same backend and dtype.",
    )
    judge: Place | None = _model(
        "--judge",
        part="judge",
        help="Score each finished picture for its prompt: the folder or hub id of a CLIP "
        "(openai/clip-vit-large-patch14).",
        doc="a CLIP that scores each finished picture for its prompt: its folder or hub id.",
    )
    upscaler: Place | None = _model(
        "--upscaler",
        key="upscaler",
        part="upscaler",
        help="Enlarge each finished picture: the file of a network (ESRGAN, Real-ESRGAN), or an "
        "x4 upscaler, as for -m.",
        doc="what enlarges each finished picture: the file of a network (ESRGAN, Real-ESRGAN) or "
        "its hub id, or a model that enlarges, as for ``model``.",
        elsewhere="upscale_model postprocess_upscaler",
    )
    loras: Loras = _model(
        "--lora",
        default=(),
        key="loras",
        part="lora",
        help="A LoRA (or LoCon, LoHa, LoKr, DoRA): file, folder or hub id org/name[/FILE], and its "
        "scale (default: 1). Repeatable.",
        doc="files, folders or hub ids ``org/name[/FILE][@revision]`` that change the model's "
        "weights: each alone, or (path, scale).",
        elsewhere="lora lora_paths lora_weights",
    )
    fast: Flag = _model(
        "--fast",
        default=False,
        key="fast",
        part="lora",
        help="Draw in few steps: add the few-step LoRA of this kind of model, and take its "
        "sampler, steps and guidance (docs/models.md).",
        doc="draw in few steps: add the few-step LoRA of this kind of model, and take its "
        "sampler, steps and guidance as defaults.",
    )
    lora_folder: Place = _model(
        "--lora-folder",
        default=".",
        help="Where to look for the LoRAs that a prompt in a1111 syntax names "
        "(<lora:name:scale>). Default: here.",
        doc="where to look for the LoRAs that a prompt in a1111 syntax names "
        "(``<lora:name:0.8>``).",
    )
    style_file: Place | None = _model(
        "--style-file",
        part="prompt",
        metavar="FILE",
        help="Styles of one's own for --style: a TOML file.",
        doc="styles of one's own, a TOML file (``mlxdiff.text.styles``).",
    )
    embeddings: Embeddings = _model(
        "--embedding",
        default=(),
        key="embeddings",
        part="embedding",
        help="A textual inversion and its word in the prompt (default: the word in the file, or "
        "the name of the file). Repeatable.",
        doc="textual inversions, words with vectors of their own: each a file or (file, word).",
        elsewhere="embedding textual_inversion textual_inversions",
    )
    controlnets: Places = _model(
        "--controlnet",
        default=(),
        key="controlnet",
        part="controlnet",
        help="A ControlNet: folder, file or hub id. Repeatable; give --control-image once for "
        "each.",
        doc="ControlNets made for this kind of model, each a folder, a file or a hub id; "
        "``generate`` then takes a control_image for each.",
        elsewhere="controlnet controlnet_path control_net",
    )
    motion_adapter: Place | None = _model(
        "--motion-adapter",
        key="motion_adapter",
        part="motion",
        help="Draw videos: a motion adapter (AnimateDiff): folder, file or hub id (docs/video.md).",
        doc="a motion adapter (AnimateDiff), with which the model draws videos: a folder, a file "
        "or a hub id.",
        elsewhere="motion_module motion_modules",
    )
    t2i_adapters: Places = _model(
        "--t2i-adapter",
        default=(),
        key="t2i_adapter",
        part="t2i_adapter",
        help="A T2I-Adapter: folder, file or hub id. Repeatable; give --control-image once for "
        "each, those of ControlNets first.",
        doc="T2I-Adapters made for this kind of model, each a folder, a file or a hub id; "
        "``generate`` then takes a control_image for each, after those of ControlNets.",
        elsewhere="t2i_adapter adapter",
    )
    map_models: Places = _model(
        "--map-model",
        default=(),
        key="map_model",
        part="controlnet",
        help="A Marigold model, as for -m, that makes the depth map or the normals of control "
        "pictures (--control-preprocess depth, normal). Repeatable.",
        doc="Marigold models, as for ``model``, that make the depth maps and normals of control "
        "pictures (``control_preprocess``).",
        elsewhere="map_model depth_model depth_estimator",
    )
    ip_adapters: Places = _model(
        "--ip-adapter",
        default=(),
        key="ip_adapter",
        part="ip_adapter",
        help="An IP-Adapter: a file, or the hub id of one. Repeatable; give --ip-image once for "
        "each.",
        doc="IP-Adapters made for this kind of model, each a file or the hub id of one; "
        "``generate`` then takes an ip_image for each.",
        elsewhere="ip_adapter",
    )
    image_encoder: Place | None = _model(
        "--image-encoder",
        key="image_encoder",
        part="ip_adapter",
        help="CLIP image encoder of the IP-Adapters: a folder or hub id. "
        "Default: image_encoder beside the file.",
        doc="the CLIP image encoder of all IP-Adapters, a folder or hub id. None: the folder "
        "image_encoder beside the file.",
    )
    quantize: Quantization | None = _model(
        "-q",
        "--quantize",
        key="quantize",
        help="Round weights to 2, 3, 4, 5, 6 or 8 bits, or to mxfp4, nvfp4 or mxfp8. "
        "Default: keep them as they are.",
        doc="round weights to this many bits (2, 3, 4, 5, 6, 8) or to a float mode (mxfp4, nvfp4, "
        "mxfp8) while they are read, by the best recipe (docs/quantization.md). None: keep them "
        "as they are.",
        elsewhere="bits",
    )
    config: Place | None = _model(
        "--config",
        help="For a single file: a folder with its configs, or with the parts it lacks.",
        doc="for a single file: a folder whose configs, scheduler and tokenizer are used, and "
        "whose weights replace parts that the file does not have.",
    )
    prediction_type: PredictionType | None = _model(
        "--prediction-type",
        metavar="NAME",
        help="For a single file: epsilon, v_prediction or sample, whatever the file says.",
    )
    zero_snr: Flag | None = _model(
        "--zero-snr/--no-zero-snr",
        help="For a single file: whether it was trained to zero terminal SNR, whatever it says.",
    )
    revision: Text | None = _model(doc="for a hub id: branch, tag or commit.")
    variant: Text | None = _model(doc='variant of the files: "fp16" and such.')
    backend: Backend = _machine(
        "--backend", default="auto", help="What computes. Default: auto.", elsewhere="device"
    )
    dtype: DType | None = _machine(
        "--dtype",
        metavar="NAME",
        help="auto (default), float32, float16 or bfloat16.",
        doc='what the U-Net and the text encoders compute in. None or "auto": float16 on a GPU, '
        "else float32. The VAE stays in float32 where its config says ``force_upcast``, or where "
        "float16 overflows.",
        elsewhere="torch_dtype precision",
    )
    low_memory: Flag = _machine(
        "--low-memory",
        default=False,
        help="Hold one stage of networks at a time, weights as they are stored: slower, the same "
        "picture.",
        doc="hold the networks of one stage at a time, and weights as they are stored: each "
        "picture reads them again, and on a CPU each step expands them again.",
        elsewhere="low_ram lowvram medvram",
    )
    vae_tiling: Flag | None = _machine(
        "--vae-tiling/--no-vae-tiling",
        help="Decode in bands of rows: less memory, the same picture. "
        "Default: above 256x256 pixels.",
        doc="decode in bands of rows: less memory, the same picture. None: where it has more than "
        "256 x 256 pixels, and always with low_memory.",
    )
    memory_limit: Gigabytes | None = _machine(
        "--memory-limit",
        metavar="GB",
        help="Refuse a run that is expected to take more. Default: what the machine has.",
        doc="gigabytes that a run may take; a run that is expected to take more is refused. None: "
        "what the machine has.",
    )
    exact: Flag = _machine(
        "--exact",
        default=False,
        key="exact",
        help="On a GPU: compute as exactly as the type allows; slower (no Winograd convolutions, "
        "no TF32).",
        doc="on a GPU, compute as exactly as the type allows; slower (docs/metal.md). Ask for it "
        "before anything imports MLX.",
    )
    progress: Callable[..., None] | None = option(
        key=None,
        doc="called while files are fetched, as ``mlxdiff.store.hub.resolve`` calls it.",
    )
    on_progress: Callable[[Progress], object] | None = option(
        key=None,
        doc="called with a ``mlxdiff.Progress`` while files are fetched.",
    )
    cancel: Cancel | None = option(
        key=None,
        doc="a ``mlxdiff.Cancel``, which stops a download from another thread; what has arrived "
        "is kept.",
    )


_command = partial(option, section="Output", key=None)
_batch = partial(option, section="Many pictures", key=None)


@dataclass(frozen=True, kw_only=True)
class CommandOptions(Options):
    """Options of the command line alone."""

    prompt_file: File | None = _batch(
        "--prompt-file",
        metavar="FILE",
        help="Draw each line of a file: a prompt, a JSON object of options, or options such as "
        "--steps 20 (docs/batches.md). - is standard input.",
    )
    vary_option: Words = _batch(
        "--vary-option",
        default=(),
        metavar="NAME=A,B,C",
        help="Draw with each value of an option; give it twice for all combinations.",
    )
    grid: File | None = _batch(
        "--grid",
        metavar="FILE",
        help="Put all pictures on one labelled sheet as well.",
    )
    wildcards: Flag = _batch(
        "--wildcards",
        default=False,
        help="Fill in {a|b} and __name__ in prompts; the seed decides what is chosen.",
    )
    wildcard_folder: File | None = _batch(
        "--wildcard-folder",
        metavar="FOLDER",
        help="Where name.txt lies for __name__. Default: wildcards in mlxdiff's settings folder.",
    )
    preset: Text | None = _batch(
        "--preset",
        metavar="NAME",
        help="Take options from presets/NAME.toml in mlxdiff's settings folder, or from a path; "
        "other options override them.",
    )
    resume: Flag = _batch(
        "--resume",
        default=False,
        help="Skip pictures that are there, drawn with the same settings.",
    )
    turntable: Views | None = _batch(
        "--turntable",
        metavar="N",
        help="Zero-1-to-3: draw N views around the object, and write them as an animation (.gif, "
        ".webp, .png, .mp4), the views beside it.",
    )
    output: Text | None = _command(
        "-o",
        "--output",
        metavar="FILE",
        help="Picture file (.png, .jpg, .webp, .avif); {seed}, {index}, {step}, {frame}, {prompt}, "
        "{model}, {image} and {date} are filled in, numbers also as {seed:05d}. "
        "Default: mlxdiff-{seed}.png, numbered if it exists.",
    )
    quality: Quality | None = _command(
        "--quality",
        metavar="1-100",
        help="Quality of JPEG, WebP and AVIF; WebP is lossless at 100. Default: 90.",
    )
    force: Flag = _command("--force", default=False, help="Overwrite files that exist.")
    no_metadata: Flag = _command(
        "--no-metadata", default=False, help="Write no prompt and no settings into the file."
    )
    from_image: File | None = _command(
        "--from-image",
        metavar="FILE",
        help="Take the settings of a picture that mlxdiff (or A1111) drew; other options override "
        "them.",
    )
    trust_image: Flag = _command(
        "--trust-image",
        default=False,
        help="With --from-image: open the files that the picture names, wherever they are, and "
        "fetch its models from the hub.",
    )
    preview: Flag = _command(
        "--preview",
        default=False,
        help="Show the picture while it is drawn: in the terminal if it can, else in a file.",
    )
    preview_every: Positive | None = _command(
        "--preview-every", metavar="N", help="Steps from one preview to the next. Default: 1."
    )
    preview_file: Text | None = _command(
        "--preview-file",
        metavar="FILE",
        help="Write previews, and keep them: {step} and all that --output takes are filled in. "
        "A name in .gif or .webp gives one animation of them.",
    )
    as_json: Flag = _command(
        "--json", default=False, help="Print one JSON object for each picture."
    )
    show_progress: ProgressForm = _command(
        "--progress",
        default="bar",
        help="bar (default), none, or json: with --json, an event a line (docs/embedding.md).",
    )
