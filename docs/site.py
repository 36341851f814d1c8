"""A hook of mkdocs: the navigation, into which pages that it does not know join by themselves, by their folder and heading."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

SECTIONS: dict[str, tuple[str, ...]] = {
    "Start": ("index.md", "start.md"),
    "How to": ("howto/*.md", "engines.md", "control.md", "report.md"),
    "Explanation": ("explanation/*.md", "replay.md", "traces.md", "model.md", "strategies.md", "advice.md", "*.md"),
    "Reference": ("reference/*.md",),
}
"""Section -> patterns under docs/; a page stands where it is named first."""


def title(page: Path) -> str:
    """The page's first heading."""
    found = re.search(r"^# (.+)$", page.read_text(encoding="utf-8"), re.M)
    return found[1].strip() if found else page.stem


def navigation(docs: Path) -> list[dict[str, list[dict[str, str]]]]:
    """mkdocs' nav: every page once."""
    taken: set[Path] = set()
    named = {docs / p for patterns in SECTIONS.values() for p in patterns if "*" not in p}
    nav = []
    for section, patterns in SECTIONS.items():
        pages = []
        for pattern in patterns:
            found = [p for p in sorted(docs.glob(pattern)) if p not in taken and ("*" not in pattern or p not in named)]
            taken.update(found)
            pages += [{title(p): p.relative_to(docs).as_posix()} for p in found]
        nav.append({section: pages})
    return nav


def on_config(config: Any) -> Any:
    """Called by mkdocs before it looks at the files."""
    config.nav = navigation(Path(config.docs_dir))
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that leave docs/ lead to files of the repository, which the site does not hold: their text stays."""
    return re.sub(
        r"\[([^\]]+)\]\((?:\.\./)+(?:README|CHANGELOG|benchmarks|loadgen|advisor|traces|tests)[^)]*\)", r"\1", markdown
    )
