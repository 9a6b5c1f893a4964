"""Orders of accuracy against exact solutions, as benchmarks/sampler_orders.py measures them."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.sampler_orders import (
    FIRST_ORDER,
    GAUSSIAN,
    METHODS,
    PARTICLES,
    TWO,
    Method,
    Mixture,
    error,
    level,
    slope,
)

STEPS = (32, 48, 64, 96)


def measured(method: Method, data: Mixture) -> float:
    return slope([error(method, data, n) for n in STEPS], STEPS)


def test_the_exact_solution() -> None:
    """The quantiles obey the closed form of a Gaussian, and the flow's equation on the mixture."""
    (mean,), (deviation,) = GAUSSIAN.means, GAUSSIAN.deviations
    spread = {}
    for lam in (-1.0, 0.5):
        alpha, sigma = level(lam)
        spread[lam] = (GAUSSIAN.quantile(PARTICLES, lam) - alpha * mean) / np.hypot(
            alpha * deviation, sigma
        )
    np.testing.assert_allclose(spread[-1.0], spread[0.5], atol=1e-12)
    # d(x / alpha) / d(sigma / alpha) is the predicted noise
    lam, step = 0.3, 1e-4
    (x, ratio), (y, other) = (
        (TWO.quantile(PARTICLES, at) / level(at)[0], np.exp(-at)) for at in (lam - step, lam + step)
    )
    noise = TWO.noise(TWO.quantile(PARTICLES, lam), lam)
    np.testing.assert_allclose((y - x) / (other - ratio), noise, atol=1e-6)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_order_on_a_mixture(method: Method) -> None:
    """Every ODE sampler reaches its order, and none pretends to another."""
    tolerance = {1: 0.05, 2: 0.2, 3: 0.2, 4: 0.45}[method.promised]
    assert measured(method, TWO) == pytest.approx(method.promised, abs=tolerance)


@pytest.mark.parametrize(
    ("method", "order"),
    [(FIRST_ORDER, 1), *((m, 2) for m in METHODS if m.label in ("dpmpp-2m", "dpm-2m", "dpmpp-3m"))],
    ids=lambda value: getattr(value, "label", str(value)),
)
def test_dpm_solver_on_a_gaussian(method: Method, order: int) -> None:
    """DPM-Solver's orders 1, 2 and, for the reference's third-order multistep, about 2 again.

    Its second difference carries half the coefficient that a parabola needs (docs/samplers.md).
    """
    assert measured(method, GAUSSIAN) == pytest.approx(order, abs=0.2)
