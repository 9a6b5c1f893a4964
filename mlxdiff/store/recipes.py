"""Quantization recipes: the number of bits for each tensor of a model."""

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

# A recipe covers everything except norms and biases, in every network except the VAE. The VAE is
# small, and its errors reach the picture directly.
_NETWORKS = ("unet", "text_encoder", "text_encoder_2")
_CONVOLUTION = re.compile(r"(.*\.)?conv(\d|_in|_out)?\.weight")


@dataclass(frozen=True)
class Recipe:
    """A choice of the stored form of each tensor of a model.

    Attributes:
        name: name in manifests.
        fitted: True if scales are fitted to the values (see ``quantization.quantize``).
        plan: takes a component and the shapes of all its tensors; returns the quantization of each
            tensor to quantize.
    """

    name: str
    fitted: bool
    plan: Callable[[str, Shapes], dict[str, Quantization]] = field(repr=False, compare=False)


def _fitting(shape: Shape, wanted: Quantization) -> Quantization | None:
    """Reduce the group size until it divides a row. Return None if no size does."""
    groups = [wanted.group_size]
    if wanted.mode == "affine":
        groups += [group for group in (64, 32) if group < wanted.group_size]
    options = (Quantization(wanted.bits, group, wanted.mode) for group in groups)
    return next((option for option in options if fits(shape, option)), None)


def _candidates(component: str, shapes: Shapes) -> Shapes:
    """Return the tensors that can be quantized at all."""
    if component not in _NETWORKS:
        return {}
    return {n: s for n, s in shapes.items() if n.endswith(".weight") and len(s) > 1}


def _uniform(wanted: Quantization, convolutions: bool) -> Callable[..., dict[str, Quantization]]:
    """Plan the same bits for all tensors. Rows that no group size divides stay floating point."""

    def plan(component: str, shapes: Shapes) -> dict[str, Quantization]:
        fitting = {
            name: _fitting(shape, wanted)
            for name, shape in _candidates(component, shapes).items()
            if convolutions or not _CONVOLUTION.fullmatch(name)
        }
        return {name: how for name, how in fitting.items() if how is not None}

    return plan


# ------------------------------------------------------------------------------------ mixed recipes

# Quantizations from small to large, each with its squared relative rounding error for normally
# distributed values (scales fitted). Each rung reduces the error per added bit less than the rung
# before. 3 bits in groups of 64 break this rule: they are used only if 128 does not divide a row.
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
    """Plan the least expected error at the size of the uniform recipe with these bits.

    The model of the error: rounding a tensor changes a picture by its sensitivity times its size
    times the squared rounding error. The plan starts with the smallest rung for each tensor. It
    then repeats the step with the greatest gain per bit until the bits are used up.
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
        reached = dict.fromkeys(candidates, 0)
        for _, rung, name, cost in sorted(steps):
            # The steps of a tensor come in order, because each gains less than the one before.
            if rung == reached[name] + 1 and cost * sizes[name] <= room:
                room -= cost * sizes[name]
                reached[name] = rung
        return {name: ladders[name][rung][0] for name, rung in reached.items()}

    return plan


def _sensitivity(name: str, depth: int) -> float:
    """Return the relative effect of one weight's rounding error on a picture.

    It depends on the kind of layer and on its place in the U-Net. The values were measured on the
    built-in model (benchmarks/quantization.py --sensitivity) and are interpolated for other numbers
    of levels.
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


# These stay in floating point: they are small, and every value passes through them.
_PROTECTED = re.compile(r"conv_(in|out)\.weight")

# (pattern, sensitivity of one weight), relative to the mean of the 3x3 convolutions.
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

# Effect of one weight, from full resolution to the lowest, to the power of 1/2
# (docs/quantization.md).
_PLACES: dict[str, tuple[float, ...]] = {
    "down_blocks": (1.7, 0.21, 0.063),
    "mid_block": (0.03,),
    "up_blocks": (3.2, 1.6, 0.12),
}
TEXT_BITS = {3: 6, 4: 6, 5: 8, 6: 8}
"""Bits of a mixed recipe -> bits of the text encoders in it."""

MIXED = {str(bits): _mixed(bits) for bits in (3, 4, 5, 6)}
"""Bits of a mixed recipe -> its plan."""

KINDS = ("mixed", "uniform", "linear")


def find_recipe(bits: int | str, group_size: int | None = None, kind: str | None = None) -> Recipe:
    """Find a recipe by bits, group size and kind, or by its full name.

    Args:
        bits: 2, 3, 4, 5, 6 or 8; or a float mode: "mxfp4", "nvfp4", "mxfp8"; or the full name of a
            recipe from a manifest or a picture: "uniform-4-64".
        group_size: number of values that share a scale. None: 64, or the group size of the float
            mode.
        kind: "mixed" (bits by the sensitivity of each layer, ``bits`` on average), "uniform" (the
            same for all) or "linear" (the same for linear layers; convolutions stay floating point,
            as in other tools). None: the best kind for these bits.
    Raises: UsageError.
    """
    text = str(bits)
    if whole := re.fullmatch(r"([a-z]+)-(\w+?)(?:-(\d+))?", text):
        if (group_size, kind) != (None, None):
            raise UsageError(f"{text} is a complete recipe; leave group size and recipe out")
        kind, text = whole[1], whole[2]
        group_size = None if whole[3] is None else int(whole[3])
    if kind is None:
        kind = "mixed" if text in MIXED and group_size is None else "uniform"
    if kind not in KINDS:
        raise UsageError(f"recipe {kind!r} does not exist; choose {', '.join(KINDS)}")
    if kind == "mixed":
        if text not in MIXED or group_size is not None:
            known = ", ".join(MIXED)
            raise UsageError(
                f"mixed recipes exist for {known} bits and have their own group sizes; choose one "
                "of these bits, and leave the group size out"
            )
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


def rounded(
    tensors: dict[str, LazyTensor], component: str, recipe: Recipe, dtype: str = "float16"
) -> dict[str, LazyTensor]:
    """Return the tensors of a component; those of the recipe are quantized when they are read.

    Args:
        dtype: type of the scales and of tensors that are not quantized.
    """
    plan = recipe.plan(component, {name: tensor.shape for name, tensor in tensors.items()})
    made = {
        name: quantize_tensor(f"{component}/{name}", tensors[name], how, dtype, recipe.fitted)
        for name, how in plan.items()
    }
    return tensors | made


class QuantizedModel:
    """A model whose tensors are rounded when they are read. The rest stays unchanged.

    Args:
        source: the model.
        recipe: bits of each tensor.
        dtype: type of the scales and of tensors that are not quantized.
    Raises: UsageError if the model is quantized already.
    """

    def __init__(self, source: ModelSource, recipe: Recipe, dtype: str = "float16") -> None:
        self._source = source
        self.recipe = recipe
        self._dtype = dtype
        if is_quantized(source):
            raise UsageError(
                f"{source.path}: already quantized, and rounding twice would lose quality; "
                "quantize the original"
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def tensors(self, component: str) -> dict[str, LazyTensor]:
        """See ``ModelSource.tensors``. The tensors of the recipe are quantized."""
        return rounded(self._source.tensors(component), component, self.recipe, self._dtype)


def quantized_model(source: ModelSource, recipe: Recipe, dtype: str = "float16") -> ModelSource:
    """Quantize a model by a recipe; see QuantizedModel. A model of this recipe stays unchanged.

    A checkpoint that is quantized in another tool's form is dequantized first.
    """
    if isinstance(source, ConvertedFolder) and source.recipe == recipe.name:
        return source
    return cast(ModelSource, QuantizedModel(unpacked_model(source), recipe, dtype))


class _UnpackedModel:
    """A model whose quantized tensors are dequantized when they are read, if ``dtype`` needs it.

    Args:
        source: the model.
        dtype: a tensor stays packed if its scales keep their values in this type. None: unpack all.
    """

    def __init__(self, source: ModelSource, dtype: str | None) -> None:
        self._source, self._dtype = source, dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def tensors(self, component: str) -> dict[str, LazyTensor]:
        """See ``ModelSource.tensors``."""
        return {
            name: self._unpacked(tensor) if isinstance(tensor, QuantizedTensor) else tensor
            for name, tensor in self._source.tensors(component).items()
        }

    def _unpacked(self, tensor: QuantizedTensor) -> LazyTensor:
        if self._dtype is not None and tensor.fits_exactly(self._dtype):
            return tensor
        return LazyTensor(tensor.shape, "F32", tensor.read, form=tensor.form, stored=tensor.stored)


def unpacked_model(source: ModelSource, dtype: str | None = None) -> ModelSource:
    """Dequantize the tensors of a checkpoint that MLX's form cannot hold exactly in this type.

    A converted folder stays unchanged.

    Args:
        source: the model.
        dtype: type of the scales. None: dequantize all.
    """
    if isinstance(source, ConvertedFolder) or not is_quantized(source):
        return source
    return cast(ModelSource, _UnpackedModel(source, dtype))


AS_STORED = "as-stored"
"""Recipe of a folder whose quantized tensors are those of its source, unchanged."""


def is_quantized(source: ModelSource) -> bool:
    """Return True if a model has quantized tensors."""
    return any(
        isinstance(tensor, QuantizedTensor)
        for component in source.components
        for tensor in source.tensors(component).values()
    )


def recipe_of(source: ModelSource) -> str | None:
    """Return the name of a model's quantization recipe, or None if it is not quantized."""
    if isinstance(source, QuantizedModel):
        return source.recipe.name
    recipe = source.recipe if isinstance(source, ConvertedFolder) else None
    return None if recipe == AS_STORED else recipe
