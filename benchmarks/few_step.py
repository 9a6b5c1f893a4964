"""Measure the error of the samplers with few evaluations, on a trained model.

    python benchmarks/few_step.py --torch --cache FOLDER     # the built-in model
    python benchmarks/few_step.py --part reuse --prompts 8   # one part of the page anew
    python benchmarks/few_step.py MODEL --out FOLDER         # another model, without diffusers

The figures of each part stand in few_step.json beside this script, with the number of prompts and
of steps of the reference. They answer four questions in docs/few_step.md and docs/few_step.png:

1. The error of every sampler, number of evaluations and guidance scale: the root-mean-square
difference of the final latents from a fine solution of the probability-flow ODE from the same noise
(DPM-Solver++ 2M, 500 steps even in t), in units of the latents' standard deviation. Also the share
of pictures that show everything in their prompt, by examples/train_builtin/checker.py.
2. The cost and the error of guidance in an interval and of reused deep features. The unit of cost
is one evaluation of the U-Net: a guided evaluation counts as two, a shallow one as its share of the
multiply-adds.
3. The best choice of `auto` for models without fitted numbers: samplers and schedules side by side
(the parts `samplers` and, for those that came later, `later`).
4. Samplers and guiders whose target is another picture, which no distance can judge: the share of
pictures that show everything in their prompt.

The prompts are the fixed ones of examples/train_builtin/evaluate.py, which include held-out ones.
The other samplers are mlxdiff's, equal to diffusers' at every step
(tests/test_samplers_goldens.py). "normal" is the spacing of the model's own file. --cache keeps
every run, so a second call, or a call for more prompts, is cheap. Several calls with one --guidance
each can fill it at the same time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlxdiff import samplers
from mlxdiff.backends import numpy_layers
from mlxdiff.backends.numpy_layers import Conv2d, Linear
from mlxdiff.pictures.plot import curves
from mlxdiff.samplers.guidance import guided_evaluations

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "train_builtin"))
import checker  # noqa: E402
import evaluate  # noqa: E402
import teacher  # noqa: E402

COUNTS = (4, 5, 6, 8, 10, 12, 15, 20, 25)
GUIDANCE = (1.0, 4.0, 7.5)
METHODS = {
    "mlxdiff (auto)": ("auto", "auto"),
    "DPM-Solver++ 2M": ("dpmpp-2m", "normal"),
    "DPM-Solver++ 2M Karras": ("dpmpp-2m", "karras"),
    "UniPC": ("unipc", "normal"),
    "DDIM": ("ddim", "normal"),
    "Euler": ("euler", "normal"),
}
OURS, DDIM, FULL = "mlxdiff (auto)", "DDIM", "DPM-Solver++ 2M"
# Rows of question 2: steps, guidance interval, feature reuse: every Nth, or (below 1) an error.
CHEAPER_AT = 4.0
CHEAPER = (
    ("auto", 6, None, 1),
    ("auto", 8, None, 1),
    ("auto", 10, None, 1),
    ("auto", 12, None, 1),
    ("auto", 15, None, 1),
    ("dpmpp-2m", 20, None, 1),
    ("dpmpp-2m", 20, (0.0, 0.8), 1),
    ("dpmpp-2m", 20, (0.0, 0.6), 1),
    ("dpmpp-2m", 20, (0.0, 0.4), 1),
    ("dpmpp-2m", 20, (0.2, 1.0), 1),
    ("dpmpp-2m", 20, (0.2, 0.8), 1),
    ("dpmpp-2m", 20, None, 2),
    ("dpmpp-2m", 20, None, 3),
    ("dpmpp-2m", 20, (0.0, 0.6), 2),
    ("auto", 10, (0.0, 0.8), 1),
    ("auto", 10, (0.0, 0.6), 1),
    ("auto", 12, None, 2),
)
REUSE = (
    ("dpmpp-2m", 20, None, 1),
    ("dpmpp-2m", 14, None, 1),
    ("dpmpp-2m", 12, None, 1),
    ("dpmpp-2m", 10, None, 1),
    ("dpmpp-2m", 20, None, 2),
    ("dpmpp-2m", 20, None, 3),
    ("dpmpp-2m", 20, None, 0.05),
    ("dpmpp-2m", 20, None, 0.1),
    ("dpmpp-2m", 20, None, 0.2),
    ("dpmpp-2m", 20, None, 0.4),
)
# Rows of question 3, at guidance scales above 1.
CANDIDATES = {
    "dpmpp-2m trailing": ("dpmpp-2m", "trailing"),
    "dpmpp-2m karras": ("dpmpp-2m", "karras"),
    "dpmpp-2m ays": ("dpmpp-2m", "ays"),
    "dpmpp-2m linspace": ("dpmpp-2m", "linspace"),
    "dpmpp-2m leading": ("dpmpp-2m", "leading"),
    "unipc trailing": ("unipc", "trailing"),
    "ddim trailing": ("ddim", "trailing"),
}
LATER = {
    "dpmpp-2m trailing": ("dpmpp-2m", "trailing"),
    "dpmpp-2m karras": ("dpmpp-2m", "karras"),
    "dpmpp-2m kl-optimal": ("dpmpp-2m", "kl-optimal"),
    "dpmpp-2m gits": ("dpmpp-2m", "gits"),
    "dpmpp-2m bong-tangent": ("dpmpp-2m", "bong-tangent"),
    "res-multistep trailing": ("res-multistep", "trailing"),
    "ipndm trailing": ("ipndm", "trailing"),
    "ipndm-v trailing": ("ipndm-v", "trailing"),
    "dpm2 karras": ("dpm2", "karras"),
    "heunpp2 trailing": ("heunpp2", "trailing"),
    "dpm-fast": ("dpm-fast", "normal"),
    "ddim-uniform dpmpp-2m": ("dpmpp-2m", "ddim-uniform"),
}
CANDIDATE_COUNTS = (6, 8, 12, 20)
# Rows of question 4, by guidance scale.
JUDGED_COUNTS = (8, 20)  # evaluations
JUDGED = {
    4.0: (
        ("dpmpp-2m", "trailing"),
        ("dpmpp-2m", "karras"),
        ("euler-a", "trailing"),
        ("dpm2-a", "karras"),
        ("dpmpp-2s-a", "karras"),
        ("dpmpp-sde", "karras"),
        ("dpmpp-2m-sde", "karras"),
        ("dpmpp-3m-sde", "exponential"),
        ("er-sde", "trailing"),
        ("sa-solver", "trailing"),
        ("restart", "karras"),
    ),
    2.0: (
        ("dpmpp-2m", "trailing"),
        ("euler-cfg++", "trailing"),
        ("euler-a-cfg++", "trailing"),
        ("dpmpp-2m-cfg++", "trailing"),
    ),
}
GUIDED_AT = (4.0, 7.5)
GUIDED_STEPS = 12
GUIDERS: dict[str, dict[str, Any]] = {
    "no guider": {},
    "--guidance-interval 0,0.8": {"guidance_interval": (0.0, 0.8)},
    "--guidance-rescale 0.7": {"guidance_rescale": 0.7},
    "--guider apg": {"guider": "apg"},
    "--guider apg:original=1": {"guider": "apg:original=1"},
    "--guider cfg-zero": {"guider": "cfg-zero"},
    "--guider mimic:scale=3": {"guider": "mimic:scale=3"},
    "--guider pag": {"guider": "pag"},
    "--guider seg": {"guider": "seg"},
    "--guider slg": {"guider": "slg"},
    "--freeu 1.5,1.6,0.9,0.2": {"freeu": (1.5, 1.6, 0.9, 0.2)},
}
CHUNK = 4  # prompts computed and kept together


class Runs:
    """Final latents of runs over the fixed prompts, kept between calls.

    Args:
        args: arguments of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.network = teacher.Network(args.model, torch=args.torch, backend=args.backend)
        self.cache = args.cache
        rows = list(evaluate.ROWS)
        self.prompts = [
            evaluate.prompts_of(rows[i % len(rows)], i // len(rows) + 1)[-1]
            for i in range(args.prompts)
        ]
        self.fingerprint = self.network.fingerprint()
        self.asked = 0
        self.skipped: list[int] = []  # evaluations on old features, for each picture

    def plan(self, sampler: str, schedule: str, count: int, guidance: float | None) -> Any:
        return samplers.plan(
            self.network.config, sampler, schedule, count, family="sd1", guidance=guidance
        )

    def within(self, sampler: str, schedule: str, count: int, guidance: float) -> int:
        """Return the number of steps that take at most `count` evaluations."""
        steps = count
        while len(self.plan(sampler, schedule, steps, guidance)) > count and steps > 2:
            steps -= 1
        return steps

    def latents(
        self,
        plan: samplers.Plan,
        guidance: float,
        interval: tuple[float, float] | None = None,
        reuse: float = 1,
    ) -> np.ndarray:
        """Return the final latents of all prompts, (B, h, w, C)."""
        said = repr((self.fingerprint, plan.rows, plan.init_noise_sigma, guidance, interval, reuse))
        found = []
        for start in range(0, len(self.prompts), CHUNK):
            prompts = self.prompts[start : start + CHUNK]
            key = hashlib.sha256((said + repr((start, prompts))).encode()).hexdigest()[:20]
            noise = self.network.noise(range(start, start + len(prompts)))

            def draw(prompts: Sequence[str] = prompts, noise: np.ndarray = noise) -> Any:
                self.asked += len(plan) * len(prompts) * (1 if guidance <= 1.0 else 2)
                usual = interval is None and reuse == 1
                asker = self._whole(prompts, guidance)
                if reuse < 1:
                    return self._measured(plan, noise, prompts, guidance, reuse)
                if not usual:
                    asker = self._cheaper(prompts, guidance, interval, reuse, len(plan))
                x, state = np.float32(plan.init_noise_sigma) * noise, plan.start()
                for index, t in enumerate(plan.timesteps):
                    output = asker(plan.scale_model_input(x, state), t, index)
                    x, state = plan.step(x, output, state)
                return {"x": x}

            kept = teacher.cached(self.cache, f"run-{key}", draw)
            found.append(kept["x"])
            self.skipped += kept["skipped"].tolist() if "skipped" in kept else []
        return np.concatenate(found)

    def share(self, latents: np.ndarray) -> float:
        """Return the share of pictures that show everything in their prompt."""
        key = hashlib.sha256(latents.tobytes() + repr(self.prompts).encode()).hexdigest()[:20]

        def judge() -> dict[str, np.ndarray]:
            pictures = [np.asarray(one) for one in self.network.pipe.decode(latents)]
            return {"right": np.float64(checker.score(pictures, self.prompts)["right"])}

        return float(teacher.cached(self.cache, f"share-{key}", judge)["right"])

    def right(self, **options: Any) -> float:
        """Return the share of pictures that show everything, drawn by mlxdiff's own pipeline."""
        right = []
        for seed, prompt in enumerate(self.prompts):
            said = repr((self.fingerprint, seed, prompt, sorted(options.items())))
            key = hashlib.sha256(said.encode()).hexdigest()[:20]

            def judge(seed: int = seed, prompt: str = prompt) -> dict[str, np.ndarray]:
                drawn = self.network.pipe.generate(prompt, seed=seed, negative_prompt="", **options)
                pictures = [np.asarray(one) for one in drawn.images]
                return {"right": np.float64(checker.score(pictures, [prompt])["right"])}

            right.append(float(teacher.cached(self.cache, f"judged-{key}", judge)["right"]))
        return float(np.mean(right))

    def _measured(
        self,
        plan: samplers.Plan,
        noise: np.ndarray,
        prompts: Sequence[str],
        guidance: float,
        allowed: float,
    ) -> dict[str, np.ndarray]:
        """Draw with mlxdiff's own pipeline, which decides for each picture on its own."""
        ends, skipped = [], []

        class Count(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                if "feature reuse:" in record.getMessage():
                    skipped.append(int(record.getMessage().split()[2]))

        handler, logger = Count(), logging.getLogger("mlxdiff")
        logger.addHandler(handler)
        level = logger.level
        logger.setLevel(logging.INFO)
        try:
            for prompt, first in zip(prompts, noise, strict=True):
                result = self.network.pipe.generate(
                    prompt,
                    noise=first[None],
                    steps=len(plan),
                    guidance=guidance,
                    sampler=plan.sampler,
                    schedule=plan.schedule,
                    feature_reuse_error=allowed,
                    negative_prompt="",
                )
                ends.append(result.latents[0])
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
        return {"x": np.array(ends), "skipped": np.array(skipped)}

    def _whole(self, prompts: Sequence[str], guidance: float) -> Callable[..., np.ndarray]:
        return lambda x, t, index: self.network(x, t, prompts, guidance)

    def _cheaper(
        self,
        prompts: Sequence[str],
        guidance: float,
        interval: tuple[float, float] | None,
        reuse: int,
        total: int,
    ) -> Callable[..., np.ndarray]:
        """Do for many pictures what mlxdiff's denoiser does for one. Tests compare the two."""
        pipe = self.network.pipe
        on, unet = pipe.backend, pipe.model.component("unet")
        text = np.concatenate([self.network.text(prompt) for prompt in prompts])
        without = np.repeat(self.network.text(""), len(prompts), axis=0)
        first, end = guided_evaluations(interval or (0.0, 1.0), total)
        deep: list[Any] = []

        def ask(x: np.ndarray, t: float, index: int) -> np.ndarray:
            guided = guidance > 1.0 and first <= index < end
            batch = np.concatenate([x, x]) if guided else x
            told = np.concatenate([without, text]) if guided else text
            if index % reuse == 0 or len(deep[0]) < len(batch):
                deep.clear()
            else:
                deep[:] = [features[-len(batch) :] for features in deep]
            out = on.to_numpy(
                unet(
                    on.asarray(batch),
                    t,
                    encoder_hidden_states=on.asarray(told),
                    deep=deep if reuse > 1 else None,
                )
            )
            if not guided:
                return out
            low, high = out[: len(x)], out[len(x) :]
            return low + np.float32(guidance) * (high - low)

        return ask


def multiply_adds(network: teacher.Network, deep: list[np.ndarray] | None) -> int:
    """Count one evaluation of the NumPy U-Net, in convolutions, linear maps and attention."""
    counted = [0]
    layers: list[tuple[Any, str]] = [(Conv2d, "__call__"), (Linear, "__call__")]
    old = [getattr(holder, name) for holder, name in layers]
    old_attention = numpy_layers.attention

    def layer(call: Any) -> Any:
        def counting(self: Any, x: np.ndarray, *others: Any) -> np.ndarray:
            out = call(self, x, *others)
            counted[0] += out.size // out.shape[-1] * self.weight.size
            return out

        return counting

    def attention(q: np.ndarray, k: np.ndarray, *others: Any, batch: int) -> np.ndarray:
        counted[0] += 2 * q.size * (k.size // k.shape[-1] // batch)
        return old_attention(q, k, *others, batch=batch)

    pipe, text = network.pipe, network.text("")  # the text encoder does not count
    height, width, channels = pipe.model.latent_shape(*pipe.model.default_size)
    try:
        for (holder, name), call in zip(layers, old, strict=True):
            setattr(holder, name, layer(call))
        numpy_layers.attention = attention
        pipe.model.component("unet")(
            np.zeros((1, height, width, channels), np.float32), 1.0, text, deep=deep
        )
    finally:
        for (holder, name), call in zip(layers, old, strict=True):
            setattr(holder, name, call)
        numpy_layers.attention = old_attention
    return counted[0]


def error(latents: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Return the root mean square over all pictures, and the median, in the latents' deviation."""
    each = teacher.distances(latents, reference)
    return {"error": float(np.sqrt((each**2).mean())), "median": float(np.median(each))}


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Measure parts of the page. Returns them by name, and what all have in common."""
    runs = Runs(args)
    found: dict[str, Any] = {
        "model": runs.fingerprint,
        "part": part_of_a_shallow_one(runs.network),
    }
    for name in args.part:
        found[name] = {
            "prompts": len(runs.prompts), "reference": args.reference
        } | PARTS[name](runs, args, found["part"])  # fmt: skip
    return found


def progress(runs: Runs, guidance: float, name: str) -> None:
    print(f"guidance {guidance:g} {name}: {runs.asked} evaluations", flush=True)


def fine(runs: Runs, args: argparse.Namespace, guidance: float) -> np.ndarray:
    """Return the final latents of the reference solution."""
    plan = runs.plan("dpmpp-2m", "linspace", args.reference, None)
    latents = runs.latents(plan, guidance)
    progress(runs, guidance, "reference")
    return latents


def samplers_part(runs: Runs, args: argparse.Namespace, part: float) -> dict[str, Any]:
    """Answer question 1, and questions 2 and 3 for what was there first."""
    found: dict[str, Any] = {"scales": {}, "cheaper": {}, "candidates": {}}
    for guidance in args.guidance:
        scale = f"{guidance:g}"
        reference = fine(runs, args, guidance)
        entry: dict[str, Any] = {"right": runs.share(reference), "methods": {}}
        for name, (sampler, schedule) in METHODS.items():
            entry["methods"][name] = {}
            for count in args.counts:
                plan = runs.plan(sampler, schedule, count, guidance)
                assert len(plan) == count
                latents = runs.latents(plan, guidance)
                entry["methods"][name][str(count)] = {
                    **error(latents, reference),
                    "right": runs.share(latents),
                }
            progress(runs, guidance, name)
        found["scales"][scale] = entry
        if guidance == 1.0:
            continue
        found["candidates"][scale] = candidates(runs, CANDIDATES, guidance, reference)
        if guidance == CHEAPER_AT:
            found["cheaper"][scale] = cheaper(runs, CHEAPER, guidance, reference, part)
    return found


def later_part(runs: Runs, args: argparse.Namespace, part: float) -> dict[str, Any]:
    """Answer question 3 for samplers and schedules that came later."""
    return {
        "candidates": {
            f"{guidance:g}": candidates(runs, LATER, guidance, fine(runs, args, guidance))
            for guidance in args.guidance
            if guidance > 1.0
        }
    }


def reuse_part(runs: Runs, args: argparse.Namespace, part: float) -> dict[str, Any]:
    """Answer question 2 for reuse within an error."""
    reference = fine(runs, args, CHEAPER_AT)
    rows = cheaper(runs, REUSE, CHEAPER_AT, reference, part)
    return {"cheaper": {f"{CHEAPER_AT:g}": rows}}


def judged_part(runs: Runs, args: argparse.Namespace, part: float) -> dict[str, Any]:
    """Answer question 4."""
    return {"samplers": judged(runs), "guiders": guiders(runs)}


PARTS = {
    "samplers": samplers_part,
    "later": later_part,
    "reuse": reuse_part,
    "judged": judged_part,
}


def candidates(
    runs: Runs, rows: dict[str, tuple[str, str]], guidance: float, reference: np.ndarray
) -> dict[str, Any]:
    """Return the errors of samplers and schedules, by number of evaluations."""
    found: dict[str, Any] = {}
    for name, (sampler, schedule) in rows.items():
        found[name] = {}
        for count in CANDIDATE_COUNTS:
            steps = runs.within(sampler, schedule, count, guidance)
            latents = runs.latents(runs.plan(sampler, schedule, steps, guidance), guidance)
            found[name][str(count)] = error(latents, reference)
        progress(runs, guidance, name)
    return found


def judged(runs: Runs) -> dict[str, Any]:
    """Answer question 4 for samplers: the share of right pictures by number of evaluations."""
    rows: dict[str, Any] = {}
    for guidance, samplers_of in JUDGED.items():
        found = rows[f"{guidance:g}"] = {}
        for sampler, schedule in samplers_of:
            found[f"{sampler} {schedule}"] = {
                str(count): runs.right(
                    steps=runs.within(sampler, schedule, count, guidance),
                    guidance=guidance,
                    sampler=sampler,
                    schedule=schedule,
                )
                for count in JUDGED_COUNTS
            }
            progress(runs, guidance, f"{sampler} {schedule}")
    return rows


def guiders(runs: Runs) -> dict[str, Any]:
    """Answer question 4 for guiders: the share of right pictures by guidance scale."""
    rows: dict[str, Any] = {}
    for name, options in GUIDERS.items():
        common = {"steps": GUIDED_STEPS, "sampler": "dpmpp-2m", "schedule": "trailing"}
        rows[name] = {
            f"{scale:g}": runs.right(guidance=scale, **common, **options) for scale in GUIDED_AT
        }
        print(name, flush=True)
    return rows


def part_of_a_shallow_one(network: teacher.Network) -> float:
    """Return the cost of an evaluation on old deep features, relative to a full one."""
    if network.pipe.backend.name != "numpy":
        raise SystemExit("few_step counts the work of the NumPy network; use --backend numpy")
    deep: list[Any] = []
    whole = multiply_adds(network, deep)
    return multiply_adds(network, deep) / whole


def cheaper(
    runs: Runs,
    asked: Sequence[tuple[str, int, tuple[float, float] | None, float]],
    guidance: float,
    reference: np.ndarray,
    part: float,
) -> list[dict[str, Any]]:
    """Return cost and error of rows of question 2."""
    rows = []
    for sampler, count, interval, reuse in asked:
        schedule = "auto" if sampler == "auto" else "normal"
        plan = runs.plan(sampler, schedule, count, guidance)
        first, end = guided_evaluations(interval or (0.0, 1.0), count)
        cost, kept = 0.0, 0
        for index in range(count):
            size = 2 if first <= index < end else 1
            again = reuse < 1 or index % reuse == 0 or size > kept
            cost += size * (1.0 if again else part)
            kept = size
        runs.skipped = []
        latents = runs.latents(plan, guidance, interval, reuse)
        if reuse < 1:  # each whole evaluation but the first measures, for the cost of a shallow one
            skipped = float(np.mean(runs.skipped))
            cost = 2 * (count - skipped) + 2 * part * (count - 1)
        rows.append(
            {
                "sampler": plan.sampler,
                "steps": count,
                "interval": interval,
                "reuse": reuse,
                "cost": cost,
                **error(latents, reference),
            }
        )
    return rows


def verdicts(found: dict[str, Any]) -> list[str]:
    """Say if the goals are met."""
    lines = []
    for guidance, entry in found["scales"].items():
        methods = entry["methods"]
        others = {n: m["12"]["error"] for n, m in methods.items() if n != OURS and "12" in m}
        if not others or "8" not in methods[OURS] or "25" not in methods[DDIM]:
            continue
        best = min(others, key=lambda name: others[name])
        at_8, at_6 = methods[OURS]["8"]["error"], methods[OURS]["6"]["error"]
        ddim = methods[DDIM]["25"]["error"]
        lines.append(
            f"- Guidance {guidance}: error {at_8:.4f} at 8 evaluations against {others[best]:.4f} "
            f"at 12 ({best}): {'smaller' if at_8 < others[best] else 'NOT smaller'}. Error "
            f"{at_6:.4f} at 6 against {ddim:.4f} at 25 (DDIM): "
            f"{'smaller' if at_6 < ddim else 'NOT smaller'}."
        )
    return lines


def verdict_on_cost(found: dict[str, Any]) -> list[str]:
    """Name the cheapest row with at most the error of 20 fully guided steps."""
    lines = []
    for guidance, rows in found["cheaper"].items():
        methods = found["scales"][guidance]["methods"]
        twenty = {name: cells["20"]["error"] for name, cells in methods.items() if name != OURS}
        for name in dict.fromkeys((FULL, min(twenty, key=lambda name: twenty[name]))):
            known = f"- Guidance {guidance}: 20 steps of {name} (40 evaluations) have an error of "
            known += f"{twenty[name]:.4f}"
            good = [row for row in rows if row["error"] <= twenty[name] and row["cost"] < 40]
            if not good:
                lines.append(f"{known}; no cheaper run below reaches it.")
                continue
            best = min(good, key=lambda row: row["cost"])
            times = 40 / best["cost"]
            lines.append(
                f"{known}; `{described(best)}` has {best['error']:.4f} at a cost of "
                f"{best['cost']:.1f}: {times:.1f} times cheaper"
                f"{'' if times >= 2 else ', NOT twice'}."
            )
    return lines


def described(row: dict[str, Any]) -> str:
    """Return a row of CHEAPER as command-line options."""
    words = [row["sampler"], f"--steps {row['steps']}"]
    if row["interval"] is not None:
        words.append("--guidance-interval {:g},{:g}".format(*row["interval"]))
    if row["reuse"] > 1:
        words.append(f"--feature-reuse {row['reuse']}")
    elif row["reuse"] < 1:
        words.append(f"--feature-reuse-error {row['reuse']:g}")
    return " ".join(words)


def cost_tables(found: dict[str, Any]) -> list[str]:
    lines = []
    for guidance, rows in found["cheaper"].items():
        lines += [f"| guidance {guidance} | cost | error | median |", "|---|---:|---:|---:|"]
        lines += [
            f"| `{described(row)}` | {row['cost']:.1f} | {row['error']:.4f} | {row['median']:.4f} |"
            for row in rows
        ]
        lines.append("")
    return lines


def candidate_tables(found: dict[str, Any]) -> list[str]:
    lines = []
    for guidance, methods in found["candidates"].items():
        counts = [str(count) for count in CANDIDATE_COUNTS]
        lines += [f"| guidance {guidance} | " + " | ".join(counts) + " |"]
        lines += ["|---|" + "---:|" * len(counts)]
        for name, cells in methods.items():
            values = [
                f"{cells[count]['error']:.3f} ({cells[count]['median']:.3f})" for count in counts
            ]
            lines.append(f"| {name} | " + " | ".join(values) + " |")
        lines.append("")
    return lines


def table(found: dict[str, Any], what: str, form: str) -> list[str]:
    lines = []
    for guidance, entry in found["scales"].items():
        counts = list(entry["methods"][OURS])
        lines += [
            f"| guidance {guidance} | " + " | ".join(counts) + " |",
            "|---|" + "---:|" * len(counts),
        ]
        for name, cells in entry["methods"].items():
            values = [form.format(cells[count][what]) for count in counts]
            lines.append(f"| {name} | " + " | ".join(values) + " |")
        lines.append("")
    return lines


def _wrapped(text: str) -> list[str]:
    """Wrap a paragraph or a list entry as all docs are wrapped."""
    indent = "  " if text.startswith("- ") else ""
    return textwrap.wrap(
        text, 110, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def report(figures: dict[str, Any]) -> str:
    """Return the text of docs/few_step.md."""
    found, later, reuse = figures["samplers"], figures.get("later"), figures.get("reuse")
    size = found["prompts"]
    exact = ", ".join(f"{100 * e['right']:.0f} % at {g}" for g, e in found["scales"].items())
    return "\n".join(
        [
            "# Few steps",
            "",
            *_wrapped(
                "This page is the output of `python benchmarks/few_step.py --torch --cache FOLDER` "
                f"on the built-in model (U-Net and text encoder {figures['model']}). The script "
                "documents the method. It uses fixed prompts (some with held-out combinations) "
                "with one seed each. A guided evaluation runs the network twice. The fitted "
                "numbers (`mlxdiff (auto)`) come from other prompts and seeds "
                "(`examples/train_builtin/fit_sampler.py`)."
            ),
            "",
            "![error against evaluations](few_step.png)",
            "",
            "## Goals",
            "",
            *_wrapped(
                "At 8 evaluations, the error of mlxdiff must be smaller than that of every other "
                "sampler at 12; at 6 evaluations, smaller than that of DDIM at 25. The error of 20 "
                "fully guided steps must be reached at half the cost or less."
            ),
            "",
            *(part for line in verdicts(found) for part in _wrapped(line)),
            *(part for line in verdict_on_cost(found) for part in _wrapped(line)),
            "",
            "## Error of the final latents",
            "",
            *_wrapped(
                "Root mean square over all pictures, in standard deviations of the latents, by "
                f"number of evaluations. {_measured_with(found)} A single picture that changed "
                "into a different one has a large effect on it."
            ),
            "",
            *table(found, "error", "{:.4f}"),
            "Median over all pictures, which is robust to such a picture:",
            "",
            *table(found, "median", "{:.4f}"),
            "## Pictures that match their prompt completely",
            "",
            *_wrapped(
                f"Percentage of {size} pictures. Each figure is uncertain by up to "
                f"{50 / size**0.5:.0f} points, but all samplers had the same prompts and seeds. "
                f"The reference solution itself has {exact}."
            ),
            "",
            *table(_percent(found), "right", "{:.0f}"),
            "## Cheaper evaluations",
            "",
            *_wrapped(
                "Guidance in an interval and reuse of deep features. The unit of cost is one whole "
                "evaluation of the U-Net: a guided evaluation costs two, a shallow one "
                f"{figures['part']:.3f} here (by multiply-adds; 0.079 in SD 1.5, 0.015 in SDXL). "
                "The error is measured against the fully guided solution. `dpmpp-2m` uses the "
                f"schedule of the model's file. {_measured_with(found)}"
            ),
            "",
            *cost_tables(found),
            *(_reuse_lines(reuse) if reuse is not None else []),
            "## Samplers and schedules without a fit",
            "",
            *_wrapped(
                "Error by number of evaluations, with the median in brackets. The built-in model "
                "has the noise schedule of Stable Diffusion, so its timesteps (and *Align Your "
                "Steps*, made for SD 1.5) mean the same noise levels; it is far smaller and "
                f"predicts v. {_measured_with(found)}"
            ),
            "",
            *candidate_tables(found),
            *(_later_lines(later) if later is not None else []),
            *(_judged_lines(figures["judged"]) if "judged" in figures else []),
        ]
    )


def _measured_with(part: dict[str, Any]) -> str:
    return f"{part['prompts']} prompts; the reference has {part['reference']} steps."


def _reuse_lines(part: dict[str, Any]) -> list[str]:
    return [
        *_wrapped(
            "Reuse within an error ([guidance.md](guidance.md#reuse-within-an-error)), which pays "
            f"for its measurements, beside the fixed one. {_measured_with(part)}"
        ),
        "",
        *cost_tables(part),
    ]


def _later_lines(part: dict[str, Any]) -> list[str]:
    return [
        *_wrapped(f"Those that came later, beside two of the above. {_measured_with(part)}"),
        "",
        *candidate_tables(part),
    ]


def _judged_lines(part: dict[str, Any]) -> list[str]:
    """Return the section of question 4."""
    size = part["prompts"]
    lines = [
        "## Samplers and guiders that draw another picture",
        "",
        *_wrapped(
            "A stochastic sampler, CFG++ and a guider have a target of their own, so the distance "
            f"above has no meaning. The share of {size} pictures (percent) that match their prompt "
            f"completely, each uncertain by up to {50 / size**0.5:.0f} points; all had the same "
            "prompts and seeds. By number of evaluations:"
        ),
        "",
    ]
    for guidance, rows in part["samplers"].items():
        lines += [f"| guidance {guidance} | " + " | ".join(map(str, JUDGED_COUNTS)) + " |"]
        lines += ["|---|" + "---:|" * len(JUDGED_COUNTS)]
        for name, cells in rows.items():
            shares = [f"{100 * cells[str(count)]:.0f}" for count in JUDGED_COUNTS]
            lines.append(f"| {name} | " + " | ".join(shares) + " |")
        lines.append("")
    lines += [
        *_wrapped(f"Guiders, by guidance scale, with `dpmpp-2m trailing --steps {GUIDED_STEPS}`:"),
        "",
        "| | " + " | ".join(f"{scale:g}" for scale in GUIDED_AT) + " |",
        "|---|" + "---:|" * len(GUIDED_AT),
    ]
    for name, cells in part["guiders"].items():
        label = name if name == "no guider" else f"`{name}`"
        shares = [f"{100 * cells[f'{scale:g}']:.0f}" for scale in GUIDED_AT]
        lines.append(f"| {label} | " + " | ".join(shares) + " |")
    return [*lines, ""]


def _percent(found: dict[str, Any]) -> dict[str, Any]:
    scales = {
        guidance: {
            "methods": {
                name: {count: {"right": 100 * cell["right"]} for count, cell in cells.items()}
                for name, cells in entry["methods"].items()
            }
        }
        for guidance, entry in found["scales"].items()
    }
    return {**found, "scales": scales}


def plot(found: dict[str, Any], path: Path) -> None:
    """Plot error against evaluations on log axes, with one panel for each guidance scale."""
    panels = [
        curves(
            {
                name: [(int(count), cell["error"]) for count, cell in cells.items()]
                for name, cells in entry["methods"].items()
            },
            f"guidance {guidance}: error over evaluations",
            width=620,
            height=360,
            logarithmic=True,
        )
        for guidance, entry in found["scales"].items()
    ]
    whole = Image.new("RGB", (panels[0].width, sum(panel.height for panel in panels)))
    for index, panel in enumerate(panels):
        whole.paste(panel, (0, index * panel.height))
    whole.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="default: the built-in model")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--reference", type=int, default=1000, help="steps of the fine solution")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--guidance", type=float, nargs="+", default=GUIDANCE)
    parser.add_argument("--backend", default="numpy")
    parser.add_argument("--torch", action="store_true", help="through diffusers' U-Net")
    parser.add_argument("--out", type=Path, help="folder for figures, page and plot")
    parser.add_argument("--cache", type=Path, help="a folder that keeps every run")
    args = parser.parse_args()
    found = measured(args)
    if args.out is None and not set(GUIDANCE) <= set(args.guidance):
        return  # one of several calls that fill the cache
    kept = (args.out or Path(__file__).parent) / "few_step.json"
    old = json.loads(kept.read_text()) if kept.exists() else {}
    figures = (old if old.get("model") == found["model"] else {}) | found
    kept.write_text(json.dumps(figures, indent=1) + "\n")
    if not set(map(str, GUIDANCE)) <= {str(float(g)) for g in figures["samplers"]["scales"]}:
        return
    docs = args.out or ROOT / "docs"
    (docs / "few_step.md").write_text(report(figures), encoding="utf-8")
    print("\n".join(verdicts(figures["samplers"]) + verdict_on_cost(figures["samplers"])))
    plot(figures["samplers"], docs / "few_step.png")


if __name__ == "__main__":
    main()
