"""A run as a table of numbers, and one function that applies a row of it.

All samplers are linear in the sample, the network's outputs and fresh noise. Only their
coefficients differ. A sampler's file computes the coefficients once, as Python floats. `Plan.step`
applies one row:

    data   = row.data[0] * x + row.data[1] * output     (the output for the negative prompt alone
                                                         in rows that say `unconditional`: CFG++)
    data   = row.after_limit[0] * x + row.after_limit[1] * limit(data)     where a limit is on
    anchor = row.anchor_x * x + row.anchor_last * last anchor + sum of row.anchor_data[k] * data_k
    next x = row.scale * anchor + row.output * output + sum of row.weights[k] * data_k
             + row.noise * fresh noise

The sampler extrapolates the data: x_0, the noise or a slope. data_0 belongs to this evaluation,
data_k to the evaluation k rows ago. The step starts from the anchor: x itself, the x of the first
stage in two-stage methods, the corrected x in UniPC.

The coefficients are Python floats because `np.float64(2) * mx_array` silently is a NumPy array. The
arithmetic is `+` and `*` on the given arrays, so NumPy and MLX run the same code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = Any  # a float32 array of either backend: np.ndarray or mx.array


@dataclass(frozen=True)
class Limit:
    """A bound on the predicted x_0, for pixel models: clipping, or Imagen's dynamic thresholding.

    Attributes:
        bound: clip to [-bound, bound]; with a quantile, the largest threshold.
        quantile: if given, clip each picture of the batch to this quantile of its |x_0|, kept
            within [1, bound], and divide it by the same number (Saharia et al. 2022, section 2.3).
    """

    bound: float
    quantile: float | None = None

    def __call__(self, x0: Array) -> Array:
        """Return `x0` within bounds, in its own array type. NumPy does it: min has no operator."""
        values = np.asarray(x0)
        if self.quantile is None:
            values = np.clip(values, -self.bound, self.bound)
        else:
            size = np.quantile(np.abs(values).reshape(len(values), -1), self.quantile, axis=1)
            size = np.clip(size, 1.0, self.bound).astype(values.dtype)
            size = size.reshape(-1, *[1] * (values.ndim - 1))
            values = np.clip(values, -size, size) / size
        return values if isinstance(x0, np.ndarray) else type(x0)(values)


@dataclass(frozen=True)
class Row:
    """The coefficients of one model evaluation (see the module's equation). Python numbers only.

    Attributes:
        timestep: the timestep input of the network.
        level: (signal, noise): the forward process at this row is signal * x_0 + noise * noise.
        input_scale: the network takes input_scale * x.
        draws: True if the step draws noise (also noise with coefficient 0, as in the reference).
        between: the two sigmas between which the noise is the increment of a Brownian motion, for
            the samplers that integrate an SDE; (): the noise belongs to no interval.
        unconditional: True if the data come from the output for the negative prompt alone.
        x0: coefficients of x and of the output that give the predicted x_0. (1, 0), x itself, where
            x is noise alone and the output says nothing of x_0.
        All other fields are coefficients of the module's equation.
    """

    timestep: float
    level: tuple[float, float]
    data: tuple[float, float]
    scale: float
    weights: tuple[float, ...]
    output: float = 0.0
    noise: float = 0.0
    draws: bool = False
    between: tuple[float, ...] = ()
    unconditional: bool = False
    anchor_x: float = 1.0
    anchor_last: float = 0.0
    anchor_data: tuple[float, ...] = ()
    limit: Limit | None = None
    after_limit: tuple[float, float] = (0.0, 1.0)
    input_scale: float = 1.0
    x0: tuple[float, float] = (1.0, 0.0)

    @property
    def is_finite(self) -> bool:
        """True if the coefficients of x, of the data and of the noise are finite."""
        return all(map(math.isfinite, (*self.data, self.scale, *self.weights, self.noise)))


@dataclass(frozen=True)
class State:
    """The position of a run. Immutable: `Plan.step` returns the next state.

    Attributes:
        index: the next row.
        data: the data of earlier evaluations that later rows need, latest first.
        anchor: the anchor of the last row, where later rows need it.
    """

    index: int = 0
    data: tuple[Array, ...] = ()
    anchor: Array | None = None


@dataclass(frozen=True)
class Plan:
    """All numbers of a run, computed before it starts. Python numbers only.

    Attributes:
        sampler, schedule: their ids, after `auto` is resolved.
        rows: one per model evaluation.
        init_noise_sigma: the factor of the initial standard normal noise.
        evaluations_per_step: model evaluations that a step of the sampler takes.
        interval: the lowest and the highest sigma of its Brownian motion, if its rows have
            `between`; None: they have not.
        brownian: True if its noise is that of a Brownian motion unless the user says otherwise.
    """

    sampler: str
    schedule: str
    rows: tuple[Row, ...]
    init_noise_sigma: float
    evaluations_per_step: int = 1
    interval: tuple[float, float] | None = None
    brownian: bool = False
    _memory: int = field(init=False, repr=False)
    _anchored: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        used = max(max(len(row.weights), len(row.anchor_data)) for row in self.rows)
        object.__setattr__(self, "_memory", used - 1)
        object.__setattr__(self, "_anchored", any(row.anchor_last for row in self.rows))

    def __len__(self) -> int:
        """Return the number of model evaluations."""
        return len(self.rows)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The timestep of each evaluation; repeats included."""
        return tuple(row.timestep for row in self.rows)

    def start(self) -> State:
        """Return the state before the first evaluation."""
        return State()

    def scale_model_input(self, x: Array, state: State) -> Array:
        """Return the network's input for sample `x` at this state."""
        scale = self.rows[state.index].input_scale
        return x if scale == 1.0 else scale * x

    @property
    def draws(self) -> bool:
        """True if a step draws noise."""
        return any(row.draws for row in self.rows)

    def step(
        self,
        x: Array,
        output: Array,
        state: State,
        noise: Callable[[], Array] | None = None,
        motion: Callable[[float, float], Array] | None = None,
        unconditional: Array | None = None,
    ) -> tuple[Array, State]:
        """Return the sample after this evaluation, and its state.

        Args:
            x: the sample of this evaluation, before `scale_model_input`; float32.
            output: the network's output, after guidance; same shape and array type.
            noise: draws standard normal noise of that shape; called if the row draws.
            motion: gives the increment of a Brownian motion from one sigma to another, scaled to
                variance 1; called instead of `noise` if the row has a `between`. None: `noise` is.
            unconditional: the output for the negative prompt alone; None: there is no guidance in
                this evaluation, and it is the same as `output`.
        Raises: TypeError if the row draws noise and `noise` is None.
        """
        row = self.rows[state.index]
        seen = output
        if row.unconditional and unconditional is not None:
            seen = unconditional
        data = _combine([(row.data[0], x), (row.data[1], seen)])
        if row.limit is not None:
            data = _combine([(row.after_limit[0], x), (row.after_limit[1], row.limit(data))])
        history = (data, *state.data)
        anchor = _combine(
            [
                (row.anchor_x, x),
                (row.anchor_last, state.anchor),
                *zip(row.anchor_data, history, strict=False),
            ]
        )
        terms = [
            (row.scale, anchor),
            (row.output, output),
            *zip(row.weights, history, strict=False),
        ]
        if row.draws and motion is not None and row.between:
            terms.append((row.noise, motion(*row.between)))
        elif row.draws:
            if noise is None:
                raise TypeError(f"sampler {self.sampler!r} draws noise at every step: pass noise=")
            terms.append((row.noise, noise()))
        following = State(
            index=state.index + 1,
            data=history[: self._memory],
            anchor=anchor if self._anchored else None,
        )
        return _combine(terms), following

    def denoised(self, x: Array, output: Array, index: int) -> Array:
        """Return the network's prediction of x_0 at a row, without a limit.

        Args:
            x, output: as `step` takes them.
            index: the row.
        """
        of_x, of_output = self.rows[index].x0
        return _combine([(of_x, x), (of_output, output)])

    def add_noise(self, x0: Array, noise: Array, index: int = 0) -> Array:
        """Add noise to `x0` up to the level of a row, to start image to image or to keep an area.

        Args:
            x0, noise: clean latents and standard normal noise, of either backend.
            index: the row; len(plan) means x0 without noise.
        """
        if index == len(self.rows):
            return x0
        signal, amount = self.rows[index].level
        return signal * x0 + amount * noise


def _combine(terms: Iterable[tuple[float, Array]]) -> Array:
    """Sum coefficient * array, in order; skip terms with coefficient 0."""
    total: Array | None = None
    for coefficient, array in terms:
        if coefficient == 0.0:
            continue
        term = array if coefficient == 1.0 else coefficient * array
        total = term if total is None else total + term
    assert total is not None, "a row that combines nothing"
    return total
