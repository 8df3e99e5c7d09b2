"""The hook of mkdocs.yml: a link of docs/ works on the site as it does in the repository.

A page may link to a file outside docs/. The site has it under repository/, with the files that it links to in turn.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
LINK_OR_CODE = re.compile(
    r"^ *```.*?^ *```$|`[^`\n]*`|\]\((?P<path>[^)\s:#]+)(?P<heading>#[^)\s]*)?\)", re.MULTILINE | re.DOTALL
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    ahead = [Path(str(file.abs_src_path)) for file in files.documentation_pages()]
    while ahead:
        page = ahead.pop()
        for link in LINK_OR_CODE.finditer(page.read_text(encoding="utf-8")):
            target = page.parent / (link["path"] or ".")
            uri = _uri(target)
            if target.is_file() and uri not in files.src_uris:
                files.append(File.generated(config, uri, abs_src_path=str(target.resolve())))
                ahead.extend([target.resolve()] if target.suffix == ".md" else [])
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    folder = Path(str(page.file.abs_src_path)).parent

    def rewritten(link: re.Match[str]) -> str:
        if link["path"] is None:
            return link[0]
        path = os.path.relpath(_uri(folder / link["path"]), os.path.dirname(page.file.src_uri) or ".")  # noqa: PTH120
        return f"]({path}{link['heading'] or ''})"

    return LINK_OR_CODE.sub(rewritten, markdown)


def _uri(path: Path) -> str:
    """Where the site has a file of the repository."""
    path = path.resolve()
    return str(path.relative_to(DOCS) if path.is_relative_to(DOCS) else Path("repository") / path.relative_to(ROOT))
