"""Result tables of the README and of docs/, made from bench/results.

    python -m bench tables            # write the tables into the pages
    python -m bench tables --check    # change nothing; fail if a page is stale

A page holds the markers `<!-- generated: NAME -->` and `<!-- end -->`. The text between them is replaced by the table
NAME, and by the source of its figures: files, machine, versions and commands. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from . import accuracy, kernels, methods, readme, time
from .reading import ROOT, TABLES, sources

__all__ = ["accuracy", "kernels", "main", "methods", "readme", "time"]  # modules that fill TABLES

MARKED = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str, page: Path) -> str:
    """The text of a page with all its tables made anew."""

    def make(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in TABLES:
            raise SystemExit(f"{page.relative_to(ROOT)}: there is no table {name!r}; there are {', '.join(TABLES)}")
        body, files = TABLES[name]
        source = f"{sources(files, page)}\n\n" if files else ""
        return f"{found[1]}\n{body()}\n\n{source}{found[4]}"

    return MARKED.sub(make, text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is stale")
    options = parser.parse_args(argv)
    stale = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = filled(text, page)
        if new == text:
            continue
        stale.append(str(page.relative_to(ROOT)))
        if not options.check:
            page.write_text(new, encoding="utf-8")
    if options.check and stale:
        raise SystemExit(f"stale: {', '.join(stale)}; run `python -m bench tables`")
    print(f"{'wrote' if stale else 'up to date:'} {', '.join(stale) or 'all pages'}")
