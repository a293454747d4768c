"""Network to ONNX: opset 18, IR at most 10, named outputs, dynamic batch, simplified, checked."""

from __future__ import annotations

import io
import warnings
from typing import Any

import onnx
import onnxsim
import torch

from cxrgaze.spec import IMAGE, LOG_DENSITY, LOGITS, NOTICE, SPEC_KEY, ModelSpec
from cxrgaze.train.model import Network

OPSET = 18
IR_VERSION = 10  # onnxruntime 1.23, the last for JetPack 6, reads at most 11; onnx writes 13


def onnx_from_network(network: Network, spec: ModelSpec) -> onnx.ModelProto:
    """The float32 graph of a network in evaluation mode.

    `image` `(N, 1, H, W)` to `logits` `(N, C)` and `log_density` `(N, 1, H, W)`, N dynamic. Made by
    torch's TorchScript exporter, which honours the opset (toolchain.md section 2).
    """
    buffer: Any = io.BytesIO()  # the exporter writes to files of any kind, its types do not say so
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # the exporter's own age
        torch.onnx.export(
            network.eval(),
            (torch.zeros(1, 1, spec.height, spec.width),),
            buffer,
            dynamo=False,
            opset_version=OPSET,
            input_names=[IMAGE],
            output_names=[LOGITS, LOG_DENSITY],
            dynamic_axes={name: {0: "N"} for name in (IMAGE, LOGITS, LOG_DENSITY)},
        )
    return onnx.load_from_string(buffer.getvalue())


def simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same function with constants folded (onnxsim); parity on films judges the result."""
    result: onnx.ModelProto = onnxsim.simplify(model, check_n=0)[0]
    return result


def finished(model: onnx.ModelProto, spec: ModelSpec) -> bytes:
    """The graph with its ModelSpec and notice inside, checked, as the bytes that ship.

    Raises:
        onnx.checker.ValidationError: the graph is not valid ONNX.
    """
    model.ir_version = min(model.ir_version, IR_VERSION)
    model.doc_string = NOTICE
    onnx.helper.set_model_props(model, {SPEC_KEY: spec.model_dump_json()})
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data
