"""Saved models carry their code: in a process that has diffusers and not this package, `AutoModel` loads them."""

import re

import pytest
import torch
from alone import run_alone
from conftest import tiny_config
from diffusers import AutoencoderKL, AutoModel

import diffusers_pq
from diffusers_pq import PQMaskedTransformer, PQModel, QuantizedAutoencoder, product_quantize
from diffusers_pq.models import quantizer, standalone
from diffusers_pq.models.standalone import standalone_code


LOAD = """
import torch
from diffusers import AutoModel

def load(folder):
    return AutoModel.from_pretrained(f"{root}/{folder}", trust_remote_code=True).eval()

model, images = load("model"), torch.load(f"{root}/images.pt", weights_only=True)
with torch.no_grad():
    output = model(images)
torch.save([output.sample, output.codes, model.scale_latents(model.encode(images).latents)], f"{root}/output.pt")
model.save_pretrained(f"{root}/again")
assert load("again").config.latents_mean == model.config.latents_mean
assert load("quantized")(images).sample.shape == images.shape
assert type(load("masked")).__name__ == "PQMaskedTransformer"
"""


def test_saved_models_load_and_are_saved_again_without_the_package(tmp_path):
    torch.manual_seed(0)
    model = PQModel(**tiny_config(latents_mean=[0.1] * 8, latents_std=[2.0] * 8)).eval()
    model.save_pretrained(tmp_path / "model")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    kl = AutoencoderKL(**blocks, block_out_channels=(4, 4), norm_num_groups=4, latent_channels=4)
    product_quantize(kl, [torch.rand(3, 64, 64)], 2, 4).save_pretrained(tmp_path / "quantized")
    sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 4, "code_embed_dim": 4}
    PQMaskedTransformer(2, 4, 4, **sizes, num_classes=2).save_pretrained(tmp_path / "masked")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    torch.save(images, tmp_path / "images.pt")
    run_alone(f"root = {str(tmp_path)!r}" + LOAD)
    sample, codes, scaled = torch.load(tmp_path / "output.pt", weights_only=True)
    with torch.no_grad():
        output = model(images)
        assert torch.equal(codes, output.codes) and torch.equal(sample, output.sample)
        assert torch.equal(scaled, model.scale_latents(model.encode(images).latents))
    assert (tmp_path / "again/diffusers_pq.py").read_text() == (tmp_path / "model/diffusers_pq.py").read_text()
    assert PQModel.from_pretrained(tmp_path / "again").config.latents_std == model.config.latents_std


@pytest.mark.parametrize("model_class", [PQModel, QuantizedAutoencoder, PQMaskedTransformer])
def test_the_code_asks_for_no_file_beside_it(model_class):
    code = standalone_code(model_class)
    compile(code, "diffusers_pq.py", "exec")
    assert not re.search(r"^\s*from\s+\.\S+\s+import", code, re.MULTILINE), "diffusers would look for that file"
    assert "import triton" not in code


def test_beside_the_package_the_code_leaves_its_operators_alone(tmp_path):
    model = PQModel(**tiny_config()).eval()
    model.save_pretrained(tmp_path)
    before = torch.ops.diffusers_pq.nearest_codes.default
    assert type(AutoModel.from_pretrained(str(tmp_path), trust_remote_code=True)) is PQModel
    assert torch.ops.diffusers_pq.nearest_codes.default is before
    assert torch.ops.diffusers_pq_file.nearest_codes.default is not before


def test_modules_that_share_a_name_are_no_single_file(monkeypatch):
    defined = standalone._defined
    monkeypatch.setattr(standalone, "_defined", lambda source: defined(source) | {"shared"})
    with pytest.raises(ValueError, match="cannot be one file: they share the names .'shared'"):
        standalone_code(quantizer.ProductQuantizer)


class Derived(PQModel):
    """Somebody's own."""


def test_a_class_that_is_not_ours_claims_no_code_of_ours(tmp_path):
    Derived(**tiny_config()).save_pretrained(tmp_path)
    assert not (tmp_path / "diffusers_pq.py").exists()
    assert "auto_map" not in (tmp_path / "config.json").read_text()
    assert isinstance(Derived.from_pretrained(tmp_path), diffusers_pq.PQModel)
