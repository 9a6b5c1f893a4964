"""ControlNet-Union: against diffusers; its modes; how it is opened, told and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from control_files import UNION_MODES, union_config, union_inputs, write_controlnet, write_union
from golden_data import cases, checkpoint, photo
from golden_runs import Opened, assert_drawn_again
from PIL import Image

import mlxdiff
from mlxdiff.cli import main
from mlxdiff.convert import open_controlnet, open_source
from mlxdiff.errors import CheckpointError, UsageError
from mlxdiff.loading import make_backend
from mlxdiff.networks.condition import Condition
from mlxdiff.networks.config import ControlNetConfig
from mlxdiff.networks.params import expected_parameters
from mlxdiff.pictures.control_modes import MODES
from mlxdiff.report.info import describe

GOLDEN = Path(__file__).parent / "golden" / "control" / "union.npz"
SMALL: dict[str, Any] = {"seed": 0, "width": 32, "height": 32, "steps": 2}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_union(tmp_path_factory.mktemp("union"))


@pytest.mark.parametrize("mode", UNION_MODES)
def test_it_predicts_as_diffusers(mode: int, net: Path, backend: str) -> None:
    opened = open_controlnet(net, open_source(checkpoint("sdxl")).config("unet"))
    chosen = make_backend(backend, "float32")
    model = chosen.load(opened.config, opened.tensors())
    given = {name: chosen.asarray(array) for name, array in union_inputs().items()}
    added = {name: given[name] for name in ("text_embeds", "time_ids")}
    temb = model.embed(given["timesteps"], **added) + model.embed_type(mode)
    picture = model.embed_image(given["image"], mode)
    found = model.predict(given["sample"], Condition(temb), model.read(given["text"]), picture, 0.7)
    with np.load(GOLDEN) as golden:
        for i, array in enumerate(found):
            expected = golden[f"{mode}-{i}"]
            bound = 2e-5 * np.abs(expected).max()  # as for the other networks, float32
            np.testing.assert_allclose(np.array(array), expected, rtol=0, atol=bound)


CASES = cases("union")


@pytest.mark.parametrize("case", CASES, ids=[c["case"] for c in CASES])
def test_pictures_equal_diffusers(case: dict[str, Any], backend: str, opened: Opened) -> None:
    assert_drawn_again(opened, case, backend)


def test_the_modes_of_the_published_nets() -> None:
    assert MODES[:6] == ("openpose", "depth", "sketch", "canny", "normal", "segment")
    config = ControlNetConfig.from_dict({"_class_name": "ControlNetUnionModel"})
    assert config.types is not None and (config.types.count, config.types.channels) == (6, 320)
    shapes = expected_parameters(config)
    assert shapes["task_embedding"] == (6, 320)
    assert shapes["transformer_layes.0.attn.in_proj.weight"] == (960, 320)
    assert shapes["control_add_embedding.linear_1.weight"] == (1280, 1536)


def test_a_single_file_is_the_folder(net: Path, tmp_path: Path) -> None:
    unet = open_source(checkpoint("sdxl")).config("unet")
    (file,) = net.glob("*.safetensors")
    one, other = open_controlnet(net, unet), open_controlnet(file, unet)
    assert one.config == other.config
    for name, tensor in one.tensors().items():
        np.testing.assert_array_equal(tensor.read(), other.tensors()[name].read())
    assert describe(str(file))["kind"] == describe(str(net))["kind"] == "a ControlNet-Union"


def test_pictures_follow_the_mode(net: Path, backend: str) -> None:
    pipe = mlxdiff.load(checkpoint("sdxl"), backend=backend, dtype="float32", controlnets=[net])
    image = photo(32, 32)
    drawn = {
        mode: pipe.generate("a", control_image=image, control_mode=mode, **SMALL)
        for mode in ("depth", "canny")
    }
    assert np.abs(drawn["depth"].latents - drawn["canny"].latents).max() > 1e-3
    assert drawn["canny"].metadata[0].extra["control_mode"] == ["canny"]
    guess = pipe.generate("a", control_image=image, control_mode="depth", guess_mode=True, **SMALL)
    assert np.isfinite(guess.latents).all()


def test_wrong_modes(net: Path, tmp_path: Path) -> None:
    pipe = mlxdiff.load(checkpoint("sdxl"), backend="numpy", controlnets=[net])
    given: dict[str, Any] = {"control_image": photo(32, 32), **SMALL}
    with pytest.raises(UsageError, match="needs the type of its picture; give control_mode with"):
        pipe.generate("a", **given)
    with pytest.raises(UsageError, match="control_mode is 'x'"):
        pipe.generate("a", control_mode="x", **given)
    six = write_union(tmp_path / "six", num_control_type=6)
    pipe = mlxdiff.load(checkpoint("sdxl"), backend="numpy", controlnets=[six])
    with pytest.raises(
        UsageError, match=r"has no mode 'tile'; .+ one of openpose, depth, .+segment$"
    ):
        pipe.generate("a", control_mode="tile", **given)
    plain = write_controlnet(tmp_path / "plain", "sdxl")
    pipe = mlxdiff.load(checkpoint("sdxl"), backend="numpy", controlnets=[plain])
    with pytest.raises(UsageError, match="leave the mode out"):
        pipe.generate("a", control_mode="depth", **given)
    bare = mlxdiff.load(checkpoint("sdxl"), backend="numpy")
    with pytest.raises(UsageError, match="ControlNet"):
        bare.generate("a", control_mode="depth", **SMALL)


def test_what_does_not_fit(net: Path, tmp_path: Path) -> None:
    other = r"another kind of model|is for an SDXL"
    with pytest.raises((CheckpointError, UsageError), match=other):
        open_controlnet(net, open_source(checkpoint("sd15")).config("unet"))
    assert union_config()["num_control_type"] == 8


def test_on_the_command_line(net: Path, tmp_path: Path) -> None:
    Image.fromarray(photo(32, 32)).save(tmp_path / "p.png")
    words = ["generate", "a", "-m", checkpoint("sdxl"), "--controlnet", net, "--backend", "numpy"]
    words += ["--control-image", tmp_path / "p.png", "--control-mode", "tile", "-s", "1"]
    words += ["--width", "32", "--height", "32", "--steps", "1", "-o", tmp_path / "x.png"]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
