"""What `auto` means, and what a scheduler_config.json says about the model.

docs/samplers.md shows the evidence for the defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxdiff.errors import ConfigError, quoted
from mlxdiff.samplers import fitted
from mlxdiff.samplers.process import is_continuous
from mlxdiff.samplers.registry import find, has_own_schedule, samplers_for

PIXELS = "ddpm"
"""The family of models that draw pixels, not latents of a VAE."""

GUIDANCE = "_mlxdiff_guidance"
"""Key of scheduler_config.json: the guidance scale that suits the model best."""

FEW_GUIDED, FEW_UNGUIDED = 20, 8
"""From this step count on, Karras' spacing measured better than an even one."""


def automatic(
    config: Mapping[str, Any],
    sampler: str,
    schedule: str,
    steps: int,
    family: str | None = None,
    guidance: float | None = None,
    altered: bool = False,
) -> tuple[str, str]:
    """Return (sampler, schedule), with the ids that `auto` means for a checkpoint.

    If both are `auto`, the run is not altered and the model has a fit (fitted.py) for this step
    count at this guidance scale, they are the fitted sampler and its own schedule. Otherwise:

    - The sampler is dpmpp-2m; for a model that was distilled to a few steps, the sampler that it
      was distilled for.
    - The schedule of a distilled model, and of one with EDM's noise, is the checkpoint's. It is
      trailing if the checkpoint says trailing or has zero terminal SNR: its highest sigma is
      outside the range of Karras' spacing. Else it is karras, or trailing below `FEW_GUIDED`
      (`FEW_UNGUIDED`) steps. Both start at the last training timestep, to which the initial noise
      belongs. The spacing in SDXL's config starts later.
    """
    if (sampler, schedule) == ("auto", "auto") and not altered:
        if fitted.available(config, steps, guidance):
            return "fitted", "normal"
    distilled = distilled_for(config)
    if sampler == "auto":
        existing = samplers_for(config)
        sampler = distilled or ("dpmpp-2m" if "dpmpp-2m" in existing else next(iter(existing)))
    if schedule == "auto":
        few = FEW_UNGUIDED if guidance is not None and guidance <= 1.0 else FEW_GUIDED
        wanted = "karras" if steps >= few else "trailing"
        if config.get("timestep_spacing") == "trailing" or config.get("rescale_betas_zero_snr"):
            wanted = "trailing"
        # For models that draw pixels nothing was measured: they take the reference's own.
        # Continuous noise levels (EDM's) belong to the model.
        if distilled or sampler == "checkpoint" or family == PIXELS or is_continuous(config):
            wanted = "normal"
        schedule = wanted if has_own_schedule(find(config, sampler).scheduler, wanted) else "normal"
    return sampler, schedule


def distilled_for(config: Mapping[str, Any]) -> str | None:
    """Return the sampler that a checkpoint was distilled for, to need a few steps only, or None."""
    turbo = _turbo(config)
    distilled = {"LCMScheduler": "lcm", "TCDScheduler": "tcd"}
    return turbo or distilled.get(str(config.get("_class_name")))


def is_turbo(config: Mapping[str, Any]) -> bool:
    """Return True for a model of adversarial distillation, which runs without guidance.

    These are SD-Turbo, SDXL-Turbo and SDXL-Lightning.
    """
    return _turbo(config) is not None


def advised_guidance(config: Mapping[str, Any]) -> float | None:
    """Return the guidance scale that the model's file advises, or None. Raises: ConfigError."""
    value = config.get(GUIDANCE)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 100:
        raise ConfigError(
            f"scheduler_config.json: {GUIDANCE} is {quoted(value)}; expected a number from 0 to "
            "100, or no such key"
        )
    return float(value)


def _turbo(config: Mapping[str, Any]) -> str | None:
    """Return the sampler of a model of adversarial distillation, else None.

    The published files have in common, and no others have: an Euler class with trailing timesteps
    that predicts noise and was not trained to zero terminal SNR.
    """
    euler_like = {"EulerDiscreteScheduler": "euler", "EulerAncestralDiscreteScheduler": "euler-a"}
    turbo = (
        config.get("timestep_spacing") == "trailing"
        and config.get("prediction_type", "epsilon") == "epsilon"
        and not config.get("rescale_betas_zero_snr")
    )
    return euler_like.get(str(config.get("_class_name"))) if turbo else None
