"""`--where "split = 'train' and label >= 3"`: conditions on the columns of the parts' tables.

    condition  := conjunction ("or" conjunction)*
    conjunction := term ("and" term)*
    term       := "not" term | "(" condition ")" | test
    test       := column ("=" | "==" | "!=" | "<>" | "<" | "<=" | ">" | ">=") value
                | column ["not"] "in" "(" value ("," value)* ")"
                | column "is" ["not"] "null"
    value      := 'text' | "text" | number | true | false

Columns are those of the part tables (key, shard, offset, label, outputs of the embedding), and `dataset`, which is
also called `split`. As in SQL, a test of a missing value is neither true nor false, and such a row is not kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sslscale.errors import UserError, did_you_mean
from sslscale.features import FeatureSet, PartRef

DATASET_COLUMNS = ("dataset", "split")
_TOKEN = re.compile(
    r"""\s*(?:(?P<text>'(?:[^']|'')*'|"(?:[^"]|"")*")|(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"""
    r"""|(?P<word>[A-Za-z_]\w*)|(?P<sign><=|>=|!=|<>|==|[=<>(),]))"""
)
_COMPARE: dict[str, Callable[[Any, Any], pa.Array]] = {
    "=": pc.equal,
    "==": pc.equal,
    "!=": pc.not_equal,
    "<>": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}

_INT64 = 2**63 - 1

Test = Callable[[pa.Table], Any]  # a table -> booleans, null where unknown


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    at: int


class Condition:
    """A parsed condition. UserError where the text is malformed, with the place."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.literals: dict[str, list[Any]] = {}
        """Column -> the values that it is compared with."""
        self._tokens = list(_tokens(text))
        self._at = 0
        self._test = self._condition()
        if self._next.kind != "end":
            self._fail("and, or, or the end")

    def mask(self, table: pa.Table) -> np.ndarray:
        """(n,) bool: the rows of a table, which has every column of the condition, that it keeps."""
        found = self._test(table)
        return pc.fill_null(found, False).to_numpy(zero_copy_only=False).astype(bool)

    # ------------------------------------------------------------ grammar

    def _condition(self) -> Test:
        found = self._conjunction()
        while self._take("or"):
            found = _both(pc.or_kleene, found, self._conjunction())
        return found

    def _conjunction(self) -> Test:
        found = self._term()
        while self._take("and"):
            found = _both(pc.and_kleene, found, self._term())
        return found

    def _term(self) -> Test:
        if self._take("not"):
            inner = self._term()
            return lambda table: pc.invert(inner(table))
        if self._take("("):
            inner = self._condition()
            self._expect(")")
            return inner
        return self._column_test()

    def _column_test(self) -> Test:
        if self._next.kind != "word":
            self._fail("a column")
        column = self._advance().text
        self.literals.setdefault(column, [])
        if self._take("is"):
            negated = self._take("not")
            self._expect("null")
            return lambda table: (pc.is_valid if negated else pc.is_null)(table.column(column))
        negated = self._take("not")
        if self._take("in"):
            return self._membership(column, negated)
        if negated or self._next.text not in _COMPARE:
            self._fail("in" if negated else "=, !=, <, <=, >, >=, in or is")
        compare, value = _COMPARE[self._advance().text], self._value(column)
        return lambda table: compare(table.column(column), value)

    def _membership(self, column: str, negated: bool) -> Test:
        self._expect("(")
        values = [self._value(column)]
        while self._take(","):
            values.append(self._value(column))
        self._expect(")")

        def test(table: pa.Table) -> Any:
            held = table.column(column)
            found = pc.is_in(held, value_set=_set_of(values, held.type))
            known = pc.if_else(pc.is_null(held), None, found)
            return pc.invert(known) if negated else known

        return test

    def _value(self, column: str) -> Any:
        token = self._next
        value: Any
        if token.kind == "text":
            value = token.text[1:-1].replace(2 * token.text[0], token.text[0])
        elif token.kind == "number":
            value = float(token.text) if re.search(r"[.eE]", token.text) else int(token.text)
            value = value if abs(value) <= _INT64 else float(value)
        elif token.text.lower() in ("true", "false"):
            value = token.text.lower() == "true"
        else:
            self._fail("'text' in quotes or a number")
        self.literals[column].append(value)
        self._advance()
        return value

    # ------------------------------------------------------------ tokens

    @property
    def _next(self) -> _Token:
        return self._tokens[self._at]

    def _advance(self) -> _Token:
        token = self._next
        self._at += token.kind != "end"
        return token

    def _take(self, text: str) -> bool:
        found = self._next.kind in ("word", "sign") and self._next.text.lower() == text
        self._at += found
        return found

    def _expect(self, text: str) -> None:
        if not self._take(text):
            self._fail(text)

    def _fail(self, expected: str) -> NoReturn:
        raise _malformed(self.text, self._next.at, f"expected {expected}")


def _tokens(text: str) -> Iterator[_Token]:
    at = 0
    while text[at:].strip():
        found = _TOKEN.match(text, at)
        if found is None:
            raise _malformed(text, at + len(text[at:]) - len(text[at:].lstrip()), "this is no column, value or sign")
        assert found.lastgroup is not None
        yield _Token(found.lastgroup, found[found.lastgroup], found.start(found.lastgroup))
        at = found.end()
    yield _Token("end", "", len(text))


def _malformed(text: str, at: int, reason: str) -> UserError:
    return UserError(
        "the filter is malformed",
        got=f"{text[:at]}>>>{text[at:]}  ({reason} at >>>)",
        allowed="such as \"split = 'train' and label >= 3\", with and, or, not, in (...), is null",
    )


def _set_of(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Values of a column of this type; what no integer is equal to is in no set of integers."""
    if pa.types.is_integer(kind):
        values = [int(value) for value in values if abs(value) <= _INT64 and value == int(value)]
    return pa.array(values).cast(kind)


def _both(combine: Callable[[Any, Any], Any], one: Test, other: Test) -> Test:
    return lambda table: combine(one(table), other(table))


# ------------------------------------------------------------------ over the parts of a set


class Filter:
    """A condition over the parts of a feature set. UserError for a column that no part has, or of another type."""

    def __init__(self, text: str, features: FeatureSet) -> None:
        self.condition, self.features = Condition(text), features
        for column, values in self.condition.literals.items():
            kind = self._types.get(column)
            if kind is None:
                names = list(self._types)
                raise UserError(
                    "the filter names a column that the features do not have",
                    got=f"{column!r}{did_you_mean(column, names)}",
                    allowed=", ".join(names),
                )
            for value in values:
                _check_type(column, kind, value)

    def mask(self, part: PartRef) -> np.ndarray:
        """(rows,) bool: the rows of a part that are kept."""
        store = self.features.stores[part.dataset]
        columns = list(self.condition.literals)
        held = [column for column in columns if column in self._schema(part).names]
        table = store.table(part.part, held or ["key"])
        for column in columns:
            if column not in held:
                value = part.dataset if column in DATASET_COLUMNS else None
                table = table.append_column(column, pa.repeat(pa.scalar(value, self._types[column]), part.rows))
        return self.condition.mask(table)

    @cached_property
    def _types(self) -> dict[str, pa.DataType]:
        types: dict[str, pa.DataType] = {column: pa.string() for column in DATASET_COLUMNS}
        for part in self.features.parts:
            types |= {field.name: field.type for field in self._schema(part)}
        return types

    def _schema(self, part: PartRef) -> pa.Schema:
        return self.features.stores[part.dataset].schema(part.part)


def _check_type(column: str, kind: pa.DataType, value: Any) -> None:
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind):
        raise UserError("a column of vectors or bytes cannot be filtered by", got=column)
    textual = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if isinstance(value, bool) != pa.types.is_boolean(kind) or isinstance(value, str) != textual:
        raise UserError(
            "the filter compares a column with a value of another type",
            got=f"{column} is {kind}, the value is {value!r}",
            allowed="text in quotes for text, numbers for numbers, true and false",
        )
