import json

import PIL.Image
import pytest
from datasets import load_dataset

from diffusers_pq.data_preparation import prepare_dataset


@pytest.fixture
def packages(tmp_path):
    """Two unpacked packages in miniature: captioned stamps, and a wallpaper in two sizes; one file is damaged."""
    stamps = tmp_path / "packages" / "tuxpaint-stamps-default" / "usr/share/tuxpaint/stamps/animals"
    stamps.mkdir(parents=True)
    for number in range(30):
        PIL.Image.new("RGBA", (40 + number, 30), (number, 0, 0, 255)).save(stamps / f"animal{number}.png")
        (stamps / f"animal{number}.txt").write_text(f"Animal number {number}.\nfr.utf8=Un animal\n")
    (stamps / "damaged.png").write_bytes(b"\x89PNG no picture")
    wallpaper = tmp_path / "packages" / "plasma-workspace-wallpapers" / "usr/share/wallpapers/EveningGlow/contents"
    (wallpaper / "images").mkdir(parents=True)
    PIL.Image.effect_noise((160, 100), 50).save(wallpaper / "images" / "160x100.png")
    PIL.Image.effect_noise((80, 50), 50).save(wallpaper / "images" / "80x50.png")
    PIL.Image.new("RGB", (10, 10)).save(wallpaper / "screenshot.png")
    doc = tmp_path / "packages" / "tuxpaint-stamps-default" / "usr/share/doc/tuxpaint-stamps-default"
    doc.mkdir(parents=True)
    (doc / "copyright").write_text("License: public domain")
    return tmp_path / "packages"


def test_makes_an_image_folder_with_captions_and_credits(packages, tmp_path):
    counts = prepare_dataset(tmp_path / "data", packages, short_side=50, validation_share=0.2)
    assert counts["train"] + counts["validation"] == 31 and counts["skipped"] == 1
    assert counts["train"] > counts["validation"] > 0
    dataset = load_dataset("imagefolder", data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    rows = {row["text"]: row["image"] for split in dataset.values() for row in split}
    assert set(rows) == {f"Animal number {number}." for number in range(30)} | {"Evening Glow"}
    assert rows["Evening Glow"].size == (80, 50), "the largest size, shrunk to the short side"
    assert rows["Animal number 7."].size == (47, 30), "small pictures keep their size"
    categories = {row["category"] for split in dataset.values() for row in split if row["text"] != "Evening Glow"}
    assert categories == {"animals"}
    assert "public domain" in (tmp_path / "data" / "CREDITS.txt").read_text()


def test_the_split_does_not_depend_on_the_other_pictures(packages, tmp_path):
    prepare_dataset(tmp_path / "all", packages, validation_share=0.3)
    for number in range(0, 30, 2):
        (packages / f"tuxpaint-stamps-default/usr/share/tuxpaint/stamps/animals/animal{number}.png").unlink()
    prepare_dataset(tmp_path / "half", packages, validation_share=0.3)

    def captions(folder):
        lines = (tmp_path / folder / "validation" / "metadata.jsonl").read_text().splitlines()
        return {json.loads(line)["text"] for line in lines}

    assert captions("half") <= captions("all")


def test_tiles_cover_large_pictures_and_keep_small_ones_whole(packages, tmp_path):
    prepare_dataset(tmp_path / "tiled", packages, validation_share=0, tile_size=60)
    lines = (tmp_path / "tiled/train/metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    tiles = [
        PIL.Image.open(tmp_path / "tiled/train" / row["file_name"]) for row in rows if row["text"] == "Evening Glow"
    ]
    assert [tile.size for tile in tiles] == [(80, 100), (80, 100)]
    assert len(rows) == 30 + 2
    source = PIL.Image.open(next(packages.rglob("160x100.png"))).convert("RGB")
    assert [tile.tobytes() for tile in tiles] == [source.crop((left, 0, left + 80, 100)).tobytes() for left in (0, 80)]
