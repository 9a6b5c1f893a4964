"""The interface of AUTOMATIC1111's web UI, ``/sdapi/v1``, as far as mlxdiff can honour it.

Clients send dozens of fields, most at the values that ask for nothing. Each field is taken, or is
neutral, or is an error that names it. Source: stable-diffusion-webui, modules/api/models.py and
modules/api/api.py; sd-webui-controlnet, its API page.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import secrets
import time
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlxdiff.errors import UsageError
from mlxdiff.pictures import encoded, formats, metadata
from mlxdiff.pictures.image import png_bytes
from mlxdiff.pictures.metadata import UPSCALER_NAMES
from mlxdiff.samplers import SAMPLERS
from mlxdiff.samplers.names import SAMPLER_NAMES, SCHEDULE_NAMES
from mlxdiff.serve.desk import Desk, Endpoint, json_body
from mlxdiff.serve.engine import Job
from mlxdiff.serve.request import picture_of

LANCZOS = "Lanczos"
_ROOT = "/sdapi/v1"

# Fields that ask for nothing at these values; None always does.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "styles": ([],),
    "restore_faces": (False,),
    "do_not_save_grid": (True, False),
    "s_min_uncond": (0,),
    "s_churn": (0,),
    "s_tmax": (0, float("inf")),
    "s_tmin": (0,),
    "s_noise": (1,),
    "override_settings_restore_afterwards": (True, False),
    "disable_extra_networks": (False,),
    "firstpass_image": ("",),
    "firstphase_width": (0,),
    "firstphase_height": (0,),
    "comments": ({},),
    "force_task_id": ("",),
    "infotext": ("",),
    "script_name": ("", "None"),
    "script_args": ([],),
    "hr_resize_x": (0,),
    "hr_resize_y": (0,),
    "hr_checkpoint_name": ("", "Use same checkpoint"),
    "hr_sampler_name": ("", "Use same sampler"),
    "hr_scheduler": ("", "Use same scheduler"),
    "hr_prompt": ("",),
    "hr_negative_prompt": ("",),
    "mask_blur": (0,),
    "mask_blur_x": (0, 4),
    "mask_blur_y": (0, 4),
    "mask_round": (True,),
    "inpainting_fill": (1,),
    "inpaint_full_res": (False, 0),
    "inpaint_full_res_padding": (0, 32),
    "initial_noise_multiplier": (1,),
    "latent_mask": ("",),
    "include_init_images": (False, True),
}
_NO_MASK = {"mask_blur", "inpainting_fill", "inpaint_full_res", "inpaint_full_res_padding"}
"""Fields of masks: without a mask, any value asks for nothing."""

_EXTRAS_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "show_extras_results": (True, False),
    "gfpgan_visibility": (0,),
    "codeformer_visibility": (0,),
    "codeformer_weight": (0,),
    "upscaler_2": ("None", "", LANCZOS),
    "extras_upscaler_2_visibility": (0,),
    "upscale_first": (False, True),
}
_SAMPLERS = {name.lower(): one for one, name in SAMPLER_NAMES.items()} | {
    one: one for one in SAMPLER_NAMES
}
_SCHEDULES = (
    {name.lower(): one for one, name in SCHEDULE_NAMES.items()}
    | {one: one for one in SCHEDULE_NAMES}
    | {"automatic": "auto", "": "auto", "uniform": "normal", "sgm_uniform": "sgm-uniform"}
    | {"align_your_steps": "ays"}
)
_UPSCALERS = {name.lower(): one for one, name in UPSCALER_NAMES.items()} | {
    "latent (nearest-exact)": "latent-nearest",
    "none": "lanczos",
}


class A1111API:
    """Handlers of ``/sdapi/v1`` and ``/controlnet``.

    Args:
        desk: of the server.
    """

    def __init__(self, desk: Desk) -> None:
        self.desk, self.engine, self.shelf = desk, desk.engine, desk.shelf
        self._model = desk.shelf.default
        self._vae = "Automatic"
        self._clip_skip = 1
        self._format, self._quality = "png", formats.QUALITY

    def endpoints(self) -> list[Endpoint]:
        """All entries of the interface."""

        def get(name: str, handler: Any, summary: str, root: str = _ROOT) -> Endpoint:
            return Endpoint("GET", f"{root}/{name}", handler, f"A1111: {summary}")

        def post(name: str, handler: Any, summary: str, root: str = _ROOT) -> Endpoint:
            body = {"type": "object"}
            return Endpoint("POST", f"{root}/{name}", handler, f"A1111: {summary}", body)

        return [
            post("txt2img", self.txt2img, "draw from a prompt."),
            post("img2img", self.img2img, "draw from a picture."),
            get("progress", self.progress, "how far the picture is."),
            post("interrupt", self.interrupt, "cancel what is being drawn."),
            post("skip", self.skip, "go on with the next picture."),
            get("options", self.options, "model and other choices."),
            post("options", self.set_options, "change them."),
            get("samplers", self.samplers, "list samplers."),
            get("schedulers", self.schedulers, "list schedules."),
            get("upscalers", self.upscalers, "list what enlarges."),
            get("latent-upscale-modes", self.latent_modes, "list what enlarges latents."),
            get("sd-models", self.models, "list models."),
            get("sd-vae", self.vaes, "list VAEs."),
            get("loras", self.loras, "list LoRAs."),
            get("embeddings", self.embeddings, "list textual inversions."),
            get("hypernetworks", self.none, "there are none."),
            get("face-restorers", self.none, "there are none."),
            get("realesrgan-models", self.none, "there are none."),
            get("prompt-styles", self.none, "there are none."),
            get("scripts", self.scripts, "list scripts."),
            get("cmd-flags", self.flags, "nothing."),
            get("memory", self.flags, "nothing."),
            post("refresh-checkpoints", self.refresh, "nothing: lists are always fresh."),
            post("refresh-loras", self.refresh, "nothing: lists are always fresh."),
            post("refresh-vae", self.refresh, "nothing: lists are always fresh."),
            post("png-info", self.png_info, "how a picture was made."),
            post("extra-single-image", self.extra, "enlarge a picture with Lanczos' filter."),
            get("version", self.control_version, "version of the interface.", "/controlnet"),
            get("model_list", self.control_models, "list ControlNets.", "/controlnet"),
            get("module_list", self.control_modules, "list preprocessors.", "/controlnet"),
        ]

    # Drawing

    async def txt2img(self, request: Request) -> Response:
        given = await json_body(request)
        asked, send = await asyncio.to_thread(self._asked, given, False)
        return await self._draw(asked, given, send, request)

    async def img2img(self, request: Request) -> Response:
        given = await json_body(request)
        asked, send = await asyncio.to_thread(self._asked, given, True)
        return await self._draw(asked, given, send, request)

    async def _draw(
        self, asked: dict[str, Any], given: dict[str, Any], send: bool, request: Request
    ) -> Response:
        job = await self.desk.draw(asked, request)
        hidden = ("init_images", "mask", "alwayson_scripts")
        first = job.drawn[0].metadata if job.drawn else {}
        info = {
            "prompt": asked["prompt"],
            "all_prompts": [asked["prompt"]] * len(job.drawn),
            "negative_prompt": asked.get("negative_prompt") or "",
            "seed": job.seeds[0],
            "all_seeds": [one.seed for one in job.drawn],
            "width": first.get("width"),
            "height": first.get("height"),
            "steps": first.get("steps"),
            "cfg_scale": first.get("guidance"),
            "sampler_name": SAMPLER_NAMES.get(str(first.get("sampler")), first.get("sampler")),
            "sd_model_name": job.order.model if job.order else None,
            "infotexts": [one.parameters for one in job.drawn],
            "job_timestamp": _stamp(job.created),
            "version": first.get("version"),
        }
        images = await asyncio.to_thread(self._files, job, given) if send else []
        return JSONResponse(
            {
                "images": images,
                "parameters": {k: v for k, v in given.items() if k not in hidden},
                "info": json.dumps(info),
            }
        )

    def _files(self, job: Job, given: Mapping[str, Any]) -> list[str]:
        """The pictures in the format of the options, in base64."""
        settings = self._settings() | (given.get("override_settings") or {})
        ending, quality = f".{settings['samples_format']}", settings["jpeg_quality"]
        return [
            base64.b64encode(formats.reencode(one.png, ending, quality)).decode()
            for one in job.drawn
        ]

    def _asked(self, given: Mapping[str, Any], from_picture: bool) -> tuple[dict[str, Any], bool]:
        """A request in our own form, and whether to send the pictures. Raises: UsageError."""
        left = {name: value for name, value in given.items() if value is not None}
        take = left.pop
        asked: dict[str, Any] = {
            "prompt": take("prompt", ""),
            "negative_prompt": take("negative_prompt", "") or None,
            "prompt_syntax": "a1111",
            "steps": take("steps", None),
            "guidance": take("cfg_scale", None),
            "width": take("width", None),
            "height": take("height", None),
            "seed": take("seed", -1),
            "count": _whole("batch_size", take("batch_size", 1))
            * _whole("n_iter", take("n_iter", 1)),
            "save": take("save_images", False) and not take("do_not_save_samples", False),
        }
        take("do_not_save_samples", None)
        send = bool(take("send_images", True))
        index, name = take("sampler_index", None), take("sampler_name", None)
        asked["sampler"], schedule = _sampler(name or index)
        asked["schedule"] = _schedule(take("scheduler", None)) or schedule
        asked |= self._overridden(take("override_settings", {}))
        asked |= self._scripts(take("alwayson_scripts", {}))
        asked |= self._refiner(take("refiner_checkpoint", None), take("refiner_switch_at", None))
        asked["embeddings"] = self._words_of(asked["prompt"], asked["negative_prompt"])
        asked |= _first_noise(left)
        strength = take("denoising_strength", None)
        if from_picture:
            asked |= self._from_picture(left)
            asked["strength"] = 0.75 if strength is None else strength
            guidance = take("image_cfg_scale", None)
            if guidance not in (None, 0, 1.5):
                asked["image_guidance"] = guidance
        hires = take("enable_hr", False)
        scale, upscaler = take("hr_scale", 2.0), take("hr_upscaler", "Latent")
        second = take("hr_second_pass_steps", 0)
        if hires:
            asked["hires_steps"] = second or None
            asked["hires"] = scale
            asked["hires_strength"] = strength
            asked["hires_upscaler"] = _known(_UPSCALERS, "hr_upscaler", upscaler)
        eta = take("eta", None)
        if asked["sampler"] in SAMPLERS and SAMPLERS[asked["sampler"]].scheduler.has_eta:
            asked["eta"] = eta
        elif _is_ancestral(asked["sampler"]) and eta not in (None, 1):
            raise UsageError(f"eta is {eta!r}, which {asked['sampler']} does not take; send 1")
        neutral = {
            key: value for key, value in left.items() if "mask" in asked or key not in _NO_MASK
        }
        _check_neutral(neutral, _NEUTRAL)
        return asked, send

    def _from_picture(self, left: dict[str, Any]) -> dict[str, Any]:
        """The picture and the mask of img2img. Takes its fields out of ``left``."""
        images = left.pop("init_images", [])
        if not isinstance(images, list) or len(images) != 1:
            raise UsageError("init_images: expected one picture")
        limits = self.desk.limits
        picture = encoded.opaque(picture_of(images[0], "init_images", limits))
        width, height = left.get("width"), left.get("height")
        found: dict[str, Any] = {"image": picture}
        mode = left.pop("resize_mode", 0)
        if mode not in (0, 1, 2):
            raise UsageError(f"resize_mode is {mode!r}; expected 0, 1 or 2")
        if mode and isinstance(width, int) and isinstance(height, int):
            found["image"] = encoded.fit(picture, width, height, fill=mode == 2)
        if (mask := left.pop("mask", None)) is not None:
            shown = picture_of(mask, "mask", limits)
            flip = left.pop("inpainting_mask_invert", 0)
            found["mask"] = encoded.inverted(shown) if flip else shown.convert("L")
            padding = left.pop("inpaint_full_res_padding", 0)
            if left.pop("inpaint_full_res", False):
                found["only_masked"] = padding
        left.pop("inpainting_mask_invert", None)
        return found

    def _refiner(self, name: Any, switch: Any) -> dict[str, Any]:
        """A model that draws the last part, from a share of the steps on."""
        if name in (None, "", "None"):
            return {}
        return {"refiner": self._model_named(name), "denoising_end": switch}

    def _words_of(self, *prompts: Any) -> list[str]:
        """Names of textual inversions that stand in a prompt: A1111 loads them all."""
        text = "\n".join(one for one in prompts if isinstance(one, str))
        return [
            name
            for name in self.shelf.names("embeddings")
            if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)
        ]

    def _overridden(self, given: Any) -> dict[str, Any]:
        """Join the options set for every picture with those of a request."""
        if not isinstance(given, dict):
            raise UsageError("override_settings: expected an object")
        settings = self._settings() | given
        self._check_settings(given)
        skip = settings["CLIP_stop_at_last_layers"]
        chosen: dict[str, Any] = {"model": self._model_named(settings["sd_model_checkpoint"])}
        if skip > 1:
            chosen["clip_skip"] = skip - 1
        if settings["sd_vae"] not in ("Automatic", "None", "", None):
            chosen["vae"] = settings["sd_vae"]
        return chosen

    def _scripts(self, given: Any) -> dict[str, Any]:
        """ControlNet's units. Raises: UsageError for another script that does something."""
        if not isinstance(given, dict):
            raise UsageError("alwayson_scripts: expected an object")
        units: list[Any] = []
        for name, value in given.items():
            args = value.get("args", []) if isinstance(value, dict) else value
            if name.lower() == "controlnet":
                units = [one for one in args if isinstance(one, dict) and one.get("enabled", True)]
            elif args not in ([], [False]):
                raise UsageError(f"alwayson_scripts: {name!r} is not here; leave it out")
        if not units:
            return {}
        found = [_unit(unit, index) for index, unit in enumerate(units)]
        return {
            "controlnets": [one["model"] for one in found],
            "control_image": [one["image"] for one in found],
            "control_scale": [one["weight"] for one in found],
            "control_start": [one["start"] for one in found],
            "control_end": [one["end"] for one in found],
            "control_preprocess": [one["module"] for one in found],
            "guess_mode": any(one["guess"] for one in found),
        }

    # The job that is being drawn

    async def progress(self, request: Request) -> Response:
        job = self.engine.current
        if job is None:
            return JSONResponse(_progress(0.0, 0.0, _state(None)))
        job.wants_preview()
        asked_for = request.query_params.get("skip_current_image", "false") != "true"
        preview = job.preview if asked_for else None
        image = None if preview is None else base64.b64encode(preview).decode()
        return JSONResponse(_progress(job.progress, job.seconds_left or 0.0, _state(job), image))

    async def interrupt(self, request: Request) -> Response:
        if (job := self.engine.current) is not None:
            self.engine.cancel(job)
        return JSONResponse({})

    async def skip(self, request: Request) -> Response:
        if (job := self.engine.current) is not None:
            job.skip()
        return JSONResponse({})

    # Choices

    def _settings(self) -> dict[str, Any]:
        return {
            "sd_model_checkpoint": self._model,
            "sd_vae": self._vae,
            "CLIP_stop_at_last_layers": self._clip_skip,
            "samples_format": self._format,
            "jpeg_quality": self._quality,
            "eta_noise_seed_delta": 0,
        }

    async def options(self, request: Request) -> Response:
        return JSONResponse(self._settings())

    async def set_options(self, request: Request) -> Response:
        given = await json_body(request)
        self._check_settings(given)
        settings = self._settings() | given
        self._model = self._model_named(settings["sd_model_checkpoint"])
        self._vae, self._clip_skip = settings["sd_vae"], settings["CLIP_stop_at_last_layers"]
        self._format, self._quality = settings["samples_format"], settings["jpeg_quality"]
        return JSONResponse(None)

    def _check_settings(self, given: Mapping[str, Any]) -> None:
        written = tuple(ending.removeprefix(".") for ending in formats.ENDINGS)
        fixed = {"samples_format": written, "eta_noise_seed_delta": (0,)}
        for name, value in given.items():
            if name == "sd_model_checkpoint":
                self._model_named(value)
            elif name == "sd_vae":
                if value not in ("Automatic", "None", "", None):
                    self.shelf.find("vaes", value)
            elif name == "CLIP_stop_at_last_layers":
                if type(value) is not int or not 1 <= value <= 12:
                    raise UsageError(f"{name} is {value!r}; expected a whole number, 1 to 12")
            elif name == "jpeg_quality":
                if type(value) is not int or not 1 <= value <= 100:
                    raise UsageError(f"{name} is {value!r}; expected a whole number, 1 to 100")
            elif name not in fixed:
                raise UsageError(f"there is no option {name!r} here; leave it out")
            elif value not in fixed[name]:
                raise UsageError(f"{name} is {value!r}, which is not here; leave it out")

    def _model_named(self, title: Any) -> str:
        """A model by the title that ``sd-models`` gives it. Raises: UnknownName."""
        name = title.partition(" [")[0] if isinstance(title, str) else title
        if not name:
            return self.shelf.default
        self.shelf.find("models", name)
        return str(name)

    # Lists

    async def samplers(self, request: Request) -> Response:
        listed = [
            {"name": name, "aliases": [one], "options": {}}
            for one, name in SAMPLER_NAMES.items()
            if one != "auto"
        ]
        return JSONResponse(listed)

    async def schedulers(self, request: Request) -> Response:
        return JSONResponse(
            [{"name": one, "label": name, "aliases": []} for one, name in SCHEDULE_NAMES.items()]
        )

    async def upscalers(self, request: Request) -> Response:
        empty = {"model_name": None, "model_path": None, "model_url": None, "scale": 4}
        return JSONResponse([{"name": name} | empty for name in ("None", LANCZOS)])

    async def latent_modes(self, request: Request) -> Response:
        names = [name for name in UPSCALER_NAMES.values() if name != LANCZOS]
        return JSONResponse([{"name": name} for name in names])

    async def models(self, request: Request) -> Response:
        names = await self._names("models")
        empty = {"hash": None, "sha256": None, "config": None}
        return JSONResponse(
            [{"title": one, "model_name": one, "filename": one} | empty for one in names]
        )

    async def vaes(self, request: Request) -> Response:
        names = await self._names("vaes")
        return JSONResponse([{"model_name": name, "filename": name} for name in names])

    async def loras(self, request: Request) -> Response:
        names = await self._names("loras")
        return JSONResponse(
            [{"name": one, "alias": one, "path": one, "metadata": {}} for one in names]
        )

    async def embeddings(self, request: Request) -> Response:
        names = await self._names("embeddings")
        loaded = {one: {"step": None, "shape": None, "vectors": None} for one in names}
        return JSONResponse({"loaded": loaded, "skipped": {}})

    async def none(self, request: Request) -> Response:
        return JSONResponse([])

    async def scripts(self, request: Request) -> Response:
        return JSONResponse({"txt2img": [], "img2img": []})

    async def flags(self, request: Request) -> Response:
        return JSONResponse({})

    async def refresh(self, request: Request) -> Response:
        return JSONResponse(None)

    async def control_version(self, request: Request) -> Response:
        return JSONResponse({"version": 2})

    async def control_models(self, request: Request) -> Response:
        return JSONResponse({"model_list": list(await self._names("controlnets"))})

    async def control_modules(self, request: Request) -> Response:
        return JSONResponse({"module_list": list(_MODULES)})

    async def _names(self, kind: str) -> list[str]:
        return list(await asyncio.to_thread(self.shelf.names, kind))

    # Pictures

    async def png_info(self, request: Request) -> Response:
        given = (await json_body(request)).get("image")
        picture = await asyncio.to_thread(picture_of, given, "image", self.desk.limits)
        try:
            found = metadata.of_picture(picture, "image")
        except UsageError:
            return JSONResponse({"info": "", "items": {}, "parameters": {}})
        text = found.to_parameters()
        return JSONResponse({"info": text, "items": {"parameters": text}, "parameters": {}})

    async def extra(self, request: Request) -> Response:
        given = {k: v for k, v in (await json_body(request)).items() if v is not None}
        image = await asyncio.to_thread(
            picture_of, given.pop("image", None), "image", self.desk.limits
        )
        mode, scale = given.pop("resize_mode", 0), given.pop("upscaling_resize", 2)
        width, height = given.pop("upscaling_resize_w", 512), given.pop("upscaling_resize_h", 512)
        crop, upscaler = given.pop("upscaling_crop", True), given.pop("upscaler_1", "None")
        if upscaler not in ("None", "", LANCZOS):
            raise UsageError(f"upscaler_1 is {upscaler!r}, which is not here; there is {LANCZOS}")
        _check_neutral(given, _EXTRAS_NEUTRAL)
        if mode == 0:
            if type(scale) not in (int, float) or not 0 < scale <= 16:
                raise UsageError(f"upscaling_resize is {scale!r}; expected a number up to 16")
            width, height = round(image.width * scale), round(image.height * scale)
        elif mode != 1 or type(width) is not int or type(height) is not int:
            raise UsageError(f"resize_mode is {mode!r}; expected 0, or 1 with whole sizes")
        if min(width, height) < 1 or width * height > self.desk.limits.upload_pixels:
            raise UsageError(
                f"{width}x{height} is not a size that is drawn; at most "
                f"{self.desk.limits.upload_pixels} pixels"
            )
        png = await asyncio.to_thread(_enlarged, image, width, height, mode == 1 and crop)
        return JSONResponse({"html_info": "", "image": base64.b64encode(png).decode()})


_MODULES = {"none": "none", "canny": "edges", "tile_resample": "tile"}
"""The extension's names of preprocessors -> ours."""
_UNIT = {
    "module", "model", "weight", "image", "input_image", "guidance_start", "guidance_end",
    "control_mode", "enabled", "guessmode",
}  # fmt: skip
_UNIT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "mask": ("",),
    "mask_image": ("",),
    "effective_region_mask": ("",),
    "low_vram": (False, True),
    "lowvram": (False, True),
    "processor_res": (-1, 64, 512),
    "threshold_a": (-1, 64),
    "threshold_b": (-1, 64),
    "pixel_perfect": (False, True),
    "hr_option": ("Both",),
    "save_detected_map": (True, False),
    "input_mode": ("simple",),
    "use_preview_as_input": (False,),
    "resize_mode": (0, "Just Resize", "Resize and Fill", "Crop and Resize", 1, 2),
}


def _unit(unit: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A unit of ControlNet. Raises: UsageError."""
    neutral = {name: value for name, value in unit.items() if name not in _UNIT}
    try:
        _check_neutral(neutral, _UNIT_NEUTRAL, strict=False)
    except UsageError as error:
        raise UsageError(f"controlnet unit {index}: {error}") from None
    image = unit.get("image") or unit.get("input_image")
    if isinstance(image, dict):
        image = image.get("image")
    if not image:
        raise UsageError(f"controlnet unit {index}: image: no picture is sent")
    mode = unit.get("control_mode", 0)
    if mode not in (0, "Balanced", 2, "ControlNet is more important"):
        raise UsageError(f"controlnet unit {index}: control_mode is {mode!r}, which is not here")
    return {
        "model": str(unit.get("model", "")).partition(" [")[0],
        "image": image,
        "weight": unit.get("weight", 1.0),
        "start": unit.get("guidance_start", 0.0),
        "end": unit.get("guidance_end", 1.0),
        "module": _known(_MODULES, "module", unit.get("module") or "none"),
        "guess": mode in (2, "ControlNet is more important") or bool(unit.get("guessmode")),
    }


def _first_noise(left: dict[str, Any]) -> dict[str, Any]:
    """Variation, size of the noise, and edges. Takes their fields out of ``left``."""
    found: dict[str, Any] = {}
    seed, strength = left.pop("subseed", -1), left.pop("subseed_strength", 0)
    if strength:
        found["vary"] = [secrets.randbelow(2**32) if seed == -1 else seed, strength]
    size = [left.pop(f"seed_resize_from_{side}", 0) for side in "hw"]
    if all(isinstance(side, int) and side > 0 for side in size):
        found["noise_size"] = size
    if left.pop("tiling", False):
        found["seamless"] = "xy"
    return found


def _check_neutral(
    given: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], strict: bool = True
) -> None:
    """Refuse a value that asks for what is not here. Raises: UsageError that names the field."""
    for name, value in given.items():
        if name not in neutral and (strict or value):
            raise UsageError(f"there is no field {name!r} here; leave it out")
        if value is not None and name in neutral and value not in neutral[name]:
            raise UsageError(f"{name} is {value!r}, which is not here; leave it out")


def _whole(name: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= 1000:
        raise UsageError(f"{name} is {value!r}; expected a whole number of at least 1")
    return value


def _sampler(name: Any) -> tuple[str, str]:
    """A sampler by A1111's name, which may end in its schedule, as in old versions."""
    if name is None or str(name).lower() in ("automatic", ""):
        return "auto", "auto"
    if not isinstance(name, str):
        raise UsageError(f"sampler_name is {name!r}; expected a name that /samplers lists")
    words = name.lower()
    if words in _SAMPLERS:
        return _SAMPLERS[words], "auto"
    first, _, last = words.rpartition(" ")
    if first in _SAMPLERS and last in _SCHEDULES:
        return _SAMPLERS[first], _SCHEDULES[last]
    raise UsageError(f"sampler_name is {name!r}; expected a name that {_ROOT}/samplers lists")


def _is_ancestral(sampler: str) -> bool:
    """Whether A1111's eta changes a sampler of it, by its name. All others get it in vain."""
    return SAMPLER_NAMES.get(sampler, "").split(" ")[-1] in ("a", "SDE")


def _schedule(name: Any) -> str | None:
    if name is None or str(name).lower() in ("", "automatic"):
        return None
    return _known(_SCHEDULES, "scheduler", name)


def _known(names: Mapping[str, str], field: str, value: Any) -> str:
    found = names.get(value.lower()) if isinstance(value, str) else None
    if found is None:
        raise UsageError(f"{field} is {value!r}; expected one of {', '.join(names)}")
    return found


def _progress(
    share: float, seconds: float, state: dict[str, Any], image: str | None = None
) -> dict[str, Any]:
    return {
        "progress": share,
        "eta_relative": seconds,
        "state": state,
        "current_image": image,
        "textinfo": None,
    }


def _state(job: Job | None) -> dict[str, Any]:
    return {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": "" if job is None else job.id,
        "job_count": 0 if job is None else len(job.seeds),
        "job_timestamp": _stamp(time.time() if job is None else job.created),
        "job_no": 0 if job is None else job.picture,
        "sampling_step": 0 if job is None else job.step,
        "sampling_steps": 0 if job is None else job.steps,
    }


def _stamp(seconds: float) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.localtime(seconds))


def _enlarged(image: Any, width: int, height: int, crop: bool) -> bytes:
    image = encoded.opaque(image)
    if crop:
        return png_bytes(encoded.fit(image, width, height, fill=False))
    return png_bytes(encoded.enlarge(image, width, height))
