"""Training: gradients, losses, optimizers and runs, against torch, diffusers and PEFT (goldens of
tests/golden/make_training_goldens.py)."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import training_cases as cases
import training_ranks

pytestmark = pytest.mark.mlx
mx = pytest.importorskip("mlx.core")

import mlxdiff  # noqa: E402
from mlxdiff.backends import mlx_training_layers as layers  # noqa: E402
from mlxdiff.errors import UsageError  # noqa: E402
from mlxdiff.networks.condition import Condition  # noqa: E402
from mlxdiff.networks.config import ControlNetConfig, UNet2DConfig  # noqa: E402
from mlxdiff.networks.params import expected_parameters  # noqa: E402
from mlxdiff.run.kind import Network  # noqa: E402
from mlxdiff.training import loop, networks, optimizers, state  # noqa: E402
from mlxdiff.training.controlnet import config_for  # noqa: E402
from mlxdiff.training.data import Batch, Data, Text  # noqa: E402
from mlxdiff.training.log import read as read_log  # noqa: E402
from mlxdiff.training.lora import LoRA  # noqa: E402
from mlxdiff.training.options import (  # noqa: E402
    OPTIMIZERS,
    RATE_SCHEDULES,
    LoraOptions,
    TrainOptions,
)
from mlxdiff.training.process import Draws, Process, draw  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
# Of each tensor's norm, in float32. The bound is 1e-4.
BOUND = 1e-4


@cache
def golden() -> dict[str, np.ndarray]:
    return cases.unpacked(dict(np.load(GOLDEN / "training.npz")))


@cache
def model(kind: str) -> Any:
    return mlxdiff.load(GOLDEN / kind / "checkpoint", backend="mlx").model


def weights_of(kind: str, component: str) -> dict[str, Any]:
    tensors = model(kind).component_of(Network(component)).tensors()
    return {name: mx.array(np.asarray(t.read(), np.float32)) for name, t in tensors.items()}


def in_torch(values: Any) -> np.ndarray:
    array = np.array(values)
    return array.transpose(0, 3, 1, 2) if array.ndim == 4 else array


def distance(name: str, values: Any, summary: np.ndarray) -> float:
    return cases.distance(name, in_torch(values), summary)


def check(prefix: str, found: Mapping[str, Any], strip: str = "") -> None:
    """Compare gradients with the golden ones, all of them."""
    expected = {
        n.removeprefix(f"{prefix}/").removeprefix(strip): v
        for n, v in golden().items()
        if n.startswith(f"{prefix}/")
    }
    names = {name.removeprefix(strip): values for name, values in found.items()}
    whole = max(float(v[0]) for v in expected.values())
    for name, summary in expected.items():
        if summary[0] < 1e-7 * whole:  # zero but for rounding: a bias before a softmax
            continue
        assert distance(name.removeprefix("inputs."), names.pop(name), summary) < BOUND, name
    unused = [
        n for n, v in names.items() if float(mx.abs(v).max()) > 1e-5 * whole and n not in expected
    ]
    assert unused == []


@pytest.fixture(params=["numpy", "mlx"])
def kernels(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The functions that compute: NumPy's, as on a CPU, or MLX's, as on a GPU."""
    if request.param == "mlx":
        monkeypatch.setattr(layers, "_on_cpu", lambda: False)
    return str(request.param)


# ---------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("kind", ["sd15", "sd21v", "sdxl"])
def test_gradients_of_a_unet_are_torchs(kind: str, kernels: str) -> None:
    config = model(kind).source.config("unet")
    unet = networks.build(config)
    pooled = None
    if config.addition_embed_type is not None:
        pooled = model(kind).source.config("text_encoder_2").projection_dim
    given = {
        n: mx.array(v)
        for n, v in cases.unet_inputs(kind, config.cross_attention_dim[0], pooled).items()
    }
    more = {n: given[n] for n in ("text_embeds", "time_ids") if n in given}

    def loss(parameters: dict[str, Any], sample: Any, text: Any) -> Any:
        for name, value in parameters.items():
            unet.put(name, value)
        out = unet(sample, given["timesteps"], text, **more)
        return (out * given["cotangent"]).sum()

    grads, sample, text = mx.grad(loss, argnums=(0, 1, 2))(
        weights_of(kind, "unet"), given["sample"], given["text"]
    )
    check(f"unet-{kind}", {**grads, "inputs.sample": sample, "inputs.text": text})


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("sd15", "text_encoder"),
        ("sd21v", "text_encoder"),
        ("sdxl", "text_encoder"),
        ("sdxl", "text_encoder_2"),
    ],
)
def test_gradients_of_a_text_encoder_are_torchs(kind: str, name: str, kernels: str) -> None:
    config = model(kind).source.config(name)
    encoder = networks.build(config)
    ids = mx.array([[1, 2, 3, 4, 5, *[config.vocab_size - 1] * 72]] * 2)
    random = np.random.default_rng(3)
    shape = (2, 77, config.hidden_size)
    to_states = mx.array(random.standard_normal(shape, np.float32))

    def loss(parameters: dict[str, Any]) -> Any:
        for key, value in parameters.items():
            encoder.put(key, value)
        out = encoder(ids)
        states = out.hidden_states[-2] if kind == "sdxl" else out.last_hidden_state
        total = (states * to_states).sum()
        if (kind, name) == ("sdxl", "text_encoder_2"):
            to_pooled = random.standard_normal((2, config.projection_dim), np.float32)
            total = total + (out.text_embeds * mx.array(to_pooled)).sum()
        return total

    check(f"{name}-{kind}", mx.grad(loss)(weights_of(kind, name)), strip="text_model.")


def test_gradients_of_a_unet_without_text_are_torchs(kernels: str) -> None:
    pipe = mlxdiff.load(GOLDEN / "ddpm" / "checkpoint", backend="mlx")
    config = pipe.model.source.config("unet")
    assert isinstance(config, UNet2DConfig)
    unet = networks.build(config)
    tensors = pipe.model.component_of(Network("unet")).tensors()
    parameters = {n: mx.array(np.asarray(t.read(), np.float32)) for n, t in tensors.items()}
    side = pipe.model.default_size[0]
    random = np.random.default_rng(8)
    x, cotangent = (
        mx.array(random.standard_normal((2, side, side, 3), np.float32)) for _ in range(2)
    )

    def loss(parameters: dict[str, Any]) -> Any:
        for name, value in parameters.items():
            unet.put(name, value)
        return (unet(x, mx.array([871, 33])) * cotangent).sum()

    check("unet-2d", mx.grad(loss)(parameters))


def test_gradients_of_a_controlnet_are_torchs(kernels: str) -> None:
    """Through the U-Net that it leads."""
    source = model("sd15").source
    told = config_for(networks.json_of(source, "unet"), 8)
    told["conditioning_embedding_out_channels"] = [8, 8, 16, 16]
    config = ControlNetConfig.from_dict(told, "the golden ControlNet")
    net, unet = networks.build(config), networks.load(model("sd15"), "unet")
    first = {
        n.partition("/")[2]: v for n, v in golden().items() if n.startswith("controlnet-first")
    }
    own = weights_of("sd15", "unet")
    parameters = {}
    for name, shape in expected_parameters(config).items():
        if name in first:
            values = first[name]
        elif name.startswith("controlnet_"):
            torchs = (*shape[:1], *shape[-1:], 1, 1) if len(shape) == 4 else shape
            values = 0.1 * np.random.default_rng(len(name)).standard_normal(torchs)
        else:
            parameters[name] = own[name]
            continue
        values = values.transpose(0, 2, 3, 1) if values.ndim == 4 else values
        parameters[name] = mx.array(np.ascontiguousarray(values, np.float32))
    width = source.config("unet").cross_attention_dim[0]
    given = {n: mx.array(v) for n, v in cases.unet_inputs("controlnet", width, None).items()}
    image = mx.array(np.random.default_rng(4).random((2, 64, 64, 3), np.float32))

    def loss(parameters: dict[str, Any]) -> Any:
        for name, value in parameters.items():
            net.put(name, value)
        temb = Condition(net.embed(given["timesteps"]))
        text = net.read(given["text"])
        added = net.predict(given["sample"], temb, text, net.embed_image(image))
        out = unet(given["sample"], given["timesteps"], given["text"], residuals=added)
        return (out * given["cotangent"]).sum()

    check("controlnet", mx.grad(loss)(parameters))


def test_checkpointing_changes_no_gradient() -> None:
    width = model("sd15").source.config("unet").cross_attention_dim[0]
    given = cases.lora_batches(1, width)[0]
    found = []
    for again in (False, True):
        task = LoRA(
            model("sd15"), LoraOptions(rank=2, targets="all", dora=True), checkpointing=again
        )
        trainer = Trainer(task, given)
        parameters = {n: v + 0.01 for n, v in task.parameters().items()}
        found.append(trainer._gradient(parameters, *trainer.batch(0)))
    (loss, plain), (other, checkpointed) = found
    assert abs(float(loss) - float(other)) < 1e-6 * float(loss)
    whole = float(optimizers.norm(plain))
    for name, value in plain.items():
        assert float(mx.linalg.norm(value - checkpointed[name])) < 1e-5 * whole, name


def test_checkpointing_keeps_less() -> None:
    width = model("sd15").source.config("unet").cross_attention_dim[0]
    random = np.random.default_rng(0)
    given = {
        "latents": random.standard_normal((2, 32, 32, 4), np.float32),
        "text": random.standard_normal((2, 77, width), np.float32),
    }
    peaks = []
    for again in (False, True):
        task = LoRA(model("sd15"), LoraOptions(rank=2), checkpointing=again)
        trainer = Trainer(task, given)
        arguments = task.parameters(), *trainer.batch(0)
        mx.eval(trainer._gradient(*arguments))
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(trainer._gradient(*arguments))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 0.6 * peaks[0]


# ------------------------------------------------------------------------------- the process


@pytest.mark.parametrize("name", list(cases.PROCESSES))
def test_noisy_latents_and_targets_are_diffusers(name: str) -> None:
    process = Process.from_config(cases.PROCESSES[name])
    random = np.random.default_rng(2)
    count = len(cases.TIMESTEPS)
    clean, noise, guess = (random.standard_normal((count, 2, 2, 4), np.float32) for _ in range(3))
    own = {n.partition("/")[2]: v for n, v in golden().items() if n.startswith(f"process-{name}/")}
    np.testing.assert_allclose(
        process.noisy(clean, noise, cases.TIMESTEPS), own["noisy"], atol=1e-6
    )
    as_v = replace(process, prediction="v_prediction")
    np.testing.assert_allclose(
        as_v.target(clean, noise, cases.TIMESTEPS), own["velocity"], atol=1e-6
    )
    np.testing.assert_allclose(process.snr(cases.TIMESTEPS), own["snr"], rtol=2e-5, atol=1e-12)
    for prediction in ("epsilon", "v_prediction", "sample"):
        if f"min-snr-{prediction}" not in own:
            continue
        kind = replace(process, prediction=prediction)

        def loss(guess: Any, kind: Process = kind) -> Any:
            each = loop.losses(kind, guess, clean, noise, cases.TIMESTEPS)
            return (each * mx.array(kind.weights(cases.TIMESTEPS, 5.0))).mean()

        value, gradient = mx.value_and_grad(loss)(mx.array(guess))
        assert float(value) == pytest.approx(float(own[f"min-snr-{prediction}-loss"]), rel=1e-4)
        expected = own[f"min-snr-{prediction}"]
        difference = np.linalg.norm(np.array(gradient) - expected) / np.linalg.norm(expected)
        assert difference < BOUND


def test_debiased_weights() -> None:
    process = Process.from_config(cases.PROCESSES["scaled-linear"])
    snr = np.minimum(process.snr(cases.TIMESTEPS), 1000)
    np.testing.assert_allclose(process.weights(cases.TIMESTEPS, debias=True), snr**-0.5, rtol=1e-6)
    of_v = replace(process, prediction="v_prediction")
    np.testing.assert_allclose(of_v.weights(cases.TIMESTEPS, debias=True), 1 / (snr + 1), rtol=1e-6)


def test_weights_without_a_finite_value_are_refused() -> None:
    process = Process.from_config(cases.PROCESSES["zero-snr"])
    with pytest.raises(UsageError, match="zero terminal SNR"):
        process.check_weighting(5.0, False)
    with pytest.raises(UsageError, match="both given"):
        process.check_weighting(5.0, True)


def test_draws_follow_from_seed_and_number() -> None:
    shape = (8, 4, 4, 4)
    one, again = (draw(3, 7, shape, 1000, drop=0.5, offset=0.1) for _ in range(2))
    assert all(
        np.array_equal(a, b) for a, b in zip(vars(one).values(), vars(again).values(), strict=True)
    )
    other = draw(3, 8, shape, 1000)
    assert not np.array_equal(one.noise, other.noise)
    many = draw(0, 0, (4096, 2, 2, 1), 1000, drop=0.25, offset=0.5)
    assert abs(many.dropped.mean() - 0.25) < 0.03
    # Pixels of a channel share the offset: their mean has variance 0.25 + 1 / 4.
    assert abs(many.noise.mean(axis=(1, 2)).var() - 0.5) < 0.05
    assert 0 <= many.timesteps.min() and many.timesteps.max() <= 999


# --------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers_are_torchs_step_by_step(kind: str) -> None:
    first, gradients = cases.optimizer_problem()
    parameters = {name: mx.array(value) for name, value in first.items()}
    optimizer = optimizers.make(kind, parameters, 0.01)
    rate = 1.0 if kind == "prodigy" else 1e-2
    for index, given in enumerate(gradients):
        if index == len(gradients) // 2:  # the state is all that it needs
            restored = {n: mx.array(np.array(v)) for n, v in optimizer.state.items()}
            optimizer = optimizers.make(kind, parameters, 0.01)
            optimizer.state = restored
        parameters = optimizer.update(parameters, {n: mx.array(g) for n, g in given.items()}, rate)
        for name, value in parameters.items():
            expected = golden()[f"optimizer-{kind}/{name}"][index]
            np.testing.assert_allclose(np.array(value), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", RATE_SCHEDULES)
def test_learning_rates(schedule: str) -> None:
    rates = [optimizers.rate_at(i, 2.0, schedule, 4, 20) for i in range(21)]
    assert rates[:5] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert rates[12] == pytest.approx({"constant": 2.0, "linear": 1.0, "cosine": 1.0}[schedule])
    assert rates[20] == pytest.approx(2.0 if schedule == "constant" else 0.0)


# --------------------------------------------------------------------------------------- runs


class Given(Data):
    """Batches that are given."""

    def __init__(self, batches: list[dict[str, np.ndarray]]) -> None:
        self.batches_, self.digest, self.size = batches, "given", len(batches)
        self.sources = {}

    @property
    def empty(self) -> Text | None:
        return Text(np.zeros_like(self.batches_[0]["text"][:1]), None)

    def batch(self, index: int, size: int, seed: int) -> Batch:
        found = self.batches_[index % len(self.batches_)]
        rows = [i % cases.BATCH for i in range(size)]
        ones = np.ones(size, np.float32)
        return Batch(found["latents"][rows], None, ones, Text(found["text"][rows], None))


class Trainer(loop.Trainer):
    """A trainer of one batch."""

    def __init__(self, task: Any, given: dict[str, np.ndarray], **options: Any) -> None:
        process = Process.from_config(cases.PROCESSES["scaled-linear"])
        super().__init__(task, Given([given]), process, TrainOptions(batch=cases.BATCH, **options))


class Golden(loop.Trainer):
    """The golden LoRA run: its batches, its noise."""

    def __init__(self, count: int, dora: bool) -> None:
        width = model("sd15").source.config("unet").cross_attention_dim[0]
        self.given = cases.lora_batches(count, width)
        task = LoRA(model("sd15"), LoraOptions(rank=cases.RANK, dora=dora))
        for name, value in task.parameters().items():
            if name.endswith("lora_A"):
                module = name.removeprefix("unet.").removesuffix(".lora_A")
                task._first[name] = mx.array(cases.first_factor(module, tuple(value.shape)))
        process = Process.from_config(cases.PROCESSES["scaled-linear"])
        options = TrainOptions(batch=cases.BATCH, learning_rate=cases.RATE)
        super().__init__(task, Given(self.given), process, options)

    def batch(self, index: int) -> tuple[Batch, Draws]:
        own = self.given[index]
        batch = self.data.batch(index, cases.BATCH, 0)
        noise, times = own["noise"], own["timesteps"].astype(np.int32)
        return batch, Draws(times, noise, noise, np.zeros(cases.BATCH, bool), times)


@pytest.mark.parametrize(
    ("name", "count"),
    [("lora", cases.STEPS), ("dora", 5), pytest.param("lora-200", 200, marks=pytest.mark.slow)],
)
def test_a_run_is_that_of_diffusers_and_peft(name: str, count: int, tmp_path: Path) -> None:
    trainer = Golden(count, dora=name == "dora")
    curve = np.array([trainer.step()["loss"] for _ in range(count)])
    expected = golden()[f"{name}/curve"]
    assert np.abs(curve / expected - 1).max() < 0.01
    assert isinstance(trainer.task, LoRA)
    tensors, _ = trainer.task.diffusers_form(trainer.result())
    names = {n.removeprefix(f"{name}/") for n in golden() if n.startswith(f"{name}/")}
    names -= {"curve", "latents", "image"}
    assert {n.removeprefix("unet.") for n in tensors} == names
    summaries = {key: golden()[f"{name}/{key.removeprefix('unet.')}"] for key in tensors}
    largest = max(float(s[0]) for key, s in summaries.items() if "lora_B" in key)
    for key, values in tensors.items():
        # Adam divides gradients by their size, so rounding grows, most where the gradient is zero
        # but for rounding (self-attention of the middle block, which has one pixel here).
        summary = summaries[key]
        off = cases.distance(key.removeprefix("unet."), values, summary) * float(summary[0])
        assert off < 0.02 * max(float(summary[0]), 0.1 * largest), key
    if name == "lora":  # what was trained draws diffusers' picture
        (file,) = trainer.task.save(trainer.result(), tmp_path / "trained", {})
        pipe = mlxdiff.load(GOLDEN / "sd15" / "checkpoint", backend="numpy", loras=[file])
        case: dict[str, Any] = {"steps": 6, "guidance": 5.0, "seed": 3, "width": 64, "height": 64}
        found = pipe.generate("a cat", sampler="dpmpp-2m", schedule="normal", **case)
        image = np.asarray(found.images[0]).astype(int)
        drawn = golden()["lora/image"].reshape(image.shape).astype(int)
        assert np.abs(image - drawn).mean() < 0.5


def options_for(steps: int, **more: Any) -> TrainOptions:
    usual: dict[str, Any] = {"batch": 2, "learning_rate": 1e-3, "save_every": 2, "seed": 1}
    return TrainOptions(steps=steps, **usual | more)


def small_run(folder: Path, options: TrainOptions, **lora: Any) -> loop.Report:
    width = model("sd15").source.config("unet").cross_attention_dim[0]
    task = LoRA(model("sd15"), LoraOptions(rank=2, **lora), options.seed)
    process = Process.from_config(model("sd15").source.scheduler_config)
    return loop.train(
        task, Given(cases.lora_batches(4, width)), process, options, folder, folder / "result"
    )


def arrays_of(path: Path) -> dict[str, bytes]:
    from safetensors.numpy import load_file

    return {name: value.tobytes() for name, value in load_file(path).items()}


@pytest.mark.parametrize(
    "optimizer",
    ["adamw", *(pytest.param(o, marks=pytest.mark.slow) for o in ("adafactor", "prodigy"))],
)
def test_a_run_that_goes_on_is_the_run_that_did_not_stop(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more: dict[str, Any] = {
        "optimizer": optimizer,
        "ema": 0.9,
        "warmup": 2,
        "caption_dropout": 0.3,
    }
    if optimizer == "prodigy":
        more["learning_rate"] = 1.0
    small_run(tmp_path / "whole", options_for(4, **more))
    step = loop.Trainer.step

    def killed(self: loop.Trainer) -> Any:
        if self.state.step == 3:  # after step 3 was logged, before it was saved
            raise MemoryError
        return step(self)

    monkeypatch.setattr(loop.Trainer, "step", killed)
    with pytest.raises(MemoryError):
        small_run(tmp_path / "halves", options_for(4, **more))
    assert [line["step"] for line in read_log(tmp_path / "halves")] == [1, 2, 3]
    monkeypatch.setattr(loop.Trainer, "step", step)
    small_run(tmp_path / "halves", options_for(4, resume=True, **more))
    for name in ("result.safetensors", "state.safetensors"):
        assert arrays_of(tmp_path / "whole" / name) == arrays_of(tmp_path / "halves" / name)
    curves = [[line["loss"] for line in read_log(tmp_path / run)] for run in ("whole", "halves")]
    assert curves[0] == curves[1] and len(curves[0]) == 4


def test_another_run_is_refused(tmp_path: Path) -> None:
    small_run(tmp_path, options_for(2))
    for changed, words in (
        ({"batch": 1}, "batch 2 .now 1"),
        ({"seed": 5}, "seed 1"),
    ):
        with pytest.raises(UsageError, match=words):
            small_run(tmp_path, options_for(4, resume=True, **changed))
    with pytest.raises(UsageError, match="targets"):
        small_run(tmp_path, options_for(4, resume=True), targets="all")
    identity = json.loads(state.TensorFile(tmp_path / state.FILE).metadata["identity"])
    with pytest.raises(UsageError, match="another model"):
        state.read(tmp_path, {**identity, "model": "0" * 64})


def test_a_loss_that_is_no_number_stops(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"step \d+: .*learning_rate .now 1e\+30.*saved"):
        small_run(tmp_path, options_for(20, learning_rate=1e30, save_every=1))
    good = read_log(tmp_path)
    assert good and all(math.isfinite(line["loss"]) for line in good)
    assert int(state.TensorFile(tmp_path / state.FILE).metadata["step"]) == len(good)


def test_a_full_disk_keeps_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_run(tmp_path, options_for(2))
    before = (tmp_path / state.FILE).read_bytes()

    def full(*_: Any, **__: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state, "write_safetensors", full)
    with pytest.raises(OSError, match="No space"):
        small_run(tmp_path, options_for(4, resume=True))
    assert (tmp_path / state.FILE).read_bytes() == before
    assert not list(tmp_path.glob(".mlxdiff-*"))


def test_accumulated_batches_are_one_batch() -> None:
    width = model("sd15").source.config("unet").cross_attention_dim[0]
    given = cases.lora_batches(2, width)
    process = Process.from_config(model("sd15").source.scheduler_config)
    data = Given(given)

    class Joined(Given):
        def batch(self, index: int, size: int, seed: int) -> Batch:
            return _joined([data.batch(i, 2, seed) for i in (2 * index, 2 * index + 1)])

    task = LoRA(model("sd15"), LoraOptions(rank=2))
    two = loop.Trainer(task, data, process, options_for(1, accumulate=2, clip=0.0))
    one = loop.Trainer(task, Joined(given), process, options_for(1, batch=4, clip=0.0))
    parts = [two.batch(i) for i in (0, 1)]
    one.batch = lambda index: (  # type: ignore[method-assign]
        _joined([batch for batch, _ in parts]),
        _joined([drawn for _, drawn in parts]),
    )
    (loss, gradients, size), (other, whole, _) = two.gradients(0), one.gradients(0)
    assert loss == pytest.approx(other, rel=1e-5)
    for name, value in gradients.items():
        assert float(mx.linalg.norm(value - whole[name])) < 1e-5 * size


def _joined(parts: list[Any]) -> Any:
    first = parts[0]
    names = [name for name, value in vars(first).items() if isinstance(value, np.ndarray)]
    found = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    if getattr(first, "text", None) is not None:
        found["text"] = Text(np.concatenate([part.text.states for part in parts]), None)
    return replace(first, **found)


@pytest.mark.parametrize("kind", ["sd15", "sd21v", "sdxl"])
@pytest.mark.parametrize("dora", [False, True])
def test_both_forms_hold_the_same_changes(kind: str, dora: bool, tmp_path: Path) -> None:
    from mlxdiff.adapters import lora

    options = LoraOptions(rank=2, targets="all", text_encoder=True, dora=dora, form="both", alpha=3)
    task = LoRA(model(kind), options)
    random = np.random.default_rng(0)
    parameters = {
        name: np.array(value) + 0.1 * random.standard_normal(value.shape).astype(np.float32)
        for name, value in task.parameters().items()
    }
    files = task.save(parameters, tmp_path / "trained", {"pictures": {"a.png": "0f"}})
    source = model(kind).source
    configs = {name: source.config(name) for name in source.components if name != "vae"}
    opened = [lora.open_all([file], configs, source.family)[0] for file in files]
    for component in task.networks:
        tensors = source.tensors(component)
        one, other = (lora.changed([each], component, tensors) for each in opened)
        changed = 0
        for name, tensor in tensors.items():
            a, b = one[name].read(), other[name].read()
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
            changed += not np.array_equal(a, np.asarray(tensor.read(), np.float32))
        assert changed == sum(n.startswith(f"{component}.") and n.endswith("A") for n in parameters)
    assert json.loads(opened[0].file.metadata["pictures"]) == {"a.png": "0f"}


def test_the_change_in_training_is_the_change_in_drawing(tmp_path: Path, kernels: str) -> None:
    """The network under training predicts what the model with the written file predicts."""
    options = LoraOptions(rank=2, targets="all", dora=True, alpha=5)
    task = LoRA(model("sd15"), options)
    random = np.random.default_rng(0)
    parameters = {
        name: np.array(value) + 0.1 * random.standard_normal(value.shape).astype(np.float32)
        for name, value in task.parameters().items()
    }
    width = model("sd15").source.config("unet").cross_attention_dim[0]
    given = cases.lora_batches(1, width)[0]
    batch = Given([given]).batch(0, 2, 0)
    times = mx.array(given["timesteps"])
    arrays = {name: mx.array(value) for name, value in parameters.items()}
    found = task.predict(arrays, batch, mx.array(given["noise"]), times)
    (file,) = task.save(parameters, tmp_path / "trained", {})
    pipe = mlxdiff.load(GOLDEN / "sd15" / "checkpoint", backend="mlx", loras=[file])
    unet = pipe.model.component("unet")
    expected = unet(mx.array(given["noise"]), times, mx.array(given["text"]))
    assert float(mx.abs(found - expected).max()) < 2e-5 * float(mx.abs(expected).max())


def test_a_quantized_base_stays_packed() -> None:
    pipe = mlxdiff.load(backend="mlx", quantize=4)
    task = LoRA(pipe.model, LoraOptions(rank=2))
    unet: Any = task.networks["unet"]
    kept = [m.weight for m in unet.modules() if isinstance(m.get("weight"), layers.StoredWeight)]
    assert any(weight.quantization is not None for weight in kept)
    batch = Batch(
        np.zeros((1, 16, 16, 4), np.float32),
        None,
        np.ones(1, np.float32),
        Text(np.ones((1, 77, 128), np.float32), None),
    )
    trainer = loop.Trainer(
        task, Given([]), Process.from_config(pipe.model.source.scheduler_config), options_for(1)
    )
    drawn = draw(0, 0, (1, 16, 16, 4), 1000)
    _, found = trainer._gradient(task.parameters(), batch, drawn)
    assert all(bool(mx.isfinite(value).all()) for value in found.values())
    assert max(float(mx.abs(value).max()) for value in found.values()) > 0


def test_processes_share_a_batch(tmp_path: Path) -> None:
    """Two processes, each with half of a batch, make the update of one with the whole."""
    launch = shutil.which("mlx.launch", path=str(Path(sys.executable).parent))
    if launch is None:
        pytest.skip("mlx.launch is not installed")
    script, out = Path(training_ranks.__file__), tmp_path / "of-two.npz"
    subprocess.run(
        [launch, "-n", "2", "--backend", "ring", sys.executable, str(script), str(out)],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        timeout=120,
        capture_output=True,
    )
    loss, gradients = training_ranks.update(loop.Ranks())
    two = dict(np.load(out))
    assert float(two.pop("loss")) == pytest.approx(loss, rel=1e-5)
    assert set(two) == set(gradients)
    whole = float(optimizers.norm(gradients))
    for name, value in gradients.items():
        assert np.linalg.norm(np.array(value) - two[name]) < 1e-5 * whole, name


def test_half_precision_learns_what_float32_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: frozen weights and activations in float16, what is trained in float32."""
    monkeypatch.setattr(layers, "_on_cpu", lambda: False)
    width = model("sd15").source.config("unet").cross_attention_dim[0]
    given = cases.lora_batches(1, width)[0]
    found = []
    for dtype in ("float32", "float16"):
        task = LoRA(model("sd15"), LoraOptions(rank=2), dtype=dtype)
        trainer = Trainer(task, given, dtype=dtype, clip=0.0)
        trainer.state.parameters = {n: v + 0.01 for n, v in task.parameters().items()}
        found.append(trainer.gradients(0))
    (loss, whole, size), (other, half, _) = found
    assert other == pytest.approx(loss, rel=5e-3)
    assert all(value.dtype == mx.float32 for value in half.values())
    off = {name: whole[name] - half[name] for name in whole}
    assert float(optimizers.norm(off)) < 0.02 * size
