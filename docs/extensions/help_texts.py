"""Fills the page `api/command_line.md` with the `--help` of every command and training script."""

import io
import os
import re
import runpy
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from diffusers_pq.cli import main


SCRIPTS = Path(__file__).parent.parent.parent / "training_scripts"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.src_uri == "api/command_line.md":
        markdown = markdown.replace("<!-- help of diffusers-pq -->", _commands())
        markdown = markdown.replace("<!-- help of training_scripts -->", _scripts())
    return markdown


def _commands() -> str:
    names = re.search(r"\{(.+?)\}", _help(main, "diffusers-pq"))[1].split(",")
    return "\n".join(_section(f"diffusers-pq {name}", _help(main, "diffusers-pq", name)) for name in names)


def _scripts() -> str:
    parsers = {path.name: runpy.run_path(str(path))["parse_args"] for path in sorted(SCRIPTS.glob("*.py"))}
    return "\n".join(_section(name, _help(parse, name)) for name, parse in parsers.items())


def _section(title: str, text: str) -> str:
    return f"### `{title}`\n\n```text\n{text}```\n"


def _help(parse: Callable, program: str, *arguments: str) -> str:
    os.environ["COLUMNS"] = "80"
    with redirect_stdout(io.StringIO()) as printed:
        try:
            parse([*arguments, "--help"])
        except SystemExit:
            return re.sub(r"usage: \S+", f"usage: {program}", printed.getvalue(), count=1)
