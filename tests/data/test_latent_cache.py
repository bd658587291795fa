"""What is encoded once, and what cannot be is refused before anything is written."""

import PIL.Image
import pytest
import torch
from accelerate import Accelerator

from diffusers_pq.autoencoders import encode_latents, encode_reusably, reused_latents
from diffusers_pq.data.latent_cache import encode_dataset, pack_codes, unpack_codes
from diffusers_pq.data.pictures import Crops, PictureSource


@pytest.mark.parametrize(
    "resolution, message",
    [(64, "no picture that can be used.*`--min_image_side`.*needs at least 64"), (30, "--resolution: 30 must be a")],
)
def test_pictures_that_are_too_small_and_sides_that_do_not_fit_are_refused(resolution, message, model, tmp_path):
    (tmp_path / "data").mkdir()
    for number in range(2):
        PIL.Image.new("RGB", (40, 40)).save(tmp_path / "data" / f"{number}.png")
    (tmp_path / "data" / "metadata.csv").write_text("file_name,text\n0.png,a\n1.png,b\n")
    rows = PictureSource(data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache")).load("train", "text")
    crops = Crops("image", resolution, resize_mode="short_side", center_crop=True)
    with pytest.raises(ValueError, match=message):
        encode_dataset(model, rows, crops, "text", tmp_path / "codes", Accelerator(cpu=True))
    assert not (tmp_path / "codes").exists()


def test_a_packed_code_that_is_no_entry_is_refused():
    packed = pack_codes(torch.tensor([[3, 14]]), codebook_size=16)
    assert unpack_codes(packed, (1, 2), codebook_size=16).tolist() == [[3, 14]]
    with pytest.raises(ValueError, match="damaged: one is 14, but K is 13"):
        unpack_codes(packed, (1, 2), codebook_size=13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_of_pictures_are_the_entries_of_their_codes_in_every_precision(model, images, dtype):
    model.to(dtype)
    latents = encode_latents(model, images)
    assert latents.dtype == torch.float32
    assert torch.equal(latents, model.quantizer.lookup(model.encode_codes(images.to(dtype))))
    assert torch.equal(latents, reused_latents(model, encode_reusably(model, images), model.device))
