"""Line and bar charts drawn with Pillow, for tools/report.

matplotlib would be one more requirement for two kinds of chart, and its figures could not be drawn in the sheets that
engine/drawing.py makes; so the charts are drawn here, larger and then reduced, which smooths their lines. They come out
SHARP times as large as the sizes that are given, so that they are sharp on a phone and in print.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from engine.drawing import GRAY, INK, PAPER, RULE, font

COLORS = ((31, 119, 180), (214, 95, 14), (44, 140, 60), (148, 68, 170), (196, 50, 60), (110, 85, 70), (90, 90, 95))
SHARP = 2  # pixels of the finished image for one of the sizes given
ZOOM = 2 * SHARP  # while it is drawn
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Bar:
    """A bar of a chart; a spread of 0 draws no whisker, and without a value there is the text alone."""

    value: float | None
    spread: float = 0.0
    text: str = ""  # beside it, such as its value


Rows = Mapping[str, Mapping[str, Bar]]  # {row: {series: bar}}


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that lie in [low, high], about `count` of them, in steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    rough = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def label(value: float) -> str:
    """A tick's number: 0.5, 20, 3k, 1.2M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:.3g}"


class Canvas:
    """An image with a plot area; places are given in data units."""

    def __init__(self, width: int, height: int, left: int, top: int, right: int, bottom: int):
        self.image = Image.new("RGB", (width * ZOOM, height * ZOOM), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.box = left, top, width - right, height - bottom
        self.x_range = self.y_range = (0.0, 1.0)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of the finished image."""
        left, top, right, bottom = self.box
        across = (x - self.x_range[0]) / (self.x_range[1] - self.x_range[0])
        up = (y - self.y_range[0]) / (self.y_range[1] - self.y_range[0])
        return left + across * (right - left), bottom - up * (bottom - top)

    def line(self, points: Sequence[tuple[float, float]], color, width: float = 1) -> None:
        self.draw.line([(x * ZOOM, y * ZOOM) for x, y in points], fill=color, width=round(width * ZOOM), joint="curve")

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, color) -> None:
        left, right = sorted((x0, x1))
        self.draw.rectangle([left * ZOOM, y0 * ZOOM, max(right, left + 1) * ZOOM, y1 * ZOOM], fill=color)

    def dot(self, x: float, y: float, color, radius: float = 3) -> None:
        self.draw.ellipse([(x - radius) * ZOOM, (y - radius) * ZOOM, (x + radius) * ZOOM, (y + radius) * ZOOM], color)

    def text(self, x: float, y: float, line: str, size: int = 13, color=INK, anchor: str = "la") -> None:
        self.draw.text((x * ZOOM, y * ZOOM), line, font=font(size * ZOOM), fill=color, anchor=anchor)

    def finish(self) -> Image.Image:
        return self.image.reduce(ZOOM // SHARP)


def padded(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """A range somewhat wider than the finite values'; never empty."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    edge = (high - low) * share or abs(high) * 0.1 or 1.0
    return low - edge, high + edge


def line_chart(title: str, series: Mapping[str, Points], width: int = 420, height: int = 260) -> Image.Image:
    """Curves over training steps. series: {name: [(step, value), ...]}, each in order of its steps."""
    canvas = Canvas(width, height, left=56, top=34, right=14, bottom=30 + 18 * (len(series) > 1))
    every = [point for points in series.values() for point in points]
    steps = [x for x, _ in every]
    canvas.x_range = (min(steps), max(steps)) if steps and min(steps) < max(steps) else padded(steps)
    canvas.y_range = padded([y for _, y in every])
    axes(canvas, title)
    for number, points in enumerate(series.values()):
        color = COLORS[number % len(COLORS)]
        places = [canvas.place(x, y) for x, y in points if math.isfinite(y)]
        if len(places) > 1:
            canvas.line(places, color, 1.6)
        if len(places) <= 12:
            for place in places:
                canvas.dot(*place, color)
    if len(series) > 1:
        legend(canvas, list(series), canvas.box[0], height)
    return canvas.finish()


def axes(canvas: Canvas, title: str) -> None:
    left, top, right, bottom = canvas.box
    canvas.text(left, 8, title, 15)
    for value in ticks(*canvas.y_range):
        y = canvas.place(canvas.x_range[0], value)[1]
        canvas.line([(left, y), (right, y)], RULE, 0.5)
        canvas.text(left - 6, y, label(value), 12, GRAY, "rm")
    for value in ticks(*canvas.x_range):
        x = canvas.place(value, canvas.y_range[0])[0]
        canvas.text(x, bottom + 6, label(value), 12, GRAY, "ma")
    canvas.line([(left, bottom), (right, bottom)], GRAY, 1)


def legend(canvas: Canvas, names: Sequence[str], x: float, height: int) -> None:
    y = height - 14
    for number, name in enumerate(names):
        canvas.rectangle(x, y - 5, x + 10, y + 5, COLORS[number % len(COLORS)])
        canvas.text(x + 15, y, name, 12, INK, "lm")
        x += 30 + font(12).getlength(name)


def bar_chart(title: str, rows: Rows, unit: str, width: int = 420) -> Image.Image:
    """Horizontal bars from zero, their texts in a column at the right."""
    return bar_charts({title: rows}, unit, width)[0]


def bar_charts(panels: Mapping[str, Rows], unit: str, width: int = 420) -> list[Image.Image]:
    """A `bar_chart` per panel {title: rows}, all on the same scale, so that their bars can be compared."""
    every = [bar for rows in panels.values() for bars in rows.values() for bar in bars.values()]
    left = 20 + widest(13, [row for rows in panels.values() for row in rows])
    right = 18 + widest(12, [bar.text for bar in every])
    edges = [bar.value + sign * bar.spread for bar in every if bar.value is not None for sign in (-1, 1)]
    return [
        bars_of_panel(f"{title} ({unit})", rows, width, (left, right), padded([0.0, *edges]))
        for title, rows in panels.items()
    ]


def widest(size: int, texts: Sequence[str]) -> int:
    return math.ceil(max(map(font(size).getlength, texts), default=0))


def bars_of_panel(title: str, rows: Rows, width: int, margins: tuple[int, int], scale: tuple[float, float]):
    names = list(dict.fromkeys(name for bars in rows.values() for name in bars))
    thick, between = 15, 12
    height = 76 + (thick * len(names) + between) * len(rows)
    canvas = Canvas(width, height, left=margins[0], top=36, right=margins[1], bottom=46)
    canvas.x_range = scale
    left, top, right, bottom = canvas.box
    canvas.text(14, 8, title, 15)
    for value in ticks(*scale, 4):
        x = canvas.place(value, 0)[0]
        canvas.line([(x, top), (x, bottom)], RULE, 0.5)
        canvas.text(x, bottom + 4, label(value), 12, GRAY, "ma")
    zero = canvas.place(0, 0)[0]
    y = top + between / 2
    for row, bars in rows.items():
        canvas.text(left - 8, y + thick * len(names) / 2, row, 13, INK, "rm")
        for number, name in enumerate(names):
            if name in bars:
                draw_bar(canvas, bars[name], (zero, y + 2, y + thick - 1), COLORS[number % len(COLORS)])
            y += thick
        y += between
    canvas.line([(zero, top), (zero, bottom)], GRAY, 1)
    legend(canvas, names, 14, canvas.image.height // ZOOM)
    return canvas.finish()


def draw_bar(canvas: Canvas, bar: Bar, place: tuple[float, float, float], color: tuple) -> None:
    """place: where zero lies, the bar's top and its bottom."""
    zero, top, bottom = place
    middle = (top + bottom) / 2
    canvas.text(canvas.box[2] + 8, middle, bar.text, 12, GRAY if bar.value is None else INK, "lm")
    if bar.value is None:
        return
    canvas.rectangle(zero, top, canvas.place(bar.value, 0)[0], bottom, color)
    if bar.spread:
        ends = [canvas.place(bar.value + sign * bar.spread, 0)[0] for sign in (-1, 1)]
        canvas.line([(x, middle) for x in ends], INK, 1.2)
        for x in ends:
            canvas.line([(x, middle - 3), (x, middle + 3)], INK, 1.2)
