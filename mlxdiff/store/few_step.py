"""LoRAs that let a model draw in few steps, and how each is to be used.

One belongs to the built-in model and lies in this package. The others are published: repositories,
files, licences and settings are those of the model cards. The first row that fits a model is what
``--fast`` takes; the others are for ``--lora`` (docs/models.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from mlxdiff.store.catalogue import SHIPPED


@dataclass(frozen=True)
class FewStep:
    """A LoRA for few steps.

    Attributes:
        name: what people call it.
        family: of the models that it fits.
        repo, file: on the hub, or a model of this package and a file in it.
        megabytes: size of the file, rounded; 0: unknown.
        licence: as its model card names it.
        steps, guidance, sampler, schedule, eta: as its authors recommend; None: the usual ones.
        only: repositories of the models that it fits, where the family has other shapes, too.
    """

    name: str
    family: str
    repo: str
    file: str
    megabytes: int
    licence: str
    steps: int
    guidance: float
    sampler: str
    schedule: str = "auto"
    eta: float | None = None
    only: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The name of the file, the same on every machine."""
        return f"{self.repo}/{self.file}"

    @property
    def is_shipped(self) -> bool:
        """Return True if the file is in this package."""
        return self.repo in SHIPPED

    @property
    def place(self) -> str:
        """What ``--lora`` takes: a file of this package, or a name on the hub."""
        return str(SHIPPED[self.repo] / self.file) if self.is_shipped else self.id

    def __str__(self) -> str:
        size = f"{self.megabytes} MB, " if self.megabytes else ""
        return f"{self.name} ({self.id}, {size}licence {self.licence})"


_LCM = "latent-consistency/lcm-lora"
_PEFT = "pytorch_lora_weights.safetensors"
_RAIL = "openrail++"
_CARD = "see its model card"

FEW_STEP: tuple[FewStep, ...] = (
    FewStep("distilled", "sd1", "builtin", "few_step.safetensors", 8, "MIT", 4, 1.0,
            "ddim", "trailing", only=("builtin",)),
    FewStep("LCM-LoRA", "sd1", f"{_LCM}-sdv1-5", _PEFT, 135, _RAIL, 4, 1.0, "lcm"),
    FewStep("TCD", "sd1", "h1t/TCD-SD15-LoRA", _PEFT, 135, "mit", 4, 0.0, "tcd", eta=0.3),
    FewStep("Hyper-SD", "sd1", "ByteDance/Hyper-SD", "Hyper-SD15-4steps-lora.safetensors", 269,
            _CARD, 4, 0.0, "ddim", "trailing"),
    FewStep("TCD", "sd2", "h1t/TCD-SD21-base-LoRA", _PEFT, 0, _CARD, 4, 0.0, "tcd", eta=0.3),
    FewStep("LCM-LoRA", "sdxl", f"{_LCM}-ssd-1b", _PEFT, 210, _RAIL, 4, 1.0, "lcm",
            only=("segmind/SSD-1B",)),
    FewStep("VegaRT", "sdxl", "segmind/Segmind-VegaRT", _PEFT, 0, "apache-2.0", 4, 0.0, "lcm",
            only=("segmind/Segmind-Vega",)),
    FewStep("SDXL-Lightning", "sdxl", "ByteDance/SDXL-Lightning",
            "sdxl_lightning_4step_lora.safetensors", 394, _RAIL, 4, 0.0, "euler", "trailing"),
    FewStep("Hyper-SD", "sdxl", "ByteDance/Hyper-SD", "Hyper-SDXL-4steps-lora.safetensors", 787,
            _CARD, 4, 0.0, "ddim", "trailing"),
    FewStep("LCM-LoRA", "sdxl", f"{_LCM}-sdxl", _PEFT, 394, _RAIL, 4, 1.0, "lcm"),
    FewStep("TCD", "sdxl", "h1t/TCD-SDXL-LoRA", _PEFT, 394, "mit", 4, 0.0, "tcd", eta=0.3),
)  # fmt: skip
"""All LoRAs, by family; of each family the one that ``--fast`` takes first."""


def find(family: str, source: str) -> FewStep | None:
    """Return what ``--fast`` takes for a model; None: nothing is published for it.

    Args:
        family: of the model.
        source: its repository on the hub, or another name.
    """
    fits = [
        one for one in FEW_STEP if one.family == family and (not one.only or source in one.only)
    ]
    return max(fits, key=lambda one: bool(one.only), default=None)
