"""Recognise the noise process of a scheduler_config.json: DDPM's, EDM's, or one that is refused.

The process is part of the model: it says which noise the network saw in training, and what its
output means. A solver can be exchanged, the process cannot. So a config of an unknown process is an
error; a run with other numbers would end in a wrong picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxdiff.errors import ConfigError

DDPM_CLASSES = frozenset(
    f"{name}Scheduler"
    for name in """
    DDIM DDIMInverse DDIMParallel DDPM DDPMParallel DEISMultistep DPMSolverMultistep
    DPMSolverMultistepInverse DPMSolverSDE DPMSolverSinglestep EulerAncestralDiscrete EulerDiscrete
    HeunDiscrete KDPM2AncestralDiscrete KDPM2Discrete LCM LMSDiscrete PNDM RePaint SASolver TCD
    UniPCMultistep
    """.split()
)
"""Classes of diffusers 0.42.1 that compute their noise levels from betas, as Ho et al. 2020."""

EDM_CLASSES = frozenset({"EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"})
"""Classes of diffusers 0.42.1 with the parametrisation of Karras et al. 2022 (see edm.py)."""

_FLOW = "flow matching"
# The start of a class name -> its process.
_FOREIGN = {
    "FlowM": _FLOW,
    "LTXEulerAncestralRF": _FLOW,
    "Helios": _FLOW,
    "Piflow": _FLOW,
    "SCM": "TrigFlow",
    "CMStochasticIterative": "consistency training",
    "CosineDPMSolver": "a cosine schedule of EDM's noise",
    "CogVideoX": "CogVideoX's shifted noise schedule",
    "IPNDM": "a sine schedule of noise",
    "ScoreSde": "a score-based SDE",
    "UnCLIP": "unCLIP's noise",
}
# Values of keys that mean flow matching, in whichever class.
_FLOW_VALUES = {
    "use_flow_sigmas": True,
    "use_dynamic_shifting": True,
}


def is_edm(config: Mapping[str, Any]) -> bool:
    """Return True if the config belongs to a model that was trained with EDM's parametrisation."""
    return str(config.get("_class_name")) in EDM_CLASSES


def is_continuous(config: Mapping[str, Any]) -> bool:
    """Return True if the network takes the noise level itself, not a numbered timestep.

    Models with EDM's noise do, and EulerDiscreteScheduler has the same in its own words.
    """
    continuous = config.get("timestep_type") == "continuous"
    return is_edm(config) or (continuous and config.get("prediction_type") == "v_prediction")


def check_process(config: Mapping[str, Any], where: str = "scheduler_config.json") -> None:
    """Raise ConfigError if the config belongs to a noise process that mlxdiff does not have.

    Args:
        config: the JSON object of scheduler_config.json. A config without a class name passes.
        where: its file, for the message.
    """
    name = config.get("_class_name")
    for key, value in _FLOW_VALUES.items():
        if config.get(key) == value:
            raise _refusal(where, f"{key} {value!r}", _FLOW)
    predicts = config.get("prediction_type")
    if isinstance(predicts, str) and predicts.startswith("flow"):
        raise _refusal(where, f"prediction_type {predicts!r}", _FLOW)
    plain = str(name).removeprefix("Flax")  # the classes that diffusers had for JAX
    if name is None or plain in DDPM_CLASSES | EDM_CLASSES:
        return
    process = next((words for start, words in _FOREIGN.items() if plain.startswith(start)), None)
    if process is not None:
        raise _refusal(where, f"_class_name {name!r}", process)
    raise ConfigError(
        f"{where}: _class_name {name!r} is unknown, and with it the noise that the model was "
        "trained on; for a model that was trained as Stable Diffusion, write the class that its "
        "authors used (EulerDiscreteScheduler, for example)"
    )


def _refusal(where: str, said: str, process: str) -> ConfigError:
    return ConfigError(
        f"{where}: {said}: the model was trained with {process}, which mlxdiff does not have (it "
        "has DDPM's noise, as Stable Diffusion, and EDM's); use a model of these, or another "
        "program"
    )
