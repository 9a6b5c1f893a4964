"""The fitted sampler: where its numbers stand, what they mean, when `auto` takes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sampler_cases import CONFIGS, fake_network, start_noise

from examples.train_builtin import fit_sampler
from mlxdiff import samplers
from mlxdiff.errors import ConfigError, UsageError
from mlxdiff.samplers.fitted import KEY

V = CONFIGS["sd21v"]


def _fit(*steps: int, slope: float = 0.0) -> dict[str, Any]:
    """A config whose fitted numbers are those of dpmpp-2m, plus `slope` for each unit above 1."""
    runs = {}
    for count in steps:
        rows = samplers.plan(V, "dpmpp-2m", "trailing", count).rows
        runs[str(count)] = [
            [row.timestep, [[row.scale, slope], *([weight, slope] for weight in row.weights)]]
            for row in rows
        ]
    return {**V, KEY: {"guidance": [1.0, 8.0], "runs": runs}}


def _run(plan: samplers.Plan, array: Any = lambda x: x, numpy: Any = lambda x: x) -> np.ndarray:
    x, state = array(plan.init_noise_sigma * start_noise()), plan.start()
    for t in plan.timesteps:
        output = array(fake_network(numpy(plan.scale_model_input(x, state)), t))
        x, state = plan.step(x, output, state)
    return numpy(x)


def test_it_is_what_its_numbers_say() -> None:
    plan = samplers.plan(_fit(6), "fitted", steps=6, guidance=4.0)
    same = samplers.plan(V, "dpmpp-2m", "trailing", 6)
    assert (plan.sampler, plan.schedule, plan.timesteps) == ("fitted", "normal", same.timesteps)
    np.testing.assert_allclose(_run(plan), _run(same), atol=2e-6)
    times, sigmas = samplers.timesteps(_fit(6), "fitted", "normal", 6)
    expected = samplers.timesteps(V, "dpmpp-2m", "trailing", 6)
    np.testing.assert_array_equal(times, expected[0])
    assert sigmas is not None and expected[1] is not None
    np.testing.assert_allclose(sigmas, expected[1], rtol=1e-6)


@pytest.mark.mlx
def test_the_same_on_mlx() -> None:
    mx = pytest.importorskip("mlx.core")
    plan = samplers.plan(_fit(6, slope=0.01), "fitted", steps=6, guidance=4.0)
    np.testing.assert_allclose(_run(plan, mx.array, np.array), _run(plan), atol=2e-6)


def test_coefficients_are_lines_in_the_guidance_scale() -> None:
    plain, config = samplers.plan(V, "dpmpp-2m", "trailing", 4), _fit(4, slope=0.25)
    for guidance, more in ((3.0, 0.5), (1.0, 0.0), (0.0, 0.0), (None, 0.0)):
        for row, was in zip(
            samplers.plan(config, "fitted", steps=4, guidance=guidance).rows,
            plain.rows,
            strict=True,
        ):
            assert row.scale == was.scale + more
            assert row.weights == tuple(weight + more for weight in was.weights)
            assert {type(number) for number in (row.scale, *row.weights)} == {float}


@pytest.mark.parametrize(
    "sampler, schedule, steps, more, chosen",
    [
        ("auto", "auto", 6, {"guidance": 4.0}, "fitted"),
        ("auto", "auto", 6, {"guidance": 0.0}, "fitted"),
        ("auto", "auto", 8, {"guidance": 8.0}, "fitted"),
        ("auto", "auto", 7, {"guidance": 4.0}, "dpmpp-2m"),  # not fitted for as many steps,
        ("auto", "auto", 6, {"guidance": 8.5}, "dpmpp-2m"),  # nor for this guidance
        ("auto", "auto", 6, {}, "dpmpp-2m"),
        ("auto", "karras", 6, {"guidance": 4.0}, "dpmpp-2m"),
        ("euler", "auto", 6, {"guidance": 4.0}, "euler"),
        ("auto", "auto", 6, {"guidance": 4.0, "strength": 0.5}, "dpmpp-2m"),
        ("auto", "auto", 6, {"guidance": 4.0, "denoising_end": 0.8}, "dpmpp-2m"),
    ],
)
def test_auto(sampler: str, schedule: str, steps: int, more: dict[str, Any], chosen: str) -> None:
    assert samplers.plan(_fit(6, 8), sampler, schedule, steps, **more).sampler == chosen
    assert samplers.plan(V, sampler, schedule, steps, **more).sampler != "fitted"


def test_what_cannot_be() -> None:
    config = _fit(6)
    for steps, more, message in (
        (7, {}, "fitted for 6 steps, not 7"),
        (6, {"guidance": 9.0}, "fitted for guidance 1 to 8, not 9"),
        (6, {"strength": 0.5}, "from noise to picture only"),
        (6, {"eta": 0.5}, "has no eta"),
    ):
        with pytest.raises(UsageError, match=message):
            samplers.plan(config, "fitted", "auto", steps, **more)
    with pytest.raises(UsageError, match="has not been fitted"):
        samplers.plan(V, "fitted", steps=6)
    with pytest.raises(UsageError, match="karras"):
        samplers.plan(config, "fitted", "karras", 6)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {},
        {"guidance": [1.0], "runs": {}},
        {"guidance": [2.0, 1.0], "runs": {}},
        {"guidance": [1.0, 8.0], "runs": {"2": [[999, [[1.0, 0.0], [0.0, 0.0]]]]}},
        {"guidance": [1.0, 8.0], "runs": {"1": [[999.5, [[1.0, 0.0], [0.0, 0.0]]]]}},
        {"guidance": [1.0, 8.0], "runs": {"1": [[999, [[1.0, 0.0]]]]}},
        {"guidance": [1.0, 8.0], "runs": {"1": [[999, [[1.0, 0.0], [0.0]]]]}},
        {"guidance": [1.0, 8.0], "runs": {"1": [[999, [[1.0, 0.0], [0.0, float("nan")]]]]}},
        {"guidance": [1.0, 8.0], "runs": {"1": [[999, [["1", 0.0], [0.0, 0.0]]]]}},
    ],
)
def test_malformed_numbers(entry: Any) -> None:
    for sampler in ("auto", "fitted"):
        with pytest.raises(ConfigError, match="malformed"):
            samplers.plan({**V, KEY: entry}, sampler, steps=1, guidance=1.0)
    assert samplers.plan({**V, KEY: entry}, "ddim", steps=1, guidance=1.0).sampler == "ddim"


# --- fitting --------------------------------------------------------------------------------------


class _TwoPoints:
    """The perfect network for data at -1 and 1, as fit_sampler asks it; v-prediction."""

    config = V

    def __call__(
        self, x: np.ndarray, t: float, prompts: Sequence[str], scales: np.ndarray
    ) -> np.ndarray:
        rows = fit_sampler.solver(V, fit_sampler.LEVELS).rows
        alpha, sigma = {row.timestep: row.level for row in rows}[t]
        x0 = np.tanh(scales.reshape(-1, 1, 1, 1) * alpha / sigma**2 * x)
        return ((alpha * x - x0) / sigma).astype(np.float32)


def test_fitting_lands_nearer_and_is_written_as_it_is_read(tmp_path: Path) -> None:
    network = _TwoPoints()
    scales = np.repeat([1.0, 3.0], 8)
    rng = np.random.default_rng(0)
    noise = np.tile(rng.standard_normal((8, 4, 4, 4)).astype(np.float32), (2, 1, 1, 1))
    x, x0 = fit_sampler.fine_solution(network, noise, [], scales)
    assert np.abs(np.abs(x[-1]) - 1.0).mean() < 0.05  # nearly every value at one of the points
    errors = fit_sampler.step_errors(x, x0, scales)
    runs = {}
    for steps in (2, 5):
        path = fit_sampler.choose_levels(errors, steps)
        assert path[0] == 0 and len(path) == steps and path == sorted(set(path))
        runs[str(steps)] = fit_sampler.fit(network, x, path, [], scales)
    folder = tmp_path / "scheduler"
    folder.mkdir()
    (folder / "scheduler_config.json").write_text(json.dumps(V))
    entry = {"guidance": [1.0, 3.0], "runs": runs}
    for _ in range(2):  # a second fit takes the place of the first
        fit_sampler.write(tmp_path, entry)
    config = json.loads((folder / "scheduler_config.json").read_text())
    assert config == {**V, KEY: entry}

    fresh = rng.standard_normal((8, 4, 4, 4)).astype(np.float32)
    for guidance in (1.0, 2.0, 3.0):
        scales = np.full(8, guidance)
        exact = fit_sampler.fine_solution(network, fresh, [], scales)[0][-1]
        found = {}
        fitted = samplers.plan(config, steps=5, guidance=guidance)
        assert fitted.sampler == "fitted"
        times = [fit_sampler.LEVELS[i] for i in (0, 13, 26, 39, 52)]
        for name, plan in (("fitted", fitted), ("2m", fit_sampler.solver(V, times))):
            now, state = fresh, plan.start()
            for t in plan.timesteps:
                now, state = plan.step(now, network(now, t, [], scales), state)
            found[name] = float(np.sqrt(((now - exact) ** 2).mean()))
        assert found["fitted"] < found["2m"], (guidance, found)
