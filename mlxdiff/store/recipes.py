"""Which tensor of a model gets how many bits."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import numpy as np

from mlxdiff.errors import UsageError
from mlxdiff.store.folder import ConvertedFolder, ModelSource
from mlxdiff.weights.quantization import AFFINE_BITS, FLOAT_MODES, Quantization, fits
from mlxdiff.weights.tensors import LazyTensor, QuantizedTensor, Shape, quantize_tensor

Shapes = Mapping[str, Shape]

# Everything but norms and biases, in every network but the VAE: that is small, and the last thing
# that a picture passes through.
_NETWORKS = ("unet", "text_encoder", "text_encoder_2")
_CONVOLUTION = re.compile(r"(.*\.)?conv(\d|_in|_out)?\.weight")


@dataclass(frozen=True)
class Recipe:
    """How the tensors of a model are stored.

    Attributes:
        name: what manifests call it.
        fitted: whether scales are fitted to the values (see ``quantization.quantize``).
        plan: component, name -> shape of all its tensors -> how those are stored that are
            quantized.
    """

    name: str
    fitted: bool
    plan: Callable[[str, Shapes], dict[str, Quantization]] = field(repr=False, compare=False)


def _fitting(shape: Shape, how: Quantization) -> Quantization | None:
    """The way, with the largest group up to its own that divides a row; None: none does."""
    groups = [how.group_size]
    if how.mode == "affine":
        groups += [group for group in (64, 32) if group < how.group_size]
    ways = (Quantization(how.bits, group, how.mode) for group in groups)
    return next((way for way in ways if fits(shape, way)), None)


def _candidates(component: str, shapes: Shapes) -> Shapes:
    """What can be quantized at all."""
    if component not in _NETWORKS:
        return {}
    return {n: s for n, s in shapes.items() if n.endswith(".weight") and len(s) > 1}


def _uniform(how: Quantization, convolutions: bool) -> Callable[..., dict[str, Quantization]]:
    """The same for all; where no group size divides a row, floating point."""

    def plan(component: str, shapes: Shapes) -> dict[str, Quantization]:
        ways = {
            name: _fitting(shape, how)
            for name, shape in _candidates(component, shapes).items()
            if convolutions or not _CONVOLUTION.fullmatch(name)
        }
        return {name: way for name, way in ways.items() if way is not None}

    return plan


# ------------------------------------------------------------------------------------ mixed recipes

# Ways to store a tensor from small to large, and the relative error that rounding normally
# distributed values to them makes, squared (scales fitted). What each adds in bits gains less error
# a bit than the one before; 3 bits in groups of 64 do not, where groups of 128 are to be had.
_LADDER = (
    (Quantization(3, 128), 0.0329),
    (Quantization(4, 128), 0.00859),
    (Quantization(4, 64), 0.00699),
    (Quantization(5, 64), 0.00171),
    (Quantization(6, 64), 0.00042),
    (Quantization(8, 64), 0.000026),
)
_LADDER_64 = ((Quantization(3, 64), 0.0282), *_LADDER[2:])


def _mixed(bits: int) -> Callable[..., dict[str, Quantization]]:
    """The least expected error at the size of the uniform recipe with these bits.

    What rounding a tensor does to a picture is taken as its sensitivity, times its size, times the
    squared rounding error. From the smallest way for all, the step that gains most for its bits is
    taken again and again, until the bits are used up.
    """

    def plan(component: str, shapes: Shapes) -> dict[str, Quantization]:
        if component != "unet":
            return _uniform(Quantization(TEXT_BITS[bits]), True)(component, shapes)
        candidates = {
            name: shape
            for name, shape in _candidates(component, shapes).items()
            if not _PROTECTED.fullmatch(name) and fits(shape, Quantization(3, 64))
        }
        sizes = {name: math.prod(shape) for name, shape in candidates.items()}
        ladders = {
            name: _LADDER if fits(shape, _LADDER[0][0]) else _LADDER_64
            for name, shape in candidates.items()
        }
        room = sum(sizes.values()) * Quantization(bits, 64).bits_per_weight
        room -= sum(sizes[n] * ladder[0][0].bits_per_weight for n, ladder in ladders.items())
        depth = max(int(n.split(".")[1]) for n in shapes if n.startswith("down_blocks."))
        steps = []
        for name, ladder in ladders.items():
            weight = _sensitivity(name, depth)
            for rung, (lower, upper) in enumerate(pairwise(ladder), 1):
                cost = upper[0].bits_per_weight - lower[0].bits_per_weight
                steps.append((-weight * (lower[1] - upper[1]) / cost, rung, name, cost))
        place = dict.fromkeys(candidates, 0)
        for _, rung, name, cost in sorted(steps):
            # Steps of one tensor come in order, since each gains less than the one before.
            if rung == place[name] + 1 and cost * sizes[name] <= room:
                room -= cost * sizes[name]
                place[name] = rung
        return {name: ladders[name][rung][0] for name, rung in place.items()}

    return plan


def _sensitivity(name: str, depth: int) -> float:
    """How much the rounding error of a weight in this tensor moves a picture, relatively.

    By kind of layer, and by where in the U-Net it stands: measured on the built-in model
    (benchmarks/quantization.py --sensitivity), interpolated for other numbers of levels.
    """
    kind = next((value for pattern, value in _KINDS if re.search(pattern, name)), 1.0)
    side, _, rest = name.partition(".")
    if side not in _PLACES:
        return kind
    block = rest.partition(".")[0]
    level = depth
    if side == "down_blocks":
        level = int(block)
    elif side == "up_blocks":
        level = depth - int(block)
    share = level / depth if depth else 0.0  # 1 in the middle block
    values = np.log(_PLACES[side])
    return kind * float(np.exp(np.interp(share, np.linspace(0, 1, len(values)), values)))


# Left in floating point: few weights, on which everything depends.
_PROTECTED = re.compile(r"conv_(in|out)\.weight")

# Relative to the mean of the 3x3 convolutions: (pattern, sensitivity of a weight).
_KINDS = (
    (r"\.proj_in\.", 40.0),
    (r"\.proj_out\.", 35.0),
    (r"\.conv_shortcut\.", 15.0),
    (r"\.attn2\.to_[kv]\.", 9.0),
    (r"\.ff\.net\.0\.", 8.0),
    (r"\.attn2\.to_out\.", 7.5),
    (r"\.attn1\.to_out\.", 6.0),
    (r"\.attn1\.to_v\.", 3.3),
    (r"\.ff\.net\.2\.", 3.0),
    (r"\.attn2\.to_q\.", 1.8),
    (r"\.conv2\.", 1.7),
    (r"samplers\.", 1.7),
    (r"\.attn1\.to_[qk]\.", 0.6),
    (r"\.conv1\.", 0.6),
    (r"time_emb", 0.15),
)

# From full resolution to the lowest: what a weight there moves, to the power of 1/2 (see the docs).
_PLACES: dict[str, tuple[float, ...]] = {
    "down_blocks": (1.7, 0.21, 0.063),
    "mid_block": (0.03,),
    "up_blocks": (3.2, 1.6, 0.12),
}
TEXT_BITS = {3: 6, 4: 6, 5: 8, 6: 8}
"""Bits of the text encoders in a mixed recipe, by its bits."""

MIXED = {str(bits): _mixed(bits) for bits in (3, 4, 5, 6)}
"""Bits -> plan of the mixed recipe."""

KINDS = ("mixed", "uniform", "linear")


def find_recipe(bits: int | str, group_size: int | None = None, kind: str | None = None) -> Recipe:
    """The recipe for these words.

    Args:
        bits: 2, 3, 4, 5, 6 or 8; or a float mode: "mxfp4", "nvfp4", "mxfp8"; or the whole name of a
            recipe, as manifests and pictures have it: "uniform-4-64".
        group_size: values that share a scale; None: 64, or what the mode has.
        kind: "mixed" (bits by what a layer can bear, ``bits`` on average), "uniform" (the same for
            all), "linear" (the same for linear layers; convolutions keep floating point, as other
            tools do it); None: the best there is for these bits.
    Raises: UsageError.
    """
    text = str(bits)
    if whole := re.fullmatch(r"([a-z]+)-(\w+?)(?:-(\d+))?", text):
        if (group_size, kind) != (None, None):
            raise UsageError(f"{text} is a whole recipe; leave group size and recipe out")
        kind, text = whole[1], whole[2]
        group_size = None if whole[3] is None else int(whole[3])
    if kind is None:
        kind = "mixed" if text in MIXED and group_size is None else "uniform"
    if kind not in KINDS:
        raise UsageError(f"recipe {kind!r} does not exist; choose {', '.join(KINDS)}")
    if kind == "mixed":
        if text not in MIXED or group_size is not None:
            known = ", ".join(MIXED)
            raise UsageError(f"a mixed recipe exists for {known} bits, with its own group sizes")
        return Recipe(f"mixed-{text}", True, MIXED[text])
    if text in FLOAT_MODES:
        how = Quantization(*FLOAT_MODES[text], text)
        if group_size not in (None, how.group_size):
            raise UsageError(f"{text} has groups of {how.group_size}; leave the group size out")
    elif text.isdecimal():
        how = Quantization(int(text), 64 if group_size is None else group_size)
    else:
        known = ", ".join((*map(str, AFFINE_BITS), *FLOAT_MODES))
        raise UsageError(f"quantization {bits!r} does not exist; choose one of {known}")
    return Recipe(f"{kind}-{text}-{how.group_size}", False, _uniform(how, kind == "uniform"))


class QuantizedModel:
    """A model whose tensors are rounded when they are read; in all else the model itself.

    Args:
        source: the model.
        recipe: which tensor gets how many bits.
        dtype: what scales, and what is not quantized, are stored as.
    Raises: UsageError where the model is quantized already.
    """

    def __init__(self, source: ModelSource, recipe: Recipe, dtype: str = "float16") -> None:
        self._source = source
        self.recipe = recipe
        self._dtype = dtype
        if is_quantized(source):
            raise UsageError(
                f"{source.path}: is quantized already, and rounding twice would make it worse; "
                "quantize the original"
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def tensors(self, component: str) -> dict[str, LazyTensor]:
        """As ``ModelSource.tensors``; quantized ones as the recipe says."""
        tensors = self._source.tensors(component)
        plan = self.recipe.plan(component, {name: t.shape for name, t in tensors.items()})
        rounded = {
            name: quantize_tensor(
                f"{component}/{name}", tensors[name], how, self._dtype, self.recipe.fitted
            )
            for name, how in plan.items()
        }
        return tensors | rounded


def quantized_model(source: ModelSource, recipe: Recipe, dtype: str = "float16") -> ModelSource:
    """A model, quantized by a recipe: see QuantizedModel. One that is so already stays as it is."""
    if isinstance(source, ConvertedFolder) and source.recipe == recipe.name:
        return source
    return cast(ModelSource, QuantizedModel(source, recipe, dtype))


def is_quantized(source: ModelSource) -> bool:
    """Whether a model has quantized tensors."""
    return any(
        isinstance(tensor, QuantizedTensor)
        for component in source.components
        for tensor in source.tensors(component).values()
    )


def recipe_of(source: ModelSource) -> str | None:
    """Name of the recipe that a model is quantized by; None: it is not."""
    if isinstance(source, QuantizedModel):
        return source.recipe.name
    return source.recipe if isinstance(source, ConvertedFolder) else None
