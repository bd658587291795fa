import pytest
import torch
from conftest import tiny_config
from diffusers import AutoencoderKL

from diffusers_pq import PQModel, ProductQuantizer
from diffusers_pq.models.kmeans import kmeans_codebooks
from diffusers_pq.training.initialisation import collect_latents, pca_init
from diffusers_pq.training.pqgan import ReconstructionModel


@pytest.fixture
def smooth_images():
    noise = torch.rand(24, 3, 6, 6, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return torch.nn.functional.interpolate(noise, size=(48, 48), mode="bicubic").clamp(-1, 1)


def mean_squared_error(model, images):
    with torch.no_grad():
        return float((ReconstructionModel(model).eval()(images, quantize=False).sample - images).square().mean())


@pytest.mark.parametrize("kind", ["pq", "pq with wide z", "pq with attention", "kl"])
def test_pca_init_starts_from_a_linear_autoencoder(smooth_images, kind):
    torch.manual_seed(0)
    shape = {"block_out_channels": (8, 16, 32), "norm_num_groups": 1, "mid_block_add_attention": False}
    if kind == "kl":
        levels = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
        model = AutoencoderKL(**shape, **levels, latent_channels=8)
    else:
        shape["mid_block_add_attention"] = kind == "pq with attention"
        model = PQModel(**tiny_config(**shape, z_channels=12 if kind == "pq with wide z" else 8))
    before = mean_squared_error(model, smooth_images)
    pca_init(model, smooth_images[:16])
    fitted, held_out = (mean_squared_error(model, part) for part in (smooth_images[:16], smooth_images[16:]))
    assert before > 0.1 > 0.02 > fitted
    assert held_out < 0.03


def test_pca_init_pairs_large_components_with_small_ones(smooth_images):
    torch.manual_seed(0)
    shape = {"block_out_channels": (8, 16, 32), "norm_num_groups": 1, "mid_block_add_attention": False}
    model = PQModel(**tiny_config(**shape, z_channels=8))
    pca_init(model, smooth_images, num_subspaces=4)
    variance = model.encode(smooth_images).latents.var((0, 2, 3))
    assert variance.argsort(descending=True).tolist() == [0, 2, 4, 6, 7, 5, 3, 1]
    spread = variance.view(4, 2).log().sum(1)
    assert spread.max() - spread.min() < variance.log().max() - variance.log().min()


def test_a_rotated_start_is_the_same_for_all_bottlenecks_and_favours_no_channel(smooth_images):
    shape = {"block_out_channels": (8, 16, 32), "norm_num_groups": 1, "mid_block_add_attention": False}

    def start(seed=0, **bottleneck):
        torch.manual_seed(0)
        model = PQModel(**tiny_config(**shape, z_channels=8, **bottleneck))
        pca_init(model, smooth_images, model.config.num_subspaces, rotation_seed=seed)
        return model.encode(smooth_images).latents.detach()

    scalar, product = start(num_subspaces=8), start(num_subspaces=2)
    torch.testing.assert_close(scalar, product)
    assert not torch.allclose(scalar, start(seed=1, num_subspaces=8), atol=0.1)
    torch.manual_seed(0)
    model = PQModel(**tiny_config(**shape, z_channels=8))
    pca_init(model, smooth_images)
    dealt = model.encode(smooth_images).latents.detach()
    spread = [float(latents.var((0, 2, 3)).log().std()) for latents in (scalar, dealt)]
    assert spread[0] < spread[1] / 2
    assert mean_squared_error(model, smooth_images) < 0.02
    assert scalar.square().sum() == pytest.approx(float(dealt.square().sum()), rel=0.1)


def test_pca_init_gives_a_kl_autoencoder_little_noise(smooth_images):
    torch.manual_seed(0)
    model = AutoencoderKL(block_out_channels=(16,), norm_num_groups=1, mid_block_add_attention=False)
    pca_init(model, smooth_images)
    posterior = model.encode(smooth_images).latent_dist
    torch.testing.assert_close(posterior.logvar, torch.full_like(posterior.logvar, -6.0))
    assert posterior.mean.var() > 0.1


def test_kmeans_lowers_the_quantisation_error():
    latents = torch.randn(1, 4, 40, 40, generator=torch.Generator().manual_seed(0))
    quantizer = ProductQuantizer(4, 2, 4)
    errors = []
    for iterations in (0, 10):
        torch.manual_seed(0)  # the same start
        kmeans_codebooks(quantizer, latents, iterations)
        errors.append(float((quantizer(latents).latents - latents).square().mean()))
    # The best 4 points for a Gaussian in the plane: two levels for each of its axes, (1 - 2 / pi) of the variance.
    assert errors[0] > 0.4 > errors[1] > 0.33, errors


def test_kmeans_needs_as_many_latents_as_entries():
    quantizer, latents = ProductQuantizer(4, 2, 4), torch.randn(1, 4, 20, 20)
    with pytest.raises(ValueError, match="at least codebook_size = 4"):
        kmeans_codebooks(quantizer, latents[..., :1, :2])


def test_kmeans_gets_as_many_latents_as_it_asks_for(model, images):
    latents = collect_latents(model, [images] * 5, minimum=200)
    expected = model.encode(images).latents
    assert latents.shape == (1, 8, 2 * expected[:, 0].numel(), 1), "two batches of 192 latent pixels"
    torch.testing.assert_close(latents[0, :, :4, 0], expected[0].flatten(1)[:, :4])
    assert collect_latents(model, [images], minimum=1000).shape[2] == 192
