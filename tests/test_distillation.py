"""mlxdiff train distill: the loss against the formulas, and from a folder to a model of few steps.

The formulas are those of latent consistency distillation (Luo et al. 2023, algorithm 1), written
down once more in float64, in the form of diffusers' train_lcm_distill scripts: arrays of the DDIM
solver by index, and predictions split by the type of the network's output.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_data import checkpoint
from test_training_commands import FEW, pictures, weights

import mlxdiff
from mlxdiff.errors import UsageError

pytest.importorskip("mlx.core")

import mlx.core as mx

from mlxdiff.training import consistency
from mlxdiff.training.data import Batch, Text
from mlxdiff.training.options import TrainDistillOptions
from mlxdiff.training.process import Process, draw
from mlxdiff.training.train_distill import train_distill

pytestmark = pytest.mark.mlx

SHAPE = (3, 4, 4, 2)
ALPHAS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2)


class Linear:
    """A network that float64 can repeat: out = a x + b t / 1000 + mean(text) + c (scale - 1)."""

    def __init__(self, c: float = 0.0) -> None:
        self.c = c

    def predict(self, parameters: Any, batch: Any, noisy: Any, timesteps: Any, scales: Any) -> Any:
        return self._run(parameters["a"], parameters["b"], batch, noisy, timesteps, scales)

    def teach(self, batch: Any, noisy: Any, timesteps: Any) -> Any:
        return self._run(0.4, 0.3, batch, noisy, timesteps, np.ones(len(noisy), np.float32))

    def _run(self, a: Any, b: Any, batch: Any, x: Any, t: Any, scales: Any) -> Any:
        add = batch.text.states.mean((1, 2)) + self.c * (scales - 1)
        return a * x + (b * t / 1000).reshape(-1, 1, 1, 1) + mx.array(add.reshape(-1, 1, 1, 1))


def formula(
    prediction: str, batch: Batch, drawn: Any, scales: np.ndarray, c: float, a: float, b: float,
    target: tuple[float, float], huber: float | None, solver: str, count: int = 50,
) -> np.ndarray:  # fmt: skip
    """Return the loss of each example in float64."""
    skip = 1000 // count
    ddim = np.round(np.arange(1, count + 1) * skip).astype(int) - 1
    before = np.concatenate([ALPHAS[:1], ALPHAS[ddim[:-1]]])
    index = drawn.timesteps.astype(int) * count // 1000
    start, end = ddim[index], np.maximum(ddim[index] - skip, 0)

    def wide(values: Any) -> np.ndarray:
        return np.asarray(values, np.float64).reshape(-1, 1, 1, 1)

    def network(a: float, b: float, x: Any, t: Any, text: float | np.ndarray, more: Any) -> Any:
        return a * x + wide(b * t / 1000) + wide(text) + wide(more)

    def both(out: Any, x: Any, t: Any) -> tuple[Any, Any]:
        alpha, sigma = wide(np.sqrt(ALPHAS[t])), wide(np.sqrt(1 - ALPHAS[t]))
        if prediction == "epsilon":
            return (x - sigma * out) / alpha, out
        return alpha * x - sigma * out, alpha * out + sigma * x

    def end_of(a: float, b: float, x: Any, t: Any) -> Any:
        scaled = wide(t * 10.0)
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
        out = network(a, b, x, t, batch.text.states.mean((1, 2)), c * (scales - 1))
        return c_skip * x + c_out * both(out, x, t)[0]

    def teacher(x: Any, t: Any) -> tuple[Any, Any]:
        with_text = network(0.4, 0.3, x, t, batch.text.states.mean((1, 2)), 0)
        without = network(0.4, 0.3, x, t, 0.0, 0)
        w = wide(scales - 1)  # LCM's w
        found = [
            u + (1 + w) * (v - u)
            for u, v in zip(both(without, x, t), both(with_text, x, t), strict=False)
        ]
        return found[0], found[1]

    noisy = wide(np.sqrt(ALPHAS[start])) * batch.mean + wide(np.sqrt(1 - ALPHAS[start])) * (
        drawn.noise
    )
    clean, noise = teacher(noisy, start)
    if solver == "ddim":
        previous = wide(np.sqrt(before[index])) * clean + wide(np.sqrt(1 - before[index])) * noise
    else:  # DPM-Solver++ 2S in the form of Lu et al. 2022, algorithm 1
        level = 0.5 * np.log(ALPHAS / (1 - ALPHAS))
        middle = np.array(
            [
                min(range(e + 1, s), key=lambda i: abs(level[i] - (level[e] + level[s]) / 2))
                for s, e in zip(start, end, strict=False)
            ]
        )

        def go(x: Any, data: Any, s: Any, t: Any) -> Any:
            h = wide(level[t] - level[s])
            ratio = wide(np.sqrt((1 - ALPHAS[t]) / (1 - ALPHAS[s])))
            return ratio * x - wide(np.sqrt(ALPHAS[t])) * (np.exp(-h) - 1) * data

        again, _ = teacher(go(noisy, clean, start, middle), middle)
        r = wide((level[middle] - level[start]) / (level[end] - level[start]))
        previous = go(noisy, (1 - 1 / (2 * r)) * clean + 1 / (2 * r) * again, start, end)
    missed = end_of(a, b, noisy, start) - end_of(*target, previous, end)
    if huber is None:
        return np.square(missed).mean((1, 2, 3))
    return (np.sqrt(missed**2 + huber**2) - huber).mean((1, 2, 3))


@pytest.mark.parametrize("solver", ["ddim", "dpm-solver"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("huber", [None, 0.001])
def test_loss_and_gradient_are_the_formulas(
    solver: str, prediction: str, huber: float | None
) -> None:
    rng = np.random.default_rng(1)
    batch = Batch(
        rng.standard_normal(SHAPE).astype(np.float32), None, np.ones(3, np.float32),
        Text(rng.standard_normal((3, 5, 2)).astype(np.float32), None),
    )  # fmt: skip
    drawn = replace(draw(3, 4, SHAPE, 1000), timesteps=np.array([7, 511, 999], np.int32))
    empty = Text(np.zeros((1, 5, 2), np.float32), None)
    options = TrainDistillOptions(solver=solver, huber=huber)
    process = Process(ALPHAS.astype(np.float32), prediction)
    scales = np.float32(3) + np.float32(12) * drawn.uniform
    found = consistency.Consistency(Linear(0.02), process, options, (3.0, 15.0), empty)
    target = {"a": mx.array(0.5), "b": mx.array(0.2)}

    def mean(parameters: dict[str, Any]) -> Any:
        return found.errors(parameters, target, batch, drawn).mean()

    parameters = {"a": mx.array(0.6), "b": mx.array(0.1)}
    errors = np.array(found.errors(parameters, target, batch, drawn))

    def expected(a: float, b: float) -> np.ndarray:
        return formula(prediction, batch, drawn, scales, 0.02, a, b, (0.5, 0.2), huber, solver)

    # Measured: at most 4e-6 of the value, of which the noise at t = 999 (epsilon) takes most:
    # x_0 there is the difference of two numbers 15 times as large.
    np.testing.assert_allclose(errors, expected(0.6, 0.1), rtol=3e-5)
    gradient = mx.grad(mean)(parameters)
    for name, step in (("a", (1e-6, 0.0)), ("b", (0.0, 1e-6))):
        high = expected(0.6 + step[0], 0.1 + step[1]).mean()
        low = expected(0.6 - step[0], 0.1 - step[1]).mean()
        np.testing.assert_allclose(float(gradient[name]), (high - low) / 2e-6, rtol=1e-4)


def test_the_timesteps_are_those_of_the_lcm_sampler() -> None:
    plan = mlxdiff.samplers.plan({"num_train_timesteps": 1000}, "lcm", "auto", 50)
    assert sorted(plan.timesteps) == consistency.grid(1000, 50).tolist()


@pytest.fixture(scope="module")
def cats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures") / "cats", count=2)


TINY: dict[str, Any] = {**FEW, "resolution": 32}


def test_a_lora_of_few_steps_goes_on_to_the_bit(cats: Path, tmp_path: Path) -> None:
    told = {**TINY, "model": checkpoint("sd15"), "rank": 2, "ema": 0.9, "huber": 0.001}
    straight, stopped = (tmp_path / f"{name}.safetensors" for name in ("straight", "stopped"))
    train_distill(cats, output=str(straight), **told | {"steps": 2})
    for steps in (1, 2):
        train_distill(cats, output=str(stopped), resume=True, **told | {"steps": steps})
    assert straight.read_bytes() == stopped.read_bytes()
    assert any(np.abs(value).max() > 0 for name, value in weights(straight).items() if "_B" in name)
    with pytest.raises(UsageError, match="its run had"):
        train_distill(cats, output=str(stopped), resume=True, **told | {"guidance": 4})
    pipe = mlxdiff.load(checkpoint("sd15"), backend="numpy", loras=[straight])
    drawn = pipe.generate(
        "a cat", seed=0, sampler="lcm", steps=2, guidance=1.0, width=32, height=32
    )
    assert np.isfinite(drawn.latents).all()


def test_a_whole_model_takes_the_guidance_scale(cats: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = {**TINY, "steps": 2, "model": checkpoint("sd15"), "whole": True, "guidance": (3, 9)}
    done = train_distill(cats, output=str(out), validate_every=2, validation_prompts="a", **told)
    assert done.report is not None and np.isfinite(done.report.loss)
    assert (tmp_path / "out-training/validation/step-000002-1.png").exists()
    scheduler = json.loads((out / "scheduler/scheduler_config.json").read_text())
    assert (
        scheduler["_class_name"] == "LCMScheduler" and scheduler["original_inference_steps"] == 50
    )
    pipe = mlxdiff.load(out, backend="numpy")
    drawn = [
        pipe.generate("a", seed=0, steps=2, guidance=scale, width=32, height=32)
        for scale in (3.0, 9.0)
    ]
    assert drawn[0].settings.sampler == "lcm" and drawn[0].settings.steps == 2
    assert np.abs(drawn[0].latents - drawn[1].latents).max() > 0
    with pytest.raises(UsageError, match="distilled already"):
        train_distill(cats, output=str(tmp_path / "again"), **told | {"model": str(out)})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"whole": True, "rank": 4}, "rank is for a LoRA and whole trains all weights"),
        ({"whole": True, "quantize": 4}, "quantize is for a LoRA"),
        ({"guidance": (3, 15)}, "guidance is a range, from 3 to 15"),
        ({"guidance": 0.5}, "a number of at least 1, or two as LOW,HIGH"),
        ({"guidance": (9, 3)}, "a number of at least 1, or two as LOW,HIGH"),
        ({"min_snr_gamma": 5}, "min_snr_gamma weights the error of a denoiser"),
        ({"debias": True}, "debias weights the error of a denoiser"),
        ({"solver_steps": 501}, "solver_steps is 501"),
        ({"solver_steps": 1}, "solver_steps"),
        ({"solver": "euler"}, "solver"),
    ],
)
def test_what_does_not_go_together(given: dict[str, Any], said: str, cats: Path) -> None:
    with pytest.raises(UsageError, match=said):
        train_distill(cats, model=checkpoint("sd15"), **{**TINY, **given})


def test_a_dry_run_tells_memory_and_time(cats: Path, tmp_path: Path) -> None:
    told = {**TINY, "model": checkpoint("sd15"), "dry_run": True}
    lora = train_distill(cats, output=str(tmp_path / "a.safetensors"), **told)
    whole = train_distill(cats, output=str(tmp_path / "b"), whole=True, **told)
    assert lora.report is None and whole.plan.weights == lora.plan.weights > 0
    assert whole.plan.trained > lora.plan.trained and not list(tmp_path.iterdir())
