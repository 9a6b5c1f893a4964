"""The version of mlxdiff, in the one place that says it beside pyproject.toml."""

__version__ = "0.1.0"
