"""The database: the only SQL in the project beside ``migrations/``.

The contract, the same on SQLite, PostgreSQL and MariaDB
- **Who writes.** One writer a run: the process that replays. Any number of readers, meanwhile. Several masters may
  write different runs to one database at once.
- **What is atomic.** A trace: all of it or none. A batch of observations or samples: all of it or none. A run that
  never ended is a run with ``ended = false``; its rows count as what was measured before the interruption.
- **What is written twice.** Everything that is measured has a key of its own: an observation (run, index), a sample
  (run, time, worker, role), a fleet change (run, time), a run and a recommendation a number that their writer drew; a decision,
  and a fleet change outside of a run, is told by its time and what it steered, by one writer after another. Writing
  the same again changes nothing, so whatever was sent when a connection broke is sent again: by the store itself at once
  (RETRIES_S), by the replay from disk (:mod:`loadgen.spool`). Only a trace is not: it fails whole, ``ingest`` runs again.
- **What a reader sees.** Whole batches, in any order of arrival; never half a batch. A reader never blocks a writer
  (SQLite: WAL; PostgreSQL, MariaDB: MVCC). Two writers of one SQLite file take turns, each waits up to 30 s.
- **What is derived.** A run's figures are kept with it when it has ended, those of a long run with the counts they come from
  (``summaries``, :mod:`traces.aggregate`), and thrown away by the first row that comes later; whoever asks then computes them
  again from the rows, and keeps them unless a row has come meanwhile (to be sure of it takes the turn of a writer for as long as
  the rows take to count). Of a long run that goes on they are kept as well, and lag behind by a twentieth of its rows at
  most; where no row has come for a minute, all are counted.
- **Revisions.** A database is used at this version's revision only; an older one is refused with the command to run, a
  newer one in words. Two ``migrate`` at once: the second waits, then finds the work done. A revision that fails leaves the
  one before it, except on MariaDB, which cannot take a change of tables back: there restore a dump.
- **What is never stored.** Prompt or answer text, API keys, passwords in URLs.

NaN in a record is NULL in a row, and so is -1 in a count. Text loses NUL and lone surrogates, which no database takes. A name
or number that one of the three could not hold is refused on all of them (InputError).
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shlex
import sqlite3
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from difflib import get_close_matches
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO, TypeVar

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects import mysql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from traces import __version__, pgcopy
from traces.aggregate import COLUMNS, EXACT_ROWS, MEASURES, Bins
from traces.credentials import read_secret
from traces.errors import InputError, StoreError, understood
from traces.formats.blocks import unpack
from traces.measures import QUANTILES, Figures, Slo
from traces.records import (
    Aggregate,
    Decision,
    Feed,
    Fleet,
    FleetChange,
    Histogram,
    Ints,
    Observations,
    Run,
    Sample,
    Schedule,
)
from traces.shape import joined, middle

T = TypeVar("T")

metadata = sa.MetaData()

trace_sources = sa.Table(
    "trace_sources",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(200), nullable=False, unique=True),
    sa.Column("format", sa.String(40), nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("files", sa.JSON, nullable=False),
    sa.Column("options", sa.JSON, nullable=False),
    sa.Column("summary", sa.JSON, nullable=False),
    sa.Column("origin_utc", sa.String(40)),
    sa.Column("block_size", sa.Integer),
    sa.Column("hash_scope", sa.String(20)),
    sa.Column("tool_version", sa.String(40), nullable=False),
    sa.Column("created_at", sa.String(40), nullable=False),
)

trace_rows = sa.Table(
    "traces",
    metadata,
    sa.Column("source_id", sa.ForeignKey("trace_sources.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("source_line", sa.Integer, nullable=False),
    sa.Column("arrival_us", sa.BigInteger, nullable=False),
    sa.Column("prompt_tokens", sa.Integer, nullable=False),
    sa.Column("output_tokens", sa.Integer),
    sa.Column("status", sa.SmallInteger, nullable=False),
    sa.Column("session_key", sa.Text),
    sa.Column("turn", sa.Integer),
    sa.Column("parent_seq", sa.Integer),
    sa.Column("think_us", sa.BigInteger),
    sa.Column("source_ttft_us", sa.BigInteger),
    sa.Column("source_e2e_us", sa.BigInteger),
    sa.Column("hash_ids", sa.LargeBinary().with_variant(mysql.LONGBLOB, "mysql", "mariadb")),
    sqlite_with_rowid=False,
)
"""parent_seq: the request whose answer came before this one was written; think_us: from the end of that answer to this
arrival. source_*: what the recorded system measured; never a result of ours."""

TRACE_COLUMNS = tuple(c.name for c in trace_rows.columns if c.name != "source_id")
"""What a batch of :meth:`Store.add_trace` may hold; a column that it lacks is null."""

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("key", sa.String(32), nullable=False, unique=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("group", sa.String(200), nullable=False, index=True),
    sa.Column("trace", sa.String(200), nullable=False),
    sa.Column("schedule_digest", sa.String(64), nullable=False),
    sa.Column("scheduled", sa.Integer, nullable=False),
    sa.Column("endpoint", sa.Text, nullable=False),
    sa.Column("engine", sa.String(40), nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("profile", sa.Text, nullable=False),
    sa.Column("prefill", sa.Integer),
    sa.Column("decode", sa.Integer),
    sa.Column("mixed", sa.Integer, nullable=False, server_default="0"),
    sa.Column("prefill_gpus", sa.Integer, nullable=False),
    sa.Column("decode_gpus", sa.Integer, nullable=False),
    sa.Column("started_unix_s", sa.Double, nullable=False),
    sa.Column("workers", sa.Integer, nullable=False),
    sa.Column("rate_factor", sa.Double, nullable=False),
    sa.Column("rate_per_s", sa.Double),
    sa.Column("changes", sa.JSON, nullable=False),
    sa.Column("policy", sa.String(40), nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("warmup_s", sa.Double, nullable=False, server_default="0"),
    sa.Column("slo", sa.Text, nullable=False),
    sa.Column("version", sa.String(40), nullable=False),
    sa.Column("ended", sa.Boolean, nullable=False),
    sa.Column("complete", sa.Boolean, nullable=False),
    sa.Column("verdict", sa.String(10), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("lag_p50_ms", sa.Double),
    sa.Column("lag_p99_ms", sa.Double),
    sa.Column("lag_max_ms", sa.Double),
    sa.Column("counts", sa.JSON, nullable=False),
    sa.Column("costs", sa.JSON, nullable=False, server_default="{}"),
    sa.Column("sources", sa.JSON, nullable=False, server_default="{}"),
    sa.Column("engine_version", sa.String(80), nullable=False, server_default=""),
)

aggregates = sa.Table(
    "aggregates",
    metadata,
    sa.Column("run_id", sa.ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    *(sa.Column(f.name, sa.Double, nullable=False) for f in fields(Aggregate)),
)
"""Of runs that are means at a fixed concurrency; they have no other rows."""

observations = sa.Table(
    "observations",
    metadata,
    sa.Column("run_id", sa.ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("index", sa.BigInteger, primary_key=True),
    sa.Column("worker", sa.SmallInteger),
    sa.Column("due_s", sa.Double),
    sa.Column("dispatch_s", sa.Double),
    sa.Column("sent_s", sa.Double),
    sa.Column("first_byte_s", sa.Double),
    sa.Column("first_token_s", sa.Double),
    sa.Column("last_token_s", sa.Double),
    sa.Column("requested_prompt_tokens", sa.Integer),
    sa.Column("requested_tokens", sa.Integer),
    sa.Column("prompt_tokens", sa.Integer),
    sa.Column("output_tokens", sa.Integer),
    sa.Column("chunks", sa.Integer),
    sa.Column("max_gap_s", sa.Double),
    sa.Column("http_status", sa.SmallInteger),
    sa.Column("status", sa.String(9), nullable=False),
    sa.Column("error", sa.String(16), nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
    sa.Column("prefill_worker", sa.Text),
    sa.Column("decode_worker", sa.Text),
    sa.Column("queue_s", sa.Double),
    sa.Column("prefill_s", sa.Double),
    sa.Column("transfer_s", sa.Double),
    sa.Column("first_step_s", sa.Double),
    sa.Column("cached_tokens", sa.Integer),
    sa.Column("facts", sa.Text),
    sqlite_with_rowid=False,
)
"""From prefill_worker on: what the server said of the request; facts is JSON under the engine's own names. Ids are text: those
of some engines have 64 bits."""

samples = sa.Table(
    "samples",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("run_id", sa.ForeignKey("runs.id", ondelete="CASCADE"), nullable=False),
    sa.Column("at_s", sa.Double, nullable=False),
    sa.Column("worker", sa.Text, nullable=False),
    sa.Column("role", sa.String(10), nullable=False),
    *(sa.Column(f.name, sa.Double) for f in fields(Sample)[3:]),
)
sa.Index(
    "uq_samples",
    *(samples.c[name] for name in ("run_id", "at_s", "worker", "role")),
    unique=True,
    mysql_length={"worker": 200},
    mariadb_length={"worker": 200},
)

histograms = sa.Table(
    "histograms",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("run_id", sa.ForeignKey("runs.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("worker", sa.Text, nullable=False),
    sa.Column("role", sa.String(10), nullable=False),
    sa.Column("name", sa.String(40), nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("count", sa.Double, nullable=False),
    sa.Column("total", sa.Double, nullable=False),
    sa.Column("buckets", sa.JSON, nullable=False),
)
"""Of the servers, as differences over the run. buckets: [[upper bound, null for infinity; observations up to it], ..]."""

fleet_changes = sa.Table(
    "fleet_changes",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("run_id", sa.ForeignKey("runs.id", ondelete="CASCADE")),
    sa.Column("asked_s", sa.Double, nullable=False),
    sa.Column("ready_s", sa.Double),
    sa.Column("before_prefill", sa.Integer, nullable=False),
    sa.Column("before_decode", sa.Integer, nullable=False),
    sa.Column("after_prefill", sa.Integer, nullable=False),
    sa.Column("after_decode", sa.Integer, nullable=False),
    sa.Column("before_mixed", sa.Integer, nullable=False, server_default="0"),
    sa.Column("after_mixed", sa.Integer, nullable=False, server_default="0"),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("control", sa.String(400), nullable=False, server_default=""),
    sa.Column("asked_unix_s", sa.Double),
    sa.Column("joined_s", sa.Double),
    sa.Column("first_served_s", sa.Double),
    sa.Column("in_flight", sa.Integer),
    sa.Column("failed", sa.Integer),
    sa.Column("slowed", sa.Integer),
    sa.Index("uq_fleet_changes", "run_id", "asked_s", unique=True),
)

decisions = sa.Table(
    "decisions",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("run_id", sa.ForeignKey("runs.id", ondelete="CASCADE"), index=True),
    sa.Column("control", sa.String(400), nullable=False),
    sa.Column("unix_s", sa.Double, nullable=False, index=True),
    sa.Column("at_s", sa.Double, nullable=False),
    sa.Column("until_s", sa.Double, nullable=False),
    sa.Column("action", sa.String(20), nullable=False),
    sa.Column("fleet_before", sa.String(40)),
    sa.Column("fleet_after", sa.String(40)),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("repeats", sa.Integer, nullable=False),
)

summaries = sa.Table(
    "summaries",
    metadata,
    sa.Column("run_id", sa.ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("figures", sa.JSON, nullable=False),
    sa.Column("bins", sa.JSON, nullable=False),
    sa.Column("latencies", sa.LargeBinary().with_variant(mysql.LONGBLOB, "mysql", "mariadb")),
)
"""bins, latencies: of a run longer than EXACT_ROWS, what :meth:`traces.aggregate.Bins.pack` makes."""

recommendations = sa.Table(
    "recommendations",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("created_at", sa.String(40), nullable=False),
    sa.Column("kind", sa.String(40), nullable=False),
    sa.Column("answer", sa.JSON, nullable=False),
    sa.Column("data_hash", sa.String(64), nullable=False),
    sa.Column("version", sa.String(40), nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("key", sa.String(32)),
    sa.Index("uq_recommendations", "key", unique=True),
)

recommendation_runs = sa.Table(
    "recommendation_runs",
    metadata,
    sa.Column("recommendation_id", sa.ForeignKey("recommendations.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("run_id", sa.ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
)

OF_A_RUN = tuple(
    t.name for t in metadata.sorted_tables if "run_id" in t.c and t.name not in ("summaries", "recommendation_runs")
)
"""Tables whose rows belong to one run and were measured."""

BATCH = 5000
"""Rows a statement; a compromise between round trips and the size of a failed batch."""

FEED_ROWS = 20_000
"""Rows of a piece of :meth:`Store.feed` and of :meth:`Store.pieces`."""

PIECE_ROWS = 1_000
"""Rows that are fetched together where all are wanted: of twenty times as many Python's collector takes a third of the time."""

FEED_PATIENCE_S = 20.0
"""Shorter than the time that pieces are read ahead: a short absence of the database is not noticed by the load."""

ROWS_A_STATEMENT = 200
"""On SQLite; more gains nothing, and the parameters of a statement are limited (32,766)."""

PASSWORD_FILE = "password_file"  # noqa: S105 - the name of the parameter
"""Parameter of a database URL: where the password is, a file or keyring:SERVICE/USER."""

RETRIES_S = (0.05, 0.4, 1.5)
"""Pauses before a transaction whose connection broke, or that a deadlock ended, is done again."""

KEEP_AFTER = 0.05
"""The counts of a long run that goes on are kept anew when they have grown by this share."""

LEFT_S = 60.0
"""A run that has not ended and got no row for so long is taken for one that never will."""

READERS = 4
"""Threads that count the rows of a run at once, each with a connection. More than there are cores do no harm."""

SHARE_ROWS = 500_000
"""Rows that one of them takes at least: of several runs so short each is counted by whoever asked, as fast, for less."""

COUNTED_RUNS = 8
"""Long runs whose rows one store counts while it stores them; of more, the oldest are counted when they end."""

WORKER_CHARACTERS = 200
"""Of a server worker's name: it comes from the endpoint, and stands in a key."""

_PASSING = frozenset({"40001", "40P01", "57P01", "57P02", "57P03", "53300"})
"""SQLSTATE of what another try may mend: deadlock, shutdown, start, too many connections. Class 08, the connection, too."""

_PASSING_MARIADB = frozenset({0, 1040, 1053, 1205, 1213, 1927, 2006, 2013, 4031})


@dataclass(frozen=True, slots=True)
class TraceInfo:
    """A stored trace. summary: the counts and sums that ``ingest`` printed, see :mod:`traces.ingest`."""

    id: int
    name: str
    format: str
    sha256: str
    files: list[dict[str, Any]]
    options: dict[str, Any]
    summary: dict[str, Any]
    origin_utc: str | None
    block_size: int | None
    hash_scope: str | None
    created_at: str


# --- opening --------------------------------------------------------------------------------------------------------


def open_store(url: str, *, create: bool = True) -> Store:
    """Open a database, making its schema if it is empty and ``create``.

    StoreError says what is wrong in one line: not reachable, no driver, older or newer revision, not ours.
    """
    engine = _engine(url, create=create)
    shown = redact(url)
    try:
        with _connected(engine, shown) as connection:
            found = _revision_of(connection)
            wanted = head_revision()
            if found != wanted:  # perhaps somebody is at it: MariaDB shows each of its steps
                with _turn(connection):
                    tables = set(sa.inspect(connection).get_table_names())  # before the revision, which comes with them
                    found = _revision_of(connection)
            if found is None:
                if tables & set(metadata.tables):
                    raise StoreError(
                        f"{shown}: has tables named like ours but no revision. Give another --db, or restore a backup."
                    )
                if not create and not tables:
                    raise StoreError(
                        f"{shown}: the database is empty. Start with: steelyard ingest FILE, or steelyard demo"
                    )
                _upgrade(connection)
            elif found != wanted:
                if found in _revisions():
                    raise StoreError(
                        f"{shown}: database is at revision {found}, this version needs {wanted}. "
                        f"{_BACKUP.get(engine.dialect.name, '')}Run: steelyard migrate{option(url)}"
                    )
                raise StoreError(
                    f"{shown}: database is at revision {found}, which this version ({__version__}, revision {wanted}) "
                    "does not know: a newer steelyard wrote it. Install that one: pip install --upgrade steelyard"
                )
    except BaseException:
        engine.dispose()
        raise
    return Store(engine, shown, told(url))


_BACKUP = {
    "postgresql": "Back it up (pg_dump). ",
    "mysql": "Back it up (mariadb-dump). ",
    "mariadb": "Back it up (mariadb-dump). ",
}
"""SQLite is backed up by migrate itself."""


def migrate(url: str) -> tuple[str | None, str, Path | None]:
    """Bring a database to this version's revision. Returns (revision before, revision now, SQLite backup or None)."""
    engine = _engine(url, create=True)
    shown = redact(url)
    backup: Path | None = None
    try:
        with _connected(engine, shown) as connection:
            before = _revision_of(connection)
            wanted = head_revision()
            if before is not None and before not in _revisions():
                raise StoreError(
                    f"{shown}: database is at revision {before}, newer than this version's {wanted}. steelyard does not "
                    "downgrade databases: install the newer steelyard, or restore a backup."
                )
            if before == wanted:
                return before, wanted, None
            file = engine.url.database
            if before is not None and engine.dialect.name == "sqlite" and file and file != ":memory:":
                backup = Path(f"{file}.{before}.{time.strftime('%Y%m%dT%H%M%S')}.backup")
            return before, wanted, _upgrade(connection, backup)
    finally:
        engine.dispose()


_KEPT_BACK = r"\b(?=\w*(?:pass|pwd|secret|token|key))(\w+)(?<!file)=[^&\s]*"
"""A parameter that is a secret. The name of a file is none: without it the command that a message tells would not run."""


def redact(url: str) -> str:
    """The URL without user, password and parameters that are secrets, for messages and rows."""

    def bare(found: re.Match[str]) -> str:
        # An @ behind such a parameter: where its value or the password before the host ends nobody knows.
        if any("@" in one[0] for one in re.finditer(rf"(?<=[?&]){_KEPT_BACK}", found[0], re.I)):
            return "//***"
        # Up to the last @: a password that was not percent-encoded may hold / and @ itself.
        return "//" + found[0].removeprefix("//").rpartition("@")[2]

    url = re.sub(r"(?<=:)//(?!/)\S*", bare, url)  # sqlite:///a@b has no host
    return re.sub(_KEPT_BACK, r"\1=***", url, flags=re.I)


def told(url: str) -> str:
    """The URL for a command that is printed; "" where something must be taken out: without it the command opens nothing, while
    STEELYARD_DB holds it."""
    return url if redact(url) == url and not _torn(url) else ""


def _torn(url: str) -> bool:
    """A server's URL with a blank in it: in a message nobody could say where it ends, and what of it is the password."""
    return not url.startswith("sqlite") and re.search(r"\s", url.strip()) is not None


def option(url: str) -> str:
    """`` --db ..`` for the end of a command that is printed; of a URL that cannot be :func:`told` the word, or nothing where
    STEELYARD_DB holds it."""
    if not told(url):
        return "" if url == os.environ.get("STEELYARD_DB") else " --db URL"
    return f" --db {shlex.quote(url)}"


def _credited(url: sa.URL, ours: bool) -> sa.URL:
    """The URL with its password: from the file or keyring that ``?password_file=`` names; for our own database, when the URL
    has none, from STEELYARD_DB_PASSWORD, or where STEELYARD_DB_PASSWORD_FILE says."""
    named = url.query.get(PASSWORD_FILE)
    if named is not None:
        url = url.difference_update_query([PASSWORD_FILE])
        return url.set(
            password=read_secret(named if isinstance(named, str) else named[-1], f"--db ...?{PASSWORD_FILE}=")
        )
    if not ours or url.get_backend_name() == "sqlite" or url.password or "password" in url.query:
        return url
    variable = "STEELYARD_DB_PASSWORD"
    if found := os.environ.get(variable):
        return url.set(password=found)
    if named := os.environ.get(f"{variable}_FILE"):
        return url.set(password=read_secret(named, f"{variable}_FILE"))
    return url


def _migrations() -> Path:
    inside = Path(__file__).parent / "_migrations"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "migrations"


def head_revision() -> str:
    """The revision that this version's schema has."""
    known = _revisions()
    if not known:
        raise StoreError("the package holds no migrations: install steelyard again.")
    return known[-1]


def _revisions() -> list[str]:
    """All that this version knows, the newest last, by the numbers of their files: Alembic, and what it brings, is loaded
    where there is something to migrate."""
    return sorted(path.name.partition("_")[0] for path in (_migrations() / "versions").glob("[0-9]*_*.py"))


def _revision_of(connection: sa.Connection) -> str | None:
    """The revision that a database is at, as Alembic keeps it; None without."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.select(sa.column("version_num")).select_from(sa.table("alembic_version"))).scalar()


def _upgrade(connection: sa.Connection, backup: Path | None = None) -> Path | None:
    """Run the revisions that are missing. Of two that start at once the second waits, then finds the work done.

    backup: where a SQLite file is copied to before; returned if it was.
    """
    with _at_work(connection):
        return _upgraded(connection, backup)


def _upgraded(connection: sa.Connection, backup: Path | None) -> Path | None:
    from alembic import command
    from alembic.config import Config

    kind = connection.dialect.name
    if kind == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(7311220)"))
        # Whoever comes later waits behind a table that is waited for, readers as well.
        connection.execute(sa.select(sa.func.set_config("lock_timeout", f"{HELD_S:g}s", True)))
    elif kind == "sqlite":
        connection.rollback()
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # the driver would begin only before the first row is changed
        if backup is not None and _revision_of(connection) == head_revision():
            backup = None  # the other made one
        if backup is not None:
            file = str(connection.engine.url.database)
            with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(backup)) as target:
                source.backup(target)
    config = Config()
    config.set_main_option("script_location", str(_migrations()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    with _turn(connection):
        if kind in ("mysql", "mariadb") and not sa.inspect(connection).get_table_names():
            # Names and texts differ by case and by blanks, as elsewhere.
            name = connection.dialect.identifier_preparer.quote(str(connection.engine.url.database))
            connection.exec_driver_sql(f"ALTER DATABASE {name} CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin")
        try:
            command.upgrade(config, "head")
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) != "55P03":
                raise
            raise StoreError(
                f"somebody reads or writes this database for {HELD_S:g} s already. Nothing was changed. End what has it open "
                "(pg_stat_activity names it), then migrate again."
            ) from None
        connection.commit()
    return backup


@contextmanager
def _turn(connection: sa.Connection) -> Iterator[None]:
    """On MariaDB nobody else migrates meanwhile; elsewhere nobody sees a part of it."""
    if connection.dialect.name not in ("mysql", "mariadb"):
        yield
        return
    if connection.execute(sa.text("SELECT GET_LOCK('steelyard', 120)")).scalar() != 1:
        raise StoreError("another steelyard migrates this database for two minutes already. Wait, then try again.")
    try:
        yield
    finally:
        connection.execute(sa.text("SELECT RELEASE_LOCK('steelyard')"))


def _engine(url: str, *, create: bool, ours: bool = True) -> sa.Engine:
    if _torn(url):
        raise StoreError("--db: a server's URL has no blanks. Write %20 for one in a name or password.")
    shown = redact(url)
    try:
        parsed = sa.make_url(url)
    except (
        ArgumentError,
        ValueError,
    ):  # ValueError: a port that is no number, perhaps the end of a password with a colon
        raise StoreError(
            f"--db {shown!r} is not a database URL. Write sqlite:///FILE or postgresql://HOST/NAME."
        ) from None
    parsed = _credited(parsed, ours)
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername in ("mariadb", "mysql"):
        parsed = parsed.set(drivername="mariadb+pymysql").update_query_dict({"charset": "utf8mb4"})
    if parsed.get_backend_name() == "sqlite" and parsed.database not in (None, "", ":memory:"):
        path = Path(str(parsed.database))
        if path.is_dir():
            raise StoreError(f"{shown}: is a folder. Give a file: sqlite:///{path}/steelyard.db")
        if not path.exists():
            if not create:
                raise StoreError(f"{shown}: no such database. Start with: steelyard ingest FILE, or steelyard demo")
            if not path.parent.is_dir():
                raise StoreError(f"{shown}: the folder {path.parent} does not exist. Make it, or give another --db.")
    try:
        if parsed.get_backend_name() == "sqlite":
            engine = sa.create_engine(parsed, connect_args={"timeout": LOCKED_S, "check_same_thread": False})
            sa.event.listen(engine, "connect", _tune_sqlite)
        else:
            engine = sa.create_engine(
                parsed,
                pool_pre_ping=True,
                # Every statement sees what is committed, and many writers do not lock gaps that they do not write.
                isolation_level="READ COMMITTED",
                connect_args=_TIMED.get(parsed.get_driver_name(), {}),
            )
            if parsed.get_driver_name() in _TIMED:
                sa.event.listen(engine, "connect", _give_up_in_time)
    except NoSuchModuleError:
        raise StoreError(
            f"--db {shown!r}: unknown kind of database. Use sqlite:///, postgresql:// or mariadb://."
        ) from None
    except ModuleNotFoundError as error:
        extra = {"psycopg": "'steelyard[postgres]'", "pymysql": "'steelyard[mariadb]'"}
        hint = f"pip install {extra.get(str(error.name), error.name)}"
        raise StoreError(f"--db {shown}: the driver {error.name} is not installed. Run: {hint}") from None
    return engine


_TIMED: dict[str, dict[str, float]] = {
    "psycopg": {"connect_timeout": 10},
    "pymysql": {"connect_timeout": 10, "read_timeout": 10, "write_timeout": 10},  # its greeting is read as all else
}


LOCKED_S = 30.0
"""A SQLite file that another holds is waited for."""

ANSWER_S = 600.0
"""A PostgreSQL or MariaDB that says nothing for this long while it is asked for something is given up. Its own time limits do not
help where the server is stopped and not gone."""

HELD_S = 60.0
"""A PostgreSQL table that somebody reads or writes is waited for by ``migrate``."""

WORK_S = 24 * 3600.0
"""The same, while it changes, moves or deletes all rows of a table (:func:`_at_work`): with a large one it takes hours."""


def _give_up_in_time(connection: Any, _record: Any) -> None:
    """Bound a driver's waits, which end by themselves only when the connection does."""
    _bound(connection, ANSWER_S)
    if type(connection).__module__.startswith("pymysql"):
        return  # its sockets have a time limit
    wait = connection.wait  # looks up every tenth of a second

    def within(steps: Any, *how: Any, **named: Any) -> Any:
        def bounded() -> Any:
            until = time.monotonic() + connection.answer_s
            try:
                step = next(steps)
                while True:
                    ready = yield step
                    if ready:
                        until = time.monotonic() + connection.answer_s
                    elif time.monotonic() > until:
                        connection.pgconn.finish()  # what it is in the middle of is unknown
                        import psycopg

                        raise psycopg.OperationalError(f"the server has not answered for {connection.answer_s:g} s")
                    step = steps.send(ready)
            except StopIteration as done:
                return done.value

        return wait(bounded(), *how, **named)

    connection.wait = within


def _bound(driver: Any, answer_s: float) -> None:
    """How long a driver's connection waits for the next that its server says."""
    room = type(driver).__module__.partition(".")[0]
    if room == "pymysql":
        driver._read_timeout = driver._write_timeout = answer_s
    elif room == "psycopg":
        driver.answer_s = answer_s


@contextmanager
def _at_work(connection: sa.Connection) -> Iterator[None]:
    """Meanwhile the server may say nothing for WORK_S."""
    driver: Any = connection.connection.driver_connection
    _bound(driver, WORK_S)
    try:
        yield
    finally:
        _bound(driver, ANSWER_S)


def _tune_sqlite(connection: Any, _record: Any) -> None:
    try:
        connection.execute("SELECT ceil(1.0)")
    except sqlite3.OperationalError:  # built without its mathematics
        connection.create_function("ceil", 1, lambda v: None if v is None else math.ceil(v), deterministic=True)
    until = time.monotonic() + LOCKED_S
    while True:  # of a file that is not in this mode yet and that another writes: SQLite itself does not wait there
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.02)
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")


@contextmanager
def _connected(engine: sa.Engine, shown: str) -> Iterator[sa.Connection]:
    with _said(shown), engine.connect() as connection:
        yield connection


@contextmanager
def _said(shown: str) -> Iterator[None]:
    """Turn a driver's error into one line without secrets."""
    try:
        yield
    except Exception as error:
        # The bulk paths speak to the driver directly, so its own errors come unwrapped.
        drivers = type(error).__module__.startswith(("psycopg", "pymysql"))
        if not isinstance(error, (SQLAlchemyError, sqlite3.Error)) and not drivers:
            raise
        cause = str(getattr(error, "orig", None) or error).strip().splitlines()
        what = redact(cause[0] if cause else type(error).__name__)
        what = re.sub(r"user \"[^\"]*\"", "the user", what)
        if "not a database" in what:
            raise StoreError(f"{shown}: is not a database file. Give another --db.") from None
        raise StoreError(f"{shown}: {what}. Check that the database is there and can be written.") from None


def _may_pass(error: Exception) -> bool:
    """Could the same transaction succeed in a moment: a connection that broke, a deadlock, a server that restarts?"""
    cause = error.orig if isinstance(error, DBAPIError) else error
    state = getattr(cause, "sqlstate", None)
    if type(cause).__module__.startswith("pymysql"):
        return bool(cause.args) and cause.args[0] in _PASSING_MARIADB  # type: ignore[union-attr]
    if type(cause).__module__.startswith("psycopg"):
        # Without a state it never came to a server, or the server is gone.
        gone = state is None and type(cause).__name__ in ("OperationalError", "InterfaceError")
        return gone or (state is not None and (state in _PASSING or state.startswith("08")))
    return isinstance(error, DBAPIError) and error.connection_invalidated


# --- other people's databases ---------------------------------------------------------------------------------------

SPEND_LOGS = (
    "request_id",
    "call_type",
    "prompt_tokens",
    "completion_tokens",
    "startTime",
    "endTime",
    "completionStartTime",
    "cache_hit",
    "status",
    "session_id",
)
"""Columns of LiteLLM's table that are read; those with texts, keys and users are not."""


def spend_logs(url: str, into: TextIO, since: datetime | None = None, until: datetime | None = None) -> int:
    """Write LiteLLM's ``LiteLLM_SpendLogs`` as CSV, in order of start; returns the rows. Nothing there is changed.

    since, until: rows that began from the one on and before the other, in the zone of a column that carries none. StoreError when
    there is no such database or table, it lacks what a trace needs, or no row began then.
    """
    engine = _engine(url, create=False, ours=False)
    shown = redact(url)
    try:
        with _connected(engine, shown) as connection:
            name = "LiteLLM_SpendLogs"
            inspector = sa.inspect(connection)
            if not inspector.has_table(name):
                raise StoreError(f"{shown}: has no table {name}. Give the URL of LiteLLM's own database.")
            held = {c["name"]: c["type"] for c in inspector.get_columns(name)}
            missing = [c for c in SPEND_LOGS[:5] if c not in held]
            if missing:
                raise StoreError(f"{shown}: its {name} lacks {', '.join(missing)}. Which LiteLLM wrote it?")
            table = sa.table(name, *(sa.column(c) for c in SPEND_LOGS if c in held))
            query = sa.select(table).order_by(table.c.startTime, table.c.request_id)
            began, zoned = sa.column("startTime", held["startTime"]), getattr(held["startTime"], "timezone", False)
            if since is not None:
                query = query.where(began >= (since if zoned else since.replace(tzinfo=None)))
            if until is not None:
                query = query.where(began < (until if zoned else until.replace(tzinfo=None)))
            writer = csv.writer(into, lineterminator="\n")
            writer.writerow(table.c.keys())
            rows = 0
            for part in connection.execution_options(yield_per=BATCH).execute(query).partitions():
                writer.writerows([v.isoformat() if isinstance(v, datetime) else v for v in row] for row in part)
                rows += len(part)
            if not rows and (since is not None or until is not None):
                raise StoreError(f"{shown}: no row of its {name} began then. Check --since and --until.")
            return rows
    finally:
        engine.dispose()


# --- the store ------------------------------------------------------------------------------------------------------


class Store:
    """An open database. Safe to use from several threads; each call takes its own connection."""

    def __init__(self, engine: sa.Engine, shown: str, told: str = "") -> None:
        self._engine = engine
        self.url = shown
        self.told = told
        self._counting: dict[int, Bins] = {}  # of long runs that were begun here
        self._kept: dict[int, int] = {}
        self._lock = threading.Lock()
        self.begun: dict[int, str] = {}
        """Run -> its key, of runs that were begun here, or that are being loaded."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def place(self) -> str:
        """The URL without what says where its password is."""
        return re.sub(rf"(?<=[?&]){PASSWORD_FILE}=[^&]*&?", "", self.url).rstrip("?&")

    def close(self) -> None:
        """Give every connection back."""
        self._engine.dispose()

    @contextmanager
    def _begin(self) -> Iterator[sa.Connection]:
        with self._understood(), _said(self.url), self._engine.begin() as connection:
            yield connection

    def _understood(self) -> AbstractContextManager[None]:
        """Rows are read meanwhile."""
        return understood(self.url, "Restore a backup, or mend it by SQL.")

    def _write(self, work: Callable[[sa.Connection], T], run_id: int | None = None) -> T:
        """One transaction that may be done again, because what it writes has a key: see RETRIES_S. run_id: the run to which its
        rows belong."""

        def once() -> T:
            mine = [] if run_id is None else [run_id]
            try:
                with self._engine.begin() as connection:
                    done = work(connection)
                    self._same(connection, mine)
                    return done
            except Exception as error:
                if "foreign key" in str(error).lower():  # of a server that gives no number twice
                    with self._engine.begin() as connection:
                        self._same(connection, mine)
                raise

        with _said(self.url):
            for pause in RETRIES_S:
                try:
                    return once()
                except Exception as error:
                    if not _may_pass(error):
                        raise
                time.sleep(pause)
            return once()

    def _same(self, connection: sa.Connection, run_ids: Iterable[int]) -> None:
        """InputError where a run of :attr:`begun` was deleted: SQLite gives its number to the next one. Asked when the
        transaction has its turn to write, so that it holds until its end, and when a row has no run."""
        for one in run_ids:
            key = self.begun.get(one)
            if key and connection.execute(sa.select(runs.c.key).where(runs.c.id == one)).scalar() != key:
                raise InputError(f"run {one} of {self.url} was deleted while its rows came. Measure, or load, it anew.")

    # --- traces ----------------------------------------------------------------------------------------------------

    def add_trace(
        self,
        *,
        name: str,
        format: str,
        sha256: str,
        files: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        batches: Iterable[Mapping[str, Sequence[Any]]],
        summary: Any,
    ) -> TraceInfo:
        """Store a trace, all of it or none.

        batches: columns of TRACE_COLUMNS; the one that may be null may be missing.
        summary: called after the last batch; gives (summary dict, origin_utc, block_size, hash_scope). InputError when the
        name is taken.
        """
        with _said(self.url), self._engine.begin() as connection:
            if connection.execute(sa.select(trace_sources.c.id).where(trace_sources.c.name == name)).first():
                raise InputError(f"a trace named {name!r} is already stored with other content. Give another --name.")
            values = {
                "name": name,
                "format": format,
                "sha256": sha256,
                "files": list(files),
                "options": dict(options),
                "summary": {},
                "tool_version": __version__,
                "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            _fits(trace_sources, values)
            key = connection.execute(trace_sources.insert().values(values)).inserted_primary_key
            source = int(key[0]) if key else 0
            for batch in batches:
                held = {c: batch[c] for c in TRACE_COLUMNS if c in batch}
                if "session_key" in held:
                    clean = {one: one and _clean(one) for one in set(held["session_key"])}
                    held["session_key"] = [clean[one] for one in held["session_key"]]
                self._bulk(connection, trace_rows, {"source_id": [source] * len(held["seq"])} | held)
            figures, origin, block, scope = summary()
            connection.execute(
                trace_sources.update()
                .where(trace_sources.c.id == source)
                .values(summary=figures, origin_utc=origin, block_size=block, hash_scope=scope)
            )
        return self.trace(name)

    def _bulk(self, connection: sa.Connection, table: sa.Table, columns: Mapping[str, Sequence[Any]]) -> None:
        """Insert columns by the driver's own fast way. Rows that are there stay (a trace has none yet)."""
        names = list(columns)
        quoted = ", ".join(f'"{c}"' for c in names)
        driver: Any = connection.connection.driver_connection
        if connection.dialect.name == "postgresql":
            lines = "\n".join(map("\t".join, zip(*map(_copy_cells, columns.values()), strict=True)))
            try:
                with (
                    driver.transaction(),
                    driver.cursor() as cursor,
                    cursor.copy(f"COPY {table.name} ({quoted}) FROM STDIN") as copy,
                ):
                    copy.write(lines + "\n")
                return
            except Exception as error:
                if getattr(error, "sqlstate", "") != "23505":  # some are there already: below, one by one
                    raise
        rows = zip(*columns.values(), strict=True)
        if connection.dialect.name == "sqlite":
            # Many rows a statement by the driver itself: twice executemany, four times SQLAlchemy's dictionaries. The
            # statement is built from our own names.
            marks = f"({', '.join('?' * len(names))})"
            head = f"INSERT INTO {table.name} ({quoted}) VALUES "  # noqa: S608
            values = chain.from_iterable(rows)
            while piece := list(islice(values, ROWS_A_STATEMENT * len(names))):
                count = len(piece) // len(names)
                driver.execute(head + ", ".join([marks] * count) + " ON CONFLICT DO NOTHING", piece)
            return
        held = [dict(zip(names, row, strict=True)) for row in rows]
        for start in range(0, len(held), BATCH):
            connection.execute(_once(connection, table), held[start : start + BATCH])

    def traces(self) -> list[TraceInfo]:
        """All stored traces, by name."""
        with self._begin() as connection:
            rows = connection.execute(sa.select(trace_sources).order_by(trace_sources.c.name)).all()
            return [_info(row) for row in _sound(trace_sources, rows)]

    def trace(self, name: str) -> TraceInfo:
        """One trace. InputError, with the nearest name, when there is none."""
        with self._begin() as connection:
            row = connection.execute(sa.select(trace_sources).where(trace_sources.c.name == name)).first()
            if row is None:
                known = list(map(str, connection.execute(sa.select(trace_sources.c.name)).scalars()))
        if row is None:
            near = get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Stored: {', '.join(sorted(known)) or 'none'}."
            raise InputError(
                f"no trace is named {name!r}. {hint} See: steelyard traces; add one: steelyard ingest FILE"
            )
        with self._understood():
            return _info(*_sound(trace_sources, [row]))

    def trace_windows(self, name: str, most: int, parts: int) -> list[Schedule]:
        """About ``most`` of a long trace's successful requests in ``parts`` windows spread evenly over it, at the recorded times.

        Only their rows are read. Each stands in the middle of its share of the requests.
        """
        info = self.trace(name)
        t = trace_rows.c
        width = max(1, most // parts)
        found = []
        with self._begin() as connection:
            query = sa.select(sa.func.min(t.seq), sa.func.max(t.seq), sa.func.min(t.arrival_us))
            first, last, zero = connection.execute(query.where(t.source_id == info.id)).one()
            for k in range(0 if first is None else parts):
                start = first + middle(last + 1 - first, width, k, parts)
                query = (
                    sa.select(t.seq, t.arrival_us - zero, t.prompt_tokens, t.output_tokens)
                    .where(t.source_id == info.id, t.seq >= start, t.seq < start + width)
                    .where(t.status == 0, t.output_tokens >= 1)
                    .order_by(t.seq)
                )
                rows = _table(connection.execute(query).all())
                found.append(Schedule(name, rows[:, 0], rows[:, 1] / 1e6, rows[:, 2], rows[:, 3]))
        return [one for one in found if len(one)]

    def excerpt(self, name: str, most: int, parts: int) -> tuple[Schedule, list[int]]:
        """(the windows of a long trace one after the other, at the mean rate of what a replay sends; requests of each)."""
        found = self.trace_windows(name, most, parts)
        if not found:
            return self.schedule(name), []
        whole = self.feed(name)
        return joined(found, name, whole.scheduled, whole.rate_per_s), [len(one) for one in found]

    def schedule(self, name: str, *, blocks: bool = False, sessions: bool = False, most: int | None = None) -> Schedule:
        """The trace's successful requests as a schedule at the recorded times; with most, its first.

        With blocks, their prefix blocks too; with sessions, which request continues which, where the trace has sessions.
        """
        info = self.trace(name)
        t = trace_rows.c
        columns = [t.seq, t.arrival_us, t.prompt_tokens, t.output_tokens]
        query = (
            sa.select(*columns, *([t.hash_ids] if blocks else []))
            .where(t.source_id == info.id, t.status == 0, t.output_tokens >= 1)
            .order_by(t.seq)
            .limit(most)
        )
        rows: Any = []
        with self._begin() as connection:
            if blocks:
                rows = connection.execute(query).all()
                table = _table(row[:4] for row in rows)
            else:  # of millions of rows only the numbers are held
                table = _table(connection.execution_options(yield_per=FEED_ROWS).execute(query))
        due = table[:, 1] / 1e6
        due = due - (due[0] if len(due) else 0.0)
        held: dict[str, Any] = {}
        if blocks and info.block_size and any(row[4] for row in rows):
            ids = np.empty(len(rows), dtype=object)
            with self._understood():
                ids[:] = [tuple(unpack(row[4])) if row[4] else () for row in rows]
            held = {"blocks": ids, "block_tokens": info.block_size}
        if sessions:
            held |= self._sessions(info.id, table[:, 0])
        return Schedule(name, table[:, 0], due, table[:, 2], table[:, 3], **held)

    def first_asked_s(self, name: str) -> float:
        """Seconds from the trace's first row to the first successful one, at which its schedule begins."""
        t = trace_rows.c
        first = sa.select(sa.func.min(t.arrival_us)).where(
            t.source_id == self.trace(name).id, t.status == 0, t.output_tokens >= 1
        )
        with self._begin() as connection:
            return (connection.scalar(first) or 0) / 1e6

    def feed(self, name: str, *, rate_factor: float = 1.0, rate_per_s: float | None = None) -> Feed:
        """The trace's successful requests, read piece by piece while they are replayed; nothing of them is held.

        rate_factor: recorded gaps are divided by it; rate_per_s: chosen so that this is the mean rate.
        """
        info = self.trace(name)
        t = trace_rows.c
        wanted = (t.source_id == info.id, t.status == 0, t.output_tokens >= 1)
        n, longest = info.summary.get("replayable"), info.summary.get("longest_prompt_tokens")
        arrivals = sa.select(t.arrival_us).where(*wanted).limit(1)
        with self._begin() as connection:
            if n is None:  # a trace that was stored before these were kept: a second or two for ten million rows
                n, longest = connection.execute(
                    sa.select(sa.func.count(), sa.func.max(t.prompt_tokens)).where(*wanted)
                ).one()
            first, last = (connection.scalar(arrivals.order_by(at)) or 0 for at in (t.seq, t.seq.desc()))
        span = (last - first) / 1e6
        if rate_per_s is not None:
            if n < 2 or span <= 0:
                raise InputError(f"{name!r} has no rate to scale: its {n} requests are due at one instant.")
            rate_factor = rate_per_s / ((n - 1) / span)

        # SQLite gives the number of a deleted trace to the next one.
        same = sa.select(trace_sources.c.id).where(
            trace_sources.c.id == info.id, trace_sources.c.name == name, trace_sources.c.sha256 == info.sha256
        )

        def pieces() -> Iterator[Schedule]:
            after = -1
            while True:
                query = (
                    sa.select(t.seq, t.arrival_us, t.prompt_tokens, t.output_tokens)
                    .where(*wanted, t.seq > after, same.exists())
                    .order_by(t.seq)
                    .limit(FEED_ROWS)
                )
                rows = self._patiently(query)
                if not rows:
                    if not self._patiently(same):
                        raise StoreError(f"the trace {name!r} was removed or replaced while it was read. Start anew.")
                    return
                with self._understood():
                    table = _table(rows)
                after = int(table[-1, 0])
                due = (table[:, 1] - first) / 1e6 / rate_factor
                yield Schedule(name, table[:, 0], due, table[:, 2], table[:, 3])

        changes = () if rate_factor == 1 else (f"rate x{rate_factor:.6g}",)
        return Feed(name, n, span / rate_factor, longest or 1, info.sha256, pieces, changes)

    def _patiently(self, query: Any) -> Sequence[Any]:
        """Rows of a query; a database that is away is asked again for FEED_PATIENCE_S."""
        until = time.monotonic() + FEED_PATIENCE_S
        while True:
            try:
                with self._begin() as connection:
                    return connection.execute(query).all()
            except StoreError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.25)

    def _sessions(self, source: int, kept: Ints) -> dict[str, Any]:
        """session, parent and think_s of the rows that are kept; none where no row has a session."""
        t = trace_rows.c
        query = (
            sa.select(t.seq, t.session_key, t.parent_seq, t.think_us)
            .where(t.source_id == source, t.session_key.is_not(None))
            .order_by(t.seq)
        )
        n = len(kept)
        session, parent, think = np.full(n, -1), np.full(n, -1), np.full(n, np.nan)
        numbers: dict[str, int] = {}
        above: dict[int, int] = {}  # of a row that is not kept, the nearest earlier one that is
        with self._begin() as connection:
            if connection.scalar(query.limit(1)) is None:
                return {}
            place = dict(zip(kept.tolist(), range(n), strict=True))
            for seq, key, before, think_us in connection.execution_options(yield_per=FEED_ROWS).execute(query):
                up = -1 if before is None else place.get(before, above.get(before, -1))
                at = place.get(seq)
                if at is None:
                    above[seq] = up
                    continue
                session[at] = numbers.setdefault(key, len(numbers))
                parent[at] = up
                if before in place and think_us is not None:
                    think[at] = think_us / 1e6
        return {"session": session, "parent": parent, "think_s": think} if numbers else {}

    def delete_trace(self, name: str) -> None:
        """Remove a trace and its rows; runs made from it stay."""
        info = self.trace(name)
        with self._begin() as connection, _at_work(connection):
            connection.execute(trace_rows.delete().where(trace_rows.c.source_id == info.id))
            connection.execute(trace_sources.delete().where(trace_sources.c.id == info.id))

    # --- runs ------------------------------------------------------------------------------------------------------

    def begin_run(self, run: Run, key: str = "") -> Run:
        """Store a run that starts; returns it with its id. key: what tells it from others; one that is there is gone on with."""
        values = _run_values(run) | {"key": key or uuid.uuid4().hex}

        def write(connection: sa.Connection) -> int:
            connection.execute(_once(connection, runs), [values])
            return int(connection.execute(sa.select(runs.c.id).where(runs.c.key == values["key"])).scalar_one())

        run = replace(run, id=self._write(write))
        self.begun[run.id] = values["key"]
        if run.scheduled > EXACT_ROWS:
            with self._lock:
                self._counting[run.id] = Bins(run.slo, run.warmup_s)
                while len(self._counting) > COUNTED_RUNS:
                    self._counting.pop(next(iter(self._counting)))
        return run

    def end_run(self, run: Run, *, count: bool = True) -> Run:
        """Store what came of a run, and its figures; without count those are left to :meth:`count`."""
        run = replace(run, ended=True)
        update = runs.update().where(runs.c.id == run.id).values(_run_values(run))

        def write(connection: sa.Connection) -> None:
            connection.execute(update)
            connection.execute(summaries.delete().where(summaries.c.run_id == run.id))

        self._write(write, run.id)
        if count:
            self.count(run)
        return run

    def count(self, run: Run) -> None:
        """Keep the figures of a long run that has ended, so that nobody who asks waits for them."""
        with self._lock:
            counted = self._counting.pop(run.id, None)
        if run.scheduled > EXACT_ROWS:
            with suppress(StoreError):
                known = counted is not None and (counted.slo, counted.warmup_s) == (run.slo, run.warmup_s)
                if counted is not None and known and counted.rows > EXACT_ROWS:
                    # Not kept where somebody else stored rows, or stored some before: those are not in what was counted here.
                    self._keep(run.id, counted.figures(), counted, counted.rows)
                self.figures(run)

    def add_aggregates(self, measured: Sequence[tuple[Run, Aggregate]]) -> list[Run]:
        """Store runs that are means, all or none; those of the same group and digest that are there stay as they are."""
        keys = [sha256(f"{run.group}\0{run.schedule_digest}".encode()).hexdigest()[:32] for run, _ in measured]
        rows = [
            _run_values(replace(run, ended=True)) | {"key": key} for key, (run, _) in zip(keys, measured, strict=True)
        ]

        def write(connection: sa.Connection) -> dict[str, int]:
            for row in rows:
                connection.execute(_once(connection, runs), [row])
            known: dict[str, int] = {}
            for at in range(0, len(keys), ROWS_A_STATEMENT):
                query = sa.select(runs.c.key, runs.c.id).where(runs.c.key.in_(keys[at : at + ROWS_A_STATEMENT]))
                known |= {key: int(number) for key, number in connection.execute(query)}
            for key, (_, held) in zip(keys, measured, strict=True):
                connection.execute(_once(connection, aggregates), [{"run_id": known[key]} | asdict(held)])
            return known

        ids = self._write(write)
        return [replace(run, id=ids[key], ended=True) for key, (run, _) in zip(keys, measured, strict=True)]

    def aggregates(self, ids: Sequence[int]) -> dict[int, Aggregate]:
        """Run -> its means, of those runs that have them."""
        found = {}
        with self._begin() as connection:
            for at in range(0, len(ids), ROWS_A_STATEMENT):
                query = sa.select(aggregates).where(aggregates.c.run_id.in_(list(ids[at : at + ROWS_A_STATEMENT])))
                for row in _sound(aggregates, connection.execute(query).all()):
                    found[int(row.run_id)] = Aggregate(*(getattr(row, f.name) for f in fields(Aggregate)))
        return found

    def runs(self, *, group: str | None = None, ids: Sequence[int] | None = None) -> list[Run]:
        """Runs in the order in which they were begun; of one group, or those named."""
        query = sa.select(runs).order_by(runs.c.id)
        if group is not None:
            query = query.where(runs.c.group == group)
        if ids is not None:
            query = query.where(runs.c.id.in_(list(ids)))
        with self._begin() as connection:
            return [_run(row) for row in _sound(runs, connection.execute(query).all())]

    def key(self, id: int) -> str:
        """What tells a run from another that had, or will have, its number; "" where there is none."""
        with self._begin() as connection:
            return str(connection.execute(sa.select(runs.c.key).where(runs.c.id == id)).scalar() or "")

    def run(self, id: int) -> Run:
        """One run. InputError when there is none."""
        found = self.runs(ids=[id])
        if not found:
            known = [run.id for run in self.runs()]
            held = f"Stored: {known[0]} to {known[-1]}." if known else "None is stored."
            raise InputError(f"no run has id {id}. {held} See: steelyard runs")
        return found[0]

    def delete_run(self, id: int) -> None:
        """Remove a run and its rows."""
        self.run(id)

        def write(connection: sa.Connection) -> None:
            with _at_work(connection):
                for name in (*OF_A_RUN, "summaries", "recommendation_runs"):
                    table = metadata.tables[name]
                    connection.execute(table.delete().where(table.c.run_id == id))
            connection.execute(runs.delete().where(runs.c.id == id))

        self._write(write)

    def columns(self, table: str) -> dict[str, str]:
        """Column -> integer, real, boolean or text (JSON is text)."""
        return {c.name: _kind(c) for c in metadata.tables[table].columns if c.name != "id" or table == "runs"}

    def dump(self, table: str, run_id: int) -> Iterator[dict[str, list[Any]]]:
        """All columns of a run's rows in a table, piece by piece."""
        t = metadata.tables[table]
        names = list(self.columns(table))
        which = t.c.id if table == "runs" else t.c.run_id
        query = sa.select(*(t.c[n] for n in names)).where(which == run_id).order_by(*t.primary_key.columns)
        with self._begin() as connection:
            for piece in connection.execution_options(yield_per=FEED_ROWS).execute(query).partitions():
                held = {n: list(values) for n, values in zip(names, zip(*piece, strict=True), strict=True)}
                for n in names:
                    if isinstance(t.c[n].type, sa.JSON):
                        held[n] = [json.dumps(v) for v in held[n]]
                yield held

    def restore_runs(self, piece: Mapping[str, Sequence[Any]]) -> list[int]:
        """Store runs that were dumped; their ids here. One whose key is there stays as it is. They have not ended and
        are not complete until :meth:`end_restored` says that all their rows are here."""
        rows = _rows_of(runs, piece)
        begun = [{k: v for k, v in row.items() if k != "id"} | {"ended": False, "complete": False} for row in rows]

        def write(connection: sa.Connection) -> list[int]:
            connection.execute(_once(connection, runs), begun)
            known = sa.select(runs.c.key, runs.c.id).where(runs.c.key.in_([row["key"] for row in rows]))
            ids = {key: int(number) for key, number in connection.execute(known)}
            return [ids[row["key"]] for row in rows]

        ids = self._write(write)
        self.begun.update(zip(ids, (row["key"] for row in rows), strict=True))
        return ids

    def end_restored(self, piece: Mapping[str, Sequence[Any]]) -> None:
        """What came of runs that were dumped; those that have ended here stay as they are."""
        rows = _rows_of(runs, piece)

        def write(connection: sa.Connection) -> None:
            for row in rows:
                mine = (runs.c.key == row["key"], runs.c.ended.is_(False))
                which = sa.select(runs.c.id).where(*mine).scalar_subquery()
                connection.execute(summaries.delete().where(summaries.c.run_id == which))
                values = {k: v for k, v in row.items() if k not in ("id", "key")}
                connection.execute(runs.update().where(*mine).values(values))
            keys = {row["key"] for row in rows}
            self._same(connection, [run_id for run_id, key in self.begun.items() if key in keys])

        self._write(write)

    def restore(self, table: str, piece: Mapping[str, Sequence[Any]], passed: Mapping[int, int]) -> None:
        """Store rows of runs that were dumped; those that are there stay as they are.

        passed: run -> its rows in the pieces before this one. A table whose rows have no key goes by their place in the run.
        """
        t = metadata.tables[table]
        rows = _rows_of(t, piece)
        ids = {row["run_id"] for row in rows}

        def write(connection: sa.Connection) -> None:
            fresh = rows
            _alone(connection, ids)  # what has no key is counted
            self._same(connection, ids)
            if t is observations:  # what was kept of these runs, perhaps while they were only half here, holds no more
                connection.execute(summaries.delete().where(summaries.c.run_id.in_(ids)))
            if t is fleet_changes:  # what they cost is known when the run has ended, to a later dump
                begun = sa.select(runs.c.id).where(runs.c.id.in_(ids), runs.c.ended.is_(False))
                for one in set(connection.execute(begun).scalars()):
                    again = t.c.asked_s.in_([row["asked_s"] for row in rows if row["run_id"] == one])
                    connection.execute(t.delete().where(t.c.run_id == one, again))
            if not any(i.unique for i in t.indexes) and "id" in t.c:
                count = sa.select(t.c.run_id, sa.func.count()).where(t.c.run_id.in_(ids)).group_by(t.c.run_id)
                there = {run_id: int(n) for run_id, n in connection.execute(count)}
                place, fresh = Counter(passed), []
                for row in rows:
                    place[row["run_id"]] += 1
                    if place[row["run_id"]] > there.get(row["run_id"], 0):
                        fresh.append(row)
            if fresh:
                connection.execute(_once(connection, t), fresh)

        if rows:
            self._write(write)

    def vacuum(self) -> None:
        """Give the space of deleted rows back, on PostgreSQL to later rows, and let the database count what it holds."""
        kind = self._engine.dialect.name
        with _said(self.url), self._engine.connect() as connection, _at_work(connection):
            if kind in ("mysql", "mariadb"):
                for table in metadata.sorted_tables:
                    name = connection.dialect.identifier_preparer.quote(table.name)
                    for _, _, how, text in connection.exec_driver_sql(f"OPTIMIZE TABLE {name}"):
                        if how.lower() == "error":  # the statement itself succeeds
                            raise StoreError(f"{self.url}: the space of {table.name} was not given back: {text}.")
                return
            alone = connection if kind == "sqlite" else connection.execution_options(isolation_level="AUTOCOMMIT")
            for statement in ("VACUUM", "ANALYZE") if kind == "sqlite" else ("VACUUM ANALYZE",):
                alone.exec_driver_sql(statement)
            connection.commit()
            if kind == "sqlite":
                # Its log holds the whole database then, until the last who has it open closes it.
                held = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()[0]
                if held:
                    raise StoreError(
                        f"{self.url}: its space is not given back yet, since another command reads or writes it: until that "
                        "ends, the file beside it (-wal) holds it once more. Run it again then."
                    )

    def add_observations(self, run_id: int, rows: Observations) -> None:
        """Store a batch; a row that is there already stays as it is."""

        with self._lock:
            counted = self._counting.get(run_id)

        def write(connection: sa.Connection) -> None:
            if counted is None:
                _alone(connection, [run_id])
                connection.execute(summaries.delete().where(summaries.c.run_id == run_id))
            if connection.dialect.name == "postgresql" and _copied(connection, run_id, rows):
                return
            columns = {name: _nullable(name, getattr(rows, name)) for name in Observations.columns()}
            self._bulk(connection, observations, {"run_id": [run_id] * len(rows)} | columns)

        if not len(rows):
            return
        self._write(write, run_id)
        if counted is not None:
            with self._lock:
                counted.add_once(rows)
                due = counted.rows > max(EXACT_ROWS, (1 + KEEP_AFTER) * self._kept.get(run_id, 0))
                if due:
                    self._kept[run_id] = counted.rows
            if due:
                self._keep(run_id, counted.figures(), counted)

    def observations(self, run_id: int, names: Sequence[str] = Observations.columns()) -> Observations:
        """All rows of a run, in order of due time; only the columns named are read, due_s and index among them."""
        return Observations.concat(self._pieces(names, observations.c.run_id == run_id))

    def windows(
        self, run_id: int, most: int = 200_000, parts: int = 20, names: Sequence[str] = Observations.columns()
    ) -> list[Observations]:
        """A run's rows, or of a long one about ``most`` in ``parts`` windows spread evenly over it; each in order of due time.

        The first window begins where the run does, the last one ends where it does. A window holds every request between its
        first and last index (in the order of the schedule, so neighbours in time): queues and batches can be told within it. Only
        its rows are read, and of them the columns named, due_s and index among them.
        """
        t = observations.c
        # One by one: of both in one query SQLite reads every row.
        ends = (
            sa.select(end(t.index)).where(t.run_id == run_id).scalar_subquery() for end in (sa.func.min, sa.func.max)
        )
        with self._begin() as connection:
            first, last = connection.execute(sa.select(*ends)).one()
            short = first is None or last - first < most
        if first is None:
            return []
        if short:
            return [self.observations(run_id, names)]
        width = max(1, most // parts)
        starts = [first + (last + 1 - first - width) * k // max(1, parts - 1) for k in range(parts)]
        found = [
            Observations.concat(self._pieces(names, t.run_id == run_id, t.index >= start, t.index < start + width))
            for start in starts
        ]
        return [rows for rows in found if len(rows)]

    def pieces(self, run_id: int, names: Sequence[str] = Observations.columns()) -> Iterator[Observations]:
        """A run's rows piece by piece, in order of index; only the columns named are read."""
        return self._pieces(names, observations.c.run_id == run_id, ordered=True, rows=FEED_ROWS)

    def _pieces(
        self, names: Sequence[str], *which: Any, ordered: bool = False, rows: int = PIECE_ROWS
    ) -> Iterator[Observations]:
        query = sa.select(*(observations.c[name] for name in names)).where(*which)
        if ordered:
            query = query.order_by(observations.c.index)
        with self._begin() as connection:
            held = connection.execution_options(yield_per=rows).execute(query)
            for piece in held.partitions():
                part = Observations.empty(len(piece))
                for name, values in zip(names, zip(*piece, strict=True), strict=True):
                    column = getattr(part, name)
                    if column.dtype == object:
                        column[:] = ["" if v is None else v for v in values]
                        if not set(map(type, values)) <= {str, type(None)}:
                            raise TypeError(f"observations.{name} is no text")
                    elif column.dtype == np.float64:
                        column[:] = np.array(values, dtype=np.float64)  # None is NaN
                        if np.isinf(column).any():
                            raise ValueError(f"observations.{name} is infinite")
                    else:
                        column[:] = [-1 if v is None else v for v in values]
                        if name != "index" and column.max() >= 2**31:
                            raise ValueError(f"observations.{name} is too large")
                yield part

    def figures(self, run: Run) -> Figures:
        """The figures of a run after its warm-up, by its own SLO. Of one that has ended they are computed once and kept.

        Up to EXACT_ROWS from the rows themselves; of a longer run from its counts.
        """
        query = sa.select(summaries.c.figures).where(summaries.c.run_id == run.id)
        with self._begin() as connection:
            kept = connection.execute(query).scalar()
        if run.ended and (known := _figures(kept)) is not None:
            return known
        if (counted := self.bins(run)) is not None:
            return counted.figures()
        rows = self.observations(run.id)
        found = Figures.of(run.counted(rows), Slo.parse(run.slo) if run.slo else Slo())
        if run.ended and found.n:
            self._keep(run.id, found, rows=len(rows))
        return found

    def bins(self, run: Run, slo: Slo | None = None) -> Bins | None:
        """The counts of a run of more than EXACT_ROWS rows; None of a shorter one, whose rows can be read.

        They are kept with the run, else counted from the rows and then kept. slo: what is counted as good [by the run's own];
        by another one the database counts it, and of an ended run that is kept as well.
        """
        if run.scheduled <= EXACT_ROWS:
            return None
        query = sa.select(summaries.c.bins, summaries.c.latencies).where(summaries.c.run_id == run.id)
        with self._begin() as connection:
            kept = connection.execute(query).first()
        found = Bins.unpack(kept.bins, kept.latencies) if kept is not None and kept.latencies is not None else None
        if found is not None and self._left(run, found.rows):
            found = None
        if found is None:
            with self._begin() as connection:
                if _rows(connection, run.id, EXACT_ROWS + 1) <= EXACT_ROWS:
                    return None
            found = Bins(run.slo, run.warmup_s)
            for piece in self._pieces(COLUMNS, observations.c.run_id == run.id, rows=FEED_ROWS):
                found.add(piece)
            self._keep(run.id, found.figures(), found, found.rows)
        if slo is not None and str(slo) != str(Slo.parse(found.slo) if found.slo else Slo()):
            limits = " ".join(f"{metric}<{limit!r}" for metric, limit in sorted(slo.limits))
            good = found.others.get(limits) if run.ended else None
            if good is None:
                good = self._good(run.id, slo, found)
                if run.ended:
                    self._keep_other(run.id, found, limits, good)
            found = found.within(str(slo), good)
        return found

    def _left(self, run: Run, kept: int) -> bool:
        """Has a run that never ended other rows than those that were counted, and no more come? Its master was killed then."""
        if run.ended or run.id in self._counting or time.time() - self.heard_unix_s(run) <= LEFT_S:
            return False
        with self._begin() as connection:
            return _rows(connection, run.id) != kept

    def heard_unix_s(self, run: Run) -> float:
        """When the last row of a run that was sent came, or it was begun, if none did."""
        t = observations.c
        came = sa.func.coalesce(t.last_token_s, t.sent_s)
        last = sa.select(came).where(t.run_id == run.id, came.is_not(None)).order_by(t.index.desc()).limit(1)
        with self._begin() as connection:
            return run.started_unix_s + (connection.execute(last).scalar() or 0.0)

    def _good(self, run_id: int, slo: Slo, found: Bins) -> dict[int, int]:
        """Slot of time -> requests that met the limits of an SLO; the formulas of :func:`traces.measures.met`."""
        t = observations.c
        tokens = sa.func.coalesce(t.output_tokens, t.requested_tokens)
        latency: dict[str, Any] = {
            "ttft": t.first_token_s - t.due_s,
            "tpot": sa.case((tokens > 1, (t.last_token_s - t.first_token_s) / (tokens - 1))),
            "e2e": t.last_token_s - t.due_s,
        }
        good = [t.run_id == run_id, t.status == "ok"]
        for metric, limit in slo.limits:
            keeps: Any = latency[metric] <= limit
            good.append(sa.or_(keeps, tokens <= 1) if metric == "tpot" else keeps)
        due = sa.func.coalesce(t.due_s, found.warmup_s)
        # The floor of how far it lies within. SQLAlchemy gives SQLite a floor of Python, which takes the lock for every row.
        slot = sa.cast(-sa.func.ceil((found.warmup_s - due) / found.width_s), sa.Integer)
        # In pieces, so that SQLite groups each in its memory. While the database counts, its driver lets other threads run.
        most = sa.select(sa.func.max(t.index)).where(t.run_id == run_id)
        good += [t.index >= sa.bindparam("start"), t.index < sa.bindparam("end")]
        inner = sa.select(slot.label("slot")).where(*good).subquery()
        by_slot = sa.select(inner.c.slot, sa.func.count()).group_by(inner.c.slot)

        def count(starts: range) -> Counter[int]:
            counted: Counter[int] = Counter()
            with self._begin() as connection:
                for start in starts:
                    held = connection.execute(by_slot, {"start": start, "end": start + starts.step})
                    counted.update({int(k): int(more) for k, more in held})
            return counted

        with self._begin() as connection:
            rows = (connection.execute(most).scalar() or 0) + 1
        starts = range(0, rows, FEED_ROWS)
        share = max(SHARE_ROWS // FEED_ROWS, math.ceil(len(starts) / READERS))
        shares = [starts[k : k + share] for k in range(0, len(starts), share)]
        in_memory = isinstance(self._engine.pool, sa.pool.SingletonThreadPool)  # another thread would find nothing
        if in_memory or len(shares) == 1:
            return dict(sum(map(count, shares), Counter[int]()))
        with ThreadPoolExecutor(READERS) as pool:
            return dict(sum(pool.map(count, shares), Counter[int]()))

    def _keep_other(self, run_id: int, counted: Bins, limits: str, good: Mapping[int, int]) -> None:
        """Keep what was counted within another SLO beside the counts that it belongs to, if those are still the ones kept."""
        s = summaries.c

        def write(connection: sa.Connection) -> None:
            _alone(connection, [run_id])
            held = connection.execute(sa.select(s.bins).where(s.run_id == run_id)).scalar()
            if isinstance(held, dict) and held.get("rows") == counted.rows:
                kept = counted.keep_other(limits, good)
                connection.execute(summaries.update().where(s.run_id == run_id), {"bins": held | {"others": kept}})

        with suppress(StoreError):  # a reader without the right to write still gets its answer
            self._write(write)

    def _keep(self, run_id: int, found: Figures, counted: Bins | None = None, rows: int | None = None) -> None:
        """Keep what was computed of a run, instead of what was kept before. rows: only if the run has as many."""
        plain, latencies = counted.pack() if counted is not None else ({}, None)
        values = {"run_id": run_id, "figures": _plain(asdict(found)), "bins": _plain(plain), "latencies": latencies}

        def write(connection: sa.Connection) -> None:
            if rows is not None:
                _alone(connection, [run_id])
                if _rows(connection, run_id) != rows:  # some came after they were read
                    return
            connection.execute(summaries.delete().where(summaries.c.run_id == run_id))
            connection.execute(_once(connection, summaries), [values])

        with suppress(StoreError):  # a reader without the right to write still gets its answer
            self._write(write)

    def add_samples(self, run_id: int, readings: Sequence[Sample]) -> None:
        """Store server readings; one that is there already stays as it is."""
        if not readings:
            return
        names = [f.name for f in fields(Sample)]
        values = [
            {"run_id": run_id}
            | {name: _plain(getattr(s, name)) for name in names}
            | {"worker": _clean(s.worker)[:WORKER_CHARACTERS]}
            for s in readings
        ]
        self._write(lambda connection: connection.execute(_once(connection, samples), values), run_id)

    def samples(self, run_id: int, most: int = 50_000) -> list[Sample]:
        """A run's server readings, in order of time; of more than ``most`` every second, third, .. of each worker."""
        t = samples.c
        step = -(-self.readings(run_id) // most)
        place = sa.func.row_number().over(partition_by=(t.worker, t.role), order_by=(t.at_s, t.id))
        held = sa.select(*samples.c, *([place.label("place")] if step > 1 else [])).where(t.run_id == run_id).subquery()
        query = sa.select(*(held.c[f.name] for f in fields(Sample))).order_by(held.c.at_s, held.c.id)
        if step > 1:
            query = query.where((held.c.place - 1) % step == 0)
        with self._begin() as connection:
            return [Sample(*row) for row in _sound(samples, connection.execute(query).all())]

    def readings(self, run_id: int) -> int:
        """How many server readings a run has."""
        query = sa.select(sa.func.count()).select_from(samples).where(samples.c.run_id == run_id)
        with self._begin() as connection:
            return int(connection.execute(query).scalar_one())

    def add_histograms(self, run_id: int, found: Sequence[Histogram]) -> None:
        """Store what the servers' histograms counted during the run, instead of what was stored of it before."""
        values = [
            {f.name: getattr(h, f.name) for f in fields(Histogram)}
            | {"run_id": run_id, "worker": _clean(h.worker)[:WORKER_CHARACTERS], "source": _clean(h.source)}
            | {"buckets": [[None if math.isinf(b) else b, n] for b, n in h.buckets]}
            for h in found
        ]

        def write(connection: sa.Connection) -> None:
            _alone(connection, [run_id])
            connection.execute(histograms.delete().where(histograms.c.run_id == run_id))
            connection.execute(histograms.insert(), values)

        if values:
            self._write(write, run_id)

    def histograms(self, run_id: int) -> list[Histogram]:
        """A run's server histograms, by role, worker and name."""
        h = histograms.c
        query = sa.select(histograms).where(h.run_id == run_id).order_by(h.role, h.worker, h.name, h.id)
        with self._begin() as connection:
            return [
                Histogram(
                    row.worker,
                    row.role,
                    row.name,
                    row.source,
                    row._mapping["count"],  # a row has a method of that name
                    row.total,
                    tuple((math.inf if bound is None else float(bound), float(n)) for bound, n in row.buckets),
                )
                for row in _sound(histograms, connection.execute(query).all())
            ]

    def add_fleet_change(
        self, run_id: int | None, change: FleetChange, control: str = "", zero_unix_s: float | None = None
    ) -> None:
        """Store a change of P:D; one that is there already stays as it is. run_id None: outside a run. control: what was
        steered, without credentials; zero_unix_s: the wall clock where the change's seconds count from."""
        values = _fleet_change(run_id, change, control, zero_unix_s)
        f = fleet_changes.c
        outside = run_id is None and zero_unix_s is not None  # the key does not tell those outside of a run apart
        same = sa.select(f.id).where(f.run_id.is_(None), f.asked_unix_s == values["asked_unix_s"])

        def write(connection: sa.Connection) -> None:
            if not outside or connection.execute(same.where(f.control == values["control"])).first() is None:
                connection.execute(_once(connection, fleet_changes), [values])

        self._write(write, run_id)

    def cost_fleet_changes(self, run_id: int, changes: Sequence[FleetChange], control: str, zero_unix_s: float) -> None:
        """Store a run's changes anew, with what they cost."""
        values = [_fleet_change(run_id, change, control, zero_unix_s) for change in changes]

        def write(connection: sa.Connection) -> None:
            connection.execute(fleet_changes.delete().where(fleet_changes.c.run_id == run_id))
            connection.execute(fleet_changes.insert(), values)

        self._write(write, run_id)

    def fleet_changes(self, run_id: int | None) -> list[FleetChange]:
        """A run's changes of P:D, in order of time; those outside a run for None."""
        query = sa.select(fleet_changes).where(
            fleet_changes.c.run_id.is_(None) if run_id is None else fleet_changes.c.run_id == run_id
        )
        query = query.order_by(fleet_changes.c.asked_unix_s, fleet_changes.c.asked_s)
        with self._begin() as connection:
            return [
                FleetChange(
                    row.asked_s,
                    _time(row.ready_s),
                    Fleet(row.before_prefill, row.before_decode, row.before_mixed),
                    Fleet(row.after_prefill, row.after_decode, row.after_mixed),
                    row.reason,
                    _time(row.joined_s),
                    _time(row.first_served_s),
                    _count(row.in_flight),
                    _count(row.failed),
                    _count(row.slowed),
                )
                for row in _sound(fleet_changes, connection.execute(query).all())
            ]

    def add_decision(self, run_id: int | None, decision: Decision, control: str, zero_unix_s: float) -> None:
        """Store a decision of the online controller; one that is there already stays as it is. control: what it steers, without
        credentials; zero_unix_s: the wall clock where its seconds count from."""
        values = {
            "run_id": run_id,
            "control": _clean(control)[:400],
            "unix_s": zero_unix_s + decision.at_s,
            "at_s": decision.at_s,
            "until_s": decision.until_s,
            "action": decision.action,
            "fleet_before": None if decision.before is None else str(decision.before),
            "fleet_after": None if decision.after is None else str(decision.after),
            "reason": _clean(decision.reason),
            "repeats": decision.repeats,
        }
        d = decisions.c
        whose = d.run_id.is_(None) if run_id is None else d.run_id == run_id
        same = sa.select(d.id).where(
            whose, *(d[name] == values[name] for name in ("unix_s", "at_s", "control", "action"))
        )

        def write(connection: sa.Connection) -> None:
            _alone(connection, [] if run_id is None else [run_id])
            if connection.execute(same).first() is None:
                connection.execute(decisions.insert(), [values])

        self._write(write, run_id)

    def decisions(self, run_id: int | None) -> list[Decision]:
        """The controller's decisions of a run, in order of time; those outside a run for None."""
        query = sa.select(decisions).where(
            decisions.c.run_id.is_(None) if run_id is None else decisions.c.run_id == run_id
        )
        with self._begin() as connection:
            return [
                Decision(
                    row.at_s,
                    row.until_s,
                    row.action,
                    Fleet.parse(row.fleet_before) if row.fleet_before else None,
                    Fleet.parse(row.fleet_after) if row.fleet_after else None,
                    row.reason,
                    row.repeats,
                )
                for row in _sound(
                    decisions, connection.execute(query.order_by(decisions.c.unix_s, decisions.c.id)).all()
                )
            ]

    # --- recommendations -------------------------------------------------------------------------------------------

    def add_recommendation(
        self, kind: str, answer: Mapping[str, Any], run_ids: Sequence[int], data_hash: str, seed: int
    ) -> int:
        """Store an answer with the runs it rests on, as far as they are still there; returns its id."""
        values = {
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "kind": kind,
            "answer": _plain(answer),
            "data_hash": data_hash,
            "version": __version__,
            "seed": seed,
            "key": uuid.uuid4().hex,
        }
        r = recommendations.c

        def write(connection: sa.Connection) -> int:
            connection.execute(_once(connection, recommendations), [values])
            number = int(connection.execute(sa.select(r.id).where(r.key == values["key"])).scalar_one())
            there = connection.execute(sa.select(runs.c.id).where(runs.c.id.in_(set(run_ids))).order_by(runs.c.id))
            used = [{"recommendation_id": number, "run_id": one} for one in there.scalars()]
            if used:
                connection.execute(_once(connection, recommendation_runs), used)
            return number

        return self._write(write)

    def recommendation(self, id: int | None = None, *, kind: str | None = None) -> dict[str, Any]:
        """An answer by id, the latest (of a kind) without one; its JSON with id, created_at, kind and run_ids added."""
        query = sa.select(recommendations).order_by(recommendations.c.id.desc()).limit(1)
        if kind is not None:
            query = query.where(recommendations.c.kind == kind)
        if id is not None:
            query = query.where(recommendations.c.id == id)
        with self._begin() as connection:
            row = connection.execute(query).first()
            if row is None:
                raise InputError(
                    "no recommendation is stored" + (f" with id {id}" if id else "") + ". Run: steelyard advise"
                )
            _sound(recommendations, [row])
            used = connection.execute(
                sa.select(recommendation_runs.c.run_id).where(recommendation_runs.c.recommendation_id == row.id)
            ).scalars()
            return dict(row.answer) | {"id": row.id, "created_at": row.created_at, "run_ids": list(used)}

    def count_recommendations(self) -> int:
        """How many answers are stored."""
        with self._begin() as connection:
            return connection.execute(sa.select(sa.func.count()).select_from(recommendations)).scalar_one()

    def recommendations(
        self, *, kind: str | None = None, id: int | None = None, limit: int = 100, offset: int = 0
    ) -> list[dict[str, Any]]:
        """The latest answers (of a kind, or the one of an id), newest first: id, created_at, kind, version, seed, run_ids and the
        answer's JSON. offset: newer ones that are passed over."""
        query = sa.select(recommendations).order_by(recommendations.c.id.desc()).limit(limit).offset(offset)
        if kind is not None:
            query = query.where(recommendations.c.kind == kind)
        if id is not None:
            query = query.where(recommendations.c.id == id)
        used: dict[int, list[int]] = {}
        with self._begin() as connection:
            rows = _sound(recommendations, connection.execute(query).all())
            links = sa.select(recommendation_runs).where(
                recommendation_runs.c.recommendation_id.in_([row.id for row in rows])
            )
            for link in connection.execute(links.order_by(recommendation_runs.c.run_id)):
                used.setdefault(link.recommendation_id, []).append(link.run_id)
        names = ("id", "created_at", "kind", "version", "seed")
        return [
            {name: getattr(row, name) for name in names} | {"run_ids": used.get(row.id, []), "answer": dict(row.answer)}
            for row in rows
        ]

    def compare_schema(self) -> list[Any]:
        """What ``alembic check`` would report: differences between the database and this version's tables."""
        from alembic.autogenerate import compare_metadata
        from alembic.migration import MigrationContext

        with self._begin() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            return list(compare_metadata(context, metadata))


# --- records and rows -----------------------------------------------------------------------------------------------


def _table(rows: Iterable[Sequence[Any]]) -> Ints:
    """Rows of four whole numbers as an array; a hundred times as fast as numpy.array, which asks each row for its shape."""
    return np.fromiter(chain.from_iterable(rows), dtype=np.int64).reshape(-1, 4)


def _rows(connection: sa.Connection, run_id: int, most: int | None = None) -> int:
    """How many rows a run has; with most, no more than that many are counted."""
    t = observations.c
    which = sa.select(t.run_id).where(t.run_id == run_id)
    query = sa.select(sa.func.count()).select_from((which.limit(most) if most else which).subquery())
    return int(connection.execute(query).scalar_one())


def _alone(connection: sa.Connection, run_ids: Iterable[int]) -> None:
    """Until the transaction ends nobody else keeps figures of these runs, or adds rows to them that make kept ones stale, or
    that have no key."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # the driver would begin only before the first row is changed
    else:  # others may still refer to the run: the rows of whoever counts what it stores
        query = sa.select(runs.c.id).where(runs.c.id.in_(run_ids)).order_by(runs.c.id)
        connection.execute(query.with_for_update(key_share=True)).all()


def _once(connection: sa.Connection, table: sa.Table) -> Any:
    """An insert that leaves a row whose key is there as it is, and complains of everything else."""
    kind = connection.dialect.name
    if kind in ("mysql", "mariadb"):
        first = next(iter(table.primary_key.columns))  # INSERT IGNORE would swallow every other mistake too
        return mysql.insert(table).on_duplicate_key_update({first.name: first})
    if kind == "postgresql":
        from sqlalchemy.dialects import postgresql  # not at the top: each command would read it, most need it never

        return postgresql.insert(table).on_conflict_do_nothing()
    return sqlite.insert(table).on_conflict_do_nothing()


def _figures(kept: Any) -> Figures | None:
    """Figures from their JSON, in which NaN is null; None where it is not theirs: they are computed again."""
    try:
        held: dict[str, Any] = {k: math.nan if v is None else v for k, v in kept.items() if k != "quantiles"}
        spread = {
            m: {w: math.nan if v is None else float(v) for w, v in q.items()} for m, q in kept["quantiles"].items()
        }
        found = Figures(**held, quantiles=spread)
        wanted = {measure: QUANTILES.keys() for measure in MEASURES[:5]}
        numbers = all(isinstance(value, (int, float)) for value in held.values())
        return found if numbers and {m: q.keys() for m, q in spread.items()} == wanted else None
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


_LISTS = ("files", "changes", "buckets")
"""JSON columns that hold a list; the others hold an object."""


def _sound(table: sa.Table, rows: Sequence[Any]) -> Sequence[Any]:
    """The rows, if each value is of its column's kind: SQLite takes anything anywhere, and JSON may be of any shape. TypeError or
    ValueError names the first that is not."""
    kinds = {"integer": int, "real": float, "boolean": bool, "text": str}
    for name, values in zip(rows[0]._fields, zip(*rows, strict=True), strict=True) if rows else ():
        column = table.c[name]
        wanted = {(list if name in _LISTS else dict) if isinstance(column.type, sa.JSON) else kinds[_kind(column)]}
        if wanted == {float}:
            wanted |= {int}
        if column.nullable:
            wanted |= {type(None)}
        for odd in set(map(type, values)) - wanted:
            raise TypeError(f"{table.name}.{name} is of the kind {odd.__name__}")
        if float in wanted and any(v is not None and not math.isfinite(v) for v in values):
            raise ValueError(f"{table.name}.{name} is no finite number")
        bits = 63 if isinstance(column.type, sa.BigInteger) else 31
        if int in wanted and float not in wanted and any(v is not None and abs(v) >> bits for v in values):
            raise ValueError(f"{table.name}.{name} is too large")
    return rows


def _kind(column: sa.Column[Any]) -> str:
    if isinstance(column.type, sa.Boolean):
        return "boolean"
    if isinstance(column.type, sa.Integer):
        return "integer"
    return "real" if isinstance(column.type, sa.Float) else "text"


def _rows_of(table: sa.Table, piece: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    names = list(piece)
    decoded = {
        n: [json.loads(v) for v in piece[n]] if isinstance(table.c[n].type, sa.JSON) else list(piece[n]) for n in names
    }
    return [dict(zip(names, row, strict=True)) for row in zip(*decoded.values(), strict=True)]


def _clean(text: str) -> str:
    """What every database takes: no NUL, no half of a surrogate pair."""
    return text.replace("\x00", "").encode("utf-8", "replace").decode()


def _copied(connection: sa.Connection, run_id: int, rows: Observations) -> bool:
    """Copy observations into PostgreSQL, in binary: three times the rate of text. False, and nothing done, when some of the
    rows are there already, or a number is none that the column holds (the text path says which)."""
    numbers: dict[str, tuple[Any, str, Any]] = {}
    texts: dict[str, list[Any]] = {}
    for column in observations.columns:
        name, kind = column.name, column.type
        values = np.full(len(rows), run_id) if name == "run_id" else getattr(rows, name)
        if isinstance(kind, sa.Integer):
            size = 2 if isinstance(kind, sa.SmallInteger) else 8 if isinstance(kind, sa.BigInteger) else 4
            if not pgcopy.fits(values, size):
                return False
            numbers[name] = values, f">i{size}", values < 0 if column.nullable else np.zeros(len(rows), dtype=bool)
        elif isinstance(kind, sa.Float):
            numbers[name] = values, ">f8", ~np.isfinite(values)
        else:
            texts[name] = _nullable(name, values)
    names = ", ".join(f'"{name}"' for name in (*numbers, *texts))
    driver: Any = connection.connection.driver_connection
    try:
        with (
            driver.transaction(),
            driver.cursor() as cursor,
            cursor.copy(f"COPY observations ({names}) FROM STDIN (FORMAT BINARY)") as copy,
        ):
            copy.write(pgcopy.rows(list(numbers.values()), list(texts.values())))
    except Exception as error:
        if getattr(error, "sqlstate", "") == "23505":
            return False
        raise
    return True


def _copy_cells(values: Sequence[Any]) -> Iterable[str]:
    """A column as COPY's text format wants it."""
    kinds = set(map(type, values))
    if kinds <= {int, float}:
        return map(str, values)
    if kinds <= {int, float, type(None)}:
        return ["\\N" if v is None else str(v) for v in values]
    cells = {v: _copy_cell(v) for v in set(values)}  # status and error have few
    return [cells[v] for v in values]


def _copy_cell(value: Any) -> str:
    if value is None:
        return "\\N"
    if isinstance(value, bytes):
        return "\\\\x" + value.hex()
    return str(value).translate(_COPY_ESCAPES)


_COPY_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


def _fleet_change(run_id: int | None, change: FleetChange, control: str, zero_unix_s: float | None) -> dict[str, Any]:
    """A change of P:D as columns."""
    times = {"ready_s": change.ready_s, "joined_s": change.joined_s, "first_served_s": change.first_served_s}
    counts = {"in_flight": change.in_flight, "failed": change.failed, "slowed": change.slowed}
    return (
        {
            "run_id": run_id,
            "control": _clean(control)[:400],
            "asked_unix_s": None if zero_unix_s is None else zero_unix_s + change.asked_s,
            "asked_s": change.asked_s,
            "before_prefill": change.before.prefill,
            "before_decode": change.before.decode,
            "after_prefill": change.after.prefill,
            "after_decode": change.after.decode,
            "before_mixed": change.before.mixed,
            "after_mixed": change.after.mixed,
            "reason": _clean(change.reason),
        }
        | {name: t if math.isfinite(t) else None for name, t in times.items()}
        | {name: None if n < 0 else n for name, n in counts.items()}
    )


def _time(value: float | None) -> float:
    return math.nan if value is None else value


def _count(value: int | None) -> int:
    return -1 if value is None else value


def _nullable(name: str, column: Any) -> list[Any]:
    values = column.tolist()
    if column.dtype == np.float64:
        known = np.isfinite(column)
        return (
            values if known.all() else [v if there else None for v, there in zip(values, known.tolist(), strict=True)]
        )
    if column.dtype == object:
        clean = {v: _clean(str(v)) for v in set(values)}  # most are one of a few words
        texts = [clean[v] for v in values]
        return [v or None for v in texts] if observations.c[name].nullable else texts
    return values if name == "index" else [v if v >= 0 else None for v in values]


def _plain(value: Any) -> Any:
    """JSON without NaN: PostgreSQL refuses it, and so do we."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return _clean(value)
    if isinstance(value, Mapping):
        return {_clean(str(k)): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _info(row: Any) -> TraceInfo:
    for name, absent in (("rows_kept", 0), ("replayable", None), ("longest_prompt_tokens", None)):
        if not isinstance(row.summary.get(name, absent), int) and row.summary.get(name, absent) is not absent:
            raise TypeError(f"trace_sources.summary has no number for {name}")
    return TraceInfo(
        row.id,
        row.name,
        row.format,
        row.sha256,
        row.files,
        row.options,
        row.summary,
        row.origin_utc,
        row.block_size,
        row.hash_scope,
        row.created_at,
    )


def _run_values(run: Run) -> dict[str, Any]:
    values = {f.name: getattr(run, f.name) for f in fields(Run) if f.name not in ("id", "fleet", "gpus_per_worker")}
    values["prefill"] = run.fleet.prefill if run.fleet else None
    values["decode"] = run.fleet.decode if run.fleet else None
    values["mixed"] = run.fleet.mixed if run.fleet else 0
    values["prefill_gpus"], values["decode_gpus"] = run.gpus_per_worker
    values["endpoint"] = redact(run.endpoint)
    values["changes"] = list(run.changes)
    values = {k: _plain(v) for k, v in values.items()}
    _fits(runs, values)
    return values


def _fits(table: sa.Table, values: Mapping[str, Any]) -> None:
    """InputError where a column does not hold a text or number: SQLite would take it, and no other database."""
    for name, value in values.items():
        kind = table.c[name].type
        most = getattr(kind, "length", None)
        if isinstance(value, str) and most and len(value) > most:
            raise InputError(
                f"{name} {value[:40]!r}.. is too long: at most {most} characters (got {len(value)}). Shorten it."
            )
        bits = 63 if isinstance(kind, sa.BigInteger) else 31
        if isinstance(kind, sa.Integer) and isinstance(value, int) and not -(2**bits) <= value < 2**bits:
            raise InputError(f"{name} {value} is too large: at most {2**bits - 1}. Give a smaller one.")


def _run(row: Any) -> Run:
    values = {f.name: getattr(row, f.name) for f in fields(Run) if f.name not in ("fleet", "gpus_per_worker")}
    for name in ("rate_per_s", "lag_p50_ms", "lag_p99_ms", "lag_max_ms"):
        values[name] = math.nan if values[name] is None else values[name]
    for name, kind, held in (("changes", str, row.changes), ("counts", int, row.counts.values())):
        if not all(type(one) is kind for one in held):
            raise TypeError(f"runs.{name} does not hold {kind.__name__} alone")
    if min(row.prefill_gpus, row.decode_gpus) < 1:
        raise ValueError("runs.prefill_gpus or decode_gpus is below 1")
    values["costs"] = {
        w: c for w, c in row.costs.items() if type(c) is dict and set(map(type, c.values())) <= {int, float}
    }
    values["sources"] = {w: held for w, held in row.sources.items() if type(held) is dict}
    values["changes"] = tuple(row.changes)
    values["fleet"] = None if row.prefill is None else Fleet(row.prefill, row.decode, row.mixed)
    values["gpus_per_worker"] = (row.prefill_gpus, row.decode_gpus)
    return Run(**values)
