"""mlxdiff."""
