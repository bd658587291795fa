"""The benchmarks on tiny networks: what they write, not how fast they are."""

import json
import runpy
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a benchmark in the repository and returns what it wrote."""
    monkeypatch.chdir(ROOT)

    def run_benchmark(name, *flags, written, folder="benchmarks"):
        script = runpy.run_path(str(ROOT / folder / f"{name}.py"))
        script["main"](script["parse_args"]([*map(str, flags), "--output_dir", str(tmp_path)]))
        return json.loads((tmp_path / f"{written}.json").read_text())

    return run_benchmark


def test_table_3_is_measured_for_each_batch_size_against_the_base_of_each_family(run, tmp_path):
    flags = ["--small", "--steps", 1, "--batch_sizes", 2, 1, "--systems", "PQSD-Quick", "SDXL-PQ-HR"]
    record = run("generation_speed", *flags, "--num_inference_steps", 10, written="generation_speed")
    assert list(record["systems"]) == ["SD 2.1", "PQSD-Quick", "SDXL", "SDXL-PQ-HR"]
    quick, base = record["systems"]["PQSD-Quick"], record["systems"]["SD 2.1"]
    assert (quick["F"], quick["d"], quick["pixels"]) == (16, 256, 64)
    two, base_two = quick["batches"]["2"]["eager"], base["batches"]["2"]["eager"]
    assert two["picture_seconds"] == pytest.approx((10 * two["step_seconds"] + two["decode_seconds"]) / 2)
    assert two["speed_ratio"] == pytest.approx(base_two["picture_seconds"] / two["picture_seconds"])
    assert quick["picture_seconds"] == two["picture_seconds"], "the first batch size is the row's own"
    assert (tmp_path / "generation_speed.png").is_file()


def test_generation_is_measured_in_the_order_and_the_layouts_that_are_asked_for(run):
    flags = ["--small", "--steps", 1, "--systems", "PQSD-Quick", "PQSD-HR", "--layouts", "default", "channels_last"]
    record = run("generation_speed", *flags, written="generation_speed")
    assert list(record["systems"]) == ["SD 2.1", "PQSD-Quick", "PQSD-HR"]
    assert all(list(row["batches"]["1"]) == ["eager", "eager channels_last"] for row in record["systems"].values())
    assert all("speed_ratio" in one for one in record["systems"]["PQSD-HR"]["batches"]["1"].values())


def test_the_search_and_its_share_of_a_reconstruction_are_measured(run):
    flags = ["--small", "--sizes", 16, "--repeats", 1, "--pixels", 32, "--models", "model_cards/pqgan-f8"]
    record = run("quantizer_speed", *flags, "--batch_sizes", 1, 2, written="quantizer_speed")
    assert {row["S"] for row in record["search"]} == {4, 16}
    assert {"ours", "loop", "batched product", "faiss"} <= record["search"][0]["seconds"].keys()
    assert all(row["codes_unlike_float64"] == 0 for row in record["search"])
    shares = {row["batch_size"]: row["modes"]["eager"] for row in record["models"]}
    assert shares.keys() == {1, 2} and all(0 < row["share"] < 1 and row["peak_gib"] > 0 for row in shares.values())


def test_rows_of_models_that_are_measured_again_replace_earlier_ones(run):
    flags = ["--small", "--models", "model_cards/pqgan-f8", "--pixels", 32, "--repeats", 1, "--tiling_pixels", 264]
    run("model_speed", *flags, written="model_speed")
    rows = run("model_speed", *flags, "--batch_sizes", 1, 2, "--layouts", "channels_last", "default", written="tiling")
    assert len(rows) == 1 and 0 < rows[0]["tiled_to_whole"]
    rows = run("model_speed", *flags, written="model_speed")
    kinds = [(row["variant"], row["batch_size"], row["mode"]) for row in rows]
    assert sorted(kinds) == [
        ("channels_last", 1, "eager"),
        ("channels_last", 2, "eager"),
        ("contiguous", 1, "eager"),
        ("default", 1, "eager"),
        ("default", 2, "eager"),
    ]


TINY_TRAINING = ("--config", "model_cards/pqgan-mini-f8-pq/config.json", "--resolution", 32)


def test_a_training_step_is_profiled_by_kind_of_operation(run):
    record = run(
        "training_profile", *TINY_TRAINING, "--batch_size", 1, written="training_profile", folder="experiments"
    )
    seconds = record["seconds"]
    assert seconds["convolution"] > seconds["optimiser"] > 0 and seconds["quantiser"] > 0 and seconds["norm"] > 0
    kinds = sum(value for name, value in seconds.items() if name not in ("step", "discriminator"))
    assert kinds >= seconds["step"] - seconds["discriminator"] - 1e-6


def test_the_loader_is_timed_alone_and_in_training(run):
    flags = ["--batch_size", 1, "--batches", 1, "--num_workers", 0, "--pictures", 3, "--picture_side", 32]
    record = run("loader_speed", *TINY_TRAINING, *flags, written="loader_speed", folder="experiments")
    (row,) = record["pictures_per_second"]
    assert row["alone"] > row["training"] > 0 and record["step"] > 0


def test_training_speed_has_a_row_for_each_variant(run):
    flags = ["--batch_size", 1, "--repeats", 1, "--variants", "plain", "channels_last"]
    record = run("training_speed", *TINY_TRAINING, *flags, written="training_speed", folder="experiments")
    names = [*record["steps"]]
    assert names[2:] == ["train_pqgan, PQ (S=32)", "train_pqgan, PQ (S=32), channels_last"]
    assert record["steps"][names[0]]["speed_ratio"] == 1 and record["steps"][names[3]]["speed_ratio"] > 0
