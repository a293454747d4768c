"""What a network's outputs are served as: probabilities, a label, flags, of what was taught alone.

Exclusive classes: softmax over the temperature; the label is the most probable class, and each
class's flag says whether its own probability reaches its operating point, so that label and flags
may differ. Findings: a sigmoid each over its own temperature; there is no label, flags decide.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cxrgaze.records import Frozen
from cxrgaze.spec import LOG_DENSITY, LOGITS, Head, ModelSpec


class Decision(Frozen):
    """Parameters fitted on validation films."""

    temperature: float = Field(default=1.0, gt=0)
    """Logits of exclusive classes are divided by it before the softmax."""
    temperatures: dict[str, Annotated[float, Field(gt=0)]] = {}
    """What a finding's logit is divided by before its sigmoid, by name; 1 where there is none."""
    operating_points: dict[str, float] = {}
    """Probability threshold of a class's flag, by class name; classes without one get no flag."""


@dataclass(frozen=True)
class Served:
    """What is served of a network.

    Raises:
        ValueError: a parameter of a class that the network does not have, or of the other kind.
    """

    spec: ModelSpec
    decision: Decision = Decision()
    untrained: tuple[Head, ...] = ()
    """Heads that nothing taught."""
    untaught: tuple[str, ...] = ()
    """Classes that nothing taught."""

    def __post_init__(self) -> None:
        decision, names = self.decision, self.spec.class_names
        for what, of in (
            ("operating point", decision.operating_points),
            ("temperature", decision.temperatures),
            ("mark of an untaught class", self.untaught),
        ):
            if foreign := sorted(set(of) - set(names)):
                raise ValueError(f"{what} of {foreign[0]!r}, which is no class")
        if self.spec.exclusive and decision.temperatures:
            raise ValueError("exclusive classes have one temperature, found one a class")
        if not self.spec.exclusive and decision.temperature != 1:
            raise ValueError("findings have a temperature each, found one for all")
        if foreign_heads := [head for head in self.untrained if head not in self.spec.heads]:
            raise ValueError(f"untrained {foreign_heads[0]}, which is no head of this network")

    @cached_property
    def heads(self) -> tuple[Head, ...]:
        """Heads that something taught; no diagnosis where too few of its classes were."""
        there = {LOG_DENSITY, *([LOGITS] if self.classes else [])} - set(self.untrained)
        return tuple(head for head in self.spec.heads if head in there)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that something taught; none without a taught diagnosis.

        Of exclusive ones two at least: one alone would always be certain.
        """
        if LOGITS in self.untrained:
            return ()
        taught = tuple(name for name in self.spec.class_names if name not in self.untaught)
        return () if self.spec.exclusive and len(taught) < 2 else taught

    @cached_property
    def columns(self) -> list[int]:
        """Columns of the logits of `classes`."""
        return [self.spec.class_names.index(name) for name in self.classes]

    @cached_property
    def decided(self) -> tuple[str, ...]:
        """Names of the classes that have an operating point, in the order of `classes`."""
        return tuple(name for name in self.classes if name in self.decision.operating_points)

    @cached_property
    def points(self) -> dict[str, float]:
        """Operating points of `decided`, in its order."""
        return {name: self.decision.operating_points[name] for name in self.decided}

    def probabilities(self, logits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Of logits `(..., C)` the probabilities of `classes` `(..., K)`; NaN of what is no number.

        Exclusive ones sum to 1 over the classes that something taught.
        """
        chosen = np.ascontiguousarray(np.asarray(logits, dtype=np.float64)[..., self.columns])
        with np.errstate(invalid="ignore", over="ignore"):  # NaN stays NaN, and is seen
            if self.spec.exclusive:
                scaled = chosen / self.decision.temperature
                odds = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
                return np.asarray(odds / odds.sum(axis=-1, keepdims=True))
            each = [self.decision.temperatures.get(name, 1.0) for name in self.classes]
            shares = 1 / (1 + np.exp(-chosen / np.asarray(each)))
            return np.where(np.isfinite(chosen), shares, np.nan)

    @cached_property
    def decides(self) -> NDArray[np.bool_]:
        """`(K,)`, of which classes something is decided: exclusive ones all, findings by point."""
        exclusive = self.spec.exclusive
        return np.array([exclusive or name in self.decided for name in self.classes], dtype=bool)

    def labelled(self, probabilities: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
        """Of probabilities `(n, K)` whether each class is the label, `(n, K)`; no finding is."""
        columns = np.arange(probabilities.shape[1])
        if not self.classes or not self.spec.exclusive:
            return np.zeros(probabilities.shape, dtype=bool)
        return np.asarray(probabilities.argmax(axis=1)[:, None] == columns)

    def flagged(self, probabilities: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
        """Of probabilities `(n, K)` each class's flag; the label of a class without a point."""
        points = [self.points.get(name, np.inf) for name in self.classes]
        has_point = np.isfinite(points)
        flags = probabilities >= np.asarray(points)
        return np.where(has_point, flags, self.labelled(probabilities))

    def decisions(self, probabilities: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
        """All that is decided of films, of probabilities `(n, K)`: labels and flags, `(n, 2 K)`."""
        return np.hstack([self.labelled(probabilities), self.flagged(probabilities)])

    def flags(self, probabilities: dict[str, float]) -> dict[str, bool]:
        """`flagged` of one film, by name, of the classes that have an operating point."""
        (flags,) = self.flagged(self._row(probabilities)).tolist()
        return {n: flag for n, flag in zip(self.classes, flags, strict=True) if n in self.points}

    def label(self, probabilities: dict[str, float]) -> str | None:
        """The class that is `labelled` of one film; None of findings."""
        (labels,) = self.labelled(self._row(probabilities)).tolist()
        return next(itertools.compress(self.classes, labels), None)

    def _row(self, probabilities: dict[str, float]) -> NDArray[np.float64]:
        return np.array([[probabilities[name] for name in self.classes]], dtype=np.float64)
