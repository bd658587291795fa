"""Reconstruct pictures with any image autoencoder of diffusers, and measure what was lost."""

import time
from dataclasses import dataclass

import PIL.Image
import torch
import torch.nn as nn
from diffusers import VQModel

from .autoencoders import decode_pictures, downsampling_factor, encode_pictures
from .images import pad_to_multiple, to_pil, to_tensor, to_uint8
from .metrics import SSIM_SIDE, CodebookUsage, bits_per_pixel, psnr, ssim
from .models.autoencoder_pq import PQModel
from .models.tiling import tiled_beyond


@dataclass
class EncodedPictures:
    """
    Args:
        sample (`torch.Tensor` of shape `(B, 3, H, W)`): The reconstruction, about [-1, 1].
        latents (`torch.Tensor` of shape `(B, d, h, w)`): As encoded, before quantisation.
        codes (`torch.LongTensor` of shape `(B, S, h, w)`, *optional*): The codes, `None` without a quantiser.
    """

    sample: torch.Tensor
    latents: torch.Tensor
    codes: torch.LongTensor | None = None


@dataclass
class PictureReconstruction:
    """
    Args:
        picture (`PIL.Image.Image`): The reconstruction, of the original's size.
        scores (`dict[str, float]`): `psnr` (dB), `ssim` if both sides have 6 pixels, `bits_per_pixel`, `seconds` of
            encoding and decoding, and `H_n`, `P_n` (Eq. 3) if the model has codebooks.
        codes (`torch.LongTensor` of shape `(1, S, h, w)`, *optional*): The codes.
    """

    picture: PIL.Image.Image
    scores: dict[str, float]
    codes: torch.LongTensor | None


@torch.no_grad()
def reconstruct(model: nn.Module, images: torch.Tensor) -> EncodedPictures:
    """
    Encode and decode pictures `[B, 3, H, W]` in [-1, 1] with any image autoencoder of diffusers. Of a distribution of
    latents the mode is decoded.
    """
    encoded = encode_pictures(model, images)
    if "latent_dist" in encoded:
        latents = encoded.latent_dist.mode()
    else:
        latents = encoded.latents if "latents" in encoded else encoded.latent
    if isinstance(model, PQModel):
        quantized = model.quantize(latents)
        return EncodedPictures(model.decode(quantized.latents, quantize=False).sample, latents, quantized.codes)
    codes = None
    if isinstance(model, VQModel):
        _, _, (_, _, indices) = model.quantize(latents)
        codes = indices.view(len(latents), 1, *latents.shape[-2:])
    return EncodedPictures(decode_pictures(model, latents), latents, codes)


def codebook_shape(model: nn.Module) -> tuple[int, int] | None:
    """S and K of a model with codebooks."""
    if isinstance(model, VQModel):
        return 1, model.config.num_vq_embeddings
    size = getattr(getattr(model, "quantizer", None), "codebook_size", None)
    return None if size is None else (model.quantizer.num_subspaces, size)


def stored_bits_per_pixel(model: nn.Module, output: EncodedPictures, images: torch.Tensor) -> float:
    """[`~diffusers_pq.metrics.bits_per_pixel`] of what the model stores of pictures: codes, or else latents."""
    if output.codes is None:
        return bits_per_pixel(output.latents, images)
    return bits_per_pixel(output.codes, images, codebook_shape(model)[1])


def reconstruct_picture(model: nn.Module, picture: PIL.Image.Image) -> PictureReconstruction:
    """
    Encode and decode one picture of any size; it is padded to a multiple of F and cropped back. More than 2048 x 2048
    pixels are taken in tiles, if the model can do so.

    Args:
        model (`nn.Module`): An image autoencoder of diffusers or a [`PQModel`], in eval mode.
        picture (`PIL.Image.Image`): Modes other than RGB are converted.
    """
    original = to_tensor(picture).unsqueeze(0)
    height, width = original.shape[-2:]
    padded = pad_to_multiple(original, downsampling_factor(model)).to(model.device, model.dtype)
    started = time.perf_counter()
    with tiled_beyond(model, height, width):
        output = reconstruct(model, padded)
    if padded.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    sample = output.sample[..., :height, :width].cpu()
    pair = to_uint8(sample), to_uint8(original)
    scores = {
        "psnr": float(psnr(*pair)),
        **({"ssim": float(ssim(*pair))} if min(height, width) >= SSIM_SIDE else {}),
        "bits_per_pixel": stored_bits_per_pixel(model, output, original),
        "seconds": seconds,
    }
    if output.codes is not None:
        usage = codebook_usage(model, [output.codes])
        scores |= {"H_n": usage["H_n"], "P_n": usage["P_n"]}
    return PictureReconstruction(to_pil(sample[0]), scores, output.codes)


def codebook_usage(model: nn.Module, codes: list[torch.LongTensor]) -> dict[str, float]:
    """
    The utilisation of Eq. 3 over several pictures.

    Args:
        model (`nn.Module`): The model with codebooks that made the codes.
        codes (`list[torch.LongTensor]`): Each of shape `(B, S, h, w)`.

    Returns:
        `dict`: See [`~diffusers_pq.metrics.CodebookUsage.compute`].
    """
    # Of these codes only, whatever other processes count.
    usage = CodebookUsage(*codebook_shape(model), sync_on_compute=False)
    for picture_codes in codes:
        usage.update(picture_codes)
    return usage.compute()
