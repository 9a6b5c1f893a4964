"""Reads a config strictly: what takes keys out of a file one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, overload

from mlxdiff.errors import ConfigError

# Bounds on what a file may ask for, far above every real model: a damaged or hostile config must
# not make the list of its parameters, or a shape, grow without end.
MOST_LAYERS = 256
MOST_CHANNELS = 1 << 24


class ConfigReader:
    """Takes keys out of a config file one by one, so that what is left over is known."""

    def __init__(self, data: Mapping[str, Any], where: str, class_names: tuple[str, ...]) -> None:
        self.where = where
        self.left = {k: v for k, v in data.items() if not k.startswith("_")}
        found = data.get("_class_name")
        if found is not None and found not in class_names:
            raise ConfigError(
                f"{where}: _class_name is {found!r}, expected {' or '.join(class_names)}"
            )

    def fail(self, key: str, value: Any, expected: str) -> ConfigError:
        return ConfigError(f"{self.where}: {key} = {value!r} is not supported; expected {expected}")

    def take(self, key: str, default: Any) -> Any:
        return self.left.pop(key, default)

    def integer(
        self, key: str, default: int | None, least: int = 1, most: int = MOST_CHANNELS
    ) -> Any:
        value = self.take(key, default)
        if value is None and default is None:
            return None
        if not is_int(value) or not least <= value <= most:
            raise self.fail(key, value, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float | None) -> Any:
        value = self.take(key, default)
        if value is None and default is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fail(key, value, "a number")
        return float(value)

    @overload
    def flag(self, key: str, default: bool) -> bool: ...

    @overload
    def flag(self, key: str, default: None) -> bool | None: ...

    def flag(self, key: str, default: bool | None) -> bool | None:
        value = self.take(key, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, value, "true or false")
        return value

    def integers(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        value = self.take(key, default)
        if not isinstance(value, (list, tuple)) or not value or not all(map(is_int, value)):
            raise self.fail(key, value, "a list of whole numbers")
        if len(value) > MOST_LAYERS or not all(1 <= v <= MOST_CHANNELS for v in value):
            raise self.fail(key, value, f"whole numbers from 1 to {MOST_CHANNELS}")
        return tuple(value)

    def choices(
        self, key: str, default: tuple[str, ...], allowed: tuple[str, ...]
    ) -> tuple[str, ...]:
        value = self.take(key, default)
        if not isinstance(value, (list, tuple)) or not value:
            raise self.fail(key, value, "a list of block types")
        for entry in value:
            if entry not in allowed:
                raise self.fail(key, entry, " or ".join(allowed))
        return tuple(value)

    def size(self, key: str) -> tuple[int, int] | None:
        """(height, width), where the file gives one number for both, two, or null."""
        value = self.take(key, None)
        if value is None:
            return None
        sides = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
        if len(sides) != 2 or not all(is_int(v) and 1 <= v <= MOST_CHANNELS for v in sides):
            raise self.fail(key, value, "one or two whole numbers of at least 1")
        return sides

    def per_block(
        self,
        key: str,
        default: Any,
        blocks: int,
        kind: type = int,
        most: int = MOST_CHANNELS,
    ) -> tuple[Any, ...]:
        """One value for each block, where the file gives either one for all or a list."""
        value = self.take(key, default)
        values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * blocks

        def check(v: Any) -> bool:
            return isinstance(v, bool) if kind is bool else is_int(v) and 1 <= v <= most

        if len(values) != blocks or not all(map(check, values)):
            raise self.fail(key, value, f"one {kind.__name__}, or a list of {blocks}")
        return values

    def per_block_depths(
        self, key: str, default: int, layers: tuple[int, ...]
    ) -> tuple[tuple[int, ...], ...]:
        """Transformer depth of each layer of each block: a number, a list, or a list of lists."""
        value = self.take(key, default)
        blocks = tuple(value) if isinstance(value, (list, tuple)) else (value,) * len(layers)
        expected = f"a whole number, or a list of {len(layers)} whole numbers or lists"
        if len(blocks) != len(layers):
            raise self.fail(key, value, expected)
        depths = []
        for block, count in zip(blocks, layers, strict=True):
            depth = tuple(block) if isinstance(block, (list, tuple)) else (block,) * count
            if len(depth) != count or not all(is_int(d) and 0 <= d <= MOST_LAYERS for d in depth):
                raise self.fail(key, value, expected)
            depths.append(depth)
        return tuple(depths)

    def only(self, key: str, default: Any, *allowed: Any) -> Any:
        """A key of which only these values are implemented."""
        value = self.take(key, default)
        if not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
            raise self.fail(key, value, " or ".join(map(repr, allowed)))
        return value

    def finish(self, no_effect: Mapping[str, str]) -> None:
        unknown = sorted(set(self.left) - set(no_effect))
        if unknown:
            shown = ", ".join(f"{k} = {self.left[k]!r}" for k in unknown[:10])
            raise ConfigError(
                f"{self.where}: {len(unknown)} unknown key(s): {shown}; it may change what the "
                "model computes, so it is not ignored (remove it if you know it has no effect)"
            )


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


TRAINING = "only used in training"
SETTING = "a library setting, not part of the computation"
