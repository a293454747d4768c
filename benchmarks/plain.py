"""What one would write by hand: numpy, OpenCV and onnxruntime, nothing checked, nothing recorded.

The yardstick for what our own runtime costs.
"""

from __future__ import annotations

import time

import cv2
import numpy as np
import onnxruntime
from numpy.typing import NDArray


def plain_session(graph: bytes, threads: int) -> onnxruntime.InferenceSession:
    """A session of ONNX Runtime, all defaults but the threads; 0 leaves those to it too."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class Plain:
    """Pixels to probabilities and log-density.

    Args:
        graph: bytes of the ONNX graph. size: height and width of its canvas.
        temperature: of the softmax, or of each finding's sigmoid `(C,)`.
        threads: of ONNX Runtime; 0 leaves the choice to it.
        exclusive: softmax instead of sigmoids.
    """

    def __init__(
        self,
        graph: bytes,
        size: tuple[int, int],
        temperature: float | NDArray[np.float64],
        threads: int,
        *,
        exclusive: bool = True,
    ) -> None:
        self._exclusive = exclusive
        self._session = plain_session(graph, threads)
        self._size = size
        self._temperature = temperature
        self.timings_ms: dict[str, float] = {}

    def __call__(self, pixels: NDArray[np.float32]) -> dict[str, NDArray[np.float64]]:
        """Probabilities `(C,)` and log-density `(H, W)` of a film `(h, w)` in [0, 1].

        By the names of the graph's outputs, those that it has.
        """
        start = time.perf_counter()
        height, width = self._size
        scale = min(height / pixels.shape[0], width / pixels.shape[1])
        h, w = round(pixels.shape[0] * scale), round(pixels.shape[1] * scale)
        way = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        canvas = np.zeros((1, 1, height, width), np.float32)
        top, left = (height - h) // 2, (width - w) // 2
        canvas[0, 0, top : top + h, left : left + w] = cv2.resize(pixels, (w, h), interpolation=way)
        prepared = time.perf_counter()
        outputs = self._session.run(None, {"image": canvas})
        inferred = time.perf_counter()
        said = {o.name: a[0] for o, a in zip(self._session.get_outputs(), outputs, strict=True)}
        if "logits" in said and self._exclusive:
            odds = np.exp((said["logits"] - said["logits"].max()) / self._temperature)
            said["logits"] = odds / odds.sum()
        elif "logits" in said:
            said["logits"] = 1 / (1 + np.exp(-said["logits"] / self._temperature))
        if "log_density" in said:
            said["log_density"] = said["log_density"][0]
        done = time.perf_counter()
        self.timings_ms = {
            "preprocess": (prepared - start) * 1e3,
            "infer": (inferred - prepared) * 1e3,
            "postprocess": (done - inferred) * 1e3,
        }
        return said
