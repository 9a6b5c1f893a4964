"""Stable Video Diffusion against diffusers, at 2 to 4 frames, on both backends."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_data import GOLDEN, assert_latents_close, assert_picture_close, checkpoint, photo
from safetensors.numpy import load_file
from single_files import real_names, single_file, sparse_file
from svd_files import SCHEDULER, tensors, write_svd

import mlxdiff
from mlxdiff.convert import convert, describe, open_source, recognise
from mlxdiff.errors import CheckpointError, UsageError
from mlxdiff.networks.config import read_unet, read_vae
from mlxdiff.pictures.resampling import blurred
from mlxdiff.pipeline import Pipeline
from mlxdiff.run.kind import PARTS
from mlxdiff.weights.files import open_file

CASES = json.loads((GOLDEN / "svd/cases.json").read_text())
SMALL = {"image": photo(32, 40), "width": 32, "height": 32, "steps": 1, "frames": 2, "seed": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_svd(tmp_path_factory.mktemp("svd") / "svd")


@pytest.fixture(scope="module")
def pipe_of(folder: Path) -> Callable[[str], Pipeline]:
    opened: dict[str, Pipeline] = {}

    def open_once(backend: str) -> Pipeline:
        if backend not in opened:
            opened[backend] = mlxdiff.load(folder, backend=backend, dtype="float32")
        return opened[backend]

    return open_once


@pytest.mark.parametrize(
    ("label", "backend"),
    [*((one, "numpy") for one in CASES), pytest.param("plain", "mlx", marks=pytest.mark.mlx)],
    indirect=["backend"],
)
def test_videos_equal_diffusers(
    label: str, backend: str, pipe_of: Callable[[str], Pipeline]
) -> None:
    golden = np.load(GOLDEN / "svd/videos.npz")
    arguments = CASES[label] | {"image": photo(*CASES[label]["image"])}
    result = pipe_of(backend).generate(**arguments)
    assert_latents_close(result.latents[0], golden[f"{label}/latents"])
    (video,) = result.videos
    assert_picture_close(np.stack([np.asarray(one) for one in video]), golden[f"{label}/frames"])


def test_what_it_says_of_itself(folder: Path, pipe_of: Callable[[str], Pipeline]) -> None:
    model = pipe_of("numpy").model
    has = {part for part in PARTS if model.lacks(part) is None}
    assert has == {"text", "image", "video", "animation"}
    said = describe(folder)
    assert (said["pipeline"], said["family"]) == ("StableVideoDiffusionPipeline", "svd")
    settings = pipe_of("numpy").settings(image=photo(32, 40))
    numbers = settings.frames, settings.fps, settings.motion_bucket, settings.noise_augmentation
    assert numbers == (4, 7.0, 127, 0.02)
    assert (settings.guidance, settings.min_guidance, settings.steps) == (3.0, 1.0, 25)
    assert (settings.width, settings.height, settings.decode_chunk) == (1024, 576, 4)
    assert settings.sampler == "euler"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"image": None}, r"give one \(image\)"),
        ({"prompt": "a"}, "it has no part for that"),
        ({"negative_prompt": "a"}, "it has no part for that"),
        ({"strength": 0.5}, "strength: .* it has no part for that"),
        ({"guidance_rescale": 0.5}, "guidance_rescale: .* no part"),
        ({"guider": "apg"}, "guider: .* no part"),
        ({"feature_reuse": 2}, "feature_reuse: .* no part"),
        ({"context_length": 8}, "context_length: .* no part"),
        ({"mask": photo(8, 8)}, "it has no part"),
        ({"sampler": "euler-a"}, "does not exist for this model, which takes continuous"),
        ({"width": 30}, "multiple of 8"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    arguments: dict[str, Any], says: str, pipe_of: Callable[[str], Pipeline]
) -> None:
    with pytest.raises(UsageError, match=says):
        pipe_of("numpy").generate(**SMALL | arguments)


def test_other_models_name_what_takes_its_options(opened: Any) -> None:
    with pytest.raises(UsageError, match="Stable Video Diffusion"):
        opened("sd15").generate("a", motion_bucket=3)


def test_additions_are_refused(pipe_of: Callable[[str], Pipeline], tmp_path: Path) -> None:
    pipe = pipe_of("numpy")
    for add in (pipe.set_controlnets, pipe.set_ip_adapters, pipe.set_loras, pipe.set_embeddings):
        with pytest.raises(UsageError, match="it has no part for that"):
            add([str(tmp_path)])
    with pytest.raises(UsageError, match="it has no part for that"):
        pipe.set_vae(tmp_path)


def test_converted_quantized_and_with_low_memory(
    folder: Path, tmp_path: Path, pipe_of: Callable[[str], Pipeline]
) -> None:
    expected = pipe_of("numpy").generate(**SMALL, count=2)
    convert(folder, tmp_path / "float32", dtype="float32")
    convert(tmp_path / "float32", tmp_path / "back", dtype="float32", to="diffusers")
    for part in ("unet", "vae"):
        file = tmp_path / "back" / part / "diffusion_pytorch_model.safetensors"
        written, original = load_file(file), tensors(part)
        assert written.keys() == original.keys()
        assert all(np.array_equal(written[name], original[name]) for name in original)
    low = mlxdiff.load(tmp_path / "float32", backend="numpy", low_memory=True)
    result = low.generate(**SMALL, count=2)
    assert_latents_close(result.latents, expected.latents)
    with pytest.raises(UsageError, match="cannot be written in one file"):
        convert(folder, tmp_path / "x.safetensors", to="single")
    few = mlxdiff.load(folder, backend="numpy", quantize=8).generate(**SMALL)
    assert np.abs(few.latents - expected.latents[:1]).max() < 0.1 * expected.latents.std()


# --------------------------------------------------------------------------------- original files


def test_the_original_file_draws_the_same(
    folder: Path, tmp_path: Path, pipe_of: Callable[[str], Pipeline]
) -> None:
    """With the folder's configs, as heads and frames are not in the file."""
    path = single_file(folder, tmp_path / "svd.safetensors", _unused())
    opened = mlxdiff.load(path, config=folder, backend="numpy", dtype="float32")
    result = opened.generate(**SMALL)
    np.testing.assert_array_equal(result.latents, pipe_of("numpy").generate(**SMALL).latents)
    convert(path, tmp_path / "converted", config=folder, dtype="float32")
    again = mlxdiff.load(tmp_path / "converted", backend="numpy").generate(**SMALL)
    np.testing.assert_array_equal(again.latents, result.latents)


def _unused() -> dict[str, np.ndarray]:
    """What an original file holds beside the model: halves of VAEs, and of OpenCLIP."""
    names = (
        "first_stage_model.encoder.conv_in.weight",
        "conditioner.embedders.3.encoder.decoder.conv_in.weight",
        "conditioner.embedders.3.encoder.post_quant_conv.bias",
        "conditioner.embedders.0.open_clip.model.positional_embedding",
        "conditioner.embedders.0.open_clip.model.logit_scale",
    )
    return dict.fromkeys(names, np.ones(3, np.float32))


@pytest.mark.parametrize(("name", "frames"), [("svd", 14), ("svd_xt_1_1", 25), ("next", 14)])
def test_what_the_published_files_imply(name: str, frames: int, tmp_path: Path) -> None:
    path = sparse_file(tmp_path / f"{name}.safetensors", real_names("svd"))
    path.with_suffix(".yaml").write_text("model:\n  params:\n    new: 1\n")
    model = open_source(path)
    unet, vae, encoder = (model.config(part) for part in ("unet", "vae", "image_encoder"))
    published = json.loads(gzip.decompress((GOLDEN / "names/unet.svd.json.gz").read_bytes()))
    assert unet == replace(read_unet(published["config"]), num_frames=frames)
    published = json.loads(gzip.decompress((GOLDEN / "names/vae.svd.json.gz").read_bytes()))
    assert vae == read_vae(published["config"])
    assert (encoder.hidden_act, encoder.num_attention_heads, encoder.image_size) == (
        "gelu",
        16,
        224,
    )
    assert model.scheduler_config == SCHEDULER
    assert any(f"frames: {frames} by the name" in note for note in model.notes)
    assert any(".yaml: not read" in note for note in model.notes)


def _without(names: dict[str, Any], *starts: str) -> dict[str, Any]:
    return {name: shape for name, shape in names.items() if not name.startswith(starts)}


LABELS = "model.diffusion_model.label_emb.0.0.weight"
PICTURES_ENCODER = "conditioner.embedders.3.encoder."
TURNED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "sv3d": (lambda names: names | {LABELS: (1280, 256)}, "takes 256 values.*SV3D"),
    "image decoder": (
        lambda names: {
            n: s
            for n, s in names.items()
            if not n.startswith("first") or not re.search("time_|mix_factor", n)
        },
        "svd_image_decoder.*use svd.safetensors",
    ),
    "no picture's encoder": (
        lambda names: _without(names, PICTURES_ENCODER),
        "missing tensors: .*quant_conv|no layers among frames",
    ),
    "no image encoder": (
        lambda names: _without(names, "conditioner.embedders.0."),
        "is Stable Video Diffusion, but has no image_encoder",
    ),
}


@pytest.mark.parametrize("kind", TURNED)
def test_similar_files_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    turn, says = TURNED[kind]
    with pytest.raises(CheckpointError, match=says) as caught:
        open_source(sparse_file(tmp_path / "x.safetensors", turn(real_names("svd"))))
    assert "\n" not in str(caught.value)


def test_configs_of_another_kind_of_model_are_refused(folder: Path, tmp_path: Path) -> None:
    alone = {n: s for n, s in real_names("sd15").items() if n.startswith("model.")}
    path = sparse_file(tmp_path / "sd15.safetensors", alone)
    with pytest.raises(CheckpointError, match=r"is Stable Diffusion 1, .* is Stable Video Diff"):
        open_source(path, config=folder)
    with pytest.raises(CheckpointError, match=r"is Stable Video Diffusion, .* is Stable Diffu"):
        open_source(
            sparse_file(
                tmp_path / "svd.safetensors",
                {n: s for n, s in real_names("svd").items() if n.startswith("model.")},
            ),
            config=checkpoint("sd15"),
        )


def test_zero_snr_has_no_meaning_for_it(folder: Path, tmp_path: Path) -> None:
    path = single_file(folder, tmp_path / "svd.safetensors")
    with pytest.raises(UsageError, match=r"zero_snr: this model was trained with"):
        open_source(path, config=folder, zero_snr=True)


def test_its_vae_alone_is_refused(folder: Path, tmp_path: Path, opened: Any) -> None:
    path = single_file(folder, tmp_path / "svd.safetensors")
    with pytest.raises(CheckpointError, match=r"the VAE of Stable Video Diffusion"):
        mlxdiff.load(checkpoint("sd15"), vae=path, backend="numpy")
    assert recognise.kind(open_file(path).tensors).startswith("a whole model in one file (Stable V")


def test_memory_grows_with_the_frames(pipe_of: Callable[[str], Pipeline]) -> None:
    pipe = pipe_of("numpy")
    few, many, chunked = (
        pipe.memory(pipe.settings(**SMALL | more)).stages
        for more in ({}, {"frames": 16}, {"frames": 16, "decode_chunk": 2})
    )
    assert many["unet"] > few["unet"] + 2e6
    assert many["vae"] > 2 * chunked["vae"]


def test_large_frames_are_seen_one_at_a_time(
    pipe_of: Callable[[str], Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = pipe_of("numpy").model.component("vae")
    z = np.random.default_rng(0).standard_normal((3, 4, 4, 4)).astype(np.float32)
    together = vae.decode(z)
    monkeypatch.setattr("mlxdiff.networks.spatio_temporal.LARGE", 1)
    np.testing.assert_allclose(vae.decode(z), together, atol=1e-5)


def test_what_helps_names_the_chunk(pipe_of: Callable[[str], Pipeline]) -> None:
    pipe = pipe_of("numpy")
    pipe.limit_memory(0.125)
    try:
        with pytest.raises(UsageError, match="frames decoded one at a time"):
            pipe.settings(**SMALL | {"frames": 16})
    finally:
        pipe.limit_memory(None)


def test_smoothing_reflects_at_the_edges() -> None:
    x = np.arange(12, dtype=np.float32).reshape(1, 12, 1)
    smooth = blurred(x, (0.001, 1.0), (1, 5))
    kernel = np.exp(-(np.arange(-2, 3) ** 2) / 2.0)
    reflected = np.array([2, 1, 0, 1, 2], np.float32)
    assert abs(smooth[0, 0, 0] - (kernel / kernel.sum()) @ reflected) < 1e-5
    assert np.isfinite(blurred(photo(3, 2).astype(np.float32), (3.0, 3.0), (13, 13))).all()
