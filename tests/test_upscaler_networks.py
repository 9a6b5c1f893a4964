"""Networks that enlarge a picture: every spelling of their files, against spandrel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from folders import random_tensors
from golden_data import GOLDEN
from safetensors.numpy import save_file
from sides import Side
from upscaler_files import FORMS, weights_of, write_upscaler

from mlxdiff.convert.upscaler import open_upscaler, structure
from mlxdiff.errors import CheckpointError
from mlxdiff.networks.config import CompactConfig, RRDBNetConfig
from mlxdiff.networks.registry import build
from mlxdiff.report.info import describe
from mlxdiff.run.upscaling import enlarge
from mlxdiff.weights.tensors import LazyTensor

EXPECTED = np.load(GOLDEN / "upscalers.npz")
BOUND = 2e-5  # of values around 1, in float32: 20 convolutions of 72 to 1152 products each


@pytest.mark.parametrize("name", FORMS)
def test_every_file_gives_what_spandrel_gives(name: str, backend: str, tmp_path: Path) -> None:
    component = open_upscaler(write_upscaler(name, tmp_path))
    assert component.config == FORMS[name].config
    side = Side(backend)
    network = side.backend.load(component.config, component.tensors())
    got = enlarge(network, side.backend, EXPECTED["picture"])
    expected = EXPECTED[name]
    assert got.shape == expected.shape and expected.std() > 0.15
    np.testing.assert_allclose(got, expected, atol=BOUND * max(1, np.abs(expected).max()))


@pytest.mark.parity
@pytest.mark.parametrize("name", FORMS)
def test_files_are_those_that_spandrel_reads(name: str, tmp_path: Path) -> None:
    torch, spandrel = pytest.importorskip("torch"), pytest.importorskip("spandrel")
    weights = {key: torch.from_numpy(value) for key, value in weights_of(FORMS[name]).items()}
    model = spandrel.ModelLoader().load_from_state_dict(weights)
    x = torch.from_numpy(EXPECTED["picture"]).permute(2, 0, 1)[None]
    with torch.no_grad():
        out = model.model(x)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(out, EXPECTED[name], atol=1e-5 * max(1, np.abs(out).max()))


@pytest.mark.parametrize("name", ["compact-x4.pth", "realesrgan-x2.safetensors"])
@pytest.mark.parametrize(("tile", "overlap"), [(8, None), (12, 40)])
def test_tiles_equal_the_whole(
    name: str, tile: int, overlap: int | None, backend: str, tmp_path: Path
) -> None:
    """Where they overlap by what a pixel depends on: to the rounding of sums in other order."""
    component = open_upscaler(write_upscaler(name, tmp_path))
    side = Side(backend)
    network = side.backend.load(component.config, component.tensors())
    picture = np.random.RandomState(1).rand(29, 23, 3).astype(np.float32)
    reach = component.config.reach
    overlap = reach if overlap is None else max(overlap, reach)
    whole = enlarge(network, side.backend, picture)
    parts = enlarge(network, side.backend, picture, tile, overlap)
    np.testing.assert_allclose(parts, whole, atol=BOUND * max(1, np.abs(whole).max()))


@pytest.mark.parametrize(
    "config",
    [
        RRDBNetConfig(8, 4, 1),
        RRDBNetConfig(8, 4, 1, 1),
        RRDBNetConfig(8, 4, 1, 2, 2),
        CompactConfig(4, 1, 2),
    ],
)
def test_reach_is_what_a_pixel_depends_on(config: RRDBNetConfig | CompactConfig) -> None:
    """A change of a pixel changes the results within reach, up to its end, and none beyond."""
    side = Side("numpy")
    network, _ = side.load(build(side.nn, config))
    side_length = 2 * config.reach + 9
    side_length += -side_length % config.shuffle
    middle = side_length // 2
    first = np.random.RandomState(0).rand(side_length, side_length, 3).astype(np.float32)
    second = first.copy()
    second[middle, middle] += 100.0
    changed = np.argwhere(
        (enlarge(network, side.backend, first) != enlarge(network, side.backend, second)).any(-1)
    )
    far = np.abs(changed // config.scale - middle).max()
    assert config.reach - 2 * config.shuffle <= far <= config.reach


def test_what_is_no_upscaler_is_named(tmp_path: Path) -> None:
    save_file({"lora_unet_x.lora_up.weight": np.zeros((2, 2), np.float32)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"LoRA.*loras.*expected an upscaler"):
        open_upscaler(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        open_upscaler(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        open_upscaler(tmp_path / "none.pth")
    weights = weights_of(FORMS["compact-x2.safetensors"])
    save_file(weights | {"body.0.weight": np.zeros((8, 1, 3, 3), np.float32)}, tmp_path / "g.pth")
    with pytest.raises(CheckpointError, match="takes 1 channels"):
        open_upscaler(tmp_path / "g.pth")
    del weights["body.3.weight"]
    save_file(weights, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match=r"missing.*body.3.weight"):
        open_upscaler(tmp_path / "part.pth")


HOSTILE: dict[str, dict[str, tuple[int, ...]]] = {
    "no first": {"model.0.weight": (8, 3, 3, 3), "model.1.sub.0.RDB1.conv1.0.weight": ()},
    "wide": {"conv_first.weight": (1 << 40, 3, 3, 3), "body.0.rdb1.conv1.weight": (4, 8, 3, 3)}
    | {"conv_last.weight": (3, 8, 3, 3)},
    "many": {"conv_first.weight": (8, 3, 3, 3), "body.9999.rdb1.conv1.weight": (4, 8, 3, 3)}
    | {"conv_last.weight": (3, 8, 3, 3)},
    "steep": {"conv_first.weight": (8, 3, 3, 3), "body.0.rdb1.conv1.weight": (4, 8, 3, 3)}
    | {"conv_last.weight": (3, 8, 3, 3), "conv_up99.weight": (8, 8, 3, 3)},
    "flat": {"body.0.weight": (), "body.1.weight": (8,)},
    "long": {"body.0.weight": (8, 3, 3, 3), "body.9998.weight": (12, 8, 3, 3)},
    "empty": {"body.0.weight": (0, 3, 3, 3), "body.2.weight": (0, 8, 3, 3)},
    "backwards": {
        "model.0.weight": (8, 48, 3, 3),
        "model.1.sub.0.RDB1.conv1.0.weight": (4, 8, 3, 3),
    }
    | {"model.2.weight": (3, 8, 3, 3)},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_shapes_are_errors_of_one_line(name: str, tmp_path: Path) -> None:
    tensors = {key: LazyTensor(shape, "F32", list) for key, shape in HOSTILE[name].items()}
    with pytest.raises(CheckpointError) as caught:
        structure(tmp_path / "x.pth", tensors)
    assert "\n" not in str(caught.value)


def test_other_networks_that_enlarge_are_not_taken_for_these(tmp_path: Path) -> None:
    swinir = {"conv_first.weight": (60, 3, 3, 3), "layers.0.conv.weight": (60, 60, 3, 3)}
    edsr = {"body.0.weight": (60, 3, 3, 3), "body.1.body.0.weight": (60, 60, 3, 3)}
    for shapes in (swinir, edsr, {}):
        tensors = {key: LazyTensor(shape, "F32", list) for key, shape in shapes.items()}
        assert structure(tmp_path, tensors) is None


def test_info_names_the_structure(tmp_path: Path) -> None:
    facts = describe(str(write_upscaler("realesrgan-x2.safetensors", tmp_path)))
    assert facts["kind"] == "an ESRGAN upscaler" and "mlxdiff upscale" in facts["use"]
    assert facts["architecture"] == (
        "ESRGAN (RRDBNet), 1 blocks of 8 channels, reads squares of 2x2 pixels"
    )
    assert facts["scale"] == 2
    facts = describe(str(write_upscaler("compact-x4.pth", tmp_path)))
    assert facts["kind"] == "a Real-ESRGAN compact upscaler" and facts["scale"] == 4
    assert "3 convolutions of 8 channels" in facts["architecture"]


def test_random_tensors_make_every_structure(tmp_path: Path) -> None:
    """The published structures, by their names and shapes alone."""
    published = {
        "x4plus": RRDBNetConfig(),
        "anime": RRDBNetConfig(blocks=6),
        "general": CompactConfig(),
        "video": CompactConfig(convolutions=16),
    }
    for name, config in published.items():
        if name == "x4plus":
            continue  # 67 MB
        save_file(random_tensors(config), tmp_path / f"{name}.safetensors")
        assert open_upscaler(tmp_path / f"{name}.safetensors").config == config
