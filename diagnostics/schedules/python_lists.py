"""Lists of (a, b, c) triples in Python code, read without running it.

What is read is what is written out: numbers, arithmetic on numbers, lists and tuples, a list of triples times a number or plus another.
"""

import ast
import math
import operator
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeGuard

MAX_CODE = 400_000  # characters: parsing may take 650 times as many bytes, and a second or two
MAX_ROWS = 1_000  # of a list that is repeated or joined
_ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: math.pow,
}  # fmt: skip
_SIGNS: dict[type[ast.unaryop], Callable[[float], float]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}
_CONVERSIONS = {"array", "asarray", "tensor", "as_tensor", "list", "tuple"}  # calls that leave a list what it is
_CHANGING = (ast.BinOp, ast.Subscript, ast.ListComp, ast.GeneratorExp)


class PythonList(NamedTuple):
    """A list that code holds, or a single triple.

    Attributes:
        name: what the code calls it, by the variable, the key or the parameter that it is the value of; "" where it has no name.
        label: the name, where no other list has it; else with its line, "line 12" without a name.
        line: where it begins.
        node: how it is written; :func:`value_of` reads it.
        changed: the first line in which an assignment gives that name another value; 0 where none does.
    """

    name: str
    label: str
    line: int
    node: ast.expr
    changed: int = 0


class NotWrittenOutError(ValueError):
    """Code that would have to be run to know its value: `node`."""

    def __init__(self, node: ast.expr) -> None:
        try:
            code = ast.unparse(node)
        except (RecursionError, ValueError):  # nested deep, or a number of more digits than Python prints
            code = "code too long to show"
        super().__init__(
            f"expected numbers or arithmetic on numbers, got {code:.60} in line {node.lineno}; write its value, code is not run"
        )
        self.node = node


def parse_python(text: str) -> ast.expr | ast.Module:
    """One expression, be it indented or without its outermost brackets; else a module. Nothing is run.

    Raises:
        SyntaxError: no Python.
        ValueError: more than 400,000 characters, or nested too deep; told without a subject.
    """
    if len(text) > MAX_CODE:
        raise ValueError(f"expected JSON, or at most {MAX_CODE:,} characters of Python code, got something else")
    text = text.replace("−", "-")  # the minus sign of papers, and of what `diag ns` prints
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Python thinks of the code's style
            try:
                return ast.parse(f"({text}\n)", mode="eval").body
            except SyntaxError:
                return ast.parse(textwrap.dedent(text))
    except (RecursionError, MemoryError):
        raise ValueError("expected Python code that is nested less deep") from None


def value_of(node: ast.expr) -> Any:
    """The value of what is written out: numbers, arithmetic on them in float64, texts, True, False, None, lists (tuples are lists) and dicts.

    Raises:
        NotWrittenOutError: of another expression.

    >>> value_of(parse_python("[(3 / 2, -.5, 0)] * 2"))
    [[1.5, -0.5, 0], [1.5, -0.5, 0]]
    """
    try:
        match node:
            case ast.Constant(value=str() | bool() | None):
                return node.value
            case ast.Constant(value=int(value)) if abs(value) < 2**53:
                return value
            case ast.Constant(value=int(value) | float(value)):
                return float(value)
            case ast.List() | ast.Tuple():
                return [value_of(element) for element in node.elts]
            case ast.Dict():
                return {_key(key, node): value_of(value) for key, value in zip(node.keys, node.values, strict=True)}
            case ast.UnaryOp(op=ast.USub() | ast.UAdd()) if _is_plain(value := value_of(node.operand)):
                return _SIGNS[type(node.op)](value)
            case ast.BinOp():
                return _combined(type(node.op), value_of(node.left), value_of(node.right))
    except NotWrittenOutError:
        raise
    except (ArithmeticError, ValueError):
        pass  # 1/0, or a number beyond all bounds
    raise NotWrittenOutError(node)


def lists_in(tree: ast.AST) -> list[PythonList]:
    """The lists of triples in code, by line; where it holds none its single triples, without these what would be lists if it were written out.

    >>> [(found.label, found.line) for found in lists_in(parse_python("a = [(1, 2, 3)]; b = [4, 5]; f(c=[(1, 2, 3)], d=x)"))]
    [('a', 1), ('c', 1)]
    """
    lists: list[_Found] = []
    triples: list[_Found] = []
    unwritten: list[_Found] = []
    assigned: set[tuple[str, int]] = set()
    rest: list[tuple[ast.AST, str, int]] = [(tree, "", 0)]
    while rest:
        node, name, line = rest.pop()
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            line = node.lineno
            assigned |= {(_name(target), line) for target in (node.targets if isinstance(node, ast.Assign) else [node.target])}
        if isinstance(node, _CHANGING):
            # Whatever changes a list is a part of it; without one there is nothing to look for inside.
            lists += [_Found(node, name, line)] if any(map(_is_list, ast.walk(node))) else []
        elif _is_list(node):
            lists.append(_Found(node, name, line))
        elif _is_triple(node):
            triples.append(_Found(node, name, line))
        else:
            if _is_list(node, of=_may_be_triple):
                unwritten.append(_Found(node, name, line))
            rest += ((part, own, line) for part, own in _parts(node, name))
    return _labelled(sorted(lists or triples or unwritten, key=lambda one: (one.node.lineno, one.node.col_offset)), assigned)


class _Found(NamedTuple):
    node: ast.expr
    name: str
    assigned: int  # the line of the assignment that it is in, 0 outside


def _labelled(found: list[_Found], assigned: set[tuple[str, int]]) -> list[PythonList]:
    called, begun = Counter(one.name for one in found), Counter(one.node.lineno for one in found)
    elsewhere = dict(sorted(assigned - {(one.name, one.assigned) for one in found}, reverse=True))  # name → the first such line
    lists = []
    for node, name, _ in found:
        place = f"line {node.lineno}" + (f", column {node.col_offset}" if begun[node.lineno] > 1 else "")
        label = name if name and called[name] == 1 else ", ".join(filter(None, (name, place)))
        lists.append(PythonList(name, label, node.lineno, node, elsewhere.get(name, 0) if name else 0))
    return lists


def _parts(node: ast.AST, name: str) -> Iterator[tuple[ast.AST, str]]:
    """What a node is made of, and what the code calls each: by the variable, the key or the parameter that it is the value of."""
    match node:
        case ast.Assign(targets=[target, *_], value=value) | ast.AnnAssign(target=target, value=ast.expr() as value):
            yield value, _name(target)
        case ast.Dict():
            for key, value in zip(node.keys, node.values, strict=True):
                yield value, key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else ""
        case ast.keyword(arg=arg, value=value):
            yield value, arg or ""
        case ast.arguments():
            positional = [*node.posonlyargs, *node.args]
            of_positional = zip(positional[len(positional) - len(node.defaults) :], node.defaults, strict=True)
            for parameter, default in (*of_positional, *zip(node.kwonlyargs, node.kw_defaults, strict=True)):
                if default is not None:
                    yield default, parameter.arg
        case _:
            keeps = isinstance(node, (ast.List, ast.Tuple)) or (isinstance(node, ast.Call) and _name(node.func) in _CONVERSIONS)
            for child in ast.iter_child_nodes(node):
                yield child, name if keeps else ""


def _name(target: ast.AST) -> str:
    match target:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def _is_triple(node: ast.AST) -> TypeGuard[ast.expr]:
    return isinstance(node, (ast.List, ast.Tuple)) and len(node.elts) == 3 and all(map(_is_number, node.elts))


def _may_be_triple(node: ast.AST) -> TypeGuard[ast.expr]:
    parts = (ast.Constant, ast.Name, ast.Attribute, ast.UnaryOp, ast.BinOp)
    return isinstance(node, (ast.List, ast.Tuple)) and len(node.elts) == 3 and all(isinstance(part, parts) for part in node.elts)


def _is_list(node: ast.AST, of: Callable[[ast.AST], bool] = _is_triple) -> TypeGuard[ast.expr]:
    """Whether it is a list of rows, one of them a triple: others may be what is wrong with it."""
    rows = node.elts if isinstance(node, (ast.List, ast.Tuple)) else []
    return all(isinstance(row, (ast.List, ast.Tuple)) for row in rows) and any(map(of, rows))


def _is_number(node: ast.expr) -> bool:
    """Whether it is written as a number or as arithmetic on numbers."""
    return all(
        type(part.value) in (int, float)
        if isinstance(part, ast.Constant)
        else isinstance(part, (ast.UnaryOp, ast.BinOp, ast.unaryop, ast.operator))
        for part in ast.walk(node)
    )


def _key(key: ast.expr | None, of: ast.Dict) -> str:
    if isinstance(key, ast.Constant) and isinstance(key.value, str):
        return key.value
    raise NotWrittenOutError(of if key is None else key)


def _combined(operation: type[ast.operator], left: Any, right: Any) -> Any:
    """Arithmetic on numbers; of lists of rows repetition and sum."""
    if _is_plain(left) and _is_plain(right) and operation in _ARITHMETIC:
        return _ARITHMETIC[operation](float(left), float(right))
    if type(left) is int:
        left, right = right, left
    if operation is ast.Mult and _are_rows(left) and type(right) is int and len(left) * right <= MAX_ROWS:
        return left * right
    if operation is ast.Add and _are_rows(left) and _are_rows(right) and len(left) + len(right) <= MAX_ROWS:
        return left + right
    raise ValueError("no arithmetic on numbers, nor a list repeated or joined")


def _is_plain(value: Any) -> bool:
    return type(value) in (int, float)


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, list) and not any(isinstance(x, (list, dict)) for x in row) for row in value)
