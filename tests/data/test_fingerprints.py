import shutil

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_config

from diffusers_pq import PQModel
from diffusers_pq.data.fingerprints import fingerprint_files, fingerprint_rows
from diffusers_pq.data.latent_cache import encode_dataset
from diffusers_pq.data.pictures import Crops, PictureSource


def noise(seed, side=40):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "pictures"
    path.mkdir()
    for number in range(3):
        noise(number).save(path / f"{number}.png")
    captions(path, "red")
    return path


def captions(folder, first):
    lines = [
        f'{{"file_name": "{number}.png", "text": "{word}"}}' for number, word in enumerate([first, "green", "blue"])
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def rows(folder):
    cache = str(folder.parent / "cache")
    return PictureSource(data_dir=str(folder), cache_dir=cache).load("train", "text")


def test_rows_have_the_same_fingerprint_wherever_they_lie(folder, tmp_path):
    found = fingerprint_rows(rows(folder))
    shutil.copytree(folder, tmp_path / "copy" / "elsewhere")
    assert fingerprint_rows(rows(tmp_path / "copy" / "elsewhere")) == found == fingerprint_rows(rows(folder))
    assert fingerprint_rows(rows(folder).select([0, 2, 1])) != found, "another order"
    assert fingerprint_rows(rows(folder).take(2)) != found


def test_another_caption_or_picture_changes_the_fingerprint(folder):
    found = fingerprint_rows(rows(folder))
    captions(folder, "RED")
    recaptioned = fingerprint_rows(rows(folder))
    noise(9).save(folder / "1.png")
    assert len({found, recaptioned, fingerprint_rows(rows(folder))}) == 3


def test_pictures_within_a_dataset_count_as_files_do(folder):
    embedded = rows(folder).to_list()
    for row in embedded:
        with open(row["image"]["path"], "rb") as file:
            row["image"] = {"bytes": file.read(), "path": None}
    dataset = datasets.Dataset.from_list(embedded, features=rows(folder).features)
    assert fingerprint_rows(dataset) == fingerprint_rows(rows(folder))


@pytest.mark.parametrize("place", [0, 150_000, 299_999])
def test_of_large_pictures_the_beginning_middle_and_end_are_read(place):
    data = bytearray(300_000)
    features = datasets.Features({"image": datasets.Image(decode=False)})

    def fingerprint():
        value = {"bytes": bytes(data), "path": None}
        return fingerprint_rows(datasets.Dataset.from_dict({"image": [value]}, features=features))

    before = fingerprint()
    data[place] = 1
    assert fingerprint() != before


def test_files_of_a_stream_are_told_apart(tmp_path):
    shard = tmp_path / "0.tar"
    shard.write_bytes(b"one")
    before = fingerprint_files([str(shard)])
    shard.write_bytes(b"two")
    assert fingerprint_files([str(shard)]) != before
    assert fingerprint_files(["hf://datasets/a@1/0.tar"]) != fingerprint_files(["hf://datasets/a@2/0.tar"])


def test_codes_of_pictures_or_captions_that_were_changed_are_refused(folder, tmp_path):
    torch.manual_seed(0)
    vae = PQModel(**tiny_config()).eval()
    crops = Crops("image", 32, center_crop=True)

    def encode():
        return encode_dataset(vae, rows(folder), crops, "text", tmp_path / "codes", Accelerator(cpu=True))

    assert encode()["written"] == 1 and encode()["written"] == 0
    captions(folder, "RED")
    with pytest.raises(ValueError, match="rows_sha256 .*pictures or captions were changed"):
        encode()
    captions(folder, "red")
    assert encode()["written"] == 0
    noise(9).save(folder / "1.png")
    with pytest.raises(ValueError, match="rows_sha256"):
        encode()


def test_codes_without_a_fingerprint_get_it(folder, tmp_path, caplog):
    torch.manual_seed(0)
    arguments = PQModel(**tiny_config()).eval(), rows(folder), Crops("image", 32), "text"
    encode_dataset(*arguments, tmp_path / "codes", Accelerator(cpu=True))
    index = tmp_path / "codes" / "32" / "latents.json"
    with_fingerprint = index.read_text()
    lines = [line for line in with_fingerprint.splitlines() if "rows_sha256" not in line]
    index.write_text("\n".join(lines).replace(",\n}", "\n}"))
    encode_dataset(*arguments, tmp_path / "codes", Accelerator(cpu=True))
    assert "does not say of which pictures" in caplog.text and index.read_text() == with_fingerprint
