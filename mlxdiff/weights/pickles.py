"""PyTorch's own files (.ckpt .bin .pt .pth), read without torch and without running them.

A pickle is a program, and loading it runs it. Here a small interpreter reads it and calls nothing.
The interpreter knows a few names (``_CALLS``: tensors, parameters, dicts). Each of them makes a
plain record of the requested object. Any other class or function, and everything made from it,
becomes an inert placeholder without values. ``PickleFile.ignored`` lists the placeholders. A
placeholder in the place of a needed tensor is an error.

A file cannot make memory or time grow out of proportion. A pickle may have MAX_PICKLE bytes and
MAX_STEPS steps, and each step makes one small object. Copies count as steps. No table has keys from
the file except text. Nothing recurses with the nesting of the file. Every length in a file is
checked against the file's size before use.

Formats: pickletools (the opcodes); torch/serialization.py (1.6 and later: an uncompressed zip
    archive of ``data.pkl`` and ``data/0``, ``data/1``, ...; before: five pickles, then the
    storages); APPNOTE.TXT of PKWARE (zip, zip64).
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from mlxdiff.errors import CheckpointError
from mlxdiff.machine.disk import Cursor, SourceFile
from mlxdiff.weights.tensors import (
    MAX_NAME,
    LazyTensor,
    Shape,
    TensorFile,
    foreign,
    is_unicode,
    lazy,
    shown,
)

SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
"""Usual suffixes of such files."""

MAX_PICKLE = 32 << 20  # bytes; SD 1.5 has 300 kB, or some MB with its training state
MAX_STEPS = 2_000_000  # opcodes and copied items; SDXL with its training state has 200,000
MAX_CLASSES = 1000  # different names of classes and functions; real files have some dozens
MAX_ENTRIES = 200_000  # entries of a zip archive; SDXL has 3000
MAX_DIRECTORY = 64 << 20  # bytes of a zip directory
MAX_ARGUMENTS = 16  # arguments of a known call
MAX_LISTED = 1000  # lines of ``ignored`` for one reason
MAX_REPEATED = 1 << 20  # values of a tensor that is larger than its storage (torch's expand)

MAGIC = 0x1950A86A20F9469CFC6C  # first number of the format before torch 1.6
PROTOCOL = 1001

NESTED = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "params_ema",
    "params",
    "weights",
    "string_to_param",
)
"""Keys under which tools store the table of weights. The first key that exists counts."""

# Type name in safetensors -> bytes per value.
_WIDTHS = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
# Class of a storage -> dtype (None if not supported), bytes per value.
_STORAGES: dict[str, tuple[str | None, int]] = {
    f"torch.{device}{name}Storage": (dtype, width)
    for device in ("", "cuda.")
    for name, dtype, width in (
        ("Double", "F64", 8),
        ("Float", "F32", 4),
        ("Half", "F16", 2),
        ("BFloat16", "BF16", 2),
        ("Long", "I64", 8),
        ("Int", "I32", 4),
        ("Short", "I16", 2),
        ("Char", "I8", 1),
        ("Byte", "U8", 1),
        ("Bool", "BOOL", 1),
        ("ComplexDouble", None, 16),
        ("ComplexFloat", None, 8),
        ("QInt32", None, 4),
        ("QInt8", None, 1),
        ("QUInt8", None, 1),
        ("QUInt4x2", None, 1),
        ("QUInt2x4", None, 1),
    )
} | dict.fromkeys(("torch.storage.UntypedStorage", "torch.UntypedStorage"), (None, 1))
# torch.dtype -> dtype, for tensors over an untyped storage.
_TYPES = {
    f"torch.{name}": dtype
    for name, dtype in {
        "float64": "F64",
        "float32": "F32",
        "float16": "F16",
        "bfloat16": "BF16",
        "float8_e4m3fn": "F8_E4M3",
        "float8_e5m2": "F8_E5M2",
        "float8_e8m0fnu": "F8_E8M0",
        "int64": "I64",
        "int32": "I32",
        "int16": "I16",
        "int8": "I8",
        "uint64": "U64",
        "uint32": "U32",
        "uint16": "U16",
        "uint8": "U8",
        "bool": "BOOL",
    }.items()
}
# Modules that a pickle of weights does not need, and harmless names in two of them.
_PROGRAMS = (
    "os posix nt subprocess sys builtins __builtin__ importlib runpy socket shutil pty ctypes code "
    "webbrowser pickle marshal types functools operator urllib requests http commands torch.hub"
).split()
_HARMLESS = [
    f"{module}.{name}"
    for module in ("builtins", "__builtin__")
    for name in (
        "bool bytearray bytes complex dict float frozenset int list long object range set slice "
        "str tuple unicode"
    ).split()
]

OBJECT = "an object or function in the pickle; it was neither run nor kept"
PROGRAM = "runs code or reaches the system in programs that trust pickles; it was not run"
BESIDE = "is outside the table of weights (settings or training state)"


# ------------------------------------------------------------------------------ values of a pickle


class _Name:
    """A class or function named in the pickle. Nothing is imported."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path


class _Inert:
    """A placeholder for the result of an unknown call."""

    __slots__ = ("what",)

    def __init__(self, what: str) -> None:
        self.what = what


class _Table:
    """The items of a dict, in order. Not a dict, because hashing a file's keys can be slow."""

    __slots__ = ("items",)

    def __init__(self, items: list[tuple[Any, Any]]) -> None:
        self.items = items


class _Storage:
    """A run of values in the file: ``size`` bytes from ``start`` in the storage ``key``."""

    __slots__ = ("dtype", "key", "name", "size", "start", "whole", "width")

    def __init__(
        self, name: str, dtype: str | None, width: int, key: str, whole: int, start: int, size: int
    ) -> None:
        self.name, self.dtype, self.width, self.key = name, dtype, width, key
        self.whole, self.start, self.size = whole, start, size


class _Tensor:
    """The arguments of torch._utils._rebuild_tensor. They are checked before use."""

    __slots__ = ("dtype", "offset", "shape", "storage", "strides")

    def __init__(
        self, storage: _Storage, dtype: str | None, offset: Any, shape: Any, strides: Any
    ) -> None:
        self.storage, self.dtype = storage, dtype
        self.offset, self.shape, self.strides = offset, shape, strides


class _Fault(Exception):
    """The file is damaged or exceeds a limit. The text gives the reason."""


def _describe(value: Any) -> str:
    """Describe any value in a few words."""
    if isinstance(value, _Inert):
        return value.what
    if isinstance(value, _Name):
        return f"the name {value.path}"
    if isinstance(value, _Tensor):
        return "a tensor"
    if isinstance(value, _Table):
        return "a table"
    if isinstance(value, _Storage):
        return "a storage"
    return "None" if value is None else f"of type {type(value).__name__}"


# ---------------------------------------------------------------------------------- the interpreter


class _Interpreter:
    """Interprets the opcodes of pickles. It makes only plain Python values and the classes above.

    Attributes:
        storages: key -> (bytes per value, total bytes) of each named storage.
        names: path -> each named class or function.
    """

    def __init__(self) -> None:
        self.storages: dict[str, tuple[int, int]] = {}
        self.names: dict[str, _Name] = {}
        self._steps = 0

    def run(self, stream: BinaryIO) -> Any:
        """Return the value of one pickle in memory. The stream is then at the end of the pickle.

        Raises: _Fault.
        """
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        actions = self._ACTIONS
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes in old text opcodes
                for opcode, argument, _ in pickletools.genops(stream):
                    self._count(1)
                    action = actions.get(opcode.name)
                    if action is None:
                        self._stack.append(argument)
                    else:
                        action(self, argument)
            return self._stack.pop()
        except (IndexError, KeyError):
            raise _Fault("damaged: its pickle uses a value that does not exist") from None
        except (ValueError, OverflowError, struct.error) as error:
            raise _Fault(f"damaged or truncated: its pickle ends early ({error})") from None

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise _Fault(
                f"its pickle takes more than {MAX_STEPS} steps; no checkpoint needs so many"
            )

    # Opcodes. An opcode that is not in _ACTIONS pushes its argument.

    def _nothing(self, _: Any) -> None:
        """Do nothing (PROTO, FRAME and STOP)."""

    def _refuse(self, _: Any) -> None:
        raise _Fault("damaged: its pickle needs buffers from outside the file")

    def _none(self, _: Any) -> None:
        self._stack.append(None)

    def _true(self, _: Any) -> None:
        self._stack.append(True)

    def _false(self, _: Any) -> None:
        self._stack.append(False)

    def _mark(self, _: Any) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._outer.pop()
        return items

    def _pop(self, _: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._since_mark()

    def _pop_mark(self, _: Any) -> None:
        self._since_mark()

    def _duplicate(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def _put(self, index: int) -> None:
        if not 0 <= index < 1 << 32:
            raise _Fault("damaged: its pickle gives a value a number that is too large")
        self._memo[index] = self._stack[-1]

    def _memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _empty_list(self, _: Any) -> None:
        self._stack.append([])

    def _list(self, _: Any) -> None:
        items = self._since_mark()
        self._stack.append(items)

    def _append(self, _: Any) -> None:
        self._extend([self._stack.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is list:
            target.extend(items)
        elif not isinstance(target, (_Inert, _Name)):
            raise _Fault(f"damaged: its pickle appends to a value {_describe(target)}")

    def _empty_tuple(self, _: Any) -> None:
        self._stack.append(())

    def _tuple(self, _: Any) -> None:
        items = tuple(self._since_mark())
        self._stack.append(items)

    def _tuple1(self, _: Any) -> None:
        self._stack[-1:] = [(self._stack[-1],)]

    def _tuple2(self, _: Any) -> None:
        self._stack[-2:] = [(self._stack[-2], self._stack[-1])]

    def _tuple3(self, _: Any) -> None:
        self._stack[-3:] = [(self._stack[-3], self._stack[-2], self._stack[-1])]

    def _empty_dict(self, _: Any) -> None:
        self._stack.append(_Table([]))

    def _dict(self, _: Any) -> None:
        pairs = _pairs(self._since_mark())
        self._stack.append(_Table(pairs))

    def _set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([(key, value)])

    def _set_items(self, _: Any) -> None:
        self._update(_pairs(self._since_mark()))

    def _update(self, pairs: list[tuple[Any, Any]]) -> None:
        target = self._stack[-1]
        if isinstance(target, _Table):
            target.items.extend(pairs)
        elif not isinstance(target, (_Inert, _Name)):
            raise _Fault(f"damaged: its pickle sets items of a value {_describe(target)}")

    def _empty_set(self, _: Any) -> None:
        self._stack.append(_Inert("a set"))

    def _frozen_set(self, _: Any) -> None:
        self._since_mark()
        self._stack.append(_Inert("a set"))

    def _name(self, module: Any, name: Any) -> _Name:
        if not isinstance(module, str) or not isinstance(name, str):
            raise _Fault("damaged: its pickle names a class by a value that is not text")
        path = shown(f"{module[:100]}.{name[:100]}")
        if path not in self.names:
            if len(self.names) == MAX_CLASSES:
                raise _Fault(f"its pickle names more than {MAX_CLASSES} classes")
            self.names[path] = _Name(path)
        return self.names[path]

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._stack.append(self._name(module, name))

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._stack.append(self._name(module, name))

    def _extension(self, code: int) -> None:
        self._stack.append(self._name("copyreg", f"extension {code}"))

    def _reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self._call(function, arguments))

    def _inst(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        arguments = tuple(self._since_mark())
        self._stack.append(self._call(self._name(module, name), arguments))

    def _obj(self, _: Any) -> None:
        function, *arguments = self._since_mark() or [None]
        self._stack.append(self._call(function, tuple(arguments)))

    def _new_object(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self._call(function, arguments))

    def _new_object_ex(self, _: Any) -> None:
        self._stack.pop()  # keyword arguments: no known call takes any
        self._new_object(_)

    def _build(self, _: Any) -> None:
        state = self._stack.pop()  # attributes; of the known classes only ParameterDict needs them
        made = self._stack[-1] if self._stack else None
        if isinstance(made, _Table) and not made.items and isinstance(state, _Table):
            self._count(len(state.items))
            parameters = _tables(state).get("_parameters")
            if parameters is not None:
                self._count(len(parameters.items))
                made.items.extend(parameters.items)

    def _persistent(self, identity: Any) -> None:
        self._stack.append(_Inert("an object outside the pickle"))

    def _stack_persistent(self, _: Any) -> None:
        self._stack.append(self._storage(self._stack.pop()))

    # Objects of torch.

    def _storage(self, identity: Any) -> _Storage | _Inert:
        """Read a persistent id: ("storage", class, key, device, number of values[, view])."""
        if not isinstance(identity, tuple) or identity[:1] != ("storage",):
            return _Inert("an object outside the pickle")
        if len(identity) not in (5, 6):
            raise _Fault("damaged: a storage is described in an unknown way")
        kind, key, count = identity[1], identity[2], identity[4]
        if not isinstance(kind, _Name) or not _is_size(count):
            raise _Fault("damaged: a storage is described in an unknown way")
        if not isinstance(key, str) or len(key) > 100:
            raise _Fault("damaged: a storage has no usable key")
        if kind.path not in _STORAGES:
            raise _Fault(f"has a storage of an unknown type ({kind.path})")
        dtype, width = _STORAGES[kind.path]
        start, size = 0, count
        view = identity[5] if len(identity) == 6 else None
        if view is not None:  # (key of the view, first value, number of values): torch < 0.4
            if not isinstance(view, tuple) or len(view) != 3 or not all(map(_is_size, view[1:])):
                raise _Fault(f"damaged: the storage {shown(key)!r} is described in an unknown way")
            start, size = view[1:]
            if start + size > count:
                raise _Fault(f"damaged: a view goes beyond its storage {shown(key)!r}")
        if self.storages.setdefault(key, (width, count * width)) != (width, count * width):
            raise _Fault(f"damaged: the storage {shown(key)!r} is described in two ways")
        return _Storage(kind.path, dtype, width, key, count * width, start * width, size * width)

    def _call(self, function: Any, arguments: Any) -> Any:
        """Return the record of a call in _CALLS, or a placeholder for another call."""
        if isinstance(function, _Inert):
            return function
        if not isinstance(function, _Name):
            raise _Fault(f"damaged: its pickle calls a value {_describe(function)}")
        make = self._CALLS.get(function.path)
        result = None
        if make is not None and type(arguments) is tuple and len(arguments) <= MAX_ARGUMENTS:
            result = make(self, *arguments)
        return _Inert(f"made by {function.path}") if result is None else result

    # Each of these accepts any arguments. It returns None if it does not know them.

    def _make_table(self, items: Any = (), *_: Any) -> _Table | None:
        if isinstance(items, _Table):
            items = items.items
        if not isinstance(items, (list, tuple)):
            return None
        self._count(len(items))
        if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in items):
            return None
        return _Table([(key, value) for key, value in items])

    def _make_default_table(self, factory: Any = None, items: Any = (), *_: Any) -> _Table | None:
        return self._make_table(items)

    def _make_size(self, sizes: Any = (), *_: Any) -> Any:
        return sizes if isinstance(sizes, tuple) else None

    def _make_tensor(
        self, storage: Any = None, offset: Any = 0, shape: Any = (), strides: Any = (), *rest: Any
    ) -> _Tensor | _Inert | None:
        """Record _rebuild_tensor_v2(storage, offset, shape, strides, grad, hooks, metadata)."""
        if not isinstance(storage, _Storage):
            return None
        if any(isinstance(value, _Table) and value.items for value in rest[2:]):
            return _Inert("a tensor that is lazily negated or conjugated")
        if storage.dtype is None:
            return _Inert(f"a tensor of type {storage.name}, which is not supported")
        return _Tensor(storage, storage.dtype, offset, shape, strides)

    def _make_tensor_of_type(
        self,
        storage: Any = None,
        offset: Any = 0,
        shape: Any = (),
        strides: Any = (),
        requires_grad: Any = False,
        hooks: Any = None,
        dtype: Any = None,
        *rest: Any,
    ) -> _Tensor | _Inert | None:
        """Record _rebuild_tensor_v3: like v2, with a storage of bytes and a type."""
        if not isinstance(storage, _Storage) or not isinstance(dtype, _Name):
            return None
        if any(isinstance(value, _Table) and value.items for value in rest):
            return _Inert("a tensor that is lazily negated or conjugated")
        known = _TYPES.get(dtype.path)
        if known is None:
            return _Inert(f"a tensor of type {dtype.path}, which is not supported")
        return _Tensor(storage, known, offset, shape, strides)

    def _make_parameter(self, data: Any = None, *_: Any) -> _Tensor | _Inert | None:
        return data if isinstance(data, (_Tensor, _Inert)) else None

    def _make_subclass(
        self, function: Any = None, kind: Any = None, arguments: Any = (), *_: Any
    ) -> Any:
        """Record _rebuild_from_type_v2(function, class, arguments, attributes)."""
        if not isinstance(function, _Name) or function.path not in _REBUILD:
            return None
        if not isinstance(kind, _Name) or kind.path not in _PLAIN_TENSORS:
            return None
        return self._call(function, arguments)

    _CALLS: ClassVar[dict[str, Callable[..., Any]]] = {
        "builtins.dict": _make_table,
        "__builtin__.dict": _make_table,
        "collections.OrderedDict": _make_table,
        "torch.nn.modules.container.ParameterDict": _make_table,
        "collections.defaultdict": _make_default_table,
        "torch.Size": _make_size,
        "torch._utils._rebuild_tensor": _make_tensor,
        "torch._utils._rebuild_tensor_v2": _make_tensor,
        "torch._utils._rebuild_tensor_v3": _make_tensor_of_type,
        "torch._utils._rebuild_parameter": _make_parameter,
        "torch._utils._rebuild_parameter_with_state": _make_parameter,
        "torch.nn.parameter.Parameter": _make_parameter,
        "torch.nn.parameter.Buffer": _make_parameter,
        "torch._tensor._rebuild_from_type_v2": _make_subclass,
    }

    _ACTIONS: ClassVar[dict[str, Callable[[_Interpreter, Any], None]]] = {
        **dict.fromkeys(("PROTO", "FRAME", "STOP"), _nothing),
        **dict.fromkeys(("NEXT_BUFFER", "READONLY_BUFFER"), _refuse),
        "NONE": _none,
        "NEWTRUE": _true,
        "NEWFALSE": _false,
        "MARK": _mark,
        "POP": _pop,
        "POP_MARK": _pop_mark,
        "DUP": _duplicate,
        **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _put),
        "MEMOIZE": _memoize,
        **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _get),
        "EMPTY_LIST": _empty_list,
        "LIST": _list,
        "APPEND": _append,
        **dict.fromkeys(("APPENDS", "ADDITEMS"), _appends),
        "EMPTY_TUPLE": _empty_tuple,
        "TUPLE": _tuple,
        "TUPLE1": _tuple1,
        "TUPLE2": _tuple2,
        "TUPLE3": _tuple3,
        "EMPTY_DICT": _empty_dict,
        "DICT": _dict,
        "SETITEM": _set_item,
        "SETITEMS": _set_items,
        "EMPTY_SET": _empty_set,
        "FROZENSET": _frozen_set,
        "GLOBAL": _global,
        "STACK_GLOBAL": _stack_global,
        **dict.fromkeys(("EXT1", "EXT2", "EXT4"), _extension),
        "REDUCE": _reduce,
        "INST": _inst,
        "OBJ": _obj,
        "NEWOBJ": _new_object,
        "NEWOBJ_EX": _new_object_ex,
        "BUILD": _build,
        "PERSID": _persistent,
        "BINPERSID": _stack_persistent,
    }


_REBUILD = tuple(path for path in _Interpreter._CALLS if path.startswith("torch._utils."))
_PLAIN_TENSORS = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter")


def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    if len(items) % 2:
        raise _Fault("damaged: its pickle has a key without a value")
    return list(zip(items[::2], items[1::2], strict=True))


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _understood(path: str) -> bool:
    """Return True if the interpreter knows a name of the pickle."""
    return any(path in known for known in (_Interpreter._CALLS, _STORAGES, _TYPES, _PLAIN_TENSORS))


def _reason(path: str) -> str:
    """Return the reason, for the report, to ignore an unknown name."""
    program = any(path.startswith(f"{module}.") for module in _PROGRAMS)
    return PROGRAM if program and path not in _HARMLESS else OBJECT


# ----------------------------------------------------------------------------------------- the file


class PickleFile:
    """The weights in a file that torch.save wrote.

    The weights are one table of names and tensors. It is the table under the first key of NESTED
    that exists and holds tensors (these keys can be nested in one another), else the outermost
    table, else the only table in it that holds tensors.

    Args:
        tables: names of tables in the outermost table. If the file has them, their tensors are
            joined under the names TABLE.NAME.
    Attributes:
        path: the file.
        tensors: name -> LazyTensor, in the order of the file.
        texts: name -> short text in the outermost table.
        refused: name -> description of each value in the table of weights that is not a readable
            tensor.
        ignored: (name, reason) of everything unused. Placeholders are listed by class.
    Raises: CheckpointError if the file is not a complete and sound file with tensors.
    """

    def __init__(self, path: str | os.PathLike[str], tables: tuple[str, ...] = ()) -> None:
        self.path = Path(path)
        self._tables = tables
        self.tensors: dict[str, LazyTensor] = {}
        self.texts: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        try:
            file = SourceFile(self.path)
            head = Cursor(file).read(512)
            interpreter = _Interpreter()
            read = _read_zip if head.startswith(b"PK\x03\x04") else _read_stream
            if (other := foreign(head, file.size)) is not None:
                raise _Fault(other)
            root, places = read(Cursor(file), file.size, interpreter)
            self._take(root, places, interpreter, file)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be read ({error.strerror or error})"
            ) from None
        except _Fault as fault:
            raise CheckpointError(f"{self.path}: {shown(str(fault))}") from None

    def _take(
        self, root: Any, places: dict[str, int], interpreter: _Interpreter, file: SourceFile
    ) -> None:
        inner = _tables(root) if self._tables and isinstance(root, _Table) else {}
        if joined := [table for table in self._tables if table in inner]:
            items = [
                (f"{table}.{name}" if isinstance(name, str) else name, value)
                for table in joined
                for name, value in inner[table].items
            ]
            beside: Iterable[str] = (name for name in inner if name not in joined)
        else:
            keys = _find_weights(root)
            *_, table = _descend(root, keys)
            items, beside = table.items, _beside(root, keys)
        self.texts = {
            name: value
            for name, value in root.items
            if isinstance(name, str) and isinstance(value, str)
            if max(len(name), len(value)) <= MAX_NAME
        }
        for name, value in items:
            if not isinstance(name, str) or len(name) > MAX_NAME or not is_unicode(name):
                if isinstance(value, _Tensor):
                    raise _Fault("a tensor's name is not text, or is too long")
            elif name in self.tensors or name in self.refused:
                raise _Fault(f"{shown(name)!r} occurs twice")
            elif isinstance(value, _Tensor):
                self.tensors[name] = self._lazy(name, value, places, file)
            else:
                self.refused[name] = _describe(value)
        odd = sorted(name for name in interpreter.names if not _understood(name))
        self.ignored: tuple[tuple[str, str], ...] = (
            *_listed(
                (name, f"not readable as a tensor: it is {what}")
                for name, what in self.refused.items()
            ),
            *_listed((name, BESIDE) for name in beside),
            *((name, _reason(name)) for name in odd),
        )

    def _lazy(
        self, name: str, tensor: _Tensor, places: dict[str, int], file: SourceFile
    ) -> LazyTensor:
        """Check a tensor against its storage. Make it a LazyTensor."""
        storage, dtype = tensor.storage, tensor.dtype
        shape, strides = _sizes(tensor.shape), _sizes(tensor.strides)
        if dtype is None or shape is None or strides is None or len(shape) != len(strides):
            raise _Fault(f"damaged: tensor {shown(name)!r} has a malformed shape or strides")
        if not _is_size(tensor.offset):
            raise _Fault(f"damaged: tensor {shown(name)!r} has a malformed offset")
        width = _WIDTHS[dtype]
        count = math.prod(shape)
        last = sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
        begin = tensor.offset * width
        if begin + (last + 1) * width > storage.size and count:
            raise _Fault(f"damaged: tensor {shown(name)!r} goes beyond its storage")
        if count * width > storage.size and count > MAX_REPEATED:
            raise _Fault(
                f"tensor {shown(name)!r} has {count} values that repeat a storage of "
                f"{storage.size} bytes; save a contiguous tensor"
            )
        offset = places[storage.key] + storage.start + begin
        steps = None if _contiguous(shape, strides) else strides
        return lazy(file, name, dtype, shape, offset, steps)


def open_tensors(path: Path, tables: tuple[str, ...] = ()) -> PickleFile | TensorFile:
    """Open a weight file in PyTorch's format or safetensors. Its content decides, not its name.

    Args:
        tables: see PickleFile. Names in safetensors are flat.
    Raises: CheckpointError.
    """
    return PickleFile(path, tables) if is_pickle(path) else TensorFile(path)


def is_pickle(path: Path) -> bool:
    """Return True for PyTorch's format, by content; if unclear, by suffix."""
    try:
        head = Cursor(SourceFile(path)).read(9)
    except OSError:
        head = b""
    if head[8:9] == b"{":
        return False
    return head.startswith((b"PK\x03\x04", b"\x80\x02\x8a\x0a")) or path.suffix in SUFFIXES


def _sizes(value: Any) -> Shape | None:
    """Return a shape or strides, or None if the value is neither."""
    if not isinstance(value, (tuple, list)) or len(value) > 32 or not all(map(_is_size, value)):
        return None
    return tuple(value)


def _contiguous(shape: Shape, strides: Shape) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _listed(entries: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield entries for the report, at most MAX_LISTED."""
    entries = iter(entries)
    for name, reason in islice(entries, MAX_LISTED):
        yield shown(name), reason
    if more := sum(1 for _ in entries):
        yield f"{more} more", reason


# ----------------------------------------------------------------------------- the table of weights


def _find_weights(root: Any) -> list[str]:
    """Return the keys that lead to the table of weights. PickleFile gives the rule."""
    if not isinstance(root, _Table):
        what = _describe(root)
        advice = "; save its state_dict()" if isinstance(root, _Inert) else ""
        raise _Fault(f"holds no table of tensors: the saved value is {what}{advice}")
    keys = _locate(root, set(), 0)
    if keys is None:
        raise _Fault("holds no tensors in any usual place of a table of weights")
    return keys


def _descend(root: _Table, keys: list[str]) -> Iterator[_Table]:
    """Yield each table on the way, from the outermost to the table of weights."""
    yield root
    for key in keys:
        root = _tables(root)[key]
        yield root


def _beside(root: _Table, keys: list[str]) -> Iterator[str]:
    """Yield the names of the values outside the table of weights."""
    prefix = ""
    for table, key in zip(_descend(root, keys), keys, strict=False):
        for name, _ in table.items:
            if isinstance(name, str) and name != key:
                yield f"{prefix}{name[:MAX_NAME]}"
        prefix = f"{prefix}{key[:MAX_NAME]}."


def _tables(table: _Table) -> dict[str, _Table]:
    """Return the tables in a table. If a key repeats, its last item counts, as in Python."""
    return {k: v for k, v in table.items if isinstance(k, str) and isinstance(v, _Table)}


def _locate(table: _Table, seen: set[int], depth: int) -> list[str] | None:
    """Find the keys that lead to the table of weights. Tables can be cyclic: visit each once."""
    if depth > len(NESTED) or id(table) in seen:
        return None
    seen.add(id(table))
    inner = _tables(table)
    for key in NESTED:
        if key in inner and (rest := _locate(inner[key], seen, depth + 1)) is not None:
            return [key, *rest]
    if _holds_tensors(table):
        return []
    distinct = {id(value): key for key, value in inner.items()}  # one table can have many keys
    found = [key for key in distinct.values() if _holds_tensors(inner[key])]
    if len(found) > 1:
        few = ", ".join(shown(key) for key in found[:10])
        raise _Fault(f"holds {len(found)} tables of tensors ({few}); save only one of them")
    return found or None


def _holds_tensors(table: _Table) -> bool:
    return any(isinstance(value, _Tensor) for _, value in table.items)


# ------------------------------------------------------------------------ torch 1.6 and later: zip


def _read_zip(file: Cursor, size: int, interpreter: _Interpreter) -> tuple[Any, dict[str, int]]:
    """Return the pickled value and the offset of each storage in the file. Raises: _Fault."""
    entries = _zip_entries(file, size)
    roots = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise _Fault("is a zip archive, but not one that torch.save wrote (it has no data.pkl)")
    prefix = roots[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in entries or any(n.startswith(f"{prefix}code/") for n in entries):
        raise _Fault("is a TorchScript program, not weights; save the state_dict of the model")

    def find(name: str) -> tuple[int, int]:
        offset, length = entries[name]
        if length is None:
            raise _Fault(
                f"its entry {shown(name)!r} is compressed or encrypted, which torch.save never does"
            )
        return offset, length

    def content(name: str, most: int) -> bytes:
        offset, length = find(name)
        if length > most:
            raise _Fault(f"its {shown(name)} takes {length} bytes; at most {most} are read")
        file.seek(offset)
        return file.read(length)

    if f"{prefix}byteorder" in entries and content(f"{prefix}byteorder", 16) != b"little":
        raise _Fault("was saved on a big-endian machine, which is not supported")
    root = interpreter.run(io.BytesIO(content(roots[0], MAX_PICKLE)))
    places = {}
    for key, (_, needed) in interpreter.storages.items():
        if f"{prefix}data/{key}" not in entries:
            raise _Fault(f"damaged: the storage {shown(key)!r} is missing")
        offset, length = find(f"{prefix}data/{key}")
        if length < needed:
            raise _Fault(
                f"damaged: the storage {shown(key)!r} has {length} bytes, {needed} expected"
            )
        places[key] = offset
    return root, places


def _zip_entries(file: Cursor, size: int) -> dict[str, tuple[int, int | None]]:
    """Return entry -> offset and length of its bytes. Check that they do not overlap.

    The length is None if the bytes are compressed or encrypted.
    """
    broken = "truncated or damaged: its zip directory is incomplete; download it again"
    tail_start = max(0, size - 22 - 0xFFFF - 20)
    file.seek(tail_start)
    tail = file.read(size - tail_start)
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) - end < 22:
        raise _Fault(broken)
    disk, first, here, count, length, start, comment = struct.unpack_from("<4H2IH", tail, end + 4)
    limit = tail_start + end  # all entries must end before this
    if end + 22 + comment != len(tail):
        raise _Fault(broken)
    if end >= 20 and tail[end - 20 : end - 16] == b"PK\x06\x07":  # zip64
        (limit,) = struct.unpack_from("<Q", tail, end - 12)
        if limit > size - 56:
            raise _Fault(broken)
        file.seek(limit)
        record = file.read(56)
        if record[:4] != b"PK\x06\x06":
            raise _Fault(broken)
        disk, first, here, count, length, start = struct.unpack_from("<2I4Q", record, 16)
    if disk or first or here != count or start + length > limit:
        raise _Fault(broken)
    if count > MAX_ENTRIES or length > MAX_DIRECTORY:
        raise _Fault(
            f"its zip directory has {count} entries ({length} bytes); no checkpoint needs so many"
        )
    file.seek(start)
    directory = file.read(length)
    entries: dict[str, tuple[int, int | None]] = {}
    spans: list[tuple[int, int]] = []
    place = 0
    for _ in range(count):
        if directory[place : place + 4] != b"PK\x01\x02" or len(directory) - place < 46:
            raise _Fault(broken)
        flags, method = struct.unpack_from("<2H", directory, place + 8)
        packed, plain, names, extras, comments = struct.unpack_from("<2I3H", directory, place + 20)
        (header,) = struct.unpack_from("<I", directory, place + 42)
        raw = directory[place + 46 : place + 46 + names]
        extra = directory[place + 46 + names : place + 46 + names + extras]
        place += 46 + names + extras + comments
        plain, packed, header = _zip64(extra, plain, packed, header)
        name = raw.decode("utf-8", "replace")
        file.seek(min(header, size))
        local = file.read(30)
        if len(local) < 30 or local[:4] != b"PK\x03\x04":
            raise _Fault(broken)
        offset = header + 30 + sum(struct.unpack_from("<2H", local, 26))
        if name in entries:
            raise _Fault(f"damaged: its entry {shown(name)!r} occurs twice")
        is_stored = not method and not flags & 1 and plain == packed
        entries[name] = (offset, plain if is_stored else None)
        spans.append((header, offset + packed))
    end_of_last = 0
    for header, stop in sorted(spans):
        if header < end_of_last:
            raise _Fault("damaged: entries of its zip archive overlap")
        end_of_last = stop
    if end_of_last > start:
        raise _Fault(broken)
    return entries


def _zip64(extra: bytes, *fields: int) -> list[int]:
    """Return the fields of an entry. Values beyond 32 bits come from its zip64 record."""
    place = 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, place)
        if kind == 1:
            wide = extra[place + 4 : place + 4 + length]
            values = iter(struct.unpack(f"<{len(wide) // 8}Q", wide[: len(wide) // 8 * 8]))
            return [next(values, f) if f == 0xFFFFFFFF else f for f in fields]
        place += 4 + length
    return list(fields)


# ---------------------------------------------------------- before torch 1.6: consecutive pickles


def _read_stream(file: Cursor, size: int, interpreter: _Interpreter) -> tuple[Any, dict[str, int]]:
    """Return the pickled value and the offset of each storage in the file. Raises: _Fault."""
    file.seek(0)
    stream = io.BytesIO(file.read(MAX_PICKLE))
    head = stream.getvalue()[:512]
    if head[257:262] == b"ustar":
        raise _Fault(
            "is in the tar format of torch before 0.1.10, which is not supported; "
            "load and save it with a newer torch"
        )
    try:
        magic = interpreter.run(stream)
    except _Fault as fault:
        if head[:1] == b"\x80":
            raise
        raise _Fault(f"was not written by torch.save, or is damaged ({size} bytes)") from fault
    if type(magic) is not int or magic != MAGIC:
        raise _Fault("is a pickle, but not one that torch.save wrote")
    if interpreter.run(stream) != PROTOCOL:
        raise _Fault(f"is in an unknown format of torch.save (protocol {PROTOCOL} expected)")
    interpreter.run(
        stream
    )  # sizes of C types on the writer's machine; storages do not depend on them
    root = interpreter.run(stream)
    keys = interpreter.run(stream)
    if type(keys) is not list or not all(isinstance(key, str) for key in keys):
        raise _Fault("damaged: the list of its storages is malformed")
    place = stream.tell()
    places = {}
    for key in keys:
        if key not in interpreter.storages or key in places:
            raise _Fault(f"damaged: the storage {shown(key)!r} is unknown or occurs twice")
        width, needed = interpreter.storages[key]
        file.seek(place)
        count = int.from_bytes(file.read(8), "little")
        if count * width != needed:
            raise _Fault(
                f"truncated or damaged: the storage {shown(key)!r} is {count * width} bytes, "
                f"{needed} expected"
            )
        places[key] = place + 8
        place += 8 + needed
    if place > size:
        raise _Fault(f"truncated: {place} bytes expected, {size} found; download it again")
    if missing := interpreter.storages.keys() - places.keys():
        raise _Fault(f"damaged: the storage {shown(min(missing))!r} is missing")
    return root, places
