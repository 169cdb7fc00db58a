"""The pictures of a page: axes, lines with gaps, points with error bars, and what a long line keeps."""

import random
import re
from itertools import pairwise
from math import isfinite

import pytest
from burnish.algorithms.show.axis import axis_of, steps_axis
from burnish.algorithms.show.curve import Series, draw, smooth, training_series

VALUES = {
    "none": [],
    "one": [3.5],
    "zero": [0.0, 0.0],
    "constant": [0.1, 0.1 + 1e-17],
    "huge": [1e9, 1e9 + 3],
    "huger": [-9e299, 9e299],
    "tiny": [1e-12, 5e-12],
    "tinier": [1e-310, 5e-324],
    "spread": [1e-6, 2e3],
    "spread with zero": [0.0, 2e6],
    "usual": [0.691, 0.7, 0.65],
    "negative": [-3e-5, 1e-6],
}


def numbers(text: str) -> list[float]:
    return [float(each) for each in re.findall(r"-?\d+(?:\.\d+)?", text)]


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_an_axis_fits_any_values(values):
    axis = axis_of(values, may_be_log=True)
    places, labels = [place for place, _ in axis.ticks], [label for _, label in axis.ticks]
    assert 2 <= len(places) <= 7 and all(0 <= place <= 1 for place in places)
    assert all(b - a > 0.1 for a, b in pairwise(places)), "no label lies on another"
    assert len(set(labels)) == len(labels) and max(map(len, labels)) <= 13
    for place, label in axis.ticks:  # a label is the number of its place
        assert axis.place(float(label)) == pytest.approx(place, abs=0.02)
    assert axis.log == (values == VALUES["spread"])
    found = [axis.place(value) for value in values]
    assert sorted(found) == [axis.place(value) for value in sorted(values)]


def test_one_spike_makes_an_axis_logarithmic_and_a_rate_that_decays_does_not():
    assert axis_of([1.0] * 99 + [1e6], may_be_log=True).log
    assert not axis_of([1.0] * 95 + [1e-6] * 5, may_be_log=True).log
    assert not axis_of([1.0] * 99 + [1e6]).log


def test_an_axis_of_chance():
    noise = random.Random(0)
    for _ in range(300):
        scale, shift = 10 ** noise.uniform(-12, 12), noise.choice([0, 1, 1e3]) * noise.random()
        axis = axis_of(
            [scale * (noise.gauss(0, 1) + shift) for _ in range(noise.randrange(1, 9))], may_be_log=True
        )
        labels = [label for _, label in axis.ticks]
        assert len(set(labels)) == len(labels) >= 2


@pytest.mark.parametrize(
    "steps, labels",
    [
        ([], ["0", "1"]),
        ([7], ["7"]),
        ([0, 3], ["0", "1", "2", "3"]),
        ([0, 9999], ["0", "2k", "4k", "6k", "8k"]),
        ([1500, 3200], ["1,500", "2,000", "2,500", "3,000"]),
        ([100_000, 100_003], ["100,000", "100,001", "100,002", "100,003"]),
    ],
)
def test_an_axis_of_steps_has_whole_numbers(steps, labels):
    assert [label for _, label in steps_axis(steps).ticks] == labels


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_a_picture_of_any_values_stays_within_its_frame(values):
    points = [(float(i), value) for i, value in enumerate(values)]
    errors = {0.0: 0.5, 1.0: 1e300}
    series = [*training_series(points), Series("held out", points, errors=errors, colour=1, line=False)]
    picture = draw("a <metric>", series)
    assert 'aria-label="a &lt;metric&gt;' in picture
    for path in re.findall(r' d="([^"]*)"', picture):
        assert all(isfinite(number) and -1 <= number <= 361 for number in numbers(path)), path
    for x, anchor, text in re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="(\w+)">([^<]*)<', picture):
        if anchor == "end":
            assert float(x) - 6.3 * len(text) >= 0, "no label is cut off"


def test_a_gap_is_a_gap_and_a_lonely_value_a_dot():
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, None), (3.0, 1.5), (4.0, None), (5.0, 1.0), (6.0, 2.0)]
    (path,) = re.findall(r'class="line c0" d="([^"]*)"', draw("x", [Series("training", points)]))
    assert re.sub(r"[\d. ]", "", path) == "MLMhML"
    assert 'class="marks' in draw("x", [Series("training", [(5.0, 1.0)])])


def test_a_long_line_keeps_its_spikes_and_its_gaps():
    points = [(float(i), 1.0 + (i % 7) / 10) for i in range(10_000)]
    points[6000] = (6000.0, 50.0)
    points[3000:4000] = [(float(i), None) for i in range(3000, 4000)]
    raw, smoothed = training_series(points)
    assert len(raw.points) < 320 and (6000.0, 50.0) in raw.points and raw.points[0] == points[0]
    assert len(smoothed.points) <= 150
    assert {y is None for x, y in smoothed.points if 3100 < x < 3900} == {True}
    xs = [x for x, _ in raw.points]
    assert xs == sorted(xs)


def test_an_average_leaves_gaps_and_constants_alone():
    assert smooth([1.0, 2.0, None, 6.0], window=2) == [1.0, 1.5, None, 6.0]
    (constant,) = training_series([(float(i), 3.0) for i in range(5000)])
    assert constant.label == "training" and len(constant.points) < 310


def test_labels_of_an_axis_do_not_lie_on_one_another():
    picture = draw("x", [Series("training", [(float(x), 1.0 * x) for x in range(0, 2_000_000, 100_000)])])
    row = re.findall(r'<text x="([\d.]+)" y="182[^"]*" text-anchor="middle">([^<]*)<', picture)
    ends = [(float(x) - 3.15 * len(text), float(x) + 3.15 * len(text)) for x, text in row]
    assert len(row) >= 3 and all(b[0] > a[1] for a, b in pairwise(ends)) and ends[-1][1] <= 360
