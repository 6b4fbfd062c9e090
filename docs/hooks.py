"""Hooks of MkDocs: the search ranks guides first; linked files of the checkout are on the site; names
and options in code do not break."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LAST = "Measured"  # a tab of mkdocs.yml
# Factors of the search: pages that name everything come after the guides.
RANK = {
    "own-network.md": 2,
    "batch.md": 0.5,
    **dict.fromkeys(
        ("cli.md", "errors.md", "glossary.md", "models.md", "python.md", "settings.md"), 0.3
    ),
}
LINK = re.compile(
    r"(?<=\]\()\.\./([\w./-]+)(?=\))"
)  # to a folder above, perhaps to the checkout
NAME = re.compile(r"<code>([^\s<]{1,32})</code>")  # in the HTML of a page
BLOCK = re.compile(r"<pre>.*?</pre>", re.DOTALL)
OPTION = re.compile(r"(<[^>]*>)|(?<![\w-])(--?[a-zA-Z][\w-]*)")  # a tag, or an option


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Set the rank of *page* in the search, and put the files of the checkout that it links on the site."""
    is_last = any(section.title == LAST for section in page.ancestors)
    page.meta["search"] = {"boost": 0.01 if is_last else RANK.get(page.file.src_uri, 1)}
    source = Path(page.file.abs_src_path)
    pages = ROOT / "docs"

    def lead_to_copy(link: re.Match[str]) -> str:
        target = (source.parent / link[0]).resolve()
        if target.is_relative_to(pages) or not target.is_file():
            return link[0]

        # The folder `docs` is the root of the site. Only pages of `docs` are converted to HTML.
        place = link[1] + (".txt" if target.suffix == ".md" else "")
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, abs_src_path=str(target)))
        return place

    return LINK.sub(lead_to_copy, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Mark short names in code and the options of commands: a browser would break them after each hyphen."""
    html = NAME.sub(r'<code class="name">\1</code>', html)
    return BLOCK.sub(lambda block: OPTION.sub(_mark_option, block[0]), html)


def _mark_option(match: re.Match[str]) -> str:
    return match[1] or f'<span class="name">{match[2]}</span>'
