"""The samplers that k-diffusion defines, against stored runs of it, and its Brownian motions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sampler_cases as cases

from mlxdiff import samplers
from mlxdiff.brownian import BrownianMotion
from mlxdiff.noise import Generator

with np.load(Path(__file__).parent / "golden" / "samplers" / "kdiffusion.npz") as _data:
    STORED = {name: _data[name] for name in _data.files}
CELLS: list[dict[str, Any]] = json.loads(STORED["cells"].tobytes())
OWN_GRID = ("dpmpp-2m-sde",)  # whole timesteps here, as diffusers has it; fractional in k-diffusion


def drawn(cell: dict[str, Any]) -> np.ndarray:
    """The end of a run, x / alpha."""
    config, sampler = cases.CONFIGS[cell["config"]], cell["sampler"]
    plan = samplers.plan(config, sampler, cell["schedule"], cell["steps"])
    generator, motion = Generator(3), None
    if cell["noise"] == "brownian":
        assert plan.interval is not None
        motion = BrownianMotion(plan.interval, 3, lambda seed: Generator(seed).randn(cases.SHAPE))
    x, state = np.float32(plan.init_noise_sigma) * cases.start_noise(), plan.start()
    for t in plan.timesteps:
        output = cases.fake_network(plan.scale_model_input(x, state), t)
        x, state = plan.step(
            x, output, state, noise=lambda: generator.randn(cases.SHAPE), motion=motion
        )
    return x


def _tolerance(cell: dict[str, Any]) -> float:
    """2e-5 for float32, as in test_samplers_goldens.py.

    k-diffusion gives the sigmas of dpmpp-sde to the tree as exp(-(-log(sigma))) in float32, and
    torch's log and exp differ from NumPy's in the last bit (up to 1e-6 at sigma 14.6). With the
    rounding to six digits the ends of an interval can lie 2e-6 apart; a Brownian motion over that
    has a deviation of 1.4e-3, and five of these are 7e-3.
    """
    through_logs = cell["sampler"] == "dpmpp-sde" and cell["noise"] == "brownian"
    return 7e-3 if through_logs else 2e-5


@pytest.mark.parametrize("sampler", sorted({cell["sampler"] for cell in CELLS} - set(OWN_GRID)))
def test_runs(sampler: str) -> None:
    """Up to float32's rounding."""
    for cell, end in zip(CELLS, STORED["ends"], strict=True):
        if cell["sampler"] == sampler:
            off = np.abs(drawn(cell) - end).max()
            assert off <= _tolerance(cell) * max(1.0, np.abs(end).max()), (cell, off)


def test_brownian_motions() -> None:
    """Equal to torchsde's, but for the last bits of torch's log and cos."""
    low, high = float(STORED["pairs"].min()), float(STORED["pairs"].max())
    for seed, stored in zip(STORED["seeds"].tolist(), STORED["motions"], strict=True):
        motion = BrownianMotion((low, high), seed, lambda own: Generator(own).randn((1, 4, 2, 3)))
        for (here, there), expected in zip(STORED["pairs"].tolist(), stored, strict=True):
            found = motion(here, there)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
            np.testing.assert_array_equal(found, -motion(there, here))
