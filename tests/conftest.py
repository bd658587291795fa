import os
from collections import Counter
from pathlib import Path


# Tests never wait for a network: the models and data they use are built here.
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # threads of tests that run at the same time would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from diffusers import UNet2DConditionModel  # noqa: E402

from diffusers_pq import PQModel  # noqa: E402


ROOT = Path(__file__).parents[1]
# Files that take a minute or more, some of them with few tests.
LONG = {
    "test_bottlenecks.py",
    "test_distribution.py",
    "test_families.py",
    "test_notebook.py",
    "test_push.py",
    "test_train_ldm.py",
    "test_train_masked.py",
    "test_train_pqsd.py",
    "test_training.py",
}


def pytest_collection_modifyitems(items):
    # Long files at the end would leave one of two workers idle; `--no-loadscope-reorder` keeps this order.
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in LONG, -tests[item.path]))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def tiny_config(**overrides):
    """A PQModel of F=4 with d=8, S=4, K=16 that runs in milliseconds."""
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 32,
        "z_channels": 12,
        "latent_channels": 8,
        "num_subspaces": 4,
        "codebook_size": 16,
    }
    return config | overrides


def tiny_unet(channels):
    """A text-conditioned UNet for latents of 8 x 8 pixels and prompt embeddings of dimension 16."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )


@pytest.fixture(scope="module", autouse=True)
def results_stay_as_they_are():
    """A test that runs a benchmark or an experiment gives it another folder."""
    before = _results()
    yield
    assert _results() == before, "a test has written among the results"


def _results():
    files = [path for folder in ("benchmarks", "experiments") for path in (ROOT / folder / "results").rglob("*.*")]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return PQModel(**tiny_config()).eval()


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
