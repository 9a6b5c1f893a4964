"""Teach the text encoder to read captions of emoji, before any picture is used.

Linear heads must name the content of the caption from any position behind the end of the text. The
heads are then dropped, and the encoder is frozen. It starts from the built-in model's encoder: the
transformer, and the embeddings of the words that both models know.
"""

from __future__ import annotations

from pathlib import Path

import common
import numpy as np
import tokens
import train_text
import world

NOTHING = 0
HEADS = {
    "kind": len(world.KINDS),
    "ground": 1 + len(world.GROUNDS),
    "place": 1 + len(world.PLACES),
    "small": 2,
}
DISTURBED = 0.15


def target(spec: world.Spec, text: str) -> list[int]:
    """Return the class of every head. What the caption omits is NOTHING."""
    named = spec.ground
    if named in world.RGB:
        said = f" on {named}" in text or f" on {world.a(named)} background" in text
    else:
        said = any(text.endswith(phrase) for phrase in world.SCENES[named])
    there = spec.place is not None and any(p in text for p in world.WHERE[spec.place])
    return [
        world.KINDS.index(spec.kind),
        1 + world.GROUNDS.index(named) if said else NOTHING,
        1 + world.PLACES.index(spec.place) if there else NOTHING,
        int("small " in text),
    ]


def draw(rng: np.random.Generator, size: int) -> tuple[list[str], list[list[int]]]:
    """Return captions and their targets."""
    texts, rows = [], []
    for _ in range(size):
        spec = world.random_spec(rng)
        text = world.caption(spec, rng)
        rows.append(target(spec, text))
        texts.append(train_text.disturb(text, rng) if rng.random() < DISTURBED else text)
    return texts, rows


def start_from(encoder, tokenizer, folder: Path) -> None:
    """Copy the built-in encoder's weights, and its embeddings of known tokens."""
    import torch
    from transformers import CLIPTextModel

    known = CLIPTextModel.from_pretrained(folder / "text_encoder").state_dict()
    vocabulary = tokens.load(folder / "tokenizer").get_vocab()
    own = encoder.state_dict()
    table = next(key for key in own if key.endswith("token_embedding.weight"))
    with torch.no_grad():
        own[table].mul_(5)  # CLIP's own 0.02 starts too slowly at this size
        for token, i in tokenizer.get_vocab().items():
            if token in vocabulary:
                own[table][i] = known[table][vocabulary[token]]
        for key, value in known.items():
            if key != table:
                own[key].copy_(value)


def worker(rank: int, processes: int, args) -> None:
    import torch
    from torch import nn

    run = Path(args.run)
    torch.manual_seed(0)
    tokenizer = tokens.load(run / "tokenizer")
    encoder = train_text.build(tokenizer)
    start_from(encoder, tokenizer, Path(args.start))
    heads = nn.Linear(128, sum(HEADS.values()))
    model = nn.ModuleList([encoder, heads])

    def predict(texts, length, rng, positions=4):
        ids = tokens.encode(tokenizer, texts)[:, :length]
        hidden = encoder(ids).last_hidden_state
        ends = (ids == tokenizer.eos_token_id).int().argmax(1).numpy()
        at = torch.from_numpy(rng.integers(ends[:, None], length, (len(texts), positions)))
        picked = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))
        return heads(picked).split(list(HEADS.values()), -1)

    training = common.Training(rank, processes, run, model, args.lr, args.minutes)
    while not training.done:
        rng = np.random.default_rng((7, training.step, rank))
        texts, rows = draw(rng, args.batch)
        goal = torch.tensor(rows)
        logits = predict(texts, 77 if training.step % 4 == 0 else 40, rng)
        loss = sum(
            nn.functional.cross_entropy(
                one.transpose(1, 2), goal[:, i, None].expand(-1, one.shape[1])
            )
            for i, one in enumerate(logits)
        )
        training.update(loss, args.batch)
    training.save()
    if rank == 0:
        with torch.no_grad():
            rng = np.random.default_rng(99)
            texts, rows = draw(rng, 1024)
            goal = torch.tensor(rows)
            hit = [
                one.argmax(-1) == goal[:, i, None]
                for i, one in enumerate(predict(texts, 77, rng, 4))
            ]
            for name, h in zip(HEADS, hit, strict=True):
                print(name, f"{h.float().mean():.4f}", end=" ")
            print(f"| all {torch.stack(hit).all(0).float().mean():.4f}", flush=True)
        encoder.save_pretrained(run / "text_encoder")
