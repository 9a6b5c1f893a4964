"""Short names of well-known models."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest

from mlxdiff.store.catalogue import KNOWN, expand, suggestion
from mlxdiff.store.reference import is_repo_id, parse

NAMES = Path(__file__).parent / "golden" / "names"
TEXT = {"sd1": ["sd15"], "sd2": ["sd21"], "sdxl": ["sd15", "sdxl-2"], "sdxl-refiner": ["sdxl-2"]}
UNETS = {
    "sd14": "sd15",
    "lcm": "lcm-dreamshaper-v7",
    "sd21-base": "sd21",
    "sd-turbo": "sd21",
    "sdxl-turbo": "sdxl",
    "vega": "segmind-vega",
    "ddpm-cifar10": "ddpm-cifar10-32",
    "ddpm-celebahq": "ddpm-celebahq-256",
    "marigold-normals": "marigold",
    "svd-xt": "svd",
}


def half_bytes(component: str) -> int:
    """Return the bytes of a full-size component in float16."""
    data = json.loads(gzip.decompress((NAMES / f"{component}.json.gz").read_bytes()))
    return 2 * sum(math.prod(shape) for shape in data["shapes"].values())


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_the_table(known: object) -> None:
    assert is_repo_id(known.repo) and "@" not in known.repo
    assert parse(known.name) is None
    assert known.licence and known.note  # type: ignore[attr-defined]


@pytest.mark.parametrize("known", [k for k in KNOWN if k.family != "vae"], ids=lambda k: k.name)
def test_sizes_are_those_of_the_real_networks(known: object) -> None:
    family, name = known.family, known.name  # type: ignore[attr-defined]
    parts = [f"unet.{UNETS.get(name, name)}"]
    if family != "ddpm":
        has_own = (NAMES / f"vae.{name}.json.gz").is_file()
        own = family if family == "svd" else name if has_own else "sd15"
        parts += ["vae.sdxl" if family.startswith("sdxl") else f"vae.{own}"]
        parts += [f"text_encoder.{text}" for text in TEXT.get(family, [])]
        parts += ["image_encoder.openclip-h"] if family == "svd" else []
    total = sum(half_bytes(part) for part in parts)
    assert known.megabytes * 10**6 == pytest.approx(total, rel=1e-3, abs=5e5)  # type: ignore[attr-defined]


def test_names_are_told_apart() -> None:
    assert (
        len({known.name for known in KNOWN}) == len({known.repo for known in KNOWN}) == len(KNOWN)
    )


def test_expand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    repo = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert expand("sd15") == repo and expand("sd15@fp16") == f"{repo}@fp16"
    for other in ("sd", "org/name", "", "./sd15", tmp_path / "sd15"):
        assert expand(other) == other
    assert caplog.text == ""
    (tmp_path / "sd15").mkdir()
    assert expand("sd15") == "sd15"
    expected = f"using the local folder of this name, not the well-known model ({repo})"
    assert expected in caplog.text


def test_suggestion() -> None:
    assert suggestion("sdxl-trubo") == " (did you mean sdxl-turbo?)"
    assert "sd15" in suggestion("SD1.5")
    assert suggestion("nothing like it") == ""
