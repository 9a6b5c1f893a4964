"""mlxdiff train embedding, controlnet, unconditional, finetune: from a folder to a result."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_data import checkpoint
from PIL import Image

import mlxdiff
from mlxdiff.convert import export
from mlxdiff.errors import UsageError

pytest.importorskip("mlx.core")

from mlxdiff.training.controlnet import config_for
from mlxdiff.training.data import open_data, open_pixels
from mlxdiff.training.train_controlnet import train_controlnet
from mlxdiff.training.train_embedding import train_embedding
from mlxdiff.training.train_finetune import train_finetune
from mlxdiff.training.train_unconditional import train_unconditional
from mlxdiff.weights.tensors import open_weights

pytestmark = pytest.mark.mlx

FEW: dict[str, Any] = {"steps": 1, "batch": 1, "learning_rate": 1e-3}
SMALL: dict[str, Any] = {**FEW, "resolution": 16, "channels": (8, 16), "layers": 1, "attention": 8}
THREE = {"steps": 3}  # after which labels matter: a new network begins with zeros


def pictures(folder: Path, side: int = 64, count: int = 3, caption: str | None = "a cat") -> Path:
    """Write pictures of smooth waves, with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:side, :side] / side
    for i in range(count):
        planes = [np.sin((i + 2) * (a * x + b * y)) for a, b in ((3, 1), (1, 4), (2, -3))]
        pixels = ((np.stack(planes, axis=-1) + 1) * 127).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        if caption is not None:
            (folder / f"{i}.txt").write_text(f"{caption} {i}")
    return folder


def weights(path: Path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in open_weights(path).items()}


@pytest.fixture(scope="module")
def cats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures") / "cats")


# From scratch


def test_a_new_model_of_pixels_with_classes(tmp_path: Path) -> None:
    for name in ("dots", "lines"):
        pictures(tmp_path / "in" / name, 16, 2, caption=None)
    out = tmp_path / "out"
    done = train_unconditional(
        tmp_path / "in", output=str(out), classes=True, noise="cosine", ema=0.5, **SMALL | THREE
    )
    assert done.report is not None and np.isfinite(done.report.loss)
    facts = json.loads((out / "training.json").read_text())
    assert facts["classes"] == ["dots", "lines"] and facts["steps"] == 3
    assert "0 dots, 1 lines" in (out / "README.md").read_text()
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"
    pipe = mlxdiff.load(out, backend="numpy")
    drawn = [pipe.generate(label=label, seed=0, steps=2).latents for label in (0, 1)]
    assert drawn[0].shape == (1, 16, 16, 3) and np.abs(drawn[0] - drawn[1]).max() > 0
    with pytest.raises(UsageError, match="already exists"):
        train_unconditional(tmp_path / "in", output=str(out), classes=True, **SMALL)


def test_a_new_model_goes_on_to_the_bit(tmp_path: Path) -> None:
    pictures(tmp_path / "in", 16, 5, caption=None)
    told = {**SMALL, "flip": True, "crop": "random", "ema": 0.9}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train_unconditional(tmp_path / "in", output=str(straight), **told | {"steps": 3})
    for steps in (1, 3):
        train_unconditional(
            tmp_path / "in", output=str(stopped), resume=True, **told | {"steps": steps}
        )
    file = "unet/diffusion_pytorch_model.safetensors"
    assert (straight / file).read_bytes() == (stopped / file).read_bytes()
    for changed in ({"channels": (16, 16)}, {"noise": "cosine"}, {"flip": False}):
        with pytest.raises(UsageError, match="its run had"):
            train_unconditional(tmp_path / "in", output=str(stopped), resume=True, **told | changed)


def test_a_model_that_cannot_be_halved(tmp_path: Path) -> None:
    pictures(tmp_path / "in", 18, caption=None)
    with pytest.raises(UsageError, match="cannot be halved 2 times"):
        train_unconditional(
            tmp_path / "in", output=str(tmp_path / "o"), resolution=18, channels=(8, 8, 8)
        )


# The whole U-Net


def test_finetune_changes_the_unet_alone(cats: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train_finetune(cats, model=checkpoint("sd15"), output=str(out), **FEW)
    before, after = (mlxdiff.load(path, backend="numpy") for path in (checkpoint("sd15"), out))
    for part in ("text_encoder", "vae", "unet"):
        same = [
            np.array_equal(tensor.read(), after.source.tensors(part)[name].read())
            for name, tensor in before.source.tensors(part).items()
        ]
        assert all(same) if part != "unet" else not any(same)
    assert after.source.scheduler_config == before.source.scheduler_config
    with pytest.raises(UsageError, match="quantize"):
        train_finetune(cats, model=checkpoint("sd15"), quantize=4, output=str(tmp_path / "q"))


# ControlNet


def test_a_controlnet_begins_with_the_models_own_pictures(cats: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = {"model": checkpoint("sd15"), "control": "edges", "output": str(out)}
    hint = Image.open(cats / "0.png")
    along = {"control_image": hint, "control_preprocess": "edges"}
    pipe = mlxdiff.load(checkpoint("sd15"), backend="numpy")
    own = pipe.generate("a cat", seed=1, steps=1).latents
    for rate in (1e-12, 1e-2):
        train_controlnet(cats, **told, **FEW | {"learning_rate": rate, "force": True})
        pipe.set_controlnets(out)
        found = pipe.generate("a cat", seed=1, steps=1, **along).latents
        assert (np.abs(found - own).max() < 1e-4) == (rate < 1e-6)


def test_control_images_come_from_a_folder_or_from_metadata(cats: Path, tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (i * 40, 0, 0)).save(maps / f"{i}.jpg", quality=100)
    model = mlxdiff.load(checkpoint("sd15"), backend="numpy").model
    data = open_data(cats, model, cache=tmp_path / "cache", control=maps, flip=True)
    hint = data.batch(0, 3, 0).hint
    assert hint is not None and hint.shape == (3, 64, 64, 3)
    reds = sorted(float(one.mean()) * 3 * 255 for one in hint)
    assert np.allclose(reds, [0, 40, 80], atol=2)
    (maps / "1.jpg").unlink()
    with pytest.raises(UsageError, match=r"no control image for 1\.png"):
        open_data(cats, model, cache=tmp_path / "cache", control=maps)
    with pytest.raises(UsageError, match=r"names no control image"):
        open_data(cats, model, cache=tmp_path / "cache", control="metadata")
    with pytest.raises(UsageError, match="no folder of control images and no preprocessor"):
        open_data(cats, model, cache=tmp_path / "cache", control="depths")
    with pytest.raises(UsageError, match="no control images: give control="):
        train_controlnet(cats, model=checkpoint("sd15"), output=str(tmp_path / "o"))


def test_a_controlnet_for_a_vae_of_another_factor() -> None:
    unet = {"block_out_channels": [8, 16], "sample_size": 8, "_class_name": "x"}
    found = config_for(unet, 4)
    assert found["conditioning_embedding_out_channels"] == [16, 32, 96]
    assert "sample_size" not in found
    with pytest.raises(UsageError, match="factor 16"):
        config_for(unet, 16)


# Words


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_a_word_changes_alone(model: str, tmp_path: Path) -> None:
    side = 64
    pictures(tmp_path / "in", side, caption="a photo of <own>")
    told: dict[str, Any] = {"model": checkpoint(model), "word": "<own>", "vectors": 2, **FEW}
    out = tmp_path / "own.safetensors"
    train_embedding(tmp_path / "in", output=str(out), resolution=side, **told)
    found = weights(out)
    assert set(found) == ({"clip_l", "clip_g"} if model == "sdxl" else {"<own>"})
    assert all(len(rows) == 2 and np.isfinite(rows).all() for rows in found.values())
    pipe = mlxdiff.load(checkpoint(model), backend="numpy", embeddings=[(out, "<own>")])
    plain = mlxdiff.load(checkpoint(model), backend="numpy")
    drawn = [
        one.generate("a photo of <own>", seed=1, steps=1, width=side, height=side).latents
        for one in (pipe, plain)
    ]
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-4


def test_the_forms_of_a_word_and_where_it_starts(cats: Path, tmp_path: Path) -> None:
    told: dict[str, Any] = {"model": checkpoint("sd15"), "word": "own", "caption": "x own"}
    told |= {"init_word": "a cat", **FEW | {"learning_rate": 1e-9, "steps": 1}}
    bare = pictures(tmp_path / "bare", caption=None)
    files = {form: tmp_path / f"{form}.safetensors" for form in ("diffusers", "a1111")}
    for form, file in files.items():
        train_embedding(bare, form=form, output=str(file), **told)
    (name, rows), (other, same) = (next(iter(weights(f).items())) for f in files.values())
    assert (name, other) == ("own", "emb_params") and np.array_equal(rows, same)
    source = mlxdiff.load(checkpoint("sd15"), backend="numpy").source
    ids = source.tokenizer().encode("a cat", pad=False)
    table = source.tensors("text_encoder")["text_model.embeddings.token_embedding.weight"].read()
    assert np.allclose(rows[0], table[ids[0]], atol=1e-6)
    with pytest.raises(UsageError, match=r"3 of 3 captions do not have the word 'own'"):
        train_embedding(cats, output=str(tmp_path / "e.safetensors"), **told)
    for word in (None, "", "two words"):
        with pytest.raises(UsageError, match="no word to teach"):
            train_embedding(bare, output=str(tmp_path / "e.safetensors"), **told | {"word": word})


# What can go wrong


def test_another_model_on_resume_is_refused(cats: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train_finetune(cats, model=checkpoint("sd15"), output=str(out), **FEW)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    told = {"output": str(out), "resume": True, **FEW | {"steps": 2}}
    with pytest.raises(UsageError, match="its run had") as caught:
        train_finetune(cats, model=checkpoint("sd21v"), **told)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="its run had"):
        train_controlnet(cats, model=checkpoint("sd15"), control="edges", **told)
    (tmp_path / "more").mkdir()
    for file in cats.glob("0.*"):
        (tmp_path / "more" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UsageError, match="its run had"):
        train_finetune(tmp_path / "more", model=checkpoint("sd15"), **told)
    assert {p: p.read_bytes() for p in before} == before


def test_a_disk_that_fills_up_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the result is written: the one before is still there, and the run can go on."""
    pictures(tmp_path / "in", 16, caption=None)
    out = tmp_path / "out"
    told: dict[str, Any] = {"output": str(out), "resume": True, **SMALL}
    train_unconditional(tmp_path / "in", **told)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}

    def full(*args: Any, **more: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(export, "write_safetensors", full)
        with pytest.raises(UsageError, match="No space left on device"):
            train_unconditional(tmp_path / "in", **told | {"steps": 2})
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert not list(tmp_path.glob(".out*"))
    done = train_unconditional(tmp_path / "in", **told | {"steps": 2})
    assert done.report is not None and done.report.steps == 2


def test_a_foreign_folder_is_never_replaced(tmp_path: Path) -> None:
    pictures(tmp_path / "in", 16, caption=None)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for force in ({"force": True}, {"resume": True}):
        with pytest.raises(UsageError, match="is not a folder that mlxdiff wrote"):
            train_unconditional(tmp_path / "in", output=str(out), **SMALL, **force)
    assert (out / "thesis.txt").read_text() == "years of work"


def test_pictures_are_checked_before_the_model_works(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in")
    (folder / "1.png").write_bytes(b"no picture")
    (folder / "2.txt").unlink()
    told = {"model": checkpoint("sd15"), "output": str(tmp_path / "out"), **FEW}
    with pytest.raises(UsageError, match=r"2 of the files cannot be used \(1 unreadable, 1 witho"):
        train_finetune(folder, **told)
    assert not list(tmp_path.glob("out*"))
    lines: list[str] = []
    train_finetune(folder, **told, skip_faulty=True, dry_run=True, say=lines.append)
    assert sum(line.startswith("Note: left out: ") for line in lines) == 2


@pytest.mark.parametrize("model", ["marigold-depth", "pix2pix", "variation"])
def test_what_needs_other_pictures_is_not_trained(model: str, cats: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "tuned")
    with pytest.raises(UsageError, match="which mlxdiff train does not have"):
        train_finetune(cats, model=checkpoint(model), output=out, **FEW)


def test_a_dry_run_writes_nothing(cats: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    done = train_finetune(cats, model=checkpoint("sd15"), dry_run=True, **FEW)
    assert any("GB of memory" in line for line in done.lines())
    pictures(tmp_path / "in", 16, caption=None)
    train_unconditional(tmp_path / "in", dry_run=True, **SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


# Batches


def test_batches_of_latents(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", count=4)
    Image.open(folder / "3.png").resize((128, 64)).save(folder / "3.png")
    model = mlxdiff.load(checkpoint("sd15"), backend="numpy").model
    told: dict[str, Any] = {"cache": tmp_path / "cache", "flip": True}
    data = open_data(folder, model, **told)
    data.prepare()
    assert data.size == 4 and data.batches(2) == 2
    kept = sorted((tmp_path / "cache").rglob("*.safetensors"))
    shapes = {data.batch(i, 2, 0).mean.shape for i in range(4)}
    assert shapes == {(2, 8, 8, 4), (2, 5, 11, 4)}
    batch = data.batch(0, 2, 0)
    assert batch.std is not None and (batch.std > 0).all()
    assert batch.text is not None and batch.text.states.shape == (2, 77, 32)
    assert batch.time_ids is None and batch.hint is None and batch.labels is None
    # The same again from the disk, by another object; another seed is another order.
    again = open_data(folder, model, **told)
    assert again.digest == data.digest
    for i in range(6):
        one, other = data.batch(i, 2, 7), again.batch(i, 2, 7)
        assert np.array_equal(one.mean, other.mean)
        assert one.text is not None and other.text is not None
        assert np.array_equal(one.text.states, other.text.states)
    assert sorted((tmp_path / "cache").rglob("*.safetensors")) == kept
    # A mirror is another picture for the VAE.
    assert len({data.batch(i, 1, 0).mean.tobytes() for i in range(40)}) == 8
    # What decides a batch decides the digest.
    assert open_data(folder, model, cache=tmp_path / "cache").digest != data.digest
    (folder / "0.txt").write_text("another caption")
    assert open_data(folder, model, **told).digest != data.digest


def test_batches_for_sdxl_know_sizes_and_crops(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", side=64, count=1)
    Image.open(folder / "0.png").resize((200, 100)).save(folder / "0.png")
    model = mlxdiff.load(checkpoint("sdxl"), backend="numpy").model
    data = open_data(
        folder, model, cache=tmp_path / "c", resolution=(64, 64), buckets=False, crop="random"
    )
    ids = {tuple(data.batch(i, 1, 0).time_ids[0]) for i in range(40)}  # type: ignore[index]
    assert ids == {(100, 200, 0, left, 64, 64) for left in (0, 16, 32, 48, 64)}
    assert data.empty is not None and not data.empty.states.any()
    assert data.batch(0, 1, 0).text.pooled is not None  # type: ignore[union-attr]


def test_pictures_of_the_class_weigh_as_much_as_the_others(cats: Path, tmp_path: Path) -> None:
    prior = pictures(tmp_path / "prior", count=2, caption=None)
    model = mlxdiff.load(checkpoint("sd15"), backend="numpy").model
    data = open_data(
        cats,
        model,
        cache=tmp_path / "c",
        prior_folder=prior,
        prior_caption="a pet",
        prior_weight=0.5,
        tokens=True,
    )
    assert data.size == 6
    batches = [data.batch(i, 2, 0) for i in range(3)]
    found = np.concatenate([batch.weights for batch in batches])
    assert sorted(found) == [0.5] * 3 + [1.0] * 3
    assert all(batch.text is None for batch in batches)
    tokens = batches[0].tokens
    assert tokens is not None and tokens["text_encoder"].shape == (2, 77)


def test_batches_of_pixels(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", side=24, count=2, caption=None)
    data = open_pixels(folder, resolution=(16, 16), flip=True, crop="random")
    batch = data.batch(0, 2, 0)
    assert batch.mean.shape == (2, 16, 16, 3) and np.abs(batch.mean).max() <= 1
    assert batch.std is None and batch.labels is None and batch.text is None
