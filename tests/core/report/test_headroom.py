"""From the oracle down to the certificate: by hand, by loops, and on the page of the report's five examples."""

import csv
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from core.errors import DataError
from core.evaluation.metrics import reached
from core.report import DualRows, ReportData
from core.report import headroom as module
from core.report.agreement import CONSTANT, AgreementRows
from core.report.headroom import Routed, agreement_claims, dual_claim, headroom, headroom_sections
from core.report.pages import html_page, markdown_page
from tests.core.report.test_report import Page, cells, dual, report, standard

LOST = ["wrong level", "price of alpha", "capped by the router's reach", "capped by the class at another level"]
LOST += ["abstained"]


def parts(stations: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    losses = -np.diff(np.stack(list(stations.values())), axis=0)
    return dict(zip(list(stations)[1:], losses, strict=True))


def test_headroom_one_example_for_each_cause_equals_hand_count() -> None:
    # In order: nothing but alpha; wrong level; wrong class there; router; class elsewhere; abstained; never right.
    level = np.array([[0.4, 0.3], [0.4, 0.9], [0.0, 0.5], [0.5, 0.1], [0.5, 0.1], [0.5, 0.1], [0.0, 0.0]])
    claim = Routed(
        name="claim",
        choice=np.zeros(7, int),
        at_share=np.array([0.35, 0.3, 0.7, 0.4, 0.4, 0.4, 0.7]),  # .7: of a wrong class
        certified=np.array([0.35, 0.3, 0.0, 0.1, 0.15, 0.0, 0.0]),
        by_router=np.array([0, 0, 0, 1, 0, 0, 0], bool),
        by_class=np.array([0, 0, 0, 0, 1, 0, 0], bool),
    )
    stations = headroom(level, claim)
    assert stations["oracle"].tolist() == [0.4, 0.9, 0.5, 0.5, 0.5, 0.5, 0.0]
    np.testing.assert_array_equal(stations["abstained"], claim.certified)
    expected = {
        "wrong level": [0, 0.5, 0.5, 0, 0, 0, 0],
        "price of alpha": [0.05, 0.1, 0, 0.1, 0.1, 0.1, 0],
        "capped by the router's reach": [0, 0, 0, 0.3, 0, 0, 0],
        "capped by the class at another level": [0, 0, 0, 0, 0.25, 0, 0],
        "abstained": [0, 0, 0, 0, 0, 0.4, 0],
    }
    found = parts(stations)
    assert list(found) == LOST
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-15, err_msg=name)
    without = headroom(level, replace(claim, by_class=None, by_router=np.array([0, 0, 0, 1, 1, 0, 0], bool)))
    assert list(parts(without)) == [name for name in LOST if "another" not in name]
    assert parts(without)["capped by the router's reach"].tolist() == pytest.approx([0, 0, 0, 0.3, 0.25, 0, 0])


def test_headroom_radii_that_other_draws_gave_keep_their_sum_and_the_signs_below_alpha() -> None:
    """The votes at the class's share are known only roughly, or the routed method drew noise of its own."""
    level, at_share = np.full((5, 1), 0.5), np.array([0.6, 0.3, 0.45, 0.45, 0.45])
    certified, router = np.array([0.0, 0.4, 0.48, 0.7, 0.4]), np.array([0, 1, 0, 1, 0], bool)
    claim = Routed(name="claim", choice=np.zeros(5, int), at_share=at_share, certified=certified, by_router=router)
    found = parts(headroom(level, claim))
    assert found["wrong level"].tolist() == [0, 0, 0, 0, 0]
    assert found["price of alpha"].tolist() == pytest.approx([0, 0.1, 0.02, -0.2, 0.1])
    assert found["capped by the router's reach"].tolist() == [0, 0, 0, 0, 0]
    assert found["abstained"].tolist() == [0.5, 0, 0, 0, 0]


@pytest.mark.parametrize("change", [{"choice": np.zeros(2, int)}, {"by_class": np.zeros((3, 2), bool)}])
def test_headroom_shapes_that_differ_are_refused(change: dict[str, Any]) -> None:
    zero = np.zeros(3)
    claim = Routed(name="claim", choice=np.zeros(3, int), at_share=zero, certified=zero, by_router=zero > 0)
    with pytest.raises(DataError, match=r"claim: standard RS is .* got \(3, 2\) and"):
        headroom(np.zeros((3, 2)), replace(claim, **change))
    with pytest.raises(DataError, match=r"got \(4, 2\)"):
        headroom(np.zeros((4, 2)), claim)


def certificates(seed: int, num: int, levels: int) -> tuple[np.ndarray, ...]:
    """Radii at alpha, E and R of the class that was chosen, m, and whether that class is right."""
    rng = np.random.default_rng(seed)
    share = np.where(rng.random((num, levels)) < 0.3, 0.0, rng.integers(1, 9, (num, levels)) / 8)
    right = rng.random((num, levels)) < 0.8  # of what standard RS answers at each level
    level = np.where(right, share + (share > 0) * rng.integers(0, 2, share.shape) / 16, 0.0)
    choice = rng.integers(0, levels, num)
    row = np.arange(num)
    radius_class = np.where(rng.random(share.shape) < 0.2, 0.0, share)
    radius_class[row, choice] = share[row, choice]
    excluded = np.where(rng.random(share.shape) < 0.4, 0.0, rng.integers(1, 9, share.shape) / 8)
    excluded[row, choice] = 0.0
    return level, excluded, radius_class, choice, right[row, choice]


def certified(name: str, correct: Any, radius: Any, constant: Any, choice: Any, binding: Any, e: Any, r: Any) -> Any:
    nothing = np.zeros(len(choice))
    return AgreementRows(
        name=name, correct=correct, radius=radius, radius_constant=constant, sigma_choice=choice, binding=binding,
        radius_excluded=e, radius_class=r, abstained=radius == 0, sigma=nothing, p_lower=nothing, alpha_router=0.5,
        num_draws=choice, draws_router=choice, draws_class=choice, draws_others=choice,
    )  # fmt: skip


@pytest.mark.parametrize("strict", [True, False])
def test_agreement_claims_random_certificates_equal_loops(strict: bool) -> None:
    level, excluded, radius_class, choice, right = certificates(3, 400, 3)
    radii = np.array([0.0, 0.25, 0.5, 0.75])
    radius, constant, binding, wanted = [], [], [], []
    for x, m in enumerate(choice):
        protects = [max(e, r) for e, r in zip(excluded[x], radius_class[x], strict=True)]
        t = min(protects)
        radius.append(t)
        binding.append(-1 if t == 0 else m if protects[m] == t else protects.index(t))
        others = [excluded[x, j] for j in range(3) if j != m]
        constant.append(min(*others, radius_class[x, m]))
        known = radius_class[x, m] if right[x] else 0.0  # what the class at m has at its share of alpha
        lost = dict.fromkeys(LOST, 0.0)
        lost["wrong level"] = max(level[x]) - level[x, m]
        lost["price of alpha"] = level[x, m] - known
        if t == 0 or not right[x]:
            lost["abstained"] = known
        elif t < known:
            j = binding[-1]
            side = "router's reach" if excluded[x, j] > radius_class[x, j] else "class at another level"
            lost[f"capped by the {side}"] = known - t
        wanted.append([lost[name] for name in LOST])
    t, c = np.array(radius), np.array(constant)
    args = (choice, np.array(binding), excluded, radius_class)
    agreement, published = agreement_claims(certified("A", right & (t > 0), t, c, *args))
    found = parts(stations := headroom(level, agreement))
    np.testing.assert_array_equal(np.stack(list(found.values()), axis=1), wanted)
    assert all(np.any(values > 0) for values in found.values()), "a cause that never came up"
    np.testing.assert_array_equal(sum(found.values()), level.max(axis=1) - np.where(right, t, 0.0))
    at_radii = parts({name: reached(each, radii, strict).sum(axis=0) for name, each in stations.items()})
    assert all(np.all(values >= 0) for values in at_radii.values())
    total = reached(level.max(axis=1), radii, strict).sum(axis=0) - reached(agreement.certified, radii, strict).sum(0)
    np.testing.assert_array_equal(sum(at_radii.values()), total)

    # Of the constant claim everything that the class at m does not give is the router's.
    share = np.where(right, radius_class[np.arange(400), choice], 0.0)
    found = parts(headroom(level, published))
    np.testing.assert_array_equal(published.certified, np.where(right, c, 0.0))
    capped, none = np.where(published.certified > 0, share - c, 0.0), np.where(published.certified > 0, 0.0, share)
    np.testing.assert_array_equal(found["capped by the router's reach"], capped)
    np.testing.assert_array_equal(found["abstained"], none)


def markdown_table(text: str, row: str) -> dict[str, list[str]]:
    (table,) = [part for part in text.split("\n\n") if part.startswith("|") and f"\n| {row}" in part]
    return cells(table)


def test_headroom_sections_five_examples_equal_hand_count() -> None:
    """S_m: .6 1.2 .2 0 0; at the share .6 1.1 .2 0 0; certified .6 .7 .2 0 0; best single level .6 1.2 0 0 0."""
    (section,) = headroom_sections(report())
    assert section.summary == (
        "Dual RS: mean certified radius 0.3000 of the oracle's 0.4200, -0.0600 ± 0.1166 against the best single level. "
        "Of the 0.1200 that are missing the largest part is 'capped by the router's reach' (0.0800); it takes a router "
        "that is surer, or reaches further where it is sure (certify.num_estimation, sigma_e)."
    )
    assert sorted(section.files) == ["headroom.csv", "headroom.png"]
    text = markdown_page("Headroom", section.blocks, {})
    assert "](headroom.png)" in text
    table = markdown_table(text, "Best single level")
    assert table["Best single level (sigma = 0.5)"] == ["0.3600", "40.00", "40.00", "40.00", "20.00", "0.00"]
    assert table["Oracle (not a certificate)"] == ["0.4200", "80.00", "40.00", "40.00", "20.00", "0.00"]
    assert table["Dual RS: its choice, not certified"] == ["0.4000", "60.00", "40.00", "40.00", "20.00", "0.00"]
    assert table["Dual RS"] == ["0.3000", "60.00", "40.00", "40.00", "0.00", "0.00"]
    # One of five gained, or lost: a fifth, sd sqrt(.2).
    less = ["-0.0600 ± 0.1166", "+20.00 ± 20.00", "+0.00 ± 0.00", "+0.00 ± 0.00", "-20.00 ± 20.00", "+0.00 ± 0.00"]
    assert table["Dual RS less the best single level"] == less
    lost = markdown_table(text, "Dual RS: wrong level")
    assert lost["Dual RS: wrong level"] == ["0.0200", "20.00", "0.00", "0.00", "0.00", "0.00"]
    assert lost["Dual RS: price of alpha"] == ["0.0200", "0.00", "0.00", "0.00", "0.00", "0.00"]
    assert lost["Dual RS: capped by the router's reach"] == ["0.0800", "0.00", "0.00", "0.00", "20.00", "0.00"]
    assert lost["Dual RS: abstained"] == ["0.0000", "0.00", "0.00", "0.00", "0.00", "0.00"]
    lines = csv.DictReader(section.files["headroom.csv"].decode().splitlines())
    rows = {(row["quantity"], row["radius"]): row for row in lines}
    assert float(rows["capped by the router's reach", ""]["value"]) == pytest.approx(0.08)
    assert float(rows["certified", "1.0"]["value"]) == 0.0
    assert float(rows["certified less best single level", ""]["standard_error"]) == pytest.approx(0.1166, abs=5e-5)
    assert rows["oracle", "0.0"]["standard_error"] == ""
    assert len(rows) == 9 * 6
    page = Page(html_page("Headroom", section.blocks, {}))
    assert "svg" in page.tags
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))


def test_dual_claim_certificate_of_a_wrong_class_is_none() -> None:
    claim = dual_claim(replace(dual(), correct=np.array([False, True, True, False, False])), np.zeros((5, 2)))
    assert claim.certified.tolist() == [0, 0.7, 0.2, 0, 0]
    assert claim.by_router.tolist() == [False, True, False, False, False]


def test_headroom_sections_count_radii_as_the_report_does() -> None:
    for strict, share in ((True, 0.2), (False, 0.4)):
        (section,) = headroom_sections(replace(report(), radii=np.array([0.6]), strict=strict))
        lines = csv.DictReader(section.files["headroom.csv"].decode().splitlines())
        found = [row["value"] for row in lines if (row["quantity"], row["radius"]) == ("certified", "0.6")]
        assert [float(value) for value in found] == [share]


def three_claims(data: ReportData) -> list[Routed]:
    assert isinstance(data.dual, DualRows)
    rows = data.dual
    excluded, radius_class = np.array([[0.9, 0.0]] * 5), np.array([[0.0, 0.9]] * 5)
    binding = np.array([0, 0, 0, -1, -1])
    args = (rows.correct, rows.radius, rows.radius, rows.sigma_choice, binding, excluded, radius_class)
    at_share = data.standard_at_dual_alpha
    assert at_share is not None
    return [dual_claim(rows, at_share), *agreement_claims(certified("Agreement", *args))]


def test_headroom_sections_several_claims_share_a_table_and_a_legend(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, draw = [], module._figure

    def keep(*args: Any) -> Any:
        drawn.append(draw(*args))
        return drawn[-1]

    monkeypatch.setattr(module, "_figure", keep)
    monkeypatch.setattr(module, "_claims", three_claims)
    (section,) = headroom_sections(report())
    names = ["Dual RS", "Agreement", CONSTANT]
    assert [line.split(":")[0] for line in section.summary.splitlines()] == names
    text = markdown_page("Headroom", section.blocks, {})
    assert set(names) < set(markdown_table(text, "Best single level"))
    lost = markdown_table(text, "Dual RS: wrong level")
    other = "capped by the class at another level"
    assert [name for name in lost if name.endswith(other)] == [f"Agreement: {other}"]
    lines = csv.DictReader(section.files["headroom.csv"].decode().splitlines())
    assert {row["claim"] for row in lines} == set(names)
    (figure,) = drawn
    (legend,) = figure.legends
    assert [each.get_text() for each in legend.get_texts()] == ["Best single level (sigma = 0.5)", *LOST, "certified"]
    for axes in figure.axes:  # the bars of a radius end where the oracle does
        bars = [bar for bar in axes.patches if isinstance(bar, Rectangle)]
        tops = np.array([[bar.get_y() + bar.get_height(), bar.get_height()] for bar in bars]).reshape(6, 5, 2)
        np.testing.assert_allclose(tops[:, :, 1].sum(axis=0), [80, 40, 40, 20, 0], atol=1e-12)
        np.testing.assert_allclose(tops[0, :, 0], [80, 40, 40, 20, 0], atol=1e-12)
        np.testing.assert_allclose(tops[-1, :, 0], [60, 40, 40, 0, 0], atol=1e-12)


def test_headroom_sections_without_a_routed_method_or_its_radii_are_none() -> None:
    assert headroom_sections(replace(report(), dual=None)) == []
    assert headroom_sections(replace(report(), standard_at_dual_alpha=None)) == []


def test_headroom_sections_nothing_certified_or_one_example_make_up_nothing() -> None:
    zero = np.zeros(1)
    rows = replace(
        dual(), correct=zero > 0, abstained=zero == 0, radius=zero, radius_sigma=zero, radius_class=zero, p_lower=zero,
        sigma=zero + np.nan, bounded_by=np.array(["none"]), sigma_choice=np.array([0]), num_draws=np.array([110]),
    )  # fmt: skip
    one = replace(
        report(), dual=rows, baseline=(), standard=(standard(0.25, [0], [0.0]),), standard_at_dual_alpha=zero[:, None]
    )
    (section,) = headroom_sections(one)
    assert section.summary == (
        "Dual RS: mean certified radius 0.0000 of the oracle's 0.0000, +0.0000 against the best single level. "
        "Nothing is lost on the way."
    )
    assert not any("nan" in str(block) for block in section.blocks if not hasattr(block, "svg"))
