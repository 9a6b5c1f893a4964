"""The text of AUTOMATIC1111's web UI, which many others write: prompt, negative prompt, a line.

    a red circle
    Negative prompt: blurry
    Steps: 20, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7, Seed: 1, Size: 512x512, ...

Others tell themselves by ``Version`` or ``App``: Forge and its kin, SD.Next, stable-diffusion.cpp,
ComfyUI's savers, Civitai, mlxdiff.

Source: stable-diffusion-webui, modules/processing.py (create_infotext), modules/infotext_utils.py
(parse_generation_parameters), modules/sd_samplers_kdiffusion.py (the schedules that "Automatic"
stands for); stable-diffusion.cpp, examples/common (get_image_params); SD.Next,
modules/processing_info.py.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from mlxdiff.pictures.foreign.record import (
    UNNAMED,
    Fields,
    Record,
    Texts,
    document,
    edges,
    file_name,
    number,
    without_brackets,
)

NEGATIVE = "Negative prompt:"
_KEY = re.compile(r"\w[\w \-/]+")
_VALUE = re.compile(r'\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
# Names that A1111 writes, and what their values look like. A prompt can have some "word: word".
_SIGNS = {
    "Steps": re.compile(r"\d{1,6}"),
    "Seed": re.compile(r"-?\d{1,20}"),
    "CFG scale": re.compile(r"-?[\d.]{1,12}"),
    "Size": re.compile(r"\d{1,6}x\d{1,6}"),
    "Sampler": re.compile(r"[^,]{2,60}"),
    "Model hash": re.compile(r"[0-9a-fA-F]{6,64}"),
    "Version": re.compile(r".*\d.*|ComfyUI"),
}
# JSON, Python's way to write it, JSON inside JSON, XML: each from its first characters on.
_DATA = re.compile(r'\s*(\{\s*["\']|\[\s*\{\s*["\']|"\s*[\[{]\s*\\|<\?xml|<x:xmpmeta|<rdf:)')
_WITH_JSON = (
    "SDCPP",
    "Custom Sigmas",
    "Hires custom sigmas",
)  # keys with a JSON value, and Civitai's
_VERSION = re.compile(r"(?:^|v)(\d{1,3})\.(\d{1,3})")
_PLACES = ("parameters", "UserComment", "comment", "Comment", "Description", "ImageDescription")
_LORA_TAG = re.compile(r"<(?:lora|lyco):([^<>:\n]{1,200})[:>]", re.IGNORECASE)

_AUTOMATIC = {
    "dpm++ 2m": "karras",
    "dpm++ sde": "karras",
    "dpm++ 2m sde": "exponential",
    "dpm++ 2m sde heun": "exponential",
    "dpm++ 2s a": "karras",
    "dpm++ 3m sde": "exponential",
    "dpm2": "karras",
    "dpm2 a": "karras",
    "restart": "karras",
}
"""Sampler -> the schedule that "Automatic" means since version 1.9; for all others, even steps."""

_RNG = {"cpu": "cpu", "gpu": "gpu", "nv": "gpu", "cuda": "gpu"}
_FORGES = ("neo", "classic")  # versions of two forks of Forge
_UPSCALERS = {
    "latent": "latent-bilinear",
    "latent (antialiased)": "latent-bilinear",  # the same where it enlarges
    "latent (nearest)": "latent-nearest",
    "lanczos": "lanczos",
    "none": "lanczos",
}
# Operations: "img2img" has a strength beside it.
_SAYS_NOTHING = ("Batch size", "Batch pos", "User", "Created Date", "Parser", "Operations")


class Text(NamedTuple):
    """The parts of a text: both prompts, the pairs of its line, and the lines after that."""

    prompt: str
    negative_prompt: str | None
    pairs: dict[str, str]
    after: str


def split(text: str) -> Text:
    """Split a text as A1111 does; where its last line holds no settings, all is prompt.

    A1111 takes any line with three pairs for settings. Here it must also begin as A1111's, or have
    two of A1111's names with fitting values, so that a prompt such as ``style: oil, lens: 50mm,
    time: dusk`` stays one.
    Extensions write lines after the settings; these are found as well.
    """
    lines = text.strip().split("\n")
    place, pairs = _settings_line(lines)
    prompts: tuple[list[str], list[str]] = ([], [])
    negative = False
    for line in map(str.strip, lines[:place]):
        if line.startswith(NEGATIVE):
            negative, line = True, line[len(NEGATIVE) :].strip()
        prompts[negative].append(line)
    return Text(
        # Empty lines at the beginning are lost on A1111's reader, and so here.
        "\n".join(prompts[0]).lstrip("\n"),
        "\n".join(prompts[1]).lstrip("\n") if negative else None,
        {key: unquote(value) for key, value in pairs},
        "\n".join(lines[place + 1 :]).strip(),
    )


def _settings_line(lines: list[str]) -> tuple[int, list[tuple[str, str]]]:
    """Find the line of settings from the end; (count of lines, none) if there is none."""
    pairs = pairs_of(lines[-1])
    if len(pairs) >= 3 and _is_settings(lines[-1], pairs):
        return len(lines) - 1, pairs
    for place in range(len(lines) - 2, max(-1, len(lines) - 20), -1):
        if lines[place].lstrip().startswith("Steps: "):
            pairs = pairs_of(lines[place])
            if len(pairs) >= 3:
                return place, pairs
    return len(lines), []


def _is_settings(line: str, pairs: list[tuple[str, str]]) -> bool:
    """Return True if a line begins as A1111's does, or has two values of A1111's."""
    if line.lstrip().startswith("Steps: "):
        return True
    signs = [key for key, value in pairs if key in _SIGNS and _SIGNS[key].fullmatch(value)]
    return len(set(signs)) >= 2


def pairs_of(line: str) -> list[tuple[str, str]]:
    """Split ``Key: value, ...`` as A1111's regular expression does, in linear time.

    A key is what stands before a colon: word characters, blanks, hyphens and slashes, from the
    first word character on. A value ends at a comma, or is quoted. Those of Civitai and some of
    stable-diffusion.cpp's are JSON.
    """
    pairs: list[tuple[str, str]] = []
    place, colon = 0, line.find(":")
    while colon >= 0:
        begin = colon
        while begin > place and (line[begin - 1].isalnum() or line[begin - 1] in "_ -/"):
            begin -= 1
        key = _KEY.search(line, begin, colon)
        if key is not None:
            is_json = key[0].startswith("Civitai ") or key[0] in _WITH_JSON
            end = _json_end(line, colon + 1) if is_json and len(pairs) < 200 else None
            if end is not None:
                pairs.append((key[0], line[colon + 1 : end].strip()))
                place = end
            else:
                value = _VALUE.match(line, colon + 1)
                assert value is not None  # it matches everywhere
                pairs.append((key[0], value[1]))
                place = value.end()
        colon = line.find(":", max(place, colon + 1))
    return pairs


def _json_end(line: str, start: int) -> int | None:
    """Return where the JSON value after a colon ends; None if there is none."""
    begin = start + (line[start : start + 1] == " ")
    if line[begin : begin + 1] not in ("[", "{"):
        return None
    try:
        return json.JSONDecoder().raw_decode(line, begin)[1]
    except (ValueError, RecursionError):
        return None


def unquote(text: str) -> str:
    """Return the text of a quoted value; another one as it is."""
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return text
    try:
        return str(json.loads(text))
    except (ValueError, RecursionError):
        return text


def read(texts: Texts) -> Record | None:
    """Read the text of A1111 and its kin; see ``foreign.READERS``."""
    for place in _PLACES:
        text = texts.get(place, "")
        if not text.strip() or place in texts.values_of_json or _DATA.match(text):
            continue
        parts = split(text)
        # A comment of a camera ("Screenshot") or an editor ("Created with GIMP") is no prompt.
        if parts.pairs or place == "parameters" or parts.negative_prompt is not None:
            return of_text(parts)
    return None


def of_text(text: Text) -> Record:
    """Read a text that is split into its parts."""
    if not text.pairs:
        return Record("AUTOMATIC1111", prompt=text.prompt, negative_prompt=text.negative_prompt)
    fields = Fields(text.pairs)
    version = fields.text("Version")
    tool, kin = _tool(version, fields)
    bare = tool in ("ComfyUI", "Fooocus")  # square brackets mean nothing there
    negative = text.negative_prompt
    record = Record(
        tool,
        version,
        prompt=without_brackets(text.prompt) if bare else text.prompt,
        negative_prompt=without_brackets(negative) if bare and negative else negative,
        seed=fields.whole("Seed"),
        steps=fields.whole("Steps"),
        guidance=fields.number("CFG scale", "Cfg scale", "CFG Scale"),
        sampler=fields.text("Sampler"),
        schedule=fields.text("Schedule type", "Scheduler"),
        even=kin != "diffusers",
        clip_skip=fields.whole("Clip skip"),
        model=file_name(fields.text("Model")),
        vae=file_name(fields.text("VAE")),
        noise_seed_delta=fields.whole("ENSD", "Eta noise seed delta"),
    )
    if (found := fields.size("Size")) is not None:
        record.width, record.height = found
    if kin == "diffusers":
        _read_diffusers(record, fields)
    elif kin == "sd.cpp":
        _read_sd_cpp(record, fields)
    record.seamless = edges(fields.text("Tiling"))
    if (record.sampler or "").lower() == "ddim":
        record.eta = fields.number("Eta DDIM")
    if kin == "a1111" and _is_modern(version, record.schedule):
        record.automatic = _AUTOMATIC.get((record.sampler or "").lower())
    _read_noise(record, fields, kin)
    _read_passes(record, fields)
    if _are_called(fields.left.get("Lora hashes"), text.prompt):
        del fields.left["Lora hashes"]  # the prompt calls them
    record.name(fields.left, _SAYS_NOTHING)
    if text.after:
        record.name({"text after the settings": text.after})
    return record


def _read_diffusers(record: Record, fields: Fields) -> None:
    """Read what SD.Next calls by other names."""
    sigma, spacing = fields.text("Sampler sigma"), fields.text("Sampler spacing")
    names = {"betas": "beta", "lambdas": "lu"}
    if record.schedule is None and sigma not in (None, "default"):
        record.schedule = names.get(str(sigma), sigma)
    elif record.schedule is None:
        record.schedule = spacing
    if record.sampler is None:
        record.sampler = "checkpoint"  # "Default" is the class of the model's file


def _read_sd_cpp(record: Record, fields: Fields) -> None:
    """Read what stable-diffusion.cpp calls by other names."""
    record.model = record.model or file_name(fields.text("Unet"))
    told = document(fields.left.pop("SDCPP", None))  # the same again, and more
    if isinstance(told, dict):
        record.name({key: told.get(key) for key in ("cache", "video")})
    if (fields.number("Eta") or 0.0) == 0.0:  # "inf": the sampler's own
        fields.left.pop("Eta", None)
    levels = document(fields.left.get("Custom Sigmas"))
    if isinstance(levels, list) and all(number(one) is not None for one in levels):
        record.sigmas, record.steps = [float(one) for one in levels], None
        del fields.left["Custom Sigmas"]


def _tool(version: str | None, fields: Fields) -> tuple[str, str]:
    """Return the program and its kin: "a1111", "comfyui", "diffusers" or "sd.cpp"."""
    said = (version or "").lower()
    if (app := fields.text("App")) is not None and "sd.next" in app.lower():
        return "SD.Next", "diffusers"
    if "stable-diffusion.cpp" in said or "sd.cpp" in said:
        return "stable-diffusion.cpp", "sd.cpp"
    if said.startswith("comfy"):
        return "ComfyUI", "comfyui"
    if any(key.startswith("Civitai ") for key in fields.left):
        return "Civitai", "comfyui"
    if said.startswith("fooocus"):
        return "Fooocus", "comfyui"
    if re.match(r"f\d", said) or "forge" in said or said.startswith(_FORGES):
        return "Forge", "a1111"
    if not said and _is_of_comfyui(fields):
        return "ComfyUI", "comfyui"
    if said.startswith("sd.next") or "Operations" in fields.left:
        return "SD.Next", "diffusers"
    return "AUTOMATIC1111", "a1111"


def _is_of_comfyui(fields: Fields) -> bool:
    """Return True for the text of a saver of ComfyUI, which does not say its program.

    A1111 writes names of models without their endings, and names of samplers with capitals.
    """
    model, sampler = str(fields.left.get("Model", "")), str(fields.left.get("Sampler", ""))
    endings = (".safetensors", ".ckpt", ".gguf", ".sft")
    return model.endswith(endings) or re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)+", sampler) is not None


def _is_modern(version: str | None, schedule: str | None) -> bool:
    """Return True if "Automatic" means the sampler's own schedule: since version 1.9."""
    match = _VERSION.search(version or "")
    if match is not None:
        return (int(match[1]), int(match[2])) >= (1, 9)
    return (schedule or "").lower() == "automatic" or (version or "").lower().startswith(_FORGES)


def _read_noise(record: Record, fields: Fields, kin: str) -> None:
    """Read what drew the noise."""
    record.seed_order = "diffusers" if kin == "diffusers" else "a1111"
    record.rng, record.sampler_rng = ("cpu", "gpu") if kin == "comfyui" else ("gpu", None)
    said = fields.text("RNG")
    if said is not None:
        record.rng = _RNG.get(said.lower())
        record.sampler_rng = None
        if record.rng is None:
            record.name({"RNG": said})
    said = fields.text("Sampler RNG")
    if said is not None:
        record.sampler_rng = _RNG.get(said.lower())
    seed, share = fields.whole("Variation seed"), fields.number("Variation seed strength")
    if share is not None and not 0.0 <= share <= 1.0:
        record.name({"Variation seed": seed, "Variation seed strength": share})
    elif share:
        record.vary = seed or 0, share
    if (found := fields.size("Seed resize from")) is not None and min(found) > 0:
        record.noise_size = found[1], found[0]


def _read_passes(record: Record, fields: Fields) -> None:
    """Read an image that was started from, or a second pass: both have a strength."""
    strength = fields.number("Denoising strength")
    scale, resized = fields.number("Hires upscale"), fields.size("Hires resize")
    if resized is not None and record.width and record.height:
        scales = resized[0] / record.width, resized[1] / record.height
        if 0 in resized:
            scale = max(scales)
        elif abs(scales[0] / scales[1] - 1) < 0.02:
            scale = sum(scales) / 2
        else:
            record.name({"Hires resize": f"{resized[0]}x{resized[1]}"})
    old = fields.size("First pass size")
    if scale is not None and scale > 1.0:
        record.hires, record.hires_strength = scale, strength
        record.hires_steps = fields.whole("Hires steps") or record.steps
        upscaler = fields.text("Hires upscaler")
        record.hires_upscaler = _UPSCALERS.get((upscaler or "").lower())
        guidance = fields.number("Hires CFG Scale")
        if guidance != record.guidance:
            record.name({"Hires CFG Scale": guidance})
        if scale.is_integer() and (upscaler or "").lower() == "latent (nearest-exact)":
            record.hires_upscaler = "latent-nearest"  # the same at a whole scale
        if record.hires_upscaler is None:
            record.name({"Hires upscaler": upscaler})
    elif old is not None or scale or any(key.startswith("Hires ") for key in fields.left):
        record.name({"Denoising strength": strength, "Hires upscale": scale})
        if old is not None:
            record.name({"First pass size": f"{old[0]}x{old[1]}"})
    elif strength is not None and fields.left.get("Operations") != "txt2img":
        record.strength, record.image = strength, UNNAMED
        masked = ("Mask blur", "Inpaint area", "Masked content", "Mask mode", "Mask alpha")
        if any(key in fields.left for key in masked):
            record.mask = UNNAMED


def _are_called(hashes: Any, prompt: str) -> bool:
    """Return True if tags in the prompt call all LoRAs that have a hash."""
    if not isinstance(hashes, str):
        return False
    called = {name.strip() for name in _LORA_TAG.findall(prompt)}
    names = {one.partition(":")[0].strip() for one in hashes.split(",")}
    return bool(names) and names <= called
