"""The world of the built-in model and the checker that judges pictures of it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from examples.train_builtin import checker, data, evaluate, rectify, tokens, uses

ROOT = Path(__file__).resolve().parent.parent
KINDS = [(1, "train"), (1, "pair"), (2, "train"), (2, "pair"), (2, "combination")]


@pytest.mark.parametrize(("count", "kind"), KINDS)
def test_checker_agrees_with_true_pictures(count, kind):
    rng = np.random.default_rng(7)
    specs = [data.random_spec(rng, count, kind) for _ in range(150)]
    result = checker.score([data.render(spec) for spec in specs], specs)
    assert result["right"] >= 0.99, result


def test_checker_sees_what_is_wrong():
    rng = np.random.default_rng(8)
    for _ in range(30):
        spec = data.random_spec(rng, 2)
        picture = data.render(spec)
        asked = data.asked_of(spec)
        (shape, color, size), other = asked.things
        next_of = {
            c: d for c, d in zip(data.SHAPES, data.SHAPES[1:] + data.SHAPES[:1], strict=True)
        }
        small_of = {"small": "large", "large": "small"}
        opposite = dict(zip(data.RELATIONS, ("right of", "left of", "below", "above"), strict=True))
        background = "cyan" if asked.background != "cyan" else "gray"
        new_color = next(c for c in data.COLORS if c not in (color, other[1]))
        mutants = {
            "shape": {"things": ((next_of[shape], color, size), other)},
            "size": {"things": ((shape, color, small_of[size]), other)},
            "color": {"things": ((shape, new_color, size), other)},
            "background": {"background": background},
            "count": {"things": ((shape, color, size),), "relation": None},
            "relation": {"relation": opposite[asked.relation]},
        }
        for attribute, change in mutants.items():
            verdict = checker.judge(checker.look(picture), dataclasses.replace(asked, **change))
            assert not verdict.right, (attribute, spec)
    noise = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert not checker.check(noise, "a red circle").right
    assert not checker.check(np.full((64, 64, 3), 255, np.uint8), "a red circle").right


def test_captions_are_read_back():
    rng = np.random.default_rng(9)
    for i in range(500):
        spec = data.random_spec(rng, 1 + i % 2)
        full = data.asked_of(spec)
        assert data.parse(data.caption(spec, rng, complete=True)) == full
        some = data.parse(data.caption(spec, rng))
        assert some.background in (None, full.background)
        assert some.relation in (None, full.relation)
        assert some.place in (None, full.place)
        assert [t[:2] for t in some.things] == [t[:2] for t in full.things]
    asked = data.parse(evaluate.DEMO)
    assert asked.things == (("circle", "red", "small"), ("square", "blue", "large"))
    assert (asked.background, asked.relation) == ("yellow", "left of")
    with pytest.raises(ValueError, match="found 0"):
        data.parse("a horse")


def test_held_out_pairs_and_combinations_stay_out():
    rng = np.random.default_rng(10)
    for i in range(500):
        spec = data.random_spec(rng, 1 + i % 2)
        pairs = [thing.pair for thing in spec.things]
        assert not data.HELD_OUT_PAIRS.intersection(pairs)
        assert len(pairs) == 1 or not data.combination_held_out(*pairs)
    for count, kind in KINDS[1:]:
        pairs = [t.pair for t in data.random_spec(rng, count, kind).things]
        if kind == "pair":
            assert data.HELD_OUT_PAIRS.intersection(pairs)
        if kind == "combination":
            assert data.combination_held_out(*pairs)


def test_every_word_is_one_token():
    vocab, merges = tokens.build_bpe(data.words())
    assert all(word + "</w>" in vocab for word in data.words())
    assert sorted(vocab.values()) == list(range(len(vocab)))
    assert len(vocab) == 514 + len({"".join(m) for m in merges} - set(tokens.byte_alphabet()))
    rng = np.random.default_rng(11)
    for i in range(200):
        text = data.caption(data.random_spec(rng, 1 + i % 2), rng).replace(",", "")
        assert set(text.split()) <= set(data.words())


def test_every_documented_prompt_is_measured():
    files = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "mlxdiff").rglob("*.py")]
    found = set()
    for file in files:
        for text in re.findall(r'"([a-z][a-z ]+)"', file.read_text(encoding="utf-8")):
            known = " " in text and set(text.split()) <= set(data.words())
            if known and any(shape in text.split() for shape in data.SHAPES):
                found.add(text)
    assert evaluate.DEMO in found
    assert found <= {prompt for prompt, _, _ in evaluate.DEMOS}


def test_uses_ask_for_what_can_be_judged():
    rng = np.random.default_rng(12)
    for i in range(60):
        spec, goal = uses.changed(rng, 1 + i % 2, shapes=i % 2 == 1)
        assert checker.check(data.render(goal), goal).right
        assert not checker.check(data.render(spec), goal).right
        assert uses.stays(data.render(goal), spec)
        mask = uses.box(spec.things[0])
        assert set(np.unique(mask)) == {0, 255}
        alone = dataclasses.replace(spec, things=spec.things[:1])
        empty = dataclasses.replace(spec, things=())
        outside = (data.render(alone) != data.render(empty)).any(-1) & (mask == 0)
        assert not outside.any()


def test_a_drawer_that_does_what_is_asked_gets_full_marks(capsys):
    def draw(prompt, seed, image=None, negative_prompt=None, **_):
        if image is not None:  # where the objects are, it sees; what they become, it reads
            asked = data.parse(prompt)
            seen = sorted(checker.look(image).objects, key=lambda o: (o.x, o.y))
            first = asked.relation in (None, "left of", "above")
            wanted = asked.things if first else asked.things[::-1]
            if len(seen) == 2 and abs(seen[0].x - seen[1].x) < abs(seen[0].y - seen[1].y):
                seen.sort(key=lambda o: o.y)
            things = [
                data.Thing(shape, color, o.size, o.x, o.y, {"small": 0.14, "large": 0.21}[o.size])
                for o, (shape, color, _) in zip(seen, wanted, strict=True)
            ]
            return data.render(data.Spec(asked.background, tuple(things)))
        color = "orange" if negative_prompt is None else "purple"
        shape, ground = prompt.split()[2], prompt.split()[-2]
        return data.render(data.Spec(ground, (data.Thing(shape, color, "large", 0.5, 0.5, 0.21),)))

    uses.image(draw, 12)
    uses.inpaint(draw, 12)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("| 100.0" in line for line in lines)
    uses.negative(draw, 12)
    assert "of 12 | 0.0" in capsys.readouterr().out


def test_the_true_picture_beside_a_wobbly_one():
    rng = np.random.default_rng(13)
    for i in range(6):
        spec = data.random_spec(rng, 1 + i % 2)
        picture = data.render(spec).astype(float)
        wobbly = (
            picture + 0.35 * (np.roll(picture, 1, i % 2) - picture) + rng.normal(0, 4, (64, 64, 1))
        )
        found = rectify.nearest(np.clip(wobbly, 0, 255).astype(np.uint8), spec)
        for a, b in zip(found.things, spec.things, strict=True):
            assert max(abs(a.x - b.x), abs(a.y - b.y), abs(a.r - b.r)) < 0.012
    assert rectify.nearest(picture.astype(np.uint8), data.random_spec(rng, 1)) is None


def test_pictures_are_drawn_again_without_a_search():
    rng = np.random.default_rng(5)
    for i in range(20):
        spec = data.random_spec(rng, 1 + i % 2)
        prompt, picture = data.caption(spec, rng, complete=True), data.render(spec)
        again, weights = rectify.redraw(picture, prompt)
        assert np.abs(again.astype(int) - picture).mean() < 0.2
        assert weights.shape == picture.shape[:2] and weights.min() == 0.5
        for thing in spec.things:  # each counts as much
            x, y = (int(value * data.SIDE) for value in (thing.x, thing.y))
            area = checker.area_of(thing.shape) * (thing.r * data.SIDE) ** 2
            assert weights[y, x] == pytest.approx(max(200 / area, 0.5), rel=0.05)
    assert rectify.redraw(picture, "a small red circle on a blue background") is None
