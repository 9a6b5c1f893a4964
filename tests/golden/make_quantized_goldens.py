"""Make golden data of quantized forms: stored bytes, and the values that their tools read.

    python tests/golden/make_quantized_goldens.py        (gguf 0.19, comfy-kitchen 0.2.40, torch)

gguf.npz: for each form of ggml, random blocks and the values of the gguf package. container.gguf
is a file that this package writes. comfy.npz: for each form of comfy-kitchen, the tensors of a
layer and the float32 values of its eager CPU code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy_kitchen as ck
import comfy_kitchen.tensor as forms
import gguf
import numpy as np
import torch
from comfy_kitchen.tensor.convrot_w4a4 import TensorCoreConvRotW4A4Layout
from comfy_kitchen.tensor.w4a8_int8 import AsymW4A8Int8Layout

HERE = Path(__file__).parent / "quantized"
GGUF_FORMS = ("Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS").split()
# Form -> places of its float16 numbers in a block; random bytes there could be NaN.
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82],
    "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0],
}  # fmt: skip


def make_gguf() -> None:
    rng = np.random.default_rng(0)
    result: dict[str, np.ndarray] = {}
    for name in GGUF_FORMS:
        kind = gguf.GGMLQuantizationType[name]
        values, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (3, 1024 // values, size), dtype=np.uint8)
        for place in HALVES[name]:
            scale = rng.normal(0, 0.02, blocks.shape[:2]).astype("<f2")
            blocks[..., place : place + 2] = scale[..., None].view(np.uint8)
        blocks = blocks.reshape(3, -1)
        result[f"{name.lower()}/bytes"] = blocks
        result[f"{name.lower()}/values"] = gguf.dequantize(blocks, kind)
    np.savez_compressed(HERE / "gguf.npz", **result)

    writer = gguf.GGUFWriter(HERE / "container.gguf", "sdxl")
    writer.add_quantization_version(2)
    writer.add_string("general.name", "made for a test")
    writer.add_array("a.list", list(range(100)))
    writer.add_array("some.texts", ["a", "b"])
    weight = rng.normal(0, 1, (8, 4, 3, 8)).astype(np.float32)
    writer.add_array("comfy.gguf.orig_shape.conv.weight", [8, 4, 3, 8])
    writer.add_tensor(
        "conv.weight",
        gguf.quantize(weight.reshape(-1, 256), gguf.GGMLQuantizationType.Q8_0),
        raw_dtype=gguf.GGMLQuantizationType.Q8_0,
    )
    linear = rng.normal(0, 1, (5, 64)).astype(np.float32)
    writer.add_tensor(
        "linear.weight",
        gguf.quantize(linear, gguf.GGMLQuantizationType.Q8_0),
        raw_dtype=gguf.GGMLQuantizationType.Q8_0,
    )
    writer.add_tensor("linear.bias", linear[:, 0])
    writer.add_tensor("half", linear[:2].astype(np.float16))
    writer.add_tensor(
        "brain",
        gguf.quantize(linear[:3], gguf.GGMLQuantizationType.BF16),
        raw_dtype=gguf.GGMLQuantizationType.BF16,
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


DTYPES = {
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
    torch.int8: "I8", torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16",
}  # fmt: skip


def make_comfy() -> None:
    torch.manual_seed(0)
    result: dict[str, np.ndarray] = {}
    headers: dict[str, Any] = {}

    def add(case: str, config: Any, tensors: dict[str, torch.Tensor], values: torch.Tensor) -> None:
        headers[case] = {"config": config, "tensors": {}}
        for suffix, tensor in tensors.items():
            name = f"weight{suffix}"
            headers[case]["tensors"][name] = [DTYPES[tensor.dtype], list(tensor.shape)]
            result[f"{case}/{name}"] = (
                tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            )
        result[f"{case}/values"] = values.to(torch.float32).numpy()

    tall = torch.randn(48, 256) * 0.05
    weight = tall[:16]
    with ck.registry.use_backend("eager"):
        for dtype, name in ((torch.float8_e4m3fn, "e4m3fn"), (torch.float8_e5m2, "e5m2")):
            layout = forms.TensorCoreFP8Layout
            data, params = layout.quantize(weight, dtype=dtype)
            stored = layout.state_dict_tensors(data, params)
            add(
                f"float8_{name}",
                {"format": f"float8_{name}"},
                stored,
                layout.dequantize(data, params),
            )
        int8 = forms.TensorWiseINT8Layout
        for case, options, config in (
            ("int8_tensor", {"is_weight": True}, {}),
            ("int8_row", {"is_weight": True, "per_channel": True}, {}),
            ("int8_convrot", {"is_weight": True, "per_channel": True, "convrot": True},
             {"convrot": True, "convrot_groupsize": 256}),
            ("int8_convrot_64", {"is_weight": True, "per_channel": True, "convrot": True,
                                 "convrot_groupsize": 64},
             {"params": {"convrot": True, "convrot_groupsize": 64}}),
        ):  # fmt: skip
            data, params = int8.quantize(weight, **options)
            stored = int8.state_dict_tensors(data, params)
            add(
                case, {"format": "int8_tensorwise", **config}, stored, int8.dequantize(data, params)
            )
        for case, layout in (
            ("mxfp8", forms.TensorCoreMXFP8Layout),
            ("nvfp4", forms.TensorCoreNVFP4Layout),
        ):
            data, params = layout.quantize(tall)
            add(case, {"format": case}, layout.state_dict_tensors(data, params),
                layout.dequantize(data, params))  # fmt: skip
            odd = tall[:37, :200]
            data, params = layout.quantize(odd)
            values = layout.dequantize(data, params)[:37, :200]
            add(f"{case}_padded", {"format": case, "orig_shape": [37, 200]},
                layout.state_dict_tensors(data, params), values)  # fmt: skip
        data, params = TensorCoreConvRotW4A4Layout.quantize(weight)
        add("convrot_w4a4", {"format": "convrot_w4a4", "convrot_groupsize": 256},
            TensorCoreConvRotW4A4Layout.state_dict_tensors(data, params),
            TensorCoreConvRotW4A4Layout.dequantize(data, params))  # fmt: skip
        for case, options in (
            ("w4a8", {}),
            ("w4a8_plain", {"codebook": False}),
            ("w4a8_asymmetric", {"symmetric": False, "codebook": False}),
            ("w6a8", {"bits": 6, "codebook": False}),
        ):
            data, params = AsymW4A8Int8Layout.quantize(weight, **options)
            add(case, {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 256},
                AsymW4A8Int8Layout.state_dict_tensors(data, params),
                AsymW4A8Int8Layout.dequantize(data, params))  # fmt: skip
        awq = forms.TensorCoreAWQW4A16Layout
        data = torch.randint(-128, 128, (16, 128), dtype=torch.int8)
        params = awq.Params(
            scale=(torch.rand(4, 16) * 0.01).to(torch.bfloat16),
            zeros=(torch.randn(4, 16) * 0.01).to(torch.bfloat16),
            orig_dtype=torch.float32,
            orig_shape=(16, 256),
        )
        add("awq_w4a16", {"format": "awq_w4a16", "group_size": 64},
            awq.state_dict_tensors(data, params), awq.dequantize(data, params))  # fmt: skip
    result["headers"] = np.frombuffer(json.dumps(headers).encode(), np.uint8)
    np.savez_compressed(HERE / "comfy.npz", **result)


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    make_gguf()
    make_comfy()
