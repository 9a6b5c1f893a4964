"""Train a LoRA: low-rank changes of a model's layers (Hu et al. 2021), with DoRA's norms if wanted.

The file holds the names of diffusers and PEFT, or those of kohya's scripts; ``adapters.lora`` reads
both.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxdiff.adapters import lora_names
from mlxdiff.errors import UsageError
from mlxdiff.machine import stopping
from mlxdiff.machine.temporary import temporary_file
from mlxdiff.networks.layers import Module
from mlxdiff.networks.params import expected_parameters
from mlxdiff.run.latent_model import LatentModel
from mlxdiff.training import folders, networks
from mlxdiff.training.data import Batch
from mlxdiff.training.options import LoraOptions, RankOptions
from mlxdiff.weights.tensors import write_safetensors

_ATTENTION = r".*\.(to_q|to_k|to_v|to_out\.0|[qkv]_proj|out_proj)"
_PATTERNS = {
    "attention": _ATTENTION,
    "transformer": rf"{_ATTENTION}|.*\.(proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|fc1|fc2)",
    "all": r"(?!.*(_embedding|conv_in|conv_out|text_projection)).*",
}
"""Modules to change, for each of ``options.TARGETS``."""

_PARTS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
_MAGNITUDE = "lora_magnitude_vector"
_BASES = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}


class LoRA:
    """The task of training a LoRA.

    Args:
        model: the model that it changes.
        options: rank, layers and forms.
        seed: of the first weights.
        dtype: what the networks compute in.
        checkpointing: keep no more of the forward pass than the inputs of blocks.
    """

    kind = "lora"

    def __init__(
        self,
        model: LatentModel,
        options: RankOptions,
        seed: int = 0,
        dtype: str = "float32",
        checkpointing: bool = False,
    ) -> None:
        self._source, self._options = model.source, options
        self._texts = isinstance(options, LoraOptions) and options.text_encoder
        self.rank = options.rank
        self.alpha = float(options.rank if options.alpha is None else options.alpha)
        names = ("unet", *(model.texts.names if self._texts else ()))
        self.networks = {name: networks.load(model, name, dtype) for name in names}
        self._first: dict[str, mx.array] = {}
        for name, network in self.networks.items():
            self._adapt(name, network, seed)
        kinds = networks.BLOCKS if checkpointing else networks.GATES
        for name, network in self.networks.items():
            prefix = f"{name}."
            own = {n[len(prefix) :]: v for n, v in self._first.items() if n.startswith(prefix)}
            networks.checkpoint(network, own, kinds)

    def _adapt(self, component: str, network: Module, seed: int) -> None:
        """Give the chosen layers of a network an adapter."""
        scale = self.alpha / self.rank
        layers = dict(network.named_modules())  # type: ignore[attr-defined]
        shapes = expected_parameters(self._source.config(component))
        for path in chosen(shapes, self._options.targets):
            layer = layers[path]
            parts = layer.adapt(self.rank, scale, self._options.dora)
            number = int.from_bytes(
                hashlib.sha256(f"{component}.{path}".encode()).digest()[:8], "big"
            )
            random = np.random.default_rng([seed % 2**64, number])
            shape = parts["lora_A"].shape
            # As PEFT: uniform, of variance 1 / (3 inputs); the change is zero at first.
            bound = 1 / math.sqrt(math.prod(shape[1:]))
            parts["lora_A"] = mx.array(random.uniform(-bound, bound, shape).astype(np.float32))
            if _MAGNITUDE in parts:
                parts[_MAGNITUDE] = layer.norms()
                mx.eval(parts[_MAGNITUDE])
            for part, value in parts.items():
                layer[part] = value
                self._first[f"{component}.{path}.{part}"] = value

    def parameters(self) -> dict[str, mx.array]:
        """Return the first weights: ``component.module.part`` -> array, in our layout."""
        return dict(self._first)

    def predict(
        self, parameters: Mapping[str, mx.array], batch: Batch, noisy: mx.array, timesteps: mx.array
    ) -> mx.array:
        """Run the networks with these changes."""
        for name, value in parameters.items():
            component, _, own = name.partition(".")
            self.networks[component].put(own, value)
        text = None
        if batch.tokens is not None:
            encoders = {name: net for name, net in self.networks.items() if name != "unet"}
            text = networks.encode(self._source, encoders, batch.tokens)
        found: mx.array = self.networks["unet"](
            noisy, timesteps, **networks.conditions(batch, text)
        )
        return found

    def save(
        self, parameters: Mapping[str, np.ndarray], path: Path, facts: Mapping[str, Any]
    ) -> list[Path]:
        """Write the LoRA in the chosen forms."""
        forms = {"both": ("diffusers", "kohya")}.get(self._options.form, (self._options.form,))
        written = []
        for form in forms:
            ending = "-kohya" if len(forms) > 1 and form == "kohya" else ""
            place = path.with_name(f"{path.name}{ending}.safetensors")
            make = self.diffusers_form if form == "diffusers" else self.kohya_form
            tensors, told = make(parameters)
            metadata = {"format": "pt", **told, **networks.strings(self._facts(facts))}
            with stopping.uninterrupted(), temporary_file(place.parent) as (temporary, file):
                write_safetensors(temporary, folders.lazy(tensors), "float32", metadata=metadata)
                os.fsync(file.fileno())
                os.replace(temporary, place)
            written.append(place)
        return written

    def _facts(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        licence = self._options.licence
        return {**facts, **({} if licence is None else {"modelspec.license": licence})}

    def diffusers_form(
        self, parameters: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Return tensors and metadata as diffusers' ``save_lora_weights`` writes them."""
        tensors, modules = {}, {name: set[str]() for name in self.networks}
        for name, value in sorted(parameters.items()):
            module, _, part = name.rpartition(".")
            component, _, own = module.partition(".")
            own = own.removeprefix("text_model.")
            modules[component].add(own)
            tensors[f"{component}.{own}.{_PARTS.get(part, part)}"] = self._in_pytorch(name, value)
        told: dict[str, Any] = {}
        for component, found in modules.items():
            config: dict[str, Any] = {
                "r": self.rank,
                "lora_alpha": int(self.alpha) if self.alpha.is_integer() else self.alpha,
                "use_dora": self._options.dora,
                "target_modules": sorted(found),
                "lora_bias": False,
            }
            told |= {f"{component}.{key}": value for key, value in config.items()}
        return tensors, {"lora_adapter_metadata": json.dumps(told, sort_keys=True, indent=2)}

    def kohya_form(
        self, parameters: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Return tensors and metadata as kohya's scripts write them."""
        configs = {name: self._source.config(name) for name in self.networks}
        names = _kohya_names(configs, self._source.family)
        tensors: dict[str, np.ndarray] = {}
        for name, value in sorted(parameters.items()):
            module, _, part = name.rpartition(".")
            spelled, values = names[module], self._in_pytorch(name, value)
            if part == _MAGNITUDE:
                tensors[f"{spelled}.dora_scale"] = values.reshape(-1, *(1,) * self._axes(module))
                continue
            word = {"lora_A": "lora_down", "lora_B": "lora_up"}[part]
            tensors[f"{spelled}.{word}.weight"] = values
            tensors[f"{spelled}.alpha"] = np.array(self.alpha, np.float32)
        told = {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(self.rank),
            "ss_network_alpha": str(self.alpha),
            "ss_base_model_version": _BASES.get(self._source.family, self._source.family),
            "ss_v2": str(self._source.family == "sd2"),
        }
        return tensors, told

    def _in_pytorch(self, name: str, value: np.ndarray) -> np.ndarray:
        """An array of an adapter in PyTorch's layout; both factors of a convolution are kernels."""
        module, _, part = name.rpartition(".")
        if part == "lora_B":
            return value.reshape(*value.shape, *(1,) * (self._axes(module) - 1))
        if value.ndim == 4:
            return np.ascontiguousarray(value.transpose(0, 3, 1, 2))
        return value

    def _axes(self, module: str) -> int:
        """Axes of a module's weight beside that of its outputs."""
        return len(self._first[f"{module}.lora_A"].shape) - 1

    def identity(self) -> dict[str, Any]:
        """Return what must not change when a run goes on."""
        o = self._options
        return {
            "model": networks.digest(self._source),
            "rank": self.rank,
            "alpha": self.alpha,
            "targets": o.targets,
            "text_encoder": self._texts,
            "dora": o.dora,
        }


def chosen(shapes: Mapping[str, tuple[int, ...]], targets: str) -> list[str]:
    """Return the modules of a network that a LoRA changes.

    Args:
        shapes: parameter -> shape.
        targets: one of ``options.TARGETS``.
    """
    pattern = re.compile(_PATTERNS[targets])
    modules = (
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) > 1
    )
    return sorted(module for module in modules if pattern.fullmatch(module))


def _kohya_names(configs: Mapping[str, Any], family: str) -> dict[str, str]:
    """Return ``component.module`` -> kohya's name of the module.

    SDXL's U-Net has the names of the original code there, all others those of diffusers.
    """
    found: dict[str, str] = {}
    for component in configs:
        prefix = {"unet": "lora_unet_", "text_encoder_2": "lora_te2_"}.get(component)
        if prefix is None:
            prefix = "lora_te1_" if family.startswith("sdxl") else "lora_te_"
        original = component == "unet" and family.startswith("sdxl")
        blocks = (f"{prefix}input_blocks_", f"{prefix}middle_block_", f"{prefix}output_blocks_")
        for spelled, targets in lora_names.spellings({component: configs[component]}).items():
            for target in targets:
                module = target.parameter.removesuffix(".weight")
                flat = f"{prefix}{module.replace('.', '_')}"
                fits = spelled.startswith(blocks) if original else spelled == flat
                if fits and target.third is None:
                    found[f"{component}.{module}"] = spelled
    return found


def check_trainable(model: Any) -> LatentModel:
    """Return the model if it can be trained with captions alone. Raises: UsageError."""
    if not isinstance(model, LatentModel):
        raise UsageError(
            "this model draws without text; mlxdiff train unconditional makes such ones"
        )
    led = model.edits or model.upscales or model.is_led
    if model.lacks("prompt") or model.inpaints or led or model.takes_aesthetic_score:
        raise UsageError(
            f"{model.description}: it needs other pictures beside those with captions, which "
            "mlxdiff train does not have; train a model that draws from text"
        )
    return model
