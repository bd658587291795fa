#!/usr/bin/env python
"""Write the tables of the documentation anew from the results in JSON files.

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
RESULTS = ROOT / "experiments" / "results"
PAGES = ("docs/systems.md", "docs/sweep.md", "docs/compression.md")
BLOCK = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def sweep_table(record):
    rows = pd.DataFrame(record["configurations"])
    return report(rows, judge(rows))


# name of a JSON file in experiments/results -> what makes Markdown of it
TABLES = {
    "quantizer_comparison": results_table,
    "sweep_normal": sweep_table,
    "sweep_kmeans": sweep_table,
    "rate_distortion": at_equal_quality,
}


def rendered(name):
    return TABLES[name](read_json(RESULTS / f"{name}.json")).strip()


def updated(page):
    """The text of a page with its tables written anew."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{rendered(block[2])}\n\n{block[3]}", page.read_text(encoding="utf-8"))


def main():
    FlagParser(description=__doc__).parse_args()
    for name in PAGES:
        write_text(ROOT / name, updated(ROOT / name))
        print(name)


if __name__ == "__main__":
    with one_line_errors():
        main()
