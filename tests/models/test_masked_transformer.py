import pytest
import torch

from diffusers_pq import PQMaskedTransformer, ProductQuantizer


def tiny(**config):
    torch.manual_seed(0)
    sizes = {"num_subspaces": 4, "codebook_size": 8, "sample_size": 4, "code_embed_dim": 8, "num_layers": 2}
    sizes |= {"num_attention_heads": 2, "attention_head_dim": 8, "num_classes": 3}
    model = PQMaskedTransformer(**sizes | config)
    for parameter in model.parameters():  # the zeros of the start hide what is not wired
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def inputs(height=4, width=4):
    codes = torch.randint(8, (2, 4, height, width), generator=torch.Generator().manual_seed(1))
    return codes, torch.rand(codes.shape, generator=torch.Generator().manual_seed(2)) < 0.5


LABELS = torch.tensor([0, 3])


def test_masked_codes_are_hidden_and_known_ones_are_seen():
    model, (codes, mask) = tiny(), inputs()
    logits = model(codes, mask, LABELS).logits
    assert logits.shape == (2, 4, 8, 4, 4)
    other = torch.where(mask, (codes + 1) % 8, codes)
    torch.testing.assert_close(model(other, mask, LABELS).logits, logits)
    other = torch.where(mask, codes, (codes + 1) % 8)
    assert (model(other, mask, LABELS).logits - logits).abs().max() > 1e-3


def test_codes_of_masked_places_may_have_any_value():
    model, (codes, mask) = tiny(), inputs()
    assert model(codes.masked_fill(mask, -1), mask, LABELS).logits.isfinite().all()


def test_the_class_the_share_of_masks_and_the_place_matter():
    model, (codes, mask) = tiny(), inputs()
    logits = model(codes, mask, LABELS).logits
    assert (model(codes, mask, LABELS.flip(0)).logits - logits).abs().max() > 1e-3
    everywhere = torch.zeros(1, 4, 4, 4, dtype=torch.long)
    places = model(everywhere, torch.ones_like(everywhere, dtype=torch.bool), LABELS[:1]).logits
    # Equal tokens: rotary positions change nothing in self-attention over equal values.
    torch.testing.assert_close(places, places[..., :1, :1].expand_as(places))
    everywhere[0, 0, 0, 0] = 1
    mask = torch.zeros_like(everywhere, dtype=torch.bool)
    places = model(everywhere, mask, LABELS[:1]).logits
    assert (places[..., 0, 1] - places[..., 2, 3]).abs().max() > 1e-5


def test_any_size_of_latents_works():
    model, (codes, mask) = tiny(), inputs(3, 6)
    assert model(codes, mask, LABELS).logits.shape == (2, 4, 8, 3, 6)


def test_padding_of_a_text_is_not_attended_to():
    model, (codes, mask) = tiny(num_classes=None, cross_attention_dim=6), inputs()
    states = torch.randn(2, 5, 6)
    attended = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    logits = model(codes, mask, encoder_hidden_states=states, encoder_attention_mask=attended).logits
    states[0, 3:] += 1
    again = model(codes, mask, encoder_hidden_states=states, encoder_attention_mask=attended).logits
    torch.testing.assert_close(again, logits)
    states[0, 0] += 1
    again = model(codes, mask, encoder_hidden_states=states, encoder_attention_mask=attended).logits
    assert (again - logits).abs().max() > 1e-3


def test_begins_with_every_entry_equally_likely():
    model = PQMaskedTransformer(4, 8, 4, 8, 1, 2, 8, num_classes=3)
    assert not model(*inputs(), LABELS).logits.any()


def test_embeddings_start_with_near_entries_near():
    torch.manual_seed(0)
    quantizer, model = ProductQuantizer(8, 4, 64), tiny(codebook_size=64, code_embed_dim=64)
    model.init_code_embeddings(quantizer)
    entries, embeddings = quantizer.codebooks[1].detach(), model.code_embeddings[1].detach()
    near = torch.cdist(entries, entries).fill_diagonal_(torch.inf).argmin(1)
    distances = torch.cdist(embeddings, embeddings)
    assert distances.gather(1, near[:, None]).mean() < 0.6 * distances.sum() / (64 * 63)
    with pytest.raises(ValueError, match="`quantizer` has S = 2 and K = 64, but this model S = 4"):
        model.init_code_embeddings(ProductQuantizer(8, 2, 64))


def test_size_grows_with_the_subspaces_and_not_with_the_joint_indices():
    one, two = (tiny(num_subspaces=subspaces, codebook_size=16) for subspaces in (8, 16))
    per_subspace = 16 * 8 + 8 + 2 * 8 * 16 + 8 + 16  # table, mask, both projections, their biases
    assert two.num_parameters() - one.num_parameters() == 8 * per_subspace


def test_gradient_checkpointing_changes_nothing():
    model, (codes, mask) = tiny().train(), inputs()
    model(codes, mask, LABELS).logits.square().mean().backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.enable_gradient_checkpointing()
    model(codes, mask, LABELS).logits.square().mean().backward()
    for parameter, expected in zip(model.parameters(), plain):
        torch.testing.assert_close(parameter.grad, expected)


def test_is_saved_and_loaded(tmp_path):
    model, (codes, mask) = tiny(), inputs()
    model.save_pretrained(tmp_path)
    loaded = PQMaskedTransformer.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(codes, mask, LABELS).logits, model(codes, mask, LABELS).logits)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"codebook_size": 1}, "`codebook_size` must be at least 2, but is 1"),
        ({"num_layers": 0}, "`num_layers` must be at least 1, but is 0"),
        ({"attention_head_dim": 6}, "`attention_head_dim` must be a positive multiple of 4, but is 6"),
        ({"cross_attention_dim": 8}, "exactly one of `num_classes` and `cross_attention_dim`"),
    ],
)
def test_bad_sizes_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        tiny(**config)


def test_bad_inputs_are_named():
    model, (codes, mask) = tiny(), inputs()
    with pytest.raises(ValueError, match=r"`codes` must be integers of shape \[batch, 4, height, width\]"):
        model(codes[:, :2], mask[:, :2], LABELS)
    with pytest.raises(ValueError, match="`mask` must be of booleans and have the shape"):
        model(codes, mask[..., :2], LABELS)
    with pytest.raises(ValueError, match="`class_labels` are missing; 3 stands for no class"):
        model(codes, mask)
