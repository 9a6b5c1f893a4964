"""Which tensor of a checkpoint is which parameter of ours: a table of whole-key rules by layout.

A rule matches a whole name or nothing. Every name of the source must be used exactly once, or be
ignored for a stated reason, and every parameter must be produced exactly once; all else is an
error. Our names are those of today's diffusers, so the tables hold the spellings of other days.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mlxdiff.convert.transforms import Transform, choose
from mlxdiff.params import Shape
from mlxdiff.weights import raise_faults


@dataclass(frozen=True)
class Rule:
    """A spelling: source names that match ``source`` as a whole become ``target`` (as re.sub's)."""

    source: str
    target: str


@dataclass(frozen=True)
class Ignored:
    """Names that may be there without being used, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class Layout:
    """All that may stand in one kind of file. A name that no rule matches stands for itself."""

    rules: tuple[Rule, ...]
    ignored: tuple[Ignored, ...] = ()


_VAE_ATTENTION = r"((?:encoder|decoder)\.mid_block\.attentions\.0)"

DIFFUSERS_UNET = Layout(rules=())

DIFFUSERS_VAE = Layout(
    # diffusers < 0.18 (AttentionBlock); weights are (C, C), or (C, C, 1, 1) in early conversions.
    rules=(
        Rule(_VAE_ATTENTION + r"\.query\.(weight|bias)", r"\1.to_q.\2"),
        Rule(_VAE_ATTENTION + r"\.key\.(weight|bias)", r"\1.to_k.\2"),
        Rule(_VAE_ATTENTION + r"\.value\.(weight|bias)", r"\1.to_v.\2"),
        Rule(_VAE_ATTENTION + r"\.proj_attn\.(weight|bias)", r"\1.to_out.0.\2"),
    ),
)

TRANSFORMERS_CLIP_TEXT = Layout(
    # transformers >= 5.6 writes CLIPTextModel without the prefix.
    rules=(Rule(r"((?:embeddings|encoder|final_layer_norm)\..+)", r"text_model.\1"),),
    ignored=(
        Ignored(
            r"(?:text_model\.)?embeddings\.position_ids",
            "a buffer that counts 0, 1, 2, ...; not a weight",
        ),
        Ignored(
            r"text_projection\.weight",
            "the class in model_index.json is CLIPTextModel, which has no projection",
        ),
        Ignored(
            r"logit_scale|(?:vision_model|visual_projection)\..+",
            "belongs to the image half of CLIP, which text-to-image does not use",
        ),
    ),
)

DIFFUSERS: dict[str, Layout] = {
    "text_encoder": TRANSFORMERS_CLIP_TEXT,
    "text_encoder_2": TRANSFORMERS_CLIP_TEXT,
    "unet": DIFFUSERS_UNET,
    "vae": DIFFUSERS_VAE,
}
"""The layout of each component of a diffusers folder."""


@dataclass(frozen=True)
class Use:
    """One tensor that is used: its name in the source, and what happens to it."""

    source: str
    transform: Transform


@dataclass(frozen=True)
class Mapped:
    """The outcome for a component: parameter -> use (in our order), and what is left over.

    ``ignored`` holds (name, reason).
    """

    uses: dict[str, Use]
    ignored: tuple[tuple[str, str], ...]


def targets(layout: Layout, name: str) -> Iterable[str]:
    """The names that a source name may stand for: its own, and one for each rule that matches."""
    yield name
    for rule in layout.rules:
        if match := re.fullmatch(rule.source, name):
            yield match.expand(rule.target)


def map_names(
    found: Mapping[str, Shape], expected: Mapping[str, Shape], layout: Layout, where: str
) -> Mapped:
    """Account for every tensor of a component.

    Args:
        found: name -> shape in the source.
        expected: parameter -> shape in our layout.
        layout: spellings that the source may use.
        where: the component, for messages.
    Raises: CheckpointError with every missing, unknown, duplicated and misshapen tensor.
    """
    uses: dict[str, Use] = {}
    ignored: list[tuple[str, str]] = []
    unknown: list[str] = []
    duplicated: list[str] = []
    misshapen: list[str] = []
    seen: dict[str, str] = {}
    for name, shape in found.items():
        hits = [target for target in targets(layout, name) if target in expected]
        if not hits:
            reason = next((i.reason for i in layout.ignored if re.fullmatch(i.source, name)), None)
            if reason is None:
                unknown.append(name)
            else:
                ignored.append((name, reason))
            continue
        target = hits[0]
        if len(hits) > 1 or target in seen:
            duplicated.append(f"{name} and {seen.get(target, target)}")
            continue
        seen[target] = name
        transform = choose(shape, expected[target])
        if transform is None:
            misshapen.append(f"{name} is {shape}, expected {_as_stored(expected[target])}")
        else:
            uses[target] = Use(name, transform)
    raise_faults(
        where,
        missing=[target for target in expected if target not in seen],
        unknown=unknown,
        duplicated=duplicated,
        misshapen=misshapen,
    )
    return Mapped({target: uses[target] for target in expected}, tuple(ignored))


def _as_stored(shape: Shape) -> Shape:
    """The shape that PyTorch gives to a parameter of ours."""
    return (shape[0], shape[3], shape[1], shape[2]) if len(shape) == 4 else shape
