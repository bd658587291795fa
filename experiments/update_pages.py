#!/usr/bin/env python
"""Render the tables, and the numbers in the text, of README.md and docs/ from the JSON files of their results.

    python experiments/update_pages.py

A page holds a block between `<!-- NAME -->` and `<!-- end -->`, where NAME is one of `BLOCKS`. One that begins on the
line of its name, which Markdown allows within a line only, is part of a sentence.
"""

import re
from pathlib import Path

import pandas as pd
import result_tables
from claims import claims_table, findings_in_short, findings_table
from families import families_table
from head_start import head_start_table
from latent_diffusion import markdown_tables
from masked_generation import results_table as masked_generation_tables
from quantizer_comparison import results_table
from rate_distortion import at_equal_quality
from remarks import REMARKS
from sweep_report import judge, report

from diffusers_pq.console import one_line_errors
from diffusers_pq.evaluation import systems, tables
from diffusers_pq.files import read_json, write_text
from diffusers_pq.flags import FlagParser


ROOT = Path(__file__).parent.parent
EVALUATIONS = ROOT / "benchmarks" / "results" / "evaluation"
FOLDERS = [ROOT / folder / "results" for folder in ("benchmarks", "experiments")]
# Of speed, what was measured on a CPU; on another device, under names that end in the device's.
RESULTS = {path.stem: path for folder in FOLDERS for place in (".", "cpu") for path in (folder / place).glob("*.json")}
RESULTS |= {
    f"{path.stem}_{path.parent.name.replace('-', '_')}": path
    for folder in FOLDERS
    for path in folder.glob("*/*.json")
    if path.parent.name != "cpu"
}
BLOCK = re.compile(r"<!-- (?P<name>\w+) -->(?P<newline>\n?).*?<!-- end -->", re.DOTALL)


def sweep_table(record):
    rows = pd.DataFrame(record["configurations"])
    return report(rows, judge(rows))


# name of a table, which is that of its JSON file, -> what renders it
TABLES = {
    "adaptation": result_tables.adaptation,
    "codebook_remedies": result_tables.codebook_remedies,
    "families": families_table,
    "generation_speed": result_tables.generation_speed,
    "head_start": head_start_table,
    "latent_diffusion": markdown_tables,
    "masked_generation": masked_generation_tables,
    "model_speed": result_tables.model_speed,
    "photographs": result_tables.photographs,
    "product_quantization": result_tables.product_quantization,
    "quantisation_overhead": result_tables.quantisation_overhead,
    "quantizer_comparison": results_table,
    "quantizer_speed": result_tables.codebook_search,
    "rate_distortion": at_equal_quality,
    "sweep_kmeans": sweep_table,
    "sweep_normal": sweep_table,
    "tiling": result_tables.tiling,
    "training_speed": result_tables.training_speed,
}
# name of a block -> what renders it from the contents of all JSON files
SUMMARIES = {"claims": claims_table, "findings": findings_table, "findings_in_short": findings_in_short} | REMARKS
# name of a block -> what renders it from the evaluations of autoencoders
EVALUATION_TABLES = {
    "evaluation": tables.results_table,
    "references": systems.references_table,
    "systems": lambda results: systems.systems_table(),
}
# Of other devices.
TABLES |= {name: TABLES[path.stem] for name, path in RESULTS.items() if name != path.stem and path.stem in TABLES}
TABLES |= {name: result_tables.gpu_goals for name in RESULTS if name.startswith("gpu_check_")}
BLOCKS = (*TABLES, *SUMMARIES, *EVALUATION_TABLES)


def pages():
    """README.md and the pages of docs/ and of this folder that hold results."""
    candidates = [ROOT / "README.md", ROOT / "experiments" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [page for page in candidates if BLOCK.search(page.read_text(encoding="utf-8"))]


def rendered(name):
    if name in EVALUATION_TABLES:
        return EVALUATION_TABLES[name](tables.read_results(EVALUATIONS)).strip()
    if name in TABLES:
        return TABLES[name](read_json(RESULTS[name])).strip()
    if name in SUMMARIES:
        return SUMMARIES[name]({title: read_json(path) for title, path in RESULTS.items()}).strip()
    raise ValueError(f"`<!-- {name} -->` is not a block: the names are {', '.join(BLOCKS)}.")


def updated(text):
    """The text of a page with its blocks rendered."""

    def block(match):
        space = "\n\n" if match["newline"] else ""
        return f"<!-- {match['name']} -->{space}{rendered(match['name'])}{space}<!-- end -->"

    return BLOCK.sub(block, text)


def main():
    FlagParser(description=__doc__).parse_args()
    for page in pages():
        write_text(page, updated(page.read_text(encoding="utf-8")))
        print(page.relative_to(ROOT))


if __name__ == "__main__":
    with one_line_errors():
        main()
