"""Drawings against coordinates worked out by hand."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligntune.reporting import palette, svg
from aligntune.reporting.scales import (
    LONG,
    Scale,
    log_ticks,
    means,
    nice_ticks,
    path,
    roughness,
    smooth,
    thin,
    tick_labels,
)
from aligntune.reporting.svg import Line, line_chart, sparkline
from aligntune.reporting.svg_blocks import bar_chart, matrix_chart
from aligntune.reporting.text import number

NAN = float("nan")
floats = st.floats(-1e12, 1e12, allow_nan=False)


class TestTicks:
    @pytest.mark.parametrize(
        ("low", "high", "expected"),
        [
            (0, 1, [0, 0.25, 0.5, 0.75, 1.0]),  # a quarter of the range is 0.25, itself a round number
            (0, 4, [0, 1, 2, 3, 4]),
            (0.3, 2.9, [0, 1, 2, 3]),  # 2.6 / 4 = 0.65 -> 1
            (-1, 1, [-1, -0.5, 0, 0.5, 1]),
            (0, 2e-5, [0, 5e-6, 1e-5, 1.5e-5, 2e-5]),
            (980, 1020, [980, 990, 1000, 1010, 1020]),
            (5, 5, [4.5, 4.75, 5.0, 5.25, 5.5]),  # a constant gets a tenth of itself on either side
            (0, 0, [-1, -0.5, 0, 0.5, 1]),
        ],
    )
    def test_by_hand(self, low, high, expected):
        assert nice_ticks(low, high) == pytest.approx(expected, abs=1e-18)

    @given(floats, floats)
    def test_they_cover_the_range_with_few_round_steps(self, a, b):
        low, high = min(a, b), max(a, b)
        if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-150):
            return
        ticks = nice_ticks(low, high)
        step = ticks[1] - ticks[0]
        slack = 1e-6 * step
        assert ticks[0] <= low + slack
        assert ticks[-1] >= high - slack
        assert ticks[0] > low - step - slack
        assert 2 <= len(ticks) <= 7
        assert step / 10 ** math.floor(math.log10(step * (1 + 1e-9))) == pytest.approx(
            min((1, 2, 2.5, 5, 10), key=lambda f: abs(f - step / 10 ** math.floor(math.log10(step * (1 + 1e-9))))),
            rel=1e-6,
        )

    def test_logarithmic(self):
        assert log_ticks(0.02, 30) == pytest.approx([0.01, 0.1, 1, 10, 100])
        assert log_ticks(10, 10) == [10, 100]

    @pytest.mark.parametrize(
        ("ticks", "labels"),
        [
            ([0, 0.25, 0.5], ["0", "0.25", "0.50"]),
            ([0, 2.5, 5], ["0", "2.5", "5.0"]),
            ([0, 1, 2], ["0", "1", "2"]),
            ([-0.05, 0, 0.05], ["-0.05", "0", "0.05"]),
            ([8000, 10000, 12000], ["8k", "10k", "12k"]),
            ([0, 2500, 5000], ["0", "2,500", "5,000"]),
            ([0, 5e-6, 1e-5], ["0", "5e-6", "1e-5"]),
            ([0, 2_500_000, 5_000_000, 12_500_000], ["0", "2.5M", "5.0M", "12.5M"]),
        ],
    )
    def test_labels_share_a_unit(self, ticks, labels):
        assert tick_labels(ticks) == labels


class TestCurves:
    def test_scale(self):
        assert Scale(0, 10, 100, 200)(2.5) == 125
        assert Scale(0, 1, 50, 0)(1) == 0  # y points down
        assert Scale(0.1, 10, 0, 100, log=True)(1) == pytest.approx(50)

    def test_path_breaks_at_gaps(self):
        x, y = Scale(0, 4, 0, 40), Scale(0, 1, 10, 0)
        points = [(0, 0.0), (1, 1.0), (2, None), (3, 0.5), (4, None)]
        assert path(points, x, y) == "M0,10L10,0M30,5h0"  # the lone point is a dot

    def test_path_leaves_out_what_a_log_axis_cannot_show(self):
        assert path([(0, 1.0), (1, 0.0), (2, 10.0)], Scale(0, 2, 0, 2), Scale(1, 10, 1, 0, log=True)) == "M0,1h0M2,0h0"

    def test_smoothing_is_a_two_sided_average(self):
        # weights 1/2 ** distance: (1 + 2/2 + 3/4) / (1 + 1/2 + 1/4) = 11/7, (1/2 + 2 + 3/2) / 2 = 2
        assert smooth([1.0, 2.0, 3.0], 0.5) == pytest.approx([11 / 7, 2, 17 / 7])

    def test_smoothing_keeps_gaps_and_their_distance(self):
        # places 0 and 2 are two apart: (1 + 3/4) / (1 + 1/4)
        assert smooth([1.0, NAN, 3.0], 0.5) == [pytest.approx(1.4), None, pytest.approx(2.6)]

    @given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 0.99))
    def test_an_average_stays_between_the_extremes(self, values, weight):
        slack = 1e-6 * (1 + max(map(abs, values)))
        assert all(min(values) - slack <= value <= max(values) + slack for value in smooth(values, weight))

    def test_roughness_tells_noise_from_a_curve(self):
        # -1, 1, -1, 1: variance 1, steps of 2 -> 4 / 2; a line of four: variance 1.25, steps of 1 -> 1 / 2.5
        assert roughness([-1, 1, -1, 1]) == pytest.approx(2.0)
        assert roughness([0, 1, 2, 3]) == pytest.approx(0.4)
        assert roughness([5, 5, 5]) == 0

    def test_thinning_keeps_ends_spikes_and_gaps(self):
        y = [0.0] * 10_000
        y[4321], y[777], y[9000] = 5.0, -5.0, NAN
        points = thin(range(10_000), y, 100)
        assert len(points) <= 220
        assert (points[0], points[-1]) == ((0, 0.0), (9999, 0.0))
        assert {(4321, 5.0), (777, -5.0), (9000, None)} <= set(points)

    def test_short_curves_are_not_thinned(self):
        assert thin([0, 1], [1, None]) == [(0.0, 1.0), (1.0, None)]


def parse(svg):
    return ElementTree.fromstring(svg)


def classes(svg, kind):
    return [element for element in parse(svg).iter() if kind in element.get("class", "").split()]


class TestLineChart:
    def test_coordinates(self):
        svg = line_chart([Line("train", [0, 100], [0, 1])], title="Loss", width=520, height=240)
        (curve,) = classes(svg, "line")
        # labels "0.00".."1.00" have 4 characters: left = 14 + 4 * 6.1 = 38.4; right = 520 - 14; y from 240 - 32 to 12
        assert curve.get("d") == "M38.4,208L506,12"
        texts = ["".join(text.itertext()) for text in classes(svg, "tick")]
        assert texts == ["0", "0.25", "0.50", "0.75", "1.00", "0", "20", "40", "60", "80", "step 100"]

    def test_it_speaks(self):
        svg = line_chart([Line("train", [1, 2, 3], [4, NAN, 2])], title="Loss <of> 'x'")
        root = parse(svg)
        assert root.get("role") == "img"
        assert root.find("title").text == root.get("aria-label") == "Loss <of> 'x'"
        assert root.find("desc").text == "train: 4 at step 1, 2 at step 3, lowest 2, highest 4."

    def test_names_are_escaped(self):
        svg = line_chart([Line("<b>&", [1, 2], [1, 2]), Line("b", [1, 2], [1, 2])], title="t")
        assert "<b>&" not in svg
        assert "&lt;b&gt;&amp;" in svg

    def test_a_legend_for_two_and_none_for_one(self):
        one, two = Line("a", [1, 2], [1, 2]), Line("b", [1, 2], [2, 3])
        assert not classes(line_chart([one], title="t"), "key")
        assert [key.text for key in classes(line_chart([one, two], title="t"), "key")] == ["a", "b"]

    def test_noise_is_drawn_faint_under_its_average(self):
        y = [(-1) ** i for i in range(40)]
        assert len(classes(line_chart([Line("a", range(40), y)], title="t", smoothing=0.9), "faint")) == 1
        assert not classes(line_chart([Line("a", range(40), range(40))], title="t", smoothing=0.9), "faint")

    def test_a_band(self):
        svg = line_chart([Line("a", [0, 1], [1, 2], low=[0, 1], high=[2, 4])], title="t", width=100, height=100)
        (band,) = classes(svg, "band")
        # ticks 0..4, one character: left 20.1, right 86; y from 68 to 12, so 14 a unit: there along high, back along low
        assert band.get("d") == "M20.1,40L86,12L86,54L20.1,68Z"

    def test_nothing_finite_says_so(self):
        assert "no finite value yet" in line_chart([Line("a", [1, 2], [NAN, None])], title="t")
        assert "no finite value yet" in line_chart([], title="t")

    def test_one_point(self):
        svg = line_chart([Line("a", [3], [0.5])], title="t")
        assert len(classes(svg, "line")) == 1
        assert "nan" not in svg.lower()

    def test_log_axis_without_positive_values_is_linear(self):
        assert parse(line_chart([Line("a", [1, 2], [-1, 0])], title="t", log_y=True)) is not None

    @pytest.mark.parametrize(
        "values",
        [[1.7e308, -1.7e308], [5e-324, 0.0], [1e308, 1e308], [1.0, 1.0 + 2e-16], [1e149, -1e149], [1e-149, 1e149]],
    )
    @pytest.mark.parametrize("log_y", [False, True])
    def test_extremes(self, values, log_y):
        assert not re.search(
            "nan|inf", line_chart([Line("a", [1, 2], values)], title="t", log_y=log_y).replace("finite", "")
        )
        assert parse(bar_chart(["a", "b"], {"": values}, title="t")) is not None

    @given(st.lists(st.one_of(st.none(), st.floats()), max_size=40), st.booleans(), st.floats(0, 0.95))
    def test_any_numbers_give_a_drawing(self, values, log_y, smoothing):
        svg = line_chart([Line("a", range(len(values)), values)], title="t", log_y=log_y, smoothing=smoothing)
        for curve in classes(svg, "line"):
            assert re.fullmatch(r"([ML]-?\d+(\.\d)?,-?\d+(\.\d)?|h0)*", curve.get("d"))


class TestBlocks:
    def test_bars(self):
        svg = bar_chart(["ab", "c"], {"": [2.0, 1.0]}, title="t", width=200)
        first, second = classes(svg, "fill")
        # left = 12 + 2 * 6.1 = 24.2, right = 200 - 52 = 148: two units are 123.8 wide
        assert (first.get("x"), first.get("width")) == ("24.2", "123.8")
        assert (second.get("x"), second.get("width")) == ("24.2", "61.9")
        assert float(second.get("y")) == 4 + 26  # a bar of 16 and a gap of 10

    def test_negative_bars_grow_to_the_left_of_zero(self):
        svg = bar_chart(["a", "b"], {"": [-1.0, 1.0]}, title="t", width=200)
        negative, positive = classes(svg, "fill")
        assert float(negative.get("x")) + float(negative.get("width")) == pytest.approx(
            float(positive.get("x")), abs=0.11
        )

    def test_grouped_bars_have_a_legend_and_skip_gaps(self):
        svg = bar_chart(["a"], {"before": [1.0], "after": [None]}, title="t")
        assert len(classes(svg, "fill")) == 1
        assert [key.text for key in classes(svg, "key")] == ["before", "after"]

    def test_matrix_shades_by_share(self):
        svg = matrix_chart([[10, 0], [5, None]], ["a", "b"], ["a", "b"], title="t", row_label="true")
        cells = classes(svg, "cell")
        assert [cell.get("fill-opacity") for cell in cells] == ["1.000", "0.050", "0.525", None]
        assert [text.text for text in classes(svg, "on") + classes(svg, "strong")] == ["10", "0", "5"]

    def test_a_large_matrix_leaves_out_its_numbers(self):
        names = [str(index) for index in range(40)]
        svg = matrix_chart([[1] * 40] * 40, names, names, title="t")
        assert len(classes(svg, "cell")) == 1600
        assert not classes(svg, "on")

    def test_empty(self):
        assert "no finite value" in bar_chart([], {"": []}, title="t")
        assert parse(matrix_chart([], [], [], title="t")) is not None


def test_sparkline():
    (curve,) = classes(sparkline([0, 1], title="t", width=120, height=28), "line")
    assert curve.get("d") == "M3,24L116,4"
    assert sparkline([1.0], title="t") == sparkline([NAN, NAN], title="t") == ""


def test_standalone_is_a_file_of_its_own():
    root = parse(palette.standalone(sparkline([1, 2, 3], title="t")))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme:dark" in next(root.iter("{http://www.w3.org/2000/svg}style")).text


def contrast(one, other):
    def luminance(colour):
        channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [palette.LIGHT, palette.DARK])
def test_colours_can_be_told_from_their_paper(theme):
    colours = dict(re.findall(r"--([\w-]+):(#\w{6})", theme))
    for name, colour in colours.items():
        if name.startswith("series") or name in ("good", "bad", "warn", "muted", "ink"):
            wanted = 3 if name.startswith("series") else 4.5  # WCAG: graphics 3:1, text 4.5:1
            assert min(contrast(colour, colours["paper"]), contrast(colour, colours["card"])) >= wanted, name


class TestLongCurves:
    """Of a curve with more points than can be seen, charts look at what can be: its extremes, and the means of stretches."""

    def test_means_by_hand(self):
        assert means([1, 2, 3, 4, 5], [1, 3, 5, None, 9], 3) == ([1.5, 3.5, 5], [2, 5, 9])
        assert means([1, 2, 3, 4], [None, math.nan, 5, 7], 2) == ([1.5, 3.5], [None, 6])
        assert means([1, 2], [3, 4], 2) == ([1, 2], [3, 4])

    def test_spikes_ends_and_the_trend_are_those_of_the_whole(self, monkeypatch):
        smoothed = []
        monkeypatch.setattr(svg, "smooth", lambda values, weight: smoothed.append(values) or smooth(values, weight))
        steps = list(range(1, 50_001))
        rough = [math.sin(step / 8_000) + (1 if step % 2 else -1) for step in steps]
        rough[30_000], rough[-1] = 77.0, 0.25
        drawn = line_chart([Line("loss", steps, rough)], title="loss", smoothing=0.95)
        ends = f"loss: {number(rough[0])} at step 1, {number(0.25)} at step 50,000"
        assert f"{ends}, lowest {number(min(rough))}, highest {number(77.0)}." in drawn
        (trend,) = smoothed
        assert len(trend) <= LONG // 2
        for part, value in enumerate(trend[:1000]):
            assert value == pytest.approx(math.sin((part + 0.5) * 50_000 / len(trend) / 8_000), abs=0.05)
        assert len(drawn) < 60_000

    def test_a_long_curve_with_a_band_keeps_its_band(self):
        steps = list(range(LONG + 100))
        low, high = [-1.0] * len(steps), [1.0] * len(steps)
        drawn = line_chart([Line("mean", steps, [0.5] * len(steps), low, high)], title="mean")
        assert 'class="band' in drawn

    def test_a_curve_that_is_smooth_by_itself_stays_one_line(self):
        steps = list(range(50_000))
        drawn = line_chart([Line("rate", steps, [1 - step / 50_000 for step in steps])], title="rate", smoothing=0.95)
        assert drawn.count('class="line') == 1
