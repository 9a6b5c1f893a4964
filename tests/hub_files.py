"""The files of a repo on the hub: stable-diffusion-v1-5, shortened, with unneeded files."""

from __future__ import annotations

import json

UNET, CLIP = "unet/diffusion_pytorch_model", "text_encoder/model"

# A repo as published: stable-diffusion-v1-5, shortened, with all that is not wanted.
SD15 = {
    "model_index.json": json.dumps(
        {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "image_encoder": [None, None],
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
            "scheduler": ["diffusers", "PNDMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
    ),
    "scheduler/scheduler_config.json": '{"of": "scheduler"}',
    "tokenizer/vocab.json": '{"of": "vocab"}',
    "tokenizer/merges.txt": "#version",
    "tokenizer/special_tokens_map.json": '{"of": "map"}',
    "tokenizer/tokenizer_config.json": '{"of": "tokenizer"}',
    "text_encoder/config.json": '{"of": "text"}',
    f"{CLIP}.safetensors": "clip",
    f"{CLIP}.fp16.safetensors": "clip16",
    "unet/config.json": '{"of": "unet"}',
    f"{UNET}.safetensors": "unet" * 1000,
    f"{UNET}.fp16.safetensors": "unet16" * 1000,
    "vae/config.json": '{"of": "vae"}',
    "vae/diffusion_pytorch_model.safetensors": "vae",
}
UNWANTED = dict.fromkeys(
    [
        ".gitattributes",
        "README.md",
        "v1-5-pruned.ckpt",
        "v1-5-pruned.safetensors",
        "feature_extractor/preprocessor_config.json",
        "safety_checker/config.json",
        "safety_checker/model.safetensors",
        "text_encoder/pytorch_model.bin",
        "text_encoder/flax_model.msgpack",
        "text_encoder/model.onnx",
        "text_encoder/openvino_model.bin",
        f"{UNET}.bin",
        f"{UNET}.fp16.bin",
        f"{UNET}.non_ema.safetensors",
        "unet/sub/config.json",
        "vae_encoder/model.onnx",
        "scheduler/notes.txt",
        "tokenizer/README.md",
    ],
    "no",
)
PLAIN = sorted(set(SD15) - {f"{CLIP}.fp16.safetensors", f"{UNET}.fp16.safetensors"})
HALF = sorted(set(SD15) - {f"{CLIP}.safetensors", f"{UNET}.safetensors"})
