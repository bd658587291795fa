import math

import pytest
import torch
from conftest import tiny_config

from diffusers_pq import PQMaskedTransformer, PQModel
from diffusers_pq.training.masked import MaskedCodePredictor, MaskedObjective, draw_masks


def tiny(**config):
    torch.manual_seed(0)
    sizes = {"num_subspaces": 4, "codebook_size": 16, "sample_size": 8, "code_embed_dim": 8, "num_layers": 1}
    return PQMaskedTransformer(
        **sizes | {"num_attention_heads": 2, "attention_head_dim": 16, "num_classes": 2} | config
    )


def test_shares_of_hidden_codes_follow_the_cosine():
    masks = draw_masks((4000, 4, 4, 4), torch.Generator().manual_seed(0))
    shares = masks.flatten(1).float().mean(1)
    assert shares.min() >= 1 / 64
    assert shares.mean() == pytest.approx(2 / math.pi + 0.5 / 64, abs=0.01)  # E cos(pi/2 u), rounded up
    assert masks.float().mean(0).std() < 0.015, "every place is hidden equally often"


def test_only_hidden_codes_cost_and_certain_guesses_cost_nothing():
    codes = torch.randint(16, (3, 4, 8, 8))
    objective = MaskedObjective(vae=None)

    def uniform(codes, mask, condition):
        return torch.zeros(3, 4, 16, 8, 8)

    def knows_hidden(codes, mask, condition):
        right = torch.nn.functional.one_hot(codes, 16).movedim(-1, 2) * 100.0
        return torch.where(mask.unsqueeze(2), right, -right)

    torch.testing.assert_close(objective.losses(uniform, codes, None), torch.full((3,), math.log(16)))
    torch.testing.assert_close(objective.losses(knows_hidden, codes, None), torch.zeros(3))


def test_codes_are_taken_from_the_cache_or_encoded():
    torch.manual_seed(0)
    vae = PQModel(**tiny_config()).eval()
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    codes = MaskedObjective(vae).inputs({"pixel_values": pictures}, pictures.device)
    assert torch.equal(codes, vae.encode_codes(pictures))
    assert torch.equal(MaskedObjective(vae).inputs({"codes": codes}, codes.device), codes)


def test_eight_pictures_are_learned():
    model = MaskedCodePredictor(tiny(num_layers=2))
    codes, labels = torch.randint(16, (8, 4, 4, 4)), torch.zeros(8, dtype=torch.long)
    codes[:, :, :, 1:] = codes[:, :, :, :1]  # a row's codes repeat: what is hidden can be told from what is seen
    optimizer = torch.optim.Adam(model.learned_parameters(), 3e-3)
    objective = MaskedObjective(vae=None)
    losses = []
    for _ in range(150):
        loss = objective.losses(model, codes, labels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(16), abs=0.01)
    assert sum(losses[-10:]) / 10 < 0.6 * losses[0]


def test_a_text_encoder_is_trained_only_if_asked():
    encoder = torch.nn.Linear(2, 2)
    transformer = tiny()
    frozen = MaskedCodePredictor(transformer, encoder).learned_parameters()
    assert len(frozen) == len(list(transformer.parameters()))
    assert len(MaskedCodePredictor(transformer, encoder, True).learned_parameters()) == len(frozen) + 2
