"""``mlxdiff serve``: a page and HTTP interfaces; the model stays loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import click

from mlxdiff.cli import common_options, show_notes
from mlxdiff.cli.completion import like
from mlxdiff.cli.options import given_to, options_named
from mlxdiff.errors import UsageError, in_python, naming
from mlxdiff.run.options import LoadOptions

NEEDED = ("starlette", "uvicorn", "python_multipart")
LOADING = (
    "quantize",
    "backend",
    "dtype",
    "low_memory",
    "vae_tiling",
    "memory_limit",
    "exact",
    "fast",
)
"""Options of loading that hold for every model."""


def folder_option(flag: str, what: str) -> Any:
    """An option that takes folders of files that clients may name."""
    return click.option(
        flag,
        multiple=True,
        metavar="FOLDER",
        type=click.Path(path_type=Path),
        help=f"Folder of {what} that clients may name. Repeatable.",
    )


def shelf_options(command: Any) -> Any:
    """The options that say what clients may name."""
    for flag, what in (
        ("--ip-adapters", "IP-Adapters"),
        ("--controlnets", "ControlNets"),
        ("--vaes", "VAEs"),
        ("--embeddings", "textual inversions"),
        ("--loras", "LoRAs"),
        ("--models", "models"),
    ):
        command = folder_option(flag, what)(command)
    command = click.option(
        "--wildcards",
        metavar="FOLDER",
        type=click.Path(path_type=Path),
        help="Folder of name.txt for __name__ in prompts, for requests that ask for wildcards.",
    )(command)
    return click.option(
        "-m",
        "--model",
        multiple=True,
        shell_complete=like("model"),
        help="Model that clients may name: as for mlxdiff generate. Repeatable; the first is the "
        "default. Without one: the built-in model.",
    )(command)


gallery_option = click.option(
    "--gallery",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Where pictures are kept. Default: gallery in the folder of mlxdiff's cache.",
)


@click.command()
@click.option("--host", default="127.0.0.1", help="Address to listen at. Default: 127.0.0.1.")
@click.option("--port", default=7860, type=click.IntRange(0, 65535), help="Default: 7860.")
@shelf_options
@gallery_option
@click.option(
    "--gallery-limit",
    default=2.0,
    type=click.FloatRange(min=0.001),
    metavar="GB",
    help="The oldest pictures are deleted beyond this. Default: 2.",
)
@click.option(
    "--queue",
    default=16,
    type=click.IntRange(1, 1000),
    metavar="N",
    help="Requests that may wait. Default: 16.",
)
@click.option(
    "--keep-alive",
    default=300.0,
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Unload a model that is idle after this time; 0: never. Default: 300.",
)
@click.option(
    "--token",
    envvar="MLXDIFF_TOKEN",
    show_envvar=True,
    help="What clients must show; needed for every address but 127.0.0.1.",
)
@click.option(
    "--allow-host", multiple=True, metavar="NAME", help="Another name of this server. Repeatable."
)
@click.option(
    "--allow-origin",
    multiple=True,
    metavar="ORIGIN",
    help="Let web pages of this origin use the server. Repeatable.",
)
@click.option(
    "--max-upload",
    default=64,
    type=click.IntRange(1, 4096),
    metavar="MB",
    help="Largest request. Default: 64.",
)
@click.option(
    "--max-pixels",
    default=2048 * 2048,
    type=click.IntRange(4096),
    metavar="N",
    help="Largest picture that is drawn. Default: 4194304 (2048x2048).",
)
@options_named(LoadOptions, *LOADING)
@common_options
def serve(
    host: str,
    port: int,
    token: str | None,
    allow_host: tuple[str, ...],
    allow_origin: tuple[str, ...],
    max_upload: int,
    max_pixels: int,
    quiet: bool,
    **given: Any,
) -> None:
    """Keep a model loaded, and draw for a page in the browser and for programs.

    \b
    mlxdiff serve -m sd15 --loras ~/loras
    """  # fmt: skip
    show_notes(quiet=True)  # notes are for who asked, and stand in the job
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UsageError(
            f"the server needs {', '.join(missing)}; install it: pip install 'mlxdiff[server]', "
            "or '.[server]' in a clone"
        )
    from mlxdiff.serve.desk import Desk
    from mlxdiff.serve.guard import Policy
    from mlxdiff.serve.http import listen, server
    from mlxdiff.serve.request import Limits

    policy = Policy(
        host=host,
        names=frozenset(name.lower() for name in allow_host),
        origins=frozenset(origin.rstrip("/") for origin in allow_origin),
        token=token,
        upload_bytes=max_upload * 1_000_000,
    )
    listener = listen(host, port)
    with listener:
        engine, shelf = make_engine(**given)
        desk = Desk(engine, shelf, Limits(drawn_pixels=max_pixels))
        name = f"[{host}]" if ":" in host else host
        click.echo(f"mlxdiff serves http://{name}:{listener.getsockname()[1]}/")
        if not quiet:
            click.echo(f"Pictures are in {engine.gallery.folder}. Ctrl-C stops.", err=True)
        try:
            with naming(in_python):  # the names of the fields of a request
                server(desk, policy).run(sockets=[listener])
        finally:
            engine.close()


def make_engine(
    model: tuple[str, ...],
    models: tuple[Path, ...],
    loras: tuple[Path, ...],
    embeddings: tuple[Path, ...],
    vaes: tuple[Path, ...],
    controlnets: tuple[Path, ...],
    ip_adapters: tuple[Path, ...],
    wildcards: Path | None = None,
    gallery: Path | None = None,
    gallery_limit: float = 2.0,
    queue: int = 16,
    keep_alive: float = 300.0,
    **loading: Any,
) -> tuple[Any, Any]:
    """The engine, and the shelf of what clients may name. Raises: UsageError."""
    from mlxdiff import library
    from mlxdiff.serve.engine import Engine
    from mlxdiff.serve.gallery import Gallery
    from mlxdiff.serve.shelf import Shelf

    folders = {
        "models": models,
        "loras": loras,
        "embeddings": embeddings,
        "vaes": vaes,
        "controlnets": controlnets,
        "ip_adapters": ip_adapters,
    }
    shelf = Shelf(model, folders, wildcards)
    kept = library.folder().parent / "gallery" if gallery is None else gallery.expanduser()
    options = given_to(LoadOptions, loading)
    # Without a folder of LoRAs, a prompt must not find files of the folder that we happen to be in.
    options["lora_folder"] = loras[0] if loras else kept / "no-loras"
    engine = Engine(
        Gallery(kept, int(gallery_limit * 1e9)),
        options,
        queue_length=queue,
        keep_alive=keep_alive or None,
    )
    return engine, shelf
