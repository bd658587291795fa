"""
Runs the Python blocks of README.md and the guides, parses (or runs, where it is cheap) the commands of the shell
blocks, and builds the site.

The blocks of a page share their variables and a folder with `photo.jpg`, the model cards and two small pipelines. A
block after `<!-- skip: next "reason" -->` is not run.
"""

import functools
import re
import runpy
import shlex
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import PIL.Image
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from conftest import tiny_unet
from mkdocs.commands.build import build
from mkdocs.config import load_config
from skimage.data import coffee
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

import diffusers_pq
from diffusers_pq.autoencoders import load_autoencoder
from diffusers_pq.cli import _build_parser, main
from diffusers_pq.training.stable_diffusion import create_stable_diffusion, train_clip_tokenizer


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "training_scripts" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CHEAP = ("reconstruct", "compress", "decompress")


def check_shell_block(example):
    for line in example.parsed.replace("\\\n", "").splitlines():
        program, *arguments = shlex.split(line, comments=True) or ("",)
        if program:
            COMMANDS[Path(program).name](arguments)


def check_diffusers_pq(arguments):
    command = _build_parser().parse_args(arguments).command
    assert command not in CHEAP or main(arguments) == 0


def check_accelerate(arguments):
    if arguments == ["config"]:
        return
    assert arguments[0] == "launch"
    launch = launch_command_parser().parse_args(arguments[1:])
    check_python([launch.training_script, *launch.training_script_args])


def check_python(arguments):
    script, *arguments = arguments
    runpy.run_path(script)["parse_args"](arguments)


def check_make(arguments):
    subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def check_nothing(arguments):
    """Programs of others."""


COMMANDS = {
    "diffusers-pq": check_diffusers_pq,
    "accelerate": check_accelerate,
    "python": check_python,
    "make": check_make,
    "pip": check_nothing,
    "tensorboard": check_nothing,
    "hf": check_nothing,
}
SYBIL = Sybil([PythonCodeBlockParser(), CodeBlockParser("bash", check_shell_block), SkipParser()])
BLOCKS = [block for page in PAGES for block in SYBIL.parse(page)]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """The first of what `make train-pqsd-mini` writes, with a smaller UNet and untrained."""
    runs = tmp_path_factory.mktemp("pipelines") / "runs"
    torch.manual_seed(0)
    unet = {name: value for name, value in tiny_unet(4).config.items() if not name.startswith("_")}
    for name in ("in_channels", "out_channels", "cross_attention_dim"):
        del unet[name]
    text_encoder = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = train_clip_tokenizer(["a red apple", "a green apple"], 530, 8)
    vae = load_autoencoder(str(ROOT / "model_cards" / "pqgan-mini-f8-kl"))
    pipeline = create_stable_diffusion(vae, tokenizer, unet, text_encoder, "v_prediction")
    pipeline.save_pretrained(runs / "sd-mini")
    for name in ("pq", "vq", "kl"):  # which a command looks for before it compares them
        (runs / f"ldm-mini-{name}").mkdir()
    return runs


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, pipelines):
    """Makes the folder of a page."""

    @functools.cache
    def make(page):
        folder = tmp_path_factory.mktemp("page")
        PIL.Image.fromarray(coffee()).crop((0, 0, 203, 150)).save(folder / "photo.jpg")
        (folder / "runs").symlink_to(pipelines)
        for name in ("model_cards", "training_scripts", "benchmarks", "experiments"):
            (folder / name).symlink_to(ROOT / name)
        return folder

    return make


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{Path(block.path).relative_to(ROOT)}:{block.line}")
def test_blocks_of_the_pages_work(block, folder_of, monkeypatch):
    monkeypatch.chdir(folder_of(block.path))
    # Commands for a GPU are only parsed.
    monkeypatch.setattr("diffusers_pq.devices.usable_device", lambda name: name)
    block.evaluate()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """As `make docs` builds it: a warning is an error."""
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path_factory.mktemp("site")), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return Path(config.site_dir)


class Links(HTMLParser):
    """What a page of the site leads to or shows, and the places on it that others lead to."""

    def __init__(self, page):
        super().__init__()
        self.links, self.places = [], set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.places.add(attributes.get("id"))
        self.links += [attributes[name] for name in ("href", "src") if attributes.get(name)]


def dead_links(site):
    pages = {page: Links(page) for page in site.rglob("*.html") if page.name != "404.html"}
    for page, found in pages.items():
        for link in map(urlsplit, found.links):
            target = (page.parent / unquote(link.path)).resolve() if link.path else page
            target = target / "index.html" if target.is_dir() else target
            known = target in pages and link.fragment not in pages[target].places
            if not (link.scheme or link.netloc) and (not target.is_file() or (link.fragment and known)):
                yield f"{page.relative_to(site)}: {link.geturl()}"


def test_every_link_and_picture_of_the_site_is_there(site):
    assert (site / "benchmarks" / "results" / "overview.jpg").is_file()
    assert list(dead_links(site)) == []


def test_a_dead_link_of_the_site_is_found(tmp_path):
    (tmp_path / "index.html").write_text('<img src="a.png"><a href="#b"></a><a href="c/#d"></a><a href="c/"></a>')
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "index.html").write_text('<p id="e"><a href="..#b"></a><a href="https://example.org/x"></a></p>')
    assert set(dead_links(tmp_path)) == {
        "index.html: a.png",
        "index.html: #b",
        "index.html: c/#d",
        "c/index.html: ..#b",
    }


def test_pictures_in_html_are_taken_to_the_site():
    pages = runpy.run_path(str(ROOT / "docs" / "extensions" / "pages.py"))
    html = '<a href="docs/sweep.md#time"><img width="420" src="benchmarks/results/overview.jpg"></a> <a href="#here">'
    assert [link for _, link in pages["_LINK"].findall(html)] == ["docs/sweep.md", "benchmarks/results/overview.jpg"]


def test_the_site_has_every_public_name_with_its_shapes(site):
    pages = "".join(page.read_text() for page in site.glob("api/*/index.html"))
    own = {name for name, module in diffusers_pq._PUBLIC.items() if module.startswith(".")}
    assert own <= set(re.findall(r'<h2 id="diffusers_pq\.(\w+)"', pages))
    assert "Of shape <code>(batch_size, in_channels, height, width)</code>" in pages
    assert "[<code>" not in pages, "a reference of a docstring is not a link"


def test_the_site_has_the_flags_of_every_script(site):
    page = (site / "api" / "command_line" / "index.html").read_text()
    for script in (ROOT / "training_scripts").glob("*.py"):
        assert f"usage: {script.name}" in page
    assert "usage: diffusers-pq compress" in page
