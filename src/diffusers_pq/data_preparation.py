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
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from PIL import ImageOps
from PIL.Image import Image, Resampling
from tqdm import tqdm

from .images import load_image, save_image


logger = logging.getLogger(__name__)

PACKAGES = (
    "tuxpaint-stamps-default",
    "plasma-workspace-wallpapers",
    "gnome-backgrounds",
    "mate-backgrounds",
    "ukui-wallpapers",
)
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
# Thumbnails of the wallpapers, not pictures of their own.
_SKIPPED_NAMES = {"screenshot", "preview"}


@dataclass
class SourcePicture:
    """A picture file, its caption, its category and the package that its licence is stated in."""

    path: Path
    text: str
    category: str
    package: str


def fetch_packages(folder: Path, packages: Sequence[str] = PACKAGES):
    """Download and unpack Debian packages into `folder/<package>` with apt; those already there are kept."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise OSError(
                f"{tool} is needed to fetch the pictures. On other systems unpack the packages and give --source."
            )
    for package in packages:
        if (folder / package).is_dir():
            continue
        with tempfile.TemporaryDirectory(dir=folder) as download:
            subprocess.run(["apt-get", "download", package], cwd=download, check=True, stdout=subprocess.DEVNULL)
            (archive,) = Path(download).glob("*.deb")
            unfinished = Path(download) / "unpacked"
            subprocess.run(["dpkg-deb", "-x", archive, unfinished], check=True)
            os.replace(unfinished, folder / package)


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
            yield SourcePicture(path, _caption(path, motif), _category(path), package.name)


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


def _is_validation(picture: SourcePicture, share: float) -> bool:
    # By name, not by position, so that a picture stays on its side when the packages change.
    digest = hashlib.sha256(f"{picture.package}/{picture.path.name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def prepare_dataset(
    output_dir: str | os.PathLike,
    source: str | os.PathLike | None = None,
    short_side: int = 512,
    validation_share: float = 0.05,
    tile_size: int | None = None,
    packages: Sequence[str] = PACKAGES,
    pad_to_square: bool = False,
) -> dict[str, int]:
    """
    Write a Hugging Face `imagefolder` dataset with the columns `image`, `text`, `category` and `source`.

    Args:
        output_dir: Written whole or not at all; must not exist.
        source (*optional*): A folder with an unpacked Debian package in each sub-folder; `None` fetches them with apt.
        short_side (`int`): Larger pictures are shrunk to this shorter side.
        validation_share (`float`): Share of the pictures in the validation split, in [0, 1).
        tile_size (`int`, *optional*): Cut pictures into tiles with sides from `tile_size` to below twice that, which
            share a caption. Random crops of the dataset then show large pictures as often as their area deserves.
        packages (`Sequence[str]`): The packages to take pictures from.
        pad_to_square (`bool`): Add white margins, so that a square crop shows all of a picture.

    Returns:
        `dict[str, int]`: Pictures (or tiles) per split, and `skipped` for those that could not be read.

    Raises:
        FileExistsError: if `output_dir` exists.
        ValueError: if no picture was found.
    """
    output_dir = Path(output_dir)
    if output_dir.exists():
        raise FileExistsError(f"{output_dir} exists already: choose another folder or remove it.")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent) as scratch:
        if source is None:
            fetched = Path(scratch) / "packages"
            fetched.mkdir()
            fetch_packages(fetched, packages)
            source = fetched
        unfinished = Path(scratch) / "dataset"
        pictures = [picture for picture in find_pictures(Path(source)) if picture.package in packages]
        counts = _write_dataset(pictures, unfinished, short_side, validation_share, tile_size, pad_to_square)
        if counts["train"] + counts["validation"] == 0:
            raise ValueError(
                f"No pictures found below {source}; it must hold unpacked packages: {', '.join(packages)}."
            )
        _write_credits(Path(source), unfinished)
        os.replace(unfinished, output_dir)
    return counts


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
    folder: Path,
    short_side: int,
    validation_share: float,
    tile_size: int | None,
    pad_to_square: bool,
) -> dict[str, int]:
    rows = {"train": [], "validation": []}
    skipped = 0
    for number, picture in enumerate(tqdm(pictures, desc="Preparing pictures")):
        try:
            image = load_image(picture.path)
        except ValueError as error:
            logger.warning("Skipped: %s", error)
            skipped += 1
            continue
        if pad_to_square:
            image = ImageOps.pad(image, [max(image.size)] * 2, color="white")
        split = "validation" if _is_validation(picture, validation_share) else "train"
        scale = min(1.0, short_side / min(image.size))
        image = image.resize(
            [max(1, round(side * scale)) for side in image.size], Resampling.LANCZOS, reducing_gap=3.0
        )
        for tile_number, tile in enumerate(_tiles(image, tile_size)):
            file_name = f"{number:05d}.png" if tile_size is None else f"{number:05d}-{tile_number:03d}.png"
            save_image(tile, folder / split / file_name)
            line = {"file_name": file_name, "text": picture.text, "category": picture.category}
            rows[split].append(line | {"source": picture.package})
    for split, lines in rows.items():
        if lines:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (folder / split / "metadata.jsonl").write_text(text, encoding="utf-8")
    return {split: len(lines) for split, lines in rows.items()} | {"skipped": skipped}


def _write_credits(source: Path, folder: Path):
    parts = ["The pictures come from these Debian packages; their authors and licences, as the packages state them:\n"]
    for copyright_file in sorted(source.glob("*/usr/share/doc/*/copyright")):
        text = copyright_file.read_text(encoding="utf-8", errors="replace")
        parts.append(f"\n# {copyright_file.parent.name}\n\n{text}")
    (folder / "CREDITS.txt").write_text("".join(parts), encoding="utf-8")
