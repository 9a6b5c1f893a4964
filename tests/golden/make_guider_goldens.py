"""Write tests/golden/guiders.npz: what diffusers' guiders, PAG, FreeU and circular padding give.

    python tests/golden/make_guider_goldens.py    # needs torch==2.13.0 diffusers==0.42.1

Outputs of the tiny U-Nets and VAEs of sd15 and sdxl, on inputs that follow from a seed (the test
makes the same), and guiders' results on random predictions.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeZeroStarGuidance
from diffusers.hooks.smoothed_energy_guidance_utils import _gaussian_blur_2d
from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from guider_cases import LAYERS, MODELS, inputs, predictions  # noqa: E402


def tensors(name: str, config: Any) -> dict[str, Any]:
    """Inputs of a U-Net, as torch has them."""
    made = inputs(name, config)
    arguments: dict[str, Any] = {
        "sample": torch.from_numpy(made["sample"].transpose(0, 3, 1, 2).copy()),
        "timestep": torch.tensor(made["timestep"]),
        "encoder_hidden_states": torch.from_numpy(made["text"]),
    }
    if "pooled" in made:
        arguments["added_cond_kwargs"] = {
            "text_embeds": torch.from_numpy(made["pooled"]),
            "time_ids": torch.from_numpy(made["ids"]),
        }
    return arguments


def nhwc(x: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.detach().numpy().transpose(0, 2, 3, 1))


def matching(unet: Any, layers: str) -> list[Any]:
    """The transformer blocks whose names hold the layers' word."""
    return [
        module
        for name, module in unet.named_modules()
        if type(module).__name__ == "BasicTransformerBlock" and layers in name
    ]


def weakened(unet: Any, arguments: dict[str, Any], layers: str) -> dict[str, np.ndarray]:
    """The U-Net's output, weakened in each way."""
    found = {}
    blocks = matching(unet, layers)
    usual = [block.attn1.processor for block in blocks]
    for block in blocks:  # with batch 1 the processor's chunks are the sample, perturbed
        block.attn1.processor = PAGIdentitySelfAttnProcessor2_0()
    twice = {
        key: torch.cat([value] * 2) if torch.is_tensor(value) and value.ndim else value
        for key, value in arguments.items()
        if key != "added_cond_kwargs"
    }
    if "added_cond_kwargs" in arguments:
        twice["added_cond_kwargs"] = {
            key: torch.cat([value] * 2) for key, value in arguments["added_cond_kwargs"].items()
        }
    found["pag"] = nhwc(unet(**twice).sample[1:])
    for block, processor in zip(blocks, usual, strict=True):
        block.attn1.processor = processor
    for label, sigma, threshold in (("seg-1.5", 1.5, 0.0), ("seg-inf", 1e6, 1e9)):
        # In diffusers the two branches are exchanged: above the threshold it blurs, below it takes
        # the mean. The thresholds here ask for the one that the paper means.
        kernel = int(np.ceil(6 * 1.5)) + 1 - int(np.ceil(6 * 1.5)) % 2
        hooks = [
            block.attn1.to_q.register_forward_hook(
                lambda _, __, q, s=sigma, t=threshold, k=kernel: _gaussian_blur_2d(q, k, s, t)
            )
            for block in blocks
        ]
        found[label] = nhwc(unet(**arguments).sample)
        for hook in hooks:
            hook.remove()
    hooks = [
        block.register_forward_hook(lambda _, args, kwargs, out: args[0], with_kwargs=True)
        for block in blocks
    ]
    found["slg"] = nhwc(unet(**arguments).sample)
    for hook in hooks:
        hook.remove()
    return found


def circular(network: Any, axes: str) -> None:
    """Let every convolution of a network pad with the opposite edge."""
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d) and any(module.padding):
            pad = module.padding[0]

            def forward(x: Any, weight: Any, bias: Any, m: Any = module, p: int = pad) -> Any:
                mode = torch.nn.functional.pad
                x = mode(x, (p, p, 0, 0), mode="circular" if "x" in axes else "constant")
                x = mode(x, (0, 0, p, p), mode="circular" if "y" in axes else "constant")
                return torch.nn.functional.conv2d(x, weight, bias, m.stride)

            module._conv_forward = forward


def main() -> None:
    found: dict[str, np.ndarray] = {}
    for name in MODELS:
        unet = UNet2DConditionModel.from_pretrained(HERE / name / "checkpoint", subfolder="unet")
        arguments = tensors(name, unet.config)
        found[f"{name} plain"] = nhwc(unet(**arguments).sample)
        for layers in LAYERS[name]:
            for way, output in weakened(unet, arguments, layers).items():
                found[f"{name} {layers} {way}"] = output
        unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
        found[f"{name} freeu"] = nhwc(unet(**arguments).sample)
        unet.disable_freeu()
        for axes in ("x", "y", "xy"):
            network = UNet2DConditionModel.from_pretrained(
                HERE / name / "checkpoint", subfolder="unet"
            )
            circular(network, axes)
            found[f"{name} {axes}"] = nhwc(network(**arguments).sample)
            vae = AutoencoderKL.from_pretrained(HERE / name / "checkpoint", subfolder="vae")
            circular(vae, axes)
            z = torch.from_numpy(inputs(name, unet.config)["latents"].transpose(0, 3, 1, 2).copy())
            found[f"{name} vae {axes}"] = nhwc(vae.decode(z).sample)
    for case, options in {
        "apg": {"adaptive_projected_guidance_rescale": 3.0, "eta": 0.0},
        "apg eta": {"adaptive_projected_guidance_rescale": 0.0, "eta": 0.7},
        "apg momentum": {
            "adaptive_projected_guidance_momentum": -0.5,
            "adaptive_projected_guidance_rescale": 15.0,
            "eta": 0.0,
            "guidance_rescale": 0.6,
        },
    }.items():
        guider = AdaptiveProjectedGuidance(guidance_scale=6.0, **options)
        momentum = options.get("adaptive_projected_guidance_momentum")
        if momentum is not None:
            from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer

            guider.momentum_buffer = MomentumBuffer(momentum)
        outputs = []
        for uncond, cond in predictions():
            pair = [torch.from_numpy(one.transpose(0, 3, 1, 2).copy()) for one in (cond, uncond)]
            outputs.append(nhwc(guider.forward(*pair).pred))
        found[case] = np.array(outputs)
    zero = ClassifierFreeZeroStarGuidance(guidance_scale=6.0, zero_init_steps=1)
    outputs = []
    for step, (uncond, cond) in enumerate(predictions()):
        zero._step = step
        pair = [torch.from_numpy(one.transpose(0, 3, 1, 2).copy()) for one in (cond, uncond)]
        outputs.append(nhwc(zero.forward(*pair).pred))
    found["cfg-zero"] = np.array(outputs)
    np.savez_compressed(HERE / "guiders.npz", **found)
    print(len(found), (HERE / "guiders.npz").stat().st_size)


if __name__ == "__main__":
    with torch.no_grad():
        main()
