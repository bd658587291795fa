import json

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from datasets import load_dataset

from diffusers_pq.data_preparation import group_motifs, motif_name, prepare_dataset, signature


def painting(seed, size):
    """A picture of coloured patches that no other seed's is like."""
    patches = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return PIL.Image.fromarray(patches).resize(size, PIL.Image.Resampling.NEAREST)


@pytest.fixture
def packages(tmp_path):
    """Two unpacked packages in miniature: captioned stamps, and a wallpaper in two sizes; one file is damaged."""
    stamps = tmp_path / "packages" / "tuxpaint-stamps-default" / "usr/share/tuxpaint/stamps/animals"
    stamps.mkdir(parents=True)
    for number in range(30):
        painting(number, (40 + number, 30)).save(stamps / f"animal{number}.png")
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


def captions_by_split(folder):
    paths = {split: folder / split / "metadata.jsonl" for split in ("train", "validation")}
    return {
        split: {json.loads(line)["text"] for line in path.read_text().splitlines()} if path.is_file() else set()
        for split, path in paths.items()
    }


@pytest.mark.parametrize(
    "stem, motif",
    [
        ("Elephants_3840x2160", "elephants"),
        ("licorice-l", "licorice"),
        ("licorice-d", "licorice"),
        ("sedan_police_mirror", "sedan_police"),
        ("Clown_pt_BR", "clown"),
        ("clown-fr", "clown"),
        ("adwaita-d_5120x2880", "adwaita"),
        ("rabbit-2", "rabbit-2"),
        ("E_filled", "e_filled"),
    ],
)
def test_a_motifs_name_is_that_of_its_file_without_what_variants_differ_in(stem, motif):
    assert motif_name(stem) == motif


def test_no_near_duplicate_crosses_the_split(tmp_path):
    """Variants by name that look different, and variants by looks that are called differently."""
    folder = tmp_path / "packages" / "gnome-backgrounds" / "usr/share/backgrounds"
    other = tmp_path / "packages" / "mate-backgrounds" / "usr/share/backgrounds"
    folder.mkdir(parents=True)
    other.mkdir(parents=True)
    families = []
    for number in range(24):
        first = painting(number, (160, 100))
        first.save(folder / f"hill{number}-l.png")
        painting(1000 + number, (160, 100)).save(folder / f"hill{number}-d.png")
        PIL.ImageOps.mirror(first).save(other / f"slope{number}.png")
        noise = np.random.default_rng(number).normal(0, 6, (50, 80, 3))
        darker = np.asarray(first.resize((80, 50)), float) * 0.6 + 10 + noise
        PIL.Image.fromarray(darker.clip(0, 255).astype(np.uint8)).save(other / f"dusk{number}.jpg", quality=60)
        families.append({f"hill{number} l", f"hill{number} d", f"slope{number}", f"dusk{number}"})
    for share in (0.2, 0.5):
        prepare_dataset(tmp_path / str(share), tmp_path / "packages", validation_share=share)
        sides = captions_by_split(tmp_path / str(share))
        assert sum(map(len, sides.values())) == 4 * 24
        assert all(family <= sides["train"] or family <= sides["validation"] for family in families)
        assert share / 2 < len(sides["validation"]) / 96 < 2 * share
        pictures = {split: list((tmp_path / str(share) / split).glob("*.png")) for split in sides}
        held_out, trained = (
            np.stack([signature(PIL.Image.open(path)).ravel() for path in pictures[split]])
            for split in ("validation", "train")
        )
        assert (held_out @ trained.T).max() < 0.9
    prepare_dataset(tmp_path / "file", tmp_path / "packages", validation_share=0.5, split_by="file")
    sides = captions_by_split(tmp_path / "file")
    assert any(family & sides["train"] and family & sides["validation"] for family in families)
    with pytest.raises(ValueError, match="`split_by` must be one of motif, file, but is 'name'"):
        prepare_dataset(tmp_path / "name", tmp_path / "packages", split_by="name")


def test_pictures_of_one_colour_are_one_motif():
    flat = [signature(PIL.Image.new("RGB", (20, 20), colour)) for colour in ("white", "navy")]
    assert group_motifs(["b", "a", "c"], np.stack([*flat, signature(painting(0, (20, 20)))])) == ["a", "a", "c"]
