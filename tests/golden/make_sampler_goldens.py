"""Make tests/golden/samplers/*.npz: what torch draws, and what diffusers' schedulers do.

    python tests/golden/make_sampler_goldens.py [runs more edm noise]
                                        # needs torch==2.13.0 diffusers==0.42.1 scipy

runs.npz, more.npz for the samplers in `LATER` (so that a new sampler does not make the old runs
anew), and edm.npz for models that were trained with EDM's noise: `cells`, a JSON list of runs
(config name, overrides, sampler, schedule, steps, options), and for all of them end to end:
`timesteps`, `sigmas`, `scales` (the initial scale) and `samples`, x before and after each step.
noise.npz: torch.randn on the CPU, several draws from one generator.
"""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import sampler_cases as cases  # noqa: E402

from mlxdiff.samplers import SAMPLERS  # noqa: E402
from mlxdiff.samplers.registry import SCHEDULE_ARGUMENTS as SCHEDULES  # noqa: E402

CLASSES = {
    one.id: (one.scheduler.reference, dict(one.arguments))
    for one in SAMPLERS.values()
    if one.scheduler.reference is not None
}
EDM_CLASSES = {
    one.id: (one.edm.reference, dict(one.arguments))
    for one in SAMPLERS.values()
    if one.edm is not None
}
# Arguments off the beaten track: (overrides of the config, samplers, schedule, steps).
VARIANTS: list[tuple[dict[str, Any], str, str, int]] = [
    (
        {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
        name,
        "normal",
        6,
    )
    for name in ("dpmpp-2m", "dpm-2m", "dpmpp-2s", "unipc", "ddim", "ddpm", "lcm", "tcd", "deis")
]
COSINE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
VARIANTS += [
    (COSINE, name, schedule, 8)
    for name in ("dpmpp-2m", "dpmpp-2s", "unipc", "euler", "ddim", "lcm")
    for schedule in ("normal", "karras", "exponential", "lu")
    if schedule == "normal"
    or name == "dpmpp-2m"
    or (schedule != "lu" and name not in ("ddim", "lcm"))
]
VARIANTS += [({"clip_sample": True}, name, "normal", 6) for name in ("heun", "ddim", "ddpm", "lcm")]
VARIANTS += [
    ({"solver_type": "heun"}, name, "normal", 6)
    for name in ("dpmpp-2m", "dpmpp-2m-sde", "dpm-2m", "dpmpp-2s")
]
VARIANTS += [
    ({"lower_order_final": False}, "dpmpp-3m", "karras", 6),
    ({"euler_at_final": True, "final_sigmas_type": "sigma_min"}, "dpmpp-2m", "normal", 16),
    ({"final_sigmas_type": "sigma_min"}, "dpmpp-2s", "normal", 6),
    ({"final_sigmas_type": "sigma_min"}, "unipc", "exponential", 6),
    ({"final_sigmas_type": "sigma_min"}, "euler", "karras", 6),
    ({"lambda_min_clipped": -1.5}, "dpmpp-2m", "normal", 6),
    ({"lambda_min_clipped": -1.5}, "dpmpp-2s", "normal", 6),
    ({"sigma_min": 0.1, "sigma_max": 10.0}, "dpmpp-2m", "karras", 6),
    ({"sigma_min": 0.1, "sigma_max": 10.0}, "euler", "beta", 6),
    ({"sigma_min": 0.1, "sigma_max": 10.0}, "lms", "karras", 6),
    ({"interpolation_type": "log_linear"}, "euler", "normal", 6),
    ({"timestep_type": "continuous", "prediction_type": "v_prediction"}, "euler", "karras", 6),
    ({"solver_order": 3}, "unipc", "normal", 16),
    ({"solver_order": 3}, "deis", "karras", 7),
    (
        {"solver_type": "bh1", "final_sigmas_type": "sigma_min", "solver_order": 3},
        "unipc",
        "normal",
        7,
    ),
    ({"predict_x0": False, "final_sigmas_type": "sigma_min"}, "unipc", "normal", 7),
    ({"disable_corrector": [0, 2]}, "unipc", "normal", 6),
    ({"predictor_order": 3, "corrector_order": 4}, "sa-solver", "karras", 9),
    ({"predictor_order": 1, "corrector_order": 1}, "sa-solver", "normal", 5),
    ({"lower_order_final": False}, "sa-solver", "trailing", 6),
    ({"sigma_min": 0.1, "sigma_max": 10.0}, "dpm2", "karras", 6),
    ({"sigma_min": 0.1, "sigma_max": 10.0}, "dpmpp-sde", "karras", 6),
    ({"skip_prk_steps": False}, "pndm", "normal", 8),
    ({"set_alpha_to_one": True}, "pndm", "linspace", 6),
    ({"set_alpha_to_one": True}, "ddim", "trailing", 7),
    ({"variance_type": "fixed_large"}, "ddpm", "normal", 6),
    ({"variance_type": "fixed_small_log"}, "ddpm", "normal", 6),
    ({"beta_schedule": "sigmoid"}, "ddpm", "normal", 4),
    ({"beta_schedule": "laplace"}, "ddpm", "normal", 4),
    ({"beta_schedule": "exp"}, "heun", "normal", 4),
    ({"beta_schedule": "linear"}, "dpmpp-2m", "lu", 6),
    ({"trained_betas": np.linspace(1e-4, 0.02, 1000).tolist()}, "euler", "normal", 4),
    ({"original_inference_steps": 40, "timestep_scaling": 3.0}, "lcm", "normal", 5),
    ({"_use_default_values": ["beta_end"]}, "ddim", "normal", 4),
]
# `checkpoint`: the class that the file names, with all its arguments.
for extra, steps in (
    ({"_class_name": "PNDMScheduler"}, 6),
    ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3, "solver_type": "heun"}, 7),
    (
        {
            "_class_name": "DPMSolverMultistepScheduler",
            "algorithm_type": "sde-dpmsolver++",
            "solver_order": 3,
        },
        7,
    ),
    (
        {
            "_class_name": "DPMSolverMultistepScheduler",
            "algorithm_type": "sde-dpmsolver",
            "final_sigmas_type": "sigma_min",
        },
        6,
    ),
    (
        {
            "_class_name": "DPMSolverMultistepScheduler",
            "algorithm_type": "dpmsolver",
            "final_sigmas_type": "sigma_min",
            "solver_order": 3,
        },
        7,
    ),
    ({"_class_name": "DPMSolverSinglestepScheduler", "solver_order": 3}, 7),
    ({"_class_name": "DPMSolverSinglestepScheduler", "solver_order": 3, "solver_type": "heun"}, 9),
    ({"_class_name": "DPMSolverSinglestepScheduler", "algorithm_type": "sde-dpmsolver++"}, 6),
    ({"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}, 4),
    ({"_class_name": "LCMScheduler"}, 4),
):
    VARIANTS.append((extra, "checkpoint", "normal", steps))

# Of models with EDM's noise: (config, overrides, sampler, steps).
EDM_VARIANTS: list[tuple[str, dict[str, Any], str, int]] = [
    ("playground", {"thresholding": True, "dynamic_thresholding_ratio": 0.9}, "dpmpp-2m", 6),
    ("playground", {"solver_type": "heun"}, "dpmpp-2m", 6),
    ("playground", {"solver_type": "heun"}, "dpmpp-2m-sde", 6),
    ("playground", {"euler_at_final": True, "final_sigmas_type": "sigma_min"}, "dpmpp-2m", 16),
    ("playground", {"lower_order_final": False}, "dpmpp-3m", 6),
    ("playground", {"rho": 4.0, "sigma_min": 0.1, "sigma_max": 20.0}, "dpmpp-2m", 6),
    ("playground", {"solver_order": 3, "prediction_type": "v_prediction"}, "checkpoint", 7),
    ("playground", {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}, "checkpoint", 7),
    ("cosxl", {"final_sigmas_type": "sigma_min", "prediction_type": "epsilon"}, "euler", 6),
    ("cosxl", {"_use_default_values": ["sigma_schedule"]}, "checkpoint", 6),
]

STRENGTH = 0.7
LATER = ("res-multistep", "dpm2", "dpm2-a", "dpmpp-sde", "sa-solver")
# The classes that do not take prediction_type sample.
NO_SAMPLE = ("euler-a", "pndm", "dpm2", "dpm2-a", "dpmpp-sde")


def sets(cls: type, schedule: str) -> dict[str, Any] | None:
    """The arguments that the schedule sets; None: the class takes none of them."""
    if schedule == "ays":
        return {} if "timesteps" in inspect.signature(cls.set_timesteps).parameters else None
    taken = set(inspect.signature(cls.__init__).parameters)
    return next((one for one in SCHEDULES[schedule] if set(one) <= taken), None)


def exists(cls: type, sampler: str, schedule: str) -> bool:
    """Whether the class takes an argument that the schedule sets."""
    return sets(cls, schedule) is not None


def cells() -> list[dict[str, Any]]:
    """All runs: every combination on every config that the class can take, then the variants."""
    import diffusers

    found = []
    for sampler, (name, _) in CLASSES.items():
        cls = getattr(diffusers, name)
        for schedule in SCHEDULES:
            if not exists(cls, sampler, schedule):
                continue
            for config, steps in cases.STEPS.items():
                if config == "sample" and (sampler in NO_SAMPLE or schedule == "ays"):
                    continue  # no sample prediction there; AYS is for 1000 timesteps
                steps = 10 if schedule == "ays" else steps
                found.append(
                    {"config": config, "sampler": sampler, "schedule": schedule, "steps": steps}
                )
        schedule = "karras" if exists(cls, sampler, "karras") else "normal"
        found.append(
            {
                "config": "sd15",
                "sampler": sampler,
                "schedule": schedule,
                "steps": 9,
                "strength": STRENGTH,
            }
        )
    for eta in (0.3, 1.0):
        for sampler in ("ddim", "tcd"):
            for config in ("sd15", "sd21v"):
                cell = {"config": config, "sampler": sampler, "schedule": "normal", "steps": 6}
                found.append({**cell, "eta": eta})
    for overrides, sampler, schedule, steps in VARIANTS:
        cell = {"config": "sd15", "sampler": sampler, "schedule": schedule, "steps": steps}
        found.append({**cell, "overrides": overrides})
    return found


def parted(later: bool) -> list[dict[str, Any]]:
    """The runs of the samplers in `LATER`, or of all others."""
    return [cell for cell in cells() if (cell["sampler"] in LATER) == later]


def edm_cells() -> list[dict[str, Any]]:
    """Runs of models with EDM's noise: every combination, the middle of a run, the variants."""
    import diffusers

    found: list[dict[str, Any]] = []
    for sampler, (name, _) in EDM_CLASSES.items():
        cls = getattr(diffusers, name)
        for config in cases.EDM_CONFIGS:
            for schedule in SCHEDULES:
                for steps in (6, 20) if exists(cls, sampler, schedule) else ():
                    found.append(
                        {"config": config, "sampler": sampler, "schedule": schedule, "steps": steps}
                    )
            cell = {"config": config, "sampler": sampler, "schedule": "normal", "steps": 9}
            found.append({**cell, "strength": STRENGTH})
    for config, overrides, sampler, steps in EDM_VARIANTS:
        cell = {"config": config, "sampler": sampler, "schedule": "normal", "steps": steps}
        found.append({**cell, "overrides": overrides})
    return found


def run(cell: dict[str, Any]) -> tuple[np.ndarray, np.ndarray | None, float, list[np.ndarray]]:
    """Timesteps, sigmas, initial scale and samples of one run by diffusers."""
    import diffusers
    import torch
    from diffusers.schedulers.scheduling_utils import AysSchedules

    config = {**cases.EVERY_CONFIG[cell["config"]], **cell.get("overrides", {})}
    classes = EDM_CLASSES if cell["config"] in cases.EDM_CONFIGS else CLASSES
    name, fixed = classes.get(cell["sampler"], (config["_class_name"], {}))
    cls = getattr(diffusers, name)
    scheduler = cls.from_config(config, **fixed, **sets(cls, cell["schedule"]))
    if cell["schedule"] == "ays":
        key = (
            "StableDiffusionXLTimesteps" if cell["config"] == "sdxl" else "StableDiffusionTimesteps"
        )
        scheduler.set_timesteps(timesteps=AysSchedules[key])
    else:
        scheduler.set_timesteps(cell["steps"])
    times, sigmas = scheduler.timesteps.numpy(), getattr(scheduler, "sigmas", None)
    first, x = 0, torch.from_numpy(cases.start_noise())
    if "strength" in cell:  # as diffusers' image-to-image pipelines do it
        first = (cell["steps"] - int(cell["steps"] * cell["strength"])) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    if "strength" in cell:
        at = scheduler.timesteps[first : first + 1]
        x = scheduler.add_noise(torch.from_numpy(cases.picture()), x, at)
    else:
        x = x * scheduler.init_noise_sigma
    takes = inspect.signature(scheduler.step).parameters
    extra = {"generator": torch.Generator("cpu").manual_seed(3)} if "generator" in takes else {}
    if "eta" in takes:
        extra["eta"] = cell.get("eta", 0.0)
    if hasattr(scheduler, "noise_sampler"):  # independent noise; test_noise.py has the Brownian one
        generator = torch.Generator("cpu").manual_seed(3)
        scheduler.noise_sampler = lambda *_: torch.randn(x.shape, generator=generator)
    samples = [x.numpy()]
    for t in scheduler.timesteps[first:]:
        seen = scheduler.scale_model_input(x, t)
        output = torch.from_numpy(cases.fake_network(seen.numpy(), float(t)))
        x = scheduler.step(output, t, x, **extra).prev_sample
        samples.append(x.numpy())
    assert np.isfinite(samples).all(), cell
    return (
        times,
        None if sigmas is None else sigmas.numpy(),
        float(scheduler.init_noise_sigma),
        samples,
    )


def draws() -> dict[str, np.ndarray]:
    """torch's own numbers: one generator a seed, draws of mixed sizes in this order."""
    import torch

    sizes = [252, 5, 256, 3, 20, 1, 7, 1000, 16, 17, 31, 33, 2, 15, 100]
    found = {"sizes": np.array(sizes)}
    for seed in (0, 42, 2**32 - 1, 2**32 + 5, -3):
        generator = torch.Generator("cpu").manual_seed(seed)
        found[f"seed {seed}"] = np.concatenate(
            [torch.randn(size, generator=generator).numpy() for size in sizes]
        )
    generator = torch.Generator("cpu").manual_seed(1234)
    found["latents"] = torch.randn((1, 4, 64, 64), generator=generator).numpy()[:, :, ::9, ::7]
    return found


def write(path: Path, every: list[dict[str, Any]]) -> None:
    """Run all cells and store what came out."""
    times, sigmas, scales, samples = [], [], [], []
    for cell in every:
        t, s, scale, xs = run(cell)
        cell["timesteps"], cell["whole"] = len(t), t.dtype.kind == "i"
        cell["sigmas"] = 0 if s is None else len(s)
        times.append(t.astype(np.float32))
        sigmas.append(np.zeros(0, np.float32) if s is None else s)
        scales.append(scale)
        samples.extend(xs)
        cell["samples"] = len(xs)
    np.savez_compressed(
        path,
        cells=np.frombuffer(json.dumps(every).encode(), np.uint8),
        timesteps=np.concatenate(times),
        sigmas=np.concatenate(sigmas),
        scales=np.array(scales),
        samples=np.array(samples),
    )
    print(f"{path.name}: {len(every)} runs, {path.stat().st_size} bytes")


def main() -> None:
    import diffusers

    diffusers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    folder = HERE / "samplers"
    folder.mkdir(exist_ok=True)
    wanted = sys.argv[1:] or ["runs", "more", "edm", "noise"]
    if "runs" in wanted:
        write(folder / "runs.npz", parted(later=False))
    if "more" in wanted:
        write(folder / "more.npz", parted(later=True))
    if "edm" in wanted:
        write(folder / "edm.npz", edm_cells())
    if "noise" in wanted:
        np.savez_compressed(folder / "noise.npz", **draws())


if __name__ == "__main__":
    main()
