"""Train a small CLIP that judges the built-in model's pictures.

    python train.py --run runs/clip --to shapes

One core, no GPU, about twenty minutes. It needs torch and transformers. The result is a folder as
transformers writes a CLIPModel, which needs only mlxdiff:

    mlxdiff score PICTURE --judge shapes --prompt "a red circle on a blue background"
    mlxdiff generate "a small red star on a white background" --best-of 8 --judge shapes

Pictures and captions are those of the built-in model's training (examples/train_builtin). Each
picture is compared with its caption, with captions of the same picture with one fact changed, and
with those of all other pictures of a step (Radford et al. 2021). The same command continues a
stopped run. The file RUN/minutes shortens or extends a run while it goes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel

import mlxdiff
from mlxdiff.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "train_builtin"))
import common
import data

BUILTIN = Path(mlxdiff.__file__).parent / "builtin" / "tokenizer"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OTHERS = 1  # captions beside the right one that differ from it in one fact
# What the picture encoder is also asked for, while it learns: the facts of each object, the left or
# upper one first.
FACTS = (data.SHAPES, data.COLORS, data.SIZES)


def make_model(tokenizer: Tokenizer) -> CLIPModel:
    """Return a CLIP of 0.3 million parameters for pictures of 64 pixels."""
    end = tokenizer.eos_token_id
    text = {
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    vision = {
        "hidden_size": 80,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": data.SIDE,
        "patch_size": 8,
    }
    return CLIPModel(
        CLIPConfig(
            text_config=text,
            vision_config=vision,
            projection_dim=64,
            attn_implementation="sdpa",
        )
    )


def changed(spec: data.Spec, rng: np.random.Generator) -> data.Spec:
    """Return the same picture with one fact changed."""
    while True:
        like = data.random_spec(rng, len(spec.things))
        fact = rng.integers(5)
        if fact == 4:
            other = dataclasses.replace(
                spec, background=like.background, relation=spec.relation, place=spec.place
            )
        elif fact == 3:
            other = dataclasses.replace(spec, relation=like.relation, place=like.place)
        else:
            which, name = int(rng.integers(len(spec.things))), ("shape", "color", "size")[fact]
            things = list(spec.things)
            things[which] = dataclasses.replace(
                things[which], **{name: getattr(like.things[which], name)}
            )
            other = dataclasses.replace(spec, things=tuple(things))
        if other != spec:
            return other


class Learner(torch.nn.Module):
    """The model, and what is asked of its picture encoder beside captions."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.clip = make_model(tokenizer)
        width = self.clip.config.vision_config.hidden_size
        sizes = [len(data.BACKGROUNDS), len(data.RELATIONS) + len(data.PLACES)]
        sizes += [1 + len(words) for words in FACTS] * 2
        self.heads = torch.nn.ModuleList(torch.nn.Linear(width, size) for size in sizes)

    def forward(
        self, pixels: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return logits of pictures over captions, and of each fact."""
        seen = self.clip.vision_model(pixel_values=pixels).pooler_output
        read = self.clip.text_model(input_ids=ids).pooler_output
        a, b = self.clip.visual_projection(seen), self.clip.text_projection(read)
        a, b = (x / x.norm(dim=-1, keepdim=True) for x in (a, b))
        return self.clip.logit_scale.exp() * a @ b.T, [head(seen) for head in self.heads]


def facts_of(spec: data.Spec) -> list[int]:
    """Return the right answer of each head."""
    where = data.RELATIONS.index(spec.relation) if spec.relation else len(data.RELATIONS)
    if spec.relation is None:
        where += data.PLACES.index(spec.place)
    # "a right of b" is "b left of a".
    swapped = spec.relation in ("right of", "below")
    if spec.relation is not None:
        where -= swapped
    things = spec.things[::-1] if swapped else spec.things
    found = [data.BACKGROUNDS.index(spec.background), where]
    for i in range(2):
        thing = things[i] if i < len(things) else None
        for words, name in zip(FACTS, ("shape", "color", "size"), strict=True):
            found.append(0 if thing is None else 1 + words.index(getattr(thing, name)))
    return found


def train_worker(rank: int, processes: int, args: argparse.Namespace) -> None:
    """Train with the cross-entropy of pictures over captions, of captions over pictures, and of
    the facts of each picture."""
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer.from_folder(BUILTIN)
    model = Learner(tokenizer)
    training = common.Training(
        rank, processes, args.run, model, args.lr, args.minutes, ema=args.ema, muon=True
    )
    rng, size = np.random.default_rng((args.seed, training.step)), args.batch
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    cross_entropy = torch.nn.functional.cross_entropy
    while not training.done:
        specs = [data.random_spec(rng, 1 + int(rng.random() < 0.6)) for _ in range(size)]
        captions = [data.caption(spec, rng, complete=rng.random() < 0.7) for spec in specs]
        for _ in range(OTHERS):
            captions += [data.caption(changed(spec, rng), rng, complete=True) for spec in specs]
        ids = torch.tensor([tokenizer.encode(caption) for caption in captions])
        rows = ids[:, : 1 + int((ids != tokenizer.eos_token_id).sum(1).max())]  # up to the end
        pictures = np.stack([data.render(spec) for spec in specs])
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
        x = x + 0.02 * rng.random() * torch.randn_like(x)
        logits, answers = model((x - mean) / std, rows)
        right = torch.arange(size)
        loss = (cross_entropy(logits, right) + cross_entropy(logits[:, :size].T, right)) / 2
        facts = torch.tensor([facts_of(spec) for spec in specs])
        told = [cross_entropy(a, f) for a, f in zip(answers, facts.T, strict=True)]
        found = (logits.argmax(1) == right).float().mean()
        named = torch.stack([(a.argmax(1) == f) for a, f in zip(answers, facts.T, strict=True)])
        training.update(
            loss + sum(told) / 2, size, found=float(found), named=float(named.float().mean())
        )
        with torch.no_grad():
            model.clip.logit_scale.clamp_(max=float(np.log(100)))
    training.save()


def write(run: Path, to: Path) -> None:
    """Write the averaged weights in half precision, with tokenizer and preprocessing."""
    learner = Learner(Tokenizer.from_folder(BUILTIN))
    averaged = torch.load(run / "last.pt", weights_only=True)["ema"]
    with torch.no_grad():
        for p, value in zip(learner.parameters(), averaged, strict=True):
            p.copy_(value)
    learner.clip.half().save_pretrained(to)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json"):
        shutil.copy(BUILTIN / name, to / name)
    side = data.SIDE
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_mean": MEAN,
        "image_std": STD,
        "resample": 3,
    }
    (to / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    print(f"{to}: {sum(file.stat().st_size for file in to.iterdir()):,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of this run")
    parser.add_argument("--to", type=Path, default=Path("shapes"), help="folder to write")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    common.launch(train_worker, args, 1)
    write(args.run, args.to)


if __name__ == "__main__":
    main()
