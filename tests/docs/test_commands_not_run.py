"""Commands of pages that `test_page_commands` does not run have options, targets and files that exist."""

import re
import shlex
import subprocess
import tomllib

import pytest

from tests.docs.page_commands import PROGRAM, steps
from tests.docs.reading import PAGES, ROOT, blocks, command_lines, name
from tests.docs.test_page_commands import RUNNABLE, TESTED_ELSEWHERE, is_run

STEPS = [
    (name(page), step)
    for page in PAGES
    if name(page) not in TESTED_ELSEWHERE
    for step in steps(page)
    if not is_run(step)
]
ONLY_EXPLAINED = (
    "git ",
    "docker run",
    "helm ",
    "#!/bin/bash",
)
TEXT_BLOCKS = {  # commands in blocks that are not extracted: why
    "docker run -v /srv/weights/torch:/cache/torch -e TORCH_HOME=/cache/torch ...": "a part of a command",
    "curl --data-binary @photo.jpg 'http://127.0.0.1:8000/v1/classify?explain=1'": "needs a bundle with maps",
    "curl --data-binary @photo.jpg http://127.0.0.1:8000/v1/embed": "needs a bundle with features",
}


def problem_with(page: str, step: str) -> str | None:
    """Describe why *step* of *page* cannot work: an unknown option, target, extra or file."""
    words = shlex.split(step, comments=True)
    if words[0] == "python":
        code = "".join(
            (ROOT / path).read_text(encoding="utf-8") for path in (words[1], "benchmarks/measure.py")
        )
        options = [word for word in (w.strip("[]") for w in words[2:]) if word.startswith("--")]
        return next((option for option in options if f'"{option}"' not in code), None)
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = [word for word in words[1:] if "=" not in word]
        return next((one for one in targets if not re.search(rf"^{one}:", makefile, re.MULTILINE)), None)
    if words[0] == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        extras = ",".join(re.findall(r"(?:sopdeploy|\.)\[([\w,-]+)\]", step)).split(",")
        return next((one for one in extras if one not in project["optional-dependencies"]), None)
    if words[:2] == ["docker", "build"]:
        stage = words[words.index("--target") + 1]
        known = re.findall(
            r"^FROM .* AS (\S+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE
        )
        return None if stage in known else stage
    parsed = command_lines(ROOT / page)  # `test_commands` parses them with the parser of the command line
    found = any(line == words[-len(line) :] for line in parsed if line)
    return None if found else f"{step}: not parsed"


@pytest.mark.parametrize(("page", "step"), [one for one in STEPS if not one[1].startswith(ONLY_EXPLAINED)])
def test_a_command_that_is_not_run_has_options_that_exist(page: str, step: str) -> None:
    assert problem_with(page, step) is None


def test_scripts_that_are_not_run_have_correct_syntax() -> None:
    scripts = [block for page in PAGES for block in blocks(page, "bash")]
    assert scripts
    for script in scripts:
        subprocess.run(["/bin/bash", "-n", "-c", script], check=True)


def test_no_command_hides_in_a_block_of_text() -> None:
    """Blocks without a language show output; the lines after `$` repeat commands of another block or page."""
    every = {re.sub(r"\s+#.*", "", step) for page in PAGES for step in steps(page)}
    for page in RUNNABLE.values():
        found = [
            line
            for language in ("", "text")
            for block in blocks(page, language)
            for line in block.splitlines()
        ]
        typed = [line.removeprefix("$ ") for line in found if line.startswith("$ ") or PROGRAM.match(line)]
        assert [line for line in typed if line not in every | TEXT_BLOCKS.keys()] == [], name(page)


UNITS = r"(?:%|GB|MB|images/s|minutes|ms|points|seconds|times)"


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_every_measured_number_of_the_first_pages_is_on_the_page_of_measurements(page: str) -> None:
    text = re.sub(
        r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    numbers = set(re.findall(rf"\d[\d.,]*(?: to \d+)? {UNITS}(?!\w)", re.sub(r"`[^`]*`", "", text)))
    definitions = {"16 times", "4 times"} if page == "README.md" else set()  # of tolerances and of a layer
    stated = (ROOT / "docs" / "benchmarks" / "index.md").read_text(encoding="utf-8")
    assert [number for number in sorted(numbers - definitions) if number not in stated] == []
