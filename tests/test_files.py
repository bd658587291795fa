import pytest

from diffusers_pq.autoencoders import create_autoencoder, load_autoencoder
from diffusers_pq.data.pictures import load_images
from diffusers_pq.evaluation.systems import load_for_evaluation
from diffusers_pq.files import read_json


@pytest.mark.parametrize("text, message", [("{", "is no valid JSON"), ("\ufeff{}", "is no valid JSON")])
def test_a_file_that_is_no_json_is_named(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"config.json {message}"):
        read_json(tmp_path / "config.json")


def test_a_file_that_is_missing_or_holds_something_else_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.json is missing"):
        read_json(tmp_path / "absent.json")
    (tmp_path / "config.json").write_text("[1]")
    assert read_json(tmp_path / "config.json") == [1]
    with pytest.raises(ValueError, match="config.json must hold a JSON dict, but holds a list"):
        create_autoencoder(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    "load",
    [
        load_autoencoder,
        create_autoencoder,
        load_for_evaluation,
        lambda name: load_images(name, None, "image", "train"),
        lambda name: load_images(None, name, "image", "train"),
    ],
)
@pytest.mark.parametrize("name", ["absent", "runs/absent", "a/b/absent"])
def test_a_folder_that_does_not_exist_is_said_not_to(load, name):
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        load(name)
