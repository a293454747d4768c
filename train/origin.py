"""What weights were trained on, and whether that leaks into a set's test films.

EGD-CXR and REFLACX are films of MIMIC-CXR. Weights trained on MIMIC-CXR with another split, or on
nobody knows what, may have seen the test films (docs/method.md#leakage).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import model_validator

from cxrgaze.errors import DataError
from cxrgaze.evidence.labelled_set import SetInfo, with_collection
from cxrgaze.records import Frozen


class Origin(Frozen):
    """One set of films that weights descend from."""

    trained_on: str
    """In words; empty where it is unknown."""
    collection: str = ""
    """As `SetInfo.collection`."""
    split_sha256: str = ""
    """The set's split, where it was a labelled set."""
    weights_sha256: str = ""
    """Of the weights that were taken over; empty for a run's own films."""

    @classmethod
    def of_set(cls, info: SetInfo) -> Origin:
        """A labelled set as the origin of weights."""
        return cls(
            trained_on=info.origin, collection=info.collection, split_sha256=info.split_sha256
        )

    @model_validator(mode="before")
    @classmethod
    def _some_say_it_in_words(cls, content: Any) -> Any:
        return with_collection(content, "trained_on")


def leakage(info: SetInfo, origins: Sequence[Origin]) -> str | None:
    """Why weights of these origins may have seen the set's test films, or None.

    Weights trained on the same split of the same set have not.
    """
    for origin in origins:
        if origin.split_sha256 and origin.split_sha256 == info.split_sha256:
            continue
        if info.collection and not origin.trained_on:
            why = "come from nobody knows where; say it with --init-origin"
        elif info.collection and info.collection == origin.collection:
            why = f"were trained on {origin.trained_on!r} with another split"
        elif origin.trained_on == info.origin:
            why = "were trained on films of the same origin with another split"
        else:
            continue
        sha = origin.weights_sha256
        whose = f"initial or teaching weights {sha[:12]}" if sha else "these weights"
        return f"Possible leakage: the set is {info.origin!r}, and {whose} {why}."
    return None


def check_leakage(info: SetInfo, origins: Sequence[Origin], *, allow: bool = False) -> None:
    """Refuse weights that may have seen the set's test films.

    Args:
        allow: the caller knows better.

    Raises:
        DataError: naming the origin.
    """
    why = None if allow else leakage(info, origins)
    if why:
        raise DataError(
            f"{why} Their test films may be training films; "
            "choose other weights, or give --allow-leakage and report no test figures"
        )
