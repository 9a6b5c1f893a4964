"""The samplers without a reference library, against their papers' formulas as plain loops.

Everything is float64 here, so only the order of the operations differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from sampler_cases import CONFIGS

from mlxdiff import samplers
from mlxdiff.samplers.schedule import karras

SHAPE = (1, 2, 3, 4)
RNG = np.random.default_rng(5)
START, OTHER = RNG.standard_normal(SHAPE), RNG.standard_normal(SHAPE)
NOISE = [RNG.standard_normal(SHAPE) for _ in range(80)]
Denoise = Callable[[np.ndarray, float], tuple[np.ndarray, np.ndarray]]


def _network(x: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Noise predicted with and without the prompt, for x at unit variance; a formula."""
    guided = 0.3 * x + 0.2 * np.sin(3.0 * x + 0.3 * math.log(sigma))
    return guided, 0.7 * guided + 0.1 * np.cos(x) * OTHER


def _denoise(x: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """x_0, with x / alpha in."""
    noises = _network(x / math.hypot(sigma, 1.0), sigma)
    return x - sigma * noises[0], x - sigma * noises[1]


def _drawn(plan: samplers.Plan) -> np.ndarray:
    noise = iter(NOISE)
    x, state = plan.init_noise_sigma * START, plan.start()
    for row in plan.rows:
        output, unconditional = _network(plan.scale_model_input(x, state), row.level[1])
        x, state = plan.step(
            x, output, state, noise=lambda: next(noise), unconditional=unconditional
        )
    return x


def _sigmas(steps: int, schedule: str = "karras") -> list[float]:
    found = samplers.timesteps(CONFIGS["sd15"], "euler", schedule, steps)[1]
    assert found is not None
    return [float(sigma) for sigma in found]


def _slope(x: np.ndarray, sigma: float) -> np.ndarray:
    return (x - _denoise(x, sigma)[0]) / sigma


def ipndm(sigmas: Sequence[float]) -> np.ndarray:
    x, slopes = sigmas[0] * START, []
    for here, there in pairwise(sigmas):
        slopes.append(_slope(x, here))
        d = slopes[::-1]
        if there == 0.0 or len(d) == 1:
            mean = d[0]
        elif len(d) == 2:
            mean = (3 * d[0] - d[1]) / 2
        elif len(d) == 3:
            mean = (23 * d[0] - 16 * d[1] + 5 * d[2]) / 12
        else:
            mean = (55 * d[0] - 59 * d[1] + 37 * d[2] - 9 * d[3]) / 24
        x = x + (there - here) * mean
    return x


def ipndm_v(sigmas: Sequence[float]) -> np.ndarray:
    """The integral of the interpolating polynomial, which NumPy fits."""
    x, slopes = sigmas[0] * START, []
    for i, (here, there) in enumerate(pairwise(sigmas)):
        slopes.append(_slope(x, here))
        count = 1 if there == 0.0 else min(i + 1, 4)
        nodes = np.array(sigmas[i - count + 1 : i + 1])
        values = np.array(slopes[-count:]).reshape(count, -1)
        fitted = np.linalg.solve(np.vander(nodes - here, count, increasing=True), values)
        powers = np.array([(there - here) ** (k + 1) / (k + 1) for k in range(count)])
        x = x + (powers @ fitted).reshape(SHAPE)
    return x


def heunpp2(sigmas: Sequence[float]) -> np.ndarray:
    x, top = sigmas[0] * START, sigmas[0]
    for i, (here, there) in enumerate(pairwise(sigmas)):
        d = _slope(x, here)
        if there > 0.0:
            x2 = x + (there - here) * d
            d2 = _slope(x2, there)
            beyond = sigmas[i + 2]
            if beyond == 0.0:
                w2 = there / (2 * top)
                d = (1 - w2) * d + w2 * d2
            else:
                d3 = _slope(x2 + (beyond - there) * d2, beyond)
                w2, w3 = there / (3 * top), beyond / (3 * top)
                d = (1 - w2 - w3) * d + w2 * d2 + w3 * d3
        x = x + (there - here) * d
    return x


def er_sde(sigmas: Sequence[float]) -> np.ndarray:
    """The authors' loop, with 20000 rectangles (midpoints) for their 100."""

    def phi(sigma: Any) -> Any:
        return sigma * (np.exp(sigma**0.3) + 10.0)

    x, noise, old, old_d = sigmas[0] * START, iter(NOISE), None, None
    for i, (here, there) in enumerate(pairwise(sigmas)):
        x0 = _denoise(x, here)[0]
        if there == 0.0:
            return x0
        r = phi(there) / phi(here)
        new = r * x + (1 - r) * x0
        if old is not None:
            at = there + (np.arange(20000) + 0.5) / 20000 * (here - there)
            width = (here - there) / 20000
            d = (x0 - old) / (here - sigmas[i - 1])
            new = new + (there - here + (width / phi(at)).sum() * phi(there)) * d
            if old_d is not None:
                dd = 2 * (d - old_d) / (here - sigmas[i - 2])
                part = ((at - here) / phi(at) * width).sum()
                new = new + ((there - here) ** 2 / 2 + part * phi(there)) * dd
            old_d = d
        old = x0
        x = new + math.sqrt(there**2 - here**2 * r**2) * next(noise)
    return x


def euler_cfg_pp(sigmas: Sequence[float], ancestral: bool = False) -> np.ndarray:
    x, noise = sigmas[0] * START, iter(NOISE)
    for here, there in pairwise(sigmas):
        x0, uncond = _denoise(x, here)
        up = there / here * math.sqrt(here**2 - there**2) if ancestral else 0.0
        x = x0 + math.sqrt(there**2 - up**2) * (x - uncond) / here
        x = x + up * next(noise) if ancestral else x
    return x


def dpmpp_2m_cfg_pp(sigmas: Sequence[float]) -> np.ndarray:
    x, old, last = sigmas[0] * START, None, 0.0
    for here, there in pairwise(sigmas):
        x0, uncond = _denoise(x, here)
        shrink = there / here
        new = x0 + shrink * (x - uncond)
        if old is not None and there > 0.0:
            h = math.log(here / there)
            new = new + (1 - shrink) * (uncond - old) * h / (2 * last)
        last = math.log(here / there) if there > 0.0 else 0.0
        old, x = uncond, new
    return x


def restart(steps: int) -> np.ndarray:
    """Algorithm 1 of the paper on Heun's steps, with the web UI's numbers."""
    inner, times = (9, 1) if steps < 36 else (steps // 4, 2)
    sigmas = _sigmas(steps - inner * times)
    low = int(np.argmin(np.abs(np.array(sigmas) - 0.1)))
    high = int(np.argmin(np.abs(np.array(sigmas) - 2.0)))
    again = karras(sigmas[high], sigmas[low], inner + 1).astype(np.float32).astype(float).tolist()
    again[0], again[-1] = sigmas[high], sigmas[low]
    x, noise = sigmas[0] * START, iter(NOISE)

    def heun(x: np.ndarray, here: float, there: float) -> np.ndarray:
        d = _slope(x, here)
        if there > 0.0:
            d = (d + _slope(x + (there - here) * d, there)) / 2
        return x + (there - here) * d

    for i, (here, there) in enumerate(pairwise(sigmas)):
        x = heun(x, here, there)
        if i + 1 == low:
            for _ in range(times):
                x = x + math.sqrt(again[0] ** 2 - again[-1] ** 2) * next(noise)
                for a, b in pairwise(again):
                    x = heun(x, a, b)
    return x


@pytest.mark.parametrize(
    ("sampler", "formula"),
    [
        ("ipndm", ipndm),
        ("ipndm-v", ipndm_v),
        ("heunpp2", heunpp2),
        ("er-sde", er_sde),
        ("euler-cfg++", euler_cfg_pp),
        ("euler-a-cfg++", lambda sigmas: euler_cfg_pp(sigmas, ancestral=True)),
        ("dpmpp-2m-cfg++", dpmpp_2m_cfg_pp),
    ],
)
@pytest.mark.parametrize("schedule", ["karras", "linspace"])
def test_formulas(
    sampler: str, formula: Callable[[Sequence[float]], np.ndarray], schedule: str
) -> None:
    plan = samplers.plan(CONFIGS["sd15"], sampler, schedule, 9)
    # er_sde's rectangles are accurate to 1e-8 or so
    np.testing.assert_allclose(
        _drawn(plan),
        formula(_sigmas(9, schedule)),
        rtol=0,
        atol=1e-6 if sampler == "er-sde" else 1e-9,
    )


@pytest.mark.parametrize("steps", [20, 40])
def test_restart(steps: int) -> None:
    plan = samplers.plan(CONFIGS["sd15"], "restart", "karras", steps)
    np.testing.assert_allclose(_drawn(plan), restart(steps), rtol=0, atol=1e-6)


def test_restart_of_few_steps_is_heun() -> None:
    rows = [
        samplers.plan(CONFIGS["sd15"], sampler, "karras", 10).rows
        for sampler in ("restart", "heun")
    ]
    for own, other in zip(*rows, strict=True):
        assert own.weights == pytest.approx(other.weights) and own.level == other.level


def test_cfg_plus_plus_without_guidance_is_the_plain_sampler() -> None:
    for sampler, plain in (("euler-cfg++", "euler"), ("euler-a-cfg++", "euler-a")):
        ends = []
        for name in (sampler, plain):
            plan, noise = samplers.plan(CONFIGS["sd15"], name, "linspace", 7), iter(NOISE)
            x, state = plan.init_noise_sigma * START, plan.start()
            for row in plan.rows:
                output, _ = _network(plan.scale_model_input(x, state), row.level[1])
                x, state = plan.step(x, output, state, noise=lambda noise=noise: next(noise))
            ends.append(x)
        np.testing.assert_allclose(*ends, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampler", [name for name in samplers.SAMPLERS if name != "fitted"])
@pytest.mark.parametrize("strength", [0.3, 0.75])
def test_a_run_begins_with_a_whole_step(sampler: str, strength: float) -> None:
    plan = samplers.plan(CONFIGS["sd15"], sampler, "normal", 24, strength=strength)
    assert plan.rows[0].anchor_last == 0.0
    x, state = plan.add_noise(OTHER, START), plan.start()
    for row in plan.rows:
        output = _network(plan.scale_model_input(x, state), max(row.level[1], 0.01))[0]
        x, state = plan.step(x, output, state, noise=lambda: START)
    assert np.isfinite(x).all() and len(plan) < len(
        samplers.plan(CONFIGS["sd15"], sampler, "normal", 24)
    )
