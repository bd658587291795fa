import hashlib
import json
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest

from diffusers_pq import photographs
from diffusers_pq.cli import main
from diffusers_pq.data_preparation import PACKAGES
from diffusers_pq.evaluation.data import EvaluationData
from diffusers_pq.photographs import TEST_PHOTOGRAPHS


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Unpacked packages with a photograph of noise in each place, whose digests are those that are expected."""
    source = tmp_path / "packages"
    expected = {}
    for number, (name, photograph) in enumerate(TEST_PHOTOGRAPHS.items()):
        path = source / photograph.package / photograph.path
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (60, 90, 3), dtype=np.uint8)
        PIL.Image.fromarray(noise).save(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        expected[name] = replace(photograph, sha256=digest[:16])
        doc = source / photograph.package / "usr/share/doc" / photograph.package
        doc.mkdir(parents=True, exist_ok=True)
        (doc / "copyright").write_text(f"Licences of {photograph.package}")
    monkeypatch.setattr(photographs, "TEST_PHOTOGRAPHS", expected)
    return source


def test_the_test_set_is_sixteen_photographs_of_packages_that_are_not_trained_on():
    assert len(TEST_PHOTOGRAPHS) == 16
    assert not {photograph.package for photograph in TEST_PHOTOGRAPHS.values()} & set(PACKAGES)
    assert all(photograph.author and photograph.licence for photograph in TEST_PHOTOGRAPHS.values())


def test_the_command_writes_the_test_set_with_its_credits(packages, tmp_path, capsys):
    flags = ["prepare-test-set", str(tmp_path / "out"), "--packages-dir", str(packages), "--short-side", "40"]
    assert main(flags) == 0
    assert "16 photographs, split test" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out" / "test" / "metadata.jsonl").read_text().splitlines()]
    assert rows[0] == {
        "file_name": "bridge.png",
        "text": "bridge",
        "author": "Sander Klootwijk",
        "licence": "CC BY-SA 4.0",
        "source": "lomiri-wallpapers-16.04",
    }
    assert {PIL.Image.open(path).size for path in (tmp_path / "out" / "test").glob("*.png")} == {(60, 40)}
    assert "Licences of palapeli-data" in (tmp_path / "out" / "CREDITS.txt").read_text()
    (batch,) = EvaluationData(data_dir=str(tmp_path / "out"), split="test", resolution=32).loader(16)
    assert batch.shape == (16, 3, 32, 32)
    assert main(flags) == 1 and "exists already" in capsys.readouterr().err


def test_another_picture_than_the_chosen_one_is_refused(packages, tmp_path, capsys):
    path = packages / TEST_PHOTOGRAPHS["castle"].package / TEST_PHOTOGRAPHS["castle"].path
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["prepare-test-set", str(tmp_path / "out"), "--packages-dir", str(packages)]) == 1
    assert "castle-maintenon.jpg is another file than the photograph of the test set" in capsys.readouterr().err
    path.unlink()
    assert main(["prepare-test-set", str(tmp_path / "out"), "--packages-dir", str(packages)]) == 1
    assert "castle-maintenon.jpg is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
