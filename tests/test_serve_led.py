"""Models that a picture leads and models that draw videos, behind the server."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_data import checkpoint, photo
from PIL import Image
from serving import Server, running
from svd_files import write_svd

import mlxdiff
from mlxdiff.serve.shelf import Shelf

LED = ("variation", "unclip", "zero123")
DRAW: dict[str, Any] = {"steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("served")
    models = {name: checkpoint(name) for name in LED} | {"svd": write_svd(root / "svd")}
    folder = root / "models"
    folder.mkdir()
    for name, place in models.items():
        (folder / name).symlink_to(place)
    loading = {"backend": "numpy", "dtype": "float32"}
    with running(
        root / "gallery", shelf=Shelf(folders={"models": [folder]}), loading=loading
    ) as one:
        yield one


def sent(image: np.ndarray, **fields: Any) -> tuple[bytes, dict[str, str]]:
    """A form with a picture, as OpenAI's clients send it, and its headers."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    parts = [
        f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    head = '--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n'
    parts.append(f"{head}Content-Type: image/png\r\n\r\n".encode() + file.getvalue() + b"\r\n")
    return b"".join([*parts, b"--x--\r\n"]), {"content-type": "multipart/form-data; boundary=x"}


def varied(server: Server, image: np.ndarray, **fields: Any) -> tuple[int, Any]:
    status, answer, _ = server.ask("POST", "/v1/images/variations", *sent(image, **fields))
    return status, answer


@pytest.mark.parametrize("name", ["variation", "unclip"])
def test_variations_are_what_the_model_draws(name: str, server: Server) -> None:
    image = photo(64, 64)
    status, answer = varied(server, image, model=name, n=2, **DRAW)
    assert status == 200, answer
    pipe = mlxdiff.load(checkpoint(name), backend="numpy", dtype="float32")
    expected = pipe.generate(image=image, count=2, **DRAW).images
    assert [one["seed"] for one in answer["data"]] == [3, 4]
    for one, picture in zip(answer["data"], expected, strict=True):
        got = Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))
        np.testing.assert_array_equal(np.asarray(got), np.asarray(picture))


def test_another_view_is_an_option(server: Server) -> None:
    status, answer = varied(server, photo(64, 64), model="zero123", azimuth=60, **DRAW)
    assert status == 200, answer
    pipe = mlxdiff.load(checkpoint("zero123"), backend="numpy", dtype="float32")
    (expected,) = pipe.generate(image=photo(64, 64), azimuth=60.0, **DRAW).images
    got = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


def test_a_prompt_is_refused_by_name(server: Server) -> None:
    body = {"model": "variation", "prompt": "a dog", **DRAW}
    status, answer, _ = server.ask("POST", "/v1/images/generations", body)
    assert status == 400 and "it reads no text" in answer["error"]["message"]


def test_a_video_is_refused_by_name(server: Server, tmp_path: Path) -> None:
    says = "svd: this model draws videos, and the server returns pictures; use mlxdiff generate"
    status, answer = varied(server, photo(32, 32), model="svd")
    assert status == 400 and answer["error"]["message"] == says
    body = {"model": "svd", "prompt": "a dog"}
    status, answer, _ = server.ask("POST", "/v1/images/generations", body)
    assert status == 400 and answer["error"]["message"] == says
