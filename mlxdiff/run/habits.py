"""Notes on habits from other programs: what is honoured as written, but may mean something else.

Each is a note on stderr, once for a run. What cannot be honoured is an error elsewhere.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

from mlxdiff import samplers
from mlxdiff.errors import UsageError, argument
from mlxdiff.run.model import Model
from mlxdiff.run.options import RunOptions

logger = logging.getLogger("mlxdiff")

# Signs of A1111's prompt syntax and what they look like. Each reads a bounded stretch of text.
_A1111: Mapping[str, re.Pattern[str]] = {
    "(word:1.2)": re.compile(r"\([^()\n]{1,200}:\s{0,9}[+-]?[0-9.]{1,20}\s{0,9}\)"),
    "((word))": re.compile(r"\(\([^()\n]{1,200}\)\)"),
    "[from:to:when]": re.compile(r"\[[^\[\]\n]{0,200}:[^\[\]:\n]{0,200}:?[0-9.]{1,9}\]"),
    "[a|b]": re.compile(r"\[[^\[\]|\n]{0,200}\|[^\[\]\n]{0,200}\]"),
    "<lora:name:1>": re.compile(r"<(?:lora|lyco|hypernet):[^<>\n]{1,200}>", re.IGNORECASE),
    "BREAK": re.compile(r"\bBREAK\b"),
}
_WILDCARDS = re.compile(r"\{[^{}\n]{0,200}\|[^{}\n]{0,200}\}|__[\w/-]{1,60}__")

_AREA = 0.4, 2.5
"""Shares of the model's own picture area within which sizes are usual."""


def note_habits(model: Model, asked: RunOptions, height: int, width: int) -> None:
    """Log what in a run may come from another program's habits.

    Args:
        model: the model that draws.
        asked: the options as given.
        height, width: of the picture, in pixels.
    """
    _note_prompt_syntax(asked)
    _note_size(model, asked, height, width)
    _note_zero_snr(model, asked.sampler)


def note_seed(seed: int | None) -> None:
    """Log that -1, with which other programs ask for a random seed, is a seed here."""
    if seed == -1:
        logger.warning(
            "seed -1 is one seed like any other, as for torch (%d), and gives the same picture "
            "each time; for a random seed leave it out",
            seed % 2**32,
        )


def _note_prompt_syntax(asked: RunOptions) -> None:
    texts = [
        text
        for text in (asked.prompt, asked.negative_prompt, asked.prompt_2, asked.negative_prompt_2)
        if text
    ]
    signs = []
    if asked.prompt_syntax == "plain":
        signs = [sign for sign, found in _A1111.items() if any(map(found.search, texts))]
    if signs:
        logger.warning(
            "the prompt has %s, which is plain text in this prompt syntax; for A1111's meaning "
            "give %s",
            " and ".join(signs),
            argument("prompt_syntax", "a1111"),
        )
    if any(map(_WILDCARDS.search, texts)):
        logger.warning(
            "the prompt has {a|b} or __name__, as extensions of other programs replace by chance; "
            "here it is plain text: write each prompt out"
        )


def _note_size(model: Model, asked: RunOptions, height: int, width: int) -> None:
    """Log a size far from the one that a model was trained on, for a run from noise alone."""
    if asked.image is not None or (asked.width is None and asked.height is None):
        return
    try:
        own_height, own_width = model.default_size
    except UsageError:  # the model names no size
        return
    share = height * width / (own_height * own_width)
    if not _AREA[0] <= share <= _AREA[1]:
        larger = f"; {argument('hires')} draws larger pictures in two passes"
        way_out = "" if share < 1 else larger
        logger.warning(
            "%dx%d is far from the size that this model was trained for (%dx%d): expect %s%s",
            width,
            height,
            own_width,
            own_height,
            "poor pictures" if share < 1 else "repeated subjects",
            way_out,
        )


def _note_zero_snr(model: Model, sampler: str) -> None:
    """Log a sampler that leaves out the zero terminal SNR of a model, as in the reference."""
    config = model.source.scheduler_config
    if not config.get("rescale_betas_zero_snr") or sampler not in samplers.SAMPLERS:
        return
    if "rescale_betas_zero_snr" not in samplers.SAMPLERS[sampler].scheduler.defaults:
        having = [
            one.id
            for one in samplers.SAMPLERS.values()
            if "rescale_betas_zero_snr" in one.scheduler.defaults
        ]
        logger.warning(
            "sampler %s has no zero terminal SNR, with which this model was trained: colours may "
            "be off; %s have it",
            sampler,
            ", ".join(having),
        )
