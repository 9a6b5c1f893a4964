"""Pictures as other programs write them, made after their sources, and what they say."""

from __future__ import annotations

import gzip
import html
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

PIXELS = np.zeros((64, 64, 3), np.uint8)


def png(path: Path, texts: dict[str, str], image: Image.Image | None = None) -> Path:
    """Write a PNG with text chunks."""
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    (Image.fromarray(PIXELS) if image is None else image).save(path, pnginfo=info)
    return path


def with_exif(path: Path, tags: dict[int, str | bytes]) -> Path:
    """Write a picture with EXIF tags; 0x9286 (UserComment) belongs to the inner part."""
    exif = Image.Exif()
    for tag, value in tags.items():
        if tag == 0x9286:
            exif.get_ifd(0x8769)[tag] = value
        else:
            exif[tag] = value
    Image.fromarray(PIXELS).save(path, exif=exif)
    return path


def comment(text: str, encoding: str = "utf-16-be") -> bytes:
    """Return an EXIF UserComment."""
    code = b"ASCII\0\0\0" if encoding == "ascii" else b"UNICODE\0"
    return code + text.encode(encoding)


def stealth(text: str, kind: str = "stealth_pngcomp") -> Image.Image:
    """Return a picture with a text in its lowest bits, down the columns."""
    data = gzip.compress(text.encode()) if kind.endswith("comp") else text.encode()
    data = kind.encode() + (8 * len(data)).to_bytes(4, "big") + data
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    bands = [3] if kind.startswith("stealth_png") else [0, 1, 2]
    side = int(np.ceil(np.sqrt(len(bits) / len(bands)))) + 1
    pixels = np.full((side, side, 4), 254, np.uint8)
    columns = pixels.transpose(1, 0, 2)[:, :, bands].reshape(-1)
    columns[: len(bits)] |= bits
    pixels[:, :, bands] = columns.reshape(side, side, len(bands)).transpose(1, 0, 2)
    return Image.fromarray(pixels if len(bands) == 1 else pixels[:, :, :3])


@dataclass
class Sample:
    """A picture of another program.

    Attributes:
        texts: its chunks; or
        exif: its EXIF tags; or
        hidden: the text in its alpha.
        says: what `Metadata.to_dict` must hold.
        named: what must be named, as it is not honoured.
    """

    says: dict[str, Any]
    named: set[str] = field(default_factory=set)
    texts: dict[str, str] = field(default_factory=dict)
    exif: dict[int, str | bytes] = field(default_factory=dict)
    hidden: str | None = None

    def write(self, folder: Path) -> Path:
        """Write the picture."""
        if self.hidden is not None:
            return png(folder / "p.png", self.texts, stealth(self.hidden))
        if self.exif:
            return with_exif(folder / "p.jpg", self.exif)
        return png(folder / "p.png", self.texts)


def a1111(line: str, prompt: str = "a red circle\nNegative prompt: blurry") -> dict[str, str]:
    """Return the chunk of A1111 and its kin."""
    return {"parameters": f"{prompt}\n{line}"}


BASIC = {
    "prompt": "a red circle",
    "negative_prompt": "blurry",
    "seed": 42,
    "steps": 20,
    "guidance": 7.0,
    "width": 512,
    "height": 768,
}
_START = "Steps: 20, Sampler: {}, CFG scale: 7, Seed: 42, Size: 512x768"


def _line(sampler: str, more: str = "") -> str:
    return _START.format(sampler) + (f", {more}" if more else "")


def api_graph(**ksampler: Any) -> dict[str, Any]:
    """Return ComfyUI's usual graph of text to image, as API JSON."""
    return {
        "3": {
            "class_type": "KSampler",
            "inputs": {
                "seed": 42, "steps": 20, "cfg": 7.0, "sampler_name": "euler_ancestral",
                "scheduler": "normal", "denoise": 1.0, "model": ["10", 0], "positive": ["6", 0],
                "negative": ["7", 0], "latent_image": ["5", 0], **ksampler,
            },
        },
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15.safetensors"}},
        "5": {
            "class_type": "EmptyLatentImage",
            "inputs": {"width": 512, "height": 768, "batch_size": 1},
        },
        "6": {
            "class_type": "CLIPTextEncode",
            "inputs": {"text": "a red circle", "clip": ["10", 1]},
        },
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": ["12", 0], "clip": ["10", 1]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["11", 0]}},
        "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x", "images": ["8", 0]}},
        "10": {
            "class_type": "LoraLoader",
            "inputs": {
                "lora_name": "style\\pastel.safetensors", "strength_model": 0.8,
                "strength_clip": 0.5, "model": ["4", 0], "clip": ["4", 1],
            },
        },
        "11": {"class_type": "VAELoader", "inputs": {"vae_name": "mse.safetensors"}},
        "12": {"class_type": "PrimitiveString", "inputs": {"value": "blurry"}},
    }  # fmt: skip


def workflow() -> dict[str, Any]:
    """Return a workflow of image to image, as the page saves it."""

    def node(number: int, kind: str, values: list[Any], **links: int) -> dict[str, Any]:
        inputs = [{"name": name, "type": "X", "link": link} for name, link in links.items()]
        return {"id": number, "type": kind, "widgets_values": values, "inputs": inputs, "mode": 0}

    return {
        "last_node_id": 9,
        "version": 0.4,
        "nodes": [
            node(1, "CheckpointLoaderSimple", ["sd15.safetensors"]),
            node(2, "CLIPTextEncode", ["a red circle"], clip=1),
            node(3, "CLIPTextEncode", ["blurry"], clip=2),
            node(4, "LoadImage", ["photo.png", "image"]),
            node(5, "VAEEncode", [], pixels=3, vae=4),
            node(
                6,
                "KSampler",
                [42, "randomize", 20, 7, "dpmpp_2m", "karras", 0.6],
                model=5,
                positive=6,
                negative=7,
                latent_image=8,
            ),
            node(7, "VAEDecode", [], samples=9, vae=10),
            node(8, "SaveImage", ["x"], images=11),
            node(9, "Note", ["nothing"]),
        ],
        "links": [
            [1, 1, 1, 2, 0, "CLIP"], [2, 1, 1, 3, 0, "CLIP"], [3, 4, 0, 5, 0, "IMAGE"],
            [4, 1, 2, 5, 1, "VAE"], [5, 1, 0, 6, 0, "MODEL"], [6, 2, 0, 6, 1, "C"],
            [7, 3, 0, 6, 2, "C"], [8, 5, 0, 6, 3, "LATENT"], [9, 6, 0, 7, 0, "LATENT"],
            [10, 1, 2, 7, 1, "VAE"], [11, 7, 0, 8, 0, "IMAGE"],
        ],
    }  # fmt: skip


def custom_graph() -> dict[str, Any]:
    """Return a graph of custom sampling: noise, guider, sampler and sigmas are nodes."""
    graph = api_graph()
    graph["3"] = {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {
            "noise": ["20", 0], "guider": ["21", 0], "sampler": ["22", 0], "sigmas": ["23", 0],
            "latent_image": ["5", 0],
        },
    }  # fmt: skip
    graph["20"] = {"class_type": "RandomNoise", "inputs": {"noise_seed": 42}}
    graph["21"] = {
        "class_type": "CFGGuider",
        "inputs": {"cfg": 7.0, "model": ["10", 0], "positive": ["6", 0], "negative": ["7", 0]},
    }
    graph["22"] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "dpmpp_2m"}}
    graph["23"] = {
        "class_type": "BasicScheduler",
        "inputs": {"scheduler": "karras", "steps": 20, "denoise": 1.0, "model": ["10", 0]},
    }
    return graph


def _invokeai(**more: Any) -> dict[str, Any]:
    return {
        "app_version": "4.2.0", "generation_mode": "txt2img", "positive_prompt": "a red circle",
        "negative_prompt": "blurry", "width": 512, "height": 768, "seed": 42, "rand_device": "cpu",
        "cfg_scale": 7.0, "cfg_rescale_multiplier": 0.0, "steps": 20, "scheduler": "dpmpp_2m_k",
        "clip_skip": 0, "model": {"key": "x", "hash": "blake3:0", "name": "sd15", "base": "sd-1"},
        "controlnets": [], "loras": [{"model": {"name": "pastel"}, "weight": 0.8}], **more,
    }  # fmt: skip


NOVELAI = {
    "prompt": "a red circle", "uc": "blurry", "steps": 20, "scale": 7.0, "seed": 42, "width": 512,
    "height": 768, "sampler": "k_euler_ancestral", "noise_schedule": "karras", "n_samples": 1,
    "sm": True, "cfg_rescale": 0.0, "request_type": "PromptGenerateRequest",
}  # fmt: skip
_DRAW_THINGS = {
    "c": "a red circle", "uc": "blurry", "seed": 42, "steps": 20, "scale": 7.0, "size": "512x768",
    "sampler": "DPM++ 2M Karras", "model": "sd_v1.5_f16.ckpt", "strength": 1.0,
    "seed_mode": "Torch CPU Compatible", "mask_blur": 1.5,
    "lora": [{"model": "pastel_lora_f16.ckpt", "weight": 0.8}], "v2": {"clipSkip": 2},
}  # fmt: skip
_XMP = (
    '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    'xmlns:exif="http://ns.adobe.com/exif/1.0/"><exif:UserComment><rdf:Alt><rdf:li '
    'xml:lang="x-default">{}</rdf:li></rdf:Alt></exif:UserComment></rdf:Description></rdf:RDF>'
    "</x:xmpmeta>"
)
MFLUX = {
    "mflux_version": "0.10.0", "model": "org/FLUX.1-dev", "base_model": "dev", "seed": 42,
    "steps": 20, "guidance": 7.0, "height": 768, "width": 512, "precision": "mlx.core.bfloat16",
    "quantize": 8, "generation_time_seconds": 10.2, "created_at": "2025-09-17T19:44:52",
    "lora_paths": ["/home/x/pastel.safetensors"], "lora_scales": [0.8], "image_path": None,
    "image_strength": None, "controlnet_image_path": None, "prompt": "a red circle",
    "negative_prompt": "blurry",
}  # fmt: skip
EASY = {
    "prompt": "a red circle", "negative_prompt": "blurry", "seed": 42, "num_inference_steps": 20,
    "guidance_scale": 7.0, "width": 512, "height": 768, "use_stable_diffusion_model": "sd-v1-4",
    "sampler_name": "euler_a", "clip_skip": True, "use_lora_model": ["pastel"],
    "lora_alpha": [0.8], "use_face_correction": "GFPGANv1.4",
}  # fmt: skip
SWARM = {
    "prompt": "a red circle", "negativeprompt": "blurry", "model": "Official/sd_xl_base_1.0",
    "seed": 42, "steps": 20, "cfgscale": 7.0, "width": 512, "height": 768, "aspectratio": "Custom",
    "sampler": "dpmpp_2m", "scheduler": "karras", "variationseed": 11,
    "variationseedstrength": 0.3, "loras": ["pastel"], "loraweights": ["0.8"],
    "refinermethod": "PostApply", "swarm_version": "0.9.5.0",
}  # fmt: skip
_LORA = [{"name": "pastel", "scale": 0.8}]
_LORA_FILE = [{"name": "pastel.safetensors", "scale": 0.8}]
_COMFY = {"rng": "cpu", "sampler_rng": "gpu", "seed_order": "a1111", "prompt_syntax": "a1111"}
_A1111 = {"rng": "gpu", "seed_order": "a1111", "prompt_syntax": "a1111"}

SAMPLES: dict[str, Sample] = {
    "a1111 1.10, Automatic": Sample(
        BASIC | _A1111 | {"sampler": "dpmpp-2m", "schedule": "karras", "model": "v1-5"},
        {"Model hash"},
        a1111(_line("DPM++ 2M", "Schedule type: Automatic, Model hash: 6ce0161689, Model: v1-5, "
                                "Version: v1.10.1")),
    ),
    "a1111 1.9, Automatic, SDE": Sample(
        BASIC | {"sampler": "dpmpp-2m-sde", "schedule": "exponential"},
        set(),
        a1111(_line("DPM++ 2M SDE", "Schedule type: Automatic, Version: 1.9.0")),
    ),
    "a1111 1.6, no type": Sample(
        BASIC | {"sampler": "dpmpp-2m", "schedule": "linspace"},
        set(),
        a1111(_line("DPM++ 2M", "Version: v1.6.0-2-g4afaaf8a")),
    ),
    "a1111 1.6, in the name": Sample(
        BASIC | {"sampler": "dpmpp-2m", "schedule": "karras"},
        set(),
        a1111(_line("DPM++ 2M Karras", "Version: v1.6.0")),
    ),
    "a1111, everything": Sample(
        BASIC
        | {
            "sampler": "euler-a", "schedule": "linspace", "clip_skip": 1, "hires": 2.0,
            "hires_strength": 0.6, "hires_steps": 10, "hires_upscaler": "latent-bilinear",
            "vary": [11, 0.5], "noise_size": [512, 384], "noise_seed_delta": 31337, "rng": "cpu",
            "vae": "vae-ft-mse.safetensors",
        },
        {"VAE hash", "Hires CFG Scale", "Lora hashes", "Model hash", "Emphasis"},
        a1111(
            _line("Euler a", "Schedule type: Automatic, Model hash: abcdef, VAE hash: 735e4c, VAE: "
            "vae-ft-mse.safetensors, Denoising strength: 0.6, Clip skip: 2, ENSD: 31337, RNG: CPU, "
            "Variation seed: 11, Variation seed strength: 0.5, Seed resize from: 384x512, Hires "
            'upscale: 2, Hires steps: 10, Hires upscaler: Latent, Hires CFG Scale: 5, Lora hashes: '
            '"pastel: 0123456789ab", Emphasis: No norm, Version: v1.9.4')
        ),
    ),
    "a1111, image to image": Sample(
        BASIC | {"strength": 0.4, "image": "(not named)", "sampler": "euler"},
        set(),
        a1111(_line("Euler", "Denoising strength: 0.4, Version: v1.10.1")),
    ),
    "a1111, inpainting": Sample(
        BASIC | {"strength": 0.75, "image": "(not named)", "mask": "(not named)"},
        {"Mask blur", "Inpaint area"},
        a1111(_line("Euler", "Denoising strength: 0.75, Mask blur: 4, Inpaint area: Only masked, "
                             "Version: v1.10.1")),
    ),
    "a1111, hires by size": Sample(
        BASIC | {"hires": 1.5, "hires_strength": 0.3, "hires_steps": 20},
        {"Hires upscaler"},
        a1111(_line("Euler", "Denoising strength: 0.3, Hires resize: 768x1152, Hires upscaler: "
                             "4x-UltraSharp, Version: v1.10.1")),
    ),
    "a1111, lines after": Sample(
        BASIC | {"sampler": "euler"},
        {"text after the settings"},
        a1111(_line("Euler", "Version: v1.6.0") + "\nTemplate: a {red|blue} circle"),
    ),
    "a1111, called loras": Sample(
        BASIC | {"prompt": "a red circle <lora:pastel:0.8>"},
        set(),
        a1111(_line("Euler", 'Lora hashes: "pastel: 0123456789ab", Version: v1.6.0'),
              "a red circle <lora:pastel:0.8>\nNegative prompt: blurry"),
    ),
    "forge": Sample(
        BASIC | _A1111 | {"sampler": "dpmpp-2m", "schedule": "karras"},
        {"Distilled CFG Scale", "Module 1"},
        a1111(_line("DPM++ 2M", "Schedule type: Automatic, Distilled CFG Scale: 3.5, Module 1: ae, "
                                "Version: f2.0.1v1.10.1-previous-659-gc055f2d4")),
    ),
    "sd.next": Sample(
        BASIC | {"sampler": "unipc", "rng": "gpu", "seed_order": "diffusers"},
        {"Pipeline"},
        a1111(_line("UniPC", "App: SD.Next, Version: 0f6b4b4, Operations: txt2img, Pipeline: "
                             "StableDiffusionPipeline")),
    ),
    "sd.cpp": Sample(
        BASIC | {"sampler": "euler-a", "schedule": "linspace", "rng": "gpu"},
        {"Guidance"},
        a1111("Steps: 20, CFG scale: 7.000000, Guidance: 3.5, Seed: 42, Size: 512x768, Model: "
              "sd15.safetensors, RNG: cuda, Sampler: euler_a, Version: stable-diffusion.cpp"),
    ),
    "civitai": Sample(
        BASIC | {"sampler": "dpmpp-2m", "schedule": "karras", "rng": "cpu", "sampler_rng": "gpu"},
        {"Civitai resources"},
        exif={0x9286: comment(
            a1111(_line("DPM++ 2M Karras", "Created Date: 2024-01-01T10:00:00Z, Civitai resources: "
                  '[{"type":"checkpoint","modelVersionId":128713}], Civitai metadata: {}'))
            ["parameters"]
        )},
    ),
    "fooocus": Sample(
        BASIC | _COMFY | {"sampler": "dpmpp-2m-sde", "schedule": "karras", "loras": _LORA_FILE},
        {"sharpness", "styles", "base_model_hash"},
        {
            "parameters": json.dumps({
                "base_model": "someXL", "base_model_hash": "0123", "prompt": "a red circle",
                "negative_prompt": "blurry", "full_prompt": ["a red circle"], "seed": "42",
                "full_negative_prompt": ["blurry"], "steps": 20, "guidance_scale": 7.0,
                "resolution": "(512, 768)", "sampler": "dpmpp_2m_sde_gpu", "scheduler": "karras",
                "sharpness": 2.0, "styles": "['Fooocus V2']", "refiner_model": "None",
                "loras": [["pastel.safetensors", 0.8, "fedc"]], "version": "Fooocus v2.5.0",
            }),
            "fooocus_scheme": "fooocus",
        },
    ),
    "fooocus, old names": Sample(
        BASIC | {"sampler": "dpmpp-2m-sde", "loras": _LORA_FILE},
        {"Sharpness"},
        exif={0x9286: comment(json.dumps({
            "Prompt": "a red circle", "Negative Prompt": "blurry", "Resolution": "(512, 768)",
            "Seed": 42, "Steps": 20, "Guidance Scale": 7.0, "Sharpness": 2.0, "Base Model": "x",
            "Sampler": "dpmpp_2m_sde_gpu", "Scheduler": "karras", "Version": "v2.1.852",
            "LoRA 1": "pastel.safetensors : 0.8",
        }))},
    ),
    "swarmui": Sample(
        BASIC | _COMFY | {"sampler": "dpmpp-2m", "schedule": "karras", "vary": [11, 0.3],
                          "model": "sd_xl_base_1.0", "loras": _LORA},
        {"refinermethod"},
        {"parameters": json.dumps({"sui_image_params": SWARM, "sui_extra_data": {"date": "x"}})},
    ),
    "swarmui, jpeg": Sample(
        BASIC | {"sampler": "dpmpp-2m"},
        {"refinermethod"},
        exif={0x9286: comment(json.dumps({"sui_image_params": SWARM}), "utf-16-le")},
    ),
    "swarmui, legacy": Sample(
        BASIC | {"sampler": "dpmpp-2m"},
        {"refinermethod"},
        exif={0x0110: json.dumps({"sui_image_params": SWARM})},
    ),
    "invokeai 4": Sample(
        BASIC | {"sampler": "dpmpp-2m", "schedule": "karras", "model": "sd15", "loras": _LORA,
                 "rng": "cpu", "sampler_rng": "gpu", "prompt_syntax": "plain",
                 "noise_seed_delta": (42 ^ 0xFFFFFFFF) - 42, "seamless": "x"},
        set(),
        {"invokeai_metadata": json.dumps(_invokeai(seamless_x=True))},
    ),
    "invokeai 4, image to image": Sample(
        BASIC | {"strength": 0.7, "image": "photo.png"},
        {"controlnets"},
        {"invokeai_metadata": json.dumps(_invokeai(
            generation_mode="img2img", strength=0.7, init_image="photo.png",
            controlnets=[{"control_model": {"name": "canny"}}],
        ))},
    ),
    "invokeai 2": Sample(
        BASIC | {"sampler": "lms", "model": "stable-diffusion-1.5", "rng": "gpu"},
        {"perlin"},
        {"sd-metadata": json.dumps({
            "model": "stable diffusion", "model_weights": "stable-diffusion-1.5",
            "model_hash": "ce", "app_id": "invoke-ai/InvokeAI", "app_version": "2.3.5",
            "image": {"prompt": [{"prompt": "a red circle [blurry]", "weight": 1.0}],
                      "steps": 20, "cfg_scale": 7.0, "threshold": 0, "perlin": 0.1, "height": 768,
                      "width": 512, "seed": 42, "seamless": False, "variations": [],
                      "type": "txt2img", "sampler": "k_lms"},
        })},
    ),
    "invokeai, dream": Sample(
        BASIC | {"sampler": "lms"},
        {"-G"},
        {"Dream": '"a red circle [blurry]" -s 20 -S 42 -W 512 -H 768 -C 7.0 -A k_lms -G 0.8'},
    ),
    "comfyui, API": Sample(
        BASIC | _COMFY | {
            "sampler": "euler-a", "schedule": "linspace", "model": "sd15.safetensors",
            "vae": "mse.safetensors", "loras": [
                {"name": "pastel.safetensors", "scale": 0.8, "text_scale": 0.5}],
        },
        set(),
        {"prompt": json.dumps(api_graph()), "workflow": json.dumps({"nodes": [], "links": []})},
    ),
    "comfyui, workflow": Sample(
        {k: v for k, v in BASIC.items() if k not in ("width", "height")} | {
            "sampler": "dpmpp-2m", "schedule": "karras", "image": "photo.png", "strength": 0.6},
        set(),
        {"workflow": json.dumps(workflow())},
    ),
    "comfyui, custom sampling": Sample(
        BASIC | {"sampler": "dpmpp-2m", "schedule": "karras"},
        set(),
        {"prompt": json.dumps(custom_graph())},
    ),
    "comfyui, other nodes": Sample(
        BASIC,
        {"nodes"},
        {"prompt": json.dumps(api_graph(model=["30", 0]) | {
            "30": {"class_type": "FreeU_V2", "inputs": {"b1": 1.3, "model": ["10", 0]}}})},
    ),
    "comfyui, two passes": Sample(
        BASIC,
        {"passes after the first", "nodes"},
        {"prompt": json.dumps(api_graph() | {
            "8": {"class_type": "VAEDecode", "inputs": {"samples": ["40", 0], "vae": ["11", 0]}},
            "40": api_graph(seed=7, denoise=0.5, latent_image=["41", 0])["3"],
            "41": {"class_type": "LatentUpscale", "inputs": {"width": 1024, "samples": ["3", 0]}},
        })},
    ),
    "comfyui, webp": Sample(
        BASIC,
        set(),
        exif={0x0110: "prompt:" + json.dumps(api_graph())},
    ),
    "novelai": Sample(
        BASIC | {"sampler": "euler-a", "schedule": "karras"},
        {"sm"},
        {"Software": "NovelAI", "Source": "NovelAI Diffusion V3 1234", "Title": "AI generated",
         "Description": "a red circle", "Comment": json.dumps(NOVELAI)},
    ),
    "novelai, in alpha": Sample(
        BASIC | {"sampler": "euler-a"},
        {"sm"},
        hidden=json.dumps({"Software": "NovelAI", "Source": "NovelAI Diffusion V3 1234",
                           "Description": "a red circle", "Comment": json.dumps(NOVELAI)}),
    ),
    "a1111, in alpha": Sample(
        BASIC,
        set(),
        hidden=a1111(_line("Euler", "Version: v1.6.0"))["parameters"],
    ),
    "easy diffusion, jpeg": Sample(
        BASIC | {"sampler": "euler-a", "clip_skip": 1, "loras": _LORA, "model": "sd-v1-4"},
        {"use_face_correction"},
        exif={0x9286: comment(json.dumps(EASY))},
    ),
    "easy diffusion, png": Sample(
        BASIC | {"sampler": "euler-a", "model": "sd-v1-4"},
        {"use_face_correction"},
        {k: str(v) for k, v in EASY.items() if k not in ("use_lora_model", "lora_alpha")},
    ),
    "mflux": Sample(
        BASIC | {"model": "org/FLUX.1-dev", "loras": _LORA_FILE},
        {"quantize", "seed"},
        exif={0x9286: comment(json.dumps(MFLUX))},
    ),
    "mflux, ascii": Sample(
        BASIC, {"quantize"}, exif={0x9286: comment(json.dumps(MFLUX), "ascii")}
    ),
    "draw things": Sample(
        BASIC | {"sampler": "dpmpp-2m", "schedule": "karras", "rng": "cpu", "clip_skip": 1,
                 "loras": [{"name": "pastel_lora_f16.ckpt", "scale": 0.8}]},
        {"mask_blur"},
        {"XML:com.adobe.xmp": _XMP.format(html.escape(json.dumps(_DRAW_THINGS)))},
    ),
    "diffusers": Sample(
        BASIC | {"sampler": "euler", "prompt_syntax": "plain"},
        {"aux"},
        {"parameters": json.dumps({
            "prompt": "a red circle", "negative_prompt": "blurry", "seed": 42, "aux": 3,
            "num_inference_steps": 20, "guidance_scale": 7.0, "width": 512, "height": 768,
            "scheduler": "EulerDiscreteScheduler"})},
    ),
    "a1111, tiling": Sample(
        BASIC | {"seamless": "xy", "sampler": "euler"},
        set(),
        a1111(_line("Euler", "Tiling: True, Version: v1.10.1")),
    ),
    "a1111, SDE on a GPU": Sample(
        BASIC | {"sampler": "dpmpp-2m-sde", "step_noise": "brownian", "schedule": "karras"},
        {"noise of the steps"},
        a1111(_line("DPM++ 2M SDE Karras", "Version: v1.6.0")),
    ),
    "a1111, SDE on a CPU": Sample(
        BASIC | {"sampler": "dpmpp-sde", "step_noise": "brownian", "rng": "cpu"},
        set(),
        a1111(_line("DPM++ SDE", "RNG: CPU, Version: v1.6.0")),
    ),
    "a1111, hires by nearest pixels": Sample(
        BASIC | {"hires": 2.0, "hires_upscaler": "latent-nearest", "hires_strength": 0.5},
        set(),
        a1111(_line("Euler", "Denoising strength: 0.5, Hires upscale: 2, Hires upscaler: Latent "
                             "(nearest-exact), Version: v1.10.1")),
    ),
    "forge neo": Sample(
        BASIC | {"sampler": "dpmpp-2m", "schedule": "karras"},
        set(),
        a1111(_line("DPM++ 2M", "Schedule type: Automatic, Version: neo-2.28")),
    ),
    "sd.next, a schedule of sigmas": Sample(
        BASIC | {"sampler": "euler", "schedule": "karras"},
        set(),
        a1111(_line("Euler", "Sampler sigma: karras, App: SD.Next, Version: 56a8aea")),
    ),
    "sd.next, an argument that its class lacks": Sample(
        BASIC | {"sampler": "ddim", "schedule": "normal"},
        set(),
        a1111(_line("DDIM", "Sampler sigma: exponential, App: SD.Next, Version: 56a8aea")),
    ),
    "sd.next, the model's own sampler": Sample(
        BASIC | {"sampler": "checkpoint"},
        set(),
        a1111("Steps: 20, Size: 512x768, Seed: 42, CFG scale: 7, App: SD.Next, Version: 56a8aea"),
    ),
    "sd.cpp, later": Sample(
        BASIC | {"sampler": "euler", "schedule": "linspace", "rng": "gpu", "sampler_rng": "cpu",
                 "model": "unet.gguf"},
        {"cache"},
        a1111("Steps: 20, CFG scale: 7.000000, Eta: inf, Seed: 42, Size: 512x768, Model: , RNG: "
              "cuda, Sampler RNG: cpu, Sampler: euler discrete, Unet: unet.gguf, Version: "
              'stable-diffusion.cpp, SDCPP: {"schema":"x","cache":{"mode":1},"seed":42}'),
    ),
    "sd.cpp, sigmas": Sample(
        BASIC | {"sampler": "euler", "sigmas": [14.6146, 2.0], "steps": None},
        {"RNG"},
        a1111("Steps: 20, CFG scale: 7.0, Seed: 42, Size: 512x768, RNG: std_default, Sampler: "
              "euler, Custom Sigmas: [14.6146, 2.0000], Version: stable-diffusion.cpp"),
    ),
    "comfyui, a saver's text": Sample(
        BASIC | _COMFY | {"sampler": "euler", "schedule": "simple", "prompt": "a \\[red\\] circle"},
        set(),
        a1111("Steps: 20, Sampler: euler_simple, CFG Scale: 7.0, Seed: 42, Size: 512x768, Model: "
              "sd15.safetensors", "a [red] circle\nNegative prompt: blurry"),
    ),
    "comfyui, a graph beside a text": Sample(
        BASIC | {"model": "sd15.safetensors", "sampler": "euler-a"},
        set(),
        a1111("Steps: 20, Sampler: Euler Ancestral, CFG scale: 7, Seed: 42, Size: 1024x1536, "
              "Model: sd15.safetensors") | {"prompt": json.dumps(api_graph())},
    ),
    "comfyui, texts in nodes of their own": Sample(
        BASIC | {"prompt": "a red circle", "seed": 42},
        set(),
        {"prompt": json.dumps(api_graph(seed=["34", 0], positive=["30", 0]) | {
            "30": {"class_type": "Power Prompt (rgthree)",
                   "inputs": {"prompt": ["31", 0], "opt_clip": ["10", 1]}},
            "31": {"class_type": "StringConcatenate", "inputs": {
                "string_a": ["32", 0], "string_b": ["33", 0], "delimiter": " "}},
            "32": {"class_type": "DF_Text_Box", "inputs": {"Text": "a red"}},
            "33": {"class_type": "ComfySwitchNode",
                   "inputs": {"switch": True, "on_true": ["35", 0], "on_false": ["32", 0]}},
            "34": {"class_type": "Seed (rgthree)", "inputs": {"seed": 42}},
            "35": {"class_type": "ShowText|pysssss", "inputs": {"text": ["36", 0]}},
            "36": {"class_type": "ImpactWildcardProcessor", "inputs": {
                "wildcard_text": "{circle|square}", "populated_text": "circle"}},
        })},
    ),
    "comfyui, LoRAs in stacks": Sample(
        BASIC | {"loras": [
            {"name": "one.safetensors", "scale": 0.7}, {"name": "two.safetensors", "scale": 0.6,
                                                        "text_scale": 0.1},
            {"name": "three.safetensors", "scale": 0.5, "text_scale": 0.2},
        ]},
        set(),
        {"prompt": json.dumps(api_graph(model=["30", 0]) | {
            "30": {"class_type": "Power Lora Loader (rgthree)", "inputs": {
                "lora_1": {"on": True, "lora": "two.safetensors", "strength": 0.6,
                           "strengthTwo": 0.1},
                "lora_2": {"on": True, "lora": "three.safetensors", "strength": 0.5,
                           "strengthTwo": 0.2},
                "lora_3": {"on": False, "lora": "off.safetensors", "strength": 1.0},
                "model": ["31", 0], "clip": ["31", 1]}},
            "31": {"class_type": "CR Apply LoRA Stack", "inputs": {
                "model": ["4", 0], "clip": ["4", 1], "lora_stack": ["32", 0]}},
            "32": {"class_type": "CR LoRA Stack", "inputs": {
                "switch_1": "On", "lora_name_1": "one.safetensors", "model_weight_1": 0.7,
                "clip_weight_1": 0.7, "switch_2": "Off", "lora_name_2": "x.safetensors",
                "model_weight_2": 1.0, "clip_weight_2": 1.0}},
            "10": {"class_type": "Reroute", "inputs": {"": ["4", 1]}},
        })},
    ),
    "comfyui, a loader that does it all": Sample(
        BASIC | {"model": "sd15.safetensors", "clip_skip": 1, "loras": _LORA_FILE},
        set(),
        {"prompt": json.dumps({
            "1": {"class_type": "Efficient Loader", "inputs": {
                "ckpt_name": "sd15.safetensors", "vae_name": "Baked VAE", "clip_skip": -2,
                "lora_name": "pastel.safetensors", "lora_model_strength": 0.8,
                "lora_clip_strength": 0.8, "positive": "a red circle", "negative": "blurry",
                "empty_latent_width": 512, "empty_latent_height": 768, "batch_size": 1}},
            "2": {"class_type": "KSampler (Efficient)", "inputs": {
                "seed": 42, "steps": 20, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal",
                "denoise": 1.0, "model": ["1", 0], "positive": ["1", 1], "negative": ["1", 2],
                "latent_image": ["1", 3]}},
            "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 5]}},
        })},
    ),
    "comfyui, formulas of its own": Sample(
        BASIC | {"sampler": "dpmpp-2m-cfg++"},
        {"sampler dpmpp_2m_cfg_pp"},
        {"prompt": json.dumps(api_graph(sampler_name="dpmpp_2m_cfg_pp"))},
    ),
    "comfyui, SDE from an image": Sample(
        {"sampler": "dpmpp-2m-sde", "step_noise": "brownian", "strength": 0.5},
        {"noise of the steps"},
        {"prompt": json.dumps(api_graph(
            sampler_name="dpmpp_2m_sde", denoise=0.5, latent_image=["50", 0]) | {
            "50": {"class_type": "VAEEncode", "inputs": {"pixels": ["51", 0], "vae": ["11", 0]}},
            "51": {"class_type": "LoadImage", "inputs": {"image": "photo.png?sig=x"}}})},
    ),
    "swarmui, tiles": Sample(
        {"seamless": "x"},
        set(),
        {"parameters": json.dumps({"sui_image_params": SWARM | {"seamlesstileable": "X-Only"}})},
    ),
    "easy diffusion, tiles": Sample(
        {"seamless": "xy"}, set(), {"parameters": json.dumps(EASY | {"tiling": "xy"})}
    ),
    "diffusers, a space of the hub": Sample(
        BASIC | {"sampler": "dpmpp-2m", "schedule": "karras", "model": "SD 1.5"},
        {"use_upscaler"},
        {"parameters": json.dumps({
            "prompt": "a red circle", "negative_prompt": "blurry", "seed": 42, "resolution":
            "512 x 768", "num_inference_steps": 20, "guidance_scale": 7.0, "sampler":
            "DPM++ 2M Karras", "Model": "SD 1.5", "use_upscaler": {"upscale_by": 1.5}})},
    ),
}  # fmt: skip
"""By the program, and what is special."""
