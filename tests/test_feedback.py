"""Timed networks correct the profile, and a search goes on with it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import autocompress.pipeline as pipeline
from autocompress.costs import CostModel
from autocompress.deliver import LOCAL, Delivery
from autocompress.errors import UsageError
from autocompress.hwprofiles import Entry, HardwareProfile, load_profile, recalibrated, scaled
from autocompress.prepare import Prepared, kernels_of
from autocompress.results import Request
from autocompress.stages import Stages
from autocompress.types import Evaluation, Format, Kernel, Plan


def profile_of(kernels: Sequence[Kernel], **factors: float) -> HardwareProfile:
    """One nanosecond a hundred MACs or numbers written, times the factor of the format."""
    entries = [
        Entry(k, (500 + k.macs / 100 + k.out_shape[0]) * factors.get(k.format, 1.0)) for k in dict.fromkeys(kernels)
    ]
    return HardwareProfile("local", "a processor", "none", "1", 1, 1, "2026-01-01", tuple(entries), overhead_ns=800)


def networks(n: int, seed: int = 0) -> list[list[Kernel]]:
    """Convolutions in two formats, by turns of widths."""
    rng = random.Random(seed)

    def one(form: Format) -> Kernel:
        c = rng.choice((16, 32, 64))
        return Kernel("conv", (c, 16, 16), (c, 16, 16), (3, 3), format=form)

    return [[one("w8" if rng.random() < 0.3 else "float") for _ in range(12)] for _ in range(n)]


def total(profile: HardwareProfile, kernels: Sequence[Kernel]) -> float:
    return profile.overhead_ns + float(profile.predict_ns(kernels).sum())


def test_a_format_that_takes_longer_in_networks_is_found() -> None:
    found = networks(20)
    believed = profile_of([k for ks in found for k in ks])
    true = profile_of([k for ks in found for k in ks], w8=2.5)
    corrected = recalibrated(believed, [(ks, total(true, ks)) for ks in found[:8]])
    for kernels in found[8:]:
        before = abs(total(believed, kernels) / total(true, kernels) - 1)
        after = abs(total(corrected, kernels) / total(true, kernels) - 1)
        assert after < 0.03 and after <= before
    assert total(scaled(corrected, 2.0), found[0]) == pytest.approx(2 * total(corrected, found[0]), rel=1e-3)
    assert corrected.how["corrected_by_networks"]["conv w8"] > 2


def test_networks_that_take_what_was_predicted_change_nothing() -> None:
    found = networks(6)
    believed = profile_of([k for ks in found for k in ks])
    corrected = recalibrated(believed, [(ks, total(believed, ks)) for ks in found])
    for kernels in found:
        assert total(corrected, kernels) == pytest.approx(total(believed, kernels), rel=1e-3)


def test_a_fitted_profile_is_not_corrected() -> None:
    with pytest.raises(UsageError, match="measured profile"):
        recalibrated(load_profile("pixel3"), [(networks(1)[0], 1e6)])


@pytest.mark.slow
def test_a_search_goes_on_until_plans_hold_as_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight-bit weights take three times as long as the profile says; the file's timing is the other profile's word."""
    path = tmp_path / "local.json"
    request = Request(
        task="digits",
        budgets=("latency_ms<=50%@local", "size_mb<=30%"),
        evaluations=60,
        recover_minutes=0,
        profiles={"local": str(path)},
    )
    run = pipeline._Run(request, tmp_path / "out", None, None, Stages(None), None)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(
        "autocompress.prepare._profile", lambda d, r, graph, space, *_: profile_of(kernels_of(graph, space))
    )
    monkeypatch.setattr(pipeline, "timed", timed_by_another)
    try:
        run._prepare()
        run._begin()
        run._search(run.field[0], run.budgets)
        run._refit()
        first = run._timed(run._chosen())
        held = sum(run._holds(d) for d in first)
        assert held < len(first), "some were predicted to hold and do not"
        monkeypatch.setattr(pipeline, "RECOVERED", held + 1)  # too few, however many a good search has found
        before = {e.plan: e.costs[LOCAL] for e in run.front.evaluations("full")}
        found = run._correct(first)
    finally:
        run.close()
    assert sum(run._holds(d) for d in found) > held
    assert any("corrected profile" in note for note in run.notes)
    assert any(e.costs[LOCAL] != before.get(e.plan, e.costs[LOCAL]) for e in run.front.evaluations("full"))


def timed_by_another(
    judged: Sequence[Evaluation], models: Any, made: Prepared, *rest: Any
) -> tuple[list[Delivery], list[Any]]:
    profile = profile_of(kernels_of(made.graph, made.space), w8=3.0, w4=3.0, int8=3.0)
    costs = CostModel(made.graph, made.space, {"local": profile})

    def ms(plan: Plan) -> float:
        return costs.in_units(plan)[LOCAL] / costs.in_units(made.space.dense)[LOCAL] * made.dense_costs[LOCAL]

    return [Delivery(e, {LOCAL: ms(e.plan)}, ms(e.plan) / made.dense_costs[LOCAL]) for e in judged], []
