"""A hook of MkDocs: the site's search finds research notes last."""

from typing import Any

LAST = "Research notes"  # a tab of mkdocs.yml
BOOST = 0.01


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lower the rank of the pages below the tab `LAST`; return *markdown* unchanged."""
    if any(section.title == LAST for section in page.ancestors):
        page.meta.setdefault("search", {})["boost"] = BOOST
    return markdown
