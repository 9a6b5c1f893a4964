"""Make tests/golden/samplers/kdiffusion.npz: what k-diffusion's samplers and torchsde's trees give.

    python tests/golden/make_kdiffusion_goldens.py    # needs k-diffusion (torchsde, torch, scipy)

`cells`, a JSON list of runs (config, sampler, schedule, steps, noise), and for all of them `ends`:
x / alpha after the last step, float64. `motions`: increments of BrownianTreeNoiseSampler for the
seeds and the pairs of sigmas in `seeds` and `pairs`.
"""

from __future__ import annotations

import json
import math
import sys
import types
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import sampler_cases as cases  # noqa: E402

from mlxdiff import samplers  # noqa: E402
from mlxdiff.samplers.euler import EULER  # noqa: E402
from mlxdiff.samplers.schedule import NoiseSchedule, timestep_of  # noqa: E402

# The package's __init__ imports what its samplers do not need.
package = types.ModuleType("k_diffusion")
package.__path__ = list(find_spec("k_diffusion").submodule_search_locations)  # type: ignore[union-attr]
sys.modules["k_diffusion"] = package
from k_diffusion import sampling  # noqa: E402

FUNCTIONS = {
    "dpm2": "sample_dpm_2",
    "dpm2-a": "sample_dpm_2_ancestral",
    "dpmpp-2s-a": "sample_dpmpp_2s_ancestral",
    "dpmpp-sde": "sample_dpmpp_sde",
    "dpmpp-2m-sde": "sample_dpmpp_2m_sde",
    "dpmpp-3m-sde": "sample_dpmpp_3m_sde",
    "dpm-fast": "sample_dpm_fast",
    "lms": "sample_lms",
    "euler-a": "sample_euler_ancestral",
}
SDE = ("dpmpp-sde", "dpmpp-2m-sde", "dpmpp-3m-sde")


def cells() -> list[dict[str, Any]]:
    """All runs: two models, three schedules, both kinds of noise where there are two."""
    found = []
    for config in ("sd15", "sd21v"):
        for sampler in FUNCTIONS:
            for schedule, steps in (("exponential", 9), ("exponential", 4), ("linspace", 12)):
                if sampler == "dpm-fast":
                    schedule = "linspace"
                for noise in ("independent", "brownian") if sampler in SDE else ("independent",):
                    cell = {"config": config, "sampler": sampler, "schedule": schedule}
                    found.append({**cell, "steps": steps, "noise": noise})
    return found


def run(cell: dict[str, Any]) -> np.ndarray:
    """x / alpha at the end of a run by k-diffusion."""
    config = cases.CONFIGS[cell["config"]]
    known = NoiseSchedule.from_arguments(EULER.read(config)).sigmas_karras
    sigmas = samplers.timesteps(config, "euler", cell["schedule"], cell["steps"])[1]
    assert sigmas is not None

    def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        s = float(sigma[0])
        time = float(np.float32(timestep_of(np.array([s]), known)[0]))
        scaled = (x / math.sqrt(s * s + 1)).numpy().astype(np.float32)
        out = torch.from_numpy(cases.fake_network(scaled, time)).to(x.dtype)
        if config.get("prediction_type") == "v_prediction":
            return x / (s * s + 1) - out * s / math.sqrt(s * s + 1)
        return x - s * out

    x = torch.from_numpy(cases.start_noise()).double()
    generator = torch.Generator("cpu").manual_seed(3)
    extra: dict[str, Any] = {}
    if cell["sampler"] in ("dpm2", "dpm-fast", "lms"):
        pass
    elif cell["noise"] == "brownian":
        low, high = float(sigmas[sigmas > 0].min()), float(sigmas.max())
        extra["noise_sampler"] = sampling.BrownianTreeNoiseSampler(
            torch.zeros(cases.SHAPE), low, high, seed=[3]
        )
    else:
        extra["noise_sampler"] = lambda *_: torch.randn(cases.SHAPE, generator=generator)
    function = getattr(sampling, FUNCTIONS[cell["sampler"]])
    if cell["sampler"] == "dpm-fast":
        high, low = float(known[-1]), float(known[0])
        # torch.tensor(float) is float32; the run is in double precision.
        torch.set_default_dtype(torch.float64)
        end = function(model, x * high, low, high, cell["steps"], disable=True)
        torch.set_default_dtype(torch.float32)
        return end.numpy()
    levels = torch.from_numpy(sigmas)
    if cell["noise"] == "brownian":  # the path notices the last bit of a sigma
        x = x.float()
    else:
        levels = levels.double()
    return function(model, x * levels[0], levels, disable=True, **extra).double().numpy()


def motions() -> dict[str, np.ndarray]:
    """Increments of torchsde's trees."""
    sigmas = np.exp(np.linspace(math.log(14.6146), math.log(0.0292), 8)).astype(np.float32)
    middles = np.sqrt(sigmas[:-1] * sigmas[1:])
    pairs = [*zip(sigmas, middles, strict=False), *pairwise(sigmas)]
    seeds = np.array([0, 3, 123456789012, 2**63 - 1], np.int64)
    found = []
    for seed in seeds.tolist():
        sampler = sampling.BrownianTreeNoiseSampler(
            torch.zeros(1, 4, 2, 3), float(sigmas[-1]), float(sigmas[0]), seed=[seed]
        )
        found.append([sampler(torch.tensor(a), torch.tensor(b)).numpy() for a, b in pairs])
    return {"seeds": seeds, "pairs": np.array(pairs), "motions": np.array(found)}


def main() -> None:
    every = cells()
    ends = np.array([run(cell) for cell in every])
    path = HERE / "samplers" / "kdiffusion.npz"
    text = np.frombuffer(json.dumps(every).encode(), np.uint8)
    np.savez_compressed(path, cells=text, ends=ends, **motions())
    print(f"{path.name}: {len(every)} runs, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
