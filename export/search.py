"""Trying forms of a graph until one passes: parity, then the gate, then blocks that go back."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from cxrgaze.bundles.manifest import FormRecord
from cxrgaze.bundles.verdicts import Gate, Parity
from cxrgaze.command import say
from cxrgaze.errors import ParityError
from cxrgaze.export.forms import Form
from cxrgaze.files import parse_json, read_regular, render_json, sha256, write_atomic
from cxrgaze.spec import Head, ModelSpec

_LOG_LIMIT = 1 << 24


@dataclass(frozen=True)
class JudgedForm:
    """A form and what was found of it."""

    form: Form
    data: bytes
    """The graph as it would ship."""
    parity: Parity
    gate: Gate
    record: FormRecord


Judge = Callable[[Form], JudgedForm]


class Choices(Protocol):
    """The forms of a graph (`cxrgaze.export.forms.Forms`)."""

    def with_kept(self, kept: Collection[str] = ()) -> Iterable[Form]:
        """The forms with some blocks kept in higher precision."""
        ...

    def blocks(self) -> Sequence[str]:
        """Blocks that can go back."""
        ...


def all_of(forms: Iterable[Form], judge: Judge) -> list[JudgedForm]:
    """Each form with its verdicts; the caller takes `best`."""
    judged = []
    for form in forms:
        judged.append(judge(form))
        say(f"  {form.name}: {judged[-1].gate.verdict}, {judged[-1].gate.reason}")
    return judged


_ORDER = {"pass": 0, "not_gated": 1, "inconclusive": 2, "fail": 3}


def best(judged: Sequence[JudgedForm]) -> JudgedForm:
    """The form with the best verdict, the first among equals; broken graphs last."""
    return min(judged, key=lambda a: (a.parity.verdict != "pass", _ORDER[a.gate.verdict]))


def weakest_head(judged: JudgedForm, spec: ModelSpec) -> Head:
    """The output behind the gated quantity that is furthest outside its limit."""
    comparison = judged.gate.comparison
    measured = [q for q in comparison.quantities if q.loss is not None] if comparison else []
    if not measured:
        return spec.heads[0]
    return max(measured, key=lambda q: (q.loss or 0.0) / (q.limit or 1e-9)).head


@dataclass
class Log:
    """Distances by kept blocks, written after each trial, so that a search goes on.

    Args:
        path: the file. key: SHA-256 of all that a distance depends on; another key's file is begun
            anew.
    """

    path: Path
    key: str

    def __post_init__(self) -> None:
        self._known: dict[str, float] = {}
        try:
            content = parse_json(read_regular(self.path, _LOG_LIMIT), str(self.path))
        except OSError:
            return
        if content.get("key") == self.key:
            self._known = {str(k): float(v) for k, v in dict(content["distances"]).items()}

    def distance(self, kept: Collection[str], measure: Callable[[], float]) -> float:
        """The distance with these blocks kept, measured where it is not known."""
        name = json.dumps(sorted(kept))
        if name not in self._known:
            self._known[name] = min(measure(), 1e9)
            write_atomic(self.path, render_json({"key": self.key, "distances": self._known}))
        return self._known[name]


def fallback(
    forms: Choices, judge: Judge, distance: Callable[[Form], float], log: Log, budget: int
) -> list[JudgedForm]:
    """Blocks go back to higher precision until the gate passes: the smallest set by their rank.

    Each block is tried alone in low precision, and ranked by how far from the reference that takes
    the output that fails; then the first one, two, ... of the ranking go back together until the
    gate passes. What ranks is continuous: counts of flips change by chance from block to block. And
    it is a block's own error: with all others in low precision, errors of two blocks can make up
    for each other, and taking one of them away looks like a loss.

    Args:
        distance: of a form to the reference, at the output that fails.
        budget: trials that may be made; the ranking takes as many as there are blocks.

    Returns:
        The forms of the second part, up to the first set that passes.

    Raises:
        ParityError: the budget is smaller than the number of blocks.
    """
    blocks = forms.blocks()
    if budget < len(blocks):
        raise ParityError(
            f"--fallback-trials {budget}: ranking {len(blocks)} blocks takes {len(blocks)} trials"
        )

    def nearest(kept: Collection[str]) -> float:
        return min(distance(form) for form in forms.with_kept(kept))

    ranks = {}
    for number, block in enumerate(blocks, start=1):
        others = [other for other in blocks if other != block]
        ranks[block] = log.distance(others, partial(nearest, others))
        say(f"  trial {number}: {block} alone takes the output {ranks[block]:.2g} from fp32")
    order = sorted(blocks, key=lambda block: -ranks[block])
    judged: list[JudgedForm] = []
    for count in range(1, min(len(order), budget - len(blocks)) + 1):
        kept = order[:count]
        say(f"  trial {len(blocks) + count}: back go {', '.join(kept)}")
        judged += all_of(forms.with_kept(kept), judge)
        if any(one.gate.verdict == "pass" and one.parity.verdict == "pass" for one in judged):
            break
    return judged


def log_key(*parts: str) -> str:
    """The key of a log."""
    return sha256("\n".join(parts).encode())
