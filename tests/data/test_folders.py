"""Folders of pictures are read whole, in a fixed order, whatever their files and folders are called."""

import json
import logging
import zipfile

import datasets
import PIL.Image
import pytest

from diffusers_pq.data.folders import PictureFolder
from diffusers_pq.data.pictures import BadImageError, PictureSource, decode_image


@pytest.fixture
def folder(tmp_path):
    """Makes pictures, each of another colour, and metadata files below a folder."""

    def make(*names, **metadata):
        for number, name in enumerate(names):
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
        for place, rows in metadata.items():
            path = tmp_path / "data" / place.replace("top", ".") / "metadata.jsonl"
            path.write_text("".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows))
        return tmp_path / "data"

    return make


def load(folder, split="train", *columns, **options):
    cache_dir = str(folder.parent / "cache")
    return PictureSource(data_dir=str(folder), cache_dir=cache_dir, **options).load(split, *columns)


def names(dataset, folder):
    return [row["image"]["path"].removeprefix(f"{folder}/") for row in dataset]


@pytest.mark.parametrize(
    "files",
    [
        ["bus.jpg", "cat.jpg", "test.jpg", "train station.jpg", "validation-1.jpg"],
        ["bus/1.jpg", "bus/2.jpg", "car/1.jpg", "train/1.jpg"],
        ["holiday/1.jpg", "holiday/2.jpg", "test shots/1.jpg"],
        ["more/2.jpg", "more/3.jpg", "train/1.jpg"],
        ["a/1.jpg", "a/2.avif", "a/3.JPG"],
        ["a/test/1.jpg", "a/val/2.jpg", "dev/3.jpg", "eval/4.jpg"],
        ["a [1]/x*.png", "a {b}/?.png", "a::b.png"],
    ],
    ids=lambda files: files[-1],
)
def test_no_name_leaves_a_picture_out(files, folder):
    path = folder(*files)
    rows = load(path)
    assert names(rows, path) == sorted(files) and load(path, "test") is None
    assert [decode_image(row["image"]).size for row in rows] == [(8, 8)] * len(files)
    assert names(load(path, streaming=True), path) == sorted(files)
    assert len(PictureSource(str(path)).load("train")) == len(files)


def test_folders_at_the_top_are_splits(folder):
    path = folder("train/1.png", "val/2.png", "test/deep/3.png", "4.png", "extra/validation/5.png")
    splits = {split: names(load(path, split), path) for split in ("train", "validation", "test")}
    assert splits == {
        "train": ["4.png", "extra/validation/5.png", "train/1.png"],
        "validation": ["val/2.png"],
        "test": ["test/deep/3.png"],
    }


def test_a_tree_of_pictures_is_read_in_the_order_in_which_datasets_reads_it(folder, tmp_path):
    path = folder("train/a/3.png", "train/a-b/3.png", "train/[x].png", "train/10.png", "train/9.png", "train/B/1.png")
    theirs = datasets.load_dataset("imagefolder", data_dir=str(path), cache_dir=str(tmp_path), drop_labels=True)
    theirs = theirs["train"].cast_column("image", datasets.Image(decode=False))
    assert names(load(path), path) == names(theirs, path)


def test_classes_are_the_names_of_folders_of_all_splits(folder):
    path = folder("train/dog/1.png", "train/cat/2.png", "validation/bird/3.png")
    rows = load(path, "train", "label")
    assert rows.features["label"].names == ["bird", "cat", "dog"] and rows["label"] == [1, 2]
    assert load(path, "validation", "label")["label"] == [0]


@pytest.mark.parametrize("files", [["train/1.png", "validation/2.png"], ["1.png", "a/2.png"], ["a/1.png"]], ids=str)
def test_folders_that_are_no_classes_give_no_label(files, folder):
    with pytest.raises(ValueError, match="no column 'label'; the dataset has image"):
        load(folder(*files), "train", "label")


def test_unlisted_pictures_are_read_unless_captions_are_needed(folder, caplog):
    path = folder("train/1.png", "train/2.png", "train/3.png", "more/4.png", train=[("3.png", "c"), ("1.png", "a")])
    caplog.set_level(logging.INFO)
    assert names(load(path), path) == ["train/3.png", "train/1.png", "more/4.png", "train/2.png"]
    assert "4 pictures in the split 'train'" in caplog.text
    caplog.clear()
    with_captions = load(path, "train", "text")
    assert names(with_captions, path) == ["train/3.png", "train/1.png"] and with_captions["text"] == ["c", "a"]
    assert "no metadata file lists them: 2 pictures, 4.png, 2.png" in caplog.text
    assert "2 pictures in the split 'train'" in caplog.text


def test_metadata_at_the_top_may_list_the_pictures_of_all_splits(folder):
    path = folder("train/1.png", "validation/2.png", top=[("validation/2.png", "b"), ("train/1.png", "a")])
    assert load(path, "train", "text")["text"] == ["a"] and load(path, "validation", "text")["text"] == ["b"]


def test_several_metadata_files_are_read_in_the_order_of_their_paths(folder):
    files = [f"{letter}/{number}.png" for letter in "edcba" for number in (2, 1)]
    rows = {letter: [(f"{number}.png", f"{letter}{number}") for number in (2, 1)] for letter in "edcba"}
    captions = load(folder(*files, **rows), "train", "text")["text"]
    assert captions == ["a2", "a1", "b2", "b1", "c2", "c1", "d2", "d1", "e2", "e1"]


def test_links_are_followed_but_not_round_in_circles(folder, tmp_path):
    path = folder("a/1.png")
    (tmp_path / "elsewhere").mkdir()
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "elsewhere" / "2.png")
    (path / "b").symlink_to(tmp_path / "elsewhere")
    (path / "a" / "round").symlink_to(path)
    (tmp_path / "link").symlink_to(path)
    assert names(load(path), path) == ["a/1.png", "b/2.png"]
    assert names(load(tmp_path / "link"), tmp_path / "link") == ["a/1.png", "b/2.png"]


def test_a_link_that_leads_nowhere_is_a_bad_picture_and_not_passed_over(folder, tmp_path):
    data = folder("a.png")
    (data / "b.png").symlink_to(tmp_path / "gone.png")
    rows = load(data)
    assert names(rows, data) == ["a.png", "b.png"]
    with pytest.raises(BadImageError, match="b.png cannot be read: .*No such file"):
        decode_image(rows[1]["image"])


def test_hidden_files_and_other_kinds_are_no_pictures(folder, caplog):
    path = folder("1.png", ".2.png", "__MACOSX/3.png", ".thumbnails/4.png")
    (path / "notes.txt").write_text("x")
    (path / "5.heic").write_text("x")
    caplog.set_level(logging.INFO)
    assert names(load(path), path) == ["1.png"]
    assert "Files of other kinds, not read: 1 .heic, 1 .txt." in caplog.text.replace(
        "1 .txt, 1 .heic", "1 .heic, 1 .txt"
    )


def test_archives_are_read(folder, tmp_path):
    path = folder("1.png")
    for split in ("train", "validation"):
        with zipfile.ZipFile(path / f"{split}.zip", "w") as archive:
            archive.write(path / "1.png", "2.png")
    assert len(load(path)) == 2 and len(load(path, "validation")) == 1


def test_a_folder_that_is_missing_or_empty_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no pictures"):
        load(tmp_path / "empty")


def test_a_dataset_folder_with_a_card_or_shards_is_left_to_datasets(folder):
    path = folder("data/1.png")
    assert PictureFolder(path).is_dataset_of_pictures()
    (path / "README.md").write_text("---\nconfigs: []\n---\n")
    assert not PictureFolder(path).is_dataset_of_pictures()


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("metadata.jsonl", b'{"file_name": "a.png", "text": \n', "JSON parse error"),
        ("metadata.jsonl", b"[1, 2]\n", "JSON parse error"),
        ("metadata.jsonl", b'{"name": "a.png"}\n', "`file_name`"),
        ("metadata.jsonl", b'{"file_name": 7}\n', "`file_name`"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "caf\xe9"}\n', "utf-8"),
        ("metadata.jsonl", b"\n\n", "no rows"),
        ("metadata.csv", b"file_name,text\n", "no rows"),
        ("metadata.parquet", b"text", "Parquet"),
    ],
)
def test_metadata_that_cannot_be_read_are_named(name, content, reason, folder):
    path = folder("a.png", "good/b.png", good=[("b.png", "b")])
    (path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{path / name} cannot be read as metadata of pictures: .*{reason}"):
        load(path)


def test_an_empty_metadata_file_says_nothing_of_the_pictures(folder):
    path = folder("a.png")
    (path / "metadata.jsonl").touch()
    assert names(load(path), path) == ["a.png"]
    with pytest.raises(ValueError, match="no column 'text'"):
        load(path, "train", "text")


def test_pictures_that_are_listed_but_not_there_are_warned_of(folder, caplog):
    load(folder("a.png", top=[("a.png", "a"), ("b.png", "b")]), "train", "text")
    assert "listed, but not there: 1 pictures, b.png" in caplog.text


def test_what_a_folder_holds_is_logged_once(folder, caplog):
    path = folder("a.png")
    with caplog.at_level(logging.INFO):
        load(path)
        load(path)
    assert caplog.text.count("1 pictures in the split 'train'") == 1
