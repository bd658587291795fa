"""What the adaptation of a text-to-image pipeline needs to know of its family: a class for each."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
import torch.nn as nn
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch.utils.data import default_collate

from ..pipelines.pipeline_stable_diffusion_3_pq import StableDiffusion3PQPipeline
from ..pipelines.pipeline_stable_diffusion_pq import StableDiffusionPQPipeline
from ..pipelines.pipeline_stable_diffusion_xl_pq import StableDiffusionXLPQPipeline


class Family:
    """
    A family of text-to-image pipelines of diffusers. A class derived from it says what its pipelines are called, how
    a prompt is encoded, and how the denoiser is called.

    Args:
        pipeline (`DiffusionPipeline`): One of the family.

    Attributes:
        pipeline_class, pq_pipeline_class (`type`): On the latents of diffusers' autoencoders and of a [`PQModel`].
        denoiser_name (`str`): Of the component.
        text_encoders (`tuple[str, ...]`): Of the components; a `tokenizer` of the same ending belongs to each.
        optional_text_encoders (`tuple[str, ...]`): Those of them that a pipeline may lack; they are never trained.
        left_out (`dict`): Components that are neither trained nor saved.
        settings (`dict`): Further arguments of the pipelines.
        lora_target_modules (`tuple[str, ...]`): Of the denoiser's attention.
        is_flow_matching (`bool`)
        weighting_scheme (`str`): See [`draw_timesteps`].
        takes_sizes (`bool`): Whether the denoiser is told sizes and crops (Podell et al., 2023, section 2.2).
    """

    pipeline_class: type[DiffusionPipeline]
    pq_pipeline_class: type[DiffusionPipeline]
    denoiser_name = "unet"
    text_encoders: tuple[str, ...] = ("text_encoder",)
    optional_text_encoders: tuple[str, ...] = ()
    left_out: dict = {}
    settings: dict = {}
    lora_target_modules: tuple[str, ...] = ("to_k", "to_q", "to_v", "to_out.0")
    is_flow_matching = False
    weighting_scheme = "none"
    takes_sizes = False

    def __init__(self, pipeline: DiffusionPipeline):
        names = [name for name in self.text_encoders if getattr(pipeline, name) is not None]
        missing = {*self.text_encoders} - {*names, *self.optional_text_encoders}
        if missing:
            raise ValueError(f"The pipeline has no {', '.join(sorted(missing))}: captions cannot be encoded without.")
        self.tokenizers = {name: getattr(pipeline, name.replace("text_encoder", "tokenizer")) for name in names}

    @classmethod
    def matches(cls, index: Mapping) -> bool:
        """Whether a `model_index.json` names the components that the family's pipelines have."""
        encoders = {name for name in index if name.startswith("text_encoder")}
        return encoders == {*cls.text_encoders} and cls.denoiser_name in index

    def condition(self, caption: str) -> dict[str, dict]:
        """What a [`ConditionalDenoiser`] takes of one caption."""
        return {"tokens": self.tokenize(caption)}

    def tokenize(self, caption: str) -> dict[str, torch.Tensor]:
        """What [`encode`] needs to know of one caption: token ids `[L]` for each text encoder."""
        return {name: self._token_ids(name, caption) for name in self.tokenizers}

    def max_length(self, name: str) -> int:
        """Tokens to which captions are padded and cut for one text encoder, as in the pipelines."""
        return self.tokenizers[name].model_max_length

    def _token_ids(self, name: str, caption: str) -> torch.LongTensor:
        padding = {"max_length": self.max_length(name), "padding": "max_length", "truncation": True}
        return self.tokenizers[name](caption, **padding, return_tensors="pt").input_ids[0]

    def encode(self, encoders: Mapping[str, nn.Module], tokens: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The states of a batch of captions, from what [`tokenize`] made of each."""
        raise NotImplementedError

    def predict(
        self,
        denoiser: nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        states: Mapping[str, torch.Tensor],
        sizes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The prediction for noisy latents, both `[B, d, h, w]`.

        Args:
            denoiser (`nn.Module`)
            noisy (`torch.Tensor` of shape `(B, d, h, w)`)
            timesteps (`torch.Tensor` of shape `(B,)`)
            states (`dict`): What [`encode`] returns.
            sizes (`torch.Tensor` of shape `(B, 6)`, *optional*): Original height and width, top and left of the crop,
                target height and width, in pixels. For families that `takes_sizes`.
        """
        raise NotImplementedError


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x."""

    pipeline_class, pq_pipeline_class = StableDiffusionPipeline, StableDiffusionPQPipeline
    left_out = {"safety_checker": None}
    settings = {"requires_safety_checker": False}

    def encode(self, encoders, tokens):
        return {"prompt": encoders["text_encoder"](tokens["text_encoder"])[0]}

    def predict(self, denoiser, noisy, timesteps, states, sizes=None):
        return denoiser(noisy, timesteps, states["prompt"]).sample


class StableDiffusionXL(Family):
    """Stable Diffusion XL: two text encoders, and a denoiser that is told sizes."""

    pipeline_class, pq_pipeline_class = StableDiffusionXLPipeline, StableDiffusionXLPQPipeline
    text_encoders = ("text_encoder", "text_encoder_2")
    takes_sizes = True

    def __init__(self, pipeline):
        super().__init__(pipeline)
        self.zeros_for_empty = pipeline.config.force_zeros_for_empty_prompt

    def tokenize(self, caption):
        # Pipelines take zeros in place of a negative prompt that is not given; so does a caption that is left out.
        is_kept = bool(caption) or not self.zeros_for_empty
        return super().tokenize(caption) | {"is_kept": torch.tensor(float(is_kept))}

    def encode(self, encoders, tokens):
        encoded = [encoders[name](tokens[name], output_hidden_states=True) for name in self.text_encoders]
        prompt = torch.cat([output.hidden_states[-2] for output in encoded], dim=-1)
        is_kept = tokens["is_kept"].to(prompt)[:, None]
        return {"prompt": prompt * is_kept[..., None], "pooled": encoded[-1].text_embeds * is_kept}

    def predict(self, denoiser, noisy, timesteps, states, sizes=None):
        added = {"text_embeds": states["pooled"], "time_ids": sizes}
        return denoiser(noisy, timesteps, states["prompt"], added_cond_kwargs=added).sample


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5: flow matching by a transformer, and three text encoders."""

    pipeline_class, pq_pipeline_class = StableDiffusion3Pipeline, StableDiffusion3PQPipeline
    denoiser_name = "transformer"
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    optional_text_encoders = ("text_encoder_3",)
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
    is_flow_matching = True
    weighting_scheme = "logit_normal"
    # Of T5, as in the pipelines.
    max_sequence_length = 256

    def __init__(self, pipeline):
        super().__init__(pipeline)
        self.width = pipeline.transformer.config.joint_attention_dim

    def max_length(self, name):
        return self.max_sequence_length if name == "text_encoder_3" else super().max_length("text_encoder")

    def encode(self, encoders, tokens):
        encoded = [encoders[name](tokens[name], output_hidden_states=True) for name in self.text_encoders[:2]]
        clip = torch.cat([output.hidden_states[-2] for output in encoded], dim=-1)
        clip = nn.functional.pad(clip, (0, self.width - clip.shape[-1]))
        if "text_encoder_3" in encoders:
            t5 = encoders["text_encoder_3"](tokens["text_encoder_3"])[0]
        else:
            t5 = clip.new_zeros(len(clip), self.max_sequence_length, self.width)
        pooled = torch.cat([output.text_embeds for output in encoded], dim=-1)
        return {"prompt": torch.cat([clip, t5.to(clip)], dim=1), "pooled": pooled}

    def predict(self, denoiser, noisy, timesteps, states, sizes=None):
        text = {"encoder_hidden_states": states["prompt"], "pooled_projections": states["pooled"]}
        return denoiser(hidden_states=noisy, timestep=timesteps, **text).sample


class EncodedCaptions:
    """
    Captions that are encoded once, their states kept in the CPU's memory.

    Args:
        captions (iterable of `str`): May repeat each other.
        encode: Makes states of a batch of token ids, see [`Family.tokenize`] and [`Family.encode`].
        family ([`Family`])
        dtype (`torch.dtype`): Of the states that are kept.
        batch_size (`int`): Captions that are encoded together.
    """

    def __init__(
        self,
        captions: Iterable[str],
        encode: Callable[[dict], dict],
        family: Family,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ):
        self.numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
        texts, batches = list(self.numbers), []
        for start in range(0, len(texts), batch_size):
            tokens = default_collate([family.tokenize(caption) for caption in texts[start : start + batch_size]])
            batches.append({name: value.to("cpu", dtype) for name, value in encode(tokens).items()})
        self.states = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.states.values())

    @property
    def condition(self) -> Callable[[str], dict]:
        """As [`Family.condition`]; holds no states, so that it is cheap to send to the workers of a loader."""
        return partial(_caption_number, self.numbers)

    def of(self, numbers: torch.LongTensor) -> dict[str, torch.Tensor]:
        """The states of a batch of captions `[B]`, on the device of their numbers."""
        return {name: value[numbers.cpu()].to(numbers.device) for name, value in self.states.items()}


def _caption_number(numbers: dict[str, int], caption: str) -> dict[str, torch.Tensor]:
    return {"caption": torch.tensor(numbers[caption])}


FAMILIES = (StableDiffusion, StableDiffusionXL, StableDiffusion3)


def find_family(index: Mapping) -> type[Family]:
    """
    The family of a pipeline.

    Args:
        index (`dict`): Its `model_index.json`.

    Raises:
        ValueError: if it is of none; the message names those that are known.
    """
    for family in FAMILIES:
        if family.matches(index):
            return family
    known = ", ".join(family.pipeline_class.__name__ for family in FAMILIES)
    raise ValueError(f"A {index.get('_class_name')} cannot be adapted; known are {known}.")
