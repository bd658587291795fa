"""Push and pull through the real `huggingface_hub`, over HTTP, with a stand-in of the Hub at the other end."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from alone import run_alone
from conftest import tiny_config, tiny_unet
from diffusers import DDIMScheduler
from hub_stand_in import Hub
from safetensors.torch import load_file, save_file
from tiny_pipelines import stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from transformers import CLIPTextConfig, CLIPTextModel

import diffusers_pq
from diffusers_pq import PQModel, StableDiffusionPQPipeline
from diffusers_pq.cli import main
from diffusers_pq.hub.push import check_folder


FAMILIES = {
    "StableDiffusionPQPipeline": stable_diffusion,
    "StableDiffusionXLPQPipeline": stable_diffusion_xl,
    "StableDiffusion3PQPipeline": stable_diffusion_3,
}
PIPELINES = Path(__file__).parents[2] / "pipelines"
TRAIN_PQGAN = Path(__file__).parents[2] / "training_scripts" / "train_pqgan.py"
CARD = "---\nlicense: apache-2.0\nlibrary_name: diffusers\n---\n\n# A tiny one\n"
WEIGHTS = "diffusion_pytorch_model.safetensors"
VARIANT = "diffusion_pytorch_model.fp16.safetensors"
OBJECT = r"/\w{64}"  # path of a large file in the storage

# What every client begins with.
PRELUDE = f"""
import json
import sys
import torch
from safetensors.torch import load_file

root = sys.argv[1]
NO_TEXT = {{"text_encoder": None, "tokenizer": None}}

def reproduces(model, folder):
    saved, loaded = load_file(f"{{root}}/{{folder}}/{WEIGHTS}"), model.state_dict()
    return saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)

def works(pipeline, **inputs):
    pipeline.set_progress_bar_config(disable=True)
    prompt = {{"prompt_embeds": torch.ones(1, 4, 16), "negative_prompt_embeds": torch.zeros(1, 4, 16)}}
    images = pipeline(**prompt, num_inference_steps=2, output_type="pt", **inputs).images
    whole = reproduces(pipeline.vae, "pipeline/vae") and reproduces(pipeline.unet, "pipeline/unet")
    return whole and images.shape == (1, 3, 32, 32)

def failure(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{{type(error).__name__}}: {{error}}"
"""


@pytest.fixture(scope="module")
def hub():
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Holds a model and a pipeline."""
    root = tmp_path_factory.mktemp("root")
    torch.manual_seed(0)
    model = PQModel(**tiny_config())
    pipeline = StableDiffusionPQPipeline(
        model, None, None, tiny_unet(8), DDIMScheduler(), None, None, requires_safety_checker=False
    )
    for part, name in ((model, "model"), (pipeline, "pipeline")):
        part.save_pretrained(root / name)
        (root / name / "README.md").write_text(CARD)
    return root


@pytest.fixture(scope="module")
def client(hub, root, tmp_path_factory):
    """Runs code in a new process with an empty cache and returns what it prints last, as JSON."""

    def run(code, token="", home=None, offline=False):
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home or tmp_path_factory.mktemp("home")),
            "HF_TOKEN": token,
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", PRELUDE + code, str(root)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def pushed(client):
    """The model at org/model and, private, at org/secret; the pipeline at org/pipeline, its parent at org/stock."""
    client(
        """
from diffusers import StableDiffusionPipeline
from diffusers_pq import PQModel, StableDiffusionPQPipeline

model = PQModel.from_pretrained(f"{root}/model")
model.push_to_hub("org/model")
model.push_to_hub("org/secret", private=True)
pipeline = StableDiffusionPQPipeline.from_pretrained(f"{root}/pipeline", **NO_TEXT)
pipeline.push_to_hub("org/pipeline")
StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False).push_to_hub("org/stock")
print(json.dumps(None))
""",
        token="hf_owner",
    )


def test_what_was_pushed_loads_in_a_new_process_and_later_without_the_hub(hub, client, pushed, tmp_path):
    load = """
from diffusers_pq import PQModel, StableDiffusionPQPipeline

model = PQModel.from_pretrained("org/model")
pipeline = StableDiffusionPQPipeline.from_pretrained("org/pipeline", **NO_TEXT)
print(json.dumps([reproduces(model, "model"), type(pipeline).__name__, works(pipeline)]))
"""
    expected = [True, "StableDiffusionPQPipeline", True]
    assert client(load, home=tmp_path) == expected
    hub.requests.clear()
    assert client(load, home=tmp_path, offline=True) == expected
    assert not hub.requests


def test_diffusion_pipeline_loads_a_pushed_pipeline_where_diffusers_pq_is_installed(client, pushed):
    report = client(
        f"""
from diffusers import DiffusionPipeline

report = {{"untrusted": failure(DiffusionPipeline.from_pretrained, "org/pipeline", **NO_TEXT)}}
trusted = NO_TEXT | {{"trust_remote_code": True}}
sys.modules["diffusers_pq"] = None  # the import then fails as that of a package that is not installed
report["missing"] = failure(DiffusionPipeline.from_pretrained, "org/pipeline", **trusted)
del sys.modules["diffusers_pq"]

pipeline = DiffusionPipeline.from_pretrained("org/pipeline", **trusted)
import diffusers_pq

report["class"] = isinstance(pipeline, diffusers_pq.StableDiffusionPQPipeline) and works(pipeline)
code = "{PIPELINES}/pipeline_stable_diffusion_pq_img2img.py"
img2img = DiffusionPipeline.from_pretrained("org/stock", custom_pipeline=code, **trusted)
report["custom"] = [type(img2img).__name__, works(img2img, image=torch.zeros(1, 3, 32, 32))]
report["explicit"] = works(diffusers_pq.StableDiffusionPQPipeline.from_pretrained("org/pipeline", **NO_TEXT))
print(json.dumps(report))
"""
    )
    assert "Pass `trust_remote_code=True`" in report.pop("untrusted")
    assert "ImportError: StableDiffusionPQPipeline needs the Python package `diffusers_pq`" in report.pop("missing")
    assert report == {"class": True, "custom": ["StableDiffusionPQImg2ImgPipeline", True], "explicit": True}


def test_auto_model_loads_a_pushed_model_where_diffusers_pq_is_not_installed(hub, pushed, tmp_path):
    code = """
import json
from diffusers import AutoModel

model = AutoModel.from_pretrained("org/model", trust_remote_code=True)
print(json.dumps([type(model).__name__, float(model.quantizer.codebooks.sum())]))
"""
    name, total = run_alone(code, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="0")
    torch.manual_seed(0)
    codebooks = PQModel(**tiny_config()).quantizer.codebooks.detach()
    assert name == "PQModel" and total == pytest.approx(codebooks.sum().item())


def test_a_pipeline_of_any_family_paints_the_same_after_a_push(client, root):
    for name, components in FAMILIES.items():
        pipeline = getattr(diffusers_pq, name)(**components(PQModel(**tiny_config()).eval(), 8))
        pipeline.save_pretrained(root / name)
    code = f"""
import diffusers_pq
from diffusers import DiffusionPipeline

def paint(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    options = {{"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}}
    return pipeline("a red bus", **options).images

def check(name):
    pipeline_class = getattr(diffusers_pq, name)
    local = pipeline_class.from_pretrained(f"{{root}}/{{name}}")
    local.push_to_hub(f"org/{{name}}")
    own = pipeline_class.from_pretrained(f"org/{{name}}")
    generic = DiffusionPipeline.from_pretrained(f"org/{{name}}", trust_remote_code=True)
    same = [torch.allclose(paint(local), paint(pipeline), atol=1e-5) for pipeline in (own, generic)]
    return all(same) and isinstance(generic, pipeline_class)

print(json.dumps([check(name) for name in {list(FAMILIES)}]))
"""
    assert client(code, token="hf_owner") == [True] * len(FAMILIES)


def test_private_missing_and_forbidden_repositories_give_errors_that_say_so(client, pushed):
    report = client(
        """
from diffusers_pq import PQModel, StableDiffusionPQPipeline

model = PQModel.from_pretrained("org/secret", token="hf_reader", cache_dir=f"{root}/cache")
print(json.dumps({
    "member": reproduces(model, "model"),
    "anonymous": failure(PQModel.from_pretrained, "org/secret"),
    "stranger": failure(PQModel.from_pretrained, "org/secret", token="hf_stranger"),
    "wrong": failure(PQModel.from_pretrained, "org/secret", token="hf_wrong"),
    "absent": failure(PQModel.from_pretrained, "org/absent", token="hf_owner"),
    "pipeline": failure(StableDiffusionPQPipeline.from_pretrained, "org/absent"),
    "revision": failure(PQModel.from_pretrained, "org/model", revision="v9"),
    "reader": failure(model.push_to_hub, "org/model", token="hf_reader"),
    "elsewhere": failure(model.push_to_hub, "others/model", token="hf_owner"),
}))
"""
    )
    assert report.pop("member") is True
    for case in ("anonymous", "stranger", "absent"):
        assert "is not a local folder and is not a valid model identifier" in report.pop(case)
    assert "Invalid credentials in Authorization header" in report.pop("wrong")
    assert "Cannot load model org/absent" in report.pop("pipeline")
    assert "v9 is not a valid git identifier" in report.pop("revision")
    assert "you must use a write token" in report.pop("reader")
    assert "don't have the rights to create a model" in report.pop("elsewhere")
    assert not report


def test_transfers_that_are_cut_leave_nothing_half_and_go_on_where_they_stopped(hub, client, root):
    # More than the 10 MB that the client reads at a time.
    PQModel(**tiny_config(codebook_size=400_000)).save_pretrained(root / "large")
    weights = (root / "large" / WEIGHTS).read_bytes()
    hub.cut("PUT", OBJECT, after=1000)
    hub.cut("POST", "/api/models/org/large/commit/main")
    hub.cut("GET", OBJECT, after=len(weights) - 1000)
    hub.requests.clear()
    report = client(
        """
from diffusers_pq import PQModel
from huggingface_hub import list_repo_files

model = PQModel.from_pretrained(f"{root}/large")
failed = failure(model.push_to_hub, "org/large") is not None
between = list_repo_files("org/large")
model.push_to_hub("org/large")
print(json.dumps([failed, between, reproduces(PQModel.from_pretrained("org/large"), "large")]))
""",
        token="hf_owner",
    )
    assert report == [True, [".gitattributes"], True]
    assert len(hub.find("PUT", OBJECT)) == 2, "cut, then whole; the repeated push finds the weights there"
    assert hub.files("org/large")[WEIGHTS] == weights
    first, second = (request.range for request in hub.find("GET", OBJECT))
    assert first is None and int(second.removeprefix("bytes=").removesuffix("-")) >= 10_000_000


def test_push_uploads_a_checked_folder_once(hub, client, root):
    shutil.copytree(root / "pipeline", root / "trained")
    for name in ("checkpoint-5/optimizer.bin", "logs/train_pqsd/events"):
        (root / "trained" / name).parent.mkdir(parents=True)
        (root / "trained" / name).write_bytes(b"not for the Hub")
    shutil.copytree(root / "model", root / "unlicensed")
    (root / "unlicensed" / "README.md").write_text("---\nlicense: [1, 2]\n---\n")
    hub.cut("POST", "/api/models/org/card/commit/main")
    report = client(
        """
import contextlib
import io
import os
from diffusers_pq.cli import main
from diffusers_pq.hub.push import check_folder

def push(*arguments):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(["push", *arguments])
    return [status, out.getvalue().strip(), err.getvalue().strip().splitlines()[-1:]]

model, pipeline = f"{root}/model", f"{root}/trained"
os.remove(f"{pipeline}/vae/diffusers_pq.py")
print(json.dumps({
    "cut": push(model, "org/card", "--private"),
    "repeated": push(model, "org/card", "--private"),
    "unchanged": push(model, "org/card"),
    "branch": push(pipeline, "org/card", "--revision", "v2"),
    "again": push(pipeline, "org/card", "--revision", "v2"),
    "public": push(model, "org/model-card"),
    "made private": push(model, "org/model-card", "--private"),
    "reader": push(model, "org/card", "--token", "hf_reader"),
    "wrong": push(model, "org/card", "--token", "hf_wrong"),
    "name": push(model, "org/card/model"),
    "metadata": push(f"{root}/unlicensed", "org/unlicensed"),
}))
""",
        token="hf_owner",
    )
    commits = list(hub.repositories["org/card"].commits)
    urls = [f"{hub.url}/org/card/commit/{sha}" for sha in commits]
    assert len(commits) == 3, "the first, the model's and the pipeline's"
    status, _, (error,) = report["cut"]
    assert status == 1 and "broke off" in error and "Repeat it: what has arrived is not sent again" in error
    assert report["repeated"][:2] == report["unchanged"][:2] == [0, urls[1]]
    assert report["branch"][:2] == report["again"][:2] == [0, urls[2]]
    for name, revision in (("model", "main"), ("pipeline", "v2")):
        files = {str(path.relative_to(root / name)) for path in (root / name).rglob("*") if path.is_file()}
        remote = hub.files("org/card", revision)
        assert files and all(remote[path] == (root / name / path).read_bytes() for path in files)
        assert not [path for path in remote if path.startswith(("checkpoint-", "logs/"))]
    assert hub.repositories["org/card"].private
    assert report["public"][0] == 0 and not hub.repositories["org/model-card"].private
    for case, message in {
        "made private": "org/model-card exists already and is public",
        "reader": "Use a token that may write there",
        "wrong": "Invalid credentials in Authorization header Use a token",
        "name": "org/card/model",
        "metadata": 'unlicensed/README.md: "license" must be a string',
    }.items():
        status, _, (error,) = report[case]
        assert status == 1 and message in error, case
    assert "org/unlicensed" not in hub.repositories


def break_weights(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def drop_a_tensor(folder):
    state = load_file(folder / WEIGHTS)
    del state["quantizer.codebooks"]
    save_file(state, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model", lambda folder: (folder / "README.md").unlink(), "README.md is missing"),
        ("model", lambda folder: (folder / "README.md").write_text("# Text\n"), "README.md has no metadata"),
        ("model", lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"), "is not valid YAML"),
        ("model", lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        ("model", lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
        ("model", lambda folder: (folder / "config.json").write_text('{"_class_name": "X"}'), "names the class 'X'"),
        ("model", break_weights, "Unable to load weights"),
        ("model", drop_a_tensor, "do not fit its config.json: missing ['quantizer.codebooks']"),
        ("model", lambda folder: (folder / WEIGHTS).rename(folder / WEIGHTS.replace("safetensors", "bin")), WEIGHTS),
        ("pipeline", lambda folder: drop_a_tensor(folder / "vae"), "do not fit its config.json: missing"),
        ("pipeline", lambda folder: (folder / "vae" / WEIGHTS).unlink(), WEIGHTS),
        ("pipeline", lambda folder: (folder / "model_index.json").unlink(), "neither a config.json nor"),
    ],
)
def test_push_refuses_a_folder_that_is_not_whole(name, damage, message, root, tmp_path, capsys):
    folder = tmp_path / name
    shutil.copytree(root / name, folder)
    damage(folder)
    assert main(["push", str(folder), "org/damaged"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model", "pipeline"])
def test_weights_of_a_variant_alone_are_fit_to_be_pushed(name, root, tmp_path):
    shutil.copytree(root / name, tmp_path / name)
    paths = list((tmp_path / name).rglob(WEIGHTS))
    for path in paths:
        path.rename(path.with_name(VARIANT))
    assert paths and check_folder(tmp_path / name).data.license == "apache-2.0"


@pytest.mark.parametrize("part", ["model", "pipeline/vae", "pipeline/text_encoder"])
def test_a_damaged_variant_beside_whole_weights_is_noticed(part, root, tmp_path):
    for name in ("model", "pipeline"):
        shutil.copytree(root / name, tmp_path / name)
    config = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    CLIPTextModel(CLIPTextConfig(**config, vocab_size=9)).save_pretrained(tmp_path / "pipeline/text_encoder")
    index = json.loads((tmp_path / "pipeline/model_index.json").read_text())
    index["text_encoder"] = ["transformers", "CLIPTextModel"]
    (tmp_path / "pipeline/model_index.json").write_text(json.dumps(index))
    folder = tmp_path / part.split("/")[0]
    (whole,) = (tmp_path / part).glob("*model.safetensors")
    variant = whole.with_name(whole.name.replace("model.", "model.fp16."))
    shutil.copy(whole, variant)
    check_folder(folder)
    variant.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(OSError, match="Unable to load|damaged"):
        check_folder(folder)


def test_push_takes_a_configuration_without_weights_and_says_so(root, tmp_path, caplog, capsys):
    shutil.copytree(root / "model", tmp_path / "model")
    (tmp_path / "model" / WEIGHTS).unlink()
    assert main(["push", str(tmp_path / "model"), "org/configuration"]) == 1
    assert "holds no weights: the configuration is pushed alone" in caplog.text
    assert "offline mode is enabled" in capsys.readouterr().err


def test_training_uploads_in_the_background_and_survives_uploads_that_fail(hub, root, tmp_path):
    for split in ("train", "validation"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for number in range(3):
            PIL.Image.effect_noise((40, 40), 40).convert("RGB").save(tmp_path / "data" / split / f"{number}.png")
    command = [sys.executable, str(TRAIN_PQGAN), "--model_config_name_or_path", str(root / "model")]
    command += ["--train_data_dir", str(tmp_path / "data"), "--resolution", "32", "--train_batch_size", "2"]
    command += ["--output_dir", str(tmp_path / "run"), "--perceptual_weight", "0", "--discriminator_weight", "0"]
    command += ["--max_train_steps", "2", "--validation_steps", "1", "--checkpointing_steps", "1"]
    command += ["--push_to_hub", "--hub_model_id", "org/trained", "--hub_token", "hf_owner"]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    hub.cut("POST", "/api/models/org/trained/commit/main")
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "The upload to org/trained failed, nothing local is lost" in result.stderr
    pushed = hub.files("org/trained")
    for name in (WEIGHTS, f"best/{WEIGHTS}", "best/validation.json", "README.md", "training_config.json"):
        assert pushed[name] == (tmp_path / "run" / name).read_bytes()
    assert not any(name.startswith(("checkpoint", "logs")) for name in pushed)
    assert b"hf_owner" not in pushed["training_config.json"]
