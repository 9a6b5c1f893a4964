"""Frequencies of the timestep embedding (Ho et al. 2020), the same for all backends."""

from __future__ import annotations

import math

import numpy as np


def frequencies(embedding_dim: int, freq_shift: float) -> np.ndarray:
    """Return 10000 ** (-i / (D // 2 - freq_shift)) for i below D // 2: (D // 2,) float32.

    The reference implementation rounds exponents and frequencies to float32. At timestep 999 the
    last bit of a frequency is a phase of 6e-5. So each is rounded here too, correctly: a backend's
    own exp would be off by some of these bits.

    Source: diffusers models/embeddings.py (get_timestep_embedding).
    """
    half = embedding_dim // 2
    exponents = np.arange(half, dtype=np.float32) * np.float32(-math.log(10000))
    exponents /= np.float32(half - freq_shift)
    return np.exp(exponents.astype(np.float64)).astype(np.float32)
