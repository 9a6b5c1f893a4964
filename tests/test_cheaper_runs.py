"""Guidance in an interval and reuse of deep features: what they compute, and what they save."""

from __future__ import annotations

import argparse
import importlib
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
from golden_data import checkpoint, photo
from golden_runs import Opened

import mlxdiff
from mlxdiff import samplers
from mlxdiff.errors import UsageError
from mlxdiff.loading import make_backend
from mlxdiff.pipeline import Pipeline

ROOT = Path(__file__).resolve().parent.parent
RUN = {"width": 32, "height": 32, "seed": 3, "steps": 6, "guidance": 4.0, "sampler": "dpmpp-2m"}


@pytest.fixture(params=["sd15", "sdxl"])
def pipe(request: pytest.FixtureRequest, backend: str, opened: Opened) -> Pipeline:
    return opened(request.param, backend)


@contextmanager
def watched(holder: Any, index: int, around: Any) -> Iterator[None]:
    """`around(layer, x, *others)` in place of a layer of a list."""
    layer = holder[index]
    holder[index] = lambda *inputs: around(layer, *inputs)
    try:
        yield
    finally:
        holder[index] = layer


@contextmanager
def calls_of(*networks: Any) -> Iterator[dict[str, list[int]]]:
    """Batch sizes with which the first and the last layer of a U-Net, the first of others run."""
    found: dict[str, list[int]] = {"first": [], "last": []}

    def counted(name: str) -> Any:
        def call(layer: Any, x: Any, *others: Any) -> Any:
            found[name].append(x.shape[0])
            return layer(x, *others)

        return call

    with ExitStack() as stack:
        for network in networks:
            stack.enter_context(watched(network.down_blocks[0].resnets, 0, counted("first")))
            for block in getattr(network, "up_blocks", [])[-1:]:
                stack.enter_context(watched(block.resnets, -1, counted("last")))
        yield found


def near(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


# --- the U-Net ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.UNETS)
def test_a_shallow_evaluation_is_the_whole_one_with_old_features(name: str, backend: str) -> None:
    config, on = tiny.config("unet", name), make_backend(backend, "float32")
    unet = on.load(config, tiny.lazy(tiny.random_arrays(config)))
    inputs = {k: on.asarray(v) for k, v in tiny.unet_inputs(config, 9, 7).items()}
    deep: list[Any] = []
    first = on.to_numpy(unet(**inputs, deep=deep))
    assert np.array_equal(first, on.to_numpy(unet(**inputs)))
    near(on.to_numpy(unet(**inputs, deep=deep)), first)

    # At another sample and timestep: the whole network, its last layer given what it was before.
    old, last = on.to_numpy(deep[0]), unet.up_blocks[-1].resnets
    inputs["sample"], inputs["timesteps"] = 0.7 * inputs["sample"], inputs["timesteps"] * 0 + 400

    def forgetful(layer: Any, x: Any, *others: Any) -> Any:
        now = on.to_numpy(x)
        assert now.shape[-1] > old.shape[-1]
        both = np.concatenate([old, now[..., old.shape[-1] :]], axis=-1)
        return layer(on.asarray(both), *others)

    with watched(last, -1, forgetful):
        expected = on.to_numpy(unet(**inputs))
    with calls_of(unet) as calls:
        near(on.to_numpy(unet(**inputs, deep=deep)), expected)
    assert calls == {"first": [], "last": [2]}
    assert len(deep) == 1


# --- whole runs -----------------------------------------------------------------------------------


def test_the_whole_interval_and_no_reuse_change_nothing(pipe: Pipeline) -> None:
    expected = pipe.generate("a", **RUN)
    found = pipe.generate("a", guidance_interval=(0, 1), feature_reuse=1, **RUN)
    assert np.array_equal(found.latents, expected.latents)
    assert found.metadata == expected.metadata and found.settings == expected.settings
    assert not {"guidance_interval", "feature_reuse"} & set(found.metadata[0].extra)


def by_hand(pipe: Pipeline, guided: set[int]) -> np.ndarray:
    """The run with guidance in some evaluations; prompt and negative prompt asked one by one."""
    text, on = pipe.encode_prompt("a"), pipe.backend
    extra: list[dict[str, Any]] = [{}, {}]
    if pipe.model.is_sdxl:
        ids = on.asarray(np.array([[32, 32, 0, 0, 32, 32]], np.float32))
        extra = [
            {"text_embeds": on.asarray(pooled), "time_ids": ids}
            for pooled in (text.pooled_prompt_embeds, text.negative_pooled_prompt_embeds)
        ]
    plan = samplers.plan(pipe.source.scheduler_config, "dpmpp-2m", "auto", 6, guidance=4.0)
    x = plan.init_noise_sigma * mlxdiff.run.model.draw_noise(mlxdiff.noise.Generator(3), (4, 4, 4))
    x, state, unet = on.asarray(x), plan.start(), pipe.model.component("unet")
    for index, t in enumerate(plan.timesteps):
        output = unet(x, t, on.asarray(text.prompt_embeds), **extra[0])
        if index in guided:
            without = unet(x, t, on.asarray(text.negative_prompt_embeds), **extra[1])
            output = without + 4.0 * (output - without)
        x, state = plan.step(x, output, state)
    return on.to_numpy(x)


@pytest.mark.parametrize(
    ("interval", "guided"),
    [((0.0, 0.5), {0, 1, 2}), ([0.2, 0.7], {1, 2, 3}), ((0.9, 1), {5})],
)
def test_guidance_in_an_interval(pipe: Pipeline, interval: Any, guided: set[int]) -> None:
    with calls_of(pipe.model.component("unet")) as calls:
        found = pipe.generate("a", guidance_interval=interval, **RUN)
    assert calls["first"] == calls["last"] == [2 if i in guided else 1 for i in range(6)]
    near(found.latents, by_hand(pipe, guided))
    assert found.metadata[0].extra["guidance_interval"] == list(interval)


def test_deep_features_are_computed_in_every_nth_evaluation(pipe: Pipeline) -> None:
    unet, whole = pipe.model.component("unet"), pipe.generate("a", **RUN).latents
    with calls_of(unet) as calls:
        found = pipe.generate("a", feature_reuse=3, count=2, **RUN)
    assert calls == {"first": [2, 2] * 2, "last": [2] * 12}
    assert found.metadata[0].extra["feature_reuse"] == 3
    assert not np.array_equal(found.latents[:1], whole)
    assert np.array_equal(pipe.generate("a", **RUN).latents, whole)  # nothing is left behind
    near(found.latents[:1], with_old_features(pipe, {0, 3}, RUN))


def with_old_features(pipe: Pipeline, whole: set[int], run: dict[str, Any]) -> np.ndarray:
    """A run with the whole network in every evaluation, its last layer given what is old in all
    but these."""
    unet, on, kept = pipe.model.component("unet"), pipe.backend, []

    def forgetful(layer: Any, x: Any, *others: Any) -> Any:
        now = on.to_numpy(x)
        width = now.shape[-1] - unet.config.block_out_channels[0]  # beside the skip of conv_in
        kept.append(now[..., :width] if len(kept) in whole else kept[-1][-len(now) :])
        both = np.concatenate([kept[-1], now[..., width:]], axis=-1)
        return layer(on.asarray(both), *others)

    with watched(unet.up_blocks[-1].resnets, -1, forgetful):
        return pipe.generate("a", **run).latents


@pytest.mark.parametrize(
    ("name", "more", "whole"),
    [
        ("sd15", {}, {0, 3, 4}),
        ("sd15", {"guess_mode": True}, {0, 3, 4}),
        ("sd15", {"guidance_interval": (0.4, 1.0)}, {0, 2, 3, 4}),  # two predictions from 2 on
        ("sdxl", {}, {0, 3, 4}),
    ],
)
def test_deep_features_and_what_is_added(
    name: str, more: dict[str, Any], whole: set[int], backend: str, opened: Opened
) -> None:
    """Two ControlNets, one of which has no part from evaluation 4 on, and an IP-Adapter: skips have
    what the nets add now, old features what they added then; of the nets no more runs than counts.
    """
    pipe = opened(name, backend, controlnets=["first", "second"], ip_adapters=["image"])
    run = RUN | more | {"ip_image": photo(40, 40), "control_image": [photo(32, 32)] * 2}
    run |= {"control_scale": [0.8, 0.6], "control_end": [1.0, 0.7]}
    expected = with_old_features(pipe, whole, run)
    nets = [pipe.model.component("controlnet", i) for i in (0, 1)]
    with calls_of(pipe.model.component("unet")) as calls, calls_of(*nets) as of_nets:
        found = pipe.generate("a", feature_reuse=3, **run).latents
    near(found, expected)
    assert len(calls["first"]) == len(whole) and len(calls["last"]) == 6
    assert len(of_nets["first"]) == 2 * len(whole) - 1


def test_both(pipe: Pipeline) -> None:
    unet = pipe.model.component("unet")
    with calls_of(unet) as calls:
        pipe.generate("a", guidance_interval=(0.3, 0.8), feature_reuse=4, **RUN)
    # Guided in 1, 2, 3: the features of 0, without guidance, do not do for 1.
    assert calls == {"first": [1, 2, 1], "last": [1, 2, 2, 2, 1, 1]}


# --- what is refused, and what is noted -----------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"guidance_interval": 0.5}, "two numbers"),
        ({"guidance_interval": (0.1, 0.2, 0.3)}, "two numbers"),
        ({"guidance_interval": ("a", 1)}, r"guidance_interval is \('a', 1\); expected two numbers"),
        (
            {"guidance_interval": (0, 1.5)},
            r"guidance_interval is \(0, 1.5\); expected two numbers, 0 to 1",
        ),
        ({"guidance_interval": (0.5, 0.5)}, "must be less"),
        ({"guidance_interval": (0.0, 0.1)}, "holds none of the run's 6 evaluations"),
        ({"feature_reuse": 0}, "feature_reuse is 0; expected"),
        ({"feature_reuse": 2.0}, "whole number"),
        ({"feature_reuse": True}, "whole number"),
    ],
)
def test_wrong_values(arguments: dict[str, Any], says: str, opened: Opened) -> None:
    pipe = opened("sd15")
    with pytest.raises(UsageError, match=says):
        pipe.settings("a", **{k: v for k, v in RUN.items() if k != "seed"}, **arguments)


def test_a_model_without_text_has_no_part_for_them() -> None:
    pipe = mlxdiff.load(checkpoint("ddpm"), backend="numpy")
    for arguments in ({"guidance_interval": (0.0, 0.5)}, {"feature_reuse": 2}):
        with pytest.raises(UsageError, match="no part for that"):
            pipe.settings(**arguments)


def test_an_interval_without_guidance_is_noted(caplog: pytest.LogCaptureFixture) -> None:
    pipe = mlxdiff.load(checkpoint("sd15"), backend="numpy")
    with caplog.at_level(logging.WARNING, logger="mlxdiff"):
        pipe.settings("a", guidance=1.0, guidance_interval=(0.0, 0.5))
    assert "guidance_interval has no effect: there is no guidance at 1" in caplog.text


def test_auto_takes_what_was_fitted_for_whole_runs_only() -> None:
    pipe = mlxdiff.load(backend="numpy")
    for arguments in ({"guidance_interval": (0.0, 0.5)}, {"feature_reuse": 2}):
        settings = pipe.settings("a red circle", steps=8, guidance=4.0, **arguments)
        assert settings.sampler == "dpmpp-2m"
    assert pipe.settings("a red circle", steps=8, guidance=4.0).sampler == "fitted"


def test_the_benchmark_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    few_step = importlib.import_module("few_step")
    runs = few_step.Runs(
        argparse.Namespace(
            model=None, torch=False, backend="numpy", cache=None, prompts=1, judged=0
        )
    )
    plan = runs.plan("dpmpp-2m", "normal", 4, 4.0)
    for arguments in (
        {},
        {"guidance_interval": (0.0, 0.5)},
        {"feature_reuse": 2},
        {"guidance_interval": (0.3, 1.0), "feature_reuse": 3},
    ):
        found = runs.latents(plan, 4.0, *few_step_arguments(arguments))
        expected = runs.network.pipe.generate(
            runs.prompts[0],
            seed=0,
            steps=4,
            guidance=4.0,
            sampler="dpmpp-2m",
            schedule="normal",
            **arguments,
        )
        near(found, expected.latents)


def few_step_arguments(arguments: dict[str, Any]) -> tuple[Any, int]:
    return arguments.get("guidance_interval"), arguments.get("feature_reuse", 1)
