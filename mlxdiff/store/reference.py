"""References to models on the Hugging Face hub: `org/name[/FILE][@revision]`, or a web address."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlxdiff.errors import HubError

SINGLE_FILE_SUFFIXES = (".safetensors", ".ckpt")
"""Suffixes of files that can hold a whole model."""

WEIGHT_SUFFIXES = (*SINGLE_FILE_SUFFIXES, ".gguf", ".bin", ".pt", ".pth")
"""Suffixes of all weight files."""

_NAME = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_REPO_ID = re.compile(
    rf"(?P<name>{_NAME}/{_NAME})(?P<file>(?:/[\w.()+ -]+)+\.(?:safetensors|ckpt|gguf|bin|pth?))?"
    r"(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?",
    re.ASCII,
)
_URL = re.compile(
    rf"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<name>{_NAME}/{_NAME})/?"
    r"(?:(?:blob|resolve|tree)/(?P<revision>[\w.%-]+)(?:/(?P<file>[^?#]+))?)?(?:[?#].*)?",
    re.ASCII,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class Reference:
    """A model on the hub: `org/name[/FILE][@revision]`.

    Attributes:
        name: `org/name`.
        revision: branch, tag or commit.
        file: path of a single-file checkpoint in the repo, or "" for the repo itself.
    """

    name: str
    revision: str = "main"
    file: str = ""

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else ""
        return f"{self.name}{file}" + (f"@{self.revision}" if self.revision != "main" else "")

    @property
    def is_pinned(self) -> bool:
        """True if the revision is a commit. A commit never changes."""
        return is_commit(self.revision)


def is_digest(text: str) -> bool:
    """Return True for git's sha1 of a blob or a sha256, in lower-case hex."""
    return _DIGEST.fullmatch(text) is not None


def is_repo_path(text: str) -> bool:
    """Return True for the path of a file in a repo that cannot lead out of the repo's folder."""
    return (
        len(text) <= 1000
        and "\\" not in text
        and min(text, default="\0") >= " "  # no control characters
        and not {"", ".", ".."} & set(text.split("/"))
    )


def is_address(text: object) -> bool:
    """Return True if a text is a web address. Only addresses of models on the hub are fetched."""
    return isinstance(text, str) and text.lower().startswith(("http://", "https://"))


def is_commit(revision: str) -> bool:
    """Return True if a revision is the full name of a commit (40 hex digits)."""
    return _COMMIT.fullmatch(revision) is not None


def parse(text: str, revision: str | None = None) -> Reference | None:
    """Parse a reference. Return None if the text has another form.

    Args:
        text: `org/name[/FILE.safetensors][@revision]`, or the web address of a repo or of one file
            in it on huggingface.co.
        revision: revision from a separate argument.
    Raises: HubError if the text and `revision` name different revisions.
    """
    match = _REPO_ID.fullmatch(text) or _URL.fullmatch(text)
    if match is None or ".." in text or "--" in match["name"]:
        return None
    if match["name"].endswith(WEIGHT_SUFFIXES):
        return None
    written, file = match["revision"], (match["file"] or "").strip("/")
    if match.re is _URL:
        written = written and written.replace("%2F", "/")
        file = file.replace("%20", " ")
        if file and not file.endswith(WEIGHT_SUFFIXES):
            return None
    if written and revision and written != revision:
        raise HubError(
            f"{text}: names the revision {written!r}, but revision {revision!r} is given too; "
            "give one of them"
        )
    return Reference(match["name"], written or revision or "main", file)


def parse_or_raise(text: str) -> Reference:
    """Parse a reference. Raises: HubError if the text has another form."""
    reference = parse(text)
    if reference is None:
        raise HubError(f"{text!r} is not a model on the hub; expected org/name[@revision]")
    return reference


def is_repo_id(text: str) -> bool:
    """Return True if a text has the form of a `Reference`. A local file can have the same name."""
    return parse(text) is not None
