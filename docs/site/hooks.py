"""Pages link to files of the repository that lie outside docs/; the site gets a copy of each.

So that a link is written once, as GitHub reads it: ``../csrc/README.md`` in ``docs/building.md`` is ``csrc/README.md``
of the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

LINK = re.compile(r"\]\((?P<target>(?:\.\./)+[^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the pages link to above docs/."""
    docs = Path(config.docs_dir)
    for page in list(files.documentation_pages()):
        for target in LINK.findall(page.content_string):
            path = (docs / page.src_uri).parent.joinpath(target).resolve()
            if path.is_file() and path.is_relative_to(docs.parent) and not path.is_relative_to(docs):
                uri = path.relative_to(docs.parent).as_posix()
                if files.get_file_from_path(uri) is None:
                    files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Shorten the links that climb above docs/ by that step."""
    above = "../" * (page.file.src_uri.count("/") + 1)

    def shorten(link: re.Match[str]) -> str:
        return link[0].replace("../", "", 1) if link["target"].startswith(above) else link[0]

    return LINK.sub(shorten, markdown)
