"""The cost of a network at a size: its exact multiply-adds, and the values that it holds.

The network runs on layers that compute nothing (``networks.recorder``); nothing is loaded. Counted
as arithmetic are convolutions, linear maps and the two products of attention, as the plain network
has them. An implementation may add some (zero-padded heads) or save some (keys and values of the
prompt are kept from step to step); the count stays the same. Sums, normalizations and activations
are not counted: they are a thousandth of the arithmetic.
"""

from __future__ import annotations

from functools import lru_cache

from mlxdiff.networks import recorder
from mlxdiff.networks.condition import Frames
from mlxdiff.networks.config import ComponentConfig
from mlxdiff.networks.layers import Sizes
from mlxdiff.networks.recorder import Operation, Tape
from mlxdiff.networks.registry import build

WHOLE = Frames()
TOKENS = 77  # of a prompt, as CLIP takes it


@lru_cache(maxsize=64)
def operations(
    config: ComponentConfig,
    height: int = 1,
    width: int = 1,
    *,
    batch: int = 1,
    tokens: int = TOKENS,
    encode: bool = False,
    frames: Frames = WHOLE,
) -> tuple[Operation, ...]:
    """The work of one evaluation of a network, in the order in which it is done.

    Args:
        config: of the network.
        height, width: of its input: latents for a U-Net and for a VAE that decodes, pixels for a
            VAE that encodes or for a U-Net that draws pixels. CLIP's encoders have none.
        batch: how many at once: 2 for a U-Net under guidance.
        tokens: length of a text.
        encode: a VAE's encoder, in place of its decoder.
        frames: of a video, for a U-Net with motion modules; in parts its samples are evaluated
            one by one.
    """
    if frames.in_parts:
        batch = 1
    network = build(recorder, config)
    with Tape() as tape:
        sizes = Sizes(recorder.parameter, height, width, batch, tokens, encode, frames)
        network.run_once(sizes)
    return tuple(tape.operations)


def multiply_adds(
    config: ComponentConfig,
    height: int = 1,
    width: int = 1,
    *,
    batch: int = 1,
    tokens: int = TOKENS,
    encode: bool = False,
) -> int:
    """Multiply-adds of one evaluation; arguments as for ``operations``."""
    work = operations(config, height, width, batch=batch, tokens=tokens, encode=encode)
    return sum(operation.macs for operation in work)
