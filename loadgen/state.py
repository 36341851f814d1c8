"""Where files are that outlive a command, whatever the working folder. Light to import: every verb looks there first."""

from __future__ import annotations

import os
from pathlib import Path


def folder(name: str) -> Path:
    """``$XDG_STATE_HOME/steelyard/NAME``, under ~/.local/state without."""
    home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(home) / "steelyard" / name
