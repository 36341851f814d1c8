"""Would the tests notice? Small faults put into the core, one at a time; the tests that own the module must fail.

Run: ``make mutants``, or ``python -m benchmarks.mutants --n 40 --seed 0 --jobs 2 [--only statistics]``.

A mutant is the module with one change: a comparison turned or moved by its boundary, an operator exchanged, a number one
higher, True for False, and for or, a condition negated, a sign or ``not`` left out, None returned. Messages, annotations,
decorators and texts stay as they are. Nothing is written into the tree. Where the change is inside a function, a process that has
collected the tests forks a child for each mutant, which puts the changed code into it and runs those that call it; every other
mutant gets a child that imports the changed module. Both run pytest ``-x``. What tests start as
processes of their own sees the unchanged module, which counts against us.
A mutant that runs into the time limit counts as killed, as usual, and is shown apart. Of all, n a module are drawn by seed.
"""

from __future__ import annotations

import argparse
import ast
import gc
import hashlib
import importlib.machinery
import importlib.util
import inspect
import json
import math
import os
import platform
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

GOAL = 0.85
"""Share of the mutants of each part that must be killed."""

SURVIVED, ABSENT = 0, 97
NOTHING_RAN = (5, ABSENT)
"""Exit codes of a child that tell nothing of its mutant: pytest found no tests; the module was never loaded. Wrong usage, 4, is
also what pytest says of a conftest.py that cannot be loaded for the fault; as the module stands, the same words passed."""


@dataclass(frozen=True, slots=True)
class Core:
    """One module to change. names: functions and classes to change, all if empty. tests: arguments for pytest."""

    part: str
    path: str
    tests: tuple[str, ...]
    names: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """Its name for import."""
        return self.path.removesuffix(".py").replace("/", ".")


_ROWS = "journey or lost_rows or one_worker or let_go or of_pieces or stays or are_even or column_holds or ends_early"
CORES = (
    Core("schedule", "traces/shape.py", ("tests/test_shape.py", "tests/test_schedule_stateful.py")),
    Core("accounting", "traces/records.py", ("tests/test_records.py",), ("Schedule", "Observations", "Histogram")),
    Core(
        "accounting",
        "loadgen/swarm.py",
        ("tests/test_swarm.py", "-k", _ROWS),
        ("pack", "_plain", "_facts", "Pieces", "unpack", "shares", "ended"),
    ),
    Core("statistics", "traces/measures.py", ("tests/test_measures.py",)),
    Core("statistics", "traces/aggregate.py", ("tests/test_aggregate.py", "-k", "not postgres and not mariadb")),
    Core("statistics", "advisor/compare.py", ("tests/test_compare.py",)),
    Core(
        "decision",
        "advisor/recommend.py",
        ("tests/test_advise.py", "-k", "lexicographic or equal_fleets or what_the_choice_loses"),
        ("rank", "_regret"),
    ),
    Core("decision", "loadgen/policy.py", ("tests/test_policy.py",)),
)

# --- what is changed ------------------------------------------------------------------------------------------------

_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}


@dataclass(frozen=True, slots=True)
class Change:
    """What is done where; ``make`` does it to the tree that it was found in."""

    line: int
    what: str
    make: Callable[[], None]


def changes(tree: ast.Module, names: Sequence[str] = ()) -> list[Change]:
    """All changes of one kind or another that can be made to a module, in order of the source."""
    found: list[Change] = []
    for statement in tree.body:
        name = getattr(statement, "name", "")
        if not names or name in names:
            found += _changes(statement)
    return found


def _changes(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return  # messages are prose
    yield from _of(node)
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _changes(child)


def _of(node: ast.AST) -> Iterator[Change]:
    def change(what: str, owner: ast.AST, key: str, value: object) -> Change:
        return Change(getattr(node, "lineno", 0), what, lambda: setattr(owner, key, value))

    def word(kind: type[ast.AST]) -> str:
        return kind.__name__

    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for other in _COMPARISONS[type(op)]:
                ops = [*node.ops[:i], other(), *node.ops[i + 1 :]]
                yield change(f"{word(type(op))} -> {word(other)} in {_text(node)}", node, "ops", ops)
    elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _OPERATORS:
        to = _OPERATORS[type(node.op)]
        yield change(f"{word(type(node.op))} -> {word(to)} in {_text(node)}", node, "op", to())
    elif isinstance(node, ast.BoolOp):
        both = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield change(f"{word(type(node.op))} -> {word(both)} in {_text(node)}", node, "op", both())
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield change(f"{node.value} -> {not node.value}", node, "value", not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield change(f"{node.value} -> {node.value + 1}", node, "value", node.value + 1)
    elif isinstance(node, ast.Return) and node.value is not None and not _none(node.value):
        yield change(f"{_text(node)} -> return None", node, "value", ast.Constant(None))
    for key in ("test", "operand"):  # of if, while, conditional expressions; of -x and not x
        inner = getattr(node, key, None)
        if isinstance(node, ast.UnaryOp) and key == "operand" and isinstance(node.op, ast.USub | ast.Not):
            other = ast.UAdd() if isinstance(node.op, ast.USub) else None
            if other is not None:
                yield change(f"{_text(node)} without its sign", node, "op", other)
            else:  # not not x is bool(x)
                yield change(f"{_text(node)} without not", node, "operand", ast.UnaryOp(ast.Not(), node.operand))
        elif key == "test" and isinstance(inner, ast.Name | ast.Attribute | ast.Call | ast.Subscript):
            yield change(f"{_text(inner)} negated", node, "test", ast.UnaryOp(ast.Not(), inner))
    if isinstance(node, ast.comprehension):
        for i, inner in enumerate(node.ifs):
            if not isinstance(inner, ast.Compare | ast.BoolOp | ast.UnaryOp):
                ifs = [*node.ifs[:i], ast.UnaryOp(ast.Not(), inner), *node.ifs[i + 1 :]]
                yield Change(
                    inner.lineno, f"{_text(inner)} negated", lambda node=node, ifs=ifs: setattr(node, "ifs", ifs)
                )


def _none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _text(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 90 else text[:87] + "..."


def mutant(core: Core, number: int | None) -> CodeType:
    """The module's code with one change; unchanged for None."""
    path = ROOT / core.path
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if number is not None:
        changes(tree, core.names)[number].make()
    return compile(ast.fix_missing_locations(tree), str(path), "exec", dont_inherit=True)


# --- a child that runs the tests ------------------------------------------------------------------------------------


class Changed(importlib.machinery.SourceFileLoader):
    """Loads code that we made."""

    code: CodeType

    def get_code(self, fullname: str) -> CodeType:
        """Not the file's."""
        return self.code


class Finder:
    """Finds one module, changed, before the others look for it."""

    def __init__(self, module: str, path: Path, code: CodeType) -> None:
        self.module, self.path, self.code = module, path, code

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> object:
        """The changed module's spec, None for any other."""
        if name != self.module:
            return None
        loader = Changed(name, str(self.path))
        loader.code = self.code
        return importlib.util.spec_from_file_location(name, self.path, loader=loader)


def start(core: Core, number: int | None) -> int:
    """Fork a child that runs the tests on a mutant; its process id."""
    code = mutant(core, number)
    pid = os.fork()
    if pid:
        return pid
    try:
        alone()
        sys.meta_path.insert(0, Finder(core.module, ROOT / core.path, code))  # type: ignore[arg-type]
        found = tests(core)
        held = sys.modules.get(core.module)
        if found == SURVIVED and not isinstance(getattr(held, "__loader__", None), Changed):
            found = ABSENT
    except BaseException:
        found = 1
    os._exit(found)


def alone() -> None:
    """A group of our own, to be ended as one (not a session: Linux would share the cores out by those), and silence."""
    os.setpgid(0, 0)
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)


def tests(core: Core, *plugins: object) -> int:
    """Exit code of pytest."""
    import pytest

    return int(pytest.main(["-x", "-q", "-p", "no:xdist", "--no-header", *core.tests], plugins=list(plugins)))


# --- children of a process that has collected the tests -------------------------------------------------------------


def functions(core: Core) -> dict[tuple[str, int], list[FunctionType]]:
    """The module's functions that are loaded, by name and line."""
    found: dict[tuple[str, int], list[FunctionType]] = {}
    gc.unfreeze()  # tests/conftest.py hides from the collector what was read, and so from us
    for held in gc.get_objects():
        if isinstance(held, FunctionType) and held.__code__.co_filename == str(ROOT / core.path):
            found.setdefault((held.__code__.co_qualname, held.__code__.co_firstlineno), []).append(held)
    return found


def _changed(old: CodeType, new: CodeType) -> Iterator[CodeType | None]:
    """Outermost functions of the new code that are not the old ones; None where a module's or a class's own code is not."""
    inner = [[c for c in code.co_consts if isinstance(c, CodeType)] for code in (old, new)]
    if len(inner[0]) != len(inner[1]) or _own(old) != _own(new):
        yield None
        return
    for a, b in zip(*inner, strict=True):
        if not b.co_flags & inspect.CO_OPTIMIZED:
            yield from _changed(a, b)
        elif a != b:
            yield b


def _own(code: CodeType) -> tuple[object, ...]:
    return code.co_code, code.co_names, [repr(c) for c in code.co_consts if not isinstance(c, CodeType)]


class Child(BaseException):
    """We are the child: run the tests."""


Name = tuple[str, int]
"""Of a function: its qualified name and first line."""


class Here:
    """Plugin of pytest: when the tests are collected, fork a child for each mutant, which goes on to run those that call it."""

    def __init__(self, core: Core, numbers: Sequence[int], limit_s: float, most: int, until: float, told: int) -> None:
        self.core, self.numbers, self.told = core, numbers, told
        self.limits_s, self.most, self.until = {core: limit_s}, most, until
        self.survey: dict[str, tuple[float, list[Name]]] | None = None  # of the child that looks

    def fork(self, core: Core, number: int | None) -> int:
        pid = os.fork()
        if not pid:
            alone()
            names = {(code.co_qualname, code.co_firstlineno) for code in self.codes[number]}
            for code in self.codes[number]:
                for function in self.loaded[code.co_qualname, code.co_firstlineno]:
                    function.__code__ = code
            calls = [item for item in self.session.items if names & set(self.called[item.nodeid][1])]
            self.session.items[:] = sorted(calls, key=lambda item: self.called[item.nodeid][0])  # the quick ones first
            raise Child
        return pid

    def look(self) -> dict[str, tuple[float, list[Name]]]:
        """Test -> seconds, and the module's functions that it called, by a child that runs all."""
        handle, name = tempfile.mkstemp()  # no folder of a with: the child leaves this frame, too
        os.close(handle)
        self.seen = Path(name)
        pid = os.fork()
        if not pid:
            self.survey = {}
            raise Child
        os.waitpid(pid, 0)
        held = json.loads(self.seen.read_text())
        self.seen.unlink()
        return {test: (took, [(name, line) for name, line in names]) for test, (took, names) in held.items()}

    def pytest_runtest_protocol(self, item: Any) -> None:
        """In the child that looks: from here on this test is watched."""
        if self.survey is None:
            return
        path, found, start = str(ROOT / self.core.path), set[Name](), time.perf_counter()

        def note(frame: Any, event: str, _: object) -> None:
            if event == "call" and frame.f_code.co_filename == path:
                found.add((frame.f_code.co_qualname, frame.f_code.co_firstlineno))

        self.survey[item.nodeid] = 0.0, []
        self.ended = lambda: (time.perf_counter() - start, sorted(found))
        threading.setprofile(note)
        sys.setprofile(note)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if self.survey is not None:
            sys.setprofile(None)
            threading.setprofile(None)
            self.survey[nodeid] = self.ended()

    def pytest_sessionfinish(self) -> None:
        if self.survey is not None:
            self.seen.write_text(json.dumps(self.survey))

    def pytest_runtestloop(self, session: Any) -> None:
        self.session, self.loaded, old = session, functions(self.core), mutant(self.core, None)
        if not self.loaded:
            os._exit(1)
        self.codes: dict[int | None, list[CodeType]] = {}
        for number in self.numbers:
            changed = list(_changed(old, mutant(self.core, number)))
            codes = [c for c in changed if c is not None and (c.co_qualname, c.co_firstlineno) in self.loaded]
            if codes and len(codes) == len(changed):
                self.codes[number] = codes
        try:
            self.called = self.look()
            known = {name for _, names in self.called.values() for name in names}
            jobs = [
                (self.core, number)
                for number, codes in self.codes.items()
                if known & {(code.co_qualname, code.co_firstlineno) for code in codes}
            ]
            for at, outcome, _ in run(jobs, self.limits_s, self.most, self.until, self.fork):
                os.write(self.told, f"{jobs[at][1]} {outcome}\n".encode())
        except Child:
            return
        os._exit(0)


def collected(core: Core, numbers: Sequence[int], limit_s: float, most: int, until: float) -> Iterator[tuple[int, str]]:
    """(mutant, killed, survived or timeout) of those mutants that a child of a process with collected tests can try."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(ours)
            alone()
            os._exit(tests(core, Here(core, numbers, limit_s, most, until, theirs)))
        except BaseException:
            os._exit(1)
    os.close(theirs)
    with os.fdopen(ours) as lines:
        for line in lines:
            number, outcome = line.split()
            yield int(number), outcome
    if os.waitpid(pid, 0)[1]:
        raise SystemExit(
            f"the process that collected the tests of {core.path} failed, or found no function of it loaded"
        )


def preload() -> None:
    """Load what the tests import and we do not change, once, before the forks."""
    for name in (
        "pytest",
        "numpy",
        "numpy.random",
        "sqlalchemy",
        "aiohttp",
        "orjson",
        "scipy.stats",
        "sklearn.linear_model",
    ):
        import_module(name)
    ours = [m for m in sys.modules if m.split(".")[0] in ("traces", "loadgen", "advisor", "tests")]
    if ours:
        raise SystemExit(f"{ours[0]} was loaded before it could be changed")


def run(
    jobs: Sequence[tuple[Core, int | None]],
    limits_s: dict[Core, float],
    most: int,
    until: float = math.inf,
    start: Callable[[Core, int | None], int] = start,
) -> Iterator[tuple[int, str, float]]:
    """(position, killed, survived or timeout, seconds) of each job, as they end. until: begin none after this time."""
    waiting = list(enumerate(jobs))[::-1]
    alive: dict[int, tuple[int, float]] = {}
    while waiting or alive:
        if time.monotonic() > until:
            waiting.clear()
        while waiting and len(alive) < most:
            at, (core, number) = waiting.pop()
            alive[start(core, number)] = at, time.monotonic()
        time.sleep(0.01)
        for pid, (at, since) in list(alive.items()):
            took = time.monotonic() - since
            core = jobs[at][0]
            ended, status = os.waitpid(pid, os.WNOHANG)  # first: we may have been stopped for a while, and it has ended
            late = not ended and took > limits_s.get(core, 120.0)
            if late:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            elif not ended:
                continue
            del alive[pid]
            code = os.waitstatus_to_exitcode(status)
            if not late and code in NOTHING_RAN:
                raise SystemExit(f"the tests of {core.path} did not run (exit {code}): {' '.join(core.tests)}")
            yield at, "timeout" if late else "survived" if code == SURVIVED else "killed", took


def main() -> int:
    """Draw, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=40, help="mutants drawn of each module; 0: all of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="children at once")
    parser.add_argument("--only", default="", help="a part, or a word of a module's path")
    parser.add_argument(
        "--keep", type=Path, help="file of what became of each mutant; those that stand there are not tried again"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no mutant after so long")
    parser.add_argument("--json", default="", help="also write the figures to this file")
    asked = parser.parse_args()
    begin = time.monotonic()
    cores = [c for c in CORES if not asked.only or asked.only == c.part or asked.only in c.path]
    os.chdir(ROOT)
    os.environ["HYPOTHESIS_PROFILE"] = "unshrunk"
    preload()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, pytest {version('pytest')}, "
        f"seed {asked.seed}, at most {asked.n or 'all'} mutants a module",
        flush=True,
    )

    limits_s: dict[Core, float] = {}
    for at, outcome, took in run([(c, None) for c in cores], limits_s, 1):
        if outcome != "survived":
            raise SystemExit(f"the tests of {cores[at].path} fail as it is: {' '.join(cores[at].tests)}")
        limits_s[cores[at]] = 10 + 5 * took
        print(f"  {cores[at].path}: unchanged, {took:.1f} s", flush=True)

    held = {c: changes(ast.parse((ROOT / c.path).read_text(encoding="utf-8")), c.names) for c in cores}
    jobs: list[tuple[Core, int | None]] = []
    for core in cores:
        every = range(len(held[core]))
        drawn = random.Random(asked.seed).sample(every, min(asked.n, len(every))) if asked.n else every
        jobs += [(core, k) for k in sorted(drawn)]
    # A mutant is known by its module as it stands: of another version nothing is taken over.
    texts = {c: hashlib.sha256((ROOT / c.path).read_bytes()).hexdigest()[:16] for c in cores}
    kept: dict[tuple[str, str, int], str] = {}
    if asked.keep and asked.keep.exists():
        for line in asked.keep.read_text(encoding="utf-8").splitlines():
            path, text, number, outcome = json.loads(line)
            kept[path, text, number] = outcome
    found: dict[int, str] = {}
    for at, (core, number) in enumerate(jobs):
        if (core.path, texts[core], number or 0) in kept:
            found[at] = kept[core.path, texts[core], number or 0]
    until = begin + 60 * asked.minutes

    def learn(at: int, outcome: str) -> None:
        found[at] = outcome
        if asked.keep:
            core, number = jobs[at]
            with asked.keep.open("a", encoding="utf-8") as file:
                file.write(json.dumps([core.path, texts[core], number or 0, outcome]) + "\n")

    for core in cores:
        places = {number or 0: at for at, (c, number) in enumerate(jobs) if c == core and at not in found}
        for number, outcome in collected(core, list(places), limits_s[core], asked.jobs, until) if places else ():
            learn(places[number], outcome)
        print(f"  {core.path}: {time.monotonic() - begin:.0f} s", flush=True)
    left = [at for at in range(len(jobs)) if at not in found]
    for place, outcome, _ in run([jobs[at] for at in left], limits_s, asked.jobs, until):
        learn(left[place], outcome)
    for at, outcome in sorted(found.items()):
        if outcome == "survived":
            core, number = jobs[at]
            print(
                f"  {outcome}: {core.path}:{held[core][number or 0].line}: {held[core][number or 0].what}", flush=True
            )

    print(
        f"\n{'part':<12}{'module':<24}{'mutants':>8}{'drawn':>7}{'killed':>8}{'timeout':>9}{'survived':>10}{'share':>8}"
    )
    by_part: dict[str, Counter[str]] = {}
    table = []
    for core in cores:
        counts = Counter(found[at] for at, (c, _) in enumerate(jobs) if c == core and at in found)
        by_part.setdefault(core.part, Counter()).update(counts)
        drawn = counts.total()
        share = 1 - counts["survived"] / max(1, drawn)
        table.append({"part": core.part, "module": core.path, "mutants": len(held[core]), "drawn": drawn, **counts})
        print(
            f"{core.part:<12}{core.path:<24}{len(held[core]):>8}{drawn:>7}{counts['killed']:>8}{counts['timeout']:>9}"
            f"{counts['survived']:>10}{share:>8.0%}"
        )
    shares = {part: 1 - c["survived"] / max(1, c.total()) for part, c in by_part.items()}
    print("  ".join(f"{part} {share:.1%}" for part, share in shares.items()), f"in {time.monotonic() - begin:.0f} s")
    if len(found) < len(jobs):
        print(f"{len(jobs) - len(found)} are left to try: run it again with --keep.")
    if asked.json:
        Path(asked.json).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return 0 if min(shares.values()) >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
