"""Each network against diffusers' and transformers' outputs, in float32, on both backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_data import NAMES, arrays, assert_component_close, checkpoint, prompts, respelled

from mlxdiff.convert import convert, open_source
from mlxdiff.loading import make_backend

TEXTS = [("sd15", "text_encoder"), ("sd21v", "text_encoder")]
TEXTS += [("sdxl", "text_encoder"), ("sdxl", "text_encoder_2")]


class Networks:
    """The networks of the tiny models on one backend, loaded when first asked for."""

    def __init__(self, backend: str) -> None:
        self.backend: Any = make_backend(backend, "float32")
        self.loaded: dict[tuple[str, str], Any] = {}

    def load(self, path: Path, component: str) -> Any:
        if (str(path), component) not in self.loaded:
            source = open_source(path)
            network = self.backend.load(source.config(component), source.tensors(component))
            self.loaded[str(path), component] = network
        return self.loaded[str(path), component]

    def array(self, x: np.ndarray) -> Any:
        return self.backend.asarray(x)

    def close(self, actual: Any, expected: np.ndarray) -> None:
        assert_component_close(self.backend.to_numpy(actual), expected)


_networks: dict[str, Networks] = {}


@pytest.fixture
def networks(backend: str) -> Networks:
    return _networks.setdefault(backend, Networks(backend))


def check_text(networks: Networks, path: Path, name: str, component: str) -> None:
    golden = arrays(name)
    output = networks.load(path, component)(networks.array(golden[f"{component}/input_ids"]))
    found = {
        "last_hidden_state": output.last_hidden_state,
        "penultimate": output.hidden_states[-2],
        "embeddings": output.hidden_states[0],
        "pooled": output.pooled,
        "text_embeds": output.text_embeds,
    }
    kinds = [key for key in found if f"{component}/{key}" in golden]
    assert len(kinds) == 4
    for key in kinds:
        networks.close(found[key], golden[f"{component}/{key}"])
    assert (output.text_embeds is None) == ("text_embeds" not in kinds)


def check_unet(networks: Networks, path: Path, name: str) -> None:
    golden = arrays(name)
    unet = networks.load(path, "unet")
    for size in ("square", "wide", "odd"):
        part = {k.split("/")[1]: v for k, v in golden.items() if k.startswith(f"unet.{size}/")}
        expected = part.pop("output")
        networks.close(unet(**{k: networks.array(v) for k, v in part.items()}), expected)


def check_vae(networks: Networks, path: Path, name: str) -> None:
    golden = arrays(name)
    vae = networks.load(path, "vae")
    mean, logvar = vae.encode(networks.array(golden["vae/image"]))
    networks.close(mean, golden["vae/mean"])
    networks.close(logvar, golden["vae/logvar"])
    networks.close(vae.decode(networks.array(golden["vae/latents"])), golden["vae/decoded"])


@pytest.mark.parametrize(("name", "component"), TEXTS)
def test_text_embeddings(name: str, component: str, networks: Networks) -> None:
    check_text(networks, checkpoint(name), name, component)


@pytest.mark.parametrize("name", NAMES)
def test_unet(name: str, networks: Networks) -> None:
    check_unet(networks, checkpoint(name), name)


@pytest.mark.parametrize("name", NAMES)
def test_vae_both_ways(name: str, networks: Networks) -> None:
    check_vae(networks, checkpoint(name), name)


@pytest.mark.parametrize("name", NAMES)
def test_token_ids(name: str) -> None:
    """The ids behind the embeddings, with each family's padding."""
    source = open_source(checkpoint(name))
    for component in source.components:
        if component.startswith("text_encoder"):
            tokenizer = source.tokenizer(component.replace("text_encoder", "tokenizer"))
            expected = arrays(name)[f"{component}/input_ids"]
            for prompt, ids in zip(prompts(name), expected, strict=False):
                assert tokenizer.encode(prompt) == ids.tolist(), prompt


@pytest.mark.parametrize("new", [True, False], ids=["new", "old"])
@pytest.mark.parametrize("name", NAMES)
def test_every_spelling_of_the_names(name: str, new: bool, tmp_path: Path) -> None:
    """Text encoders with and without text_model., the VAE's attention under both sets of names."""
    networks = Networks("numpy")
    path = respelled(name, tmp_path / "model", text_prefix=not new, old_vae_names=not new)
    for component in ("text_encoder", "text_encoder_2"):
        if (path / component).exists():
            check_text(networks, path, name, component)
    check_vae(networks, path, name)


@pytest.mark.parametrize("name", NAMES)
def test_after_conversion(name: str, tmp_path: Path, networks: Networks) -> None:
    """The same through a converted folder (whose tensors keep their values in float32)."""
    convert(checkpoint(name), tmp_path / "model", dtype="float32")
    for component in open_source(checkpoint(name)).components:
        if component.startswith("text_encoder"):
            check_text(networks, tmp_path / "model", name, component)
    check_unet(networks, tmp_path / "model", name)
    check_vae(networks, tmp_path / "model", name)
