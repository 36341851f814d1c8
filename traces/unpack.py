"""What is packed, unpacked within bounds; Parquet as lines of JSON, by a process of its own.

What a Parquet file says of its sizes need not be true, a kilobyte of it can hold gigabytes, and one that is made to may end who
reads it. So another process does: it may take MEMORY_BYTES (where the system holds it to that, as Linux does), and who reads its
lines bounds their length and their sum.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, cast

import orjson

from traces.errors import InputError

MEMORY_BYTES = 2 << 30
"""Address space of who unpacks: the libraries take a third of a gigabyte of it, Python included."""

TOGETHER, LINE_BYTES = 1024, 4 << 20
"""Rows that are unpacked together, and how long a line of columns becomes before it is halved, if it has two rows or more."""

REFUSED = 3
"""How the process ends that has said why."""

INHERITED = {
    "PATH", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "TMPDIR", "TMP", "TEMP", "SYSTEMROOT", "VIRTUAL_ENV", "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH", "PYTHONHOME", "PYTHONDEVMODE", "PYTHONWARNINGS", "PYTHONDONTWRITEBYTECODE", "COVERAGE_PROCESS_START",
    "COVERAGE_PROCESS_CONFIG",
}  # fmt: skip
"""What it knows of our environment: no password, no key."""

ALONE = {f"{name}_NUM_THREADS": "1" for name in ("OPENBLAS", "OMP", "MKL")} | {"ARROW_DEFAULT_MEMORY_POOL": "system"}
"""Pools of threads take address space by the core, and of forty cores all that there is."""

By = Literal["rows", "columns", "names"]


MOST_RATIO = 200
MOST_PLAIN_BYTES = 256 << 20
"""A packed file may become this large, or MOST_RATIO times its size where that is more."""


class UnpackError(OSError):
    """A file cannot be unpacked, or is not to be; why, in words that follow its name."""


class Bounded(io.RawIOBase):
    """An unpacked stream that stops where no log can have been packed that tightly. packed: bytes of the file."""

    def __init__(self, source: Unpacked | BinaryIO, packed: int) -> None:
        self._source = source
        self._most = max(MOST_PLAIN_BYTES, packed * MOST_RATIO)
        self._given = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As many bytes as there are at hand, none at the end."""
        piece = self._source.read(len(buffer))
        self._given += len(piece)
        if self._given > self._most:
            raise UnpackError(
                f"expands to more than {MOST_RATIO} times its size: is it a log? Unpack it first, if it is"
            )
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        """And what it reads from."""
        self._source.close()
        super().close()


class Unpacked:
    """The lines of a Parquet file, in bytes. UnpackError at the end of those that could be had, InputError without pyarrow.

    by: rows, an object each, times as ISO 8601, what is no number null; columns, of numbers, truths and texts alone, an object of
    lists of TOGETHER rows or fewer, none in the first line, NaN and Infinity as Python writes them; names, one list of those that
    are there. columns: those wanted, ``a.b`` is a field of the struct ``a``; () for all.
    """

    def __init__(self, path: Path, by: By, columns: Sequence[str] = ()) -> None:
        if find_spec("pyarrow") is None:
            raise InputError(f"{path}: Parquet needs pyarrow. Run: pip install 'steelyard[parquet]'")
        with path.open("rb"):
            pass  # what the system says of it, it says here
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the lines
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "traces.unpack", json.dumps([MEMORY_BYTES, str(path), by, *columns])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={k: v for k, v in os.environ.items() if k in INHERITED}
            | ALONE
            | {"PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(Path(__file__).parents[1])])},
            start_new_session=True,  # it ends with its pipe, not by Ctrl-C
        )
        self._lines = cast(IO[bytes], self._child.stdout)

    def read(self, n: int) -> bytes:
        """At most n bytes, none at the end."""
        got = self._lines.read(n)
        if not got and (code := self._child.wait()):
            self._said.seek(0)
            words = self._said.read().decode(errors="replace").strip().splitlines() or [""]
            if code == REFUSED:
                raise UnpackError(words[0])
            if code < 0:
                most = f"needs more than {MEMORY_BYTES >> 20:,} MiB at once, or is damaged"
                raise UnpackError(f"{most} (its reader ended with signal {-code})")
            raise UnpackError(f"its reader ended with exit code {code}: {words[-1][:300]}")
        return got

    def close(self) -> None:
        """Whether it was read to its end or not."""
        self._lines.close()
        self._child.kill()
        self._child.wait()
        self._said.close()


def names(path: Path) -> list[str]:
    """Names of the columns of a file."""
    with Bounded(Unpacked(path, "names"), 0) as lines:
        found: list[str] = json.loads(lines.readall())
    return found


def _lines(path: str, by: By, columns: Sequence[str]) -> Iterator[bytes]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    pa.set_cpu_count(1)
    with ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        there = file.schema_arrow.names
        if by == "names":
            yield orjson.dumps(there)
            return
        tops = {c: c if c in there else c.partition(".")[0] for c in columns}
        if missing := [c for c, top in tops.items() if top not in there]:
            raise UnpackError(f"no column {', '.join(missing)}; there are {', '.join(sorted(there))}")
        if by == "columns":
            for field in file.schema_arrow:
                kind = field.type
                plain = ("integer", "floating", "boolean", "string", "large_string", "null")
                if not any(getattr(pa.types, f"is_{name}")(kind) for name in plain):
                    raise UnpackError(f"{field.name} holds {kind!s:.80}, no number, truth or text")
            yield json.dumps({name: [] for name in there}).encode()
        for batch in file.iter_batches(TOGETHER, columns=sorted(set(tops.values())) or None, use_threads=False):
            if by == "columns":
                yield from _halved(batch)
                continue
            for record in batch.to_pylist():
                yield orjson.dumps(record, default=str, option=orjson.OPT_NON_STR_KEYS)


def _halved(batch: Any) -> Iterator[bytes]:
    line = json.dumps(batch.to_pydict()).encode()
    if len(line) <= LINE_BYTES or batch.num_rows < 2:
        yield line
        return
    half = batch.num_rows // 2
    yield from _halved(batch.slice(0, half))
    yield from _halved(batch.slice(half))


def main(asked: str) -> int:
    """Write the lines to standard output, or why not to standard error."""
    memory, path, by, *columns = json.loads(asked)
    with suppress(ImportError, OSError, ValueError):  # Windows has none of it, and macOS does not hold to it
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = [n for n in (memory, soft, hard) if n != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min(most), hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with suppress(AttributeError):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nobody reads on: that is all
    try:
        for line in _lines(path, by, columns):
            sys.stdout.buffer.write(line + b"\n")
        sys.stdout.buffer.flush()
        return 0
    except MemoryError:
        why = f"unpacks to more than {memory >> 20:,} MiB at once"
    except Exception as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:1000]
    sys.stdout.buffer.flush()
    sys.stderr.write(why)
    return REFUSED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
