"""Any CSV, JSONL or Parquet whose columns the user names: ``--map arrival=..,input=..,output=..[,session=..] --time-unit s``."""

from __future__ import annotations

from typing import Any

from traces.errors import InputError
from traces.formats import BadRowError, Event, Meta, Row, TraceFormat
from traces.formats.columns import Columns
from traces.formats.jsonl import Lines, at, number_us, stamp_us, whole

UNITS = {"s": 1e6, "ms": 1e3, "us": 1.0, "ns": 1e-3}
_KEYS = ("arrival", "input", "output", "session")


def parse_map(text: str) -> dict[str, str]:
    """``arrival=ts,input=n_in,output=n_out`` as a dict. InputError says what is missing or unknown."""
    found: dict[str, str] = {}
    for term in filter(None, (t.strip() for t in text.split(","))):
        key, _, column = term.partition("=")
        key, column = key.strip(), column.strip()
        if key not in _KEYS or not column:
            raise InputError(f"--map takes arrival=..,input=..,output=..[,session=..] (got {term!r}).")
        found[key] = column
    missing = [k for k in _KEYS[:3] if k not in found]
    if missing:
        raise InputError(f"--map must name {', '.join(missing)} too (got {text!r}).")
    return found


def generic(text: str, unit: str, first: str) -> TraceFormat:
    """The format of a map. first: the start of the file, which says whether it is JSONL or CSV."""
    names = parse_map(text)
    if unit != "iso" and unit not in UNITS:
        raise InputError(f"--time-unit must be iso, {', '.join(UNITS)} (got {unit!r}).")

    def when(value: Any) -> tuple[int, bool | None]:
        if unit == "iso":
            return stamp_us(value, names["arrival"])
        if isinstance(value, str):
            try:
                value = int(value)
            except ValueError:
                try:
                    value = float(value)
                except ValueError:
                    raise BadRowError("bad_time", f"{names['arrival']} must be a number (got {value[:40]!r})") from None
        return number_us(value, UNITS[unit], names["arrival"]), None

    if first.lstrip("\ufeff").lstrip().startswith("{"):

        def read(record: dict[str, Any], state: dict[str, Any]) -> Event:
            arrival_us, zoned = when(at(record, names["arrival"]))
            session = at(record, names["session"]) if "session" in names else None
            return Row(
                arrival_us,
                whole(at(record, names["input"]), names["input"]),
                whole(at(record, names["output"]), names["output"]),
                session_key=None if session is None else str(session)[:200],
                zoned=zoned,
            )

        return Lines(
            "jsonl",
            "JSONL or Parquet by --map",
            Meta(clock=unit),
            tuple(names[k] for k in _KEYS[:3]),
            read,
            columns=tuple(names.values()),
        )
    return Columns(
        "csv",
        "CSV by --map",
        unit,
        at=names["arrival"],
        prompt=names["input"],
        output=names["output"],
        when=when,
        session=names.get("session", ""),
    )
