"""What the benchmarks measure with: time, memory, and a line that says where."""

import math
import platform
import statistics
import time
from collections.abc import Callable

import torch


def describe_machine(device: str) -> str:
    """Device, threads, architecture and torch version, for the record beside every measurement."""
    name = device if device == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{name}, {torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"


def measure_seconds(
    function: Callable[[], object], repeats: int, device: str, warm_up: int = 1, at_most: float = math.inf
) -> float:
    """Median wall time of `repeats` calls, or of fewer that take `at_most` seconds together, after `warm_up` more."""
    times = []
    while len(times) < warm_up + repeats and (len(times) <= warm_up or sum(times[warm_up:]) < at_most):
        started = time.perf_counter()
        function()
        if device != "cpu":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[warm_up:])


def measure_peak_bytes(function: Callable[[], object], device: str) -> int:
    """The most that torch (no other library) held at once during a call, beyond what it held before."""
    if device != "cpu":
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
