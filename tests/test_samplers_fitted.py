"""The fitted sampler: where its numbers stand, what they mean, when `auto` takes them."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sampler_cases import CONFIGS, fake_network, start_noise

from examples.train_builtin import fit_sampler, refine, teacher
from mlxdiff import samplers
from mlxdiff.errors import ConfigError, UsageError
from mlxdiff.loading import BUILTIN
from mlxdiff.samplers.fitted import KEY
from mlxdiff.store.folder import open_folder

V = CONFIGS["sd21v"]
V_HEUN = {**V, "solver_type": "heun"}  # the line integrated exactly, as the fitted runs have it


def _fit(*steps: int, slope: float = 0.0) -> dict[str, Any]:
    """A config whose run is dpmpp-2m at scale 1; at 8 each number has 7 * slope more."""
    runs: dict[str, Any] = {}
    for count in steps:
        rows = samplers.plan(V_HEUN, "dpmpp-2m", "trailing", count).rows
        runs[str(count)] = [
            [[row.timestep, [more] * (1 + len(row.weights))] for row in rows]
            for more in (0.0, 7.0 * slope)
        ]
    return {**V, KEY: [{"guidance": [1.0, 8.0], "runs": runs}]}


def _run(plan: samplers.Plan, array: Any = lambda x: x, numpy: Any = lambda x: x) -> np.ndarray:
    x, state = array(plan.init_noise_sigma * start_noise()), plan.start()
    for t in plan.timesteps:
        output = array(fake_network(numpy(plan.scale_model_input(x, state)), t))
        x, state = plan.step(x, output, state)
    return numpy(x)


def test_it_is_what_its_numbers_say() -> None:
    plan = samplers.plan(_fit(6), "fitted", steps=6, guidance=4.0)
    same = samplers.plan(V_HEUN, "dpmpp-2m", "trailing", 6)
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


def test_numbers_are_interpolated_between_guidance_scales() -> None:
    plain, config = samplers.plan(V_HEUN, "dpmpp-2m", "trailing", 4), _fit(4, slope=0.25)
    for guidance, more in ((3.0, 0.5), (8.0, 1.75), (1.0, 0.0), (0.0, 0.0), (None, 0.0)):
        for row, was in zip(
            samplers.plan(config, "fitted", steps=4, guidance=guidance).rows,
            plain.rows,
            strict=True,
        ):
            assert row.scale == pytest.approx(was.scale + more, abs=1e-6)
            expected = [weight + more for weight in was.weights]
            assert row.weights == pytest.approx(expected, abs=1e-6)
            assert {type(number) for number in (row.scale, *row.weights)} == {float}


def test_the_narrowest_fit_that_covers_the_scale_is_taken() -> None:
    def fit(guidance: list[float], *times: int) -> dict[str, Any]:
        run = [[time, [0.0] * (2 if i == 0 else 3)] for i, time in enumerate(times)]
        return {"guidance": guidance, "runs": {"2": [run] * len(guidance)}}

    fits = [fit([4.0], 999, 4), fit([1.0, 4.0], 999, 1), fit([4.0, 8.0], 999, 8)]
    config = {**V, KEY: [*fits, {"guidance": [9.0], "runs": {}}]}
    for guidance, last in ((1.0, 1), (3.9, 1), (4.0, 4), (4.1, 8), (8.0, 8)):
        plan = samplers.plan(config, steps=2, guidance=guidance)
        assert (plan.sampler, plan.timesteps) == ("fitted", (999, last))
        usual = teacher.solver(V, plan.timesteps).rows  # the numbers are zero
        for row, same in zip(plan.rows, usual, strict=True):
            assert row.scale == pytest.approx(same.scale, rel=1e-6)
            weights = row.weights[: len(same.weights)]
            assert weights == pytest.approx(same.weights, rel=1e-5)
    assert samplers.plan(config, steps=2, guidance=9.0).sampler == "dpmpp-2m"


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
        (7, {}, "fitted for 6 steps at guidance 1 to 8; not for 7 steps at guidance 1"),
        (6, {"guidance": 9.0}, "not for 6 steps at guidance 9"),
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
    "fit",
    [
        None,
        {},
        {"guidance": [], "runs": {}},
        {"guidance": [2.0, 1.0], "runs": {}},
        {"guidance": [1.0, 2.0, 3.0], "runs": {}},
        {"guidance": [0.5], "runs": {}},
        {"guidance": [1.0, 8.0], "runs": {"1": [[[999, [1.0, 0.0]]]]}},
        {"guidance": [1.0, 8.0], "runs": {"1": [[[999, [1.0, 0.0]]], [[999, [1.0, 0.0, 0.0]]]]}},
        {"guidance": [1.0, 8.0], "runs": {"1": [[[999, [1.0, 0.0]]], [[998, [1.0, 0.0]]]]}},
        {"guidance": [1.0], "runs": {"2": [[[999, [1.0, 0.0]]]]}},
        {"guidance": [1.0], "runs": {"2": [[[9, [1.0, 0.0]], [9, [1.0, 0.0]]]]}},
        {"guidance": [1.0], "runs": {"1": [[[999.5, [1.0, 0.0]]]]}},
        {"guidance": [1.0], "runs": {"1": [[[999, [1.0]]]]}},
        {"guidance": [1.0], "runs": {"1": [[[999, [1.0, float("nan")]]]]}},
        {"guidance": [1.0], "runs": {"1": [[[999, ["1", 0.0]]]]}},
        {"guidance": [1.0], "runs": {"one": [[[999, [1.0, 0.0]]]]}},
    ],
)
def test_malformed_numbers(fit: Any) -> None:
    for entry in ([fit], fit):
        for sampler in ("auto", "fitted"):
            with pytest.raises(ConfigError, match="malformed"):
                samplers.plan({**V, KEY: entry}, sampler, steps=1, guidance=1.0)
    assert samplers.plan({**V, KEY: [fit]}, "ddim", steps=1, guidance=1.0).sampler == "ddim"


# --- fitting --------------------------------------------------------------------------------------


class _TwoHills:
    """The perfect network for data around -1 and 1, as fit_sampler asks it; v-prediction."""

    config = V

    def __call__(self, x: np.ndarray, t: float, prompts: Sequence[str], scale: float) -> np.ndarray:
        alpha, sigma = teacher.solver(V, [int(t)]).rows[0].level
        spread = (alpha * 0.5) ** 2 + sigma**2
        point = np.tanh(scale * alpha / spread * x)
        x0 = point + alpha * 0.25 / spread * (x - alpha * point)
        return ((alpha * x - x0) / sigma).astype(np.float32)


def _moved(runs: fit_sampler.Runs, path: tuple[int, ...]) -> tuple[int, ...]:
    """A path that ends nearer than the given one, and begins and grows as it must."""

    def error(path: tuple[int, ...]) -> float:
        return float(runs.errors(path).mean())

    found = fit_sampler.nearest(error, [path], move=True)
    assert error(found) < error(path) == error(fit_sampler.nearest(error, [path], move=False))
    assert found[0] == 0 and len(found) == len(path) and list(found) == sorted(set(found))
    return found


def test_fitting_lands_nearer_and_is_written_as_it_is_read(tmp_path: Path) -> None:
    network = _TwoHills()
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((64, 4, 4, 4)).astype(np.float32)
    fine = {scale: teacher.fine_solution(network, noise, [], scale) for scale in (1.0, 2.0)}
    errors = {}
    for scale, solution in fine.items():
        x, x0 = solution["x"], solution["x0"]
        assert len(x) == len(x0) + 1 == len(teacher.LEVELS) + 1
        assert 0.9 < np.abs(x[-1]).mean() < 1.3
        errors[scale] = fit_sampler.step_errors(x, x0)
    fits: list[Any] = []
    for scales in ([1.0], [2.0], [1.0, 2.0]):
        runs = {}
        for steps in (2, 4):
            path = fit_sampler.choose_levels(sum(errors[scale] for scale in scales), steps, 0.5)
            assert path[0] == 0 and len(path) == steps and list(path) == sorted(set(path))
            fitted = [fit_sampler.Runs(network, fine[scale]["x"], [], scale) for scale in scales]
            if len(scales) == 1:
                path = _moved(fitted[0], path)
            runs[str(steps)] = [each.run(path) for each in fitted]
        fits.append({"guidance": scales, "runs": runs})
    folder = tmp_path / "scheduler"
    folder.mkdir()
    (folder / "scheduler_config.json").write_text(json.dumps(V))
    for _ in range(2):  # a second fit takes the place of the first
        fit_sampler.write(tmp_path, fits)
    config = json.loads((folder / "scheduler_config.json").read_text())
    assert config == {**V, KEY: fits}

    fresh = rng.standard_normal((64, 4, 4, 4)).astype(np.float32)
    for guidance in (1.0, 1.4, 2.0):
        exact = teacher.fine_solution(network, fresh, [], guidance)["x"][-1]
        found = {}
        plan = samplers.plan(config, steps=4, guidance=guidance)
        assert plan.sampler == "fitted"
        times = [teacher.LEVELS[i] for i in (0, 16, 33, 49)]
        for name, one in (("fitted", plan), ("2m", teacher.solver(V, times))):
            now, state = fresh, one.start()
            for t in one.timesteps:
                now, state = one.step(now, network(now, t, [], guidance), state)
            # Not the square: a value whose sign turned would weigh more than all others.
            found[name] = float(np.abs(now - exact).mean())
        assert found["fitted"] < found["2m"], (guidance, found)


def test_refining_brings_the_end_nearer() -> None:
    network, scale = _TwoHills(), 1.0
    rng = np.random.default_rng(1)
    pictures = []
    for _ in range(4):
        noise = rng.standard_normal((16, 4, 4, 4)).astype(np.float32)
        ends = teacher.fine_solution(network, noise, [], scale)["x"][-1]
        pictures.append(refine.Pictures([], noise, ends))
    usual = [[time, [0.0, 0.0]] for time in (999, 700, 400, 100)]
    run = refine.refine(network, usual, pictures[:3] * 2, scale)
    times = [time for time, _ in run]
    assert len(run) == 4 and times[0] == 999 and times == sorted(set(times), reverse=True)
    assert [len(numbers) for _, numbers in run] == [2, 3, 4, 5]
    for seen in pictures:  # the last one is new
        before, after = (refine.missed(network, one, seen, scale).mean() for one in (usual, run))
        assert after < before / 3
    # It is what the sampler does with these numbers.
    config = {**V, KEY: [{"guidance": [scale], "runs": {"4": [run]}}]}
    plan, now = samplers.plan(config, "fitted", steps=4), pictures[3].noise
    state = plan.start()
    for t in plan.timesteps:
        now, state = plan.step(now, network(now, t, [], scale), state)
    miss = np.sqrt(((now - pictures[3].ends) ** 2).mean((1, 2, 3))) / pictures[3].ends.std()
    np.testing.assert_allclose(miss, refine.missed(network, run, pictures[3], scale), rtol=1e-3)


def test_a_converted_folder_stays_whole(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(BUILTIN, model)
    config = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    fit_sampler.write(model, config[KEY])
    folder = open_folder(model)
    folder.verify()
    assert folder.scheduler_config == config


@pytest.mark.parametrize("module", [fit_sampler, refine, teacher], ids=lambda m: m.__name__)
def test_a_script_has_all_that_the_module_has(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is imported in two ways."""
    monkeypatch.syspath_prepend(str(Path(module.__file__).parent))
    assert set(vars(module)) <= set(runpy.run_path(module.__file__)) | {"__builtins__"}


def test_runs_are_kept(tmp_path: Path) -> None:
    calls = []

    def make() -> dict[str, np.ndarray]:
        calls.append(1)
        return {"x": np.arange(3.0)}

    for _ in range(2):
        assert teacher.cached(tmp_path / "new", "one", make)["x"].tolist() == [0.0, 1.0, 2.0]
    assert len(calls) == 1
    teacher.cached(None, "one", make)
    assert len(calls) == 2
