"""The hub: which files, from a hand-made cache, and from a server that speaks its protocol."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mlxdiff import hub
from mlxdiff.errors import HubError
from mlxdiff.hub import is_repo_id, needed_files, resolve

COMMIT, OTHER = "a" * 40, "b" * 40
UNET, CLIP = "unet/diffusion_pytorch_model", "text_encoder/model"

# A repo as published: stable-diffusion-v1-5, shortened, with all that is not wanted.
SD15 = {
    "model_index.json": json.dumps(
        {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "image_encoder": [None, None],
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
            "scheduler": ["diffusers", "PNDMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
    ),
    "scheduler/scheduler_config.json": "{}",
    "tokenizer/vocab.json": "{}",
    "tokenizer/merges.txt": "#version",
    "tokenizer/special_tokens_map.json": "{}",
    "tokenizer/tokenizer_config.json": "{}",
    "text_encoder/config.json": "{}",
    f"{CLIP}.safetensors": "clip",
    f"{CLIP}.fp16.safetensors": "clip16",
    "unet/config.json": "{}",
    f"{UNET}.safetensors": "unet" * 1000,
    f"{UNET}.fp16.safetensors": "unet16" * 1000,
    "vae/config.json": "{}",
    "vae/diffusion_pytorch_model.safetensors": "vae",
}
UNWANTED = dict.fromkeys(
    [
        ".gitattributes",
        "README.md",
        "v1-5-pruned.ckpt",
        "v1-5-pruned.safetensors",
        "feature_extractor/preprocessor_config.json",
        "safety_checker/config.json",
        "safety_checker/model.safetensors",
        "text_encoder/pytorch_model.bin",
        "text_encoder/flax_model.msgpack",
        "text_encoder/model.onnx",
        "text_encoder/openvino_model.bin",
        f"{UNET}.bin",
        f"{UNET}.fp16.bin",
        f"{UNET}.non_ema.safetensors",
        "unet/sub/config.json",
        "vae_encoder/model.onnx",
        "scheduler/notes.txt",
        "tokenizer/README.md",
    ],
    "no",
)
PLAIN = sorted(set(SD15) - {f"{CLIP}.fp16.safetensors", f"{UNET}.fp16.safetensors"})
HALF = sorted(set(SD15) - {f"{CLIP}.safetensors", f"{UNET}.safetensors"})


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
    """A repo in the cache, as huggingface_hub lays it out: blobs, links to them, refs."""
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


# Names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", True),
        ("stabilityai/stable-diffusion-xl-base-1.0@refs/pr/1", True),
        ("org/name@" + COMMIT, True),
        ("o/n@v1.0-rc_2", True),
        ("name", False),
        ("a/b/c", False),
        ("/a/b", False),
        ("./models/x", False),
        ("~/x", False),
        ("../x", False),
        ("org/name.", False),
        ("org/-x", False),
        ("org/a--b", False),
        ("org/a..b", False),
        ("org/name@", False),
        ("org/name@../../x", False),
        ("org/name@a//b", False),
        ("org/name@/etc", False),
        ("org/na me", False),
        ("org/näme", False),
        ("org/name\n", False),
        ("", False),
    ],
)
def test_is_repo_id(text: str, expected: bool) -> None:
    assert is_repo_id(text) is expected
    if not expected:
        with pytest.raises(HubError, match="is no model of the hub; expected org/name"):
            resolve(text)


# Which files


def test_only_what_is_needed() -> None:
    everything = [*SD15, *UNWANTED]
    assert needed_files(everything) == HALF
    assert needed_files(everything, "fp16") == HALF
    assert needed_files(everything, "") == PLAIN
    assert f"{UNET}.non_ema.safetensors" in needed_files(everything, "non_ema")
    assert needed_files(everything, components=("vae",)) == [
        "model_index.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]


@pytest.mark.parametrize(
    ("index", "shards"),
    [
        (".safetensors.index.json", "-0000{}-of-00002.safetensors"),
        (".safetensors.index.fp16.json", ".fp16-0000{}-of-00002.safetensors"),
        (".safetensors.index.fp16.json", "-0000{}-of-00002.fp16.safetensors"),
        (".safetensors.fp16.index.json", "-0000{}-of-00002.fp16.safetensors"),
        (".fp16.safetensors.index.json", ".fp16-0000{}-of-00002.safetensors"),
    ],
)
def test_shards_come_with_their_index(index: str, shards: str) -> None:
    sharded = {UNET + index, *(UNET + shards.format(i) for i in (1, 2))}
    files = {f for f in PLAIN if not f.startswith(UNET)} | sharded
    assert sharded <= set(needed_files(files))
    with pytest.raises(HubError, match="unet/ has no safetensors weights"):
        needed_files(files - {UNET + index})


def test_tokenizer_json_alone_suffices() -> None:
    files = [f for f in PLAIN if "vocab" not in f and "merges" not in f]
    assert "tokenizer/tokenizer.json" in needed_files([*files, "tokenizer/tokenizer.json"])
    with pytest.raises(
        HubError, match=r"tokenizer/ has no tokenizer\.json or merges.txt and vocab"
    ):
        needed_files(files)


def test_repos_that_cannot_be_used() -> None:
    for files, variant, message in (
        (
            ["a.safetensors", "README.md"],
            None,
            "no model_index.json.*a.safetensors is a single-file",
        ),
        (
            [f for f in PLAIN if f != f"{UNET}.safetensors"],
            None,
            "unet/ has no safetensors weights",
        ),
        (
            [f.replace(".safetensors", ".bin") for f in PLAIN],
            None,
            "text_encoder/ has its weights only as a pickle.*@refs/pr/1",
        ),
        ([f for f in PLAIN if f != "vae/config.json"], None, "vae/ has no config.json"),
        ([*SD15], "bf16", r"no variant 'bf16' \(variants there: fp16\)"),
    ):
        with pytest.raises(HubError, match=message) as error:
            needed_files(files, variant)
        assert "\n" not in str(error.value)


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
    assert hub.cache_folder() == tmp_path / "home" / "hub"
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert hub.cache_folder() == tmp_path / ".cache" / "huggingface" / "hub"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert hub.cache_folder() == tmp_path / "x" / "huggingface" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", "~/c")
    assert hub.cache_folder() == tmp_path / "c"


# A server


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as fetching files needs."""

    files: ClassVar[dict[str, str]] = {}
    fault: str | None = None
    got: ClassVar[list[str]] = []
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.fault:
            status, code = self.fault.split()
            self.reply(int(status), b"{}", {"X-Error-Code": code, "X-Error-Message": code})
        elif path.startswith("/api/models/org/name"):
            listing = [{"rfilename": f, "size": len(t)} for f, t in self.files.items()]
            info = {"id": "org/name", "sha": COMMIT, "siblings": listing}
            self.reply(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        elif path.startswith("/org/name/resolve/"):
            revision, _, file = path.removeprefix("/org/name/resolve/").partition("/")
            assert revision in ("main", COMMIT)
            body = self.files[file].encode()
            if self.command == "GET":
                self.got.append(file)
            digest = hashlib.sha1(f"{file}{body!r}".encode()).hexdigest()
            self.reply(200, body, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT})
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("Handler", (Hub,), {"files": {**SD15, **UNWANTED}, "got": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.server_port}")
        monkeypatch.setenv("HF_TOKEN", "")
        yield handler
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(("variant", "expected"), [(None, HALF), ("", PLAIN), ("fp16", HALF)])
def test_a_fetch_brings_what_is_needed_and_no_more(
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
        ("401 RepoNotFound", "org/name: the hub has no such model, or it is private"),
        ("404 RepoNotFound", "org/name: the hub has no such model, or it is private"),
        ("404 RevisionNotFound", "org/name has no revision 'main'"),
        ("418 Teapot", r"org/name: the hub answered with an error \(418\)"),
    ],
)
def test_what_the_hub_refuses(fault: str, message: str, server: type[Hub]) -> None:
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


def test_a_repo_without_safetensors(server: type[Hub]) -> None:
    server.files = {f.replace(".safetensors", ".bin"): t for f, t in SD15.items()}
    with pytest.raises(HubError, match=r"org/name@main cannot be used: .* only as a pickle"):
        resolve("org/name")
    assert server.got == []


def test_importing_is_cheap() -> None:
    code = (
        "import sys, mlxdiff.hub, mlxdiff.tokenizer, mlxdiff.metadata\n"
        "heavy = {'huggingface_hub', 'tokenizers', 'PIL', 'httpx', 'mlx'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
