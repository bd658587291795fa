"""The version ranges this package is tested with; `setup.py` reads them from here."""

from importlib.metadata import PackageNotFoundError, version


# Needed by `import diffusers_pq` and the models; checked on import.
SUPPORTED = {
    "torch": ">=2.6",
    "diffusers": ">=0.42,<0.43",
    "transformers": ">=5.0,<6",
    "huggingface_hub": ">=1.0,<3",
    "safetensors": ">=0.5",
}


def check_dependency_versions():
    """Raise an `ImportError` that names every installed package outside the supported range."""
    from packaging.specifiers import SpecifierSet

    wrong = []
    for package, supported in SUPPORTED.items():
        try:
            installed = version(package)
        except PackageNotFoundError:
            wrong.append(f"{package}{supported} is needed but not installed")
            continue
        if not SpecifierSet(supported).contains(installed, prereleases=True):
            wrong.append(f"{package}{supported} is needed but {installed} is installed")
    if wrong:
        fix = " ".join(f'"{package}{supported}"' for package, supported in SUPPORTED.items())
        raise ImportError(f"diffusers_pq: {'; '.join(wrong)}. Fix it with `pip install {fix}`.")
