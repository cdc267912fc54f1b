"""Line charts as SVG, of the standard library only: the same numbers give the same bytes."""

from math import ceil, floor, log10
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 710, 380
LEFT, RIGHT, TOP, BOTTOM = 70, 230, 40, 50
# Told apart by those who see colours differently, and in print by their marks.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKS = ("circle", "square", "diamond", "triangle")


class Axis:
    """Values to pixels, logarithmic or from 0."""

    def __init__(self, values, begin, end, log, ticks=None):
        self.begin, self.end, self.log = begin, end, log
        if log:
            ticks = ticks or _round_numbers(min(values), max(values))
            self.low, self.high = log10(ticks[0]), log10(ticks[-1])
        else:
            step = _step(max(values))
            self.low, self.high = 0, step * ceil(max(values) / step)
            ticks = ticks or [step * i for i in range(round(self.high / step) + 1)]
        if self.high == self.low:
            self.high += 1
        self.ticks = ticks

    def at(self, value):
        part = ((log10(value) if self.log else value) - self.low) / (self.high - self.low)
        return self.begin + part * (self.end - self.begin)


def _round_numbers(least, most):
    """1, 2 and 5 times powers of ten, from the last one below `least` to the first above `most`."""
    all_of = [times * 10.0**power for power in range(floor(log10(least)), ceil(log10(most)) + 1)
              for times in (1, 2, 5)]
    return all_of[max(i for i, one in enumerate(all_of) if one <= least):
                  1 + min(i for i, one in enumerate(all_of) if one >= most)]


def _step(most):
    """A round number of which there are four to ten up to `most`."""
    power = 10.0**floor(log10(most))
    return next(power * one for one in (0.1, 0.2, 0.5, 1, 2) if most / (power * one) <= 10)


def number(value):
    return f"{value:,.10g}".replace(",", " ")


def _mark(kind, x, y, colour):
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'
    points = {"square": ((-3, -3), (3, -3), (3, 3), (-3, 3)),
              "diamond": ((0, -4.5), (4.5, 0), (0, 4.5), (-4.5, 0)),
              "triangle": ((0, -4.5), (4, 3.5), (-4, 3.5))}[kind]
    corners = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in points)
    return f'<polygon points="{corners}" fill="{colour}"/>'


def _text(x, y, text, anchor="middle", more=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _grid(across, up, labels):
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for tick in up.ticks:
        y = up.at(tick)
        yield f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#ddd"/>'
        yield _text(LEFT - 6, y + 4, number(tick), "end")
    for tick in across.ticks:
        yield f'<path d="M{across.at(tick):.1f} {bottom}v5" stroke="#555"/>'
        yield _text(across.at(tick), bottom + 18, number(tick))
    yield f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#555"/>'
    yield _text((LEFT + right) / 2, HEIGHT - 10, labels[0])
    middle = (TOP + bottom) / 2
    yield _text(16, middle, labels[1], more=f' transform="rotate(-90 16 {middle:.1f})"')


def line_chart(title, labels, series, log_x=True, log_y=True):
    """`labels`: of x and y. `series`: {name: [(x, y), ...]}; names of the form "a, b" share a
    colour by a and a mark by b."""
    points = [point for line in series.values() for point in line]
    xs = sorted({x for x, _ in points})
    across = Axis(xs, LEFT + 15, WIDTH - RIGHT - 15, log_x, xs)
    if not log_x:
        across.low, across.high = min(xs), max(xs)
    up = Axis([y for _, y in points], HEIGHT - BOTTOM, TOP, log_y)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
             f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
             _text(LEFT, 22, title, "start", ' font-size="14" font-weight="bold"'),
             *_grid(across, up, labels)]
    firsts = list(dict.fromkeys(name.partition(", ")[0] for name in series))
    seconds = list(dict.fromkeys(name.partition(", ")[2] for name in series))
    for index, (name, line) in enumerate(series.items()):
        first, _, second = name.partition(", ")
        colour = COLOURS[firsts.index(first) % len(COLOURS)]
        mark = MARKS[seconds.index(second) % len(MARKS)]
        at = [(across.at(x), up.at(y)) for x, y in sorted(line)]
        parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in at)}" '
                     f'fill="none" stroke="{colour}" stroke-width="1.8"/>')
        parts += [_mark(mark, x, y, colour) for x, y in at]
        y = TOP + 10 + 20 * index
        parts.append(f'<path d="M{WIDTH - RIGHT + 14} {y}h24" stroke="{colour}" '
                     'stroke-width="1.8"/>')
        parts.append(_mark(mark, WIDTH - RIGHT + 26, y, colour))
        parts.append(_text(WIDTH - RIGHT + 46, y + 4, name, "start"))
    return "\n".join(parts) + "\n</svg>\n"
