"""Charts as SVG and HTML text, without a plotting library: lines, bars, a matrix. The colours are the page style's."""

import dataclasses
import html
from collections.abc import Sequence

import numpy as np

WIDTH, HEIGHT = 440, 320
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 42  # margins around the plotting area
NUM_COLORS = 8  # of the style's --c0 .. --c7


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a chart; `color` is a position in the style's colours, None for a faint line without a legend.

    Positions beyond the colours begin anew and are dashed.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    color: int | None = None
    is_dashed: bool = False


STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--dim:#667;--grid:#e3e6ea;--card:#f6f7f9;--faint:#9aa7b5;
--c0:#2563c9;--c1:#d9480f;--c2:#2b8a3e;--c3:#9c36b5;--c4:#b08900;--c5:#0b7285;--c6:#c2255c;--c7:#5c636a}
@media(prefers-color-scheme:dark){:root{--bg:#15181c;--fg:#e6e9ec;--dim:#9aa4af;--grid:#2c3238;--card:#1d2126;--faint:#5b6672;
--c0:#6ea8fe;--c1:#ff922b;--c2:#69db7c;--c3:#da77f2;--c4:#ffd43b;--c5:#3bc9db;--c6:#f783ac;--c7:#adb5bd}}
body{margin:0 auto;max-width:1180px;padding:24px;background:var(--bg);color:var(--fg)}
body{font:15px/1.5 system-ui,sans-serif}
h1{margin:0 0 4px;font-size:26px}h2{margin:36px 0 8px;font-size:19px}p{margin:4px 0 10px;max-width:75ch}
.dim{color:var(--dim)}.row{display:flex;flex-wrap:wrap;gap:20px;align-items:flex-start}
figure{margin:0;flex:1 1 400px;max-width:560px}figcaption{color:var(--dim);font-size:13px}svg{width:100%;height:auto}
svg text{fill:var(--dim);font:12px system-ui,sans-serif}svg .axis{stroke:var(--dim)}svg .grid{stroke:var(--grid)}
svg .line{fill:none;stroke-width:2}svg .faint{fill:none;stroke:var(--faint);stroke-width:1;opacity:.6}
svg .faint:hover{stroke:var(--c1);opacity:1;stroke-width:2.5}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:3px 10px;text-align:right}
td:first-child,th:first-child{text-align:left}th{color:var(--dim);font-weight:500}
tr+tr td{border-top:1px solid var(--grid)}
.bar{min-width:180px;padding:3px 0}.bar div{height:11px;border-radius:2px}.scroll{overflow-x:auto}
.matrix td:first-child{text-align:right;white-space:nowrap}
.matrix td{min-width:34px;text-align:center;border:1px solid var(--bg)}
.matrix th.col{writing-mode:vertical-rl;transform:rotate(180deg);text-align:left}
.key{display:inline-block;white-space:nowrap;border-top:2.5px;margin:3px 10px 0 0}td.text{text-align:left}
.gallery{display:flex;flex-wrap:wrap;gap:14px}
.gallery figure{flex:0 0 auto;max-width:none}.gallery img{display:block;border-radius:3px}"""


def line_chart(lines: Sequence[Line], *, x_label: str, y_label: str, title: str) -> str:
    """Lines over axes from 0 to 1, as an SVG in a figure with a legend."""
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">', *_axes()]
    for line in sorted(lines, key=lambda line: line.color is not None):
        style = 'class="faint"' if line.color is None else f'class="line" style="stroke:{color(line.color)}"'
        dashes = ' stroke-dasharray="5 4"' if _stroke(line) == "dashed" else ""
        points = _points(line.x, line.y)
        if points:
            parts.append(
                f'<polyline {style}{dashes} points="{points}"><title>{html.escape(line.name)}</title></polyline>'
            )
    parts += [*_labels(x_label, y_label), "</svg>"]
    keys = " ".join(_key(line.name, line.color, _stroke(line)) for line in lines if line.color is not None)
    return f"<figure>{''.join(parts)}<figcaption>{html.escape(title)}<br>{keys}</figcaption></figure>"


def reliability_chart(edges: np.ndarray, heights: np.ndarray, counts: np.ndarray, *, title: str) -> str:
    """Bars of a share by score, with the diagonal on which scores and shares agree."""
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">', *_axes()]
    for left, right, height, count in zip(edges[:-1], edges[1:], heights, counts, strict=True):
        if count:
            (x1, y1), (x2, y2) = _place(left, height), _place(right, 0)
            parts.append(
                f'<rect x="{x1 + 1:.1f}" y="{y1:.1f}" width="{x2 - x1 - 2:.1f}" height="{y2 - y1:.1f}" '
                f'style="fill:{color(0)};opacity:.75"><title>{height:.2f} of {count} detections</title></rect>'
            )
    parts.append(f'<polyline class="line" style="stroke:{color(1)}" points="{_points([0, 1], [0, 1])}"/>')
    parts += [*_labels("score", "share of true detections"), "</svg>"]
    return f"<figure>{''.join(parts)}<figcaption>{html.escape(title)}</figcaption></figure>"


def interval_chart(rows: Sequence[tuple[str, float, float, float]], *, title: str, first_color: int = 0) -> str:
    """A dot with whiskers for each (name, value, low, high), shares shown as points, over one axis."""
    low, high = min((row[2] for row in rows), default=0), max((row[3] for row in rows), default=0)
    margin = 0.08 * (high - low) or 0.01
    low, high = low - margin, high + margin
    step, top = 26, 14
    bottom = top + step * len(rows)

    def place(value: float) -> float:
        return 150 + (value - low) / (high - low) * (WIDTH - 150 - RIGHT)

    parts = [f'<svg viewBox="0 0 {WIDTH} {bottom + 30}" role="img" aria-label="{html.escape(title)}">']
    for tick in np.linspace(low + margin, high - margin, 5):
        x = place(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{100 * tick:.1f}</text>')
    if low < 0 < high:
        x = place(0)
        parts.append(f'<line class="axis" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}"/>')
    for i, (name, value, start, end) in enumerate(rows):
        y = top + step * (i + 0.5)
        tip = f"<title>{100 * value:.1f} ({100 * start:.1f} to {100 * end:.1f})</title>"
        ends = f'x1="{place(start):.1f}" y1="{y}" x2="{place(end):.1f}" y2="{y}"'
        parts.append(f'<line class="line" style="stroke:{color(first_color + i)}" {ends}>{tip}</line>')
        parts.append(
            f'<circle cx="{place(value):.1f}" cy="{y}" r="4.5" style="fill:{color(first_color + i)}">{tip}</circle>'
        )
        parts.append(f'<text x="142" y="{y + 4}" text-anchor="end">{html.escape(name[-22:])}</text>')
    return f"<figure>{''.join(parts)}</svg><figcaption>{html.escape(title)}</figcaption></figure>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain texts."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def bar_table(header: Sequence[str], rows: Sequence[tuple[str, Sequence[float | None], Sequence[str]]]) -> str:
    """A table whose rows are a name, values that are drawn as bars beside each other's scale, and further texts."""
    largest = max((v for _, values, _ in rows for v in values if v is not None), default=0) or 1
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = []
    for name, values, texts in rows:
        bars = "".join(
            f'<div style="width:{100 * (value or 0) / largest:.1f}%;background:{color(i)}"></div>'
            for i, value in enumerate(values)
        )
        cells = "".join(f"<td{_alignment(text)}>{html.escape(text)}</td>" for text in texts)
        body.append(f'<tr><td>{html.escape(name)}</td><td class="bar">{bars}</td>{cells}</tr>')
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def matrix(counts: np.ndarray, names: Sequence[str], *, corner: str) -> str:
    """A square table of counts, each row shaded by its shares."""
    head = "".join(f'<th class="col">{html.escape(name)}</th>' for name in names)
    body = []
    for name, row in zip(names, counts.tolist(), strict=True):
        total = sum(row) or 1
        shade = f"background:color-mix(in srgb,{color(0)} {{:.0f}}%,transparent)"
        cells = "".join(f'<td style="{shade.format(75 * n / total)}">{n or ""}</td>' for n in row)
        body.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    head = f"<tr><th>{html.escape(corner)}</th>{head}</tr>"
    return f'<div class="scroll"><table class="matrix">{head}{"".join(body)}</table></div>'


def legend(names: Sequence[str]) -> str:
    """The names of bars with their colours, in order."""
    return f'<p class="dim">{" ".join(_key(name, i, "solid") for i, name in enumerate(names))}</p>'


def color(position: int) -> str:
    """A colour of the style, beginning anew after the last."""
    return f"var(--c{position % NUM_COLORS})"


def _key(name: str, position: int, stroke: str) -> str:
    style = f"border-color:{color(position)};border-top-style:{stroke}"
    return f'<span class="key" style="{style}">{html.escape(name)}</span>'


def _alignment(text: str) -> str:
    """Numbers stand to the right, words to the left."""
    return ' class="text"' if text[:1].isalpha() else ""


def _stroke(line: Line) -> str:
    return "dashed" if line.is_dashed or (line.color or 0) >= NUM_COLORS else "solid"


def _place(x: float, y: float) -> tuple[float, float]:
    return LEFT + x * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM)


def _points(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> str:
    """Positions as SVG has them, without those that are not numbers and without steps too small to see."""
    placed, last = [], None
    pairs = list(zip(x, y, strict=True))
    for i, (a, b) in enumerate(pairs):
        if not (np.isfinite(a) and np.isfinite(b)):
            continue
        point = _place(float(a), float(b))
        is_far = last is None or abs(point[0] - last[0]) + abs(point[1] - last[1]) > 0.7
        if is_far or i == len(pairs) - 1:
            placed.append(f"{point[0]:.1f},{point[1]:.1f}")
            last = point
    return " ".join(placed)


def _axes() -> list[str]:
    parts = []
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1):
        (x, y0), (x0, y) = _place(tick, 0), _place(0, tick)
        x1, y1 = _place(1, 1)
        kind = "axis" if tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{x:.1f}" y1="{y0:.1f}" x2="{x:.1f}" y2="{y1:.1f}"/>')
        parts.append(f'<line class="{kind}" x1="{x0:.1f}" y1="{y:.1f}" x2="{x1:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{x:.1f}" y="{y0 + 16:.1f}" text-anchor="middle">{tick:g}</text>')
        parts.append(f'<text x="{x0 - 7:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    return parts


def _labels(x_label: str, y_label: str) -> list[str]:
    (x, _), (_, y) = _place(0.5, 0), _place(0, 0.5)
    turned = f'text-anchor="middle" transform="rotate(-90 13 {y:.1f})"'
    return [
        f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(x_label)}</text>',
        f'<text x="13" y="{y:.1f}" {turned}>{html.escape(y_label)}</text>',
    ]
