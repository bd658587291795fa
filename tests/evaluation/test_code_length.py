import numpy as np
import PIL.Image
import pytest
import torch
from conftest import tiny_config
from diffusers import AmusedScheduler
from test_pipeline_masked_pq import make

from diffusers_pq import MaskedPQPipeline, PQMaskedTransformer, PQModel
from diffusers_pq.cli import main
from diffusers_pq.compression import pack_codes
from diffusers_pq.evaluation.code_length import bits_per_code, bits_per_code_of_files, code_length


def untrained():
    """A class-conditional pipeline whose logits are all 0, as its transformer's start is."""
    torch.manual_seed(0)
    vae = PQModel(**tiny_config()).eval()
    transformer = PQMaskedTransformer(4, 16, 8, 8, 1, 2, 16, num_classes=2).eval()
    return MaskedPQPipeline(vae, transformer, AmusedScheduler(mask_token_id=16), id2label={0: "frog", 1: "7"})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three pictures of different sizes."""
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(3)]
    for path, width in zip(paths, (40, 32, 33)):
        PIL.Image.fromarray(generator.integers(0, 256, (36, width, 3), dtype=np.uint8)).save(path)
    return paths


def test_a_uniform_prior_takes_log2_k_bits_a_code_in_any_number_of_steps():
    transformer, codes = untrained().transformer, torch.randint(16, (2, 4, 4, 4))
    for steps in (1, 3, 64, 100):
        bits = code_length(transformer, codes, {"class_labels": torch.tensor([0, 1])}, steps)
        torch.testing.assert_close(bits, torch.full((2,), 4.0 * 64, dtype=torch.float64))
    with pytest.raises(ValueError, match="`num_steps` must be at least 1, but is 0"):
        code_length(transformer, codes, {"class_labels": torch.tensor([0, 1])}, 0)


def test_a_prior_that_knows_a_code_pays_less_for_it():
    pipeline = untrained()
    codes, labels = torch.full((1, 4, 4, 4), 3), {"class_labels": torch.tensor([0])}
    pipeline.transformer.logits_bias.data[:, 3] = np.log(15)  # as likely as the 15 others together
    torch.testing.assert_close(code_length(pipeline.transformer, codes, labels, 4), torch.tensor([64.0]).double())


def test_the_adaptive_coder_stands_beside_with_what_it_writes():
    pipeline, codes = untrained(), torch.randint(16, (2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    bits = bits_per_code(pipeline.vae, pipeline.transformer, codes, {"class_labels": torch.tensor([0, 1])}, 2)
    written = sum(8 * len(pack_codes(pipeline.vae, one[None], (32, 32))) for one in codes)
    assert bits == {"masked": pytest.approx(4), "adaptive": written / codes.numel(), "uniform": 4}


def test_files_of_any_size_are_measured_by_class_by_text_or_by_neither(pictures):
    by_class, by_text = make(), make(text=True)
    results = [
        bits_per_code_of_files(by_class, pictures, "apple", num_steps=2, batch_size=2),
        bits_per_code_of_files(by_class, pictures, num_steps=2),
        bits_per_code_of_files(by_text, pictures, prompt="a frog", num_steps=2),
        bits_per_code_of_files(by_text, pictures, num_steps=2),
    ]
    assert len({result["masked"] for result in results}) == 4
    with pytest.raises(ValueError, match="This model takes `class_labels`, and no `prompt`"):
        bits_per_code_of_files(by_class, pictures, prompt="a frog")
    with pytest.raises(ValueError, match="This model takes `prompt`, and no `class_labels`"):
        bits_per_code_of_files(by_text, pictures, 0)


def test_the_command_names_classes_by_name_or_number(pictures, tmp_path, capsys):
    untrained().save_pretrained(tmp_path / "masked")
    command = ["code-length", *map(str, pictures), "--model", str(tmp_path / "masked"), "--steps", "2"]
    assert main([*command, "--class-label", "frog"]) == 0
    assert "bits per code of 3 pictures: masked 4, adaptive " in capsys.readouterr().out
    assert main([*command, "--class-label", "2"]) == 1
    assert "`class_labels` must be in 0 ... 1, but one is 2" in capsys.readouterr().err
    (tmp_path / "damaged.png").write_bytes(b"no picture")
    assert main(["code-length", str(tmp_path / "damaged.png"), *command[4:]]) == 1
    assert "damaged.png cannot be read" in capsys.readouterr().err
