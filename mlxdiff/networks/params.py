"""The name and shape of every tensor that a checkpoint must hold, from the config.

Names are diffusers' and transformers' parameter names (the text encoder's with the ``text_model.``
prefix of published files). Shapes are in the layout of the converted folder: linear (out, in),
convolution (out, kH, kW, in). They are read off the network, built from the recording layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from mlxdiff.networks import recorder
from mlxdiff.networks.config import ComponentConfig
from mlxdiff.networks.registry import build
from mlxdiff.weights.tensors import Shape, raise_faults


def expected_parameters(config: ComponentConfig) -> dict[str, Shape]:
    """Name and shape of every parameter that a component with this config has."""
    return dict(_parameters(config))


@lru_cache(maxsize=32)
def _parameters(config: ComponentConfig) -> dict[str, Shape]:
    shapes: dict[str, Shape] = build(recorder, config).parameters()
    return shapes


def check_parameters(found: Mapping[str, Shape], config: ComponentConfig, where: str) -> None:
    """Check tensors against ``expected_parameters(config)``: all names, all shapes, nothing else.

    Raises: CheckpointError that lists at most ten names of each kind of fault, and how many there
        are.
    """
    expected = expected_parameters(config)
    raise_faults(
        where,
        missing=[name for name in expected if name not in found],
        unknown=[name for name in found if name not in expected],
        misshapen=[
            f"{name} is {found[name]}, expected {shape}"
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != shape
        ],
    )
