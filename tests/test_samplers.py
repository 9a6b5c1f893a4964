"""The samplers' contract: ids, combinations, configs, plans of Python numbers, windows, errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from sampler_cases import CONFIGS

from mlxdiff import samplers
from mlxdiff.errors import ConfigError, UsageError
from mlxdiff.samplers import schedule as sch
from mlxdiff.samplers.arguments import KNOWN_KEYS
from mlxdiff.samplers.ddim import DDIM
from mlxdiff.samplers.levels import AYS
from mlxdiff.samplers.plan import Limit, Plan, Row

SD = CONFIGS["sd15"]
SAMPLERS = [name for name in samplers.SAMPLERS if name != "fitted"]  # it needs a fitted model


def _numbers(value: Any) -> list[Any]:
    if isinstance(value, tuple):
        return [number for part in value for number in _numbers(part)]
    if dataclasses.is_dataclass(value):
        return _numbers(tuple(getattr(value, f.name) for f in dataclasses.fields(value)))
    return [value]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_plans_hold_python_numbers_only(sampler: str) -> None:
    """np.float64 * mx.array is a NumPy array, so no NumPy scalar may be left in a plan."""
    for schedule in samplers.SCHEDULES[1:]:
        try:
            plan = samplers.plan(SD, sampler, schedule, 10)
        except UsageError:
            continue
        assert type(plan.init_noise_sigma) is float
        for row in plan.rows:
            assert {type(number) for number in _numbers(row)} <= {float, int, bool, type(None)}
            for field in dataclasses.fields(row):
                if field.name not in ("timestep", "draws", "unconditional", "limit"):
                    assert {type(n) for n in _numbers(getattr(row, field.name))} <= {float}, (
                        field.name
                    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_are_pure(sampler: str) -> None:
    """The same state twice gives the same sample twice; nothing that was passed in changes."""
    plan = samplers.plan(SD, sampler, "normal", 6)
    noise = np.full((1, 2, 2, 4), 0.3, np.float32)
    x, state = np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 2, 2, 4), plan.start()
    for _ in plan.timesteps:
        before, held = x.copy(), [part.copy() for part in state.data]
        first, after = plan.step(x, x / 2, state, noise=lambda: noise)
        again, _ = plan.step(x, x / 2, state, noise=lambda: noise)
        np.testing.assert_array_equal(first, again)
        np.testing.assert_array_equal(x, before)
        for part, copy in zip(state.data, held, strict=True):
            np.testing.assert_array_equal(part, copy)
        assert (after.index, first.dtype) == (state.index + 1, np.float32)
        x, state = first, after
    assert plan.start().index == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.start().index = 3  # type: ignore[misc]


def test_a_plan_remembers_no_more_than_it_needs() -> None:
    for sampler, kept in (("euler", 0), ("dpmpp-2m", 1), ("dpmpp-3m", 2), ("lms", 3), ("ddim", 0)):
        plan = samplers.plan(SD, sampler, "normal", 12)
        x, state = np.zeros(3, np.float32), plan.start()
        for _ in plan.timesteps:
            x, state = plan.step(x, x, state)
        assert (len(state.data), state.anchor) == (kept, None)


def test_stochastic_samplers_ask_for_noise() -> None:
    plan = samplers.plan(SD, "euler-a", "normal", 4)
    with pytest.raises(TypeError, match="noise"):
        plan.step(np.zeros(3, np.float32), np.zeros(3, np.float32), plan.start())


# --- timesteps ------------------------------------------------------------------------------------


def test_known_timesteps() -> None:
    """What diffusers' users know by heart, and the counts of the two-stage samplers."""
    times, sigmas = samplers.timesteps(SD, "pndm", "normal", 4)
    assert times.tolist() == [751, 501, 501, 251, 1] and sigmas is None
    assert samplers.timesteps(SD, "ddim", "normal", 5)[0].tolist() == [801, 601, 401, 201, 1]
    assert samplers.timesteps(SD, "lcm", "normal", 4)[0].tolist() == [999, 759, 499, 259]
    assert samplers.timesteps(SD, "ddim", "trailing", 4)[0].tolist() == [999, 749, 499, 249]
    times, sigmas = samplers.timesteps(CONFIGS["sdxl"], "dpmpp-2m", "normal", 10)
    assert times[:2].tolist() == [901, 811]  # a third of the noise range is skipped
    assert sigmas is not None and sigmas[-1] == 0 and sigmas[0] == pytest.approx(8.39, abs=0.01)
    times, sigmas = samplers.timesteps(SD, "heun", "normal", 5)
    assert len(times) == 9 and sigmas is not None and len(sigmas) == 10
    plan = samplers.plan(SD, "heun", "normal", 5)
    assert len(plan) == 9 and plan.timesteps == tuple(times.tolist())


def test_trailing_has_no_timestep_below_zero() -> None:
    """1000 / 61 added up is a little above 0 at the end; the reference goes on to timestep -1."""
    for sampler in ("ddim", "dpmpp-2m", "euler", "pndm"):
        for steps in (60, 61, 103, 1000):
            times = samplers.timesteps({**SD, "steps_offset": 0}, sampler, "trailing", steps)[0]
            assert (times.min(), len(set(times.tolist()))) == (round(1000 / steps) - 1, steps)


def test_beta_quantiles() -> None:
    """Against values of scipy.stats.beta.ppf(q, 0.6, 0.6)."""
    for q, expected in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0), *_BETA):
        assert sch.beta_quantile(q) == pytest.approx(expected, rel=1e-12, abs=1e-15)
        assert sch.beta_quantile(1 - q) == pytest.approx(1 - expected, rel=1e-12, abs=1e-15)


_BETA = (
    (0.001, 1.855873851745199e-05),
    (0.05, 0.012554456873611399),
    (0.1111111111111111, 0.04709181754904242),
    (0.25, 0.17568037865269498),
    (0.4, 0.3627009907532143),
    (0.49, 0.4861289142781599),
)


@pytest.mark.parametrize("family", [None, "sd1", "sdxl", "sdxl-refiner"])
def test_ays_is_the_published_list_at_ten_steps(family: str | None) -> None:
    listed = AYS["sdxl" if family and family.startswith("sdxl") else "sd"]
    assert samplers.plan(SD, "euler", "ays", 10, family=family).timesteps == listed
    for steps in (1, 4, 7, 25):
        times = samplers.plan(SD, "dpmpp-2m", "ays", steps, family=family).timesteps
        assert len(times) == steps and times[0] == 999 and list(times) == sorted(times)[::-1]
    with pytest.raises(UsageError, match="ays"):
        samplers.plan({**SD, "num_train_timesteps": 500}, "euler", "ays", 10)
    with pytest.raises(UsageError, match="ays"):
        samplers.plan(SD, "euler", "ays", 400)


def test_an_explicit_spacing_of_sigmas_replaces_the_files() -> None:
    karras = {**SD, "use_karras_sigmas": True}
    for schedule in ("exponential", "lu", "ays"):
        found = samplers.plan(karras, "dpmpp-2m", schedule, 10).rows
        assert found == samplers.plan(SD, "dpmpp-2m", schedule, 10).rows
    assert (
        samplers.plan(karras, "euler", "normal", 8).rows
        == samplers.plan(SD, "euler", "karras", 8).rows
    )


# --- auto and checkpoint --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "asked", "chosen"),
    [
        (SD, ("auto", "auto"), ("dpmpp-2m", "karras")),
        (SD, ("auto", "normal"), ("dpmpp-2m", "normal")),
        (SD, ("ddim", "auto"), ("ddim", "normal")),
        (SD, ("checkpoint", "auto"), ("checkpoint", "normal")),
        (CONFIGS["zsnr"], ("auto", "auto"), ("dpmpp-2m", "trailing")),
        ({**SD, "timestep_spacing": "trailing"}, ("auto", "auto"), ("dpmpp-2m", "trailing")),
        ({**SD, "_class_name": "LCMScheduler"}, ("auto", "auto"), ("lcm", "normal")),
        ({**SD, "_class_name": "TCDScheduler"}, ("auto", "auto"), ("tcd", "normal")),
        ({}, ("auto", "auto"), ("dpmpp-2m", "karras")),
    ],
)
def test_auto(config: dict[str, Any], asked: tuple[str, str], chosen: tuple[str, str]) -> None:
    assert samplers.automatic(config, *asked, 20) == chosen
    plan = samplers.plan(config, *asked, 20)
    assert (plan.sampler, plan.schedule) == chosen


@pytest.mark.parametrize(
    ("steps", "guidance", "schedule"),
    [
        (19, 7.5, "trailing"),
        (20, 7.5, "karras"),
        (19, None, "trailing"),
        (7, 1.0, "trailing"),
        (8, 1.0, "karras"),
        (8, 0.0, "karras"),
    ],
)
def test_auto_at_few_steps(steps: int, guidance: float | None, schedule: str) -> None:
    for config in (SD, CONFIGS["sdxl"]):  # one says nothing about spacing, one leading
        plan = samplers.plan(config, steps=steps, guidance=guidance)
        assert (plan.sampler, plan.schedule) == ("dpmpp-2m", schedule)
        assert plan.timesteps[0] == 999
    assert samplers.automatic(SD, "dpmpp-2s", "auto", 6) == ("dpmpp-2s", "normal")


def test_checkpoint_is_the_class_that_the_file_names() -> None:
    assert (
        samplers.plan(SD, "checkpoint", "normal", 6).rows
        == samplers.plan(SD, "pndm", "normal", 6).rows
    )
    with pytest.raises(ConfigError, match=r"_class_name 'FlowMatch.*flow matching"):
        samplers.plan({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "checkpoint", "normal", 6)
    with pytest.raises(ConfigError, match="_class_name None"):
        samplers.plan({}, "checkpoint", "normal", 6)


# --- scheduler_config.json ------------------------------------------------------------------------


def test_clip_sample_is_off_unless_written() -> None:
    for sampler in ("ddim", "ddpm", "lcm", "heun"):
        assert all(row.limit is None for row in samplers.plan({}, sampler, "normal", 4).rows)
        plan = samplers.plan({"clip_sample": True}, sampler, "normal", 4)
        assert all(row.limit == Limit(1.0) for row in plan.rows)


def test_keys_of_other_schedulers_are_skipped() -> None:
    """Every known key, at a value that means nothing to these classes, changes nothing."""
    taken = {key for one in samplers.SAMPLERS.values() for key in one.scheduler.defaults}
    foreign = {key: "?" for key in KNOWN_KEYS - taken - {"sigma_min", "sigma_max"}}
    plain, full = (samplers.plan({**SD, **more}, "unipc", "normal", 6) for more in ({}, foreign))
    assert plain == full
    private = {
        "_class_name": "SASolverScheduler",
        "_diffusers_version": "9",
        "_use_default_values": ["beta_end"],
    }
    linear = {key: value for key, value in SD.items() if key != "beta_end"}
    assert samplers.plan({**SD, **private}, "ddim", "normal", 6) == samplers.plan(
        linear, "ddim", "normal", 6
    )


@pytest.mark.parametrize(
    ("sampler", "config", "named"),
    [
        ("ddim", {"beta_shedule": "linear"}, "beta_shedule"),
        ("ddim", {"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'; DDIMScheduler"),
        ("dpmpp-2m", {"prediction_type": "flow_prediction"}, "prediction_type"),
        ("euler-a", {"prediction_type": "sample"}, "prediction_type"),
        ("dpmpp-2m", {"use_flow_sigmas": True}, "use_flow_sigmas"),
        ("dpmpp-2m", {"variance_type": "learned_range"}, "variance_type"),
        (
            "dpmpp-2m",
            {"solver_order": 4, "_class_name": "DPMSolverMultistepScheduler"},
            "solver_order",
        ),
        ("euler", {"timestep_spacing": "middle"}, "timestep_spacing is 'middle'"),
        ("euler", {"num_train_timesteps": 0}, "num_train_timesteps"),
        ("euler", {"num_train_timesteps": "1000"}, "num_train_timesteps"),
        ("euler", {"steps_offset": -1}, "steps_offset is -1"),
        ("lcm", {"original_inference_steps": 0}, "original_inference_steps"),
        ("lcm", {"original_inference_steps": 2000}, "original_inference_steps is 2000"),
        ("euler", {"beta_start": "0.1"}, "beta_start"),
        ("euler", {"beta_start": True}, "beta_start"),
        ("euler", {"use_karras_sigmas": "yes"}, "use_karras_sigmas"),
        ("euler", {"use_karras_sigmas": True, "use_beta_sigmas": True}, "only one of"),
        ("euler", {"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ("euler", {"trained_betas": "many"}, "trained_betas"),
        ("unipc", {"predict_x0": False}, "sigma_min"),
        ("unipc", {"disable_corrector": 3}, "disable_corrector"),
        ("ddim", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "v_prediction"),
    ],
)
def test_what_is_not_understood_is_named(sampler: str, config: dict[str, Any], named: str) -> None:
    sampler = "checkpoint" if "_class_name" in config else sampler
    with pytest.raises(ConfigError, match=named) as caught:
        samplers.plan({**SD, **config}, sampler, "normal", 4)
    assert "\n" not in str(caught.value)


def test_a_config_is_an_object() -> None:
    for config in ([], None, "x"):
        with pytest.raises(ConfigError, match="object"):
            samplers.plan(config)  # type: ignore[arg-type]


def test_noise_prediction_does_not_step_to_zero() -> None:
    config = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}
    with pytest.raises(ConfigError, match="sigma_min"):
        samplers.plan(config, "checkpoint", "normal", 4)


# --- usage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "named"),
    [
        (
            ("dpm++", "normal", 4),
            {},
            "unknown sampler 'dpm\\+\\+'; there are auto, checkpoint, dpmpp-2m",
        ),
        (("euler", "fast", 4), {}, "unknown schedule 'fast'"),
        (("ddim", "karras", 4), {}, "it has normal, trailing.*karras exists for dpmpp-2m"),
        (("dpmpp-2s", "trailing", 4), {}, "it has normal, karras, exponential, beta, ays"),
        (("unipc", "ays", 10), {}, "ays exists for"),
        (("euler", "normal", 0), {}, "steps"),
        (("euler", "normal", 1001), {}, "1000"),
        (("euler", "normal", 2.5), {}, "steps"),
        (("euler", "normal", True), {}, "steps"),
        (("lcm", "normal", 51), {}, "50"),
        (("pndm", "normal", 3), {"config": {"skip_prk_steps": False}}, "at least 4"),
        (("ddim", "normal", 1000), {}, "steps_offset 1 .* timestep 1000 of 0 to 999"),
        (("euler", "normal", 4), {"eta": 0.5}, "no eta; ddim and tcd"),
        (("ddim", "normal", 4), {"eta": 1.5}, "between 0 and 1"),
        (("euler", "normal", 4), {"strength": 1.2}, "strength"),
        (("euler", "normal", 4), {"strength": 0.2}, "strength 0.2 leaves none of 4 steps"),
        (("euler", "normal", 4), {"denoising_end": 0.0}, "denoising_end"),
        (("euler", "normal", 4), {"denoising_start": 0.8, "denoising_end": 0.7}, "leaves none"),
    ],
)
def test_what_cannot_be_is_named(
    arguments: tuple[Any, Any, Any], options: dict[str, Any], named: str
) -> None:
    config = {**SD, **options.pop("config", {})} if "config" in options else SD
    with pytest.raises(UsageError, match=named) as caught:
        samplers.plan(config, *arguments, **options)
    assert "\n" not in str(caught.value)


def test_eta_zero_is_the_default() -> None:
    for sampler in ("ddim", "tcd"):
        plan = samplers.plan(SD, sampler, "normal", 6)
        assert plan == samplers.plan(SD, sampler, "normal", 6, eta=0.0)
        assert not any(row.draws for row in plan.rows)
        assert any(row.draws for row in samplers.plan(SD, sampler, "normal", 6, eta=0.4).rows)


# --- runs of a part -------------------------------------------------------------------------------


def test_strength_counts_steps_as_diffusers_does() -> None:
    whole = samplers.plan(SD, "dpmpp-2m", "karras", 12).timesteps
    for strength, kept in ((1.0, 12), (0.8, 9), (0.75, 9), (0.5, 6), (0.1, 1)):
        plan = samplers.plan(SD, "dpmpp-2m", "karras", 12, strength=strength)
        assert plan.timesteps == whole[12 - kept :]
    assert (
        len(samplers.plan(SD, "heun", "karras", 12, strength=0.5)) == 11
    )  # 6 steps, the last single


def test_strength_in_the_distillation_grid() -> None:
    """As LCMScheduler.set_timesteps(4, strength=0.5) has it: four steps all the same, but lower."""
    plan = samplers.plan(SD, "lcm", "normal", 4, distilled_strength=0.5)
    assert plan.timesteps == (499, 379, 259, 139)
    with pytest.raises(UsageError, match="higher strength"):
        samplers.plan(SD, "lcm", "normal", 4, distilled_strength=0.05)
    with pytest.raises(UsageError, match="sampler lcm"):
        samplers.plan(SD, "euler", "normal", 4, distilled_strength=0.5)


def test_a_run_begun_in_the_middle_begins_with_first_order() -> None:
    plan = samplers.plan(SD, "dpmpp-3m", "karras", 12, strength=0.5)
    assert [len(row.weights) for row in plan.rows] == [1, 2, 3, 3, 2, 1]


def test_denoising_start_and_end_share_a_run() -> None:
    """SDXL's base and refiner: together they are the whole run, at the published cutoff."""
    config = CONFIGS["sdxl"]
    for sampler in ("euler", "heun", "dpmpp-2m"):
        whole = samplers.plan(config, sampler, "normal", 20)
        base = samplers.plan(config, sampler, "normal", 20, denoising_end=0.8)
        refiner = samplers.plan(config, sampler, "normal", 20, denoising_start=0.8)
        assert min(base.timesteps) >= 200
        if sampler == "heun":  # begins with a whole step
            assert len(refiner) % 2 == 1
        else:
            assert base.timesteps + refiner.timesteps == whole.timesteps
            assert max(refiner.timesteps) < 200
    part = samplers.plan(config, "euler", "normal", 20, denoising_start=0.3, denoising_end=0.6)
    assert all(400 <= t < 700 for t in part.timesteps)
    alone = samplers.plan(config, "euler", "normal", 20, strength=0.3, denoising_start=0.5)
    assert alone == samplers.plan(config, "euler", "normal", 20, denoising_start=0.5)


def test_add_noise_at_the_levels_of_a_run() -> None:
    x0, noise = np.float32([1.0, 0.0]), np.float32([0.0, 1.0])
    plan = samplers.plan(SD, "ddim", "normal", 10, strength=0.5)
    a = samplers.schedule.NoiseSchedule.from_arguments(DDIM.read(SD)).alphas_cumprod[401]
    np.testing.assert_allclose(plan.add_noise(x0, noise), [np.sqrt(a), np.sqrt(1 - a)], rtol=1e-6)
    np.testing.assert_array_equal(plan.add_noise(x0, noise, len(plan)), x0)
    plan = samplers.plan(SD, "euler", "normal", 10, strength=0.5)
    sigmas = samplers.timesteps(SD, "euler", "normal", 10)[1]
    assert sigmas is not None
    np.testing.assert_allclose(plan.add_noise(x0, noise, 1), [1.0, sigmas[6]], rtol=1e-6)


# --- pieces ---------------------------------------------------------------------------------------


def test_dynamic_thresholding() -> None:
    x = np.random.RandomState(0).standard_normal((2, 3, 3, 4)).astype(np.float32) * 3
    found = Limit(2.0, 0.9)(x)
    for one, limited in zip(x, found, strict=True):
        size = np.clip(np.quantile(np.abs(one), 0.9), 1, 2)
        np.testing.assert_allclose(limited, np.clip(one, -size, size) / size, rtol=1e-6)
    assert found.dtype == np.float32 and np.abs(Limit(0.5)(x)).max() == 0.5


@pytest.mark.mlx
def test_limits_keep_mlx_arrays() -> None:
    mx = pytest.importorskip("mlx.core")
    x = np.linspace(-3, 3, 16, dtype=np.float32).reshape(1, 2, 2, 4)
    for limit in (Limit(1.0), Limit(2.0, 0.8)):
        found = limit(mx.array(x))
        assert isinstance(found, mx.array) and found.dtype == mx.float32
        np.testing.assert_array_equal(np.array(found), limit(x))


def test_zero_terminal_snr_keeps_the_first_level() -> None:
    betas = np.linspace(0.0001, 0.02, 1000, dtype=np.float32)
    rescaled = np.cumprod(1 - sch.rescale_zero_terminal_snr(betas).astype(np.float64))
    assert rescaled[-1] == 0.0 and rescaled[0] == pytest.approx(1 - 0.0001, rel=1e-6)
    assert (np.diff(rescaled) < 0).all()


def test_a_thousand_steps_stay_finite() -> None:
    """As many steps as timesteps: where the reference divides 0 by 0 between equal sigmas."""
    for sampler in ("dpmpp-2m", "dpmpp-3m", "dpm-2m", "dpmpp-2s", "unipc", "deis"):
        plan = samplers.plan(SD, sampler, "normal", 1000)
        numbers = [
            number for row in plan.rows for number in (row.scale, *row.weights, *row.anchor_data)
        ]
        assert np.isfinite(numbers).all(), sampler


def test_a_sampler_is_a_table() -> None:
    """A plan can be written by hand: the equation of the module's docstring, term by term."""
    first = Row(
        timestep=1, level=(1.0, 0.0), data=(2.0, 3.0), scale=0.5, weights=(4.0,), output=5.0
    )
    second = dataclasses.replace(
        first,
        anchor_x=0.25,
        anchor_last=-1.0,
        anchor_data=(0.0, 6.0),
        weights=(4.0, 7.0),
        noise=8.0,
        draws=True,
    )
    plan = Plan("by hand", "none", (first, second), 1.0)
    x, output, noise = 1.5, -0.5, 0.125
    y, state = plan.step(x, output, plan.start())
    data = 2 * x + 3 * output
    assert y == 0.5 * x + 5 * output + 4 * data
    z, _ = plan.step(y, output, state, noise=lambda: noise)
    later = 2 * y + 3 * output
    anchor = 0.25 * y - x + 6 * data
    assert z == pytest.approx(0.5 * anchor + 5 * output + 4 * later + 7 * data + 8 * noise)
