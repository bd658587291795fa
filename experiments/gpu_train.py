#!/usr/bin/env python
"""Train a text-to-image model on PQ latents from nothing within minutes: autoencoders, source, adaptation.

    make gpu-train                                                           # some twelve minutes on one card
    python experiments/gpu_train.py --device cpu --small --data_dir DATA     # the same in small, to try it

PQ and KL autoencoders learn side by side; then a small Stable Diffusion on KL latents, the source; then its adaptation
to PQ latents and, beside it, the same UNet from scratch. A dry run of each training says how many steps its share of
--minutes is enough for. Checkpoints are written every minute; started again, it goes on with the last of them and
skips what is done. What is trained is packed after each stage, in half precision, as parts of a tar file
(`cat weights.tar.* | tar x`).
"""

import json
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from diffusers_pq.console import one_line_errors
from diffusers_pq.files import read_json, replacing, write_json
from diffusers_pq.flags import COUNT, FlagParser, device, number, output_folder


ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "training_scripts"
MOST_BYTES, PART_BYTES = 60 * 2**20, 15 * 2**20
CHECKPOINT_SECONDS = 60
# Of the time, to each stage; the rest is for imports, dry runs and encoding.
SHARES = {"autoencoders": 0.3, "source": 0.25, "adaptation": 0.25}


@dataclass
class Training:
    """
    Args:
        stage (`str`): Out of `SHARES`; the trainings of a stage run side by side.
        folder (`str`): Of what is trained, within the output folder.
        script (`str`): Of training_scripts.
        flags (`Callable`): Makes its flags but for steps and checkpoints.
        steps (`Callable`): Makes the flags for a number of steps.
        result (`str`): The file that is there once it is done.
        is_comparison (`bool`): Only its losses matter: its weights are not packed.
    """

    stage: str
    folder: str
    script: str
    flags: Callable
    steps: Callable
    result: str
    is_comparison: bool = False


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True, help="imagefolder of captioned pictures")
    parser.add_argument("--minutes", type=number(float, above=0), default=12, help="for all of it")
    parser.add_argument("--resolution", type=COUNT, default=128, help="side of the pictures, in pixels")
    parser.add_argument("--batch_size", type=COUNT, default=64, help="pictures of a step")
    parser.add_argument("--device", type=device, default="cuda", help="device to train on")
    parser.add_argument(
        "--mixed_precision", choices=("no", "fp16", "bf16"), default="bf16", help="precision of the forward passes"
    )
    parser.add_argument("--small", action="store_true", help="two steps of each training, to try the commands")
    parser.add_argument(
        "--output_dir", type=output_folder, default=Path("runs/gpu-train"), help="folder of all that is made"
    )
    args = parser.parse_args(argv)
    if args.small:
        args.resolution, args.batch_size, args.mixed_precision = 32, 2, "no"
    return args


def common(args):
    flags = {"train_data_dir": args.data_dir, "mixed_precision": args.mixed_precision, "min_image_side": 1}
    flags |= {"train_batch_size": args.batch_size, "resume_from_checkpoint": "latest"}
    return flags | {"dataloader_num_workers": 0 if args.small else 4, "cache_dir": args.output_dir / "cache"}


def autoencoder(kind):
    def flags(args):
        config = ROOT / "model_cards" / f"pqgan-mini-f8-{kind}" / "config.json"
        own = {"config": SCRIPTS / "recipes" / "pqgan-mini.yaml", "model_config_name_or_path": config}
        return own | common(args) | {"resolution": args.resolution}

    def steps(args, count):
        return {"max_train_steps": count}

    return Training("autoencoders", kind, "train_pqgan.py", flags, steps, "diffusion_pytorch_model.safetensors")


def denoiser_steps(args, count):
    return {"stages": f"{args.resolution}:{count}:5e-4:all"}


def source_flags(args):
    own = {"config": SCRIPTS / "recipes" / "sd-mini.yaml", "train_text_encoder": True}
    return own | common(args) | {"pretrained_model_name_or_path": args.output_dir / "untrained"}


def adaptation(init):
    def flags(args):
        own = {"config": SCRIPTS / "recipes" / "sd-mini.yaml", "unet_init": init}
        own |= {"vae_name_or_path": args.output_dir / "pq", "channel_weighting": 1, "noise_shift": "auto"}
        own |= {"pretrained_model_name_or_path": args.output_dir / "source", "rescale_betas_zero_snr": True}
        return own | common(args) | {"latents_dir": args.output_dir / "codes", "lr_scheduler": "constant_with_warmup"}

    is_comparison = init == "random"
    return Training("adaptation", init, "train_pqsd.py", flags, denoiser_steps, "model_index.json", is_comparison)


TRAININGS = (
    autoencoder("pq"),
    autoencoder("kl"),
    Training("source", "source", "train_pqsd.py", source_flags, denoiser_steps, "model_index.json"),
    adaptation("copy"),
    adaptation("random"),
)


def command_of(script, flags, args):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--dynamo_backend", "no", "--mixed_precision", args.mixed_precision]
    launch += ["--cpu"] if args.device == "cpu" else []
    given = []
    for name, value in flags.items():
        given += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return [*launch, str(SCRIPTS / script), *given]


def run_together(commands, logs):
    """Run processes side by side; an `OSError` names the log of one that failed, once all have ended."""
    processes = []
    for command, log in zip(commands, logs):
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as output:
            processes.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT))
    failed = [str(log) for process, log in zip(processes, logs) if process.wait()]
    if failed:
        raise OSError(f"A training failed; see the end of {', '.join(failed)}.")


def seconds_a_step(log):
    """Of the dry run that wrote a log."""
    found = re.findall(r"time: (\S+) s a step", log.read_text(errors="replace"))
    if not found:
        raise ValueError(f"{log} does not say how long a step takes.")
    return float(found[-1])


def plan(trainings, args):
    """Steps of each training and between its checkpoints, by dry runs side by side, as the trainings will be."""
    if args.small:
        return {training.folder: {"steps": 2, "checkpointing_steps": 1} for training in trainings}
    logs = [args.output_dir / "logs" / f"{training.folder}-dry-run.txt" for training in trainings]
    commands = [
        command_of(training.script, training.flags(args) | training.steps(args, 1000) | {"dry_run": True}, args)
        for training in trainings
    ]
    run_together(commands, logs)
    seconds = 60 * args.minutes * SHARES[trainings[0].stage]
    plans = {}
    for training, log in zip(trainings, logs):
        step = seconds_a_step(log)
        plans[training.folder] = {
            "steps": max(1, int(seconds / step)),
            "checkpointing_steps": max(1, int(CHECKPOINT_SECONDS / step)),
        }
    return plans


def is_done(training, args):
    return (args.output_dir / training.folder / training.result).is_file()


def train(stage, state, args):
    """All trainings of a stage that are not done."""
    trainings = [training for training in TRAININGS if training.stage == stage and not is_done(training, args)]
    unplanned = [training for training in trainings if training.folder not in state["plans"]]
    if unplanned:
        state["plans"] |= plan(unplanned, args)
        write_json(args.output_dir / "gpu_train.json", state)
    commands = []
    for training in trainings:
        own = state["plans"][training.folder]
        every = own["checkpointing_steps"]
        flags = training.flags(args) | training.steps(args, own["steps"])
        flags |= {"checkpointing_steps": every, "checkpoints_total_limit": 1}
        flags |= {"validation_steps": every, "num_validation_images": 2 if args.small else 64}
        flags |= {"output_dir": args.output_dir / training.folder}
        commands.append(command_of(training.script, flags, args))
    run_together(commands, [args.output_dir / "logs" / f"{training.folder}.txt" for training in trainings])


def prepare_source(args):
    """A Stable Diffusion on KL latents that has learned nothing."""
    if (args.output_dir / "untrained" / "model_index.json").is_file():
        return
    command = [sys.executable, SCRIPTS / "create_stable_diffusion.py", "--train_data_dir", args.data_dir]
    command += ["--output_dir", args.output_dir / "untrained", "--vae_name_or_path", args.output_dir / "kl"]
    command += ["--config_dir", SCRIPTS / "recipes" / "sd-mini"]
    run_together([list(map(str, command))], [args.output_dir / "logs" / "untrained.txt"])


def encode(args):
    """The pictures' codes, which the adaptation learns from."""
    if (args.output_dir / "codes").is_dir():
        return
    flags = {"train_data_dir": args.data_dir, "vae_name_or_path": args.output_dir / "pq", "min_image_side": 1}
    flags |= {"resolution": args.resolution, "output_dir": args.output_dir / "codes"}
    run_together([command_of("encode_dataset.py", flags, args)], [args.output_dir / "logs" / "codes.txt"])


def halved(path):
    """A safetensors file's tensors in half precision but for codebooks, which others would be for good."""
    tensors = load_file(path)
    return {
        name: value.half() if value.dtype == torch.float32 and "codebooks" not in name else value
        for name, value in tensors.items()
    }


def pack(args):
    """
    What is trained so far, without checkpoints, in numbered parts; returns their size.

    Raises:
        ValueError: if it is larger than may be; the parts are written all the same.
    """
    whole = args.output_dir / "weights.tar"
    with replacing(whole) as unfinished, tarfile.open(unfinished, "w") as archive:
        for training in (training for training in TRAININGS if is_done(training, args)):
            folder = args.output_dir / training.folder
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                if is_kept(path.relative_to(folder), training):
                    _add(archive, path, path.relative_to(args.output_dir))
    content = whole.read_bytes()
    whole.unlink()
    for path in args.output_dir.glob("weights.tar.*"):
        path.unlink()
    for place in range(0, len(content), PART_BYTES):
        path = args.output_dir / f"weights.tar.{place // PART_BYTES:03d}"
        path.write_bytes(content[place : place + PART_BYTES])
    if len(content) > MOST_BYTES:
        raise ValueError(f"The weights take {len(content) / 2**20:.0f} MiB, more than {MOST_BYTES / 2**20:.0f}.")
    return len(content)


def is_kept(path, training):
    """Whether a file within the folder of a training is packed: of weights only those that are nowhere else."""
    first = path.parts[0]
    if path.suffix == ".safetensors":
        return first not in ("best", "vae", "discriminator") and not training.is_comparison
    return not first.startswith("checkpoint-")


def _add(archive, path, name):
    if path.suffix != ".safetensors":
        archive.add(path, name, recursive=False)
        return
    smaller = path.with_name("half-precision.tmp")
    save_file(halved(path), smaller, metadata={"format": "pt"})
    archive.add(smaller, name)
    smaller.unlink()


def start_state(args):
    settings = {
        name: str(getattr(args, name)) for name in ("data_dir", "minutes", "resolution", "batch_size", "small")
    }
    path = args.output_dir / "gpu_train.json"
    state = read_json(path) if path.is_file() else {"settings": settings, "plans": {}, "seconds": {}}
    if state["settings"] != settings:
        raise ValueError(f"{path} is of a run with other settings: choose another --output_dir, or remove it.")
    return state


def main(args):
    args.data_dir, args.output_dir = args.data_dir.resolve(), args.output_dir.resolve()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    state = start_state(args)
    before = {"autoencoders": lambda args: None, "source": prepare_source, "adaptation": encode}
    for stage in SHARES:
        started = time.monotonic()
        before[stage](args)
        train(stage, state, args)
        packed = pack(args)
        state["seconds"][stage] = round(time.monotonic() - started, 1)
        write_json(args.output_dir / "gpu_train.json", state)
        print(f"{stage}: {state['seconds'][stage]} s, {packed / 2**20:.1f} MiB packed", flush=True)
    print(json.dumps(state["plans"]))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
