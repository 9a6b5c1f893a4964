"""20,000 damaged files: each is read, or refused in one line, within seconds.

pytest -m slow tests/test_fuzz.py        (pickles have theirs in test_pickles.py)
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_data import checkpoint
from safetensors.numpy import save_file

from mlxdiff.convert import describe
from mlxdiff.errors import MlxdiffError
from mlxdiff.weights.tensors import TensorFile

STRANGE: list[Any] = [None, True, -1, 0, 1.5, "x", [], {}, [1], 1e308, 10**30, [None], {"a": 1}]
STRANGE += ["../x", [[[]]], 2**31, "model-00001-of-00002.safetensors", "\x00", "NaN"]
SECONDS = 5.0


def spoil_bytes(data: bytes, chance: random.Random) -> bytes:
    """Flip, delete or insert a few bytes."""
    spoilt = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(min(len(spoilt), 400) or 1)
        kind = chance.randrange(3)
        if kind == 0 and spoilt:
            spoilt[place] = chance.randrange(256)
        elif kind == 1:
            del spoilt[place : place + chance.randint(1, 20)]
        else:
            spoilt[place:place] = chance.choice([b"[", b"{", b'"', b"9" * 30, b"null", b"1e999"])
    return bytes(spoilt)


def spoil_value(value: Any, chance: random.Random) -> Any:
    """Replace, drop or add one value somewhere in a JSON document."""
    if isinstance(value, dict) and value:
        key = chance.choice(list(value))
        if chance.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if chance.random() < 0.1:
            return value | {key + "s": chance.choice(STRANGE)}
        return value | {key: spoil_value(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.7:
        place = chance.randrange(len(value))
        return [*value[:place], spoil_value(value[place], chance), *value[place + 1 :]]
    return chance.choice(STRANGE)


def judge(outcomes: Counter[str], run: Any) -> None:
    start = time.process_time()
    try:
        run()
        outcomes["read"] += 1
    except MlxdiffError as error:
        outcomes["refused"] += 1
        assert "\n" not in str(error)
    assert time.process_time() - start < SECONDS


@pytest.mark.slow
def test_safetensors_headers(tmp_path: Path) -> None:
    chance, outcomes = random.Random(1), Counter[str]()
    save_file({f"layer.{i}": np.ones((i + 1, 3), np.float16) for i in range(4)}, tmp_path / "good")
    good, bad = (tmp_path / "good").read_bytes(), tmp_path / "bad"

    def read() -> None:
        for tensor in TensorFile(bad).tensors.values():
            assert tensor.read().shape == tensor.shape

    for _ in range(15_000):
        bad.write_bytes(spoil_bytes(good, chance))
        judge(outcomes, read)
    print(dict(outcomes))
    assert outcomes["refused"] > 5_000


@pytest.mark.slow
def test_configs_and_index_files(tmp_path: Path) -> None:
    chance, outcomes = random.Random(2), Counter[str]()
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("sdxl"), folder)
    files = [f for f in sorted(folder.rglob("*.json")) if f.name != "vocab.json"]
    files = [f for f in files if f.stat().st_size < 200_000]
    for _ in range(5_000):
        file = chance.choice(files)
        good = file.read_bytes()
        if chance.random() < 0.8:
            spoilt = json.dumps(spoil_value(json.loads(good), chance)).encode()
        else:
            spoilt = spoil_bytes(good, chance)
        file.write_bytes(spoilt)
        judge(outcomes, lambda: describe(folder))
        file.write_bytes(good)
    print(dict(outcomes))
    assert outcomes["refused"] > 1_000
