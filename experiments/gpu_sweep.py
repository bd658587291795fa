#!/usr/bin/env python
"""Whether the quality of vector quantisation falls with d because of dimension or because entries die (section 4.2).

    make gpu-sweep                                              # some six minutes on one card
    python experiments/gpu_sweep.py --device cpu --small        # the same in small, to try it

Trains d in {8, 32, 128} x S in {1, d/2, d} with K = 512 on one backbone with 32 groups, without a linear start, with
codebooks that start from N(0, 1) and learn by gradients; S = 1 also from k-means and with re-seeding of unused
entries. The crops lie on the device. All trainings have equally many steps, so many that --minutes are enough. Each
result is saved at once to gpu_sweep.json, and a run that is started again goes on behind those that are there.
"""

import datetime
import itertools
import json
import random
import time

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from spread import mean_and_spread

from diffusers_pq import PQModel
from diffusers_pq.console import one_line_errors
from diffusers_pq.data.pictures import Crops, PictureSource, usable_rows
from diffusers_pq.files import read_json, write_json
from diffusers_pq.flags import COUNT, FlagParser, device, number, output_folder
from diffusers_pq.images import to_uint8
from diffusers_pq.measuring import describe_machine, results_folder
from diffusers_pq.metrics import CodebookUsage, pooled_psnr, psnr
from diffusers_pq.models.kmeans import kmeans_codebooks
from diffusers_pq.tables import markdown_table
from diffusers_pq.training.codebooks import DeadEntryReseeder
from diffusers_pq.training.pqgan import AutoencoderLoss, AutoencoderTrainer, LossWeights, ReconstructionModel


BACKBONE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (32, 64, 128, 192),
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "mid_block_add_attention": False,
    "z_channels": 64,
}
SMALL_BACKBONE = BACKBONE | {"block_out_channels": (32, 32, 32, 32)}
WEIGHTS = LossWeights(perceptual=0.0, discriminator=0.0)
WARM_UP = 50  # steps of the learning rate
RESEED_EVERY = 50  # steps
RESAMPLES = 1000


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    parser.add_argument("--data_dir", default="data/debian-tiles", help="imagefolder with `train` and `validation`")
    parser.add_argument("--latent_channels", nargs="+", type=COUNT, default=[8, 32, 128], help="latent channels d")
    parser.add_argument("--codebook_size", type=COUNT, default=512, help="size of a codebook K")
    parser.add_argument("--seeds", type=COUNT, default=2, help="trainings of each configuration")
    parser.add_argument("--resolution", type=COUNT, default=128, help="side of the crops, in pixels")
    parser.add_argument("--batch_size", type=COUNT, default=64, help="crops of a step")
    parser.add_argument("--pictures", type=COUNT, default=2000, help="pictures at most, of each split")
    parser.add_argument("--learning_rate", type=number(float, above=0), default=1e-3, help="learning rate")
    parser.add_argument(
        "--mixed_precision", choices=("no", "fp16", "bf16"), default="bf16", help="precision of the forward pass"
    )
    parser.add_argument("--steps", type=COUNT, help="of each training; default: what --minutes are enough for")
    parser.add_argument("--minutes", type=number(float, above=0), default=6, help="for all trainings together")
    parser.add_argument("--device", type=device, default="cuda", help="device to train on")
    parser.add_argument("--small", action="store_true", help="two steps of a tiny backbone, to try the command")
    parser.add_argument(
        "--output_dir", type=output_folder, help="folder of the results; default: experiments/results/ and the device"
    )
    args = parser.parse_args(argv)
    if args.small:
        args.latent_channels, args.codebook_size, args.seeds = [8], 16, 1
        args.resolution, args.batch_size, args.pictures, args.steps = 16, 2, 16, 2
    return args


def configurations(args):
    """All of one seed before the next, so that what is there when time is up is complete."""
    for seed, d in itertools.product(range(args.seeds), args.latent_channels):
        for subspaces in (1, d // 2, d):
            yield {"d": d, "S": subspaces, "K": args.codebook_size, "start": "normal", "seed": seed}
        yield {"d": d, "S": 1, "K": args.codebook_size, "start": "kmeans, re-seeded", "seed": seed}


def load_crops(args, split, side):
    """Middles of the split's pictures, uint8 `[N, 3, side, side]`, on the device."""
    rows = PictureSource(data_dir=args.data_dir).load(split)
    if rows is None:
        raise ValueError(f"--data_dir {args.data_dir} has no `{split}` split.")
    crops = Crops.middle("image", side, "native")
    pictures = [to_uint8(crops(row, random.Random(0))) for row in usable_rows(rows, "image", args.pictures)]
    return torch.cat(pictures).to(args.device)


def draw_batch(pictures, args, generator):
    """Random crops, half of them mirrored, in [-1, 1]; drawn on the device, without waiting for it."""
    count, _, side, _ = pictures.shape
    which = torch.randint(count, (args.batch_size,), device=args.device, generator=generator)
    top, left = torch.randint(
        side - args.resolution + 1, (2, args.batch_size, 1), device=args.device, generator=generator
    )
    steps = torch.arange(args.resolution, device=args.device)
    flips = torch.rand(args.batch_size, 1, device=args.device, generator=generator) < 0.5
    columns = left + torch.where(flips, steps.flip(0), steps)
    rows = top + steps
    channels = torch.arange(3, device=args.device).view(1, 3, 1, 1)
    crops = pictures[which.view(-1, 1, 1, 1), channels, rows[:, None, :, None], columns[:, None, None, :]]
    return crops.float() / 127.5 - 1


def build(one, pictures, steps, args, accelerator):
    torch.manual_seed(one["seed"])
    shape = {"latent_channels": one["d"], "num_subspaces": one["S"], "codebook_size": one["K"]}
    autoencoder = PQModel(**(SMALL_BACKBONE if args.small else BACKBONE) | shape)
    autoencoder.to(args.device, memory_format=torch.channels_last)
    generator = torch.Generator(args.device).manual_seed(one["seed"])
    reseeder = None
    if one["start"] != "normal":
        with torch.no_grad():
            wanted = max(1, -(-32 * one["K"] // (args.batch_size * (args.resolution // 8) ** 2)))
            latents = [autoencoder.encode(draw_batch(pictures, args, generator)).latents for _ in range(wanted)]
            kmeans_codebooks(autoencoder.quantizer, torch.cat(latents))
        reseeder = DeadEntryReseeder(autoencoder.quantizer, accelerator, RESEED_EVERY)
    model = ReconstructionModel(autoencoder).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    warm_up = min(WARM_UP, steps // 4)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=warm_up, num_training_steps=steps)
    prepared = accelerator.prepare(model, optimizer, schedule)
    losses = AutoencoderLoss(WEIGHTS, None, None, accelerator)
    return AutoencoderTrainer(accelerator, *prepared, losses, max_grad_norm=1.0, reseeder=reseeder), generator


def train(one, pictures, steps, args, accelerator):
    trainer, generator = build(one, pictures, steps, args, accelerator)
    for _ in range(steps):
        trainer.step(draw_batch(pictures, args, generator))
    return trainer.model.eval()


@torch.no_grad()
def evaluate(model, pictures, args):
    """Pooled PSNR with its interval over held-out pictures, and the use of the codebooks."""
    quantizer = model.autoencoder.quantizer
    usage = CodebookUsage(quantizer.num_subspaces, quantizer.codebook_size).to(args.device)
    decibels = []
    for batch in pictures.split(args.batch_size):
        output = model(batch.float() / 127.5 - 1)
        decibels += psnr(to_uint8(output.sample), batch).tolist()
        usage.update(output.codes)
    low, high = bootstrap(decibels)
    pooled = pooled_psnr(decibels, [1] * len(decibels))
    return {"psnr_pooled": pooled, "interval": [low, high], "pictures": len(decibels)} | usage.compute()


def bootstrap(decibels, resamples=RESAMPLES):
    """95 % interval of the pooled PSNR over pictures that are drawn with replacement."""
    errors = 10 ** (-np.asarray(decibels) / 10)
    drawn = np.random.default_rng(0).integers(len(errors), size=(resamples, len(errors)))
    return [float(value) for value in np.percentile(-10 * np.log10(errors[drawn].mean(1)), [2.5, 97.5])]


def affordable_steps(pictures, count, args, accelerator):
    """Of each of `count` trainings, by the slowest configuration's time of a step."""
    d = max(args.latent_channels)
    one = {"d": d, "S": d, "K": args.codebook_size, "start": "normal", "seed": 0}
    trainer, generator = build(one, pictures, 100, args, accelerator)
    for _ in range(5):
        trainer.step(draw_batch(pictures, args, generator))
    started = time.perf_counter()
    for _ in range(10):
        trainer.step(draw_batch(pictures, args, generator))  # waits for the device, to see whether it is finite
    seconds = (time.perf_counter() - started) / 10
    return max(1, int(0.85 * 60 * args.minutes / count / seconds))


def table(runs):
    """Means over the seeds."""
    groups = {}
    for run in runs:
        groups.setdefault((run["d"], run["S"], run["start"]), []).append(run)
    lines = [
        (d, subspaces, start, *(mean_and_spread([run[key] for run in found], spec) for key, spec in SCORES.items()))
        for (d, subspaces, start), found in groups.items()
    ]
    return markdown_table(("d", "S", "codebooks", "PSNR, pooled (dB)", "H_n", "P_n", "dead"), lines)


SCORES = {"psnr_pooled": ".2f", "H_n": ".3f", "P_n": ".3f", "dead": ".3f"}
# What must not differ between results in one file.
SETTINGS = ("data_dir", "codebook_size", "resolution", "batch_size", "pictures", "learning_rate", "mixed_precision")


def start_record(path, args):
    settings = {name: getattr(args, name) for name in SETTINGS}
    if path.is_file():
        record = read_json(path)
        if record["settings"] != settings:
            raise ValueError(f"{path} holds results with other settings: choose another --output_dir, or remove it.")
        return record
    where = {"date": datetime.date.today().isoformat(), "machine": describe_machine(args.device)}
    return where | {"settings": settings, "steps": args.steps, "runs": []}


def main(args):
    torch.backends.cudnn.benchmark = True
    ends = time.monotonic() + 60 * args.minutes
    folder = args.output_dir or results_folder("experiments/results", args.device, args.small)
    record = start_record(folder / "gpu_sweep.json", args)
    accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=args.mixed_precision)
    pictures, held_out = (
        load_crops(args, "train", 2 * args.resolution),
        load_crops(args, "validation", args.resolution),
    )
    wanted = [*configurations(args)]
    if record["steps"] is None:
        record["steps"] = affordable_steps(pictures, len(wanted), args, accelerator)
        print(f"{len(wanted)} trainings of {record['steps']} steps on {len(pictures)} pictures", flush=True)
    for one in wanted:
        if any(one.items() <= run.items() for run in record["runs"]):
            continue
        if time.monotonic() > ends:
            print("No time left: start it again to go on.")
            break
        started = time.perf_counter()
        model = train(one, pictures, record["steps"], args, accelerator)
        record["runs"].append(one | evaluate(model, held_out, args) | {"seconds": time.perf_counter() - started})
        write_json(folder / "gpu_sweep.json", record)
        print(json.dumps(record["runs"][-1]), flush=True)
    print(table(record["runs"]))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
