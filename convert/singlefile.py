"""A model in one file, in the naming of latent diffusion, opened as a ModelSource.

The file decides: its names and shapes give the structure (``families``), and the tables of
``keymap`` map every tensor. Missing configs and parts come from a folder.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxdiff.convert import detect, marks, original_config, recognise
from mlxdiff.convert.checkpoint import ComponentFiles, DiffusersFolder, map_component
from mlxdiff.convert.families import (
    FAMILIES,
    OPENAI_WIDTH,
    PART_CLASSES,
    SIZES,
    SVD,
    Config,
    Family,
    Unrepresentable,
    guess,
    pipeline_class,
    svd_vae_structure,
    text_structure,
    unet_config,
    unet_structure,
    vae_structure,
    vision_structure,
)
from mlxdiff.convert.keymap import (
    CC_PROJECTION_FILE,
    DIFFUSERS,
    FILE_IGNORED,
    NORMALIZER_FILE,
    STRAY,
    SVD_DECODER,
    SVD_ENCODER,
    Layout,
    ema_names,
    ignored_for,
    ldm_unet,
    ldm_vae,
    openclip_names,
    openclip_text,
    openclip_vision,
    svd_vae,
)
from mlxdiff.convert.preprocessor import preparation
from mlxdiff.errors import CheckpointError, HubError, UsageError, argument
from mlxdiff.machine.disk import read_document
from mlxdiff.networks.config import (
    AutoencoderKLConfig,
    AutoencoderKLTemporalDecoderConfig,
    CCProjectionConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    ComponentConfig,
    ImageNormalizerConfig,
    UNet2DConditionConfig,
    read_unet,
    read_vae,
)
from mlxdiff.samplers import check_process
from mlxdiff.store import hub
from mlxdiff.store.folder import (
    CC_PROJECTION,
    COMPONENTS,
    FEATURE_EXTRACTOR,
    IMAGE_ENCODER,
    IMAGE_NOISES,
    IMAGE_NORMALIZER,
    MANIFEST,
    OWN_PARTS,
    PREPROCESSOR,
    TOKENIZER_FILES,
    ConvertedFolder,
    Progress,
    check_tokenizer,
    open_folder,
    pad_token,
)
from mlxdiff.weights.files import open_file
from mlxdiff.weights.tensors import LazyTensor, raise_faults, shard_files

if TYPE_CHECKING:
    from mlxdiff.tokenizer import Tokenizer

PREDICTIONS = marks.PREDICTIONS
TOKENIZER = "tokenizer"
"""Folder of the tokenizer's files beside a single file."""
VOCABULARY = "openai/clip-vit-large-patch14"
"""The repository with the vocab.json and merges.txt of all these families."""
VOCABULARY_FILES = ("vocab.json", "merges.txt")

# Prefix -> component, naming. The refiner has one text encoder, the second one of SDXL. The names
# of a U-Net or a VAE show which of two namings they have.
_SECTIONS = {
    "model.diffusion_model.": ("unet", "ldm"),
    "unet.": ("unet", "ldm"),
    "first_stage_model.": ("vae", "ldm"),
    "vae.": ("vae", "ldm"),
    "text_encoder.": ("text_encoder", "clip"),
    "text_encoder_2.": ("text_encoder_2", "clip"),
    "cond_stage_model.1.transformer.": ("text_encoder_2", "clip"),
    "cond_stage_model.transformer.": ("text_encoder", "clip"),
    "cond_stage_model.model.": ("text_encoder", "openclip"),
    "embedder.model.": (IMAGE_ENCODER, "openclip"),
    "cc_projection.": (CC_PROJECTION, "cc_projection"),
    "noise_augmentor.": (IMAGE_NORMALIZER, "noise_augmentor"),
    "conditioner.embedders.0.open_clip.model.": (IMAGE_ENCODER, "openclip"),
    SVD_ENCODER: ("vae", "svd"),
    "conditioner.embedders.0.transformer.": ("text_encoder", "clip"),
    "conditioner.embedders.0.model.": ("text_encoder_2", "openclip"),
    "conditioner.embedders.1.transformer.": ("text_encoder_2", "clip"),
    "conditioner.embedders.1.model.": ("text_encoder_2", "openclip"),
}
_EMA = "model_ema."
_READERS: dict[str, Callable[[Config, str], ComponentConfig]] = {
    "text_encoder": CLIPTextConfig.from_dict,
    "text_encoder_2": CLIPTextConfig.from_dict,
    "unet": read_unet,
    "vae": read_vae,
    IMAGE_ENCODER: CLIPVisionConfig.from_dict,
    IMAGE_NORMALIZER: ImageNormalizerConfig.from_dict,
    CC_PROJECTION: CCProjectionConfig.from_dict,
}
_FILE_LAYOUTS = {IMAGE_NORMALIZER: NORMALIZER_FILE, CC_PROJECTION: CC_PROJECTION_FILE}
_V_MARKS = (
    "output_blocks.11.1.transformer_blocks.0.norm1.bias",
    "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias",
)
_V_SPREAD = 0.09
_XT = re.compile(r"(?<![a-z])xt(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Section:
    """The tensors of one component, with their prefix removed.

    Attributes:
        prefix: prefix of each name in the file.
        naming: "ldm", "clip", "openclip", "diffusers" or "svd" (a VAE in two halves, each with its
            own prefix).
        tensors: name -> tensor.
    """

    prefix: str
    naming: str
    tensors: dict[str, LazyTensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def split(
    tensors: Mapping[str, LazyTensor], path: Path
) -> tuple[dict[str, Section], dict[str, LazyTensor], dict[str, LazyTensor]]:
    """Sort the tensors of a file by component.

    Returns: component -> section; moving averages without their prefix; the rest.
    Raises: CheckpointError if the file has a component twice.
    """
    rest = {n: t for n, t in tensors.items() if ignored_for(n, FILE_IGNORED)}
    if kind := detect.unet_alone(tensors):
        whole = {name: tensor for name, tensor in tensors.items() if name not in rest}
        return {"unet": Section("", kind, whole)}, {}, rest
    averages: dict[str, LazyTensor] = {}
    groups: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        prefix = _section_of(name)
        if name in rest:
            continue
        if name.startswith(_EMA):
            averages[name.removeprefix(_EMA)] = tensor
        elif prefix is None:
            rest[name] = tensor
        else:
            groups.setdefault(prefix, {})[name.removeprefix(prefix)] = tensor
    sections: dict[str, Section] = {}
    if SVD_ENCODER in groups:
        both = {p: groups.pop(p) for p in (SVD_ENCODER, SVD_DECODER) if p in groups}
        whole = {p + name: tensor for p, group in both.items() for name, tensor in group.items()}
        sections["vae"] = Section("", "svd", whole)
    for prefix, group in groups.items():
        component, naming = _SECTIONS[prefix]
        if component == "text_encoder" and _holds_images(group):
            component = IMAGE_ENCODER
        if all(map(STRAY.fullmatch, group)):
            rest |= {prefix + name: tensor for name, tensor in group.items()}
        elif component in sections:
            raise CheckpointError(
                f"{path}: has {component} twice, as {sections[component].prefix}* and {prefix}*; "
                "remove one of them"
            )
        else:
            sections[component] = _section(prefix, naming, group)
    return sections, averages, rest


def _holds_images(group: Mapping[str, LazyTensor]) -> bool:
    """Return True if these are a CLIP's tensors without its text encoder."""
    return "visual.proj" in group and not any(n.startswith("transformer.") for n in group)


def _section(prefix: str, naming: str, group: dict[str, LazyTensor]) -> Section:
    """Make a section. The names decide between two namings."""
    if naming == "ldm" and ("conv_in.weight" in group or "encoder.down_blocks.0" in _places(group)):
        naming = "diffusers"
    if any(name.endswith(".self_attn.in_proj.weight") for name in group):
        names = openclip_names(group)
        return Section(prefix, "openclip", {names[name]: group[name] for name in group})
    return Section(prefix, naming, group)


def _places(names: Iterable[str]) -> set[str]:
    """Return the first three parts of each name."""
    return {".".join(name.split(".")[:3]) for name in names}


class SingleFile:
    """A checkpoint in one file. Opening it checks everything that the headers show.

    Args:
        path: the file, in safetensors or PyTorch's format.
        config: a diffusers or converted folder. Its configs, scheduler and tokenizer are used, and
            its weights for parts that the file lacks.
        prediction_type: "epsilon", "v_prediction" or "sample". Overrides what the file, a .yaml
            beside it and the folder say.
        zero_snr: True if the model was trained to zero terminal SNR, False if not; likewise.
        ema: use the moving averages of the U-Net if the file has both.
        progress: called while the tokenizer's vocabulary is fetched.
    Attributes:
        family: see ModelSource.
        files: component -> its weights, for components in this file.
        ignored: (name, reason) of tensors that belong to no component.
        notes: guesses and omissions, one line each.
    Raises: CheckpointError, ConfigError, UsageError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        config: str | os.PathLike[str] | None = None,
        prediction_type: str | None = None,
        zero_snr: bool | None = None,
        ema: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.path = Path(path)
        if prediction_type is not None and prediction_type not in PREDICTIONS:
            raise UsageError(
                f"{argument('prediction_type')} {prediction_type!r} is unknown; expected "
                f"{', '.join(PREDICTIONS)}"
            )
        self._progress = progress
        file = open_file(self.path)
        if kind := detect.refused(file.tensors):
            raise CheckpointError(
                f"{self.path}: looks like {kind}, not a whole model; {recognise.use(kind)}"
            )
        self._sections, averages, rest = split(file.tensors, self.path)
        if not self._sections and not averages:
            raise CheckpointError(
                f"{self.path}: {recognise.refusal(file.tensors)}; it is not a whole model"
            )
        self._filled: dict[str, dict[str, LazyTensor]] = {}  # of components, not from the file
        own = {*self._sections, *(["unet"] if averages else [])}
        self.base = None if config is None else _open_base(Path(config), own)
        own = self._named_encoder(own)
        self.notes: tuple[str, ...] = file.notes
        self.ignored: tuple[tuple[str, str], ...] = file.ignored
        self._refused = file.refused
        structure = self._structure()
        self._marks = self._read_marks(file)
        self.notes += self._marks.notes
        asked = {"prediction_type": prediction_type, "zero_snr": zero_snr}
        if self.base is None:
            self._infer_configs(structure, asked)
        else:
            self._use_configs_of(self.base, own, structure, asked)
        check_process(self.scheduler_config, f"{self.path}: its scheduler_config.json")
        self.provenance: dict[str, Any] = {"source": self.path.name}
        if self.base is not None:
            self.provenance["config"] = self.base.provenance.get("source")
        if (said := self._marks.ema) is not None and said.value and averages and not ema:
            ema = True
            self.notes += (f"{argument('ema')}: {said.by} says true",)
        self._sort_remaining(averages, rest, ema)
        self.files: dict[str, ComponentFiles] = {
            name: self._map(name, section) for name, section in self._sections.items()
        }

    def _fault(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")

    def _named_encoder(self, own: set[str]) -> set[str]:
        """Name a lone OpenCLIP encoder by its model: SD 2's only one, or the refiner's second one.

        Returns: the components in the file.
        """
        section, unet = self._sections.get("text_encoder_2"), self._sections.get("unet")
        if section is None or section.naming != "openclip" or "text_encoder" in own:
            return own
        if self.base is not None:
            alone = "text_encoder_2" not in self.base.components
        else:
            alone = unet is not None and not SIZES.intersection(unet.tensors)
        if not alone:
            return own
        self._sections["text_encoder"] = self._sections.pop("text_encoder_2")
        return own - {"text_encoder_2"} | {"text_encoder"}

    # ------------------------------------------------------------------------------------- configs

    def _read_marks(self, file: Any) -> marks.Marks:
        """Read what the file, and a .yaml beside it, say about the training."""
        where = str(self.path)
        found = marks.of_tensors(file.tensors, where)
        found = found.over(marks.of_metadata(getattr(file, "metadata", {}), where))
        config, vae = original_config.beside(self.path), self._sections.get("vae")
        if config is not None and vae is not None and vae.naming == "svd":
            # It says nothing that the shapes do not, and much that other models do not have.
            self.notes += (f"{config.name}: not read; the file decides",)
            config = None
        return found if config is None else found.over(original_config.read(config))

    def _structure(self) -> Config | None:
        """Return the structure of the U-Net from its shapes. None: none, or a lone one."""
        section = self._sections.get("unet")
        if section is None or (section.naming != "ldm" and not section.prefix):
            return None
        try:
            return unet_structure(section.shapes)
        except Unrepresentable as error:
            if self.base is not None:
                return None  # the folder's config gives the structure
            raise self._fault(
                f"has a U-Net of an unknown structure ({error}); the file may be incomplete; if "
                f"not, give the model's configs with {_config()}"
            ) from None

    def _use_configs_of(
        self,
        base: DiffusersFolder | ConvertedFolder,
        own: set[str],
        structure: Config | None,
        asked: Mapping[str, Any],
    ) -> None:
        """Use the configs of a folder, and its weights for parts that the file lacks.

        What the marks of the file say counts more than the folder.
        """
        if foreign := [name for name in sorted(own) if name not in base.components]:
            raise self._fault(
                f"has a {' and a '.join(foreign)}, which {base.path} does not have; "
                "give the folder of a model of this kind"
            )
        if structure is not None:
            family = self._family(structure)
            if not _alike(family.name, base.family):
                known = {one.name: one.words for one in (*FAMILIES.values(), SVD)}
                raise self._fault(
                    f"is {family.words}, {base.path} is {known.get(base.family, base.family)}; "
                    "give the folder of a model of this kind"
                )
        self.family = base.family
        self.components = base.components
        self.model_index = dict(base.model_index)
        self.scheduler_config, notes = marks.settle(
            self._marks, base.scheduler_config, **asked, folder=str(base.path)
        )
        self.notes += notes
        self.image_noise_config = dict(base.image_noise_config)
        self._configs: dict[str, ComponentConfig] = {c: base.config(c) for c in base.components}
        self._documents = {
            name: content
            for name, content in base.documents().items()
            if not name.startswith("tokenizer")
        } | {"scheduler/scheduler_config.json": _json(self.scheduler_config)}
        if (scheduler := self.scheduler_config.get("_class_name")) is not None:
            entry: dict[str, Any] = {"scheduler": ["diffusers", scheduler]}
            index = json.loads(self._documents["model_index.json"])
            entry |= self._index_of_marks(self.config("unet").in_channels)
            self.model_index |= entry
            self._documents["model_index.json"] = _json(index | entry)
        self._change_config("unet", self._marks.unet, read_unet)
        self._change_config("vae", self._marks.vae, read_vae)
        if isinstance(base, DiffusersFolder):
            self.notes += base.notes
        taken = [name for name in base.components if name not in own]
        if taken:
            self.notes += (f"{', '.join(taken)}: used from {base.path}",)

    def _index_of_marks(self, channels: int) -> dict[str, Any]:
        """Return what the marks add to model_index.json, for a U-Net of these input channels."""
        edits = channels == 8 and self._marks.process is not None
        # CosXL Edit takes the picture's latents scaled; InstructPix2Pix models do not.
        return {"is_cosxl_edit": True} if edits else {}

    def _change_config(
        self, component: str, changes: Config, read: Callable[[Config, str], ComponentConfig]
    ) -> None:
        """Put what the marks say into the config that a folder gave."""
        document = f"{component}/config.json"
        data = json.loads(self._documents[document])
        if all(key in data and data[key] == value for key, value in changes.items()):
            return
        self._documents[document] = _json(data | changes)
        self._configs[component] = read(data | changes, f"{self.path}: {component}")
        self.notes += (f"{component}: {', '.join(changes)} as the file says, not the folder",)

    def _family(self, structure: Config) -> Family:
        text = [s for name, s in self._sections.items() if name.startswith("text")]
        naming = text[0].naming if len(text) == 1 else None
        return guess(structure, naming, self._sections)

    def _infer_configs(self, structure: Config | None, asked: Mapping[str, Any]) -> None:
        """Infer all configs from the names and shapes in the file."""
        if structure is None:
            what = "holds only moving averages of a U-Net (model_ema)"
            if "unet" in self._sections:
                what = "is a U-Net alone"
            elif self._sections:
                what = f"has no U-Net (only {', '.join(self._sections)})"
            raise self._fault(
                f"{what}; give its model with {_config()} (a diffusers or converted folder)"
            )
        family = self._family(structure)
        self._fill_normalizer(family)
        needed = [*family.text_encoders, "unet", "vae", *family.parts]
        found = {*self._sections, *self._filled}
        if missing := [name for name in needed if name not in found]:
            raise self._fault(
                f"is {family.words}, but has no {' and no '.join(missing)}; give a diffusers or "
                f"converted folder that has them, with {_config()}"
            )
        prediction = self._prediction(family, structure, asked["prediction_type"])
        scheduler = family.scheduler if prediction != "v_prediction" else family.v_scheduler
        scheduler = scheduler | {"prediction_type": prediction}
        self.scheduler_config, notes = marks.settle(self._marks, scheduler, **asked, folder=None)
        self.notes += notes
        self.image_noise_config = dict(family.image_noise)
        data = self._component_configs(family, structure, _size(family, prediction, self._marks))
        self.family = family.name
        self.components = tuple(name for name in COMPONENTS if name in data)
        self._configs = {}
        for name, one in data.items():
            where = f"{self.path}: {name} (derived from the file; {_config()} overrides it)"
            self._configs[name] = _READERS[name](one, where)
        self.model_index = {"_class_name": pipeline_class(family, structure), **family.index}
        self.model_index |= self._index_of_marks(structure["in_channels"])
        parts = OWN_PARTS.get(self.model_index["_class_name"], ())
        self.model_index |= {name: PART_CLASSES[name] for name in parts if name in PART_CLASSES}
        for name in ("scheduler", "text_encoder", "text_encoder_2", "unet", "vae"):
            if name == "scheduler":
                self.model_index[name] = ["diffusers", self.scheduler_config["_class_name"]]
            elif name.startswith("text"):
                there = name in data
                kind = data[name]["architectures"][0] if there else None
                self.model_index[name] = ["transformers" if there else None, kind]
                tokenizer = name.replace("text_encoder", "tokenizer")
                self.model_index[tokenizer] = (
                    ["transformers", "CLIPTokenizer"] if there else [None, None]
                )
            else:
                self.model_index[name] = ["diffusers", data[name]["_class_name"]]
        schedulers = {"scheduler": self.scheduler_config}
        for name in set(parts).intersection(IMAGE_NOISES):
            self.model_index[name] = ["diffusers", self.image_noise_config["_class_name"]]
            schedulers[name] = self.image_noise_config
        self._documents = {"model_index.json": _json(self.model_index)}
        self._documents |= {f"{n}/scheduler_config.json": _json(c) for n, c in schedulers.items()}
        self._documents |= {f"{name}/config.json": _json(one) for name, one in data.items()}
        if FEATURE_EXTRACTOR in parts:
            prepared = preparation(data[IMAGE_ENCODER]["image_size"])
            self._documents[f"{FEATURE_EXTRACTOR}/{PREPROCESSOR}"] = _json(prepared)

    def _component_configs(
        self, family: Family, structure: Config, size: tuple[int, int]
    ) -> dict[str, Config]:
        """Return the config.json of each component, for pictures of (height, width) pixels."""
        data: dict[str, Config] = {}
        try:
            for name, config in family.text_encoders.items():
                data[name] = config | text_structure(self._sections[name].shapes, family.name)
            read = svd_vae_structure if family is SVD else vae_structure
            vae = read(self._sections["vae"].shapes)
            if IMAGE_ENCODER in family.parts:
                data[IMAGE_ENCODER] = vision_structure(self._sections[IMAGE_ENCODER].shapes)
        except Unrepresentable as error:
            raise self._fault(f"is incomplete: {error}") from None
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        pooled = data.get("text_encoder_2", {}).get("projection_dim", 1280)
        try:
            unet = unet_config(family, structure, pooled)
        except CheckpointError as error:
            raise self._fault(str(error)) from None
        if family is SVD:
            unet["num_frames"] = self._frames()
        latents = [side // factor for side in size]
        square = latents[0] == latents[1]
        data["unet"] = unet | {"sample_size": latents[0] if square else latents} | self._marks.unet
        data["vae"] = family.vae | vae | {"sample_size": max(size)} | self._marks.vae
        if IMAGE_NORMALIZER in family.parts:
            width = data[IMAGE_ENCODER]["projection_dim"]
            data[IMAGE_NORMALIZER] = {"embedding_dim": width}
        if CC_PROJECTION in family.parts:
            width, inputs = self._sections[CC_PROJECTION].shapes["weight"]
            data[CC_PROJECTION] = {"in_channel": inputs, "out_channel": width}
        for name in (IMAGE_NORMALIZER, CC_PROJECTION):
            if name in data:
                data[name] = {"_class_name": PART_CLASSES[name][1], **data[name]}
        return data

    def _frames(self) -> int:
        """Return the number of frames that Stable Video Diffusion was trained on, by its name."""
        frames = 25 if _XT.search(self.path.stem) else 14
        self.notes += (
            f"frames: {frames} by the name of the file (14, or 25 with xt); {argument('frames')} "
            "gives another number",
        )
        return frames

    def _fill_normalizer(self, family: Family) -> None:
        """Add the mean and deviation of OpenCLIP's embeddings, 0 and 1, which no file holds.

        Raises: CheckpointError for OpenAI's, which are in a file of their own.
        """
        image = self._sections.get(IMAGE_ENCODER)
        if IMAGE_NORMALIZER not in family.parts or IMAGE_NORMALIZER in self._sections:
            return
        if image is None or "visual.proj" not in image.tensors:
            return  # reported as missing
        width = image.tensors["visual.proj"].shape[-1]
        if width == OPENAI_WIDTH:
            raise self._fault(
                "is Stable unCLIP l, whose mean and deviation of embeddings are not in the file "
                f"(noise_augmentor.data_mean); give its diffusers folder with {_config()}"
            )
        zero, one = (np.full((1, width), value, np.float32) for value in (0, 1))
        self._filled[IMAGE_NORMALIZER] = {
            "mean": LazyTensor(zero.shape, "F32", lambda: zero),
            "std": LazyTensor(one.shape, "F32", lambda: one),
        }
        self.notes += ("image_normalizer: mean 0 and deviation 1, as published for OpenCLIP",)

    def _prediction(self, family: Family, structure: Config, asked: str | None) -> str:
        """Return the prediction type.

        The first source that gives one counts: the caller; the marks; for SD 2, the spread of one
        bias, which is above 0.09 in the published v models (ComfyUI's rule); else the family.
        """
        if asked is not None:
            return asked
        if self._marks.prediction is not None:
            return str(self._marks.prediction.value)
        bias = self._sections["unet"].tensors
        mark = next((bias[name] for name in _V_MARKS if name in bias), None)
        if family is FAMILIES["sd2"] and structure["in_channels"] == 4 and mark is not None:
            spread = float(np.std(mark.read().astype(np.float32)))
            found = "v_prediction" if spread > _V_SPREAD else "epsilon"
            self.notes += (
                f"prediction type: {found}, guessed from one bias of the U-Net; if the pictures "
                f"are noise or flat, give the other one with {argument('prediction_type')}",
            )
            return found
        return family.prediction

    # ------------------------------------------------------------------------------------- weights

    def _sort_remaining(
        self, averages: dict[str, LazyTensor], rest: dict[str, LazyTensor], ema: bool
    ) -> None:
        """Use or ignore the moving averages. Ignore the rest, each with a reason."""
        stray = "left over from another naming; the text encoder has its own"
        reasons = {
            name: ignored_for(name, FILE_IGNORED)
            or (stray if STRAY.fullmatch(name) and _section_of(name) else None)
            for name in rest
        }
        raise_faults(
            str(self.path), unknown=[name for name, reason in reasons.items() if reason is None]
        )
        self.ignored += tuple((name, reason or "") for name, reason in reasons.items())
        if ema and not averages:
            raise UsageError(
                f"{self.path}: has no moving averages (model_ema); leave {argument('ema')} out"
            )
        if not averages:
            return
        plain = self._sections.get("unet")
        if plain is not None and not ema:
            self.ignored += tuple(
                (
                    _EMA + name,
                    f"moving averages; the plain weights are used ({argument('ema')} uses these)",
                )
                for name in averages
            )
            return
        layout = ldm_unet(self.config("unet"))
        known = ema_names(layout.names or ())
        raise_faults(
            f"{self.path} ({_EMA}*)",
            unknown=[name for name in averages if name not in known],
        )
        taken = {known[name]: tensor for name, tensor in averages.items()}
        self._sections["unet"] = Section("model.diffusion_model.", "ldm", taken)
        if plain is not None:
            self.ignored += tuple(
                (plain.prefix + name, f"the moving averages are used ({argument('ema')})")
                for name in plain.tensors
            )
        self.notes += ("unet: its moving averages (model_ema) are used",)

    def _map(self, component: str, section: Section) -> ComponentFiles:
        config = self.config(component)
        where = f"{self.path} ({section.prefix}*)" if section.prefix else str(self.path)
        layout = self._layout(component, section, config)
        refused = {
            name.removeprefix(section.prefix): what
            for name, what in self._refused.items()
            if name.startswith(section.prefix)
        }
        return map_component(self.path, section.tensors, layout, config, where, refused)

    def _layout(self, component: str, section: Section, config: ComponentConfig) -> Layout:
        if section.naming in ("clip", "diffusers"):
            return DIFFUSERS[component]
        if isinstance(config, UNet2DConditionConfig):
            return ldm_unet(config)
        if section.naming == "svd" and isinstance(config, AutoencoderKLTemporalDecoderConfig):
            return svd_vae(config)
        if isinstance(config, AutoencoderKLConfig):
            return ldm_vae(config)
        if isinstance(config, CLIPTextConfig):
            return openclip_text(config)
        if isinstance(config, CLIPVisionConfig):
            return openclip_vision(config)
        if component in _FILE_LAYOUTS:
            return _FILE_LAYOUTS[component]
        raise self._fault(
            f"its {component} is not the {type(config).__name__.removesuffix('Config')} of the "
            f"config; give the folder of a model of this kind with {_config()}"
        )

    # -------------------------------------------------------------------------------- a ModelSource

    def class_name(self, part: str) -> str | None:
        """See ModelFolder.class_name."""
        entry = self.model_index.get(part)
        return entry[1] if isinstance(entry, list) else None

    def config(self, component: str) -> Any:
        return self._configs[component]

    def tensors(self, component: str) -> dict[str, LazyTensor]:
        if component in self.files:
            return self.files[component].read(self.config(component))
        if component in self._filled:
            return dict(self._filled[component])
        assert self.base is not None
        return self.base.tensors(component)

    def tokenizer(self, name: str = "tokenizer") -> Tokenizer:
        from mlxdiff.tokenizer import Tokenizer

        if self.base is not None:
            tokenizer, folder = self.base.tokenizer(name), self.base.path / name
        else:
            folder = self._vocabulary
            tokenizer = Tokenizer.from_folder(folder, pad_token=pad_token(self.family, name))
        check_tokenizer(tokenizer, name, self._configs, str(folder))
        return tokenizer

    @cached_property
    def _vocabulary(self) -> Path:
        """Folder of the tokenizer's files: beside the file, or from the hub."""
        beside = self.path.absolute().parent / TOKENIZER
        if any((beside / name).is_file() for name in (*VOCABULARY_FILES, "tokenizer.json")):
            return beside
        try:
            return hub.fetch_files(VOCABULARY, VOCABULARY_FILES, progress=self._progress)
        except HubError as error:
            raise CheckpointError(
                f"{self.path}: a single file holds no tokenizer, and {error}; you can also put "
                f"{' and '.join(VOCABULARY_FILES)} of https://huggingface.co/{VOCABULARY} into "
                f"{beside}, or give a folder that has them with {_config()}"
            ) from None

    def documents(self) -> dict[str, bytes]:
        if self.base is not None:
            tokenizers = {
                name: content
                for name, content in self.base.documents().items()
                if name.startswith("tokenizer")
            }
            return self._documents | tokenizers
        folders = [
            name.replace("text_encoder", "tokenizer")
            for name in self.components
            if name.startswith("text")
        ]
        return self._documents | {
            f"{folder}/{file}": read_document(self._vocabulary / file)
            for folder in folders
            for file in TOKENIZER_FILES
            if (self._vocabulary / file).is_file()
        }

    def source_files(self) -> dict[str, Path]:
        """Return every file that weights are read from: name -> path."""
        files = {self.path.name: self.path}
        if isinstance(self.base, DiffusersFolder):
            for name in self.components:
                if name not in self.files:
                    for path in shard_files(self.base.files[name].entry):
                        files[f"{self.base.path.name}/{name}/{path.name}"] = path
        return files

    def beside_files(self, tokenizer: bool) -> dict[str, Path]:
        """Return the files that are read beside this one: name -> path.

        Args:
            tokenizer: whether the tokenizer is read.
        """
        config = original_config.beside(self.path)
        files = {} if config is None else {config.name: config}
        if tokenizer and self.base is None:
            there = [self._vocabulary / name for name in TOKENIZER_FILES]
            files |= {f"{TOKENIZER}/{path.name}": path for path in there if path.is_file()}
        return files


def _config() -> str:
    return argument("config", form="FOLDER")


def _alike(family: str, other: str) -> bool:
    """Return True if one model's configs can be those of another. Shapes show the rest."""
    return all(family.startswith(one) == other.startswith(one) for one in ("sdxl", "svd"))


def _section_of(name: str) -> str | None:
    """Return the prefix of the component that a name belongs to, or None."""
    return next((prefix for prefix in _SECTIONS if name.startswith(prefix)), None)


def _open_base(path: Path, own: Collection[str]) -> DiffusersFolder | ConvertedFolder:
    if not path.is_dir():
        raise UsageError(
            f"{argument('config')}: {path}: no such folder; give a diffusers or converted folder"
        )
    if (path / MANIFEST).is_file():
        return open_folder(path)
    return DiffusersFolder(path, without=own)


def _size(family: Family, prediction: str, said: marks.Marks) -> tuple[int, int]:
    """Return (height, width) of the pictures in pixels, from the marks or from the family."""
    if said.size is not None:
        height, width = said.size.value
        return height, width
    if family is FAMILIES["sd2"] and prediction == "v_prediction":
        return 768, 768
    return family.size, family.size


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
