"""Trying forms of a graph until one passes: parity, then the gate, then blocks that go back."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cxrgaze.bundle import Gate, Head, Parity, Trial
from cxrgaze.command import say
from cxrgaze.errors import ParityError
from cxrgaze.export.forms import Form
from cxrgaze.files import parse_json, read_regular, render_json, sha256, write_atomic

_LOG_LIMIT = 1 << 24


@dataclass(frozen=True)
class Attempt:
    """A form and what was found of it."""

    form: Form
    data: bytes
    """The graph as it would ship."""
    parity: Parity
    gate: Gate
    trial: Trial


Try = Callable[[Form], Attempt]
Forms = Callable[[Collection[str]], Sequence[Form]]
"""The forms with some blocks kept in higher precision."""


def all_of(forms: Sequence[Form], attempt: Try) -> list[Attempt]:
    """An attempt with each form; the caller takes `best`."""
    made = []
    for form in forms:
        made.append(attempt(form))
        say(f"  {form.name}: {made[-1].gate.verdict}, {made[-1].gate.reason}")
    return made


_ORDER = {"pass": 0, "not_gated": 1, "inconclusive": 2, "fail": 3}


def best(attempts: Sequence[Attempt]) -> Attempt:
    """The attempt with the best verdict, the first among equals; broken graphs last."""
    return min(attempts, key=lambda a: (a.parity.verdict != "pass", _ORDER[a.gate.verdict]))


def weakest_head(attempt: Attempt) -> Head:
    """The output behind the gated quantity that is furthest outside its limit."""
    found = attempt.gate.comparison
    quantities = [q for q in found.quantities if q.loss is not None] if found else []
    if not quantities:
        return "logits"
    worst = max(quantities, key=lambda q: (q.loss or 0.0) / (q.limit or 1e-9))
    return "log_density" if worst.name == "CC" else "logits"


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
    forms: Forms,
    blocks: Sequence[str],
    attempt: Try,
    distance: Callable[[Form], float],
    log: Log,
    budget: int,
) -> list[Attempt]:
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
        Attempts of the second part, up to the first set that passes.

    Raises:
        ParityError: the budget is smaller than the number of blocks.
    """
    if budget < len(blocks):
        raise ParityError(
            f"--fallback-trials {budget}: ranking {len(blocks)} blocks takes {len(blocks)} trials"
        )

    def measured(kept: Collection[str]) -> float:
        return min(distance(form) for form in forms(kept))

    ranks = {}
    for number, block in enumerate(blocks, start=1):
        others = [other for other in blocks if other != block]
        ranks[block] = log.distance(others, partial(measured, others))
        say(f"  trial {number}: {block} alone takes the output {ranks[block]:.2g} from fp32")
    order = sorted(blocks, key=lambda block: -ranks[block])
    made: list[Attempt] = []
    for count in range(1, min(len(order), budget - len(blocks)) + 1):
        kept = order[:count]
        say(f"  trial {len(blocks) + count}: back go {', '.join(kept)}")
        made += all_of(forms(kept), attempt)
        if any(a.gate.verdict == "pass" and a.parity.verdict == "pass" for a in made):
            break
    return made


def log_key(*parts: str) -> str:
    """The key of a log."""
    return sha256("\n".join(parts).encode())
