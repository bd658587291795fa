"""Reconstruct single pictures of any size, and measure what was lost."""

import time
from dataclasses import dataclass

import PIL.Image
import torch

from .images import pad_to_multiple, to_pil, to_tensor, to_uint8
from .metrics import CodebookUsage, psnr, ssim
from .training.autoencoders import ReconstructionModel, bits_per_pixel, downsampling_factor


@dataclass
class PictureReconstruction:
    """
    Args:
        picture (`PIL.Image.Image`): The reconstruction, of the original's size.
        scores (`dict[str, float]`): `psnr` (dB), `ssim`, `bits_per_pixel`, `seconds` of encoding and decoding, and
            `H_n`, `P_n` (Eq. 3) if the model has codebooks.
        codes (`torch.LongTensor` of shape `(1, S, h, w)`, *optional*): The codes.
    """

    picture: PIL.Image.Image
    scores: dict[str, float]
    codes: torch.LongTensor | None


@torch.no_grad()
def reconstruct_picture(model: torch.nn.Module, picture: PIL.Image.Image) -> PictureReconstruction:
    """
    Encode and decode one RGB picture of any size; it is padded to a multiple of F and cropped back.

    Args:
        model: A [`PQModel`] or [`AutoencoderKL`] in eval mode.
        picture (`PIL.Image.Image`): 8-bit RGB; [`~diffusers_pq.images.load_image`] makes it.
    """
    original = to_tensor(picture).unsqueeze(0)
    height, width = original.shape[-2:]
    padded = pad_to_multiple(original, downsampling_factor(model)).to(model.device, model.dtype)
    started = time.perf_counter()
    output = ReconstructionModel(model).eval()(padded)
    if padded.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    sample = output.sample[..., :height, :width].cpu()
    pair = to_uint8(sample), to_uint8(original)
    scores = {
        "psnr": float(psnr(*pair)),
        "ssim": float(ssim(*pair)),
        "bits_per_pixel": bits_per_pixel(model) * padded[0, 0].numel() / (height * width),
        "seconds": seconds,
    }
    if output.codes is not None:
        usage = codebook_usage(model, [output.codes])
        scores |= {"H_n": usage["H_n"], "P_n": usage["P_n"]}
    return PictureReconstruction(to_pil(sample[0]), scores, output.codes)


def codebook_usage(model: torch.nn.Module, codes: list[torch.LongTensor]) -> dict[str, float]:
    """Eq. 3 over the codes of several pictures of a [`PQModel`]."""
    # Of these codes only, whatever other processes count.
    usage = CodebookUsage(model.config.num_subspaces, model.config.codebook_size, sync_on_compute=False)
    for picture_codes in codes:
        usage.update(picture_codes)
    return usage.compute()
