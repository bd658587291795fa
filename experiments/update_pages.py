#!/usr/bin/env python
"""Render the tables of README.md and docs/ from the JSON files of their results.

    python experiments/update_pages.py

A page holds a table between `<!-- NAME -->` and `<!-- end -->`, where NAME is one of `TABLES`.
"""

import re
from pathlib import Path

import pandas as pd
from quantizer_comparison import results_table
from rate_distortion import at_equal_quality
from sweep_report import judge, report

from diffusers_pq.console import one_line_errors
from diffusers_pq.files import read_json, write_text
from diffusers_pq.flags import FlagParser


ROOT = Path(__file__).parent.parent
EXPERIMENTS = ROOT / "experiments" / "results"
BLOCK = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def sweep_table(record):
    rows = pd.DataFrame(record["configurations"])
    return report(rows, judge(rows))


# name of a table -> JSON file of its results, what renders them
TABLES = {
    "quantizer_comparison": (EXPERIMENTS / "quantizer_comparison.json", results_table),
    "sweep_normal": (EXPERIMENTS / "sweep_normal.json", sweep_table),
    "sweep_kmeans": (EXPERIMENTS / "sweep_kmeans.json", sweep_table),
    "rate_distortion": (EXPERIMENTS / "rate_distortion.json", at_equal_quality),
}


def pages():
    """README.md and the pages of docs/ that hold tables."""
    candidates = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [page for page in candidates if BLOCK.search(page.read_text(encoding="utf-8"))]


def rendered(name):
    if name not in TABLES:
        raise ValueError(f"`<!-- {name} -->` is no table: the names are {', '.join(TABLES)}.")
    path, render = TABLES[name]
    return render(read_json(path)).strip()


def updated(text):
    """The text of a page with its tables rendered."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{rendered(block[2])}\n\n{block[3]}", text)


def main():
    FlagParser(description=__doc__).parse_args()
    for page in pages():
        write_text(page, updated(page.read_text(encoding="utf-8")))
        print(page.relative_to(ROOT))


if __name__ == "__main__":
    with one_line_errors():
        main()
