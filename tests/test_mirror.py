"""The two backends, and their two sets of layers, offer what the protocols say, alike."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import pytest

from mlxdiff.backends import numpy_layers
from mlxdiff.backends.numpy import NumPyBackend
from mlxdiff.backends.protocol import Backend
from mlxdiff.networks.layers import Convolution, FeatureNorm, Layers

SIDES = ["numpy", pytest.param("mlx", marks=pytest.mark.mlx)]


def layers_of(side: str) -> ModuleType:
    if side == "numpy":
        return numpy_layers
    from mlxdiff.backends import mlx_layers

    return mlx_layers


def backend_of(side: str) -> type:
    if side == "numpy":
        return NumPyBackend
    from mlxdiff.backends.mlx import MLXBackend

    return MLXBackend


def members(protocol: type) -> dict[str, Any]:
    """The methods of a protocol by name, in order."""
    own = vars(protocol).items()
    return {n: m for n, m in own if not n.startswith("_") and not isinstance(m, property)}


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    """Name, default and kind of each parameter but self."""
    return [
        (p.name, p.default, p.kind)
        for p in inspect.signature(function).parameters.values()
        if p.name != "self"
    ]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", members(Layers))
def test_layers_have_the_signatures_of_the_protocol(name: str, side: str) -> None:
    assert parameters(getattr(layers_of(side), name)) == parameters(members(Layers)[name])


@pytest.mark.parametrize("side", SIDES)
def test_layers_have_the_attributes_of_the_protocol(side: str) -> None:
    layers = layers_of(side)
    assert all(hasattr(layers, name) for name in Layers.__annotations__)
    for protocol, layer in ((Convolution, layers.Conv2d), (FeatureNorm, layers.GroupNorm)):
        for name in ("__call__", *members(protocol)):
            expected = [p[:2] for p in parameters(getattr(protocol, name))]
            assert [p[:2] for p in parameters(getattr(layer, name))] == expected


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", members(Backend))
def test_backends_have_the_signatures_of_the_protocol(name: str, side: str) -> None:
    assert parameters(getattr(backend_of(side), name)) == parameters(members(Backend)[name])


@pytest.mark.parametrize("side", SIDES)
def test_backends_offer_nothing_else(side: str) -> None:
    public = {name for name in vars(backend_of(side)) if not name.startswith("_")}
    assert public - {"name"} == set(members(Backend))
    backend = backend_of(side)()
    assert (backend.name, backend.dtype) == (side, "float32")


@pytest.mark.mlx
def test_both_sets_of_layers_have_the_same_public_names() -> None:
    def public(layers: ModuleType) -> set[str]:
        return {
            name
            for name, value in vars(layers).items()
            if not name.startswith("_")
            and (inspect.isclass(value) or inspect.isfunction(value))
            and value.__module__ == layers.__name__
        }

    assert public(layers_of("mlx")) == public(layers_of("numpy"))
