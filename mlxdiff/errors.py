"""The errors that mlxdiff raises on purpose: one line that names the thing and the way out."""

from __future__ import annotations


class MlxdiffError(Exception):
    """Base class of all errors that the user's input causes. The command line exits with 2."""


class UsageError(MlxdiffError):
    """An argument, an option or a combination of options that mlxdiff cannot honour."""


class UnknownAttribute(UsageError, AttributeError):
    """An attribute that an object does not have."""


class ConfigError(MlxdiffError):
    """A configuration file that is malformed or asks for an unsupported feature."""


class CheckpointError(MlxdiffError):
    """Weights or tokenizer files that are missing, damaged, incomplete or of another kind."""


class HubError(MlxdiffError):
    """A model that cannot be fetched from the Hugging Face hub and is not in the cache."""


def one_line(error: object) -> str:
    """Return the text of an error on one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."
