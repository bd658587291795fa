"""What the benchmarks measure with: time, memory, and names that say where."""

import argparse
import math
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn as nn

from .flags import COUNT, DTYPES, FlagParser, device, output_folder


# How a function is run: as it is, replayed as a CUDA graph, compiled, or compiled and replayed.
MODES = ("eager", "graphed", "compiled", "compiled_graphed")


class MeasuringParser(FlagParser):
    """
    A parser with the flags that all benchmarks share; without `--modes` they are the usual ones of the device.

    Args:
        results (`str`): Folder within which each device has one for results.
    """

    def __init__(self, results: str, **options):
        super().__init__(**options)
        self.add_argument("--device", type=device, default="cpu", help="device to compute on, such as cuda or mps")
        self.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the models")
        self.add_argument(
            "--modes", nargs="+", choices=MODES, help="how functions are run; default: eager on a CPU, all on a GPU"
        )
        self.add_argument("--batch_sizes", nargs="+", type=COUNT, default=[1], help="pictures at once")
        self.add_argument("--small", action="store_true", help="take tiny networks or pictures, to try the command")
        self.add_argument(
            "--output_dir", type=output_folder, help=f"folder of the results; default: {results}/ and the device"
        )

    def parse_args(self, args=None, namespace=None):
        parsed = super().parse_args(args, namespace)
        parsed.modes = parsed.modes or usual_modes(parsed.device)
        return parsed


def describe_machine(device: str) -> str:
    """Device, threads, architecture and torch version, for the record beside every measurement."""
    name = f"{device} ({torch.cuda.get_device_name(device)})" if _is_cuda(device) else device
    return f"{name}, {torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"


def results_folder(parent: str | Path, device: str, small: bool = False) -> Path:
    """
    The folder within `parent` for what is measured on a device: `cpu`, or a name such as `nvidia-h200`. What tries a
    command in `small` goes to `outputs/small` instead: it must not replace results.
    """
    name = torch.cuda.get_device_name(device) if _is_cuda(device) else torch.device(device).type
    return Path("outputs/small" if small else parent) / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def usual_modes(device: str) -> tuple[str, ...]:
    """The `MODES` that a benchmark takes by default: a CPU has no graphs, and compiles for minutes."""
    return MODES if _is_cuda(device) else ("eager",)


def measure_seconds(
    function: Callable[[], object], repeats: int, device: str, warm_up: int = 1, at_most: float = math.inf
) -> float:
    """
    Median time of `repeats` calls, or of fewer that take `at_most` seconds together, after `warm_up` more. On CUDA it
    is the time between two events on the device; elsewhere that of a clock, once the device is done.
    """
    once = _seconds_by_events if _is_cuda(device) else _seconds_by_clock
    for _ in range(warm_up):
        once(function, device)
    times = []
    while len(times) < repeats and (not times or sum(times) < at_most):
        times.append(once(function, device))
    return statistics.median(times)


def measure_peak_bytes(function: Callable[[], object], device: str) -> int:
    """The most that torch (no other library) held at once during a call, beyond what it held before."""
    if _is_cuda(device):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    held = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def in_passes(modes: Sequence[str], compile: Callable[[], object]) -> Iterator[list[str]]:
    """
    `MODES` in two passes: first those that take functions as they are, then, once `compile` has been called, those in
    which they are compiled. Compiling is done in place (`module.compile()`) and for good.
    """
    for is_compiled in (False, True):
        now = [mode for mode in modes if ("compiled" in mode) == is_compiled]
        if now and is_compiled:
            compile()
        if now:
            yield now


def shrunk(config: dict) -> dict:
    """The config of an autoencoder with so few channels and layers that it runs in milliseconds, for `--small`."""
    channels = (32,) * len(config["block_out_channels"])
    return config | {"layers_per_block": 1, "mid_block_add_attention": False, "block_out_channels": channels}


def random_autoencoder(kind: type[nn.Module], path: str, args: argparse.Namespace, **overrides) -> nn.Module:
    """
    An autoencoder with random weights, for measurements of time and memory alone.

    Args:
        kind (`type`): Its class.
        path (`str`): Folder or Hub repository of its config.
        args (`argparse.Namespace`): Flags of a [`MeasuringParser`].
        overrides: What differs from the config.
    """
    torch.manual_seed(0)
    config = kind.load_config(path) | overrides
    model = kind.from_config(shrunk(config) if args.small else config)
    return model.eval().to(args.device, getattr(torch, args.dtype))


def compile_autoencoder(model: nn.Module):
    """Compile encoder and decoder in place."""
    model.encoder.compile()
    model.decoder.compile()


def measure_modes(
    function: Callable[[], object], modes: Sequence[str], repeats: int, device: str, at_most: float = math.inf
) -> dict[str, dict]:
    """
    Time and memory of a function in several `MODES`.

    Args:
        function: See [`graphed`].
        modes (`Sequence[str]`): Out of `MODES`, as [`in_passes`] gives them.
        repeats, device, at_most: As for [`measure_seconds`].

    Returns:
        `dict`: By mode `seconds`, `first_seconds` (of the first call, with its compilation or recording, which are no
        part of the former) and `peak_gib` beyond what was held before; or an `error`, so that a mode that fails costs
        no other.
    """
    rows = {}
    for mode in modes:
        try:
            rows[mode] = _measure_mode(function, "graphed" in mode, repeats, device, at_most)
        except Exception as error:  # compilers and drivers raise errors without a common class
            rows[mode] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    return rows


def _measure_mode(function, is_graphed, repeats, device, at_most):
    started, call = time.perf_counter(), function
    if is_graphed:
        function()  # compiles, which cannot be recorded
        call, peak = _graphed_with_peak(function, device)
    call()
    first_seconds = time.perf_counter() - started
    if not is_graphed:
        peak = measure_peak_bytes(function, device)
    seconds = measure_seconds(call, repeats, device, warm_up=0, at_most=at_most)
    return {"seconds": seconds, "first_seconds": first_seconds, "peak_gib": peak / 2**30}


def _graphed_with_peak(function, device):
    """A graph holds its memory from the recording on."""
    recorded = []
    peak = measure_peak_bytes(lambda: recorded.append(graphed(function, device)), device)
    return recorded[0], peak


def graphed(function: Callable[[], object], device: str) -> Callable[[], None]:
    """
    Record what a function launches on a CUDA device, to be launched again at once, without the host's part.

    Args:
        function: Reads and writes the same tensors whenever it is called, and does not wait for the device.
        device (`str`): A CUDA device.

    Returns:
        Launches the record.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()  # what is only done at first, such as choosing algorithms, is not part of the record
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
    return graph.replay


def _is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def _seconds_by_events(function: Callable[[], object], device: str) -> float:
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1000


def _seconds_by_clock(function: Callable[[], object], device: str) -> float:
    started = time.perf_counter()
    function()
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started
