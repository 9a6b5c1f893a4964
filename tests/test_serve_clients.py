"""Clients that others wrote, against the running server and the built-in model."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving import FakePipeline, Server, fake, running

import mlxdiff
from mlxdiff.pictures import metadata
from mlxdiff.serve.shelf import Shelf

__all__ = ["fake"]

PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("gallery")) as one:
        yield one


@pytest.fixture(scope="module")
def drawn() -> Image.Image:
    """What the library draws."""
    return mlxdiff.load().generate(PROMPT, seed=7, steps=2).images[0]


def same(one: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(one.convert("RGB")), np.asarray(other.convert("RGB")))


def file_of(image: Image.Image) -> io.BytesIO:
    data = io.BytesIO()
    image.save(data, "PNG")
    data.seek(0)
    data.name = "picture.png"
    return data


# OpenAI's own client


@pytest.fixture(scope="module")
def openai(server: Server) -> Any:
    module = pytest.importorskip("openai")
    with module.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def opened(answer: Any) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))


def test_openai_generates_what_the_library_draws(openai: Any, drawn: Image.Image) -> None:
    answer = openai.images.generate(
        prompt=PROMPT,
        model="builtin",
        size="64x64",
        n=2,
        quality="auto",
        user="me",
        extra_body={"seed": 7, "steps": 2},
    )
    assert len(answer.data) == 2 and same(opened(answer), drawn)


def test_openai_gives_addresses(openai: Any, server: Server) -> None:
    answer = openai.images.generate(
        prompt=PROMPT, response_format="url", extra_body={"steps": 1, "seed": 1}
    )
    url = answer.data[0].url
    assert url.startswith(server.url)
    assert server.ask("GET", url.removeprefix(server.url))[0] == 200


def test_openai_chooses_the_format(openai: Any, drawn: Image.Image) -> None:
    how = {"prompt": PROMPT, "output_format": "webp", "output_compression": 100}
    answer = openai.images.generate(**how, extra_body={"seed": 7, "steps": 2})
    picture = opened(answer)
    assert picture.format == "WEBP" and same(picture, drawn)  # lossless at 100
    assert metadata.of_picture(picture, "x").seed == 7


def test_openai_edits(openai: Any, drawn: Image.Image) -> None:
    mask = Image.new("RGBA", drawn.size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    answer = openai.images.edit(
        image=file_of(drawn),
        mask=file_of(mask),
        prompt="a green circle",
        extra_body={"steps": 2, "seed": 1, "paste_original": True},
    )
    edited = np.asarray(opened(answer))
    before = np.asarray(drawn)
    assert np.array_equal(edited[:, 40:], before[:, 40:])
    assert not np.array_equal(edited[:, :24], before[:, :24])


def test_openai_varies(openai: Any, drawn: Image.Image, server: Server) -> None:
    with pytest.warns(DeprecationWarning):  # OpenAI has retired its own
        answer = openai.images.create_variation(image=file_of(drawn), extra_body={"steps": 2})
    assert opened(answer).size == (64, 64)
    job = server.engine.jobs()[-1]
    assert job.drawn[0].metadata["strength"] == 0.6 and job.drawn[0].metadata["prompt"] == ""


def test_openai_lists_models(openai: Any) -> None:
    assert "builtin" in [model.id for model in openai.models.list()]
    assert openai.models.retrieve("builtin").owned_by == "mlxdiff"


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"quality": "hd"}, "quality"),
        ({"style": "natural"}, "style"),
        ({"background": "transparent"}, "background"),
        ({"size": "huge"}, "size"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 101}, "output_compression"),
        ({"n": 0}, "count"),
        ({"extra_body": {"steps": "many"}}, "steps"),
    ],
)
def test_openai_errors_name_the_field(openai: Any, given: dict[str, Any], param: str) -> None:
    module = pytest.importorskip("openai")
    with pytest.raises(module.BadRequestError) as refused:
        openai.images.generate(prompt=PROMPT, **given)
    assert refused.value.param == param and refused.value.type == "invalid_request_error"


def test_openai_errors_of_other_kinds(openai: Any) -> None:
    module = pytest.importorskip("openai")
    with pytest.raises(module.NotFoundError) as refused:
        openai.images.generate(prompt=PROMPT, model="dall-e-3")
    assert refused.value.code == "model_not_found"
    with pytest.raises(module.NotFoundError):
        openai.models.retrieve("other")
    with pytest.raises(module.BadRequestError, match="multiple of"):
        openai.images.generate(prompt=PROMPT, size="65x64")


def test_openai_is_told_of_a_full_queue(tmp_path: Path, fake: type[FakePipeline]) -> None:
    module = pytest.importorskip("openai")
    with running(tmp_path, queue_length=1) as server:
        for _ in range(2):
            server.ask("POST", "/api/jobs", {"prompt": "slow", "steps": 200})
            while server.engine.current is None:
                time.sleep(0.005)
        with module.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            with pytest.raises(module.RateLimitError) as refused:
                client.images.generate(prompt="a")
        assert int(refused.value.response.headers["retry-after"]) >= 1
        for job in server.engine.jobs():
            server.engine.cancel(job)


# webuiapi, a client of A1111's web UI


@pytest.fixture(scope="module")
def webui(server: Server) -> Any:
    module = pytest.importorskip("webuiapi")
    client = module.WebUIApi(port=server.port, sampler="Euler a", steps=2)
    yield client
    client.session.close()


def test_webui_draws_what_the_library_draws(webui: Any) -> None:
    result = webui.txt2img(prompt=PROMPT, seed=7, cfg_scale=4, width=64, height=64)
    expected = mlxdiff.load().generate(
        PROMPT, seed=7, steps=2, guidance=4.0, sampler="euler-a", prompt_syntax="a1111"
    )
    assert same(result.image, expected.images[0])
    assert result.info["all_seeds"] == [7] and result.info["sampler_name"] == "Euler a"
    assert webui.png_info(result.image).info.startswith(PROMPT)


def test_webui_varies_a_seed_and_tiles(webui: Any) -> None:
    """Variation seeds, the size of the noise and seamless edges are the library's."""
    given = {"prompt": PROMPT, "steps": 2, "seed": 7, "sampler_name": "Euler", "cfg_scale": 7}
    given |= {"width": 64, "height": 64}
    pipe = mlxdiff.load(backend="numpy")
    for asked, ours in (
        ({"subseed": 3, "subseed_strength": 0.3}, {"vary": (3, 0.3)}),
        ({"seed_resize_from_h": 32, "seed_resize_from_w": 48}, {"noise_size": (32, 48)}),
        ({"tiling": True}, {"seamless": "xy"}),
    ):
        expected = pipe.generate(
            PROMPT, steps=2, seed=7, sampler="euler", guidance=7, prompt_syntax="a1111", **ours
        )
        assert same(webui.txt2img(**given, **asked).image, expected.images[0]), asked


def test_webui_starts_from_a_picture(webui: Any, drawn: Image.Image) -> None:
    result = webui.img2img(
        images=[drawn], prompt=PROMPT, seed=1, width=64, height=64, denoising_strength=0.5, n_iter=2
    )
    assert len(result.images) == 2


@pytest.mark.parametrize("part", [False, True])
def test_webui_inpaints(webui: Any, drawn: Image.Image, part: bool) -> None:
    drawn = drawn.resize((96, 80))
    mask = Image.new("L", drawn.size)
    mask.paste(255, (0, 0, 32, 64))
    result = webui.img2img(
        images=[drawn],
        mask_image=mask,
        mask_blur=0,
        inpainting_fill=1,
        inpaint_full_res=part,
        inpaint_full_res_padding=4,
        prompt=PROMPT,
        width=64,
        height=64,
    )
    assert result.image.size == (drawn.size if part else (64, 64))


def test_webui_enlarges(webui: Any, drawn: Image.Image) -> None:
    enlarged = webui.extra_single_image(drawn, upscaling_resize=2, upscaler_1="Lanczos")
    assert enlarged.image.size == (128, 128)


def test_webui_chooses_the_format_and_a_refiner(webui: Any, server: Server) -> None:
    override = {"samples_format": "jpg", "jpeg_quality": 95}
    size = {"width": 64, "height": 64}
    result = webui.txt2img(prompt=PROMPT, steps=2, seed=7, **size, override_settings=override)
    with Image.open(io.BytesIO(base64.b64decode(result.json["images"][0]))) as picture:
        assert picture.format == "JPEG"
        assert metadata.of_picture(picture, "x").prompt == PROMPT
    body = {"prompt": PROMPT, **size, "refiner_checkpoint": "builtin", "refiner_switch_at": 0.8}
    status, answer, _ = server.ask("POST", "/sdapi/v1/txt2img", body)
    assert status == 422 and "refiner" in answer["detail"]  # the model has no part for one


def test_webui_lists(webui: Any) -> None:
    assert "builtin" in webui.util_get_model_names()
    assert "Euler a" in webui.util_get_sampler_names()
    assert "karras" in [one["name"] for one in webui.get_schedulers()]
    assert webui.get_loras() == [] and webui.get_sd_vae() == []
    assert webui.get_embeddings() == {"loaded": {}, "skipped": {}}
    assert webui.get_options()["sd_model_checkpoint"] == "builtin"
    webui.set_options({"sd_model_checkpoint": "builtin", "CLIP_stop_at_last_layers": 1})
    assert webui.util_get_current_model() == "builtin"
    assert webui.get_progress()["state"]["job_count"] == 0
    assert webui.controlnet_model_list() == [] and webui.controlnet_version() == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"restore_faces": True}, "restore_faces"),
        ({"sampler_name": "DPM adaptive"}, "sampler_name"),
        ({"scheduler": "Turbo"}, "scheduler"),
        ({"subseed": 3, "subseed_strength": 1.5}, "vary"),
        ({"styles": ["anime"]}, "styles"),
        ({"eta": 0.5}, "eta"),
        ({"script_name": "X/Y/Z plot"}, "script_name"),
        ({"override_settings": {"sd_model_checkpoint": "other"}}, "other"),
        ({"override_settings": {"face_restoration": True}}, "face_restoration"),
        ({"alwayson_scripts": {"reactor": {"args": [True]}}}, "reactor"),
        ({"batch_size": 10**9}, "batch_size"),
    ],
)
def test_webui_is_told_what_is_not_here(webui: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        webui.txt2img(prompt=PROMPT, **given)


def test_webui_progress_skip_and_interrupt(tmp_path: Path, fake: type[FakePipeline]) -> None:
    module = pytest.importorskip("webuiapi")
    with running(tmp_path) as server:
        client = module.WebUIApi(port=server.port, steps=300)
        results: list[Any] = []

        def draw() -> None:
            try:
                results.append(client.txt2img(prompt="slow", n_iter=2, seed=5))
            except RuntimeError as error:
                results.append(error)

        def reached(picture: int) -> dict[str, Any]:
            until = time.monotonic() + 60
            while time.monotonic() < until:
                _, found, _ = server.ask("GET", "/sdapi/v1/progress")
                at = found["state"]["job_no"], found["state"]["sampling_step"]
                if found["current_image"] and at[0] == picture and at[1] > 2:
                    return found
            raise TimeoutError(picture)

        thread = threading.Thread(target=draw)
        thread.start()
        found = reached(0)
        assert 0 < found["progress"] < 0.5 and found["eta_relative"] > 0
        server.ask("POST", "/sdapi/v1/skip")
        reached(1)
        server.ask("POST", "/sdapi/v1/interrupt")
        thread.join(20)
        client.session.close()
        assert len(results) == 1 and results[0].images == []


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def equipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the LoRA and the ControlNet of the examples."""
    loras = EXAMPLES / "train_lora"
    shelf = Shelf((), {"loras": [loras], "controlnets": [EXAMPLES / "train_control"]})
    folder = tmp_path_factory.mktemp("equipped")
    with running(folder, shelf=shelf, loading={"lora_folder": loras}) as one:
        yield one


def test_webui_draws_with_a_lora_of_the_prompt(equipped: Server) -> None:
    module = pytest.importorskip("webuiapi")
    client = module.WebUIApi(port=equipped.port, sampler="Euler", steps=2)
    prompt = f"{PROMPT} <lora:outline:0.8>"
    result = client.txt2img(prompt=prompt, seed=7, cfg_scale=4, width=64, height=64)
    pipe = mlxdiff.load(lora_folder=EXAMPLES / "train_lora")
    expected = pipe.generate(
        prompt, seed=7, steps=2, guidance=4.0, sampler="euler", prompt_syntax="a1111"
    )
    assert same(result.image, expected.images[0])
    assert [one["name"] for one in client.get_loras()] == ["outline"]
    client.session.close()


def test_webui_draws_with_a_controlnet(equipped: Server, drawn: Image.Image) -> None:
    module = pytest.importorskip("webuiapi")
    client = module.WebUIApi(port=equipped.port, sampler="Euler", steps=2)
    assert client.controlnet_model_list() == ["edges"]
    unit = module.ControlNetUnit(image=drawn, module="canny", model="edges", weight=0.9)
    result = client.txt2img(
        prompt=PROMPT, seed=7, cfg_scale=4, width=64, height=64, controlnet_units=[unit]
    )
    pipe = mlxdiff.load(controlnets=EXAMPLES / "train_control/edges")
    expected = pipe.generate(
        PROMPT,
        seed=7,
        steps=2,
        guidance=4.0,
        sampler="euler",
        prompt_syntax="a1111",
        control_image=drawn,
        control_scale=0.9,
        control_preprocess="edges",
    )
    assert same(result.image, expected.images[0])
    client.session.close()


def test_own_api_draws_with_a_lora(equipped: Server) -> None:
    lora = {"name": "outline", "scale": 0.8}
    given = {"prompt": PROMPT, "seed": 7, "steps": 2, "loras": [lora]}
    job = equipped.finished(equipped.ask("POST", "/api/jobs", given)[1]["id"])
    data = equipped.ask("GET", f"/api/pictures/{job['drawn'][0]['id']}.png")[1]
    pipe = mlxdiff.load(loras=[(EXAMPLES / "train_lora/outline.safetensors", 0.8)])
    expected = pipe.generate(PROMPT, seed=7, steps=2).images[0]
    assert same(Image.open(io.BytesIO(data)), expected)


def test_webui_controlnet_units_are_named(server: Server) -> None:
    unit = {"model": "edges", "image": "x", "weight": 1.0, "module": "none"}
    body = {"prompt": PROMPT, "alwayson_scripts": {"controlnet": {"args": [unit]}}}
    status, answer, _ = server.ask("POST", "/sdapi/v1/txt2img", body)
    assert status == 404 and "controlnet 'edges'" in answer["detail"]


def test_json_of_everything(server: Server) -> None:
    for path in ("/api/capabilities", "/api/capabilities?model=builtin", "/api/openapi.json"):
        assert json.dumps(server.ask("GET", path)[1])
