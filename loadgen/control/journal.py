"""The way back, on disk: which fleet was in force before steelyard changed it. One file an endpoint.

Written, and on the disk (fsync), before the first change; dropped when the old fleet is back. A file that no living
process holds is what a crash left: ``steelyard control restore`` puts its fleet back. Entries stack: a deliberate
``control set`` lies below what a sweep did afterwards. Holds no credentials.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from loadgen import state
from traces.errors import EndpointError, InputError
from traces.records import Fleet

SET = "set"
"""The verb whose change is meant to stay."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One change: by which verb, from which fleet to which, when."""

    verb: str
    before: str
    after: str
    unix_s: float


def folder() -> Path:
    """Where the files are: beside the rows that wait (:func:`loadgen.spool.folder`)."""
    return state.folder("control")


def hold(path: Path, verb: str, busy: str) -> IO[str]:
    """A lock, held until the file is closed or the process ends. EndpointError when another has it: busy, and who."""
    handle = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.seek(0)
        who = handle.read(200).strip() or "another process"
        handle.close()
        raise EndpointError(f"{busy} {who}. Wait for it, or end it.") from None
    handle.seek(0)
    handle.truncate()
    handle.write(f"steelyard {verb}, process {os.getpid()}")
    handle.flush()
    return handle


class Journal:
    """The file of one control. spec: what makes it again; name: for people; cluster: which one it changes, where the spec alone
    means another one tomorrow (a kubeconfig's context), else ""."""

    def __init__(self, spec: str, name: str, where: Path | None = None, cluster: str = "") -> None:
        self.spec, self.name, self.cluster = spec, name, cluster
        self.path = (where or folder()) / f"{hashlib.sha256(spec.encode()).hexdigest()[:16]}.json"
        self._lock: IO[str] | None = None

    @classmethod
    def of(cls, control: Any) -> Journal:
        """That of a control as it is now."""
        return cls(control.spec, control.name, cluster=getattr(control, "cluster", ""))

    @classmethod
    def all(cls, where: Path | None = None) -> list[Journal]:
        """Every file that is there, and readable."""
        found = []
        for path in sorted((where or folder()).glob("*.json")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                held = json.loads(path.read_text(encoding="utf-8"))
                found.append(cls(str(held["control"]), str(held["name"]), path.parent, str(held.get("cluster", ""))))
        return found

    @classmethod
    def unreadable(cls, where: Path | None = None) -> list[Path]:
        """The others: each may be the only trace of an old fleet."""
        known = {journal.path for journal in cls.all(where)}
        return [path for path in sorted((where or folder()).glob("*.json")) if path not in known]

    # --- who holds it

    def lock(self, verb: str) -> None:
        """Held until unlock or the end of the process. EndpointError when another process changes this fleet."""
        with self.writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = hold(self.path.with_suffix(".lock"), verb, f"{self.name}: its fleet is being changed by")

    def unlock(self) -> None:
        """Let others."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # --- what it says

    def entries(self) -> list[Entry]:
        """Oldest first. InputError when the file cannot be read, since it may be the only trace of the old fleet, or is of
        another cluster, whose fleet must not come here."""
        try:
            held = json.loads(self.path.read_text(encoding="utf-8"))
            found, noted = [Entry(**entry) for entry in held["entries"]], str(held.get("cluster", ""))
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path}: cannot be read ({error}). Put the fleet back by hand and remove the file."
            ) from None
        if noted != self.cluster:
            context = noted.removeprefix("context ").rpartition(" (")[0] if noted.startswith("context ") else ""
            go = f"kubectl config use-context {shlex.quote(context)}, then " if context else ""
            raise InputError(
                f"{self.name}: nothing was changed, since the note on disk is of {noted or 'an unknown cluster'}, and this is "
                f"{self.cluster or 'another'}. Run: {go}steelyard control restore"
            )
        return found

    def left(self, verb: str) -> Fleet | None:
        """The fleet that a crash left unrestored. Call with the lock held."""
        found = None
        for entry in reversed(self.entries()):
            if entry.verb == SET:
                break
            found = Fleet.parse(entry.before)
        return found

    def begin(self, verb: str, before: Fleet, after: Fleet) -> None:
        """Note a change before it is made."""
        held = self.entries()
        if verb == SET and held and held[-1].verb == SET:
            return  # the way back is to before the first of them
        self._write([*held, Entry(verb, str(before), str(after), time.time())])

    def done(self, verb: str) -> None:
        """The fleet is as it was: drop what this verb and a crash before it noted."""
        held = self.entries()
        while held and held[-1].verb != SET:
            held.pop()
        if verb == SET and held:
            held.pop()  # what a crash before it noted stays
        self._write(held)

    def forget(self) -> None:
        """Drop all: the fleet is as it should be."""
        self._write([])

    def undo(self) -> tuple[Fleet, str] | None:
        """(fleet to go back to, by what it was changed): what a crash left, otherwise the last ``control set``."""
        held = self.entries()
        if not held:
            return None
        left = self.left("")
        if left is not None:
            return left, next(e.verb for e in held if e.verb != SET)
        return Fleet.parse(held[-1].before), SET

    # --- what else the way back needs

    @property
    def _beside(self) -> Path:
        return self.path.with_suffix(".pool")

    def keep(self, held: Any) -> None:
        """Beside the note, and dropped with it: what the control has to know to go back. Nothing where there is no note."""
        if self.path.exists():
            with self.writing():
                self._store(self._beside, held)

    def kept(self) -> Any:
        """What :meth:`keep` was given last; None where it cannot be read, or its note is gone."""
        if not self.path.exists():
            return None
        try:
            return json.loads(self._beside.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _store(self, path: Path, held: Any) -> None:
        part = path.with_suffix(".part")
        with part.open("w", encoding="utf-8") as out:
            json.dump(held, out, indent=1)
            out.flush()
            os.fsync(out.fileno())
        part.replace(path)

    def _write(self, entries: list[Entry]) -> None:
        with self.writing():
            if not entries:
                self.path.unlink(missing_ok=True)
                self._beside.unlink(missing_ok=True)
            else:
                held = {"control": self.spec, "name": self.name, "cluster": self.cluster}
                self._store(self.path, held | {"entries": [asdict(e) for e in entries]})
            # The name must be on the disk too, not only the bytes.
            handle = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """InputError of one line where the folder cannot be written."""
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self.path.parent}: the way back of {self.name} cannot be noted there ({error.strerror}). Make room, or let "
                "XDG_STATE_HOME name a folder that can be written."
            ) from None
