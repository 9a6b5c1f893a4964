"""What all kinds of additions have in common (``run.additions``)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import lora_files
import numpy as np
import pytest
from golden_data import GOLDEN, checkpoint, photo
from golden_runs import Opened
from safetensors.numpy import save_file

import mlxdiff
from mlxdiff.convert import Component
from mlxdiff.errors import MlxdiffError, UsageError
from mlxdiff.pipeline import Pipeline
from mlxdiff.run.additions import Addition
from mlxdiff.run.kind import Kind, Network
from mlxdiff.run.memory import Held
from mlxdiff.weights.tensors import LazyTensor

SIZE: dict[str, Any] = {"width": 32, "height": 32, "steps": 5, "guidance": 3.0}
SMALL = SIZE | {"seed": 5}


def setters(pipe: Pipeline) -> dict[str, Callable[[list[Any]], None]]:
    """Part -> what replaces the additions of its kind; each takes a list."""
    return {
        "controlnet": pipe.set_controlnets,
        "t2i_adapter": pipe.set_t2i_adapters,
        "ip_adapter": pipe.set_ip_adapters,
        "lora": pipe.set_loras,
        "motion": lambda given: pipe.set_motion_adapter(given[0] if given else None),
        "embedding": pipe.set_embeddings,
        "vae": lambda given: pipe.set_vae(given[0] if given else None),
        "refiner": lambda given: pipe.set_refiner(given[0] if given else None),
    }


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, dict[str, Any]]:
    """A pipeline, and for each part something that fits it."""
    opened = Opened(tmp_path_factory.mktemp("additions"))
    pipe = mlxdiff.load(checkpoint("sdxl"), backend="numpy")
    return pipe, {
        "controlnet": opened.controlnet("sdxl", "first"),
        "t2i_adapter": opened.t2i_adapter("sdxl", "xl"),
        "ip_adapter": opened.adapter("sdxl", "image"),
        "lora": opened.lora("sdxl-kohya"),
        "motion": opened.motion_adapter("sdxl", "xl"),
        "embedding": GOLDEN / "prompts" / "xl-toy.safetensors",
        "vae": checkpoint("sdxl"),
        "refiner": checkpoint("sdxl-refiner"),
    }


PARTS = "controlnet t2i_adapter ip_adapter lora motion embedding vae refiner".split()


@pytest.mark.parametrize("part", PARTS)
def test_each_is_added_and_removed_alike(part: str, sdxl: tuple[Pipeline, dict[str, Any]]) -> None:
    """A failure changes nothing; what was added is in the metadata; removed, it is gone."""
    pipe, given = sdxl
    change, before = setters(pipe)[part], pipe.model
    with pytest.raises(MlxdiffError) as caught:
        change([Path("nothing here")])
    assert "\n" not in str(caught.value)
    assert pipe.model is before
    change([given[part]])
    (added,) = pipe.model.additions.items
    assert added.part == part
    names = {"lora": "loras", "embedding": "embeddings", "motion": "motion_adapter"}
    named = names.get(part, part)
    settings = pipe.settings("a", **SIZE, **shown(part))
    assert pipe.model.additions.describe(settings)[named]
    change([])
    assert pipe.model.additions.items == ()


def shown(part: str) -> dict[str, Any]:
    """The arguments that a run needs with such an addition."""
    return {
        "controlnet": {"control_image": photo(32, 32)},
        "t2i_adapter": {"control_image": photo(32, 32)},
        "ip_adapter": {"ip_image": photo(32, 32)},
    }.get(part, {})


@pytest.mark.parametrize("part", PARTS)
def test_a_model_without_such_a_part_refuses_it(part: str) -> None:
    """Before anything is opened, with the reason; nothing is asked for nothing."""
    pipe = mlxdiff.load(checkpoint("ddpm"), backend="numpy")
    change = setters(pipe)[part]
    change([])
    with pytest.raises(UsageError, match=r"draws from noise alone; it has no part for an? "):
        change(["nothing here"])


def test_networks_are_known_by_name_and_position(opened: Opened) -> None:
    pipe = opened("sd15", controlnets=["first", "second"])
    run = SMALL | {"control_image": [photo(32, 32)] * 2}
    both = pipe.generate("a", **run).latents
    nets = {Network("controlnet", 0), Network("controlnet", 1)}
    assert nets <= pipe.model.cache.loaded
    unet = pipe.model.component("unet")
    pipe.set_controlnets([opened.controlnet("sd15", "first")])
    assert not nets & pipe.model.cache.loaded
    assert pipe.model.component("unet") is unet
    alone = pipe.generate("a", **SMALL, control_image=photo(32, 32)).latents
    assert np.abs(alone - both).max() > 1e-3


def test_the_old_names_still_work(opened: Opened) -> None:
    pipe = opened("sdxl")
    with pytest.warns(DeprecationWarning, match="set_controlnets"):
        pipe.control_with(opened.controlnet("sdxl", "first"))
    with pytest.warns(DeprecationWarning, match="set_ip_adapters"):
        pipe.show_with(opened.adapter("sdxl", "image"))
    with pytest.warns(DeprecationWarning, match="set_refiner"):
        pipe.refine_with(mlxdiff.load(checkpoint("sdxl-refiner"), backend="numpy"))
    assert [one.part for one in pipe.model.additions.items] == [
        "controlnet",
        "ip_adapter",
        "refiner",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pipe.control_with()
        pipe.show_with()
        pipe.refine_with(None)
    assert pipe.model.additions.items == ()


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_run_keeps_what_it_began_with(low_memory: bool, backend: str, tmp_path: Path) -> None:
    """Runs that are suspended do not see what others add: LoRAs of prompts, and of the pipeline."""
    path = lora_files.write("sd15-kohya", tmp_path)
    pipe = mlxdiff.load(
        checkpoint("sd15"),
        backend=backend,
        dtype="float32",
        lora_folder=tmp_path,
        low_memory=low_memory,
    )
    prompts = "a cat", "a cat <lora:sd15-kohya:0.5>", "a cat <lora:sd15-kohya:-0.5>"
    run = SMALL | {"steps": 2, "prompt_syntax": "a1111", "count": 2}
    expected = [[step.latents for step in pipe.stream(prompt, **run)] for prompt in prompts]
    assert not np.allclose(expected[0][-1], expected[1][-1])
    streams = [pipe.stream(prompt, **run) for prompt in prompts]
    found: list[list[np.ndarray]] = [[next(stream).latents] for stream in streams]
    pipe.set_loras([(path, 2.0)])
    for steps in zip(*streams, strict=True):
        for latents, step in zip(found, steps, strict=True):
            latents.append(step.latents)
    np.testing.assert_array_equal(found, expected)


def test_the_words_of_a_model_are_read_by_its_refiner(tmp_path: Path) -> None:
    """The refiner's own pipeline stays as it is."""
    vectors = np.ones((2, 32), np.float32)
    save_file({"clip_l": vectors, "clip_g": vectors}, tmp_path / "word.safetensors")
    pipe, other = (mlxdiff.load(checkpoint("sdxl-refiner"), backend="numpy") for _ in range(2))
    pipe.set_refiner(other)
    pipe.set_embeddings([tmp_path / "word.safetensors"])
    assert pipe.refiner is not None
    assert pipe.refiner.texts.embeddings == pipe.embeddings != ()
    assert other.embeddings == () and other.model.texts.embeddings == ()
    pipe.set_embeddings([])
    assert pipe.refiner.texts.embeddings == ()


def test_an_image_encoder_takes_memory(opened: Opened) -> None:
    pipe = opened("sd15", ip_adapters=["image"])
    settings = pipe.settings("a", **SIZE, ip_image=[photo(32, 32)] * 2)
    estimate = pipe.memory(settings)
    for name in ("ip_adapter", "image_encoder"):
        assert estimate.weights[Held(Network(name, 0))] > 0
    (adapter,) = pipe.model.ip_adapters
    encoder = replace(adapter.encoder.config, image_size=8 * adapter.encoder.config.image_size)
    large = replace(adapter, encoder=replace(adapter.encoder, config=encoder))
    pipe.model = pipe.model.with_additions(pipe.model.additions.replaced(type(large), [large]))
    assert pipe.memory(settings).work["unet"] > estimate.work["unet"]


@dataclass(frozen=True, eq=False)
class Halved(Addition):
    """A kind of addition that nothing else knows: it halves what the U-Net gives."""

    part: ClassVar[str] = "lora"

    factor: float

    @classmethod
    def open(cls, given: Iterable[float], model: Kind) -> tuple[Halved, ...]:
        return tuple(map(cls, given))

    @property
    def changes(self) -> Sequence[str]:
        return ("unet",)

    @classmethod
    def change(cls, items: Sequence[Halved], name: str, component: Component) -> Component:
        def tensors() -> dict[str, LazyTensor]:
            found = component.tensors()
            last = found["conv_out.weight"]
            scale = np.float32(np.prod([item.factor for item in items]))
            found["conv_out.weight"] = LazyTensor(last.shape, "F32", lambda: scale * last.read())
            return found

        return replace(component, tensors=tensors)

    @classmethod
    def describe(cls, items: Sequence[Halved], settings: Any) -> dict[str, Any]:
        return {"halved": [item.factor for item in items]}


def test_a_kind_of_ones_own(opened: Opened, backend: str) -> None:
    """One class makes a new kind: loaded, applied, described and removed as all others are."""
    pipe = opened("sd15", backend)
    plain = pipe.generate("a", **SMALL).latents
    pipe._set(Halved, [0.5, 0.5], Halved.open)
    pipe.set_loras([(opened.lora("sd15-kohya"), 0.5)])
    drawn = pipe.generate("a", **SMALL)
    assert np.abs(drawn.latents - plain).max() > 1e-2
    assert drawn.metadata[0].extra["halved"] == [0.5, 0.5]
    assert drawn.metadata[0].extra["loras"]
    pipe.set_loras([])
    pipe._set(Halved, [], Halved.open)
    np.testing.assert_array_equal(pipe.generate("a", **SMALL).latents, plain)
