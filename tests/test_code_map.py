import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_pq import ProductQuantizer
from diffusers_pq.figures import code_map, enlarged_detail


@pytest.fixture
def quantizer():
    quantizer = ProductQuantizer(latent_channels=4, num_subspaces=2, codebook_size=8)
    # The second codebook's entries lie on a line, in another order than their codes.
    positions = torch.tensor([3.0, 0.0, 7.0, 1.0, 6.0, 2.0, 5.0, 4.0])
    with torch.no_grad():
        quantizer.codebooks[1] = positions[:, None] * torch.tensor([1.0, -2.0])
    return quantizer


def test_close_entries_have_close_colours(quantizer):
    codes = torch.zeros(1, 2, 1, 8, dtype=torch.long)
    codes[0, 1] = torch.tensor([1, 3, 5, 0, 7, 6, 4, 2])  # along the line
    colours = np.asarray(code_map(quantizer, codes, subspace=1)).astype(int)[0]
    neighbours, ends = np.abs(np.diff(colours, axis=0)).sum(1), np.abs(colours[0] - colours[-1]).sum()
    assert colours.shape == (8, 3) and neighbours.min() > 0 and neighbours.max() < ends / 2


def test_same_codes_have_the_same_colour_in_their_places(quantizer):
    codes = torch.zeros(1, 2, 3, 5, dtype=torch.long)
    codes[0, 1, 2, 4] = 6
    picture = code_map(quantizer, codes, subspace=1)
    pixels = np.asarray(picture).reshape(-1, 3)
    assert picture.size == (5, 3)
    assert (pixels[:-1] == pixels[0]).all() and (pixels[-1] != pixels[0]).any()
    assert len(code_map(quantizer, codes, subspace=0).getcolors()) == 1


def test_a_detail_is_enlarged_exactly_and_stays_inside():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(pixels)
    for center, (left, top) in {(12, 9): (8, 5), (0, 19): (0, 12), (29, 0): (22, 0)}.items():
        detail = np.asarray(enlarged_detail(picture, center, side=8, factor=3))
        assert (detail == pixels[top : top + 8, left : left + 8].repeat(3, 0).repeat(3, 1)).all()
    assert enlarged_detail(picture, (5, 5), side=64, factor=2).size == (40, 40)
