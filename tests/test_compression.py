import io
import json
import math
import statistics
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import tiny_config
from diffusers import AutoencoderKL
from scripts import run_script

from diffusers_pq import PQModel
from diffusers_pq.autoencoders import load_autoencoder
from diffusers_pq.cli import main
from diffusers_pq.compression import compress_picture, decompress_picture, pack_codes, unpack_codes
from diffusers_pq.images import to_tensor, to_uint8
from diffusers_pq.metrics import psnr
from diffusers_pq.photographs import load_photographs
from diffusers_pq.reconstruction import reconstruct_picture


RATE_DISTORTION = Path(__file__).parent.parent / "experiments" / "rate_distortion.py"
MEASURES = ("psnr", "ssim")
SIZE = (45, 31)  # 12 x 8 latent pixels at F = 4
FILE_OF_VERSION_1 = (
    "89505143019a7da1da62b9bde60a00000008000000040000000200000003000000fa754e0aefb913cd60e7db3ac39e8042d6b8d532"
)
WITHOUT_CODES = 4 + 1 + 8 + 5 * 4 + 4  # bytes of header and checksum


@pytest.fixture
def picture():
    noise = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise)


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def random_codes(*shape, size=16):
    return torch.randint(0, size, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [SIZE, (48, 32), (1, 1), (4, 700)])
def test_codes_come_back_as_they_were(model, size):
    codes = random_codes(1, 4, -(-size[1] // 4), -(-size[0] // 4))
    unpacked, unpacked_size = unpack_codes(model, pack_codes(model, codes, size))
    assert torch.equal(unpacked, codes) and unpacked.dtype == torch.long and unpacked_size == size


@pytest.mark.parametrize("subspaces, entries", [(1, 300), (8, 16), (2, 2)])
def test_any_number_of_subspaces_and_entries_can_be_coded(subspaces, entries):
    model = PQModel(**tiny_config(num_subspaces=subspaces, codebook_size=entries)).eval()
    codes = random_codes(1, subspaces, 8, 12, size=entries)
    assert torch.equal(unpack_codes(model, pack_codes(model, codes, SIZE))[0], codes)


def test_the_size_of_a_file_is_the_information_in_its_codes(model):
    """The code lengths of the adaptive distributions, computed here one code after the other, in subspaces alike and
    unlike each other."""
    samples = torch.stack([torch.arange(16).float().mul(-decay).exp() for decay in (0, 0.3, 1, 3)])
    codes = torch.multinomial(samples, 3000, replacement=True, generator=torch.Generator().manual_seed(2))
    bits = 0
    for subspace in codes.tolist():
        weights = [32 / 16] * 16
        for code in subspace:
            bits -= math.log2(weights[code] / sum(weights))
            weights[code] += 1
    size = len(pack_codes(model, codes.view(1, 4, 50, 60), (240, 200))) - WITHOUT_CODES
    assert bits / 8 <= size < 1.001 * bits / 8 + 8
    assert size < 0.7 * codes.numel() * math.log2(16) / 8


def test_codes_without_a_pattern_cost_hardly_more_than_whole_bits(model):
    codes = random_codes(1, 4, 50, 60)
    size = len(pack_codes(model, codes, (240, 200))) - WITHOUT_CODES
    assert size < 1.01 * codes.numel() * math.log2(16) / 8


def test_the_format_stays_as_it_is(model):
    """A file of version 1 from when the format was made: another content needs another version."""
    model.quantizer.codebooks.data = torch.arange(4 * 16 * 2).view(4, 16, 2).float()
    codes = (torch.arange(4 * 2 * 3).view(1, 4, 2, 3) * 7) % 16
    data = bytes.fromhex(FILE_OF_VERSION_1)
    assert pack_codes(model, codes, (10, 8)) == data
    unpacked, size = unpack_codes(model, data)
    assert torch.equal(unpacked, codes) and size == (10, 8)


def test_decompresses_to_the_reconstruction_in_the_original_size(model, picture):
    decompressed = decompress_picture(model, compress_picture(model, picture))
    assert decompressed.size == SIZE
    assert decompressed.tobytes() == reconstruct_picture(model, picture).picture.tobytes()


def test_every_damaged_byte_is_noticed(model, picture):
    data = compress_picture(model, picture)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 4
        with pytest.raises(ValueError, match="is damaged|version 5 of the format|not a picture compressed"):
            unpack_codes(model, bytes(damaged))


def test_every_truncation_is_noticed(model, picture):
    data = compress_picture(model, picture)
    for length in range(len(data)):
        with pytest.raises(ValueError, match="truncated|not a picture compressed"):
            unpack_codes(model, data[:length])
    with pytest.raises(ValueError, match="is damaged"):
        unpack_codes(model, data + b"\0")


def test_a_foreign_file_and_a_newer_version_are_named(model, picture, tmp_path):
    picture.save(tmp_path / "picture.png")
    with pytest.raises(ValueError, match="not a picture compressed by `diffusers-pq compress`"):
        decompress_picture(model, (tmp_path / "picture.png").read_bytes())
    content = bytearray(compress_picture(model, picture)[:-4])
    content[4] = 2
    with pytest.raises(ValueError, match="version 2 of the format, but this diffusers_pq reads version 1"):
        decompress_picture(model, bytes(content) + struct.pack("<I", zlib.crc32(content)))


def with_checksum(content):
    return bytes(content) + struct.pack("<I", zlib.crc32(content))


@pytest.mark.parametrize("size", [(2**32 - 1, 2**32 - 1), (20_000, 20_000), (4000, 4000), (0, 0), (0, 31)])
def test_a_header_that_lies_about_the_size_is_refused_before_anything_is_reserved(size, model, picture, monkeypatch):
    monkeypatch.setattr(np, "empty", None)  # of the codes
    content = bytearray(compress_picture(model, picture)[:-4])
    content[13:33] = struct.pack("<5I", *size, 4, *(-(-side // 4) for side in size[::-1]))
    with pytest.raises(ValueError, match=r"claims \d+ x \d+ pixels|bytes cannot be 4000 x 4000 pixels"):
        decompress_picture(model, with_checksum(content))


@pytest.mark.parametrize("change", [-8, -4, -1, 1, 4, 400])
def test_a_content_of_another_length_with_a_valid_checksum_is_refused(change, model, picture):
    content = compress_picture(model, picture)[:-4]
    content = content[:change] if change < 0 else content + bytes(change)
    with pytest.raises(ValueError, match="is damaged"):
        unpack_codes(model, with_checksum(content))


def test_the_cheapest_codes_there_are_come_back(model):
    codes = torch.zeros(1, 4, 100, 100, dtype=torch.long)
    assert torch.equal(unpack_codes(model, pack_codes(model, codes, (400, 400)))[0], codes)


def test_a_file_of_another_model_is_refused(model, picture):
    data = compress_picture(model, picture)
    model.quantizer.codebooks.data[1, 2, 0] += 1e-3
    with pytest.raises(ValueError, match="made with another model"):
        decompress_picture(model, data)


def test_codes_that_do_not_fit_are_named(model):
    with pytest.raises(ValueError, match=r"`codes` of a picture of 45 x 31 pixels must have shape \[1, 4, 8, 12\]"):
        pack_codes(model, random_codes(1, 4, 8, 11), SIZE)
    with pytest.raises(ValueError, match=r"`codes` must lie in \[0, 15\]"):
        pack_codes(model, random_codes(1, 4, 8, 12) + 1, SIZE)


def test_the_commands_compress_and_decompress(folder, picture, tmp_path, capsys):
    photo, file, output = (str(tmp_path / name) for name in ("photo.png", "photo.pqc", "out/photo.png"))
    picture.save(photo)
    assert main(["compress", photo, "--model", folder, "--output", file]) == 0
    bits = 8 * Path(file).stat().st_size / (SIZE[0] * SIZE[1])
    expected = reconstruct_picture(load_autoencoder(folder), picture)
    assert f"bits_per_pixel {bits:.4g}, psnr {expected.scores['psnr']:.4g}" in capsys.readouterr().out
    assert main(["decompress", file, "--model", folder, "--output", output]) == 0
    with PIL.Image.open(output) as result:
        assert result.tobytes() == expected.picture.tobytes()


def test_errors_of_the_commands_are_one_line_and_leave_no_file(folder, picture, tmp_path, capsys):
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "kl")
    photo, output, kl = (str(tmp_path / name) for name in ("photo.png", "output.png", "kl"))
    picture.save(photo)
    for arguments, message in [
        (["compress", photo, "--model", kl, "--output", output], "Only a PQModel has codes"),
        (["decompress", photo, "--model", kl, "--output", output], "Only a PQModel has codes"),
        (["decompress", photo, "--model", folder, "--output", output], "not a picture compressed by"),
        (["decompress", output, "--model", folder, "--output", output], "No such file"),
    ]:
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*output*"))


def test_rates_and_distortions_of_models_and_codecs_are_those_of_their_files(folder, model, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    training_picture = PIL.Image.fromarray(noise)
    (tmp_path / "data" / "train").mkdir(parents=True)
    training_picture.save(tmp_path / "data" / "train" / "noise.png")
    flags = ["--models", folder, "--train_data_dir", tmp_path / "data", "--qualities", 50]
    run_script(RATE_DISTORTION, *flags, "--output_dir", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "rate_distortion.json").read_text())
    (row,) = record["models"].values()
    name, photograph = next(iter(load_photographs().items()))
    bits = 8 * len(compress_picture(model, photograph)) / (photograph.width * photograph.height)
    scores = reconstruct_picture(model, photograph).scores
    assert row["photographs"][name] == pytest.approx({"bits_per_pixel": bits} | {key: scores[key] for key in MEASURES})
    errors = [(load_photographs()[name].size, 10 ** (-one["psnr"] / 10)) for name, one in row["photographs"].items()]
    pooled = sum(math.prod(size) * error for size, error in errors) / sum(math.prod(size) for size, _ in errors)
    assert row["psnr_pooled"] == pytest.approx(-10 * math.log10(pooled)) and row["psnr_pooled"] < row["psnr"]
    # S = 4 codes of 4 bits in 4 x 4 pixels, and the padding
    assert 1 <= row["bits_per_pixel_uncoded"] < 1.01 and 0 < row["bits_per_pixel"] < row["bits_per_pixel_uncoded"]
    codes = model.encode_codes(to_tensor(training_picture)[None])[0].flatten(1)
    counts = torch.stack([one.bincount(minlength=16) + 1.0 for one in codes])
    bits = []
    for picture in load_photographs().values():
        codes = reconstruct_picture(model, picture).codes[0].flatten(1)
        lengths = -(counts / counts.sum(1, keepdim=True)).log2().gather(1, codes)
        bits.append(float(lengths.sum()) / (picture.width * picture.height))
    assert row["bits_per_pixel_static"] == pytest.approx(statistics.mean(bits), rel=1e-4)
    jpeg = io.BytesIO()
    photograph.save(jpeg, "JPEG", quality=50, optimize=True)
    found = record["codecs"]["JPEG"][0]["photographs"][name]
    assert found["bits_per_pixel"] == 8 * len(jpeg.getvalue()) / (photograph.width * photograph.height)
    pair = [to_uint8(to_tensor(picture))[None] for picture in (PIL.Image.open(jpeg), photograph)]
    assert found["psnr"] == pytest.approx(float(psnr(*pair)))
    assert (tmp_path / "out" / "rate_distortion.png").is_file()


def test_a_large_picture_of_any_mode_is_compressed_in_tiles(model, monkeypatch):
    monkeypatch.setattr("diffusers_pq.models.tiling.WHOLE_PIXELS", 2000)
    model.tile_sample_min_size, model.tile_latent_min_size = 32, 8
    picture = PIL.Image.linear_gradient("L").resize((90, 61))
    decompressed = decompress_picture(model, compress_picture(model, picture))
    assert decompressed.tobytes() == reconstruct_picture(model, picture).picture.tobytes()
    monkeypatch.setattr("diffusers_pq.models.tiling.WHOLE_PIXELS", 2**20)
    assert decompressed.tobytes() != reconstruct_picture(model, picture).picture.tobytes(), "no tile"
