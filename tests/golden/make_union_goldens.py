"""Write what diffusers' ControlNetUnionModel predicts: control/union.npz.

    python tests/golden/make_union_goldens.py

The net is the tiny one of tests/control_files.py for the tiny SDXL; its inputs are union_inputs
there. Both rows of the batch are alike, as they are in a run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetUnionModel

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from control_files import UNION_MODES, union_config, union_inputs, write_union  # noqa: E402


def main(folder: Path) -> None:
    net = ControlNetUnionModel.from_pretrained(write_union(folder), torch_dtype=torch.float32)
    inputs = {name: torch.from_numpy(array) for name, array in union_inputs().items()}
    results = {}
    count = union_config()["num_control_type"]
    for mode in UNION_MODES:
        chosen = torch.zeros(1, count)
        chosen[0, mode] = 1
        with torch.no_grad():
            down, middle = net(
                inputs["sample"].permute(0, 3, 1, 2).repeat(2, 1, 1, 1),
                inputs["timesteps"].repeat(2),
                inputs["text"].repeat(2, 1, 1),
                [inputs["image"].permute(0, 3, 1, 2).repeat(2, 1, 1, 1)],
                chosen.repeat(2, 1),
                [mode],
                conditioning_scale=0.7,
                added_cond_kwargs={
                    "text_embeds": inputs["text_embeds"].repeat(2, 1),
                    "time_ids": inputs["time_ids"].repeat(2, 1),
                },
                return_dict=False,
            )
        for i, array in enumerate((*down, middle)):
            results[f"{mode}-{i}"] = array[:1].permute(0, 2, 3, 1).numpy()
    np.savez_compressed(HERE / "control" / "union.npz", **results)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "union"))
