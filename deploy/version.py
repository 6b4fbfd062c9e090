"""The version of sopdeploy: where it stands, and how it is raised everywhere at once.

`sopdeploy/__init__.py` is the one place that counts; the others are texts that cannot ask it.
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
FORM = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")


def parts(version: str) -> tuple[int, ...]:
    """Return the three numbers of *version*; raises `ValueError` where it is not of the form 1.2.3."""
    match = FORM.fullmatch(version)
    if match is None:
        raise ValueError(f"{version}: a version is three numbers, as in 1.2.3")
    return tuple(int(number) for number in match.groups())


def current(root: Path) -> str:
    """Return the version of the checkout at *root*; raises `ValueError` where none stands in `SOURCE`."""
    found = re.search(r'^__version__ = "(.*)"$', (root / SOURCE).read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise ValueError(f"{SOURCE}: no line `__version__ = ...`")
    return found[1]


def raised(root: Path, version: str) -> dict[str, str]:
    """Return the texts of all `PLACES` below *root* with *version* in them; raises `ValueError`."""
    old = current(root)
    texts = {}
    for name, forms in PLACES.items():
        text = (root / name).read_text(encoding="utf-8")
        for form in forms:
            if form.format(old) not in text:
                raise ValueError(f"{name}: does not say {form.format(old).strip()}")
            text = text.replace(form.format(old), form.format(version))
        texts[name] = text
    return texts
