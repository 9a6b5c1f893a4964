"""The hub: a hand-made cache, and downloads from a server with the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import COMMIT, OTHER, Hub, digest_of, serve
from hub_files import HALF, PLAIN, SD15, UNET, UNWANTED

from mlxdiff.errors import HubError, UsageError
from mlxdiff.store import hub
from mlxdiff.store.cache import cache_folder
from mlxdiff.store.hub import resolve
from mlxdiff.store.selection import needed_files


@pytest.fixture(autouse=True)
def hub_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for key in list(os.environ):
        if key.startswith(("HF_", "HUGGINGFACE_")) or key == "TRANSFORMERS_OFFLINE":
            monkeypatch.delenv(key)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub"


def fill_cache(
    home: Path,
    files: dict[str, str],
    repo: str = "org/name",
    commit: str = COMMIT,
    ref: str = "main",
) -> Path:
    """Make a repo in the cache in huggingface_hub's layout: blobs, links to them, refs."""
    folder = home / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for name, text in files.items():
        blob = folder / "blobs" / hashlib.sha256(f"{name}{text}".encode()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_text(text)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    if ref:
        (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return snapshot


# The cache


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
@pytest.mark.parametrize("offline", [False, True])
def test_a_whole_copy_needs_no_network(
    revision: str, offline: bool, hub_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = fill_cache(hub_home, {f: SD15[f] for f in PLAIN})
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it would fail
    if offline:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve(f"org/name{revision}") == snapshot


def test_branches_with_a_slash(hub_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snapshot = fill_cache(hub_home, SD15, commit=OTHER, ref="refs/pr/3")
    assert resolve("org/name@refs/pr/3") == snapshot
    with pytest.raises(HubError, match=r"org/name: offline .*it is not in the cache"):
        resolve("org/name")


@pytest.mark.parametrize("missing", PLAIN)
def test_an_incomplete_copy_offline(
    missing: str, hub_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing.startswith("tokenizer/") and "_" in missing:
        pytest.skip("is not needed")
    snapshot = fill_cache(hub_home, {f: SD15[f] for f in PLAIN})
    (snapshot / missing).resolve().unlink()  # the blob: what remains is a link to nothing
    monkeypatch.setenv("HF_HUB_OFFLINE", "yes")
    with pytest.raises(HubError, match=r"offline .*incomplete") as error:
        resolve("org/name")
    assert missing.split("/")[0] in str(error.value) and "\n" not in str(error.value)


def test_a_missing_shard_is_found(hub_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = {"weight_map": {"x": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    files = {f: SD15[f] for f in PLAIN if not f.startswith(UNET)}
    files[f"{UNET}.safetensors.index.json"] = json.dumps(index)
    files[f"{UNET}-00001-of-00002.safetensors"] = "1"
    snapshot = fill_cache(hub_home, files)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve("org/name") == snapshot
    index["weight_map"]["y"] = "diffusion_pytorch_model-00002-of-00002.safetensors"
    (snapshot / f"{UNET}.safetensors.index.json").resolve().write_text(json.dumps(index))
    with pytest.raises(HubError, match=r"unet/.*00002-of-00002.safetensors is missing"):
        resolve("org/name")


def test_environment_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == tmp_path / "home" / "hub"
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "huggingface" / "hub"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "huggingface" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", "~/c")
    assert cache_folder() == tmp_path / "c"


# The network


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    with serve({**SD15, **UNWANTED}, monkeypatch) as handler:
        yield handler


@pytest.mark.parametrize(("variant", "expected"), [(None, HALF), ("", PLAIN), ("fp16", HALF)])
def test_fetch_brings_only_needed_files(
    variant: str | None,
    expected: list[str],
    server: type[Hub],
    hub_home: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[tuple[int, int, str]] = []
    folder = resolve("org/name", variant, progress=lambda *args: told.append(args))
    assert folder == hub_home / "models--org--name" / "snapshots" / COMMIT
    assert sorted(server.got) == expected
    for name in expected:
        assert (folder / name).read_text() == SD15[name]
    total = sum(len(SD15[name]) for name in expected)
    assert told[-1][:2] == (total, total)
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert capfd.readouterr() == ("", "")
    # Again: from the cache; also without a network.
    server.fault = "500 no"
    assert resolve("org/name", variant) == resolve(f"org/name@{COMMIT}", variant) == folder
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve("org/name", variant) == folder


def test_a_partial_copy_is_completed(server: type[Hub], hub_home: Path) -> None:
    snapshot = fill_cache(hub_home, {f: SD15[f] for f in PLAIN if not f.startswith("unet/")})
    assert resolve("org/name") == snapshot
    assert f"{UNET}.fp16.safetensors" in server.got


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("403 GatedRepo", "org/name is gated: accept its terms at https://huggingface.co/org/name"),
        ("401 RepoNotFound", "org/name: the hub has no such model, or the model is private"),
        ("404 RepoNotFound", "org/name: the hub has no such model, or the model is private"),
        ("404 RevisionNotFound", "org/name has no revision 'main'"),
        ("418 Teapot", r"org/name: the hub answered with an error \(418\)"),
    ],
)
def test_errors_of_the_hub(fault: str, message: str, server: type[Hub]) -> None:
    server.fault = fault
    with pytest.raises(HubError, match=message) as error:
        resolve("org/name")
    assert "\n" not in str(error.value)


def test_no_network(monkeypatch: pytest.MonkeyPatch, hub_home: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    fill_cache(hub_home, {"model_index.json": SD15["model_index.json"]})
    with pytest.raises(HubError, match=r"cannot be fetched .*incomplete .*check the network") as e:
        resolve("org/name")
    assert "\n" not in str(e.value)


def test_pickles_without_safetensors(server: type[Hub]) -> None:
    server.files = {f.replace(".safetensors", ".bin"): t for f, t in SD15.items()}
    folder = resolve("org/name")
    assert (folder / f"{UNET}.fp16.bin").is_file() and f"{UNET}.bin" not in server.got
    names = ["unet/config.json", f"{UNET}.fp16.bin", f"{UNET}.safetensors", f"{UNET}.bin"]
    rest = [f for f in PLAIN if not f.startswith("unet/")]
    assert f"{UNET}.safetensors" in needed_files([*rest, *names])
    assert f"{UNET}.fp16.bin" in needed_files([*rest, *names], "fp16")


# What a fetch makes sure of


def test_interrupted_download_is_resumed(server: type[Hub], hub_home: Path) -> None:
    name, body = f"{UNET}.fp16.safetensors", SD15[f"{UNET}.fp16.safetensors"].encode()
    partial = hub_home / "models--org--name" / "blobs" / f"{digest_of(body)}.mlxdiff.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(body[:4000])
    told: list[int] = []
    folder = resolve("org/name", progress=lambda done, total, file: told.append(done))
    assert server.ranges == ["bytes=4000-"]
    assert (folder / name).read_bytes() == body and told == sorted(told)
    assert not partial.exists()


def test_wrong_partial_file_is_dropped(server: type[Hub], hub_home: Path) -> None:
    body = SD15[f"{UNET}.fp16.safetensors"].encode()
    partial = hub_home / "models--org--name" / "blobs" / f"{digest_of(body)}.mlxdiff.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"x" * 4000)
    folder = resolve("org/name")
    assert (folder / f"{UNET}.fp16.safetensors").read_bytes() == body
    assert server.got.count(f"{UNET}.fp16.safetensors") == 2


@pytest.mark.parametrize("file", [f"{UNET}.fp16.safetensors", "tokenizer/vocab.json"])
def test_damaged_files_are_fetched_again(file: str, server: type[Hub]) -> None:
    server.files = {**SD15, "tokenizer/vocab.json": '{"ab": 1}'}
    server.damage = {file: 1}
    folder = resolve("org/name")
    assert (folder / file).read_text() == server.files[file]
    assert server.got.count(file) == 2


@pytest.mark.parametrize("file", [f"{UNET}.fp16.safetensors", "tokenizer/vocab.json"])
def test_files_that_stay_damaged_are_refused(
    file: str, server: type[Hub], hub_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files = {**SD15, "tokenizer/vocab.json": '{"ab": 1}'}
    server.damage = {file: 99}
    with pytest.raises(HubError, match=f"org/name: {file} arrived damaged twice") as error:
        resolve("org/name")
    assert "\n" not in str(error.value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="offline"):
        resolve("org/name")


def test_a_disk_without_room(
    server: type[Hub], hub_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxdiff.machine.disk.free_space", lambda folder: 100)
    with pytest.raises(UsageError, match=r"org/name: the download needs .* GB at .*HF_HOME"):
        resolve("org/name")
    assert server.got == []


# Branches that move


def age(home: Path, seconds: float, ref: str = "main") -> None:
    """Set the time of the last look-up of a branch to this many seconds ago."""
    then = time.time() - seconds
    os.utime(home / "models--org--name" / "refs" / ref, (then, then))


DAY = 24 * 3600 + 1


def test_a_branch_is_looked_up_once_a_day(
    server: type[Hub], hub_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = resolve("org/name")
    server.got.clear()
    assert resolve("org/name") == folder and len(server.asked) == 1
    age(hub_home, DAY)
    assert resolve("org/name") == folder and len(server.asked) == 2
    assert resolve("org/name") == folder and len(server.asked) == 2
    assert server.got == [] and caplog.text == ""


def test_a_branch_that_moved_is_fetched(
    server: type[Hub], hub_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = resolve("org/name")
    age(hub_home, DAY)
    server.commit, server.files = OTHER, {**SD15, "unet/config.json": '{"new": 1}'}
    server.got.clear()
    new = resolve("org/name")
    assert new.name == OTHER and (new / "unet/config.json").read_text() == '{"new": 1}'
    assert server.got == ["unet/config.json"]  # the rest is the same
    assert f"org/name has changed on the hub; the old version is org/name@{COMMIT}" in caplog.text
    assert resolve("org/name") == new and resolve(f"org/name@{COMMIT}") == old


def test_a_new_readme_changes_nothing(server: type[Hub], hub_home: Path) -> None:
    old = resolve("org/name")
    age(hub_home, DAY)
    server.commit, server.files = OTHER, {**SD15, "README.md": "new"}
    server.got.clear()
    assert resolve("org/name") == old and server.got == []
    assert len(server.asked) == 2 and resolve("org/name") == old and len(server.asked) == 2


def test_cached_copy_is_used_without_a_network(
    server: type[Hub],
    hub_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = resolve("org/name")
    age(hub_home, DAY)
    server.fault = "404 RepoNotFound"  # withdrawn
    assert resolve("org/name") == folder
    assert "using the copy in the cache; a newer one may exist: the hub has" in caplog.text
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    caplog.clear()
    assert resolve("org/name") == folder
    assert "cannot be fetched" in caplog.text
    caplog.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve("org/name") == folder and caplog.text == ""


# Repos of other shapes


def test_one_checkpoint_file(server: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    server.files = {"README.md": "", "model.safetensors": "x" * 5000, "x/y/old.ckpt": "y"}
    path = resolve("org/name")
    assert path.name == "model.safetensors" and path.read_text() == "x" * 5000
    assert path.parent.name == COMMIT and server.got == ["model.safetensors"]
    old = resolve("org/name/x/y/old.ckpt")
    assert old.read_text() == "y"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve("org/name/x/y/old.ckpt") == old
    assert resolve("org/name") == path


def test_several_checkpoint_files(server: type[Hub]) -> None:
    server.files = dict.fromkeys(["a.safetensors", "b.safetensors", "c.ckpt"], "x")
    match = r"2 checkpoint files; name one: org/name/a.safetensors, org/name/b.safetensors"
    for _ in range(2):
        with pytest.raises(HubError, match=match):
            resolve("org/name")
        assert resolve("org/name/b.safetensors").name == "b.safetensors"
    with pytest.raises(HubError, match=r"d\.safetensors is missing"):
        resolve("org/name/d.safetensors")


def test_repos_without_a_model(server: type[Hub]) -> None:
    vae = "diffusion_pytorch_model.safetensors"
    server.files = {"config.json": "{}", vae: "x", "README.md": "", "vae.bin": ""}
    with pytest.raises(HubError, match=r"only one component; give a VAE.*vae, "):
        resolve("org/name")
    folder = hub.resolve_component("org/name", "vae")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", vae]
    server.files = {"README.md": ""}
    with pytest.raises(HubError, match=r"neither a model_index\.json nor a checkpoint file"):
        resolve("org/name@v1")
    with pytest.raises(HubError, match=r"it holds no vae/config\.json"):
        hub.resolve_component("org/name@v1")


def test_a_clip_comes_with_its_tokenizer(server: type[Hub]) -> None:
    wanted = {"config.json": "{}", "model.safetensors": "x", "merges.txt": "", "vocab.json": "{}"}
    wanted["preprocessor_config.json"] = "{}"
    server.files = {**wanted, "README.md": "", "tf_model.h5": "", "pytorch_model.bin": "y"}
    folder = hub.resolve_clip("org/name")
    assert sorted(p.name for p in folder.iterdir()) == sorted(wanted)
    del server.files["merges.txt"]
    with pytest.raises(HubError, match=r"no tokenizer \(merges\.txt"):
        hub.resolve_clip("org/name@v1")


def test_one_component_of_a_model(server: type[Hub]) -> None:
    folder = hub.resolve_component("org/name", "vae")
    assert folder.name == "vae" and (folder / "config.json").is_file()
    assert sorted(server.got) == ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    assert hub.resolve_component("org/name", "vae") == folder and len(server.asked) == 1


def test_some_files_of_a_repo(server: type[Hub], hub_home: Path) -> None:
    wanted = ["tokenizer/vocab.json", "tokenizer/merges.txt"]
    folder = hub.fetch_files("org/name", wanted)
    assert all((folder / file).is_file() for file in wanted) and len(server.got) == 2
    age(hub_home, DAY)
    assert hub.fetch_files("org/name", wanted[:1]) == folder and len(server.asked) == 1
    with pytest.raises(HubError, match=r"it has no nothing\.json"):
        hub.fetch_files("org/name", ["nothing.json"])


def test_a_pixel_space_model_in_the_root(server: type[Hub], hub_home: Path) -> None:
    index = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    server.files = {
        "model_index.json": json.dumps(index),
        "config.json": "{}",
        "scheduler_config.json": "{} ",
        "diffusion_pytorch_model.safetensors": "x" * 2000,
        "diffusion_pytorch_model.bin": "y",
        "images/a.png": "",
    }
    folder = resolve("org/name")
    assert set(server.got) == set(server.files) - {"images/a.png", "diffusion_pytorch_model.bin"}
    assert resolve("org/name") == folder and len(server.asked) == 1


def test_two_processes_fetch_a_file_once(server: type[Hub], hub_home: Path) -> None:
    server.pause = 1.0
    code = "from mlxdiff.store.hub import resolve; print(resolve('org/name'))"
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    folders = {process.communicate()[0].strip() for process in started}
    assert folders == {str(hub_home / "models--org--name" / "snapshots" / COMMIT)}
    assert server.got.count(f"{UNET}.fp16.safetensors") == 1


def test_importing_is_cheap() -> None:
    code = (
        "import sys, mlxdiff.store.hub, mlxdiff.tokenizer, mlxdiff.pictures.metadata\n"
        "heavy = {'huggingface_hub', 'tokenizers', 'PIL', 'httpx', 'mlx'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
