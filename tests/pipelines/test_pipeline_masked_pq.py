import numpy as np
import PIL.Image
import pytest
import torch
from conftest import tiny_config
from diffusers import AmusedScheduler, AutoencoderKL, DiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers_pq import MaskedPQPipeline, PQMaskedTransformer, PQModel
from diffusers_pq.training.stable_diffusion import train_clip_tokenizer


NAMES = {0: "crane, bird", 1: "apple", 2: "frog"}


def make(names=NAMES, text=False, **config):
    torch.manual_seed(0)
    vae = PQModel(**tiny_config()).eval()
    sizes = {"num_subspaces": vae.config.num_subspaces, "codebook_size": vae.config.codebook_size, "sample_size": 8}
    sizes |= {"code_embed_dim": 8, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    parts = {}
    if text:
        tokenizer = train_clip_tokenizer(["a red apple", "a frog"], 530, 8)
        encoder = CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=8,
        )  # fmt: skip
        parts, names = {"text_encoder": CLIPTextModel(encoder).eval(), "tokenizer": tokenizer}, None
    condition = {"cross_attention_dim": 16} if text else {"num_classes": 3}
    transformer = PQMaskedTransformer(**sizes | condition | config).eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    scheduler = AmusedScheduler(mask_token_id=vae.config.codebook_size)
    pipeline = MaskedPQPipeline(vae, transformer, scheduler, **parts, id2label=names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline():
    return make()


def paint(pipeline, labels=("apple", 2), **kwargs):
    options = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    return pipeline(class_labels=list(labels), **options | kwargs).images


def test_pictures_are_decoded_codes(pipeline):
    codes = paint(pipeline, output_type="latent")
    assert codes.shape == (2, pipeline.vae.config.num_subspaces, 8, 8)
    assert codes.min() >= 0 and codes.max() < pipeline.vae.config.codebook_size
    expected = (pipeline.vae.decode_codes(codes).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(paint(pipeline), expected)
    assert paint(pipeline, output_type="pil", height=32, width=48)[0].size == (48, 32)


def test_the_class_the_seed_and_each_setting_matter(pipeline):
    codes = paint(pipeline, output_type="latent")
    assert torch.equal(paint(pipeline, output_type="latent"), codes)
    changes = [{"labels": (0, 0)}, {"generator": torch.Generator().manual_seed(1)}, {"guidance_scale": 9.0}]
    changes += [{"num_inference_steps": 5}, {"temperature": 0.2}, {"order": "random"}, {"order_temperature": 0.0}]
    for change in [*changes, {"guidance_schedule": "constant"}, {"guidance_scale": 1.0}]:
        assert not torch.equal(paint(pipeline, output_type="latent", **change), codes), change


def test_a_generator_for_each_picture_makes_it_independent_of_its_batch(pipeline):
    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = paint(pipeline, output_type="latent", generator=seeded(3, 4))
    assert torch.equal(paint(pipeline, labels=[2], output_type="latent", generator=seeded(4)), both[1:])


def test_every_step_fixes_codes_along_the_cosine(pipeline):
    hidden = []

    def count(pipeline, step, timestep, tensors):
        hidden.append((tensors["codes"] == pipeline.vae.config.codebook_size).float().mean().item())
        return tensors

    paint(pipeline, num_inference_steps=4, callback_on_step_end=count)
    expected = [np.cos(np.pi / 2 * step / 4) for step in (1, 2, 3, 4)]
    assert hidden == pytest.approx(expected, abs=0.01)


def test_given_codes_stay(pipeline):
    codes = torch.randint(pipeline.vae.config.codebook_size, (1, pipeline.vae.config.num_subspaces, 8, 8))
    codes[:, :2, 3:] = -1
    painted = paint(pipeline, codes=codes, output_type="latent")
    kept = (codes >= 0).expand_as(painted)
    assert torch.equal(painted[kept], codes.expand_as(painted)[kept])
    assert painted.min() >= 0 and not torch.equal(painted[0], painted[1])


def test_inpainting_keeps_the_codes_of_what_the_mask_keeps(pipeline):
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    mask = PIL.Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    painted = paint(pipeline, image=picture, mask_image=mask, output_type="latent")
    encoded = pipeline.vae.encode_codes(pipeline.image_processor.preprocess(picture))
    half = painted.shape[-1] // 2
    assert torch.equal(painted[..., half:], encoded[..., half:].expand_as(painted[..., half:]))
    assert not torch.equal(painted[..., :half], encoded[..., :half].expand_as(painted[..., :half]))


def test_a_text_conditional_pipeline_listens_and_is_saved(tmp_path):
    pipeline = make(text=True)
    options = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 2.0}
    pictures = [
        pipeline([prompt], **options, generator=torch.Generator().manual_seed(0)).images
        for prompt in ("a red apple", "a frog")
    ]
    assert not torch.equal(*pictures)
    pipeline.save_pretrained(tmp_path)
    loaded = MaskedPQPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    again = loaded(["a frog"], **options, generator=torch.Generator().manual_seed(0)).images
    assert torch.equal(again, pictures[1])
    with pytest.raises(ValueError, match="This model takes `prompt`, and no `class_labels`"):
        pipeline(class_labels=[0])


def test_is_saved_and_loaded_by_diffusers_too(pipeline, tmp_path):
    codes = paint(pipeline, output_type="latent")
    pipeline.save_pretrained(tmp_path)
    for load in (MaskedPQPipeline.from_pretrained, DiffusionPipeline.from_pretrained):
        loaded = load(tmp_path, trust_remote_code=True)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is MaskedPQPipeline and loaded.get_label_ids("bird") == [0]
        assert torch.equal(paint(loaded, output_type="latent"), codes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [3]}, "`class_labels` must be in 0 ... 2, but one is 3"),
        ({"labels": ["pear"]}, "unknown class 'pear'"),
        ({"prompt": "a frog"}, "This model takes `class_labels`, and no `prompt`"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be at least 1, but is 0"),
        ({"temperature": 0.0}, "`temperature` must be above 0"),
        ({"order": "raster"}, "`order` must be"),
        ({"guidance_schedule": "cosine"}, "`guidance_schedule` must be"),
        ({"height": 30}, "`height` must be a positive multiple of the downsampling factor F = 4, but is 30"),
        ({"generator": [torch.Generator()]}, "`generator` has 1 entries for 2 pictures"),
        ({"codes": torch.zeros(1, 1, 8, 8, dtype=torch.long)}, r"`codes` must be integers of shape \[batch, S = "),
        ({"codes": torch.full((1, 4, 8, 8), 99)}, "`codes` must lie in .* Were they made by another model"),
        ({"codes": torch.full((3, 4, 8, 8), -1)}, "Cannot spread 3 pictures"),
        ({"mask_image": PIL.Image.new("L", (32, 32))}, "`image` and `mask_image` go together"),
    ],
)
def test_bad_arguments_are_named(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        paint(pipeline, **arguments)


def test_parts_that_do_not_fit_are_refused(pipeline):
    parts = dict(pipeline.components)
    with pytest.raises(ValueError, match="`mask_token_id` of the `scheduler` must be K"):
        MaskedPQPipeline(**parts | {"scheduler": AmusedScheduler(mask_token_id=1)})
    with pytest.raises(ValueError, match="`num_subspaces` is 3 in the `transformer`"):
        make(num_subspaces=3)
    with pytest.raises(TypeError, match="`vae` must be a PQModel"):
        MaskedPQPipeline(**parts | {"vae": AutoencoderKL()})
    with pytest.raises(ValueError, match="`id2label` names 1 classes, but the denoiser has 3"):
        make(names={0: "crane"})
