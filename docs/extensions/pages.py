"""
Puts the pages of the repository that lie outside docs/ on the site: README.md as its front page, and the READMEs of
folders. Links and pictures, in Markdown or HTML, stay as they are in the repository, where GitHub follows them. Here
they are turned for the site.
"""

import os
import re
from functools import partial
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parent.parent.parent
PAGES = ("README.md", "training_scripts/README.md", "benchmarks/README.md", "experiments/README.md")

# What a link of Markdown or an attribute of HTML leads to, but for other sites and places on the same page.
_LINK = re.compile(r"""(\]\(|<(?:img|a)\b[^>]*?\b(?:src|href)=["'])(?!\w+:|#)([^)"'#\s]+)""")


def on_files(files: Files, config: MkDocsConfig):
    for path in PAGES:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for file in list(files.documentation_pages()):
        for _, link in _LINK.findall(file.content_string):
            path = _in_repository(file, link)
            if (ROOT / path).is_file() and files.get_file_from_path(_on_site(path)) is None:
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return _LINK.sub(partial(_turn, page.file), markdown)


def _turn(file: File, match: re.Match) -> str:
    target = _on_site(_in_repository(file, match[2]))
    return match[1] + os.path.relpath(target, PurePosixPath(file.src_uri).parent)


def _in_repository(file: File, link: str) -> str:
    page = file.src_uri if file.src_uri in PAGES else f"docs/{file.src_uri}"
    return os.path.normpath(PurePosixPath(page).parent / link)


def _on_site(path: str) -> str:
    return path.removeprefix("docs/")
