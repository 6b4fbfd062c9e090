"""The comparison of `benchmarks/few_photos.py`, with stored accuracies."""

import json
from pathlib import Path

import few_photos
import pytest

OPTIONS = ["--model", "resnet18", "--weights", "unused.pth", "--sizes", "5,10", "--draws", "3", "--json"]
CASES = {
    "better than the probe at both sizes": ({5: (3, 4, 5), 10: (2, 3, 2)}, 0),
    "better, but by less than 1.5 points on average": ({5: (1, 1, 2), 10: (1, 2, 1)}, 1),
    "worse than the probe at one size": ({5: (6, 7, 8), 10: (-1, 0, -1)}, 1),
    "not clearly better": ({5: (1, 9, 2), 10: (-4, 8, 1)}, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_the_exit_status_follows_from_the_requirements(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gains, status = CASES[case]
    for size, values in gains.items():
        for seed, gain in enumerate(values):
            found = {"ours": 80 + gain, "probe": 80, "estimate": 79 + gain, "low": 70, "high": 90}
            (tmp_path / f"{size}-{seed}.json").write_text(json.dumps({**found, "cpu_seconds": 5}))
    arguments = ["--data", "unused", "--test", "unused", "--cache", str(tmp_path), *OPTIONS]
    assert few_photos.main(arguments) == status
    rows = {row["case"]: row for row in json.loads(capsys.readouterr().out)["results"]}
    assert rows["5 per class, ours minus probe, mean"]["ours"] == pytest.approx(sum(gains[5]) / 3)
    assert rows["5 per class, estimate minus test, mean"]["ours"] == pytest.approx(-1)
    assert rows["5 per class, intervals that contain the test accuracy"]["ours"] == 3
    mean = sum(map(sum, gains.values())) / 6
    assert rows["all sizes, ours minus probe, mean"]["ours"] == pytest.approx(mean)
