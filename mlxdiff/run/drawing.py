"""The drawing of a run: steps, pictures, result.

A run belongs to what it began with: its models with all additions, its settings and its metadata
are fixed when it is made, and nothing that happens to the pipeline later changes them. The order
of the work and the draws of noise are those of diffusers' pipelines.
"""

from __future__ import annotations

import inspect
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Generator as Steps
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxdiff import samplers
from mlxdiff.brownian import BrownianMotion
from mlxdiff.errors import Cancelled, MlxdiffError, UsageError, argument
from mlxdiff.machine.turns import each_in_turn, turn
from mlxdiff.networks.layers import seamless
from mlxdiff.noise import SOURCES
from mlxdiff.pictures import formats, videos
from mlxdiff.pictures.image import check_writable, png_bytes, side_by_side, write_bytes
from mlxdiff.pictures.metadata import Metadata
from mlxdiff.pictures.names import Template
from mlxdiff.run.additions.judge import judge_of, score
from mlxdiff.run.additions.map_maker import SEED, with_maps
from mlxdiff.run.additions.refiner import refiner_of
from mlxdiff.run.additions.upscaler import enlarged, upscaler_of
from mlxdiff.run.animation import AnimatingModel
from mlxdiff.run.denoiser import Evaluation, make_denoiser
from mlxdiff.run.inputs import Inputs, Stage, Start, make_stages
from mlxdiff.run.map_model import MapModel
from mlxdiff.run.model import Model, draw_noise
from mlxdiff.run.options import RunOptions
from mlxdiff.run.planning import PlannedRun, resolve
from mlxdiff.run.progress import Watch
from mlxdiff.run.seeds import Draws, variation
from mlxdiff.run.settings import Settings
from mlxdiff.run.video import unstacked

if TYPE_CHECKING:
    import PIL.Image

GROUP = 4
"""Pictures that are drawn before they are decoded, in low memory, where U-Net and VAE are not in
memory together. Otherwise each picture is decoded when it is drawn."""


@dataclass(frozen=True, eq=False)
class Step:
    """One finished evaluation of the U-Net.

    Attributes:
        index: 0 for the first step of a picture.
        total: evaluations for each picture, a refiner's included.
        picture: which picture of the run, from 0.
        seed: its seed.
        seconds: how long this evaluation took.
        latents: (H/f, W/f, C) float32, after the step; of a video (F, H/f, W/f, C).
    """

    index: int
    total: int
    picture: int
    seed: int
    seconds: float
    latents: np.ndarray
    _model: Model = field(repr=False)
    _denoised: Callable[[], np.ndarray] = field(repr=False)

    def __repr__(self) -> str:
        return (
            f"<Step {self.index + 1} of {self.total}, picture {self.picture}, seed {self.seed}, "
            f"{self.seconds:.2f} s>"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Step):
            return NotImplemented
        own = (self.index, self.total, self.picture, self.seed)
        same = own == (other.index, other.total, other.picture, other.seed)
        return same and np.array_equal(self.latents, other.latents)

    def __hash__(self) -> int:
        return hash((self.index, self.total, self.picture, self.seed))

    @property
    def denoised(self) -> np.ndarray:
        """The model's estimate of the latents without noise, of the shape of ``latents``."""
        with turn():
            return self._denoised().reshape(self.latents.shape)

    def sketch(self) -> PIL.Image.Image:
        """A quick estimate of the finished picture: decoded if the VAE is a TAESD, else by a linear
        map, one pixel for each latent. Of a video it shows the frame in the middle."""
        with turn():
            return self._model.sketch(_middle(self.denoised))

    def preview(self) -> PIL.Image.Image:
        """The latents after this step, decoded: noisy until the last steps. Of a video it shows
        the frame in the middle."""
        with turn():
            return self._model.decode(_middle(self.latents)[None])[0]


@dataclass(frozen=True, eq=False)
class Picture:
    """A finished picture of a run.

    Attributes:
        index: which picture of the run, from 0.
        image: the picture; of a video the first frame.
        latents: (H/f, W/f, C) float32, the final ones, scaled as the U-Net takes them; of a video
            (F, H/f, W/f, C).
        seed: its seed.
        metadata: how it was made (``chunks()`` gives the text chunks of a PNG).
        timings: see ``Result``; what several pictures share counts for the first of them.
        peak_memory: bytes that the process held at most so far, as the backend counts them.
        map: of a model that makes maps, (height, width, C) float32: depth 0 to 1, or normals
            (``pictures.maps``); else None.
        frames: all frames of a video; () for a picture.
    """

    index: int
    image: PIL.Image.Image
    latents: np.ndarray
    seed: int
    metadata: Metadata
    timings: dict[str, Any]
    peak_memory: int
    frames: tuple[PIL.Image.Image, ...] = ()
    map: np.ndarray | None = None

    def files_of(self, template: Template) -> range:
        """Numbers of the frames that get a file of their own; one file holds all: (0,)."""
        is_each = bool(self.frames) and "frame" in template.fields
        if self.frames and not is_each:
            videos.require_writer(template.text)
        return range(len(self.frames) if is_each else 1)

    def encoded(
        self, files: Sequence[Path], metadata: Metadata | None, quality: int | None
    ) -> Iterator[bytes]:
        """Encode it as files: one, or one for each frame of a video.

        Args:
            files: their names.
            metadata: what the files say; None: nothing.
            quality: as ``Result.save`` takes it.
        """
        name = formats.ending(files[0])
        if self.frames and len(files) == 1:
            fps = float(self.metadata.extra.get("fps") or videos.FPS)
            yield videos.encode_video(self.frames, name, fps, metadata, quality)
            return
        for image in self.frames or (self.image,):
            yield formats.encode(image, name, metadata, quality)

    def __repr__(self) -> str:
        width, height = self.image.size
        if self.frames:
            many = f"{len(self.frames)} frames"
            return f"<Video {self.index}, {width}x{height}, {many}, seed {self.seed}>"
        return f"<Picture {self.index}, {width}x{height}, seed {self.seed}>"


@dataclass(frozen=True, eq=False)
class Result:
    """Finished pictures. Two results are equal if their pictures and metadata are.

    Attributes:
        images: one for each seed; of a video the first frame.
        videos: the frames of the video of each seed; empty for pictures.
        latents: (B, H/f, W/f, C) float32, the final ones, scaled as the U-Net takes them; of videos
            (B, F, H/f, W/f, C).
        seeds: seed of each picture.
        settings: of the run, with every default filled in.
        metadata: of each picture (``chunks()`` gives the text chunks of a PNG).
        timings: seconds by stage: load, text_encoder, map (of control pictures), image (encoding
            the given one), hires (enlarging), unet, vae, judge, upscaler; and steps, the seconds of
            each evaluation.
        peak_memory: bytes, as the backend counts them.
        maps: of a model that makes maps, the map of each image, see ``Picture``; else empty.
    """

    images: list[PIL.Image.Image]
    latents: np.ndarray
    seeds: list[int]
    settings: Settings
    metadata: list[Metadata]
    timings: dict[str, Any]
    peak_memory: int
    maps: list[np.ndarray] = field(default_factory=list)
    videos: list[list[PIL.Image.Image]] = field(default_factory=list)

    def __repr__(self) -> str:
        width, height = self.images[0].size
        noun = "video" if self.videos else "picture"
        many = f"1 {noun}" if len(self.images) == 1 else f"{len(self.images)} {noun}s"
        seeds = f"{self.seeds[0]}" + (f" to {self.seeds[-1]}" if len(self.seeds) > 1 else "")
        return f"<Result: {many}, {width}x{height}, seed {seeds}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Result):
            return NotImplemented
        return (
            (self.seeds, self.metadata) == (other.seeds, other.metadata)
            and np.array_equal(self.latents, other.latents)
            and all(map(_same_pixels, self._pictures, other._pictures))
        )

    def __hash__(self) -> int:
        return hash((tuple(self.seeds), self.latents.shape))

    @property
    def _pictures(self) -> list[PIL.Image.Image]:
        return [frame for video in self.videos for frame in video] or self.images

    def png(self, index: int = 0) -> bytes:
        """Return a picture as the bytes of a PNG file, with its settings in it.

        Args:
            index: which picture, from 0.
        Raises: UsageError if there is no such picture.
        """
        if not 0 <= index < len(self.images):
            raise UsageError(f"index is {index}; there are {len(self.images)} pictures, from 0")
        return png_bytes(self.images[index], self.metadata[index].chunks())

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        quality: int | None = None,
    ) -> list[Path]:
        """Write all pictures or videos as files, with their settings in them.

        Args:
            path: the file, whose ending gives the format (.png, .jpg, .webp, .avif; of a video
                .gif, .webp, .png, .mp4); with several pictures a template with ``{seed}`` or
                ``{index}``. With ``{frame}`` each frame of a video is a picture file. Also
                ``{step}`` (their number), ``{prompt}``, ``{model}``, ``{image}`` and ``{date}`` are
                filled in, numbers also as ``{seed:05d}``. Its folder must exist.
            overwrite: replace existing files.
            quality: 1 to 100, see ``pictures.formats.encode``.
        Returns: the files, in order.
        Raises: UsageError. Nothing is written if one of the files cannot be.
        """
        endings = (*formats.ENDINGS, *videos.ANIMATED) if self.videos else formats.ENDINGS
        template = Template(_path_text(path), "path", endings=tuple(endings))
        pictures = [
            Picture(index, image, self.latents[index], self.seeds[index], self.metadata[index], {},
                    0, tuple(self.videos[index]) if self.videos else ())
            for index, image in enumerate(self.images)
        ]  # fmt: skip
        paths = [
            [
                template.fill(
                    **name_values(one.metadata, one.index, self.steps_of_a_picture, frame)
                )
                for frame in one.files_of(template)
            ]
            for one in pictures
        ]
        every = [path for some in paths for path in some]
        if len(set(every)) < len(every):
            raise UsageError(
                f"{template} gives {len(every)} pictures the same name; put {{index}} or {{seed}} "
                "into it"
            )
        for one in every:
            check_writable(one, overwrite, tuple(endings))
        for picture, files in zip(pictures, paths, strict=True):
            for data, file in zip(
                picture.encoded(files, picture.metadata, quality), files, strict=True
            ):
                write_bytes(data, file, overwrite)
        return every

    @property
    def steps_of_a_picture(self) -> int:
        """Evaluations of the U-Net for each picture."""
        return len(self.timings["steps"]) // (len(self.images) * self.settings.group)

    def _repr_png_(self) -> bytes:
        """Show the pictures in a notebook, side by side."""
        if len(self.images) == 1:
            return self.png()
        return png_bytes(side_by_side(self.images))


def name_values(metadata: Metadata, index: int, steps: int, frame: int = 0) -> dict[str, int | str]:
    """Return the values for the name of a picture's file, see ``pictures.names.Template``."""
    return {
        "seed": 0 if metadata.seed is None else metadata.seed,
        "index": index,
        "step": steps,
        "frame": frame,
        "prompt": metadata.prompt,
        "model": _model_name(metadata),
        "image": Path(str(metadata.extra.get("image") or "none")).stem,
        "date": time.strftime("%Y-%m-%d"),
    }


def _model_name(metadata: Metadata) -> str:
    name = (metadata.model or "model").rpartition("/")[2]
    return name.removesuffix(".safetensors").removesuffix(".ckpt")


class Run(Iterator[Step]):
    """A run: an iterator of its steps that ends in ``result``.

        run = pipe.stream("a lighthouse", seed=7)
        for step in run:
            print(step.index, "of", step.total)
        run.result.save("lighthouse.png")

    Several runs of one pipeline can be under way, in one thread or in several: each draws what it
    would draw alone. One thread computes at a time (``machine.turns``). One run is for one thread
    at a time.

    Args:
        planned: the run, checked and planned.
        metadata: of its pictures.
        watch: tells a caller of its progress, and stops it; None: nobody watches.
    Attributes:
        settings: with every default filled in.
        seeds: of its pictures; of several of which the best is kept, that of the first.
        metadata: of its pictures, in the same way.
    """

    def __init__(
        self, planned: PlannedRun, metadata: list[Metadata], watch: Watch | None = None
    ) -> None:
        self.settings = planned.settings
        of = planned.settings.group
        self.seeds = planned.seeds[::of]
        self.metadata = metadata[::of]
        # The generator does not get the run: a run that is dropped before its end is then in no
        # circle of references, and its networks leave memory at once.
        self._planned = planned
        self._watch = Watch(len(planned.seeds), 0) if watch is None else watch
        self._work = _Work(planned, metadata, self._watch)
        self._steps = _draw(planned, self._work)
        self._handed_out = False

    def __repr__(self) -> str:
        many = "1 picture" if len(self.seeds) == 1 else f"{len(self.seeds)} pictures"
        size = f"{self.settings.width}x{self.settings.height}"
        return f"<Run: {len(self.finished)} of {many} finished, {size}, seed {self.seeds[0]}>"

    def __iter__(self) -> Run:
        return self

    def __next__(self) -> Step:
        while (step := self._advance()) is None:
            pass
        return step

    def _advance(self) -> Step | None:
        """Return the next step, or None when pictures are finished.

        Raises: StopIteration, Cancelled.
        """
        if inspect.getgeneratorstate(self._steps) == inspect.GEN_RUNNING:
            raise UsageError(
                "this run is being drawn in another thread; start one of its own for each thread"
            )
        try:
            self._watch.check()
        except Cancelled:
            self.close()
            raise
        return next(self._steps)

    def close(self) -> None:
        """Stop drawing. Finished pictures stay in ``finished``."""
        self._steps.close()

    @property
    def steps(self) -> int:
        """Evaluations of the U-Net for each picture."""
        return sum(map(len, self._planned.plans))

    @property
    def model_name(self) -> str:
        """Name of the model in the names of files."""
        return _model_name(self.metadata[0])

    @property
    def finished(self) -> tuple[Picture, ...]:
        """The pictures that are finished so far."""
        return tuple(self._work.finished)

    @property
    def result(self) -> Result:
        """The finished pictures: equal to what ``generate`` returns. Draws what is not drawn yet.

        Raises: UsageError if the run was closed, failed, or gave its pictures away (``pictures``).
        """
        for _ in self:
            pass
        done = self._work.finished
        if self._handed_out or len(done) < len(self.seeds):
            why = "its pictures were handed out" if self._handed_out else "it was stopped"
            raise UsageError(f"this run has no result: {why}; start another one with stream(...)")
        return Result(
            images=[one.image for one in done],
            latents=np.stack([one.latents for one in done]),
            seeds=[one.seed for one in done],
            settings=self.settings,
            metadata=[one.metadata for one in done],
            videos=[list(one.frames) for one in done if one.frames],
            timings=_sum(one.timings for one in done),
            peak_memory=done[-1].peak_memory,
            maps=[one.map for one in done if one.map is not None],
        )

    def pictures(self, on_step: Callable[[Step], object] | None = None) -> Iterator[Picture]:
        """Draw, and yield each picture when it is finished. The run does not keep it.

        A picture counts as taken when the caller comes back for the next one.

        Args:
            on_step: called with each Step.
        """
        self._handed_out = True
        finished = self._work.finished
        while True:
            try:
                step = self._advance()
            except StopIteration:
                return
            if step is not None and on_step is not None:
                on_step(step)
            while finished:
                yield finished[0]
                del finished[0]

    def rescue(self) -> list[Picture]:
        """Stop drawing, decode what is drawn, and return the pictures that were not taken yet."""
        self.close()
        self._work.decode()
        self._work.settle()
        return list(self._work.finished)


_SHOWN = {"text_encoder": "encode", "image": "encode", "hires": "encode", "vae": "decode"}
"""Stages of the timings -> stages that a caller is told of."""


class _Work:
    """The progress of a run.

    Attributes:
        watch: is told of it.
        timings: of the picture that is drawn now.
        drawn: index, latents and timings of pictures that are not decoded yet.
        finished: pictures that nobody has taken yet.
    """

    def __init__(self, planned: PlannedRun, metadata: list[Metadata], watch: Watch) -> None:
        self._planned, self._metadata, self.watch = planned, metadata, watch
        self._models = [
            one for one in (planned.model, refiner_of(planned.model)) if one is not None
        ]
        self.drawn: deque[tuple[int, np.ndarray, dict[str, Any]]] = deque()
        self.finished: list[Picture] = []
        self._rivals: list[tuple[int, Picture]] = []  # decoded; the best of them will be kept
        self.timings: dict[str, Any] = {}
        self.begin()

    def begin(self) -> None:
        """Begin the timings of a picture."""
        self.timings = {"load": 0.0, "text_encoder": 0.0, "steps": []}

    @contextmanager
    def turn(self, stage: str | None = None) -> Iterator[None]:
        """Take a turn. Count the seconds of loading, and the other ones for a stage."""
        with turn():
            start, loaded = time.perf_counter(), self._load_seconds
            timings = self.timings
            shown = None if stage is None else _SHOWN.get(stage)
            if shown is not None:
                self.watch.tell(shown)
            self._tell_of_loading(shown)
            try:
                yield
            finally:
                for model in self._models:
                    model.cache.on_load = None
                loading = self._load_seconds - loaded
                timings["load"] += loading
                if stage is not None:
                    seconds = time.perf_counter() - start - loading
                    timings[stage] = timings.get(stage, 0.0) + seconds

    def _tell_of_loading(self, stage: str | None) -> None:
        """Tell of each network that is loaded in this turn, and of the stage that goes on then."""

        def tell(network: str) -> None:
            if network:
                self.watch.tell("load", network)
            elif stage is not None:
                self.watch.tell(stage)

        for model in self._models:
            model.cache.on_load = tell

    @property
    def _load_seconds(self) -> float:
        """Seconds that the models have spent on reading weights so far."""
        return sum(model.load_seconds for model in self._models)

    def finish(self, index: int, latents: np.ndarray) -> None:
        """Take the final latents of a picture."""
        self.timings["unet"] = sum(self.timings["steps"])
        self.drawn.append((index, latents, self.timings))

    def decode(self) -> None:
        """Decode the pictures that are drawn. May be called again after an interruption."""
        planned = self._planned
        model, canvas = planned.model, planned.settings.canvas
        while self.drawn:
            index, latents, self.timings = self.drawn[0]
            if self._is_decoded(index):
                self.drawn.popleft()  # interrupted here
                self._choose(index)
                continue
            with self.turn("vae"), seamless(planned.settings.seamless):
                settings = planned.settings
                frames, values = self._made_of(latents)
                image = frames[0]
                pastes = settings.paste_original or settings.only_masked is not None
                if canvas is not None and pastes:
                    image = canvas.paste_original(image)
            picture = Picture(
                index=index // planned.settings.group,
                image=image,
                latents=latents,
                seed=planned.seeds[index],
                metadata=self._scored(image, index),
                timings=self.timings,
                peak_memory=model.backend.peak_memory(),
                map=values,
                frames=() if settings.frames is None else tuple(frames),
            )
            self._rivals.append((index, picture))
            self.drawn.popleft()
            self._choose(index)

    def _made_of(self, latents: np.ndarray) -> tuple[list[PIL.Image.Image], np.ndarray | None]:
        """Decode a picture, or the frames of a video; of a model that makes maps, also the map
        before it is resized."""
        settings, model = self._planned.settings, self._planned.model
        if isinstance(model, MapModel):
            values = model.map_of(latents, *settings.drawn)
            model.backend.clear_cache()
            return [model.paint(values, settings.depth_as)], values
        if isinstance(model, AnimatingModel):
            return model.decode_frames(latents, settings.decode_chunk or len(latents)), None
        frames = []
        for one in latents if settings.frames is not None else latents[None]:
            frames.append(model.decode(one[None])[0])
            model.backend.clear_cache()
        return frames, None

    def _is_decoded(self, index: int) -> bool:
        """Return True if a picture that is drawn is decoded, too."""
        if self._rivals:
            return self._rivals[-1][0] == index
        last, of = (index + 1) % self._planned.settings.group == 0, self._planned.settings.group
        return last and bool(self.finished) and self.finished[-1].index == index // of

    def _scored(self, image: PIL.Image.Image, index: int) -> Metadata:
        """Metadata of a picture, with its score if there is a judge."""
        planned, metadata = self._planned, self._metadata[index]
        if judge_of(planned.model) is None:
            return metadata
        with self.turn("judge"):
            points = round(score(planned.model, image, planned.settings), 4)
        return replace(metadata, extra={**metadata.extra, "score": points})

    def _choose(self, index: int) -> None:
        """Make one picture of a group when all of it is drawn."""
        if (index + 1) % self._planned.settings.group == 0:
            self.settle()

    def settle(self) -> None:
        """Make one picture of those that are decoded: keep the best, or join them; enlarge it."""
        rivals = [picture for _, picture in self._rivals]
        if not rivals:
            return
        best = max(rivals, key=lambda one: one.metadata.extra.get("score", 0.0))
        if len(rivals) > 1:
            self.timings = _sum(one.timings for one in rivals)
        if isinstance(self._planned.model, MapModel):
            best = self._joined(self._planned.model, rivals)
        elif len(rivals) > 1:
            scores = [[one.seed, one.metadata.extra["score"]] for one in rivals]
            extra = {**best.metadata.extra, "best_of": len(rivals), "scores": scores}
            best = replace(best, metadata=replace(best.metadata, extra=extra))
        model = self._planned.model
        if upscaler_of(model) is not None:
            large = self._enlarge(model, best.image, best.seed)
            best = replace(best, image=large, peak_memory=model.backend.peak_memory())
        if not self.finished or self.finished[-1].index != best.index:  # else interrupted here
            self.finished.append(replace(best, timings=self.timings))
        self._rivals.clear()

    def _joined(self, model: MapModel, found: list[Picture]) -> Picture:
        """Join the maps of a group, and paint the result in its size."""
        settings, first = self._planned.settings, found[0]
        maps = [one.map for one in found if one.map is not None]
        values = model.joined(maps, settings.height, settings.width)
        metadata = first.metadata
        if len(found) != settings.ensemble:  # stopped before the last
            metadata = replace(metadata, extra={**metadata.extra, "ensemble": len(found)})
        image = model.paint(values, settings.depth_as)
        return replace(first, image=image, map=values, metadata=metadata)

    def make_map(self, maker: Model, pixels: np.ndarray) -> np.ndarray:
        """Make the map of a picture with a model of its own."""
        start = time.perf_counter()
        self.watch.tell("encode")
        asked = RunOptions(image=pixels, seed=SEED)
        made = Run(resolve(maker, None, asked), [Metadata()]).result.maps[0]
        if maker.low_memory:
            with turn():
                maker.cache.release_all()
        self.timings["map"] = self.timings.get("map", 0.0) + time.perf_counter() - start
        return made

    def _enlarge(self, model: Model, image: PIL.Image.Image, seed: int) -> PIL.Image.Image:
        """Enlarge a finished picture by the model's upscaler."""
        upscaler = upscaler_of(model)
        assert upscaler is not None

        def draw(by: Model, asked: RunOptions) -> Any:
            run = Run(resolve(by, None, asked), [Metadata()])
            for _ in run:  # its turns are its own
                pass
            return run.result.images[0]

        asked = upscaler.asked(self._planned.settings, image, seed)
        start = time.perf_counter()
        if upscaler.model is not None:
            large = enlarged(model, image, draw, asked)
            self.timings["upscaler"] = time.perf_counter() - start
            return large
        with self.turn("upscaler"):
            large = enlarged(model, image, draw, asked)
            model.backend.clear_cache()
        return large


def _draw(run: PlannedRun, work: _Work) -> Steps[Step | None, None, None]:
    """Draw the pictures of a run one after the other: each is then exactly what it is alone.

    Yields: each Step; None when pictures are finished.
    """
    model, settings, backend = run.model, run.settings, run.model.backend
    stages: list[Stage] = []
    edges = partial(seamless, settings.seamless)
    total = sum(map(len, run.plans))
    inputs: Inputs | None = None
    denoisers: dict[int, Any] = {}
    smaller = None if settings.noise_size is None else model.latent_shape(*settings.noise_size)
    last = len(run.seeds) - 1
    for picture, seed in enumerate(run.seeds):
        work.begin()
        work.watch.begin(picture)
        if inputs is None:
            settings = with_maps(model, settings, work.make_map)
            stages = make_stages(settings, run.plans, model, refiner_of(model))
            encodes = settings.encodes or model.unclips
            with work.turn("image" if encodes else None), edges():
                inputs = Inputs(model, settings)
        vary, index = variation(settings.vary, picture), 0
        draws = Draws(settings, seed, vary, smaller)
        given = None if run.noise is None else run.noise[picture][None]
        x: Any = None  # after the last step
        for part, stage in enumerate(stages):
            shape = stage.settings.latent_shape(model)
            denoise = None
            if part not in denoisers and stage.model.low_memory:
                denoisers.clear()
            if x is None:
                with work.turn(), edges():
                    begun = inputs.begin(stage.plan, draws, shape, given)
            else:
                with work.turn("hires" if settings.hires is not None else None), edges():
                    begun = inputs.go_on(stage, begun, backend.to_numpy(x), draws, shape)
            if part not in denoisers:
                with work.turn("text_encoder"), edges():
                    denoisers[part] = make_denoiser(
                        stage.model, stage.settings, stage.plan.timesteps, stage.before
                    )
            denoise = denoisers[part]
            motion, draw = _motion(stage, seed), partial(draws.step, shape)
            steps = _evaluations(stage, begun, denoise, backend, draw, motion)
            for x, latents, clean, elapsed in each_in_turn(steps):  # noqa: B007 - x is used later
                work.timings["steps"].append(elapsed)
                _require_finite(latents, index, total, backend.dtype)
                if settings.frames is not None:
                    latents = unstacked(latents, settings.frames)
                if index == total - 1:
                    work.finish(picture, latents)
                work.watch.advance(elapsed)
                yield Step(
                    index=index,
                    total=total,
                    picture=picture // settings.group,
                    seed=seed,
                    seconds=elapsed,
                    latents=latents,
                    _model=model,
                    _denoised=clean,
                )
                index += 1
                del clean
        del x, begun, denoise, steps, draws, draw, motion
        backend.clear_cache()
        if model.low_memory and picture < last and len(work.drawn) < GROUP:
            continue
        if model.low_memory:
            denoisers.clear()
        work.decode()
        yield None


def _middle(latents: np.ndarray) -> np.ndarray:
    """The frame in the middle of (F, h, w, C); (h, w, C) as it is."""
    return latents[len(latents) // 2] if latents.ndim == 4 else latents


def _evaluations(
    stage: Stage,
    begun: Start,
    denoise: Any,
    backend: Any,
    draw: Callable[[], np.ndarray],
    motion: BrownianMotion | None,
) -> Iterator[tuple[Any, np.ndarray, Callable[[], np.ndarray], float]]:
    """Evaluate the U-Net of a stage again and again, for one picture.

    Args:
        begun: the start of the picture.
        draw: noise of the picture's own generator.
        motion: what the noise of the steps is the increment of; None: it is independent.
    Yields: x after each step, (1, h, w, C); the same as float32 NumPy (h, w, C); a function that
        gives it without noise; seconds.
    """
    plan, x = stage.plan, backend.asarray(begun.x)
    beside = None if begun.beside is None else backend.asarray(begun.beside)
    kept = None if begun.kept is None else begun.kept.on(backend)
    state = plan.start()
    for i, t in enumerate(plan.timesteps):
        start = time.perf_counter()
        evaluation = Evaluation(t, i, len(plan), beside, begun.labels)
        with seamless(stage.settings.seamless):
            output, unconditional = denoise(plan.scale_model_input(x, state), evaluation)
        clean = partial(_denoised, backend, plan, i, x, output)
        x, state = plan.step(
            x,
            output,
            state,
            noise=partial(_on_backend, backend, draw),
            motion=None if motion is None else partial(_on_backend, backend, motion),
            unconditional=unconditional,
        )
        if kept is not None:
            x = kept(x, plan, i + 1)
        backend.evaluate(x)
        yield x, backend.to_numpy(x)[0], clean, time.perf_counter() - start


def _require_finite(latents: np.ndarray, index: int, total: int, dtype: str) -> None:
    """Raise MlxdiffError unless the latents of a step are finite."""
    if np.isfinite(latents).all():
        return
    damaged = "the weights are damaged, or the computation overflowed"
    way_out = "verify the model" if dtype == "float32" else f"use {argument('dtype', 'float32')}"
    raise MlxdiffError(
        f"step {index + 1} of {total} gives latents that are not finite: {damaged}; {way_out}"
    )


def _denoised(backend: Any, plan: samplers.Plan, index: int, x: Any, output: Any) -> np.ndarray:
    clean: np.ndarray = backend.to_numpy(plan.denoised(x, output, index))[0]
    return clean


def _motion(stage: Stage, seed: int) -> BrownianMotion | None:
    """Return the Brownian motion of a picture's steps; None: their noise is independent.

    Its numbers have seeds of their own, which follow from the picture's.
    """
    plan, settings = stage.plan, stage.settings
    if plan.interval is None or not plan.draws or not settings.is_brownian(plan):
        return None
    shape = settings.latent_shape(stage.model)
    source = SOURCES[settings.sampler_rng or settings.rng]
    return BrownianMotion(plan.interval, seed % 2**64, lambda own: draw_noise(source(own), shape))


def _on_backend(backend: Any, draw: Callable[..., np.ndarray], *between: float) -> Any:
    return backend.asarray(draw(*between))


def _sum(timings: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Add up the timings of pictures."""
    total: dict[str, Any] = {}
    for one in timings:
        for stage, value in one.items():
            total[stage] = total[stage] + value if stage in total else value
    return total


def _same_pixels(image: PIL.Image.Image, other: PIL.Image.Image) -> bool:
    own = (image.mode, image.size, image.tobytes())
    return own == (other.mode, other.size, other.tobytes())


def _path_text(path: Any) -> str:
    if not isinstance(path, (str, os.PathLike)):
        raise UsageError(f"path is {path!r}; expected the name of a picture file")
    return os.fspath(path)
