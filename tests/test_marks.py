"""What a single file says about its training: marks, metadata, a .yaml; options and folders."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from golden_data import checkpoint
from safetensors.numpy import save_file
from single_files import Tensors, ldm_tensors, real_names, single_file, sparse_file

import mlxdiff
from mlxdiff.cli import main
from mlxdiff.convert import SingleFile, convert, describe, open_source
from mlxdiff.convert.plain_yaml import NotPlain, parse
from mlxdiff.errors import CheckpointError, ConfigError, UsageError
from mlxdiff.store.folder import open_folder

EMPTY = np.zeros(0, np.float16)
V_AND_ZERO = {"v_pred": EMPTY, "ztsnr": EMPTY}
UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def sdxl() -> Tensors:
    return ldm_tensors(checkpoint("sdxl"))


def opened(path: Path, **options: Any) -> SingleFile:
    model = open_source(path, **options)
    assert isinstance(model, SingleFile)
    return model


def training(model: Any) -> tuple[str, bool]:
    """Prediction type, and whether the noise schedule ends at zero signal."""
    config = model.scheduler_config
    return config["prediction_type"], bool(config.get("rescale_betas_zero_snr"))


# ------------------------------------------------------------------- marks against a folder


FORMS = {
    "without VAE": lambda t: {k: v for k, v in t.items() if not k.startswith("first_stage_")},
    "U-Net in its place": lambda t: {k: v for k, v in t.items() if k.startswith(UNET)},
    "U-Net bare": lambda t: {k.removeprefix(UNET): v for k, v in t.items() if k.startswith(UNET)},
}


@pytest.mark.parametrize("form", FORMS)
def test_marks_count_more_than_the_folder(form: str, sdxl: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "vpred.safetensors"
    save_file(FORMS[form](sdxl) | V_AND_ZERO, path)
    folder = checkpoint("sdxl")
    model = opened(path, config=folder)
    assert training(model) == ("v_prediction", True)
    assert model.scheduler_config["timestep_spacing"] == "trailing"
    said = "\n".join(model.notes)
    assert f"prediction type: v_prediction, as the mark v_pred says; {folder} has epsilon" in said
    assert "zero terminal SNR: true, as the mark ztsnr says" in said
    assert "prediction_type overrides" in said and "zero_snr overrides" in said
    # The report, the converted folder and info say the same.
    report = convert(path, tmp_path / "converted", config=folder)
    assert all(note in report.notes for note in model.notes)
    assert training(open_folder(tmp_path / "converted")) == ("v_prediction", True)
    assert describe(path, folder)["prediction_type"] == "v_prediction"
    # A mark is no weight.
    assert {name for name, _ in model.ignored} >= set(V_AND_ZERO)


def test_a_folder_that_agrees_needs_no_note(sdxl: Tensors, tmp_path: Path) -> None:
    save_file({k: v for k, v in sdxl.items() if k.startswith(UNET)}, tmp_path / "x.safetensors")
    notes = opened(tmp_path / "x.safetensors", config=checkpoint("sdxl")).notes
    assert all("prediction" not in note and "SNR" not in note for note in notes)


def test_metadata_count_more_than_the_folder(tmp_path: Path) -> None:
    path = single_file(
        checkpoint("sdxl"), tmp_path / "x.safetensors", **{"modelspec.prediction_type": "v"}
    )
    model = opened(path, config=checkpoint("sdxl"))
    assert training(model) == ("v_prediction", False)
    assert any("as modelspec.prediction_type says" in note for note in model.notes)


@pytest.mark.parametrize("config", [None, "sdxl"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"prediction_type": "epsilon"}, ("epsilon", True)),
        ({"zero_snr": False}, ("v_prediction", False)),
        ({"prediction_type": "epsilon", "zero_snr": False}, ("epsilon", False)),
        ({"prediction_type": "v_prediction", "zero_snr": True}, ("v_prediction", True)),
    ],
)
def test_an_option_counts_more_than_marks_and_folder(
    config: str | None, options: dict[str, Any], expected: tuple[str, bool], tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    if config is None:
        sparse_file(path, real_names("sdxl") | {"v_pred": (0,), "ztsnr": ()})
    else:
        single_file(checkpoint(config), path, V_AND_ZERO)
        options = options | {"config": checkpoint(config)}
    model = opened(path, **options)
    assert training(model) == expected
    overridden = {"prediction type": expected[0] == "epsilon", "zero terminal SNR": not expected[1]}
    for what, is_overridden in overridden.items():
        told = [n for n in model.notes if n.startswith(what) and "as asked for" in n]
        assert len(told) == is_overridden


def test_an_option_gives_a_file_without_marks_zero_snr(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "x.safetensors", real_names("sd15"))
    model = opened(path, prediction_type="v_prediction", zero_snr=True)
    assert training(model) == ("v_prediction", True)
    model = opened(path, zero_snr=True)  # PNDM, the class of SD 1, has no such argument
    assert model.scheduler_config["_class_name"] == "DDIMScheduler"
    assert training(opened(path, zero_snr=False)) == ("epsilon", False)
    with pytest.raises(UsageError, match="zero_snr is for single files only"):
        open_source(checkpoint("sd15"), zero_snr=False)


def test_the_options_on_the_command_line(tmp_path: Path) -> None:
    path = single_file(checkpoint("sdxl"), tmp_path / "x.safetensors", V_AND_ZERO)
    given = ["convert", str(path), str(tmp_path / "out"), "--config", str(checkpoint("sdxl"))]
    done = CliRunner().invoke(main, [*given, "--no-zero-snr"])
    assert done.exit_code == 0, done.output
    assert "zero terminal SNR: false, as asked for; the mark ztsnr says true" in done.output
    assert training(open_folder(tmp_path / "out")) == ("v_prediction", False)
    pipe = mlxdiff.load(path, config=checkpoint("sdxl"), zero_snr=False, backend="numpy")
    assert training(pipe.source) == ("v_prediction", False)


def test_marks_that_contradict_each_other_are_told(tmp_path: Path) -> None:
    said = {"modelspec.prediction_type": "epsilon", "modelspec.resolution": "1024x1024"}
    path = sparse_file(tmp_path / "x.safetensors", real_names("sdxl") | {"v_pred": (0,)}, **said)
    model = opened(path)
    assert training(model) == ("v_prediction", False)
    assert model.notes[0] == (
        "prediction type: the mark v_pred says v_prediction, modelspec.prediction_type says "
        "epsilon; the former counts"
    )


def test_an_unknown_prediction_in_the_metadata_is_refused(tmp_path: Path) -> None:
    for word in ("flow", "edm", "v2"):
        said = {"modelspec.prediction_type": word}
        path = sparse_file(tmp_path / "x.safetensors", real_names("sdxl"), **said)
        with pytest.raises(CheckpointError, match=f"'{word}', which mlxdiff does not have"):
            open_source(path)


# ------------------------------------------------------------------------------------- resolution


@pytest.mark.parametrize(
    ("said", "size"),
    [
        ("1216x832", (104, 152)),
        ("832x1216", (152, 104)),
        ("1024x1024", (128, 128)),
        ("768", (96, 96)),
        (" 1152X896 ", (112, 144)),
        ("1216 by 832", (128, 128)),
        ("0x0", (128, 128)),
        ("1001x1001", (128, 128)),
        ("9999x9999", (128, 128)),
        ("١٠٢٤x1024", (128, 128)),
    ],
)
def test_the_resolution_is_width_x_height(said: str, size: tuple[int, int], tmp_path: Path) -> None:
    names = real_names("sdxl")
    path = sparse_file(tmp_path / "x.safetensors", names, **{"modelspec.resolution": said})
    model = opened(path)
    assert model.config("unet").sample_size == size
    assert describe(path)["resolution"] == [8 * side for side in size]
    understood = size != (128, 128) or said == "1024x1024"
    assert any("is not WIDTHxHEIGHT" in note for note in model.notes) is not understood


# ------------------------------------------------------------------------------------- EDM's noise


PLAYGROUND = {
    "edm_mean": np.array([-0.3, 0.4, -0.2, 0.5], np.float32),
    "edm_std": np.array([1.7, 1.2, 1.3, 1.05], np.float32),
}
COSXL = {
    "edm_vpred.sigma_max": np.array(120.0, np.float32),
    "edm_vpred.sigma_min": np.array(0.002, np.float32),
}
SMALL = {"width": 32, "height": 32, "steps": 3, "seed": 0}


@pytest.mark.parametrize(
    ("name", "base", "marks"),
    [
        ("playground", "segmind-vega", PLAYGROUND),
        ("cosxl", "segmind-vega", COSXL),
        ("cosxl-edit", "sdxl-pix2pix", COSXL),
    ],
)
def test_single_files_with_edms_noise_draw_as_the_folders(
    name: str, base: str, marks: Tensors, tmp_path: Path, backend: str
) -> None:
    """A file with these marks, on the folder of an ordinary model, is the model of diffusers."""
    path = single_file(checkpoint(base), tmp_path / "x.safetensors", marks)
    given = {"backend": backend, "dtype": "float32"}
    found = mlxdiff.load(path, config=checkpoint(base), **given)
    expected = mlxdiff.load(checkpoint(name), **given)
    assert found.source.config("vae") == expected.source.config("vae")
    extra = {"image": np.zeros((32, 32, 3), np.uint8)} if name == "cosxl-edit" else {}
    pictures = [
        pipe.generate("a", sampler="checkpoint", **SMALL, **extra).latents
        for pipe in (found, expected)
    ]
    assert np.array_equal(*pictures)
    assert any(note.startswith("scheduler: EDM") for note in found.source.notes)


@pytest.mark.parametrize("channels", [4, 8])
def test_the_configs_of_edms_files_are_derived(channels: int, tmp_path: Path) -> None:
    names = real_names("sdxl")
    first = f"{UNET}input_blocks.0.0.weight"
    names[first] = (names[first][0], channels, 3, 3)
    path = sparse_file(tmp_path / "x.safetensors", names)
    shapes = names | {"edm_vpred.sigma_max": (), "edm_vpred.sigma_min": ()}
    path = sparse_file(tmp_path / "x.safetensors", shapes)
    _fill(path, {"edm_vpred.sigma_max": 120.0, "edm_vpred.sigma_min": 0.002})
    model = opened(path)
    config = model.scheduler_config
    assert config["_class_name"] == "EDMEulerScheduler"
    assert (config["sigma_max"], config["sigma_data"]) == (120.0, 1.0)
    assert (config["prediction_type"], config["sigma_schedule"]) == ("v_prediction", "exponential")
    assert config["sigma_min"] == pytest.approx(0.002, rel=1e-3)  # stored in float16 here
    assert bool(model.model_index.get("is_cosxl_edit")) is (channels == 8)
    with pytest.raises(UsageError, match="EDM's noise"):
        open_source(path, zero_snr=True)


def _fill(path: Path, values: dict[str, float]) -> None:
    """Write float16 scalars into a sparse file."""
    import json

    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name, value in values.items():
            file.seek(8 + length + header[name]["data_offsets"][0])
            file.write(np.float16(value).tobytes())


@pytest.mark.parametrize(
    ("marks", "says"),
    [
        ({"edm_mean": PLAYGROUND["edm_mean"]}, "edm_std is missing"),
        (PLAYGROUND | {"edm_std": np.zeros(4, np.float32)}, "do not fit"),
        (PLAYGROUND | {"edm_std": np.ones(3, np.float32)}, "do not fit"),
        (PLAYGROUND | {"edm_mean": np.full(4, np.nan, np.float32)}, "not finite"),
        ({"edm_vpred.sigma_max": np.array(120.0, np.float32)}, "sigma_min is missing"),
        (COSXL | {"edm_vpred.sigma_max": np.zeros(10_000, np.float32)}, "misshapen"),
    ],
)
def test_damaged_marks_are_refused(marks: Tensors, says: str, tmp_path: Path) -> None:
    path = single_file(checkpoint("segmind-vega"), tmp_path / "x.safetensors", marks)
    with pytest.raises(CheckpointError, match=says):
        open_source(path, config=checkpoint("segmind-vega"))


def test_a_folder_of_another_process_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    import json
    import shutil

    for name, config in {
        "flow": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        "sigmas": {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
        "prediction": {"prediction_type": "flow_prediction"},
    }.items():
        shutil.copytree(checkpoint("sdxl"), tmp_path / name)
        place = tmp_path / name / "scheduler" / "scheduler_config.json"
        place.write_text(json.dumps(json.loads(place.read_text()) | config))
        for open_it in (open_source, describe, mlxdiff.load):
            with pytest.raises(ConfigError, match="flow matching") as caught:
                open_it(tmp_path / name)
            assert str(place) in str(caught.value) and "\n" not in str(caught.value)


def test_the_schedulers_class_stands_in_two_files(tmp_path: Path) -> None:
    import json
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(checkpoint("playground"), folder)
    place, index = folder / "scheduler" / "scheduler_config.json", folder / "model_index.json"
    config = json.loads(place.read_text())
    name = config.pop("_class_name")
    place.write_text(json.dumps(config))  # as diffusers does, the class is that of the index
    assert open_source(folder).scheduler_config["_class_name"] == name
    convert(folder, tmp_path / "converted")
    assert open_folder(tmp_path / "converted").scheduler_config["_class_name"] == name
    place.write_text(json.dumps(config | {"_class_name": "EulerDiscreteScheduler"}))
    with pytest.raises(ConfigError, match=f"{name}', a class of another noise process"):
        open_source(folder)
    parts = json.loads(index.read_text())
    parts["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    index.write_text(json.dumps(parts))
    with pytest.raises(ConfigError, match=r"model_index\.json: scheduler.*flow matching"):
        open_source(folder)


# ------------------------------------------------------------------------------------------- .yaml


YAML = """\
model:
  base_learning_rate: 1.0e-04
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: "v"  # comment
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: "jpg"
    cond_stage_key: "txt"
    image_size: 64
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    monitor: val/loss_simple_ema
    scale_factor: 0.18215
    use_ema: False

    scheduler_config: # 10000 warmup steps
      target: ldm.lr_scheduler.LambdaLinearScheduler
      params:
        warm_up_steps: [ 10000 ]
        f_start: [ 1.e-6 ]

    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        in_channels: 4
        channel_mult: [ 1, 2, 4, 4 ]
        num_heads: 8
        use_checkpoint: True
        legacy: False

    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        ddconfig:
          ch_mult:
          - 1
          - 2
          attn_resolutions: []
        lossconfig:
          target: torch.nn.Identity

    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
"""


def sd15_with(tmp_path: Path, yaml: str, name: str = "x.yaml") -> Path:
    (tmp_path / name).write_text(yaml, encoding="utf-8")
    return sparse_file(tmp_path / "x.safetensors", real_names("sd15"))


@pytest.mark.parametrize("name", ["x.yaml", "x.yml"])
def test_a_yaml_beside_the_file_is_read(name: str, tmp_path: Path) -> None:
    model = opened(sd15_with(tmp_path, YAML, name))
    assert training(model) == ("v_prediction", False)
    assert model.config("unet").sample_size == (64, 64)
    # Windows' line ends and a byte order mark change nothing.
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + YAML.replace("\n", "\r\n").encode())
    assert training(opened(tmp_path / "x.safetensors")) == ("v_prediction", False)
    epsilon = opened(tmp_path / "x.safetensors", prediction_type="epsilon")
    assert training(epsilon) == ("epsilon", False)
    assert any(f"parameterization in {name} says v_prediction" in n for n in epsilon.notes)


def test_the_yaml_counts_more_than_the_folder(tmp_path: Path) -> None:
    path = single_file(checkpoint("sd15"), tmp_path / "x.safetensors")
    (tmp_path / "x.yaml").write_text(YAML)
    model = opened(path, config=checkpoint("sd15"))
    assert training(model) == ("v_prediction", False)
    assert any("as parameterization in x.yaml says" in note for note in model.notes)


def test_what_the_yaml_says_reaches_the_configs(tmp_path: Path) -> None:
    changed = YAML.replace("image_size: 64", "image_size: 96").replace("0.18215", "0.13")
    changed = changed.replace("num_heads: 8", "num_heads: 8\n        upcast_attention: True")
    changed = changed.replace("linear_end: 0.0120", "linear_end: 0.02")
    model = opened(sd15_with(tmp_path, changed))
    assert model.config("unet").sample_size == (96, 96)
    assert model.config("unet").upcast_attention is True
    assert model.config("vae").scaling_factor == 0.13
    assert model.scheduler_config["beta_end"] == 0.02


def test_use_ema_takes_the_moving_averages(tmp_path: Path) -> None:
    tensors = ldm_tensors(checkpoint("sd15"))
    averages = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): array + np.float16(1)
        for name, array in tensors.items()
        if name.startswith(UNET)
    }
    save_file(tensors | averages, tmp_path / "x.safetensors")
    (tmp_path / "x.yaml").write_text(YAML.replace("use_ema: False", "use_ema: True"))
    model = opened(tmp_path / "x.safetensors", config=checkpoint("sd15"))
    bias = model.tensors("unet")["conv_out.bias"].read()
    np.testing.assert_array_equal(bias, tensors[f"{UNET}out.2.bias"] + np.float16(1))
    assert any("use_ema in x.yaml" in note for note in model.notes)


def test_a_yaml_of_sdxl(tmp_path: Path) -> None:
    text = """
model:
  target: sgm.models.diffusion.DiffusionEngine
  params:
    scale_factor: 0.13025
    disable_first_stage_autocast: True
    denoiser_config:
      target: sgm.modules.diffusionmodules.denoiser.DiscreteDenoiser
      params:
        num_idx: 1000
        scaling_config:
          target: sgm.modules.diffusionmodules.denoiser_scaling.SCALING
        discretization_config:
          target: sgm.modules.diffusionmodules.discretizer.LegacyDDPMDiscretization
    conditioner_config:
      params:
        emb_models:
          - is_trainable: False
            input_key: txt
            params:
              layer: hidden
"""
    path = sparse_file(tmp_path / "x.safetensors", real_names("sdxl"))
    for scaling, prediction in (("EpsScaling", "epsilon"), ("VScaling", "v_prediction")):
        (tmp_path / "x.yaml").write_text(text.replace("SCALING", scaling))
        assert training(opened(path)) == (prediction, False)
    (tmp_path / "x.yaml").write_text(text.replace("SCALING", "EDMScaling"))
    with pytest.raises(CheckpointError, match=r"'EDMScaling'; mlxdiff has EpsScaling, VScaling"):
        open_source(path)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"v"', '"flow"', "parameterization is 'flow'"),
        ("use_ema: False", "use_ema: maybe", "use_ema is 'maybe'; expected true or false"),
        ("use_ema: False", "brand_new_switch: 1", "model.params.brand_new_switch is unknown"),
        ("image_size: 64", "image_size: many", "image_size is 'many'"),
        ("linear_start: 0.00085", "linear_start: -1", "linear_start is -1"),
        ("num_heads: 8", "num_heads: 4", r"num_heads is 4; mlxdiff has 8 or -1"),
        ("use_ema: False", "use_ema: {a: 1}", "line 19 is not plain YAML"),
        ("use_ema: False", "use_ema: &a False", "line 19 is not plain YAML"),
        ("use_ema: False", "timesteps: 1000", "line 19 gives timesteps a second time"),
        ("use_ema: False", "\tuse_ema: False", "line 19 is indented by a tab|differently"),
        ("model:", "model:\n  x\n", "line 2"),
    ],
)
def test_a_yaml_that_is_not_understood_is_refused(
    old: str, new: str, says: str, tmp_path: Path
) -> None:
    assert old in YAML
    path = sd15_with(tmp_path, YAML.replace(old, new, 1))
    with pytest.raises(CheckpointError, match=says) as caught:
        open_source(path)
    assert "x.yaml" in str(caught.value) and "move it away" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "# nothing\n", "steps: 20\n", "- 1\n", "model:\n"])
def test_a_yaml_of_something_else_is_told(text: str, tmp_path: Path) -> None:
    model = opened(sd15_with(tmp_path, text))
    assert training(model) == ("epsilon", False)
    assert any("x.yaml: has no model.params" in note for note in model.notes)


def test_a_text_that_is_no_yaml_at_all(tmp_path: Path) -> None:
    path = sd15_with(tmp_path, YAML)
    for raw in (b"\xff\xfe\x00", b"model: \xe9\n", b"x" * 5_000_000):
        (tmp_path / "x.yaml").write_bytes(raw)
        with pytest.raises(CheckpointError, match="cannot be read as the config"):
            open_source(path)


def test_plain_yaml_survives_damage() -> None:
    """Every damaged text is read or refused, fast; nothing else is ever raised."""
    generator = random.Random(0)
    alphabet = "\n\n  :-#[]{}\"'&*!|>,abc019.~%@\t\r\u2028"
    for _ in range(3000):
        text = list(YAML)
        for _ in range(generator.randint(1, 20)):
            at = generator.randrange(len(text))
            text[at : at + generator.randint(0, 5)] = generator.choices(
                alphabet, k=generator.randint(0, 5)
            )
        try:
            parse("".join(text))
        except NotPlain as error:
            assert "\n" not in str(error)
    hostile = [
        "a" + " " * 900_000 + "b",
        "- " * 400_000,
        "a: [" + "1," * 400_000 + "]",
        "a:\n" * 300_000,
        "\n".join(" " * i + "a:" for i in range(1200)),
        "a: " + "9" * 900_000,
        '"' * 900_000,
    ]
    for text in hostile:
        start = time.process_time()
        try:
            parse(text)
        except NotPlain:
            pass
        assert time.process_time() - start < 2
