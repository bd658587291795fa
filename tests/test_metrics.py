import math

import pytest
import torch

from diffusers_pq.metrics import CodebookUsage, psnr, ssim


def test_psnr_has_its_closed_form():
    reference = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    image = reference.clone()
    image[1] += 5
    values = psnr(image, reference)
    assert math.isinf(values[0]) and float(values[1]) == pytest.approx(20 * math.log10(255 / 5))


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    noisy = torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    assert ssim(reference, reference).tolist() == pytest.approx([1, 1])
    assert (ssim(noisy, reference) < 0.2).all()


def test_uniform_use_is_one_and_a_single_entry_nearly_zero():
    usage = CodebookUsage(num_subspaces=2, codebook_size=8)
    uniform = torch.arange(8).view(1, 1, 2, 4).expand(3, 2, 2, 4)
    usage.update(uniform)
    assert usage.compute() == pytest.approx({"H_n": 1, "P_n": 1, "dead": 0})
    collapsed = CodebookUsage(2, 8)
    collapsed.update(torch.zeros(1, 2, 4, 4, dtype=torch.long))
    assert collapsed.compute() == pytest.approx({"H_n": 0, "P_n": 1 / 8, "dead": 7 / 8})


def test_use_is_averaged_over_subspaces_and_batches():
    codes = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 2]]).view(1, 2, 2, 2)
    usage = CodebookUsage(2, 4)
    usage.update(codes)
    usage.update(codes)
    assert usage.compute() == pytest.approx({"H_n": 0.25, "P_n": (2 / 4 + 1 / 4) / 2, "dead": 5 / 8})


def test_nothing_counted_is_an_error():
    with pytest.raises(ValueError, match="No codes were counted"):
        CodebookUsage(1, 4).compute()
