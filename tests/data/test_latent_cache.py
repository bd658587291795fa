"""What cannot be encoded is refused before anything is written."""

import PIL.Image
import pytest
from accelerate import Accelerator

from diffusers_pq.data.latent_cache import encode_dataset
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
