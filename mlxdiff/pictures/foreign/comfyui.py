"""ComfyUI: the graph of nodes that drew a picture, as API JSON (``prompt``) or workflow JSON.

A graph can be anything. Read are the usual ones, from the node that saves the picture backwards:
VAE, sampler, prompts, LoRAs, checkpoint, the empty latents or the image. Nodes that change the
result and are not read are named.

Source: ComfyUI, nodes.py and comfy_extras/nodes_custom_sampler.py (inputs of the nodes), SaveImage
(the chunks), app and frontend (the workflow's form).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlxdiff.pictures.foreign.record import (
    UNNAMED,
    AddedLora,
    Record,
    Texts,
    document,
    file_name,
    number,
    whole,
)

_EXIF_PREFIX = re.compile(r"(?:prompt|workflow):", re.IGNORECASE)  # of WebP

Node = Mapping[str, Any]
"""``class_type`` and ``inputs``: values, or links [node id, output]."""
Graph = dict[str, Node]

_MOST_NODES = 5000
_MOST_STEPS = 200  # along one path of links

_SAMPLERS = {
    "KSampler",
    "KSamplerAdvanced",
    "SamplerCustom",
    "SamplerCustomAdvanced",
    "SwarmKSampler",
    "KSampler (Efficient)",
    "KSampler Adv. (Efficient)",
}
_SAVERS = ("SaveImage", "PreviewImage", "SwarmSaveImageWS", "SaveImageWebsocket", "Image Save")
_TEXTS = ("text", "string", "value", "prompt", "text_g", "positive", "result", "STRING")
_HARMLESS = {
    "Note", "MarkdownNote", "Reroute", "PrimitiveNode", "SaveImage", "PreviewImage", "VAEDecode",
    "VAEDecodeTiled", "CheckpointLoaderSimple", "PrimitiveString", "PrimitiveInt", "PrimitiveFloat",
    "SwarmSaveImageWS", "SaveImageWebsocket",
}  # fmt: skip
# Nodes of a workflow whose values stand without names: class -> the names in order. The control
# after a seed ("randomize") is a value of the page alone.
_WIDGETS: Mapping[str, Sequence[str]] = {
    "KSampler": ("seed", "", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": (
        "add_noise", "noise_seed", "", "steps", "cfg", "sampler_name", "scheduler",
        "start_at_step", "end_at_step", "return_with_leftover_noise",
    ),
    "SamplerCustom": ("add_noise", "noise_seed", "", "cfg"),
    "KSamplerSelect": ("sampler_name",),
    "BasicScheduler": ("scheduler", "steps", "denoise"),
    "KarrasScheduler": ("steps", "sigma_max", "sigma_min", "rho"),
    "ExponentialScheduler": ("steps", "sigma_max", "sigma_min"),
    "PolyexponentialScheduler": ("steps", "sigma_max", "sigma_min", "rho"),
    "SDTurboScheduler": ("steps", "denoise"),
    "AlignYourStepsScheduler": ("model_type", "steps", "denoise"),
    "RandomNoise": ("noise_seed", ""),
    "CFGGuider": ("cfg",),
    "CLIPTextEncode": ("text",),
    "CLIPTextEncodeSDXL": (
        "width", "height", "crop_w", "crop_h", "target_width", "target_height", "text_g", "text_l",
    ),
    "CLIPSetLastLayer": ("stop_at_clip_layer",),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "UNETLoader": ("unet_name", "weight_dtype"),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
    "LoraLoaderModelOnly": ("lora_name", "strength_model"),
    "VAELoader": ("vae_name",),
    "EmptyLatentImage": ("width", "height", "batch_size"),
    "EmptySD3LatentImage": ("width", "height", "batch_size"),
    "LoadImage": ("image", ""),
    "LoadImageMask": ("image", "channel", ""),
    "PrimitiveString": ("value",),
    "PrimitiveStringMultiline": ("value",),
    "PrimitiveInt": ("value", ""),
}  # fmt: skip
_SCHEDULERS = {
    "KarrasScheduler": "karras",
    "ExponentialScheduler": "exponential",
    "PolyexponentialScheduler": "polyexponential",
    "AlignYourStepsScheduler": "align your steps",
    "SDTurboScheduler": "sgm_uniform",
}


def read(texts: Texts) -> Record | None:
    """Read a graph of ComfyUI; see ``foreign.READERS``."""
    for name in ("prompt", "workflow", "Model", "Make", "ImageDescription", "UserComment"):
        text = texts.get(name, "")
        begin = _EXIF_PREFIX.match(text)
        found = document(text[begin.end() :]) if begin else texts.documents.get(name)
        graph = _graph(found)
        if graph and (walk := _Walk.begin(graph)) is not None:
            return walk.record()
    return None


def _graph(values: Any) -> Graph | None:
    """Return the nodes of API JSON or workflow JSON; None for other values."""
    if not isinstance(values, dict):
        return None
    if isinstance(values.get("prompt"), dict):  # both in one object
        values = values["prompt"]
    if isinstance(values.get("nodes"), list):
        return _from_workflow(values)
    graph: Graph = {
        str(name): node
        for name, node in values.items()
        if isinstance(node, dict)
        and isinstance(node.get("class_type"), str)
        and isinstance(node.get("inputs"), dict)
    }
    return graph if 0 < len(graph) <= _MOST_NODES else None


def _from_workflow(values: Mapping[str, Any]) -> Graph | None:
    """Name the inputs of a workflow's nodes as API JSON does. Switched-off nodes are left out."""
    nodes, links = values["nodes"], values.get("links")
    if len(nodes) > _MOST_NODES or not isinstance(links, list) or len(links) > 4 * _MOST_NODES:
        return None
    sources: dict[int, list[Any]] = {}
    for link in links:
        if isinstance(link, dict):
            link = [link.get("id"), link.get("origin_id"), link.get("origin_slot")]
        if isinstance(link, list) and len(link) >= 3 and isinstance(link[0], int):
            sources[link[0]] = [str(link[1]), link[2]]
    graph: Graph = {}
    for node in nodes:
        if not isinstance(node, dict) or not isinstance(node.get("type"), str):
            continue
        inputs: dict[str, Any] = {}
        given = node.get("widgets_values")
        if isinstance(given, dict):
            inputs |= given
        elif isinstance(given, list):
            names = _WIDGETS.get(node["type"], ())
            inputs |= {name: value for name, value in zip(names, given, strict=False) if name}
            if not names and given and isinstance(given[0], str):
                inputs["text"] = given[0]
        for one in node.get("inputs") or ():
            if isinstance(one, dict) and isinstance(link := one.get("link"), int):
                if link in sources and isinstance(one.get("name"), str):
                    inputs[one["name"]] = sources[link]
        off = node.get("mode") in (2, 4)
        graph[str(node.get("id"))] = {
            "class_type": "Reroute" if off else node["type"],
            "inputs": inputs,
        }
    return graph


class _Walk:
    """Reads a graph backwards from the picture.

    Attributes:
        graph: the nodes.
        read: ids of the nodes whose values are honoured, or that change nothing.
        passes: number of samplers on the way to the picture; the first one is read.
        savers: number of nodes that save pictures; the first one is taken.
    """

    def __init__(self, graph: Graph, sampler: str, decoder: str | None) -> None:
        self.graph, self.sampler, self.decoder = graph, sampler, decoder
        self.read: set[str] = set()
        self.passes = self.savers = 1

    @classmethod
    def begin(cls, graph: Graph) -> _Walk | None:
        """Find the sampler of the picture; None if there is none."""
        savers = [name for name, node in graph.items() if node["class_type"] in _SAVERS]
        samplers = [name for name, node in graph.items() if node["class_type"] in _SAMPLERS]
        for saver in (*savers, *samplers):
            decoder = sampler = None
            passes: list[str] = []
            for name in _upstream(graph, saver, ("images", "image", "samples", "latent_image",
                                                 "latent", "pixels", "LATENT")):  # fmt: skip
                kind = graph[name]["class_type"]
                if kind.startswith("VAEDecode") and decoder is None:
                    decoder = name
                if kind in _SAMPLERS:
                    passes.append(name)
                    sampler = name
            if sampler is not None:
                walk = cls(graph, sampler, decoder)
                walk.passes, walk.savers = len(passes), len(savers)
                return walk
        return None

    def record(self) -> Record:
        """Return what the graph says."""
        inputs = self._inputs(self.sampler)
        self.read |= {self.sampler, *([] if self.decoder is None else [self.decoder])}
        record = Record("ComfyUI", even=True, rng="cpu", sampler_rng="gpu", seed_order="a1111")
        record.seed = whole(self._value(inputs, "seed", "noise_seed"))
        record.steps = whole(self._value(inputs, "steps"))
        record.guidance = number(self._value(inputs, "cfg"))
        record.sampler = self._text_value(inputs, "sampler_name")
        record.schedule = self._text_value(inputs, "scheduler")
        strength = number(self._value(inputs, "denoise"))
        strength = self._read_custom(record, inputs, strength)
        guided = self._read_prompts(record, inputs)
        self._read_model(record, guided)
        self._read_latents(record, inputs, strength)
        self._read_vae(record)
        self._name_rest(record, inputs)
        return record

    # Values

    def _inputs(self, name: str | None) -> Mapping[str, Any]:
        node = self.graph.get(name or "")
        return {} if node is None else node["inputs"]

    def _kind(self, name: str | None) -> str:
        node = self.graph.get(name or "")
        return "" if node is None else str(node["class_type"])

    def _linked(self, inputs: Mapping[str, Any], *names: str) -> str | None:
        """Return the node that an input is linked to; reroutes are followed."""
        for name in names:
            target = _target(inputs.get(name))
            for _ in range(_MOST_STEPS):
                if target is None or self._kind(target) != "Reroute":
                    break
                self.read.add(target)
                links = [one for one in map(_target, self._inputs(target).values()) if one]
                target = links[0] if links else None
            if target in self.graph:
                return target
        return None

    def _value(self, inputs: Mapping[str, Any], *names: str) -> Any:
        """Return the value of an input, which may stand in a node of its own."""
        for name in names:
            value = inputs.get(name)
            if _target(value) is None:
                if value is not None:
                    return value
                continue
            source = self._linked(inputs, name)
            if source is None:
                continue
            own = self._inputs(source)
            for key in (*names, "value", "int", "float", "number", *_TEXTS):
                if key in own and _target(own[key]) is None:
                    self.read.add(source)
                    return own[key]
        return None

    def _text_value(self, inputs: Mapping[str, Any], *names: str) -> str | None:
        value = self._value(inputs, *names)
        return value if isinstance(value, str) else None

    # Parts

    def _read_custom(
        self, record: Record, inputs: Mapping[str, Any], strength: float | None
    ) -> float | None:
        """Read the nodes that a custom sampler is put together from. Return its strength."""
        if (chosen := self._linked(inputs, "sampler")) is not None:
            self.read.add(chosen)
            record.sampler = self._text_value(self._inputs(chosen), "sampler_name")
            record.sampler = record.sampler or self._kind(chosen).removeprefix("Sampler")
        if (sigmas := self._linked(inputs, "sigmas")) is not None:
            kind, own = self._kind(sigmas), self._inputs(sigmas)
            record.steps = whole(self._value(own, "steps"))
            strength = number(self._value(own, "denoise"))
            record.schedule = self._text_value(own, "scheduler") or _SCHEDULERS.get(kind)
            if kind == "BasicScheduler" or kind in _SCHEDULERS:
                self.read.add(sigmas)
        if (noise := self._linked(inputs, "noise")) is not None:
            self.read.add(noise)
            record.seed = whole(self._value(self._inputs(noise), "noise_seed", "seed"))
        return strength

    def _read_prompts(self, record: Record, inputs: Mapping[str, Any]) -> str | None:
        """Read both prompts. Return the node whose model is guided."""
        owner = self.sampler
        if (guider := self._linked(inputs, "guider")) is not None:
            self.read.add(guider)
            owner, inputs = guider, self._inputs(guider)
            guidance = number(self._value(inputs, "cfg"))
            record.guidance = 1.0 if self._kind(guider) == "BasicGuider" else guidance
        texts = self._conditioning(record, self._linked(inputs, "positive", "conditioning"), True)
        record.prompt, record.prompt_2 = texts or ("", None)
        negative = self._conditioning(record, self._linked(inputs, "negative"), False)
        if negative is not None:
            record.negative_prompt, record.negative_prompt_2 = negative
        return owner

    def _conditioning(
        self, record: Record, name: str | None, positive: bool
    ) -> tuple[str, str | None] | None:
        """Follow a conditioning to its text. Return the texts for one or two text encoders."""
        for _ in range(_MOST_STEPS):
            if name is None:
                return None
            kind, inputs = self._kind(name), self._inputs(name)
            if kind == "ConditioningZeroOut":
                self.read.add(name)
                return None
            if kind == "CLIPTextEncodeSDXL":
                self.read.add(name)
                first = _plain(self._text_value(inputs, "text_l") or "")
                second = _plain(self._text_value(inputs, "text_g") or "")
                self._read_clip(record, self._linked(inputs, "clip"))
                return first, None if first == second else second
            text = self._text_value(inputs, "text", "prompt", "text_g")
            if text is not None and "clip" in inputs:
                self.read.add(name)
                self._read_clip(record, self._linked(inputs, "clip"))
                return _plain(text), None
            side = ("positive",) if positive else ("negative",)
            name = self._linked(inputs, *side, "conditioning", "conditioning_1", "conditioning_to")
        return None

    def _read_clip(self, record: Record, name: str | None) -> None:
        """Follow the text encoder up to the checkpoint: LoRAs are read with the model."""
        for _ in range(_MOST_STEPS):
            if name is None:
                return
            if self._kind(name) == "CLIPSetLastLayer":
                self.read.add(name)
                layer = whole(self._value(self._inputs(name), "stop_at_clip_layer"))
                record.clip_skip = None if layer is None else abs(layer)
            name = self._linked(self._inputs(name), "clip")

    def _read_model(self, record: Record, owner: str | None) -> None:
        """Follow the model up to its file, through LoRAs."""
        name = self._linked(self._inputs(owner), "model")
        found: list[AddedLora] = []
        for _ in range(_MOST_STEPS):
            if name is None:
                break
            inputs = self._inputs(name)
            file = self._text_value(inputs, "lora_name")
            scale = number(self._value(inputs, "strength_model"))
            if file is not None and scale is not None:
                self.read.add(name)
                of_text = number(self._value(inputs, "strength_clip"))
                if "clip" not in inputs:
                    of_text = 0.0
                if (lora := file_name(file)) is not None and (scale or of_text):
                    found.append(AddedLora(lora, scale, of_text))
            file = self._text_value(inputs, "ckpt_name", "unet_name")
            if file is not None:
                self.read.add(name)
                record.model = file_name(file)
                break
            name = self._linked(inputs, "model")
        record.loras = found[::-1][:40]

    def _read_latents(
        self, record: Record, inputs: Mapping[str, Any], strength: float | None
    ) -> None:
        """Read the size of the empty latents, or the image that is encoded."""
        name = self._linked(inputs, "latent_image", "latent")
        for _ in range(_MOST_STEPS):
            if name is None:
                return
            kind, own = self._kind(name), self._inputs(name)
            if kind.startswith("Empty"):
                self.read.add(name)
                record.width = whole(self._value(own, "width"))
                record.height = whole(self._value(own, "height"))
                if (whole(self._value(own, "batch_size")) or 1) > 1:
                    record.name({"batch_size": self._value(own, "batch_size")})
                if strength is not None and strength < 1.0:
                    record.name({"denoise": strength})
                return
            if kind in ("LoadImage", "LoadImageBase64"):
                self.read.add(name)
                file = self._text_value(own, "image")
                record.image = (file_name(file) if file and len(file) < 500 else None) or UNNAMED
                record.strength = 1.0 if strength is None else strength
                return
            if kind in ("VAEEncode", "VAEEncodeForInpaint", "SetLatentNoiseMask"):
                self.read.add(name)
            if "mask" in own:
                record.mask = UNNAMED
                if (mask := self._linked(own, "mask")) is not None:
                    self.read |= {mask} & {
                        n for n in self.graph if self._kind(n) in ("LoadImage", "LoadImageMask")
                    }
            name = self._linked(own, "pixels", "samples", "image", "images", "latent")

    def _read_vae(self, record: Record) -> None:
        loader = self._linked(self._inputs(self.decoder), "vae")
        file = self._text_value(self._inputs(loader), "vae_name")
        if loader is not None and file is not None:
            self.read.add(loader)
            record.vae = file_name(file)

    def _name_rest(self, record: Record, inputs: Mapping[str, Any]) -> None:
        """Name the nodes and values that are not honoured."""
        if self._value(inputs, "add_noise") == "disable":
            record.name({"add_noise": "disable"})
        if whole(self._value(inputs, "start_at_step")):
            record.name({"start_at_step": self._value(inputs, "start_at_step")})
        end = whole(self._value(inputs, "end_at_step"))
        if end is not None and record.steps is not None and end < record.steps:
            record.name({"end_at_step": end})
        if self.passes > 1:
            record.name({"passes after the first": self.passes - 1})
        if self.savers > 1:
            record.name({"other pictures of the graph": self.savers - 1})
        rest = [
            self._kind(name)
            for name in self.graph
            if name not in self.read and self._kind(name) not in _HARMLESS
        ]
        if rest:
            record.name({"nodes": ", ".join(dict.fromkeys(rest))})


def _upstream(graph: Graph, start: str, names: Sequence[str]) -> Iterator[str]:
    """Yield a node and what it comes from, along the first of these inputs that is a link."""
    seen: set[str] = set()
    current: str | None = start
    while current is not None and current in graph and current not in seen:
        seen.add(current)
        yield current
        inputs = graph[current]["inputs"]
        if graph[current]["class_type"] == "Reroute":
            names_here: Sequence[str] = list(inputs)
        else:
            names_here = names
        links = (_target(inputs.get(name)) for name in names_here)
        current = next((link for link in links if link is not None), None)


def _target(value: Any) -> str | None:
    """Return the id of the node that a link names; None for a value."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], (str, int)):
        if isinstance(value[1], int) and not isinstance(value[0], bool):
            return str(value[0])
    return None


def _plain(text: str) -> str:
    """Escape what means something in A1111's syntax and nothing in ComfyUI's: square brackets."""
    return text.replace("[", "\\[").replace("]", "\\]")
