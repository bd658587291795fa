"""Best models on disk, and uploads that fail."""

import json
import logging

from safetensors.torch import load_file

from diffusers_pq import PQModel
from diffusers_pq.training import uploads
from diffusers_pq.training.uploads import BestModel, HubUploads


def first_weight(folder):
    return float(load_file(folder / "diffusion_pytorch_model.safetensors")["encoder.conv_in.bias"][0])


def set_first_weight(model, value):
    model.encoder.conv_in.bias.data[0] = value


def test_the_best_model_is_kept_also_over_a_restart(model, tmp_path):
    best = BestModel(str(tmp_path), "psnr")
    for step, (score, expected) in enumerate([(20.0, 0.0), (22.0, 1.0), (21.0, 1.0)]):
        set_first_weight(model, step)
        assert best.offer(model.save_pretrained, {"psnr": score}, step) == (expected == step)
        assert first_weight(tmp_path / "best") == expected
    assert json.loads((tmp_path / "best" / "validation.json").read_text()) == {"step": 1, "psnr": 22.0}
    resumed = BestModel(str(tmp_path), "psnr")
    resumed.best = resumed.restore()
    assert not resumed.offer(model.save_pretrained, {"psnr": 21.9}, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert isinstance(PQModel.from_pretrained(tmp_path / "best"), PQModel)


def test_a_best_model_is_found_again_if_the_run_was_killed_while_it_was_replaced(model, tmp_path):
    BestModel(str(tmp_path), "psnr").offer(model.save_pretrained, {"psnr": 20.0}, 1)
    (tmp_path / "best").rename(tmp_path / "old-best")
    assert BestModel(str(tmp_path), "psnr").restore() == 20.0
    assert (tmp_path / "best" / "validation.json").is_file()


class NoHub:
    """A Hub that creates repositories and fails when something is uploaded."""

    def __init__(self, token):
        self.repo_id = None

    def create_repo(self, repo_id, exist_ok):
        return type("Repository", (), {"repo_id": repo_id})

    def upload_folder(self, repo_id, folder_path, commit_message, run_as_future):
        from concurrent.futures import Future

        self.seen = sorted(path.name for path in folder_path.iterdir())
        future = Future()
        future.set_exception(OSError("the connection was cut"))
        return future


def test_a_failed_upload_is_a_warning_and_loses_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(uploads, "HfApi", NoHub)
    folder = tmp_path / "run"
    for name in ("best", "checkpoint-5", "logs"):
        (folder / name).mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    target = HubUploads("me/model", str(folder))
    with caplog.at_level(logging.WARNING):
        assert not target.upload(folder, "step 5")
    assert "The upload to me/model failed, nothing local is lost: the connection was cut" in caplog.text
    assert target.api.seen == ["best", "config.json"]
    assert (folder / "config.json").read_text() == "{}" and (folder / "checkpoint-5").is_dir()
    assert sorted(path.name for path in folder.iterdir()) == ["best", "checkpoint-5", "config.json", "logs"]
    target.start(folder, "step 6")
    target.start(folder, "step 7")
    assert caplog.text.count("nothing local is lost") == 2
