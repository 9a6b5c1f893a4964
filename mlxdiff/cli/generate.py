"""``mlxdiff generate``: prompts in, PNG files out."""

from __future__ import annotations

import json
import string
import sys
import time
from pathlib import Path
from typing import Any

import click

from mlxdiff.cli import ProgressBar, common_options, show_notes
from mlxdiff.cli import embeddings as embedding_options
from mlxdiff.cli import loras as lora_options
from mlxdiff.cli.preview import Preview
from mlxdiff.cli.sections import SectionedCommand
from mlxdiff.errors import UsageError

# Options that make up the picture, and the models beside the main one: what --from-image can bring
# back, and, of what stands in a picture's metadata as `extra`, the type that it must have.
_FIELDS = (
    "prompt negative_prompt prompt_2 negative_prompt_2 width height steps guidance "
    "guidance_rescale sampler schedule seed model clip_skip"
).split()
_EXTRA: dict[str, Any] = dict.fromkeys(
    "eta strength denoising_start denoising_end aesthetic_score negative_aesthetic_score "
    "image_guidance hires hires_strength".split(),
    float,
)
_EXTRA |= dict.fromkeys(("original_size", "target_size", "crop"), tuple)
_EXTRA |= dict.fromkeys(("guidance_interval", "outpaint"), tuple)
_EXTRA |= dict.fromkeys(("vae", "refiner", "image", "mask", "quantize", "image_encoder"), str)
_EXTRA |= {"hires_upscaler": str}
_EXTRA |= {"prompt_syntax": str, "embeddings": list}
_EXTRA |= {"label": int, "feature_reuse": int, "noise_level": int}
_EXTRA |= {"paste_original": bool, "guess_mode": bool, "exact": bool}
_EXTRA |= {"loras": list}
# Those that are given once for each ControlNet or IP-Adapter: lists.
_EACH: dict[str, Any] = dict.fromkeys(("control_scale", "control_start", "control_end"), float)
_EACH |= dict.fromkeys(("controlnet", "control_image", "control_preprocess"), str)
_EACH |= {"ip_adapter": str, "ip_image": str, "ip_scale": float}
# Not arguments of Pipeline.generate.
_NAMED = tuple("model vae refiner controlnet ip_adapter image_encoder quantize exact seed".split())
BUILTIN_NAME = "builtin"  # what pictures of the built-in model say that they are made with


class Numbers(click.ParamType):
    """Numbers with a separator between them, such as 512x768."""

    def __init__(self, separator: str, names: str, kind: type = int) -> None:
        self.separator, self.name, self.kind = separator, names, kind
        self.count = len(names.lower().split(separator))

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self.kind(part) for part in value.lower().split(self.separator))
        except ValueError:
            numbers = ()
        if len(numbers) != self.count:
            self.fail(f"{value!r} is not of the form {self.name}", param, ctx)
        return numbers


SIZE = Numbers("x", "HxW")
POINT = Numbers(",", "Y,X")
INTERVAL = Numbers(",", "START,END", float)
BORDERS = Numbers(",", "LEFT,TOP,RIGHT,BOTTOM")


SECTIONS = {
    "Prompt": "prompt prompt_file negative_prompt prompt_2 negative_prompt_2 prompt_syntax "
    "clip_skip embeddings label",
    "Model": "model vae refiner loras lora_folder controlnet ip_adapter image_encoder quantize "
    "config prediction_type",
    "Picture": "width height seed count steps guidance guidance_rescale guidance_interval "
    "feature_reuse sampler schedule eta hires hires_upscaler hires_strength",
    "From a picture": "image strength image_guidance noise_level mask outpaint paste_original",
    "Control": "control_image control_scale control_start control_end control_preprocess "
    "guess_mode ip_image ip_scale",
    "SDXL": "denoising_end denoising_start aesthetic_score negative_aesthetic_score original_size "
    "target_size crop",
    "Machine": "backend dtype low_memory vae_tiling memory_limit exact",
    "Output": "output force no_metadata from_image preview preview_every preview_file as_json "
    "quiet debug help",
}


@click.command(cls=SectionedCommand, sections=SECTIONS, context_settings={"show_default": False})
@click.argument("text", metavar="[PROMPT]", required=False)
@click.option("-p", "--prompt", help="What to draw, in place of PROMPT; may be empty.")
@click.option(
    "--prompt-file",
    type=click.Path(dir_okay=False),
    help="Prompts, one a line; - is standard input.",
)
@click.option("-n", "--negative-prompt", help="What not to draw.")
@click.option("--prompt-2", help="SDXL: the prompt of the second text encoder.")
@click.option("--negative-prompt-2", help="SDXL: its negative prompt.")
@click.option(
    "--prompt-syntax",
    help="plain (default) or a1111: (word:1.2), [word], BREAK, prompts of any length.",
)
@click.option(
    "--clip-skip",
    type=int,
    help="Layers left out at the end of the text encoders; A1111 counts one more.",
)
@click.option(
    "-m",
    "--model",
    help="Folder, single file, hub id org/name[@revision], or short name "
    "(see mlxdiff models --known). Default: the built-in model.",
)
@click.option("--config", help="Single file: a folder with its configs, or the parts it lacks.")
@click.option(
    "--prediction-type",
    help="Single file: epsilon, v_prediction or sample, whatever the file looks like.",
)
@click.option("--vae", help="Another VAE, or a TAESD: its folder, or a model that has it.")
@click.option("--refiner", help="SDXL: a model, as for -m, that draws the last part of the way.")
@click.option(
    "--controlnet",
    multiple=True,
    help="A ControlNet: folder, file or hub id. Repeatable; so are the next five, in step.",
)
@click.option("--control-image", multiple=True, help="The picture that it is shown; resized.")
@click.option("--control-scale", type=float, multiple=True, help="Default: 1.")
@click.option("--control-start", type=float, multiple=True, help="Share of the way. Default: 0.")
@click.option("--control-end", type=float, multiple=True, help="Share of the way. Default: 1.")
@click.option(
    "--control-preprocess",
    multiple=True,
    help="What is made of its picture first: none (default), edges, grey or tile.",
)
@click.option(
    "--guess-mode",
    is_flag=True,
    default=None,
    help="ControlNets lead: with guidance, they act on the prompt's prediction alone.",
)
@click.option(
    "--embedding",
    "embeddings",
    type=embedding_options.EmbeddingParam(),
    multiple=True,
    help="A textual inversion, and the word that stands for it in the prompt; repeatable. "
    "Default: the word that the file tells, or its name.",
)
@click.option(
    "--ip-adapter",
    multiple=True,
    help="An IP-Adapter: a file, or the hub id of one. Repeatable; so are the next two, in step.",
)
@click.option("--ip-image", multiple=True, help="The picture that it is shown, as a prompt.")
@click.option("--ip-scale", type=float, multiple=True, help="Default: 1.")
@click.option(
    "--image-encoder",
    help="Its CLIP image encoder: a folder or hub id. Default: image_encoder beside the file.",
)
@click.option(
    "--lora",
    "loras",
    type=lora_options.LoraParam(),
    multiple=True,
    help="A LoRA (or LoCon, LoHa, LoKr, DoRA) and its scale, 1 by default; repeatable.",
)
@click.option(
    "--lora-folder",
    default=".",
    help="Where <lora:name:scale> of a prompt in a1111 syntax is looked for. Default: here.",
)
@click.option("--label", type=int, help="A model without text: the class to draw, 0, 1, ...")
@click.option("-W", "--width", type=int, help="Pixels. Default: the image's, or the model's own.")
@click.option("-H", "--height", type=int, help="Pixels. Default: the image's, or the model's own.")
@click.option("-i", "--image", help="A picture to start from; it is resized.")
@click.option(
    "--strength",
    type=float,
    help="How far from the image, 0 to 1. Default: 0.8, SDXL 0.3, with a mask 1.",
)
@click.option(
    "--hires",
    type=float,
    metavar="SCALE",
    help="Then enlarge the picture, and draw over it at that size.",
)
@click.option(
    "--hires-upscaler",
    help="lanczos (of the picture; default), latent-nearest or latent-bilinear.",
)
@click.option(
    "--hires-strength", type=float, help="How far from the enlarged picture, 0 to 1. Default: 0.5."
)
@click.option(
    "--image-guidance",
    type=float,
    help="instruct-pix2pix: how closely to keep to the image; below 1: no guidance. Default: 1.5.",
)
@click.option(
    "--noise-level",
    type=int,
    help="x4 upscaler: noise added to the image first; more of it, more is made up. Default: 20.",
)
@click.option("--mask", help="With --image: what to repaint of it, in white; it is resized.")
@click.option(
    "--outpaint",
    type=BORDERS,
    metavar=BORDERS.name,
    help="With --image: pixels to add around it and to paint.",
)
@click.option(
    "--paste-original",
    is_flag=True,
    default=None,
    help="With --mask or --outpaint: put the rest of the image back exactly as it was.",
)
@click.option(
    "--steps", type=int, help="Of the sampler. Default: 20; 4 for models made for few (LCM, Turbo)."
)
@click.option(
    "-g",
    "--guidance",
    "--cfg-scale",
    type=float,
    help="Classifier-free guidance scale; none at 1 and below. "
    "Default: 7.5, SDXL 5, LCM 8.5, x4 upscaler 9, Turbo 0.",
)
@click.option("--guidance-rescale", type=float, help="Rescale of the guided prediction, 0 to 1.")
@click.option(
    "--guidance-interval",
    type=INTERVAL,
    metavar="START,END",
    help="Guidance only between these shares of the run, 0 to 1; the rest costs half.",
)
@click.option(
    "--feature-reuse",
    type=int,
    metavar="N",
    help="Cheaper and less exact: the whole U-Net only in every Nth evaluation. Default: 1.",
)
@click.option("-s", "--seed", type=int, help="As torch takes it. Default: random, printed.")
@click.option(
    "-b", "--count", type=int, default=1, help="Pictures for each prompt, with seeds s, s+1, ..."
)
@click.option("--sampler", help="Default: auto. A wrong name lists all.")
@click.option("--schedule", help="Default: auto. A wrong name lists all.")
@click.option("--eta", type=float, help="Share of fresh noise, 0 to 1 (ddim, tcd). Default: 0.")
@click.option(
    "--denoising-end",
    type=float,
    help="SDXL: stop after this share of the way, or hand over to the refiner (default: 0.8).",
)
@click.option(
    "--denoising-start",
    type=float,
    help="SDXL: where the refiner begins; without one, take the image for made up to there.",
)
@click.option("--aesthetic-score", type=float, help="SDXL refiner. Default: 6.")
@click.option("--negative-aesthetic-score", type=float, help="SDXL refiner. Default: 2.5.")
@click.option("--original-size", type=SIZE, metavar="HxW", help="SDXL: micro-conditioning.")
@click.option("--target-size", type=SIZE, metavar="HxW", help="SDXL: micro-conditioning.")
@click.option("--crop", type=POINT, metavar="Y,X", help="SDXL: micro-conditioning.")
@click.option("--backend", default="auto", help="auto (default), mlx or numpy.")
@click.option("--dtype", default="auto", help="auto (default), float32, float16 or bfloat16.")
@click.option(
    "-q",
    "--quantize",
    metavar="BITS",
    help="Weights in 2, 3, 4, 5, 6 or 8 bits, or mxfp4, nvfp4, mxfp8. Default: as they are.",
)
@click.option(
    "--exact",
    is_flag=True,
    help="On a GPU: as exactly as the type allows, slower (no Winograd convolutions, no TF32).",
)
@click.option(
    "--low-memory",
    is_flag=True,
    help="One stage of networks at a time, weights as they are stored: slower, the same picture.",
)
@click.option(
    "--vae-tiling/--no-vae-tiling",
    default=None,
    help="Decode in bands of rows: less memory, the same picture. Default: above 256x256 pixels.",
)
@click.option(
    "--memory-limit",
    type=float,
    metavar="GB",
    help="Refuse what is expected to take more. Default: what the machine has.",
)
@click.option(
    "-o",
    "--output",
    help="PNG file; {seed} and {index} are filled in. Default: mlxdiff-{seed}.png.",
)
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
@click.option("--no-metadata", is_flag=True, help="Write no prompt and settings into the PNG.")
@click.option(
    "--from-image",
    type=click.Path(dir_okay=False),
    help="Take the settings of a picture that mlxdiff (or A1111) drew; options override them.",
)
@click.option(
    "--preview",
    is_flag=True,
    help="Show the picture while it is drawn: in the terminal where it can, else in a file.",
)
@click.option(
    "--preview-file",
    help="Previews as PNG: {seed}, {index} and {step} are filled in. They stay.",
)
@click.option("--preview-every", type=int, help="Steps from one preview to the next. Default: 1.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a picture on stdout.")
@common_options
def generate(
    text: str | None,
    prompt: str | None,
    prompt_file: str | None,
    model: str | None,
    config: str | None,
    prediction_type: str | None,
    vae: str | None,
    refiner: str | None,
    controlnet: tuple[str, ...],
    embeddings: tuple[tuple[str, str | None], ...],
    ip_adapter: tuple[str, ...],
    image_encoder: str | None,
    loras: tuple[lora_options.Asked, ...],
    lora_folder: str,
    seed: int | None,
    count: int,
    backend: str,
    dtype: str,
    quantize: str | None,
    exact: bool,
    low_memory: bool,
    vae_tiling: bool | None,
    memory_limit: float | None,
    output: str | None,
    force: bool,
    no_metadata: bool,
    from_image: str | None,
    preview: bool,
    preview_file: str | None,
    preview_every: int | None,
    as_json: bool,
    quiet: bool,
    **picture: Any,
) -> None:
    """Draw pictures from a PROMPT and say where they are.

    \b
    mlxdiff generate "a red circle on a blue background" --seed 7
    mlxdiff generate -m stabilityai/sd-turbo "a lighthouse in a storm" --steps 4 -g 0
    """
    start = time.perf_counter()
    show_notes(quiet)
    if count < 1:
        raise UsageError(f"--count is {count}; expected at least 1")
    replay: dict[str, Any] = {}
    if from_image is not None:
        replay = _replay(from_image)
        named = {name: replay.pop(name, None) for name in _NAMED}
        model = named["model"] if model is None else model
        vae = named["vae"] if vae is None else vae
        refiner = named["refiner"] if refiner is None else refiner
        seed = named["seed"] if seed is None else seed
        quantize = named["quantize"] if quantize is None else quantize
        exact = exact or bool(named["exact"])
        for name in ("image", "mask"):
            if name in replay and picture[name] is None:
                raise UsageError(
                    f"{from_image}: was drawn from the {name} {replay[name]!r}: give it with "
                    f"--{name}"
                )
        controlnet = controlnet or named["controlnet"] or ()
        ip_adapter = ip_adapter or named["ip_adapter"] or ()
        image_encoder = named["image_encoder"] if image_encoder is None else image_encoder
        for name, option in (("control_image", "control-image"), ("ip_image", "ip-image")):
            if name in replay and not picture[name]:
                raise UsageError(
                    f"{from_image}: was drawn with the {option.replace('-', ' ')} "
                    f"{' and '.join(replay[name])}: give it with --{option}"
                )
    words = embedding_options.replayed(embeddings, replay.pop("embeddings", None), from_image)
    chosen = lora_options.replayed(loras, replay.pop("loras", None), from_image)
    prompts = _prompts(text, prompt, prompt_file, replay.pop("prompt", None))
    if prompts == [None] and model is None:  # a model of one's own may draw without
        raise UsageError(
            'no prompt is given; for example: mlxdiff generate "a red circle on a blue background"'
        )
    arguments = replay | {k: v for k, v in picture.items() if v not in (None, ())}

    from mlxdiff.loading import load
    from mlxdiff.pictures.image import check_writable
    from mlxdiff.pipeline import pick_seeds

    seeds = pick_seeds(seed, count)
    paths = _paths(output, len(prompts), seeds)
    with ProgressBar("fetching", quiet) as progress:
        pipe = load(
            model,
            backend=backend,
            dtype=dtype,
            quantize=quantize,
            exact=exact,
            low_memory=low_memory,
            vae_tiling=vae_tiling,
            vae=vae,
            refiner=refiner,
            controlnets=controlnet,
            embeddings=words,
            ip_adapters=ip_adapter,
            image_encoder=image_encoder,
            loras=chosen,
            lora_folder=lora_folder,
            config=config,
            prediction_type=prediction_type,
            memory_limit=memory_limit,
            progress=progress,
        )
    if not quiet:
        for word in pipe.embeddings:
            many = "1 vector" if word.count == 1 else f"{word.count} vectors"
            click.echo(f"Embedding {word.path.name}: {word.token!r} stands for {many}", err=True)
        lora_options.report(pipe.loras)
    shown = None
    if preview or preview_file is not None:
        shown = Preview(preview_file, 1 if preview_every is None else preview_every, force)
    elif preview_every is not None:
        raise UsageError("--preview-every needs --preview or --preview-file")
    # What can be refused is refused before anything is drawn.
    pipe.settings(prompts[0], **arguments)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_writable(path, overwrite=force)
    if shown is not None:
        shown.check(paths, seeds)
    for index, one in enumerate(prompts):
        _draw(
            pipe,
            one,
            seeds,
            paths[index * count : (index + 1) * count],
            arguments,
            {"force": force, "metadata": not no_metadata, "json": as_json, "quiet": quiet},
            start,
            shown,
            index * count,
        )
        start = time.perf_counter()


def _prompts(
    text: str | None, prompt: str | None, prompt_file: str | None, replayed: str | None
) -> list[str | None]:
    """The prompts to draw, from the one place that gives them; [None] where none does."""
    given = [
        name
        for name, value in (("PROMPT", text), ("--prompt", prompt), ("--prompt-file", prompt_file))
        if value is not None
    ]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} are both given; give one")
    if prompt_file is not None:
        try:
            lines = (
                sys.stdin.read() if prompt_file == "-" else Path(prompt_file).read_text("utf-8")
            ).splitlines()
        except UnicodeDecodeError:
            raise UsageError(f"{prompt_file}: not a UTF-8 text file") from None
        prompts = [line for line in lines if line.strip()]
        if not prompts:
            raise UsageError(f"{prompt_file}: holds no prompt; expected one on each line")
        return prompts
    return [next((value for value in (text, prompt, replayed) if value is not None), None)]


def _replay(path: str) -> dict[str, Any]:
    """The settings that a picture carries, as arguments of ``generate``."""
    from mlxdiff.pictures.metadata import read

    found = read(path)
    replay = {name: getattr(found, name) for name in _FIELDS}
    for name, kind in _EXTRA.items():
        value: Any = found.extra.get(name)
        if kind is tuple and isinstance(value, list):
            value = tuple(value)
        good = isinstance(value, (int, float) if kind is float else kind)
        if kind is tuple and good:
            numbers = (int, float) if name == "guidance_interval" else (int,)
            count = BORDERS.count if name == "outpaint" else 2
            good = len(value) == count and all(type(v) in numbers for v in value)
        if value is not None and (not good or isinstance(value, bool) != (kind is bool)):
            raise UsageError(f"{path}: {name} in its mlxdiff metadata is {value!r}")
        replay[name] = value
    if found.version is None:  # drawn by A1111 or a program that writes as it does
        replay["prompt_syntax"] = "a1111"
    for name, kind in _EACH.items():
        values = found.extra.get(name)
        accepted = (int, float) if kind is float else kind
        if values is not None and not (
            isinstance(values, list)
            and values
            and all(isinstance(v, accepted) and not isinstance(v, bool) for v in values)
        ):
            raise UsageError(f"{path}: {name} in its mlxdiff metadata is {values!r}")
        replay[name] = values
    if replay["model"] is not None and found.revision is not None:
        replay["model"] += f"@{found.revision}"
    if replay["model"] == BUILTIN_NAME:
        del replay["model"]
    return {name: value for name, value in replay.items() if value is not None}


def _paths(output: str | None, prompts: int, seeds: list[int]) -> list[Path]:
    """One file for each picture."""
    if output is None:
        output = "mlxdiff-{seed}.png" if prompts == 1 else "mlxdiff-{seed}-{index}.png"
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(output) if name is not None}
    except ValueError as error:
        raise UsageError(f"--output {output!r}: {error}; write {{{{ for a brace") from None
    if fields - {"seed", "index"}:
        raise UsageError(f"--output {output!r}: only {{seed}} and {{index}} are filled in")
    if not output.lower().endswith(".png"):
        raise UsageError(f"--output {output!r}: pictures are written as PNG; end it in .png")
    paths = [
        Path(output.format(seed=seed, index=prompt * len(seeds) + i)).expanduser()
        for prompt in range(prompts)
        for i, seed in enumerate(seeds)
    ]
    if len(set(paths)) < len(paths):
        raise UsageError(
            f"--output {output!r} gives {len(paths)} pictures the same name; "
            "put {index} into it" + (" or {seed}" if prompts == 1 else "")
        )
    return paths


def _draw(
    pipe: Any,
    prompt: str | None,
    seeds: list[int],
    paths: list[Path],
    arguments: dict[str, Any],
    options: dict[str, bool],
    start: float,
    shown: Preview | None,
    before: int,
) -> None:
    """Draw the pictures of one prompt, write and report them.

    Args:
        shown: what becomes of previews, if there are any.
        before: pictures of the prompts before this one.
    """
    from mlxdiff.pictures.image import save_png

    bar: Any = None

    def on_step(step: Any) -> None:
        nonlocal bar
        if shown is not None:
            shown.show(pipe, step, paths[step.picture], before + step.picture)
        if options["quiet"]:
            return
        if bar is None or step.index == 0:
            if bar is not None:
                bar.render_finish()
            bar = click.progressbar(
                length=step.total,
                label=f"seed {step.seed}",
                item_show_func=lambda s: f"{s:.2f} s/step" if s is not None else None,
                file=sys.stderr,
            )
        bar.update(1, step.seconds)

    try:
        result = pipe.generate(
            prompt,
            seed=seeds[0],
            count=len(seeds),
            on_step=on_step,
            **arguments,
        )
    except KeyboardInterrupt:
        if shown is not None and (kept := shown.keep()) is not None:
            click.echo(f"\nThe last preview is in {kept}", err=True)
        raise
    finally:
        if bar is not None:
            bar.render_finish()
    for i, (image, seed, path) in enumerate(zip(result.images, result.seeds, paths, strict=True)):
        text = result.metadata[i].chunks() if options["metadata"] else {}
        save_png(image, path, text, overwrite=options["force"])
        seconds = time.perf_counter() - start
        if options["json"]:
            click.echo(json.dumps(_record(result, i, path, seconds)))
        else:
            click.echo(f"{path}  seed {seed}  {seconds:.1f} s")
    if shown is not None:
        shown.done()


def _record(result: Any, picture: int, path: Path, seconds: float) -> dict[str, Any]:
    """What --json says of a picture. Seconds by stage are those of the whole run of its prompt."""
    s, metadata = result.settings, result.metadata[picture]
    stages = {k: round(v, 4) for k, v in result.timings.items() if k != "steps"}
    return {
        "path": str(path),
        "seed": metadata.seed,
        "width": result.images[picture].width,
        "height": result.images[picture].height,
        "steps": s.steps,
        "guidance": s.guidance,
        "sampler": s.sampler,
        "schedule": s.schedule,
        **metadata.extra,
        "seconds": stages | {"total": round(seconds, 4)},
        "peak_memory_bytes": result.peak_memory,
    }
