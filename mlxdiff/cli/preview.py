"""``--preview``: show the picture while it is drawn, in the terminal or as a file.

Environment variables identify terminals that can show pictures. Escape codes go only to these,
never into a pipe or a file. Sources: the Kitty graphics protocol; iTerm2's inline images protocol.
"""

from __future__ import annotations

import base64
import io
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from mlxdiff.cli.streams import clear, tell
from mlxdiff.errors import UsageError
from mlxdiff.pictures.formats import ANIMATIONS, animation, ending
from mlxdiff.pictures.names import Template

ROWS = 12  # height of a preview in the terminal, in lines of text
_PIXELS = 4  # maximum number of pixels per latent along a side, in a file: a PNG takes time
_MARK = {"Comment": "A preview by mlxdiff"}  # text in the file, by which it is known again
_KITTY_CHUNK = 4096
_KITTY_ID = 1112  # a new picture with the same id replaces the old one


def terminal_protocol(environment: Mapping[str, str], stream: TextIO) -> str | None:
    """Return the terminal's protocol for pictures: "kitty", "iterm2", or None if it has none.

    Args:
        environment: environment variables of the process.
        stream: the stream to write to.
    """
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if not stream.isatty() or term == "dumb":
        return None
    if "TMUX" in environment or term.startswith(("screen", "tmux")):
        return None  # by default, these do not pass pictures on
    if "KITTY_WINDOW_ID" in environment or term in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    if program in ("iTerm.app", "WezTerm", "mintty") or "ITERM_SESSION_ID" in environment:
        return "iterm2"
    return None


def kitty(png: bytes) -> str:
    """Make escape codes that show a picture at the cursor, ROWS high, without moving the cursor."""
    data = base64.standard_b64encode(png).decode()
    pieces = [data[i : i + _KITTY_CHUNK] for i in range(0, len(data), _KITTY_CHUNK)]
    head = f"a=T,f=100,q=2,C=1,i={_KITTY_ID},r={ROWS},"
    return "".join(
        f"\x1b_G{head if i == 0 else ''}m={int(i < len(pieces) - 1)};{piece}\x1b\\"
        for i, piece in enumerate(pieces)
    )


def iterm2(png: bytes) -> str:
    """Make the escape codes for iTerm2 and compatible terminals."""
    data = base64.standard_b64encode(png).decode()
    options = f"inline=1;size={len(png)};height={ROWS};preserveAspectRatio=1"
    return f"\x1b]1337;File={options}:{data}\x07"


class Preview:
    """Show or write the previews of a run.

    Args:
        file: path template, see ``pictures.names``. None shows previews in the terminal, or writes
            them beside the pictures if the terminal shows none.
        every: number of steps between previews.
        force: replace existing files.
    Raises: UsageError.
    """

    def __init__(self, file: str | None, every: int, force: bool) -> None:
        endings = (".png", *ANIMATIONS)
        self.file = None if file is None else Template(file, "--preview-file", endings=endings)
        self.is_animated = file is not None and ending(file) in ANIMATIONS
        self._frames: list[Any] = []
        self.every, self.force = every, force
        self.protocol = None if file else terminal_protocol(os.environ, sys.stderr)
        # The last preview: picture, its size in a file, and the path of the final picture.
        self.last: Any = None
        self.path: Path | None = None  # file of the last preview
        self._values: Sequence[Mapping[str, int | str]] = ()
        self._ours: set[Path] = set()
        self._begun = False
        if every < 1:
            raise UsageError(f"--preview-every is {every}; expected at least 1")

    def check(self, outputs: list[Path], values: Sequence[Mapping[str, int | str]]) -> None:
        """Raise UsageError if a preview cannot be written or would overwrite a picture.

        Args:
            outputs: files of the final pictures.
            values: of the fields of their names.
        """
        from mlxdiff.pictures.image import check_writable, require_right_to_write

        self._values = values
        if self.protocol is not None:
            return
        finals = {other.absolute() for other in outputs}
        for index, output in enumerate(outputs):
            path = self._path(index, 1, output)
            if path.absolute() in finals:
                raise UsageError(f"{path}: is the output file; give another name for the preview")
            path.parent.mkdir(parents=True, exist_ok=True)
            if index == 0:
                require_right_to_write(path.parent)
            endings = (".png", *ANIMATIONS)
            check_writable(path, self.force or self._is_left_over(path), endings)

    def show(self, pipe: Any, step: Any, output: Path, index: int) -> None:
        """Show a preview, if one is due at this step.

        Args:
            pipe: the Pipeline.
            step: the Step.
            output: file of the final picture.
            index: index of the picture among all prompts.
        """
        if step.index % self.every and step.index != step.total - 1:
            return
        config = getattr(pipe.model, "vae_config", None)
        factor = min(getattr(config, "factor", 1), _PIXELS)
        height, width, _ = step.latents.shape[-3:]
        image = step.sketch()
        self.last = image, (width * factor, height * factor), output
        if self.protocol is not None:
            self._draw(image)
            return
        if self.is_animated:
            self._animate(step, index, output)
            return
        path = self._path(index, step.index + 1, output)
        if not self._begun and self.file is None:
            tell(
                "Note: this terminal cannot show pictures (Kitty, Ghostty, iTerm2, WezTerm and "
                f"mintty can); the preview is in {path} until the picture is finished"
            )
        self._begun = True
        self._write(path)

    def _animate(self, step: Any, index: int, output: Path) -> None:
        """Keep a frame; after the last step write all frames of the picture."""
        self._frames.append(self._enlarged())
        if step.index == step.total - 1:
            from mlxdiff.pictures.image import write_bytes

            path, frames = self._path(index, step.index + 1, output), self._frames
            self._frames = []
            write_bytes(animation(frames, ending(path)), path, self.force or path in self._ours)
            self._ours.add(path)
            self.path = path

    def _path(self, index: int, step: int, output: Path) -> Path:
        if self.file is None:
            return _beside(output)
        return self.file.fill(**{**self._values[index], "step": step})

    def _is_left_over(self, path: Path) -> bool:
        """Return True for a preview beside a picture whose run was killed."""
        from mlxdiff.pictures.image import open_picture

        if self.file is not None or not path.is_file():
            return False
        try:
            with open_picture(path) as picture:
                return _MARK.items() <= picture.info.items()
        except UsageError:
            return False

    def _draw(self, image: Any) -> None:
        data = io.BytesIO()
        image.save(data, format="PNG", compress_level=1)
        codes = {"kitty": kitty, "iterm2": iterm2}[str(self.protocol)](data.getvalue())
        if not self._begun:  # make room above the line that shows the progress
            clear()
            sys.stderr.write("\r" + "\n" * ROWS)
        self._begun = True
        sys.stderr.write(f"\x1b7\r\x1b[{ROWS}A{codes}\x1b8")
        sys.stderr.flush()

    def _enlarged(self) -> Any:
        """Return the last preview at its size in a file."""
        import numpy as np

        from mlxdiff.pictures.image import resize, to_image

        image, size, _ = self.last
        return to_image(resize(np.asarray(image), *size)) if image.width < size[0] else image

    def _write(self, path: Path) -> None:
        from mlxdiff.pictures.image import save_png

        image = self._enlarged()
        ours = self.force or path in self._ours or self._is_left_over(path)
        save_png(image, path, _MARK, overwrite=ours, compress_level=1)
        self._ours.add(path)
        self.path = path

    def keep(self) -> Path | None:
        """Return the file of the last preview; write it now if it was only in the terminal."""
        if self.path is None and self.last is not None:
            self._write(_unused(_beside(self.last[2])))
        return self.path

    def done(self) -> None:
        """Finish: delete the previews beside the pictures, unless the user named their file."""
        if self.file is None and self.protocol is None:
            for path in self._ours:
                path.unlink(missing_ok=True)
        self.last, self.path = None, None
        self._frames = []


def _beside(output: Path) -> Path:
    return output.with_name(f"{output.stem}-preview.png")


def _unused(path: Path) -> Path:
    """Return the path, or a numbered variant that does not exist."""
    names = [path] + [path.with_name(f"{path.stem}-{i}.png") for i in range(2, 1000)]
    return next((name for name in names if not name.exists()), path)
