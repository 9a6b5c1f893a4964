"""Conversion of models with PyTorch's pickles, from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from folders import diffusers_folder, write_json
from pickle_files import call, saved, table, tensor, text, zip_file
from safetensors.numpy import load_file

from mlxdiff.cli import main
from mlxdiff.convert import convert, describe, open_source
from mlxdiff.errors import CheckpointError
from mlxdiff.weights.pickles import BESIDE, OBJECT, PROGRAM

SAFE = {
    "text_encoder": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
BIN = SAFE | {"text_encoder": "pytorch_model"}
Tensors = dict[str, np.ndarray]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    diffusers_folder(tmp_path / "model")
    return tmp_path / "model"


def arrays(model: Path, component: str) -> Tensors:
    return load_file(model / component / f"{SAFE[component]}.safetensors")


def to_pickle(model: Path, component: str, name: str = "", stream: bool = False) -> Path:
    """Replace a component's safetensors by a pickle."""
    path = model / component / (name or f"{BIN[component]}.bin")
    path.write_bytes(saved(arrays(model, component), stream=stream))
    (model / component / f"{SAFE[component]}.safetensors").unlink()
    return path


def weights(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*.safetensors")
    }


@pytest.mark.parametrize("stream", [False, True], ids=["zip", "before 1.6"])
def test_a_folder_of_pickles_converts_to_the_same_bytes(
    model: Path, tmp_path: Path, stream: bool
) -> None:
    convert(model, tmp_path / "from-safetensors")
    for component in SAFE:
        to_pickle(model, component, stream=stream)
    report = convert(model, tmp_path / "from-pickles")
    assert weights(tmp_path / "from-pickles") == weights(tmp_path / "from-safetensors")
    assert {c.name: c.file for c in report.components} == {
        name: f"{name}/{stem}.bin" for name, stem in BIN.items()
    }
    assert "unet: has no safetensors; its pickle was read without running it" in report.notes
    manifest = json.loads((tmp_path / "from-pickles" / "mlxdiff.json").read_text())
    assert "unet/diffusion_pytorch_model.bin" in manifest["source"]["sha256"]


def test_safetensors_come_before_pickles(model: Path) -> None:
    (model / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"never opened")
    (model / "vae" / "diffusion_pytorch_model.fp16.bin").write_bytes(b"never opened")
    source = open_source(model)
    assert not [note for note in source.notes if "pickle" in note]


def test_a_requested_variant_can_be_a_pickle(model: Path) -> None:
    changed = {name: array + 1 for name, array in arrays(model, "unet").items()}
    (model / "unet" / "diffusion_pytorch_model.fp16.bin").write_bytes(saved(changed))
    with pytest.raises(CheckpointError, match="its variants: fp16"):
        open_source(model, variant="fp32")
    source = open_source(model, variant="fp16")
    np.testing.assert_array_equal(
        source.tensors("unet")["conv_in.bias"].read(), changed["conv_in.bias"]
    )
    assert "vae: has no fp16 variant; its plain file is used" in source.notes


@pytest.mark.parametrize("index", ["{}.bin.index.json", "{}.fp16.bin.index.json"])
def test_shards_of_pickles(model: Path, tmp_path: Path, index: str) -> None:
    convert(model, tmp_path / "whole")
    tensors = arrays(model, "text_encoder")
    names, folder = list(tensors), model / "text_encoder"
    files = {}
    for number, part in enumerate((names[:5], names[5:])):
        file = f"pytorch_model-0000{number + 1}-of-00002.bin"
        (folder / file).write_bytes(saved({name: tensors[name] for name in part}))
        files |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    write_json(folder / index.format("pytorch_model"), {"weight_map": files})
    convert(model, tmp_path / "sharded")
    assert weights(tmp_path / "sharded") == weights(tmp_path / "whole")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"the shard pytorch_model-00002\S+bin is missing"):
        open_source(model)


def test_ignored_values_are_reported(model: Path, tmp_path: Path) -> None:
    whole = model / "vae" / "diffusion_pytorch_model.bin"
    whole.write_bytes(saved(arrays(model, "vae"), wrap="state_dict"))
    (model / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    report = convert(model, tmp_path / "out")
    (vae,) = [c for c in report.components if c.name == "vae"]
    assert vae.ignored == (("when", BESIDE), ("datetime.datetime", OBJECT))
    assert f"1 ignored: {OBJECT}" in str(report)


def test_a_parameter_that_is_not_a_tensor_is_an_error(model: Path, tmp_path: Path) -> None:
    path = to_pickle(model, "unet")
    canary = tmp_path / "CANARY"
    value = call("os.system", text(f"touch {canary}"))
    fine = tensor("0", 1, (1,))
    path.write_bytes(
        zip_file(table({"conv_out.bias": fine, "conv_in.bias": value}), {"0": bytes(4)})
    )
    expected = r"unet.+: 1 unreadable tensor: conv_in\.bias is made by os\.system"
    with pytest.raises(CheckpointError, match=expected) as caught:
        convert(model, tmp_path / "out")
    assert "\n" not in str(caught.value) and not canary.exists()
    assert not (tmp_path / "out").exists()


def test_a_trojan_is_reported_and_the_model_read(model: Path, tmp_path: Path) -> None:
    tensors = arrays(model, "vae")
    trojan = call("os.system", text(f"touch {tmp_path / 'CANARY'}")) + b"0"
    to_pickle(model, "vae").write_bytes(saved(tensors, first=trojan))
    report = convert(model, tmp_path / "out")
    (vae,) = [c for c in report.components if c.name == "vae"]
    assert vae.ignored == (("os.system", PROGRAM),)
    assert not (tmp_path / "CANARY").exists()


def test_info_of_a_folder_of_pickles(model: Path) -> None:
    to_pickle(model, "unet")
    count = len(open_source(model).tensors("unet"))
    assert describe(model)["components"]["unet"]["dtypes"] == {"F16": count}
    result = CliRunner().invoke(main, ["info", str(model), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["components"]["unet"]["tensors"] == count
