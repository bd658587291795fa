"""
The photographs for evaluation, none of which is trained on: six that come with scikit-image and scikit-learn, and a
test set of sixteen out of Debian packages.
"""

import hashlib
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import PIL.Image
from PIL.Image import Resampling

from .data_preparation import fetch_packages, new_folder, write_credits, write_metadata
from .images import load_image, save_image


# Colour photographs of different subjects. They were looked at while things were chosen, as a validation set is. Left
# out: scikit-image's stereo pair (motorcycle_left and _right), its scientific pictures and its grey ones. Credits:
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


@dataclass(frozen=True)
class TestPhotograph:
    """A file of a Debian package, its author and licence, and the first digits of its SHA-256."""

    __test__ = False  # for pytest

    package: str
    path: str
    author: str
    licence: str
    sha256: str


# Chosen once, on 28 November 2026, before anything was measured on them: all photographs of the two packages of
# lomiri-wallpapers (their drawings, gradients and textures left out), and the first two of palapeli-data by name.
# Nothing may be tuned on them.
TEST_PHOTOGRAPHS = {
    "bridge": TestPhotograph(
        "lomiri-wallpapers-16.04",
        "usr/share/backgrounds/Bridge_by_Sander_Klootwijk.jpg",
        "Sander Klootwijk",
        "CC BY-SA 4.0",
        "bd86b081f9975e2b",
    ),
    "dragonfly": TestPhotograph(
        "lomiri-wallpapers-16.04",
        "usr/share/backgrounds/Dragonfly_by_Bolly.jpg",
        "Bolly",
        "CC BY-SA 4.0",
        "af5af17841009732",
    ),
    "fig": TestPhotograph(
        "lomiri-wallpapers-16.04",
        "usr/share/backgrounds/Picture_0B_by_freespace.jpg",
        'Trevor "Freespace"',
        "CC BY 4.0",
        "c8c0ab18e48d9e04",
    ),
    "brushes": TestPhotograph(
        "lomiri-wallpapers-16.04",
        "usr/share/backgrounds/Picture_1A_by_freespace.jpg",
        'Trevor "Freespace"',
        "CC BY 4.0",
        "89e86af38d04daae",
    ),
    "wine": TestPhotograph(
        "lomiri-wallpapers-16.04",
        "usr/share/backgrounds/Wine_by_Jakkub_Mede.jpg",
        "Jakub Mede",
        "CC BY 4.0",
        "d2e96e6d4da40dd8",
    ),
    "aitzgorri": TestPhotograph(
        "lomiri-wallpapers-16.04",
        "usr/share/backgrounds/aitzgorri_by_Aitzol_Berasategi.jpg",
        "Aitzol Berasategi",
        "CC BY 4.0",
        "66268e7b48f8854d",
    ),
    "bird": TestPhotograph(
        "lomiri-wallpapers-16.04",
        "usr/share/backgrounds/free_by_Peter_Nerlich.jpg",
        "Peter Nerlich",
        "CC BY-SA 4.0",
        "85a5453c2fed514c",
    ),
    "dogs": TestPhotograph(
        "lomiri-wallpapers-16.04",
        "usr/share/backgrounds/friends_by_Aitzol_Berasategi.jpg",
        "Aitzol Berasategi",
        "CC BY 4.0",
        "cc40e313c74e421e",
    ),
    "clock": TestPhotograph(
        "lomiri-wallpapers-16.04",
        "usr/share/backgrounds/greentock_by_Peter_Nerlich.jpg",
        "Peter Nerlich",
        "CC BY-SA 4.0",
        "e7b20e2db9dcd6e2",
    ),
    "stream": TestPhotograph(
        "lomiri-wallpapers-16.04",
        "usr/share/backgrounds/life_by_Aitzol_Berasategi.jpg",
        "Aitzol Berasategi",
        "CC BY 4.0",
        "4c119350ead80201",
    ),
    "picos": TestPhotograph(
        "lomiri-wallpapers-16.04",
        "usr/share/backgrounds/picosdeeuropa_by_Aitzol_Berasategi.jpg",
        "Aitzol Berasategi",
        "CC BY 4.0",
        "414d0072b2f6f2c5",
    ),
    "dandelion": TestPhotograph(
        "lomiri-wallpapers-16.04",
        "usr/share/backgrounds/seeding_by_Clements_Engelhardt.jpg",
        "Clemens Engelhardt",
        "CC0 1.0",
        "a5634d1ab5e41a35",
    ),
    "sunset": TestPhotograph(
        "lomiri-wallpapers-16.04",
        "usr/share/backgrounds/sunset_by_Aitzol_Berasategi.jpg",
        "Aitzol Berasategi",
        "CC BY 4.0",
        "474dab6a4b9f94dc",
    ),
    "nuthatch": TestPhotograph(
        "lomiri-wallpapers-20.04",
        "usr/share/backgrounds/Kleiber_by_Lukas_Baubkus.jpg",
        "Lukas Baubkus",
        "CC BY-SA 3.0",
        "6572410c09f4492c",
    ),
    "castle": TestPhotograph(
        "palapeli-data",
        "usr/share/palapeli/collection/castle-maintenon.jpg",
        "Eric Pouhier",
        "GFDL",
        "f4a6bf48b97d9771",
    ),
    "cincinnati": TestPhotograph(
        "palapeli-data",
        "usr/share/palapeli/collection/cincinnati-bridge.jpg",
        "Derek Jensen",
        "public domain",
        "09772d09318b34a5",
    ),
}


def load_photographs() -> dict[str, PIL.Image.Image]:
    """
    The held-out photographs as 8-bit RGB, by name. Choices were made by them; for final results see
    [`prepare_test_photographs`].

    Raises:
        ImportError: if scikit-image or scikit-learn is not installed.
    """
    return {name: load_image(_package_folder(package) / file) for name, (package, file) in PHOTOGRAPHS.items()}


def prepare_test_photographs(
    output_dir: str | os.PathLike, packages_dir: str | os.PathLike | None = None, short_side: int = 512
) -> int:
    """
    Write the `TEST_PHOTOGRAPHS` as the split `test` of an `imagefolder` dataset, with the columns `image`, `text` (the
    name), `author`, `licence` and `source`, and the packages' own statements in `CREDITS.txt`. For final tables only.

    Args:
        output_dir: Written whole or not at all; must not exist.
        packages_dir (*optional*):
            A folder with an unpacked Debian package in each sub-folder; `None` fetches them with apt.
        short_side (`int`): The photographs are shrunk to this shorter side, which leaves little of JPEG's artefacts.

    Returns:
        `int`: How many photographs there are.

    Raises:
        FileExistsError: if `output_dir` exists.
        FileNotFoundError: if a package lacks a photograph.
        ValueError: if a file is another than the one that was chosen.
    """
    with new_folder(output_dir) as unfinished:
        if packages_dir is None:
            packages_dir = unfinished.with_name("packages")
            packages_dir.mkdir()
            fetch_packages(packages_dir, sorted({photograph.package for photograph in TEST_PHOTOGRAPHS.values()}))
        packages_dir = Path(packages_dir)
        rows = [_write_test_photograph(name, packages_dir, unfinished, short_side) for name in TEST_PHOTOGRAPHS]
        write_metadata(unfinished, {"test": rows})
        write_credits(packages_dir, unfinished)
    return len(rows)


def _write_test_photograph(name: str, source: Path, folder: Path, short_side: int) -> dict[str, str]:
    photograph = TEST_PHOTOGRAPHS[name]
    path = source / photograph.package / photograph.path
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {source} must hold {photograph.package}, unpacked.")
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(photograph.sha256):
        raise ValueError(f"{path} is another file than the photograph of the test set: get it from Debian 12.")
    picture = load_image(path)
    scale = min(1.0, short_side / min(picture.size))
    sides = [round(side * scale) for side in picture.size]
    save_image(picture.resize(sides, Resampling.LANCZOS), folder / "test" / f"{name}.png")
    credit = {"author": photograph.author, "licence": photograph.licence, "source": photograph.package}
    return {"file_name": f"{name}.png", "text": name} | credit


def _package_folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None:
        raise ImportError('The held-out photographs need `pip install "diffusers_pq[eval]"`.')
    return Path(spec.origin).parent
