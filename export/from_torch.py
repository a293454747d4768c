"""A torch module to ONNX: opset 18, named outputs, dynamic batch."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
import torch
from torch import nn

from cxrgaze.errors import UsageError
from cxrgaze.export.graph import OPSET
from cxrgaze.spec import IMAGE, ModelSpec


def onnx_from_module(module: nn.Module, spec: ModelSpec) -> onnx.ModelProto:
    """The float32 graph of a module in evaluation mode.

    `image` `(N, 1, H, W)` to the heads of the spec (`ModelSpec.shapes`), N dynamic.
    """
    image = torch.zeros(1, 1, spec.height, spec.width)
    data = exported(module, image, IMAGE, spec.heads, lambda out: heads_in_order(out, spec))
    return onnx.load_from_string(data)


def exported(
    module: nn.Module,
    image: torch.Tensor,
    name: str,
    outputs: Sequence[str],
    in_order: Callable[[Any], tuple[torch.Tensor, ...]],
) -> bytes:
    """A module in evaluation mode as an ONNX file, N dynamic.

    Made by torch's TorchScript exporter, which honours the opset (docs/graphs.md#exporter).

    Args:
        image: `(1, C, H, W)`, such as the module takes. name: what the graph's input is called.
        outputs: names of what `in_order` makes of the module's output.
    """
    buffer: Any = io.BytesIO()  # the exporter writes to files of any kind, its types do not say so
    # On the module itself: a module around it would be in the names of all nodes.
    hook = module.register_forward_hook(lambda _, given, out: in_order(out))
    try:
        with warnings.catch_warnings():
            # The exporter's own age.
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            torch.onnx.export(
                module.eval(),
                (image,),
                buffer,
                dynamo=False,
                opset_version=OPSET,
                input_names=[name],
                output_names=list(outputs),
                dynamic_axes={tensor: {0: "N"} for tensor in (name, *outputs)},
            )
    finally:
        hook.remove()
    data: bytes = buffer.getvalue()
    return data


def heads_in_order(output: Any, spec: ModelSpec) -> tuple[torch.Tensor, ...]:
    """The heads of a module's output, in the order of the spec.

    Args:
        output: tensors by name of the head, in the order of the spec, or one tensor alone.

    Raises:
        UsageError: another number of them, or other names.
    """
    if isinstance(output, Mapping):
        if set(output) != set(spec.heads):
            raise UsageError(f"the network gives {sorted(output)}, its spec says {spec.heads}")
        return tuple(output[head] for head in spec.heads)
    heads = (output,) if isinstance(output, torch.Tensor) else tuple(output)
    if len(heads) != len(spec.heads):
        raise UsageError(f"the network gives {len(heads)} outputs, its spec says {spec.heads}")
    return heads
