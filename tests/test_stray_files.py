"""Files as people have them: strays in checkpoints, lone VAEs, cache folders, forms of other tools.

The cases come from public reports; each test writes its own input.
"""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_data import checkpoint
from pickle_files import saved
from safetensors.numpy import load_file, save_file
from single_files import Tensors, ldm_tensors, real_names, single_file, sparse_file

import mlxdiff
from mlxdiff.convert import describe, open_source, open_vae
from mlxdiff.convert.component import Component
from mlxdiff.errors import CheckpointError, MlxdiffError, UsageError
from mlxdiff.store.folder import ModelSource


def same(found: ModelSource, expected: ModelSource) -> None:
    assert found.components == expected.components
    for component in expected.components:
        tensors = found.tensors(component)
        for name, tensor in expected.tensors(component).items():
            np.testing.assert_array_equal(tensors[name].read(), tensor.read(), name)


# ------------------------------------------------------------------------------------------- strays

IDS = np.arange(77, dtype=np.int64)[None]
LOGIT = np.array(4.6, np.float32)
SQUARE = np.zeros((8, 8), np.float16)
STRAYS: dict[str, tuple[str, Tensors]] = {
    "positions under the other naming": (
        "sdxl",
        {"conditioner.embedders.1.model.transformer.text_model.embeddings.position_ids": IDS},
    ),
    "positions under another encoder": (
        "sdxl",
        {"conditioner.embedders.1.transformer.text_model.embeddings.position_ids": IDS},
    ),
    "positions of a first encoder in SD 2": (
        "sd21v",
        {"cond_stage_model.transformer.text_model.embeddings.position_ids": IDS},
    ),
    "projection beside SDXL's first encoder": (
        "sdxl",
        {
            "conditioner.embedders.0.logit_scale": LOGIT,
            "conditioner.embedders.0.text_projection.weight": SQUARE,
        },
    ),
    "projection beside the encoder": (
        "sd15",
        {"cond_stage_model.logit_scale": LOGIT, "cond_stage_model.text_projection": SQUARE},
    ),
    "moving averages of another tool": ("sd15", {"ema.unet.conv_in.weight": SQUARE}),
    "a safety checker": ("sd15", {"safety_checker.concept_embeds": SQUARE}),
    "training state": (
        "sd15",
        {
            "global_step": np.array(7),
            "epoch": np.array(3),
            "optimizer.state.0.exp_avg": SQUARE,
            "lr_schedulers.0.last_epoch": np.array(3),
            "loss.logvar": LOGIT,
        },
    ),
}


@pytest.mark.parametrize("case", STRAYS)
def test_strays_are_ignored_with_a_reason(case: str, tmp_path: Path) -> None:
    name, strays = STRAYS[case]
    folder = checkpoint(name)
    model: Any = open_source(single_file(folder, tmp_path / "x.safetensors", strays), config=folder)
    same(model, open_source(folder))
    reasons = dict(model.ignored)
    for component, files in model.files.items():
        prefix = model._sections[component].prefix
        reasons |= {prefix + key: reason for key, reason in files.mapped.ignored}
    assert set(reasons) == set(strays) and all(reasons.values())


def test_a_real_weight_is_not_a_stray(tmp_path: Path) -> None:
    folder = checkpoint("sdxl")
    more = {"conditioner.embedders.1.transformer.text_model.final_layer_norm.weight": SQUARE}
    path = single_file(folder, tmp_path / "x.safetensors", more)
    with pytest.raises(CheckpointError, match="has text_encoder_2 twice"):
        open_source(path, config=folder)


def sgm(name: str) -> str:
    return name.replace("cond_stage_model.model.", "conditioner.embedders.0.model.")


def test_sd2_in_the_names_of_stabilitys_later_code(tmp_path: Path) -> None:
    folder = checkpoint("sd21v")
    path = tmp_path / "x.safetensors"
    save_file({sgm(name): array for name, array in ldm_tensors(folder).items()}, path)
    same(open_source(path, config=folder), open_source(folder))
    full = {sgm(name): shape for name, shape in real_names("sd21").items()}
    facts = describe(sparse_file(tmp_path / "full.safetensors", full))
    assert (facts["family"], set(facts["components"])) == ("sd2", {"text_encoder", "unet", "vae"})


def test_the_refiner_keeps_its_second_encoder(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "x.safetensors", real_names("sdxl-refiner"))
    assert "text_encoder_2" in open_source(path).components


def diffusers_names(folder: Path) -> Tensors:
    """The tensors of a folder, each under the name of its component."""
    model: Any = open_source(folder)
    return {
        f"{component}.{name}": np.ascontiguousarray(tensor.read())
        for component, files in model.files.items()
        for name, tensor in files.tensors.items()
    }


@pytest.mark.parametrize("name", ["sd15", "sd21v", "sdxl"])
def test_parts_under_the_names_of_diffusers(name: str, tmp_path: Path) -> None:
    folder = checkpoint(name)
    save_file(diffusers_names(folder), tmp_path / "x.safetensors")
    same(open_source(tmp_path / "x.safetensors", config=folder), open_source(folder))


def test_parts_under_the_names_of_diffusers_need_no_config(tmp_path: Path) -> None:
    from folders import diffusers_folder

    folder = tmp_path / "folder"
    diffusers_folder(
        folder, "sdxl", {"block_out_channels": [64, 128], "attention_head_dim": [1, 2]}
    )
    model = open_source(folder)
    save_file(diffusers_names(folder), tmp_path / "x.safetensors")
    found = open_source(tmp_path / "x.safetensors")
    assert found.family == "sdxl"
    same(found, model)


def test_torch_files_without_a_suffix(tmp_path: Path) -> None:
    folder = checkpoint("sd15")
    tensors = {name: array.astype(np.float32) for name, array in ldm_tensors(folder).items()}
    for stream in (True, False):
        path = tmp_path / f"model{stream}"
        path.write_bytes(saved(tensors, "state_dict", stream))
        same(open_source(path, config=folder), open_source(folder))


# ------------------------------------------------------------------------------------ hub's folders


def cache_folder(place: Path, *commits: str, main: str | None) -> Path:
    repo = place / "models--org--name"
    for commit in commits:
        shutil.copytree(checkpoint("sd15"), repo / "snapshots" / commit)
    if main is not None:
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(main)
    return repo


def test_a_cache_folder_of_the_hub_is_a_model(tmp_path: Path) -> None:
    repo = cache_folder(tmp_path / "a", "0123", "4567", main="4567")
    assert open_source(repo).path.name == "4567"
    assert open_vae(repo).config == open_source(checkpoint("sd15")).config("vae")
    assert open_source(cache_folder(tmp_path / "b", "0123", main=None)).path.name == "0123"
    shutil.copytree(repo, tmp_path / "copy")
    assert open_source(tmp_path / "copy").path.name == "4567"
    assert open_source(repo / "snapshots").path.name == "4567"
    with pytest.raises(UsageError, match="has the snapshots 0123, 4567; give one folder"):
        open_source(cache_folder(tmp_path / "c", "0123", "4567", main=None))


# --------------------------------------------------------------------------------------------- VAEs


def vae_files(folder: Path, place: Path) -> dict[str, Path]:
    """The VAE of a model in every form of one file."""
    whole = ldm_tensors(folder)
    inside = "first_stage_model."
    vae = {n.removeprefix(inside): a for n, a in whole.items() if n.startswith(inside)}
    (file,) = (folder / "vae").glob("*.safetensors")
    training = {
        "loss.logvar": LOGIT,
        "loss.perceptual_loss.lin0.model.1.weight": np.zeros((1, 8, 1, 1), np.float32),
    }
    contents: dict[str, Tensors] = {
        "ldm.safetensors": vae,
        "prefixed.safetensors": {inside + name: array for name, array in vae.items()},
        "whole.safetensors": whole,
        "diffusers.safetensors": load_file(file),
        "vae.pt": vae | training,
        "vae.ckpt": vae,
    }
    place.mkdir(exist_ok=True)
    for name, content in contents.items():
        if name.endswith("safetensors"):
            save_file(content, place / name)
        else:
            (place / name).write_bytes(saved(content, "state_dict"))
    return {name: place / name for name in contents}


def own_vae(folder: Path) -> Component:
    model = open_source(folder)
    return Component(model.config("vae"), lambda: model.tensors("vae"), {})


def test_a_vae_in_one_file_equals_its_folder(tmp_path: Path) -> None:
    folder = checkpoint("sd15")
    own = own_vae(folder)
    for name, path in vae_files(folder, tmp_path).items():
        vae = open_vae(path, own=own)
        assert vae.config == own.config, name
        assert vae.provenance == {"source": name}
        for key, tensor in own.tensors().items():
            np.testing.assert_array_equal(vae.tensors()[key].read(), tensor.read(), name)


def test_a_vae_in_one_file_draws(tmp_path: Path) -> None:
    folder = checkpoint("sd15")
    path = vae_files(folder, tmp_path)["ldm.safetensors"]
    draw: dict[str, Any] = {"prompt": "a red circle", "seed": 3, "steps": 1}
    plain, other = (
        mlxdiff.load(folder, backend="numpy", **options).generate(**draw).images[0]
        for options in ({}, {"vae": path})
    )
    np.testing.assert_array_equal(np.asarray(plain), np.asarray(other))


@pytest.mark.parametrize("form", ["ldm.safetensors", "whole.safetensors", "folder", "model"])
def test_the_vae_of_another_family_is_refused(form: str, tmp_path: Path) -> None:
    """The VAEs of SD 1.5 and SDXL have the same shapes."""
    other = checkpoint("sdxl")
    path = {"folder": other / "vae", "model": other}.get(form)
    path = path or vae_files(other, tmp_path)[form]
    with pytest.raises(UsageError, match="another family") as error:
        mlxdiff.load(checkpoint("sd15"), backend="numpy", vae=path)
    assert "\n" not in str(error.value)


def test_a_fine_tuned_vae_is_not_of_another_family(tmp_path: Path) -> None:
    folder = checkpoint("sd15")
    path = vae_files(folder, tmp_path)["ldm.safetensors"]
    rng = np.random.default_rng(0)
    tuned = {
        name: (array + rng.normal(0, array.std() + 1e-6, array.shape)).astype(np.float32)
        for name, array in load_file(path).items()
    }
    save_file(tuned, path)
    open_vae(path, own=own_vae(folder))


def taesd_files(place: Path) -> dict[str, Path]:
    """TAESD as its author publishes it: two lists of layers."""
    (file,) = checkpoint("taesd").glob("*.safetensors")
    halves: dict[str, Tensors] = {"encoder": {}, "decoder": {}}
    for name, array in load_file(file).items():
        half, _, number, rest = name.split(".", 3)
        # Its decoder begins with a clamp, which diffusers leaves out.
        halves[half][f"{int(number) + (half == 'decoder')}.{rest}"] = array
    both = {f"taesd_{half}.{n}": a for half, part in halves.items() for n, a in part.items()}
    place.mkdir(exist_ok=True)
    for half, part in halves.items():
        (place / f"taesd_{half}.pth").write_bytes(saved(part))
        save_file(part, place / f"taesd_{half}.safetensors")
    save_file(both, place / "both.safetensors")
    save_file(load_file(file), place / "diffusers.safetensors")
    return {path.name: path for path in place.iterdir()}


def test_taesds_own_files(tmp_path: Path) -> None:
    want = open_vae(checkpoint("taesd"))
    for name, path in taesd_files(tmp_path).items():
        vae = open_vae(path)
        assert vae.config == want.config, name
        for key, tensor in want.tensors().items():
            np.testing.assert_array_equal(vae.tensors()[key].read(), tensor.read(), name)


def test_half_a_taesd(tmp_path: Path) -> None:
    """A decoder alone draws; it cannot start from a picture. An encoder alone is of no use."""
    files = taesd_files(tmp_path / "all")
    decoder, encoder = (
        shutil.copy(files[f"taesd_{half}.pth"], tmp_path) for half in ("decoder", "encoder")
    )
    Path(encoder).unlink()
    draw: dict[str, Any] = {"prompt": "a red circle", "seed": 3, "steps": 1}
    pipes = [
        mlxdiff.load(checkpoint("sd15"), backend="numpy", vae=vae)
        for vae in (decoder, checkpoint("taesd"))
    ]
    one, other = (np.asarray(pipe.generate(**draw).images[0]) for pipe in pipes)
    np.testing.assert_array_equal(one, other)
    with pytest.raises(UsageError, match="decoder alone, which cannot encode") as error:
        pipes[0].generate(**draw, image=np.zeros((64, 64, 3), np.uint8), strength=1.0)
    assert "\n" not in str(error.value)
    shutil.copy(files["taesd_encoder.pth"], encoder)
    Path(decoder).unlink()
    with pytest.raises(CheckpointError, match=r"encoder alone; put its decoder \(taesd_decoder"):
        open_vae(encoder)


def test_other_files_are_no_vaes(tmp_path: Path) -> None:
    folder = checkpoint("sd15")
    (file,) = (folder / "unet").glob("*.safetensors")
    with pytest.raises(CheckpointError, match=r"looks like a U-Net .*; expected a VAE"):
        open_vae(file)
    vae = vae_files(folder, tmp_path)["ldm.safetensors"]
    tensors = load_file(vae)
    del tensors["decoder.conv_in.weight"]
    save_file(tensors, vae)
    with pytest.raises(CheckpointError, match=r"decoder\.conv_in\.weight is missing"):
        open_vae(vae)
    with pytest.raises(CheckpointError, match="looks like a VAE, alone; give it with vae"):
        open_source(vae)


# ------------------------------------------------------------------------------- other tools' forms


def _folder(place: Path, change: Any) -> Path:
    folder = place / "model"
    shutil.copytree(checkpoint("sd15"), folder)
    change(folder)
    return folder


def _quantized_by(settings: dict[str, Any], beside: bool = False) -> Any:
    def change(folder: Path) -> None:
        config = folder / "unet" / "config.json"
        if beside:
            (folder / "unet" / "quantization_config.json").write_text(json.dumps(settings))
        else:
            data = json.loads(config.read_text()) | {"quantization_config": settings}
            config.write_text(json.dumps(data))

    return change


def _renamed(name: str) -> Any:
    def change(folder: Path) -> None:
        for path in (folder / "unet").glob("*.safetensors"):
            path.rename(path.with_name(name))

    return change


def _modular(folder: Path) -> None:
    (folder / "model_index.json").rename(folder / "modular_model_index.json")


def _mflux(folder: Path) -> None:
    shutil.rmtree(folder)
    (folder / "transformer").mkdir(parents=True)
    save_file({"a": LOGIT}, folder / "transformer" / "0.safetensors")


FOLDERS: dict[str, tuple[Any, str]] = {
    "bitsandbytes": (_quantized_by({"quant_method": "bitsandbytes"}), "quantized by bitsandbytes"),
    "torchao": (_quantized_by({"quant_method": "torchao"}), "quantized by torchao"),
    "quanto": (_quantized_by({"quant_method": "quanto"}), "quantized by quanto"),
    "sdnq": (_quantized_by({"quant_method": "sdnq"}, beside=True), "quantized by SDNQ"),
    "nunchaku": (_quantized_by({"quant_method": "nunchaku"}), r"by SVDQuant \(Nunchaku\)"),
    "unknown": (_quantized_by({"bits": 4}), "quantized by another tool"),
    "flashpack": (_renamed("model.flashpack"), "flashpack's form .*; use the safetensors files"),
    "modular": (_modular, "modular diffusers repository.*use the plain repository"),
    "mflux": (_mflux, "saved by mflux"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_of_other_tools_are_refused_by_name(case: str, tmp_path: Path) -> None:
    change, message = FOLDERS[case]
    with pytest.raises(CheckpointError, match=message) as error:
        open_source(_folder(tmp_path, change))
    assert "remove it" not in str(error.value) and "\n" not in str(error.value)


GARBAGE = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + bytes(64)
FILES: dict[str, tuple[bytes, str]] = {
    "x.gguf": (GARBAGE, "GGUF"),
    "gguf.safetensors": (GARBAGE, "GGUF"),
    "gguf.ckpt": (GARBAGE, "GGUF"),
    "gguf": (GARBAGE, "GGUF"),
    "short.gguf": (b"x", "not a GGUF file"),
    "lfs.gguf": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "x.dduf": (b"PK\3\4", "DDUF file, .* unpack it"),
    "empty.safetensors": (b"", "is empty"),
    "half.safetensors": (struct.pack("<Q", 1000) + b'{"a":{"dtype":"F16"', "truncated"),
    "x.crdownload": (bytes(100), "is not a model folder"),
    "lfs.safetensors": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "page.safetensors": (b"<!DOCTYPE html><html></html>", "is a web page"),
    "denied.safetensors": (b'{"error":"You must be authenticated"}', "not a safetensors file"),
}


@pytest.mark.parametrize("name", FILES)
def test_other_files_are_refused_by_name(name: str, tmp_path: Path) -> None:
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        open_source(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["x.zip", "zip.safetensors"])
def test_a_plain_archive_is_refused(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("model/x.txt", "hello")
    with pytest.raises(MlxdiffError, match="is a zip archive, but not one that torch"):
        open_source(tmp_path / name)
