"""The tables of the pages, and the numbers in their text, are those of the JSON files; nobody types a number."""

import copy
import re

import pytest
import result_tables
from remarks import REMARKS
from update_pages import BLOCK, BLOCKS, RESULTS, ROOT, pages, updated

from diffusers_pq.evaluation.systems import KNOWN
from diffusers_pq.files import read_json


TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "model_cards" / "cards.yaml"]
TEXTS += [ROOT / folder / "README.md" for folder in ("benchmarks", "experiments", "training_scripts")]
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
MEASURED = re.compile(r"(?<![\w^.])(\d[\d.,]*)\s+(dB|bpp|bits?\s+per\s+pixel|ms|s|seconds?)\b")
# With these units, published numbers may be typed: their source is beside them.
PUBLISHED = {
    "dB": {scores["psnr"] for system in KNOWN.values() for scores in system.published.values() if "psnr" in scores}
}
PUBLISHED["bits per pixel"] = {f"{system.bits_per_pixel:.3g}" for system in KNOWN.values()}


def test_pages_hold_every_block_once():
    texts = "".join(page.read_text(encoding="utf-8") for page in pages())
    assert {name: texts.count(f"<!-- {name} -->") for name in BLOCKS} == dict.fromkeys(BLOCKS, 1)
    assert texts.count("<!-- end -->") == len(BLOCKS)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_a_page_is_what_the_command_renders(page):
    text = page.read_text(encoding="utf-8")
    assert text == updated(text), "run `python experiments/update_pages.py`"


def test_a_table_is_replaced_and_the_text_around_it_stays():
    name = "rate_distortion"
    text = f"before\n\n<!-- {name} -->\n| a number | typed by hand |\n<!-- end -->\n\nafter\n"
    once = updated(text)
    assert once.startswith(f"before\n\n<!-- {name} -->\n\n|") and once.endswith("|\n\n<!-- end -->\n\nafter\n")
    assert "typed by hand" not in once and "pqgan-mini-f8-pq" in once
    assert updated(once) == once


def test_a_block_that_nobody_renders_is_named():
    with pytest.raises(ValueError, match="<!-- unknown -->` is not a block: the names are"):
        updated("<!-- unknown -->\n<!-- end -->\n")


def test_a_block_within_a_line_stays_within_it():
    once = updated("takes <!-- jpeg_share -->many bits<!-- end --> of it.\n")
    assert re.fullmatch(r"takes <!-- jpeg_share -->\d+%<!-- end --> of it\.\n", once) and updated(once) == once


def typed_numbers(text):
    """The measured numbers outside of what is rendered and of code."""
    for number, unit in MEASURED.findall(CODE.sub("", BLOCK.sub("", text))):
        if number not in PUBLISHED.get(" ".join(unit.split()), ()):
            yield f"{number} {unit}"


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_nobody_types_a_measured_number(page):
    assert not list(typed_numbers(page.read_text(encoding="utf-8")))


def test_a_typed_number_is_found_and_one_of_the_paper_is_not():
    block = "<!-- jpeg_share -->30.1 dB<!-- end -->"
    text = f"The paper: 37.4 dB, 9 bits per\npixel. {block}, `1.5 s`, 28.36\ndB at 3.43 bits per pixel in 1.2 s, 4 bpp"
    assert list(typed_numbers(text)) == ["28.36 dB", "3.43 bits per pixel", "1.2 s", "4 bpp"]


@pytest.fixture
def records():
    return {name: read_json(path) for name, path in RESULTS.items()}


def of_one_seed(records):
    """Sweeps and the comparison as an earlier version made them."""
    earlier = copy.deepcopy(records)
    for name in ("sweep_normal", "sweep_kmeans"):
        earlier[name].pop("training", None)
        rows = earlier[name]["configurations"]
        earlier[name]["configurations"] = [row for row in rows if row.pop("run", 0) == 0]
    results = earlier["quantizer_comparison"]
    earlier["quantizer_comparison"] = [one for one in results if one["settings"]["seed"] == 0]
    for result in earlier["quantizer_comparison"]:
        result["settings"]["weight_init"] = "pca"
    return earlier


def with_another_seed(records):
    """The same a second time, with other numbers, as they are made now."""
    changed = copy.deepcopy(records)
    for name in ("sweep_normal", "sweep_kmeans"):
        rows = changed[name]["configurations"]
        again = [
            row | {"psnr": row["psnr"] + 1 + row["d"] / 64, "H_n": row["H_n"] / 2 + 0.2, "run": 1} for row in rows
        ]
        changed[name]["configurations"] = [row | {"run": 0} for row in rows] + again
        changed[name]["training"] = {"weight_init": "pca_rotated"}
    again = copy.deepcopy(changed["quantizer_comparison"])
    for result in again:
        result["settings"]["seed"] = 1
        result["photographs"]["scores"]["psnr"] += result["name"] == "pq"
    changed["quantizer_comparison"] += again
    for result in changed["quantizer_comparison"]:
        result["settings"]["weight_init"] = "pca_rotated"
    return changed


def test_sentences_follow_the_results(records):
    before = {name: remark(of_one_seed(records)) for name, remark in REMARKS.items()}
    after = {name: remark(with_another_seed(of_one_seed(records))) for name, remark in REMARKS.items()}
    assert "earlier start" in before["sweep_conditions"] and "One seed" in before["comparison_conditions"]
    assert "earlier start" not in after["sweep_conditions"] + after["comparison_conditions"]
    assert "2 seeds" in after["sweep_conditions"] and after["comparison_conditions"] == "2 seeds."
    gain = float(before["without_quantisation"].split()[0])
    assert after["without_quantisation"] == f"{gain + 0.5:+.2f} \u00b1 0.71 dB"
    assert before["sweep_doubling"] != after["sweep_doubling"] and "\u00b1" in after["sweep_doubling"]


def test_the_verdict_on_vector_quantisation_follows_both_starts(records):
    def verdict(normal, kmeans):
        for name, slope in (("sweep_normal", normal), ("sweep_kmeans", kmeans)):
            for row in records[name]["configurations"]:
                row["psnr"] = 20 + slope * (row["d"].bit_length() - 4)
        return REMARKS["sweep_starts"](records)

    assert "**Vector quantisation gains with d from this start** (+1.00 dB for twice the d, -2.00 dB" in verdict(-2, 1)
    assert "does not gain with d from this start either" in verdict(-2, -1)
    assert "gains with d from both starts" in verdict(1, 2)


def test_goals_on_a_gpu_are_rendered_with_what_was_not_measured():
    goals = [{"what": "search (ms)", "goal": 0.15, "found": 0.1234, "verdict": "met"}]
    goals += [{"what": "speed", "goal": 4.0, "found": None, "verdict": "not measured"}]
    table = result_tables.gpu_goals({"date": "2026-01-01", "machine": "a card", "goals": goals})
    assert "| search (ms) | 0.15 | 0.123 | met |" in table and "| speed | 4 | - | not measured |" in table
