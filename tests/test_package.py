import importlib.metadata
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent


def python(code, interpreter=sys.executable, **kwargs):
    return subprocess.run([interpreter, "-c", code], capture_output=True, text=True, **kwargs)


def test_import_is_light():
    code = "import sys, diffusers_pq; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    assert python(code).stdout.strip() == "[]"


@pytest.mark.parametrize("order", ["import diffusers_pq; import diffusers", "import diffusers; import diffusers_pq"])
def test_diffusers_knows_the_library_whatever_is_imported_first(order):
    code = f"{order}; from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES as known; "
    result = python(code + "print(sorted(known['diffusers_pq']))")
    assert result.stdout.strip() == "['DiffusionPipeline', 'ModelMixin']", result.stderr


@pytest.mark.parametrize(
    "order",
    [
        "import diffusers_pq; from diffusers import AutoPipelineForInpainting as auto",
        "from diffusers import AutoPipelineForInpainting as auto; import diffusers_pq",
    ],
)
def test_auto_pipelines_know_ours_whatever_is_imported_first(order):
    code = f"{order}; from diffusers.pipelines.auto_pipeline import AUTO_INPAINT_PIPELINES_MAPPING as known; "
    result = python(code + "print(known['stable-diffusion-pq'] is diffusers_pq.StableDiffusionPQInpaintPipeline)")
    assert result.stdout.strip() == "True", result.stderr


def test_a_diffusers_without_the_table_gives_a_clear_error():
    from diffusers_pq import _registration

    with pytest.raises(ImportError, match="Install diffusers>=0.42"):
        _registration._register(object())


def test_an_unsupported_version_is_named(monkeypatch):
    from diffusers_pq import _versions

    real = importlib.metadata.version
    monkeypatch.setattr(_versions, "version", lambda name: "0.30.0" if name == "diffusers" else real(name))
    with pytest.raises(ImportError, match="diffusers>=0.42.* is needed but 0.30.0 is installed.*pip install"):
        _versions.check_dependency_versions()


def test_every_public_name_can_be_imported():
    import diffusers_pq

    for name in diffusers_pq.__all__:
        assert getattr(diffusers_pq, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = diffusers_pq.Nonsense


@pytest.mark.install
def test_the_wheel_works_in_an_empty_environment(tmp_path):
    """Installs the wheel with all it asks for, at the versions of this environment so that pip's cache serves them."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    shutil.copytree(ROOT / "pipelines", source / "pipelines", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist"), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")

    venv.create(tmp_path / "empty", with_pip=True)
    interpreter = str(tmp_path / "empty" / "bin" / "python")
    installed = {d.name: d.version for d in importlib.metadata.distributions() if d.name != "diffusers_pq"}
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in installed.items()))
    install = [interpreter, "-m", "pip", "install", "--quiet", str(wheel), "--constraint", str(constraints)]
    subprocess.run(install, check=True, capture_output=True)
    code = (
        "import diffusers_pq; from diffusers import StableDiffusionPipeline; "
        "from diffusers_pq import PQModel, StableDiffusionPQPipeline; "
        f"model = PQModel.from_pretrained({str(ROOT / 'model_cards/pqgan-mini-f8-pq')!r}); "
        "print(diffusers_pq.__file__, model.num_parameters(), "
        "issubclass(StableDiffusionPQPipeline, StableDiffusionPipeline))"
    )
    result = python(code, interpreter, cwd=tmp_path)
    assert result.stdout.split()[1:] == ["2751315", "True"], result.stderr
    assert result.stdout.startswith(str(tmp_path / "empty"))
