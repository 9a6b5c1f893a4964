"""The library of converted models, against a server that speaks the hub's protocol."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from fake_hub import COMMIT, OTHER, Hub, serve
from folders import diffusers_folder
from safetensors.numpy import load, save
from single_files import ldm_tensors

from mlxdiff import convert, library
from mlxdiff.cli import main
from mlxdiff.errors import HubError, MlxdiffError, UsageError
from mlxdiff.machine import disk
from mlxdiff.store.folder import ConvertedFolder

DAY = 24 * 3600 + 1


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Make the files of a tiny model, plain and fp16."""
    path = tmp_path_factory.mktemp("repo")
    diffusers_folder(path)
    found = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
    content = {name: p.read_bytes() for name, p in found.items()}
    for name in list(content):
        if name.endswith(".safetensors"):
            content[name.replace(".safetensors", ".fp16.safetensors")] = content[name]
            full = {k: v.astype(np.float32) for k, v in load(content[name]).items()}
            content[name] = save(full)
    return content | {"README.md": b"# A model"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for key in list(os.environ):
        if key.startswith(("HF_", "HUGGINGFACE_", "MLXDIFF_")) or key == "TRANSFORMERS_OFFLINE":
            monkeypatch.delenv(key)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MLXDIFF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home" / "models"


@pytest.fixture
def server(repo: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    with serve(dict(repo), monkeypatch) as handler:
        yield handler


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record each conversion."""
    done: list[str] = []

    def counted(source: str, dest: Path, **options: Any) -> Any:
        done.append(source)
        return convert.convert(source, dest, **options)

    monkeypatch.setattr(library, "convert", counted)
    return done


def open_model(model: str = "org/name", **options: Any) -> ConvertedFolder:
    opened = library.open_model(model, **options)
    assert isinstance(opened, ConvertedFolder)
    return opened


def later(home: Path) -> None:
    """Make every look-up of the hub a day old."""
    for index in home.glob("*/index.json"):
        text = json.loads(index.read_text())
        for seen in text["seen"].values():
            seen["checked"] -= DAY
        index.write_text(json.dumps(text))
    then = time.time() - DAY
    for ref in (home.parent.parent / "hf").rglob("refs/*"):
        os.utime(ref, (then, then))


def test_converted_once_and_found_again(
    server: type[Hub], home: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    model = open_model(progress=lambda done, total, name: told.append(name))
    assert model.path.parent == home / "org--name" and model.dtype == "float16"
    assert model.provenance["source"] == "org/name" and model.provenance["revision"] == COMMIT
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in told
    assert "unet/diffusion_pytorch_model.safetensors" not in server.got
    assert conversions == [f"org/name@{COMMIT}"] and len(server.asked) == 1
    # Again, by every name; also when the downloads are gone, and without a network.
    shutil.rmtree(home.parent.parent / "hf")
    server.fault = "500 no"
    for name in ("org/name", "org/name@main", f"org/name@{COMMIT}", "https://hf.co/org/name"):
        assert open_model(name).path == model.path
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    later(home)
    assert open_model().path == model.path
    assert len(conversions) == 1 and len(server.asked) == 1


def test_float32_is_kept_beside_float16(server: type[Hub], conversions: list[str]) -> None:
    half, full = open_model(), open_model(dtype="float32")
    assert full.dtype == "float32" and full.path != half.path
    assert "unet/diffusion_pytorch_model.safetensors" in server.got
    assert open_model(dtype="float32").path == full.path
    assert open_model(dtype="bfloat16").path == open_model(dtype="auto").path == half.path
    assert len(conversions) == 2


def test_a_new_readme_converts_nothing(
    server: type[Hub], home: Path, conversions: list[str], repo: dict[str, bytes]
) -> None:
    first = open_model()
    later(home)
    shutil.rmtree(home.parent.parent / "hf")
    server.commit, server.files = OTHER, {**repo, "README.md": b"# New"}
    server.got.clear()
    assert open_model().path == first.path
    assert open_model().path == first.path
    assert server.got == [] and len(conversions) == 1 and len(server.asked) == 2


def test_a_branch_that_moved_is_converted_again(
    server: type[Hub],
    home: Path,
    conversions: list[str],
    repo: dict[str, bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = open_model()
    later(home)
    server.commit = OTHER
    server.files = {**repo, "scheduler/scheduler_config.json": b'{"_class_name": "DDIMScheduler"}'}
    second = open_model()
    assert second.path != first.path
    assert second.scheduler_config["_class_name"] == "DDIMScheduler"
    assert f"org/name has changed on the hub; the old version is org/name@{COMMIT}" in caplog.text
    assert open_model(f"org/name@{COMMIT}").path == first.path
    assert len(conversions) == 2


def test_converted_copy_is_used_without_a_network(
    server: type[Hub], home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = open_model()
    later(home)
    shutil.rmtree(home.parent.parent / "hf")
    server.fault = "404 RepoNotFound"
    assert open_model().path == first.path
    assert "using the copy in the library; a newer one may exist: the hub has" in caplog.text
    with pytest.raises(HubError, match="no such model"):
        open_model("org/other")


@pytest.mark.parametrize("damage", ["truncated", "no manifest", "empty"])
def test_a_damaged_entry_is_made_again(
    damage: str, server: type[Hub], conversions: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = open_model().path
    if damage == "truncated":
        file = path / "unet" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "no manifest":
        (path / "mlxdiff.json").unlink()
    else:
        shutil.rmtree(path)
        path.mkdir()
    server.got.clear()
    again = open_model()
    assert again.path == path and len(conversions) == 2 and server.got == []
    again.verify()
    assert caplog.text.count("org/name: converting it again: ") == 1


@pytest.mark.parametrize("text", ["", "[]", '{"seen": 3}', '{"seen": {"main||auto": {}}}', "\0"])
def test_a_damaged_index_costs_a_look(
    text: str, server: type[Hub], home: Path, conversions: list[str]
) -> None:
    path = open_model().path
    (home / "org--name" / "index.json").write_text(text)
    assert open_model().path == path and len(conversions) == 1


def test_leftovers_of_killed_conversions_are_removed(server: type[Hub], home: Path) -> None:
    left = home / "org--name" / ".0123456789abcdef-float16-v1.abc.partial"
    left.mkdir(parents=True)
    path = open_model().path
    names = sorted(p.name for p in (home / "org--name").iterdir())
    assert names == sorted([path.name, "index.json"])


def test_a_failure_leaves_nothing(server: type[Hub], home: Path, repo: dict[str, bytes]) -> None:
    server.files = {
        **repo,
        "unet/config.json": repo["unet/config.json"].replace(b"32, 64", b"32, 96"),
    }
    with pytest.raises(Exception, match="unet"):
        open_model()
    assert library.entries() == [] and not list(home.glob("org--name/.*"))
    server.files, server.commit = dict(repo), OTHER
    later(home)
    assert open_model().path.is_dir()


@pytest.mark.parametrize(
    "file, old, new, says",
    [
        (
            "model_index.json",
            b"StableDiffusionPipeline",
            b"FluxPipeline",
            "^org/name: is a FluxPipeline",
        ),
        (
            "unet/config.json",
            b'"layers_per_block"',
            b'"dual_cross_attention": true, "l"',
            "^org/name/unet/.*dual_",
        ),
    ],
    ids=["pipeline", "config"],
)
@pytest.mark.parametrize("opened", [open_model, convert.open_source], ids=["kept", "not kept"])
def test_unsupported_models_are_refused_before_their_weights_are_fetched(
    server: type[Hub],
    repo: dict[str, bytes],
    opened: Any,
    file: str,
    old: bytes,
    new: bytes,
    says: str,
) -> None:
    server.files = {**repo, file: repo[file].replace(old, new)}
    assert server.files[file] != repo[file]
    server.got.clear()
    with pytest.raises(MlxdiffError, match=says):
        opened("org/name")
    assert server.got and not any(name.endswith(".safetensors") for name in server.got)


def test_a_disk_without_room(
    server: type[Hub], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "free_space", lambda folder: 100_000)
    with pytest.raises(UsageError, match=r"org/name: download and conversion needs .*MLXDIFF_HOME"):
        open_model()
    assert server.got == [] and library.entries() == []


def test_two_processes_make_one(server: type[Hub], home: Path) -> None:
    server.pause = 0.5
    code = (
        "import logging\n"
        "from mlxdiff import library\n"
        "logging.basicConfig(format='%(message)s')\n"
        "print(library.open_model('org/name').path)"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in started]
    assert all(process.returncode == 0 for process in started), outputs
    (path,) = {out.strip() for out, _ in outputs}
    assert [str(entry.path) for entry in library.entries()] == [path]
    assert sorted(server.got) == sorted(set(server.got))  # nothing was fetched twice
    notes = "".join(err for _, err in outputs)
    assert notes.count("is preparing it; waiting") == 1, notes


def test_a_lock_goes_with_its_holder(tmp_path: Path) -> None:
    lock = tmp_path / "locks" / "a.lock"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom mlxdiff.machine.disk import exclusive\n"
        f"with exclusive(Path({str(lock)!r})): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    waited: list[str] = []

    def on_wait(pid: str) -> None:
        waited.append(pid)
        holder.kill()

    with disk.exclusive(lock, on_wait) as held:
        assert held and lock.read_text() == str(os.getpid())
    holder.wait()
    holder.stdout.close()
    assert waited == [str(holder.pid)]


def test_folders_of_the_user_stay_where_they_are(home: Path, tmp_path: Path) -> None:
    diffusers_folder(tmp_path / "mine")
    opened = library.open_model("mine")
    assert not isinstance(opened, ConvertedFolder) and not home.exists()
    diffusers_folder(tmp_path / "org" / "name")
    assert library.open_model("org/name").path == Path("org/name")


def test_models_converted_by_their_publisher(
    server: type[Hub], home: Path, tmp_path: Path, repo: dict[str, bytes]
) -> None:
    diffusers_folder(tmp_path / "mine")
    convert.convert(tmp_path / "mine", tmp_path / "done")
    done = [p for p in (tmp_path / "done").rglob("*") if p.is_file()]
    server.files = {p.relative_to(tmp_path / "done").as_posix(): p.read_bytes() for p in done}
    assert open_model().path.parent.name == "snapshots" and library.entries() == []


def test_single_files_are_kept_too(
    server: type[Hub],
    conversions: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    repo: dict[str, bytes],
) -> None:
    diffusers_folder(tmp_path / "mine")
    vocabulary = {name: repo[f"tokenizer/{name}"] for name in ("vocab.json", "merges.txt")}
    monkeypatch.setattr("mlxdiff.convert.singlefile.VOCABULARY", "org/name")
    server.files = {"a.safetensors": save(ldm_tensors(tmp_path / "mine")), **vocabulary}
    model = open_model("org/name/a.safetensors")
    assert model.provenance["source"] == "org/name/a.safetensors"
    assert model.provenance["revision"] == COMMIT
    assert open_model("org/name/a.safetensors").path == open_model("org/name").path == model.path
    assert len(conversions) == 1
    assert [entry.name for entry in library.entries()] == ["org/name/a.safetensors"]
    assert "removed org/name/a.safetensors" in run("remove", "org/name/a.safetensors").stdout


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert library.folder() == tmp_path / "home" / "models"
    monkeypatch.delenv("MLXDIFF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert library.folder() == tmp_path / "x" / "mlxdiff" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert library.folder() == tmp_path / ".cache" / "mlxdiff" / "models"


def test_a_home_that_cannot_be_written(
    server: type[Hub], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLXDIFF_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"cannot be written .*set MLXDIFF_HOME"):
        open_model()


# The command


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["models", *arguments])


def test_the_list(server: type[Hub], home: Path) -> None:
    empty = run()
    assert empty.exit_code == 0 and empty.stdout == "" and "No models yet" in empty.stderr
    model, _ = open_model(), open_model(dtype="float32")
    lines = run().stdout.splitlines()
    assert lines[0].split() == ["NAME", "FAMILY", "SIZE", "TYPE", "REVISION", "DATE"]
    assert [line.split()[0] for line in lines[1:3]] == ["org/name", "org/name"]
    assert COMMIT[:7] in lines[1] and "sd1" in lines[1] and str(home) in lines[3]
    shown = json.loads(run("--json").stdout)
    assert {entry["dtype"] for entry in shown} == {"float16", "float32"}
    assert shown[0]["size"] == sum(p.stat().st_size for p in model.path.rglob("*") if p.is_file())
    (model.path / "mlxdiff.json").write_text("{")
    assert "damaged" in run().stdout


def test_removing(server: type[Hub], home: Path) -> None:
    path = open_model().path
    for name in ("sd15", "org/nam", f"org/name@{OTHER}"):
        refused = run("remove", name)
        assert refused.exit_code == 2 and "is not in the library" in refused.stderr
        assert "its models: org/name" in refused.stderr
    removed = run("remove", "org/name@aaaa")
    assert removed.exit_code == 0 and removed.stdout.startswith("removed org/name (float16), ")
    assert "`hf cache rm model/org/name` removes them" in removed.stderr
    assert not path.exists() and not path.parent.exists() and library.entries() == []
    assert open_model().path == path
    assert json.loads(run("remove", "org/name", "--json").stdout)[0]["name"] == "org/name"


def test_the_known_ones() -> None:
    text = run("--known").stdout
    assert "sdxl-turbo" in text and "stabilityai/sdxl-turbo" in text and "openrail++" in text
    assert {"name", "repo", "licence", "note"} <= set(
        json.loads(run("--known", "--json").stdout)[0]
    )


def test_models_are_drawn_with(server: type[Hub], conversions: list[str]) -> None:
    from mlxdiff import loading

    pipe = loading.load("org/name", backend="numpy")
    assert isinstance(pipe.source, ConvertedFolder) and len(conversions) == 1
    assert np.isfinite(pipe.model.source.tensors("vae")["decoder.conv_in.bias"].read()).all()
