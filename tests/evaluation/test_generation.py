"""Draws and measures samples of a small pipeline, in one process and in two."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import Accelerator
from test_pipeline_latent_diffusion_pq import make
from test_pipeline_masked_pq import make as masked
from torchmetrics import MetricCollection
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from diffusers_pq import LatentDiffusionPQPipeline
from diffusers_pq.evaluation import generation
from diffusers_pq.evaluation.data import EvaluationData
from diffusers_pq.evaluation.generation import (
    Sampling,
    add_references,
    draw_samples,
    measure_samples,
    run_generation_evaluation,
)
from diffusers_pq.metrics import CMMD, FID


SAMPLING = Sampling(num_samples=7, num_inference_steps=2, batch_size=2)


class Thumbnails(nn.Module):
    """A feature space that needs no weights: pictures of 2 x 2 pixels."""

    num_features = 12

    def forward(self, pictures):
        return F.adaptive_avg_pool2d(pictures.float(), 2).flatten(1)


def small_metrics():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=4))
    metrics = {"rfid": FID(Thumbnails()), "cmmd": CMMD(clip.eval().requires_grad_(False))}
    return MetricCollection(metrics, compute_groups=False)


def evaluate(accelerator, workspace, output, metrics):
    pipeline = LatentDiffusionPQPipeline.from_pretrained(workspace / "pipeline")
    paths = draw_samples(accelerator, pipeline, ["bird", 2, 1], output / "samples", SAMPLING)
    add_references(accelerator, metrics, data_of(workspace), output / "references", batch_size=2)
    return measure_samples(accelerator, metrics, paths, batch_size=3)


def data_of(workspace):
    return EvaluationData(data_dir=str(workspace / "data"), resolution=32)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generation")
    make().save_pretrained(folder / "pipeline")
    generator = np.random.default_rng(0)
    (folder / "data" / "validation").mkdir(parents=True)
    for number in range(5):
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).resize((32, 32)).save(folder / "data" / "validation" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def alone(workspace):
    return evaluate(Accelerator(cpu=True), workspace, workspace / "one", small_metrics())


def test_two_processes_draw_the_same_samples_and_find_the_same_distances(workspace, alone):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    folders = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": folders}
    result = subprocess.run([*command, __file__, workspace], env=environment, capture_output=True, text=True)
    print(result.stderr)
    result.check_returncode()
    assert json.loads((workspace / "two.json").read_text()) == pytest.approx(alone | {"processes": 2}, rel=1e-5)
    for number in range(7):
        one, two = ((workspace / folder / "samples" / f"{number:06d}.png").read_bytes() for folder in ("one", "two"))
        assert one == two
    assert len(list((workspace / "two" / "samples").iterdir())) == 7
    # Statistics of two processes serve one.
    metrics = small_metrics()
    add_references(Accelerator(cpu=True), metrics, data_of(workspace), workspace / "two" / "references")
    paths = sorted((workspace / "one" / "samples").iterdir())
    assert measure_samples(Accelerator(cpu=True), metrics, paths, 7) == pytest.approx(alone, rel=1e-5)


def test_drawing_goes_on_where_it_was(workspace, alone):
    samples = workspace / "one" / "samples"
    before = {path: path.read_bytes() for path in samples.iterdir()}
    missing = samples / "000003.png"
    missing.unlink()
    times = {path: path.stat().st_mtime_ns for path in before if path != missing}
    pipeline = LatentDiffusionPQPipeline.from_pretrained(workspace / "pipeline")
    draw_samples(Accelerator(cpu=True), pipeline, ["bird", 2, 1], samples, SAMPLING)
    assert {path: path.read_bytes() for path in samples.iterdir()} == before
    again = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert again == {"000002.png"}, "drawn together with the missing one"


def test_another_seed_gives_other_samples(workspace, alone, tmp_path):
    pipeline = LatentDiffusionPQPipeline.from_pretrained(workspace / "pipeline")
    sampling = Sampling(num_samples=2, num_inference_steps=2, batch_size=2, seed=1)
    for path in draw_samples(Accelerator(cpu=True), pipeline, ["bird", 2], tmp_path, sampling):
        assert path.read_bytes() != (workspace / "one" / "samples" / path.name).read_bytes()


def test_references_of_other_pictures_are_refused(workspace, alone):
    data = EvaluationData(data_dir=str(workspace / "data"), resolution=16)
    with pytest.raises(ValueError, match="resolution 32 there, 16 now"):
        add_references(Accelerator(cpu=True), small_metrics(), data, workspace / "one" / "references")


def test_references_of_pictures_that_were_changed_are_refused(workspace, tmp_path):
    shutil.copytree(workspace / "data", tmp_path / "data")
    data = EvaluationData(data_dir=str(tmp_path / "data"), resolution=32)
    for _ in range(2):
        add_references(Accelerator(cpu=True), small_metrics(), data, tmp_path / "references")
    PIL.Image.new("RGB", (32, 32)).save(tmp_path / "data" / "validation" / "0.png")
    with pytest.raises(ValueError, match="an evaluation of other pictures .*rows_sha256"):
        add_references(Accelerator(cpu=True), small_metrics(), data, tmp_path / "references")


def test_an_evaluation_names_what_it_lacks_and_keeps_its_result(workspace, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # no Inception
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    arguments = Accelerator(cpu=True), str(workspace / "pipeline"), data_of(workspace), tmp_path / "runs"
    result = run_generation_evaluation(*arguments, SAMPLING)
    assert result["scores"] == {} and result["unavailable"].keys() == {"gfid", "cmmd"}
    samples = tmp_path / "runs" / "pipeline" / "samples"
    assert len(list(samples.iterdir())) == 7
    assert run_generation_evaluation(*arguments, SAMPLING) == result
    more = Sampling(**vars(SAMPLING) | {"num_samples": 8})
    assert run_generation_evaluation(*arguments, more)["settings"]["num_samples"] == 8
    assert len(list(samples.iterdir())) == 8, "those that were there are kept"
    small = EvaluationData(data_dir=str(workspace / "data"), resolution=16)
    with monkeypatch.context() as patch:
        patch.setattr(generation, "load_metrics", lambda names: pytest.fail("the metrics were fetched before"))
        with pytest.raises(ValueError, match="`resolution` is 16, but pipeline makes pictures of 32 pixels"):
            run_generation_evaluation(*arguments[:2], small, tmp_path / "runs", SAMPLING)
    own = EvaluationData(data_dir=str(workspace / "data"), resolution=None)
    assert (
        run_generation_evaluation(*arguments[:2], own, tmp_path / "runs", more)["settings"]
        == (run_generation_evaluation(*arguments, more)["settings"])
    )
    with pytest.raises(ValueError, match="guidance_scale 1.0 there, 2.0 now"):
        run_generation_evaluation(*arguments, Sampling(**vars(SAMPLING) | {"guidance_scale": 2.0}))


def test_masked_pipelines_of_classes_are_evaluated_and_others_refused(workspace, monkeypatch, tmp_path):
    monkeypatch.setattr(generation, "load_metrics", lambda names: (small_metrics(), {}))
    masked().save_pretrained(tmp_path / "masked")
    arguments = data_of(workspace), tmp_path / "runs", SAMPLING
    result = run_generation_evaluation(Accelerator(cpu=True), str(tmp_path / "masked"), *arguments)
    assert result["scores"]["gfid"] > 0 and len(list((tmp_path / "runs" / "masked" / "samples").iterdir())) == 7
    masked(text=True).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="text makes pictures of texts; samples are drawn of classes"):
        run_generation_evaluation(Accelerator(cpu=True), str(tmp_path / "text"), *arguments)
    index = json.loads((tmp_path / "masked" / "model_index.json").read_text())
    (tmp_path / "masked" / "model_index.json").write_text(json.dumps(index | {"_class_name": "DDIMPipeline"}))
    with pytest.raises(
        ValueError, match="holds a 'DDIMPipeline'; samples are drawn of LatentDiffusionPQPipeline, Mas"
    ):
        run_generation_evaluation(Accelerator(cpu=True), str(tmp_path / "masked"), *arguments)


def refuse(*args, **kwargs):
    raise OSError("no network")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    accelerator = Accelerator(cpu=True)
    scores = evaluate(accelerator, folder, folder / "two", small_metrics())
    if accelerator.is_main_process:
        (folder / "two.json").write_text(json.dumps(scores | {"processes": accelerator.num_processes}))
    accelerator.end_training()
