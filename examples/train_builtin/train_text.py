"""Teach the text encoder to read captions, before any picture is used.

    python train_text.py --run runs/text --minutes 8

Linear heads must name the content of the caption from any position behind the end of the text: the
objects in the order of the text and in the order of the picture (left or top first), background,
place, relation. The heads are then dropped. The U-Net gets an encoder that already binds attributes
to objects. RUN/text_encoder and RUN/tokenizer are the result.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import common
import data
import numpy as np
import tokens

NOTHING, UNKNOWN = 0, -100  # "not named" is a class; UNKNOWN is not scored

HEADS = {
    "count": 2,
    "background": 1 + len(data.BACKGROUNDS),
    "place": 1 + len(data.PLACES),
    "relation": 1 + len(data.RELATIONS),
    **{
        f"{attribute} {which}": 1 + n
        for which in ("mentioned 1", "mentioned 2", "standing 1", "standing 2")
        for attribute, n in (
            ("shape", len(data.SHAPES)),
            ("color", len(data.COLORS)),
            ("size", len(data.SIZES)),
        )
    },
}


def targets(asked: data.Asked) -> list[int]:
    """Return the class of every head, in the order of HEADS."""

    def index(options, value) -> int:
        return NOTHING if value is None else 1 + options.index(value)

    def of(thing) -> list[int]:
        if thing is None:
            return [NOTHING] * 3
        shape, color, size = thing
        return [
            index(data.SHAPES, shape),
            index(data.COLORS, color),
            index(data.SIZES, size),
        ]

    first, second = (*asked.things, None)[:2]
    row = [
        len(asked.things) - 1,
        index(data.BACKGROUNDS, asked.background),
        index(data.PLACES, asked.place),
        index(data.RELATIONS, asked.relation),
        *of(first),
        *of(second),
    ]
    if asked.relation in ("right of", "below"):
        row += of(second) + of(first)
    elif asked.relation or second is None:
        row += of(first) + of(second)
    else:
        row += [UNKNOWN] * 6
    return row


def disturb(text: str, rng: np.random.Generator) -> str:
    """Insert one or two meaningless words into a caption, so that they do no harm later."""
    parts = text.split()
    for _ in range(int(rng.integers(1, 3))):
        letters = rng.integers(0, 26, int(rng.integers(2, 8)))
        word = "".join(chr(97 + int(c)) for c in letters)
        parts.insert(int(rng.integers(len(parts) + 1)), word)
    return " ".join(parts)


def draw(rng: np.random.Generator, size: int, kind: str = "train", disturbed: float = 0.15):
    """Return captions and their targets."""
    texts, rows = [], []
    for _ in range(size):
        count = 2 if kind == "combination" or rng.random() < 0.75 else 1
        text = data.caption(data.random_spec(rng, count, kind), rng)
        rows.append(targets(data.parse(text)))
        texts.append(disturb(text, rng) if rng.random() < disturbed else text)
    return texts, rows


def build(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel

    end = tokenizer.eos_token_id
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        projection_dim=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end,
        pad_token_id=end,
    )
    config._attn_implementation = "eager"  # the backward pass of fused attention is slower on a CPU
    return CLIPTextModel(config)


def worker(rank: int, processes: int, args) -> None:
    import torch
    from torch import nn

    run = Path(args.run)
    torch.manual_seed(0)
    tokenizer = tokens.load(run / "tokenizer")
    encoder = build(tokenizer)
    with torch.no_grad():  # CLIP's own 0.02 starts too slowly at this size
        encoder.get_input_embeddings().weight.mul_(5)
    heads = nn.Linear(128, sum(HEADS.values()))
    model = nn.ModuleList([encoder, heads])
    splits = list(HEADS.values())

    def predict(texts, length, rng, positions=4):
        ids = tokens.encode(tokenizer, texts)[:, :length]
        hidden = encoder(ids).last_hidden_state
        ends = (ids == tokenizer.eos_token_id).int().argmax(1).numpy()
        at = torch.from_numpy(rng.integers(ends[:, None], length, (len(texts), positions)))
        picked = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))
        return heads(picked).split(splits, -1)

    training = common.Training(rank, processes, run, model, args.lr, args.minutes)
    while not training.done:
        rng = np.random.default_rng((7, training.step, rank))
        texts, rows = draw(rng, args.batch)
        goal = torch.tensor(rows)
        logits = predict(texts, 77 if training.step % 4 == 0 else 48, rng)
        loss = sum(
            nn.functional.cross_entropy(
                one.transpose(1, 2), goal[:, i, None].expand(-1, one.shape[1]), ignore_index=UNKNOWN
            )
            for i, one in enumerate(logits)
        )
        training.update(loss, args.batch)
    training.save()
    if rank == 0:
        with torch.no_grad():
            for kind, disturbed in (("train", 0), ("pair", 0), ("combination", 0), ("train", 1)):
                rng = np.random.default_rng(99)
                texts, rows = draw(rng, 512, kind, disturbed)
                goal = torch.tensor(rows)
                logits = predict(texts, 77, rng, 4)
                hit = [
                    (one.argmax(-1) == goal[:, i, None]) | (goal[:, i, None] == UNKNOWN)
                    for i, one in enumerate(logits)
                ]
                print(kind, "disturbed" if disturbed else "", end=": ")
                for name, h in zip(HEADS, hit, strict=True):
                    print(name, f"{h.float().mean():.3f}", end=" ")
                print(f"| all {torch.stack(hit).all(0).float().mean():.4f}", flush=True)
        encoder.save_pretrained(run / "text_encoder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", required=True, help="folder of this run (resumed if it exists)")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--batch", type=int, default=64, help="captions a process and step")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    tokens.save(Path(args.run) / "tokenizer", data.words())
    common.launch(worker, args, args.processes)


if __name__ == "__main__":
    main()
