"""The full loops of diffusers' own scheduler tests, against the sums that those tests publish.

The loops are theirs: a "network" output = x * t / (t + 1) on a ramp of 4 x 3 x 8 x 8 numbers; the
sum of |x| at the end. Source: huggingface/diffusers, tests/schedulers/test_scheduler_*.py
(test_full_loop_*). Where they give the mean only, to 1e-3, it stands here times the 768 elements.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlxdiff import samplers
from mlxdiff.noise import Generator

LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LONG = {**LINEAR, "num_train_timesteps": 1100}
CLIP = {**LINEAR, "clip_sample": True}
SOLVER = {**LINEAR, "final_sigmas_type": "sigma_min"}
MULTI = {**SOLVER, "lower_order_final": False}
V = {"prediction_type": "v_prediction"}
FIRST = {"beta_start": 0.01}
LIMITED = {"thresholding": True, "dynamic_thresholding_ratio": 0.87, "sample_max_value": 0.5}

# sampler, schedule, config, steps, strength or None, published sum of |x|, its precision
LOOPS: list[tuple[str, str, dict[str, Any], int, float | None, float, float]] = [
    ("dpmpp-2m", "normal", MULTI, 10, None, 0.3301 * 768, 0.8),
    ("dpmpp-2m", "normal", {**MULTI, **V}, 10, None, 0.2251 * 768, 0.8),
    ("dpmpp-2m", "normal", {**MULTI, **LIMITED}, 10, None, 1.1364 * 768, 0.8),
    ("dpmpp-2m", "normal", MULTI, 10, 0.5, 318.4111, 1e-2),
    ("dpmpp-2s", "normal", SOLVER, 10, None, 0.2791 * 768, 0.8),
    ("dpmpp-2s", "normal", {**SOLVER, **V}, 10, None, 0.1453 * 768, 0.8),
    ("unipc", "normal", SOLVER, 10, None, 0.2464 * 768, 0.8),
    ("unipc", "karras", SOLVER, 10, None, 0.2925 * 768, 0.8),
    ("unipc", "normal", {**SOLVER, **V}, 10, None, 0.1014 * 768, 0.8),
    ("unipc", "karras", {**SOLVER, **V}, 10, None, 0.1966 * 768, 0.8),
    ("unipc", "normal", SOLVER, 10, 0.2, 315.5757, 1e-2),
    ("deis", "normal", LINEAR, 10, None, 0.23916 * 768, 0.8),
    ("deis", "normal", {**LINEAR, **V}, 10, None, 0.091 * 768, 0.8),
    ("deis", "normal", LINEAR, 10, 0.2, 315.3016, 1e-2),
    ("euler", "normal", LONG, 10, None, 10.0807, 1e-2),
    ("euler", "normal", {**LONG, **V}, 10, None, 0.0002, 1e-2),
    ("euler", "karras", LONG, 10, None, 124.52299, 1e-2),
    ("euler-a", "normal", LONG, 10, None, 152.3192, 1e-2),
    ("euler-a", "normal", {**LONG, **V}, 10, None, 108.4439, 1e-2),
    ("heun", "normal", LONG, 10, None, 0.1233, 1e-2),
    ("heun", "karras", LONG, 10, None, 0.00015, 1e-2),
    ("lms", "normal", LONG, 10, None, 1006.388, 1e-2),
    ("lms", "normal", {**LONG, **V}, 10, None, 0.0017, 1e-2),
    ("lms", "karras", LONG, 10, None, 3812.9927, 2e-2),
    ("pndm", "normal", LINEAR, 10, None, 198.1318, 1e-2),
    ("pndm", "normal", {**LINEAR, **V}, 10, None, 67.3986, 1e-2),
    ("pndm", "normal", {**LINEAR, **FIRST, "set_alpha_to_one": True}, 10, None, 230.0399, 1e-2),
    ("pndm", "normal", {**LINEAR, **FIRST, "set_alpha_to_one": False}, 10, None, 186.9482, 1e-2),
    ("ddim", "normal", CLIP, 10, None, 172.0067, 1e-2),
    ("ddim", "normal", {**CLIP, **V}, 10, None, 52.5302, 1e-2),
    ("ddim", "normal", {**CLIP, **FIRST, "set_alpha_to_one": True}, 10, None, 149.8295, 1e-2),
    ("ddim", "normal", {**CLIP, **FIRST, "set_alpha_to_one": False}, 10, None, 149.0784, 1e-2),
    ("ddim", "normal", CLIP, 10, 0.2, 354.5418, 1e-2),
    ("ddpm", "normal", CLIP, 1000, None, 258.9606, 1e-2),
    ("ddpm", "normal", {**CLIP, **V}, 1000, None, 202.0296, 1e-2),
    ("lcm", "normal", LATENT, 1, None, 18.7097, 1e-3),
    ("lcm", "normal", LATENT, 10, None, 197.7616, 1e-3),
    ("tcd", "normal", LATENT, 1, None, 29.8715, 1e-3),
    ("tcd", "normal", LATENT, 10, None, 181.2040, 1e-3),
]


@pytest.mark.parametrize("case", LOOPS, ids=lambda case: f"{case[0]} {case[1]} {case[5]:.4g}")
def test_published_sum(
    case: tuple[str, str, dict[str, Any], int, float | None, float, float],
) -> None:
    sampler, schedule, config, steps, strength, published, precision = case
    plan = samplers.plan(config, sampler, schedule, steps, strength=strength)
    ramp = np.arange(768, dtype=np.float32).reshape(3, 8, 8, 4).transpose(3, 0, 1, 2) / 768
    ramp = ramp.astype(np.float32)
    back = ramp.transpose(1, 2, 3, 0).ravel()[::-1].reshape(3, 8, 8, 4).transpose(3, 0, 1, 2)
    x, state, generator = plan.init_noise_sigma * ramp, plan.start(), Generator(0)
    if strength is not None:
        x = plan.add_noise(ramp, back)
    for t in plan.timesteps:
        x = plan.scale_model_input(x, state)  # their loops go on from the scaled sample
        output = (x * np.float32(t) / np.float32(t + 1)).astype(np.float32)
        x, state = plan.step(x, output, state, noise=lambda: generator.randn(ramp.shape))
    assert float(np.abs(x).sum()) == pytest.approx(published, abs=precision)
