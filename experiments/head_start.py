#!/usr/bin/env python
"""Is a denoiser that was trained on other latents ahead of a new one, and by how many steps? Adapts one source to a
PQModel's latents from each start of the new weights (section 4.5), with several seeds, and trains the same UNet from
scratch, all on the noise schedule of the source.

    python experiments/head_start.py --source runs/sd-emoji --vae model_cards/pqgan-mini-f8-pq \\
        --data_dir data/emoji-128 --latents_dir data/emoji-codes

At each checkpoint: the loss on held-out pictures; and of samples for held-out captions, the Fréchet distance to the
training pictures in the features of an EfficientNet-Lite0, which is not FID, and the share whose subject and style
linear classifiers on these features name. Each measurement is written at once, so an interrupted run resumes. Writes
head_start.json and head_start.png.
"""

import itertools
import random
from pathlib import Path

import matplotlib.pyplot as plt
from accelerate import Accelerator
from adaptation import read_logs
from run_record import add_run, is_measured, open_record
from spread import mean_and_spread
from text_agreement import TextAgreement, cached_features, frechet_distance, picture_features

from diffusers_pq import StableDiffusionPQPipeline
from diffusers_pq.console import one_line_errors
from diffusers_pq.data.conditions import caption_texts
from diffusers_pq.data.pictures import PictureSource, decode_image
from diffusers_pq.evaluation.generation import Sampling, draw_samples
from diffusers_pq.files import replacing
from diffusers_pq.flags import COUNT, SCALE, SEED, FlagParser, number, output_folder, parse
from diffusers_pq.images import load_image
from diffusers_pq.tables import markdown_table
from diffusers_pq.training.stable_diffusion import AdaptationOptions, adapt_stable_diffusion


ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "training_scripts" / "recipes" / "sd-emoji.yaml"
# By name: what the new channels start from, and the share of the steps that trains the first and last layer alone.
STARTS = {
    "copy": ("copy", 0.1),
    "copy_scaled": ("copy_scaled", 0.1),
    "zero": ("zero", 0.1),
    "copy, one stage": ("copy", 0),
    "random": ("random", 0),
}
COLUMNS = ("subject", "style")
BATCH_SIZE = 16
SCORES = {
    "loss": ("held-out loss", ".3f"),
    "frechet_distance": ("FD, EfficientNet-Lite0", ".1f"),
    "subject_top5": ("subject among the first five", ".0%"),
    "style": ("style", ".0%"),
}


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="folder of the pipeline to adapt")
    parser.add_argument("--vae", required=True, help="PQModel whose latents it is adapted to")
    parser.add_argument("--data_dir", type=Path, required=True, help="captioned pictures with subject and style")
    parser.add_argument("--latents_dir", type=Path, help="their codes, from encode_dataset.py")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS), help="starts of the new weights")
    parser.add_argument("--seeds", nargs="+", type=SEED, default=[0, 1, 2], help="seeds of the trainings")
    parser.add_argument("--resolution", type=COUNT, default=128, help="side of the pictures, in pixels")
    parser.add_argument("--learning_rate", type=number(float, above=0), default=5e-4, help="of all stages")
    parser.add_argument(
        "--checkpoints", nargs="+", type=COUNT, default=[250, 500, 1000, 2000, 4000], help="steps to measure after"
    )
    parser.add_argument("--num_samples", type=number(int, minimum=2), default=256, help="samples at each checkpoint")
    parser.add_argument("--num_inference_steps", type=COUNT, default=20, help="steps of each sample")
    parser.add_argument("--guidance_scale", type=SCALE, default=2.5, help="of classifier-free guidance")
    parser.add_argument(
        "--runs_dir", type=output_folder, default=ROOT / "runs" / "head-start", help="of the trainings"
    )
    parser.add_argument(
        "--output_dir", type=output_folder, default=ROOT / "experiments" / "results", help="folder of the results"
    )
    args = parser.parse_args(argv)
    args.checkpoints = sorted(set(args.checkpoints))
    return args


def train(args, folder, start, seed, step):
    """Go on from the last checkpoint to this one."""
    init, share = STARTS[start]
    steps = args.checkpoints[-1]
    ends_only = round(share * steps)
    stages = [(ends_only, "conv")] if ends_only else []
    stages.append((steps - ends_only, "all"))
    flags = {
        "config": RECIPE,
        "pretrained_model_name_or_path": args.source,
        "vae_name_or_path": args.vae,
        "unet_init": init,
        "train_data_dir": args.data_dir,
        "stages": " ".join(f"{args.resolution}:{count}:{args.learning_rate}:{what}" for count, what in stages),
        "max_train_steps": step,
        "lr_warmup_steps": min(100, steps // 10),
        "channel_weighting": 1,
        "checkpointing_steps": steps,
        "validation_steps": step,
        "seed": seed,
        "output_dir": folder,
    }
    argv = [f"--{name}={value}" for name, value in flags.items()]
    if args.latents_dir:
        argv += ["--no-cache_latents", f"--latents_dir={args.latents_dir}"]
    adapt_stable_diffusion(AdaptationOptions.of(parse(AdaptationOptions, argv)))


def held_out_loss(folder, step):
    return {event.step: event.value for event in read_logs(folder).Scalars("validation/loss")}[step]


def held_out_rows(args):
    """As many rows of the validation split, in random order, as there are to be samples."""
    rows = PictureSource(data_dir=str(args.data_dir)).load("validation", "text", *COLUMNS)
    order = random.Random(0).sample(range(len(rows)), min(args.num_samples, len(rows)))
    return rows.select(order)


def training_pictures(args):
    """The features of the training pictures, and classifiers that are fitted to them."""
    rows = PictureSource(data_dir=str(args.data_dir)).load("train", *COLUMNS)
    features = cached_features([decode_image(value) for value in rows["image"]], args.runs_dir / "features.npy")
    return features, TextAgreement.fit(features, {name: rows[name] for name in COLUMNS})


def measure(args, folder, step, rows, references, agreement):
    pipeline = StableDiffusionPQPipeline.from_pretrained(folder)
    captions = [caption_texts(value, "text")[0] for value in rows["text"]]
    sampling = Sampling(len(captions), args.guidance_scale, args.num_inference_steps, 0, BATCH_SIZE)
    size = {"height": args.resolution, "width": args.resolution}
    samples = folder / "samples" / str(step)
    paths = draw_samples(Accelerator(cpu=True), pipeline, captions, samples, sampling, condition="prompt", **size)
    features = picture_features([load_image(path) for path in paths])
    return {
        "loss": held_out_loss(folder, step),
        "frechet_distance": frechet_distance(features, references),
        **agreement.accuracy(features, {name: rows[name] for name in COLUMNS}),
    }


def by_start(record):
    """Runs of each start, by the steps after which they were measured."""
    runs = {}
    for run in record["runs"]:
        runs.setdefault(run["start"], {}).setdefault(run["step"], []).append(run)
    return runs


def head_start_table(record):
    """Markdown: a row for each start and checkpoint, over the seeds; the first is of real pictures."""
    real = record["held_out_pictures"]
    scores = (format(real[name], spec) if name in real else "-" for name, (_, spec) in SCORES.items())
    lines = [("none: real pictures", "-", *scores, "-")]
    for start, steps in by_start(record).items():
        for step, runs in sorted(steps.items()):
            scores = [mean_and_spread([run[name] for run in runs], spec) for name, (_, spec) in SCORES.items()]
            lines.append((start, f"{step:,}", *scores, len(runs)))
    settings = record["settings"]
    where = (
        f"`experiments/head_start.py`, {record['date']}, {record['machine']}: {settings['data_dir']} at "
        f"{settings['resolution']} px, `{settings['source']}` to the latents of `{settings['vae']}`, learning rate "
        f"{settings['learning_rate']}; {settings['num_samples']} samples of {settings['num_inference_steps']} steps, "
        f"guidance {settings['guidance_scale']}"
    )
    table = markdown_table(("start", "steps", *(title for title, _ in SCORES.values()), "seeds"), lines)
    return f"{where}:\n\n{table}"


def plot(record, path):
    figure, axes = plt.subplots(1, len(SCORES), figsize=(14, 3.4), layout="constrained")
    for axis, (name, (title, _)) in zip(axes, SCORES.items()):
        for start, steps in by_start(record).items():
            points = sorted((step, [run[name] for run in runs]) for step, runs in steps.items())
            low, mean, high = zip(*((min(values), sum(values) / len(values), max(values)) for _, values in points))
            axis.plot([step for step, _ in points], mean, marker=".", label=start)
            axis.fill_between([step for step, _ in points], low, high, alpha=0.2)
        axis.set(title=title, xlabel="steps", xscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main(args):
    path = args.output_dir / "head_start.json"
    names = ("resolution", "learning_rate", "checkpoints", "num_samples", "num_inference_steps", "guidance_scale")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"data_dir": args.data_dir.name, "source": args.source.name, "vae": Path(args.vae).name}
    record = open_record(path, settings)
    (references, agreement), rows = training_pictures(args), held_out_rows(args)
    held_out = picture_features([decode_image(value) for value in rows["image"]])
    record["held_out_pictures"] = agreement.accuracy(held_out, {name: rows[name] for name in COLUMNS})
    record["held_out_pictures"]["frechet_distance"] = frechet_distance(held_out, references)
    for step, seed, start in itertools.product(args.checkpoints, args.seeds, args.starts):
        combination = {"start": start, "seed": seed, "step": step}
        if is_measured(record, combination):
            continue
        folder = args.runs_dir / f"{start}-{seed}".replace(", ", "-").replace(" ", "-")
        train(args, folder, start, seed, step)
        add_run(path, record, combination | measure(args, folder, step, rows, references, agreement))
    with replacing(args.output_dir / "head_start.png") as unfinished:
        plot(record, unfinished)
    print(head_start_table(record))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
