import json
import os
import socket
import time

import PIL.Image
import pytest
from conftest import tiny_config
from huggingface_hub import close_session, constants

from diffusers_pq import PQModel, files
from diffusers_pq.autoencoders import create_autoencoder, load_autoencoder
from diffusers_pq.cli import main
from diffusers_pq.conversion import load_original_autoencoder
from diffusers_pq.data.pictures import PictureSource
from diffusers_pq.evaluation.systems import load_for_evaluation
from diffusers_pq.files import (
    check_output,
    check_output_folder,
    folder_or_hub,
    naming,
    read_json,
    replacing,
    write_text,
)
from diffusers_pq.metrics import load_metrics


@pytest.mark.parametrize(
    "text, message",
    [("{", "is not valid JSON"), ("\ufeff{}", "is not valid JSON"), ("[" * 100_000, "is not valid JSON")],
)
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
        lambda name: PictureSource(name).load("train"),
        lambda name: PictureSource(data_dir=name).load("train"),
    ],
)
@pytest.mark.parametrize("name", ["absent", "runs/absent", "a/b/absent"])
def test_a_folder_that_does_not_exist_is_said_not_to(load, name):
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        load(name)


@pytest.mark.parametrize("name", ["", "/absent", "a/b/absent", "a b"])
def test_the_hub_is_not_asked_for_what_can_be_no_repository(name, monkeypatch):
    monkeypatch.setattr(files, "hub_is_reachable", lambda: pytest.fail("the Hub was asked"))
    with pytest.raises(FileNotFoundError, match=f"^The folder {name} does not exist.$"), folder_or_hub(name):
        pass


def test_a_file_is_replaced_by_a_whole_one_only(tmp_path):
    write_text(tmp_path / "new" / "file.txt", "one")
    with pytest.raises(KeyError), replacing(tmp_path / "new" / "file.txt") as unfinished:
        unfinished.write_text("half")
        raise KeyError
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file.txt"]
    assert (tmp_path / "new" / "file.txt").read_text() == "one"


@pytest.mark.parametrize("kind", ["fifo", "link", "dangling link", "folder"])
def test_what_is_no_regular_file_is_not_replaced(kind, tmp_path):
    output, target = tmp_path / "output", tmp_path / "target"
    if kind == "fifo":
        os.mkfifo(output)
    elif kind == "folder":
        output.mkdir()
    else:
        output.symlink_to(target)
        if kind == "link":
            target.write_text("mine")
    before = os.lstat(output)
    with pytest.raises(ValueError, match=f"The output {output} is (not a regular file|a link|a folder)"):
        write_text(output, "text")
    after = os.lstat(output)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert target.exists() == (kind == "link") and (kind != "link" or target.read_text() == "mine")


def test_nothing_is_written_through_a_link_in_the_place_of_the_unfinished_file(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".unfinished-output").symlink_to(tmp_path / "mine")
    write_text(tmp_path / "output", "text")
    assert (tmp_path / "mine").read_text() == "mine" and (tmp_path / "output").read_text() == "text"


@pytest.mark.parametrize("command", ["reconstruct", "compress", "decompress"])
@pytest.mark.parametrize("other_name", [False, True])
def test_a_command_does_not_overwrite_its_input(command, other_name, tmp_path, capsys):
    PQModel(**tiny_config()).save_pretrained(tmp_path / "model")
    PIL.Image.new("RGB", (16, 16)).save(tmp_path / "photo.png")
    output = tmp_path / "photo.png"
    if other_name:
        output = tmp_path / "hard-link.png"
        os.link(tmp_path / "photo.png", output)
    before = output.read_bytes()
    arguments = [command, str(tmp_path / "photo.png"), "--model", str(tmp_path / "model"), "--output", str(output)]
    assert main(arguments) == 1 and "is the input, which would be overwritten" in capsys.readouterr().err
    assert output.read_bytes() == before


@pytest.fixture
def without_network(monkeypatch, tmp_path):
    """Counts the tries to reach a host, all of which fail."""
    tries = []

    def refuse(host, *args, **kwargs):
        tries.append(host)
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    close_session()  # that of the tests refuses by itself
    yield tries
    close_session()


@pytest.mark.parametrize(
    "load",
    [
        load_autoencoder,
        lambda name: load_metrics(["cmmd"]),
        lambda name: load_original_autoencoder(f"{name}:last.ckpt"),
    ],
)
def test_the_hub_is_tried_once_where_it_cannot_be_reached(load, without_network):
    started = time.perf_counter()
    try:
        load("nobody/absent")
    except OSError:
        pass
    assert 1 <= len(without_network) <= 2 and time.perf_counter() - started < 5
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("content", ["[1]", "7", "null", "{", ""])
@pytest.mark.parametrize("place", ["config.json", "model_index.json", "vae/config.json"])
def test_a_configuration_that_is_no_json_object_is_named(place, content, tmp_path):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text(content)
    with pytest.raises(ValueError, match=place), folder_or_hub(tmp_path):
        pass


@pytest.mark.parametrize("load", [load_autoencoder, create_autoencoder, load_for_evaluation])
def test_a_model_with_a_list_for_a_configuration_is_refused(load, tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="config.json must hold a JSON dict, but holds a list"):
        load(str(tmp_path))


@pytest.mark.parametrize("place", ["file", "file/below", "file/a/b"])
def test_an_output_folder_that_a_file_is_in_the_way_of_is_refused(place, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"The output folder .*{place} cannot be made, since .*file is a file"):
        check_output_folder(tmp_path / place)
    check_output_folder(tmp_path / "new" / "folder")
    with pytest.raises(ValueError, match="file is a file"):
        check_output(tmp_path / "file" / "picture.png")


def test_a_folder_that_is_given_for_a_json_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} is a folder: name a JSON file"):
        read_json(tmp_path)


def test_a_pipeline_that_is_given_for_an_autoencoder_says_where_that_is(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(OSError, match=f"{tmp_path} holds a pipeline: name the autoencoder in it, {tmp_path / 'vae'}"):
        load_autoencoder(str(tmp_path))


@pytest.mark.parametrize(
    "values", [{"norm_num_groups": 3}, {"block_out_channels": ["8", 8, 16]}, {"act_fn": 7}], ids=str
)
@pytest.mark.parametrize("place", ["", "config.json"])
def test_a_configuration_of_no_network_is_named(place, values, tmp_path):
    config = {"_class_name": "PQModel"} | tiny_config() | values
    (tmp_path / "config.json").write_text(json.dumps(config, default=list))
    with pytest.raises(ValueError, match=f"^{tmp_path / place}: "):
        create_autoencoder(str(tmp_path / place))


def test_errors_that_say_nothing_of_a_configuration_stay_as_they_are():
    with pytest.raises(FileNotFoundError, match="^absent$"), naming("config.json"):
        raise FileNotFoundError("absent")
