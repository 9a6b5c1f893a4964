"""The converted folder: read, write, verify. Also the interface of a model, converted or not.

docs/checkpoint-format.md describes the folder. Its tensors are in safetensors files.
"""

from __future__ import annotations

import glob
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

import numpy as np

from mlxdiff._version import __version__
from mlxdiff.errors import CheckpointError, ConfigError, UsageError, argument
from mlxdiff.machine.disk import read_document, read_json, sha256
from mlxdiff.machine.temporary import claimed_folder, remove_leftovers
from mlxdiff.networks.config import (
    CCProjectionConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    ComponentConfig,
    ImageNormalizerConfig,
    UNet2DConfig,
    read_unet,
    read_vae,
)
from mlxdiff.networks.params import check_parameters, expected_parameters
from mlxdiff.samplers.process import check_process, is_edm
from mlxdiff.store.reference import is_repo_path
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
"""Version of a folder with floating-point weights."""

QUANTIZED_VERSION = 2
"""Version of a folder with quantized weights. Readers of version 1 do not know them."""

GLOBAL_SCALE_VERSION = 3
"""Version of a folder where quantized weights have a factor for the whole tensor beside them."""

VERSIONS = (FORMAT_VERSION, QUANTIZED_VERSION, GLOBAL_SCALE_VERSION)

MANIFEST = "mlxdiff.json"
TRAINED = "training.json"
"""What training writes beside its result: how it was made. Such a folder may be replaced, too."""
_OURS = (MANIFEST, TRAINED)
IMAGE_ENCODER, IMAGE_NORMALIZER, CC_PROJECTION = (
    "image_encoder",
    "image_normalizer",
    "cc_projection",
)
COMPONENTS = (
    "text_encoder",
    "text_encoder_2",
    "unet",
    "vae",
    IMAGE_ENCODER,
    IMAGE_NORMALIZER,
    CC_PROJECTION,
)
TOKENIZERS = ("tokenizer", "tokenizer_2")
LOW_RES_SCHEDULER = "low_res_scheduler"
"""The part of an upscaler that describes the noise added to its input picture."""
IMAGE_NOISING_SCHEDULER = "image_noising_scheduler"
"""The part of Stable unCLIP that describes the noise added to CLIP's embedding of a picture."""
IMAGE_NOISES = LOW_RES_SCHEDULER, IMAGE_NOISING_SCHEDULER
"""The parts that describe the noise added to a given picture; a model has at most one."""
FEATURE_EXTRACTOR = "feature_extractor"
"""The part that says how a picture is prepared for an image encoder."""
PREPROCESSOR = "preprocessor_config.json"
OWN_PARTS: dict[str, tuple[str, ...]] = {
    "StableDiffusionUpscalePipeline": (LOW_RES_SCHEDULER,),
    "StableUnCLIPImg2ImgPipeline": (
        IMAGE_ENCODER,
        IMAGE_NORMALIZER,
        IMAGE_NOISING_SCHEDULER,
        FEATURE_EXTRACTOR,
    ),
    "StableDiffusionImageVariationPipeline": (IMAGE_ENCODER, FEATURE_EXTRACTOR),
    "StableVideoDiffusionPipeline": (IMAGE_ENCODER, FEATURE_EXTRACTOR),
    "Zero1to3StableDiffusionPipeline": (IMAGE_ENCODER, CC_PROJECTION),
}
"""Pipeline class -> the parts that models of this class alone have a use for."""
_OWN = frozenset(part for parts in OWN_PARTS.values() for part in parts)
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
"""Called with the bytes done, the total bytes, and the name of the current item."""


class ModelSource(Protocol):
    """A model, converted or not, as a pipeline needs it."""

    @property
    def path(self) -> Path:
        """Path of the model."""

    @property
    def family(self) -> str:
        """ "sd1", "sd2", "sdxl", "sdxl-refiner" or "svd"; "ddpm" for a U-Net alone, in pixel
        space."""

    @property
    def components(self) -> tuple[str, ...]:
        """The components of COMPONENTS that the model has."""

    @property
    def model_index(self) -> dict[str, Any]:
        """Content of model_index.json."""

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """Content of scheduler_config.json."""

    @property
    def image_noise_config(self) -> dict[str, Any]:
        """Content of the scheduler_config.json by which a given picture is noised (an upscaler's
        low_res_scheduler, Stable unCLIP's image_noising_scheduler); empty for all other models."""

    @property
    def provenance(self) -> dict[str, Any]:
        """Origin of the weights: source, revision and, after conversion, each file's sha256."""

    def config(self, component: str) -> Any:
        """Return the config of a component: a CLIPTextConfig, UNetConfig or VAEConfig."""

    def tensors(self, component: str) -> dict[str, LazyTensor]:
        """Return all tensors in our names and layout, complete and checked, as a new dict."""

    def tokenizer(self, name: str = "tokenizer") -> Tokenizer:
        """Return a tokenizer. Its pad token comes from its files, or else from the family."""

    def documents(self) -> dict[str, bytes]:
        """Return all files except the weights: relative path -> content."""


def pad_token(family: str, tokenizer: str) -> str:
    """Return the pad token of a tokenizer whose files do not give one.

    SD 2 and the second encoder of SDXL are OpenCLIP models, which pad with id 0.
    """
    return "!" if family == "sd2" or tokenizer == "tokenizer_2" else "<|endoftext|>"


def check_tokenizer(
    tokenizer: Tokenizer, name: str, configs: Mapping[str, ComponentConfig], where: str
) -> None:
    """Check that a tokenizer fits its text encoder (see ``Tokenizer.check_fits``).

    Args:
        name: "tokenizer" or "tokenizer_2".
        configs: component -> config.
        where: folder of the tokenizer.
    Raises: CheckpointError.
    """
    config = configs.get(name.replace("tokenizer", "text_encoder"))
    if isinstance(config, CLIPTextConfig):
        tokenizer.check_fits(config.vocab_size, config.max_position_embeddings, where)


_PICTURE_CONFIGS: dict[str, Any] = {
    IMAGE_ENCODER: CLIPVisionConfig,
    IMAGE_NORMALIZER: ImageNormalizerConfig,
    CC_PROJECTION: CCProjectionConfig,
}


class ModelFolder:
    """A folder in diffusers' form: model_index.json and one folder for each part.

    Base class of converted and unconverted models. Subclasses provide the tensors.
    Raises: CheckpointError or ConfigError on opening, for a missing or malformed file.
    """

    family: str

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.model_index: dict[str, Any] = read_json(self.path / "model_index.json")
        self.components: tuple[str, ...] = tuple(c for c in COMPONENTS if self.uses(c))
        self._configs = {name: self._read_config(name) for name in self.components}
        self._tokenizers: dict[str, Tokenizer] = {}
        where = self.place("scheduler") / "scheduler_config.json"
        self.scheduler_config: dict[str, Any] = read_json(where)
        self._check_scheduler(where)
        self.image_noise_config: dict[str, Any] = {}
        for part in filter(self.uses, IMAGE_NOISES):
            where = self.path / part / "scheduler_config.json"
            self.image_noise_config = read_json(where)

    def _check_scheduler(self, where: Path) -> None:
        """Check that mlxdiff has the noise process of the model.

        diffusers takes the class from model_index.json, and it is in the scheduler's config too.
        Raises: ConfigError for another process, or two of them.
        """
        named = self.class_name("scheduler")
        if named is not None and "_class_name" not in self.scheduler_config:
            self.scheduler_config = {"_class_name": named, **self.scheduler_config}
        check_process(self.scheduler_config, str(where))
        if named is None:
            return
        index = {"_class_name": named}
        check_process(index, f"{self.path}/model_index.json: scheduler")
        if is_edm(index) != is_edm(self.scheduler_config):
            raise ConfigError(
                f"{where}: _class_name is {self.scheduler_config.get('_class_name')!r}, and "
                f"model_index.json has {named!r}, a class of another noise process; write the "
                "right one into both"
            )

    def class_name(self, part: str) -> str | None:
        """Return the class of a part from model_index.json, or None if the model lacks the part."""
        entry = self.model_index.get(part)
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
            return None
        return entry[1]

    def uses(self, part: str) -> bool:
        """Return True if the model has a part that its pipeline class has a use for."""
        pipeline = str(self.model_index.get("_class_name"))
        used = part not in _OWN or part in OWN_PARTS.get(pipeline, ())
        return used and self.class_name(part) is not None

    def place(self, part: str) -> Path:
        """Return a part's folder. The first pixel-space models keep their parts in the root."""
        folder = self.path / part
        return folder if folder.is_dir() else self.path

    def _read_config(self, component: str) -> ComponentConfig:
        where = self.place(component) / "config.json"
        data = read_json(where)
        if component == "unet":
            return read_unet(data, str(where))
        if component == "vae":
            return read_vae(data, str(where))
        if (kind := _PICTURE_CONFIGS.get(component)) is not None:
            return kind.from_dict(data, str(where))
        projects = self.class_name(component) == "CLIPTextModelWithProjection"
        return CLIPTextConfig.from_dict(data, str(where), with_projection=projects)

    def config(self, component: str) -> Any:
        return self._configs[component]

    def tokenizer(self, name: str = "tokenizer") -> Tokenizer:
        if name not in self._tokenizers:
            self._tokenizers[name] = self._read_tokenizer(name)
        return self._tokenizers[name]

    def _read_tokenizer(self, name: str) -> Tokenizer:
        from mlxdiff.tokenizer import Tokenizer

        folder = self.path / name
        files = (folder / "tokenizer_config.json", folder / "special_tokens_map.json")
        pad: str | None = pad_token(self.family, name)
        if any("pad_token" in read_json(file) for file in files if file.is_file()):
            pad = None
        tokenizer = Tokenizer.from_folder(folder, pad_token=pad)
        check_tokenizer(tokenizer, name, self._configs, str(folder))
        return tokenizer

    def _check_tokenizers(self) -> None:
        """Read the tokenizer of each text encoder. Raises: CheckpointError if one does not fit."""
        for component in self.components:
            if component.startswith("text_encoder"):
                self.tokenizer(component.replace("text_encoder", "tokenizer"))

    def document_paths(self) -> dict[str, Path]:
        """Return the files of ``documents``: relative path there -> path on this disk."""
        files = [("scheduler", "scheduler_config.json")]
        files += [(part, "scheduler_config.json") for part in filter(self.uses, IMAGE_NOISES)]
        if self.uses(FEATURE_EXTRACTOR):
            files.append((FEATURE_EXTRACTOR, PREPROCESSOR))
        files += [(name, "config.json") for name in self.components]
        files += [(name, file) for name in TOKENIZERS for file in TOKENIZER_FILES]
        paths = {f"{part}/{file}": self.place(part) / file for part, file in files}
        paths = {"model_index.json": self.path / "model_index.json", **paths}
        return {name: path for name, path in paths.items() if path.is_file()}

    def documents(self) -> dict[str, bytes]:
        return {name: read_document(path) for name, path in self.document_paths().items()}


class ConvertedFolder(ModelFolder):
    """A folder written by ``write_folder``. Opening it checks the manifest and all headers."""

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
        self._check_tokenizers()
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
        """Build tensors from arrays: weight, scales and biases become one quantized tensor."""
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
            scaled = self._has_global_scales and f"{stem}global_scale" in rest
            template = quantized(
                expected[name], self._float_type, how, _never, has_global_scale=scaled
            )
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
                expected[name],
                self._float_type,
                how,
                partial(_read_packed, parts, how),
                has_global_scale=scaled,
            )
        raise_faults(where, missing=missing, misshapen=misshapen)
        tensors |= rest
        return {name: tensors[name] for name in (*expected, *tensors) if name in tensors}

    @property
    def quantization(self) -> dict[str, Any]:
        """ "recipe" and "tensors" (component -> quantization -> names), or empty."""
        return dict(self.manifest.get("quantization", {}))

    @property
    def recipe(self) -> str | None:
        """Name of the quantization recipe, or None if the model is not quantized."""
        return self.quantization.get("recipe")

    @property
    def _has_global_scales(self) -> bool:
        return bool(self.manifest["format_version"] == GLOBAL_SCALE_VERSION)

    @property
    def _float_type(self) -> str:
        return DTYPES[self.dtype]

    @property
    def dtype(self) -> str:
        """Type of the stored weights, for example "float16"."""
        return str(self.manifest["dtype"])

    @property
    def provenance(self) -> dict[str, Any]:
        return dict(self.manifest["source"])

    def tensors(self, component: str) -> dict[str, LazyTensor]:
        return dict(self._tensors[component])

    def verify(self) -> None:
        """Compare every file with its sha256 in the manifest. Raises: CheckpointError."""
        for name, entry in self.manifest["files"].items():
            if sha256(self.path / name) != entry["sha256"]:
                raise CheckpointError(
                    f"{self.path / name}: changed since it was written; convert again"
                )


def _read_packed(parts: Mapping[str, LazyTensor], how: Quantization) -> Packed:
    biases = parts["biases"].read() if "biases" in parts else None
    scale = np.float32(parts["global_scale"].read()) if "global_scale" in parts else None
    return Packed(parts["weight"].read(), parts["scales"].read(), biases, how, scale)


def _never() -> Packed:
    raise AssertionError("a template has no values")


def _read_manifest(path: Path) -> dict[str, Any]:
    """Read mlxdiff.json. Check its version and its keys."""
    if not os.path.isdir(path):
        raise CheckpointError(f"{path}: no such folder")
    where = path / MANIFEST
    if not where.is_file():
        raise CheckpointError(
            f"{path}: not a converted folder (it has no {MANIFEST}); make one with mlxdiff convert"
        )
    try:
        manifest = read_json(where)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    version = manifest.get("format_version")
    if type(version) is not int or version not in VERSIONS:
        raise CheckpointError(
            f"{where}: format version {version!r} is unknown to mlxdiff {__version__}, "
            f"which reads {', '.join(map(str, VERSIONS))}; convert the model again, or update "
            "mlxdiff"
        )
    files = manifest.get("files")
    sound = (
        isinstance(manifest.get("family"), str)
        and manifest.get("dtype") in tuple(DTYPES)
        and isinstance(manifest.get("source"), dict)
        and isinstance(files, dict)
        and all(
            is_repo_path(name)
            and isinstance(e, dict)
            and type(e.get("bytes")) is int
            and isinstance(e.get("sha256"), str)
            for name, e in files.items()
        )
    )
    if not sound:
        raise CheckpointError(
            f"{where}: family, dtype, source or files is missing or malformed; convert the model "
            "again"
        )
    if ("quantization" in manifest) != (version > FORMAT_VERSION):
        raise CheckpointError(
            f"{where}: format version {version} does not match its quantization; convert the "
            "model again"
        )
    if version > FORMAT_VERSION and not _is_quantization(manifest["quantization"]):
        raise CheckpointError(f"{where}: quantization is malformed; convert the model again")
    return manifest


def _is_quantization(data: Any) -> bool:
    """Return True for {"recipe": text, "tensors": {component: {quantization: [names]}}}."""
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
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: missing from the converted folder; convert again")
    found = path.stat().st_size
    if found != expected:
        raise CheckpointError(
            f"{path}: truncated or changed: {expected} bytes expected, {found} found; convert again"
        )


def open_folder(path: str | os.PathLike[str]) -> ConvertedFolder:
    """Open a converted folder. Check its manifest, file sizes, and all tensor names and shapes.

    Raises: CheckpointError that names the fault; ConfigError for a config file.
    """
    return ConvertedFolder(path)


def write_folder(
    source: ModelSource,
    dest: str | os.PathLike[str],
    dtype: str = "float16",
    *,
    provenance: Mapping[str, Any] | None = None,
    recipe: str | None = None,
    card: str = "",
    force: bool = False,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Write a model as a converted folder. The same source gives the same bytes.

    The folder is written under a temporary name beside ``dest`` and then renamed as a whole. A
    failure or an interruption leaves nothing behind.

    Args:
        source: the model. Its QuantizedTensors are written unchanged.
        dest: folder to make, with its parents.
        dtype: type of all weights: "float16", "bfloat16" or "float32".
        recipe: name of the quantization recipe, for the manifest.
        card: text of the model card, README.md. It may be edited later, so it has no hash.
        provenance: source entry of the manifest. Default: ``source.provenance``.
        force: replace ``dest`` if it is a converted folder. Nothing else is ever replaced.
        progress: called after each tensor.
        shard_bytes: largest size of a file. Larger components are split into several files.
        check: called when everything is written, before the folder gets its name. An error of it
            is an error of the whole.
    Returns: dest.
    Raises: UsageError (dest, dtype, space), CheckpointError (a tensor cannot be read or stored).
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

    with new_folder(dest, total, force) as folder:
        files: dict[str, bytes] = dict(source.documents())
        digests: dict[str, str] = {}
        for component, part in tensors.items():
            (folder / component).mkdir()
            shards = split_into_shards(part, dtype, shard_bytes)
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
                files[f"{component}/model.safetensors.index.json"] = json_bytes(
                    {"metadata": {"total_size": size}, "weight_map": weight_map}
                )
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
            digests[name] = hashlib.sha256(content).hexdigest()
        packed = _quantization_table(tensors)
        manifest = {
            "format_version": _version(tensors),
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
        (folder / MANIFEST).write_bytes(json_bytes(manifest))
        if card:
            (folder / "README.md").write_text(card, encoding="utf-8")
        check()
    return dest


def split_into_shards(
    tensors: Mapping[str, LazyTensor], dtype: str, limit: int, stem: str = "model"
) -> dict[str, dict[str, LazyTensor]]:
    """Split tensors into files of at most ``limit`` bytes. A larger tensor gets its own.

    Args:
        stem: start of the names of the files.
    """
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
        return {f"{stem}.safetensors": groups[0]}
    total = len(groups)
    return {f"{stem}-{i:05d}-of-{total:05d}.safetensors": g for i, g in enumerate(groups, 1)}


def _version(tensors: Mapping[str, Mapping[str, LazyTensor]]) -> int:
    """Return the oldest version whose readers know all these tensors."""
    packed = [
        t for part in tensors.values() for t in part.values() if isinstance(t, QuantizedTensor)
    ]
    if any(tensor.has_global_scale for tensor in packed):
        return GLOBAL_SCALE_VERSION
    return QUANTIZED_VERSION if packed else FORMAT_VERSION


def _quantization_table(
    tensors: Mapping[str, Mapping[str, LazyTensor]],
) -> dict[str, dict[str, list[str]]]:
    """Return component -> quantization -> names of the tensors that are stored that way."""
    table: dict[str, dict[str, list[str]]] = {}
    for component, part in tensors.items():
        for name, tensor in part.items():
            if isinstance(tensor, QuantizedTensor):
                by_kind = table.setdefault(component, {})
                by_kind.setdefault(str(tensor.quantization), []).append(name)
    return table


@contextmanager
def new_folder(dest: Path, size: int, force: bool) -> Iterator[Path]:
    """Make a temporary folder. Rename it to ``dest`` if the block succeeds, else remove it."""
    check_dest(dest, force)
    _remove_leftovers(dest.absolute())
    parents = [p for p in dest.absolute().parents if not p.exists()]
    temporary = dest.absolute().with_name(f".{dest.name}.{uuid.uuid4().hex[:8]}.partial")
    old = temporary.with_suffix(".old")
    try:
        try:
            temporary.mkdir(parents=True)
            free = shutil.disk_usage(temporary).free
            if free < size:
                raise UsageError(
                    f"{dest}: needs {size / 1e9:.2f} GB, only {free / 1e9:.2f} GB are free there; "
                    "make room, or give a folder on another disk"
                )
            with claimed_folder(temporary):
                yield temporary
                if dest.exists():
                    check_dest(dest, force)  # another process may have made it meanwhile
                    dest.rename(old)
                temporary.rename(dest)
        except OSError as error:
            raise UsageError(f"{dest}: cannot be written ({error.strerror or error})") from error
    except BaseException:
        if old.exists() and not dest.exists():
            old.rename(dest)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in parents:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(dest: Path) -> None:
    """Remove what killed conversions have left beside a folder, and bring back what they replaced.

    A run with ``force`` that was killed between its two renames has left the old folder under its
    temporary name and nothing under ``dest``.
    """
    hidden = f".{glob.escape(dest.name)}.{'[0-9a-f]' * 8}"
    remove_leftovers(dest.parent, f"{hidden}.partial")
    for old in dest.parent.glob(f"{hidden}.old"):
        if dest.exists():
            remove_leftovers(dest.parent, old.name)
        else:
            old.rename(dest)


def check_dest(dest: str | os.PathLike[str], force: bool) -> None:
    """Check that a converted folder may be written at this path. Raises: UsageError."""
    dest = Path(dest)
    if not os.path.lexists(dest):
        return
    if not force:
        raise UsageError(
            f"{dest} already exists; give another name, or replace it with "
            f"{argument('force', True)}"
        )
    if (
        dest.is_symlink()
        or not dest.is_dir()
        or not (any((dest / name).is_file() for name in _OURS) or not any(dest.iterdir()))
    ):
        raise UsageError(
            f"{dest} is not a folder that mlxdiff wrote, so it is not replaced; remove it "
            "yourself, or give another name"
        )


def json_bytes(data: Any) -> bytes:
    """Return the text of a JSON file as this package writes it."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
