"""The tables of the pages are those of the JSON files; nobody types a number."""

import pytest
from update_pages import BLOCKS, pages, updated


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
