"""The NumPy networks against diffusers and transformers, with the same tiny random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny

from mlxdiff.backends.numpy import NumPyBackend

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity
TOLERANCE = 1e-5


def to_torch(x: np.ndarray) -> Any:
    return torch.tensor(x.transpose(0, 3, 1, 2) if x.ndim == 4 else x)


def from_torch(x: Any) -> np.ndarray:
    x = x.numpy()
    return x.transpose(0, 2, 3, 1) if x.ndim == 4 else x


def pair(kind: str, name: str, build: Callable[[], Any]) -> tuple[Any, Any, Any]:
    """The config, our network, and theirs with the same weights."""
    config = tiny.config(kind, name)
    arrays = tiny.random_arrays(config)
    theirs = build()
    state = {key: to_torch(value) for key, value in arrays.items()}
    if kind == "clip" and not any(k.startswith("text_model.") for k in theirs.state_dict()):
        state = {key.removeprefix("text_model."): value for key, value in state.items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all("position_ids" in key for key in missing)
    return config, NumPyBackend().load(config, tiny.lazy(arrays)), theirs.eval()


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (5, 12)])
@pytest.mark.parametrize("name", tiny.UNETS)
def test_unet(name: str, size: tuple[int, int]) -> None:
    options = {"sample_size": 8} | tiny.UNETS[name]
    # This class refuses the second spelling of the head count, which some files have.
    if "num_attention_heads" in options:
        options["attention_head_dim"] = options.pop("num_attention_heads")
    config, ours, theirs = pair("unet", name, lambda: diffusers.UNet2DConditionModel(**options))
    inputs = tiny.unet_inputs(config, *size)
    got = ours(**inputs)
    tensors = {key: to_torch(value) for key, value in inputs.items()}
    added = {key: tensors.pop(key) for key in ("text_embeds", "time_ids") if key in tensors}
    timesteps = tensors.pop("timesteps")
    with torch.no_grad():
        wanted = theirs(timestep=timesteps, added_cond_kwargs=added or None, **tensors).sample
    assert tiny.difference(got, from_torch(wanted)) < TOLERANCE


@pytest.mark.parametrize("name", tiny.VAES)
def test_vae(name: str) -> None:
    _, ours, theirs = pair("vae", name, lambda: diffusers.AutoencoderKL(**tiny.VAES[name]))
    x = np.random.RandomState(3).uniform(-1, 1, (2, 10, 14, 3)).astype(np.float32)
    with torch.no_grad():
        posterior = theirs.encode(to_torch(x)).latent_dist
        picture = theirs.decode(posterior.mean).sample
    mean, logvar = ours.encode(x)
    assert tiny.difference(mean, from_torch(posterior.mean)) < TOLERANCE
    assert tiny.difference(logvar, from_torch(posterior.logvar)) < TOLERANCE
    assert tiny.difference(ours.decode(mean), from_torch(picture)) < TOLERANCE


@pytest.mark.parametrize("name", tiny.CLIPS)
def test_clip(name: str) -> None:
    projected = name == "projection"
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    options = {key: value for key, value in tiny.CLIPS[name].items() if key != "architectures"}
    settings = transformers.CLIPTextConfig(**options, bos_token_id=98, pad_token_id=1)
    _, ours, theirs = pair("clip", name, lambda: kind(settings))
    got = ours(tiny.INPUT_IDS)
    with torch.no_grad():
        wanted = theirs(torch.tensor(tiny.INPUT_IDS).long(), output_hidden_states=True)
    assert tiny.difference(got.last_hidden_state, from_torch(wanted.last_hidden_state)) < TOLERANCE
    for a, b in zip(got.hidden_states, wanted.hidden_states, strict=True):
        assert tiny.difference(a, from_torch(b)) < TOLERANCE
    if projected:
        assert tiny.difference(got.text_embeds, from_torch(wanted.text_embeds)) < TOLERANCE
    else:
        assert tiny.difference(got.pooled, from_torch(wanted.pooler_output)) < TOLERANCE
