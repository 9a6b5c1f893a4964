"""What README and docs/ tell a reader to type is accepted, and every link in them leads somewhere.

A working folder has a small model under each name that the documents use, so that commands and
snippets run as they are written, up to the first step. What needs a server, a hub or minutes is
only parsed.
"""

from __future__ import annotations

import glob
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import adapter_files
import clip_files
import control_files
import lora_files
import motion_files
import pytest
import svd_files
import t2i_files
import upscaler_files
from click.testing import CliRunner
from golden_data import checkpoint, mask, photo
from PIL import Image
from safetensors.numpy import save_file
from single_files import single_file

import mlxdiff
from mlxdiff.cli import main
from mlxdiff.pictures.videos import encode_video

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODELS = {
    "sd15": "sd15",
    "sdxl": "sdxl",
    "sd-turbo": "sd-turbo",
    "lcm": "lcm",
    "instruct-pix2pix": "pix2pix",
    "x4-upscaler": "x4-upscaler",
    "image-variations": "variation",
    "unclip": "unclip",
    "zero123": "zero123",
    "sd2-depth": "sd2-depth",
    "marigold": "marigold-depth",
    "marigold-normals": "marigold-normals",
    "ddpm-cifar10": "ddpm",
    "google/ddpm-cifar10-32": "ddpm",
    "FOLDER": "ddpm-labels",
    "sd15-q4": "sd15",
    "sdxl-q4": "sdxl",
}
PICTURES = """photo.jpg painting.jpg bench.png harbour.png house.png castle.jpg cat.png cat-128.png
    scan.png style.png group.jpg grid.png a.png b.png photos/a.png photos/b.png
    dog/1.png dog/2.png""".split()
LORAS = """pastel detail style person dog few lcm-lora loras/style
    latent-consistency/lcm-lora-sdv1-5/pytorch_lora_weights""".split()
UPSCALERS = """RealESRGAN_x4plus 4x_NMKD-Siax_200k realesr-general-x4v3 4x-UltraSharp""".split()
ONLY_PARSED = {"train", "bench", "doctor", "serve", "mcp", "models", "convert", "info"}
NO_PAIR = ["instruct-pix2pix", "--ip-adapter"]  # the small models of both do not fit together
RUNNABLE = {"README.md", "coming-from-diffusers.md", "control.md", "depth.md", "embedding.md",
            "image-led.md", "images.md", "lora.md", "tasks.md"}  # fmt: skip


class Reached(BaseException):
    """A run was checked and planned; its first step would follow."""


def blocks(kind: str, page: Path) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of each mlxdiff command, once."""
    seen = set()
    for page in PAGES:
        for block in blocks("sh", page):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                for sign in (">>", ">", "|"):
                    words = words[: words.index(sign)] if sign in words else words
                if words[:1] == ["uvx"]:
                    words = words[1:]
                if all(word in words for word in NO_PAIR):
                    continue
                if words[:1] == ["mlxdiff"] and tuple(words) not in seen:
                    seen.add(tuple(words))
                    yield page.name, words[1:]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the documents name."""
    here = tmp_path_factory.mktemp("docs")
    for name, golden in MODELS.items():
        shutil.copytree(checkpoint(golden), here / name)
    for name in ("svd", "svd-xt"):
        svd_files.write_svd(here / name)
    for index, name in enumerate(PICTURES):
        (here / name).parent.mkdir(exist_ok=True)
        Image.fromarray(photo(64, 64 + 8 * (index % 2))).save(here / name)
    for name in ("depth.png", "near.png"):
        Image.fromarray(photo(64, 72)[..., 0]).save(here / name)
    for name in ("where.png", "face.png"):
        Image.fromarray(mask("half", 64, 64)).save(here / name)
    made = lora_files.write("sd15-kohya", here)
    for name in LORAS:
        path = here / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made, path)
    for name in ("control_v11p_sd15_canny", "control_v11f1p_sd15_depth"):
        control_files.write_controlnet(here / "lllyasviel" / name, "sd15")
    union = control_files.write_union(here / "union")
    shutil.copy(next(union.glob("*.safetensors")), here / "union.safetensors")
    for folder, name in (("models", "ip-adapter_sd15"), ("sdxl_models", "ip-adapter_sdxl")):
        place = here / "h94/IP-Adapter" / folder
        place.mkdir(parents=True)
        model = checkpoint("sd15" if folder == "models" else "sdxl")
        adapter_files.write_adapter(place / f"{name}.safetensors", "plain", model, 0)
        adapter_files.write_encoder(place / "image_encoder")
    single_file(checkpoint("sd15"), here / "model.safetensors")
    t2i_files.write_t2i_adapter(here / "TencentARC/t2i-adapter-canny-sdxl-1.0", "xl", "sdxl")
    for name in ("CLIP", "openai/clip-vit-large-patch14"):
        clip_files.write_clip(here / name)
    motion_files.write_motion(here / "guoyww/animatediff-motion-adapter-v1-5-2", "v2", "sd15")
    frames = [Image.fromarray(photo(64, 64 + 8 * i)) for i in range(4)]
    (here / "dance.gif").write_bytes(encode_video([f.resize((64, 64)) for f in frames], ".gif", 8))
    zoom = motion_files.motion_lora("v2", "sd15")
    save_file(zoom, here / "zoom-in.safetensors")
    (here / "labels.txt").write_text("cat\ndog\n", "utf-8")
    (here / "styles.toml").write_text('[mine]\nprompt = "{prompt}, ink"\n', "utf-8")
    enlarges = upscaler_files.write_upscaler("compact-x4.pth", here)
    for name in UPSCALERS:
        shutil.copy(enlarges, here / f"{name}.pth")
    (here / "examples").symlink_to(ROOT / "examples")
    (here / "prompts.txt").write_text("a cat\na dog\n", "utf-8")
    drawn = mlxdiff.load(here / "sd15").generate("a cat", seed=1, steps=1)
    for name in (
        "lighthouse.png",
        "picture.png",
        "fox.png",
        "fox.jpg",
        "drawn/a.png",
        "drawn/b.png",
    ):
        (here / name).parent.mkdir(exist_ok=True)
        drawn.save(here / name)
    return here


@pytest.fixture
def planned(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in the shelf; stop a run where its first step would follow."""
    monkeypatch.chdir(shelf)

    def stop(*_: Any, **__: Any) -> NoReturn:
        raise Reached

    monkeypatch.setattr("mlxdiff.run.drawing._evaluations", stop)


COMMANDS = list(commands())


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[" ".join(w)[:70] for _, w in COMMANDS])
def test_commands(page: str, words: list[str], planned: None) -> None:
    name = next((word for word in words if not word.startswith("-")), "")
    if name in ONLY_PARSED:
        with main.make_context("mlxdiff", words) as context:
            _, command, rest = main.resolve_command(context, words)
            assert command is not None
            command.make_context(name, rest, parent=context)
        return
    words = [one for word in words for one in sorted(glob.glob(word)) or [word]]
    more = ["--config", "sd15"] if "model.safetensors" in words else []
    more += ["--force"] if name == "generate" else []
    try:
        done = CliRunner().invoke(main, [*words, *more])
    except Reached:
        return
    assert done.exit_code == 0, f"{page}: {' '.join(words)}: {done.output}"


@pytest.mark.parametrize("page", [p for p in PAGES if p.name in RUNNABLE], ids=lambda p: p.name)
def test_snippets(page: Path, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for one in shelf.iterdir():
        if one.name != "lighthouse.png":  # the snippets write it
            (tmp_path / one.name).symlink_to(one)
    monkeypatch.chdir(tmp_path)
    with Image.open("harbour.png") as opened:
        picture = opened.copy()
    names: dict[str, Any] = {
        "mlxdiff": mlxdiff,
        "pipe": mlxdiff.load("sd15"),
        "picture": picture,
        "show": print,
    }
    for block in blocks("python", page):
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, place = target.partition("#")
        if Path(path).name in ("reference-options.md", "reference-python.md"):
            continue  # made with the site
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if place and file.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", t.lower()).strip().replace(" ", "-") for t in titles}
            assert place in anchors, f"{page.name}: {target}"
