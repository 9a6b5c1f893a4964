"""Networks that enlarge a picture, in the files that people have: ESRGAN and Real-ESRGAN.

Such a file has no config; its names and shapes give the structure. Three spellings of RRDBNet are
in use: that of the first ESRGAN (``model.1.sub.``), of BSRGAN (``RRDB_trunk.``), and of Real-ESRGAN
(``body.0.rdb1``), which is ours.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

from mlxdiff.convert import recognise
from mlxdiff.convert.checkpoint import map_component
from mlxdiff.convert.component import Component, find_component
from mlxdiff.convert.detect import is_weights
from mlxdiff.convert.keymap import Layout, Rule
from mlxdiff.errors import CheckpointError
from mlxdiff.networks.config import CompactConfig, RRDBNetConfig, UpscalerConfig
from mlxdiff.networks.config.reader import MOST_LAYERS
from mlxdiff.store import catalogue
from mlxdiff.store.folder import Progress
from mlxdiff.store.reference import parse
from mlxdiff.weights.files import open_file
from mlxdiff.weights.tensors import LazyTensor, Shape

MOST_WIDTH = 1024  # channels of any known network, and more
_PREFIXES = ("params_ema.", "params.", "module.", "model.netG.")
_FIRST = "model.0.weight"  # of the oldest spelling
_OLD_BLOCK = r"model\.1\.sub\.(\d{1,4})\.RDB(\d)\.conv(\d|1x1)\.0\.(weight|bias)"
_BLOCK = r"(?:RRDB_trunk|body)\.(\d{1,4})\.(?:RDB|rdb)\d\.conv\d\.weight"
_COMPACT = r"body\.(\d{1,4})\.(?:weight|bias)"


def open_upscaler(path: str | os.PathLike[str], progress: Progress | None = None) -> Component:
    """Open a network that enlarges a picture.

    Args:
        path: one file, in safetensors or PyTorch's format, or its hub id (``org/name/FILE``).
        progress: called while files are fetched.
    Raises: CheckpointError, HubError.
    """
    place, provenance = find_component(path, "upscaler", None, progress)
    if place.is_dir():
        raise CheckpointError(
            f"{place}: is a folder; give the file of an upscaler (ESRGAN or Real-ESRGAN)"
        )
    if not place.exists():
        raise CheckpointError(
            f"{place}: no such file, and not the hub id of a file (org/name/FILE); give the file "
            "of an upscaler (ESRGAN or Real-ESRGAN)"
        )
    file = open_file(place)
    tensors = _without_prefix(file.tensors)
    config = structure(place, tensors)
    if config is None:
        raise CheckpointError(
            f"{place}: {recognise.refusal(file.tensors)}; expected an upscaler (ESRGAN or "
            "Real-ESRGAN)"
        )
    files = map_component(place, tensors, _layout(config, tensors), config, str(place))
    return Component(config, lambda: files.read(config), provenance)


def is_upscaler(path: str | os.PathLike[str]) -> bool:
    """Return True if a path is, or by its form can only be, the file of an upscaler.

    A file of the hub counts as one: a model in one file is fetched by its repository.
    """
    place = catalogue.expand(path)
    if os.path.isfile(place):
        file = Path(place)
        return is_weights(file) and structure(file, open_file(file).tensors) is not None
    reference = None if os.path.exists(place) else parse(str(place))
    return reference is not None and bool(reference.file)


def structure(path: Path, tensors: Mapping[str, LazyTensor]) -> UpscalerConfig | None:
    """Derive the structure of an upscaler from its tensors; None: they are of something else.

    Raises: CheckpointError for an upscaler that mlxdiff cannot represent.
    """
    shapes = {name: tensor.shape for name, tensor in _without_prefix(tensors).items()}
    old = _FIRST in shapes and bool(_numbers(shapes, _OLD_BLOCK))
    if old or ("conv_first.weight" in shapes and _numbers(shapes, _BLOCK)):
        return _rrdbnet(path, shapes, old)
    if shapes and len(_numbers(shapes, _COMPACT)) == len(shapes) and "body.0.weight" in shapes:
        return _compact(path, shapes)
    return None


def _without_prefix(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Drop what stands before all names."""
    for prefix in _PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return dict(tensors)


def _rrdbnet(path: Path, shapes: Mapping[str, Shape], old: bool) -> RRDBNetConfig:
    if old:
        last = max(_numbers(shapes, r"model\.(\d{1,4})\.weight"), default=0)
        first, end = shapes[_FIRST], shapes.get(f"model.{last}.weight", ())
        doublings = (last - 4) // 3
        blocks = _numbers(shapes, _OLD_BLOCK)
    else:
        first, end = shapes["conv_first.weight"], shapes.get("conv_last.weight", ())
        doublings = max(_numbers(shapes, r"(?:upconv|conv_up)(\d{1,2})\.weight"), default=0)
        blocks = _numbers(shapes, _BLOCK)
    growth = next(
        (
            shape[0]
            for name, shape in shapes.items()
            if shape and re.search(r"\.(?:RDB|rdb)1\.conv1\.(?:0\.)?weight$", name)
        ),
        0,
    )
    if len(first) != 4 or len(end) != 4 or not blocks or not growth:
        raise CheckpointError(
            f"{path}: is not a whole ESRGAN network (its first or last convolution, or its blocks, "
            "are missing); download it again"
        )
    if end[0] != 3 or first[1] not in (3, 12, 48):
        raise CheckpointError(
            f"{path}: this network takes {first[1]} channels and gives {end[0]}; only networks for "
            "color pictures (3 channels) are supported"
        )
    shuffle = math.isqrt(first[1] // 3)
    sizes = doublings, max(blocks), first[0], growth
    most = 5, MOST_LAYERS - 1, MOST_WIDTH, MOST_WIDTH
    if min(sizes) < 0 or any(a > b for a, b in zip(sizes, most, strict=True)) or not first[0]:
        doublings = -1
    if 2.0**doublings < shuffle:
        raise CheckpointError(
            f"{path}: an ESRGAN network of {max(blocks) + 1} blocks of {first[0]} channels that "
            f"enlarges in {sizes[0]} steps; no such network is known"
        )
    return RRDBNetConfig(
        width=first[0],
        growth=growth,
        blocks=max(blocks) + 1,
        doublings=doublings,
        shuffle=shuffle,
        plus=any(".conv1x1." in name for name in shapes),
    )


def _compact(path: Path, shapes: Mapping[str, Shape]) -> CompactConfig:
    first, last = shapes["body.0.weight"], max(_numbers(shapes, _COMPACT))
    end = shapes.get(f"body.{last}.weight", ())
    if len(first) != 4 or len(end) != 4 or last % 2 or not 2 <= last <= 2 * MOST_LAYERS:
        raise CheckpointError(
            f"{path}: is not a whole Real-ESRGAN compact network (convolutions and slopes in turn, "
            "a convolution at both ends)"
        )
    scale = math.isqrt(end[0] // 3)
    sound = 0 < first[0] <= MOST_WIDTH and 0 < scale <= 16
    if first[1] != 3 or end[0] != 3 * scale**2 or not sound:
        raise CheckpointError(
            f"{path}: this network takes {first[1]} channels and its last convolution gives "
            f"{end[0]}; only networks for color pictures (3 channels) are supported"
        )
    return CompactConfig(width=first[0], convolutions=last // 2 - 1, scale=scale)


def _numbers(names: Mapping[str, Shape], pattern: str) -> list[int]:
    """The numbers of the names that match."""
    return [int(match[1]) for name in names if (match := re.fullmatch(pattern, name))]


def _layout(config: UpscalerConfig, names: Mapping[str, LazyTensor]) -> Layout:
    """The spelling of the names."""
    kind = r"\.(weight|bias)"
    if isinstance(config, CompactConfig):
        return Layout()
    if _FIRST not in names:
        return Layout(
            (
                Rule(r"RRDB_trunk\.(\d+)\.RDB(\d)\.(.+)", r"body.\1.rdb\2.\3"),
                Rule(rf"trunk_conv{kind}", r"conv_body.\1"),
                Rule(rf"upconv(\d){kind}", r"conv_up\1.\2"),
                Rule(rf"HRconv{kind}", r"conv_hr.\1"),
            )
        )
    ups, blocks = config.doublings, config.blocks
    return Layout(
        (
            Rule(_OLD_BLOCK, r"body.\1.rdb\2.conv\3.\4"),
            Rule(
                r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv1x1\.weight", r"body.\1.rdb\2.conv1x1.weight"
            ),
            Rule(rf"model\.0{kind}", r"conv_first.\1"),
            Rule(rf"model\.1\.sub\.{blocks}{kind}", r"conv_body.\1"),
            *(Rule(rf"model\.{3 * i}{kind}", rf"conv_up{i}.\1") for i in range(1, ups + 1)),
            Rule(rf"model\.{3 * ups + 2}{kind}", r"conv_hr.\1"),
            Rule(rf"model\.{3 * ups + 4}{kind}", r"conv_last.\1"),
        )
    )
