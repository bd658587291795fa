import json
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import yaml
from conftest import tiny_config
from scripts import run_script
from sweep import Claim, ClaimLostError, Configuration, Sweep, grid
from sweep_report import (
    by_share,
    check_findings,
    draw_overhead,
    draw_quality,
    draw_utilisation,
    explained,
    judge,
    mean_of_runs,
    read_sweep,
    report,
    slope_per_doubling,
)

from diffusers_pq import PQModel, ProductQuantizer
from diffusers_pq.files import write_json
from diffusers_pq.models import search
from diffusers_pq.training.pqgan import PQGANOptions


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "sweep_pqgan.py"
FIGURES = ROOT / "experiments" / "sweep_figures.py"
OVERHEAD = ROOT / "experiments" / "quantisation_overhead.py"
ALL_SHARES = ["1", "d/8", "d/4", "d/2", "d"]

# Stand-ins for the two scripts, which count how often they are called. This one is slow at its first call.
SLOW_ONCE = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
first = not (folder / "calls").exists()
(folder / "calls").open("a").write("x")
if first and "slow" in sys.argv: time.sleep(60)
if "broken" in sys.argv and "s2" in str(folder): sys.exit("no memory left")
"""
EVALUATE = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1]) / "model" / "data-validation-32"
folder.mkdir(parents=True)
(folder / "results.json").write_text(json.dumps({}))
"""


def stand_in(output_dir, *flags, claim_timeout=30.0):
    train = [sys.executable, "-c", SLOW_ONCE, *flags]
    return Sweep(output_dir, {"_class_name": "PQModel"}, train, [sys.executable, "-c", EVALUATE], [[]], claim_timeout)


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_papers_grid_has_every_configuration_once():
    configurations = grid([4, 8, 16, 32, 64, 128, 256], ALL_SHARES, [128, 512, 1024, 8192, 16384])
    # Of d = 4 there is no eighth, and d/4 is 1; of d = 8, d/8 is 1.
    assert len(configurations) == len(set(configurations)) == 5 * (3 + 4 + 5 * 5)
    assert {one.num_subspaces for one in configurations if one.latent_channels == 4} == {1, 2, 4}
    assert str(Configuration(64, 32, 512)) == "d64-s32-k512"


@pytest.mark.parametrize("subspaces", ["d/8", "5", "two", "d/0", "2d"])
def test_subspaces_that_do_not_divide_the_channels_are_refused(subspaces):
    with pytest.raises(ValueError, match=f"`num_subspaces`.*{subspaces}"):
        grid([12], [subspaces], [128])


def test_a_claim_is_held_by_one_worker_until_it_is_released(tmp_path):
    claim = Claim.take(tmp_path, timeout=30)
    assert Claim.take(tmp_path, timeout=30) is None
    claim.renew()
    claim.release()
    assert Claim.take(tmp_path, timeout=30) is not None


def test_a_claim_without_signs_of_life_is_taken_over_by_one_of_many(tmp_path):
    dead = Claim.take(tmp_path, timeout=30)
    os.utime(dead.path, (time.time() - 31,) * 2)
    barrier = threading.Barrier(8)
    taken = []

    def take():
        barrier.wait()
        taken.append(Claim.take(tmp_path, timeout=30))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(claim is not None for claim in taken) == 1
    with pytest.raises(ClaimLostError):
        dead.renew()


def test_workers_share_a_grid_and_do_nothing_twice(tmp_path):
    configurations = grid([8, 16], ["1", "d/2"], [16])
    workers = [threading.Thread(target=stand_in(tmp_path).run, args=(configurations,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sweep = stand_in(tmp_path)
    assert sweep.run(configurations) == []
    for one in configurations:
        assert (sweep.folder(one) / "calls").read_text() == "x"
        config = json.loads((sweep.folder(one) / "model_config.json").read_text())
        assert (config["latent_channels"], config["num_subspaces"]) == (one.latent_channels, one.num_subspaces)


def test_a_configuration_that_fails_stops_no_other_and_is_tried_again_later(tmp_path):
    configurations = grid([8], ["1", "2", "4"], [16])
    failed = stand_in(tmp_path, "broken").run(configurations)
    assert failed == [Configuration(8, 2, 16)]
    assert "no memory left" in (tmp_path / "d8-s2-k16" / "log.txt").read_text()
    assert stand_in(tmp_path).run(configurations) == []
    assert (tmp_path / "d8-s2-k16" / "calls").read_text() == "xx"


@pytest.mark.skipif(sys.platform != "linux", reason="a killed worker takes its training with it only on Linux")
def test_the_configuration_of_a_killed_worker_is_taken_over(tmp_path):
    configurations = grid([8], ["1"], [16])
    calls = tmp_path / "d8-s1-k16" / "calls"
    sweep = stand_in(tmp_path, "slow", claim_timeout=1.0)
    worker = multiprocessing.get_context("fork").Process(target=sweep.run, args=(configurations,))
    worker.start()
    wait_for(calls.exists)
    (training,) = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    worker.kill()
    worker.join()
    wait_for(lambda: not Path("/proc", training).exists())
    assert sweep.run(configurations) == [] and sweep.is_done(configurations[0])
    assert calls.read_text() == "xx"


def test_a_worker_that_was_taken_over_ends_its_training(tmp_path):
    configurations = grid([8], ["1"], [16])
    folder = tmp_path / "d8-s1-k16"
    sweep = stand_in(tmp_path, "slow", claim_timeout=1.0)
    worker = threading.Thread(target=sweep.run, args=(configurations,))
    started = time.monotonic()
    worker.start()
    wait_for((folder / "calls").exists)
    (folder / "claim-1").touch()
    worker.join()
    # The other worker's claim went stale, and this one began again.
    assert time.monotonic() - started < 50
    assert (folder / "claim-2").exists() and (folder / "calls").read_text() == "xx"


def parse(*flags):
    needed = ["--output_dir", "out", "--train_data_dir", "data", "--model_config_name_or_path", "config.json"]
    return runpy.run_path(str(SCRIPT))["parse_args"]([*needed, *flags])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--latent_channels", "12"], "`num_subspaces` d/8 is not a divisor of `latent_channels` 12"),
        (["--codebook_size", "1"], "`codebook_size` must be at least 2"),
        (["--max_train_step", "5"], "unrecognized arguments: --max_train_step 5"),
        (["--evaluation", "--resolutoin 64"], "unrecognized arguments: --resolutoin 64"),
        (["--dry_run"], "without --dry_run"),
    ],
)
def test_bad_flags_are_named_before_anything_is_trained(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse(*flags)
    assert message in capsys.readouterr().err


def test_the_evaluation_takes_over_the_data_of_the_training():
    args = parse("--resolution", "64", "--evaluation", "--max_samples 8", "--evaluation", "--data_dir other")
    own, other = map(shlex.join, args.evaluation_flags)
    assert own == "--resolution 64 --max_samples 8 --data_dir data --image_column image"
    assert other == "--resolution 64 --data_dir other"


def test_trains_evaluates_and_skips_what_is_done(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    generator = np.random.default_rng(0)
    for split in ("train", "validation"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for number in range(4):
            noise = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            PIL.Image.fromarray(noise).save(tmp_path / "data" / split / f"{number}.png")
    PQModel(**tiny_config()).save_config(tmp_path / "config")
    flags = ["--output_dir", tmp_path / "sweep", "--latent_channels", 8, "--num_subspaces", "d/4"]
    flags += ["--codebook_size", 16, "--evaluation", "--metrics psnr ssim"]
    flags += ["--model_config_name_or_path", tmp_path / "config", "--train_data_dir", tmp_path / "data"]
    flags += ["--cache_dir", tmp_path / "cache", "--resolution", 32, "--train_batch_size", 2]
    flags += ["--perceptual_weight", 0, "--discriminator_weight", 0, "--max_train_steps", 2]
    script = runpy.run_path(str(SCRIPT))

    def sweep(*more):
        return script["main"](script["parse_args"]([*map(str, flags), *more]))

    assert sweep() == 0, (tmp_path / "sweep" / "d8-s2-k16" / "log.txt").read_text()
    rows, (result,) = read_sweep(tmp_path / "sweep")
    assert rows[["d", "S", "K"]].values.tolist() == [[8, 2, 16]] and {"psnr", "ssim", "H_n"} < set(rows)
    assert result["pictures"] == 4
    weights = tmp_path / "sweep" / "d8-s2-k16" / "diffusion_pytorch_model.safetensors"
    written = weights.stat().st_mtime_ns
    assert sweep() == 0 and weights.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="d8-s2-k16 was trained with max_train_steps 2, now 3"):
        sweep("--max_train_steps", "3")
    with pytest.raises(ValueError, match="d8-s2-k16 was trained with use_ema False, now True"):
        sweep("--use_ema")
    with pytest.raises(ValueError, match="d8-s2-k16 was evaluated with .*--metrics psnr ssim"):
        flags[flags.index("--metrics psnr ssim")] = "--metrics psnr"
        sweep()


def results_of(psnr, entropy):
    rows = []
    for one in grid([8, 16, 32, 64], ALL_SHARES, [128, 512]):
        d, s, k = one.latent_channels, one.num_subspaces, one.codebook_size
        rows.append({"d": d, "S": s, "K": k, "psnr": psnr(d, s, k), "H_n": entropy(d, s, k), "P_n": 1 / k})
    return pd.DataFrame(rows)


def as_in_the_paper():
    def psnr(d, s, k):
        share = min(s, d // 2)
        return 20 - np.log2(d) if s == 1 else 20 + np.log2(d) + 0.5 * np.log2(share) + 0.001 * k / 512

    def entropy(d, s, k):
        return 0.5 - 0.01 * np.log2(d) if s == 1 else 0.8 + 0.02 * np.log2(s)

    return results_of(psnr, entropy)


def test_findings_are_seen_where_they_hold_and_not_elsewhere():
    results = as_in_the_paper()
    assert all(finding.seen for finding in check_findings(results))
    upside_down = results.assign(psnr=-results.psnr, H_n=1 - results.H_n, P_n=-results.P_n)
    # That K matters little is true of both.
    seen = [finding.seen for finding in check_findings(upside_down)]
    assert seen == [False, False, True, False, True, False, False, False]
    by_size = results.assign(psnr=results.K / 10 + results.S, H_n=np.log2(results.K) / 10)
    assert not any(finding.seen for finding in check_findings(by_size)[2:5:2])


@pytest.mark.parametrize("query, lacking", [("S > 1", "S = 1"), ("S != d / 2", "S = d/2"), ("K == 128", "d or K")])
def test_findings_need_the_configurations_they_compare(query, lacking):
    with pytest.raises(ValueError, match=f"lack .*{lacking}"):
        check_findings(as_in_the_paper().query(query))


def test_numbers_of_the_findings_are_right():
    table = by_share(as_in_the_paper(), "psnr")
    assert list(table.index) == ["1", "d/8", "d/4", "d/2", "d"] and list(table) == [8, 16, 32, 64]
    # At d = 8 an eighth is vector quantisation, which has its own row.
    assert table.isna().sum().sum() == 1 and np.isnan(table.loc["d/8", 8])
    assert slope_per_doubling(table.loc["1"]) == pytest.approx(-1)
    assert table.loc["d/2", 64] == pytest.approx(20 + 6 + 2.5 + 0.001 * (128 + 512) / 2 / 512)
    frame = pd.DataFrame({"K": [1, 1, 2, 2], "S": [1, 2, 1, 2], "H_n": [0.0, 1.0, 0.0, 1.0]})
    assert explained(frame, "H_n", "S") == 1 and explained(frame, "H_n", "K") == 0
    by_sub_vector = results_of(psnr=lambda d, s, k: s, entropy=lambda d, s, k: s / d)
    findings = check_findings(by_sub_vector)
    assert findings[1].numbers.startswith("dB gained on the S before, d = 16, 32, 64: S = d/8: +3.67")
    assert findings[4].seen and findings[4].numbers.endswith("d/S: 1.00")
    assert findings[7].numbers == "K = 512, mean H_n: S = d/8: 0.12, S = d/4: 0.25, S = d/2: 0.50, S = d: 1.00"


def test_figures_and_report_are_written(tmp_path):
    results = as_in_the_paper()
    draw_quality(results, tmp_path / "quality.png")
    draw_utilisation(results, tmp_path / "utilisation.png")
    draw_overhead(results.assign(seconds=1.0, overhead=0.1), tmp_path / "overhead.png")
    sizes = [PIL.Image.open(tmp_path / f"{name}.png").size for name in ("quality", "utilisation", "overhead")]
    assert all(width > height > 200 for width, height in sizes)
    text = report(results, check_findings(results))
    assert "| S = 1 | 17.00 | 16.00 | 15.00 | 14.00 | -1.00 |" in text and text.count("| yes |") == 8


def test_several_runs_give_mean_spread_and_a_verdict_of_all():
    first = as_in_the_paper()
    better = first.assign(psnr=first.psnr + 2)
    upside_down = first.assign(psnr=-first.psnr, H_n=1 - first.H_n, P_n=-first.P_n)
    runs = pd.concat([first.assign(run=0), better.assign(run=1)])
    findings = judge(runs)
    assert [(one.verdict, one.seen_in) for one in findings] == [("yes", (2, 2))] * 8
    row = "| S = 1 | 18.00 ± 1.41 | 17.00 ± 1.41 | 16.00 ± 1.41 | 15.00 ± 1.41 | -1.00 ± 0.00 |"
    assert row in report(runs, findings)
    assert "17.00 and more; best" not in findings[3].numbers and mean_of_runs(runs).psnr.equals(first.psnr + 1)
    divided = judge(pd.concat([first.assign(run=0), upside_down.assign(run=1)]))
    assert divided[0].verdict == "in 1 of 2 runs" and not divided[0].seen and divided[2].verdict == "yes"
    assert judge(upside_down)[0].verdict == "no"


def test_the_commands_of_the_figures_write_what_they_measured(tmp_path):
    results = as_in_the_paper()
    machine = {"date": "2026-11-26", "machine": "1 x cpu", "pictures": 4, "unavailable": {"rfid": "weights"}}
    for row in results.to_dict("records"):
        name = str(Configuration(row["d"], row["S"], row["K"]))
        latents = {"latent_channels": row["d"], "num_subspaces": row["S"], "codebook_size": row["K"]}
        scores = {column: row[column] for column in ("psnr", "H_n", "P_n")}
        record = machine | {"latents": latents | {"bits_per_pixel": 1.0}, "scores": scores}
        record["settings"] = {"resolution": 32, "weights_sha256": name}
        write_json(tmp_path / "sweep" / name / "evaluation" / name / "data-validation-32" / "results.json", record)
    folders = [tmp_path / f"sweep-seed{seed}" for seed in (4, 5)]
    settings = PQGANOptions.of({"model_config_name_or_path": "config.json"}).settings()
    for folder, seed in zip(folders, (4, 5)):
        shutil.copytree(tmp_path / "sweep", folder)
        write_json(folder / "d8-s1-k128" / "training_config.json", settings | {"seed": seed})
    printed = run_script(FIGURES, *folders, "--output_dir", tmp_path / "out").stdout
    assert "38 configurations in 2 runs" in printed and "rfid: unavailable, needs weights" in printed
    record = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert record["settings"] == {"resolution": 32} and all(finding["seen"] for finding in record["findings"])
    rows = pd.DataFrame(record["configurations"])
    assert rows[rows.run == 1][["d", "S", "K"]].reset_index(drop=True).equals(results[["d", "S", "K"]])
    assert record["findings"][0]["seen_in"] == [2, 2]
    assert record["training"]["seeds"] == [4, 5] and record["training"]["weight_init"] == "default"
    write_json(folder / "d8-s1-k128" / "training_config.json", settings | {"seed": 5, "max_train_steps": 3})
    with pytest.raises(subprocess.CalledProcessError) as error:
        run_script(FIGURES, *folders, "--output_dir", tmp_path / "out")
    assert "must differ in their seed alone" in error.value.stdout
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"sweep_quality.png", "sweep_utilisation.png"}


@pytest.mark.parametrize("page", ["sweep", "evaluation"])
def test_the_sweep_of_the_papers_scale_is_at_f16(page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    (recipe,) = re.findall(r"sweep_pqgan\.py --output_dir /shared/sweep [^`]*?--config (\S+)", text)
    config = read_yaml(ROOT / recipe)["model_config_name_or_path"]
    assert 2 ** (len(json.loads((ROOT / config).read_text())["block_out_channels"]) - 1) == 16


def test_figures_1_and_7_show_the_model_at_f16_that_pqsd_uses():
    text = (ROOT / "docs" / "evaluation.md").read_text()
    (folder,) = re.findall(r"reconstruct_photographs\.py .* F16=(\S+)", text)
    recipes = (ROOT / "training_scripts" / "recipes").glob("pqgan-f16*.yaml")
    (tuned,) = (flags for flags in map(read_yaml, recipes) if flags["output_dir"] == folder)
    quick = read_yaml(ROOT / "training_scripts" / "recipes" / "pqsd-quick.yaml")
    assert tuned["output_dir"] == quick["vae_name_or_path"]
    source = Path(tuned["pretrained_model_name_or_path"]).name
    assert json.loads((ROOT / "model_cards" / source / "config.json").read_text())["latent_channels"] == 256


def read_yaml(path):
    return yaml.safe_load(path.read_text())


def test_the_overhead_is_the_time_of_the_quantiser_over_that_of_the_rest(tmp_path, monkeypatch):
    def measure(function, modes, *_):
        with patch.object(ProductQuantizer, "forward") as forward:
            function()
        seconds = 0.5 if forward.called else 2.0
        return {mode: {"seconds": seconds, "first_seconds": 9.0, "peak_gib": seconds} for mode in modes}

    script = runpy.run_path(str(OVERHEAD))
    script["main"].__globals__["measure_modes"] = measure
    monkeypatch.setattr(search, "COMPILE_AFTER", search.COMPILE_AFTER)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config() | {"_class_name": "PQModel"}))
    flags = ["--model", tmp_path, "--latent_channels", 8, "--num_subspaces", "d/2", "--codebook_size", 16]
    flags += ["--pixels", 32, "--batch_sizes", 1, 2, "--modes", "eager", "compiled", "--output_dir", tmp_path / "out"]
    script["main"](script["parse_args"](list(map(str, flags))))
    record = json.loads((tmp_path / "out" / "quantisation_overhead.json").read_text())
    found = {"seconds": 2.5, "quantisation": 0.5, "overhead": 0.25, "peak_gib": 2.0}
    row = {"d": 8, "S": 4, "K": 16} | found | {"modes": {"eager": found, "compiled": found}}
    assert record["configurations"] == [row | {"batch_size": size} for size in (1, 2)] and record["pixels"] == 32
    assert (tmp_path / "out" / "quantisation_overhead.png").is_file()


def test_a_folder_must_hold_one_evaluation_or_it_be_chosen(tmp_path):
    with pytest.raises(ValueError, match="holds none"):
        read_sweep(tmp_path)
    latents = {"latent_channels": 8, "num_subspaces": 2, "codebook_size": 16, "bits_per_pixel": 0.5}
    for name, psnr in (("a-validation-32", 20.0), ("b-validation-32", 30.0)):
        folder = tmp_path / "d8-s2-k16" / "evaluation" / "d8-s2-k16" / name
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"latents": latents, "scores": {"psnr": psnr}}))
    with pytest.raises(ValueError, match="a-validation-32, b-validation-32: choose one"):
        read_sweep(tmp_path)
    assert read_sweep(tmp_path, "b-validation-32")[0].psnr.tolist() == [30.0]
