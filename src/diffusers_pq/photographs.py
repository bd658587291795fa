"""The photographs for evaluation. They come with scikit-image and scikit-learn and are never trained on."""

from importlib.util import find_spec
from pathlib import Path

import PIL.Image

from .images import load_image


# Colour photographs of different subjects. Left out: scikit-image's stereo pair (motorcycle_left and _right), its
# scientific pictures and its grey ones. Credits:
#   astronaut (NASA, public domain), chelsea (Stefan van der Walt, CC0), coffee (Rachel Michetti, CC0),
#   rocket (SpaceX, CC0), china (danielbuechele, CC BY 2.0), flower (vultilion, CC BY 2.0).
PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}


def load_photographs() -> dict[str, PIL.Image.Image]:
    """
    The held-out photographs as 8-bit RGB, by name.

    Raises:
        ImportError: if scikit-image or scikit-learn is not installed.
    """
    return {name: load_image(_package_folder(package) / file) for name, (package, file) in PHOTOGRAPHS.items()}


def _package_folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None:
        raise ImportError('The held-out photographs need `pip install "diffusers_pq[eval]"`.')
    return Path(spec.origin).parent
