import PIL.Image
import pytest
import torch
from conftest import tiny_config
from diffusers import AutoencoderKL

from diffusers_pq import PQModel
from diffusers_pq.cli import main


@pytest.fixture
def model_folder(tmp_path):
    torch.manual_seed(0)
    PQModel(**tiny_config()).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_reconstructs_a_picture_of_any_size(model_folder, tmp_path, capsys):
    picture = tmp_path / "photo.jpg"
    PIL.Image.linear_gradient("L").resize((45, 31)).save(picture)
    assert main(["reconstruct", str(picture), "--model", model_folder]) == 0
    with PIL.Image.open(tmp_path / "photo-reconstruction.png") as result:
        assert result.size == (45, 31) and result.mode == "RGB"
    printed = capsys.readouterr().out
    # 4 codes of 4 bits for each of 12 x 8 latent pixels, over the 45 x 31 pixels of the picture.
    assert "psnr" in printed and f"bits_per_pixel {12 * 8 * 16 / (45 * 31):.4g}" in printed


def test_reconstructs_with_a_kl_autoencoder(tmp_path, capsys):
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "kl")
    PIL.Image.new("RGB", (20, 20)).save(tmp_path / "photo.png")
    output = tmp_path / "out" / "result.png"
    arguments = ["reconstruct", str(tmp_path / "photo.png"), "--model", str(tmp_path / "kl"), "--output", str(output)]
    assert main(arguments) == 0
    assert output.is_file() and "H_n" not in capsys.readouterr().out


def test_errors_are_one_line_and_leave_no_file(model_folder, tmp_path, capsys):
    (tmp_path / "text.png").write_text("not a picture")
    PIL.Image.new("RGB", (16, 16)).save(tmp_path / "photo.png")
    reconstruct = ["reconstruct", str(tmp_path / "photo.png"), "--model"]
    for arguments, message in [
        (["reconstruct", str(tmp_path / "text.png"), "--model", model_folder], "cannot be read as a picture"),
        ([*reconstruct, str(tmp_path / "absent")], "absent"),
        (
            ["reconstruct", str(tmp_path / "photo.png"), "--model", "absent", "--output", "x.text"],
            "must end in the suffix",
        ),
        (["decompress", str(tmp_path / "codes"), "--model", "absent", "--output", "x"], "must end in the suffix"),
        (["decompress", "/dev/zero", "--model", "absent", "--output", "x.png"], "/dev/zero is a device"),
        (["convert", "absent.ckpt", "--output", str(tmp_path / "new")], "No such checkpoint: absent.ckpt"),
        (["prepare-data", model_folder], "exists already"),
        (["prepare-data", str(tmp_path / "data"), "--packages-dir", model_folder], "No pictures found"),
    ]:
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
    assert not list(tmp_path.glob("*-reconstruction.png")) and not (tmp_path / "data").exists()
