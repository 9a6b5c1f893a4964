"""Guiders, FreeU, seamless edges and composed prompts: against diffusers, and by what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_data import assert_component_close, photo
from golden_runs import Opened
from guider_cases import LAYERS, MODELS, inputs, predictions

from mlxdiff.errors import UsageError
from mlxdiff.networks.condition import Condition
from mlxdiff.networks.layers import seamless
from mlxdiff.networks.perturbation import Blur, FreeU, Identity, Skip, blocks_named
from mlxdiff.pictures import metadata
from mlxdiff.run import composition
from mlxdiff.samplers import guiders
from mlxdiff.samplers.guidance import rescaled
from mlxdiff.text import a1111

with np.load(Path(__file__).parent / "golden" / "guiders.npz") as _data:
    GOLDEN = {name: _data[name] for name in _data.files}
SMALL = {"width": 48, "height": 40, "steps": 2, "seed": 4, "sampler": "euler"}


def predicted(pipe: Any, name: str, changes: list[tuple[Any, Any]]) -> np.ndarray:
    """The U-Net's output with these changes."""
    unet, on = pipe.model.component("unet"), pipe.backend
    made = inputs(name, vars(unet.config))
    extra = {}
    if "pooled" in made:
        extra = {"text_embeds": on.asarray(made["pooled"]), "time_ids": on.asarray(made["ids"])}
    temb = unet.embed(on.asarray(np.array([made["timestep"]], np.float32)), **extra)
    text = unet.read(on.asarray(made["text"])).changed(changes)
    return on.to_numpy(unet.predict(on.asarray(made["sample"]), Condition(temb), text))


@pytest.mark.parametrize("name", MODELS)
def test_weakened_networks_equal_diffusers(name: str, backend: str, opened: Opened) -> None:
    pipe = opened(name, backend)
    unet = pipe.model.component("unet")
    assert_component_close(predicted(pipe, name, []), GOLDEN[f"{name} plain"])
    ways = {"pag": Identity(), "seg-1.5": Blur(1.5), "seg-inf": Blur(float("inf")), "slg": Skip()}
    for layers in LAYERS[name]:
        blocks = blocks_named(unet, layers)
        for way, change in ways.items():
            found = predicted(pipe, name, [(block, change) for block in blocks])
            assert_component_close(found, GOLDEN[f"{name} {layers} {way}"])
            assert np.abs(found - GOLDEN[f"{name} plain"]).max() > 1e-5, (layers, way)


@pytest.mark.parametrize("name", MODELS)
def test_freeu_equals_diffusers(name: str, backend: str, opened: Opened) -> None:
    pipe = opened(name, backend)
    ups = pipe.model.component("unet").up_blocks
    found = predicted(pipe, name, [(ups[0], FreeU(1.5, 0.9)), (ups[1], FreeU(1.6, 0.2))])
    assert_component_close(found, GOLDEN[f"{name} freeu"])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("axes", ["x", "y", "xy"])
def test_seamless_networks_equal_circular_padding(
    name: str, axes: str, backend: str, opened: Opened
) -> None:
    pipe = opened(name, backend)
    latents = inputs(name, vars(pipe.model.component("unet").config))["latents"]
    with seamless(axes):
        assert_component_close(predicted(pipe, name, []), GOLDEN[f"{name} {axes}"])
        on, vae = pipe.backend, pipe.model.component("vae")
        decoded = on.to_numpy(vae.decode(on.asarray(latents)))
    assert_component_close(decoded, GOLDEN[f"{name} vae {axes}"])
    assert_component_close(predicted(pipe, name, []), GOLDEN[f"{name} plain"])


@pytest.mark.parametrize(
    ("case", "guider", "rescale"),
    [
        ("apg", "apg:norm=3,momentum=0", 0.0),
        ("apg eta", "apg:norm=0,eta=0.7,momentum=0", 0.0),
        ("apg momentum", "apg", 0.6),
        ("cfg-zero", "cfg-zero:zero_steps=1", 0.0),
    ],
)
def test_guiders_equal_diffusers(case: str, guider: str, rescale: float, backend: str) -> None:
    array: Any = np.asarray
    if backend == "mlx":
        array = pytest.importorskip("mlx.core").array
    one, memory = guiders.parse(guider), guiders.Memory()
    for index, (pair, expected) in enumerate(zip(predictions(), GOLDEN[case], strict=True)):
        memory.index = index
        uncond, cond = map(array, pair)
        found = rescaled(one.combine(uncond, cond, 6.0, memory), cond, rescale)
        np.testing.assert_allclose(np.array(found), expected, rtol=1e-4, atol=2e-5)


def test_apg_as_the_paper_has_it() -> None:
    """It starts from the prediction with the prompt, and is plain guidance with nothing taken."""
    plain = guiders.parse("apg:original=1,eta=1,norm=0,momentum=0")
    taken = guiders.parse("apg:original=1,norm=0,momentum=0")
    for uncond, cond in predictions():
        found = plain.combine(uncond, cond, 6.0, guiders.Memory())
        np.testing.assert_allclose(found, uncond + 6.0 * (cond - uncond), rtol=1e-4, atol=1e-5)
        moved = taken.combine(uncond, cond, 6.0, guiders.Memory()) - cond
        assert abs((moved * cond).sum()) < 1e-4 * (np.abs(moved) * np.abs(cond)).sum()


@pytest.mark.parametrize("name", ["apg", "cfg-zero", "mimic"])
def test_equal_predictions_give_that_prediction(name: str) -> None:
    cond = predictions()[0][1]
    found = guiders.parse(name).combine(cond, cond, 6.0, guiders.Memory())
    np.testing.assert_allclose(found, cond, rtol=1e-4, atol=1e-5)


def test_mimic_keeps_the_range_of_the_lower_scale() -> None:
    for uncond, cond in predictions():
        full = guiders.parse("mimic:scale=3").combine(uncond, cond, 12.0, guiders.Memory())
        low = uncond + 3.0 * (cond - uncond)
        centred = [x - x.mean(axis=(1, 2), keepdims=True) for x in (full, low)]
        sizes = [np.abs(x).max(axis=(1, 2)) for x in centred]
        np.testing.assert_allclose(*sizes, rtol=1e-5)
        same = guiders.parse("mimic:scale=5").combine(uncond, cond, 5.0, guiders.Memory())
        np.testing.assert_allclose(same, uncond + 5.0 * (cond - uncond), rtol=1e-4, atol=1e-5)


def test_words() -> None:
    for text in (
        "apg",
        "apg:eta=1",
        "apg:original=1",
        "pag:scale=2,layers=mid+up.1",
        "seg:blur=2",
        "mimic:scale=4",
    ):
        assert guiders.parse(text).text == text
    for text in (
        "no",
        "pag:x=1",
        "pag:scale",
        "pag:scale=a",
        "pag:end=2",
        "apg:norm=-1",
        "apg:original=2",
    ):
        with pytest.raises(UsageError, match="guider"):
            guiders.parse(text)


def drawn(opened: Opened, backend: str, name: str = "sd15", **arguments: Any) -> np.ndarray:
    given = {**SMALL, "guidance": 5.0, "negative_prompt": "blurry", **arguments}
    parts = {key: given.pop(key) for key in ("loras", "controlnets") if key in given}
    pipe = opened(name, backend, **parts)
    return pipe.generate(given.pop("prompt", "a photo"), **given).latents


GUIDED = [
    {"guider": "apg"},
    {"guider": "mimic:scale=2,percentile=0.9"},
    {"guider": "pag:scale=30,layers=up.1"},
    {"guider": "seg:layers=up.1"},
    {"guider": "slg:start=0,end=1"},
    {"freeu": (1.5, 1.6, 0.9, 0.2)},
    {"seamless": "xy"},
    {"region": ["0,0,0.5,1:a lake", "0.5,0,1,1*2:a tree"]},
    {"prompt": "a photo AND a lake :0.5", "prompt_syntax": "a1111"},
    {"sampler": "euler-cfg++"},
    {"sampler": "dpmpp-sde"},
    {"sampler": "dpmpp-2m-sde", "step_noise": "brownian"},
    {"sampler": "euler", "sigmas": (14.0, 0.5)},
]


PLAIN: dict[str, np.ndarray] = {}


@pytest.mark.mlx
@pytest.mark.parametrize("arguments", GUIDED, ids=str)
def test_pictures_on_both_backends(arguments: dict[str, Any], opened: Opened) -> None:
    """The same on both, and other than without."""
    pytest.importorskip("mlx.core")
    first = drawn(opened, "numpy", **arguments)
    np.testing.assert_allclose(drawn(opened, "mlx", **arguments), first, rtol=0, atol=2e-3)
    if "plain" not in PLAIN:
        PLAIN["plain"] = drawn(opened, "numpy")
    assert np.abs(first - PLAIN["plain"]).max() > 1e-3


@pytest.mark.parametrize("arguments", [GUIDED[2], GUIDED[5], GUIDED[6], GUIDED[7]], ids=str)
def test_they_go_with_additions_and_in_low_memory(
    arguments: dict[str, Any], opened: Opened
) -> None:
    given = {
        **arguments,
        "loras": [("sd15-kohya", 0.7)],
        "controlnets": ["first"],
        "control_image": photo(64, 64),
    }
    whole = drawn(opened, "numpy", **given)
    pipe = opened("sd15", "numpy")
    pipe.save_memory()
    try:
        low = drawn(opened, "numpy", **given)
    finally:
        pipe.save_memory(False)
    np.testing.assert_allclose(low, whole, rtol=0, atol=1e-4)


def test_pag_without_guidance_steps_away_from_the_weakened_network(opened: Opened) -> None:
    plain = drawn(opened, "numpy", guidance=1.0, negative_prompt=None)
    nothing = drawn(opened, "numpy", guidance=1.0, negative_prompt=None, guider="pag:scale=0")
    np.testing.assert_array_equal(nothing, plain)
    some = drawn(opened, "numpy", guidance=1.0, negative_prompt=None, guider="pag:scale=30")
    assert np.abs(some - plain).max() > 1e-4


def test_one_region_that_is_the_picture(opened: Opened) -> None:
    """The region's prompt alone counts then."""
    whole = drawn(opened, "numpy", region="0,0,1,1:a lake")
    np.testing.assert_allclose(whole, drawn(opened, "numpy", prompt="a lake"), rtol=0, atol=2e-4)


def test_and_of_one_prompt_with_itself(opened: Opened) -> None:
    """a AND a counts twice, as twice the guidance does."""
    both = drawn(opened, "numpy", prompt="a lake AND a lake", prompt_syntax="a1111")
    twice = drawn(opened, "numpy", prompt="a lake", guidance=10.0)
    np.testing.assert_allclose(both, twice, rtol=0, atol=2e-4)


def test_masks_and_boxes() -> None:
    region = composition.parse("0,0,0.25,1*2:a tree: old")
    assert (region.prompt, region.weight, region.text) == (
        "a tree: old",
        2.0,
        "0,0,0.25,1*2:a tree: old",
    )
    np.testing.assert_allclose(region.mask(1, 6)[0, 0, :, 0], [1, 0.5, 0, 0, 0, 0])
    for text in ("0,0,1:x", "0,0,2,1:x", "no colon", "0,0,1,1*0:x", ":x"):
        with pytest.raises(UsageError, match="region"):
            composition.parse(text)
    assert a1111.composition("a cat AND a dog :1.2 AND x") == [
        ("a cat", 1.0),
        ("a dog", 1.2),
        ("x", 1.0),
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"guider": "pag:layers=down.9"}, "no self-attention in layer 'down.9'; there is in"),
        ({"guider": "pag", "feature_reuse": 2}, "leave out one"),
        ({"guider": "unknown"}, "one of apg"),
        ({"sigmas": (3.0, 4.0), "steps": None}, "must fall"),
        ({"sigmas": (14.0, 1.0), "steps": 5}, "leave steps out"),
        ({"sigmas": (14.0, 1.0), "steps": None, "schedule": "karras"}, "leave schedule karras out"),
        ({"sigmas": (14.0, 1.0), "steps": None, "sampler": "ddim"}, "takes no list of sigmas"),
        ({"sampler": "euler-a", "step_noise": "brownian"}, "independent noise"),
        ({"negative_prompt": "a AND b", "prompt_syntax": "a1111"}, "AND"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], said: str, opened: Opened) -> None:
    with pytest.raises(UsageError, match=said):
        drawn(opened, "numpy", **arguments)


def test_reuse_within_an_error(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
    """A tiny error reuses nothing, a large one all that it can; the note says which."""
    caplog.set_level("INFO", logger="mlxdiff")
    plain = drawn(opened, "numpy", steps=5)
    none = drawn(opened, "numpy", steps=5, feature_reuse_error=1e-9)
    np.testing.assert_array_equal(none, plain)
    assert "0 of 5 evaluations used old features (none)" in caplog.text
    caplog.clear()
    drawn(opened, "numpy", steps=5, feature_reuse_error=1e6)
    assert "3 of 5 evaluations used old features (3, 4, 5)" in caplog.text
    with pytest.raises(UsageError, match="a fixed and a measured reuse"):
        drawn(opened, "numpy", feature_reuse_error=0.1, feature_reuse=2)
    with pytest.raises(UsageError, match="needs few steps"):
        drawn(opened, "numpy", "sdxl-turbo", guidance=0.0, feature_reuse_error=0.1)


def test_they_are_replayed(tmp_path: Path, opened: Opened) -> None:
    """The metadata of a picture hold every option, and give the same picture."""
    pipe = opened("sd15", "numpy")
    asked: dict[str, Any] = {
        "guider": "pag:scale=2",
        "freeu": (1.2, 1.3, 0.9, 0.8),
        "seamless": "x",
        "region": ["0,0,0.5,1:a lake", "0.5,0,1,0.5*2:a tree"],
        "sigmas": (14.0, 2.0),
        "sampler": "dpmpp-2m-sde",
        "step_noise": "brownian",
    }
    given = {**SMALL, "steps": None, "guidance": 5.0, **asked}
    first = pipe.generate("a photo", **given)
    found = metadata.read(first.save(tmp_path / "x.png")[0])
    again = {key: value for key, value in found.extra.items() if key in given}
    again |= {"schedule": found.schedule, "steps": found.steps, "seed": found.seed}
    again |= {"sampler": found.sampler, "guidance": found.guidance}
    size = {"width": found.width, "height": found.height}
    np.testing.assert_array_equal(
        pipe.generate(found.prompt, **size, **again).latents, first.latents
    )
