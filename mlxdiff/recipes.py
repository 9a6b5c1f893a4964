"""Which tensor of a model gets how many bits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, cast

from mlxdiff.errors import UsageError
from mlxdiff.quantization import AFFINE_BITS, FLOAT_MODES, Quantization, fits
from mlxdiff.weights import (
    ConvertedFolder,
    LazyTensor,
    ModelSource,
    QuantizedTensor,
    quantize_tensor,
)

Rule = tuple[str, Quantization | None]

# Everything but norms and biases, in every network but the VAE: that is small, and the last thing
# that a picture passes through.
_ALL = r"(unet|text_encoder|text_encoder_2)\..*\.weight"
_UNIFORM = ((_ALL, True),)
_LINEAR = ((r"unet\.(.*\.)?conv(\d|_in|_out)?\.weight", False), (_ALL, True))

MIXED: dict[str, tuple[Rule, ...]] = {}
"""Bits -> rules of the mixed recipe."""

KINDS = ("mixed", "uniform", "linear")


@dataclass(frozen=True)
class Recipe:
    """How the tensors of a model are stored.

    Attributes:
        name: what manifests call it.
        rules: the first whose pattern matches the whole of ``component.tensor`` decides; None, and
            no rule at all: floating point.
    """

    name: str
    rules: tuple[Rule, ...]

    def choose(self, component: str, name: str, shape: tuple[int, ...]) -> Quantization | None:
        """How this tensor is stored; None: in floating point.

        Where the group size does not divide a row, the largest smaller one that does is taken;
        where none does (input channels of the latents), the tensor keeps floating point.
        """
        for pattern, how in self.rules:
            if re.fullmatch(pattern, f"{component}.{name}"):
                return None if how is None else _fitting(shape, how)
        return None


def _fitting(shape: tuple[int, ...], how: Quantization) -> Quantization | None:
    groups = [how.group_size]
    if how.mode == "affine":
        groups += [group for group in (64, 32) if group < how.group_size]
    for group in groups:
        one = Quantization(how.bits, group, how.mode)
        if fits(shape, one):
            return one
    return None


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
        return Recipe(f"mixed-{text}", MIXED[text])
    if text in FLOAT_MODES:
        how = Quantization(*FLOAT_MODES[text], text)
        if group_size not in (None, how.group_size):
            raise UsageError(f"{text} has groups of {how.group_size}; leave the group size out")
    elif text.isdecimal():
        how = Quantization(int(text), 64 if group_size is None else group_size)
    else:
        known = ", ".join((*map(str, AFFINE_BITS), *FLOAT_MODES))
        raise UsageError(f"quantization {bits!r} does not exist; choose one of {known}")
    rules = _UNIFORM if kind == "uniform" else _LINEAR
    return Recipe(
        f"{kind}-{text}-{how.group_size}", tuple((p, how if q else None) for p, q in rules)
    )


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
        return {
            name: self._rounded(component, name, tensor)
            for name, tensor in self._source.tensors(component).items()
        }

    def _rounded(self, component: str, name: str, tensor: LazyTensor) -> LazyTensor:
        how = self.recipe.choose(component, name, tensor.shape)
        if how is None:
            return tensor
        return quantize_tensor(f"{component}/{name}", tensor, how, self._dtype)


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
