"""The product-quantised autoencoder (PQGAN) as a diffusers model."""

from dataclasses import dataclass
from numbers import Integral

import torch
import torch.nn as nn
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.vae import AutoencoderMixin, Decoder, DecoderOutput, Encoder
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from .auto_class import AutoModelMixin
from .quantizer import ProductQuantizer, ProductQuantizerOutput, bits_per_code
from .search import is_exporting
from .tiling import blend_tiles


@dataclass
class PQEncoderOutput(BaseOutput):
    """
    Output of [`PQModel.encode`].

    Args:
        latents (`torch.Tensor` of shape `(batch_size, latent_channels, height / F, width / F)`):
            The continuous latents z_e, before quantisation.
    """

    latents: torch.Tensor


@dataclass
class PQModelOutput(BaseOutput):
    """
    Output of [`PQModel`].

    Args:
        sample (`torch.Tensor` of shape `(batch_size, out_channels, height, width)`): Reconstruction, about [-1, 1].
        codes (`torch.LongTensor` of shape `(batch_size, num_subspaces, height / F, width / F)`): The codes.
        loss (`torch.Tensor`, scalar, float32): Codebook and commitment loss of Eq. 1.
    """

    sample: torch.Tensor
    codes: torch.LongTensor
    loss: torch.Tensor


_LARGEST = 2**20  # channels, layers, entries


class PQModel(AutoModelMixin, ModelMixin, AttentionMixin, AutoencoderMixin, ConfigMixin):
    r"""
    A product-quantised autoencoder: the encoder and decoder of VQGAN with its vector quantiser replaced by a
    [`ProductQuantizer`] (Product-Quantised Image Representation for High-Quality Image
    Synthesis, section 3).

    This model inherits from [`ModelMixin`]. Check the superclass documentation for its generic methods implemented for
    all models (such as downloading or saving). It can stand in for the `vae` of diffusers' Stable Diffusion pipelines,
    which ignore `latents_mean` and `latents_std`; those of this package do not.

    Parameters:
        in_channels (`int`, *optional*, defaults to 3): Number of channels in the input image.
        out_channels (`int`, *optional*, defaults to 3): Number of channels in the output.
        down_block_types (`tuple[str]`, *optional*, defaults to `("DownEncoderBlock2D",)`):
            Tuple of downsample block types, one per level; `"AttnDownEncoderBlock2D"` adds attention at that level.
        up_block_types (`tuple[str]`, *optional*, defaults to `("UpDecoderBlock2D",)`):
            Tuple of upsample block types, from the latent resolution up.
        block_out_channels (`tuple[int]`, *optional*, defaults to `(64,)`):
            Tuple of block output channels. L levels give a downsampling factor F = 2^(L-1).
        layers_per_block (`int`, *optional*, defaults to 1): Number of residual blocks per level.
        act_fn (`str`, *optional*, defaults to `"silu"`): The activation function to use.
        norm_num_groups (`int`, *optional*, defaults to 32): Number of groups for normalization layers.
        mid_block_add_attention (`bool`, *optional*, defaults to `True`): Attention in the middle blocks.
        sample_size (`int`, *optional*, defaults to 256): Side of a tile, in pixels, once tiling is enabled.
        z_channels (`int`, *optional*):
            Channels at the encoder's end; `quant_conv` maps them to `latent_channels`. `None` means `latent_channels`.
        latent_channels (`int`, *optional*, defaults to 128): d, the channels a denoiser sees.
        num_subspaces (`int`, *optional*, defaults to 64): S; 1 is vector quantisation, d scalar quantisation.
        codebook_size (`int`, *optional*, defaults to 512): K, entries in the codebook of each subspace.
        commitment_beta (`float`, *optional*, defaults to 0.25): beta of Eq. 1, on the codebook term.
        scaling_factor (`float`, *optional*, defaults to 1.0):
            Latents are multiplied by it before they go to a denoiser, as in [`AutoencoderKL`].
        latents_mean (`list[float]`, *optional*): Mean of each latent channel over a data set, of length d.
        latents_std (`list[float]`, *optional*): Standard deviation of each latent channel, of length d.
        force_upcast (`bool`, *optional*, defaults to `False`):
            Makes pipelines run this model in float32 even when the rest is in float16.
        codebook_distance (`str`, *optional*, defaults to `"euclidean"`): Or `"cosine"`, see [`ProductQuantizer`].
        image_mean, image_std (`list[float]`, *optional*):
            Mean and standard deviation of each colour channel, of colours in [0, 1], that the networks' pictures are
            normalised with. Input and output are in [-1, 1] in any case. `None`: no normalisation.

    Raises:
        ValueError: if d is not divisible by S, S < 1, K < 2, a size is not an integer or absurdly large, the tuples
            do not have one entry per level, or `image_mean` and `image_std` are not both given, with a value for each
            colour channel.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock2D", "ProductQuantizer"]
    _repeated_blocks = ["ResnetBlock2D"]
    _keep_in_fp32_modules = ["quantizer"]
    _skip_layerwise_casting_patterns = ["quantizer"]
    _group_offload_block_modules = ["quant_conv", "quantizer", "post_quant_conv", "encoder", "decoder"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        sample_size: int = 256,
        z_channels: int | None = None,
        latent_channels: int = 128,
        num_subspaces: int = 64,
        codebook_size: int = 512,
        commitment_beta: float = 0.25,
        scaling_factor: float = 1.0,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        force_upcast: bool = False,
        codebook_distance: str = "euclidean",
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
    ):
        super().__init__()
        _check_sizes(
            in_channels=in_channels,
            out_channels=out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            z_channels=z_channels or latent_channels,
            latent_channels=latent_channels,
            codebook_size=codebook_size,
        )
        if not isinstance(act_fn, str):
            raise ValueError(f"`act_fn` must be the name of an activation function, but is {act_fn!r}.")
        _check_levels(block_out_channels, down_block_types=down_block_types, up_block_types=up_block_types)
        check_statistics(latent_channels, "latent", latents_mean=latents_mean, latents_std=latents_std)
        _check_image_statistics(in_channels, out_channels, image_mean, image_std)
        z_channels = z_channels or latent_channels

        self.encoder = Encoder(
            in_channels=in_channels,
            out_channels=z_channels,
            down_block_types=down_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            norm_num_groups=norm_num_groups,
            double_z=False,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.quant_conv = nn.Conv2d(z_channels, latent_channels, 1)
        self.quantizer = ProductQuantizer(
            latent_channels, num_subspaces, codebook_size, commitment_beta, codebook_distance
        )
        self.post_quant_conv = nn.Conv2d(latent_channels, z_channels, 1)
        self.decoder = Decoder(
            in_channels=z_channels,
            out_channels=out_channels,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            norm_num_groups=norm_num_groups,
            mid_block_add_attention=mid_block_add_attention,
        )

        self.use_slicing = False
        self.use_tiling = False
        # only relevant if tiling is enabled
        self.tile_latent_min_size = max(1, sample_size // self.downsampling_factor)
        self.tile_sample_min_size = self.tile_latent_min_size * self.downsampling_factor
        self.tile_overlap_factor = 0.25

    @property
    def downsampling_factor(self) -> int:
        """F: the ratio of image side to latent side, 2^(levels - 1)."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def bits_per_pixel(self) -> float:
        """Size of the codes of a picture, S ceil(log2 K) / F^2, in bits per image pixel."""
        return self.config.num_subspaces * bits_per_code(self.config.codebook_size) / self.downsampling_factor**2

    def set_default_attn_processor(self):
        """Go back from custom attention processors to the default ones."""
        self.set_attn_processor(AttnProcessor())

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> PQEncoderOutput | tuple[torch.Tensor]:
        """
        Encode a batch of images into continuous latents z_e.

        Args:
            x (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): Images in [-1, 1].
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`PQEncoderOutput`] instead of a plain tuple.

        Returns:
            [`PQEncoderOutput`] or `tuple`: The latents of shape `(batch_size, latent_channels, height/F, width/F)`.

        Raises:
            ValueError: if the channels are wrong or a side is not a multiple of the downsampling factor F.
        """
        self._check_image(x)
        latents = self._sliced(self._encode, x)
        if not return_dict:
            return (latents,)
        return PQEncoderOutput(latents=latents)

    @apply_forward_hook
    def quantize(self, z: torch.Tensor) -> ProductQuantizerOutput:
        """
        Snap latents to the codebooks.

        Args:
            z (`torch.Tensor` of shape `(batch_size, latent_channels, height, width)`): z_e, in any float dtype.

        Returns:
            [`ProductQuantizerOutput`]: the quantised `latents`, the `codes` and the `loss` of Eq. 1.

        Raises:
            ValueError: see [`ProductQuantizer.forward`].
        """
        return self.quantizer(z)

    @apply_forward_hook
    def decode(
        self,
        z: torch.Tensor,
        quantize: bool = True,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """
        Decode a batch of latents into images.

        Args:
            z (`torch.Tensor` of shape `(batch_size, latent_channels, height, width)`): Latents, quantised or not.
            quantize (`bool`, *optional*, defaults to `True`): Whether to snap the latents to the codebooks first.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`~models.vae.DecoderOutput`] instead of a plain tuple.
            generator (`torch.Generator`, *optional*): Unused; pipelines pass it to every autoencoder.

        Returns:
            [`~models.vae.DecoderOutput`] or `tuple`: Images of shape `(batch_size, out_channels, F*height, F*width)`.

        Raises:
            ValueError: see [`ProductQuantizer.forward`].
        """
        if quantize:
            z = self.quantizer(z).latents
        else:
            self.quantizer.check_latents(z)
        sample = self._sliced(self._decode, z)
        if not return_dict:
            return (sample,)
        return DecoderOutput(sample=sample)

    def encode_codes(self, x: torch.Tensor) -> torch.LongTensor:
        """Images `[B, 3, H, W]` in [-1, 1] to codes `[B, S, H/F, W/F]`."""
        return self.quantize(self.encode(x).latents).codes

    @apply_forward_hook
    def decode_codes(self, codes: torch.LongTensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Codes `[B, S, h, w]` to images `[B, 3, F*h, F*w]`; a `ValueError` names codes outside `[0, K)`."""
        latents = self.quantizer.lookup(codes).to(self.dtype)
        return self.decode(latents, quantize=False, return_dict=return_dict)

    def scale_latents(self, z: torch.Tensor) -> torch.Tensor:
        """
        Latents `[B, d, h, w]` as a denoiser sees them: normalised per channel if `latents_mean` and `latents_std` are
        set, times `scaling_factor`.
        """
        mean, std = self._latent_statistics(z)
        return (z - mean) / std * self.config.scaling_factor

    def unscale_latents(self, z: torch.Tensor) -> torch.Tensor:
        """Inverse of [`~PQModel.scale_latents`], of the same shape."""
        mean, std = self._latent_statistics(z)
        return z / self.config.scaling_factor * std + mean

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> PQModelOutput | tuple[torch.Tensor, ...]:
        r"""
        Encode, quantise and decode a batch of images.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): Images in [-1, 1].
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`PQModelOutput`] instead of a plain tuple.

        Returns:
            [`PQModelOutput`] or `tuple`: `(sample, codes, loss)`.
        """
        quantized = self.quantize(self.encode(sample).latents)
        reconstruction = self.decode(quantized.latents, quantize=False).sample
        if not return_dict:
            return (reconstruction, quantized.codes, quantized.loss)
        return PQModelOutput(sample=reconstruction, codes=quantized.codes, loss=quantized.loss)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        def encode_tile(tile):
            return self.quant_conv(self.encoder(fastest_layout(tile))).contiguous()

        x = self._normalize_images(x)
        if self.use_tiling and max(x.shape[-2:]) > self.tile_sample_min_size:
            scale = 1 / self.downsampling_factor
            return blend_tiles(encode_tile, x, self.tile_sample_min_size, self.tile_overlap_factor, scale)
        return encode_tile(x)

    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        def decode_tile(tile):
            return self.decoder(self.post_quant_conv(fastest_layout(tile))).contiguous()

        if self.use_tiling and max(z.shape[-2:]) > self.tile_latent_min_size:
            scale = self.downsampling_factor
            sample = blend_tiles(decode_tile, z, self.tile_latent_min_size, self.tile_overlap_factor, scale)
        else:
            sample = decode_tile(z)
        return self._denormalize_images(sample)

    def _normalize_images(self, x: torch.Tensor) -> torch.Tensor:
        """
        From [-1, 1] to what the encoder was trained on. Folded into its first convolution, the normalisation would
        change the colour that the convolution pads with.
        """
        if self.config.image_mean is None:
            return x
        mean, std = self._image_statistics(x)
        return (x * (0.5 / std) + (0.5 - mean) / std).to(x.dtype)

    def _denormalize_images(self, sample: torch.Tensor) -> torch.Tensor:
        """Inverse of `_normalize_images`."""
        if self.config.image_mean is None:
            return sample
        mean, std = self._image_statistics(sample)
        return (sample * (2 * std) + (2 * mean - 1)).to(sample.dtype)

    def _image_statistics(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # In float32, so that the arithmetic in half precision is rounded once.
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=x.device).view(-1, 1, 1)
            for values in (self.config.image_mean, self.config.image_std)
        )
        return mean, std

    def _sliced(self, function, batch: torch.Tensor) -> torch.Tensor:
        if self.use_slicing and batch.shape[0] > 1:
            return torch.cat([function(part) for part in batch.split(1)])
        return function(batch)

    def _latent_statistics(self, z: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        def per_channel(values, default):
            return default if values is None else torch.tensor(values).view(1, -1, 1, 1).to(z.device, z.dtype)

        return per_channel(self.config.latents_mean, 0.0), per_channel(self.config.latents_std, 1.0)

    def _check_image(self, x: torch.Tensor):
        channels, factor = self.config.in_channels, self.downsampling_factor
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(
                f"`x` must have shape [batch, {channels}, height, width] (in_channels = {channels}), but has shape "
                f"{list(x.shape)}."
            )
        height, width = x.shape[-2:]
        if height % factor or width % factor or not (height and width):
            raise ValueError(
                f"The sides of `x` must be multiples of the downsampling factor F = {factor}, but are {height} x "
                f"{width}. Pad or crop the images (`diffusers_pq.images.pad_to_multiple` does the former)."
            )


def fastest_layout(x: torch.Tensor) -> torch.Tensor:
    """On a CPU channels_last, which saves up to a third of the time (`benchmarks/model_speed.py`); else as it is."""
    if x.device.type != "cpu" or is_exporting():  # what is exported need not run here
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _check_sizes(**sizes: int):
    """A configuration may come from anywhere, and what it asks for is allocated."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, Integral) or not 1 <= size <= _LARGEST:
            raise ValueError(f"`{name}` must be a whole number from 1 to {_LARGEST}, but is {size!r}.")


def _check_levels(block_out_channels: tuple[int, ...], **block_types: tuple[str, ...]):
    if len(block_out_channels) == 0:
        raise ValueError("`block_out_channels` must have one entry per level, but is empty.")
    for channels in block_out_channels:
        _check_sizes(block_out_channels=channels)
    for name, types in block_types.items():
        if not all(isinstance(kind, str) for kind in types):
            raise ValueError(f"`{name}` must hold names of block types, but is {tuple(types)}.")
        if len(types) != len(block_out_channels):
            raise ValueError(
                f"`{name}` must have one entry per entry of `block_out_channels`, but has {len(types)} for "
                f"{len(block_out_channels)} levels: {tuple(types)}."
            )


def check_statistics(channels: int, kind: str, **statistics: list[float] | None):
    """Raise a `ValueError` for means or deviations by name that do not fit so many channels, or are not positive."""
    for name, values in statistics.items():
        if values is not None and len(values) != channels:
            raise ValueError(
                f"`{name}` must have one value for each of the {channels} {kind} channels, but has {len(values)}."
            )
        if values is not None and name.endswith("_std") and not min(values) > 0:
            raise ValueError(f"`{name}` must be positive, but its smallest value is {min(values)}.")


def _check_image_statistics(
    in_channels: int, out_channels: int, image_mean: list[float] | None, image_std: list[float] | None
):
    if (image_mean is None) != (image_std is None):
        raise ValueError(f"`image_mean` and `image_std` must be given together, but are {image_mean} and {image_std}.")
    for channels in (in_channels, out_channels):
        check_statistics(channels, "colour", image_mean=image_mean, image_std=image_std)
