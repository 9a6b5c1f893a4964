"""What the site needs beyond the pages: links out of docs/, and the reference of the options.

A page links to files of the repository (`../examples/...`), so that it also reads well there. On
the site a picture is copied, and any other file is a link to the repository.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import reference
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent.parent
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(((?:\.\./)[^)\s#]+)(#[^)\s]*)?\)")
_FOLDER = "repository"
_STYLE = "assets/extra.css"
_WORKER = "assets/javascripts/worker_in_a_frame.js"


def on_config(config: Any) -> Any:
    """Take the address of the repository from pyproject.toml."""
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    config.extra["repository"] = re.search(r'^Source = "(.*)"', project, re.M)[1]  # type: ignore[index]
    return config


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the pictures that pages show from outside docs/, and the page of options."""
    for page in list(files.documentation_pages()):
        for picture, _, target, _ in _LINK.findall(page.content_string):
            place = f"{_FOLDER}/{_inside(target)}"
            if picture and files.get_file_from_path(place) is None:
                source = str(ROOT / _inside(target))
                files.append(File.generated(config, place, abs_src_path=source))
    for place in (_WORKER, _STYLE):
        source = str(Path(__file__).with_name(posixpath.basename(place)))
        files.append(File.generated(config, place, abs_src_path=source))
    pages = {"options": reference.options_page(), "python": reference.python_page()}
    for name, content in pages.items():
        files.append(File.generated(config, f"reference-{name}.md", content=content))
    return files


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Replace the links that leave docs/."""

    def replaced(found: re.Match[str]) -> str:
        picture, text, target, anchor = found.groups()
        inside = _inside(target)
        if picture:
            return f"![{text}]({_FOLDER}/{inside})"
        if not (ROOT / inside).exists():
            raise FileNotFoundError(f"{text}: links to {target}, which does not exist")
        kind = "tree" if (ROOT / inside).is_dir() else "blob"
        return f"[{text}]({config.extra['repository']}/{kind}/main/{inside}{anchor or ''})"

    return _LINK.sub(replaced, markdown)


def on_post_page(output: str, page: Any, config: Any, **_: Any) -> str:
    """Take the script that lets the search work from the disk from here, not from elsewhere."""
    up = "../" * page.url.count("/")
    return output.replace("https://unpkg.com/iframe-worker/shim", f"{up}{_WORKER}")


def _inside(target: str) -> str:
    return posixpath.normpath(posixpath.join("docs", target))
