"""A figure of matplotlib as SVG in a page: it takes the page's colours and answers to a pointer.

Texts stay texts, black is the page's own colour, and what `figures.mark` has marked carries
`data-row` and `data-kind`, for `assets/report.js`.
"""

from __future__ import annotations

import json
import re
from io import StringIO
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

_MARK = re.compile(r"row-(\d+)-(\w+)")
_POINTS_PER_INCH = 72  # a unit of the SVG is a point
_LINK = "{http://www.w3.org/1999/xlink}href"


def svg(figure: Figure, name: str, title: str) -> str:
    """One `<svg>` element that fills the width it is given.

    Args:
        figure: drawn, and not saved before with other settings.
        name: unique in the page; its ids begin with it.
        title: for those who cannot see it.

    Returns:
        The element. `data-panels` says, for each axes, which rectangle of the SVG is which of the
        data: {"left", "right", "top", "bottom", "x": [2], "y": [2], "title", "xlabel", "ylabel"}.
    """
    buffer = StringIO()
    # Texts stay texts, and every point of a curve can be pointed at.
    settings = {"svg.fonttype": "none", "path.simplify": False, "svg.hashsalt": name}
    with matplotlib.rc_context(settings):  # type: ignore[arg-type]
        figure.savefig(buffer, format="svg", transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())  # of our own making, not from outside
    for metadata in root.findall("{*}metadata"):
        root.remove(metadata)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = _attributes(element.attrib, name)
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-label", title)
    root.set("data-panels", json.dumps(_panels(figure)))
    return ElementTree.tostring(root, encoding="unicode")


def _attributes(attributes: dict[str, str], name: str) -> dict[str, str]:
    """An element's attributes, with marks, the page's colour and ids that no other figure has."""
    found = {}
    for key, value in attributes.items():
        if key == "id" and (mark := _MARK.fullmatch(value)):
            found["data-row"], found["data-kind"] = mark.groups()
        elif key == "id":
            found["id"] = f"{name}-{value}"
        elif key == _LINK:
            found["href"] = value.replace("#", f"#{name}-", 1)
        else:
            value = value.replace("url(#", f"url(#{name}-").replace("#000000", "currentColor")
            found[key] = value
    return found


def _panels(figure: Figure) -> list[dict[str, object]]:
    width, height = figure.get_size_inches() * _POINTS_PER_INCH
    panels = []
    for axes in figure.axes:
        if not axes.get_visible():
            continue
        box = axes.get_position()
        panels.append(
            {
                "left": round(box.x0 * width, 2),
                "right": round(box.x1 * width, 2),
                "top": round((1 - box.y1) * height, 2),
                "bottom": round((1 - box.y0) * height, 2),
                "x": [float(end) for end in axes.get_xlim()],
                "y": [float(end) for end in axes.get_ylim()],
                "title": axes.get_title(),
                "xlabel": axes.get_xlabel() or figure.get_supxlabel(),
                "ylabel": axes.get_ylabel() or figure.get_supylabel(),
            }
        )
    return panels
