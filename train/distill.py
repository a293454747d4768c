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
from cxrgaze.spec import ModelSpec
from cxrgaze.train.model import Network


def taught(
    arrays: Arrays, labelled: LabelledSet, teacher: Network, teacher_spec: ModelSpec
) -> Arrays:
    """`arrays` with the teacher's logits and densities for every film.

    The teacher reads each film on its own canvas, once; its map is brought to the student's canvas
    over the film's area.

    Raises:
        IncompatibleError: the teacher knows other classes.
    """
    if labelled.info.classes != teacher_spec.class_names:
        raise IncompatibleError(
            f"the teacher's classes are {teacher_spec.class_names}, the set's "
            f"{labelled.info.classes}; choose a teacher of the same classes"
        )
    logits, densities = [], np.zeros_like(arrays.densities)
    teacher.eval()
    for index, row in enumerate(counted(labelled.rows, len(labelled.rows), "film")):
        film = film_from_bytes(labelled.film_bytes(row), row.film)
        canvas, geometry = to_canvas(film.pixels, teacher_spec)
        with torch.inference_mode():
            out = teacher(torch.from_numpy(canvas)[None, None])
        logits.append(out.logits[0].numpy())
        density = geometry.crop(out.log_density[0, 0].exp().numpy())
        here = arrays.geometries[index]
        here.crop(densities[index, 0])[:] = _resized(density, here)
    return replace(arrays, teacher_logits=np.stack(logits), teacher_densities=densities)


def _resized(density: NDArray[np.float32], geometry: Geometry) -> NDArray[np.float32]:
    shrinks = geometry.height < density.shape[0]
    size = (geometry.width, geometry.height)
    resized = cv2.resize(
        density, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )
    return np.asarray(resized / resized.sum(), dtype=np.float32)
