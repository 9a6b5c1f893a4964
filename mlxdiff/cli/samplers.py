"""``mlxdiff samplers``: the samplers and schedules that exist, and which one to take."""

from __future__ import annotations

import json
from typing import Any

import click

from mlxdiff.cli import common_options, show_notes
from mlxdiff.errors import MlxdiffError

_STEPS = 10
_CONFIG = {  # Stable Diffusion's own noise schedule, to count evaluations with
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "skip_prk_steps": True,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
_ADVICE = """\
Which one to take:
  (leave it out)    dpmpp-2m, or what a few-step model was distilled for
  dpmpp-2m          8 to 25 steps, any guidance
  unipc             5 to 10 steps
  euler-a           another picture at each step count; 20 to 40 steps
  lcm, tcd, euler   models and LoRAs for few steps, 1 to 8 steps, guidance 1
  checkpoint        the exact sampler of the model's authors
"""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@common_options
def samplers(as_json: bool, quiet: bool) -> None:
    """List what --sampler and --schedule take, and say which one to take.

    A sampler draws noise (stochastic), or it does not. Its cost is the number of evaluations of the
    network in 10 steps. The names of A1111, ComfyUI and diffusers are understood, too.
    """
    show_notes(quiet)
    found = listed()
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
        return
    click.echo(_ADVICE)
    click.echo(f"Cost: evaluations of the network in {_STEPS} steps. Stochastic: draws noise.\n")
    rows: list[tuple[str, ...]] = [("--sampler", "A1111's name", "cost", "", "other names")]
    for one in found["samplers"]:
        cost = "" if one["evaluations"] is None else str(one["evaluations"])
        kind = "stochastic" if one["stochastic"] else ""
        rows.append((one["id"], one["a1111"], cost, kind, ", ".join(one["also"])))
    _echo_table(rows)
    click.echo()
    _echo_table(
        [("--schedule", "A1111's name"), *((s["id"], s["a1111"]) for s in found["schedules"])]
    )


def listed() -> dict[str, Any]:
    """Return all samplers and schedules, as ``--json`` prints them."""
    from mlxdiff.samplers.names import SCHEDULE_NAMES
    from mlxdiff.samplers.registry import SAMPLERS

    return {
        "samplers": [
            {
                "id": one.id,
                "a1111": one.a1111,
                "also": [*one.also, *filter(None, [one.scheduler.reference])],
                **_cost(one.id),
            }
            for one in SAMPLERS.values()
        ],
        "schedules": [{"id": key, "a1111": name} for key, name in SCHEDULE_NAMES.items()],
    }


def _cost(sampler: str) -> dict[str, Any]:
    """Return the evaluations of ten steps, and whether they draw noise."""
    from mlxdiff.samplers import plan

    try:
        rows = plan(_CONFIG, sampler, "normal", _STEPS).rows
    except MlxdiffError:  # it exists for other models only
        return {"evaluations": None, "stochastic": False}
    return {"evaluations": len(rows), "stochastic": any(row.noise for row in rows)}


def _echo_table(rows: list[tuple[str, ...]]) -> None:
    """Print rows in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())
