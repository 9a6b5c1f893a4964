"""``mlxdiff info``: what any file is, what it fits, how to use it; the same words in refusals."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import control_files
import lora_files
import numpy as np
import pytest
from golden_data import checkpoint
from PIL import Image, PngImagePlugin
from safetensors.numpy import load_file, save_file
from single_files import single_file

from mlxdiff.adapters.textual_inversion import open_embedding
from mlxdiff.convert import convert, detect, open_source, recognise
from mlxdiff.errors import CheckpointError, UsageError
from mlxdiff.report.info import describe

WEIGHT = np.zeros((8, 8), np.float16)


def saved(folder: Path, names: list[str], shape: tuple[int, ...] = (8, 8), **metadata: str) -> Path:
    path = folder / "x.safetensors"
    save_file({name: np.zeros(shape, np.float16) for name in names}, path, metadata or None)
    return path


KINDS = {
    "a ControlNet-Union": ["task_embedding", "controlnet_cond_embedding.conv_in.weight"],
    "a Control-LoRA": ["lora_controlnet", "input_blocks.1.0.in_layers.2.up"],
    "a ControlNet-LLLite": ["lllite_unet_input_blocks_4_1_to_q.down.0.weight"],
    "a ControlNeXt": ["time_embed.0.weight", "controlnext.embedding.0.weight"],
    "a T2I-Adapter": ["adapter.body.0.resnets.0.block1.weight"],
    "an IP-Adapter": ["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"],
    "a ControlNet": ["control_model.input_blocks.0.0.weight"],
    "PuLID": ["pulid_encoder.x.weight"],
    "PhotoMaker": ["id_encoder.x.weight"],
    "an IP-Adapter FaceID": ["image_proj.proj.2.weight", "image_proj.proj.0.weight"],
    "a Flux transformer": ["double_blocks.0.img_attn.qkv.weight"],
    "an ESRGAN upscaler": ["body.0.rdb1.conv1.weight"],
    "a text encoder, alone": ["text_model.embeddings.token_embedding.weight"],
    "weights of an unknown kind (2 tensors)": ["x", "y"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str, tmp_path: Path) -> None:
    path = saved(tmp_path, KINDS[kind])
    facts = describe(str(path))
    assert facts["kind"] == kind and facts["precision"] == {"F16": len(KINDS[kind])}
    assert facts["use"]
    with pytest.raises(CheckpointError) as refused:
        open_source(path)
    assert len(str(refused.value)) < 400 and "\n" not in str(refused.value)


def test_instantid_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, ["image_proj.proj_in.weight", "image_proj.latents"], (8, 512))
    assert describe(str(path))["kind"] == "InstantID"
    with pytest.raises(CheckpointError, match=r"is InstantID, which needs a face recognition"):
        from mlxdiff.convert import open_ip_adapter

        open_ip_adapter(path, open_source(checkpoint("sd15")).config("unet"))


def test_every_kind_has_its_use() -> None:
    """A known kind is never called unknown, and its use names an option or a way out."""
    for _, words in (*detect._REFUSED, *detect._PARTS):
        said = recognise.use(words)
        assert re.search("give|use|enlarge", said), words


def test_widths_name_the_family(tmp_path: Path) -> None:
    for width, family in ((768, "Stable Diffusion 1.x"), (2048, "SDXL")):
        path = saved(tmp_path, ["image_proj.x", "ip_adapter.1.to_k_ip.weight"], (8, width))
        assert describe(str(path))["made_for"] == family


def test_what_a_file_says_about_itself(tmp_path: Path) -> None:
    tags = json.dumps({"10_cat": {"a cat": 5, "grass": 9}, "1_dog": {"a cat": 5}})
    names = ["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"]
    names += [names[0].replace("down.w", "up.w")]
    path = saved(
        tmp_path,
        names,
        **{
            "modelspec.resolution": "1216x832",
            "modelspec.prediction_type": "v",
            "ss_tag_frequency": tags,
            "ss_sd_model_name": "x.ckpt",
        },
    )
    facts = describe(str(path))
    assert facts["kind"] == "LoRA" and facts["use"] == "give it with loras"
    assert facts["written"] == {
        "base_model": "x.ckpt",
        "prediction_type": "v",
        "resolution": "1216x832",
        "trained_words": ["a cat", "grass"],
    }
    saved(tmp_path, names, **{"modelspec.trigger_phrase": "ohwx, a b ", "ss_tag_frequency": "{"})
    assert describe(str(path))["written"] == {"trained_words": ["ohwx", "a b"]}


def test_models(tmp_path: Path) -> None:
    path = single_file(checkpoint("sd15"), tmp_path / "m.safetensors")
    facts = describe(str(path), str(checkpoint("sd15")))
    assert (facts["kind"], facts["use"]) == ("single file", "give it with model")
    # Without the tokenizer's size the rest is told, and why it cannot be opened.
    unet = {n: a for n, a in load_file(path).items() if n.startswith("model.diffusion_model.")}
    save_file(unet, tmp_path / "unet.safetensors")
    facts = describe(str(tmp_path / "unet.safetensors"))
    assert "with config" in facts["notes"][0]
    assert describe(str(checkpoint("sd15")))["kind"] == "diffusers"
    assert describe(str(checkpoint("sd15") / "vae"))["kind"] == "a VAE, alone"


def test_controlnet_folder_and_file(tmp_path: Path) -> None:
    folder = Path(control_files.write_controlnet(tmp_path / "net", "sd15"))
    for place in (folder, next(folder.glob("*.safetensors"))):
        facts = describe(str(place))
        assert facts["kind"] == "a ControlNet" and "controlnets" in facts["use"]


def test_peft_folders_and_lora_folders(tmp_path: Path) -> None:
    lora_files.write("sd15-kohya", tmp_path)
    facts = describe(str(tmp_path / "sd15-kohya.safetensors"))
    assert facts["kind"] == "LoRA" and facts["written"] == {}


def test_verify(tmp_path: Path) -> None:
    convert(checkpoint("sd15"), tmp_path / "x")
    assert (
        "have the hashes of mlxdiff.json" in describe(str(tmp_path / "x"), verify=True)["verified"]
    )
    file = tmp_path / "x/unet/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="changed since it was written"):
        describe(str(tmp_path / "x"), verify=True)
    with pytest.raises(UsageError, match="not a converted folder"):
        describe(str(checkpoint("sd15")), verify=True)


# -------------------------------------------------------------------------------------- embeddings


def picture(folder: Path, text: str | None) -> Path:
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_text("sd-ti-embedding", text)
    Image.new("RGB", (8, 8)).save(folder / "emb.png", pnginfo=info)
    return folder / "emb.png"


def coded(data: Any) -> str:
    return base64.b64encode(json.dumps(data).encode()).decode()


def test_an_embedding_in_a_picture(tmp_path: Path) -> None:
    rows = [[0.5] * 32, [-1.0] * 32]
    data = {"string_to_param": {"*": {"TORCHTENSOR": rows}}, "name": "ink", "step": 1}
    path = picture(tmp_path, coded(data))
    found = open_embedding(path)
    assert found.token == "ink" and found.names == ("emb",)
    np.testing.assert_array_equal(found.vectors[""], np.array(rows, np.float32))
    facts = describe(str(path))
    assert (facts["kind"], facts["word"], facts["vectors"]) == ("textual inversion", "ink", 2)
    for text in ("%%%", coded([1]), coded({"string_to_param": {"*": 3}}), coded({})):
        with pytest.raises(CheckpointError, match="sd-ti-embedding is malformed"):
            open_embedding(picture(tmp_path, text))
    with pytest.raises(CheckpointError, match="has no text chunk"):
        open_embedding(picture(tmp_path, None))


def test_several_words_in_a_file(tmp_path: Path) -> None:
    tensors = {"<cat>": np.ones(32, np.float32), "<dog>": np.zeros(32, np.float32)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    assert describe(str(path))["words"] == ["<cat>", "<dog>"]
    assert open_embedding(path, "<dog>").vectors[""].max() == 0
    with pytest.raises(CheckpointError, match=r"'<cat>', '<dog>'.+choose with embeddings"):
        open_embedding(path)
    # inside a LoRA: bundled, or of cloneofsimo
    lora = {"lora_unet_x.lora_down.weight": WEIGHT, "lora_unet_x.lora_up.weight": WEIGHT}
    bundle = {
        f"bundle_emb.ink.{part}": np.ones((2, 32), np.float32) for part in ("clip_l", "clip_g")
    }
    save_file(lora | bundle, path)
    found = open_embedding(path)
    assert found.token == "ink" and set(found.vectors) == {"clip_l", "clip_g"}
    save_file(tensors | {"unet:0:up": WEIGHT, "unet:0:down": WEIGHT}, path, {"<cat>": "<embed>"})
    assert open_embedding(path).token == "<cat>"


@pytest.mark.parametrize("given", ["lora", "model"])
def test_other_files_as_embeddings(given: str, tmp_path: Path) -> None:
    if given == "lora":
        path, words = (
            lora_files.write("sd15-kohya", tmp_path),
            "looks like a LoRA; give it with loras",
        )
    else:
        path = single_file(checkpoint("sd15"), tmp_path / "m.safetensors")
        words = "looks like a whole model .+; give it with model"
    with pytest.raises(CheckpointError, match=words):
        open_embedding(path)
