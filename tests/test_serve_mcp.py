"""``mlxdiff mcp`` with the official client of the protocol, and ``mlxdiff capabilities``."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image
from serving import FakePipeline, fake

from mlxdiff.cli import main
from mlxdiff.serve.engine import Engine
from mlxdiff.serve.gallery import Gallery
from mlxdiff.serve.request import Limits
from mlxdiff.serve.shelf import Shelf

mcp = pytest.importorskip("mcp")

__all__ = ["fake"]


def talk(tmp_path: Path, conversation: Callable[[Any], Awaitable[Any]]) -> Any:
    """Let a client talk to a server of tools."""
    from mlxdiff.serve.mcp import make_server

    engine = Engine(Gallery(tmp_path, 10_000_000))

    async def run() -> Any:
        async with mcp.Client(make_server(engine, Shelf(), Limits())) as client:
            return await conversation(client)

    try:
        return asyncio.run(run())
    finally:
        engine.close()


def test_tools_are_listed(tmp_path: Path, fake: type[FakePipeline]) -> None:
    async def conversation(client: Any) -> Any:
        return (await client.list_tools()).tools

    tools = {tool.name: tool for tool in talk(tmp_path, conversation)}
    assert set(tools) == {"generate", "edit", "info", "models"}
    assert "steps" in tools["generate"].input_schema["properties"]
    assert tools["edit"].input_schema["required"] == ["prompt", "image"]


def test_a_picture_is_drawn_changed_and_described(tmp_path: Path, fake: type[FakePipeline]) -> None:
    async def conversation(client: Any) -> Any:
        shares: list[float] = []

        async def on_progress(share: float, total: float | None, message: str | None) -> None:
            shares.append(share)

        drawn = await client.call_tool(
            "generate", {"prompt": "slow", "seed": 3, "steps": 20}, progress_callback=on_progress
        )
        image = drawn.content[0].data
        edited = await client.call_tool("edit", {"prompt": "a house", "image": image})
        info = await client.call_tool("info", {"image": image})
        models = await client.call_tool("models", {})
        return drawn, edited, info, models, shares

    drawn, edited, info, models, shares = talk(tmp_path, conversation)
    assert drawn.content[0].mime_type == "image/png"
    assert Image.open(io.BytesIO(base64.b64decode(drawn.content[0].data))).size == (64, 64)
    assert json.loads(drawn.content[1].text)["seeds"] == [3]
    assert not edited.is_error and "image" in fake.made[0].calls[-1]
    assert json.loads(info.content[0].text)["seed"] == 3
    assert "builtin" in json.loads(models.content[0].text)["models"]
    assert shares == sorted(shares) and len(shares) > 1


@pytest.mark.parametrize(
    ("tool", "given", "said"),
    [
        ("generate", {"prompt": "a", "steps": 0}, "steps is 0"),
        ("generate", {"prompt": "a", "model": "../x"}, "no model"),
        ("generate", {"prompt": "fail"}, "another number"),
        ("edit", {"prompt": "a", "image": "/etc/passwd"}, "image"),
        ("info", {"image": "x"}, "image"),
    ],
)
def test_an_agent_is_told_what_is_wrong(
    tmp_path: Path, fake: type[FakePipeline], tool: str, given: dict[str, Any], said: str
) -> None:
    async def conversation(client: Any) -> Any:
        return await client.call_tool(tool, given)

    answer = talk(tmp_path, conversation)
    assert answer.is_error and said in answer.content[0].text


def test_the_command_over_standard_input_and_output(tmp_path: Path) -> None:
    """The official client starts ``mlxdiff mcp`` as a process, and draws."""
    from mcp.client.stdio import StdioServerParameters

    command = ["-m", "mlxdiff", "mcp", "--gallery", str(tmp_path)]
    process = StdioServerParameters(command=sys.executable, args=command)

    async def run() -> Any:
        async with mcp.Client(process) as client:
            tools = await client.list_tools()
            drawn = await client.call_tool("generate", {"prompt": "a", "steps": 1, "seed": 7})
            wrong = await client.call_tool("generate", {"prompt": "a", "steps": 0})
            return tools, drawn, wrong

    tools, drawn, wrong = asyncio.run(run())
    assert {one.name for one in tools.tools} == {"generate", "edit", "info", "models"}
    picture = Image.open(io.BytesIO(base64.b64decode(drawn.content[0].data)))
    assert picture.size == (64, 64) and json.loads(drawn.content[1].text)["seeds"] == [7]
    assert wrong.is_error and "steps is 0" in wrong.content[0].text


def test_capabilities_on_the_command_line() -> None:
    runner = CliRunner()
    found = json.loads(runner.invoke(main, ["capabilities", "-m", "builtin", "--json"]).output)
    assert found["schema"] == "mlxdiff.capabilities/1" and found["model"]["name"] == "builtin"
    assert json.loads(runner.invoke(main, ["capabilities", "--json"]).output)["model"] is None
    lines = runner.invoke(main, ["capabilities", "-m", "builtin"]).output
    assert "--crop  (not honoured: only SDXL" in lines
    refused = runner.invoke(main, ["capabilities", "-m", "org/name"])
    assert refused.exit_code == 2 and "convert it first" in refused.output


@pytest.mark.parametrize("command", ["serve", "mcp"])
def test_without_the_extra_the_command_says_what_to_install(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(main, [command])
    assert result.exit_code == 2 and "pip install 'mlxdiff[" in result.output
