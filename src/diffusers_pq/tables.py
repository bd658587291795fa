"""Tables in Markdown, and what the scores and the sizes of a latent are called in them."""

from collections.abc import Iterable, Sequence


SCORE_COLUMNS = {
    "psnr": ("PSNR (dB)", ".2f"),
    "psnr_pooled": ("PSNR, pooled (dB)", ".2f"),
    "ssim": ("SSIM", ".4f"),
    "rfid": ("rFID", ".4g"),
    "kid": ("KID", ".4g"),
    "inception_score": ("IS", ".2f"),
    "cmmd": ("CMMD", ".4g"),
    "lpips_alex": ("LPIPS (alex)", ".4f"),
    "lpips_vgg": ("LPIPS (vgg)", ".4f"),
    "fd_efficientnet_lite0": ("FD, EfficientNet-Lite0", ".4g"),
    "H_n": ("H_n", ".3f"),
    "P_n": ("P_n", ".3f"),
    "seconds": ("seconds", ".3g"),
}
"""Name of a score -> its column's title, with the unit, and format."""
LATENT_COLUMNS = {
    "downsampling_factor": ("F", "d"),
    "latent_channels": ("d", "d"),
    "num_subspaces": ("S", "d"),
    "codebook_size": ("K", "d"),
    "bits_per_pixel": ("bits per pixel", ".4g"),
}
"""Name of a size of the latents -> its column's title and format."""


def markdown_table(head: Sequence, lines: Iterable[Sequence]) -> str:
    """A table in Markdown, of a head and lines of cells, without a newline at its end."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
