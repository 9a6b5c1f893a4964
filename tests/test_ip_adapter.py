"""IP-Adapter and CLIP's image encoder against diffusers and transformers; what is refused."""

from __future__ import annotations

import itertools
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pickle_files
import pytest
from adapter_files import ADAPTERS, ENCODER, adapter_tensors, write_encoder
from click.testing import CliRunner, Result
from fake_hub import serve
from folders import write_json
from golden_data import GOLDEN, assert_component_close, cases, checkpoint, photo
from golden_runs import Opened, assert_drawn_again
from PIL import Image
from safetensors.numpy import save_file

import mlxdiff
from mlxdiff.cli import main
from mlxdiff.convert import open_ip_adapter
from mlxdiff.errors import CheckpointError, ConfigError, UsageError
from mlxdiff.loading import make_backend
from mlxdiff.machine.disk import read_json
from mlxdiff.networks.config import CLIPVisionConfig, UNet2DConditionConfig
from mlxdiff.pictures.image import to_clip

CASES = cases("ip-adapter")
SMALL: dict[str, Any] = {"seed": 0, "width": 32, "height": 32, "steps": 2}


@pytest.fixture(scope="module")
def folder(opened: Opened) -> Path:
    """MODEL/NAME.safetensors for every adapter that the tests name, MODEL/image_encoder."""
    for model, name in (
        *itertools.product(["sd15"], ADAPTERS),
        ("sdxl", "image"),
        ("sdxl", "plus"),
    ):
        opened.adapter(model, name)
    return opened.folder


def _of(name: str, model: str) -> tuple[str, Path, int]:
    kind, seed = ADAPTERS[name]
    return kind, checkpoint(model), seed


def unet_of(model: str) -> UNet2DConditionConfig:
    return UNet2DConditionConfig.from_dict(read_json(checkpoint(model) / "unet/config.json"))


@pytest.mark.parametrize("case", CASES, ids=[c["case"] for c in CASES])
def test_pictures_equal_diffusers(case: dict[str, Any], backend: str, opened: Opened) -> None:
    assert_drawn_again(opened, case, backend)


def test_the_image_encoder_equals_transformers(backend: str, folder: Path) -> None:
    chosen = make_backend(backend, "float32")
    _, part = open_ip_adapter(folder / "sd15/image.safetensors", unet_of("sd15"))
    network = chosen.load(part.config, part.tensors())
    with np.load(GOLDEN / "ip-adapter/clip.npz") as expected:
        for size in ("40x90", "61x33", "28x28", "15x200"):
            pixels = to_clip(photo(*map(int, size.split("x"))), ENCODER["image_size"])
            assert np.abs(pixels - expected[f"{size}/pixels"]).max() < 1e-6
            out = network(chosen.asarray(pixels))
            assert_component_close(
                chosen.to_numpy(out.image_embeds), expected[f"{size}/image_embeds"]
            )
            assert_component_close(
                chosen.to_numpy(out.hidden_states[-2]), expected[f"{size}/penultimate"]
            )


# ---------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_a_pickle_is_what_safetensors_are(tmp_path: Path, folder: Path, name: str) -> None:
    """Published as .bin: two tables, image_proj and ip_adapter."""
    tables: dict[str, dict[str, bytes]] = {"image_proj": {}, "ip_adapter": {}}
    storages: dict[str, bytes] = {}
    for key, array in adapter_tensors(*_of(name, "sd15")).items():
        place = str(len(storages))
        storages[place] = array.astype(np.float16).tobytes()
        part, _, rest = key.partition(".")
        tables[part][rest] = pickle_files.tensor(
            place, array.size, array.shape, kind="torch.HalfStorage"
        )
    path = tmp_path / "adapter.bin"
    table = pickle_files.table
    value = table({k: table(v) for k, v in tables.items()})
    path.write_bytes(pickle_files.zip_file(value, storages))
    unet = unet_of("sd15")
    encoder = folder / "sd15/image_encoder"
    ours, _ = open_ip_adapter(path, unet, encoder)
    theirs, _ = open_ip_adapter(folder / f"sd15/{name}.safetensors", unet)
    assert ours.config == theirs.config
    expected = theirs.tensors()
    for key, tensor in ours.tensors().items():
        assert np.array_equal(tensor.read(), expected[key].read()), key


def test_names_of_diffusers_are_read_too(tmp_path: Path, folder: Path) -> None:
    """The resampler as diffusers calls its parts, keys and values apart."""
    unet = unet_of("sd15")
    expected, _ = open_ip_adapter(folder / "sd15/plus.safetensors", unet)
    tensors = {name: tensor.read() for name, tensor in expected.tensors().items()}
    save_file(tensors, tmp_path / "a.safetensors")
    found, _ = open_ip_adapter(tmp_path / "a.safetensors", unet, folder / "sd15/image_encoder")
    assert found.config == expected.config
    assert all(np.array_equal(t.read(), tensors[n]) for n, t in found.tensors().items())


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The image encoder is beside the file; in the authors' repository, in one of two places."""
    encoder = folder / "sd15/image_encoder"
    files = {f"models/image_encoder/{p.name}": p.read_bytes() for p in encoder.iterdir()}
    for place in ("models", "sdxl_models"):
        files[f"{place}/a.safetensors"] = (folder / "sd15/image.safetensors").read_bytes()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with serve(files, monkeypatch) as server:
        for place in ("models", "sdxl_models"):
            if place == "sdxl_models":
                monkeypatch.setattr("mlxdiff.convert.ip_adapter._COLLECTION", "org/name")
            adapter, found = open_ip_adapter(
                f"org/name/{place}/a.safetensors@{server.commit}", unet_of("sd15")
            )
            source = f"org/name/{place}/a.safetensors"
            assert adapter.provenance == {"source": source, "revision": server.commit}
            assert found.provenance == {"source": "org/name", "revision": server.commit}
            assert found.config == CLIPVisionConfig.from_dict(ENCODER)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["image_proj.perceiver_resampler.proj_in.weight"], "FaceID"),
        (
            ["image_proj.proj.0.weight", "image_proj.proj.2.weight", "image_proj.norm.weight"],
            "Face",
        ),
        (["image_proj.proj.weight"], "numbered"),
        (["image_proj.latents", "ip_adapter.1.to_k_ip.weight"], "image_proj.latents is"),
        (["ip_adapter.1.to_k_ip.weight", "image_proj.proj.weight"], "image_proj.norm.weight is"),
        (["lora_unet_down.lora_up.weight"], "looks like a LoRA"),
        (["control_model.input_blocks.0.0.weight"], "looks like a ControlNet"),
    ],
)
def test_files_that_hold_something_else(tmp_path: Path, names: list[str], says: str) -> None:
    path = tmp_path / "file.safetensors"
    save_file({name: np.ones((2, 2), np.float16) for name in names}, path)
    with pytest.raises(CheckpointError, match=says):
        open_ip_adapter(path, unet_of("sd15"))


def test_what_does_not_fit_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match="another kind of model"):
        mlxdiff.load(
            checkpoint("sdxl"), backend="numpy", ip_adapters=folder / "sd15/image.safetensors"
        )
    alone = tmp_path / "alone.safetensors"
    shutil.copy(folder / "sd15/image.safetensors", alone)
    with pytest.raises(UsageError, match=r"\(image_encoder\)"):
        open_ip_adapter(alone, unet_of("sd15"))
    other = write_encoder(tmp_path / "other")
    write_json(other / "config.json", ENCODER | {"projection_dim": 48})
    with pytest.raises(CheckpointError, match="misshapen"):
        open_ip_adapter(alone, unet_of("sd15"), other)
    with pytest.raises(UsageError, match="of 24 features, but small has 16"):
        small = shutil.copytree(other, tmp_path / "small")
        write_json(small / "config.json", ENCODER | {"projection_dim": 16})
        tensors = {"visual_projection.weight": np.ones((16, 32), np.float16)}
        _replace(small / "model.safetensors", tensors)
        open_ip_adapter(alone, unet_of("sd15"), small)
    with pytest.raises(UsageError, match="image_encoder: there is no IP-Adapter"):
        mlxdiff.load(checkpoint("sd15"), backend="numpy", image_encoder=other)


def _replace(path: Path, tensors: dict[str, Any]) -> None:
    from safetensors.numpy import load_file

    save_file(load_file(path) | tensors, path)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"architectures": ["CLIPModel"]}, "is a CLIPModel, not a CLIP image encoder"),
        ({"model_type": "siglip_vision_model"}, "model_type"),
        ({"num_channels": 1}, "num_channels"),
        ({"image_size": 30}, "patch_size"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"new_key": 1}, "unknown key"),
    ],
)
def test_image_encoders_that_are_refused(
    tmp_path: Path, folder: Path, config: dict[str, Any], says: str
) -> None:
    encoder = write_encoder(tmp_path / "encoder")
    write_json(encoder / "config.json", ENCODER | config)
    with pytest.raises((ConfigError, CheckpointError), match=says):
        open_ip_adapter(folder / "sd15/image.safetensors", unet_of("sd15"), encoder)


def test_paths_that_hold_no_adapter(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        open_ip_adapter(tmp_path / "none.bin", unet_of("sd15"))
    with pytest.raises(CheckpointError, match=r"is a folder.*full.safetensors, image"):
        open_ip_adapter(folder / "sd15", unet_of("sd15"))
    (tmp_path / "file.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError):
        open_ip_adapter(tmp_path / "file.bin", unet_of("sd15"))


# ----------------------------------------------------------------------------------- the arguments


@pytest.mark.parametrize(
    ("names", "arguments", "says"),
    [
        ([], {"ip_image": photo(8, 8)}, "there is no IP-Adapter"),
        ([], {"ip_scale": 0.5}, "ip_scale: there is no IP-Adapter"),
        (["image"], {}, "1 IP-Adapter and no image"),
        (["image", "plus"], {"ip_image": photo(8, 8)}, "2 IP-Adapters and 1 image"),
        (["image"], {"ip_image": "none.png"}, "none.png"),
        (["image"], {"ip_image": photo(8, 8), "ip_scale": "much"}, "'much'; expected a number"),
        (["image"], {"ip_image": photo(8, 8), "ip_scale": [1, 2]}, "2 values of ip_scale"),
    ],
)
def test_arguments_that_are_refused(
    names: list[str], arguments: dict[str, Any], says: str, opened: Opened
) -> None:
    with pytest.raises(UsageError, match=says):
        opened("sd15", ip_adapters=names).settings("a", **arguments)


def test_an_adapter_of_no_scale_changes_nothing(opened: Opened) -> None:
    without = opened("sd15").generate("a", **SMALL)
    pipe = opened("sd15", ip_adapters=["image"])
    off = pipe.generate("a", ip_image=photo(32, 32), ip_scale=0, **SMALL)
    assert np.array_equal(off.latents, without.latents)
    on = pipe.generate("a", ip_image=photo(32, 32), **SMALL)
    assert not np.array_equal(on.latents, without.latents)


def test_the_command_line_and_back_from_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "sd15", "adapters")
    Image.fromarray(photo(40, 90)).save("seen.png")

    def run(*arguments: str) -> Result:
        always = ["-m", str(checkpoint("sd15")), "--backend", "numpy"]
        return CliRunner().invoke(main, ["generate", *always, *arguments])

    given = "--ip-adapter adapters/plus.safetensors --ip-image seen.png --ip-scale 0.5 -s 3 "
    given += "--steps 2 -W 32 -H 32 -o a.png"
    first = run("a", *given.split())
    assert first.exit_code == 0, first.output
    again = run("--from-image", "a.png", "-o", "b.png")
    assert again.exit_code == 2 and "plus.safetensors" in again.stderr
    again = run("--from-image", "a.png", "-o", "b.png", "--ip-image", "seen.png")
    assert again.exit_code == 2 and "plus.safetensors" in again.stderr  # only its name is known
    monkeypatch.chdir(tmp_path / "adapters")
    again = run("--from-image", "../a.png", "-o", "b.png", "--ip-image", "../seen.png")
    assert again.exit_code == 0, again.output
    assert Path("b.png").read_bytes() == Path("../a.png").read_bytes()


@pytest.mark.mlx
@pytest.mark.parametrize("name", ["image", "plus"])
def test_half_precision_is_finite_and_near(name: str, folder: Path) -> None:
    drawn = [
        mlxdiff.load(
            checkpoint("sdxl"),
            backend="mlx",
            dtype=dtype,
            ip_adapters=[folder / f"sdxl/{name}.safetensors"],
        )
        .generate("a", ip_image=photo(32, 32), **SMALL)
        .latents
        for dtype in ("float32", "float16")
    ]
    assert np.isfinite(drawn[1]).all()
    assert np.abs(drawn[0] - drawn[1]).max() < 0.05 * drawn[0].std()
