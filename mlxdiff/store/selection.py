"""Selection of the files that a model needs, from all files of a repo on the hub.

Source: diffusers' file names for variants and shards.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mlxdiff.errors import HubError, argument
from mlxdiff.store.reference import SINGLE_FILE_SUFFIXES, WEIGHT_SUFFIXES, Reference

COMPONENTS = (
    "scheduler",
    "low_res_scheduler",
    "tokenizer",
    "tokenizer_2",
    "text_encoder",
    "text_encoder_2",
    "unet",
    "vae",
    "image_encoder",
    "image_normalizer",
    "image_noising_scheduler",
    "cc_projection",
)
"""The folders of a diffusers repo that mlxdiff reads."""

PREFERRED_VARIANT = "fp16"

INDEX = "model_index.json"
"""The file that makes a repo a model in diffusers' format."""

_WITHOUT_WEIGHTS: dict[str, tuple[set[str], ...]] = {
    "scheduler": ({"scheduler_config.json"},),
    "low_res_scheduler": ({"scheduler_config.json"},),
    "image_noising_scheduler": ({"scheduler_config.json"},),
    "tokenizer": ({"tokenizer.json"}, {"vocab.json", "merges.txt"}),
    "tokenizer_2": ({"tokenizer.json"}, {"vocab.json", "merges.txt"}),
}
"""Component -> alternative sets of files. The component needs one set."""
_OPTIONAL = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<a>\w+))?"
    r"(?P<shard>-\d{5}-of-\d{5})?(?:\.(?P<b>\w+))?\.(?P<kind>safetensors|bin)"
    r"(?P<index>(?:\.(?P<c>\w+))?\.index(?:\.(?P<d>\w+))?\.json)?"
)


class Incomplete(Exception):
    """A folder or listing lacks a part of a model. The text names the part."""


class Unusable(Exception):
    """A repo cannot be used, and more files would not help. The text gives the reason."""


@dataclass(frozen=True)
class File:
    """A file of a repo.

    Attributes:
        size: bytes.
        digest: sha256 of a large file or git's sha1 of a small one, in hex; "" if unknown.
    """

    size: int
    digest: str


@dataclass(frozen=True)
class Listing:
    """The files that a model needs, at one commit. They may not be fetched yet.

    Attributes:
        reference: the requested model.
        commit: commit of the requested revision.
        files: path in the repo -> File.
        entry: the model's place in the repo: "" for the root, a folder, or a file.
        components: parts that must be present if model_index.json names them.
        is_current: True if the hub confirmed this listing, or if it needs no confirmation.
    """

    reference: Reference
    commit: str
    files: Mapping[str, File]
    entry: str = ""
    components: tuple[str, ...] = ()
    is_current: bool = True

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify the contents of the files, independent of the commit."""
        lines = [
            f"{name} {file.digest or f'{self.reference.name} {self.commit}'}\n"
            for name, file in sorted(self.files.items())
        ]
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


class Selection(NamedTuple):
    """The files that a model needs.

    Attributes:
        files: paths in the repo.
        entry: see `Listing`.
    """

    files: set[str]
    entry: str = ""


Select = Callable[[set[str], bool], Selection]
"""Selects from the paths of a repo. The second argument is True if these are all its paths.

Raises: Incomplete, Unusable.
"""


def needed_files(
    files: Iterable[str], variant: str | None = None, components: Sequence[str] = COMPONENTS
) -> list[str]:
    """Select the files of a diffusers repo that mlxdiff needs.

    The selection never holds other variants, ONNX, Flax or OpenVINO files, pickles beside
    safetensors files, single-file checkpoints, or the safety checker.

    Args:
        files: all paths in the repo, with "/".
        variant, components: see `hub.resolve`.

    Raises:
        HubError: the repo is not a diffusers model, or has no readable weights.
    """
    try:
        return sorted(select_diffusers(set(files), variant, components))
    except (Incomplete, Unusable) as error:
        raise HubError(f"the repo cannot be used: {error}") from None


def model_selector(
    reference: Reference, variant: str | None, components: Sequence[str] = COMPONENTS
) -> Select:
    """Select a whole model: the named file, a diffusers model, or the only checkpoint file."""

    def select(files: set[str], is_complete: bool) -> Selection:
        if reference.file:
            if reference.file not in files:
                raise Incomplete(f"{reference.file} is missing")
            return Selection({reference.file}, reference.file)
        if INDEX not in files:
            single = _only_checkpoint(files, reference.name)
            return Selection({single}, single)
        return Selection(select_diffusers(files, variant, components, is_complete))

    return select


def component_selector(component: str, variant: str | None) -> Select:
    """Select one component: from its folder in a model's repo, or from the root of its own repo."""

    def select(files: set[str], is_complete: bool) -> Selection:
        folder = component if f"{component}/config.json" in files else ""
        names = {f.rpartition("/")[2] for f in files if f.rpartition("/")[0] == folder}
        if "config.json" not in names:
            raise Unusable(f"it holds no {component}/config.json, nor a config.json alone")
        weights = _pick_weights(_weights_by_variant(names), variant, folder or "it", is_complete)
        chosen = {"config.json"} | weights
        return Selection({f"{folder}/{name}" if folder else name for name in chosen}, folder)

    return select


BESIDE_CLIP = frozenset(
    """preprocessor_config.json merges.txt vocab.json tokenizer.json tokenizer_config.json
    special_tokens_map.json added_tokens.json""".split()
)
"""What a CLIP needs beside config and weights, where it has it."""


def clip_selector(variant: str | None) -> Select:
    """Select a CLIP with its tokenizer and the preparation of its pictures."""

    def select(files: set[str], is_complete: bool) -> Selection:
        names = {file for file in files if "/" not in file}
        if "config.json" not in names:
            raise Unusable("it holds no config.json, so it is no CLIP")
        if not names & {"merges.txt", "tokenizer.json"}:
            words = "it holds no tokenizer (merges.txt or tokenizer.json)"
            raise Unusable(words) if is_complete else Incomplete(words)
        weights = _pick_weights(_weights_by_variant(names), variant, "it", is_complete)
        return Selection({"config.json"} | weights | (BESIDE_CLIP & names), "")

    return select


ADAPTERS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""Names under which diffusers and PEFT publish a LoRA."""


def lora_selector(reference: Reference) -> Select:
    """Select a LoRA: the named file, one of ADAPTERS, or the only weight file in the root."""

    def select(files: set[str], is_complete: bool) -> Selection:
        if reference.file:
            file = reference.file
            if file not in files:
                raise Incomplete(f"{file} is missing")
        else:
            file = _only_lora(files, reference.name)
        beside = file.rpartition("/")[0]
        config = f"{beside}/adapter_config.json" if beside else "adapter_config.json"
        return Selection({file} | ({config} & files), file)

    return select


def _only_lora(files: set[str], name: str) -> str:
    """Return the file of the LoRA in a repo. Raises: Unusable."""
    for known in ADAPTERS:
        if known in files:
            return known
    in_root = sorted(file for file in files if "/" not in file and file.endswith(WEIGHT_SUFFIXES))
    candidates = [file for file in in_root if file.endswith(".safetensors")] or in_root
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise Unusable("it holds no file of weights, so it is no LoRA")
    listed = ", ".join(f"{name}/{file}" for file in candidates[:6])
    more = f" and {len(candidates) - 6} more" if len(candidates) > 6 else ""
    raise Unusable(f"it holds {len(candidates)} files that may be a LoRA; name one: {listed}{more}")


def file_selector(wanted: Sequence[str]) -> Select:
    """Select exactly these files."""

    def select(files: set[str], is_complete: bool) -> Selection:
        if missing := [file for file in wanted if file not in files]:
            raise Incomplete(f"it has no {' and no '.join(missing)}")
        return Selection(set(wanted))

    return select


def select_diffusers(
    files: set[str], variant: str | None, components: Sequence[str], is_complete: bool = True
) -> set[str]:
    """Select the files of a diffusers model; see `needed_files`. Raises: Incomplete, Unusable."""
    if INDEX not in files:
        raise Unusable(f"it holds no {INDEX}, so it is not a model in diffusers' format")
    folders: dict[str, set[str]] = {}
    for file in files:
        folder, _, name = file.partition("/")
        if folder in components and name and "/" not in name:
            folders.setdefault(folder, set()).add(name)
    wanted = {INDEX, "mlxdiff.json"} & files
    if "image_encoder" in folders:
        wanted |= {"feature_extractor/preprocessor_config.json"} & files
    if "unet" in components and "unet" not in folders and "config.json" in files:
        # The first pixel-space models keep the U-Net and the scheduler in the root.
        folders[""] = {file for file in files if "/" not in file}
        wanted |= {"scheduler_config.json"} & files
    variants = set()
    for folder, names in sorted(folders.items()):
        if folder in _WITHOUT_WEIGHTS:
            choices = _WITHOUT_WEIGHTS[folder]
            if not any(choice <= names for choice in choices):
                missing = " or ".join(" and ".join(sorted(choice)) for choice in choices)
                raise Incomplete(f"{folder}/ has no {missing}")
            chosen = names & _OPTIONAL.union(*choices)
        else:
            if "config.json" not in names:
                raise Incomplete(f"{folder}/ has no config.json")
            weights = _weights_by_variant(names)
            variants |= {name for _, name in weights}
            chosen = {"config.json"}
            chosen |= _pick_weights(weights, variant, folder or "unet", is_complete)
        wanted |= {f"{folder}/{name}" if folder else name for name in chosen}
    if variant and variant not in variants:
        known = ", ".join(sorted(filter(None, variants))) or "none"
        raise Unusable(f"it has no variant {variant!r} (its variants: {known})")
    return wanted


def _only_checkpoint(files: set[str], name: str) -> str:
    """Return the checkpoint file of a repo without a diffusers model. Raises: Unusable."""
    in_root = sorted(
        file
        for file in files
        if "/" not in file
        and file.endswith(SINGLE_FILE_SUFFIXES)
        and not ("config.json" in files and _WEIGHTS.fullmatch(file))
    )
    candidates = [file for file in in_root if file.endswith(".safetensors")] or in_root
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        listed = ", ".join(f"{name}/{file}" for file in candidates[:6])
        more = f" and {len(candidates) - 6} more" if len(candidates) > 6 else ""
        raise Unusable(f"it holds {len(candidates)} checkpoint files; name one: {listed}{more}")
    if "config.json" in files:
        raise Unusable(
            f"it holds no {INDEX}, only one component; give a VAE, ControlNet or adapter together "
            f"with a model, with its own option ({argument('vae')}, ...)"
        )
    raise Unusable(f"it holds neither a {INDEX} nor a checkpoint file, so it is not a model")


_Weights = dict[tuple[str, str], set[str]]
"""(file kind, variant or "") -> one file, or an index and its shards."""


def _weights_by_variant(names: set[str]) -> _Weights:
    single: _Weights = {}
    shards: _Weights = {}
    indexed = set()
    for name in names:
        match = _WEIGHTS.fullmatch(name)
        if match is None:
            continue
        key = match["kind"], next((match[group] for group in "abcd" if match[group]), "")
        if match["index"]:
            indexed.add(key)
        elif not match["shard"]:
            single[key] = {name}
            continue
        shards.setdefault(key, set()).add(name)
    return {key: found for key, found in shards.items() if key in indexed} | single


def _pick_weights(
    weights: _Weights, variant: str | None, folder: str, is_complete: bool
) -> set[str]:
    """Pick the files of the best variant. A complete repo with one variant gives that variant."""
    kinds, order = ("safetensors", "bin"), (variant or "", "")
    if variant is None:
        order = (PREFERRED_VARIANT, "")
        choices = [(kind, name) for kind in kinds for name in order]
    else:
        choices = [(kind, name) for name in order for kind in kinds]
    for choice in choices:
        if choice in weights:
            return weights[choice]
    if is_complete and len(weights) == 1 and not variant:
        return next(iter(weights.values()))
    others = ", ".join(sorted({name for _, name in weights}))
    has = f" (only the variants {others})" if weights else ""
    raise Incomplete(f"{folder}/ has no safetensors weights and no .bin{has}")
