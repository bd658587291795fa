import functools
from collections import Counter

import pytest
import torch
import torch.nn as nn
from accelerate import cpu_offload

from diffusers_pq import ProductQuantizer
from diffusers_pq.measuring import measure_peak_bytes
from diffusers_pq.models import search


@pytest.fixture(autouse=True)
def fresh_search(monkeypatch):
    """No test sees what another has searched or compiled."""
    monkeypatch.setattr(search, "_distances_so_far", Counter())
    monkeypatch.setattr(search, "_failed_to_compile", set())
    torch.compiler.reset()


@pytest.fixture
def no_fallback(caplog):
    yield
    assert not [record for record in caplog.records if record.name == search.__name__]


def brute_force(latents, codebooks):
    """Nearest entries by explicit float64 distances, one subspace after the other."""
    subspaces, _, dimension = codebooks.shape
    codes = []
    for s in range(subspaces):
        part = latents[:, s * dimension : (s + 1) * dimension].double().permute(0, 2, 3, 1).unsqueeze(-2)
        codes.append((part - codebooks[s].double()).square().sum(-1).argmin(-1))
    return torch.stack(codes, 1)


@pytest.mark.parametrize("num_subspaces", [1, 2, 4, 8], ids=["VQ", "PQ-2", "PQ-4", "scalar"])
def test_codes_equal_float64_brute_force(num_subspaces):
    torch.manual_seed(0)
    quantizer = ProductQuantizer(8, num_subspaces, 32).eval()
    latents = torch.randn(3, 8, 5, 7)
    output = quantizer(latents)
    assert torch.equal(output.codes, brute_force(latents, quantizer.codebooks))
    assert torch.equal(output.latents, quantizer.lookup(output.codes))


def test_chunked_search_gives_the_same_codes(monkeypatch):
    torch.manual_seed(0)
    vectors, codebooks = torch.randn(3, 4, 2, 100), torch.randn(4, 16, 2)
    whole = search.nearest_codes(vectors, codebooks)
    monkeypatch.setitem(search._DISTANCES_AT_ONCE, "cpu", 4 * 16 * 7)
    assert torch.equal(search.nearest_codes(vectors, codebooks), whole)


@pytest.mark.parametrize("num_subspaces", [1, 2, 4])
def test_compiled_search_equals_float64_brute_force(num_subspaces, monkeypatch, no_fallback):
    monkeypatch.setattr(search, "COMPILE_AFTER", 0)
    torch.manual_seed(0)
    quantizer = ProductQuantizer(8, num_subspaces, 37).eval()
    for shape in ((3, 8, 5, 7), (1, 8, 6, 6), (2, 8, 9, 4)):  # the later ones meet kernels for any size
        latents = torch.randn(shape) * 3
        assert torch.equal(quantizer(latents).codes, brute_force(latents, quantizer.codebooks))


def test_search_is_compiled_once_it_has_cost_enough(monkeypatch):
    monkeypatch.setattr(search, "COMPILE_AFTER", 2.5 * 4 * 10 * 16)
    vectors, codebooks = torch.randn(1, 4, 2, 10), torch.randn(4, 16, 2)
    chosen = [search._choose_search(vectors, codebooks, False) for _ in range(3)]
    assert chosen == [search._product_search, search._product_search, search._compiled_search]
    assert search._choose_search(vectors, torch.randn(4, 8, 2), False) is search._product_search


def test_in_training_the_choice_depends_on_nothing_but_the_size(monkeypatch):
    monkeypatch.setattr(search, "_COMPILE_TRAINING_FROM", 4 * 10 * 16)
    vectors, codebooks = torch.randn(1, 4, 2, 10), torch.randn(4, 16, 2)
    chosen = {search._choose_search(vectors, codebooks, True) for _ in range(3)}
    assert chosen == {search._compiled_search}
    assert search._choose_search(vectors, codebooks[:, 1:], True) is search._product_search


def test_a_far_origin_does_not_cost_precision():
    torch.manual_seed(0)
    quantizer = ProductQuantizer(8, 4, 256).eval()
    quantizer.codebooks.data += 100
    latents = torch.randn(2, 8, 16, 16) + 100
    assert torch.equal(quantizer(latents).codes, brute_force(latents, quantizer.codebooks))


def test_no_latents_have_no_codes():
    assert ProductQuantizer(8, 4, 16)(torch.zeros(0, 8, 2, 2)).codes.shape == (0, 4, 2, 2)


def test_without_a_compiler_the_search_goes_on(monkeypatch, caplog):
    def no_compiler(function):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(search, "_compiled", no_compiler)
    monkeypatch.setattr(search, "COMPILE_AFTER", 0)
    vectors, codebooks = torch.randn(1, 4, 2, 10), torch.randn(4, 16, 2)
    expected = search._product_search(vectors, codebooks)
    for _ in range(2):
        assert torch.equal(search.nearest_codes(vectors, codebooks), expected)
    assert [record.getMessage().count("no C++ compiler") for record in caplog.records] == [1]


@pytest.mark.parametrize(("num_subspaces", "compiled"), [(2, False), (2, True), (4, False)])
def test_codes_of_nan_latents_are_valid_in_training(num_subspaces, compiled, monkeypatch):
    monkeypatch.setattr(search, "_COMPILE_TRAINING_FROM", 0 if compiled else 2**31)
    quantizer = ProductQuantizer(4, num_subspaces, 8).train()
    codes = quantizer(torch.full((1, 4, 2, 2), float("nan"))).codes
    assert 0 <= codes.min() and codes.max() < 8


@pytest.mark.parametrize("dimension", [2, 4, 8])
@pytest.mark.parametrize("compiled", [False, True])
def test_memory_does_not_grow_with_the_codebooks(compiled, dimension, monkeypatch, no_fallback):
    monkeypatch.setattr(search, "COMPILE_AFTER", 0 if compiled else 2**60)
    vectors = torch.randn(1, 16, dimension, 4096)
    peaks = []
    for size in (64, 512):
        codebooks = torch.randn(16, size, dimension)
        search.nearest_codes(vectors, codebooks)
        peaks.append(measure_peak_bytes(functools.partial(search.nearest_codes, vectors, codebooks), "cpu"))
    all_distances = 16 * 4096 * 512 * 4
    assert max(peaks) < all_distances / 10, peaks
    assert peaks[1] < peaks[0] + 2**20, peaks


def test_gradients_of_the_codebooks_are_deterministic():
    torch.manual_seed(0)
    quantizer = ProductQuantizer(8, 4, 16)
    latents = torch.randn(4, 8, 16, 16)

    def gradient():
        quantizer.zero_grad()
        quantizer(latents).loss.backward()
        return quantizer.codebooks.grad.clone()

    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(gradient(), gradient())
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_search_is_float32_under_autocast_and_for_half_latents(dtype):
    torch.manual_seed(0)
    quantizer = ProductQuantizer(4, 2, 512).eval()
    latents = torch.randn(2, 4, 8, 8).to(dtype)
    expected = brute_force(latents, quantizer.codebooks)
    with torch.autocast("cpu", dtype):
        output = quantizer(latents)
    assert torch.equal(output.codes, expected)
    assert output.latents.dtype == dtype and output.loss.dtype == torch.float32


def test_loss_is_equation_1_and_gradients_go_where_it_says():
    torch.manual_seed(0)
    quantizer = ProductQuantizer(6, 3, 8, commitment_beta=0.25)
    latents = torch.randn(2, 6, 4, 4, requires_grad=True)
    output = quantizer(latents)
    z_q = quantizer.lookup(output.codes)
    error = (latents - z_q).square().mean()
    torch.testing.assert_close(output.loss, 1.25 * error)

    output.loss.backward()
    elements = latents.numel()
    torch.testing.assert_close(latents.grad, 2 * (latents - z_q).detach() / elements)
    expected = torch.zeros_like(quantizer.codebooks)
    pull = 0.25 * 2 * (z_q - latents).detach() / elements
    for b, s, i, j in torch.cartesian_prod(*(torch.arange(n) for n in output.codes.shape)).tolist():
        expected[s, output.codes[b, s, i, j]] += pull[b, 2 * s : 2 * s + 2, i, j]
    torch.testing.assert_close(quantizer.codebooks.grad, expected)


def test_straight_through_gradient_is_the_identity():
    quantizer = ProductQuantizer(4, 2, 8)
    latents = torch.randn(1, 4, 3, 3, requires_grad=True)
    weight = torch.randn(1, 4, 3, 3)
    (quantizer(latents).latents * weight).sum().backward()
    assert torch.equal(latents.grad, weight)
    assert quantizer.codebooks.grad is None or not quantizer.codebooks.grad.any()


def test_codebooks_start_from_a_standard_normal():
    torch.manual_seed(0)
    codebooks = ProductQuantizer(64, 32, 512).codebooks
    assert codebooks.shape == (32, 512, 2)
    assert abs(codebooks.mean()) < 0.02 and abs(codebooks.std() - 1) < 0.02


@pytest.mark.parametrize(("channels", "num_subspaces"), [(8, 4), (8, 8), (32, 1)], ids=["PQ", "scalar", "VQ"])
def test_compiles_without_graph_breaks(channels, num_subspaces):
    torch.manual_seed(0)
    quantizer = ProductQuantizer(channels, num_subspaces, 16).eval()
    latents = torch.randn(2, channels, 4, 4)
    compiled = torch.compile(quantizer, fullgraph=True)(latents)
    assert torch.equal(compiled.codes, quantizer(latents).codes)


@pytest.mark.parametrize("dimension", [2, 4, 8])
def test_a_compiled_quantizer_does_not_store_the_distances(dimension):
    latents = torch.randn(1, 16 * dimension, 64, 64)
    quantizer = ProductQuantizer(16 * dimension, 16, 512).eval()
    compiled = torch.compile(quantizer, fullgraph=True)
    compiled(latents)
    all_distances = 16 * 64 * 64 * 512 * 4
    assert measure_peak_bytes(functools.partial(compiled, latents), "cpu") < all_distances / 10


def operators(function):
    """Names of the operators and compiled kernels that run; on a GPU, each is at most a launch or two."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        function()
    return [event.name for event in profiler.events()]


def test_the_search_takes_a_handful_of_kernels_whatever_the_number_of_subspaces(monkeypatch):
    monkeypatch.setattr(search, "COMPILE_AFTER", 0)
    names = []
    for num_subspaces in (4, 64):
        vectors, codebooks = torch.randn(1, num_subspaces, 2, 256), torch.randn(num_subspaces, 128, 2)
        search.nearest_codes(vectors, codebooks)
        names.append(operators(functools.partial(search.nearest_codes, vectors, codebooks)))
    assert len(names[0]) == len(names[1])
    assert sum("CompiledFxGraph" in name for name in names[1]) == 2
    assert not {"aten::mm", "aten::bmm", "aten::baddbmm", "aten::argmin"} & set(names[1])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((8, 3, 16), "8 is not divisible by 3"),
        ((8, 0, 16), "`num_subspaces` must be at least 1, but is 0"),
        ((8, 4, 1), "`codebook_size` must be at least 2, but is 1"),
    ],
)
def test_impossible_shapes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ProductQuantizer(*arguments)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_latents_are_refused_in_eval_mode_only(bad):
    quantizer = ProductQuantizer(4, 2, 8)
    latents = torch.zeros(1, 4, 2, 2)
    latents[0, 1, 0, 0] = bad
    assert not quantizer(latents).loss.isfinite()
    with pytest.raises(ValueError, match="1 non-finite values"):
        quantizer.eval()(latents)


def test_wrong_latents_and_codes_are_refused():
    quantizer = ProductQuantizer(4, 2, 8).eval()
    with pytest.raises(ValueError, match="latent_channels = 4"):
        quantizer(torch.zeros(1, 5, 2, 2))
    with pytest.raises(ValueError, match=r"must lie in \[0, 7\].*range from 0 to 8"):
        quantizer.lookup(torch.tensor([0, 8]).view(1, 2, 1, 1))
    with pytest.raises(ValueError, match="range from -1"):
        quantizer.lookup(torch.tensor([0, -1]).view(1, 2, 1, 1))
    with pytest.raises(ValueError, match="num_subspaces = 2"):
        quantizer.lookup(torch.zeros(1, 3, 1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="must be integers"):
        quantizer.lookup(torch.zeros(1, 2, 1, 1))


CASTS = {
    "to": lambda module: module.to(torch.bfloat16),
    "half": lambda module: module.half(),
    "to with a device": lambda module: module.to("cpu", torch.float16),
    "as a part": lambda module: nn.ModuleDict({"part": module}).bfloat16(),
    "there and back": lambda module: module.half().float(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_a_cast_leaves_the_codebooks_exact(cast):
    quantizer = ProductQuantizer(8, 4, 16)
    before = quantizer.codebooks.detach().clone()
    quantizer.codebooks.grad = torch.full_like(before, 1 / 3)
    cast(quantizer)
    assert quantizer.codebooks.dtype == quantizer.codebooks.grad.dtype == torch.float32
    assert torch.equal(quantizer.codebooks, before)
    assert quantizer(torch.randn(1, 8, 2, 2, dtype=torch.float16)).latents.dtype == torch.float16
    assert quantizer.to("meta").codebooks.device.type == "meta"


def test_a_cast_to_double_is_exact_and_is_made():
    quantizer = ProductQuantizer(8, 4, 16)
    before = quantizer.codebooks.detach().clone()
    assert quantizer.double().codebooks.dtype == torch.float64
    assert torch.equal(quantizer.codebooks, before.double())


def test_a_lookup_finds_offloaded_codebooks():
    quantizer = ProductQuantizer(8, 4, 16).eval()
    codes = torch.randint(16, (1, 4, 2, 3))
    expected = quantizer.lookup(codes)
    cpu_offload(quantizer, torch.device("cpu"))
    assert quantizer.codebooks.device.type == "meta"
    assert torch.equal(quantizer.lookup(codes), expected)
