"""The public names of a package, imported when they are used: ``import traces`` costs nothing, ``traces.ingest(...)`` works.

A public name may be that of the submodule it comes from (``traces.ingest``, ``loadgen.replay``, ``advisor.advise``): the
verb is what a caller wants, so the name is the function, and ``from traces.ingest import IngestReport`` finds the module.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    """A package whose public names are looked up in submodules. Importing a submodule does not hide the function."""

    _public_names: Mapping[str, str]

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in self.__dict__.get("_public_names", ()):
            return  # the import system binds a submodule here once it is loaded; sys.modules has it as well
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        where = self._public_names.get(name)
        if where is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(import_module(where), name)
        super().__setattr__(name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._public_names})


def publish(package: str, names: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Make names (module -> its names) attributes of the package; returns ``__all__``."""
    module = sys.modules[package]
    found = {name: where for where, held in names.items() for name in held}
    module.__dict__["_public_names"] = found
    module.__class__ = _Package
    return sorted(found)
