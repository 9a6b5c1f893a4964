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
    size,
    whole,
    without_brackets,
)

_EXIF_PREFIX = re.compile(r"(?:prompt|workflow):", re.IGNORECASE)  # of WebP

Node = Mapping[str, Any]
"""``class_type`` and ``inputs``: values, or links [node id, output]."""
Graph = dict[str, Node]

_MOST_NODES = 5000
_MOST_STEPS = 200  # along one path of links
_DEEPEST = 20  # values of values
_LONGEST_TEXT = 100_000

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
_TEXTS = (
    "populated_text",  # of wildcards
    "text", "string", "value", "prompt", "text_g", "positive", "result",
)  # fmt: skip
_HARMLESS = {
    "MarkdownNote", "Reroute", "VAEDecode", "VAEDecodeTiled", "CheckpointLoaderSimple",
    "SwarmSaveImageWS", "Image Save", "Image Saver",
}  # fmt: skip
_HARMLESS_BEGINNINGS = ("Note", "Primitive", "Save", "Preview", "Show")
# Values that name a file are never a prompt, a sampler or a schedule.
_VALUES = ("int", "float", "number", *_TEXTS)
_FILE = re.compile(r"\.(?:png|jpe?g|webp|safetensors|ckpt|pth?|gguf|txt|json)$", re.IGNORECASE)
_UNREAD = "(in the node"
_GUIDERS = ("CFGGuider", "BasicGuider")
_MOST_LORAS = 40
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
    "PrimitiveNode": ("value", ""),
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
            if not names and given and re.search("text|string|primitive", node["type"], re.I):
                inputs["value"] = given[0]
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
        self.asked = self.depth = 0

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
        record.seed = whole(self._number_of(record, inputs, "noise_seed", "seed"))
        record.steps = whole(self._number_of(record, inputs, "steps"))
        record.guidance = number(self._number_of(record, inputs, "cfg"))
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
        """Return the value of an input, which may stand in a node of its own.

        None: there is none, or it stands in a node that is not read.
        """
        for name in names:
            value, seen = inputs.get(name), 0
            while _target(value) is not None and seen < _MOST_STEPS:
                seen += 1
                source = self._linked({name: value}, name)
                value = None if source is None else self._of_node(source, (*names, *_VALUES))
            if value is not None and _target(value) is None:
                return value
        return None

    def _of_node(self, name: str, keys: Sequence[str]) -> Any:
        """Return the value that a node hands on, or the link that it takes it from."""
        self.asked += 1
        if self.depth >= _DEEPEST or self.asked > _MOST_NODES:
            return None
        self.depth += 1
        try:
            return self._handed_on(name, keys)
        finally:
            self.depth -= 1

    def _handed_on(self, name: str, keys: Sequence[str]) -> Any:
        kind, inputs = self._kind(name), self._inputs(name)
        if kind == "ComfySwitchNode":
            self.read.add(name)
            return inputs.get("on_true" if self._value(inputs, "switch") is True else "on_false")
        if kind == "StringConcatenate":
            parts = [self._value(inputs, key) for key in ("string_a", "delimiter", "string_b")]
            if not all(isinstance(part, str) for part in parts):
                return None
            first, between, second = map(str, parts)
            if len(first) + len(second) > _LONGEST_TEXT:
                return None
            self.read.add(name)
            return f"{first}{between}{second}"
        found = {key.lower(): value for key, value in reversed(list(inputs.items()))}
        if any(key.startswith("string_") for key in found) or "clip" in found:
            return None  # it puts its texts together, or makes them
        value = next((found[key.lower()] for key in keys if key.lower() in found), None)
        if value is not None and not (isinstance(value, str) and _FILE.search(value)):
            self.read.add(name)
            return value
        return None

    def _text_value(self, inputs: Mapping[str, Any], *names: str) -> str | None:
        """Return a text; "(in the node NAME)" where it stands in a node that is not read."""
        value = self._value(inputs, *names)
        if value is None and (source := self._linked(inputs, *names)) is not None:
            return f"{_UNREAD} {self._kind(source)})"
        return value if isinstance(value, str) else None

    def _number_of(self, record: Record, inputs: Mapping[str, Any], *names: str) -> Any:
        """Return a value; one that stands in a node that is not read is named."""
        value = self._value(inputs, *names)
        if value is None and (source := self._linked(inputs, *names)) is not None:
            record.name({names[-1]: f"{_UNREAD} {self._kind(source)})"})
        return value

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
            if self._kind(guider) in _GUIDERS:
                self.read.add(guider)
            owner, inputs = guider, self._inputs(guider)
            guidance = number(self._value(inputs, "cfg"))
            record.guidance = 1.0 if self._kind(guider) == "BasicGuider" else guidance
        start = self._linked(inputs, "positive", "conditioning", "cond1")
        texts = self._conditioning(record, start, True)
        if texts is None or _UNREAD in texts[0]:
            record.unread_prompt = texts[0] if texts else f"{_UNREAD} {self._kind(start)})"
        else:
            record.prompt, record.prompt_2 = texts
        start = self._linked(inputs, "negative")
        negative = self._conditioning(record, start, False)
        if negative is not None and _UNREAD not in negative[0]:
            record.negative_prompt, record.negative_prompt_2 = negative
        elif start is not None and record.guidance != 1.0:
            record.name({"negative prompt": negative[0] if negative else self._kind(start)})
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
            side = "positive" if positive else "negative"
            if isinstance(own := inputs.get(side), str):  # a loader that also encodes
                self.read.add(name)
                skipped = whole(inputs.get("clip_skip"))
                record.clip_skip = None if skipped is None else abs(skipped)
                return without_brackets(own), None
            if kind == "CLIPTextEncodeSDXL":
                self.read.add(name)
                first = without_brackets(self._text_value(inputs, "text_l") or "")
                second = without_brackets(self._text_value(inputs, "text_g") or "")
                self._read_clip(record, self._linked(inputs, "clip"))
                return first, None if first == second else second
            text = self._text_value(inputs, "text", "prompt", "text_g")
            clips = [key for key in inputs if "clip" in key]
            if text is not None and clips:
                self.read.add(name)
                self._read_clip(record, self._linked(inputs, *clips))
                return text if _UNREAD in text else without_brackets(text), None
            name = self._linked(inputs, side, "conditioning", "conditioning_1", "conditioning_to")
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
            found += self._loras(name, inputs)
            file = self._text_value(inputs, "ckpt_name", "unet_name")
            if file is not None:
                self.read.add(name)
                record.model = file if _UNREAD in file else file_name(file)
                break
            if self._kind(name) == "ComfySwitchNode":
                name = self._linked({"": self._of_node(name, ())}, "")
                continue
            name = self._linked(inputs, "model")
        record.loras = found[::-1][:_MOST_LORAS]

    def _loras(self, name: str, inputs: Mapping[str, Any]) -> list[AddedLora]:
        """Return the LoRAs that a node adds, the last one first."""
        file = self._text_value(inputs, "lora_name")
        scale = number(self._value(inputs, "strength_model", "lora_model_strength"))
        if file is not None and scale is not None:
            self.read.add(name)
            of_text = number(self._value(inputs, "strength_clip", "lora_clip_strength"))
            if not any("clip" in key or key == "ckpt_name" for key in inputs):
                of_text = 0.0
            return _added(file, scale, of_text)
        found: list[AddedLora] = []
        nodes = [name]  # and the stacks that it is given
        while len(nodes) < _MOST_LORAS and (stack := self._linked(inputs, "lora_stack")):
            nodes.append(stack)
            inputs = self._inputs(stack)
        for one in nodes:
            listed = [
                lora
                for place in range(1, _MOST_LORAS)
                for read in (_of_power_loader, _of_stack, _of_plain_stack)
                if (lora := read(self._inputs(one), place)) is not None
            ]
            if listed:
                self.read |= {name, one}
            found += [lora for file in reversed(listed) for lora in _added(*file)]
        return found

    def _read_latents(
        self, record: Record, inputs: Mapping[str, Any], strength: float | None
    ) -> None:
        """Read the size of the empty latents, or the image that is encoded."""
        name = self._linked(inputs, "latent_image", "latent")
        for _ in range(_MOST_STEPS):
            if name is None:
                return
            kind, own = self._kind(name), self._inputs(name)
            if "empty_latent_width" in own:  # a loader that also makes the latents
                own = {key.removeprefix("empty_latent_"): value for key, value in own.items()}
                kind = "Empty"
            if kind.startswith("Empty") or "Empty Latent" in kind:
                self.read.add(name)
                record.width, record.height = self._size(record, own)
                if (whole(self._value(own, "batch_size")) or 1) > 1:
                    record.name({"batch_size": self._value(own, "batch_size")})
                if strength is not None and strength < 1.0:
                    record.name({"denoise": strength})
                return
            if kind in ("LoadImage", "LoadImageBase64"):
                self.read.add(name)
                file = (self._text_value(own, "image") or "").partition("?")[0]
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
            if name is None:
                record.name({"size": f"{_UNREAD} {kind})"})

    def _size(self, record: Record, inputs: Mapping[str, Any]) -> tuple[int | None, int | None]:
        """Return (width, height) of empty latents."""
        said = inputs.get("dimensions")  # "1024 x 1024  (square)"
        if isinstance(said, str) and (found := size(said.partition("(")[0])) is not None:
            return found
        sides = [whole(self._number_of(record, inputs, side)) for side in ("width", "height")]
        return sides[0], sides[1]

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
            if name not in self.read
            and self._kind(name) not in _HARMLESS
            and not self._kind(name).startswith(_HARMLESS_BEGINNINGS)
        ]
        if rest:
            record.name({"nodes": ", ".join(dict.fromkeys(rest))})


_Lora = tuple[str, float, float | None]


def _of_power_loader(inputs: Mapping[str, Any], place: int) -> _Lora | None:
    """rgthree's Power Lora Loader: ``lora_1: {on, lora, strength, strengthTwo}``."""
    one = inputs.get(f"lora_{place}")
    if not isinstance(one, dict) or not isinstance(one.get("lora"), str):
        return None
    scale, of_text = number(one.get("strength")), number(one.get("strengthTwo"))
    off = one.get("on") is False or scale is None
    return one["lora"], 0.0 if off or scale is None else scale, 0.0 if off else of_text


def _of_stack(inputs: Mapping[str, Any], place: int) -> _Lora | None:
    """Comfyroll's CR LoRA Stack: ``lora_name_1``, ``switch_1``, two weights."""
    name, scale = inputs.get(f"lora_name_{place}"), number(inputs.get(f"model_weight_{place}"))
    if not isinstance(name, str) or scale is None:
        return None
    on = inputs.get(f"switch_{place}") == "On" and name != "None"
    of_text = number(inputs.get(f"clip_weight_{place}"))
    return name, scale if on else 0.0, of_text if on else 0.0


def _of_plain_stack(inputs: Mapping[str, Any], place: int) -> _Lora | None:
    """rgthree's Lora Loader Stack: ``lora_01``, ``strength_01``."""
    name, scale = inputs.get(f"lora_{place:02}"), number(inputs.get(f"strength_{place:02}"))
    if not isinstance(name, str) or scale is None:
        return None
    return name, 0.0 if name == "None" else scale, None


def _added(file: str, scale: float, of_text: float | None) -> list[AddedLora]:
    """Return a LoRA; none where its weights are 0."""
    name = file if _UNREAD in file else file_name(file)
    if of_text == scale:
        of_text = None
    return [AddedLora(name, scale, of_text)] if name is not None and (scale or of_text) else []


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
