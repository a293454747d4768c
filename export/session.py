"""ONNX Runtime as the host's witness of a graph: it proves, and serves nobody."""

from __future__ import annotations

import onnxruntime


def host_session(graph: bytes, *, optimized: bool = True) -> onnxruntime.InferenceSession:
    """A session on the CPU for a graph of any precision and target.

    Args:
        optimized: False runs the nodes as they are written.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Threads that spin between films cost more than they win on a busy machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
