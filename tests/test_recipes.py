"""The recipes of docs/recipes.md run: with the real library where it is there, else a stand-in."""

from __future__ import annotations

import asyncio
import base64
import io
import re
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving import Server, fake, running

import mlxdiff
from mlxdiff.pictures import metadata

__all__ = ["fake"]

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"
PROMPT = "a red circle on a blue background"


def recipe(title: str) -> str:
    """The code below a heading."""
    _, _, rest = PAGE.read_text("utf-8").partition(f"## {title}\n")
    found = re.search(r"```python\n(.*?)```", rest.partition("\n## ")[0], re.DOTALL)
    assert found is not None, title
    return found[1]


def run(title: str, **names: Any) -> dict[str, Any]:
    """Run a recipe. Returns: its names."""
    found: dict[str, Any] = {"__name__": "recipe", **names}
    exec(compile(recipe(title), title, "exec"), found)
    return found


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    """Put a module into the place of one that is not installed."""
    module = types.ModuleType(name)
    for key, value in content.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(scope="module")
def drawn() -> Image.Image:
    return mlxdiff.load().generate(PROMPT, steps=2, seed=7).images[0]


def same(data: bytes, image: Image.Image) -> bool:
    with Image.open(io.BytesIO(data)) as found:
        return np.array_equal(np.asarray(found), np.asarray(image))


def test_async(drawn: Image.Image) -> None:
    draw = run("Async")["draw"]

    async def both() -> None:
        assert same(await draw(PROMPT, steps=2, seed=7), drawn)
        ticks = 0
        task = asyncio.create_task(draw(PROMPT, steps=400, seed=7))
        while ticks < 5:  # the loop stays free while it draws
            await asyncio.sleep(0.02)
            ticks += 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    start = time.monotonic()
    asyncio.run(both())  # waits for the thread, which stops after its step
    assert time.monotonic() - start < 20


def test_fastapi(drawn: Image.Image) -> None:
    pytest.importorskip("fastapi")
    client = pytest.importorskip("starlette.testclient").TestClient
    app = run("FastAPI")["app"]
    with client(app) as ask:
        answer = ask.get("/picture", params={"prompt": PROMPT, "steps": 2, "seed": 7})
        assert answer.status_code == 200 and answer.headers["x-seed"] == "7"
        assert same(answer.content, drawn)
        refused = ask.get("/picture", params={"prompt": PROMPT, "steps": 0})
        assert refused.status_code == 422 and "steps is 0" in refused.json()["detail"]


def test_gradio(monkeypatch: pytest.MonkeyPatch, drawn: Image.Image) -> None:
    said: list[Any] = []

    class Interface:
        def __init__(self, function: Any, inputs: Any, output: Any) -> None:
            self.function, self.inputs = function, inputs

        def launch(self) -> None:
            picture = self.function(PROMPT, 2.0, 7.0, lambda how, desc: said.append((how, desc)))
            assert np.array_equal(np.asarray(picture), np.asarray(drawn))

    names = ("Textbox", "Slider", "Number", "Image", "Progress")
    parts = {name: lambda *args, **kwargs: None for name in names}
    stand_in(monkeypatch, "gradio", Interface=Interface, **parts)
    run("Gradio")
    assert ((2, 2), "0 s left") in said and (0, "load unet") in said


def test_jupyter(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    stand_in(monkeypatch, "IPython")
    stand_in(
        monkeypatch, "IPython.display", display=shown.append, clear_output=lambda wait=False: None
    )
    found = run("Jupyter")
    assert shown and all(one.size == (256, 256) for one in shown)
    assert found["run"].result._repr_png_().startswith(b"\x89PNG")


def test_menu_bar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    notes: list[Any] = []

    class App:
        def __init__(self, name: str, **how: Any) -> None:
            self.title = how["title"]

    stand_in(
        monkeypatch,
        "rumps",
        App=App,
        MenuItem=lambda title, callback: (title, callback),
        Timer=lambda function, seconds: SimpleNamespace(start=lambda: None),
        Window=lambda *args, **how: SimpleNamespace(
            run=lambda: SimpleNamespace(clicked=1, text=PROMPT)
        ),
        notification=lambda *said: notes.append(said),
    )
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    (tmp_path / "Pictures").mkdir()
    opened: list[Any] = []
    found = run("A menu-bar app")
    monkeypatch.setattr(found["subprocess"], "run", lambda command, **how: opened.append(command))
    app = found["Painter"]()
    app.draw(PROMPT)
    ((_, file),) = opened
    assert metadata.read(file).prompt == PROMPT and app.said == "paint"
    app.show(None)
    assert app.title == "paint"
    app.stop(None)
    app.draw(PROMPT)
    assert notes and "cancelled" in notes[0][2]


class Layer:
    def setPixelData(self, data: bytes, *box: int) -> None:
        self.data, self.box = bytes(data), box


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("gallery")) as one:
        yield one


def test_krita(monkeypatch: pytest.MonkeyPatch, server: Server, drawn: Image.Image) -> None:
    """Qt's pictures are stood in for by Pillow's."""
    layer, added = Layer(), []

    class Buffer:
        def __init__(self, target: bytearray) -> None:
            self.target = target

        def open(self, mode: int) -> None:
            pass

    class QImage:
        Format_ARGB32 = 5

        def __init__(self, image: Image.Image) -> None:
            self.image = image

        @staticmethod
        def fromData(data: bytes) -> QImage:
            return QImage(Image.open(io.BytesIO(data)))

        def save(self, buffer: Buffer, form: str) -> None:
            data = io.BytesIO()
            self.image.save(data, form)
            buffer.target += data.getvalue()

        def convertToFormat(self, form: int) -> QImage:
            return self

        def byteCount(self) -> int:
            return 4 * self.image.width * self.image.height

        def constBits(self) -> Any:
            data = self.image.convert("RGBA").tobytes()
            return SimpleNamespace(asstring=lambda size: data[:size])

    document = SimpleNamespace(
        width=lambda: 67,
        height=lambda: 65,
        projection=lambda x, y, w, h: QImage(drawn.resize((w, h))),
        createNode=lambda name, kind: layer,
        rootNode=lambda: SimpleNamespace(addChildNode=lambda node, above: added.append(node)),
        refreshProjection=lambda: None,
    )
    instance = SimpleNamespace(activeDocument=lambda: document)
    stand_in(monkeypatch, "krita", Krita=SimpleNamespace(instance=lambda: instance))
    stand_in(monkeypatch, "PyQt5")
    qt = {"QBuffer": Buffer, "QByteArray": bytearray, "QIODevice": SimpleNamespace(WriteOnly=2)}
    stand_in(monkeypatch, "PyQt5.QtCore", **qt)
    stand_in(monkeypatch, "PyQt5.QtGui", QImage=QImage)
    code = recipe("Krita").replace("http://127.0.0.1:7860", server.url)
    exec(compile(code, "Krita", "exec"), {"__name__": "recipe"})
    assert added == [layer] and layer.box == (0, 0, 64, 64) and len(layer.data) == 4 * 64 * 64


def test_open_webui(server: Server) -> None:
    """What Open WebUI sends (its routers/images.py), with both of its engines."""
    assert server.ask("GET", "/sdapi/v1/options")[1]["sd_model_checkpoint"] == "builtin"
    models = server.ask("GET", "/sdapi/v1/sd-models")[1]
    assert models[0]["title"] and models[0]["model_name"]
    body: dict[str, Any] = {"sd_model_checkpoint": models[-1]["title"]}
    assert server.ask("POST", "/sdapi/v1/options", body)[0] == 200
    body = {"prompt": PROMPT, "batch_size": 1, "width": 64, "height": 64, "steps": 2}
    status, answer, _ = server.ask("POST", "/sdapi/v1/txt2img", body)
    assert status == 200 and answer["images"] and answer["info"]
    body = {"model": "builtin", "prompt": PROMPT, "n": 1, "size": "64x64"}
    body |= {"response_format": "b64_json", "steps": 2}
    status, answer, _ = server.ask("POST", "/v1/images/generations", body)
    assert status == 200, answer
    data = base64.b64decode(answer["data"][0]["b64_json"])
    assert data.startswith(b"\x89PNG")
