"""Time a model on this machine and compare it with the speed of the machine.

The record is meant to be posted. It contains no names of people, computers, folders or prompts. Its
keys are fixed by SCHEMA; new keys may be added. docs/performance.md describes every key.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from datetime import date
from statistics import median
from typing import Any

import numpy as np

from mlxdiff.convert.report import human_bytes as human
from mlxdiff.errors import UsageError
from mlxdiff.loading import make_backend
from mlxdiff.machine import probe
from mlxdiff.networks.cost import multiply_adds
from mlxdiff.pipeline import Pipeline, Result, Step
from mlxdiff.run.kind import Kind, Network
from mlxdiff.run.memory import Held
from mlxdiff.run.options import RunOptions
from mlxdiff.run.planning import resolve
from mlxdiff.run.settings import Settings
from mlxdiff.store.catalogue import SHIPPED
from mlxdiff.store.folder import ModelSource
from mlxdiff.store.recipes import recipe_of

SCHEMA = "mlxdiff-bench/1"
PROMPT = "a small red circle left of a large blue square on a yellow background"
STEPS, PICTURES = 4, 3
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def bench(
    open_pipeline: Callable[[], Pipeline],
    *,
    pictures: int = PICTURES,
    steps: int | None = STEPS,
    on_step: Callable[[Step], None] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Time one picture cold, then several warm.

    Args:
        open_pipeline: opens the model; its time is part of the record.
        pictures: number of warm pictures.
        steps: number of sampling steps; None takes the default of ``Pipeline.generate``.
        on_step: called with each Step.
        arguments: arguments of ``Pipeline.generate``; the prompt has a default, the seed is 0.
    Returns: the record, JSON values only.
    Raises: UsageError.
    """
    if pictures < 1:
        raise UsageError(f"count is {pictures}; expected at least 1")
    before = probe.facts()
    start = time.perf_counter()
    pipe = open_pipeline()
    opened = time.perf_counter() - start
    arguments = needed(pipe.model, arguments) | arguments
    arguments |= {"steps": steps, "seed": 0, "on_step": on_step}
    pipe.backend.reset_peak_memory()
    cold, cold_total = _timed(pipe, arguments)
    warm = [_timed(pipe, arguments) for _ in range(pictures)]
    peak = pipe.backend.peak_memory()
    ceiling = measured_ceiling(pipe.backend)
    settings = cold.settings
    work = arithmetic(pipe, settings)
    record = {
        "schema": SCHEMA,
        "date": date.today().isoformat(),
        "model": described(pipe),
        "run": {
            "width": settings.width,
            "height": settings.height,
            "steps": settings.steps,
            "evaluations": len(cold.timings["steps"]),
            "batch": work["batch"],
            "guidance": settings.guidance,
            "sampler": settings.sampler,
            "schedule": settings.schedule,
            "backend": pipe.backend.name,
            "device": pipe.backend.device(),
            "dtype": pipe.backend.dtype,
            "quantization": recipe_of(pipe.source),
            "low_memory": pipe.model.low_memory,
            "vae_tiling": pipe.model.band_bytes(*settings.drawn, pipe.model.low_memory) is not None,
            "pictures": pictures,
        },
        "machine": before,
        "versions": probe.versions(),
        "ceiling": ceiling,
        "work": work,
        "seconds": {
            "open": round(opened, 4),
            "cold": _stages(cold, cold_total),
            "warm": _spread([_stages(result, total) for result, total in warm]),
        },
        "memory": {
            "peak_bytes": peak,
            "counted": "arrays" if pipe.backend.name == "mlx" else "process",
            "estimate": pipe.memory(settings).to_dict(),
        },
    }
    record["share"] = _share(record)
    return record


def needed(model: Kind, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs that a model requires: a prompt or a class, a picture, a mask."""
    if model.maps is not None:
        return {"image": np.full((*model.default_size, 3), 128, np.uint8)}
    if model.lacks("text"):
        return {"label": 0} if model.takes_label else {}
    found: dict[str, Any] = {} if model.lacks("prompt") else {"prompt": PROMPT}
    if model.animates:
        return {"image": np.full((*model.default_size, 3), 128, np.uint8)}
    shown = model.edits or model.takes_depth or model.inpaints or model.upscales
    if shown or model.is_led:
        height, width = model.default_size
        sides = arguments.get("height") or height, arguments.get("width") or width
        if model.upscales:
            sides = model.latent_shape(*sides)[:2]
        found["image"] = np.full((*sides, 3), 128, np.uint8)
    if model.takes_depth:
        found["depth_image"] = np.arange(64.0).reshape(8, 8)
    if model.inpaints:
        found["mask"] = np.full(found["image"].shape[:2], 255, np.uint8)
    return found


def measured_ceiling(backend: Any) -> dict[str, Any]:
    """Measure the backend's speed: matrix products by dtype (GFLOP/s), and copying (GB/s)."""
    types = ["float32"] if backend.name == "numpy" else ["float32", "float16"]
    types += [backend.dtype] if backend.dtype not in types else []
    return {
        "matmul_gflops": {t: round(probe.matmul_rate(backend, t) / 1e9, 2) for t in types},
        "copy_gb_per_s": round(probe.copy_rate(backend) / 1e9, 2),
    }


def arithmetic(pipe: Pipeline, settings: Settings) -> dict[str, Any]:
    """Count the exact multiply-adds by stage, and the bytes of weights that a step reads."""
    model = pipe.model
    height, width, _ = model.latent_shape(*settings.drawn)
    batch = settings.batch(model)
    count: dict[str, int] = {}
    for name in model.source.components:
        config = model.source.config(name)
        if name == "unet":
            count["step"] = multiply_adds(config, height, width, batch=batch)
        elif name == "vae":
            count["vae"] = multiply_adds(model.vae_config, height, width)
        else:  # one text at a time; a picture once
            runs = batch if name.startswith("text_encoder") else 1
            count["text_encoder"] = count.get("text_encoder", 0) + runs * multiply_adds(config)
    return {
        "batch": batch,
        "multiply_adds": count,
        "weight_bytes_per_step": pipe.memory(settings).weights[Held(Network("unet"))],
    }


def expected_memory(source: ModelSource) -> dict[str, Any] | None:
    """Estimate the memory for one picture at the model's default size, on this machine.

    Returns: the estimate, or None if it cannot be made (the config gives no size, for example).
    """
    pipe = Pipeline(source, make_backend())
    try:
        settings = resolve(pipe.model, None, RunOptions(**needed(pipe.model, {}))).settings
    except UsageError:
        return None
    return {
        "backend": pipe.backend.name,
        "device": pipe.backend.device(),
        "dtype": pipe.backend.dtype,
        "width": settings.width,
        "height": settings.height,
        "peak_bytes": pipe.memory(settings).peak,
        "peak_bytes_low_memory": pipe.memory(settings, low_memory=True).peak,
    }


def described(pipe: Pipeline) -> dict[str, Any]:
    """Describe the model: its hub id if it has one (else "local"), family and parameter counts."""
    source = pipe.source
    name = str(source.provenance.get("source"))
    public = name in SHIPPED or (source.provenance.get("revision") and _HUB_ID.fullmatch(name))
    components = {
        part: sum(tensor.size for tensor in source.tensors(part).values())
        for part in source.components
    }
    return {
        "name": name if public else "local",
        "family": source.family,
        "parameters": components,
    }


def _timed(pipe: Pipeline, arguments: dict[str, Any]) -> tuple[Result, float]:
    start = time.perf_counter()
    result = pipe.generate(**arguments)
    return result, time.perf_counter() - start


def _stages(result: Result, total: float) -> dict[str, float]:
    """Return the seconds of each stage of one picture; the first step is separate."""
    timings = result.timings
    steps = timings["steps"]
    stages: dict[str, float] = {
        name: timings[name] for name in ("load", "text_encoder", "image") if name in timings
    }
    stages |= {"first_step": steps[0], "step": median(steps[1:] or steps), "unet": timings["unet"]}
    stages |= {"vae": timings["vae"], "total": total}
    return {name: round(seconds, 4) for name, seconds in stages.items()}


def _spread(pictures: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the shortest and the median time of each stage."""
    return {
        name: {
            "min": min(times := [stages[name] for stages in pictures]),
            "median": round(median(times), 4),
        }
        for name in pictures[0]
        if name not in ("load", "first_step")
    }


def _share(record: dict[str, Any]) -> dict[str, float]:
    """Compute the fraction of the measured ceiling that the shortest warm step reaches.

    ``matmul`` is its arithmetic rate divided by the rate of matrix products. ``weights`` is the
    rate of reading its weights once, divided by the speed of copying.
    """
    seconds = max(record["seconds"]["warm"]["step"]["min"], 1e-9)
    dtype = record["run"]["dtype"]
    flops = 2 * record["work"]["multiply_adds"]["step"]
    matmul = record["ceiling"]["matmul_gflops"][dtype] * 1e9
    copying = record["ceiling"]["copy_gb_per_s"] * 1e9
    return {
        "matmul": round(flops / matmul / seconds, 4),
        "weights": round(record["work"]["weight_bytes_per_step"] / copying / seconds, 4),
    }


def table(record: dict[str, Any]) -> list[str]:
    """Format a record as lines of text."""
    run, work, seconds = record["run"], record["work"], record["seconds"]
    host, ceiling, share = record["machine"], record["ceiling"], record["share"]
    cold, warm = seconds["cold"], seconds["warm"]
    memory = "" if host["memory_bytes"] is None else f", {human(host['memory_bytes'])} memory"
    versions = record["versions"]
    how = [run["dtype"], run["quantization"], "low memory" if run["low_memory"] else None]
    weights = ", ".join(filter(None, how))
    lines = [
        f"{record['model']['name']} ({record['model']['family']}), {run['width']}x{run['height']}, "
        f"{run['sampler']} {run['schedule']}, {run['steps']} steps, guidance {run['guidance']:g}",
        f"{run['backend']} on {run['device']}, {weights}; {host['processor']}, "
        f"{host['cores']} cores{memory}, {host['system']}",
        f"mlxdiff {versions['mlxdiff']}, MLX {versions['mlx'] or 'none'}, "
        f"NumPy {versions['numpy']}, Python {versions['python']}",
        "",
        f"{'seconds':16}{'first picture':>14}{'then: shortest':>16}{'median':>10}",
        f"{'open the model':16}{seconds['open']:14.3f}",
    ]
    names = {
        "load": "read weights",
        "text_encoder": "text encoder",
        "image": "encode image",
        "first_step": "first step",
        "step": "a step",
        "unet": f"{run['evaluations']} steps",
        "vae": "VAE decoder",
        "total": "picture",
    }
    for key, label in names.items():
        if key in cold:
            more = warm.get(key)
            tail = f"{more['min']:16.3f}{more['median']:10.3f}" if more else ""
            lines.append(f"{label:16}{cold[key]:14.3f}{tail}")
    rates = ", ".join(f"{rate:.4g} ({kind})" for kind, rate in ceiling["matmul_gflops"].items())
    lines += [
        "",
        f"a step: {2 * work['multiply_adds']['step'] / 1e9:.4g} GFLOP at batch {work['batch']}, "
        f"{human(work['weight_bytes_per_step'])} of weights",
        f"this machine: matrix products {rates} GFLOP/s, "
        f"copying {ceiling['copy_gb_per_s']:.4g} GB/s",
        f"a step reaches {share['matmul']:.0%} of the rate of matrix products"
        f" (and reads its weights at {share['weights']:.0%} of the copying speed)",
        f"memory: peak {human(record['memory']['peak_bytes'])}, "
        + ("arrays only" if record["memory"]["counted"] == "arrays" else "whole process"),
    ]
    if host["load"] is not None and host["load"] > host["cores"]:
        lines.append(
            f"Other programs kept this machine busy (load {host['load']:g} on {host['cores']} "
            "cores), so these times are too long."
        )
    return lines
