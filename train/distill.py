"""A teacher's answers on a student's films: probabilities, and maps on the student's canvas."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from cxrgaze.command import counted
from cxrgaze.errors import IncompatibleError
from cxrgaze.evidence.arrays import Arrays
from cxrgaze.evidence.labelled_set import LabelledSet
from cxrgaze.films.canvas import Geometry, to_canvas
from cxrgaze.films.decode import film_from_bytes
from cxrgaze.spec import LOG_DENSITY, LOGITS, ModelSpec, same_diagnosis
from cxrgaze.train.model import AnyNetwork


def taught(
    arrays: Arrays,
    labelled: LabelledSet,
    spec: ModelSpec,
    teacher: AnyNetwork,
    teacher_spec: ModelSpec,
) -> Arrays:
    """`arrays` with the teacher's logits and densities for every film.

    Of the heads that the student's `spec` has.

    The teacher reads each film on its own canvas, once; its map is brought to the student's canvas
    over the film's area.

    Raises:
        IncompatibleError: the teacher knows other classes, or has fewer heads than the student.
    """
    if LOGITS in spec.heads and not same_diagnosis(spec, teacher_spec):
        raise IncompatibleError(
            f"the teacher's classes are {teacher_spec.class_names}, the set's "
            f"{spec.class_names}; choose a teacher of the same classes"
        )
    if missing := [head for head in spec.heads if head not in teacher_spec.heads]:
        raise IncompatibleError(f"the teacher has no output {missing[0]}, which the student has")
    if teacher_spec.canvas != spec.canvas:
        raise IncompatibleError(
            f"the teacher's films are brought on the canvas by {teacher_spec.canvas}, the "
            f"student's by {spec.canvas}; train the student by the teacher's rule"
        )
    has_logits, has_map = (head in spec.heads for head in (LOGITS, LOG_DENSITY))
    logits, densities = [], np.zeros_like(arrays.densities)
    teacher.eval()
    for index, row in enumerate(counted(labelled.rows, len(labelled.rows), "film")):
        keep_stored = teacher_spec.needs_stored
        film = film_from_bytes(labelled.film_bytes(row), row.film, keep_stored=keep_stored)
        canvas, geometry = to_canvas(film, teacher_spec)
        with torch.inference_mode():
            out = teacher(torch.from_numpy(canvas)[None, None])
        if has_logits:
            logits.append(out[LOGITS][0].numpy())
        if has_map:
            density = geometry.crop(out[LOG_DENSITY][0, 0].exp().numpy())
            here = arrays.geometries[index]
            here.crop(densities[index, 0])[:] = _resized(density, here)
    return replace(
        arrays,
        teacher_logits=np.stack(logits) if has_logits else None,
        teacher_densities=densities if has_map else None,
    )


def _resized(density: NDArray[np.float32], geometry: Geometry) -> NDArray[np.float32]:
    shrinks = geometry.height < density.shape[0]
    size = (geometry.width, geometry.height)
    resized = cv2.resize(
        density, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )
    return np.asarray(resized / resized.sum(), dtype=np.float32)
