"""The networks on both backends against diffusers and transformers, with tiny random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
from sides import Side

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity
TOLERANCE = {"numpy": 1e-5, "mlx": 2e-5}


def to_torch(x: np.ndarray) -> Any:
    return torch.tensor(x.transpose(0, 3, 1, 2) if x.ndim == 4 else x)


def from_torch(x: Any) -> np.ndarray:
    x = x.detach().numpy()
    return x.transpose(0, 2, 3, 1) if x.ndim == 4 else x


class Pair:
    """A tiny network of ours on one side, and theirs with the same weights.

    Args:
        side: where ours runs.
        kind, name: of its config, as in ``tiny_models``.
        build: makes theirs.
    """

    def __init__(self, side: Side, kind: str, name: str, build: Callable[[], Any]) -> None:
        self.side, self.config = side, tiny.config(kind, name)
        arrays = tiny.random_arrays(self.config)
        self.theirs = build()
        state = {key: to_torch(value) for key, value in arrays.items()}
        names = self.theirs.state_dict()
        if kind == "clip" and not any(k.startswith("text_model.") for k in names):
            state = {key.removeprefix("text_model."): value for key, value in state.items()}
        missing, unexpected = self.theirs.load_state_dict(state, strict=False)
        assert not unexpected and all("position_ids" in key for key in missing)
        self.theirs.eval()
        self.ours = side.backend.load(self.config, tiny.lazy(arrays))

    def close(self, ours: Any, theirs: Any) -> None:
        difference = tiny.difference(self.side.numpy(ours), from_torch(theirs))
        assert difference < TOLERANCE[self.side.name]


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (5, 12)])
@pytest.mark.parametrize("name", tiny.UNETS)
def test_unet(name: str, size: tuple[int, int], backend: str) -> None:
    options = {"sample_size": 8} | tiny.UNETS[name]
    # This class refuses the second spelling of the head count, which some files have.
    if "num_attention_heads" in options:
        options["attention_head_dim"] = options.pop("num_attention_heads")
    side = Side(backend)
    pair = Pair(side, "unet", name, lambda: diffusers.UNet2DConditionModel(**options))
    inputs = tiny.unet_inputs(pair.config, *size)
    got = pair.ours(**{key: side.array(value) for key, value in inputs.items()})
    tensors = {key: to_torch(value) for key, value in inputs.items()}
    added = {key: tensors.pop(key) for key in ("text_embeds", "time_ids") if key in tensors}
    timesteps = tensors.pop("timesteps")
    with torch.no_grad():
        wanted = pair.theirs(timestep=timesteps, added_cond_kwargs=added or None, **tensors).sample
    pair.close(got, wanted)


@pytest.mark.parametrize("name", tiny.VAES)
def test_vae(name: str, backend: str) -> None:
    side = Side(backend)
    pair = Pair(side, "vae", name, lambda: diffusers.AutoencoderKL(**tiny.VAES[name]))
    x = np.random.RandomState(3).uniform(-1, 1, (2, 10, 14, 3)).astype(np.float32)
    with torch.no_grad():
        posterior = pair.theirs.encode(to_torch(x)).latent_dist
        picture = pair.theirs.decode(posterior.mean).sample
    mean, logvar = pair.ours.encode(side.array(x))
    pair.close(mean, posterior.mean)
    pair.close(logvar, posterior.logvar)
    pair.close(pair.ours.decode(mean), picture)


@pytest.mark.parametrize("name", tiny.CLIPS)
def test_clip(name: str, backend: str) -> None:
    projected = name == "projection"
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    options = {key: value for key, value in tiny.CLIPS[name].items() if key != "architectures"}
    settings = transformers.CLIPTextConfig(**options, bos_token_id=98, pad_token_id=1)
    side = Side(backend)
    pair = Pair(side, "clip", name, lambda: kind(settings))
    got = pair.ours(side.array(tiny.INPUT_IDS))
    with torch.no_grad():
        wanted = pair.theirs(torch.tensor(tiny.INPUT_IDS).long(), output_hidden_states=True)
    pair.close(got.last_hidden_state, wanted.last_hidden_state)
    for a, b in zip(got.hidden_states, wanted.hidden_states, strict=True):
        pair.close(a, b)
    if projected:
        pair.close(got.text_embeds, wanted.text_embeds)
    else:
        pair.close(got.pooled, wanted.pooler_output)
