import json

import pytest
from conftest import tiny_config

from diffusers_pq import PQModel
from diffusers_pq.cli import main
from diffusers_pq.hub.code import write_code


@pytest.fixture
def old_model(tmp_path):
    """A folder that an earlier version has saved: no code, no `auto_map`."""
    folder = tmp_path / "model"
    PQModel(**tiny_config()).save_pretrained(folder)
    (folder / "diffusers_pq.py").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def test_the_command_writes_what_saving_writes(old_model, tmp_path, capsys):
    PQModel(**tiny_config()).save_config(tmp_path / "saved")
    (old_model / "best").mkdir()
    (old_model / "best/config.json").write_text('{"_class_name": "PQModel"}')
    assert main(["write-code", str(old_model)]) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [str(old_model / "best/diffusers_pq.py"), str(old_model / "diffusers_pq.py")]
    for name in printed:
        with open(name, encoding="utf-8") as file:
            assert file.read() == (tmp_path / "saved/diffusers_pq.py").read_text()
    assert json.loads((old_model / "config.json").read_text())["auto_map"] == {"AutoModel": "diffusers_pq.PQModel"}


def test_a_folder_without_our_models_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match="holds no config.json of a model of diffusers_pq"):
        write_code(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    with pytest.raises(NotADirectoryError, match="No such folder"):
        write_code(tmp_path / "absent")
