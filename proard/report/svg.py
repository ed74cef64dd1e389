"""Matplotlib figures as SVG: reproducible, with text as text, and with colours that a page can replace."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.figure import Figure

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

PIXELS_PER_POINT = 1.42  # a figure of 10.4 inches fills the page's column

# Colours on white, after Okabe and Ito (safe for colour-blind readers); the page maps each to a variable of its own.
COLOURS: dict[str, str] = {
    "ink": "#1c2733",
    "muted": "#66727f",
    "rule": "#dde2e8",
    "paper": "#fefefe",
    "dot": "#9aa5b1",
    "blue": "#0072b2",
    "orange": "#d55e00",
    "green": "#009e73",
    "sky": "#4da6d9",
    "navy": "#0b3c5d",
    "gold": "#e6a100",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "proard",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": COLOURS["paper"],
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 10.5,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.7,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.labelcolor": COLOURS["ink"],
    "ytick.labelcolor": COLOURS["ink"],
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.7,
}


def to_svg(figure: Figure, title: str, *, tooltips: Mapping[str, Sequence[str]] | None = None) -> str:
    """A figure as a standalone SVG file on white.

    Parameters
    ----------
    title : str
        Title for screen readers.
    tooltips : mapping, optional
        For each group id (`set_gid`) of a scatter, one text per point.
    """
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", facecolor=COLOURS["paper"], metadata={"Date": None, "Creator": None})
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(buffer.getvalue())
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    heading = ElementTree.Element(f"{{{SVG}}}title")
    heading.text = title
    root.insert(0, heading)
    root.set("role", "img")
    for group, texts in (tooltips or {}).items():
        _add_tooltips(root, group, texts)
    text = ElementTree.tostring(root, encoding="unicode")
    text = re.sub(r"""(font(?:-family)?:[^;"]*?)(?:'DejaVu Sans'|DejaVu Sans)[^;"]*""", rf"\1{FONTS}", text)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'


def _add_tooltips(root: ElementTree.Element, group: str, texts: Sequence[str]) -> None:
    """Give each point of a scatter a title, if every point was drawn."""
    found = root.find(f".//{{{SVG}}}g[@id='{group}']")
    points = [] if found is None else list(found.iter(f"{{{SVG}}}use"))
    if len(points) != len(texts):
        return
    for point, words in zip(points, texts, strict=True):
        ElementTree.SubElement(point, f"{{{SVG}}}title").text = words


def inline(svg: str, prefix: str) -> str:
    """A standalone SVG as part of a page: unique ids, colours as the page's variables, scalable.

    Each colour of `COLOURS` becomes `var(--NAME)`; the width in points becomes the largest width on screen.
    """
    root = svg[svg.index("<svg") :].strip()
    head, body = root.split(">", 1)
    (width,) = re.findall(r'width="([\d.]+)pt"', head)
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)
    text = f'{head} style="max-width: {PIXELS_PER_POINT * float(width):.0f}px">{body}'
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text
