"""Trying forms of a graph from the most precise on, as long as they pass: parity, then the gate."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from cxrgaze.bundles.manifest import FormRecord
from cxrgaze.bundles.served import Decision
from cxrgaze.bundles.verdicts import Gate, Parity
from cxrgaze.command import say
from cxrgaze.errors import ParityError
from cxrgaze.export.forms import Form
from cxrgaze.files import parse_json, read_regular, render_json, sha256, write_atomic

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
    decision: Decision
    """Temperatures and operating points that it is served with."""
    decision_from: str
    """Where they are from."""

    @property
    def passes(self) -> bool:
        """Whether both verdicts are pass."""
        return self.gate.verdict == "pass" and self.parity.verdict == "pass"


Judge = Callable[[Form], JudgedForm]


class Choices(Protocol):
    """The forms of a graph (`cxrgaze.export.forms.Forms`)."""

    def with_kept(self, kept: Collection[str] = ()) -> Iterable[Form]:
        """The forms with some blocks kept in higher precision."""
        ...

    def blocks(self) -> Sequence[str]:
        """Blocks that can go back."""
        ...

    def shares(self) -> Mapping[str, float]:
        """The share of the work that each of them has, in [0, 1]."""
        ...


STEP = 0.04
"""Of the work: each look takes at least so much more of it into low precision than the last."""


def in_turn(forms: Iterable[Form], judge: Judge) -> list[JudgedForm]:
    """Forms from the most precise on, until one does not pass: every look at the gate's films.

    A fixed sequence: the order is none of the gate's, and what comes after a form that does not
    pass is not looked at, so that the probability that a form beyond a limit ships is that of one
    look (Maurer, Hothorn & Lehmacher, 1995; docs/precision.md#search).
    """
    judged = []
    for form in forms:
        judged.append(judge(form))
        kept = f", kept: {', '.join(form.kept)}" if form.kept else ""
        say(f"  {form.name}{kept}: {judged[-1].gate.verdict}, {judged[-1].gate.reason}")
        if not judged[-1].passes:
            break
    return judged


_ORDER = {"pass": 0, "not_gated": 1, "inconclusive": 2, "fail": 3}


def best(judged: Sequence[JudgedForm]) -> JudgedForm:
    """The last form that passed; where none did the best verdict, the first among equals.

    Broken graphs come last.
    """
    if passing := [one for one in judged if one.passes]:
        return passing[-1]
    return min(judged, key=lambda a: (a.parity.verdict != "pass", _ORDER[a.gate.verdict]))


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


def with_fewer_kept(
    forms: Choices, distance: Callable[[Form], float], log: Log, budget: int
) -> Iterator[Form]:
    """Forms from the one with the most blocks in higher precision to the one with none.

    Each block is tried alone in low precision on films that are none of the gate's, and ranked by
    how far from the reference that takes the outputs. All but the least harmful are kept first,
    then fewer each time, the least harmful leaving first, as many at once as make a `STEP`: a look
    takes minutes, and one that wins next to nothing is none. What ranks is continuous, and a
    block's own error: with all others in low precision, errors of two blocks can make up for each
    other.

    Args:
        distance: of a form to the reference.
        budget: forms that may be looked at on the gate's films; the first of the sequence.

    Raises:
        ParityError: a budget of none.
    """
    blocks = forms.blocks()
    if budget < 1:
        raise ParityError(f"--fallback-trials {budget}: a search takes one look at least")

    def nearest(kept: Collection[str]) -> float:
        return min(distance(form) for form in forms.with_kept(kept))

    ranks = {}
    for number, block in enumerate(blocks, start=1):
        others = [other for other in blocks if other != block]
        ranks[block] = log.distance(others, partial(nearest, others))
        say(f"  block {number}: {block} alone takes the outputs {ranks[block]:.2g} from fp32")
    order, shares = sorted(blocks, key=lambda block: -ranks[block]), forms.shares()
    sequence = (f for n in _numbers_kept(order, shares) for f in forms.with_kept(order[:n]))
    return itertools.islice(sequence, budget)


def _numbers_kept(order: Sequence[str], shares: Mapping[str, float]) -> Iterator[int]:
    """How many of the blocks, the most harmful first, each look keeps."""
    won = 0.0
    for number in range(len(order) - 1, 0, -1):
        won += shares[order[number]]
        if won >= STEP:
            yield number
            won = 0.0
    yield 0


def log_key(*parts: str) -> str:
    """The key of a log."""
    return sha256("\n".join(parts).encode())
