"""The errors that mlxdiff raises on purpose: one line that names the thing and the way out."""

from __future__ import annotations


class MlxdiffError(Exception):
    """Root of all errors caused by what the user gave us. The command line exits with 2 on it."""


class UsageError(MlxdiffError):
    """An argument, option or combination of options that cannot be honoured."""


class ConfigError(MlxdiffError):
    """A configuration file that is malformed, or asks for something that is not implemented."""


class CheckpointError(MlxdiffError):
    """Weights or tokenizer files that are missing, damaged, incomplete or not what they claim."""


class HubError(MlxdiffError):
    """A model that could not be fetched from, or found in the cache of, the Hugging Face hub."""
