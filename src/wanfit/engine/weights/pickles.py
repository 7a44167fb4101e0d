"""The pickle in a file of torch.save, read without executing anything.

A pickle is a program for a small stack machine. Python's own machine imports what a GLOBAL names
and calls what a REDUCE says. This one knows the instructions that a dictionary of tensors needs and
does neither: a GLOBAL is its name, and a REDUCE makes a `Call` (what would be called, with what) if
the name is on a list, or else is an error. So there is nothing that a pickle could reach.

Instructions: Python's pickletools, which takes them apart. Left out: all that torch.save does not
write for a dictionary of tensors (sets, EXT, INST, OBJ, NEWOBJ, buffers out of band).
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Instructions -> what they put on the stack: their argument.
_ARGUMENTS = frozenset({
    "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINBYTES", "SHORT_BINBYTES",
    "BINSTRING", "SHORT_BINSTRING", "STRING",
})  # fmt: skip
_CONSTANTS: Mapping[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: Mapping[str, Callable[[], object]] = {
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple,
}  # fmt: skip
_TUPLES: Mapping[str, int] = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NOTHING = frozenset({"PROTO", "FRAME"})
ORDERED_DICT = "collections.OrderedDict"


class BadPickle(Exception):
    """The pickle is malformed, or asks for what is not done. The text says what."""


@dataclass(frozen=True, slots=True)
class Global:
    """A name of a module, which was not imported."""

    name: str  # as in "torch.FloatStorage"


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A call that was not made."""

    name: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Persistent:
    """What lies outside the pickle, by its id: for torch, a storage."""

    id: Any


def read_pickle(content: bytes, may_call: frozenset[str]) -> Any:
    """What the pickle describes: dicts, lists, tuples, numbers, strings, and the records above.

    may_call: names whose calls become a `Call`; collections.OrderedDict() becomes a dict. Raises
    BadPickle, which names the first call that is not among them.
    """
    machine = _Machine(may_call)
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "STOP":
                return machine.pop()
            machine.do(opcode.name, argument)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        # pickletools' errors, and the stack's: an instruction without what it works on
        raise BadPickle(f"its pickle is malformed ({str(error)[:100]})") from None
    raise BadPickle("its pickle has no end")


class _Machine:
    """The stack, the stacks below its marks, and the memo."""

    def __init__(self, may_call: frozenset[str]) -> None:
        self._may_call = may_call
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def pop(self) -> Any:
        return self._stack.pop()

    def do(self, name: str, argument: Any) -> None:
        """One instruction."""
        if name in _ARGUMENTS:
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self._stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            self._tuple(_TUPLES[name])
        elif name not in _NOTHING:
            act = _ACTS.get(name)
            if act is None:
                raise BadPickle(f"its pickle has an instruction that is not read here, {name}")
            act(self, argument)

    def _tuple(self, count: int) -> None:
        items = tuple(self._stack.pop() for _ in range(count))
        self._stack.append(items[::-1])

    def mark(self, _: Any) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _to_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def tuple_to_mark(self, _: Any) -> None:
        items = self._to_mark()
        self._stack.append(tuple(items))

    def list_to_mark(self, _: Any) -> None:
        items = self._to_mark()
        self._stack.append(items)

    def dict_to_mark(self, _: Any) -> None:
        items = self._to_mark()
        self._stack.append({})
        self._fill(items)

    def put(self, argument: int) -> None:
        self._memo[argument] = self._stack[-1]

    def memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def get(self, argument: int) -> None:
        self._stack.append(self._memo[argument])

    def drop(self, _: Any) -> None:
        self._stack.pop()

    def set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._fill([key, value])

    def set_items(self, _: Any) -> None:
        self._fill(self._to_mark())

    def _fill(self, items: list[Any]) -> None:
        """Keys and values by turns. Plain keys only: a deep tuple's hash overflows C's stack."""
        found = self._into(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):
                raise ValueError(f"a key that is a {type(key).__name__}")
            found[key] = value

    def append(self, _: Any) -> None:
        value = self._stack.pop()
        self._into(list).append(value)

    def appends(self, _: Any) -> None:
        items = self._to_mark()
        self._into(list).extend(items)

    def _into(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise ValueError(f"items for something that is no {kind.__name__}")
        return self._stack[-1]

    def by_name(self, argument: str) -> None:
        self._stack.append(Global(argument.replace(" ", ".", 1)))

    def by_stack(self, _: Any) -> None:
        attribute, module = self._stack.pop(), self._stack.pop()
        if not (isinstance(attribute, str) and isinstance(module, str)):
            raise ValueError("a name that is no string")
        self._stack.append(Global(f"{module}.{attribute}"))

    def reduce(self, _: Any) -> None:
        arguments, called = self._stack.pop(), self._stack.pop()
        name = called.name if isinstance(called, Global) else "something without a name"
        if not isinstance(arguments, tuple):
            raise ValueError("a call without arguments")
        if name == ORDERED_DICT and not arguments:
            self._stack.append({})
        elif name in self._may_call:
            self._stack.append(Call(name, arguments))
        else:
            raise BadPickle(f"its pickle has code in it, a call of {name}")

    def build(self, _: Any) -> None:
        """Attributes: the `_metadata` that torch hangs on a state dict, which is left out."""
        self._stack.pop()
        if not isinstance(self._stack[-1], dict):
            raise BadPickle("its pickle sets attributes of something that is no dictionary")

    def persistent(self, _: Any) -> None:
        self._stack.append(Persistent(self._stack.pop()))


_ACTS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark, "TUPLE": _Machine.tuple_to_mark, "LIST": _Machine.list_to_mark,
    "DICT": _Machine.dict_to_mark, "PUT": _Machine.put, "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put, "MEMOIZE": _Machine.memoize, "GET": _Machine.get,
    "BINGET": _Machine.get, "LONG_BINGET": _Machine.get, "POP": _Machine.drop,
    "SETITEM": _Machine.set_item, "SETITEMS": _Machine.set_items, "APPEND": _Machine.append,
    "APPENDS": _Machine.appends, "GLOBAL": _Machine.by_name, "STACK_GLOBAL": _Machine.by_stack,
    "REDUCE": _Machine.reduce, "BUILD": _Machine.build, "BINPERSID": _Machine.persistent,
}  # fmt: skip
