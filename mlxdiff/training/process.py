"""The forward process: x_t from x_0, what the network is to predict of it, and random numbers.

Notation: a_t is the product of (1 - beta) up to timestep t. x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e,
with e standard normal (Ho et al. 2020, equation 4). The signal-to-noise ratio is a_t / (1 - a_t).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxdiff.errors import UsageError
from mlxdiff.samplers.arguments import SchedulerArguments
from mlxdiff.samplers.process import is_edm
from mlxdiff.samplers.schedule import NoiseSchedule

PREDICTIONS = ("epsilon", "v_prediction", "sample")

# The defaults of diffusers' DDPMScheduler, which defines the process.
_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}


@dataclass(frozen=True)
class Process:
    """A model's forward process.

    Attributes:
        alphas_cumprod: a_t, (T,) float32.
        prediction: one of PREDICTIONS.
    """

    alphas_cumprod: np.ndarray
    prediction: str

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Process:
        """Return the process of a scheduler_config.json.

        Raises: ConfigError for a malformed config; UsageError for EDM's process (Karras et al.
            2022), which has no timesteps.
        """
        if is_edm(config):
            raise UsageError(
                "this model was trained with EDM's noise (Karras et al. 2022), for which mlxdiff "
                "has no training; train a model with DDPM's noise, such as Stable Diffusion"
            )
        arguments = SchedulerArguments(config, "DDPMScheduler", _DEFAULTS)
        schedule = NoiseSchedule.from_arguments(arguments)
        return cls(schedule.alphas_cumprod, arguments.prediction_type)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def factors(self, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return sqrt(a_t) and sqrt(1 - a_t) of timesteps (B,), each (B, 1, 1, 1) float32."""
        a = self.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
        return np.sqrt(a), np.sqrt(np.float32(1) - a)

    def noisy(self, clean: np.ndarray, noise: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
        """Return x_t of x_0 and noise, both (B, h, w, C), at timesteps (B,)."""
        signal, sigma = self.factors(timesteps)
        return signal * clean + sigma * noise

    def target(self, clean: np.ndarray, noise: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
        """Return what the network is to predict: the noise, the sample, or v.

        v = sqrt(a_t) e - sqrt(1 - a_t) x_0 (Salimans and Ho 2022, appendix D).
        """
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return clean
        signal, sigma = self.factors(timesteps)
        return signal * noise - sigma * clean

    def snr(self, timesteps: np.ndarray) -> np.ndarray:
        """Return the signal-to-noise ratio at timesteps (B,): (B,) float32."""
        a = self.alphas_cumprod[timesteps]
        with np.errstate(divide="ignore"):
            return a / (np.float32(1) - a)

    def weights(
        self, timesteps: np.ndarray, min_snr_gamma: float | None = None, debias: bool = False
    ) -> np.ndarray:
        """Return the weight of the squared error at each timestep: (B,) float32.

        Args:
            timesteps: (B,).
            min_snr_gamma: gamma of min-SNR weighting (Hang et al. 2023): on x_0 min(SNR, gamma),
                on the noise that divided by SNR, on v that divided by SNR + 1.
            debias: weights of Yu et al. 2024: 1 / sqrt(SNR) on the noise, and as in kohya's
                scripts 1 / (SNR + 1) on v, with SNR of at most 1000.
        """
        snr = self.snr(timesteps)
        if min_snr_gamma is not None:
            least = np.minimum(snr, np.float32(min_snr_gamma))
            if self.prediction == "sample":
                return least
            return least / (snr if self.prediction == "epsilon" else snr + np.float32(1))
        if debias:
            snr = np.minimum(snr, np.float32(1000))
            if self.prediction == "v_prediction":
                return np.float32(1) / (snr + np.float32(1))
            return np.float32(1) / np.sqrt(snr)
        return np.ones_like(snr)

    def check_weighting(self, min_snr_gamma: float | None, debias: bool) -> None:
        """Raise UsageError for weightings that the process does not allow."""
        if min_snr_gamma is not None and debias:
            raise UsageError("min_snr_gamma and debias are both given; give one")
        if debias and self.prediction == "sample":
            raise UsageError(
                "debias is defined for models that predict the noise or v; leave it out"
            )
        weighted = min_snr_gamma is not None or debias
        if weighted and self.prediction == "epsilon" and self.alphas_cumprod[-1] == 0:
            raise UsageError(
                "this model predicts the noise under zero terminal SNR, where min_snr_gamma and "
                "debias have no finite weight; leave them out"
            )


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch.

    Attributes:
        timesteps: (B,) int32.
        noise: (B, h, w, C) float32.
        encoding: of the same shape: picks latents from their distribution.
        dropped: (B,) bool: examples that are trained without their caption.
        uniform: (B,) float32 in [0, 1): picks a guidance scale, in distillation.
    """

    timesteps: np.ndarray
    noise: np.ndarray
    encoding: np.ndarray
    dropped: np.ndarray
    uniform: np.ndarray


def draw(
    seed: int,
    index: int,
    shape: tuple[int, int, int, int],
    timesteps: int,
    *,
    drop: float = 0.0,
    offset: float = 0.0,
) -> Draws:
    """Return the random numbers of batch ``index`` of a run.

    They follow from the arguments alone, so a run that goes on later draws the same.

    Args:
        shape: of the latents, (B, h, w, C).
        timesteps: T of the process.
        drop: share of captions to drop.
        offset: strength of a noise that is the same for a whole channel, added to the noise
            (Guttenberg 2023: it lets a model learn dark and bright pictures).
    """

    def stream(purpose: int) -> np.random.Generator:
        return np.random.default_rng([seed % 2**64, index, purpose])

    batch, *_, channels = shape
    noise = stream(1).standard_normal(shape, np.float32)
    if offset:
        noise += np.float32(offset) * stream(2).standard_normal((batch, 1, 1, channels), np.float32)
    return Draws(
        timesteps=stream(0).integers(0, timesteps, batch).astype(np.int32),
        noise=noise,
        encoding=stream(3).standard_normal(shape, np.float32),
        dropped=stream(4).random(batch) < drop,
        uniform=stream(5).random(batch, np.float32),
    )
