"""Curves that a reader can question: switch one off, read all of them at a radius. Nothing is loaded, nothing is sent.

A chart is the figure's own SVG with a legend of buttons below it; without JavaScript it is still the figure.
"""

import html
import json
import math
from dataclasses import dataclass
from typing import Final

__all__ = ["CSS", "SCRIPT", "Chart", "Curve", "chart_html"]


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a chart: the id of its group in the SVG, its look, and its values on the chart's grid (nan: none)."""

    id: str
    name: str
    colour: str
    dashes: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """What the page needs to answer for a figure: what the ascending grid counts, where its first and last value and
    the ends of the axes are in user units of the SVG, and the curves in the order of the legend.
    """

    x_name: str
    grid: tuple[float, ...]
    left: float
    right: float
    top: float
    bottom: float
    curves: tuple[Curve, ...]


def chart_html(chart: Chart, svg: str) -> str:
    """The inside of a figure: the SVG, a legend of buttons, and the numbers for the script."""
    numbers = {
        "x": chart.x_name,
        "grid": [round(x, 6) for x in chart.grid],
        "box": [chart.left, chart.right, chart.top, chart.bottom],
        "curves": [
            {"id": curve.id, "values": [None if math.isnan(v) else round(v, 2) for v in curve.values]}
            for curve in chart.curves
        ],
    }
    data = json.dumps(numbers, separators=(",", ":")).replace("<", "\\u003c")
    keys = "\n".join(_key(curve) for curve in chart.curves)
    return (
        f'{svg}\n<p class="at" aria-live="polite"></p>\n<div class="keys">\n{keys}\n</div>\n'
        f'<script type="application/json">{data}</script>'
    )


def _key(curve: Curve) -> str:
    dashes = f' stroke-dasharray="{" ".join(f"{d:g}" for d in curve.dashes)}"' if curve.dashes else ""
    swatch = (
        '<svg viewBox="0 0 26 8" aria-hidden="true"><path d="M1 4H25" fill="none" stroke-width="2.5" '
        f'stroke="{html.escape(curve.colour)}"{dashes}/></svg>'
    )
    name = html.escape(curve.name)
    return f'<button type="button" aria-pressed="true">{swatch}<span>{name}</span><output></output></button>'


CSS: Final = """
.keys { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); gap: .1rem .6rem; }
.keys button { display: flex; align-items: center; gap: .5rem; padding: .3rem .4rem; border: 0; border-radius: 4px;
  background: none; color: #1b1f24; font: inherit; font-size: .85rem; text-align: left; cursor: pointer; }
.keys button:hover { background: #eef1f4; }
.keys button[aria-pressed="false"] { opacity: .45; text-decoration: line-through; }
.keys svg { flex: none; width: 1.9rem; margin: 0; } .keys span { flex: 1; }
.keys output { font-variant-numeric: tabular-nums; }
.at { margin: .2rem .4rem; min-height: 1.3em; font-size: .85rem; color: #1b1f24; }
.card > svg { touch-action: pan-y; }
"""

SCRIPT: Final = """
for (const box of document.querySelectorAll(".scroll")) {
  const look = () => box.classList.toggle("more", box.scrollWidth - box.clientWidth - box.scrollLeft > 1);
  box.addEventListener("scroll", look); addEventListener("resize", look); look();
}
for (const card of document.querySelectorAll(".chart")) {
  const chart = JSON.parse(card.querySelector("script").textContent);
  const svg = card.querySelector("svg"), at = card.querySelector(".at");
  const keys = [...card.querySelectorAll(".keys button")], last = chart.grid.length - 1;
  const [left, right, top, bottom] = chart.box;
  const guide = document.createElementNS(svg.namespaceURI, "line");
  const set = (x) => Object.entries({x1: x, x2: x, y1: top, y2: bottom}).forEach(([k, v]) => guide.setAttribute(k, v));
  guide.setAttribute("stroke", "#444"); guide.setAttribute("visibility", "hidden"); svg.append(guide);
  const hint = "Point at the curves (or use the arrow keys) to read them. A name switches its curve off.";
  let place = null;
  function show(to) {
    place = to === null ? null : Math.min(last, Math.max(0, to));
    guide.setAttribute("visibility", place === null ? "hidden" : "visible");
    if (place !== null) set(left + (right - left) * place / last);
    at.textContent = place === null ? hint : `${chart.x} ${chart.grid[place].toFixed(3)}`;
    keys.forEach((key, i) => {
      const value = place === null ? null : chart.curves[i].values[place];
      key.querySelector("output").textContent = value === null ? "" : `${value.toFixed(2)}%`;
    });
  }
  keys.forEach((key, i) => key.addEventListener("click", () => {
    const on = key.getAttribute("aria-pressed") !== "true";
    key.setAttribute("aria-pressed", on);
    document.getElementById(chart.curves[i].id).style.display = on ? "" : "none";
  }));
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), width = svg.viewBox.baseVal.width;
    const x = (event.clientX - box.left) / box.width * width;
    show(Math.round((x - left) / (right - left) * last));
  });
  svg.addEventListener("pointerleave", () => show(null));
  svg.setAttribute("tabindex", "0");
  svg.addEventListener("keydown", (event) => {
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (step) { event.preventDefault(); show((place ?? 0) + step * (event.shiftKey ? 20 : 2)); }
    if (event.key === "Escape") show(null);
  });
  show(null);
}
"""
