"""LoRA files for the tiny models of tests/golden, written in the spellings of the field's tools.

The tensors come from a seed, so the files need not be kept. Names are put together here from the
models' parameter names, without any of our code for LoRA names; that these are the tools' own is
shown by diffusers, which reads them (tests/golden/make_lora_goldens.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from golden_data import checkpoint
from safetensors.numpy import save_file

from mlxdiff.convert import open_source
from mlxdiff.networks.params import expected_parameters

Tensors = dict[str, np.ndarray]
ATTENTION = r".+attn[12]\.to_(?:q|k|v|out\.0)|.+self_attn\.\w+_proj"
EVERYTHING = r".+"


def modules(model: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """component -> module -> shape of its weight in PyTorch's layout, (out, in[, kH, kW])."""
    source = open_source(checkpoint(model))
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for component in source.components:
        if component not in ("unet", "text_encoder", "text_encoder_2"):
            continue
        found[component] = {}
        for name, shape in expected_parameters(source.config(component)).items():
            if len(shape) in (2, 4) and "embedding.weight" not in name:
                shape = (shape[0], shape[3], *shape[1:3]) if len(shape) == 4 else shape
                found[component][name.removesuffix(".weight")] = shape
    return found


def low_rank(shape: tuple[int, ...], rank: int, random: np.random.Generator) -> Tensors:
    """down (r, in[, kH, kW]) and up (out, r[, 1, 1]); their product is about 0.3 of a usual
    weight's size."""
    size = int(np.prod(shape[1:]))
    down = random.standard_normal((rank, *shape[1:]), np.float32)
    up = random.standard_normal((shape[0], rank, *(1,) * (len(shape) - 2)), np.float32)
    return {"down": down, "up": up * np.float32(0.3 / np.sqrt(rank * size))}


# -------------------------------------------------------------------------------------- spellings

# component, module -> module as the file spells it
Speller = Callable[[str, str], str]


def peft(component: str, module: str) -> str:
    return f"{component}.{module}"


def kohya(component: str, module: str) -> str:
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[component]
    return prefix + module.replace(".", "_")


def kohya_xl(component: str, module: str) -> str:
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    return prefix[component] + module.replace(".", "_")


def kohya_sgm(component: str, module: str) -> str:
    """kohya's names for SDXL: the U-Net as in Stability's code, three levels of two layers."""
    if component != "unet":
        return kohya_xl(component, module)
    inner = (
        (r"\.conv1$", ".in_layers.2"),
        (r"\.conv2$", ".out_layers.3"),
        (r"\.time_emb_proj$", ".emb_layers.1"),
        (r"\.conv_shortcut$", ".skip_connection"),
    )
    whole = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    if module in whole:
        return "lora_unet_" + whole[module].replace(".", "_")
    part = re.fullmatch(r"(down|up|mid)_blocks?\.(.+)", module)
    assert part is not None, module
    side, rest = part.groups()
    if side == "mid":
        kind, number, rest = rest.split(".", 2)
        place = {"resnets": 2 * int(number), "attentions": 1}[kind]
        name = f"middle_block.{place}.{rest}"
    else:
        block, kind, number, rest = rest.split(".", 3)
        level, layer = int(block), int(number)
        if kind == "downsamplers":
            name = f"input_blocks.{3 * level + 3}.0.op"
        elif kind == "upsamplers":
            name = f"output_blocks.{3 * level + 2}.2.conv"
        else:
            at = 3 * level + layer + (1 if side == "down" else 0)
            half = "input" if side == "down" else "output"
            name = f"{half}_blocks.{at}.{'resnets attentions'.split().index(kind)}.{rest}"
    for pattern, replacement in inner:
        name = re.sub(pattern, replacement, name)
    return "lora_unet_" + name.replace(".", "_")


def processor(component: str, module: str) -> str:
    """diffusers' first form: the U-Net's attention processors, and to_q for CLIP's q_proj."""
    if component == "unet":
        place, projection = re.fullmatch(r"(.+)\.(to_[qkv]|to_out)(?:\.0)?", module).groups()
        return f"unet.{place}.processor.{projection}_lora"
    place, projection = re.fullmatch(r"(.+)\.(\w+)_proj", module).groups()
    return f"{component}.{place}.to_{projection}_lora"


PEFT_PARTS = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
KOHYA_PARTS = {"down": ".lora_down.weight", "up": ".lora_up.weight", "mid": ".lora_mid.weight"}
OLD_PARTS = {"down": ".down.weight", "up": ".up.weight"}


def lora(
    model: str,
    spell: Speller,
    parts: dict[str, str],
    seed: int,
    *,
    only: str = EVERYTHING,
    ranks: Iterable[int] = (4,),
    alpha: float | None = None,
    components: Iterable[str] | None = None,
    dora: bool = False,
) -> Tensors:
    """A LoRA of all modules whose name matches ``only``; the ranks are given out in turn."""
    random, tensors, ranks = np.random.default_rng(seed), {}, tuple(ranks)
    shapes = modules(model)
    for component in components or shapes:
        weights = read_weights(model, component) if dora else {}
        for i, (module, shape) in enumerate(shapes[component].items()):
            pair = low_rank(shape, ranks[i % len(ranks)], random)
            if not re.fullmatch(only, module):
                continue
            name = spell(component, module)
            tensors |= {name + parts[part]: values for part, values in pair.items()}
            if alpha is not None:
                # kernels have one of their own; diffusers mixes up attention's where they differ
                tensors[f"{name}.alpha"] = np.array(
                    alpha * (2 if shape[2:] == (3, 3) else 1), np.float32
                )
            if dora:
                norms = np.linalg.norm(weights[module].reshape(shape[0], -1), axis=1)
                norms *= random.uniform(0.8, 1.3, len(norms)).astype(np.float32)
                if len(shape) == 4:  # PEFT's shape for a convolution
                    norms = norms[None, :, None, None]
                tensors[f"{name}.lora_magnitude_vector"] = norms
    return tensors


def read_weights(model: str, component: str) -> Tensors:
    """module -> weight in PyTorch's layout, float32."""
    tensors = open_source(checkpoint(model)).tensors(component)
    result = {}
    for name, tensor in tensors.items():
        values = tensor.read().astype(np.float32)
        if values.ndim == 4:
            values = values.transpose(0, 3, 1, 2)
        result[name.removesuffix(".weight")] = values
    return result


def rank_stabilised(model: str, alpha: float, r: int) -> dict[str, str]:
    """The header that diffusers writes beside a rank-stabilised LoRA."""
    config: dict[str, Any] = {}
    for component in modules(model):
        config |= {
            f"{component}.{key}": value
            for key, value in {
                "r": r,
                "lora_alpha": alpha,
                "use_rslora": True,
                "use_dora": False,
                "alpha_pattern": {},
                "rank_pattern": {},
                "lora_bias": False,
                "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "q_proj", "v_proj"],
            }.items()
        }
    return {"format": "pt", "lora_adapter_metadata": json.dumps(config)}


# ------------------------------------------------------------------ the files of golden pictures

_MAKERS: dict[str, Callable[[], tuple[Tensors, dict[str, str] | None]]] = {
    "sd15-peft": lambda: (lora("sd15", peft, PEFT_PARTS, 1, ranks=(4, 2)), None),
    "sd15-rslora": lambda: (
        lora("sd15", peft, PEFT_PARTS, 2, only=r".+(?:to_[qkv]|to_out\.0|[qv]_proj)"),
        rank_stabilised("sd15", 3.0, 4),
    ),
    "sd15-kohya": lambda: (lora("sd15", kohya, KOHYA_PARTS, 3, ranks=(4, 2), alpha=1.5), None),
    "sd15-processor": lambda: (lora("sd15", processor, OLD_PARTS, 4, only=ATTENTION), None),
    # diffusers does not get DoRA's norms into a text encoder of this transformers.
    "sd15-dora": lambda: (
        lora("sd15", peft, PEFT_PARTS, 5, dora=True, components=["unet"]),
        None,
    ),
    "sd21v-kohya": lambda: (lora("sd21v", kohya, KOHYA_PARTS, 6, alpha=2.0), None),
    "x4-upscaler-peft": lambda: (lora("x4-upscaler", peft, PEFT_PARTS, 10), None),
    "unclip-peft": lambda: (lora("unclip", peft, PEFT_PARTS, 11), None),
    "sdxl-peft": lambda: (lora("sdxl", peft, PEFT_PARTS, 7), None),
    # diffusers misreads kohya's names for add_embedding, but not Stability's (label_emb), and gives
    # text_projection the rank and alpha of the rest.
    "sdxl-kohya": lambda: (
        lora(
            "sdxl",
            kohya_xl,
            KOHYA_PARTS,
            8,
            only=r"(?!add_|text_projection).+",
            ranks=(4, 2),
            alpha=1.5,
        ),
        None,
    ),
    "sdxl-sgm": lambda: (
        lora("sdxl", kohya_sgm, KOHYA_PARTS, 9, only=r"(?!text_projection).+", alpha=1.5),
        None,
    ),
}
FILES = tuple(_MAKERS)


def write(name: str, folder: Path) -> Path:
    """Write one of FILES, if it is not there yet; returns its path."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        tensors, metadata = _MAKERS[name]()
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: np.array(v, order="C") for k, v in tensors.items()}, path, metadata)
    return path
