"""What a run is that draws a video: which options it takes, and its defaults.

In the sampling loop a video is one tall picture, its frames below each other: (1, F * h, w, C).
Memory has the same order as torch's (1, C, F, h, w), so noise, steps and guidance are those of
diffusers' pipelines without any code of their own. The U-Net sees the frames as samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlxdiff.errors import UsageError, argument
from mlxdiff.networks.condition import Frames
from mlxdiff.pictures.videos import FPS
from mlxdiff.run.kind import Kind
from mlxdiff.run.options import RunOptions

FRAMES = 16
AT_ONCE = 4  # frames that layers see in low memory
CONTEXT, STRIDE = 16, 4  # of windows; the defaults of diffusers' enable_free_noise

# Options that mean nothing for a video, or that no reference defines for one.
_PICTURES_ONLY = (
    "region mask outpaint zoom_out only_masked paste_original hires hires_upscaler hires_strength "
    "hires_steps denoising_start feature_reuse feature_reuse_error vary noise_size"
).split()


class Video(NamedTuple):
    """The numbers of a video.

    Attributes:
        frames: how many there are.
        fps: of them in a second.
        context_length, context_stride: windows of the motion modules; None: they see all frames.
    """

    frames: int
    fps: float
    context_length: int | None
    context_stride: int | None


def check(model: Any, refiner: Any, asked: RunOptions) -> None:
    """Refuse what cannot be combined with a video. Raises: UsageError."""
    default = RunOptions()
    for name in _PICTURES_ONLY:
        value, usual = getattr(asked, name), getattr(default, name)
        if value is not None and (usual is None or value != usual):
            raise UsageError(
                f"{argument(name)}: it is for pictures, and this model draws videos; leave it out, "
                f"or leave out the motion adapter ({argument('motion_adapter')})"
            )
    added = [one.part for one in model.additions.items]
    for part, name in (
        ("t2i_adapter", "t2i_adapters"),
        ("refiner", "refiner"),
        ("upscaler", "upscaler"),
        ("judge", "judge"),
    ):
        if part in added or (part == "refiner" and refiner is not None):
            raise _not_beside(name)
    if model.controlnets and (
        model.is_sdxl or any(one.is_lllite or one.takes_mode for one in model.controlnets)
    ):
        raise UsageError(
            f"{argument('controlnets')}: beside a motion adapter only ControlNets of "
            "Stable Diffusion 1.x are known, no LLLite and no Union; leave out one of the two"
        )


def _not_beside(name: str) -> UsageError:
    return UsageError(
        f"{argument(name)} cannot be combined with a motion adapter "
        f"({argument('motion_adapter')}); leave out one of the two"
    )


def resolve(model: Kind, asked: RunOptions, given: int | None) -> Video:
    """Fill in the numbers of a video.

    Args:
        given: frames of the video that it starts from; None: there is none, or it is a picture.
    Raises: UsageError.
    """
    frames = asked.frames or given or FRAMES
    if given is not None and frames > given:
        raise UsageError(
            f"{argument('frames')} is {frames}, and the video to start from has {given}; give at "
            "most so many"
        )
    most = model.unet_config.motion.motion_max_seq_length
    length = min(CONTEXT, most) if asked.context_length is None else asked.context_length
    if min(length, frames) > most:
        raise UsageError(
            f"{argument('context_length')} is {length}; this motion adapter knows at most {most} "
            "frames at a time"
        )
    stride = min(STRIDE, length) if asked.context_stride is None else asked.context_stride
    if stride > length:
        raise UsageError(
            f"{argument('context_stride')} is {stride}; expected at most "
            f"{argument('context_length')} {length}, so that windows leave no frame out"
        )
    windows = frames > length
    if windows and asked.rng == "gpu":
        raise UsageError(
            f"{argument('rng', 'gpu')}: with more frames than {argument('context_length')} the "
            "noise is shuffled, and how CUDA shuffles is not known here; take cpu"
        )
    fps = FPS if asked.fps is None else asked.fps
    return Video(frames, fps, length if windows else None, stride if windows else None)


def check_controls(images: Sequence[np.ndarray], frames: int) -> None:
    """Refuse control videos of another length. Raises: UsageError."""
    for image in images:
        if image.ndim == 4 and len(image) < frames:
            raise UsageError(
                f"{argument('control_image')}: the video has {len(image)} frames, and "
                f"{argument('frames')} is {frames}; give as many, or one picture for all of them"
            )


def frames_of(settings: Any, low_memory: bool = False) -> Frames:
    """The frames of a run, as networks take them."""
    if settings.frames is None:
        return Frames()
    if settings.motion_bucket is not None:  # Stable Video Diffusion: all its layers see all frames
        return Frames(settings.frames)
    windows = settings.context_length, settings.context_stride or STRIDE
    return Frames(settings.frames, *windows, AT_ONCE if low_memory else None)


def stacked(frames: np.ndarray) -> np.ndarray:
    """Put frames (F, h, w, C) below each other: (1, F * h, w, C)."""
    count, height, width, channels = frames.shape
    return frames.reshape(1, count * height, width, channels)


def unstacked(tall: np.ndarray, count: int) -> np.ndarray:
    """The frames (F, h, w, C) of (1, F * h, w, C), or of (F * h, w, C)."""
    *_, rows, width, channels = tall.shape
    return tall.reshape(count, rows // count, width, channels)


def shuffled(
    noise: np.ndarray, frames: Frames, permute: Callable[[int], Sequence[int]]
) -> np.ndarray:
    """Repeat the noise of the first window in other orders, window after window.

    Args:
        noise: (F, h, w, C).
        frames: with windows.
        permute: gives the next random order of n things.
    Source: Qiu et al. 2023 (FreeNoise), section 4.2; diffusers pipelines/free_noise_utils.py
        (``shuffle_context``).
    """
    length, stride, count = frames.context, frames.stride, frames.count
    assert length is not None
    noise = noise.copy()
    for start in range(length, count, stride):
        first = start - length
        size = min(count, first + stride) - first
        order = [first + i for i in permute(size)]
        stop = min(count, start + size)
        noise[start:stop] = noise[order[: stop - start]]
    return noise
