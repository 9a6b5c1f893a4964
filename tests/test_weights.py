"""The converted folder: results and errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import diffusers_folder, write_json
from safetensors.numpy import load_file, save_file

from mlxdiff.convert import open_source
from mlxdiff.errors import CheckpointError, ConfigError, MlxdiffError, UsageError
from mlxdiff.store.folder import open_folder, write_folder
from mlxdiff.weights.tensors import LazyTensor


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model"
    diffusers_folder(path)
    return path


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(open_source(source), tmp_path_factory.mktemp("converted") / "model")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def listing(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*"))


def test_files_and_manifest_of_the_folder(folder: Path) -> None:
    assert [name for name in listing(folder) if "." in name] == [
        "mlxdiff.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/model.safetensors",
        "vae/config.json",
        "vae/model.safetensors",
    ]
    manifest = json.loads((folder / "mlxdiff.json").read_text())
    assert manifest["format_version"] == 1
    assert (manifest["family"], manifest["dtype"]) == ("sd1", "float16")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["safety_checker"] == [None, None]
    assert index["requires_safety_checker"] is True


def test_reading_returns_the_written_model(source: Path, folder: Path) -> None:
    before, after = open_source(source), open_folder(folder)
    after.verify()
    assert after.family == before.family and after.dtype == "float16"
    assert after.components == ("text_encoder", "unet", "vae")
    assert after.scheduler_config == before.scheduler_config
    assert after.tokenizer().encode("a b")[:5] == [6, 3, 4, 7, 7]
    for component in after.components:
        assert after.config(component) == before.config(component)
        new = after.tensors(component)
        for name, tensor in before.tensors(component).items():
            np.testing.assert_array_equal(new.pop(name).read(), tensor.read())
        assert not new and after.tensors(component)  # each call gives a table of its own


def test_the_same_source_gives_the_same_bytes(source: Path, folder: Path, tmp_path: Path) -> None:
    again = write_folder(open_source(source), tmp_path / "again")
    assert listing(again) == listing(folder)
    for name in listing(again):
        if (again / name).is_file():
            assert (again / name).read_bytes() == (folder / name).read_bytes(), name


def test_large_components_are_split(source: Path, folder: Path, tmp_path: Path) -> None:
    dest = write_folder(open_source(source), tmp_path / "split", shard_bytes=500_000)
    files = sorted(p.name for p in (dest / "unet").glob("model-*"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((dest / "unet" / f).stat().st_size < 540_000 for f in files)
    whole, split = open_folder(folder), open_folder(dest)
    split.verify()
    for name, tensor in whole.tensors("unet").items():
        np.testing.assert_array_equal(split.tensors("unet")[name].read(), tensor.read())
    (dest / "unet" / files[1]).unlink()
    with pytest.raises(CheckpointError, match=files[1]):
        open_folder(dest)


def rewrite(path: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Change the tensors of a converted component, manifest and all."""
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path)
    root = path.parent.parent
    manifest = json.loads((root / "mlxdiff.json").read_text())
    manifest["files"][path.relative_to(root).as_posix()]["bytes"] = path.stat().st_size
    write_json(root / "mlxdiff.json", manifest)


ONE = np.ones(1, np.float32)
TENSOR_FAULTS: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], str]] = {
    "missing": (lambda a: a.pop("conv_in.bias"), "1 missing tensor: conv_in.bias"),
    "extra": (lambda a: a.update(more=ONE), "1 unknown tensor: more"),
    "misshapen": (
        lambda a: a.update({"conv_in.bias": ONE}),
        r"1 misshapen tensor: conv_in.bias is \(1,\), expected \(32,\)",
    ),
    "mistyped": (
        lambda a: a.update({"conv_in.bias": np.ones(32, np.int32)}),
        r"1 mistyped tensor: conv_in.bias \(I32\)",
    ),
}


@pytest.mark.parametrize("change, says", TENSOR_FAULTS.values(), ids=TENSOR_FAULTS)
def test_a_wrong_tensor(copy: Path, change: Any, says: str) -> None:
    rewrite(copy / "unet" / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=says) as caught:
        open_folder(copy)
    assert "unet" in str(caught.value)


def test_ten_names_are_shown_and_all_are_counted(copy: Path) -> None:
    rewrite(copy / "unet" / "model.safetensors", lambda a: a.clear() or a.update(x=ONE))
    with pytest.raises(CheckpointError) as caught:
        open_folder(copy)
    missing, unknown = str(caught.value).split("; ")
    assert "208 missing tensors: " in missing and missing.endswith(", ...")
    assert missing.count(", ") == 10 and unknown == "1 unknown tensor: x"


def edit(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


FOLDER_FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated file": (
        lambda p: (p / "vae/model.safetensors").write_bytes(b"12345"),
        r"vae/model.safetensors: truncated or changed: \d+ bytes expected, 5 found",
    ),
    "missing file": (lambda p: (p / "vae/model.safetensors").unlink(), "missing from the conv"),
    "unknown version": (
        lambda p: edit(p / "mlxdiff.json", format_version=99),
        "format version 99 is unknown",
    ),
    "no version": (lambda p: write_json(p / "mlxdiff.json", {}), "format version None"),
    "broken manifest": (lambda p: (p / "mlxdiff.json").write_text("{"), "not readable as JSON"),
    "malformed manifest": (lambda p: edit(p / "mlxdiff.json", files=[1]), "malformed"),
    "no unet": (lambda p: edit(p / "model_index.json", unet=None), "lacks unet or vae"),
    "no manifest": (lambda p: (p / "mlxdiff.json").unlink(), "not a converted folder"),
    "no folder": (shutil.rmtree, "no such folder"),
}


@pytest.mark.parametrize("change, says", FOLDER_FAULTS.values(), ids=FOLDER_FAULTS)
def test_a_damaged_folder(copy: Path, change: Callable[[Path], Any], says: str) -> None:
    change(copy)
    with pytest.raises(CheckpointError, match=says):
        open_folder(copy)


def test_an_unknown_config_value(copy: Path) -> None:
    path = copy / "unet/config.json"
    edit(path, block_out_channels=[32, 64], mid_block_type="Strange")
    edit(copy / "mlxdiff.json", files={})
    with pytest.raises(ConfigError, match=r"unet/config.json: mid_block_type = 'Strange'"):
        open_folder(copy)


def test_verify_finds_a_flipped_bit(copy: Path) -> None:
    path = copy / "vae/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"vae/model.safetensors: changed"):
        open_folder(copy).verify()


# ---------------------------------------------------------------------------------------- atomicity


class Broken:
    """A model with a tensor that cannot be read."""

    def __init__(self, model: Any, error: BaseException) -> None:
        self.model, self.error = model, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def tensors(self, component: str) -> dict[str, LazyTensor]:
        tensors = self.model.tensors(component)
        if component == "vae":
            last = list(tensors)[-1]
            tensors[last] = LazyTensor(tensors[last].shape, "F16", self.fail)
        return tensors

    def fail(self) -> np.ndarray:
        raise self.error


ERRORS = [
    CheckpointError("damaged"),
    KeyboardInterrupt(),
    OSError(28, "No space left"),
    ValueError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("dest", ["new", "deep/er/new"])
def test_nothing_is_left_after_a_failure(
    source: Path, tmp_path: Path, error: BaseException, dest: str
) -> None:
    model = Broken(open_source(source), error)
    expected = UsageError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        write_folder(model, tmp_path / dest)
    assert listing(tmp_path) == []


def test_force_replaces_and_a_failure_keeps_the_old(source: Path, copy: Path) -> None:
    model = open_source(source)
    with pytest.raises(UsageError, match=r"already exists.*force=True"):
        write_folder(model, copy)
    before = listing(copy.parent)
    with pytest.raises(CheckpointError):
        write_folder(Broken(model, CheckpointError("x")), copy, "float32", force=True)
    assert listing(copy.parent) == before and open_folder(copy).dtype == "float16"
    write_folder(model, copy, "float32", force=True)
    assert listing(copy.parent) == before and open_folder(copy).dtype == "float32"


def test_force_replaces_converted_folders_only(source: Path, tmp_path: Path) -> None:
    model = open_source(source)
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "letter").write_text("dear")
    (tmp_path / "link").symlink_to(precious)
    for dest in (precious, precious / "letter", tmp_path / "link"):
        with pytest.raises(UsageError, match="not replaced"):
            write_folder(model, dest, force=True)
    assert listing(tmp_path) == ["home", "home/letter", "link"]
    (tmp_path / "empty").mkdir()
    write_folder(model, tmp_path / "empty", force=True)


def test_usage_errors_come_before_any_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_source(source)
    with pytest.raises(UsageError, match="dtype 'int8' is unknown"):
        write_folder(model, tmp_path / "new", "int8")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        write_folder(model, tmp_path / "file" / "new")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(MlxdiffError, match=r"only 0\.00 GB are free"):
        write_folder(model, tmp_path / "new")
    assert listing(tmp_path) == ["file"]


def test_progress_counts_up_to_the_total(source: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    write_folder(open_source(source), tmp_path / "new", progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done == sorted(done) and calls[-1][0] == calls[-1][1]
    assert calls[0][2].startswith("text_encoder/text_model.")
