"""The one list of samplers: what its ids mean, and that no second list stands anywhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sampler_cases import CONFIGS, EDM_CONFIGS

from mlxdiff import samplers
from mlxdiff.errors import ConfigError, UsageError
from mlxdiff.pictures.metadata import SAMPLER_NAMES, SCHEDULE_NAMES
from mlxdiff.samplers.registry import SCHEDULE_ARGUMENTS, has_schedule

ROOT = Path(__file__).resolve().parent.parent
SD = CONFIGS["sd15"]

# The meaning of each id, written down a second time on purpose: the golden runs of diffusers are
# made from the registry, so a wrong argument there would not show in them.
CONTRACT: dict[str, tuple[str | None, dict[str, Any]]] = {
    "dpmpp-2m": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2},
    ),
    "dpmpp-3m": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 3},
    ),
    "dpmpp-2m-sde": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 2},
    ),
    "dpm-2m": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "solver_order": 2, "final_sigmas_type": "sigma_min"},
    ),
    "dpmpp-2s": (
        "DPMSolverSinglestepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2},
    ),
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "fitted": (None, {}),
    "res-multistep": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "heun"},
    ),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2-a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmpp-sde": ("DPMSolverSDEScheduler", {}),
    "sa-solver": ("SASolverScheduler", {"algorithm_type": "data_prediction"}),
}


@pytest.mark.parametrize("name", CONTRACT)
def test_an_id_means_what_the_contract_says(name: str) -> None:
    found = samplers.SAMPLERS[name]
    assert (found.id, found.scheduler.reference, dict(found.arguments)) == (name, *CONTRACT[name])


def test_names() -> None:
    assert samplers.NAMES == ("auto", "checkpoint", *samplers.SAMPLERS)
    assert samplers.SCHEDULES == ("auto", *SCHEDULE_ARGUMENTS)
    contract = "normal karras exponential beta lu trailing leading linspace ays"
    assert set(contract.split()) <= set(SCHEDULE_ARGUMENTS)


def test_every_sampler_and_schedule_has_a_name_for_a1111() -> None:
    assert set(SAMPLER_NAMES) == set(samplers.SAMPLERS)
    assert set(SCHEDULE_NAMES) == set(samplers.SCHEDULES)
    for names in (SAMPLER_NAMES, SCHEDULE_NAMES):
        assert len({name.lower() for name in names.values()}) == len(names)


def _table(page: str, section: str) -> list[list[str]]:
    """The cells of the table rows below a heading, up to the next heading."""
    text = page.split(f"\n## {section}\n")[1].split("\n#")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows]


def test_the_page_lists_every_sampler_and_schedule() -> None:
    page = (ROOT / "docs" / "samplers.md").read_text(encoding="utf-8")
    said = {row[0].strip("`"): row[1] for row in _table(page, "The samplers")[1:]}
    assert set(said) == set(samplers.NAMES)
    for one in samplers.SAMPLERS.values():
        reference = one.scheduler.reference
        if reference is not None and not said[one.id].startswith("the same"):
            assert said[one.id].startswith(re.sub("(Discrete)?Scheduler$", "", reference))
    rows = _table(page, "Schedules")
    listed = {name for row in rows for name in re.findall(r"`([\w-]+)`", row[0])}
    assert listed == set(SCHEDULE_ARGUMENTS)


def test_the_page_says_which_combinations_exist() -> None:
    page = (ROOT / "docs" / "samplers.md").read_text(encoding="utf-8")
    rows = [row for row in _table(page, "Schedules") if len(row) == 7]
    columns = [head.split(", ") for head in rows[0][1:]]
    found: dict[str, set[str]] = {}
    for row in rows[1:]:
        having = {
            name for cell, names in zip(row[1:], columns, strict=True) if cell for name in names
        }
        found |= {sampler: having for sampler in row[0].split(", ")}
    expected = {
        one.id: {name for name in SCHEDULE_ARGUMENTS if has_schedule(one.scheduler, name)}
        for one in samplers.SAMPLERS.values()
    }
    assert found == {sampler: having for sampler, having in expected.items() if len(having) > 1}


# --- the noise process ----------------------------------------------------------------------------

# As the other rows of CONTRACT, for models that were trained with EDM's noise.
EDM_CONTRACT = {
    "dpmpp-2m": "EDMDPMSolverMultistepScheduler",
    "dpmpp-3m": "EDMDPMSolverMultistepScheduler",
    "dpmpp-2m-sde": "EDMDPMSolverMultistepScheduler",
    "euler": "EDMEulerScheduler",
}


@pytest.mark.parametrize("model", EDM_CONFIGS)
def test_a_model_with_edms_noise_has_samplers_of_its_own(model: str) -> None:
    config = EDM_CONFIGS[model]
    assert samplers.is_edm(config) and not samplers.is_edm(SD)
    for name in samplers.SAMPLERS:
        if name in EDM_CONTRACT:
            assert samplers.reference_class(config, name) == EDM_CONTRACT[name]
        else:
            with pytest.raises(UsageError, match=r"continuous.* checkpoint, dpmpp-2m, "):
                samplers.plan(config, name, "auto", 6)
    assert samplers.reference_class(config, "checkpoint") == config["_class_name"]
    for steps in (4, 30):  # its noise levels are its own, whatever the number of steps
        plan = samplers.plan(config, "auto", "auto", steps, guidance=5.0)
        assert (plan.sampler, plan.schedule) == ("dpmpp-2m", "normal")
        assert plan.rows[0].level == (1.0, pytest.approx(config["sigma_max"]))
    with pytest.raises(UsageError, match="trailing; it has normal, karras, exponential"):
        samplers.plan(config, "euler", "trailing", 6)
    with pytest.raises(UsageError, match="draw with it alone"):
        samplers.plan(config, "euler", "auto", 6, denoising_end=0.8)


def test_continuous_noise_levels_in_eulers_words() -> None:
    """timestep_type continuous: other classes would give the network numbered timesteps."""
    config = {**SD, "_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}
    assert samplers.plan(config, "auto", "auto", 30).sampler == "dpmpp-2m"  # only with v
    config = {**config, "prediction_type": "v_prediction", "sigma_max": 700.0, "sigma_min": 0.002}
    plan = samplers.plan(config, "auto", "auto", 30)
    assert (plan.sampler, plan.schedule) == ("euler", "normal")
    assert plan.rows == samplers.plan(config, "checkpoint", "auto", 30).rows
    assert max(plan.timesteps) < 2
    with pytest.raises(UsageError, match=r"there are auto, checkpoint, euler$"):
        samplers.plan(config, "dpmpp-2m", "auto", 6)
    with pytest.raises(UsageError, match="draw with it alone"):
        samplers.plan(config, "auto", "auto", 6, denoising_end=0.8)


@pytest.mark.parametrize(
    "changed",
    [
        {"sigma_min": 0.0},
        {"sigma_max": 0.001},
        {"sigma_data": 0.0},
        {"rho": -1.0},
        {"sigma_max": float("inf")},
        {"sigma_schedule": "linear"},
        {"prediction_type": "sample"},
        {"algorithm_type": "dpmsolver"},
        {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"},
    ],
)
def test_wild_numbers_of_edms_noise_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changed))):
        samplers.plan(EDM_CONFIGS["playground"] | changed, "checkpoint", "auto", 6)
    with pytest.raises(UsageError, match="at least 2 steps"):
        samplers.plan(EDM_CONFIGS["cosxl"], "checkpoint", "auto", 1)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "flow matching"),
        ({"_class_name": "FlowMatchLCMScheduler"}, "flow matching"),
        ({"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"}, "flow"),
        ({"_class_name": "EulerDiscreteScheduler", "use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"_class_name": "CosineDPMSolverMultistepScheduler"}, "cosine"),
        ({"_class_name": "CMStochasticIterativeScheduler"}, "consistency"),
        ({"_class_name": "IPNDMScheduler"}, "sine"),
        ({"_class_name": "SomebodysScheduler"}, "unknown"),
        ({"_class_name": ["x"]}, "unknown"),
    ],
)
@pytest.mark.parametrize("sampler", ["auto", "euler", "checkpoint"])
def test_another_noise_process_is_refused_by_name(
    config: dict[str, Any], says: str, sampler: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        samplers.plan({**SD, **config}, sampler, "normal", 6)


def test_other_solvers_of_the_same_process_pass() -> None:
    for name in ("DDIMInverseScheduler", "RePaintScheduler", "FlaxPNDMScheduler"):
        config = {**SD, "_class_name": name}
        assert samplers.plan(config, "auto", "auto", 6).sampler == "dpmpp-2m"
    with pytest.raises(ConfigError, match=r"not implemented.*choose a sampler by name"):
        samplers.plan({**SD, "_class_name": "RePaintScheduler"}, "checkpoint", "normal", 6)


# --- names of other programs ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sampler", "schedule"),
    [
        ("dpmpp-2m", "dpmpp-2m", "auto"),
        ("DPM++ 2M", "dpmpp-2m", "auto"),
        ("DPM++ 2M Karras", "dpmpp-2m", "karras"),
        ("dpm++ 2m sde  exponential", "dpmpp-2m-sde", "exponential"),
        ("DPM++ 2M SDE Karras", "dpmpp-2m-sde", "karras"),
        ("Euler a", "euler-a", "auto"),
        ("euler_ancestral", "euler-a", "auto"),
        ("k_euler_a", "euler-a", "auto"),
        ("LMS Karras", "lms", "karras"),
        ("PLMS", "pndm", "auto"),
        ("UniPC", "unipc", "auto"),
        ("dpmpp_2m", "dpmpp-2m", "auto"),
        ("dpmpp_2m_karras", "dpmpp-2m", "karras"),
        ("EulerDiscreteScheduler", "euler", "auto"),
        ("EulerAncestralDiscreteScheduler", "euler-a", "auto"),
        ("DPMSolverMultistepScheduler", "dpmpp-2m", "auto"),
        ("DPMSolverSinglestep", "dpmpp-2s", "auto"),
        ("PNDMScheduler", "pndm", "auto"),
        ("AUTO", "auto", "auto"),
    ],
)
def test_names_of_other_programs(name: str, sampler: str, schedule: str) -> None:
    assert samplers.resolve(name, "auto") == (sampler, schedule)
    expected = samplers.plan(SD, sampler, schedule, 6)
    assert samplers.plan(SD, name, "auto", 6) == expected


def test_every_sampler_has_its_names() -> None:
    for one in samplers.SAMPLERS.values():
        for name in (one.id, one.a1111, *one.also):
            assert samplers.resolve(name, "auto") == (one.id, "auto")
        if one.scheduler.reference is not None:
            found, _ = samplers.resolve(one.scheduler.reference, "auto")
            assert samplers.SAMPLERS[found].scheduler is one.scheduler
    for schedule, name in SCHEDULE_NAMES.items():
        assert samplers.resolve("euler", name) == ("euler", schedule)


@pytest.mark.parametrize(
    "name", ["DPM adaptive", "res_2s", "DPM++ 2M SDE Heun Lu", "EDMEulerScheduler", "", " "]
)
def test_what_does_not_exist_here_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"unknown sampler .*there are auto, checkpoint"):
        samplers.plan(SD, name, "auto", 6)


def test_a_name_with_a_schedule_beside_another_schedule() -> None:
    assert samplers.resolve("DPM++ 2M Karras", "karras") == ("dpmpp-2m", "karras")
    with pytest.raises(UsageError, match="names the schedule karras; leave sgm-uniform out"):
        samplers.resolve("DPM++ 2M Karras", "SGM Uniform")
    with pytest.raises(UsageError, match="unknown schedule 'no'; there are auto, normal"):
        samplers.resolve("euler", "no")


# --- no second list -------------------------------------------------------------------------------

# The same word with another meaning: a model family, and a model's short name.
HOMONYMS = {
    "training/unconditional.py": {"ddpm"},  # the family of models of pixels
    "run/opening.py": {"ddpm"},
    "store/catalogue.py": {"ddpm", "lcm"},
    "convert/detect.py": {"ddpm"},
    "pictures/foreign/a1111.py": {"ddim", "dpm2", "restart"},  # A1111's words
    "training/options.py": {"ddim"},  # solvers of a teacher's equation
    "training/consistency.py": {"ddim"},
}

# Each names the sampler that its source used: published runs, adapters made for a sampler, and what
# other programs compute otherwise.
RECORDS = {
    "report/published.py",
    "store/few_step.py",
    "pictures/foreign/translate.py",
    "run/additions/motion.py",
    "training/train_distill.py",
}


def _literals(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_no_sampler_is_known_by_name_outside_the_samplers() -> None:
    """Other parts ask mlxdiff.samplers, so that a new sampler gets the right answer too."""
    found = []
    for folder in ("mlxdiff", "convert"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix().removeprefix("mlxdiff/")
            if name.startswith("samplers/") or name in RECORDS:
                continue
            known = set(samplers.SAMPLERS) - HOMONYMS.get(name, set())
            literals = known & set(_literals(path.read_text(encoding="utf-8")))
            found += [f"{name}: {literal!r}" for literal in sorted(literals)]
    assert not found, "\n".join(found)


# --- what other parts ask -------------------------------------------------------------------------


def test_evaluations_per_step() -> None:
    heun = {**SD, "_class_name": "HeunDiscreteScheduler"}
    for config, sampler, expected in ((SD, "heun", 2), (heun, "checkpoint", 2), (SD, "pndm", 1)):
        plan = samplers.plan(config, sampler, "normal", 6)
        assert plan.evaluations_per_step == expected
        assert samplers.evaluations_per_step(sampler) == (
            1 if sampler == "checkpoint" else expected
        )
        assert len(plan) in (6 * expected - (expected - 1), 7)


def test_turbo_is_told_from_the_file() -> None:
    turbo = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
    assert samplers.is_turbo(turbo) and samplers.distilled_for(turbo) == "euler"
    assert not samplers.is_turbo({**turbo, "prediction_type": "v_prediction"})
    lcm = {"_class_name": "LCMScheduler"}
    assert not samplers.is_turbo(lcm) and samplers.distilled_for(lcm) == "lcm"
    assert samplers.distilled_for(SD) is None


def test_classes() -> None:
    assert samplers.of_class("DDIMScheduler") == "ddim"
    assert samplers.of_class("DPMSolverMultistepScheduler") is None  # several ids fix its arguments
    assert samplers.of_class(None) is None
    assert samplers.reference_class(SD, "checkpoint") == "PNDMScheduler"
    assert samplers.reference_class(SD, "ddpm") == "DDPMScheduler"
    assert samplers.reference_class(SD, "fitted") is None


@pytest.mark.parametrize(
    ("config", "sampler", "expected"),
    [
        (SD, "lcm", True),
        (SD, "auto", False),
        (SD, "checkpoint", False),
        ({**SD, "_class_name": "LCMScheduler"}, "auto", True),
        ({**SD, "_class_name": "LCMScheduler"}, "checkpoint", True),
        ({**SD, "_class_name": "LCMScheduler"}, "euler", False),
        ({}, "checkpoint", False),
        (SD, "no-such-sampler", False),
    ],
)
def test_who_takes_a_strength(config: dict[str, Any], sampler: str, expected: bool) -> None:
    assert samplers.takes_distilled_strength(config, sampler) is expected
