"""Tables and charts as plain HTML and SVG: a page that opens anywhere, offline."""

import html
from collections.abc import Mapping, Sequence

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse}td,th{padding:.2rem .8rem .2rem 0;text-align:left;border-bottom:1px solid #ddd}
td:not(:first-child){font-variant-numeric:tabular-nums}
svg text{font:12px system-ui,sans-serif;fill:#222}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}svg text{fill:#ddd}td,th{border-color:#444}}
"""


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole page; sections are (heading, HTML)."""
    body = "\n".join(f"<h2>{html.escape(heading)}</h2>\n{content}" for heading, content in sections)
    name = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{name}</h1>\n{body}\n</body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; "none" without rows."""
    if not rows:
        return "<p>none</p>"
    cells = lambda tag, row: "".join(f"<{tag}>{html.escape(str(cell), quote=False)}</{tag}>" for cell in row)  # noqa: E731
    return (
        "<table><tr>"
        + cells("th", head)
        + "</tr>"
        + "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
        + "</table>"
    )


def bars(values: Mapping[str, float]) -> str:
    """A horizontal bar a value."""
    if not values:
        return "<p>none</p>"
    most, lines = max(values.values()) or 1, []
    for i, (name, value) in enumerate(values.items()):
        y, width = 22 * i, 480 * value / most
        lines.append(
            f'<text x="170" y="{y + 15}" text-anchor="end">{html.escape(str(name)[:28])}</text>'
            f'<rect x="180" y="{y + 3}" width="{width:.1f}" height="16" fill="#31688e"/>'
            f'<text x="{186 + width:.1f}" y="{y + 15}">{value:,}</text>'
        )
    return f'<svg width="760" height="{22 * len(values) + 4}" role="img">{"".join(lines)}</svg>'


def heat_map(rows: Sequence[Sequence[int]], across: str, up: str) -> str:
    """A grid of counts; rows[y][x], y upwards."""
    most = max((value for row in rows for value in row), default=0) or 1
    size, parts = 36, []
    for y, row in enumerate(rows):
        top = (len(rows) - 1 - y) * size
        parts.append(f'<text x="34" y="{top + 23}" text-anchor="end">{y}</text>')
        for x, value in enumerate(row):
            share = value / most
            parts.append(
                f'<rect x="{42 + x * size}" y="{top}" width="{size - 2}" height="{size - 2}" fill="#31688e" '
                f'fill-opacity="{0.06 + 0.94 * share:.3f}"><title>{across} {x}, {up} {y}: {value:,}</title></rect>'
            )
            if value:
                colour = "#fff" if share > 0.45 else "currentColor"
                parts.append(
                    f'<text x="{41 + x * size + size / 2:g}" y="{top + 22}" text-anchor="middle" style="fill:{colour}">'
                    f"{_brief(value)}</text>"
                )
    height = len(rows) * size
    parts += [
        f'<text x="{41 + x * size + size / 2:g}" y="{height + 14}" text-anchor="middle">{x}</text>'
        for x in range(len(rows[0]))
    ]
    parts.append(
        f'<text x="{42 + len(rows[0]) * size / 2:g}" y="{height + 34}" text-anchor="middle">{html.escape(across)}</text>'
    )
    parts.append(f'<text x="10" y="{height / 2:g}">{html.escape(up)}</text>')
    return f'<svg width="{60 + len(rows[0]) * size}" height="{height + 44}" role="img">{"".join(parts)}</svg>'


def _brief(value: int) -> str:
    return f"{value / 1000:.0f}k" if value >= 10_000 else str(value)
