"""Shows long work: bars where someone watches, plain lines now and then where nobody does, nothing when quiet."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

EVERY_S = 10.0
"""Between two plain lines of one task."""

Note = str | Callable[[], str]
"""What a task has found so far: a text, or a function that is asked when the text is shown."""

Left = Callable[[], float] | None
"""Seconds that a task will take, for work that knows better than its own speed so far."""


def _said(note: Note) -> str:
    return note() if callable(note) else note


def _span(seconds: float) -> str:
    """``75`` as 1:15."""
    whole = max(0, round(seconds))
    return (
        f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
        if whole >= 3600
        else f"{whole // 60}:{whole % 60:02d}"
    )


def _amount(done: float, total: float | None, unit: str) -> str:
    if unit == "bytes":
        return decimal(int(done)) + (f" of {decimal(int(total))}" if total else "")
    return f"{done:.0f}" + (f" of {total:.0f}" if total else "")


def _remaining(done: float, total: float | None, elapsed: float, left: Left) -> float | None:
    """Seconds left, None where nobody can know."""
    if left is not None:
        known = left()
        if known == known:
            return known
    if not total or done <= 0 or elapsed < 1.0:
        return None
    return elapsed * (total - done) / done


class _Amount(ProgressColumn):
    def render(self, task: Task) -> RenderableType:
        return Text(_amount(task.completed, task.total, task.fields["unit"]))


class _Times(ProgressColumn):
    def render(self, task: Task) -> RenderableType:
        elapsed = task.finished_time if task.finished else task.elapsed
        text = _span(elapsed or 0.0)
        rest = None if task.finished else _remaining(task.completed, task.total, elapsed or 0.0, task.fields["left"])
        return Text(text + (f", {_span(rest)} left" if rest is not None else ""))


class Bars(Progress):
    """One line a task, and under them what the tasks at work have found so far."""

    watched = True

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=None), _Amount(), _Times())
        super().__init__(*columns, console=console, expand=True, refresh_per_second=4)

    def add_task(
        self,
        description: str,
        start: bool = True,
        total: float | None = 100.0,
        completed: int = 0,
        visible: bool = True,
        note: Note = "",
        unit: str = "",
        left: Left = None,
        **fields: Any,
    ) -> Any:
        """A piece of work. note: what it has found; unit: "bytes" or nothing; left: seconds it will take, if it knows."""
        return super().add_task(
            description, start, total, completed, visible, note=note, unit=unit, left=left, **fields
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bars, then the notes of what goes on."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            note = "" if task.finished else _said(task.fields["note"])
            if note:
                yield Text(f"  {note}", style="dim", no_wrap=False)

    def say(self, line: str) -> None:
        """A line above the bars."""
        self.console.print(line, markup=False)


@dataclass
class _Line:
    description: str
    total: float | None
    note: Note
    unit: str
    left: Left
    began: float = field(default_factory=time.monotonic)
    completed: float = 0.0
    shown: float = 0.0
    """When it was last shown, on the monotonic clock; 0 if never."""

    def text(self, now: float) -> str:
        elapsed = now - self.began
        parts = [f"{self.description}: {_amount(self.completed, self.total, self.unit)}", _span(elapsed)]
        finished = self.total is not None and self.completed >= self.total
        rest = None if finished else _remaining(self.completed, self.total, elapsed, self.left)
        if rest is not None:
            parts.append(f"about {_span(rest)} left")
        return ", ".join(parts) + (f"; {note}" if (note := _said(self.note)) else "")


class Lines:
    """The same for a pipe or a log: a line a task every ``every_s``, and one when a task that was shown has ended."""

    watched = False

    def __init__(self, write: Callable[[str], Any] | None, every_s: float = EVERY_S) -> None:
        self._write, self._every_s = write, every_s
        self._tasks: dict[int, _Line] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._main, name="steelyard-progress", daemon=True)

    def __enter__(self) -> Lines:
        if self._write is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._write is not None:
            self._thread.join()

    def add_task(
        self, description: str, total: float | None = None, note: Note = "", unit: str = "", left: Left = None
    ) -> int:
        """As :meth:`Bars.add_task`."""
        with self._lock:
            self._tasks[len(self._tasks)] = _Line(description, total, note, unit, left)
            return len(self._tasks) - 1

    def update(
        self,
        task: int,
        *,
        completed: float | None = None,
        advance: float | None = None,
        total: float | None = None,
        note: Note | None = None,
        left: Left = None,
    ) -> None:
        """What was done."""
        with self._lock:
            held = self._tasks[task]
            before = held.total is not None and held.completed >= held.total
            held.total = held.total if total is None else total
            held.completed = held.completed + (advance or 0.0) if completed is None else completed
            held.note = held.note if note is None else note
            held.left = held.left if left is None else left
            ended = held.total is not None and held.completed >= held.total and not before
            if ended and held.shown:
                self._show(held, time.monotonic())

    def advance(self, task: int, advance: float = 1.0) -> None:
        """One more piece is done."""
        self.update(task, advance=advance)

    def say(self, line: str) -> None:
        """A line between those of the tasks."""
        if self._write is not None:
            self._write(line)

    def _show(self, held: _Line, now: float) -> None:
        held.shown = now
        if self._write is not None:
            self._write(held.text(now))

    def _main(self) -> None:
        while not self._stop.wait(min(1.0, self._every_s / 4)):
            now = time.monotonic()
            with self._lock:
                for held in self._tasks.values():
                    done = held.total is not None and held.completed >= held.total
                    if not done and now - (held.shown or held.began) >= self._every_s:
                        self._show(held, now)


class Steps:
    """Work of several steps, a task each, made when the step is first heard of."""

    def __init__(self, bars: Any) -> None:
        self._bars = bars
        self._known: dict[str, Any] = {}

    def __call__(self, what: str, done: int, of: int, found: str = "", /) -> None:
        """So much of a step is done; what it has found stands under its bar, and stays as a line when it has ended."""
        if what not in self._known:
            self._known[what] = self._bars.add_task(what, total=of)
        ended = done >= of
        noted = {"note": "" if ended else found} if found else {}  # a replay's own note stays
        self._bars.update(self._known[what], completed=done, total=of, **noted)
        if found and ended:
            self._bars.say(f"{what}: {found}")

    def watch(self, what: str, live: Any) -> None:
        """A step that is a replay: what it has found and how long it takes stands beside it. live: :class:`loadgen.live.Live`."""
        self._known[what] = self._bars.add_task(what, total=live.scheduled, note=live.line, left=live.left_s)


@contextmanager
def shown(quiet: bool) -> Iterator[Bars | Lines]:
    """Bars on a terminal's stderr, lines on any other, silence when quiet. NO_COLOR is honoured, a dumb terminal gets lines."""
    console = Console(stderr=True, highlight=False)
    if quiet:
        with Lines(None) as silent:
            yield silent
    elif console.is_terminal and not console.is_dumb_terminal:
        with Bars(console) as bars:
            yield bars
    else:

        def write(line: str) -> None:
            print(f"steelyard: {line}", file=sys.stderr, flush=True)

        with Lines(write) as lines:
            yield lines
