"""The figures of a stored report; they need matplotlib, which a device may lack."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from cxrgaze.benchmarks.record import Peer, Report, Sweep
from cxrgaze.evidence.intervals import Interval
from cxrgaze.report import Figure, drawn, new_plot

DRAWS = find_spec("matplotlib") is not None
"""False on a device; a machine that has it renders the report with its figures."""

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOUR = "#3b6fb6"
_GREY = "#888888"


def figures_of(report: Report) -> list[Figure]:
    """The figures that the report has something for."""
    figures = [_samples(report)]
    if report.peers:
        figures.append(_peer_plot(report.peers))
    return figures + [_sweep_plot(sweep) for sweep in report.sweeps]


def _samples(report: Report) -> Figure:
    """Every end-to-end sample in its order: drift, modes and tails are there to see."""
    samples = report.samples["end_to_end"]
    plot = new_plot(7, 2.6)
    axes = plot.add_subplot(xlabel="reading", ylabel="end to end (ms)")
    axes.plot(np.arange(1, len(samples) + 1), samples, ".", markersize=3, color=_COLOUR)
    axes.set_ylim(bottom=0)
    for objective in report.objectives:
        axes.axhline(objective.limit_ms, color="C3", linewidth=1)
    return drawn("samples.svg", plot, "Every sample, in the order that they were taken.")


def _peer_plot(peers: Sequence[Peer]) -> Figure:
    """Ratios with their intervals, a row a way."""
    shown = [peer for peer in peers if peer.ratio and peer.ratio.ratio.low is not None]
    plot = new_plot(7, 0.8 + 0.3 * max(len(shown), 1))
    axes = plot.add_subplot(xlabel="time over the first row's (log scale)", xscale="log")
    for row, peer in enumerate(reversed(shown)):
        assert peer.ratio is not None
        _interval(axes, row, peer.ratio.ratio)
    axes.set_yticks(range(len(shown)), [peer.name for peer in reversed(shown)], fontsize=8)
    axes.axvline(1, color=_GREY, linewidth=1, linestyle=":")
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if _inside(t, shown)]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    caption = f"Left of 1 is faster than {peers[0].name}; 95 % intervals."
    return drawn("peers.svg", plot, caption)


def _inside(tick: float, peers: Sequence[Peer]) -> bool:
    values = [1.0, *(peer.ratio.ratio.value for peer in peers if peer.ratio)]
    return min(values) / 2.5 <= tick <= max(values) * 2.5


def _interval(axes: Axes, row: int, ratio: Interval) -> None:
    assert ratio.low is not None and ratio.high is not None
    axes.plot([ratio.low, ratio.high], [row, row], color=_COLOUR, linewidth=2)
    axes.plot(ratio.value, row, "o", color=_COLOUR, markersize=5)


def _sweep_plot(sweep: Sweep) -> Figure:
    """Time of a call at each point, the floor below it."""
    plot = new_plot(6, 2.8)
    axes = plot.add_subplot(xlabel=sweep.name, ylabel="ms a call, p50", yscale="log")
    places = range(len(sweep.points))
    values = [p.latency.p50.value if p.latency.p50 else np.nan for p in sweep.points]
    axes.plot(places, values, "o-", color=_COLOUR, label="measured")
    floors = [p.floor_ms if p.floor_ms is not None else np.nan for p in sweep.points]
    axes.plot(places, floors, "_--", color=_GREY, label="float32 floor")
    axes.set_xticks(places, [point.at for point in sweep.points])
    axes.legend(fontsize=8)
    return drawn(f"sweep-{sweep.name}.svg", plot, f"Cost along {sweep.name}.")
