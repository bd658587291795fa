"""Turn four open sets of emoji into a captioned, credited image dataset: the same subjects, each in four styles."""

import io
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import PIL.Image
from PIL import ImageOps
from PIL.Image import Image, Resampling
from tqdm import tqdm

from .data_preparation import is_held_out, new_folder, run_tool, write_metadata
from .files import read_json
from .images import load_image, save_image, to_rgb


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmojiPackage:
    """A package of npm, the version that is fetched, and whom its content is to be credited to."""

    name: str
    version: str
    author: str
    home: str


STYLES = {
    "3d": EmojiPackage(
        "@lobehub/fluent-emoji-3d", "1.1.0", "Microsoft, LobeHub", "https://github.com/lobehub/fluent-emoji"
    ),
    "flat": EmojiPackage(
        "@iconify-json/fluent-emoji-flat", "1.2.6", "Microsoft", "https://github.com/microsoft/fluentui-emoji"
    ),
    "noto": EmojiPackage("@iconify-json/noto", "1.2.9", "Google", "https://github.com/googlefonts/noto-emoji"),
    "twemoji": EmojiPackage(
        "@iconify-json/twemoji", "1.2.5", "Twitter and contributors", "https://github.com/jdecked/twemoji"
    ),
}
NAMES = EmojiPackage("emoji-datasource", "16.0.0", "Cal Henderson", "https://github.com/iamcal/emoji-data")
# `noun` is the subject with its article.
CAPTIONS = (
    "{subject}, {style} style",
    "{noun}, {style} style",
    "{noun} in {style} style",
    "{style} style {subject}",
    "{style} emoji of {noun}",
)
SPLITS = ("train", "validation", "test")
# Left out: flags, of which there are 258 for learning nothing but flags, and the patches of skin colours.
_SKIPPED_GROUPS = ("Flags", "Component")
# In codes of emoji: emoji style, joiner, person, man, woman, female, male, facing right. What is left is the same for
# a firefighter of any sex, who is one motif as far as holding out is concerned.
_EMOJI_STYLE = "fe0f"
_VARIANTS = {_EMOJI_STYLE, "200d", "1f9d1", "1f468", "1f469", "2640", "2642", "27a1"}


@dataclass(frozen=True)
class Subject:
    """What an emoji shows: its code points, joined by dashes and without `fe0f`, its name and its group."""

    code: str
    name: str
    group: str

    @property
    def motif(self) -> str:
        """The code points without those that tell variants apart."""
        return "-".join(part for part in self.code.split("-") if part not in _VARIANTS) or self.code


def prepare_emoji(
    output_dir: str | os.PathLike,
    packages_dir: str | os.PathLike | None = None,
    side: int = 256,
    pair_share: float = 0.05,
    subject_share: float = 0.03,
) -> dict[str, int]:
    """
    Write a Hugging Face `imagefolder` dataset of emoji on white with the columns `image`, `text` (a list of captions,
    of which the training scripts draw one), `subject`, `style`, `group` and `source`. Flags and variants that differ
    in nothing but skin colour are left out.

    The split `validation` holds pairs of a subject and a style such that the subject is in `train` in another style,
    the split `test` subjects that are in no other split. The sides depend on nothing but the emoji's code, and all
    variants of an emoji (woman, man, facing right) are on the same.

    Args:
        output_dir: Written whole or not at all; must not exist.
        packages_dir (*optional*): A `node_modules` folder that holds the packages; `None` fetches them with npm.
        side (`int`): Side of the square pictures, in pixels; style `3d` comes with 256.
        pair_share (`float`): Share of the pairs in the split `validation`, in [0, 1).
        subject_share (`float`): Share of the subjects in the split `test`, in [0, 1).

    Returns:
        `dict[str, int]`: Pictures per split, and `skipped` for those that could not be read.

    Raises:
        FileExistsError: if `output_dir` exists.
        FileNotFoundError: if `packages_dir` lacks a package; the message says how to get it.
        ImportError: if resvg-py, which renders SVG, is not installed.
        OSError: if npm is missing or fails.
    """
    _renderer()
    with new_folder(output_dir) as unfinished:
        if packages_dir is None:
            packages_dir = fetch_npm_packages(unfinished.parent)
        packages_dir = Path(packages_dir)
        pictures = {style: _pictures_of(style, packages_dir, side) for style in STYLES}
        rows = {split: [] for split in SPLITS}
        skipped = 0
        for subject in tqdm(find_subjects(packages_dir), desc="Preparing emoji"):
            drawn = [style for style in STYLES if subject.code in pictures[style]]
            for style, split in split_styles(subject.motif, drawn, pair_share, subject_share).items():
                try:
                    picture = pictures[style][subject.code]()
                except ValueError as error:
                    logger.warning("Skipped %s in style %s: %s", subject.name, style, error)
                    skipped += 1
                    continue
                file_name = f"{subject.code}-{style}.png"
                save_image(picture, unfinished / split / file_name)
                rows[split].append(_row(file_name, subject, style))
        write_metadata(unfinished, rows)
        _write_credits(packages_dir, unfinished)
    return {split: len(lines) for split, lines in rows.items()} | {"skipped": skipped}


def fetch_npm_packages(folder: Path) -> Path:
    """Install the packages, without running scripts of theirs, into `folder/node_modules`, which is returned."""
    if shutil.which("npm") is None:
        raise OSError(
            f"npm is needed to fetch the emoji: install Node.js, or run `{_npm_command()}` elsewhere and give its "
            "`node_modules` as --packages-dir."
        )
    run_tool(*_npm_command("--ignore-scripts", "--no-audit", "--no-fund", "--prefix", ".").split(), folder=folder)
    return folder / "node_modules"


def _npm_command(*flags: str) -> str:
    packages = [f"{package.name}@{package.version}" for package in (*STYLES.values(), NAMES)]
    return " ".join(["npm", "install", *flags, *packages])


def find_subjects(packages_dir: Path) -> list[Subject]:
    """
    The emoji of `emoji-datasource` that are not flags, without skin colours, in its order.

    They are called as in the set `noto`, which has Unicode's current short names ("red heart"), since the formal ones
    of `emoji-datasource` ("heavy black heart") can say what is not to be seen.
    """
    short_names = _names_by_code(_package_folder(packages_dir, STYLES["noto"]))
    emoji = read_json(_package_folder(packages_dir, NAMES) / "emoji.json", list)
    subjects = []
    for one in emoji:
        if one["category"] in _SKIPPED_GROUPS:
            continue
        code = _plain(one["unified"])
        name = short_names.get(code, one["name"].lower()).replace("-", " ")
        subjects.append(Subject(code, name, one["category"]))
    return subjects


def split_styles(motif: str, styles: Collection[str], pair_share: float, subject_share: float) -> dict[str, str]:
    """
    The split of each style in which a motif is drawn: all `"test"`, or `"validation"` for those that are held out
    while another is in `"train"`.
    """
    if is_held_out(motif, subject_share):
        return dict.fromkeys(styles, "test")
    held_out = {style for style in styles if is_held_out(f"{motif}/{style}", pair_share)}
    if len(held_out) == len(styles):
        held_out = set()
    return {style: "validation" if style in held_out else "train" for style in styles}


def captions(subject: str, style: str) -> list[str]:
    """All captions of a subject in a style."""
    is_plural = subject.endswith("s") and not subject.endswith(("ss", "us", "is"))
    article = "" if is_plural else "an " if subject[0] in "aeiou" else "a "
    return [caption.format(subject=subject, noun=article + subject, style=style) for caption in CAPTIONS]


def _row(file_name: str, subject: Subject, style: str) -> dict:
    texts = captions(subject.name, style)
    about = {"subject": subject.name, "style": style, "group": subject.group, "source": STYLES[style].name}
    return {"file_name": file_name, "text": texts} | about


def _plain(code: str) -> str:
    return "-".join(part for part in code.lower().split("-") if part != _EMOJI_STYLE)


def _package_folder(packages_dir: Path, package: EmojiPackage) -> Path:
    folder = packages_dir / package.name
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is missing: --packages-dir must be the `node_modules` that `{_npm_command()}` makes."
        )
    return folder


def _names_by_code(folder: Path) -> dict[str, str]:
    return {_plain(code): name for code, name in read_json(folder / "chars.json", dict).items()}


def _pictures_of(style: str, packages_dir: Path, side: int) -> dict[str, Callable[[], Image]]:
    """By the codes of a style's emoji: what makes the picture, a square, when it is called."""
    folder = _package_folder(packages_dir, STYLES[style])
    if (folder / "icons.json").is_file():
        return dict(_icons(folder, side))
    return {_plain(path.stem): partial(_load, path, side) for path in (folder / "assets").glob("*.webp")}


def _icons(folder: Path, side: int) -> Iterator[tuple[str, Callable[[], Image]]]:
    """The icons of a set in Iconify's JSON format, in which an icon's size is the set's unless it says otherwise."""
    icons = read_json(folder / "icons.json", dict)
    for code, name in _names_by_code(folder).items():
        if name in icons["icons"]:
            yield code, partial(_render, {"width": 16, "height": 16} | icons | icons["icons"][name], side)


def _load(path: Path, side: int) -> Image:
    return ImageOps.pad(load_image(path), (side, side), Resampling.LANCZOS, "white")


def _render(icon: dict, side: int) -> Image:
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{side}" height="{side}" viewBox="0 0 {icon["width"]} {icon["height"]}">{icon["body"]}</svg>'
    )
    png = _renderer().svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    return to_rgb(PIL.Image.open(io.BytesIO(png)))


def _renderer():
    try:
        import resvg_py
    except ImportError as error:
        raise ImportError('The emoji are drawn by resvg-py: `pip install "diffusers_pq[emoji]"`.') from error
    return resvg_py


def _write_credits(packages_dir: Path, folder: Path):
    """Put authors, licences and what was changed into `CREDITS.txt` of a folder."""
    parts = ["The pictures come from these packages of npm. They were put on white and resized.\n"]
    for package in (*STYLES.values(), NAMES):
        source = _package_folder(packages_dir, package)
        about = read_json(source / "package.json", dict)
        parts.append(f"\n# {package.name} {about.get('version')}\n\nAuthor: {package.author}, {package.home}\n")
        parts.append(f"Licence: {about.get('license')}\n")
        parts.extend(f"\n{path.read_text(encoding='utf-8')}\n" for path in sorted(source.glob("LICENSE*")))
    (folder / "CREDITS.txt").write_text("".join(parts), encoding="utf-8")
