"""Drift: consecutive answers are compared as blocks; an alarm needs a large difference, too."""

import numpy as np
import pytest

from sopdeploy.evaluation.drift import (
    BLOCK,
    CAUSES,
    MIN_SHIFT,
    SIGNIFICANCE,
    WINDOW,
    Answers,
    compare_answers,
    compare_means,
    compare_samples,
    describe_alarms,
    f_tail,
    measure_image,
)

CLASSES = 5
MEASURES = 3


def draw(seed: int, *, frames: int = 1, **shifts: float) -> Answers:
    """Draw a window of answers, each object in *frames* of them; *shifts* in standard deviations."""
    random = np.random.default_rng(seed)
    count = WINDOW // frames
    logits = random.normal(size=(count, CLASSES))
    logits[:, 0] += shifts.get("classes", 0.0)
    logits += shifts.get("score", 0.0)
    image = random.normal(shifts.get("image", 0.0), size=(count, MEASURES))
    repeated = (np.repeat(part, frames, axis=0) for part in (logits, image))
    logits_NC, image_NF = (part.astype(np.float32) for part in repeated)
    return Answers.of(logits_NC, image_NF)


def alarms(first: Answers, second: Answers) -> set[str]:
    compared = compare_answers(first, second, CLASSES)
    return {name for name, comparison in compared.items() if comparison.is_alarm}


@pytest.mark.parametrize("frames", [1, 5])
def test_steady_traffic_raises_no_alarm_also_with_several_frames_of_an_object(frames) -> None:
    windows = [draw(seed, frames=frames) for seed in range(12)]
    raised = [alarms(windows[0], window) for window in windows[1:]]
    assert sum(map(bool, raised)) <= 1


# rejected images of the reference, its size, rejected ones of the newest: whether this is an alarm
REJECTED = {
    "none before, two now": (0, 1000, [7, 57], False),
    "one before, three now": (1, 1000, [7, 32, 57], False),
    "none before, one in each block now": (0, 300, [7, 32, 57, 82], False),
    "many now": (1, 1000, [*range(0, 100, 6)], True),
    "all now": (1, 1000, [*range(100)], True),
}


@pytest.mark.parametrize("case", REJECTED)
def test_a_few_rejected_images_raise_no_alarm(case) -> None:
    before, size, places, expected = REJECTED[case]
    first, second = np.zeros(size, np.float32), np.zeros(100, np.float32)
    first[:before] = 1
    second[places] = 1
    reference = draw(1).newest(size)._replace(unknown=first)
    window = draw(2).newest(100)._replace(unknown=second)
    assert ("unknown" in alarms(reference, window)) is expected


# what changes, by how much: the statistics that raise an alarm
CHANGES = {
    "the photographs": ({"image": 0.3}, {"image"}),
    "the scores": ({"score": 0.3}, {"score"}),
    "the classes": ({"classes": 0.8}, {"classes", "score"}),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_large_change_raises_an_alarm_of_its_statistic(case) -> None:
    shifts, expected = CHANGES[case]
    raised = alarms(draw(0), draw(1, **shifts))
    assert raised == expected


# answers of the reference, the shift of the images: whether 100 answers raise an alarm
FEW = {
    "a large change": (100, 2.0, {"image"}),
    "a change that few answers do not show": (100, 0.5, set[str]()),
    "the same one with more of the reference": (275, 0.5, {"image"}),
}


@pytest.mark.parametrize("case", FEW)
def test_fewer_answers_of_the_reference_must_differ_more(case) -> None:
    count, shift, expected = FEW[case]
    first = draw(0).newest(count)
    assert alarms(first, draw(1, image=shift).newest(100)) == expected


def test_a_small_change_of_many_images_is_significant_but_no_alarm() -> None:
    random = np.random.default_rng(0)
    first, second = (random.normal(mean, size=(40_000, 1)) for mean in (0.0, 0.07))
    compared = compare_samples(first, second)
    assert compared.p_value < SIGNIFICANCE
    assert compared.shift < MIN_SHIFT
    assert not compared.is_alarm


def test_the_shift_is_in_standard_deviations_of_one_answer() -> None:
    random = np.random.default_rng(0)
    first, second = (random.normal(mean, 2.0, size=(WINDOW, 1)) for mean in (0.0, 1.0))
    assert compare_samples(first, second).shift == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(("other", "expected"), [(1.0, (0.0, 1.0)), (2.0, (np.inf, 0.0))])
def test_samples_without_any_variance_are_equal_or_not(other, expected) -> None:
    first = np.ones((4 * BLOCK, 2))
    assert compare_samples(first, other * first)[:2] == expected


def test_a_change_of_few_blocks_does_not_make_the_blocks_look_different() -> None:
    random = np.random.default_rng(0)
    first, second = random.normal(size=(12, 1)), random.normal(10.0, size=(4, 1))
    _, p_value = compare_means(first, second)
    assert p_value < 1e-6


# numbers of a statistic: how they come from as many independent ones
NUMBERS = {
    "one": np.eye(1),
    "independent": np.eye(6),
    "of unequal variance": np.diag([5.0, 1.0, 1.0, 0.1, 0.1, 0.0]),
    "alike": np.eye(6) + np.ones((6, 6)),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_one_in_twenty_equal_samples_has_a_p_value_below_a_twentieth(case) -> None:
    random = np.random.default_rng(0)
    mixed_FF = NUMBERS[case]

    p_values = []
    for _ in range(600):
        blocks_BF = random.normal(size=(16, len(mixed_FF))) @ mixed_FF
        p_values.append(compare_means(blocks_BF[:12], blocks_BF[12:])[1])
    assert 0.02 < np.mean(np.asarray(p_values) < 0.05) < 0.08


def test_a_tail_of_f_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for ratio, first, second in (
        (4.0, 1.0, 14.0),
        (20.0, 1.0, 14.0),
        (3.0, 4.5, 63.0),
        (2.0, 9.0, 700.0),
    ):
        expected = stats.f.sf(ratio, first, second)
        assert f_tail(ratio, first, second) == pytest.approx(expected, rel=0.25)


# a change of an image: the measure (by its number) that grows or falls
MEASURED = {
    "darker": (lambda pixels: pixels // 2, 0, -1),
    "redder": (lambda pixels: pixels * np.asarray([1, 0, 0], np.uint8), 3, 1),
    "less contrast": (lambda pixels: pixels // 2 + 64, 1, -1),
    "finer": (lambda pixels: np.kron(pixels[::2, ::2], np.ones((2, 2, 1), np.uint8)), 8, -1),
}


@pytest.mark.parametrize("case", MEASURED)
def test_an_image_is_measured_by_light_color_contrast_and_sharpness(case) -> None:
    change, number, sign = MEASURED[case]
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    before, after = measure_image(pixels), measure_image(change(pixels))
    assert np.sign(after[number] - before[number]) == sign


def test_the_words_name_the_causes_the_largest_shift_first() -> None:
    compared = compare_answers(draw(0), draw(1, image=0.5, score=2.0), CLASSES)
    text = describe_alarms(compared)
    assert text.index(CAUSES["score"]) < text.index(CAUSES["image"])
    assert describe_alarms(compare_answers(draw(0), draw(0), CLASSES)) == ""
