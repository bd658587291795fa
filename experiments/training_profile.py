#!/usr/bin/env python
"""Where the time of a training step of an autoencoder goes: by kind of operation, discriminator, and waiting.

    python experiments/training_profile.py
    python experiments/training_profile.py --device cuda --config model_cards/pqgan-f8/config.json --resolution 256 \\
        --batch_size 20 --mixed_precision bf16

The discriminator's part is the difference between a step with and one without. The other parts are of a step without,
by torch's profiler: what operations take themselves on the device. `gaps` is the rest of the step, in which a GPU
waits for the host. Writes training_profile.json.
"""

import datetime
import json

import torch
from accelerate import Accelerator
from training_speed import add_training_flags, our_trainer

from diffusers_pq import PQModel
from diffusers_pq.console import one_line_errors
from diffusers_pq.files import write_json
from diffusers_pq.flags import COUNT, FlagParser
from diffusers_pq.measuring import describe_machine, measure_seconds, results_folder


# What the names of operations contain; the first that fits counts.
KINDS = {
    "convolution": ("conv",),
    "norm": ("group_norm", "batch_norm"),
    "attention": ("attention", "softmax"),
    "quantiser": ("diffusers_pq::", "embedding"),
    "optimiser": ("adam", "_foreach"),
    "matrix product": ("mm",),
}
OTHER = "other"  # activations, losses, copies


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    add_training_flags(parser)
    parser.add_argument("--resolution", type=COUNT, default=128, help="side of the pictures, in pixels")
    parser.add_argument("--batch_size", type=COUNT, default=4, help="pictures at once")
    parser.add_argument("--repeats", type=COUNT, default=3, help="measurements of a step, of which the median counts")
    return parser.parse_args(argv)


def kind_of(operation):
    return next((kind for kind, parts in KINDS.items() if any(part in operation for part in parts)), OTHER)


def seconds_by_kind(function, device):
    """What the operations of a call take themselves on the device, by kind."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    with torch.profiler.profile(activities=activities) as profiler:
        function()
        if device == "cuda":
            torch.cuda.synchronize()
    found = dict.fromkeys([*KINDS, OTHER], 0.0)
    for event in profiler.key_averages():
        if event.device_type == torch.autograd.DeviceType.CPU:  # kernels are counted with what launched them
            spent = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
            found[kind_of(event.key)] += spent / 1e6
    return found


def profile(config, images, accelerator, args):
    seconds = {}
    for adversarial in (True, False):
        trainer = our_trainer(config, accelerator, {}, adversarial)
        step = lambda trainer=trainer: trainer.step(images)  # noqa: E731
        step()
        seconds[adversarial] = measure_seconds(step, args.repeats, args.device)
    kinds = seconds_by_kind(step, args.device)
    gaps = max(0.0, seconds[False] - sum(kinds.values()))
    return {"step": seconds[True], "discriminator": seconds[True] - seconds[False], **kinds, "gaps": gaps}


def main(args):
    torch.backends.cudnn.benchmark = True  # as in a training
    accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=args.mixed_precision)
    torch.manual_seed(0)
    images = torch.rand(args.batch_size, 3, args.resolution, args.resolution, device=args.device) * 2 - 1
    seconds = profile(PQModel.load_config(args.config), images, accelerator, args)
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{describe_machine(args.device)}, mixed precision {args.mixed_precision}",
        "config": str(args.config),
        "resolution": args.resolution,
        "batch_size": args.batch_size,
        "seconds": seconds,
    }
    folder = args.output_dir or results_folder("experiments/results", args.device)
    write_json(folder / "training_profile.json", record)
    print(json.dumps(seconds))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
