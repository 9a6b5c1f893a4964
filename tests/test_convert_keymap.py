"""Rule tables and layout changes, each tested alone."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_params import CONFIGS

from mlxdiff.convert.keymap import DIFFUSERS, map_names, targets
from mlxdiff.convert.transforms import (
    TRANSFORMS,
    Transform,
    choose,
    conv1x1_to_linear,
    linear_to_conv1x1,
    oihw_to_ohwi,
)
from mlxdiff.errors import CheckpointError
from mlxdiff.networks.params import expected_parameters

sizes = st.integers(1, 4)
shapes = st.one_of(
    st.just(()), st.tuples(sizes), st.tuples(sizes, sizes), st.tuples(sizes, sizes, sizes, sizes)
)


@given(shapes)
def test_transforms_are_invertible_and_announce_their_shape(shape: tuple[int, ...]) -> None:
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    for transform in TRANSFORMS:
        result = transform.shape(shape)
        if result is not None:
            changed = transform.forward(values)
            assert changed.shape == result
            np.testing.assert_array_equal(transform.inverse(changed), values)


@given(shapes, shapes)
def test_at_most_one_transform_applies(source: tuple[int, ...], target: tuple[int, ...]) -> None:
    fitting = [t for t in TRANSFORMS if t.shape(source) == target]
    assert len(fitting) <= 1
    assert choose(source, target) == (fitting[0] if fitting else None)


@pytest.mark.parametrize(
    "transform, source, target",
    [
        (oihw_to_ohwi, (8, 4, 3, 3), (8, 3, 3, 4)),
        (oihw_to_ohwi, (8, 4, 1, 1), (8, 1, 1, 4)),
        (conv1x1_to_linear, (8, 4, 1, 1), (8, 4)),
        (linear_to_conv1x1, (8, 4), (8, 1, 1, 4)),
    ],
)
def test_choice(transform: Transform, source: tuple[int, ...], target: tuple[int, ...]) -> None:
    assert choose(source, target) is transform


@pytest.mark.parametrize(
    "source, target", [((8, 4, 3, 3), (8, 4)), ((4, 8), (8, 4)), ((2,), (2, 1))]
)
def test_no_choice(source: tuple[int, ...], target: tuple[int, ...]) -> None:
    assert choose(source, target) is None


@pytest.mark.parametrize(
    "component, name, target",
    [
        ("vae", "encoder.mid_block.attentions.0.query.weight", "to_q.weight"),
        ("vae", "decoder.mid_block.attentions.0.proj_attn.bias", "to_out.0.bias"),
        ("text_encoder", "final_layer_norm.weight", "text_model.final_layer_norm.weight"),
    ],
)
def test_rules(component: str, name: str, target: str) -> None:
    found = list(targets(DIFFUSERS[component], name))
    assert len(found) == 2 and found[0] == name and found[1].endswith(target)


@pytest.mark.parametrize(
    "component, name",
    [
        ("vae", "x.encoder.mid_block.attentions.0.query.weight"),
        ("vae", "encoder.mid_block.attentions.0.query.weight.more"),
        ("vae", "encoder.mid_block.attentions.1.query.weight"),
        ("text_encoder", "x.final_layer_norm.weight"),
        ("unet", "encoder.layers.0.weight"),
    ],
)
def test_rules_match_whole_names_only(component: str, name: str) -> None:
    assert list(targets(DIFFUSERS[component], name)) == [name]


def test_all_faults_of_a_component_come_in_one_error() -> None:
    prefix = "encoder.mid_block.attentions.0"
    expected = {f"{prefix}.to_q.weight": (4, 4), "a": (2,), "b": (2,), "c": (2,)}
    found = {
        f"{prefix}.to_q.weight": (4, 4),
        f"{prefix}.query.weight": (4, 4, 1, 1),
        "a": (3,),
        "b": (2,),
        "d": (2,),
    }
    with pytest.raises(CheckpointError) as caught:
        map_names(found, expected, DIFFUSERS["vae"], "vae")
    assert str(caught.value) == (
        "vae: 1 missing tensor: c; 1 unknown tensor: d; "
        f"1 duplicated tensor: {prefix}.query.weight and {prefix}.to_q.weight; "
        "1 misshapen tensor: a is (3,), expected (2,)"
    )


# Names of the full-size models, as diffusers and transformers make them today.
NAMES = sorted((Path(__file__).parent / "golden" / "names").glob("*.json.gz"))
OLD = {
    "vae": (
        (".to_q.", ".query."),
        (".to_k.", ".key."),
        (".to_v.", ".value."),
        (".to_out.0.", ".proj_attn."),
    ),
    "text_encoder": (("text_model.", ""),),
    "image_encoder": (),
    "unet": (),
}


@pytest.mark.parametrize("path", NAMES, ids=lambda p: p.name.removesuffix(".json.gz"))
def test_every_name_of_the_real_models_maps_in_both_spellings(path: Path) -> None:
    golden = json.loads(gzip.decompress(path.read_bytes()))
    component = golden["component"]
    expected = expected_parameters(CONFIGS[component](golden["config"]))
    pixels = golden["config"].get("_class_name") == "UNet2DModel"
    for spelling in ((), OLD["vae" if pixels else component]):
        found = {}
        for name, shape in golden["shapes"].items():
            for new, old in spelling:
                name = name.replace(new, old)
            found[name] = tuple(shape)
        mapped = map_names(found, expected, DIFFUSERS[component], path.name)
        assert {use.source for use in mapped.uses.values()} == set(found)
        assert not mapped.ignored
