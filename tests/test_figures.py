import json
import runpy
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import tiny_config

from diffusers_pq import PQModel
from diffusers_pq.figures import difference_map, draw_overview, draw_reconstructions, most_different_box
from diffusers_pq.metrics import pooled_psnr


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCRIPT = BENCHMARKS / "reconstruct_photographs.py"
PIPELINE = BENCHMARKS.parent / "model_cards" / "pqsd-mini"


def grey(value, size=(96, 64)):
    return PIL.Image.new("RGB", size, (value,) * 3)


def test_a_difference_map_is_the_mean_absolute_difference_of_the_colours():
    original, picture = grey(100, (2, 1)), grey(100, (2, 1))
    picture.putpixel((1, 0), (110, 70, 100))
    np.testing.assert_allclose(difference_map(picture, original), [[0, 40 / 3]], atol=1e-4)


def test_the_box_is_where_the_models_errors_differ_most():
    original, good, bad = grey(100), grey(100), grey(100)
    for picture in (good, bad):
        picture.paste((200,) * 3, (0, 0, 32, 32))  # equally wrong
    bad.paste((150,) * 3, (48, 24, 72, 48))
    left, top, right, bottom = most_different_box(original, [good, bad], 24)
    assert (left, top, right, bottom) == (48, 24, 72, 48)
    assert most_different_box(original, [bad], 24) == (0, 0, 24, 24)  # of one model, the largest error
    left, top, right, bottom = most_different_box(original, [good, bad], 500)  # more than there is
    assert (top, bottom, right - left) == (0, 64, 64) and left <= 48 and right >= 72


def test_all_models_share_one_colour_scale_that_is_stated():
    originals = {"photo": grey(100)}
    reconstructions = {"near": {"photo": grey(104)}, "far": {"photo": grey(140)}}
    titles = {model: {"photo": model} for model in reconstructions}
    figure = draw_reconstructions(originals, reconstructions, {"photo": (0, 0, 16, 16)}, titles, amplification=5)
    shown = [axis for axis in figure.axes if axis.get_title().startswith("|difference|")]
    assert [axis.get_title() for axis in shown] == ["|difference| x 5, mean 4.0", "|difference| x 5, mean 40.0"]
    assert {axis.images[0].get_clim() for axis in shown} == {(0, 51)}
    assert [axis.images[0].get_array().mean() for axis in shown] == pytest.approx([4, 40], abs=1e-3)


def test_the_command_draws_any_models_and_pictures(tmp_path, capsys):
    torch.manual_seed(0)
    PQModel(**tiny_config()).save_pretrained(tmp_path / "pq")
    PIL.Image.linear_gradient("L").resize((45, 31)).save(tmp_path / "photo.jpg")
    PIL.Image.radial_gradient("L").resize((40, 40)).save(tmp_path / "other.png")
    script = runpy.run_path(str(SCRIPT))

    def run(*crops):
        flags = ["--models", f"A={tmp_path / 'pq'}", f"B={tmp_path / 'pq'}", "--crop_side", "16", "--crops", *crops]
        flags += ["--pictures", str(tmp_path / "photo.jpg"), str(tmp_path / "other.png"), "--batch_sizes", "1", "2"]
        script["main"](script["parse_args"]([*flags, "--output_dir", str(tmp_path / "out")]))

    run("photo=5,7")
    record = json.loads((tmp_path / "out" / "photographs.json").read_text())
    assert record["crops"]["photo"] == [5, 7, 21, 23] and set(record["results"]["A"]["psnr_per_picture"]) == {
        "photo",
        "other",
    }
    pixels = {"photo": 45 * 31, "other": 40 * 40}
    row = record["results"]["A"]
    pooled = pooled_psnr([row["psnr_per_picture"][name] for name in pixels], list(pixels.values()))
    assert row["psnr_pooled"] == pytest.approx(pooled)
    assert f"| A | {row['psnr']:.2f} | {row['psnr_pooled']:.2f} |" in capsys.readouterr().out
    assert {(size, mode) for size, found in row["speed"].items() for mode in found} == {("1", "eager"), ("2", "eager")}
    assert all(found["eager"]["seconds"] > 0 for found in row["speed"].values())
    with PIL.Image.open(tmp_path / "out" / "photographs.png") as figure:
        assert figure.width == 3 * 3 * 80
    for crops, message in [("photo=40,7", "photo=40,7 leaves the picture of 45 x 31"), ("cat=1,1", "names cat")]:
        with pytest.raises(ValueError, match=message):
            run(crops)
    with pytest.raises(ValueError, match="several files with the name photo"):
        script["load_pictures"]([tmp_path / "photo.jpg", tmp_path / "other" / "photo.png"])
    with pytest.raises(SystemExit):
        run("photo=5")
    assert "--crops takes PICTURE=LEFT,TOP" in capsys.readouterr().err


def test_the_overview_has_a_row_for_each_photograph_and_one_of_generated_pictures():
    details = [{"cat": grey(10), "PQ": grey(20)}, {"dog": grey(30), "PQ": grey(40)}]
    figure = draw_overview(details, {"A red apple.": grey(50)})
    shown = {axis.get_title(): axis.images[0].get_array().mean() for axis in figure.axes}
    assert shown == {"cat": 10, "PQ": 40, "dog": 30, "“A red apple.”": 50} and len(figure.axes) == 5


def test_the_command_draws_the_overview_of_any_models(tmp_path):
    PQModel(**tiny_config()).save_pretrained(tmp_path / "pq")
    script = runpy.run_path(str(BENCHMARKS / "overview.py"))

    def run(*photographs):
        flags = ["--models", f"A={tmp_path / 'pq'}", "--pipeline", str(PIPELINE), "--photographs", *photographs]
        flags += ["--prompts", "A frog.", "--num_inference_steps", "1", "--output", str(tmp_path / "overview.jpg")]
        script["main"](script["parse_args"](flags))

    run("chelsea")
    with PIL.Image.open(tmp_path / "overview.jpg") as overview:
        assert overview.format == "JPEG" and overview.width == 2 * 220
    with pytest.raises(ValueError, match="--photographs names cat; there are astronaut"):
        run("cat")


def test_results_go_to_a_folder_of_the_device_unless_told_otherwise(tmp_path, monkeypatch):
    torch.manual_seed(0)
    PQModel(**tiny_config()).save_pretrained(tmp_path / "pq")
    PIL.Image.linear_gradient("L").resize((45, 31)).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    script = runpy.run_path(str(SCRIPT))
    flags = ["--models", "A=pq", "--crop_side", "16", "--pictures", "photo.png"]
    script["main"](script["parse_args"](flags))
    assert (tmp_path / "benchmarks" / "results" / "cpu" / "photographs.json").is_file()
