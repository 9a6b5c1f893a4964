"""The data side of training: folders, buckets, order, cache."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlxdiff.errors import UsageError
from mlxdiff.pictures.image import load_on_white
from mlxdiff.training import data_buckets, data_folder
from mlxdiff.training.data_buckets import Bucket, choose, cut, make_buckets
from mlxdiff.training.data_cache import ArrayCache
from mlxdiff.training.data_folder import Seen, read_pictures
from mlxdiff.training.data_order import Order, Place


def picture(path: Path, size: tuple[int, int] = (64, 64), seed: int = 0, **more: object) -> Path:
    """Write a picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **more)  # type: ignore[arg-type]
    return path


def captioned(folder: Path, name: str, text: str = "a thing", seed: int = 0) -> Path:
    path = picture(folder / name, seed=seed)
    path.with_suffix(".txt").write_text(text)
    return path


# Folders


def test_text_files_beside_pictures(tmp_path: Path) -> None:
    captioned(tmp_path, "b.png", "a  blue\n thing ", 1)
    captioned(tmp_path, "sub/a.jpg", "\ufeffa red thing", 2)
    picture(tmp_path / "c.webp", seed=3).with_suffix(".caption").write_text("kohya's other name")
    picture(tmp_path / ".hidden.png")
    found = read_pictures(tmp_path)
    assert [(p.name, p.caption) for p in found.items] == [
        ("b.png", "a blue thing"),
        ("c.webp", "kohya's other name"),
        ("sub/a.jpg", "a red thing"),
    ]
    assert found.faults == () and found.notes == ()
    found.require_usable()


def test_metadata_lines(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", seed=1)
    picture(tmp_path / "sub" / "b.png", (96, 64), seed=2)
    picture(tmp_path / "sub" / "b_edges.png", seed=3)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "one"}\n\n')
    line = {"file_name": "b.png", "text": "two", "conditioning_image": "b_edges.png", "more": 1}
    (tmp_path / "sub" / "metadata.jsonl").write_text(json.dumps(line))
    found = read_pictures(tmp_path)
    assert [(p.name, p.caption, p.width, p.height) for p in found.items] == [
        ("a.png", "one", 64, 64),
        ("sub/b.png", "two", 96, 64),
    ]
    assert found.items[1].control == tmp_path / "sub" / "b_edges.png"
    assert found.faults == ()


def test_kohyas_folders_repeat_and_give_a_caption(tmp_path: Path) -> None:
    captioned(tmp_path / "10_sks dog", "a.png", "a dog on a sofa", 1)
    picture(tmp_path / "10_sks dog" / "b.png", seed=2)
    picture(tmp_path / "2_style" / "c.png", seed=3)
    found = read_pictures(tmp_path)
    assert [(p.repeats, p.caption) for p in found.items] == [
        (10, "a dog on a sofa"),
        (10, "sks dog"),
        (2, "style"),
    ]
    assert found.count == 22


def test_class_folders_give_labels(tmp_path: Path) -> None:
    for i, name in enumerate(("cat/1.png", "ant/2.png", "cat/deep/3.png", "stray.png")):
        picture(tmp_path / name, seed=i)
    found = read_pictures(tmp_path, texts=False, classes=True)
    assert found.classes == ("ant", "cat")
    assert [(p.name, p.label) for p in found.items] == [
        ("ant/2.png", 0),
        ("cat/1.png", 1),
        ("cat/deep/3.png", 1),
    ]
    assert [str(f) for f in found.faults] == [
        "stray.png: lies in no class folder; move it into one"
    ]
    with pytest.raises(UsageError, match="no sub-folder with pictures"):
        read_pictures(tmp_path / "ant", texts=False, classes=True)


def test_every_fault_is_counted_before_the_start(tmp_path: Path) -> None:
    captioned(tmp_path, "good.png")
    captioned(tmp_path, "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])
    captioned(tmp_path, "text.png").write_bytes(b"not a picture at all")
    captioned(tmp_path, "two.png", seed=2)
    picture(tmp_path / "naked.png", seed=3)
    picture(tmp_path / "tiny.png", (30, 200), seed=4).with_suffix(".txt").write_text("x")
    captioned(tmp_path, "latin.png", seed=5).with_suffix(".txt").write_bytes(b"caf\xe9")
    (tmp_path / "orphan.txt").write_text("nothing beside it")
    lines = [
        '{"file_name": "two.png", "text": "again"}',
        '{"file_name": "missing.png", "text": "x"}',
        '{"file_name": "../outside.png", "text": "x"}',
        '{"file_name": 3}',
        "no json",
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    found = read_pictures(tmp_path, side=64)
    assert [p.name for p in found.items] == ["good.png"]
    assert Counter(f.kind for f in found.faults) == {
        "unreadable": 2,
        "two captions": 1,
        "without a caption": 1,
        "too small": 1,
        "unreadable captions": 3,
        "captions without a picture": 3,
    }
    with pytest.raises(UsageError) as caught:
        found.require_usable()
    told = str(caught.value)
    assert told.startswith(f"{tmp_path}: 11 of the files cannot be used (")
    assert "2 unreadable" in told and "--skip-faulty" in told and "\n" not in told
    found.require_usable(skip_faulty=True)
    for fault in found.faults:
        assert str(tmp_path) not in str(fault)


def test_a_huge_picture_is_a_fault(tmp_path: Path) -> None:
    Image.new("1", (60_000, 1000)).save(tmp_path / "huge.png")
    (tmp_path / "huge.txt").write_text("x")
    found = read_pictures(tmp_path)
    assert "too large" in str(found.faults[0]) and not found.items
    with pytest.raises(UsageError, match="holds no picture to train on"):
        found.require_usable(skip_faulty=True)


def test_what_is_only_odd_is_noted(tmp_path: Path) -> None:
    captioned(tmp_path, "a.png", seed=1)
    captioned(tmp_path, "b.png", seed=1)
    hidden = np.zeros((64, 64, 4), np.uint8)
    hidden[:32] = (200, 0, 0, 255)
    Image.fromarray(hidden).save(tmp_path / "clear.png")
    opaque = np.full((64, 64, 4), 255, np.uint8)
    Image.fromarray(opaque).save(tmp_path / "opaque.png")
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    picture(tmp_path / "small.png", (40, 48), seed=4)
    (tmp_path / "latents.npz").write_bytes(b"")
    found = read_pictures(tmp_path, caption="", side=64)
    assert len(found.items) == 6 and not found.faults
    assert list(found.notes) == [
        "1 picture is transparent; laid on white: clear.png",
        "1 picture is animated; the first frame is used: moves.gif",
        "1 picture is smaller than the training pictures; enlarged, so less sharp: small.png",
        "1 picture lies there more than once, so it counts more: a.png = b.png",
        "other files are not read: 1 .npz",
    ]
    pixels = load_on_white(tmp_path / "clear.png")
    assert (pixels[:32] == (200, 0, 0)).all() and (pixels[32:] == 255).all()


def test_a_transparent_picture_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    layer = np.zeros((8, 16, 4), np.uint8)
    layer[:, :8] = (10, 20, 30, 255)
    Image.fromarray(layer).save(tmp_path / "turned.png", exif=exif)
    pixels = load_on_white(tmp_path / "turned.png")
    assert pixels.shape == (16, 8, 3)
    assert (pixels[:8] == (10, 20, 30)).all() and (pixels[8:] == 255).all()


def test_a_picture_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captioned(tmp_path / "in", "a.png", seed=1)
    captioned(tmp_path / "in", "cut.png").write_bytes(b"no picture")
    place = tmp_path / "cache" / "pictures.json"
    seen = Seen(place)
    first = read_pictures(tmp_path / "in", seen=seen)
    seen.save()
    with monkeypatch.context() as patch:
        patch.setattr(data_folder, "load_on_white", None)
        again = read_pictures(tmp_path / "in", seen=Seen(place))
    assert again == first and len(first.faults) == 1
    for damaged in (b"", b"[]", b'{"a": 3}', b'{"a": [1, 2]}'):
        place.write_bytes(damaged)
        assert read_pictures(tmp_path / "in", seen=Seen(place)) == first


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        read_pictures(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="is not a folder"):
        read_pictures(picture(tmp_path / "a.png"))


# Buckets


def test_buckets_cover_aspects_at_the_same_area() -> None:
    buckets = make_buckets(512, 512, 64)
    assert Bucket(512, 512) in buckets and Bucket(768, 320) in buckets
    for b in buckets:
        assert b.width % 64 == b.height % 64 == 0
        assert b.width * b.height <= 512 * 512
        assert Bucket(b.height, b.width) in buckets
        assert max(b.width, b.height) <= 4 * min(b.width, b.height)
    assert make_buckets(512, 768, 64, one_size=True) == [Bucket(512, 768)]
    with pytest.raises(UsageError, match="no multiple of 64; give 448 or 512"):
        make_buckets(500, 512, 64)


@pytest.mark.parametrize("size", [(512, 512), (1000, 500), (300, 1200), (4000, 3000), (511, 513)])
def test_a_cut_covers_its_bucket(size: tuple[int, int]) -> None:
    bucket = choose(*size, make_buckets(512, 512, 64))
    for place in data_buckets.PLACES:
        found = cut(*size, bucket, place=place)
        assert 0 <= found.left <= found.scaled[0] - bucket.width
        assert 0 <= found.top <= found.scaled[1] - bucket.height
        # All of one side is kept.
        assert found.scaled[0] == bucket.width or found.scaled[1] == bucket.height
    lost = 1 - bucket.width * bucket.height / (found.scaled[0] * found.scaled[1])
    assert lost < 0.16


def test_the_nearest_aspect_is_chosen() -> None:
    buckets = make_buckets(512, 512, 64)
    assert choose(1024, 1024, buckets) == Bucket(512, 512)
    assert choose(1920, 1080, buckets) in (Bucket(640, 384), Bucket(704, 384))
    assert choose(1080, 1920, buckets) in (Bucket(384, 640), Bucket(384, 704))


def test_a_cut_is_a_part_of_the_picture() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8)
    left = cut(64, 40, Bucket(40, 40), place=0.0).apply(pixels)
    assert (left == pixels[:, :40]).all()
    right = cut(64, 40, Bucket(40, 40), place=1.0, flip=True).apply(pixels)
    assert (right == pixels[:, 24:][:, ::-1]).all()


# Order


def batches(order: Order, count: int, place: Place | None = None) -> list[list[int]]:
    walk = order.walk(place)
    return [[draw.index for draw in next(walk)[1]] for _ in range(count)]


def test_every_picture_is_used_equally() -> None:
    groups = ["a"] * 7 + ["b"] * 4 + ["c"]
    repeats = [1, 2, 1, 1, 1, 1, 1, 1, 1, 3, 1, 1]
    order = Order(groups, repeats, 4, seed=5)
    assert order.count == 15
    epochs = 8  # after which 8 * 15 is a multiple of 4, for each bucket, too
    total = sum(order.length(epoch) for epoch in range(epochs))
    assert total == epochs * order.count // 4
    found = batches(order, total)
    used = Counter(index for batch in found for index in batch)
    assert used == {i: epochs * n for i, n in enumerate(repeats)}
    for batch in found:
        assert len({groups[index] for index in batch}) == 1


def test_the_order_depends_on_the_seed_alone_and_goes_on_anywhere() -> None:
    order = Order(["a"] * 11 + ["b"] * 5, [1] * 16, 3, seed=1)
    whole = [next_ for _, next_ in zip(range(40), order.walk(), strict=False)]
    again = Order(["a"] * 11 + ["b"] * 5, [1] * 16, 3, seed=1)
    for place, draws in whole[::7]:
        saved = Place.from_dict(json.loads(json.dumps(place.to_dict())))
        assert again.at(saved) == draws
        assert [d for _, d in zip(range(5), again.walk(saved), strict=False)] == [
            d for d in whole[whole.index((place, draws)) :][:5]
        ]
    assert batches(Order(["a"] * 16, [1] * 16, 3, seed=2), 5) != batches(
        Order(["a"] * 16, [1] * 16, 3, seed=3), 5
    )
    assert batches(order, 5) == [[d.index for d in draws] for _, draws in whole[:5]]


@pytest.mark.parametrize("batch", [1, 3, 7, 40])
def test_places_by_number(batch: int) -> None:
    order = Order(["a"] * 11 + ["b"] * 5 + ["c"], [1] * 17, batch, seed=1)
    for number, (place, _) in zip(range(60), order.walk(), strict=False):
        assert order.place(number) == place


def test_more_than_all_pictures_in_a_batch() -> None:
    order = Order(["a"] * 3, [1] * 3, 8, seed=0)
    assert order.length(0) == 1 or order.start().epoch > 0
    used = Counter(i for batch in batches(order, 3) for i in batch)
    assert used == {0: 8, 1: 8, 2: 8}


def test_a_foreign_place_is_refused() -> None:
    order = Order(["a"] * 4, [1] * 4, 2, seed=0)
    for place in (Place(1), Place(0, 0, 99)):
        with pytest.raises(UsageError, match="does not fit"):
            order.at(place)
    for data in (None, {}, {"seed": 0, "epoch": -1, "position": 0}, {"seed": True}):
        with pytest.raises(UsageError, match="damaged"):
            Place.from_dict(data)


# Cache


def test_the_cache_keeps_arrays_by_what_they_depend_on(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path / "cache")
    values = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    key = {"picture": "abc", "flip": True}
    assert key not in cache
    made = cache.get(key, lambda: {"mean": values})

    def never() -> dict[str, np.ndarray]:
        raise AssertionError("made twice")

    again = ArrayCache(tmp_path / "cache").get(dict(reversed(key.items())), never)
    assert (made["mean"] == values).all() and (again["mean"] == values).all()
    assert cache.find({"picture": "abc", "flip": False}) is None


def test_a_damaged_entry_is_made_again(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path)
    cache.put({"a": 1}, {"x": np.ones(4, np.float32)})
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-3])
    assert (cache.get({"a": 1}, lambda: {"x": np.zeros(4)})["x"] == 0).all()
    assert (cache.find({"a": 1}) or {})["x"].shape == (4,)


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = ArrayCache(tmp_path)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UsageError, match=r"No space left on device.*--cache"):
        cache.put({"a": 1}, {"x": np.ones(4, np.float32)})
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
