"""Turn Debian's wallpapers and Tux Paint stamps into a captioned, credited image dataset."""

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from PIL import ImageOps
from PIL.Image import Image, Resampling
from tqdm import tqdm

from .files import check_new
from .images import load_image, save_image


logger = logging.getLogger(__name__)

PACKAGES = (
    "tuxpaint-stamps-default",
    "plasma-workspace-wallpapers",
    "gnome-backgrounds",
    "mate-backgrounds",
    "ukui-wallpapers",
)
SPLITS = ("motif", "file")
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
# Thumbnails of the wallpapers, not pictures of their own.
_SKIPPED_NAMES = {"screenshot", "preview"}
# What files of one motif differ in, at the end of their names: resolution, day and night, mirroring, language.
_VARIANT = re.compile(
    r"[-_ ](\d{3,5}x\d{3,5}|l|d|light|dark|day|night|mirror|flip|[a-z]{2}([-_][a-z]{2})?)$", re.IGNORECASE
)
_SIGNATURE_SIDE = 16
# Correlation of two signatures from which on pictures are one motif. Pictures of other motifs hardly reach 0.9.
_ALIKE = 0.95
_FLAT = 2.0  # standard deviation, of 255 levels, below which there is nothing to compare


@dataclass
class SourcePicture:
    """A picture file, its motif's name, its caption, its category and the package that its licence is stated in."""

    path: Path
    motif: str
    text: str
    category: str
    package: str


def fetch_packages(folder: Path, packages: Sequence[str] = PACKAGES):
    """Download and unpack Debian packages into `folder/<package>` with apt; those already there are kept."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise OSError(
                f"{tool} is needed to fetch the pictures. On other systems unpack the packages and give "
                "--packages-dir."
            )
    for package in packages:
        if (folder / package).is_dir():
            continue
        with tempfile.TemporaryDirectory(dir=folder) as download:
            run_tool("apt-get", "download", package, folder=download)
            (archive,) = Path(download).glob("*.deb")
            run_tool("dpkg-deb", "-x", archive.name, "unpacked", folder=download)
            os.replace(Path(download, "unpacked"), folder / package)


def run_tool(*command: str, folder: str | os.PathLike):
    """
    Run a program in a folder.

    Raises:
        OSError: if it fails; the message contains its last output.
    """
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().rpartition("\n")[2]
        raise OSError(f"`{' '.join(command)}` failed: {reason or f'exit status {done.returncode}'}")


def find_pictures(folder: Path) -> Iterator[SourcePicture]:
    """
    The pictures below `folder`, in a fixed order, each motif once.

    The folder holds one unpacked Debian package in each sub-folder. A caption is line 1 of the `.txt` beside a stamp;
    a wallpaper is captioned by its name. The category of a stamp is its folder, such as `animals`.
    """
    for package in sorted(path for path in folder.iterdir() if path.is_dir()):
        motifs = {}
        for path in sorted(package.rglob("*")):
            if path.suffix.lower() not in _SUFFIXES or path.stem in _SKIPPED_NAMES or not path.is_file():
                continue
            motif = _motif(path)
            # Plasma ships one wallpaper in several sizes; the largest file is the one to keep.
            if motif not in motifs or path.stat().st_size > motifs[motif].stat().st_size:
                motifs[motif] = path
        for motif, path in sorted(motifs.items()):
            name = motif_name(Path(motif).name)
            yield SourcePicture(path, name, _caption(path, motif), _category(path), package.name)


def _motif(path: Path) -> str:
    if path.parent.name.startswith("images") and path.parent.parent.name == "contents":
        return str(path.parent.parent.parent)
    return str(path.with_suffix(""))


def _caption(path: Path, motif: str) -> str:
    text = path.with_suffix(".txt")
    if text.is_file():
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
        if lines and lines[0].strip():
            return lines[0].strip()
    words = re.sub(r"([a-z])([A-Z])", r"\1 \2", Path(motif).name)
    return re.sub(r"[-_]+", " ", words).strip()


def _category(path: Path) -> str:
    parts = path.parts
    return parts[parts.index("stamps") + 1] if "stamps" in parts[:-2] else "wallpapers"


def motif_name(stem: str) -> str:
    """A file's name without suffix and without resolution, `-l` or `-d`, `_mirror` and language, in small letters."""
    shorter = _VARIANT.sub("", stem)
    return stem.lower() if shorter == stem else motif_name(shorter)


def signature(picture: Image) -> np.ndarray:
    """
    What a picture looks like from afar, a perceptual hash: its colours on a grid of 16 x 16, without mean and
    contrast, so that the product of two is their correlation. Zero for a picture of one colour.
    """
    small = picture.resize((_SIGNATURE_SIDE, _SIGNATURE_SIDE), Resampling.BOX, reducing_gap=3.0)
    levels = np.asarray(small, np.float64)
    if (levels - levels.mean((0, 1))).std() < _FLAT:
        return np.zeros_like(levels)
    levels = levels - levels.mean()
    return levels / np.linalg.norm(levels)


def group_motifs(names: Sequence[str], signatures: np.ndarray) -> list[str]:
    """
    Which pictures show the same.

    Args:
        names (`Sequence[str]`): Of the pictures' motifs; the same name is the same motif.
        signatures (`np.ndarray` of shape `(N, 16, 16, 3)`): Pictures that are alike, mirrored or not, are the same
            motif, and so are all of one colour.

    Returns:
        `list[str]`: For each picture the first name, by the alphabet, of all that show the same.
    """
    groups = {name: name for name in names}

    def root(name):
        while groups[name] != name:
            name = groups[name]
        return name

    rows = signatures.reshape(len(names), -1)
    mirrored = signatures[:, :, ::-1].reshape(len(names), -1)
    is_flat = ~rows.any(1)
    alike = (np.maximum(rows @ rows.T, rows @ mirrored.T) >= _ALIKE) | np.outer(is_flat, is_flat)
    for one, other in zip(*np.triu(alike, 1).nonzero()):
        first, second = sorted((root(names[one]), root(names[other])))
        groups[second] = first
    return [root(name) for name in names]


def is_held_out(key: str, share: float) -> bool:
    """Whether what goes by this name belongs to the share that is held out; no other name has a say in it."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def _split_keys(pictures: list[SourcePicture], split_by: str) -> dict[int, str]:
    """By the number of each picture that can be read: what its side of the split depends on."""
    keys, signatures = {}, []
    for number, picture in enumerate(tqdm(pictures, desc="Comparing pictures")):
        try:
            image = load_image(picture.path)
        except ValueError as error:
            logger.warning("Skipped: %s", error)
            continue
        keys[number] = f"{picture.package}/{picture.path.name}" if split_by == "file" else picture.motif
        signatures.append(signature(image))
    if split_by == "file" or not keys:
        return keys
    return dict(zip(keys, group_motifs(list(keys.values()), np.stack(signatures))))


def prepare_dataset(
    output_dir: str | os.PathLike,
    packages_dir: str | os.PathLike | None = None,
    short_side: int = 512,
    validation_share: float = 0.05,
    tile_size: int | None = None,
    packages: Sequence[str] = PACKAGES,
    pad_to_square: bool = False,
    split_by: str = "motif",
) -> dict[str, int]:
    """
    Write a Hugging Face `imagefolder` dataset with the columns `image`, `text`, `category` and `source`.

    Args:
        output_dir: Written whole or not at all; must not exist.
        packages_dir (*optional*):
            A folder with an unpacked Debian package in each sub-folder; `None` fetches them with apt.
        short_side (`int`): Larger pictures are shrunk to this shorter side.
        validation_share (`float`): Share of the motifs in the validation split, in [0, 1).
        tile_size (`int`, *optional*): Cut pictures into tiles with sides from `tile_size` to below twice that, which
            share a caption. Random crops of the dataset then show large pictures as often as their area deserves.
        packages (`Sequence[str]`): The packages to take pictures from.
        pad_to_square (`bool`): Add white margins, so that a square crop shows all of a picture.
        split_by (`str`): `"motif"` keeps all variants of a picture on one side: by name, see [`motif_name`], and by
            looks, see [`group_motifs`]. `"file"` goes by file names, as for the models in `model_cards/`, and lets
            variants of training pictures into the validation split.

    Returns:
        `dict[str, int]`: Pictures (or tiles) per split, and `skipped` for those that could not be read.

    Raises:
        FileExistsError: if `output_dir` exists.
        ValueError: if no picture was found, or `split_by` is unknown.
    """
    if split_by not in SPLITS:
        raise ValueError(f"`split_by` must be one of {', '.join(SPLITS)}, but is {split_by!r}.")
    with new_folder(output_dir) as unfinished:
        if packages_dir is None:
            packages_dir = unfinished.with_name("packages")
            packages_dir.mkdir()
            fetch_packages(packages_dir, packages)
        pictures = [picture for picture in find_pictures(Path(packages_dir)) if picture.package in packages]
        keys = _split_keys(pictures, split_by)
        splits = {n: "validation" if is_held_out(key, validation_share) else "train" for n, key in keys.items()}
        counts = _write_dataset(pictures, splits, unfinished, short_side, tile_size, pad_to_square)
        if counts["train"] + counts["validation"] == 0:
            raise ValueError(
                f"No pictures found below {packages_dir}; it must hold unpacked packages: {', '.join(packages)}."
            )
        write_credits(Path(packages_dir), unfinished)
    return counts


@contextmanager
def new_folder(output_dir: str | os.PathLike) -> Iterator[Path]:
    """
    Gives a folder to write to, in an empty one that is removed in the end; `output_dir` becomes the former if no error
    is raised.

    Raises:
        FileExistsError: if `output_dir` exists.
    """
    output_dir = Path(output_dir)
    check_new(output_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent) as scratch:
        unfinished = Path(scratch, "dataset")
        unfinished.mkdir()
        yield unfinished
        os.replace(unfinished, output_dir)


def _tiles(image: Image, tile_size: int | None) -> Iterator[Image]:
    if tile_size is None:
        yield image
        return
    columns, rows = (max(1, side // tile_size) for side in image.size)
    for row, column in product(range(rows), range(columns)):
        left, right = (image.width * edge // columns for edge in (column, column + 1))
        top, bottom = (image.height * edge // rows for edge in (row, row + 1))
        yield image.crop((left, top, right, bottom))


def _write_dataset(
    pictures: list[SourcePicture],
    splits: dict[int, str],
    folder: Path,
    short_side: int,
    tile_size: int | None,
    pad_to_square: bool,
) -> dict[str, int]:
    rows = {"train": [], "validation": []}
    for number, split in tqdm(splits.items(), desc="Preparing pictures"):
        picture = pictures[number]
        image = load_image(picture.path)
        if pad_to_square:
            image = ImageOps.pad(image, [max(image.size)] * 2, color="white")
        scale = min(1.0, short_side / min(image.size))
        image = image.resize(
            [max(1, round(side * scale)) for side in image.size], Resampling.LANCZOS, reducing_gap=3.0
        )
        for tile_number, tile in enumerate(_tiles(image, tile_size)):
            file_name = f"{number:05d}.png" if tile_size is None else f"{number:05d}-{tile_number:03d}.png"
            save_image(tile, folder / split / file_name)
            line = {"file_name": file_name, "text": picture.text, "category": picture.category}
            rows[split].append(line | {"source": picture.package})
    write_metadata(folder, rows)
    return {split: len(lines) for split, lines in rows.items()} | {"skipped": len(pictures) - len(splits)}


def write_metadata(folder: Path, rows: dict[str, list[dict]]):
    """Write the `metadata.jsonl` of each split that has rows; a row names its picture as `file_name`."""
    for split, lines in rows.items():
        if lines:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (folder / split / "metadata.jsonl").write_text(text, encoding="utf-8")


def write_credits(source: Path, folder: Path):
    """Put what unpacked packages state about authors and licences into `CREDITS.txt` of a folder."""
    parts = ["The pictures come from these Debian packages; their authors and licences, as the packages state them:\n"]
    for copyright_file in sorted(source.glob("*/usr/share/doc/*/copyright")):
        text = copyright_file.read_text(encoding="utf-8", errors="replace")
        parts.append(f"\n# {copyright_file.parent.name}\n\n{text}")
    (folder / "CREDITS.txt").write_text("".join(parts), encoding="utf-8")
