"""How masked transformers are trained on product codes: which codes are hidden, what guessing them costs, the run."""

import logging
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Self

import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import AmusedScheduler
from transformers import CLIPTextModel, CLIPTokenizer

from ..autoencoders import check_resolution, load_pq_model
from ..data.conditions import ClassLabels, Prompts, class_names
from ..files import folder_or_hub, naming, read_json
from ..flags import REQUIRED, Options, flag, with_default
from ..models.autoencoder_pq import PQModel
from ..models.masked_transformer import PQMaskedTransformer
from ..pipelines.class_labels import class_label
from ..pipelines.pipeline_masked_pq import MaskedPQPipeline
from .denoiser import (
    DenoiserOptions,
    DenoiserTask,
    Stage,
    fetched,
    paint_each,
    saved_autoencoder,
    train_denoiser,
)
from .options import DenoiserOptimisationOptions, DenoiserRunOptions, LabelledDataOptions
from .run import TrainingRun, create_accelerator, load_split, prepare_model, whole_module
from .uploads import BestModel


logger = logging.getLogger(__name__)

# Of a `PQMaskedTransformer`'s config, what codes and conditions decide.
_FILLED_IN = ("num_subspaces", "codebook_size", "sample_size", "num_classes", "cross_attention_dim")


def draw_masks(shape: tuple[int, ...], generator: torch.Generator | None = None, device=None) -> torch.BoolTensor:
    """
    Hide a random share of each picture's codes, at least one: cos(pi/2 u) of them with u uniform in [0, 1), as MaskGIT
    (Chang et al., 2022, section 3.3) draws the share. Any code of any place may be hidden, whatever happens to the
    others there.

    Args:
        shape (`tuple[int]`): `(B, S, h, w)`, of the codes.
        generator (`torch.Generator`, *optional*): On the CPU or on `device`.
        device (*optional*): Of the masks.
    """
    source = generator.device if generator is not None else device
    shares = torch.cos(math.pi / 2 * torch.rand(shape[0], 1, generator=generator, device=source))
    places = torch.rand(shape[0], math.prod(shape[1:]), generator=generator, device=source)
    hidden = (shares * places.shape[1]).ceil()
    return (places.argsort(1).argsort(1) < hidden).view(shape).to(device)


class MaskedCodePredictor(nn.Module):
    """
    A masked transformer and, where it is told texts, their encoder: one forward for DDP and the like. An encoder that
    is not trained is not part of its state.

    Args:
        transformer ([`PQMaskedTransformer`])
        text_encoder (`CLIPTextModel`, *optional*)
        train_text_encoder (`bool`)
    """

    def __init__(
        self, transformer: PQMaskedTransformer, text_encoder: nn.Module | None = None, train_text_encoder: bool = False
    ):
        super().__init__()
        self.transformer = transformer
        self.frozen_text_encoder = {}
        if text_encoder is not None:
            text_encoder.requires_grad_(train_text_encoder)
        if train_text_encoder:
            self.text_encoder = text_encoder.train()
        elif text_encoder is not None:
            self.frozen_text_encoder = {"text_encoder": text_encoder.eval()}

    def forward(self, codes: torch.LongTensor, mask: torch.BoolTensor, condition: torch.LongTensor) -> torch.Tensor:
        """Logits `[B, S, K, h, w]`; `condition` holds labels `[B]` or the token ids `[B, L]` of texts."""
        text_encoder = self.frozen_text_encoder.get("text_encoder", getattr(self, "text_encoder", None))
        if text_encoder is None:
            return self.transformer(codes, mask, class_labels=condition).logits
        states = text_encoder(condition).last_hidden_state
        return self.transformer(codes, mask, encoder_hidden_states=states).logits

    def learned_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())


@dataclass
class MaskedObjective:
    """
    To guess hidden codes; an [`~training.denoiser.Objective`].

    Args:
        vae ([`PQModel`]): Encodes pictures where a batch holds no codes.
        label_smoothing (`float`): Of the cross-entropy, in [0, 1).
    """

    vae: PQModel
    label_smoothing: float = 0.0

    @torch.no_grad()
    def inputs(self, batch: dict[str, torch.Tensor], device: torch.device) -> torch.LongTensor:
        """The codes `[B, S, h, w]` of a batch with `codes` or `pixel_values`."""
        if "codes" in batch:
            return batch["codes"].to(device).long()
        with fetched(self.vae, device):
            return self.vae.encode_codes(batch["pixel_values"].to(device, self.vae.dtype))

    def losses(
        self,
        model: nn.Module,
        inputs: torch.LongTensor,
        condition: torch.LongTensor,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """The mean cross-entropy of each picture's hidden codes, in nats: `[B]`."""
        mask = draw_masks(inputs.shape, generator, inputs.device)
        hidden = mask.nonzero(as_tuple=True)
        # Only the hidden codes' logits: the softmax takes as long as a small transformer.
        logits = model(inputs, mask, condition).movedim(2, -1)[hidden].float()
        entropies = F.cross_entropy(logits, inputs[hidden], reduction="none", label_smoothing=self.label_smoothing)
        sums = torch.zeros(len(inputs), device=inputs.device).index_add(0, hidden[0], entropies)
        return sums / mask.flatten(1).sum(1)

    def for_validation(self) -> Self:
        """Plain cross-entropy, which is also a code length."""
        return replace(self, label_smoothing=0.0)


@dataclass(kw_only=True)
class MaskedModelOptions(Options):
    """Which transformer to train, on the codes of which autoencoder."""

    title: ClassVar[str] = "model"

    vae_name_or_path: str = flag(REQUIRED, "PQModel whose codes are learned; folder or Hub repository", fixed=True)
    revision: str | None = flag(None, "branch, tag or commit of the autoencoder on the Hub; default: main", fixed=True)
    variant: str | None = flag(None, 'of the autoencoder\'s files, such as "fp16"', fixed=True)
    model_config_name_or_path: str = flag(
        REQUIRED, "JSON file of a PQMaskedTransformer; S, K, size and condition are filled in"
    )
    code_embedding_init: str = flag(
        "codebooks",
        "start of the codes' embeddings: near for codebook entries that are near, or random",
        choices=("codebooks", "random"),
        fixed=True,
    )
    text_encoder_name_or_path: str | None = flag(
        None, "pipeline whose text_encoder and tokenizer read the captions; folder or Hub repository"
    )
    train_text_encoder: bool = flag(False, "also train the text encoder, where it is untrained", fixed=True)

    def check(self):
        if self.train_text_encoder and self.text_encoder_name_or_path is None:
            raise ValueError("--train_text_encoder needs --text_encoder_name_or_path")


@dataclass(kw_only=True)
class MaskedDataOptions(LabelledDataOptions):
    """What pictures of classes, or with captions, to train on."""

    caption_column: str | None = flag(
        None, "column of captions, texts or lists of which one is drawn, to train on instead of classes"
    )
    proportion_empty_labels: float = flag(
        0.1, "labels or captions left out, for classifier-free guidance", minimum=0, maximum=1
    )


@dataclass(kw_only=True)
class MaskedOptimisationOptions(DenoiserOptimisationOptions):
    """Optimiser, precision, accumulation and loss."""

    learning_rate: float = flag(1e-4, "learning rate, after the warm-up", minimum=0)
    label_smoothing: float = flag(0.1, "share of each target that is spread over all entries", minimum=0, below=1)


@dataclass(kw_only=True)
class MaskedRunOptions(DenoiserRunOptions):
    """Output, logs, checkpoints and the Hub."""

    output_dir: str = with_default(DenoiserRunOptions, "output_dir", "masked")
    validation_labels: list[int | str] = flag(
        [], "numbers or names of classes; pictures of them go to the log", parse=class_label, differs="always"
    )
    validation_prompts: list[str] = flag([], "texts; pictures of them go to the log", differs="always")


@dataclass(kw_only=True)
class MaskedOptions(DenoiserOptions):
    """All of a training of a masked transformer."""

    model: MaskedModelOptions
    data: MaskedDataOptions
    optim: MaskedOptimisationOptions
    run: MaskedRunOptions

    def check(self):
        has_captions = self.data.caption_column is not None
        if has_captions != (self.model.text_encoder_name_or_path is not None):
            raise ValueError("--caption_column and --text_encoder_name_or_path go together: give both or neither")
        if has_captions and self.run.validation_labels:
            raise ValueError("--validation_labels are of classes: give --validation_prompts with --caption_column")
        if self.run.validation_prompts and not has_captions:
            raise ValueError("--validation_prompts need --caption_column: give --validation_labels without")


def train_masked(options: MaskedOptions):
    """
    Train, validate, keep checkpoints and write a [`MaskedPQPipeline`]; or do a dry run. To be called by all processes.

    Args:
        options ([`MaskedOptions`])

    Raises:
        ValueError: if the options contradict the models or the data.
    """
    accelerator = create_accelerator(options.optim, options.run)
    if accelerator.distributed_type == DistributedType.FSDP and _previews(options.run)[1]:
        raise ValueError(
            "--validation_labels and --validation_prompts need a whole transformer in each process: launch without "
            "FSDP."
        )
    run = TrainingRun(options, accelerator, BestModel(options.run.output_dir, "loss", lower_is_better=True))
    pipeline = _build_pipeline(options, run)
    train_denoiser(options, accelerator, run, _build_task(options, accelerator, pipeline))


def create_masked_transformer(
    config: dict,
    vae: PQModel,
    sample_size: int,
    num_classes: int | None = None,
    cross_attention_dim: int | None = None,
) -> PQMaskedTransformer:
    """
    A fresh transformer for the codes of an autoencoder.

    Args:
        config (`dict`): Of [`PQMaskedTransformer`]; what the other arguments say is filled in.
        vae ([`PQModel`]): Whose S and K it gets.
        sample_size (`int`): Side of the latents, in latent pixels.
        num_classes, cross_attention_dim (`int`, *optional*): One of them.

    Raises:
        ValueError: if the config is of another class or contradicts an argument.
    """
    if config.get("_class_name") != "PQMaskedTransformer":
        name = config.get("_class_name")
        raise ValueError(f"The config must name the `_class_name` PQMaskedTransformer, not {name!r}.")
    values = vae.config.num_subspaces, vae.config.codebook_size, sample_size, num_classes, cross_attention_dim
    filled_in = dict(zip(_FILLED_IN, values))
    for key, value in filled_in.items():
        if config.get(key, value) != value:
            raise ValueError(
                f"`{key}` is {config[key]} in the transformer's config, but codes or conditions ask for {value}. "
                "Leave it out of the config."
            )
    return PQMaskedTransformer.from_config(config | filled_in)


def _previews(run: MaskedRunOptions) -> tuple[str, list]:
    """The argument of the pipeline that pictures for the log are made of, and its values."""
    if run.validation_prompts:
        return "prompt", run.validation_prompts
    return "class_labels", run.validation_labels


def _build_pipeline(options, run) -> MaskedPQPipeline:
    """The pipeline that is trained; a run that is resumed takes the autoencoder that lies with it."""
    model, data = options.model, options.data
    if run.checkpoint is not None:
        vae = load_pq_model(str(saved_autoencoder(run)))
    else:
        vae = load_pq_model(model.vae_name_or_path, revision=model.revision, variant=model.variant)
    check_resolution("--resolution", data.resolution, vae.downsampling_factor)
    names, text = None, {}
    if data.caption_column is None:
        names = _class_names(data)
        condition = {"num_classes": len(names)}
        logger.info("%d classes: %s", len(names), ", ".join(names[:10]))
    else:
        text = _load_text_encoder(model.text_encoder_name_or_path)
        condition = {"cross_attention_dim": text["text_encoder"].config.hidden_size}
    config = read_json(model.model_config_name_or_path, dict)
    side = data.resolution // vae.downsampling_factor
    with naming(model.model_config_name_or_path):
        transformer = create_masked_transformer(config, vae, side, **condition)
    if model.code_embedding_init == "codebooks":
        transformer.init_code_embeddings(vae.quantizer, torch.Generator().manual_seed(options.optim.seed))
    pipeline = MaskedPQPipeline(
        vae.requires_grad_(False),
        prepare_model(options.optim, transformer),
        AmusedScheduler(mask_token_id=vae.config.codebook_size),
        **text,
        id2label=None if names is None else dict(enumerate(names)),
    )
    pipeline.get_label_ids(options.run.validation_labels)  # a wrong one shows before the training
    return pipeline


def _class_names(data) -> list[str]:
    labelled = load_split(data, "train", data.label_column)
    if labelled is None:
        raise ValueError("The dataset has no `train` split.")
    return class_names(labelled, data.label_column, data.class_names_file)


def _load_text_encoder(path_or_repo: str) -> dict[str, CLIPTextModel | CLIPTokenizer]:
    """In float32 whatever it is stored in: mixed precision is the accelerator's."""
    with folder_or_hub(path_or_repo):
        return {
            "text_encoder": CLIPTextModel.from_pretrained(
                path_or_repo, subfolder="text_encoder", use_safetensors=True, dtype=torch.float32
            ),
            "tokenizer": CLIPTokenizer.from_pretrained(path_or_repo, subfolder="tokenizer"),
        }


def _build_task(options, accelerator: Accelerator, pipeline: MaskedPQPipeline) -> DenoiserTask:
    data, optim = options.data, options.optim
    predictor = MaskedCodePredictor(pipeline.transformer, pipeline.text_encoder, options.model.train_text_encoder)
    for encoder in predictor.frozen_text_encoder.values():
        encoder.to(accelerator.device)
    column, condition, validation_condition = _conditions(data, pipeline)
    argument, values = _previews(options.run)
    paint = partial(paint_each, pipeline.transformer, pipeline, argument, values, optim.seed)
    parts = {"transformer": pipeline.transformer, "text_encoder": pipeline.text_encoder, "vae": pipeline.vae}
    return DenoiserTask(
        denoiser=predictor,
        vae=pipeline.vae,
        objective=MaskedObjective(pipeline.vae, optim.label_smoothing),
        stages=[Stage(data.resolution, optim.max_train_steps, optim.learning_rate, "all")],
        condition_column=column,
        condition=condition,
        validation_condition=validation_condition,
        save=partial(_save_pipeline, pipeline),
        paint=paint if values else None,
        parts={name: part for name, part in parts.items() if part is not None},
    )


def _conditions(data: MaskedDataOptions, pipeline: MaskedPQPipeline) -> tuple:
    """The column of the conditions, and what makes them for training and validation."""
    share = data.proportion_empty_labels
    if data.caption_column is None:
        names = list(pipeline.config.id2label.values())
        return data.label_column, ClassLabels(data.label_column, names, share), ClassLabels(data.label_column, names)
    column, tokens = data.caption_column, partial(_tokenize, pipeline.tokenizer)
    return column, Prompts(column, tokens, share), Prompts(column, tokens)


def _tokenize(tokenizer: CLIPTokenizer, text: str) -> torch.LongTensor:
    """Token ids `[L]`."""
    length = tokenizer.model_max_length
    return tokenizer(text, max_length=length, padding="max_length", truncation=True, return_tensors="pt").input_ids[0]


def _save_pipeline(pipeline: MaskedPQPipeline, trainer, folder):
    names = ["transformer"]
    if hasattr(trainer.accelerator.unwrap_model(trainer.denoiser), "text_encoder"):
        names.append("text_encoder")
    trained = {name: whole_module(trainer.accelerator, trainer.denoiser, name) for name in names}
    if trainer.accelerator.is_main_process:
        parts = pipeline.components | trained
        MaskedPQPipeline(**parts, id2label=pipeline.config.id2label).save_pretrained(folder)
