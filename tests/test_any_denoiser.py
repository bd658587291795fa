"""The tables of docs/any_denoiser.md say what the package has."""

import re
from pathlib import Path

import pytest

import diffusers_pq
from diffusers_pq.models.widening import ENDS
from diffusers_pq.training.families import FAMILIES


PAGE = (Path(__file__).parents[1] / "docs" / "any_denoiser.md").read_text(encoding="utf-8")
# What a row's family is called in the names of classes of diffusers.
NAMES = {
    "Stable Diffusion 1.x, 2.x": "StableDiffusion",
    "Stable Diffusion XL": "StableDiffusionXL",
    "Stable Diffusion 3, 3.5": "StableDiffusion3",
    "Flux.1": "Flux",
    "Flux.2": "Flux2",
    "Flux.2 Klein": "Flux2Klein",
    "Flux.2 Klein, base": "Flux2KleinBase",
    "Qwen-Image": "QwenImage",
    "Z-Image": "ZImage",
}
TASKS = {"": "text-to-image", "Img2Img": "image-to-image", "Inpaint": "inpainting"}


def table(title: str) -> dict[str, list[str]]:
    """The rows of the first table after a heading, by their first cells."""
    lines = PAGE.partition(f"## {title}\n")[2].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| ---"))
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return {first: rest for first, *rest in rows}


def test_the_table_of_ends_has_every_class():
    assert {re.match("`(.*?)`", row)[1] for row in table("Families")} == set(ENDS)


def test_the_table_of_families_has_a_row_for_each():
    blocks = {name.removesuffix("PQBlocks") for name in diffusers_pq._PUBLIC if name.endswith("PQBlocks")}
    trained = {family.pipeline_class.__name__.removesuffix("Pipeline") for family in FAMILIES}
    rows = table("From weights to pictures")
    assert set(NAMES.values()) == blocks | trained and list(rows) == [*NAMES, "the other classes above"]


@pytest.mark.parametrize("row", NAMES)
def test_a_row_of_the_table_of_families_is_true(row):
    widen, pipelines, train, lora, modular = table("From weights to pictures")[row]
    public, name = diffusers_pq._PUBLIC, NAMES[row]
    assert widen == "yes"
    tasks = [task for ending, task in TASKS.items() if f"{name}PQ{ending}Pipeline" in public]
    assert pipelines == (", ".join(tasks) or "-")
    is_trained = any(family.pipeline_class.__name__ == f"{name}Pipeline" for family in FAMILIES)
    assert train == lora == ("yes" if is_trained else "-")
    assert (modular != "-") == (f"{name}PQBlocks" in public)
    if modular != "-":
        blocks = getattr(diffusers_pq, f"{name}PQBlocks")()
        encoder = blocks.sub_blocks.get("vae_encoder")
        assert ("image-to-image" in modular) == (encoder is not None)
        assert ("inpainting" in modular) == (encoder is not None and "inpaint" in encoder.sub_blocks)
