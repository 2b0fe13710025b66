"""The model of machines that come and go: against what can be said without it."""

from dataclasses import replace

import pytest

from bench.scale import Cluster, scale, simulate
from bench.settings import Settings

STEADY = Cluster(20, 30.0, 2000, life_s=1e12, notice_s=0.0, away_s=100.0, load_s=0.0, driver_s=0.0)


def test_simulate_machines_that_stay_work_all_the_time() -> None:
    found = simulate(replace(STEADY, load_s=300.0))
    assert found.hours * 3600 == pytest.approx(300.0 + 100 * 30.0, rel=0.02)
    assert found.busy == pytest.approx(3000.0 / 3300.0, rel=0.02)
    assert (found.lost_s, found.losses) == (0.0, 0)


def test_simulate_driver_that_is_slower_than_the_replicas_sets_the_pace() -> None:
    found = simulate(replace(STEADY, driver_s=3.0))  # the replicas ask for one in 1.5 s
    assert found.hours * 3600 == pytest.approx(2000 * 3.0, rel=0.02)
    assert found.driver_share == pytest.approx(1.0, rel=0.02)
    assert found.busy == pytest.approx(0.5, rel=0.03)


def test_simulate_machine_that_ends_without_notice_loses_half_a_shard() -> None:
    found = simulate(replace(STEADY, shards=40_000, life_s=1200.0))
    assert found.lost_s / found.held_s == pytest.approx(15.0 / 1200.0, rel=0.15)
    assert found.useful_s + found.lost_s == pytest.approx(found.held_s, rel=0.01)
    assert found.hours * 3600 * 20 == pytest.approx(
        found.held_s * (1 + 100 / 1200), rel=0.02
    )  # and is away for a while
    assert found.useful_s == pytest.approx(40_000 * 30.0, rel=0.01), "each shard is done once"


def test_simulate_notice_longer_than_what_is_in_flight_loses_nothing_and_stands_idle_afterwards() -> None:
    found = simulate(replace(STEADY, shards=40_000, life_s=2400.0, notice_s=120.0))
    assert found.lost_s < 0.001 * found.held_s, "only of machines that live for less than their notice"
    assert 1 - found.busy == pytest.approx(45.0 / 2400.0, rel=0.1), "of 120 s two shards and a half are worked off"


@pytest.mark.slow
def test_scale_prints_what_was_measured_and_what_is_modelled() -> None:
    lines = {line.what.partition(" (")[0]: line.value.median for line in scale(Settings(tiny=True)) if line.value}
    assert {what.partition(":")[0] for what in lines} == {"measured", "model"}
    assert 4 <= lines["measured: requests of a shard, shard"] <= 8
    assert all(0 < value <= 1 for what, value in lines.items() if what.endswith("busy share"))
