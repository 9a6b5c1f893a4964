"""Every sampler on every schedule against stored runs of diffusers, in both kinds of array."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sampler_cases as cases

from mlxdiff import samplers
from mlxdiff.noise import Generator
from mlxdiff.samplers.registry import SCHEDULE_ARGUMENTS, has_own_schedule, samplers_for

GOLDEN = Path(__file__).parent / "golden" / "samplers"


def _stored(name: str) -> Iterator[dict[str, Any]]:
    with np.load(GOLDEN / name) as data:
        arrays = {name: data[name] for name in data.files}
    t = s = x = 0
    for scale, cell in zip(
        arrays["scales"].tolist(), json.loads(arrays["cells"].tobytes()), strict=True
    ):
        yield {
            **cell,
            "scale": scale,
            "timesteps": arrays["timesteps"][t : t + cell["timesteps"]],
            "sigmas": arrays["sigmas"][s : s + cell["sigmas"]] if cell["sigmas"] else None,
            "samples": arrays["samples"][x : x + cell["samples"]],
        }
        t, s, x = t + cell["timesteps"], s + cell["sigmas"], x + cell["samples"]


RUNS = [*_stored("runs.npz"), *_stored("more.npz")]
EDM_RUNS = list(_stored("edm.npz"))
EVERY_RUN = [*RUNS, *EDM_RUNS]
# The schedules that the reference has.
SCHEDULES = [name for name in samplers.SCHEDULES[1:] if name == "ays" or SCHEDULE_ARGUMENTS[name]]
NAMES = [
    "checkpoint",
    *(one.id for one in samplers.SAMPLERS.values() if one.scheduler.reference is not None),
]


def _config(run: dict[str, Any]) -> dict[str, Any]:
    return {**cases.EVERY_CONFIG[run["config"]], **run.get("overrides", {})}


def _family(run: dict[str, Any]) -> str:
    return "sdxl" if run["config"] == "sdxl" else "sd1"


def _label(run: dict[str, Any]) -> str:
    return f"{run['config']} {run['schedule']} {run.get('overrides', '')} {run.get('eta', '')}"


def test_the_grid_is_complete() -> None:
    """Every sampler with every schedule that it has, in five configs: several hundred runs."""
    assert len(RUNS) > 500
    for runs, config in ((RUNS, "sd15"), (EDM_RUNS, "playground"), (EDM_RUNS, "cosxl")):
        seen = {(run["sampler"], run["schedule"]) for run in runs}
        for name in NAMES[1:]:
            for schedule in SCHEDULES:
                one = samplers_for(cases.EVERY_CONFIG[config]).get(name)
                if one and schedule != "ays" and not has_own_schedule(one.scheduler, schedule):
                    continue  # at most by levels, which the reference does not have
                try:
                    samplers.timesteps(cases.EVERY_CONFIG[config], name, schedule, 10)
                except samplers.UsageError:
                    assert (name, schedule) not in seen
                else:
                    assert (name, schedule) in seen


@pytest.mark.parametrize("sampler", NAMES)
def test_timesteps_and_sigmas(sampler: str) -> None:
    """Whole timesteps are equal; fractional ones and sigmas to the last bit or so.

    torch's square root on x86 (Intel's library) is not correctly rounded: a fifth of the sigmas it
    gives are off by one unit in the last place. With its square root in place of NumPy's all arrays
    here are equal bit for bit. Zero terminal SNR subtracts square roots from each other, which
    enlarges that.
    """
    for run in (run for run in EVERY_RUN if run["sampler"] == sampler):
        zero_snr = run["config"] == "zsnr"
        times, sigmas = samplers.timesteps(
            _config(run), sampler, run["schedule"], run["steps"], family=_family(run)
        )
        assert times.dtype == (np.int64 if run["whole"] else np.float32), _label(run)
        if run["whole"]:
            np.testing.assert_array_equal(times, run["timesteps"], _label(run))
        else:
            np.testing.assert_allclose(
                times,
                run["timesteps"],
                rtol=0,
                atol=1e-3 if zero_snr else 2e-4,
                err_msg=_label(run),
            )
        if run["sigmas"] is None:
            assert sigmas is None, _label(run)
        else:
            assert sigmas is not None and sigmas.dtype == np.float32
            np.testing.assert_allclose(
                sigmas, run["sigmas"], rtol=1e-4 if zero_snr else 3e-7, err_msg=_label(run)
            )


def _tolerance(run: dict[str, Any], scale: float) -> float:
    """How far a sample may be from the reference's, given the largest |x| so far.

    2e-5 of it: the reference rounds its coefficients to float32, ours are double. With zero
    terminal SNR the first sigma is 4096 (alpha 2.4e-4): what is then a difference of large numbers
    carries 4096 units in the last place of float32, in the reference as here; dpm-2m, which
    predicts noise, subtracts them at full size.
    """
    if run["config"] == "zsnr":
        return 1e-2 if run["sampler"] == "dpm-2m" else 1e-3 * max(1.0, min(scale, 4.0))
    return 2e-5 * scale


def _check(run: dict[str, Any], array: Any, to_numpy: Any) -> None:
    """Follow one run to its end in one kind of array."""
    options = {key: run[key] for key in ("eta", "strength") if key in run}
    plan = samplers.plan(
        _config(run), run["sampler"], run["schedule"], run["steps"], family=_family(run), **options
    )
    assert plan.init_noise_sigma == pytest.approx(run["scale"], rel=2e-7)
    assert len(plan) + 1 == len(run["samples"]), _label(run)
    generator, state = Generator(3), plan.start()
    start = array(cases.start_noise())
    x = plan.add_noise(array(cases.picture()), start) if options.get("strength") else None
    x = plan.init_noise_sigma * start if x is None else x
    largest = 1.0
    for row, (timestep, expected) in enumerate(
        zip([None, *plan.timesteps], run["samples"], strict=True)
    ):
        if timestep is not None:
            seen = to_numpy(plan.scale_model_input(x, state))
            output = array(cases.fake_network(seen, timestep))
            x, state = plan.step(
                x,
                output,
                state,
                noise=lambda: array(generator.randn(cases.SHAPE)),
            )
            assert state.index == row
        found = to_numpy(x)
        assert found.dtype == np.float32
        largest = max(largest, float(np.abs(expected).max()))
        off = float(np.abs(found - expected).max())
        assert off <= _tolerance(run, largest), f"{_label(run)}: step {row}: {off}"


@pytest.mark.parametrize("sampler", NAMES)
def test_steps_numpy(sampler: str) -> None:
    for run in (run for run in EVERY_RUN if run["sampler"] == sampler):
        _check(run, lambda x: x, lambda x: x)


@pytest.mark.mlx
@pytest.mark.parametrize("sampler", NAMES)
def test_steps_mlx(sampler: str) -> None:
    mx = pytest.importorskip("mlx.core")

    def to_numpy(x: Any) -> np.ndarray:
        assert isinstance(x, mx.array) and x.dtype == mx.float32
        return np.array(x)

    for run in (run for run in EVERY_RUN if run["sampler"] == sampler):
        _check(run, mx.array, to_numpy)
