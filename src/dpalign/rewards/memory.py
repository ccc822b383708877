"""What a person's function remembers between two calls, and how it is put back.

A running mean, a set of texts seen, a counter: whatever one row leaves behind would reach the next row through it.
Everything that can change and that the function reaches through its own code is noted: global names that the code
mentions, closures, defaults, attributes of the objects and classes of the person's own modules, and in them lists,
dictionaries, sets, arrays and tensors. What cannot be put back (a generator, a random number generator) is refused. Not
seen: what libraries keep inside, files, other processes, and tables of more than a million entries.
"""

from __future__ import annotations

import logging
import operator
import random
import sys
import sysconfig
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from .own import OwnReward
from .weighted import Weighted

LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
SMALL = 1 << 20  # elements: what is larger is a table or a model, whose content is not compared after every row
ABSENT = object()
OURS = __name__.partition(".")[:1]


class Memory:
    """Everything changeable that `function` reaches, as it is now.

    The objects are noted, not copied: each with its direct content, so that together they are a deep copy.
    unknown: kinds of objects among them that change when they are read and cannot be put back.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.unknown: set[str] = set()
        self._undo: list[Callable[[], None]] = []
        self._packages = set(_packages(function))  # their authors', also where they are installed
        seen: dict[int, Any] = {}
        waiting: list[Any] = [function]
        while waiting:
            item = waiting.pop()
            if id(item) in seen or isinstance(item, str | bytes | int | float | complex | type(None)):
                continue
            seen[id(item)] = item  # kept alive: an id may not come again
            waiting.extend(self._note(item))

    def put_back(self) -> None:
        """Undoes what has changed since."""
        for undo in self._undo:
            undo()

    def _note(self, item: Any) -> Iterator[Any]:
        """Notes one object's own content; yields what it refers to."""
        match item:
            case types.FunctionType():
                yield from self._note_function(item)
            case types.MethodType():
                yield from (item.__self__, item.__func__)
            case partial():
                yield from (item.func, item.args, item.keywords)
            case property():
                yield from (f for f in (item.fget, item.fset) if f is not None)
            case staticmethod() | classmethod():
                yield item.__func__
            case types.ModuleType():
                if self._is_own(item):
                    yield from self._note_dict(vars(item))
            case type():
                if self._is_own(item):
                    yield from self._note_class(item)
            case np.ndarray() | torch.Tensor() | bytearray():
                self._note_array(item)
            case logging.Logger() | OwnReward():
                pass  # what was logged is not read back, and our own remember nothing
            case types.GeneratorType() | random.Random() | np.random.Generator() | np.random.RandomState():
                self.unknown.add(type(item).__name__)
            case torch.Generator():
                self.unknown.add("torch.Generator")
            case _ if type(item).__module__ == "itertools":
                self.unknown.add(f"itertools.{type(item).__name__}")
            case _:
                yield from self._note_container(item)

    def _note_function(self, function: types.FunctionType) -> Iterator[Any]:
        if not self._is_own(function):
            return
        yield from self._note_dict(vars(function))
        for cell in function.__closure__ or ():
            value = _content(cell)
            self._undo.append(partial(_set_cell, cell, value))
            yield value
        yield from (function.__defaults__, function.__kwdefaults__)
        for name in _names(function.__code__):
            value = function.__globals__.get(name, ABSENT)
            self._undo.append(partial(_set_name, function.__globals__, name, value))
            yield value

    def _note_class(self, kind: type) -> Iterator[Any]:
        own = {n: v for n, v in vars(kind).items() if n not in ("__dict__", "__weakref__")}
        self._undo.append(partial(_set_attributes, kind, own))
        yield from own.values()
        yield from kind.__bases__

    def _note_dict(self, mapping: dict[Any, Any]) -> Iterator[Any]:
        if len(mapping) > SMALL:
            return
        saved, base = dict(mapping), OrderedDict if isinstance(mapping, OrderedDict) else dict
        self._undo.append(partial(_set_dict, base, mapping, saved))
        yield from saved.values()

    def _note_container(self, item: Any) -> Iterator[Any]:
        match item:
            case dict():
                yield from self._note_dict(item)
            case list() | deque() if len(item) <= SMALL:
                self._undo.append(partial(_set_sequence, item, list(item)))
                yield from list(item)
            case set() if len(item) <= SMALL:
                self._undo.append(partial(_set_set, item, frozenset(item)))
            case tuple():
                yield from item
        if isinstance(getattr(item, "__dict__", None), dict):
            yield from self._note_dict(vars(item))
        yield type(item)
        for kind in type(item).__mro__:
            slots = vars(kind).get("__slots__", ()) if self._is_own(kind) else ()
            for name in (slots,) if isinstance(slots, str) else slots:
                value = getattr(item, name, ABSENT)
                self._undo.append(partial(_set_slot, item, name, value))
                yield value

    def _is_own(self, item: Any) -> bool:
        """Whether a module, class or function is a person's own: not of Python, another package, or dpalign."""
        name = item.__name__ if isinstance(item, types.ModuleType) else str(getattr(item, "__module__", "builtins"))
        package, file = name.partition(".")[0], getattr(sys.modules.get(name), "__file__", None)
        if package in OURS or package in sys.builtin_module_names:
            return False
        return package in self._packages or file is None or not file.startswith(LIBRARIES)

    def _note_array(self, array: Any) -> None:
        if isinstance(array, torch.Tensor):
            if array.numel() <= SMALL:
                self._undo.append(partial(_set_tensor, array, array.detach().clone()))
        elif isinstance(array, bytearray):
            self._undo.append(partial(_set_bytes, array, bytes(array)))
        elif array.flags.writeable and array.size <= SMALL:
            self._undo.append(partial(_set_array, array, array.copy()))


def _packages(function: Callable[..., Any]) -> Iterator[str]:
    """The top-level package of a function, or of each of those that it is made of."""
    if isinstance(function, Weighted):
        for one in function.functions:
            yield from _packages(one)
    elif isinstance(function, partial):
        yield from _packages(function.func)
    else:
        named = function if hasattr(function, "__qualname__") else type(function)
        yield str(named.__module__).partition(".")[0]


def _names(code: types.CodeType) -> set[str]:
    """Names that a function's code mentions, those of the functions inside it too."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*inner)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return ABSENT


# How each kind is put back: only if it has changed, and by the kind's own methods --------------------------------


def _set_cell(cell: types.CellType, value: Any) -> None:
    if _content(cell) is value:
        return
    if value is ABSENT:
        del cell.cell_contents
    else:
        cell.cell_contents = value


def _set_name(names: dict[str, Any], name: str, value: Any) -> None:
    if names.get(name, ABSENT) is value:
        return
    if value is ABSENT:
        del names[name]
    else:
        names[name] = value


def _set_slot(item: Any, name: str, value: Any) -> None:
    if getattr(item, name, ABSENT) is value:
        return
    if value is ABSENT:
        object.__delattr__(item, name)
    else:
        object.__setattr__(item, name, value)


def _set_attributes(kind: type, saved: dict[str, Any]) -> None:
    for name in set(vars(kind)) - set(saved) - {"__dict__", "__weakref__"}:
        type.__delattr__(kind, name)
    for name, value in saved.items():
        if vars(kind).get(name, ABSENT) is not value:
            type.__setattr__(kind, name, value)


def _set_dict(base: Any, mapping: dict[Any, Any], saved: dict[Any, Any]) -> None:
    same = len(mapping) == len(saved) and all(map(operator.is_, mapping.values(), saved.values()))
    if not (same and all(map(operator.is_, mapping, saved))):
        base.clear(mapping)
        base.update(mapping, saved)


def _set_sequence(sequence: Any, saved: list[Any]) -> None:
    if len(sequence) != len(saved) or not all(map(operator.is_, sequence, saved)):
        sequence.clear()
        sequence.extend(saved)


def _set_set(items: set[Any], saved: frozenset[Any]) -> None:
    if items != saved:
        items.clear()
        items.update(saved)


def _set_tensor(tensor: torch.Tensor, saved: torch.Tensor) -> None:
    if not torch.equal(tensor, saved):
        with torch.no_grad():
            tensor.copy_(saved)


def _set_bytes(array: bytearray, saved: bytes) -> None:
    if array != saved:
        array[:] = saved


def _set_array(array: Any, saved: Any) -> None:
    if array.tobytes() != saved.tobytes():
        array[...] = saved
