"""How near to the exact solution the samplers come in few evaluations, on a really trained model.

    python benchmarks/few_step.py                        # the built-in model
    python benchmarks/few_step.py MODEL [--torch]        # --torch: MODEL is a diffusers folder

For every sampler, number of evaluations and guidance scale: the root-mean-square difference of the
final latents from a fine solution of the probability-flow ODE from the same noise (DPM-Solver++ 2M,
--reference steps), in units of the latents' standard deviation; and the share of pictures with
everything that their prompt asks for, as examples/train_builtin/checker.py sees it. The prompts are
the fixed ones of examples/train_builtin/evaluate.py, held-out ones among them.

The other samplers are ours, which the goldens hold equal to diffusers' at every step
(tests/test_samplers_goldens.py); "normal" is the spacing that the model's own file asks for. Writes
docs/few_step.md and, with matplotlib, docs/few_step.png.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlxdiff import samplers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "train_builtin"))
import checker  # noqa: E402
import evaluate  # noqa: E402
import fit_sampler  # noqa: E402

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
OURS, DDIM = "mlxdiff (auto)", "DDIM"


def draw(
    network: fit_sampler.Network,
    plan: samplers.Plan,
    noise: np.ndarray,
    prompts: Sequence[str],
    scales: np.ndarray,
) -> np.ndarray:
    """Final latents, (B, h, w, C)."""
    x, state = np.float32(plan.init_noise_sigma) * noise, plan.start()
    for t in plan.timesteps:
        x, state = plan.step(
            x, network(plan.scale_model_input(x, state), t, prompts, scales), state
        )
    return x


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures: errors and shares by guidance, method, count."""
    network = fit_sampler.Network(args.model, torch=args.torch, backend=args.backend)
    rows = list(evaluate.ROWS)
    prompts = [
        evaluate.prompts_of(rows[i % len(rows)], i // len(rows) + 1)[-1]
        for i in range(args.prompts)
    ]
    noise = network.noise(range(args.prompts))
    found: dict[str, Any] = {"prompts": args.prompts, "reference": args.reference, "scales": {}}
    started = time.time()

    def share(latents: np.ndarray) -> float:
        pictures = [np.asarray(one) for one in network.pipe.decode(latents)]
        return checker.score(pictures, prompts)["right"]

    for guidance in args.guidance:
        scales = np.full(args.prompts, guidance)
        exact = samplers.plan(network.config, "dpmpp-2m", "linspace", args.reference)
        reference = draw(network, exact, noise, prompts, scales)
        deviation = float(reference.std())
        entry: dict[str, Any] = {"right": share(reference), "methods": {}}
        for name, (sampler, schedule) in METHODS.items():
            entry["methods"][name] = {}
            for count in args.counts:
                plan = samplers.plan(
                    network.config, sampler, schedule, count, family="sd1", guidance=guidance
                )
                assert len(plan) == count
                latents = draw(network, plan, noise, prompts, scales)
                each = np.sqrt(((latents - reference) ** 2).mean((1, 2, 3))) / deviation
                entry["methods"][name][str(count)] = {
                    "error": float(np.sqrt((each**2).mean())),
                    "median": float(np.median(each)),
                    "right": share(latents),
                    "sampler": f"{plan.sampler} {plan.schedule}",
                }
            shown = entry["methods"][name]
            print(
                f"guidance {guidance:g} {name:24s}",
                " ".join(f"{shown[str(count)]['error']:.4f}" for count in args.counts),
                f" ({time.time() - started:.0f} s)",
                flush=True,
            )
        found["scales"][f"{guidance:g}"] = entry
    return found


def verdicts(found: dict[str, Any]) -> list[str]:
    """Whether the goals are met, in words."""
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
            f"- Guidance {guidance}: at 8 evaluations {at_8:.4f}, the best other at 12 ({best}) "
            f"{others[best]:.4f}: {'smaller' if at_8 < others[best] else 'NOT smaller'}. At 6 "
            f"{at_6:.4f}, DDIM at 25 {ddim:.4f}: {'smaller' if at_6 < ddim else 'NOT smaller'}."
        )
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


def report(found: dict[str, Any]) -> str:
    """docs/few_step.md."""
    size = found["prompts"]
    exact = ", ".join(f"{100 * e['right']:.0f} % at {g}" for g, e in found["scales"].items())
    return "\n".join(
        [
            "# Few steps",
            "",
            f"Made by `python benchmarks/few_step.py --prompts {size} --reference "
            f"{found['reference']}` on the built-in model; see there for what is measured and "
            f"how. {size} fixed prompts (some with held-out combinations), one "
            "seed each; guided evaluations ask the network twice. The fitted numbers come from "
            "other prompts and seeds (`examples/train_builtin/fit_sampler.py`).",
            "",
            *(
                [
                    "A quick run. With so few steps the reference has an error of its own: at "
                    "guidance 1 several samplers level off together at about 0.015, which is most "
                    "likely it. Figures below 0.02 are therefore not to be compared.",
                    "",
                ]
                if found["reference"] < 500
                else []
            ),
            "![error against evaluations](few_step.png)",
            "",
            "## Goals",
            "",
            *verdicts(found),
            "",
            "## Error of the final latents",
            "",
            "Root mean square over all pictures, in standard deviations of the latents, by number "
            "of evaluations.",
            "",
            *table(found, "error", "{:.4f}"),
            "Of the middle picture (median), which a single picture that turned into another one "
            "does not move:",
            "",
            *table(found, "median", "{:.4f}"),
            "## Pictures with all that was asked for",
            "",
            f"Of {size} (so each figure is uncertain by up to {50 / size**0.5:.0f} points, but all "
            "samplers had the same prompts and seeds), in percent. The reference solution itself "
            f"has {exact}.",
            "",
            *table(_percent(found), "right", "{:.0f}"),
        ]
    )


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
    """Error against evaluations, both logarithmic, one panel a guidance scale."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(found["scales"]), figsize=(11, 3.8), squeeze=False)
    for axis, (guidance, entry) in zip(axes[0], found["scales"].items(), strict=True):
        for name, cells in entry["methods"].items():
            counts = [int(count) for count in cells]
            errors = [cell["error"] for cell in cells.values()]
            wide = 2.6 if name == OURS else 1.2
            axis.loglog(counts, errors, marker="o", markersize=3, linewidth=wide, label=name)
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.set_title(f"guidance {guidance}")
        axis.set_xlabel("evaluations")
    axes[0][0].set_ylabel("error / deviation of the latents")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="default: the built-in model")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--reference", type=int, default=1000, help="steps of the fine solution")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--guidance", type=float, nargs="+", default=GUIDANCE)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--torch", action="store_true", help="through diffusers' U-Net")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder for table and plot")
    parser.add_argument("--json", type=Path, help="write, or if it is there read, the figures")
    args = parser.parse_args()
    if args.json and args.json.exists():
        found = json.loads(args.json.read_text())
    else:
        found = measure(args)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    (args.out / "few_step.md").write_text(report(found) + "\n", encoding="utf-8")
    print("\n".join(verdicts(found)))
    try:
        plot(found, args.out / "few_step.png")
    except ImportError:
        print("no matplotlib: no plot")


if __name__ == "__main__":
    main()
