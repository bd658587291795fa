import json
import subprocess

import numpy as np
import PIL.Image
import pytest
from datasets import load_dataset

from diffusers_pq.cli import main
from diffusers_pq.emoji import NAMES, STYLES, captions, prepare_emoji, split_styles


ICON_SETS = ("flat", "noto", "twemoji")
EMOJI = [
    ("1F34E", "RED APPLE", "Food & Drink"),
    ("2764-FE0F", "HEAVY BLACK HEART", "Smileys & Emotion"),
    ("1F468-200D-1F692", "MAN FIREFIGHTER", "People & Body"),
    ("1F469-200D-1F692", "WOMAN FIREFIGHTER", "People & Body"),
    ("1F1EB-1F1F7", "FRANCE FLAG", "Flags"),
    ("1F3FD", "MEDIUM SKIN TONE", "Component"),
    *((f"1F{number:03X}", f"THING {number}", "Objects") for number in range(0x400, 0x428)),
]
SHORT_NAMES = {"2764": "red-heart", "1f34e": "red-apple"}
SQUARE = '<path fill="#f00" d="M2 2h4v4H2z"/>'


@pytest.fixture
def packages(tmp_path):
    """A `node_modules` in miniature: pictures of 3D emoji, and three sets of icons of which one is not square."""
    folder = tmp_path / "node_modules"
    for package in (*STYLES.values(), NAMES):
        (folder / package.name).mkdir(parents=True)
        about = {"name": package.name, "version": package.version, "license": f"Licence of {package.name}"}
        (folder / package.name / "package.json").write_text(json.dumps(about))
    (folder / NAMES.name / "LICENSE").write_text("Permission is hereby granted")
    keys = ("unified", "name", "category")
    (folder / NAMES.name / "emoji.json").write_text(json.dumps([dict(zip(keys, emoji)) for emoji in EMOJI]))
    for style in ICON_SETS:
        write_icons(folder / STYLES[style].name)
    assets = folder / STYLES["3d"].name / "assets"
    assets.mkdir()
    for code, name, _ in EMOJI:
        if name != "WOMAN FIREFIGHTER":
            PIL.Image.new("RGBA", (20, 20), (0, 0, 255, 128)).save(assets / f"{code.lower()}.webp", lossless=True)
    PIL.Image.new("RGBA", (20, 20)).save(assets / "1f468-1f3fd-200d-1f692.webp")
    (assets / "1f401.webp").write_bytes(b"no picture")
    return folder


def write_icons(folder):
    plain = [code.lower().replace("-fe0f", "") for code, _, _ in EMOJI]
    names = {code: SHORT_NAMES.get(code, f"icon-{code}") for code in plain}
    icons = {name: {"body": SQUARE} for name in names.values()}
    icons["red-heart"]["height"] = 4
    icons["icon-1f402"]["body"] = "<g>"
    (folder / "chars.json").write_text(json.dumps(names | {"1f468-1f3fd-200d-1f692": "icon-1f468-200d-1f692"}))
    (folder / "icons.json").write_text(json.dumps({"width": 8, "height": 8, "icons": icons}))


def rows_of(folder):
    files = [folder / split / "metadata.jsonl" for split in ("train", "validation", "test")]
    return {
        path.parent.name: [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        for path in files
    }


def test_makes_an_image_folder_of_all_styles_with_captions_and_credits(packages, tmp_path):
    counts = prepare_emoji(tmp_path / "data", packages, side=64)
    number = 4 * (len(EMOJI) - 2) - 1
    assert counts["skipped"] == 1 + len(ICON_SETS) and sum(counts.values()) == number
    dataset = load_dataset("imagefolder", data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    rows = [row for split in dataset.values() for row in split]
    assert {split: len(dataset[split]) for split in dataset} == {k: n for k, n in counts.items() if k in dataset}
    assert {row["image"].size for row in rows} == {(64, 64)}
    hearts = {row["style"]: row for row in rows if row["subject"] == "red heart"}
    assert set(hearts) == set(STYLES), "names that tell what is seen, not those of Unicode"
    assert hearts["noto"]["group"] == "Smileys & Emotion" and hearts["noto"]["source"] == "@iconify-json/noto"
    assert "a red heart, noto style" in hearts["noto"]["text"]
    assert not [row for row in rows if row["group"] in ("Flags", "Component") or "tone" in row["subject"]]
    credits = (tmp_path / "data" / "CREDITS.txt").read_text()
    assert all(f"Licence of {package.name}" in credits and package.author in credits for package in STYLES.values())
    assert "Permission is hereby granted" in credits


def test_pictures_are_squares_on_white_that_keep_their_proportions(packages, tmp_path):
    prepare_emoji(tmp_path / "data", packages, side=64, pair_share=0, subject_share=0)
    folder = tmp_path / "data" / "train"
    square, flat, translucent = (
        np.asarray(PIL.Image.open(folder / name)).astype(int)
        for name in ("1f34e-noto.png", "2764-flat.png", "1f34e-3d.png")
    )
    red, white = [255, 0, 0], [255, 255, 255]
    assert (square[17:47, 17:47] == red).all() and (square[:15] == white).all() and (square[:, 50:] == white).all()
    # The box of 8 x 4 lies in the middle of the square; the shape reaches out of it, to the lower edge.
    assert (flat[33:, 17:47] == red).all() and (flat[:31] == white).all() and (flat[:, 49:] == white).all()
    assert abs(translucent - [127, 127, 255]).max() <= 1


def test_held_out_pairs_are_seen_in_another_style_and_held_out_subjects_never(packages, tmp_path):
    prepare_emoji(tmp_path / "data", packages, side=8, pair_share=0.3, subject_share=0.2)
    rows = rows_of(tmp_path / "data")
    subjects = {split: {row["subject"] for row in rows[split]} for split in rows}
    assert subjects["validation"] and subjects["validation"] <= subjects["train"]
    assert subjects["test"] and not subjects["test"] & (subjects["train"] | subjects["validation"])
    pairs = [(row["subject"], row["style"]) for split in rows for row in rows[split]]
    assert len(set(pairs)) == len(pairs)


def test_the_shares_that_are_held_out_are_those_that_were_asked_for():
    motifs = [f"motif {number}" for number in range(2000)]
    splits = [split for motif in motifs for split in split_styles(motif, list(STYLES), 0.05, 0.03).values()]
    assert 0.04 < splits.count("validation") / len(splits) < 0.06
    assert 0.02 < splits.count("test") / len(splits) < 0.04
    assert set(split_styles("motif", ["noto"], 0.999, 0).values()) == {"train"}, "its only style"


def test_variants_of_an_emoji_are_on_the_same_side_whatever_else_there_is(packages, tmp_path):
    for share in (0.2, 0.5, 0.8):
        prepare_emoji(tmp_path / str(share), packages, side=8, pair_share=share, subject_share=share / 2)
        rows = rows_of(tmp_path / str(share))
        sides = {
            (row["file_name"][:5], row["style"]): split
            for split in rows
            for row in rows[split]
            if row["file_name"].startswith(("1f468", "1f469"))
        }
        for style in ICON_SETS:
            assert sides["1f468", style] == sides["1f469", style]


def test_captions_have_an_article_where_english_has_one():
    assert captions("red apple", "3d")[:2] == ["red apple, 3d style", "a red apple, 3d style"]
    assert "an eagle in flat style" in captions("eagle", "flat")
    assert "grapes in noto style" in captions("grapes", "noto")
    assert "a cactus in noto style" in captions("cactus", "noto")


def test_what_is_missing_is_said_in_one_line_and_nothing_is_written(packages, tmp_path, capsys, monkeypatch):
    command = ["prepare-data", str(tmp_path / "data"), "--source", "emoji"]
    given = [*command, "--packages-dir", str(packages)]
    cases = [([*given, "--tile-size", "64"], "--tile-size is for `--source debian` only")]
    cases += [([*command, "--packages-dir", str(tmp_path)], "@lobehub/fluent-emoji-3d is missing: --packages-dir")]
    for arguments, message in cases:
        assert main(arguments) == 1
        assert message in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    assert main(command) == 1
    assert "npm is needed to fetch the emoji: install Node.js, or run `npm install @lobehub" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "resvg_py", None)
    assert main(given) == 1
    assert 'pip install "diffusers_pq[emoji]"' in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_the_packages_are_installed_by_npm_without_their_scripts(packages, tmp_path, capsys, monkeypatch):
    commands = []

    def npm(command, cwd, **options):
        commands.append(command)
        if len(commands) > 1:
            return subprocess.CompletedProcess(command, 1, "", "npm error\nnpm error network\n")
        packages.rename(cwd / "node_modules")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("shutil.which", lambda tool: tool)
    monkeypatch.setattr("subprocess.run", npm)
    arguments = ["--source", "emoji", "--short-side", "16"]
    assert main(["prepare-data", str(tmp_path / "data"), *arguments]) == 0
    assert commands[0][:3] == ("npm", "install", "--ignore-scripts") and "emoji-datasource@16.0.0" in commands[0]
    assert PIL.Image.open(next((tmp_path / "data" / "train").glob("*.png"))).size == (16, 16)
    assert main(["prepare-data", str(tmp_path / "other"), *arguments]) == 1
    assert "npm error network" in capsys.readouterr().err and not (tmp_path / "other").exists()
