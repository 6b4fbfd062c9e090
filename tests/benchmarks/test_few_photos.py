"""The comparison of `benchmarks/few_photos.py`, with stored accuracies."""

import json
from pathlib import Path

import few_photos
import pytest

MET = {"new": (50, 52, 51), "old": (30, 31, 33), "probe": (48, 53, 50)}
CASES = {
    "both requirements are met": (MET, [], 0),
    "less than ten points better than from scratch": (MET | {"old": (45, 46, 47)}, [], 1),
    "worse than the probe": (MET | {"probe": (60, 62, 61)}, [], 1),
    "two seeds are no comparison": (MET | {"old": (45, 46, 47)}, ["--quick"], 0),
}


@pytest.mark.parametrize("case", CASES)
def test_the_exit_status_follows_from_the_requirements(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracies, options, status = CASES[case]
    stored = tmp_path / "quick" if options else tmp_path
    stored.mkdir(exist_ok=True)
    for arm, values in accuracies.items():
        for seed, value in enumerate(values):
            (stored / f"{arm}-{seed}.json").write_text(json.dumps({"top1": value}))
    arguments = ["--cache", str(tmp_path), "--backbone", "unused.pt", "--seeds", "3", "--json", *options]
    assert few_photos.main(arguments) == status
    rows = {(row["case"], row["against"]): row for row in json.loads(capsys.readouterr().out)["results"]}
    runs = 2 if options else 3
    row = rows["top-1, new", "old"]
    assert (row["runs"], row["ours"]) == (runs, sum(accuracies["new"][:runs]) / runs)
    assert row["other"] == sum(accuracies["old"][:runs]) / runs


def test_without_images_the_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        few_photos.main(["--cache", str(tmp_path)])
    assert capsys.readouterr().err == (
        "error: --data None: no folder train; give CIFAR-10 as train/<class>/*.jpg\n"
    )
