"""``mlxdiff upscale``: pictures in, larger PNG files out."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from mlxdiff.cli import ProgressBar, common_options, show_notes
from mlxdiff.cli.completion import files
from mlxdiff.cli.options import options_named
from mlxdiff.errors import UsageError
from mlxdiff.machine.stopping import uninterrupted
from mlxdiff.run.options import LoadOptions


@click.command()
@click.argument("pictures", nargs=-1, required=True, metavar="PICTURE...", shell_complete=files)
@click.option(
    "-m",
    "--model",
    shell_complete=files,
    required=True,
    metavar="PATH",
    help="The network: a file (ESRGAN, Real-ESRGAN; .pth or .safetensors) or the hub id of one.",
)
@click.option(
    "-o",
    "--output",
    shell_complete=files,
    metavar="FILE",
    help="PNG file; {name} is filled in. Default: {name}-x4.png beside the picture.",
)
@click.option(
    "--scale",
    type=float,
    metavar="NUMBER",
    help="Size of the result, as times that of the picture; the result of the network is resized "
    "(Lanczos). Default: the network's.",
)
@click.option(
    "--cell",
    metavar="ROW,COLUMN/ROWSxCOLUMNS",
    help="Enlarge one picture of a grid: 2,1/2x2 is the lower left one of four.",
)
@click.option(
    "--tile",
    type=click.IntRange(0),
    metavar="N",
    help="Side of a tile, in pixels of the small picture; 0: none. Default: what memory allows.",
)
@click.option(
    "--tile-overlap",
    type=click.IntRange(0),
    metavar="N",
    help="Pixels that a tile has in common with its neighbours. Default: what a pixel of the "
    "network depends on, if at most 64, else 32.",
)
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
@click.option("--no-metadata", is_flag=True, help="Do not keep the prompt and the settings.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each picture.")
@options_named(LoadOptions, "backend", "dtype", "low_memory")
@common_options
def upscale(
    pictures: tuple[str, ...],
    model: str,
    output: str | None,
    scale: float | None,
    cell: str | None,
    tile: int | None,
    tile_overlap: int | None,
    force: bool,
    no_metadata: bool,
    as_json: bool,
    quiet: bool,
    **load: Any,
) -> None:
    """Enlarge each PICTURE by a network and say where the results are.

    \b
    mlxdiff upscale photo.jpg -m RealESRGAN_x4plus.pth
    mlxdiff upscale *.png -m 4x_NMKD-Siax_200k.pth -o "large/{name}.png"

    Transparency is enlarged, too; prompt and settings in a PNG are kept. A model that draws the
    larger picture (x4-upscaler) works with: mlxdiff generate -m x4-upscaler -i PICTURE
    """
    from mlxdiff.loading import load_upscaler
    from mlxdiff.pictures.grid import cell_of, parse_cell
    from mlxdiff.pictures.image import check_writable, save_png
    from mlxdiff.pictures.kept import kept_text

    show_notes(quiet)
    if scale is not None and not 0 < scale <= 64:
        raise UsageError(f"scale is {scale:g}; expected a number above 0, at most 64")
    place = None if cell is None else parse_cell(cell)
    given = {name: value for name, value in load.items() if value is not None}
    with ProgressBar("fetching", quiet) as progress:
        network = load_upscaler(
            model, tile=tile, tile_overlap=tile_overlap, progress=progress, **given
        )
    times = network.scale if scale is None else scale
    targets = [_target(Path(one), output, times) for one in pictures]
    if len(set(targets)) < len(targets):
        raise UsageError(f"{output} gives several pictures the same name; put {{name}} into it")
    for target in targets:
        if output is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
        check_writable(target, force)
    for picture, target in zip(pictures, targets, strict=True):
        start = time.perf_counter()
        source = picture if place is None else cell_of(picture, place)
        with ProgressBar("enlarging", quiet) as bar:
            large = network.picture(source, _on_tile(bar), scale=scale)
        text, profile = kept_text(picture, Path(model).name, times)
        with uninterrupted():
            save_png(large, target, {} if no_metadata else text, force, icc_profile=profile)
        seconds = time.perf_counter() - start
        if as_json:
            record = {
                "path": str(target),
                "width": large.width,
                "height": large.height,
                "scale": times,
                "seconds": round(seconds, 4),
                "peak_memory_bytes": network.backend.peak_memory(),
            }
            click.echo(json.dumps(record))
        else:
            click.echo(f"{target}  {large.width}x{large.height}  {seconds:.1f} s")


def _target(picture: Path, output: str | None, scale: float) -> Path:
    if output is None:
        return picture.with_name(f"{picture.stem}-x{scale:g}.png")
    return Path(output.replace("{name}", picture.stem))


def _on_tile(bar: Any) -> Any:
    """Report tiles to a progress bar; one tile is no progress."""
    if bar is None:
        return None
    return lambda done, total: bar(done, total, "tile") if total > 1 else None
