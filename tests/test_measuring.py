"""What the benchmarks measure with, as far as a CPU has it; tests/gpu measures on CUDA."""

import time

import pytest
import torch

from diffusers_pq.measuring import in_passes, measure_modes, measure_seconds, results_folder, usual_modes


def test_the_median_of_the_calls_counts_and_the_warm_up_does_not():
    pauses = iter([0.2, 0.01, 0.05, 0.02])
    seconds = measure_seconds(lambda: time.sleep(next(pauses)), 3, "cpu")
    assert 0.02 <= seconds < 0.05 and next(pauses, None) is None


def test_slow_calls_are_repeated_less():
    calls = []
    measure_seconds(lambda: calls.append(time.sleep(0.02)), 100, "cpu", at_most=0.05)
    assert 3 <= len(calls) <= 5


def test_each_device_has_a_folder_of_its_own(monkeypatch):
    names = {"cuda": "NVIDIA H200", "cuda:1": "NVIDIA GeForce RTX 4090"}
    monkeypatch.setattr(torch.cuda, "get_device_name", names.get)
    folders = [str(results_folder("results", device)) for device in ("cpu", "cuda", "cuda:1")]
    assert folders == ["results/cpu", "results/nvidia-h200", "results/nvidia-geforce-rtx-4090"]


def test_what_tries_a_command_in_small_is_kept_from_the_results():
    assert str(results_folder("benchmarks/results", "cpu", small=True)) == "outputs/small/cpu"


def test_a_cpu_has_no_graphs():
    assert usual_modes("cpu") == ("eager",) and "graphed" in usual_modes("cuda")


def test_what_is_compiled_is_measured_after_all_that_is_not():
    happened = []
    passes = in_passes(["compiled", "graphed", "eager"], lambda: happened.append("compile"))
    for modes in passes:
        happened.extend(modes)
    assert happened == ["graphed", "eager", "compile", "compiled"]
    assert [*in_passes(["eager"], pytest.fail)] == [["eager"]]


def test_a_mode_that_fails_costs_no_other():
    rows = measure_modes(lambda: torch.zeros(2**20), ["graphed", "eager"], 2, "cpu")
    assert rows["graphed"].keys() == {"error"} and rows["eager"]["peak_gib"] == pytest.approx(2**22 / 2**30)
    assert 0 < rows["eager"]["seconds"] and 0 < rows["eager"]["first_seconds"]
