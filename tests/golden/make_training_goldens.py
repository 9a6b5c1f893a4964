"""Compute gradients, losses, optimizer steps and a LoRA run with torch, diffusers and PEFT.

    python tests/golden/make_training_goldens.py [unets others losses steps lora ...]

Of gradients, norms and random products are kept (tests/training_cases.py), of the run its curve and
its last weights. Needs prodigyopt beside the parity extra.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.training_utils import compute_snr
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import training_cases as cases  # noqa: E402
from make_goldens import load, run  # noqa: E402

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def torch_layout(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()


def gradients_of(module: torch.nn.Module, prefix: str, found: dict[str, np.ndarray]) -> None:
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            found[f"{prefix}/{name}"] = cases.summary(name, parameter.grad.numpy())


def unets(found: dict[str, np.ndarray]) -> None:
    for kind in ("sd15", "sd21v", "sdxl"):
        pipe = load(kind, torch.float32)
        unet = pipe.unet
        pooled = None
        if unet.config.addition_embed_type == "text_time":
            pooled = pipe.text_encoder_2.config.projection_dim
        given = cases.unet_inputs(kind, unet.config.cross_attention_dim, pooled)
        sample = torch_layout(given["sample"]).requires_grad_()
        text = torch.from_numpy(given["text"]).requires_grad_()
        added = None
        if pooled is not None:
            added = {n: torch.from_numpy(given[n]) for n in ("text_embeds", "time_ids")}
        out = unet(
            sample, torch.from_numpy(given["timesteps"]), text, added_cond_kwargs=added
        ).sample
        (out * torch_layout(given["cotangent"])).sum().backward()
        gradients_of(unet, f"unet-{kind}", found)
        found[f"unet-{kind}/inputs.sample"] = cases.summary("sample", sample.grad.numpy())
        found[f"unet-{kind}/inputs.text"] = cases.summary("text", text.grad.numpy())
        for name in ("text_encoder", "text_encoder_2"):
            encoder = getattr(pipe, name, None)
            if encoder is None:
                continue
            ids = torch.tensor([[1, 2, 3, 4, 5, *[encoder.config.vocab_size - 1] * 72]] * 2)
            states = encoder(ids, output_hidden_states=True)
            random = np.random.default_rng(3)
            hidden = states.hidden_states[-2] if kind == "sdxl" else states.last_hidden_state
            loss = (
                hidden * torch.from_numpy(random.standard_normal(hidden.shape, np.float32))
            ).sum()
            if kind == "sdxl" and name == "text_encoder_2":
                pooled_out = states.text_embeds
                weights = random.standard_normal(pooled_out.shape, np.float32)
                loss = loss + (pooled_out * torch.from_numpy(weights)).sum()
            loss.backward()
            gradients_of(encoder, f"{name}-{kind}", found)


def others(found: dict[str, np.ndarray]) -> None:
    """A ControlNet, and a U-Net without text."""
    unet = load("sd15", torch.float32).unet
    net = ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=(8, 8, 16, 16), load_weights_from_unet=True
    )
    shapes = {name: p.shape for name, p in net.named_parameters()}
    with torch.no_grad():  # no convolution is zero, so that every gradient is felt
        for name, parameter in net.named_parameters():
            if name.startswith("controlnet_"):
                random = np.random.default_rng(len(name))
                values = 0.1 * random.standard_normal(tuple(shapes[name]))
                parameter.copy_(torch.from_numpy(values.astype(np.float32)))
    given = cases.unet_inputs("controlnet", unet.config.cross_attention_dim, None)
    image = np.random.default_rng(4).random((2, 64, 64, 3), np.float32)
    sample, text = torch_layout(given["sample"]), torch.from_numpy(given["text"])
    times = torch.from_numpy(given["timesteps"])
    down, mid = net(sample, times, text, torch_layout(image), return_dict=False)
    out = unet(
        sample,
        times,
        text,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
    ).sample
    (out * torch_layout(given["cotangent"])).sum().backward()
    gradients_of(net, "controlnet", found)
    hint = {n: p.detach().numpy() for n, p in net.named_parameters() if "cond_embedding" in n}
    for name, values in hint.items():
        found[f"controlnet-first/{name}"] = values
    plain = UNet2DModel.from_pretrained(HERE / "ddpm" / "checkpoint")
    side = plain.config.sample_size
    random = np.random.default_rng(8)
    x = torch_layout(random.standard_normal((2, side, side, 3), np.float32))
    cotangent = torch_layout(random.standard_normal((2, side, side, 3), np.float32))
    (plain(x, times).sample * cotangent).sum().backward()
    gradients_of(plain, "unet-2d", found)


def losses(found: dict[str, np.ndarray]) -> None:
    """x_t, targets, weights, and gradients of weighted losses, as diffusers' scripts have them."""
    random = np.random.default_rng(2)
    count = len(cases.TIMESTEPS)
    clean, noise, guess = (
        torch.from_numpy(random.standard_normal((count, 2, 2, 4), np.float32)) for _ in range(3)
    )
    times = torch.from_numpy(cases.TIMESTEPS)
    for name, config in cases.PROCESSES.items():
        scheduler = DDPMScheduler(**config)
        found[f"process-{name}/noisy"] = scheduler.add_noise(clean, noise, times).numpy()
        velocity = scheduler.get_velocity(clean, noise, times)
        found[f"process-{name}/velocity"] = velocity.numpy()
        snr = compute_snr(scheduler, times)
        found[f"process-{name}/snr"] = snr.numpy()
        targets = {"epsilon": noise, "v_prediction": velocity, "sample": clean}
        for prediction, target in targets.items():
            if name == "zero-snr" and prediction == "epsilon":
                continue
            base = torch.minimum(snr, 5 * torch.ones_like(snr))
            if prediction == "epsilon":
                base = base / snr
            elif prediction == "v_prediction":
                base = base / (snr + 1)
            own = guess.clone().requires_grad_()
            each = torch.nn.functional.mse_loss(own, target, reduction="none").mean((1, 2, 3))
            loss = (each * base).mean()
            loss.backward()
            found[f"process-{name}/min-snr-{prediction}"] = own.grad.numpy()
            found[f"process-{name}/min-snr-{prediction}-loss"] = np.array(loss.item(), np.float32)


def steps(found: dict[str, np.ndarray]) -> None:
    """Parameters after each step of an optimizer."""
    from prodigyopt import Prodigy
    from transformers.optimization import Adafactor

    first, gradients = cases.optimizer_problem()
    makers: dict[str, Any] = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.01),
        "adafactor": lambda p: Adafactor(
            p, lr=1e-2, weight_decay=0.01, scale_parameter=False, relative_step=False
        ),
        "prodigy": lambda p: Prodigy(
            p, lr=1.0, weight_decay=0.01, use_bias_correction=True, safeguard_warmup=True
        ),
    }
    for kind, make in makers.items():
        parameters = {n: torch.nn.Parameter(torch.from_numpy(v.copy())) for n, v in first.items()}
        optimizer = make(list(parameters.values()))
        for name in first:
            found[f"optimizer-{kind}/{name}"] = np.zeros((len(gradients), *first[name].shape))
        for index, given in enumerate(gradients):
            for name, parameter in parameters.items():
                parameter.grad = torch.from_numpy(given[name].copy())
            optimizer.step()
            for name, parameter in parameters.items():
                found[f"optimizer-{kind}/{name}"][index] = parameter.detach().numpy()
        for name in first:
            found[f"optimizer-{kind}/{name}"] = found[f"optimizer-{kind}/{name}"].astype(np.float32)


def train(dora: bool, count: int) -> tuple[UNet2DConditionModel, list[float]]:
    """Train a LoRA of the tiny SD 1.5 as diffusers' train_text_to_image_lora.py does."""
    unet = load("sd15", torch.float32).unet
    unet.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(r=cases.RANK, lora_alpha=cases.RANK, use_dora=dora, target_modules=TARGETS)
    )
    learnt = [p for p in unet.parameters() if p.requires_grad]
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".lora_A." in name:
                module = name.partition(".lora_A.")[0]
                values = cases.first_factor(module, tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(values))
    optimizer = torch.optim.AdamW(learnt, lr=cases.RATE, weight_decay=0.01)
    scheduler = DDPMScheduler(**cases.PROCESSES["scaled-linear"])
    curve = []
    for batch in cases.lora_batches(count, unet.config.cross_attention_dim):
        noise, times = torch_layout(batch["noise"]), torch.from_numpy(batch["timesteps"])
        noisy = scheduler.add_noise(torch_layout(batch["latents"]), noise, times)
        out = unet(noisy, times, torch.from_numpy(batch["text"])).sample
        loss = torch.nn.functional.mse_loss(out, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return unet, curve


def kept_run(found: dict[str, np.ndarray], name: str, dora: bool, count: int) -> dict[str, Any]:
    unet, curve = train(dora, count)
    found[f"{name}/curve"] = np.array(curve)
    state: dict[str, Any] = get_peft_model_state_dict(unet)
    for key, value in state.items():
        found[f"{name}/{key}"] = cases.summary(key, value.detach().numpy())
    return state


def dora(found: dict[str, np.ndarray]) -> None:
    kept_run(found, "dora", True, 5)


def lora_200(found: dict[str, np.ndarray]) -> None:
    kept_run(found, "lora-200", False, 200)


def lora(found: dict[str, np.ndarray]) -> None:
    state = kept_run(found, "lora", False, cases.STEPS)
    # A picture with these weights, drawn by diffusers.
    with tempfile.TemporaryDirectory() as folder:
        StableDiffusionPipeline.save_lora_weights(folder, state)
        pipe = load("sd15", torch.float32)
        pipe.load_lora_weights(folder)
        case = {"prompt": "a cat", "steps": 6, "guidance": 5.0, "seed": 3}
        case |= {"width": 64, "height": 64, "sampler": "dpmpp-2m", "schedule": "normal"}
        found["lora/latents"], found["lora/image"] = run(pipe, case)


PARTS = {part.__name__: part for part in (unets, others, losses, steps, lora, dora, lora_200)}


def main() -> None:
    warnings.filterwarnings("ignore")
    target = HERE / "training.npz"
    chosen = sys.argv[1:] or list(PARTS)
    found: dict[str, np.ndarray] = {}
    if len(chosen) < len(PARTS) and target.exists():
        found = cases.unpacked(dict(np.load(target)))
    for name in chosen:
        torch.manual_seed(0)
        PARTS[name](found)
        print(name, len(found), flush=True)
    # Summaries are small; float32 holds products to 1e-7 of the norm.
    np.savez_compressed(
        target,
        **{
            name: values.astype(np.float32) if values.dtype == np.float64 else values
            for name, values in cases.packed(found).items()
        },
    )
    print(target.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
