"""Run the default tests in other surroundings than those in which they were written: `make elsewhere`.

    python deploy/elsewhere.py [--only NAME,NAME] [--workers N] [--list] [--write docs/elsewhere.md]

A journey is one run of the tests in several surroundings at once. If tests fail there, they run
again in each of these surroundings alone and in none of them, so that the table names what they
depend on. Surroundings that this machine cannot provide are rows, too, with the reason.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from sopdeploy.environment import processor, usable_cores

ROOT = Path(__file__).parents[1]
# One worker more than cores: many tests wait for servers and processes.
WORKERS = usable_cores() + 1
# ends with this program
BURN = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
OTHER_USER = 65534  # nobody
TURKISH = "tr_TR.UTF-8"  # where "I".lower() of the system is not "i"
OTHER_FILE_SYSTEM = Path("/dev/shm")  # noqa: S108 # memory, on Linux
WITHOUT_NETWORK = 'ip link set lo up && exec "$@"'
WITHOUT_IPV6 = 'echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6; exec "$@"'
NEWER = "avx512|avx_vnni|vnni|amx|bf16"
HIDE_FEATURES = (
    f'sed -E "s/ [a-z0-9_]*({NEWER})[a-z0-9_]*//g" /proc/cpuinfo > "$1" '
    '&& mount --bind "$1" /proc/cpuinfo && shift && exec "$@"'
)


class UnavailableError(Exception):
    """These surroundings do not exist on this machine; the message says why."""


@dataclass
class Process:
    """How the tests are started: in `folder` by `python`, with `prefix` before the command."""

    folder: Path = ROOT
    python: Path = Path(sys.executable)
    prefix: list[str] = field(default_factory=list)
    environment: dict[str, str | None] = field(default_factory=dict)  # None removes a variable
    options: list[str] = field(default_factory=list)  # of pytest
    alone: bool = False  # every file in a process of its own

    def command(self, *arguments: str) -> list[str]:
        """Build the command that runs pytest with *arguments*."""
        return [*self.prefix, str(self.python), "-m", "pytest", *self.options, *arguments]

    def variables(self) -> dict[str, str]:
        """Return the environment of the command."""
        merged = {
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            **os.environ,
            **self.environment,
        }
        return {name: text for name, text in merged.items() if text is not None}


Enter = Callable[[Process, ExitStack], Process]


@dataclass(frozen=True)
class Surroundings:
    """A row of the table; `enter` changes how the tests are started."""

    name: str
    enter: Enter


def needs(*programs: str) -> None:
    """Raise `UnavailableError` unless all *programs* are installed."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        raise UnavailableError(f"{', '.join(missing)} not installed")


def succeeds(*command: str) -> bool:
    """Run *command* without output; check that it exits with 0."""
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def variables(name: str, **values: str | None) -> Surroundings:
    """Build surroundings that set or, with None, remove environment variables."""
    return Surroundings(
        name, lambda process, _: replace(process, environment={**process.environment, **values})
    )


def shell(process: Process, script: str, *arguments: str, unshare: str = "") -> Process:
    """Run *script* before the command, in new namespaces of the kinds *unshare*; it ends with `exec "$@"`."""
    prefix = ["sh", "-c", script, "sh", *arguments]
    if unshare:
        needs("unshare")
        kinds = [f"--{kind}" for kind in unshare.split()]
        if not succeeds("unshare", *kinds, "true"):
            raise UnavailableError(f"this user cannot create namespaces ({unshare})")
        prefix = ["unshare", *kinds, *prefix]
    return replace(process, prefix=[*process.prefix, *prefix])


def temporary(stack: ExitStack, parent: Path | None = None) -> Path:
    """Create a folder that every user can read, deleted at the end."""
    folder = Path(
        stack.enter_context(tempfile.TemporaryDirectory(prefix="elsewhere-", dir=parent))
    )
    folder.chmod(0o755)
    return folder


def without_vnni(process: Process, stack: ExitStack) -> Process:
    """Hide AVX-512, VNNI and what is newer in the file by which the product knows the processor."""
    if not Path("/proc/cpuinfo").is_file():
        raise UnavailableError("no /proc/cpuinfo")
    return shell(process, HIDE_FEATURES, str(temporary(stack) / "cpuinfo"), unshare="mount")


def other_locale(process: Process, stack: ExitStack) -> Process:
    """Compile the Turkish locale and use it for everything."""
    needs("localedef")
    folder = temporary(stack)
    if not succeeds("localedef", "-i", "tr_TR", "-f", "UTF-8", str(folder / TURKISH)):
        raise UnavailableError("the sources of locales are not installed")
    return replace(
        process, environment={**process.environment, "LOCPATH": str(folder), "LC_ALL": TURKISH}
    )


def later(process: Process, stack: ExitStack) -> Process:
    """Set the clock ahead by 400 days. Intervals stay true; the times of files are those of the kernel."""
    needs("cc")
    library = temporary(stack) / "clock.so"
    source = Path(__file__).with_name("clock.c")
    if not succeeds("cc", "-O1", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"):
        raise UnavailableError("clock.c cannot be compiled")
    options = [*process.options, "-m", "not browser and not file_times"]
    environment = {**process.environment, "LD_PRELOAD": str(library)}
    return replace(process, options=options, environment=environment)


def one_core(process: Process, _: ExitStack) -> Process:
    """Leave the first core to the tests."""
    needs("taskset")
    first = str(min(os.sched_getaffinity(0)))
    return replace(process, prefix=[*process.prefix, "taskset", "-c", first])


def busy(process: Process, stack: ExitStack) -> Process:
    """Burn the first core, which the tests then share."""
    needs("taskset")
    first = str(min(os.sched_getaffinity(0)))
    burner = subprocess.Popen(["taskset", "-c", first, sys.executable, "-c", BURN])
    stack.callback(burner.wait)
    stack.callback(burner.kill)
    return process


def no_network(process: Process, _: ExitStack) -> Process:
    """Leave the loopback device only."""
    needs("ip")
    return shell(process, WITHOUT_NETWORK, unshare="net")


def no_ipv6(process: Process, _: ExitStack) -> Process:
    """Switch IPv6 off in a network of its own."""
    needs("ip")
    return shell(process, f"ip link set lo up; {WITHOUT_IPV6}", unshare="net")


def clone(stack: ExitStack) -> Path:
    """Clone the commit into a path with a space and an umlaut."""
    folder = temporary(stack) / "Prüf stand" / "sopdeploy"
    git("clone", "--quiet", "--config", "advice.detachedHead=false", str(ROOT), str(folder))
    return folder


def other_path(process: Process, stack: ExitStack) -> Process:
    """Use a clone with an environment of its own."""
    folder = clone(stack)
    return replace(process, folder=folder, python=install(folder, sys.executable))


def install(folder: Path, python: str, *before: str, name: str = ".venv") -> Path:
    """Create the environment *name* of the checkout *folder*, which is complete already if it has a stamp."""
    command = [*before, "make", f"VENV={name}", f"PYTHON={python}", f"{name}/.installed"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnavailableError(
            f"cannot install: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}"
        )
    return folder / name / "bin" / "python"


def other_user(process: Process, stack: ExitStack) -> Process:
    """Give a clone to a user who is not root and has a home that cannot be written.

    Raises `UnavailableError` without root, or without a Python that this user can run.
    """
    needs("setpriv", "chown")
    if os.geteuid() != 0:
        raise UnavailableError(
            "needs root to become another user; the other rows run without root"
        )

    # Find a Python that this user can run.
    become = ["setpriv", f"--reuid={OTHER_USER}", f"--regid={OTHER_USER}", "--clear-groups"]
    candidates = (sys.executable, os.path.realpath(sys.executable), "/usr/bin/python3")
    # By a shell, because the first program of the user still has root's capabilities when it is
    # started.
    runs = ["sh", "-c", '"$0" -c "import ensurepip"']
    usable = [python for python in candidates if succeeds(*become, *runs, python)]
    if not usable:
        raise UnavailableError("the other user has no Python with venv")

    # The clone with its environment, and a place for temporary files, are this user's.
    folder = clone(stack)
    home = temporary(stack)
    scratch = temporary(stack)
    subprocess.run(["chown", "-R", str(OTHER_USER), str(folder), str(scratch)], check=True)
    as_user = [*become, "env", f"HOME={scratch}"]
    python = install(folder, usable[0], *as_user)
    home.chmod(0o555)

    environment = {**process.environment, "HOME": str(home), "TMPDIR": str(scratch)}
    return replace(
        process,
        folder=folder,
        python=python,
        prefix=[*process.prefix, *become],
        environment=environment,
    )


def other_file_system(process: Process, stack: ExitStack) -> Process:
    """Use temporary files on another file system than that of the checkout."""
    if not OTHER_FILE_SYSTEM.is_dir():
        raise UnavailableError("no second file system")
    folder = temporary(stack, OTHER_FILE_SYSTEM)
    folder.chmod(0o777)
    return replace(process, environment={**process.environment, "TMPDIR": str(folder)})


def interpreter(version: str) -> Enter:
    """Build the surroundings of another Python, with an environment of its own."""

    def enter(process: Process, _: ExitStack) -> Process:
        found = shutil.which(f"python{version}")
        if found is None or not succeeds(found, "-c", "import ensurepip"):
            raise UnavailableError(f"python{version} not installed")
        return replace(process, python=install(process.folder, found, name=f".venv-{version}"))

    return enter


def in_reverse(process: Process, _: ExitStack) -> Process:
    """Run the last test first."""
    return replace(process, options=[*process.options, "--reverse"])


UMASK = Surroundings("umask 077", lambda process, _: shell(process, 'umask 077; exec "$@"'))
JOURNEYS: dict[str, list[Surroundings]] = {
    "AVX2": [
        Surroundings("a processor without AVX-512 and VNNI", without_vnni),
        variables(
            "PyTorch's kernels for AVX2",
            ATEN_CPU_CAPABILITY="avx2",
            MKL_ENABLE_INSTRUCTIONS="AVX2",
        ),
        variables("oneDNN's kernels for AVX2", ONEDNN_MAX_CPU_ISA="AVX2"),
        variables("OpenBLAS' kernels for Haswell", OPENBLAS_CORETYPE="Haswell"),
        variables("LC_ALL=C", LC_ALL="C"),
        variables("TZ=Pacific/Kiritimati", TZ="Pacific/Kiritimati"),
    ],
    "SSE": [
        variables(
            "PyTorch's default kernels",
            ATEN_CPU_CAPABILITY="default",
            MKL_ENABLE_INSTRUCTIONS="SSE4_2",
        ),
        variables("oneDNN's kernels for SSE4.1", ONEDNN_MAX_CPU_ISA="SSE41"),
        variables("OpenBLAS' kernels for Prescott", OPENBLAS_CORETYPE="Prescott"),
        Surroundings("a Turkish locale", other_locale),
        UMASK,
        variables("HOME unset", HOME=None),
    ],
    "later": [
        variables("OpenBLAS' kernels for Zen", OPENBLAS_CORETYPE="Zen"),
        Surroundings(
            "a clock 400 days ahead, without tests in Chromium and of the times of files", later
        ),
        Surroundings("tests in reverse order", in_reverse),
        Surroundings("a path with a space and an umlaut", other_path),
        Surroundings("Python 3.13", interpreter("3.13")),
    ],
    "stranger": [
        Surroundings("a user who is not root, with a read-only HOME", other_user),
        variables(
            "OpenBLAS' kernels of this processor", OPENBLAS_CORETYPE=None, OPENBLAS_L2_SIZE=None
        ),
        Surroundings("TMPDIR on another file system", other_file_system),
    ],
    "small": [
        Surroundings("one core", one_core),
        Surroundings("beside a process that burns the core", busy),
    ],
    "offline": [
        Surroundings("no network", no_network),
        Surroundings("no IPv6", no_ipv6),
        Surroundings("Python 3.12", interpreter("3.12")),
    ],
    "alone": [
        Surroundings("every test file alone", lambda process, _: replace(process, alone=True)),
    ],
}


@dataclass(frozen=True)
class Outcome:
    """The result of a run: ids of failed tests, numbers of the others, and seconds."""

    failed: tuple[str, ...]
    passed: int
    skipped: int
    seconds: float
    problem: str = ""  # the last line of a run without a report


def run_tests(process: Process, *arguments: str, tests: Sequence[str] = ()) -> Outcome:
    """Run pytest as *process*, for *tests* or all, and read its report.

    The outcome has a `problem` if pytest itself has failed.
    """
    # Run it.
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="elsewhere-") as folder:
        Path(folder).chmod(0o777)
        report = Path(folder) / "report.xml"
        command = process.command(
            "-q", f"--junitxml={report}", "-o", "junit_family=xunit1", *arguments, *tests
        )
        # A file: a pipe would stay open for a child that outlives the tests.
        log = Path(folder) / "log.txt"
        with log.open("w") as out:
            done = subprocess.run(
                command,
                cwd=process.folder,
                env=process.variables(),
                stdout=out,
                stderr=out,
                check=False,
            )
        seconds = time.monotonic() - began

        # Read the report; without one, the last line of the output says why.
        if not report.is_file():
            lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
            return Outcome((), 0, 0, seconds, f"exit code {done.returncode}: {lines[-1]}")
        cases = list(ElementTree.parse(report).iter("testcase"))  # noqa: S314 # of our own pytest

    failed = tuple(
        test_id(case)
        for case in cases
        if case.get("file")
        and (case.find("failure") is not None or case.find("error") is not None)
    )
    skipped = sum(case.find("skipped") is not None for case in cases)
    problem = ""
    if done.returncode not in {0, 1}:
        problem = f"pytest ended with exit code {done.returncode}"
    return Outcome(failed, len(cases) - len(failed) - skipped, skipped, seconds, problem)


def test_id(case: ElementTree.Element) -> str:
    """Return the id by which pytest selects a test of a report."""
    return f"{case.get('file')}::{case.get('name')}"


def run_files(process: Process, workers: int, say: Callable[[str], None]) -> Outcome:
    """Run every test file in a process of its own, *workers* of them at once; say at once which fail."""
    began = time.monotonic()

    def run_file(path: Path) -> Outcome:
        outcome = run_tests(
            process, "-p", "no:xdist", tests=[str(path.relative_to(process.folder))]
        )
        if "exit code 5" in outcome.problem:  # all tests of the file are deselected
            return Outcome((), 0, 0, outcome.seconds)

        # A file whose run has failed as a whole counts as a failed test.
        failed = outcome.failed
        if outcome.problem:
            failed = (*failed, f"{path.name}: {outcome.problem}")
        for test in failed:
            say(f"  failed: {test}")
        return replace(outcome, failed=failed)

    files = sorted((process.folder / "tests").rglob("test_*.py"))
    with ThreadPoolExecutor(workers) as pool:
        outcomes = list(pool.map(run_file, files))

    return Outcome(
        tuple(test for outcome in outcomes for test in outcome.failed),
        sum(outcome.passed for outcome in outcomes),
        sum(outcome.skipped for outcome in outcomes),
        time.monotonic() - began,
    )


@contextmanager
def entered(surroundings: Sequence[Surroundings]) -> Iterator[tuple[Process, dict[str, str]]]:
    """Enter all *surroundings* that exist here; yields the process and why the others do not, by name."""
    unavailable: dict[str, str] = {}
    with ExitStack() as stack:
        process = Process()
        for one in surroundings:
            try:
                process = one.enter(process, stack)
            except UnavailableError as error:
                unavailable[one.name] = str(error)
        yield process, unavailable


def travel(
    name: str, surroundings: Sequence[Surroundings], workers: int, say: Callable[[str], None]
) -> list[list[str]]:
    """Run the tests in all *surroundings* at once, which are the journey *name*, in *workers* processes.

    Returns the rows of the table: one for each of *surroundings*, and one for the tests that fail
    only in all of them together.
    """
    # Run the tests.
    with entered(surroundings) as (process, unavailable):
        if len(unavailable) == len(surroundings):
            return [[one.name, f"not run: {unavailable[one.name]}", ""] for one in surroundings]
        if process.alone:
            outcome = run_files(process, workers, say)
        else:
            outcome = run_tests(process, "-n", str(workers), "--dist", "loadfile")
    counts = f"{outcome.passed} passed, {len(outcome.failed)} failed"
    say(f"{name}: {counts} in {outcome.seconds:.0f} s {outcome.problem}")

    # Run those that failed in each of the surroundings alone.
    blamed = blame(surroundings, unavailable, outcome.failed, say) if outcome.failed else {}

    # A row for each; what failed in none of them alone has its own row.
    rows = []
    for one in surroundings:
        if one.name in unavailable:
            result = f"not run: {unavailable[one.name]}"
        elif failed := blamed.get(one.name, ()):
            result = f"{len(failed)} failed: {', '.join(failed)}"
        elif outcome.problem:
            result = outcome.problem
        else:
            result = f"{outcome.passed:,} passed, {outcome.skipped} not run"
        rows.append([one.name, result, f"{outcome.seconds / 60:.0f} min"])

    only_together = [
        test for test in outcome.failed if not any(test in tests for tests in blamed.values())
    ]
    if only_together:
        result = f"{len(only_together)} failed: {', '.join(only_together)}"
        rows.append([f"together ({name})", result, ""])
    return rows


def blame(
    surroundings: Sequence[Surroundings],
    unavailable: dict[str, str],
    failed: Sequence[str],
    say: Callable[[str], None],
) -> dict[str, tuple[str, ...]]:
    """Run the *failed* tests in each of *surroundings* alone; return those that fail there, by its name.

    A single one of *surroundings* is not run again. Says also how many fail in no special
    surroundings.
    """
    for test in failed:
        say(f"  failed: {test}")
    blamed = {}
    for one in surroundings:
        if one.name not in unavailable and len(surroundings) > 1:
            with entered([one]) as (process, _):
                again = run_tests(process, tests=failed)
            # If pytest itself has failed, so have all.
            blamed[one.name] = tuple(failed) if again.problem else again.failed
            say(f"  {one.name} alone: {len(blamed[one.name])} failed")
    if len(surroundings) == 1:
        blamed[surroundings[0].name] = tuple(failed)

    here = run_tests(Process(), tests=failed).failed
    say(f"  in no special surroundings: {len(here)} failed")
    return blamed


def git(*arguments: str) -> str:
    """Run git in the checkout; return what it prints."""
    command = ["git", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def page(rows: Sequence[Sequence[str]], before: str) -> str:
    """Render docs/elsewhere.md with *rows*, and those of the page *before* that were not run again."""
    # What the new rows end with: the date and the commit.
    changes = git(
        "status",
        "--porcelain",
        "--untracked-files=no",
        "--",
        ".",
        ":(exclude)docs/elsewhere.md",
    )
    commit = git("rev-parse", "--short=8", "HEAD") + ("-dirty" if changes else "")
    now = [f"{datetime.now(UTC):%Y-%m-%d}", commit]

    # The rows of the page, without the heading, and the new ones.
    kept = [
        line.strip("| ").split(" | ") for line in before.splitlines() if line.startswith("| ")
    ][1:]
    new = {row[0]: [*row, *now] for row in rows}
    # Rows of all surroundings together are those of failures; they go when their journey runs
    # without one.
    ran = {row[0] for row in rows if not row[1].startswith("not run")}
    ended = {
        f"together ({name})"
        for name, those in JOURNEYS.items()
        if any(one.name in ran for one in those)
    }
    by_name = {row[0]: row for row in kept if row[0] not in ended} | new

    # In the order of the journeys.
    order = [one.name for surroundings in JOURNEYS.values() for one in surroundings]
    order += [f"together ({name})" for name in JOURNEYS]
    names = [name for name in order if name in by_name]

    machine = f"{processor()}, {usable_cores()} cores, Python {platform.python_version()}"
    lines = [
        "# Tests in other surroundings",
        "",
        "Do the tests also pass with another locale, user, kernel or Python? `make elsewhere` runs the",
        "default tests in such surroundings, several at a time. A test that fails runs again in each of",
        f"them alone. The last run was on {machine}.",
        "",
        "| surroundings | default tests | time | date | commit |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(by_name[name])} |" for name in names),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, run the journeys, print or write the table; exit with 1 if a test failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default=",".join(JOURNEYS), help=f"of: {', '.join(JOURNEYS)}")
    parser.add_argument(
        "--list", action="store_true", help="print the surroundings of each journey"
    )
    parser.add_argument("--workers", type=int, default=WORKERS, help="test processes at once")
    parser.add_argument("--write", type=Path, help="write the rows into the table of this page")
    arguments = parser.parse_args()
    chosen = {name: JOURNEYS[name] for name in arguments.only.split(",")}

    if arguments.list:
        for name, surroundings in chosen.items():
            sys.stdout.write(f"{name}: {', '.join(one.name for one in surroundings)}\n")
        return

    # Run the journeys.
    say = partial(print, flush=True)
    rows = [
        row
        for name, surroundings in chosen.items()
        for row in travel(name, surroundings, arguments.workers, say)
    ]

    # Print the page, and write it if that is asked for.
    target = arguments.write
    before = ""
    if target is not None and target.is_file():
        before = target.read_text(encoding="utf-8")
    text = page(rows, before)
    say(text)
    if target is not None:
        target.write_text(text, encoding="utf-8")
    if any("failed" in row[1] or "exit code" in row[1] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
