"""Runs scripts as programs of their own, without each of them waiting for its imports."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path


_CONTEXT = multiprocessing.get_context("forkserver")
# Imports only: nothing may have used threads before a fork.
_CONTEXT.set_forkserver_preload(["diffusers_pq.pipelines.pipeline_stable_diffusion_pq", "diffusers_pq.training.run"])


def start_script(*command: str | os.PathLike, output: str | os.PathLike = os.devnull) -> multiprocessing.Process:
    """Start a Python script with its arguments on one thread of the CPU; both its outputs go to a file."""
    process = _CONTEXT.Process(target=_main, args=(list(map(str, command)), str(output)))
    process.start()
    return process


def run_script(*command: str | os.PathLike) -> subprocess.CompletedProcess:
    """Run a Python script with its arguments and see it succeed; its `stdout` holds both outputs."""
    with tempfile.NamedTemporaryFile("r", suffix=".txt") as output:
        process = start_script(*command, output=output.name)
        process.join()
        result = subprocess.CompletedProcess(command, process.exitcode, output.read())
    print(result.stdout)
    result.check_returncode()
    return result


def _main(command: list[str], output: str):
    import torch

    descriptor = os.open(output, os.O_WRONLY)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")
