"""The remedies against codebooks that are hardly used."""

import pytest
import torch
from accelerate import Accelerator

from diffusers_pq import PQModel, ProductQuantizer
from diffusers_pq.models.kmeans import kmeans_codebooks
from diffusers_pq.training.codebooks import DeadEntryReseeder, EMACodebooks, entry_counts, entry_sums


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def quantizer():
    torch.manual_seed(0)
    return ProductQuantizer(6, 2, 4).train()


def members(quantizer, latents, codes, subspace, entry):
    """The sub-vectors `[n, d/S]` that an entry is the nearest to."""
    rows = quantizer.split(latents)[:, subspace].movedim(1, -1).flatten(0, 1)
    return rows[codes[:, subspace].flatten() == entry]


def test_sums_and_counts_are_those_of_the_members_of_each_entry(quantizer):
    latents = torch.randn(2, 6, 3, 5)
    codes = quantizer(latents).codes
    sums, counts = entry_sums(quantizer.split(latents), codes, 4), entry_counts(codes, 4)
    for subspace in range(2):
        for entry in range(4):
            rows = members(quantizer, latents, codes, subspace, entry)
            assert counts[subspace, entry] == len(rows)
            torch.testing.assert_close(sums[subspace, entry], rows.sum(0))


def test_ema_codebooks_are_running_means_and_take_no_gradient(quantizer, accelerator):
    start = quantizer.codebooks.detach().clone()
    ema = EMACodebooks(quantizer, accelerator, decay=0.9)
    halves = torch.randn(4, 6, 3, 5).chunk(2)
    codes = [quantizer(half).codes for half in halves]
    for half, half_codes in zip(halves, codes):  # two batches of one step, as in gradient accumulation
        ema.observe(half, half_codes)
    ema.step()
    rows = members(quantizer, torch.cat(halves), torch.cat(codes), 1, 2)
    expected = (0.9 * start[1, 2] + 0.1 * rows.sum(0)) / (0.9 + 0.1 * len(rows))
    torch.testing.assert_close(quantizer.codebooks[1, 2], expected)
    assert not quantizer.codebooks.requires_grad


def test_entries_that_are_never_named_stay_where_they_are(quantizer, accelerator):
    ema = EMACodebooks(quantizer, accelerator, decay=0.5)
    before = quantizer.codebooks.clone()
    for _ in range(200):  # the counts become zero in float32
        ema.step()
    torch.testing.assert_close(quantizer.codebooks, before)


def test_ema_codebooks_converge_to_the_clusters_of_the_data(accelerator):
    torch.manual_seed(0)
    quantizer = ProductQuantizer(2, 1, 2).train()
    ema = EMACodebooks(quantizer, accelerator, decay=0.8)
    centres = torch.tensor([[3.0, 3.0], [-3.0, 0.0]])
    for _ in range(60):
        picked = centres[torch.randint(2, (64,))] + 0.1 * torch.randn(64, 2)
        latents = picked.T.reshape(1, 2, 8, 8)
        ema.observe(latents, quantizer(latents).codes)
        ema.step()
    found = quantizer.codebooks[0][quantizer.codebooks[0, :, 0].argsort(descending=True)]
    torch.testing.assert_close(found, centres, atol=0.1, rtol=0)


def test_dead_entries_move_to_vectors_of_the_data_and_others_stay(quantizer, accelerator):
    quantizer.codebooks.data[:, 3] = 1e3  # never the nearest
    reseeder = DeadEntryReseeder(quantizer, accelerator, every=2)
    before = quantizer.codebooks.detach().clone()
    latents = torch.randn(2, 6, 8, 8)
    used = entry_counts(quantizer(latents).codes, 4) > 0
    for expected in (None, ~used):
        reseeder.observe(latents, quantizer(latents).codes)
        found = reseeder.step()
        assert found is None if expected is None else torch.equal(found, expected)
    assert torch.equal(quantizer.codebooks[used], before[used])
    for subspace in range(2):
        rows = quantizer.split(latents)[:, subspace].movedim(1, -1).flatten(0, 1)
        assert (rows == quantizer.codebooks[subspace, 3]).all(-1).any()


def test_the_state_of_both_remedies_can_be_restored(quantizer, accelerator):
    remedies = EMACodebooks(quantizer, accelerator), DeadEntryReseeder(quantizer, accelerator, every=5)
    latents = torch.randn(1, 6, 4, 4)
    for remedy in remedies:
        remedy.observe(latents, quantizer(latents).codes)
        remedy.step()
    fresh = EMACodebooks(quantizer, accelerator), DeadEntryReseeder(quantizer, accelerator, every=5)
    for remedy, other in zip(remedies, fresh):
        other.load_state_dict(remedy.state_dict())
        for name, value in remedy.state_dict().items():
            assert torch.equal(torch.as_tensor(other.state_dict()[name]), torch.as_tensor(value))


def test_the_cosine_distance_compares_directions():
    torch.manual_seed(0)
    quantizer = ProductQuantizer(8, 4, 16, codebook_distance="cosine").eval()
    latents = torch.randn(2, 8, 5, 5)
    output = quantizer(latents)
    vectors, codebooks = quantizer.split(latents).double(), quantizer.codebooks.double()
    cosines = torch.einsum("bsdp,skd->bskp", vectors, codebooks) / codebooks.norm(dim=-1)[..., None]
    assert torch.equal(output.codes.flatten(2), cosines.argmax(2))
    torch.testing.assert_close(quantizer.split(output.latents).norm(dim=2), torch.ones(2, 4, 25))
    torch.testing.assert_close(quantizer(7 * latents).latents, output.latents)
    assert torch.equal(quantizer.lookup(output.codes), output.latents)


def test_the_cosine_distance_is_kept_in_the_config(tmp_path):
    PQModel(latent_channels=8, num_subspaces=4, codebook_size=4, codebook_distance="cosine").save_pretrained(tmp_path)
    assert PQModel.from_pretrained(tmp_path).quantizer.codebook_distance == "cosine"
    with pytest.raises(ValueError, match="needs sub-vectors of more than one dimension"):
        ProductQuantizer(8, 8, 4, codebook_distance="cosine")
    with pytest.raises(ValueError, match="`codebook_distance` must be"):
        ProductQuantizer(8, 4, 4, codebook_distance="manhattan")


def test_the_rotation_trick_rotates_gradients_with_their_vectors():
    torch.manual_seed(0)
    quantizer = ProductQuantizer(6, 2, 8).train()
    quantizer.gradient_estimator = "rotation"
    latents = torch.randn(1, 6, 1, 1, requires_grad=True)
    output = quantizer(latents)
    assert torch.equal(output.latents, quantizer.lookup(output.codes)), "the value is the entry itself"
    upstream = torch.randn(1, 6, 1, 1)
    (output.latents * upstream).sum().backward()
    pairs = latents, output.latents, upstream, latents.grad
    for z_e, z_q, above, below in zip(*(quantizer.split(part)[0, :, :, 0].detach() for part in pairs)):
        # The gradient keeps its angle to the vector, and is scaled like it.
        scale = z_q.norm() / z_e.norm()
        torch.testing.assert_close(below.norm(), scale * above.norm())
        torch.testing.assert_close(torch.cosine_similarity(below, z_e, 0), torch.cosine_similarity(above, z_q, 0))


def test_the_straight_through_gradient_is_a_copy():
    quantizer = ProductQuantizer(6, 2, 8).train()
    latents = torch.randn(1, 6, 2, 2, requires_grad=True)
    upstream = torch.randn(1, 6, 2, 2)
    (quantizer(latents).latents * upstream).sum().backward()
    assert torch.equal(latents.grad, upstream)


def test_a_latent_that_is_not_finite_leaves_the_codebooks_alone(quantizer, accelerator):
    ema = EMACodebooks(quantizer, accelerator)
    before = quantizer.codebooks.clone()
    latents = torch.randn(1, 6, 4, 4)
    latents[0, 0, 0, 0] = float("nan")
    ema.observe(latents, quantizer(latents).codes)
    ema.step()
    assert torch.equal(quantizer.codebooks, before)
    ema.observe(latents[..., 1:, :], quantizer(latents[..., 1:, :]).codes)
    ema.step()
    assert quantizer.codebooks.isfinite().all() and not torch.equal(quantizer.codebooks, before)


def test_nothing_is_reseeded_before_something_was_quantised(quantizer, accelerator):
    reseeder = DeadEntryReseeder(quantizer, accelerator, every=1)
    assert reseeder.step() is None and reseeder.steps == 0


def test_kmeans_for_the_cosine_distance_finds_directions():
    torch.manual_seed(0)
    quantizer = ProductQuantizer(2, 1, 2, codebook_distance="cosine")
    lengths = 0.1 + 10 * torch.rand(100)
    directions = torch.nn.functional.one_hot(torch.arange(100) % 2).float()
    kmeans_codebooks(quantizer, (lengths.unsqueeze(1) * directions).T.reshape(1, 2, 10, 10))
    assert sorted(quantizer.entries[0].round().tolist()) == [[0.0, 1.0], [1.0, 0.0]]
