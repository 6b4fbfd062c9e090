"""Read and raise the version of sopdeploy, and create its section of CHANGELOG.md.

`sopdeploy/__init__.py` defines the version. The other files cannot import it and are updated together.
"""

import re
from pathlib import Path

SOURCE = "sopdeploy/__init__.py"
PLACES = {
    SOURCE: ('__version__ = "{}"',),
    "Dockerfile": ("ARG VERSION={}\n",),
    "compose.yaml": ("image: sopdeploy:{}\n",),
    "deploy/helm/sopdeploy/Chart.yaml": ("\nversion: {}\n", "appVersion: {}\n"),
    "deploy/helm/sopdeploy/values.yaml": ("tag: {}\n",),
    "deploy/kserve/runtime.yaml": ("image: sopdeploy:{}\n",),
    "deploy/kubernetes/sopdeploy.yaml": ("image: sopdeploy:{}\n",),
    "docs/deploy.md": ("sopdeploy:{}",),
}
FORMAT = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")
CHANGELOG = "CHANGELOG.md"
UNRELEASED = re.compile(r"^## \[Unreleased\]\n", re.MULTILINE)


def parse_version(version: str) -> tuple[int, ...]:
    """Split *version* into its three numbers; raises `ValueError` for another format than 1.2.3."""
    match = FORMAT.fullmatch(version)
    if match is None:
        raise ValueError(f"{version}: a version consists of three numbers, such as 1.2.3")
    return tuple(int(number) for number in match.groups())


def current_version(root: Path) -> str:
    """Read the version of the checkout at *root*; raises `ValueError` if `SOURCE` defines none."""
    match = re.search(r'^__version__ = "(.*)"$', (root / SOURCE).read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise ValueError(f"{SOURCE}: no line `__version__ = ...`")
    return match[1]


def with_version(root: Path, version: str) -> dict[str, str]:
    """Build the texts of all `PLACES` with *version*; raises `ValueError` if one lacks the old one."""
    current = current_version(root)
    texts = {}
    for name, formats in PLACES.items():
        text = (root / name).read_text(encoding="utf-8")
        for format_ in formats:
            if format_.format(current) not in text:
                raise ValueError(f"{name}: does not contain {format_.format(current).strip()}")
            text = text.replace(format_.format(current), format_.format(version))
        texts[name] = text
    return texts


def with_release(changelog: str, version: str, date: str) -> str:
    """Move the unreleased entries of *changelog* into a section for *version* with the ISO *date*.

    Raises `ValueError` if there are no unreleased entries.
    """
    heading = UNRELEASED.search(changelog)
    if heading is None:
        raise ValueError(f"{CHANGELOG}: no line `## [Unreleased]`")
    section = re.split(r"^## ", changelog[heading.end() :], maxsplit=1, flags=re.MULTILINE)[0]
    if not re.search(r"^- ", section, re.MULTILINE):
        raise ValueError(f"{CHANGELOG}: no entries under [Unreleased]; add one line per change for users")
    return UNRELEASED.sub(f"## [Unreleased]\n\n## [{version}] - {date}\n", changelog, count=1)
