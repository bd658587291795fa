"""Product quantisation of the latents of an autoencoder that was trained without."""

from collections.abc import Iterable

import diffusers
import PIL.Image
import torch
import torch.nn as nn
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config

from ..images import to_rgb, to_tensor
from .autoencoder_pq import PQModel, check_statistics
from .kmeans import as_latents, fit_rotation, kmeans_codebooks
from .quantizer import ProductQuantizer, ProductQuantizerOutput


# Of the side of a picture, beyond what any autoencoder of diffusers shrinks it by.
_PROBE_SIDE = 128


class RotatedProductQuantizer(ProductQuantizer):
    """
    A [`ProductQuantizer`] of rotated latents (OPQ; Ge et al., 2013): what goes in and what comes out is not rotated.

    Attributes:
        rotation (buffer of shape `(d, d)`, float32): R, orthogonal; a latent pixel z is quantised as z R.
    """

    def __init__(self, latent_channels: int, num_subspaces: int, codebook_size: int, commitment_beta: float = 0.25):
        super().__init__(latent_channels, num_subspaces, codebook_size, commitment_beta)
        self.register_buffer("rotation", torch.eye(latent_channels))

    def forward(
        self, latents: torch.Tensor | None = None, codes: torch.LongTensor | None = None
    ) -> ProductQuantizerOutput | torch.Tensor:
        if codes is not None:
            return _mix_channels(super().forward(codes=codes), self.rotation.T)
        self.check_latents(latents)
        output = super().forward(_mix_channels(latents, self.rotation))
        output.latents = _mix_channels(output.latents, self.rotation.T).to(latents.dtype)
        return output


class QuantizedAutoencoder(PQModel):
    r"""
    An image autoencoder of diffusers whose latents have got a [`ProductQuantizer`] after its training, see
    [`product_quantize`]. It stands wherever a [`PQModel`] does; its latents are those of the autoencoder, so that a
    denoiser of that autoencoder needs no adaptation.

    Parameters:
        autoencoder_class (`str`): Name of the class in diffusers.
        autoencoder_config (`dict`): Its config.
        latent_channels (`int`): d.
        num_subspaces (`int`): S.
        codebook_size (`int`): K.
        downsampling_factor (`int`): F, the ratio of a picture's side to that of its latents.
        learned_rotation (`bool`, *optional*, defaults to `False`): Quantise rotated latents (OPQ).
        commitment_beta (`float`, *optional*, defaults to 0.25): See [`PQModel`].
        in_channels (`int`, *optional*, defaults to 3): Of the pictures.
        scaling_factor, latents_mean, latents_std:
            What a denoiser of the autoencoder expects, see [`PQModel`]; a `shift_factor` is a mean.
        block_out_channels (`list[int]`, *optional*): For pipelines that take F from the length of this list.
        force_upcast (`bool`, *optional*, defaults to `False`): See [`PQModel`].
        image_mean, image_std (`list[float]`, *optional*): See [`PQModel`].

    Raises:
        ValueError: if diffusers has no such autoencoder; and see [`ProductQuantizer`].
    """

    _no_split_modules = None
    _group_offload_block_modules = ["quantizer", "autoencoder"]

    @register_to_config
    def __init__(
        self,
        autoencoder_class: str,
        autoencoder_config: dict,
        latent_channels: int,
        num_subspaces: int,
        codebook_size: int,
        downsampling_factor: int,
        learned_rotation: bool = False,
        commitment_beta: float = 0.25,
        in_channels: int = 3,
        scaling_factor: float = 1.0,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        block_out_channels: list[int] | None = None,
        force_upcast: bool = False,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
    ):
        ModelMixin.__init__(self)  # the parent's would build networks of its own
        check_statistics(latent_channels, "latent", latents_mean=latents_mean, latents_std=latents_std)
        known = getattr(diffusers, autoencoder_class, None)
        if not (isinstance(known, type) and issubclass(known, ModelMixin) and autoencoder_class.startswith("Auto")):
            raise ValueError(
                f"`autoencoder_class` must name an autoencoder of diffusers, but is {autoencoder_class!r}."
            )
        self.autoencoder = known.from_config(dict(autoencoder_config))
        quantizer_class = RotatedProductQuantizer if learned_rotation else ProductQuantizer
        self.quantizer = quantizer_class(latent_channels, num_subspaces, codebook_size, commitment_beta)
        self.use_slicing = False

    @property
    def downsampling_factor(self) -> int:
        """F: the ratio of image side to latent side."""
        return self.config.downsampling_factor

    def enable_tiling(self, *args, **kwargs):
        """As the autoencoder's own."""
        self.autoencoder.enable_tiling(*args, **kwargs)

    def disable_tiling(self):
        """As the autoencoder's own."""
        self.autoencoder.disable_tiling()

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        return _encode(self.autoencoder, self._normalize_images(x))

    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        z = z.unsqueeze(2) if _is_made_for_videos(self.autoencoder) else z
        sample = self.autoencoder.decode(z, return_dict=False)[0]
        return self._denormalize_images(sample.squeeze(2) if sample.ndim == 5 else sample)


@torch.no_grad()
def product_quantize(
    vae: ModelMixin,
    dataset: Iterable,
    num_subspaces: int,
    codebook_size: int,
    learned_rotation: bool = True,
    image_column: str = "image",
    vectors_per_entry: int = 64,
    seed: int = 0,
) -> QuantizedAutoencoder:
    """
    Give the latents of a trained autoencoder a [`ProductQuantizer`], fitted to pictures by k-means.

    No weight of the autoencoder changes. A latent pixel of d channels then takes S log2 K bits, so that a cache of
    latents shrinks 16 d / (S log2 K) times from float16.

    Args:
        vae (`ModelMixin`): An image autoencoder of diffusers: `AutoencoderKL` and those of Flux 2, Qwen-Image, DC-AE,
            RAE and similar models.
        dataset (iterable): Pictures to fit to, a few dozen or more: rows with a picture in `image_column`, PIL
            pictures, or tensors `[3, H, W]` or `[B, 3, H, W]` in [-1, 1]. They are cropped to multiples of F and read
            until there are enough latent pixels.
        num_subspaces (`int`): S; must divide the latent channels.
        codebook_size (`int`): K.
        learned_rotation (`bool`, *optional*, defaults to `True`): Also learn the rotation before the split into
            subspaces (OPQ; Ge et al., 2013).
        image_column (`str`, *optional*, defaults to `"image"`): Of rows.
        vectors_per_entry (`int`, *optional*, defaults to 64): Latent pixels to fit to, over K.
        seed (`int`, *optional*, defaults to 0): Of the pixels that k-means starts from.

    Returns:
        [`QuantizedAutoencoder`]: In eval mode, with the autoencoder inside (not copied), on its device.

    Raises:
        TypeError: if `vae` has a quantiser already or is not an image autoencoder, or `dataset` holds no pictures.
        ValueError: if S does not divide d, or the pictures give fewer than K latent pixels.
    """
    if hasattr(vae, "quantize"):
        raise TypeError(f"`vae` must be an autoencoder without a quantiser, but is of class {type(vae).__name__}.")
    vae = vae.eval()
    factor, channels = _measure_latents(vae)
    model = QuantizedAutoencoder(
        type(vae).__name__,
        _plain_config(vae),
        channels,
        num_subspaces,
        codebook_size,
        factor,
        learned_rotation,
        **_conventions(vae, channels),
    )
    model.autoencoder = vae
    model = model.eval().to(vae.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vectors = _collect_vectors(model, dataset, image_column, vectors_per_entry * codebook_size)
        if learned_rotation:
            quantizer = ProductQuantizer(channels, num_subspaces, codebook_size).to(vae.device)
            model.quantizer.rotation.copy_(fit_rotation(quantizer, vectors))
            vectors = vectors @ model.quantizer.rotation
        kmeans_codebooks(model.quantizer, as_latents(vectors), iterations=30)
    return model


def _mix_channels(latents: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Every latent pixel of `[B, d, h, w]`, a row, times a matrix `[d, d]`; in float32."""
    with torch.autocast(latents.device.type, enabled=False):
        return torch.einsum("bchw,cd->bdhw", latents.float(), matrix.float())


def _is_made_for_videos(autoencoder: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv3d) for module in autoencoder.modules())


def _encode(autoencoder: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Latents `[B, d, h, w]`; of a distribution its mode, of a video autoencoder those of a single frame."""
    encoded = autoencoder.encode(x.unsqueeze(2) if _is_made_for_videos(autoencoder) else x)
    if "latent_dist" in encoded:
        latents = encoded.latent_dist.mode()
    else:
        latents = encoded.latents if "latents" in encoded else encoded.latent
    return latents.squeeze(2) if latents.ndim == 5 else latents


def _measure_latents(vae: ModelMixin) -> tuple[int, int]:
    """F and d. Not from the config, which each class writes in its own way."""
    try:
        parameter = next(vae.parameters())
        probe = torch.zeros(1, 3, _PROBE_SIDE, _PROBE_SIDE, device=parameter.device, dtype=parameter.dtype)
        latents = _encode(vae, probe)
    except (AttributeError, RuntimeError, StopIteration, TypeError) as error:
        raise TypeError(
            f"`vae` must be an autoencoder of RGB pictures, but is of class {type(vae).__name__}."
        ) from error
    # A RAE stretches pictures to one size; its decoder gives patches of another.
    side = vae.config.patch_size * latents.shape[-1] if _is_rae(vae) else _PROBE_SIDE
    return side // latents.shape[-1], latents.shape[1]


def _is_rae(vae: ModelMixin) -> bool:
    return type(vae).__name__ == "AutoencoderRAE"


def _plain_config(vae: ModelMixin) -> dict:
    return {name: value for name, value in vae.config.items() if not name.startswith("_")}


def _conventions(vae: ModelMixin, channels: int) -> dict:
    """How denoisers of this autoencoder see its latents, and how it sees pictures."""
    config = vae.config
    values = {"force_upcast": bool(config.get("force_upcast")), "block_out_channels": config.get("block_out_channels")}
    if _is_rae(vae):  # it normalises its latents itself, and takes pictures in [0, 1]
        return values | {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    values["scaling_factor"] = config.get("scaling_factor") or 1.0
    values["latents_mean"], values["latents_std"] = config.get("latents_mean"), config.get("latents_std")
    if config.get("shift_factor"):
        values["latents_mean"] = [config.shift_factor] * channels
    if values["latents_mean"] and values["latents_std"] is None:
        values["latents_std"] = [1.0] * channels
    return values


def _collect_vectors(model: QuantizedAutoencoder, dataset: Iterable, image_column: str, wanted: int) -> torch.Tensor:
    """Latent pixels `[N, d]`, float32, of pictures one after the other until there are as many as `wanted`."""
    vectors, count = [], 0
    for images in _pictures(dataset, image_column):
        height, width = (side // model.downsampling_factor * model.downsampling_factor for side in images.shape[-2:])
        if not (height and width):
            continue  # smaller than a latent pixel
        parameter = next(model.autoencoder.parameters())
        latents = model.encode(images[..., :height, :width].to(parameter.device, parameter.dtype)).latents
        vectors.append(latents.float().movedim(1, -1).flatten(0, 2))
        count += len(vectors[-1])
        if count >= wanted:
            break
    if count < model.config.codebook_size:
        raise ValueError(
            f"`dataset` gave {count} latent pixels, fewer than codebook_size = {model.config.codebook_size}: give "
            "more or larger pictures."
        )
    return torch.cat(vectors)


def _pictures(dataset: Iterable, image_column: str) -> Iterable[torch.Tensor]:
    for item in dataset:
        item = item[image_column] if isinstance(item, dict) else item
        if isinstance(item, PIL.Image.Image):
            item = to_tensor(to_rgb(item))
        if not isinstance(item, torch.Tensor) or item.ndim not in (3, 4):
            raise TypeError(
                "`dataset` must hold pictures (rows with an image column, PIL pictures or tensors [3, H, W] in "
                f"[-1, 1]), but holds a {type(item).__name__}."
            )
        yield item if item.ndim == 4 else item[None]
