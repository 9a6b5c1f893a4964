"""A training set: batches of latents (or pixels), text, sizes, labels and control images.

``open_data`` makes one for a model with a VAE and text, ``open_pixels`` for a model of pixels. All
pictures are checked, cut, encoded and kept on the disk before the first step; then batches only
read. Batch n is a pure function of (seed, n): a run can stop and go on anywhere.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlxdiff.errors import UsageError, argument
from mlxdiff.machine.turns import turn
from mlxdiff.pictures.image import load_image, load_on_white, resize, to_model
from mlxdiff.pictures.preprocess import PREPROCESSORS
from mlxdiff.run.kind import Network
from mlxdiff.run.latent_model import LatentModel
from mlxdiff.training.data_buckets import PLACES, Bucket, Cut, choose, cut, make_buckets
from mlxdiff.training.data_cache import ArrayCache, digest_of
from mlxdiff.training.data_folder import Picture, Pictures, Seen, read_pictures
from mlxdiff.training.data_order import Draw, Order, Place
from mlxdiff.training.options import DataOptions

Progress = Callable[[int, int, str], None]
"""Called with the pictures done, all pictures, and the name of the current one."""

_KEPT = 512 << 20  # bytes of arrays that are kept in memory


@dataclass(frozen=True)
class Text:
    """States of the text encoders.

    Attributes:
        states: (B, T, D) float32.
        pooled: (B, P) float32; None where the U-Net takes none.
    """

    states: np.ndarray
    pooled: np.ndarray | None


@dataclass(frozen=True)
class Batch:
    """Examples of one size.

    Attributes:
        mean: latents, scaled for the U-Net, or pixels in [-1, 1]: (B, h, w, C) float32.
        std: standard deviation around ``mean``, of its shape; None: there is no distribution.
        weights: (B,) float32, of the loss.
        text: the captions, encoded; None: ``tokens``, or no text.
        tokens: text encoder -> (B, T) int32, where text encoders are trained.
        time_ids: (B, 6) float32 for SDXL: original height and width, top and left of the crop,
            target height and width.
        labels: (B,) int32, numbers of the classes.
        hint: control images (B, H, W, 3) float32 in [0, 1].
    """

    mean: np.ndarray
    std: np.ndarray | None
    weights: np.ndarray
    text: Text | None = None
    tokens: dict[str, np.ndarray] | None = None
    time_ids: np.ndarray | None = None
    labels: np.ndarray | None = None
    hint: np.ndarray | None = None


@dataclass(frozen=True)
class Example:
    """A picture with what is learnt of it.

    Attributes:
        picture: the file.
        bucket: its size in training.
        weight: of its loss.
        hint: what its control image is made of: the name of a preprocessor, or a file.
    """

    picture: Picture
    bucket: Bucket
    weight: float = 1.0
    hint: str | Path | None = None

    def cut(self, place: float, flip: bool) -> Cut:
        """Return the cut at a place of PLACES."""
        return cut(self.picture.width, self.picture.height, self.bucket, place=place, flip=flip)


class Data:
    """A training set.

    Attributes:
        examples: all pictures.
        size: examples of an epoch, repeats included.
        digest: hash of all that decides a batch beside seed and size; another one on resume means
            other pictures, captions or sizes.
        sources: name of each file -> sha256.
        classes: names of the classes; the place of a name is its label.
        notes: what the user should know, a line each.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        rules: Mapping[str, Any],
        *,
        flip: bool,
        crop: str,
        classes: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> None:
        self.examples, self.classes = tuple(examples), tuple(classes)
        self.notes = (*notes, *_few_of_a_size(examples))
        self._flips, self._places = flip, PLACES if crop == "random" else (0.5,)
        self.size = sum(one.picture.repeats for one in self.examples)
        self.sources = {one.picture.name: one.picture.sha256 for one in self.examples}
        told = {
            "rules": {**rules, "flip": flip, "crop": crop, "classes": self.classes},
            "examples": [
                (
                    *(p.name, p.sha256, p.caption, p.label, p.repeats, one.weight),
                    *(str(one.bucket), one.hint.name if isinstance(one.hint, Path) else one.hint),
                )
                for one in self.examples
                for p in (one.picture,)
            ],
        }
        self.digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        self._orders: dict[tuple[int, int], Order] = {}
        self._kept = _Kept(_KEPT)

    def batch(self, index: int, size: int, seed: int) -> Batch:
        """Return a batch.

        Args:
            index: its number, from 0 on, over all epochs.
            size: its examples.
            seed: decides order, flips and crops.
        """
        order = self.order(size, seed)
        return self._stack(order.at(order.place(index)))

    def place(self, index: int, size: int, seed: int) -> Place:
        """Return epoch and position of a batch."""
        return self.order(size, seed).place(index)

    def batches(self, size: int) -> int:
        """Return how many batches an epoch has, on average and at least 1."""
        return max(1, round(self.size / size))

    @property
    def empty(self) -> Text | None:
        """The empty caption (B = 1), for dropping captions; None without text."""
        return None

    @property
    def empty_tokens(self) -> dict[str, np.ndarray] | None:
        """The same where tokens are given."""
        return None

    @abstractmethod
    def batch_shape(self, size: int) -> tuple[int, int, int, int]:
        """Return the shape of ``Batch.mean`` in the bucket of the largest area."""

    def order(self, size: int, seed: int) -> Order:
        """Return the order of the batches of this size."""
        if (size, seed) not in self._orders:
            groups = [one.bucket for one in self.examples]
            repeats = [one.picture.repeats for one in self.examples]
            self._orders[size, seed] = Order(groups, repeats, size, seed)
        return self._orders[size, seed]

    def prepare(self, progress: Progress = lambda done, total, name: None) -> None:
        """Make all that batches read, so that no step meets a fault or waits for an encoder."""
        for done, one in enumerate(self.examples):
            for each in self._cuts(one):
                self._prepare(one, each)
            progress(done + 1, len(self.examples), one.picture.name)

    @abstractmethod
    def _prepare(self, one: Example, each: Cut) -> None:
        """Make what batches read of a picture in this cut."""

    @abstractmethod
    def _stack(self, draws: Sequence[Draw]) -> Batch:
        """Put a batch together."""

    def _cuts(self, one: Example) -> Iterator[Cut]:
        """Yield each cut of a picture that can occur, once."""
        flips = (False, True) if self._flips else (False,)
        yield from dict.fromkeys(one.cut(at, flip) for flip in flips for at in self._places)

    def _drawn(self, draws: Sequence[Draw]) -> list[tuple[Example, Cut]]:
        """Return the pictures of a batch and how each is cut."""
        found = []
        for draw in draws:
            one = self.examples[draw.index]
            place = self._places[int(draw.place * len(self._places))]
            found.append((one, one.cut(place, self._flips and draw.flip < 0.5)))
        return found

    def _largest(self) -> Bucket:
        return max((one.bucket for one in self.examples), key=lambda b: b.width * b.height)


class LatentData(Data):
    """A training set of latents and text; see ``open_data``."""

    def __init__(
        self,
        examples: Sequence[Example],
        model: LatentModel,
        cache: ArrayCache,
        *,
        tokens: bool,
        **more: Any,
    ) -> None:
        backend = {"backend": model.backend.name, "dtype": model.backend.dtype}
        self._vae = {**backend, "vae": digest_of(model.source, "vae")}
        super().__init__(examples, {"tokens": tokens, **self._vae}, **more)
        self._model, self._cache, self._tokens = model, cache, tokens
        self._factor = model.vae_config.factor
        self._encoders = {
            **backend,
            "text": [digest_of(model.source, name) for name in model.texts.names],
        }

    @property
    def empty(self) -> Text | None:
        """What guidance compares with when the model draws without a negative prompt."""
        if self._tokens:
            return None
        found = self._text("")
        if not self._model.zeros_for_empty_prompt:
            return found
        pooled = None if found.pooled is None else np.zeros_like(found.pooled)
        return Text(np.zeros_like(found.states), pooled)

    @property
    def empty_tokens(self) -> dict[str, np.ndarray] | None:
        """The empty caption's tokens (B = 1)."""
        return self._ids("") if self._tokens else None

    def batch_shape(self, size: int) -> tuple[int, int, int, int]:
        bucket, factor = self._largest(), self._factor
        channels = self._model.source.config("vae").latent_channels
        return size, bucket.height // factor, bucket.width // factor, channels

    def prepare(self, progress: Progress = lambda done, total, name: None) -> None:
        """See ``Data.prepare``. One encoder is in memory at a time."""
        captions = sorted({"", *(one.picture.caption for one in self.examples)})
        captions = [] if self._tokens else captions
        total = len(self.examples) + len(captions)
        super().prepare(lambda done, _, name: progress(done, total, name))
        self._model.cache.release(Network("vae"))
        for done, caption in enumerate(captions, len(self.examples) + 1):
            self._text(caption)
            progress(done, total, caption)
        for name in self._model.texts.names:
            self._model.cache.release(Network(name))

    def _prepare(self, one: Example, each: Cut) -> None:
        # What is found is not kept in memory: there may be far more than the memory holds.
        key = self._latents_key(one, each)
        if key not in self._cache:
            self._cache.put(key, self._encode(one, each))
        if one.hint is not None:
            self._hint(one, each)

    def _stack(self, draws: Sequence[Draw]) -> Batch:
        found = self._drawn(draws)
        latents = [self._latents(one, each) for one, each in found]
        stds = [one["std"] for one in latents if "std" in one]
        texts = [] if self._tokens else [self._text(one.picture.caption) for one, _ in found]
        ids = [self._ids(one.picture.caption) for one, _ in found] if self._tokens else []
        sizes = [_time_ids(one, each) for one, each in found]
        hints = [self._hint(one, each) for one, each in found if one.hint is not None]
        return Batch(
            mean=np.concatenate([one["mean"] for one in latents]),
            std=np.concatenate(stds) if stds else None,
            weights=np.array([one.weight for one, _ in found], np.float32),
            text=_joined(texts) if texts else None,
            tokens={n: np.concatenate([one[n] for one in ids]) for n in ids[0]} if ids else None,
            time_ids=np.array(sizes, np.float32) if self._model.is_sdxl else None,
            hint=np.stack(hints).astype(np.float32) / 255 if hints else None,
        )

    def _latents_key(self, one: Example, each: Cut) -> dict[str, Any]:
        return {**self._vae, "picture": one.picture.sha256, "cut": _described(each)}

    def _latents(self, one: Example, each: Cut) -> dict[str, np.ndarray]:
        key = self._latents_key(one, each)
        found: dict[str, np.ndarray] = self._kept.get(
            ("latents", one.picture.sha256, each),
            lambda: self._cache.get(key, lambda: self._encode(one, each)),
        )
        return found

    def _encode(self, one: Example, each: Cut) -> dict[str, np.ndarray]:
        pixels = each.apply(load_on_white(one.picture.path))
        with turn():
            mean, std = self._model.image_latents(pixels)
        name = one.picture.name
        if not np.isfinite(mean).all():
            raise UsageError(
                f"{name}: its latents are not finite; give {argument('dtype', 'float32')}"
            )
        return {"mean": mean} | ({} if std is None else {"std": std})

    def _text(self, caption: str) -> Text:
        key = {**self._encoders, "caption": caption}
        found = self._kept.get(
            ("text", caption), lambda: self._cache.get(key, lambda: self._encode_text(caption))
        )
        return Text(found["states"], found.get("pooled"))

    def _encode_text(self, caption: str) -> dict[str, np.ndarray]:
        with turn():
            found = self._model.encode_prompt(caption, guided=False)
        states, pooled = found.prompt_embeds, found.pooled_prompt_embeds
        return {"states": states} | ({} if pooled is None else {"pooled": pooled})

    def _ids(self, caption: str) -> dict[str, np.ndarray]:
        return {
            name: np.array([ids], np.int32)
            for name, ids in self._model.texts.token_ids(caption).items()
        }

    def _hint(self, one: Example, each: Cut) -> np.ndarray:
        """Return the control image in this cut: uint8 (H, W, 3)."""
        made: np.ndarray = self._kept.get(
            ("hint", one.picture.sha256, str(one.hint), each), partial(_make_hint, one, each)
        )
        return made


class PixelData(Data):
    """A training set of pixels; see ``open_pixels``."""

    def batch_shape(self, size: int) -> tuple[int, int, int, int]:
        bucket = self._largest()
        return size, bucket.height, bucket.width, 3

    def _prepare(self, one: Example, each: Cut) -> None:
        self._pixels(one, each)

    def _pixels(self, one: Example, each: Cut) -> np.ndarray:
        made: np.ndarray = self._kept.get(
            (one.picture.sha256, each), lambda: each.apply(load_on_white(one.picture.path))
        )
        return made

    def _stack(self, draws: Sequence[Draw]) -> Batch:
        found = self._drawn(draws)
        pixels = [to_model(self._pixels(one, each)) for one, each in found]
        labels = [one.picture.label for one, _ in found]
        return Batch(
            mean=np.concatenate(pixels),
            std=None,
            weights=np.array([one.weight for one, _ in found], np.float32),
            labels=np.array(labels, np.int32) if self.classes else None,
        )


def open_asked(
    folder: str | Path, model: LatentModel, options: DataOptions, cache: str | Path, **more: Any
) -> LatentData:
    """Open the data that the options ask for.

    Args:
        more: other arguments of ``open_data``.
    """
    return open_data(
        folder,
        model,
        cache=cache,
        resolution=options.resolution,
        buckets=options.buckets,
        caption=options.caption,
        flip=options.flip,
        crop=options.crop,
        skip_faulty=options.skip_faulty,
        **more,
    )


def open_data(
    folder: str | Path,
    model: LatentModel,
    *,
    cache: str | Path,
    resolution: tuple[int, int] | None = None,
    buckets: bool = True,
    caption: str | None = None,
    flip: bool = False,
    crop: str = "center",
    prior_folder: str | Path | None = None,
    prior_caption: str | None = None,
    prior_weight: float = 1.0,
    tokens: bool = False,
    control: str | Path | None = None,
    skip_faulty: bool = False,
) -> LatentData:
    """Open a folder of captioned pictures as a training set for a model.

    Args:
        folder: see ``data_folder``.
        model: its VAE and text encoders make the latents and the text.
        cache: folder where these are kept.
        resolution: (width, height) of the training pictures, in pixels. None: the model's own.
        buckets: let pictures keep their aspect ratio, at the area of ``resolution`` or less.
        caption: of pictures that have none. None: such a picture is an error.
        flip: mirror half of the pictures, by the seed.
        crop: one of ``data_buckets.CROPS``.
        prior_folder: pictures that the model itself made of the class, so that it does not forget
            it (Ruiz et al. 2023, DreamBooth). As many of them as of the others are used.
        prior_caption: their caption, where they have none.
        prior_weight: of their loss.
        tokens: give tokens in place of the encoded text.
        control: control images: the name of a preprocessor, "metadata" (those that metadata.jsonl
            names) or a folder that has a picture of the same name for each.
        skip_faulty: leave out what cannot be used.
    Raises: UsageError.
    """
    width, height = resolution or model.default_size
    multiple = _multiple(width, height, model.vae_config.factor)
    sizes = make_buckets(width, height, multiple, one_size=not buckets)
    side = min(width, height)
    seen = Seen(Path(cache) / "pictures.json")
    found = read_pictures(folder, caption=caption, side=side, seen=seen)
    found.require_usable(skip_faulty)
    examples = [
        Example(p, choose(p.width, p.height, sizes), hint=_hint_of(p, found.folder, control))
        for p in found.items
    ]
    notes = list(found.notes) + [f"left out: {fault}" for fault in found.faults]
    if prior_folder is not None:
        prior = read_pictures(prior_folder, caption=prior_caption, side=side, seen=seen)
        prior.require_usable(skip_faulty)
        notes += list(prior.notes) + [f"left out: {fault}" for fault in prior.faults]
        examples += [
            Example(p, choose(p.width, p.height, sizes), prior_weight)
            for p in _as_many(prior, found.count)
        ]
    seen.save()
    return LatentData(
        examples, model, ArrayCache(cache), tokens=tokens, flip=flip, crop=crop, notes=notes
    )


def open_pixels(
    folder: str | Path,
    *,
    resolution: tuple[int, int],
    classes: bool = False,
    flip: bool = False,
    crop: str = "center",
    skip_faulty: bool = False,
) -> PixelData:
    """Open a folder of pictures as a training set for a model of pixels.

    Args:
        folder: see ``data_folder``. Captions are not read.
        resolution: (width, height) of the training pictures, in pixels.
        classes: each sub-folder is a class.
        flip, crop, skip_faulty: as for ``open_data``.
    Raises: UsageError.
    """
    found = read_pictures(folder, texts=False, classes=classes, side=min(resolution))
    found.require_usable(skip_faulty)
    bucket = Bucket(*resolution)
    return PixelData(
        [Example(picture, bucket) for picture in found.items],
        {"pixels": True},
        flip=flip,
        crop=crop,
        classes=found.classes,
        notes=[*found.notes, *(f"left out: {fault}" for fault in found.faults)],
    )


@dataclass
class _Kept:
    """Arrays that were used last, up to a number of bytes."""

    most: int
    _held: OrderedDict[Any, Any] = field(default_factory=OrderedDict)
    _size: int = 0

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        made = make()
        self._held[key] = made
        self._size += _bytes_of(made)
        while self._size > self.most and len(self._held) > 1:
            _, old = self._held.popitem(last=False)
            self._size -= _bytes_of(old)
        return made


def _bytes_of(made: Any) -> int:
    arrays = made.values() if isinstance(made, dict) else (made,)
    return sum(one.nbytes for one in arrays)


def _joined(texts: Sequence[Text]) -> Text:
    pooled = [one.pooled for one in texts if one.pooled is not None]
    states = np.concatenate([one.states for one in texts])
    return Text(states, np.concatenate(pooled) if pooled else None)


def _described(each: Cut) -> list[Any]:
    return [*each.scaled, each.left, each.top, each.bucket.width, each.bucket.height, each.flip]


def _time_ids(one: Example, each: Cut) -> tuple[int, ...]:
    """SDXL's sizes: original (height, width), crop (top, left), target (height, width)."""
    picture, bucket = one.picture, each.bucket
    return picture.height, picture.width, each.top, each.left, bucket.height, bucket.width


def _multiple(width: int, height: int, factor: int) -> int:
    """Return what the sides of buckets are multiples of, in pixels.

    8 latents, as all public tools have it, or fewer for a small size, which would have no buckets.
    """
    for latents in (8, 4, 2):
        multiple = latents * factor
        if width % multiple == height % multiple == 0 and min(width, height) >= 8 * multiple:
            return multiple
    return factor


def _as_many(pictures: Pictures, count: int) -> Iterator[Picture]:
    """Repeat or leave out pictures of a class so that an epoch has ``count`` of them."""
    items = pictures.items
    for i, picture in enumerate(items[:count]):
        repeats = count // len(items) + (i < count % len(items))
        yield Picture(**{**vars(picture), "repeats": max(1, repeats)})


def _few_of_a_size(examples: Sequence[Example]) -> Iterator[str]:
    """Tell of buckets with very few pictures: a batch of them shows the same ones again."""
    counts = Counter[Bucket]()
    for one in examples:
        counts[one.bucket] += one.picture.repeats
    single = [str(bucket) for bucket, n in counts.items() if n == 1]
    if len(counts) > 1 and single:
        yield (
            f"the only picture of its size: {len(single)} of {len(counts)} sizes "
            f"({', '.join(single[:3])}); each of its batches shows it alone"
        )


def _hint_of(picture: Picture, folder: Path, control: str | Path | None) -> str | Path | None:
    """Find what the control image of a picture is made of."""
    if control is None:
        return None
    if control == "metadata":
        if picture.control is None:
            raise UsageError(
                f"{picture.name}: metadata.jsonl names no control image (conditioning_image)"
            )
        return picture.control
    if str(control) in PREPROCESSORS:
        return str(control)
    place = Path(control)
    if not place.is_dir():
        raise UsageError(
            f"{place}: is no folder of control images and no preprocessor "
            f"({', '.join(PREPROCESSORS)})"
        )
    beside = place / picture.name
    matches = sorted(p for p in beside.parent.glob("*") if p.stem == beside.stem and p.is_file())
    if len(matches) != 1:
        what = "no control image" if not matches else f"{len(matches)} control images"
        raise UsageError(f"{place}: has {what} for {picture.name}")
    return matches[0]


def _make_hint(one: Example, each: Cut) -> np.ndarray:
    if isinstance(one.hint, Path):
        # A control image may have another size than its picture, but not another shape.
        pixels = load_image(one.hint)
        pixels = resize(pixels, one.picture.width, one.picture.height)
        return each.apply(pixels)
    made = PREPROCESSORS[str(one.hint)](each.apply(load_on_white(one.picture.path)))
    return np.ascontiguousarray(made)
