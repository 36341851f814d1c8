"""Parquet, read as lines of JSON: the columns of the user's map and no others, so texts beside them are never touched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import orjson

from traces.errors import InputError
from traces.formats import BadFileError


class ParquetLines:
    """Rows of a file as a text stream of JSONL; times as ISO 8601. A context manager."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._file = _parquet(path)
        names = set(self._file.schema_arrow.names)
        tops = [c if c in names else c.partition(".")[0] for c in columns]
        missing = [c for c, top in zip(columns, tops, strict=True) if top not in names]
        if missing:
            self._file.close()
            raise InputError(f"{path}: no column {', '.join(missing)}; there are {', '.join(sorted(names))}.")
        self._lines = self._each(sorted(set(tops)))

    def _each(self, columns: list[str]) -> Iterator[str]:
        try:
            for batch in self._file.iter_batches(batch_size=8192, columns=columns):
                for record in batch.to_pylist():
                    yield orjson.dumps(record, default=str, option=orjson.OPT_NON_STR_KEYS).decode() + "\n"
        except (ValueError, OSError, orjson.JSONEncodeError) as error:
            raise BadFileError(f"not readable as Parquet ({error})") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()  # type: ignore[attr-defined]
        self._file.close()

    def readline(self, limit: int = -1) -> str:
        """The next row, empty at the end; cut at ``limit`` characters."""
        line = next(self._lines, "")
        return line if limit < 0 else line[:limit]


def parquet_columns(path: Path) -> list[str]:
    """Names of the columns of a file."""
    file = _parquet(path)
    try:
        return list(file.schema_arrow.names)
    finally:
        file.close()


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError:
        raise InputError(f"{path}: Parquet needs pyarrow. Run: pip install 'steelyard[parquet]'") from None
    try:
        return ParquetFile(path)
    except (ArrowException, OSError) as error:
        words = str(error).splitlines()[0][:100]
        raise InputError(f"{path}: cannot be read as Parquet ({words}). Nothing was stored.") from None
