"""Files that are whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from traces.errors import InputError


@contextmanager
def whole(path: Path, mode: str = "w", *, folders: bool = False) -> Iterator[Any]:
    """A file to write ("w": UTF-8 text, lines end as written; "wb": bytes) that takes the name when all is in it. folders: make
    those that are missing.

    Devices and pipes are written as they are: moved onto /dev/null, a report written by root would be the machine's null device
    from then on. InputError when it cannot be written.
    """
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        if path.exists() and not path.is_file():
            with path.open(mode, **text) as file:
                yield file
            return
        if folders:
            path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, mode, **text) as file:
                yield file
            os.chmod(beside, 0o644)
            os.replace(beside, path)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}). Give another --out.") from error
