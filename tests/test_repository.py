import re
import subprocess
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[1]


def test_the_tracked_files_are_light_to_clone():
    if not (ROOT / ".git").exists():
        pytest.skip("no clone")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sizes = [(ROOT / name).stat().st_size for name in listed.split("\0") if name and (ROOT / name).is_file()]
    assert sum(sizes) < 48 * 2**20


def test_no_file_holds_the_marks_of_a_merge():
    folders = ("docs", "src", "pipelines", "training_scripts", "experiments", "benchmarks", "tests", "spaces")
    files = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md", ".yaml")
    ]
    marked = [path for path in files if re.search("^(<{7}|>{7}) ", path.read_text(encoding="utf-8"), re.MULTILINE)]
    assert not marked


def test_the_front_page_is_short_and_has_a_light_picture():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) <= 120
    (picture,) = re.findall(r"!\[.+\]\((.+)\)", page)
    assert (ROOT / picture).stat().st_size < 400_000


def test_the_autoencoder_of_a_pipeline_is_the_same_file_as_alone():
    name = "diffusion_pytorch_model.safetensors"
    cards = ROOT / "model_cards"
    assert (cards / "pqsd-mini" / "vae" / name).read_bytes() == (cards / "pqgan-mini-f8-pq" / name).read_bytes()


def test_the_citation_names_the_paper_and_its_authors():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["license"] == "Apache-2.0" and {"cff-version", "message", "title", "authors"} <= citation.keys()
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Zavadski", "Tatsch", "Rother"]


def test_no_file_holds_the_marks_of_a_merge_conflict():
    if not (ROOT / ".git").exists():
        pytest.skip("no clone")
    found = subprocess.run(
        ["git", "grep", "-nIE", "^(<<<<<<<|>>>>>>>) "], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 1, found.stdout
