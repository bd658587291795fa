import struct

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_pq.images import load_image, pad_to_multiple, save_image, to_pil, to_rgb, to_tensor, to_uint8


@pytest.fixture
def colours():
    return np.random.default_rng(0).integers(0, 256, (11, 17, 3), dtype=np.uint8)


def test_tensors_hold_pictures_without_loss(colours):
    picture = PIL.Image.fromarray(colours)
    tensor = to_tensor(picture)
    assert tensor.shape == (3, 11, 17) and tensor.min() >= -1 and tensor.max() <= 1
    assert np.array_equal(np.asarray(to_pil(tensor)), colours)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA", "I;16", "YCbCr"])
def test_any_mode_becomes_rgb(colours, tmp_path, mode):
    if mode == "I;16":
        picture = PIL.Image.fromarray(colours[..., 0].astype(np.uint16) * 257)
    else:
        picture = PIL.Image.fromarray(colours).convert(mode)
    suffix = "tif" if mode in ("CMYK", "YCbCr") else "png"
    picture.save(tmp_path / f"picture.{suffix}")
    loaded = load_image(tmp_path / f"picture.{suffix}")
    assert loaded.mode == "RGB" and loaded.size == (17, 11)
    if mode == "I;16":
        assert np.array_equal(np.asarray(loaded)[..., 0], colours[..., 0])


@pytest.mark.parametrize(
    "pixels",
    [np.linspace(0, 1, 100, dtype=np.float32), np.linspace(0, 255, 100).astype(np.int32)],
    ids=["float", "int32"],
)
def test_deep_grey_keeps_its_range(pixels, tmp_path):
    PIL.Image.fromarray(pixels.reshape(10, 10)).save(tmp_path / "ramp.tif")
    loaded = np.asarray(load_image(tmp_path / "ramp.tif"))
    assert loaded.min() == 0 and loaded.max() == 255 and abs(loaded.mean() - 127.5) < 1.5


def test_deep_grey_of_unknown_range_is_refused(tmp_path):
    PIL.Image.fromarray(np.full((4, 4), 300, np.float32)).save(tmp_path / "heights.tif")
    with pytest.raises(ValueError, match="heights.tif cannot be read as a picture: its pixels range from 300.0"):
        load_image(tmp_path / "heights.tif")


def test_broken_exif_is_a_bad_picture(tmp_path):
    # A resolution (tag 0x11a) that is a signed fraction over 0.
    entry = struct.pack("<HHI", 0x11A, 10, 1) + struct.pack("<I", 26)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + struct.pack("<I", 0) + struct.pack("<ii", -72, 0)
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "broken.jpg", exif=exif)
    try:
        assert load_image(tmp_path / "broken.jpg").size == (8, 8)
    except ValueError as error:
        assert "broken.jpg cannot be read as a picture" in str(error)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    PIL.Image.new("RGB", (64, 64)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="bomb.png cannot be read as a picture: .*exceeds limit"):
        load_image(tmp_path / "bomb.png")


def test_transparency_becomes_white(tmp_path):
    PIL.Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_exif_rotation_is_applied(tmp_path):
    picture = PIL.Image.new("RGB", (6, 4))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (4, 6)


def test_padding_repeats_the_border():
    image = torch.arange(15.0).view(1, 1, 3, 5)
    padded = pad_to_multiple(image, 4)
    assert padded.shape == (1, 1, 4, 8)
    assert torch.equal(padded[..., :3, :5], image) and torch.equal(padded[..., 3, :], padded[..., 2, :])


def test_what_is_no_picture_is_refused(colours, tmp_path):
    with pytest.raises(FileNotFoundError, match="No such picture: .*absent.png"):
        load_image(tmp_path / "absent.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match="text.png cannot be read as a picture"):
        load_image(tmp_path / "text.png")
    PIL.Image.fromarray(colours.repeat(10, 0)).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cut.png cannot be read"):
        load_image(tmp_path / "cut.png")


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(ValueError):
        save_image(PIL.Image.new("RGB", (2, 2)), tmp_path / "out.nonsense")
    assert not list(tmp_path.iterdir())


def test_pictures_of_more_pixels_than_allowed_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    PIL.Image.new("1", (40, 40)).save(path)
    monkeypatch.setattr(PIL.Image.Image, "convert", None)
    with pytest.raises(ValueError, match="large.png cannot be read .* it is too large, 40 x 40 pixels"):
        load_image(path, max_pixels=1000)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1500)
    with pytest.warns(PIL.Image.DecompressionBombWarning), pytest.raises(ValueError, match="more than 1500"):
        load_image(path)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA", "PA", "I;16", "I", "F", "YCbCr", "HSV", "LAB"])
def test_pictures_of_all_modes_become_tensors(mode, colours):
    if mode in ("I;16", "I", "F"):
        scale, kind = {"I;16": (257, np.uint16), "I": (1, np.int32), "F": (1 / 255, np.float32)}[mode]
        picture = PIL.Image.fromarray((colours[..., 0].astype(np.float64) * scale).astype(kind))
    elif mode == "LAB":
        picture = PIL.Image.new("LAB", (17, 11), (128, 0, 0))
    else:
        picture = PIL.Image.fromarray(colours).convert("LA" if mode == "PA" else mode).convert(mode)
    assert torch.equal(to_tensor(picture), to_tensor(to_rgb(picture))) and to_tensor(picture).shape == (3, 11, 17)
    if mode in ("I;16", "I", "F"):
        assert (to_uint8(to_tensor(picture))[0].int() - torch.from_numpy(colours[..., 0]).int()).abs().max() <= 1
