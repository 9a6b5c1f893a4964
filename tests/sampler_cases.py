"""What the sampler goldens are made of: scheduler configs, runs, and a network that is a formula.

Shared by tests/golden/make_sampler_goldens.py, which runs diffusers on it, and
test_samplers_goldens.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SHAPE = (1, 4, 2, 2)  # 16 values: the smallest that torch draws in blocks

_SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "trained_betas": None,
}
# As published models write them.
CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {
        **_SD,
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "clip_sample": False,
    },
    "sd21v": {
        **_SD,
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.8.0",
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "clip_sample": False,
    },
    "sdxl": {
        **_SD,
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": "0.19.0.dev0",
        "clip_sample": False,
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    },
    # Zero terminal SNR as its authors publish it, and the least common prediction.
    "zsnr": {
        **_SD,
        "_class_name": "DDIMScheduler",
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "set_alpha_to_one": True,
        "skip_prk_steps": True,
        "timestep_spacing": "trailing",
    },
    "sample": {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "linear",
        "num_train_timesteps": 500,
        "clip_sample": False,
        "prediction_type": "sample",
        "skip_prk_steps": True,
        "variance_type": "fixed_small",
    },
}
# Trained with EDM's noise: Playground 2.5 as published, CosXL as diffusers' guide has it.
EDM_CONFIGS: dict[str, dict[str, Any]] = {
    "playground": {
        "_class_name": "EDMDPMSolverMultistepScheduler",
        "_diffusers_version": "0.27.0.dev0",
        "algorithm_type": "dpmsolver++",
        "dynamic_thresholding_ratio": 0.995,
        "euler_at_final": False,
        "final_sigmas_type": "zero",
        "lower_order_final": True,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "rho": 7.0,
        "sample_max_value": 1.0,
        "sigma_data": 0.5,
        "sigma_max": 80.0,
        "sigma_min": 0.002,
        "solver_order": 2,
        "solver_type": "midpoint",
        "thresholding": False,
    },
    "cosxl": {
        "_class_name": "EDMEulerScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "sigma_data": 1.0,
        "sigma_max": 120.0,
        "sigma_min": 0.002,
        "sigma_schedule": "exponential",
    },
}
EVERY_CONFIG = CONFIGS | EDM_CONFIGS

STEPS = {"sd15": 10, "sd21v": 16, "sdxl": 7, "zsnr": 6, "sample": 5}


def fake_network(x: np.ndarray, timestep: float) -> np.ndarray:
    """A smooth function of input and timestep, float32: network enough for testing samplers."""
    return (0.3 * x + 0.2 * np.sin(3.0 * x + 0.005 * timestep)).astype(np.float32)


def start_noise() -> np.ndarray:
    """The standard normal noise that every run starts from."""
    return np.random.RandomState(7).standard_normal(SHAPE).astype(np.float32)


def picture() -> np.ndarray:
    """The clean latents that runs begun in the middle start from."""
    return np.random.RandomState(8).standard_normal(SHAPE).astype(np.float32)
