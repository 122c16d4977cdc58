"""The mutants of a source file: each changes one node of its syntax tree."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.Mod: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And, ast.Break: ast.Continue,
    ast.Continue: ast.Break,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
MESSAGES = ("Refused", "Blocked", "Refusal")
"""Calls whose arguments are codes and texts."""
FUNCTIONS = (ast.FunctionDef, ast.Lambda)


@dataclass
class Mutant:
    """`apply` changes the tree it was made of. `scope` is the outermost function around the node, None at module
    level; `part` is the class or assignment there that holds it; `lines` are those one of which runs before it."""

    file: str
    function: str
    line: int
    text: str
    before: str
    after: str
    lines: range
    scope: ast.AST | None
    part: ast.stmt
    apply: Callable[[], None]

    @property
    def key(self) -> str:
        """What names it whatever stands above it in the file."""
        return f"{self.file} | {self.function} | {self.text} | {self.before} -> {self.after}"


class Source:
    """A file of the core, parsed."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, path.relative_to(ROOT).as_posix()
        self.module = self.file[:-3].replace("/", ".").replace("passes.", "normfuse.passes.", 1)
        self.lines = path.read_text(encoding="utf-8").splitlines()
        self.tree = ast.parse("\n".join(self.lines))
        self.assigned: dict[str, int] = {}

    def mutants(self) -> Iterator[Mutant]:
        """All of them, in the order of the text."""
        for part in self.tree.body:
            yield from self._walk(part, self.tree.body, [], part, range(part.lineno, part.lineno + 1))

    def _walk(self, node: ast.AST, holder: object, around: list[ast.AST], part: ast.stmt,
              lines: range) -> Iterator[Mutant]:  # fmt: skip
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.Assert, ast.JoinedStr)):
            return
        if isinstance(node, ast.stmt):
            last = node.body[0].lineno - 1 if hasattr(node, "body") else node.end_lineno or node.lineno
            lines = range(node.lineno, max(last, node.lineno) + 1)
        if not isinstance(node, (ast.ClassDef, ast.arguments)):
            for new in _changes(node, around, isinstance(holder, tuple) and isinstance(holder[0], ast.Subscript)):
                yield self._made(node, new, holder, around, part, lines)
        inside = [*around, node] if isinstance(node, (*FUNCTIONS, ast.ClassDef)) else around
        for name, child in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "bases", "keywords") and name != "keywords":
                continue
            if name == "keywords" and isinstance(node, ast.Call):
                child = [k for k in child if k.arg != "strict"]  # of zip: lengths that are equal anyway
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in MESSAGES and name != "func":
                continue
            own = around if isinstance(child, ast.arguments) else inside  # defaults belong to the outside
            for one in child if isinstance(child, list) else [child]:
                if isinstance(one, ast.AST):
                    yield from self._walk(one, child if isinstance(child, list) else (node, name), own, part, lines)

    def _made(self, node: ast.AST, new: ast.AST, holder: object, around: list[ast.AST], part: ast.stmt,
              lines: range) -> Mutant:  # fmt: skip
        line = getattr(node, "lineno", lines.start)
        scope = next((a for a in around if isinstance(a, FUNCTIONS)), None)
        name = ".".join(getattr(a, "name", "<lambda>") for a in around) or "<module>"

        def apply() -> None:
            fixed = ast.fix_missing_locations(ast.copy_location(new, node)) if hasattr(node, "lineno") else new
            if isinstance(holder, list):
                holder[next(i for i, one in enumerate(holder) if one is node)] = fixed
            else:
                assert isinstance(holder, tuple)
                setattr(holder[0], holder[1], fixed)

        return Mutant(self.file, name, line, self.lines[line - 1].strip(), _text(node), _text(new), lines, scope, part,
                      apply)  # fmt: skip


def _text(node: ast.AST) -> str:
    if isinstance(node, (ast.operator, ast.cmpop, ast.boolop)):
        return type(node).__name__
    if isinstance(node, (ast.If, ast.While)):
        return f"if {ast.unparse(node.test)}"
    return " ".join(ast.unparse(node).split())


def _with(node: ast.AST, **fields: object) -> ast.AST:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def _changes(node: ast.AST, around: list[ast.AST], index: bool) -> Iterator[ast.AST]:
    """What may stand in the place of a node."""
    truth = [ast.Constant(True), ast.Constant(False)]
    match node:
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                yield _with(node, ops=[*ops[:i], SWAPS[type(op)](), *ops[i + 1 :]])
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in SWAPS:
            yield _with(node, op=SWAPS[type(op)]())
        case ast.BoolOp(op=op, values=values):
            yield _with(node, op=SWAPS[type(op)]())
            for i in range(len(values)):  # one condition less
                rest = [*values[:i], *values[i + 1 :]]
                yield _with(node, values=rest) if len(rest) > 1 else rest[0]
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield ast.Constant(value + 1)
            if not (index and value == 0):  # of a sequence of one element, 0 and -1 are the same
                yield ast.Constant(value - 1)
        case ast.Name(id=name) if name in NAMES:
            yield _with(node, id=NAMES[name])
        case ast.Slice(lower=lower, upper=upper, step=step):
            for field, bound in (("lower", lower), ("upper", upper), ("step", step)):
                if bound is not None:
                    yield _with(node, **{field: None})
        case ast.comprehension(ifs=ifs):
            for i in range(len(ifs)):
                yield _with(node, ifs=[*ifs[:i], *ifs[i + 1 :]])
        case ast.IfExp():
            yield node.body
            yield node.orelse
        case ast.If():
            yield from (_with(node, test=one) for one in truth)
        case ast.While() if not isinstance(node.test, ast.Constant):
            yield _with(node, test=truth[1])
        case ast.Break() | ast.Continue():
            yield SWAPS[type(node)]()
            yield ast.Pass()
        case ast.Raise() | ast.AugAssign() | ast.Delete():
            yield ast.Pass()
        case ast.Expr(value=ast.Call() | ast.Yield() | ast.YieldFrom()):
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]) if around:
            yield ast.Pass()
        case ast.Assign(targets=[ast.Name(id=name)]) if around and _again(around[-1], name):
            yield ast.Pass()
        case ast.Return(value=ast.expr() as value) if _text(value) not in ("None", "False"):
            yield ast.Return(None)
    if isinstance(node, ast.AugAssign) and type(node.op) in SWAPS:
        yield ast.Pass()


def _again(function: ast.AST, name: str) -> bool:
    """Whether a name is assigned more than once in a function, or is an argument of it."""
    stores = sum(isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Store) for n in ast.walk(function))
    return stores > 1 or any(isinstance(n, ast.arg) and n.arg == name for n in ast.walk(function))
