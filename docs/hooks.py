"""Hooks of MkDocs: the search ranks how-to pages first; linked files of `deploy/` are on the site."""

import re
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LAST = "Research notes"  # a tab of mkdocs.yml
LINK = re.compile(r"\]\(\.\./(deploy/[\w./-]+)\)")  # from a page in docs/ to the checkout

linked: set[str] = set()


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Set the rank of *page* in the search, and replace links to files of `deploy/`."""
    if any(section.title == LAST for section in page.ancestors):
        page.meta["search"] = {"boost": 0.01}
    elif page.file.src_uri.startswith("howto/"):
        page.meta["search"] = {"boost": 2}
    linked.update(LINK.findall(markdown))
    return LINK.sub(r"](\1)", markdown)


def on_post_build(config: Any) -> None:
    """Copy the linked files."""
    for file in linked:
        target = Path(config.site_dir, file)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, target)
