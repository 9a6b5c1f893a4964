"""Tools for agents: generate, edit, info, models (Model Context Protocol, the official SDK)."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping
from typing import Any

from mcp import types
from mcp.server import Server, ServerRequestContext
from mcp.server.stdio import stdio_server

from mlxdiff._version import __version__
from mlxdiff.errors import MlxdiffError, UsageError
from mlxdiff.pictures import metadata
from mlxdiff.serve.engine import Engine
from mlxdiff.serve.request import Limits, order_of, picture_of
from mlxdiff.serve.schema import request_schema
from mlxdiff.serve.shelf import KINDS, Shelf

LOOK_SECONDS = 0.1
"""How often the progress of a picture is looked at."""


class Tools:
    """Tools that agents can call.

    Args:
        engine, shelf, limits: as of a server.
    """

    def __init__(self, engine: Engine, shelf: Shelf, limits: Limits) -> None:
        self.engine, self.shelf, self.limits = engine, shelf, limits

    def list(self) -> list[types.Tool]:
        """Describe all tools."""
        schema = request_schema()
        image = schema["properties"]["image"]
        return [
            types.Tool(
                name="generate",
                description="Draw pictures from a prompt. Returns PNG pictures and their seeds.",
                input_schema=schema | {"required": ["prompt"]},
            ),
            types.Tool(
                name="edit",
                description="Change a picture as a prompt says; with a mask, only where the mask "
                "is white. Returns PNG pictures and their seeds.",
                input_schema=schema | {"required": ["prompt", "image"]},
            ),
            types.Tool(
                name="info",
                description="Read how a picture was made: prompt, seed, settings.",
                input_schema={
                    "type": "object",
                    "properties": {"image": image},
                    "required": ["image"],
                },
            ),
            types.Tool(
                name="models",
                description="List the models, LoRAs and other files that a request may name.",
                input_schema={"type": "object", "properties": {}},
            ),
        ]

    async def call(
        self, name: str, given: Mapping[str, Any], context: Any = None
    ) -> types.CallToolResult:
        """Call a tool. An error of mlxdiff is a result that says so."""
        try:
            if name in ("generate", "edit"):
                return await self._draw(name, given, context)
            if name == "info":
                picture = picture_of(given.get("image"), "image", self.limits)
                return _said(metadata.of_picture(picture, "image").to_dict())
            if name == "models":
                return _said({kind: list(self.shelf.names(kind)) for kind in KINDS})
            raise UsageError(f"there is no tool {name!r}")
        except MlxdiffError as error:
            text = types.TextContent(type="text", text=" ".join(str(error).split()))
            return types.CallToolResult(content=[text], is_error=True)

    async def _draw(
        self, name: str, given: Mapping[str, Any], context: Any
    ) -> types.CallToolResult:
        if name == "edit" and given.get("image") is None:
            raise UsageError("image: no picture is sent")
        order = await asyncio.to_thread(order_of, given, self.shelf, self.limits)
        job = self.engine.submit(order)
        shown = -1
        try:
            while not job.has_ended:
                await asyncio.sleep(LOOK_SECONDS)
                if context is not None and job.step != shown:
                    shown = job.step
                    await context.session.report_progress(job.progress, 1.0, job.stage)
        finally:  # an agent that gives up cancels
            if not job.has_ended:
                self.engine.cancel(job)
        if job.error is not None:
            raise job.error
        pictures = [
            types.ImageContent(
                type="image", data=base64.b64encode(one.png).decode(), mime_type="image/png"
            )
            for one in job.drawn
        ]
        files = [None if one.id is None else f"{one.id}.png" for one in job.drawn]
        said = {"seeds": [one.seed for one in job.drawn], "files": files, "notes": job.notes}
        text = types.TextContent(type="text", text=json.dumps(said))
        return types.CallToolResult(content=[*pictures, text])


def _said(found: Mapping[str, Any]) -> types.CallToolResult:
    return types.CallToolResult(
        content=[types.TextContent(type="text", text=json.dumps(found))],
        structured_content=dict(found),
    )


def make_server(engine: Engine, shelf: Shelf, limits: Limits) -> Server[Any]:
    """The MCP server."""
    tools = Tools(engine, shelf, limits)

    async def on_list(context: ServerRequestContext[Any], params: Any) -> types.ListToolsResult:
        return types.ListToolsResult(tools=tools.list())

    async def on_call(
        context: ServerRequestContext[Any], params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        return await tools.call(params.name, params.arguments or {}, context)

    return Server("mlxdiff", version=__version__, on_list_tools=on_list, on_call_tool=on_call)


def run(engine: Engine, shelf: Shelf, limits: Limits) -> None:
    """Serve standard input and output until it ends."""
    server = make_server(engine, shelf, limits)

    async def serve() -> None:
        async with stdio_server() as (reader, writer):
            await server.run(reader, writer, server.create_initialization_options())

    asyncio.run(serve())
