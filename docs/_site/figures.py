"""The figures of the documentation: `python docs/_site/figures.py` writes them into docs/figures/."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from core.procedures.confidence import certified_radius, largest_radius  # noqa: E402 - the path above

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
STYLE = {
    "font.size": 10,
    "svg.fonttype": "path",
    "svg.hashsalt": "docs",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def radius() -> Figure:
    """The radius against the bound of the top class's probability, and how far n draws reach."""
    figure = new(7.6, 3.3)
    left, right = figure.subplots(1, 2)
    p = np.linspace(0.5, 0.9999, 800)
    for sigma, colour in ((0.25, BLUE), (0.5, ORANGE), (1.0, GREEN)):
        left.plot(p, certified_radius(p, sigma), color=colour, label=f"$\\sigma$ = {sigma:g}")
        draws = np.unique(np.logspace(1, 5, 120).astype(int))
        right.plot(draws, [largest_radius(sigma, int(n), 0.001) for n in draws], color=colour)
    left.set(xlabel="lower bound of the top class's probability", ylabel="certified radius", ylim=(0, 4))
    left.legend(frameon=False)
    right.set(xlabel="estimation draws n", ylabel="largest radius that n draws certify", xscale="log", ylim=(0, 4))
    return figure


def dual() -> Figure:
    """Two balls around an input: the level is constant in one, the class in the other."""
    figure = new(7.6, 3.1)
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    cases = ((1.0, 0.62, "the class bounds the radius"), (0.55, 0.95, "the noise level bounds the radius"))
    for axes, (level, label, title) in zip(figure.subplots(1, 2), cases, strict=True):
        axes.add_patch(Circle((0, 0), min(level, label), facecolor="#D55E0033", edgecolor="none"))
        axes.add_patch(Circle((0, 0), level, fill=False, edgecolor=BLUE, linewidth=1.8, linestyle="--"))
        axes.add_patch(Circle((0, 0), label, fill=False, edgecolor=RED, linewidth=1.8))
        axes.plot(0, 0, "ko", markersize=4)
        axes.text(0.05, 0.04, "$x$")
        axes.text(
            0,
            level + 0.03,
            r"$R_\sigma$: the estimator picks $\hat\sigma$",
            color=BLUE,
            ha="center",
            fontsize=9,
            bbox=paper,
        )
        axes.text(0, -label - 0.12, r"$R_c$: the class at $\hat\sigma$", color=RED, ha="center", fontsize=9, bbox=paper)
        axes.set(xlim=(-1.35, 1.35), ylim=(-1.2, 1.2), aspect="equal", title=title)
        axes.axis("off")
    return figure


def agreement() -> Figure:
    """Two inputs, level by level: how far the router is from it, how far the class stays at it; the least one binds."""
    figure = new(7.6, 2.9)
    sigmas, cases = (
        (0.25, 0.5, 1.0),
        (
            ("the neighbour agrees: it costs nothing", (0.82, 0.0, 0.28), (0.41, 0.66, 0.90)),
            ("it does not: its reach binds", (0.82, 0.0, 0.28), (0.41, 0.66, 0.0)),
        ),
    )
    for axes, (title, reach, stay) in zip(figure.subplots(1, 2, sharey=True), cases, strict=True):
        place = np.arange(len(sigmas))
        held = np.maximum(reach, stay)
        axes.barh(place + 0.17, reach, 0.3, color=BLUE, label="E: the router does not pick it")
        axes.barh(place - 0.17, stay, 0.3, color=RED, label="R: the class stays at it")
        axes.plot(held, place, "k|", markersize=30, markeredgewidth=1.2)
        published = min(*(each for each in reach if each), max(stay[j] for j in place if not reach[j]))
        axes.axvline(published, color=GREY, linestyle=":", label="Dual RS")
        axes.axvline(held.min(), color="black", linestyle="--", label="agreement")
        axes.set(xlabel="radius", xlim=(0, 1.3), yticks=place, title=title)
        axes.set_yticklabels(
            [f"$\\sigma$ = {s:g}" + ("\n(picked)" if not e else "") for s, e in zip(sigmas, reach, strict=True)]
        )
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=8.5, loc="outside lower center", ncols=4)
    return figure


def pipeline() -> Figure:
    """The steps, and what passes from one to the next."""
    figure = new(7.6, 2.2)
    axes = figure.subplots()
    boxes = (
        ("denoiser,\nclassifier", "train_base", GREY),
        ("radius of every\nimage at every $\\sigma$", "build_dataset (Ray)", BLUE),
        ("variance\nestimator", "train_estimator", GREY),
        ("classifier,\nfine-tuned", "finetune_classifier", GREY),
        ("certificates of\nthe test split", "certify (Ray)", BLUE),
        ("table, plots,\npage", "report", GREY),
    )
    for place, (what, job, colour) in enumerate(boxes):
        start = (place * 1.5, 0)
        box = FancyBboxPatch(start, 1.15, 0.8, boxstyle="round,pad=0.06", facecolor="white", edgecolor=colour)
        axes.add_patch(box)
        axes.text(place * 1.5 + 0.575, 0.4, what, ha="center", va="center", fontsize=8)
        axes.text(place * 1.5 + 0.575, -0.3, job, ha="center", fontsize=7.5, color=colour, family="monospace")
        if place:
            ends = ((place * 1.5 - 0.29, 0.4), (place * 1.5 - 0.05, 0.4))
            arrow = FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=10)
            axes.add_patch(arrow)
    axes.set(xlim=(-0.15, 8.85), ylim=(-0.5, 1.0), aspect="equal")
    axes.axis("off")
    return figure


def rooms() -> Figure:
    """Floors and rooms; each may use what is below it, rooms of one row do not know one another."""
    figure = new(7.6, 5.8)
    axes = figure.subplots()
    rows: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
        ("jobs", (("jobs", "parse, build, run, exit code"),)),
        ("distributed", (("studies", "runs made of runs"),)),
        ("", (("checks", "before, during and after a run"),)),
        ("", (("training", "what is learned from shards"), ("views", "rows for people"))),
        ("", (("execution", "replicas, scheduler: from a plan to committed shards"),)),
        ("", (("cluster", "joining or starting Ray"), ("store", "run directory, plan, shards, lock"))),
        ("", (("files", "disks, object stores, data sets"), ("methods", "draws, rows and their proof"))),
        ("core", (("smoothed", "the Python API"), ("report", "tables, plots, page"), ("training", "losses, loop"))),
        ("", (("evaluation", "metrics, logs"), ("models", "networks, checkpoints"), ("data", "images, labels"))),
        ("", (("config", "validated settings"),)),
        ("", (("procedures", "bounds, CERTIFY, Dual RS"), ("machine", "noise, network, engine"))),
    )
    colours, colour, y = {"jobs": GREY, "distributed": BLUE, "core": RED}, GREY, 0.0
    for floor, row in rows:
        if floor:
            y -= 0.25
            axes.text(-0.15, y + 0.3, floor, ha="right", va="center", fontsize=10, weight="bold")
            colour = colours[floor]
        width = 9.0 / len(row)
        for place, (name, what) in enumerate(row):
            style: Any = {"boxstyle": "round,pad=0.02", "facecolor": "white", "edgecolor": colour}
            axes.add_patch(FancyBboxPatch((place * width + 0.05, y), width - 0.1, 0.6, **style))
            middle = place * width + width / 2
            axes.text(middle, y + 0.4, name, ha="center", va="center", fontsize=9, family="monospace", color=colour)
            axes.text(middle, y + 0.17, what, ha="center", va="center", fontsize=7.5)
        y -= 0.78
    axes.set(xlim=(-1.9, 9.1), ylim=(y + 0.6, 0.55))
    axes.axis("off")
    return figure


def new(width_in: float, height_in: float) -> Figure:
    """A figure on white paper."""
    figure = Figure(figsize=(width_in, height_in), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


if __name__ == "__main__":
    with rc_context(STYLE):
        for make in (radius, dual, agreement, pipeline, rooms):
            file = ROOT / "docs" / "figures" / f"{make.__name__}.svg"
            make().savefig(file, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
            text = re.sub(r"<metadata>.*?</metadata>", "", file.read_text(), flags=re.DOTALL)
            file.write_text(re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE))
            print(file.relative_to(ROOT))
