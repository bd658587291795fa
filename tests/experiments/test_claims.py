"""A claim is judged by the numbers, whatever they are."""

import copy

import pandas as pd
import pytest
from claims import (
    claims,
    codec,
    equal_rate,
    findings_in_short,
    findings_table,
    head_start,
    index_tasks,
    overhead,
    reconstruction,
    speed,
)
from update_pages import RESULTS

from diffusers_pq.files import read_json


@pytest.fixture
def records():
    return {name: read_json(path) for name, path in RESULTS.items()}


def test_every_claim_says_what_it_rests_on(records):
    for claim in claims(records):
        assert claim.where and claim.verdict and claim.basis
        assert claim.numbers != "-" or claim.verdict == "not tested"


def test_reconstruction_is_judged_by_all_models(records):
    results = copy.deepcopy(records["photographs"])
    for name, psnr in {"PQ": 30, "VQ": 20, "KL": 25}.items():
        results["results"][name]["psnr"] = psnr
    assert reconstruction(results).verdict == "yes" and "PQ 30.0 dB" in reconstruction(results).numbers
    results["results"]["KL"]["psnr"] = 31
    assert reconstruction(results).verdict == "no"


def bottleneck(name, psnr, seed=0, bits=4.0):
    photographs = {"scores": {"psnr": psnr}}
    return {"name": name, "latents": {"bits_per_pixel": bits}, "settings": {"seed": seed}, "photographs": photographs}


def test_bottlenecks_of_one_rate_are_compared_over_seeds_and_close_ones_are_equal():
    runs = [bottleneck("pq", 30), bottleneck("kl", 28), bottleneck("none", 35, bits=16.0)]
    assert equal_rate(runs).verdict == "yes" and equal_rate(runs).basis == "one seed"
    runs += [bottleneck("pq", 30, seed=1), bottleneck("kl", 29.96, seed=1)]
    assert equal_rate(runs).verdict == "yes, except for kl" and equal_rate(runs).basis == "2 seeds"
    assert equal_rate(runs).numbers == "pq 30.00, kl 28.98 dB"


def test_index_based_tasks_are_judged_by_what_a_prior_learns():
    def run(masked):
        bits = {"masked": masked, "adaptive": 8.2, "uniform": 8.0}
        return {"system": "masked-pq", "bits_per_code": bits, "settings": {"max_train_steps": 3}}

    learned = index_tasks({"runs": [run(7.0), run(7.5), {"system": "diffusion-pq"}]})
    assert learned.verdict == "no" and "takes 7.25 bits" in learned.numbers and "2 seeds, 3 steps" in learned.basis
    assert index_tasks({"runs": [run(8.0)]}).verdict == "yes"


def test_overhead_is_judged_by_what_it_grows_with():
    rows = pd.DataFrame({"d": 8, "S": [1, 1, 8, 8], "K": [128, 512] * 2, "seconds": 1.0, "overhead": 0.5})
    grows_with_subspaces = {"configurations": rows.assign(quantisation=[1, 2, 8, 16]).to_dict("records")}
    grows_with_size = {"configurations": rows.assign(quantisation=[1, 8, 2, 16]).to_dict("records")}
    assert overhead(grows_with_subspaces).verdict == "yes"
    assert overhead(grows_with_size).verdict == "no" and "50.0%" in overhead(grows_with_size).numbers


def test_speed_has_a_tolerance(records):
    record = copy.deepcopy(records["generation_speed"])
    record["systems"]["PQSD-Quick"] |= {"speed_ratio": 3.0, "paper_ratio": 4.0}
    record["systems"]["PQSD-HR"] |= {"speed_ratio": 0.95, "paper_ratio": 0.97}
    assert [claim.verdict for claim in speed(record)] == ["no", "yes (time)"]


def test_a_head_start_is_a_lower_loss():
    runs = {"copy": {"validation/loss": [[1, 0.9], [2, 0.5]]}, "random": {"validation/loss": [[1, 0.8], [2, 0.6]]}}
    assert head_start({"runs": runs}).verdict == "yes"
    assert head_start({"runs": {"copy": runs["random"], "random": runs["copy"]}}).verdict == "no"


def test_codecs_are_compared_at_equal_quality(records):
    record = copy.deepcopy(records["rate_distortion"])
    model = record["models"]["model_cards/pqgan-mini-f8-pq"]
    model |= {"psnr": 30.0, "bits_per_pixel": 0.5}
    record["codecs"]["JPEG"] = [{"psnr": 29.0, "bits_per_pixel": 0.1}, {"psnr": 31.0, "bits_per_pixel": 0.6}]
    assert codec(record).verdict == "no" and "JPEG: 31.0 dB at 0.60 bpp" in codec(record).numbers


def test_findings_are_counted_for_both_starts(records):
    table, sentence = findings_table(records), findings_in_short(records)
    rows = [row.split(" | ")[1:] for row in table.splitlines()[4:]]
    for column, start in enumerate(("N(0, 1), as in the paper", "k-means")):
        seen = sum(row[column].strip(" |") == "yes" for row in rows)
        assert f"{seen} of {len(rows)} with codebooks that start from {start}" in sentence
