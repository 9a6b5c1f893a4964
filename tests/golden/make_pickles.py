"""Writes tests/golden/pickles/: files by torch.save in every form, and what is in them.

    python tests/golden/make_pickles.py        # needs torch (the parity extra)

`expected.json` says for every file what must be read: name -> dtype, shape; the values stand in
`expected.npz` under `<file>/<name>`, bfloat16 as float32. The whole folder is some 100 kB.
"""

from __future__ import annotations

import json
import sys
import types
import warnings
from collections import Counter, OrderedDict, defaultdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent / "pickles"
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.bool: "BOOL",
}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


GENERATOR = torch.Generator().manual_seed(3)


def kinds() -> dict[str, torch.Tensor]:
    """One tensor of each kind that a checkpoint may hold."""
    base = torch.arange(120, dtype=torch.float32)
    weight = random(4, 5)
    return {
        "plain": weight,
        "tied": weight,
        "parameter": torch.nn.Parameter(random(3, 2)),
        "half": random(2, 3).half(),
        "bfloat16": random(2, 3).bfloat16(),
        "double": random(2).double(),
        "long": torch.arange(-2, 3),
        "int": torch.arange(3, dtype=torch.int32),
        "short": torch.arange(3, dtype=torch.int16),
        "char": torch.arange(3, dtype=torch.int8),
        "byte": torch.arange(3, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "transposed": base.view(2, 3, 4, 5).permute(3, 1, 0, 2),
        "transposed bfloat16": random(4, 6).bfloat16().t(),
        "slice": base[7:19],
        "every third": base[1::3],
        "column": base.view(10, 12)[:, 5],
        "channels last": random(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.tensor([1.5]).expand(2, 3),
        "one channel": random(1, 1, 2, 2).to(memory_format=torch.channels_last),
    }


def stand_in(module: str, name: str, base: type = object) -> Any:
    """A class of a library that is not installed here."""
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:count]), types.ModuleType(parts[count - 1]))
    kind = type(name, (base,), {"__module__": module})
    setattr(sys.modules[module], name, kind)
    return kind


def training() -> dict[str, Any]:
    """What pytorch_lightning keeps of a training, in the style of Stable Diffusion's own files."""
    model = torch.nn.Sequential(
        OrderedDict(conv=torch.nn.Conv2d(3, 4, 3), norm=torch.nn.GroupNorm(2, 4))
    )
    optimizer = torch.optim.AdamW(model.parameters())
    model(random(1, 3, 4, 4)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0])
    callback = stand_in("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    attributes = stand_in("pytorch_lightning.utilities.parsing", "AttributeDict", dict)
    settings = attributes(lr=1e-4, when=datetime(2022, 8, 20, tzinfo=timezone.utc))
    settings["nested"] = attributes(path=Path("x"))
    state = callback()
    state.best = np.float64(0.25)
    return {
        "epoch": 12,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": model.state_dict(),
        "loops": None,
        "callbacks": {callback: {"monitor": "val/loss", "best": np.float32(0.5), "state": state}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [schedule.state_dict()],
        "hyper_parameters": settings,
        "counts": Counter("abc"),
        "later": defaultdict(list, a=[1]),
        "array": np.arange(4.0),
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "tags": {"a"},
        "frozen": frozenset("c"),
        "complex": 1 + 2j,
        "huge": 1 << 100,
    }


def values(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def main() -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(3)
    HERE.mkdir(exist_ok=True)
    old: dict[str, Any] = {"_use_new_zipfile_serialization": False}
    tensors, state = kinds(), training()
    unsigned = tensors | {"ushort": torch.arange(3, dtype=torch.int32).to(torch.uint16)}
    files: dict[str, tuple[Any, dict[str, torch.Tensor], dict[str, Any]]] = {
        "zip.bin": (unsigned, unsigned, {}),
        "legacy.bin": (tensors, tensors, old),
        "zip-protocol4.pt": (tensors, tensors, {"pickle_protocol": 4}),
        "legacy-protocol4.pth": (tensors, tensors, old | {"pickle_protocol": 4}),
        "training.ckpt": (state, state["state_dict"], {}),
        "training-legacy.ckpt": (state, state["state_dict"], old),
        "nested.pt": ({"model": {"params": tensors}, "step": 1}, tensors, {}),
        "only-table.pt": ({"net": OrderedDict(tensors), "step": 1}, tensors, {}),
    }
    odd = {
        "complex": torch.zeros(2, dtype=torch.complex64),
        "quantized": torch.quantize_per_tensor(random(2, 2), 0.1, 0, torch.qint8),
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.empty(3, device="meta"),
        "negated": torch._neg_view(random(2)),
        "number": 7,
        "text": "7",
        "nothing": None,
        "table": {"a": 1},
        "list": [random(2)],
        "array": np.zeros(2),
        "fine": random(2),
    }
    files["odd.bin"] = (odd, {"fine": odd["fine"]}, {})
    expected: dict[str, dict[str, Any]] = {}
    arrays = {}
    for file, (content, weights, how) in files.items():
        torch.save(content, HERE / file, **how)
        expected[file] = {n: [NAMES[t.dtype], list(t.shape)] for n, t in weights.items()}
        arrays |= {f"{file}/{n}": values(t) for n, t in weights.items()}
    torch.save(torch.nn.Linear(2, 2), HERE / "module.pt")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(HERE / "torchscript.pt"))
    torch.save({"f8": random(4).to(torch.float8_e4m3fn)}, HERE / "float8.bin")
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    np.savez_compressed(HERE / "expected.npz", **arrays)


if __name__ == "__main__":
    main()
