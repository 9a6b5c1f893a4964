"""Read a folder of training pictures: the files, their captions, labels, repeats and faults.

Three forms are read, also side by side:

- pictures with a text file of the same name beside them (``cat.png``, ``cat.txt`` or ``.caption``);
- a ``metadata.jsonl`` in a folder: one JSON object a line with ``file_name`` and ``text``
  (huggingface.co/docs/datasets, "ImageFolder");
- kohya's sub-folders ``10_name``: each picture counts 10 times; ``name`` is the caption of a
  picture that has no other.

Every file is looked at before training starts. What cannot be used is counted and named, never
dropped without a word.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from mlxdiff.errors import UsageError, one_line
from mlxdiff.machine.disk import read_document, sha256
from mlxdiff.machine.temporary import temporary_file
from mlxdiff.pictures.image import is_transparent, load_on_white, open_picture

Facts: TypeAlias = tuple[int, int, int, int]

METADATA = "metadata.jsonl"
PICTURES = frozenset(
    (".png .jpg .jpeg .webp .bmp .tif .tiff .gif .avif .heic .heif .ppm .pgm .pnm").split()
)
"""Names of picture files end in one of these."""
CAPTIONS = (".txt", ".caption")
CONTROL_KEYS = ("conditioning_image_file_name", "conditioning_image")
"""Keys of metadata.jsonl that name the control image of a picture, as diffusers' examples do."""

_REPEATS = re.compile(r"([1-9]\d{0,5})_(.+)")
_MOST_METADATA = 256 << 20  # bytes
_SHOWN = 3  # files that a message names
_ENLARGED = 2  # times; a picture that needs more has nothing to teach about detail


@dataclass(frozen=True)
class Picture:
    """A picture to learn from.

    Attributes:
        path: the file.
        name: its path in the folder, with slashes.
        sha256: of the file, in hex.
        width, height: in pixels, the right way up.
        caption: what it shows; "" for training without text.
        label: number of its class; None without classes.
        repeats: how often it is used in an epoch.
        control: its control image, where the folder names one.
    """

    path: Path
    name: str
    sha256: str
    width: int
    height: int
    caption: str = ""
    label: int | None = None
    repeats: int = 1
    control: Path | None = None


@dataclass(frozen=True)
class Fault:
    """A reason why a file cannot be used."""

    kind: str
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class Pictures:
    """What a folder holds.

    Attributes:
        folder: the folder.
        items: the pictures, in the order of their names.
        classes: names of the classes; the place of a name is its label.
        faults: files that cannot be used.
        notes: what the user should know about the others, a line each.
    """

    folder: Path
    items: tuple[Picture, ...]
    classes: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Pictures of an epoch, repeats included."""
        return sum(picture.repeats for picture in self.items)

    def require_usable(self, skip_faulty: bool = False) -> None:
        """Stop before any work if files cannot be used.

        Args:
            skip_faulty: train without them; there must be others.
        Raises: UsageError that counts the faults by kind and names the first files.
        """
        if self.faults and not skip_faulty:
            kinds = Counter(fault.kind for fault in self.faults)
            counted = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
            first = "; ".join(str(fault) for fault in self.faults[:_SHOWN])
            more = len(self.faults) - _SHOWN
            rest = f"; and {more} more" if more > 0 else ""
            raise UsageError(
                f"{self.folder}: {len(self.faults)} of the files cannot be used ({counted}): "
                f"{first}{rest}. Correct or remove them, or train without them (--skip-faulty)"
            )
        if not self.items:
            raise UsageError(
                f"{self.folder}: holds no picture to train on; give a folder with pictures "
                "(PNG, JPEG, WebP, ...)"
            )


class Seen:
    """What is known of pictures that were decoded before, by the hash of their files.

    To decode thousands of large pictures takes minutes, at every start of a run.

    Args:
        path: a JSON file; one that cannot be read counts as empty.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._known = path, dict[str, Facts]()
        try:
            data = json.loads(read_document(path, _MOST_METADATA))
            found = {name: tuple(values) for name, values in data.items()}
        except (OSError, ValueError, RecursionError, AttributeError, TypeError):
            return
        if all(len(v) == 4 and all(type(n) is int for n in v) for v in found.values()):
            self._known = found

    def of(self, digest: str) -> Facts | None:
        """Return width, height, and whether a picture is transparent and animated (0 or 1)."""
        return self._known.get(digest)

    def add(self, digest: str, facts: Facts) -> None:
        """Remember a picture."""
        self._known[digest] = facts

    def save(self) -> None:
        """Write the file. A disk that takes no more loses time at the next start, nothing else."""
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with temporary_file(self._path.parent) as (temporary, file):
                file.write(json.dumps(self._known).encode())
                file.flush()
                os.replace(temporary, self._path)


@dataclass
class _Finding:
    """What has been found so far."""

    faults: list[Fault] = field(default_factory=list)
    transparent: list[str] = field(default_factory=list)
    animated: list[str] = field(default_factory=list)
    enlarged: list[str] = field(default_factory=list)

    def fault(self, kind: str, name: str, reason: str) -> None:
        self.faults.append(Fault(kind, name, reason))


def read_pictures(
    folder: str | os.PathLike[str],
    *,
    texts: bool = True,
    caption: str | None = None,
    classes: bool = False,
    side: int = 0,
    seen: Seen | None = None,
) -> Pictures:
    """Find the pictures of a folder and of its sub-folders, and check every one.

    Args:
        folder: the folder. Files whose names begin with a dot are not looked at.
        texts: every picture needs a caption. False: captions are not read.
        caption: for pictures that have none; may be "". None: such a picture is a fault.
        classes: each sub-folder is a class. Its label is its place in the order of names.
        side: the side of the training pictures, in pixels: a picture that must be enlarged more
            than twice is a fault. 0: any size will do.
        seen: pictures that were decoded before; they are not decoded again.
    Returns: the pictures, with all faults.
    Raises: UsageError if the folder cannot be read, or holds no class.
    """
    root = Path(folder)
    if not root.is_dir():
        what = "is not a folder" if os.path.lexists(root) else "no such folder"
        raise UsageError(f"{root}: {what}; give a folder of pictures")
    files = sorted(_walk(root), key=lambda path: path.relative_to(root).as_posix())
    pictures = [path for path in files if path.suffix.lower() in PICTURES]
    found = _Finding()
    names = _classes(root, pictures) if classes else ()
    words = _Captions(root, files, pictures, found) if texts else None
    items = []
    for path in pictures:
        name = path.relative_to(root).as_posix()
        if classes and path.parent == root:
            found.fault("outside a class", name, "lies in no class folder; move it into one")
            continue
        told = (None, None) if words is None else words.of(path, name, caption)
        if told is None:
            continue
        text, control = told
        facts = _look(path, name, side, found, seen)
        if facts is None:
            continue
        digest, width, height = facts
        label = names.index(path.relative_to(root).parts[0]) if classes else None
        repeats = 1 if classes else _repeats(path.relative_to(root).parts[:-1])[0]
        items.append(
            Picture(path, name, digest, width, height, text or "", label, repeats, control)
        )
    notes = [*_notes(found), *_duplicates(items), *_others(files)]
    return Pictures(root, tuple(items), names, tuple(found.faults), tuple(notes))


def _walk(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise UsageError(f"{error.filename}: cannot be read ({error.strerror})")

    for place, folders, names in os.walk(root, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _classes(root: Path, pictures: Sequence[Path]) -> tuple[str, ...]:
    inside = (path.relative_to(root).parts for path in pictures)
    names = tuple(sorted({parts[0] for parts in inside if len(parts) > 1}))
    if not names:
        raise UsageError(
            f"{root}: has no sub-folder with pictures, so there are no classes; put the pictures "
            "of each class into a sub-folder, or train without classes"
        )
    return names


def _repeats(folders: Sequence[str]) -> tuple[int, str | None]:
    """Read kohya's ``10_name`` of the innermost folder that has it."""
    for name in reversed(folders):
        if match := _REPEATS.fullmatch(name):
            return int(match[1]), match[2].strip()
    return 1, None


def _look(
    path: Path, name: str, side: int, found: _Finding, seen: Seen | None
) -> tuple[str, int, int] | None:
    """Decode a picture once. Return its hash and size, or None with a fault."""
    try:
        digest = sha256(path)
        facts = None if seen is None else seen.of(digest)
        if facts is None:
            with open_picture(path) as picture:
                transparent, frames = is_transparent(picture), getattr(picture, "n_frames", 1)
            height, width = load_on_white(path).shape[:2]
            facts = (width, height, int(transparent), int(frames > 1))
        width, height, hidden, animated = facts
    except (UsageError, OSError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        found.fault("unreadable", name, reason.removeprefix(f"{path}: "))
        return None
    if seen is not None:
        seen.add(digest, facts)
    short = min(width, height)
    if short * _ENLARGED < side:
        found.fault(
            "too small",
            name,
            f"{width}x{height} pixels; would be enlarged more than {_ENLARGED} times for {side}",
        )
        return None
    if short < side:
        found.enlarged.append(name)
    if hidden:
        found.transparent.append(name)
    if animated:
        found.animated.append(name)
    return digest, width, height


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _notes(found: _Finding) -> Iterator[str]:
    told = (
        (found.transparent, "transparent; laid on white"),
        (found.animated, "animated; the first frame is used"),
        (found.enlarged, "smaller than the training pictures; enlarged, so less sharp"),
    )
    for names, what in told:
        if names:
            yield f"{len(names)} {'picture is' if len(names) == 1 else 'pictures are'} {what}: " + (
                _some(names)
            )


def _duplicates(items: Sequence[Picture]) -> Iterator[str]:
    alike: dict[str, list[str]] = {}
    for item in items:
        alike.setdefault(item.sha256, []).append(item.name)
    twice = [" = ".join(names) for names in alike.values() if len(names) > 1]
    if twice:
        what = (
            "picture lies there more than once, so it counts"
            if len(twice) == 1
            else "pictures lie there more than once, so they count"
        )
        yield f"{len(twice)} {what} more: {_some(twice)}"


def _others(files: Sequence[Path]) -> Iterator[str]:
    known = PICTURES | set(CAPTIONS)
    kinds = Counter(
        path.suffix.lower() or path.name
        for path in files
        if path.suffix.lower() not in known and path.name != METADATA
    )
    if kinds:
        yield f"other files are not read: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}"


class _Captions:
    """The captions of a folder, matched to its pictures. What matches nothing is a fault."""

    def __init__(
        self, root: Path, files: Sequence[Path], pictures: Sequence[Path], found: _Finding
    ) -> None:
        self._root, self._found = root, found
        self._lines: dict[Path, tuple[str, Path | None]] = {}
        self._beside = {path for path in files if path.suffix.lower() in CAPTIONS}
        self._controls: set[Path] = set()
        known = set(pictures)
        for path in files:
            if path.name == METADATA:
                self._read_lines(path, known)
        used = {path.with_suffix(end) for path in known for end in CAPTIONS}
        for path in sorted(self._beside - used):
            name = path.relative_to(root).as_posix()
            found.fault("captions without a picture", name, "has no picture of this name beside it")

    def of(self, path: Path, name: str, fallback: str | None) -> tuple[str, Path | None] | None:
        """Return the caption and the control image of a picture.

        None: it has none, which is a fault, or it is itself a control image.
        """
        if path in self._controls and path not in self._lines:
            return None
        text, control = self._lines.get(path, (None, None))
        beside = [p for p in (path.with_suffix(end) for end in CAPTIONS) if p in self._beside]
        if len(beside) + (text is not None) > 1:
            where = [p.name for p in beside] + [METADATA] * (text is not None)
            self._found.fault("two captions", name, f"has captions in {' and '.join(where)}")
            return None
        if beside:
            text = self._read(beside[0])
            if text is None:
                return None
        if text is None:
            folders = path.relative_to(self._root).parts[:-1]
            text = fallback if fallback is not None else _repeats(folders)[1]
        if text is None:
            self._found.fault(
                "without a caption", name, f"has no {path.stem}.txt and no line in {METADATA}"
            )
            return None
        return text, control

    def _read(self, path: Path) -> str | None:
        try:
            text = read_document(path).decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            name = path.relative_to(self._root).as_posix()
            self._found.fault("unreadable captions", name, f"cannot be read ({reason})")
            return None
        return " ".join(text.split())

    def _read_lines(self, path: Path, known: set[Path]) -> None:
        where = path.relative_to(self._root).as_posix()
        try:
            lines = read_document(path, _MOST_METADATA).decode("utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            self._found.fault("unreadable captions", where, f"cannot be read ({reason})")
            return
        for number, line in enumerate(lines, 1):
            if line.strip():
                self._read_line(path, f"{where}, line {number}", line, known)

    def _read_line(self, path: Path, where: str, line: str, known: set[Path]) -> None:
        fault = self._found.fault
        try:
            data = json.loads(line)
        except (ValueError, RecursionError):
            fault("unreadable captions", where, "is not JSON")
            return
        name = data.get("file_name") if isinstance(data, dict) else None
        if not isinstance(name, str) or not isinstance(data.get("text", ""), str):
            fault("unreadable captions", where, 'expected {"file_name": "...", "text": "..."}')
            return
        picture = self._inside(path.parent, name)
        if picture is None or picture not in known:
            what = "is no picture of this folder"
            fault("captions without a picture", where, f"file_name {name!r} {what}")
            return
        if picture in self._lines:
            fault("two captions", where, f"file_name {name!r} stands in two lines")
            return
        if "text" not in data:
            fault("without a caption", where, f"the line of {name!r} has no text")
            return
        control = next((data[key] for key in CONTROL_KEYS if key in data), None)
        if control is not None:
            if (
                not isinstance(control, str)
                or (shown := self._inside(path.parent, control)) is None
            ):
                fault("unreadable captions", where, f"{control!r} is no file of this folder")
                return
            control = shown
            self._controls.add(shown)
        self._lines[picture] = (" ".join(data["text"].split()), control)

    def _inside(self, place: Path, name: str) -> Path | None:
        """Return the path of a name in a metadata file; None if it leads out of the folder."""
        if "\0" in name or os.path.isabs(name):
            return None
        path = Path(os.path.normpath(place / name))
        return path if path.is_relative_to(os.path.normpath(self._root)) else None
