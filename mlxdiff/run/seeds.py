"""The noise of a picture: which generator draws what, in which order.

diffusers draws all of a picture from one generator: the sample of the image, the first noise, the
noise of the steps, and what a second pass needs. A1111 and ComfyUI begin each pass with its noise,
from a new generator of the same seed, and encode the image without noise; the noise of the steps
can come from another kind of generator, and from another seed.

Source: stable-diffusion-webui, modules/rng.py (ImageRNG); ComfyUI, comfy/sample.py (prepare_noise)
and comfy/k_diffusion/sampling.py (default_noise_sampler); tests compare with torch's generators.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np

from mlxdiff.errors import UsageError, argument
from mlxdiff.noise import SEEDS, SOURCES, NoiseSource, framed, interpolated
from mlxdiff.run import video
from mlxdiff.run.model import ImageLatents, draw_noise
from mlxdiff.run.settings import Settings

Shape = tuple[int, int, int]

AT_ONCE = 16
"""Frames of a video that diffusers encodes at a time, and draws noise for (decode_chunk_size)."""


class Draws:
    """The draws of one picture.

    Args:
        settings: of the run.
        seed: of the picture.
        vary: (seed, share) of the picture's variation; None: there is none.
        smaller: shape of the first noise that is put into the middle; None: there is none.
    """

    def __init__(
        self,
        settings: Settings,
        seed: int,
        vary: tuple[int, float] | None = None,
        smaller: Shape | None = None,
    ) -> None:
        self._settings, self._seed, self._vary, self._smaller = settings, seed, vary, smaller
        self._restarts = settings.seed_order == "a1111"
        self._begin()

    def _begin(self) -> None:
        settings = self._settings
        self._stream = self._new(self._seed)
        self._of_steps = self._stream
        kind, delta = settings.sampler_rng or settings.rng, settings.noise_seed_delta
        if kind != settings.rng or delta:
            self._of_steps = SOURCES[kind](self._seed + delta)

    def next(self, shape: Shape, channels: int | None = None) -> np.ndarray:
        """Draw the next noise of the stream: (1, h, w, C). ``channels`` takes the place of C."""
        return draw_noise(self._stream, shape, channels)

    def vector(self, width: int) -> np.ndarray:
        """Draw the next noise of the stream for an embedding: (1, width)."""
        return self._stream.randn((1, width))

    def first(self, shape: Shape) -> np.ndarray:
        """Draw the first noise of a picture: (1, h, w, C)."""
        frames = video.frames_of(self._settings)
        if frames.context is not None:
            noise = video.unstacked(self.next(shape), frames.count)
            return video.stacked(video.shuffled(noise, frames, self._stream.permutation))
        if self._smaller is None or self._smaller == shape:
            return self._varied(self.next(shape))
        small = self._varied(draw_noise(self._new(self._seed), self._smaller))
        return framed(self.next(shape), small)

    def second(self, shape: Shape) -> np.ndarray:
        """Draw the noise that a second pass begins with: (1, h, w, C)."""
        if not self._restarts:
            return self.next(shape)
        self._begin()
        return self.first(shape)

    def step(self, shape: Shape) -> np.ndarray:
        """Draw the noise of a stochastic step: (1, h, w, C)."""
        return draw_noise(self._of_steps, shape)

    def sample(self, latents: ImageLatents) -> np.ndarray:
        """Return a sample of an encoded picture; its mean where passes begin with their noise."""
        if self._restarts:
            return latents.mean
        return latents.draw(lambda: self.next(_shape_of(latents.mean)))

    def frames(self, count: int, shape: Shape) -> np.ndarray:
        """Draw noise for frames, one after the other: (count, h, w, C)."""
        rows, columns, channels = shape
        drawn = self._stream.randn((count, channels, rows, columns))
        return np.ascontiguousarray(drawn.transpose(0, 2, 3, 1))

    def sample_frames(self, frames: Sequence[ImageLatents]) -> np.ndarray:
        """Return samples of encoded frames: (F, h, w, C); see ``sample``."""
        found = []
        for start in range(0, len(frames), AT_ONCE):
            part = frames[start : start + AT_ONCE]
            clean = np.concatenate([one.mean for one in part])
            if not self._restarts and part[0].std is not None:
                spread = np.concatenate([one.std for one in part if one.std is not None])
                clean = clean + spread * self.frames(len(part), clean.shape[1:])
            found.append(clean)
        return np.concatenate(found)

    def _varied(self, noise: np.ndarray) -> np.ndarray:
        if self._vary is None or self._vary[1] == 0.0:
            return noise
        seed, share = self._vary
        return interpolated(noise, draw_noise(self._new(seed), _shape_of(noise)), share)

    def _new(self, seed: int) -> NoiseSource:
        return SOURCES[self._settings.rng](seed)


def _shape_of(latents: np.ndarray) -> Shape:
    rows, columns, channels = latents.shape[1:]
    return rows, columns, channels


def pick_seeds(seed: int | None, count: int, vary: tuple[int, float] | None = None) -> list[int]:
    """The seeds of a run: seed, seed + 1, ...; the first is random if none is given.

    With a variation all pictures have the same seed: the seed of the variation counts on.
    """
    if count < 1:
        raise UsageError(f"{argument('count')} is {count}; expected at least 1")
    first = secrets.randbits(32) if seed is None else seed
    if first + count > SEEDS.stop:
        raise UsageError(
            f"{argument('seed')} {first}: with {argument('count')} {count} the last seed is "
            f"{first + count - 1}; torch takes at most 2**64 - 1"
        )
    return [first + (i if vary is None else 0) for i in range(count)]


def variation(vary: tuple[int, float] | None, index: int) -> tuple[int, float] | None:
    """The variation of picture ``index`` of a run."""
    return None if vary is None else (vary[0] + index, vary[1])
