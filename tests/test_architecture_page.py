"""docs/architecture.md names files and code that exist."""

import pydoc
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
SPANS = sorted(set(re.findall(r"`([^`\n]+)`", PAGE)))
NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
# Neither files nor names.
VALUES = {
    "[3, R, R]",
    "[B, d, H/F, W/F]",
    '"latent"',
    "quantize_latents",
    "vae",
    "__call__",
    "training",
    "diffusers_pq",
}


def exists(span):
    if (ROOT / span).exists() or (ROOT / "training_scripts" / span).exists():
        return True
    return bool(NAME.fullmatch(span)) and any(pydoc.locate(f"{package}{span}") for package in ("diffusers_pq.", ""))


@pytest.mark.parametrize("span", [span for span in SPANS if span not in VALUES])
def test_what_the_page_names_exists(span):
    assert exists(span), f"docs/architecture.md names `{span}`, which does not exist"


def test_what_does_not_exist_is_found():
    assert not exists("training.pqgan.train_vqgan") and not exists("experiments/sweep_vqgan.py")


def test_each_walk_has_ten_steps():
    walks = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    assert [len(re.findall(r"^\d+\. ", walk, re.MULTILINE)) for walk in walks] == [10, 10, 10]
