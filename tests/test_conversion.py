import json
import os
import subprocess
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import yaml
from diffusers import AutoencoderKL, VQModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from hub_stand_in import File, Hub, Repository
from safetensors.torch import save, save_file

from diffusers_pq import PQModel
from diffusers_pq.cli import main
from diffusers_pq.conversion import convert_checkpoint, load_original_autoencoder


IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

DDCONFIG = {
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "z_channels": 24,
    "double_z": False,
    "dropout": 0.0,
}


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    def __init__(self, channels, out_channels):
        super().__init__()
        self.norm1, self.conv1 = norm(channels), nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = norm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weights = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(-1)
        return x + self.proj_out((v @ weights.transpose(1, 2)).view_as(x))


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2))


class Level(nn.Module):
    def __init__(self, channels, out_channels, blocks, has_attention):
        super().__init__()
        inputs = [channels] + [out_channels] * (blocks - 1)
        self.block = nn.ModuleList(ResBlock(width, out_channels) for width in inputs)
        self.attn = nn.ModuleList(Attention(out_channels) for _ in inputs if has_attention)

    def forward(self, x):
        for number, block in enumerate(self.block):
            x = self.attn[number](block(x)) if len(self.attn) else block(x)
        return x


def middle(channels):
    blocks = {"block_1": ResBlock(channels, channels), "attn_1": Attention(channels)}
    return nn.Sequential(OrderedDict(blocks | {"block_2": ResBlock(channels, channels)}))


class Encoder(nn.Module):
    def __init__(self, widths, blocks, attention, out_channels):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        inputs = [widths[0], *widths[:-1]]
        self.down = nn.ModuleList(Level(a, b, blocks, c) for a, b, c in zip(inputs, widths, attention))
        for level, width in zip(self.down[:-1], widths):
            level.downsample = Downsample(width)
        self.mid = middle(widths[-1])
        self.norm_out, self.conv_out = norm(widths[-1]), nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            x = level.downsample(x) if hasattr(level, "downsample") else x
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, widths, blocks, attention, z_channels):
        super().__init__()
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1])
        # Number 0 is the finest level.
        inputs = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(Level(a, b, blocks + 1, c) for a, b, c in zip(inputs, widths, attention))
        for level, width in zip(self.up[1:], widths[1:]):
            level.upsample = Upsample(width)
        self.norm_out, self.conv_out = norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):
        z = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            z = level(z)
            z = level.upsample(z) if hasattr(level, "upsample") else z
        return self.conv_out(F.silu(self.norm_out(z)))


class Original(nn.Module):
    """The original autoencoder, of plain layers under the names its checkpoints have."""

    def __init__(self, ddconfig, embed_dim, n_embed=0, num_spaces=None):
        super().__init__()
        widths = [ddconfig["ch"] * multiple for multiple in ddconfig["ch_mult"]]
        attention = [ddconfig["resolution"] // 2**i in ddconfig["attn_resolutions"] for i in range(len(widths))]
        parts = 1 if n_embed else 2  # of a KL autoencoder: mean and log variance
        z_channels, blocks = ddconfig["z_channels"], ddconfig["num_res_blocks"]
        self.encoder = Encoder(widths, blocks, attention, parts * z_channels)
        self.decoder = Decoder(widths, blocks, attention, z_channels)
        self.quant_conv = nn.Conv2d(parts * z_channels, parts * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        if n_embed:
            self.quantize = nn.Module()
            books = [nn.Embedding(n_embed, embed_dim // (num_spaces or 1)) for _ in range(num_spaces or 1)]
            if num_spaces:
                self.quantize.embeddings = nn.ModuleList(books)
            else:
                self.quantize.embedding = books[0]
            self.books = lambda: [book.weight for book in books]

    def encode(self, x):
        return self.quant_conv(self.encoder(x))

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z))

    def find_codes(self, z):
        rows = z.permute(0, 2, 3, 1).chunk(len(self.books()), dim=-1)
        return torch.stack([torch.cdist(row, book).argmin(-1) for row, book in zip(rows, self.books())], dim=1)

    def reconstruct(self, x):
        codes = self.find_codes(self.encode(x))
        entries = [book[codes[:, number]] for number, book in enumerate(self.books())]
        return self.decode(torch.cat(entries, dim=-1).permute(0, 3, 1, 2))


def make_original(ddconfig=DDCONFIG, **sizes):
    torch.manual_seed(0)
    original = Original(ddconfig, **sizes).eval()
    for parameter in original.parameters():  # biases and norms start alike, which would hide a mix-up
        parameter.data += 0.05 * torch.randn_like(parameter)
    return original


def write(folder, tensors, ddconfig=DDCONFIG, **options):
    """A Lightning checkpoint and its YAML file."""
    checkpoint, config = folder / "last.ckpt", folder / "model.yaml"
    torch.save({"epoch": 3, "global_step": 7, "state_dict": tensors}, checkpoint)
    config.write_text(yaml.safe_dump({"model": {"target": "x", "params": {"ddconfig": ddconfig, **options}}}))
    return checkpoint, config


@pytest.fixture
def x():
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def vqgan(tmp_path):
    """A checkpoint, its YAML file and its tensors."""
    tensors = make_original(embed_dim=16, n_embed=32).state_dict()
    return *write(tmp_path, tensors, embed_dim=16, n_embed=32), tensors


def convert(checkpoint, config, output, *flags):
    assert main(["convert", str(checkpoint), "--config", str(config), "--output", str(output), *flags]) == 0
    return output


def assert_equal(found, expected):
    assert expected.std() > 0.1, "a constant would be easy to meet"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("resolutions", [[8], [16], [16, 8], []])
@torch.no_grad()
def test_a_vqgan_becomes_a_pq_model_of_one_subspace(resolutions, x, tmp_path):
    ddconfig = DDCONFIG | {"attn_resolutions": resolutions}
    original = make_original(ddconfig, embed_dim=16, n_embed=32)
    files = write(tmp_path, original.state_dict(), ddconfig, embed_dim=16, n_embed=32)
    model = PQModel.from_pretrained(convert(*files, tmp_path / "out")).eval()
    assert (model.config.num_subspaces, model.config.codebook_size, model.config.scaling_factor) == (1, 32, 1.0)
    assert_equal(model.encode(x).latents, original.encode(x))
    assert torch.equal(model.encode_codes(x), original.find_codes(original.encode(x)))
    assert_equal(model(x).sample, original.reconstruct(x))


@torch.no_grad()
def test_a_vqgan_of_more_levels_and_blocks_becomes_the_vq_model_of_diffusers(x, tmp_path, capsys):
    ddconfig = DDCONFIG | {"ch_mult": [1, 2, 1], "num_res_blocks": 2}
    original = make_original(ddconfig, embed_dim=16, n_embed=32)
    files = write(tmp_path, original.state_dict(), ddconfig, embed_dim=16, n_embed=32)
    model = VQModel.from_pretrained(convert(*files, tmp_path / "out", "--target", "VQModel")).eval()
    assert "VQModel of" in capsys.readouterr().out and model.config.scaling_factor == 1.0
    assert_equal(model.encode(x).latents, original.encode(x))
    assert_equal(model(x).sample, original.reconstruct(x))


@torch.no_grad()
def test_a_model_without_any_attention_converts(x, tmp_path):
    original = make_original(embed_dim=16, n_embed=32)
    original.encoder.mid.attn_1 = original.decoder.mid.attn_1 = nn.Identity()
    original.encoder.down[1].attn = original.decoder.up[1].attn = nn.ModuleList()
    files = write(tmp_path, original.state_dict(), DDCONFIG | {"attn_type": "none"}, embed_dim=16, n_embed=32)
    assert_equal(load_original_autoencoder(*files)(x).sample, original.reconstruct(x))


@pytest.mark.parametrize("prefix", ["quantize.embeddings.", "embeddings."])
@torch.no_grad()
def test_a_pqgan_becomes_a_pq_model(prefix, x, tmp_path):
    original = make_original(embed_dim=24, n_embed=8, num_spaces=12)  # numbers of two digits
    tensors = {name.replace("quantize.embeddings.", prefix): value for name, value in original.state_dict().items()}
    files = write(tmp_path, tensors, embed_dim=24, n_embed=8)
    model = PQModel.from_pretrained(convert(*files, tmp_path / "out")).eval()
    assert (model.config.num_subspaces, model.config.codebook_size, model.config.latent_channels) == (12, 8, 24)
    assert torch.equal(model.encode_codes(x), original.find_codes(original.encode(x)))
    assert_equal(model(x).sample, original.reconstruct(x))


@torch.no_grad()
def test_the_unused_quantisers_and_the_yaml_of_pqgans_code_are_understood(x, tmp_path):
    original = make_original(embed_dim=24, n_embed=8, num_spaces=12)
    tensors = original.state_dict()
    tensors |= {name.replace("quantize", "vq_split"): value for name, value in tensors.items() if "quantize" in name}
    for unused in ("quantize", "vq_split", "vq_standard"):
        tensors[f"{unused}.embedding.weight"] = torch.randn(8, 24)
    checkpoint, config = write(tmp_path, tensors)
    arguments = {"ddconfig": DDCONFIG, "embed_dim": 24, "n_embed": 8, "num_spaces": 12, "distance_type": "l2"}
    config.write_text(yaml.safe_dump({"model": {"class_path": "vv.models.VQModel", "init_args": arguments}}))
    assert_equal(load_original_autoencoder(checkpoint, config)(x).sample, original.reconstruct(x))


@pytest.mark.parametrize("resolutions", [[8], []])
@torch.no_grad()
def test_a_kl_checkpoint_becomes_an_autoencoder_kl(resolutions, x, tmp_path):
    ddconfig = DDCONFIG | {"z_channels": 4, "double_z": True, "attn_resolutions": resolutions}
    original = make_original(ddconfig, embed_dim=4)
    files = write(tmp_path, original.state_dict(), ddconfig, embed_dim=4)
    model = AutoencoderKL.from_pretrained(convert(*files, tmp_path / "out")).eval()
    assert model.config.scaling_factor == 0.18215
    mean = original.encode(x).chunk(2, dim=1)[0]
    assert_equal(model.encode(x).latent_dist.parameters, original.encode(x))
    assert_equal(model.decode(mean).sample, original.decode(mean))


def test_stable_diffusions_layout_converts_as_in_diffusers(tmp_path):
    ddconfig = DDCONFIG | {"z_channels": 4, "double_z": True, "attn_resolutions": []}
    tensors = make_original(ddconfig, embed_dim=4).state_dict()
    model = load_original_autoencoder(*write(tmp_path, tensors, ddconfig, embed_dim=4))
    expected = convert_ldm_vae_checkpoint(tensors, model.config)
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("measured", [True, False])
def test_the_first_stage_of_a_diffusion_model_is_taken_with_its_scale(measured, vqgan, tmp_path):
    _, config, tensors = vqgan
    inner = yaml.safe_load(config.read_text())["model"]["params"]
    outer = {"scale_factor": 1.0 if measured else 0.25, "first_stage_config": {"params": inner}}
    config.write_text(yaml.safe_dump({"model": {"params": outer}}))
    whole = {f"first_stage_model.{name}": value for name, value in tensors.items()}
    whole |= {"model.diffusion_model.out.weight": torch.ones(1), "first_stage_model.loss.logvar": torch.ones(())}
    whole |= {"scale_factor": torch.tensor(0.25)} if measured else {}
    save_file(whole, tmp_path / "model.safetensors")
    model = load_original_autoencoder(tmp_path / "model.safetensors", config)
    assert model.config.scaling_factor == 0.25
    assert torch.equal(model.quantizer.codebooks[0], tensors["quantize.embedding.weight"])


def write_pqgan(folder, tensors, **data):
    """A checkpoint and a config as PQGAN's code writes them; `data` is the section of that name."""
    checkpoint, config = folder / "pqgan.safetensors", folder / "pqgan.yaml"
    save_file(tensors, checkpoint)
    arguments = {"ddconfig": DDCONFIG, "embed_dim": 24, "n_embed": 8, "num_spaces": 12, "split_quantizer": True}
    config.write_text(yaml.safe_dump({"model": {"class_path": "vv.VQModel", "init_args": arguments}, "data": data}))
    return checkpoint, config


@torch.no_grad()
def normalized_reconstruction(original, x, mean, std):
    """What PQGAN's code does with pictures, from [-1, 1] to [-1, 1]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (original.reconstruct(((x + 1) / 2 - mean) / std) * std + mean) * 2 - 1


@pytest.mark.parametrize(
    "data, statistics",
    [
        ({"class_path": "vv.data.ImageNetLoader", "init_args": {"resolution": 256}}, IMAGENET),
        ({"class_path": "vv.data.ImageNetLoader", "init_args": {"norm_values": None}}, IMAGENET),
        ({"class_path": "vv.data.ImageNetLoader", "init_args": {"norm_values": [0.5, 0.5]}}, None),
        ({"class_path": "vv.data.FFHQLoader"}, None),
        ({"class_path": "vv.data.LSUNLoader", "init_args": {"norm_values": [0.0, 1.0]}}, ([0.0] * 3, [1.0] * 3)),
    ],
)
@torch.no_grad()
def test_a_converted_pqgan_takes_pictures_in_minus_one_to_one_however_it_was_trained(data, statistics, x, tmp_path):
    original = make_original(embed_dim=24, n_embed=8, num_spaces=12)
    files = write_pqgan(tmp_path, original.state_dict(), **data)
    model = PQModel.from_pretrained(convert(*files, tmp_path / "out")).eval()
    found = model.config.image_mean, model.config.image_std
    assert found == (statistics or (None, None))
    expected = normalized_reconstruction(original, x, *(statistics or ([0.5] * 3, [0.5] * 3)))
    assert_equal(model(x).sample, expected)


def test_a_normalisation_that_the_config_does_not_tell_can_be_given(tmp_path, caplog):
    tensors = make_original(embed_dim=24, n_embed=8, num_spaces=12).state_dict()
    checkpoint, config = write_pqgan(tmp_path, tensors, class_path="vv.data.LAIONLoader")
    assert load_original_autoencoder(checkpoint, config).config.image_mean is None
    assert "does not say how the training pictures were normalised" in caplog.text
    flags = ["--image-mean", "0.1", "0.2", "0.3", "--image-std", "1", "2", "4"]
    model = PQModel.from_pretrained(convert(checkpoint, config, tmp_path / "out", *flags))
    assert (model.config.image_mean, model.config.image_std) == ([0.1, 0.2, 0.3], [1.0, 2.0, 4.0])
    with pytest.raises(ValueError, match="`image_mean` and `image_std` must be given together"):
        load_original_autoencoder(checkpoint, config, image_mean=[0.5] * 3)
    with pytest.raises(ValueError, match="`image_std` must have one value for each of the 3 colour channels"):
        load_original_autoencoder(checkpoint, config, image_mean=[0.5] * 3, image_std=[0.5])


def test_the_config_beside_the_checkpoint_is_the_default(tmp_path):
    tensors = make_original(embed_dim=24, n_embed=8, num_spaces=12).state_dict()
    checkpoint, config = write_pqgan(tmp_path, tensors, class_path="vv.data.FFHQLoader")
    assert load_original_autoencoder(checkpoint).config.num_subspaces == 12
    config.unlink()
    with pytest.raises(FileNotFoundError, match="No such config: .*pqgan.yaml. Name the YAML file"):
        load_original_autoencoder(checkpoint)


CONVERT_FROM_HUB = """
import json, sys
from diffusers_pq.cli import main

print(json.dumps([main(["convert", *arguments]) for arguments in json.loads(sys.argv[1])]))
"""


@torch.no_grad()
def test_one_command_fetches_and_converts_the_authors_models(x, tmp_path):
    original = make_original(embed_dim=24, n_embed=8, num_spaces=12)
    write_pqgan(tmp_path, original.state_dict(), class_path="vv.data.ImageNetLoader")
    weights, config = save(original.state_dict()), File((tmp_path / "pqgan.yaml").read_bytes())
    files = {}
    for name in ("PQGAN_F8_K512_Z128_S64", "PQGAN_F16_K128_Z128_S64"):
        files |= {f"checkpoints/{name}.safetensors": File(weights, is_lfs=True), f"checkpoints/{name}.yaml": config}
    hub = Hub()
    hub.repositories["CVL-Heidelberg/PQGAN"] = repository = Repository(private=False)
    repository.commit("main", files)
    hub.objects[File(weights).sha256] = weights
    authors = "CVL-Heidelberg/PQGAN"
    commands = [
        [f"{authors}:F8", "--output", str(tmp_path / "f8")],
        [f"{authors}:checkpoints/PQGAN_F16_K128_Z128_S64.safetensors", "--output", str(tmp_path / "file")],
        [f"{authors}:f16", "--output", str(tmp_path / "f16")],
        [f"{authors}:F32", "--output", str(tmp_path / "x")],
        [authors, "--output", str(tmp_path / "x")],
        [f"{authors}:last.ckpt", "--output", str(tmp_path / "x")],
        ["nobody/pqgan:last.ckpt", "--output", str(tmp_path / "x")],
    ]
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CONVERT_FROM_HUB, json.dumps(commands)]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    hub.close()
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == [0, 0, 0, 1, 1, 1, 1]
    lines = [line for line in result.stderr.splitlines() if line.startswith("diffusers-pq: ")]
    for line in lines[:2]:
        assert "choose CVL-Heidelberg/PQGAN:F8 or CVL-Heidelberg/PQGAN:F16" in line
    assert lines[2] == "diffusers-pq: The repository CVL-Heidelberg/PQGAN has no file last.ckpt."
    assert "nobody/pqgan" in lines[3] and "Traceback" not in result.stderr
    expected = normalized_reconstruction(original, x, *IMAGENET)
    for name in ("f8", "f16", "file"):
        model = PQModel.from_pretrained(tmp_path / name).eval()
        assert [model.config.image_mean, model.config.image_std] == list(IMAGENET)
        assert_equal(model(x).sample, expected)


def test_half_precision_is_written_in_float32(vqgan, tmp_path):
    _, config, tensors = vqgan
    save_file({name: value.half() for name, value in tensors.items()}, tmp_path / "half.safetensors")
    model = load_original_autoencoder(tmp_path / "half.safetensors", config)
    assert model.dtype == torch.float32 and not model.training
    assert torch.equal(model.quant_conv.weight, tensors["quant_conv.weight"].half().float())


def test_training_state_is_left_behind(vqgan, tmp_path):
    checkpoint, config, tensors = vqgan
    before = load_original_autoencoder(checkpoint, config).state_dict()
    extra = {"loss.discriminator.main.0.weight": torch.ones(2), "quantize.embedding.cluster_size": torch.ones(32)}
    write(tmp_path, tensors | extra, embed_dim=16, n_embed=32)
    after = load_original_autoencoder(checkpoint, config).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_lightnings_own_classes_are_skipped(vqgan, monkeypatch):
    checkpoint, config, tensors = vqgan
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            patch.setitem(sys.modules, name, module)
        extras = {module.ModelCheckpoint: {"best_model_score": np.float64(0.5)}}
        torch.save({"callbacks": extras, "state_dict": tensors}, checkpoint)
    model = load_original_autoencoder(checkpoint, config)
    assert torch.equal(model.quantizer.codebooks[0], tensors["quantize.embedding.weight"])


class Payload:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('ran').touch()",)


@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_code_in_a_pickle_is_refused_and_not_run(form, vqgan, tmp_path, monkeypatch):
    checkpoint, config, tensors = vqgan
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": tensors, "hyper_parameters": Payload()}
    torch.save(content, checkpoint, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match=r"holds more than tensors \(exec\), which could run code.*save its"):
        load_original_autoencoder(checkpoint, config)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["cut.ckpt", "cut.safetensors"])
def test_a_truncated_file_is_refused(name, vqgan, tmp_path):
    checkpoint, config, tensors = vqgan
    if name.endswith("safetensors"):
        save_file(tensors, checkpoint)
    cut = tmp_path / name
    cut.write_bytes(checkpoint.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=f"{name} is damaged or no checkpoint"):
        load_original_autoencoder(cut, config)


def test_files_that_are_something_else_are_refused(vqgan, tmp_path):
    checkpoint, config, _ = vqgan
    text = tmp_path / "text.ckpt"
    text.write_text("not a checkpoint")
    with pytest.raises(ValueError, match="text.ckpt is damaged or no checkpoint"):
        load_original_autoencoder(text, config)
    with pytest.raises(FileNotFoundError, match="No such checkpoint: .*absent.ckpt"):
        load_original_autoencoder(tmp_path / "absent.ckpt", config)
    torch.save({"state_dict": {"epoch": 3}}, checkpoint)
    with pytest.raises(ValueError, match="last.ckpt holds no `state_dict` of tensors"):
        load_original_autoencoder(checkpoint, config)


def test_every_tensor_is_accounted_for(vqgan, tmp_path):
    checkpoint, config, tensors = vqgan
    tensors = dict(tensors)
    del tensors["encoder.down.1.attn.0.q.bias"], tensors["quantize.embedding.weight"]
    tensors["decoder.up.0.upsample.conv.weight"] = torch.ones(32, 32, 3, 3)
    tensors["ema_of_ours.decay"] = torch.ones(())
    tensors["decoder.mid.attn_1.q.weight"] = torch.ones(64, 64, 3, 3)
    tensors["decoder.up.1.block.1.conv2.weight"] = torch.ones(64, 64, 1, 1)
    write(tmp_path, tensors, embed_dim=16, n_embed=32)
    with pytest.raises(ValueError) as error:
        load_original_autoencoder(checkpoint, config)
    for sentence in (
        "last.ckpt does not fit",
        "Missing: encoder.down.1.attn.0.q.bias, quantize.embedding.weight.",
        "Left over: decoder.up.0.upsample.conv.weight, ema_of_ours.decay.",
        "decoder.up.1.block.1.conv2.weight is [64, 64, 1, 1], not [64, 64, 3, 3]",
        "decoder.mid.attn_1.q.weight is [64, 64, 3, 3], not [64, 64]",
    ):
        assert sentence in str(error.value)


def test_a_gap_in_the_codebooks_and_a_codebook_of_another_size_are_named(tmp_path):
    tensors = make_original(embed_dim=24, n_embed=8, num_spaces=4).state_dict()
    del tensors["quantize.embeddings.1.weight"]
    tensors["quantize.embeddings.2.weight"] = torch.ones(9, 6)
    with pytest.raises(ValueError, match=r"Missing: \S*ings.1.weight. Of .*ings.2.weight is \[9, 6\], not \[8, 6\]"):
        load_original_autoencoder(*write(tmp_path, tensors, embed_dim=24, n_embed=8))


def averages(tensors, prefix=""):
    """Another model's tensors, named as a moving average of these."""
    other = {name: value + 1 for name, value in tensors.items()}
    return other, {f"{prefix}model_ema.{name.replace('.', '')}": value for name, value in other.items()}


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_the_moving_average_is_taken_on_request_only(prefix, vqgan, tmp_path, caplog):
    checkpoint, config, tensors = vqgan
    other, ema = averages(tensors, prefix)
    plain = {f"{prefix}{name}": value for name, value in tensors.items()}
    extra = {f"{prefix}model_ema.decay": torch.ones(()), f"{prefix}model_ema.num_updates": torch.ones(())}
    if prefix:  # of the diffusion model
        extra["model_ema.diffusion_modeloutweight"] = torch.ones(1)
    write(tmp_path, plain | ema | extra, embed_dim=16, n_embed=32)
    model = load_original_autoencoder(checkpoint, config)
    assert torch.equal(model.encoder.conv_in.weight, tensors["encoder.conv_in.weight"])
    assert "also holds a moving average of the weights, which `use_ema` would take" in caplog.text
    model = PQModel.from_pretrained(convert(checkpoint, config, tmp_path / "out", "--use_ema"))
    assert torch.equal(model.encoder.conv_in.weight, other["encoder.conv_in.weight"])
    assert torch.equal(model.quantizer.codebooks[0], other["quantize.embedding.weight"])


def test_a_moving_average_that_is_absent_or_in_part_is_refused(vqgan, tmp_path):
    checkpoint, config, tensors = vqgan
    with pytest.raises(ValueError, match="holds no moving average of the autoencoder .*leave `use_ema` out"):
        load_original_autoencoder(checkpoint, config, use_ema=True)
    _, ema = averages(tensors)
    del ema["model_ema.encoderconv_inweight"], ema["model_ema.quantizeembeddingweight"]
    write(tmp_path, tensors | ema, embed_dim=16, n_embed=32)
    with pytest.raises(ValueError, match="Missing: encoder.conv_in.weight. Is"):
        load_original_autoencoder(checkpoint, config, use_ema=True)


def test_a_gumbel_quantiser_is_called_by_its_name(vqgan, tmp_path):
    checkpoint, config, tensors = vqgan
    tensors = {name: value for name, value in tensors.items() if not name.startswith("quantize")}
    tensors |= {"quantize.embed.weight": torch.ones(32, 16), "quantize.proj.weight": torch.ones(32, 16, 1, 1)}
    write(tmp_path, tensors, embed_dim=16, n_embed=32)
    with pytest.raises(ValueError, match="has a Gumbel quantiser"):
        load_original_autoencoder(checkpoint, config)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("ch", 0, "`ch` must be a whole number from 1 to 8192, but is 0"),
        ("ch", "32", "`ch` must be a whole number from 1 to 8192, but is '32'"),
        ("ch", 24, "`ch` times each entry of `ch_mult` must be a multiple of 32, but 24 times 1 is not"),
        ("ch", 10**9, "`ch` must be a whole number .* but is 1000000000"),
        ("num_res_blocks", True, "`num_res_blocks` must be a whole number .* but is True"),
        ("num_res_blocks", 10**9, "`num_res_blocks` must be a whole number from 1 to 64"),
        ("resolution", "${data.params.size}", "`resolution` is the interpolation .*: write the number"),
        ("ch_mult", "1,2", "`ch_mult` must be a list of at most 12 numbers, but is '1,2'"),
        ("ch_mult", [], "`ch_mult` must have an entry for each level"),
        ("ch_mult", [1, "2"], "`ch_mult` must be a whole number from 1 to 256, but is '2'"),
        ("attn_resolutions", 8, "`attn_resolutions` must be a list"),
        ("z_channels", None, "`z_channels` must be a whole number .* but is None"),
        ("n_embed", 1, "`n_embed` must be a whole number from 2"),
        ("n_embed", 2**40, "`n_embed` must be a whole number from 2 to 1048576"),
        ("embed_dim", 2.5, "`embed_dim` must be a whole number .* but is 2.5"),
        ("scale_factor", "large", "`scale_factor` must be a positive number, but is 'large'"),
        ("scale_factor", 0, "`scale_factor` must be a positive number, but is 0"),
    ],
)
def test_an_option_that_no_network_can_have_is_named(option, value, message, vqgan, capsys):
    checkpoint, config, _ = vqgan
    content = yaml.safe_load(config.read_text())
    options = content["model"]["params"]
    (options["ddconfig"] if option in DDCONFIG else options)[option] = value
    config.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=f"model.yaml: {message}"):
        load_original_autoencoder(checkpoint, config)
    assert main(["convert", str(checkpoint), "--config", str(config), "--output", str(config.parent / "out")]) == 1
    assert option in capsys.readouterr().err and not (config.parent / "out").exists()


def test_sizes_that_do_not_fit_are_named_without_memory_for_them(vqgan):
    checkpoint, config, _ = vqgan
    config.write_text(config.read_text().replace("n_embed: 32", "n_embed: 1000000").replace("ch: 32", "ch: 8192"))
    with pytest.raises(ValueError, match=r"Of another shape: .*is \[32, 16\], not \[1000000, 16\]"):
        load_original_autoencoder(checkpoint, config)


def test_a_model_the_class_cannot_hold_is_refused(vqgan, tmp_path):
    checkpoint, config, _ = vqgan
    with pytest.raises(ValueError, match="with `n_embed`.* can only become a PQModel or VQModel"):
        load_original_autoencoder(checkpoint, config, "AutoencoderKL")
    tensors = make_original(embed_dim=24, n_embed=8, num_spaces=4).state_dict()
    files = write(tmp_path, tensors, embed_dim=24, n_embed=8)
    with pytest.raises(ValueError, match="VQModel has one codebook, but the checkpoint has 4"):
        load_original_autoencoder(*files, "VQModel")
    files = write(tmp_path, tensors, embed_dim=24, n_embed=8, distance_type="cosine")
    with pytest.raises(ValueError, match="`distance_type: cosine` cannot be converted, only l2 can"):
        load_original_autoencoder(*files)


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: {params: {ddconfig: {ch: 32}}}", "lacks num_res_blocks, res"),
        ("a: 1", "no `ddconfig`"),
        ("[", "not a YAML"),
        ("[" * 5000, "not a YAML"),
    ],
)
def test_a_bad_yaml_file_is_named(text, message, vqgan):
    checkpoint, config, _ = vqgan
    config.write_text(text)
    with pytest.raises(ValueError, match=f"model.yaml .*{message}"):
        load_original_autoencoder(checkpoint, config)


def test_a_value_that_refers_to_itself_a_million_times_is_not_written_out(vqgan):
    checkpoint, config, _ = vqgan
    lists = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    lists += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 6)]
    config.write_text("\n".join(lists) + "\n" + config.read_text().replace("ch: 32", "ch: *l5"))
    with pytest.raises(ValueError, match="`ch` must be a whole number") as error:
        load_original_autoencoder(checkpoint, config)
    assert len(str(error.value)) < 1000


def test_the_command_writes_a_folder_whole_or_not_at_all(vqgan, tmp_path, capsys):
    checkpoint, config, tensors = vqgan
    output = convert(checkpoint, config, tmp_path / "new" / "out")
    assert capsys.readouterr().out.startswith(f"{output}: PQModel of")
    names = ["config.json", "diffusers_pq.py", "diffusion_pytorch_model.safetensors"]
    assert sorted(path.name for path in output.iterdir()) == names
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    command = ["convert", str(checkpoint), "--config", str(config), "--output"]
    assert main([*command, str(output)]) == 1
    assert "exists already" in capsys.readouterr().err
    write(tmp_path, {"quant_conv.weight": tensors["quant_conv.weight"]}, embed_dim=16, n_embed=32)
    assert main([*command, str(tmp_path / "other")]) == 1
    assert "Missing: decoder.conv_in.bias" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_an_interrupted_write_leaves_nothing(vqgan, tmp_path, monkeypatch):
    def fill_the_disk(model, folder):
        folder.mkdir()
        raise OSError("No space left on device")

    monkeypatch.setattr(PQModel, "save_pretrained", fill_the_disk)
    output = tmp_path / "new" / "out"
    with pytest.raises(OSError, match="No space left"):
        convert_checkpoint(*vqgan[:2], output)
    assert not list(output.parent.iterdir())
