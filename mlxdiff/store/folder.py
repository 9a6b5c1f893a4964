"""The converted folder: read, write, verify; what a model is, converted or not.

The folder is described in docs/checkpoint-format.md; its tensors lie in safetensors files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mlxdiff._version import __version__
from mlxdiff.errors import CheckpointError, ConfigError, UsageError
from mlxdiff.machine.disk import read_json, sha256
from mlxdiff.networks.config import (
    CLIPTextConfig,
    ComponentConfig,
    UNet2DConfig,
    read_unet,
    read_vae,
)
from mlxdiff.networks.params import check_parameters, expected_parameters
from mlxdiff.weights.quantization import Packed, Quantization
from mlxdiff.weights.tensors import (
    DTYPES,
    FLOATS,
    LazyTensor,
    QuantizedTensor,
    open_weights,
    quantized,
    raise_faults,
    stored_arrays,
    stored_bytes,
    write_safetensors,
)

if TYPE_CHECKING:
    from mlxdiff.tokenizer import Tokenizer

FORMAT_VERSION = 1
"""Of a folder with floating-point weights."""

QUANTIZED_VERSION = 2
"""Of a folder with quantized weights, which readers of version 1 do not know."""

MANIFEST = "mlxdiff.json"
COMPONENTS = ("text_encoder", "text_encoder_2", "unet", "vae")
TOKENIZERS = ("tokenizer", "tokenizer_2")
LOW_RES_SCHEDULER = "low_res_scheduler"
"""The part of an upscaler that says what noise is added to the picture it is shown."""
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
SHARD_BYTES = 5_000_000_000

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and what is being worked on."""


class ModelSource(Protocol):
    """What a pipeline needs of a model, converted or not."""

    @property
    def path(self) -> Path:
        """Where it lies."""

    @property
    def family(self) -> str:
        """ "sd1", "sd2", "sdxl", "sdxl-refiner"; "ddpm" for a U-Net alone, in pixel space."""

    @property
    def components(self) -> tuple[str, ...]:
        """Those of COMPONENTS that the model has."""

    @property
    def model_index(self) -> dict[str, Any]:
        """model_index.json."""

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """scheduler_config.json."""

    @property
    def low_res_scheduler_config(self) -> dict[str, Any]:
        """The same of an upscaler's low_res_scheduler; empty for all other models."""

    @property
    def provenance(self) -> dict[str, Any]:
        """Origin of the weights: source, revision and, once converted, sha256 of each file."""

    def config(self, component: str) -> Any:
        """The component's config; a CLIPTextConfig, UNetConfig or VAEConfig."""

    def tensors(self, component: str) -> dict[str, LazyTensor]:
        """Every tensor, with our name and layout, complete and checked; the caller's to pop."""

    def tokenizer(self, name: str = "tokenizer") -> Tokenizer:
        """The tokenizer, padding as its files say or else as the family does."""

    def documents(self) -> dict[str, bytes]:
        """All files but the weights: relative path -> content."""


def pad_token(family: str, tokenizer: str) -> str:
    """What a tokenizer pads with where its own files do not say.

    SD 2 and the second encoder of SDXL are OpenCLIP models, padded with id 0.
    """
    return "!" if family == "sd2" or tokenizer == "tokenizer_2" else "<|endoftext|>"


class ModelFolder:
    """A folder in the shape that diffusers writes: model_index.json and a folder for each part.

    The common ground of converted and unconverted models; subclasses say what the tensors are.
    Raises: CheckpointError or ConfigError on opening, for a missing or malformed file.
    """

    family: str

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.model_index: dict[str, Any] = read_json(self.path / "model_index.json")
        self.components: tuple[str, ...] = tuple(c for c in COMPONENTS if self.class_name(c))
        self._configs = {name: self._read_config(name) for name in self.components}
        self.scheduler_config: dict[str, Any] = read_json(
            self.place("scheduler") / "scheduler_config.json"
        )
        self.low_res_scheduler_config: dict[str, Any] = {}
        if self.class_name(LOW_RES_SCHEDULER):
            where = self.path / LOW_RES_SCHEDULER / "scheduler_config.json"
            self.low_res_scheduler_config = read_json(where)

    def class_name(self, part: str) -> str | None:
        """Class that model_index.json gives for a part; None where the model does not have it."""
        entry = self.model_index.get(part)
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
            return None
        return entry[1]

    def place(self, part: str) -> Path:
        """The folder of a part; the root for the first pixel-space models, which have none."""
        folder = self.path / part
        return folder if folder.is_dir() else self.path

    def _read_config(self, component: str) -> ComponentConfig:
        where = self.place(component) / "config.json"
        data = read_json(where)
        if component == "unet":
            return read_unet(data, str(where))
        if component == "vae":
            return read_vae(data, str(where))
        projects = self.class_name(component) == "CLIPTextModelWithProjection"
        return CLIPTextConfig.from_dict(data, str(where), with_projection=projects)

    def config(self, component: str) -> Any:
        return self._configs[component]

    def tokenizer(self, name: str = "tokenizer") -> Tokenizer:
        from mlxdiff.tokenizer import Tokenizer

        folder = self.path / name
        files = (folder / "tokenizer_config.json", folder / "special_tokens_map.json")
        if any("pad_token" in read_json(file) for file in files if file.is_file()):
            return Tokenizer.from_folder(folder)
        return Tokenizer.from_folder(folder, pad_token=pad_token(self.family, name))

    def document_paths(self) -> dict[str, Path]:
        """What ``documents`` holds: relative path there -> where the file lies."""
        files = [("scheduler", "scheduler_config.json")]
        if self.low_res_scheduler_config:
            files.append((LOW_RES_SCHEDULER, "scheduler_config.json"))
        files += [(name, "config.json") for name in self.components]
        files += [(name, file) for name in TOKENIZERS for file in TOKENIZER_FILES]
        paths = {f"{part}/{file}": self.place(part) / file for part, file in files}
        paths = {"model_index.json": self.path / "model_index.json", **paths}
        return {name: path for name, path in paths.items() if path.is_file()}

    def documents(self) -> dict[str, bytes]:
        return {name: path.read_bytes() for name, path in self.document_paths().items()}


class ConvertedFolder(ModelFolder):
    """A folder that ``write_folder`` made, its manifest and headers checked."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        self.manifest = _read_manifest(path)
        self.family = self.manifest["family"]
        super().__init__(path)
        pixels = isinstance(self._configs.get("unet"), UNet2DConfig)
        if not ({"unet"} if pixels else {"unet", "vae"}) <= set(self.components):
            raise CheckpointError(f"{path}: model_index.json lacks unet or vae; convert again")
        for name, entry in self.manifest["files"].items():
            _check_size(path / name, entry["bytes"])
        self._tensors = {name: self._open(name) for name in self.components}

    def _open(self, component: str) -> dict[str, LazyTensor]:
        folder = self.path / component
        index = folder / "model.safetensors.index.json"
        stored = open_weights(index if index.is_file() else folder / "model.safetensors")
        tensors = self._assemble(component, stored)
        check_parameters(
            {n: t.shape for n, t in tensors.items()}, self.config(component), str(folder)
        )
        raise_faults(
            str(folder),
            mistyped=[f"{n} ({t.dtype})" for n, t in tensors.items() if t.dtype not in FLOATS],
        )
        return tensors

    def _assemble(self, component: str, stored: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        """The tensors of what is stored: weight, scales and biases of a quantized one are one."""
        how_of = {
            name: Quantization.parse(text)
            for text, names in self.quantization.get("tensors", {}).get(component, {}).items()
            for name in names
        }
        where, expected = str(self.path / component), expected_parameters(self.config(component))
        raise_faults(
            f"{where}, quantized as {MANIFEST} says",
            unknown=[n for n in how_of if n not in expected],
        )
        tensors: dict[str, LazyTensor] = {}
        missing, misshapen = [], []
        rest = dict(stored)
        for name, how in how_of.items():
            stem, parts = name.removesuffix("weight"), {}
            template = quantized(expected[name], self._float_type, how, _never)
            for part, (shape, kind) in template.parts().items():
                found = rest.pop(stem + part, None)
                if found is None:
                    missing.append(stem + part)
                elif (found.shape, found.dtype) != (shape, kind):
                    misshapen.append(
                        f"{stem + part} is {found.dtype} {found.shape}, expected {kind} {shape}"
                    )
                else:
                    parts[part] = found
            tensors[name] = quantized(
                expected[name], self._float_type, how, partial(_read_packed, parts, how)
            )
        raise_faults(where, missing=missing, misshapen=misshapen)
        tensors |= rest
        return {name: tensors[name] for name in (*expected, *tensors) if name in tensors}

    @property
    def quantization(self) -> dict[str, Any]:
        """ "recipe", and "tensors": component -> how -> names; empty where nothing is quantized."""
        return dict(self.manifest.get("quantization", {}))

    @property
    def recipe(self) -> str | None:
        """Name of the recipe that it was quantized by; None where it was not."""
        return self.quantization.get("recipe")

    @property
    def _float_type(self) -> str:
        return DTYPES[self.dtype]

    @property
    def dtype(self) -> str:
        """Type of the stored weights, "float16" for example."""
        return str(self.manifest["dtype"])

    @property
    def provenance(self) -> dict[str, Any]:
        return dict(self.manifest["source"])

    def tensors(self, component: str) -> dict[str, LazyTensor]:
        return dict(self._tensors[component])

    def verify(self) -> None:
        """Hold every file against the sha256 in the manifest. Raises: CheckpointError."""
        for name, entry in self.manifest["files"].items():
            if sha256(self.path / name) != entry["sha256"]:
                raise CheckpointError(
                    f"{self.path / name}: changed since it was written; convert again"
                )


def _read_packed(parts: Mapping[str, LazyTensor], how: Quantization) -> Packed:
    biases = parts["biases"].read() if "biases" in parts else None
    return Packed(parts["weight"].read(), parts["scales"].read(), biases, how)


def _never() -> Packed:
    raise AssertionError("a template has no values")


def _read_manifest(path: Path) -> dict[str, Any]:
    """mlxdiff.json, of a version that we know and with the keys that we write."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    where = path / MANIFEST
    if not where.is_file():
        raise CheckpointError(f"{path}: not a converted folder (it has no {MANIFEST})")
    try:
        manifest = read_json(where)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    version = manifest.get("format_version")
    if version not in (FORMAT_VERSION, QUANTIZED_VERSION):
        raise CheckpointError(
            f"{where}: format version {version!r} is unknown to mlxdiff {__version__}, "
            f"which reads {FORMAT_VERSION} and {QUANTIZED_VERSION}; convert the model again, or "
            "update mlxdiff"
        )
    files = manifest.get("files")
    sound = (
        isinstance(manifest.get("family"), str)
        and manifest.get("dtype") in tuple(DTYPES)
        and isinstance(manifest.get("source"), dict)
        and isinstance(files, dict)
        and all(
            isinstance(e, dict) and type(e.get("bytes")) is int and isinstance(e.get("sha256"), str)
            for e in files.values()
        )
    )
    if not sound:
        raise CheckpointError(f"{where}: family, dtype, source or files is missing or malformed")
    if ("quantization" in manifest) != (version == QUANTIZED_VERSION):
        raise CheckpointError(f"{where}: version {version} does not go with its quantization")
    if version == QUANTIZED_VERSION and not _is_quantization(manifest["quantization"]):
        raise CheckpointError(f"{where}: quantization is malformed; convert the model again")
    return manifest


def _is_quantization(data: Any) -> bool:
    """Whether this is {"recipe": text, "tensors": {component: {how: [names]}}}."""
    return (
        isinstance(data, dict)
        and isinstance(data.get("recipe"), str)
        and isinstance(data.get("tensors"), dict)
        and all(
            isinstance(kinds, dict)
            and all(
                isinstance(names, list) and all(isinstance(n, str) for n in names)
                for names in kinds.values()
            )
            for kinds in data["tensors"].values()
        )
    )


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing from the converted folder; convert again")
    found = path.stat().st_size
    if found != expected:
        raise CheckpointError(
            f"{path}: truncated or changed: {expected} bytes expected, {found} found; convert again"
        )


def open_folder(path: str | os.PathLike[str]) -> ConvertedFolder:
    """Open a converted folder: manifest, file sizes, names and shapes of all tensors are checked.

    Raises: CheckpointError that names what is wrong; ConfigError for a config file.
    """
    return ConvertedFolder(path)


def write_folder(
    source: ModelSource,
    dest: str | os.PathLike[str],
    dtype: str = "float16",
    *,
    provenance: Mapping[str, Any] | None = None,
    recipe: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a model as a converted folder; the same source gives the same bytes.

    It is written beside ``dest`` under a temporary name and renamed whole, so that after any
    failure or interruption nothing new is there.

    Args:
        source: the model; its QuantizedTensors are written as they are.
        dest: folder to make; its parents are made too.
        dtype: type of all weights, "float16", "bfloat16" or "float32".
        recipe: name of the quantization recipe, for the manifest.
        provenance: what the manifest says of the source; default: ``source.provenance``.
        force: replace ``dest`` if it is a converted folder (nothing else is ever replaced).
        progress: called after each tensor.
        shard_bytes: a component that takes more is split into files of at most this size.
    Returns: dest.
    Raises: UsageError (dest, dtype, space), CheckpointError (a tensor that cannot be read or
        stored).
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    dest = Path(dest)
    tensors = {name: source.tensors(name) for name in source.components}
    total = sum(stored_bytes(t, dtype) for part in tensors.values() for t in part.values())
    done = 0

    def advance(size: int, name: str) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total, name)

    with _new_folder(dest, total, force) as folder:
        files: dict[str, bytes] = dict(source.documents())
        digests: dict[str, str] = {}
        for component, part in tensors.items():
            (folder / component).mkdir()
            shards = _shards(part, dtype, shard_bytes)
            for file, members in shards.items():
                digests[f"{component}/{file}"] = write_safetensors(
                    folder / component / file,
                    members,
                    dtype,
                    lambda size, name, c=component: advance(size, f"{c}/{name}"),  # type: ignore[misc]
                )
            if len(shards) > 1:
                size = sum(stored_bytes(t, dtype) for t in part.values())
                weight_map = {
                    stored: file
                    for file, members in shards.items()
                    for name, tensor in members.items()
                    for stored in stored_arrays(name, tensor, dtype)
                }
                files[f"{component}/model.safetensors.index.json"] = _json(
                    {"metadata": {"total_size": size}, "weight_map": weight_map}
                )
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
            digests[name] = hashlib.sha256(content).hexdigest()
        packed = _quantization_table(tensors)
        manifest = {
            "format_version": QUANTIZED_VERSION if packed else FORMAT_VERSION,
            "mlxdiff": __version__,
            "family": source.family,
            "dtype": dtype,
            **({"quantization": {"recipe": recipe, "tensors": packed}} if packed else {}),
            "source": dict(source.provenance if provenance is None else provenance),
            "files": {
                name: {"bytes": (folder / name).stat().st_size, "sha256": digests[name]}
                for name in sorted(digests)
            },
        }
        (folder / MANIFEST).write_bytes(_json(manifest))
    return dest


def _shards(
    tensors: Mapping[str, LazyTensor], dtype: str, limit: int
) -> dict[str, dict[str, LazyTensor]]:
    """Split into files of at most ``limit`` bytes (a larger tensor gets its own), by file name."""
    groups: list[dict[str, LazyTensor]] = [{}]
    room = limit
    for name, tensor in tensors.items():
        size = stored_bytes(tensor, dtype)
        if size > room and groups[-1]:
            groups.append({})
            room = limit
        groups[-1][name] = tensor
        room -= size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    total = len(groups)
    return {f"model-{i:05d}-of-{total:05d}.safetensors": g for i, g in enumerate(groups, 1)}


def _quantization_table(
    tensors: Mapping[str, Mapping[str, LazyTensor]],
) -> dict[str, dict[str, list[str]]]:
    """Component -> how -> names of the tensors that are stored so."""
    table: dict[str, dict[str, list[str]]] = {}
    for component, part in tensors.items():
        for name, tensor in part.items():
            if isinstance(tensor, QuantizedTensor):
                by_kind = table.setdefault(component, {})
                by_kind.setdefault(str(tensor.quantization), []).append(name)
    return table


@contextmanager
def _new_folder(dest: Path, size: int, force: bool) -> Iterator[Path]:
    """A temporary folder that becomes ``dest`` when the block ends well, and goes otherwise."""
    check_dest(dest, force)
    parents = [p for p in dest.absolute().parents if not p.exists()]
    temporary = dest.absolute().with_name(f".{dest.name}.{uuid.uuid4().hex[:8]}.partial")
    old = temporary.with_suffix(".old")
    try:
        try:
            temporary.mkdir(parents=True)
            free = shutil.disk_usage(temporary).free
            if free < size:
                raise UsageError(
                    f"{dest}: needs {size / 1e9:.2f} GB, only {free / 1e9:.2f} GB are free there"
                )
            yield temporary
            if dest.exists():
                check_dest(dest, force)  # it may have come into being meanwhile
                dest.rename(old)
            temporary.rename(dest)
        except OSError as error:
            raise UsageError(f"{dest}: cannot be written ({error.strerror or error})") from error
    except BaseException:
        if old.exists() and not dest.exists():
            old.rename(dest)
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in parents:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_dest(dest: str | os.PathLike[str], force: bool) -> None:
    """Whether a converted folder may be written there. Raises: UsageError."""
    dest = Path(dest)
    if not os.path.lexists(dest):
        return
    if not force:
        raise UsageError(
            f"{dest} exists already; give another name, or force (--force) to replace it"
        )
    if (
        dest.is_symlink()
        or not dest.is_dir()
        or not ((dest / MANIFEST).is_file() or not any(dest.iterdir()))
    ):
        raise UsageError(
            f"{dest} is not a converted folder, so it is not replaced; remove it yourself"
        )


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
