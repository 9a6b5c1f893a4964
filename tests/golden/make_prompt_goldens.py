"""Compute the golden pictures of prompts: clip skip, textual inversion, and A1111's syntax.

    python tests/golden/make_prompt_goldens.py

Clip skip and textual inversion are diffusers' own. For A1111's syntax, its arithmetic stands here a
second time, on transformers' tokenizers and text encoders in torch, written from what
modules/prompt_parser.py, modules/sd_hijack_clip.py and modules/sd_emphasis.py of the web UI do and
independent of mlxdiff; the embeddings then go through diffusers' pipeline. What the prompt is at
each step (prompt editing) is written out by hand in TIMELINES.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from make_goldens import load, nhwc
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
START = "a small red circle left of a large blue square on a yellow background"
LONG = ", ".join(
    [
        "a painting of a (lighthouse:1.3) above the sea at sunset",
        "in the style of an old master",
        "a white moon over the [black mountains]",
        "two green triangles below three purple stars",
        "a cat and a dog sleeping beside the fire in a quiet room",
        "warm colours, long shadows, mist",
        "an orange tree in the garden of a stone house",
        "spring morning, wide angle, cinematic",
    ]
)
EDITED = "a [red:green:0.5] circle and a [cat|(dog:1.4)]"


def picture(model: str, prompt: str, syntax: str = "a1111", **arguments: Any) -> dict[str, Any]:
    """Arguments of Pipeline.generate for one case, and beside them the model."""
    usual = {"steps": 4, "guidance": 6.0, "seed": 0, "width": 48, "height": 48}
    usual |= {"sampler": "dpmpp-2m", "schedule": "normal", "prompt_syntax": syntax}
    return {"model": model, "prompt": prompt} | usual | arguments


CASES: dict[str, dict[str, Any]] = {
    "skip-sd15": picture("sd15", START, "plain", clip_skip=1, negative_prompt="blurry"),
    "skip-sd21v": picture("sd21v", START, "plain", clip_skip=2),
    "skip-sdxl": picture("sdxl", START, "plain", clip_skip=1, negative_prompt="blurry"),
    "weights-sd15": picture(
        "sd15",
        r"a (small:0.6) ((red)) circle \(left\) of a [large] blue square",
        negative_prompt="(blurry:1.5), low quality",
    ),
    "weights-sd21v": picture("sd21v", "a (red:1.4) circle, [yellow] background"),
    "weights-sdxl": picture("sdxl", "a (red:1.4) circle, [yellow] background"),
    "long-sd15": picture("sd15", LONG, negative_prompt="blurry, (watermark)"),
    "long-negative-sd21v": picture("sd21v", START, negative_prompt=LONG),
    "long-sdxl": picture(
        "sdxl", LONG, negative_prompt="blurry", prompt_2="a (city:1.2) BREAK mist"
    ),
    "break-skip-sd15": picture("sd15", "a red circle BREAK a (cat:1.2)", clip_skip=1),
    "break-skip-sdxl": picture(
        "sdxl", "a red circle BREAK a (cat:1.2)", clip_skip=1, negative_prompt=""
    ),
    "edited-sd15": picture("sd15", EDITED, steps=6, negative_prompt="[blurry::2] text"),
    "edited-sdxl": picture("sdxl", EDITED, steps=6),
}
TOYS = "a photo of <cat-toy> beside <ink>, on a yellow background"
WORDS = ["cat-toy.safetensors", "ink.pt", "plain.bin:dog-toy"]
CASES |= {
    "words-sd15": picture("sd15", TOYS, "plain", embeddings=WORDS, negative_prompt="dog-toy"),
    "words-a1111-sd15": picture(
        "sd15", "a (<cat-toy>:1.3) beside dog-toy", embeddings=WORDS, negative_prompt="<ink>"
    ),
    "words-sd21v": picture("sd21v", "a photo of wide-toy", "plain", embeddings=["wide-toy.bin"]),
    "words-sdxl": picture(
        "sdxl", "a photo of xl-toy, mist", "plain", embeddings=["xl-toy.safetensors"]
    ),
    "words-a1111-sdxl": picture(
        "sdxl", "a photo of (xl-toy:1.2), mist", embeddings=["xl-toy.safetensors"]
    ),
}
# What the prompt is until which step; the web UI lists every step where there is alternation.
RED, GREEN, CAT, DOG = "a red circle", "a green circle", " and a cat", " and a (dog:1.4)"
TIMELINES: dict[str, list[tuple[int, str]]] = {
    EDITED: [
        (1, RED + CAT),
        (2, RED + DOG),
        (3, RED + CAT),
        (4, GREEN + DOG),
        (5, GREEN + CAT),
        (6, GREEN + DOG),
    ],
    "[blurry::2] text": [(2, "blurry text"), (6, " text")],
}


# ------------------------------------------------------------------------------- textual inversion


def write_words(folder: Path) -> None:
    """Files in the formats of diffusers (with and without brackets, one and several vectors), of
    A1111, of the original code, and for SDXL."""
    generator = torch.Generator().manual_seed(7)

    def randn(*shape: int) -> torch.Tensor:
        return 0.5 * torch.randn(shape, generator=generator)

    save_file({"<cat-toy>": randn(3, 32)}, folder / "cat-toy.safetensors")
    a1111 = {"string_to_token": {"*": 265}, "string_to_param": {"*": randn(2, 32)}}
    a1111 |= {"name": "<ink>", "step": 100, "sd_checkpoint": None, "sd_checkpoint_name": None}
    torch.save(a1111, folder / "ink.pt")
    torch.save({"<plain>": randn(32)}, folder / "plain.bin")
    torch.save({"wide-toy": randn(2, 64).half()}, folder / "wide-toy.bin")
    save_file({"clip_l": randn(2, 32), "clip_g": randn(2, 64)}, folder / "xl-toy.safetensors")
    first = torch.nn.ParameterDict({"*": torch.nn.Parameter(randn(2, 32))})
    torch.save(
        {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": first}, folder / "first.pt"
    )


def read_words(embeddings: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """End of a tokenizer's name -> word -> vectors (N, D)."""
    found: dict[str, dict[str, torch.Tensor]] = {"": {}, "_2": {}}
    for given in embeddings:
        name, _, token = given.partition(":")
        path = HERE / "prompts" / name
        data = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
        if "clip_g" in data:
            found[""][path.stem], found["_2"][path.stem] = data["clip_l"], data["clip_g"]
            continue
        key, rows = next(iter(data.items()))
        if "name" in data:
            key, rows = data["name"], data["string_to_param"]["*"]
        found[""][token or key] = rows.reshape(-1, rows.shape[-1]).float()
    return found


def load_words(pipe: Any, embeddings: list[str]) -> None:
    """Load files with diffusers, which finds out their format where it knows it."""
    for given in embeddings:
        name, _, token = given.partition(":")
        if name.startswith("xl"):
            for suffix, words in read_words([given]).items():
                pipe.load_textual_inversion(
                    words["xl-toy"],
                    token="xl-toy",
                    text_encoder=getattr(pipe, "text_encoder" + suffix),
                    tokenizer=getattr(pipe, "tokenizer" + suffix),
                )
        else:
            folder = str(HERE / "prompts")
            pipe.load_textual_inversion(folder, weight_name=name, token=token or None)


# ------------------------------------------------------------------------------- A1111's arithmetic


def weighted(text: str) -> list[tuple[str, float]]:
    """Letters with weights, by a stack of open brackets; BREAK is a letter of its own."""
    letters: list[list[Any]] = []
    stack: list[tuple[str, int]] = []

    def close(start: int, factor: float) -> None:
        for letter in letters[start:]:
            letter[1] *= factor

    i = 0
    while i < len(text):
        sign = text[i]
        if sign == "\\" and i + 1 < len(text) and text[i + 1] in "()[]\\":
            letters.append([text[i + 1], 1.0])
            i += 1
        elif sign in "([":
            stack.append((sign, len(letters)))
        elif sign in ")]" and stack and stack[-1][0] == {")": "(", "]": "["}[sign]:
            close(stack.pop()[1], {")": 1.1, "]": 1 / 1.1}[sign])
        elif sign == ":" and stack and stack[-1][0] == "(" and text.find(")", i) > 0:
            end = text.find(")", i)
            close(stack.pop()[1], float(text[i + 1 : end]))
            i = end
        elif text.startswith("BREAK", i):
            letters.append(["BREAK", 1.0])
            i += 4
        else:
            letters.append([sign, 1.0])
        i += 1
    return [(letter, weight) for letter, weight in letters]


def tokens(tokenizer: Any, text: str) -> list[tuple[int, float] | None]:
    """Ids and weights of all tokens of a text; None stands for BREAK."""
    result: list[tuple[int, float] | None] = []
    run, weight = "", 1.0
    for letter, its in [*weighted(text), ("", -1.0)]:
        if its != weight or letter == "BREAK":
            ids = tokenizer(run.strip() if letter == "BREAK" else run, add_special_tokens=False)
            result += [(i, weight) for i in ids.input_ids]
            run, weight = "", its
        if letter == "BREAK":
            result.append(None)
        else:
            run += letter
    return result


def with_words(tokenizer: Any, text: str, words: dict[str, torch.Tensor]) -> list[Any]:
    """As ``tokens``, with the vectors of words in place of the tokens of their names."""
    items: list[Any] = tokens(tokenizer, text)
    for word, rows in words.items():
        name = tokenizer(word, add_special_tokens=False).input_ids
        for i in range(len(items)):
            span = [item[0] if item else None for item in items[i : i + len(name)]]
            if not any(isinstance(i, torch.Tensor) for i in span) and span == name:
                items[i : i + len(name)] = [(row, items[i][1]) for row in rows]
    return items


def chunks(
    tokenizer: Any, text: str, words: dict[str, torch.Tensor]
) -> list[tuple[list[Any], list[float]]]:
    """77 ids (or vectors) and weights each, comma backtracking included."""
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    rows: list[list[tuple[Any, float]]] = [[]]
    for item in with_words(tokenizer, text, words):
        if item is None:
            rows.append([])
            continue
        row = rows[-1]
        if len(row) == 75:
            commas = [i for i, (token, _) in enumerate(row) if isinstance(token, int)]
            commas = [i for i in commas if row[i][0] == comma]
            if item[0] != comma and commas and 75 - commas[-1] <= 20:
                rows[-1], rest = row[: commas[-1] + 1], row[commas[-1] + 1 :]
                rows.append(rest)
            else:
                rows.append([])
        rows[-1].append(item)
    if len(rows) > 1 and not rows[-1]:
        rows.pop()
    result = []
    for row in rows:
        pads = 75 - len(row)
        ids = [i for i, _ in row] + [tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * pads
        result.append(
            ([tokenizer.bos_token_id, *ids], [1.0, *(w for _, w in row), *[1.0] * (pads + 1)])
        )
    return result


def forward(encoder: Any, batch: list[list[Any]]) -> Any:
    """The text encoder on ids, with vectors where there are vectors: id 0 under them."""
    ids = [[0 if isinstance(item, torch.Tensor) else item for item in row] for row in batch]

    def put(module: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
        for i, row in enumerate(batch):
            for j, item in enumerate(row):
                if isinstance(item, torch.Tensor):
                    out[i, j] = item
        return out

    hook = encoder.get_input_embeddings().register_forward_hook(put)
    result = encoder(torch.tensor(ids), output_hidden_states=True)
    hook.remove()
    return result


def encode(
    pipe: Any, texts: list[list[str]], clip_skip: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(N, T, D) and pooled (N, P) of N texts that are given once for each text encoder."""
    xl = hasattr(pipe, "text_encoder_2")
    pairs = [(pipe.tokenizer, pipe.text_encoder, pipe.words[""])]
    if xl:
        pairs.append((pipe.tokenizer_2, pipe.text_encoder_2, pipe.words["_2"]))
    found, pooled = [], None
    for (tokenizer, encoder, words), own in zip(pairs, texts, strict=False):
        split = [chunks(tokenizer, text, words) for text in own]
        empty = chunks(tokenizer, "", {})[0]
        length = max(
            len(chunks(pair[0], text, pair[2]))
            for pair, each in zip(pairs, texts, strict=False)
            for text in each
        )
        columns = []
        for k in range(length):
            batch = [one[k] if k < len(one) else empty for one in split]
            out = forward(encoder, [ids for ids, _ in batch])
            skip = clip_skip or 0
            z = out.hidden_states[-2 - skip] if xl else out.hidden_states[-1 - skip]
            z = z if xl else encoder.final_layer_norm(z)
            before = z.mean()
            z = z * torch.tensor([weights for _, weights in batch])[..., None]
            columns.append(z * (before / z.mean()))
            if k == 0 and hasattr(out, "text_embeds"):
                pooled = out.text_embeds
        found.append(torch.cat(columns, dim=1))
    return torch.cat(found, dim=-1), pooled


def lengthened(pipe: Any, z: torch.Tensor, length: int, clip_skip: int | None) -> torch.Tensor:
    """Filled up with chunks of the empty text."""
    empty = encode(pipe, [[""], [""]], clip_skip)[0].repeat(len(z), 1, 1)
    return torch.cat([z, *[empty] * ((length - z.shape[1]) // 77)], dim=1)


def run_a1111(pipe: Any, arguments: dict[str, Any], given: dict[str, Any]) -> Any:
    """diffusers' pipeline on embeddings by A1111's arithmetic, changed at the steps."""
    steps, skip = arguments["steps"], arguments.get("clip_skip")
    prompt, negative = arguments["prompt"], arguments.get("negative_prompt")

    def timeline(first: str, second: str) -> tuple[list[int], torch.Tensor, Any]:
        one = TIMELINES.get(first, [(steps, first)])
        two = one if second == first else [(steps, second)]
        z, pooled = encode(pipe, [[t for _, t in one], [t for _, t in two]], skip)
        return [end for end, _ in one], z, pooled

    ends, z, pooled = timeline(prompt, arguments.get("prompt_2", prompt))
    if negative is None and hasattr(pipe, "text_encoder_2"):
        other_ends, other = [steps], torch.zeros_like(z[:1])
        other_pooled = torch.zeros_like(pooled[:1])
    else:
        other_ends, other, other_pooled = timeline(negative or "", negative or "")
    length = max(z.shape[1], other.shape[1])
    z, other = (lengthened(pipe, one, length, skip) for one in (z, other))

    def at(step: int) -> dict[str, torch.Tensor]:
        i = next(i for i, end in enumerate(ends) if step <= end)
        j = next(j for j, end in enumerate(other_ends) if step <= end)
        now = {"prompt_embeds": z[i : i + 1], "negative_prompt_embeds": other[j : j + 1]}
        if pooled is not None:
            now |= {"pooled_prompt_embeds": pooled[i : i + 1]}
            now |= {"negative_pooled_prompt_embeds": other_pooled[j : j + 1]}
        return now

    last: dict[str, torch.Tensor] = {}

    def change(pipe: Any, step: int, time: Any, state: dict[str, Any]) -> dict[str, Any]:
        last.update(state)
        now = at(min(step + 1, steps - 1))
        both = [now["negative_prompt_embeds"], now["prompt_embeds"]]
        changed = {"prompt_embeds": torch.cat(both)}
        if pooled is not None:
            both = [now["negative_pooled_prompt_embeds"], now["pooled_prompt_embeds"]]
            changed["add_text_embeds"] = torch.cat(both)
        return changed

    inputs = ["latents", "prompt_embeds"] + ["add_text_embeds"] * (pooled is not None)
    images = pipe(
        **at(0),
        **given,
        callback_on_step_end=change,
        callback_on_step_end_tensor_inputs=inputs,
    ).images
    return last["latents"], images


def run(arguments: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Latents (1, h, w, C) and uint8 pictures (1, H, W, 3)."""
    pipe = load(arguments["model"], torch.float32)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    # These versions of diffusers and transformers do not agree on where the final norm is.
    norm = SimpleNamespace(final_layer_norm=pipe.text_encoder.final_layer_norm)
    pipe.text_encoder.text_model = norm
    given = {
        "num_inference_steps": arguments["steps"],
        "guidance_scale": arguments["guidance"],
        "width": arguments["width"],
        "height": arguments["height"],
        "generator": torch.Generator("cpu").manual_seed(arguments["seed"]),
        "output_type": "np",
    }
    embeddings = arguments.get("embeddings", [])
    if arguments["prompt_syntax"] == "a1111":
        pipe.words = read_words(embeddings)
        latents, images = run_a1111(pipe, arguments, given)
    else:
        load_words(pipe, embeddings)
        last: dict[str, torch.Tensor] = {}

        def keep(pipe: Any, step: int, time: Any, state: dict[str, Any]) -> dict[str, Any]:
            last.update(state)
            return state

        images = pipe(
            arguments["prompt"],
            negative_prompt=arguments.get("negative_prompt"),
            clip_skip=arguments.get("clip_skip"),
            callback_on_step_end=keep,
            **given,
        ).images
        latents = last["latents"]
    return nhwc(latents), (images * 255).round().astype(np.uint8)


@torch.no_grad()
def main() -> None:
    """Write prompts/cases.json and prompts/pictures.npz, and the files of words."""
    folder = HERE / "prompts"
    folder.mkdir(exist_ok=True)
    write_words(folder)
    pictures: dict[str, np.ndarray] = {}
    for case, arguments in CASES.items():
        pictures[f"{case}/latents"], pictures[f"{case}/image"] = run(arguments)
        print(case, f"contrast {pictures[f'{case}/image'].std():.0f}", flush=True)
    np.savez_compressed(folder / "pictures.npz", **pictures)
    text = json.dumps({"pictures": CASES}, indent=1)
    (folder / "cases.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    warnings.filterwarnings("ignore")
    main()
