#!/usr/bin/env python
"""The bottlenecks of Table 1 (VQ, multi-channel, residual, scalar, FSQ, KL, none, PQ) on one backbone, with the same
data, crops, start and steps.

    python experiments/quantizer_comparison.py          # 5 hours on one core; resumes after an interruption

Each is trained from three seeds (`--seeds`), and the table gives mean and spread. In two processes at a time, with
OMP_NUM_THREADS=1, into one table:

    python experiments/quantizer_comparison.py --bottlenecks vq multi_channel residual scalar &
    python experiments/quantizer_comparison.py --bottlenecks fsq kl none pq

Flags after `--` are those of train_pqgan.py for all runs, instead of the default (the recipe of the mini models, 600
steps). So on GPUs, with the paper's losses:

    accelerate launch experiments/quantizer_comparison.py --model_config model_cards/pqgan-f8/config.json \\
        --vq_codebook_size 16384 --runs_dir runs/comparison-f8 -- \\
        --config training_scripts/recipes/pqgan-f8.yaml --max_train_steps 200000

Several processes end with each training, since their group does: start them again to evaluate it and to go on.

Every trained model is evaluated on the `validation` split, on the six photographs, by which choices were made, and
with `--test_dir` on the test photographs of `diffusers-pq prepare-test-set`. Writes quantizer_comparison.json and .md.
"""

import datetime
import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from bottlenecks import BOTTLENECKS, create_bottleneck, fit_quantizer, load_bottleneck
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from spread import mean_and_spread

from diffusers_pq import PQModel
from diffusers_pq.console import one_line_errors
from diffusers_pq.evaluation.data import EvaluationData
from diffusers_pq.evaluation.reconstruction import describe_latents, evaluate_autoencoder
from diffusers_pq.files import read_json, write_json, write_text
from diffusers_pq.flags import COUNT, SEED, FlagParser, output_folder, parse, trained_unlike, unlike
from diffusers_pq.images import load_image, to_tensor, to_uint8
from diffusers_pq.measuring import describe_machine
from diffusers_pq.metrics import load_metrics
from diffusers_pq.photographs import load_photographs
from diffusers_pq.reconstruction import reconstruct_picture
from diffusers_pq.tables import SCORE_COLUMNS, markdown_table
from diffusers_pq.training import pqgan
from diffusers_pq.training.initialisation import collect_latents, copy_matching_weights
from diffusers_pq.training.run import load_train_split


ROOT = Path(__file__).parent.parent
RECIPE = ("--config", str(ROOT / "training_scripts" / "recipes" / "pqgan-mini.yaml"), "--max_train_steps", "600")
RECIPE += ("--weight_init", "pca_rotated")  # no bottleneck is favoured
# Six pictures are too few for the distances between distributions.
PHOTOGRAPH_METRICS = ("psnr", "psnr_pooled", "ssim", "lpips_alex")
OWN_SETTINGS = ("vq_codebook_size", "eval_resolution", "max_eval_samples", "test_dir", "model_config")
# Flags that not all bottlenecks know.
NOT_FOR_ALL = ("codebook_distance", "gradient_estimator", "codebook_ema_decay", "reseed_dead_entries")
NOT_FOR_ALL += ("quantize_from_step", "backbone_name_or_path", "pretrained_model_name_or_path")
# part of a result -> what its columns are called
PARTS = {"photographs": "photographs", "test": "test photographs", "validation": "validation"}
CODEBOOKS = ("num_subspaces", "codebook_size")


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    parser.add_argument(
        "--bottlenecks", nargs="+", choices=BOTTLENECKS, default=list(BOTTLENECKS), help="what is compared"
    )
    parser.add_argument(
        "--model_config",
        default=str(ROOT / "model_cards" / "pqgan-mini-f8-pq" / "config.json"),
        help="config.json of a PQModel, which gives backbone, d, S and K",
    )
    parser.add_argument("--seeds", nargs="+", type=SEED, default=[0, 1, 2], help="seed of each run")
    parser.add_argument("--test_dir", type=Path, help="folder that `diffusers-pq prepare-test-set` wrote")
    parser.add_argument("--vq_codebook_size", type=COUNT, default=1024, help="K of the vector quantiser")
    parser.add_argument("--eval_resolution", type=COUNT, default=256, help="side of the validation pictures' crops")
    parser.add_argument("--max_eval_samples", type=COUNT, help="only so many validation pictures; default: all")
    parser.add_argument(
        "--runs_dir", type=Path, default=ROOT / "runs" / "quantizer_comparison", help="folder of the trainings"
    )
    parser.add_argument(
        "--output_dir", type=output_folder, default=ROOT / "experiments" / "results", help="folder of the results"
    )
    parser.add_argument("flags", nargs="*", default=RECIPE, help="flags of train_pqgan.py, after --")
    return parser.parse_args(argv)


def build(name, config, args, options):
    """A bottleneck that starts from the same crops as all others, as the flags say."""
    train_images = load_train_split(options.data)
    autoencoder = create_bottleneck(name, config, args.vq_codebook_size)
    torch.manual_seed(options.optim.seed)
    copy_matching_weights(autoencoder, PQModel.from_config(config))  # encoder and decoder
    if options.model.weight_init != "default":
        pqgan.fit_to_images(options, autoencoder, train_images)
    if options.codebooks.codebook_init == "kmeans" and name not in ("kl", "none"):
        # The same number for all, that of the one with the most entries.
        wanted = options.codebooks.kmeans_vectors_per_entry * max(config["codebook_size"], args.vq_codebook_size)
        crops = pqgan.first_crops(options, train_images)
        fit_quantizer(autoencoder.quantizer, collect_latents(autoencoder, crops, wanted))
    return autoencoder


def train(name, config, args, options):
    if name == "none":
        codebooks = replace(options.codebooks, quantize_from_step=options.optim.max_train_steps)
        options = replace(options, codebooks=codebooks)
    pqgan.train_pqgan(options, lambda: build(name, config, args, options))


def evaluate_validation(accelerator, model, args, options):
    source = options.data
    data = EvaluationData(
        dataset_name=source.dataset_name,
        data_dir=source.train_data_dir,
        dataset_config_name=source.dataset_config_name,
        image_column=source.image_column,
        resolution=args.eval_resolution,
        max_samples=args.max_eval_samples,
    )
    share = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    reading = {"streaming": source.streaming, "cache_dir": source.cache_dir}
    loader = data.loader(options.optim.train_batch_size, **reading, **share)
    metrics, unavailable = load_metrics()
    scores, pictures = evaluate_autoencoder(accelerator, model, loader, metrics)
    return {"pictures": pictures, "scores": scores, "unavailable": unavailable}


def test_photographs(folder):
    paths = sorted(Path(folder, "test").glob("*.png"))
    if not paths:
        raise FileNotFoundError(
            f"--test_dir {folder} holds no test photographs; `diffusers-pq prepare-test-set` makes them."
        )
    return [load_image(path) for path in paths]


def evaluate_photographs(model, photographs):
    metrics, unavailable = load_metrics(PHOTOGRAPH_METRICS)
    metrics.to(model.device)
    for original in photographs:
        reconstructed = reconstruct_picture(model, original).picture
        metrics.update(*(to_uint8(to_tensor(p))[None].to(model.device) for p in (reconstructed, original)))
    scores = {name: float(score) for name, score in metrics.compute().items()}
    return {"pictures": len(photographs), "scores": scores, "unavailable": unavailable}


def check_trained_alike(found, wanted, folder):
    """Raise a `ValueError` if another bottleneck was trained or evaluated otherwise."""
    differing = trained_unlike(pqgan.PQGANOptions, found, wanted, between_machines=False, own=("seed",))
    differing |= unlike(found, wanted, OWN_SETTINGS)
    if differing:
        listed = ", ".join(f"{name} {there!r} there, {here!r} now" for name, (there, here) in differing.items())
        raise ValueError(f"{folder} was trained or evaluated otherwise: {listed}. Choose another --runs_dir.")


def run_bottleneck(name, seed, config, args):
    folder = args.runs_dir / f"seed{seed}" / name
    flags = [*args.flags, "--model_config_name_or_path", args.model_config, "--output_dir", str(folder)]
    flags += ["--seed", str(seed)]
    options = pqgan.PQGANOptions.of(parse(pqgan.PQGANOptions, flags))
    usual = pqgan.PQGANOptions.of({"model_config_name_or_path": args.model_config})
    if given := list(unlike(usual.settings(), options.settings(), NOT_FOR_ALL)):
        raise ValueError(f"Not all bottlenecks know --{', --'.join(given)}: leave it out.")
    options.optim.share_out_batch(PartialState().num_processes)
    settings = options.settings() | {
        key: getattr(args, key) for key in ("vq_codebook_size", "eval_resolution", "max_eval_samples")
    }
    settings["test_dir"] = None if args.test_dir is None else str(args.test_dir)
    settings["model_config"] = {key: value for key, value in config.items() if not key.startswith("_")}
    for path in args.runs_dir.glob("seed*/*/settings.json"):
        check_trained_alike(read_json(path), settings, path.parent)
    if (folder / "results.json").is_file():
        return
    if PartialState().is_main_process:
        write_json(folder / "settings.json", settings)
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        train(name, config, args, options)
        if PartialState().num_processes > 1:
            sys.exit(f"{name} is trained. Start the same command again to go on.")
    accelerator = Accelerator()
    model = load_bottleneck(name, folder, config, args.vq_codebook_size).to(accelerator.device)
    result = {
        "name": name,
        "latents": describe_latents(model, args.eval_resolution),
        "validation": evaluate_validation(accelerator, model, args, options),
        "photographs": evaluate_photographs(model, list(load_photographs().values())),
        **({} if args.test_dir is None else {"test": evaluate_photographs(model, test_photographs(args.test_dir))}),
        "settings": settings,
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(accelerator.device.type),
    }
    if accelerator.is_main_process:
        write_json(folder / "results.json", result)
    accelerator.wait_for_everyone()


def read_results(runs_dir):
    """Of all finished runs, those of other processes included, in the order of `BOTTLENECKS`, then of the seeds."""
    paths = (path for name in BOTTLENECKS for path in sorted(runs_dir.glob(f"seed*/{name}/results.json")))
    return [read_json(path) for path in paths]


def results_table(results):
    """Markdown: a row for each bottleneck, with mean and spread over its seeds, and how it was measured."""
    parts = [part for part in PARTS if part in results[0]]
    measured = {part: {name for result in results for name in result[part]["scores"]} for part in parts}
    columns = [(part, name) for part in parts for name in SCORE_COLUMNS if name in measured[part]]
    head = ["bottleneck", "d", "S", "K", "bits per latent pixel", "bits per pixel"]
    head += [f"{PARTS[part]}: {SCORE_COLUMNS[name][0]}" for part, name in columns]
    lines = []
    for name in dict.fromkeys(result["name"] for result in results):
        runs = [result for result in results if result["name"] == name]
        latents = runs[0]["latents"]
        bits = latents["bits_per_pixel"]
        line = [BOTTLENECKS[name], latents["latent_channels"], *(latents.get(key, "-") for key in CODEBOOKS)]
        line += [f"{bits * latents['downsampling_factor'] ** 2:g}", f"{bits:.3g}"]
        for part, score in columns:
            values = [run[part]["scores"].get(score, math.nan) for run in runs]
            line.append(mean_and_spread(values, SCORE_COLUMNS[score][1]))
        lines.append(line)
    wanted = {name: weights for result in results for name, weights in result["validation"]["unavailable"].items()}
    unavailable = [f"- Unavailable: {name}, which needs {weights}" for name, weights in wanted.items()]
    return "\n".join([_conditions(results), "", markdown_table(head, lines), "", *unavailable]).rstrip() + "\n"


def _conditions(results):
    first, settings = results[0], results[0]["settings"]
    data = Path(settings["dataset_name"] or settings["train_data_dir"]).name
    batch = settings.get("total_batch_size") or settings["train_batch_size"]
    seeds = {result["settings"]["seed"] for result in results}
    runs = f"{len(seeds)} seeds (mean ± standard deviation)" if len(seeds) > 1 else "one seed"
    test = f", {first['test']['pictures']} test photographs" if "test" in first else ""
    return (
        f"`experiments/quantizer_comparison.py`, {max(result['date'] for result in results)}, {first['machine']}: "
        f"{settings['max_train_steps']} steps of {batch} crops of {settings['resolution']} px of {data} for each, "
        f"start `{settings['weight_init']}`, {runs}; means over {first['photographs']['pictures']} whole photographs "
        f"that were never trained on{test} and {first['validation']['pictures']} validation pictures of "
        f"{settings['eval_resolution']} px."
    )


def main(args):
    config = read_json(args.model_config)
    for seed, name in itertools.product(args.seeds, args.bottlenecks):
        run_bottleneck(name, seed, config, args)
        if PartialState().is_main_process:
            results = read_results(args.runs_dir)
            write_json(args.output_dir / "quantizer_comparison.json", results)
            write_text(args.output_dir / "quantizer_comparison.md", results_table(results))
    if PartialState().is_main_process:
        print(results_table(results))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
