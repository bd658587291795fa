#!/usr/bin/env python
"""Which family of flow-matching transformers adapts best? Small ones of like size, one of each family of diffusers
that fits a single card, learn pictures on the latents of one autoencoder and are adapted to those of another.

    python experiments/families.py --data_dir data/emoji             # half an hour on one core

Each family's source is trained on KL latents. Widened by `widen_denoiser`, it is adapted to PQ latents in two stages
(first and last layer, then all), beside the same network from a random start, with the same batches and noise. All
predict the velocity of flow matching, PixArt too, which its authors train as a diffusion model; all see the same
states of a caption, a fixed random vector for each word. What is measured is the loss on held-out pictures.

What is measured is written at once, so an interrupted run resumes. Writes families.json.
"""

import itertools
import math
import random
import statistics
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import ModelMixin
from run_record import add_run, is_measured, open_record
from spread import mean_and_spread
from tqdm import tqdm

from diffusers_pq import widen_denoiser
from diffusers_pq.autoencoders import encode_latents, load_autoencoder, scale_latents, set_latent_statistics
from diffusers_pq.console import one_line_errors
from diffusers_pq.data.conditions import caption_texts
from diffusers_pq.data.pictures import Crops, PictureSource
from diffusers_pq.flags import COUNT, SEED, FlagParser, number, output_folder
from diffusers_pq.models.widening import ENDS, outer_layers
from diffusers_pq.tables import markdown_table
from diffusers_pq.training.noise import create_scheduler, denoising_loss, latent_shift


ROOT = Path(__file__).parent.parent
HEADS = {"num_attention_heads": 3, "attention_head_dim": 32}
WIDTH = 96
TEXT_WIDTH, TEXT_LENGTH = 64, 8
PATCH_SIZE = 2  # of all; Sana has 1, on latents of F = 32


@dataclass(frozen=True)
class Family:
    """
    A small transformer of a family and how it is called.

    Args:
        title (`str`)
        class_name (`str`): Of diffusers.
        config (`dict`): All but what depends on the latents.
        predict: The velocity `[B, d, h, w]`, from the transformer, noisy latents, timesteps `[B]` in [0, 1000] and
            states `[B, L, TEXT_WIDTH]`.
    """

    title: str
    class_name: str
    config: dict
    predict: Callable[[ModelMixin, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

    def create(self, latent_channels: int, side: int) -> ModelMixin:
        """With fresh weights, as diffusers makes them."""
        model_class = getattr(diffusers, self.class_name)
        channels = latent_channels * ENDS[self.class_name].packed_pixels
        fitting = {"in_channels": channels, "out_channels": channels, "sample_size": side}
        fitting["pos_embed_max_size"] = side // PATCH_SIZE
        known = model_class._get_init_keys(model_class)
        return model_class(**self.config, **{name: value for name, value in fitting.items() if name in known})


def predict_sd3(transformer, noisy, timesteps, states):
    return transformer(noisy, states, states.mean(1), timesteps).sample


def predict_pixart(transformer, noisy, timesteps, states):
    return transformer(noisy, states, timestep=timesteps, added_cond_kwargs={}).sample


def predict_sana(transformer, noisy, timesteps, states):
    return transformer(noisy, states, timesteps).sample


def predict_lumina2(transformer, noisy, timesteps, states):
    # Its time goes from noise to data.
    mask = torch.ones(states.shape[:2], dtype=torch.bool)
    return -transformer(noisy, 1 - timesteps / 1000, states, mask).sample


def predict_flux2(transformer, noisy, timesteps, states):
    patches = F.pixel_unshuffle(noisy, PATCH_SIZE)
    zero, sides = torch.zeros(1, dtype=torch.long), [torch.arange(side) for side in patches.shape[2:]]
    image_ids = torch.cartesian_prod(zero, *sides, zero).expand(len(noisy), -1, -1)
    text_ids = torch.cartesian_prod(zero, zero, zero, torch.arange(states.shape[1])).expand(len(noisy), -1, -1)
    tokens = patches.flatten(2).transpose(1, 2)
    positions = {"img_ids": image_ids, "txt_ids": text_ids, "guidance": None}
    predicted = transformer(tokens, states, timesteps / 1000, **positions).sample
    return F.pixel_shuffle(predicted.transpose(1, 2).view_as(patches), PATCH_SIZE)


# Depths make all of them of like size.
FAMILIES = {
    "sd3": Family(
        "Stable Diffusion 3.5 Medium",
        "SD3Transformer2DModel",
        {"num_layers": 3, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}
        | {"joint_attention_dim": TEXT_WIDTH, "pooled_projection_dim": TEXT_WIDTH, "caption_projection_dim": WIDTH}
        | HEADS,
        predict_sd3,
    ),
    "sana": Family(
        "Sana",
        "SanaTransformer2DModel",
        {"num_layers": 6, "num_cross_attention_heads": 3, "cross_attention_head_dim": 32}
        | {"cross_attention_dim": WIDTH, "caption_channels": TEXT_WIDTH, "patch_size": PATCH_SIZE}
        | HEADS,
        predict_sana,
    ),
    "lumina2": Family(
        "Lumina 2",
        "Lumina2Transformer2DModel",
        {"num_layers": 4, "num_refiner_layers": 1, "hidden_size": WIDTH, "num_attention_heads": 3, "num_kv_heads": 1}
        | {"multiple_of": 32, "axes_dim_rope": (8, 12, 12), "cap_feat_dim": TEXT_WIDTH},
        predict_lumina2,
    ),
    "pixart": Family(
        "PixArt-Sigma",
        "PixArtTransformer2DModel",
        {"num_layers": 6, "cross_attention_dim": WIDTH, "caption_channels": TEXT_WIDTH}
        | {"use_additional_conditions": False}
        | HEADS,
        predict_pixart,
    ),
    "flux2": Family(
        "Flux.2 Klein",
        "Flux2Transformer2DModel",
        {"num_layers": 1, "num_single_layers": 5, "joint_attention_dim": TEXT_WIDTH}
        | {"axes_dims_rope": (8, 8, 8, 8), "guidance_embeds": False}
        | HEADS,
        predict_flux2,
    ),
}


class Denoiser(nn.Module):
    """A transformer as [`denoising_loss`] calls it."""

    def __init__(self, family: Family, transformer: ModelMixin):
        super().__init__()
        self.family, self.transformer = family, transformer

    def forward(self, noisy, timesteps, states):
        return self.family.predict(self.transformer, noisy, timesteps, states)


@dataclass
class Task:
    """What to learn on the latents of an autoencoder: latents `[N, d, h, w]` and states of captions of two splits."""

    train: tuple[torch.Tensor, torch.Tensor]
    held_out: tuple[torch.Tensor, torch.Tensor]
    scheduler: diffusers.FlowMatchEulerDiscreteScheduler

    @property
    def latent_channels(self) -> int:
        return self.train[0].shape[1]

    @property
    def side(self) -> int:
        return self.train[0].shape[-1]


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of captioned pictures with a validation")
    parser.add_argument("--caption_column", default="text", help="column of the captions, of which the first counts")
    parser.add_argument(
        "--source_vae",
        default=str(ROOT / "model_cards" / "pqgan-mini-f8-kl"),
        help="autoencoder of the latents that sources are trained on",
    )
    parser.add_argument(
        "--target_vae",
        default=str(ROOT / "model_cards" / "pqgan-mini-f8-pq"),
        help="autoencoder of the latents that they are adapted to",
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="what is compared")
    parser.add_argument("--seeds", nargs="+", type=SEED, default=[0, 1, 2], help="of weights, batches and noise")
    parser.add_argument("--resolution", type=COUNT, default=64, help="side of the pictures, in pixels")
    parser.add_argument("--max_pictures", type=COUNT, default=3000, help="at most so many pictures of a split")
    parser.add_argument("--source_steps", type=COUNT, default=1500, help="steps of a source")
    parser.add_argument("--ends_steps", type=COUNT, default=100, help="steps of the first and last layer alone")
    parser.add_argument("--steps", type=COUNT, default=800, help="steps of an adaptation, these included")
    parser.add_argument("--validation_steps", type=COUNT, default=50, help="steps between two measurements")
    parser.add_argument("--train_batch_size", type=COUNT, default=16, help="pictures of a step")
    parser.add_argument("--learning_rate", type=number(float, above=0), default=1e-3, help="of all trainings")
    parser.add_argument(
        "--output_dir", type=output_folder, default=ROOT / "experiments" / "results", help="folder of the results"
    )
    return parser.parse_args(argv)


def text_states(caption):
    """Of a caption's first words `[TEXT_LENGTH, TEXT_WIDTH]`, then zeros: a text encoder that knows words only."""
    states = torch.zeros(TEXT_LENGTH, TEXT_WIDTH)
    for position, word in enumerate(caption.replace(",", "").split()[:TEXT_LENGTH]):
        states[position] = torch.randn(TEXT_WIDTH, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))
    return states


def load_pictures(args, split):
    """Pictures `[N, 3, R, R]` in [-1, 1] of a split, and states of their captions `[N, TEXT_LENGTH, TEXT_WIDTH]`."""
    rows = PictureSource(data_dir=str(args.data_dir)).load(split, args.caption_column)
    if rows is None:
        raise ValueError(f"--data_dir: {args.data_dir} has no split {split!r}.")
    rows = rows.shuffle(seed=0).select(range(min(len(rows), args.max_pictures)))
    crops = Crops.middle("image", args.resolution)
    column, pictures, states = args.caption_column, [], []
    for row in rows:
        pictures.append(crops(row, random.Random(0)))
        states.append(text_states((caption_texts(row[column], column) or [""])[0]))
    return torch.cat(pictures), torch.stack(states)


def build_task(path, train, held_out, base_dimension=None):
    """A task of pictures; noise is shifted by how many more values the latents have than `base_dimension`."""
    torch.manual_seed(0)  # of the posterior of a KL autoencoder
    vae = load_autoencoder(path)
    latents = [torch.cat([encode_latents(vae, batch) for batch in split[0].split(32)]) for split in (train, held_out)]
    set_latent_statistics(vae, [latents[0]])
    train_latents, held_out_latents = (scale_latents(vae, values) for values in latents)
    size = train_latents.shape[1:]
    shift = latent_shift(*size, base_dimension or size.numel())
    scheduler = create_scheduler("flow_matching", shift=shift)
    return Task((train_latents, train[1]), (held_out_latents, held_out[1]), scheduler)


@torch.no_grad()
def held_out_loss(denoiser, task):
    generator = torch.Generator().manual_seed(0)
    batches = zip(*(values.split(64) for values in task.held_out))
    denoiser.eval()
    losses = [denoising_loss(denoiser, task.scheduler, *batch, generator=generator) for batch in batches]
    denoiser.train()
    return torch.cat(losses).mean().item()


def train(args, denoiser, task, stages, seed):
    """
    Train in stages, pairs of steps and whether all weights learn; returns pairs of steps and held-out loss, and the
    median seconds of a step of all weights.
    """
    batches, noise = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    outer = tuple(f"transformer.{layer}." for layer in outer_layers(denoiser.transformer))
    curve, step, seconds = [(0, held_out_loss(denoiser, task))], 0, []
    for steps, is_all in stages:
        for name, parameter in denoiser.named_parameters():
            parameter.requires_grad_(is_all or name.startswith(outer))
        learned = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learned, args.learning_rate, fused=True)
        for _ in range(steps):
            start = time.perf_counter()
            chosen = torch.randint(len(task.train[0]), (args.train_batch_size,), generator=batches)
            examples = [values[chosen] for values in task.train]
            draws = {"generator": noise, "weighting_scheme": "logit_normal"}
            denoising_loss(denoiser, task.scheduler, *examples, **draws).mean().backward()
            nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds += [time.perf_counter() - start] if is_all else []
            step += 1
            if step % args.validation_steps == 0:
                curve.append((step, held_out_loss(denoiser, task)))
    return curve, statistics.median(seconds)


def measure(args, family, seed, source_task, target_task):
    """Curves of the source, the adaptation and the random start, seconds of a step, and parameters."""
    torch.manual_seed(seed)
    source = Denoiser(family, family.create(source_task.latent_channels, source_task.side))
    source_curve, _ = train(args, source, source_task, [(args.source_steps, True)], seed)
    widened = Denoiser(family, widen_denoiser(source.transformer, target_task.latent_channels))
    stages = [(args.ends_steps, False), (args.steps - args.ends_steps, True)]
    adapted_curve, seconds = train(args, widened, target_task, stages, seed)
    fresh = Denoiser(family, family.create(target_task.latent_channels, target_task.side))
    random_curve, _ = train(args, fresh, target_task, [(args.steps, True)], seed)
    return {
        "source": source_curve,
        "adapted": adapted_curve,
        "random": random_curve,
        "seconds_per_step": seconds,
        "parameters": fresh.transformer.num_parameters(),
    }


def steps_to(curve, loss):
    """Steps after which a curve first comes down to a loss, between its points along a line; NaN if it never does."""
    for (step, value), (next_step, next_value) in itertools.pairwise(curve):
        if next_value <= loss < value:
            return step + (next_step - step) * (value - loss) / (value - next_value)
    return math.nan


def families_table(record):
    """Markdown: a row for each family, over the seeds."""
    head = ("family", "parameters", "a step", "source, on its own latents", "first and last layer adapted", "adapted")
    head += ("random start", "reaches the random start's loss after", "seeds")
    settings, lines = record["settings"], []
    for name, group in itertools.groupby(record["runs"], lambda run: run["family"]):
        runs = list(group)
        ends = [dict(run["adapted"])[settings["ends_steps"]] for run in runs]
        losses = [[run[curve][-1][1] for run in runs] for curve in ("source", "adapted", "random")]
        source, adapted, fresh = (mean_and_spread(values, ".4f") for values in losses)
        reached = [steps_to(run["adapted"], run["random"][-1][1]) for run in runs]
        head_start = f"{mean_and_spread(reached, '.0f')} of {settings['steps']} steps"
        if any(map(math.isnan, reached)):
            head_start = "not with each seed"
        lines.append(
            [
                FAMILIES[name].title,
                f"{runs[0]['parameters'] / 1e6:.2f}M",
                f"{1e3 * statistics.median(run['seconds_per_step'] for run in runs):.0f} ms",
                source,
                mean_and_spread(ends, ".4f"),
                adapted,
                fresh,
                head_start,
                len(runs),
            ]
        )
    source, target = (
        f"`{settings[f'{name}_vae']}` (d = {settings[f'{name}_channels']})" for name in ("source", "target")
    )
    where = (
        f"`experiments/families.py`, {record['date']}, {record['machine']}; from {source}, {settings['source_steps']} "
        f"steps, to {target}, {settings['steps']} steps, {settings['ends_steps']} of the first and last layer "
        f"alone; {settings['train_batch_size']} pictures a step, of {settings['max_pictures']}:"
    )
    return f"{where}\n\n{markdown_table(head, lines)}"


def check_steps(args):
    if not args.ends_steps < args.steps:
        raise ValueError(f"--ends_steps {args.ends_steps} must be fewer than --steps {args.steps}.")
    for name in ("source_steps", "ends_steps", "steps"):
        if getattr(args, name) % args.validation_steps:
            raise ValueError(f"--{name} {getattr(args, name)} must be a multiple of --validation_steps.")


def main(args):
    check_steps(args)
    path = args.output_dir / "families.json"
    train_pictures, held_out_pictures = load_pictures(args, "train"), load_pictures(args, "validation")
    source_task = build_task(args.source_vae, train_pictures, held_out_pictures)
    base_dimension = source_task.train[0][0].numel()
    target_task = build_task(args.target_vae, train_pictures, held_out_pictures, base_dimension)
    own = ("families", "seeds", "output_dir", "data_dir", "source_vae", "target_vae")
    settings = {name: value for name, value in vars(args).items() if name not in own}
    settings |= {name: Path(getattr(args, name)).name for name in ("data_dir", "source_vae", "target_vae")}
    settings |= {"source_channels": source_task.latent_channels, "target_channels": target_task.latent_channels}
    settings |= {"held_out_pictures": len(held_out_pictures[0]), "noise_shift": target_task.scheduler.config.shift}
    record = open_record(path, settings)
    for seed, name in tqdm(list(itertools.product(args.seeds, args.families)), desc="families"):
        run = {"family": name, "seed": seed}
        if is_measured(record, run):
            continue
        run |= measure(args, FAMILIES[name], seed, source_task, target_task)
        add_run(path, record, run, order=lambda run: (list(FAMILIES).index(run["family"]), run["seed"]))
    print(families_table(record))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
