"""Break the Python layer at random and show which test notices: `make mutants`.

Every place of the package where one operator, constant, condition, argument or statement can be
changed is a mutant. `--seed` and `--count` draw some of them, from the modules named. A mutant that
no test of its module's selection catches, and that is not known to change nothing, ends the run
with exit code 1.
"""

from __future__ import annotations

import argparse
import ast
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from mutants import ROOT, failed_test, run_tests

# The tests that are to notice, the most telling ones first: by module, as it is imported. A module
# that is not here is left alone.
TESTS = {
    **dict.fromkeys(("fusednorm.adaptive", "fusednorm.adaptive_probe"), "test_adaptive"),
    **dict.fromkeys(
        ("fusednorm.arithmetic", "fusednorm.comparison", "fusednorm.probe"),
        "test_arithmetic test_replace",
    ),
    **dict.fromkeys(
        ("fusednorm.probe_autocast", "fusednorm.recognition", "fusednorm.swapped"),
        "test_arithmetic test_replace",
    ),
    "fusednorm.autograd": "test_limits test_surroundings test_autograd test_dropout",
    "fusednorm.backends": "test_limits test_backends",
    "fusednorm.channels": "test_channels",
    "fusednorm.coverage": "test_coverage",
    "fusednorm.distributed": "test_distributed",
    "fusednorm.functional": "test_limits test_validation test_autocast test_backends test_terms",
    "fusednorm.gated": "test_gated",
    "fusednorm.modules": "test_modules",
    "fusednorm.observers": "test_observers test_surroundings test_compile",
    "fusednorm.ops": "test_limits test_backends test_compile",
    "fusednorm.reference": "test_limits test_dropout test_empty test_surroundings test_autograd",
    "fusednorm.replace": "test_limits test_replace",
    "fusednorm.route": "test_observers test_surroundings test_nested test_torch_operators",
    "fusednorm.spec": "test_limits test_validation test_layouts",
    "fusednorm.torch_operators": "test_torch_operators",
    "fusednorm.validation": "test_limits test_validation",
    "fusednorm.triton_kernels.config": "test_limits test_config",
    "fusednorm.triton_kernels.launch": "test_limits test_dropout test_layouts test_jumps",
}

# What cannot be told from the original, with the reason.
EQUIVALENT = {
    "autograd.register.record: torch.is_grad_enabled() and any((isinstance(value, Tensor) and "
    "value.req... -> torch.is_grad_enabled()": "records what has no gradient, which torch drops",
    "channels._equations_gradients: Spec((x.shape[1],), eps, rms, 0.0, x.dtype, None, None) -> "
    "Spec((x.shape[1],), eps, rms, x.dtype, 0.0, None, None)": "without a seed both are unread",
    "channels._equations_gradients: Spec((x.shape[1],), eps, rms, 0.0, x.dtype, None, None) -> "
    "Spec((x.shape[1],), eps, rms, 1.0, x.dtype, None, None)": "without a seed none is dropped",
}

OPPOSITES: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
OTHER_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
# Their arguments have different kinds: swapped, they say nothing about the tests.
ORDERED = {"isinstance", "issubclass", "getattr", "hasattr", "setattr", "zip", "range"}
# Numbers that were tuned: others are as right, and slower.
TUNED = {"Tier", "Architecture"}


@dataclass(frozen=True)
class Mutant:
    """The replacement of the bytes from `start` to `end` of a module's source by `text`.

    `key` names it by function and changed expression, wherever that stands in the file.
    """

    module: str
    key: str
    start: int
    end: int
    text: str

    def apply(self, folder: Path) -> None:
        """Edit the copy of the package in `folder`."""
        path = folder / f"{self.module.replace('.', '/')}.py"
        source = path.read_bytes()
        path.write_bytes(source[: self.start] + self.text.encode() + source[self.end :])


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what may stand in the place of an expression or a statement."""
    match node:
        case ast.Compare(left, [op], comparators):
            yield ast.Compare(left, [OPPOSITES[type(op)]()], comparators)
        case ast.Compare(left, [first, second], comparators):  # a < b < c
            yield ast.Compare(left, [OPPOSITES[type(first)](), second], comparators)
            yield ast.Compare(left, [first, OPPOSITES[type(second)]()], comparators)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(OPPOSITES[type(op)](), values)
            for i in range(len(values)):
                rest = values[:i] + values[i + 1 :]
                yield rest[0] if len(rest) == 1 else ast.BoolOp(op, rest)
        case ast.UnaryOp(ast.Not(), operand):
            yield operand
        case ast.IfExp(_, body, orelse):
            yield body
            yield orelse
        case ast.BinOp(left, op, right) if type(op) in OPPOSITES:
            yield ast.BinOp(left, OPPOSITES[type(op)](), right)
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value)):
            yield ast.Constant(value + 1)
            if value > 0:
                yield ast.Constant(value - 1)
        case ast.Constant(float(value)):
            yield ast.Constant(2 * value if value else 1.0)
        case ast.Set(elements) if len(elements) > 1:
            for i in range(len(elements)):
                yield ast.Set(elements[:i] + elements[i + 1 :])
        case ast.Call(ast.Name(name), arguments, keywords) if name in OTHER_NAMES:
            yield ast.Call(ast.Name(OTHER_NAMES[name]), arguments, keywords)
        case ast.Call(function, arguments, keywords) if ast.unparse(function) not in ORDERED:
            for i in range(len(arguments) - 1):
                first, second = arguments[i : i + 2]
                if ast.dump(first) != ast.dump(second):
                    swapped = [*arguments[:i], second, first, *arguments[i + 2 :]]
                    yield ast.Call(function, swapped, keywords)
        case ast.If() | ast.AugAssign() | ast.Continue() | ast.Break() | ast.Delete():
            yield ast.Pass()
        case ast.Assign([ast.Attribute() | ast.Subscript()]):
            yield ast.Pass()
        case ast.Expr(ast.Call()):
            yield ast.Pass()


class Finder(ast.NodeVisitor):
    """Collects the mutants of one module."""

    def __init__(self, module: str, source: bytes) -> None:
        self.mutants: list[Mutant] = []
        self._module = module
        self._lines = [0]
        for line in source.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))
        self._source = source
        self._scope: list[str] = []
        self._above: list[ast.AST] = []
        self.visit(ast.parse(source))

    def visit(self, node: ast.AST) -> None:
        """Collect the mutants of a node and of those below it."""
        if isinstance(node, ast.Call) and ast.unparse(node.func) in TUNED:
            return
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            self._scope.append(node.name)
        if not self._is_elif(node):
            for change in changes(node):
                self._add(node, change)
        self._above.append(node)
        super().visit(node)
        self._above.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            self._scope.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Look at defaults and body, not at what is only read by people and mypy."""
        for part in (*node.args.defaults, *node.args.kw_defaults, *node.body):
            if part is not None:
                self.visit(part)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """Leave out the annotation."""
        if node.value is not None:
            self.visit(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Leave out f-strings: before Python 3.12 what is in them has no place in the source."""

    def visit_With(self, node: ast.With) -> None:
        """Enter nothing in the place of each of the contexts, too."""
        for item in node.items:
            nothing = ast.parse("__import__('contextlib').nullcontext()", mode="eval").body
            if item.optional_vars is None:
                self._add(item.context_expr, nothing)
        self.generic_visit(node)

    def _is_elif(self, node: ast.AST) -> bool:
        return isinstance(node, ast.If) and self._source.startswith(b"elif", self._span(node)[0])

    def _span(self, node: ast.AST) -> tuple[int, int]:
        start = self._lines[node.lineno - 1] + node.col_offset
        return start, self._lines[node.end_lineno - 1] + node.end_col_offset

    def _add(self, node: ast.AST, change: ast.AST) -> None:
        start, end = self._span(node)
        text = ast.unparse(ast.fix_missing_locations(change))
        text = f"({text})" if isinstance(change, ast.expr) else text
        old, new = self._in_context(node, text)
        key = f"{'.'.join([self._module.rpartition('.')[2], *self._scope])}: {old} -> {new}"
        times = sum(mutant.key.partition(" #")[0] == key for mutant in self.mutants)
        key += f" #{times + 1}" if times else ""
        self.mutants.append(Mutant(self._module, key, start, end, text))

    def _in_context(self, node: ast.AST, text: str) -> tuple[str, str]:
        """Return the smallest expression around a node that says what it is, before and after."""
        if isinstance(node, ast.stmt):
            return _line(ast.unparse(node), 0), text
        around = node
        for outer in reversed(self._above):
            telling = len(ast.unparse(around)) > 12 and _stands_alone(around)
            if telling or isinstance(outer, ast.stmt):
                break
            around = outer if isinstance(outer, ast.expr) else around
        (first, last), (start, end) = self._span(around), self._span(node)
        before, after = self._source[first:start].decode(), self._source[end:last].decode()
        parts = f"({before}{self._source[start:end].decode()}{after})", f"({before}{text}{after})"
        old, new = (ast.unparse(ast.parse(part, mode="eval")) for part in parts)
        same = len([*takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False))])
        return _line(old, same), _line(new, same)


def _stands_alone(node: ast.AST) -> bool:
    """Return whether an expression is one outside of its subscript or call, too."""
    parts = node.elts if isinstance(node, ast.Tuple) else [node]
    return not any(isinstance(part, ast.Slice | ast.Starred) for part in parts)


def _line(code: str, place: int) -> str:
    """Return code as one line, or what stands around a place in it."""
    first = max(0, place - 30) if len(code) > 72 else 0
    line = " ".join(code[first : first + 72].split())
    return "..." * (first > 0) + line + "..." * (first + 72 < len(code))


def mutants(module: str) -> list[Mutant]:
    """Return every mutant of a module, in the order of its source."""
    return Finder(module, _path(module).read_bytes()).mutants


def every_mutant() -> list[Mutant]:
    """Return the mutants of all modules."""
    return [mutant for module in TESTS for mutant in mutants(module)]


def _path(module: str) -> Path:
    """Return where the repository keeps a module."""
    path = Path(*module.split(".")).with_suffix(".py")
    return ROOT / (path.relative_to("fusednorm") if "triton_kernels" in path.parts else path)


def noticed_by(mutant: Mutant, tests: list[str], seconds: float) -> str | None:
    """Return the first test that fails for a mutant, or None where all pass."""
    try:
        done = run_tests(mutant.apply, tests, seconds)
    except subprocess.TimeoutExpired:
        return "no end"
    if done.returncode == 0:
        return None
    # An import that fails takes conftest.py along.
    return failed_test(done) or f"exit code {done.returncode}"


def main() -> int:
    """Print one line per mutant; return 1 if any survives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="parts of the keys of mutants; none means all")
    parser.add_argument("--seed", type=int, default=0, help="which ones are drawn")
    parser.add_argument("--count", type=int, default=20, help="how many are drawn; 0 for all")
    parser.add_argument("--list", action="store_true", help="print their keys and run nothing")
    options = parser.parse_args()
    found = [
        mutant
        for mutant in every_mutant()
        if mutant.key not in EQUIVALENT
        and (not options.words or any(word in mutant.key for word in options.words))
    ]
    if 0 < options.count < len(found):
        found = random.Random(options.seed).sample(found, options.count)
    if options.list:
        print(*(mutant.key for mutant in found), sep="\n")
        return 0
    limits: dict[str, float] = {}
    survivors = 0
    for mutant in sorted(found, key=lambda mutant: mutant.module):
        tests = [f"tests/{name}.py" for name in TESTS[mutant.module].split()]
        if mutant.module not in limits:
            limits[mutant.module] = time_limit(mutant.module, tests)
        test = noticed_by(mutant, tests, limits[mutant.module])
        survivors += test is None
        print(f"{mutant.key}\n    {test or 'SURVIVED'}", flush=True)
    print(f"{len(found) - survivors} of {len(found)} noticed")
    return int(survivors > 0)


def time_limit(module: str, tests: list[str]) -> float:
    """Return how long the tests of a module may take; stop where they fail without a mutant."""
    start = time.monotonic()
    done = run_tests(lambda _: None, tests)
    if done.returncode != 0:
        sys.exit(f"{module}: its tests fail without a mutant\n{done.stdout}{done.stderr}")
    return 60 + 5 * (time.monotonic() - start)


if __name__ == "__main__":
    sys.exit(main())
