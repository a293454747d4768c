"""Opening somebody's ONNX file, in a child process with limits.

A file from foreign hands can crash or hang a checker, a simplifier or a session, or make it take
all memory. The child does all three first and writes the graph that ours is made of.
"""

from __future__ import annotations

import contextlib
import json
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from cxrgaze import children
from cxrgaze.errors import CxrgazeError, IncompatibleError, IntegrityError, UsageError
from cxrgaze.export.fp16 import constants_to_initializers
from cxrgaze.export.graph import OPSET, require_servable, simplified
from cxrgaze.files import read_regular, temporary_folder
from cxrgaze.runtime import graph_look
from cxrgaze.runtime.ort import open_session

SIZE_LIMIT = 2 << 30
"""Bytes of a file; protobuf takes no more."""
TIME_LIMIT_S = 300.0
_MEMORY = 4 << 30
_MEMORY_A_BYTE = 12  # of the file, beside: the file, its parsed form, folded, in a session


def opened(
    data: bytes,
    what: str,
    size: tuple[int, int] | None = None,
    seconds: float = TIME_LIMIT_S,
) -> onnx.ModelProto:
    """The graph in the bytes of an ONNX file: checked, simplified, opset 18, every node named.

    It has one float32 input `(N, C, H, W)`, N dynamic, and ran for one film and for two.

    Args:
        what: name of the file, for messages.
        size: `(H, W)` for a graph that takes any.
        seconds: that opening it may take.

    Raises:
        UsageError: a graph that cannot be served, with what to do.
        IntegrityError: no ONNX file, data in other files, weights that are no numbers; opening it
            crashed, or took more time or memory than the limits.
    """
    with temporary_folder("own") as folder:
        (folder / "given.onnx").write_bytes(data)
        sides = [str(side) for side in size or ()]
        command = children.python("cxrgaze.export.own_open", str(folder), *sides)
        try:
            done = subprocess.run(command, capture_output=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired as error:
            raise IntegrityError(
                f"{what}: opening it took more than {seconds:.0f} s; is it what it should be?"
            ) from error
        try:
            told = json.loads((folder / "told.json").read_bytes())
        except (OSError, ValueError):
            told = {}
        if done.returncode or told.get("kind") is None:
            limit = (_MEMORY + _MEMORY_A_BYTE * len(data)) >> 30
            raise IntegrityError(
                f"{what}: opening it crashed the process that tried (exit code {done.returncode}, "
                f"memory limit {limit} GB); it is damaged or hostile"
            )
        if told["kind"]:
            error_of = {one.__name__: one for one in (UsageError, IntegrityError)}
            raise error_of.get(told["kind"], IntegrityError)(f"{what}: {told['said']}")
        model: onnx.ModelProto = onnx.load_from_string((folder / "opened.onnx").read_bytes())
        return model


def _main(folder: Path, *sides: str) -> None:
    """What the child does."""
    size = (int(sides[0]), int(sides[1])) if sides else None
    given = folder / "given.onnx"
    memory = _MEMORY + _MEMORY_A_BYTE * given.stat().st_size
    with contextlib.suppress(ValueError, OSError):  # a lower limit is there already
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    kind = said = ""
    try:
        model = _opened(read_regular(given, SIZE_LIMIT), size)
        (folder / "opened.onnx").write_bytes(model.SerializeToString())
    except MemoryError:
        kind, said = "IntegrityError", f"it needs more than {memory >> 30} GB of memory to open"
    except CxrgazeError as error:
        usage = isinstance(error, (UsageError, IncompatibleError))
        kind, said = "UsageError" if usage else "IntegrityError", str(error)
    except Exception as error:  # whatever the libraries raise of a foreign graph
        kind, said = "IntegrityError", f"not a valid graph: {_one_line(error)}"
    (folder / "told.json").write_text(json.dumps({"kind": kind, "said": said}))


def _opened(data: bytes, size: tuple[int, int] | None) -> onnx.ModelProto:
    graph_look.require_own_data(data)
    try:
        model = onnx.load_from_string(data)
    except Exception as error:
        raise IntegrityError(f"not an ONNX file: {_one_line(error)}") from error
    _require_text(model.graph)
    _require_plain(model)
    onnx.checker.check_model(model)
    model = _in_our_opset(model)
    _fix_shapes(model, size)
    model = _named(_simplified(model))
    constants_to_initializers(model.graph)
    _slice_what_is_picked(model.graph)
    _multiply_what_is_summed(model.graph)
    require_servable(model)
    onnx.checker.check_model(model, full_check=True)
    _require_it_runs(model)
    return model


def _require_text(graph: onnx.GraphProto) -> None:
    """Refuse names that are no UTF-8, which protobuf gives as bytes."""
    names: list[object] = [one.name for one in (*graph.input, *graph.output, *graph.initializer)]
    for node in graph.node:
        names += [node.name, node.op_type, node.domain, *node.input, *node.output]
    if any(not isinstance(name, str) for name in names):
        raise IntegrityError("it has names that are no text (UTF-8); it is damaged")


def _require_plain(model: onnx.ModelProto) -> None:
    foreign = sorted({n.domain for n in model.graph.node if n.domain not in ("", "ai.onnx")})
    if foreign:
        names = sorted({n.op_type for n in model.graph.node if n.domain == foreign[0]})
        raise UsageError(
            f"it has operators of the domain {foreign[0]} ({', '.join(names[:5])}), which no "
            "engine is sure to have; export it with ONNX's own operators alone"
        )
    if model.functions or model.training_info:
        raise UsageError("it defines functions or training of its own; export it for inference")
    looped = sorted(
        {n.op_type for n in model.graph.node if any(a.HasField("g") for a in n.attribute)}
    )
    if looped:
        raise UsageError(
            f"it has control flow ({', '.join(looped)}); export it without branches and loops"
        )


def _in_our_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    found = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if found == OPSET:
        return model
    try:
        return onnx.version_converter.convert_version(model, OPSET)
    except Exception as error:
        raise UsageError(
            f"it has opset {found}, which cannot be converted to {OPSET} ({_one_line(error)}); "
            f"export it again with opset {OPSET}"
        ) from error


def _fix_shapes(model: onnx.ModelProto, size: tuple[int, int] | None) -> None:
    """One image of a fixed size, and a dynamic number of them."""
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise UsageError(f"it has {len(inputs)} inputs ({names}), expected one: the image")
    (image,) = inputs
    tensor = image.type.tensor_type
    kind = onnx.TensorProto.DataType.Name(tensor.elem_type)
    if tensor.elem_type != onnx.TensorProto.FLOAT:
        raise UsageError(
            f"its input {image.name} is {kind}, expected FLOAT: export it in float32, the "
            "precision is chosen here"
        )
    shape = [d.dim_value if d.HasField("dim_value") else 0 for d in tensor.shape.dim]
    if len(shape) == 4 and size and not (shape[2] and shape[3]):
        shape[2:] = size
    if len(shape) != 4 or shape[1] not in (1, 3):
        shown = ", ".join(d.dim_param or str(d.dim_value) for d in tensor.shape.dim)
        raise UsageError(
            f"its input {image.name} has shape ({shown}), expected (N, 1, H, W) or (N, 3, H, W)"
        )
    if size and tuple(shape[2:]) != size:
        raise UsageError(
            f"its input {image.name} is {shape[2]}x{shape[3]}, the card says {size[0]}x{size[1]}"
        )
    if not (shape[2] and shape[3]):
        raise UsageError(
            f"the height and width of its input {image.name} are dynamic; export it for one size, "
            "or write it into the card: [input] size = [H, W]"
        )
    for place, side in enumerate(shape[2:], start=2):
        tensor.shape.dim[place].dim_value = side
    del model.graph.value_info[:]
    tensor.shape.dim[0].dim_param = "N"
    for number, output in enumerate(model.graph.output):
        for place, dim in enumerate(output.type.tensor_type.shape.dim):
            dim.dim_param = f"output{number}_{place}" if place else "N"


def _simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    """Simplified for any number of films; where shapes are still computed then, by way of one film.

    Whether films may be any number after that, `_require_it_runs` sees.
    """
    found = simplified(model)
    if not any(node.op_type == "Shape" for node in found.graph.node):
        return found
    single = onnx.ModelProto.FromString(model.SerializeToString())
    for value in (*single.graph.input, *single.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    found = simplified(single)
    inferred = onnx.shape_inference.infer_shapes(found, data_prop=True).graph
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*inferred.input, *inferred.output, *inferred.value_info)
    }
    del found.graph.value_info[:]
    for value in (*found.graph.input, *found.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    stored = {tensor.name: tensor for tensor in found.graph.initializer}
    for node in found.graph.node:
        if node.op_type == "Reshape" and node.input[1] in stored:
            tensor = stored[node.input[1]]
            sides = numpy_helper.to_array(tensor).copy()
            if len(sides) > 1 and sides[0] == 1:
                sides[0] = 0 if -1 in sides else -1
                tensor.CopyFrom(numpy_helper.from_array(sides, tensor.name))
        elif node.op_type == "Resize" and len(node.input) == 4 and node.input[3] in stored:
            of_one = numpy_helper.to_array(stored[node.input[3]])
            scales = numpy_helper.from_array(
                _scales(of_one, shapes[node.input[0]]), f"{node.output[0]}/scales"
            )
            found.graph.initializer.append(scales)
            node.input[2:] = [scales.name]
    return found


def _scales(sizes: NDArray[np.int64], given: Sequence[int]) -> NDArray[np.float32]:
    """Scales that make these sizes of what is given, rounded down as ONNX does."""
    scales = (sizes / np.asarray(given)).astype(np.float32)
    short = np.floor(scales * np.asarray(given, np.float32)) < sizes
    more = np.nextafter(scales, np.float32(np.inf))
    return np.asarray(np.where(short, more, scales), dtype=np.float32)


def _slice_what_is_picked(graph: onnx.GraphProto) -> None:
    """Picking one of several by a stored number, as x[:, 0], as Slice and Squeeze.

    Bundles may not have Gather, which can make large things of small ones; these two cannot.
    """
    stored = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        index = stored.get(node.input[1]) if node.op_type == "Gather" else None
        if index is None or len(index.dims):
            nodes.append(node)
            continue
        place = int(numpy_helper.to_array(index))
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        end = place + 1 if place != -1 else np.iinfo(np.int64).max
        inputs = []
        for what, number in (("start", place), ("end", end), ("axis", axis)):
            name = f"{node.output[0]}/{what}"
            graph.initializer.append(numpy_helper.from_array(np.array([number]), name))
            inputs.append(name)
        picked = f"{node.output[0]}/picked"
        slice_ = onnx.helper.make_node(
            "Slice", [node.input[0], *inputs], [picked], name=f"{node.name}/slice"
        )
        squeeze = onnx.helper.make_node(
            "Squeeze", [picked, inputs[2]], [node.output[0]], name=f"{node.name}/squeeze"
        )
        nodes += [slice_, squeeze]
    del graph.node[:]
    graph.node.extend(nodes)


def _multiply_what_is_summed(graph: onnx.GraphProto) -> None:
    """Einsums that are products of matrices, as attention has them, as MatMul.

    Bundles may not have Einsum, which can make large things of small ones. Others stay, and are
    refused.
    """
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type != "Einsum" or len(node.input) != 2:
            continue
        equation = next(a.s for a in node.attribute if a.name == "equation").decode()
        sides = re.fullmatch(r"(\w+),(\w+)->(\w+)", equation.replace(" ", ""))
        if not sides or len({len(side) for side in sides.groups()}) != 1:
            continue
        one, other, out = sides.groups()
        inner = one[-1]
        if one[:-1] != out[:-1] or one[:-2] != other[:-2]:
            continue
        if other[-2:] not in (inner + out[-1], out[-1] + inner):
            continue
        second = node.input[1]
        if other[-1] == inner:
            nodes.pop()
            second = f"{node.output[0]}/turned"
            order = [*range(len(other) - 2), len(other) - 1, len(other) - 2]
            nodes.append(
                onnx.helper.make_node(
                    "Transpose", [node.input[1]], [second], name=f"{node.name}/turn", perm=order
                )
            )
            nodes.append(node)
        node.op_type = "MatMul"
        del node.attribute[:]
        node.input[1] = second
    del graph.node[:]
    graph.node.extend(nodes)


def _named(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every node with a name of its own."""
    seen: set[str] = set()
    for number, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{number:04d}"
        seen.add(node.name)
    return model


def _require_it_runs(model: onnx.ModelProto) -> None:
    """One film and two: the batch must be dynamic, and films apart from each other."""
    (image,) = model.graph.input
    shape = [d.dim_value for d in image.type.tensor_type.shape.dim][1:]
    session = open_session(model.SerializeToString(), threads=1)
    films = np.random.default_rng(0).random((2, *shape), dtype=np.float32)
    single = session.run(None, {image.name: films[:1]})
    try:
        both = session.run(None, {image.name: films})
    except Exception as error:
        raise UsageError(
            "it reads one film at a time alone: its batch is fixed inside the graph; export it "
            "with a dynamic first dimension"
        ) from error
    for one, two, value in zip(single, both, model.graph.output, strict=True):
        same = len(one) == 1 and len(two) == 2 and np.allclose(one[0], two[0], rtol=1e-3, atol=1e-3)
        if not same and np.isfinite(one).all():
            raise UsageError(
                f"its output {value.name} for a film depends on the film beside it, or does not "
                f"have one row a film (shapes {one.shape} and {two.shape}); export it for "
                "inference, with a dynamic first dimension"
            )


def _one_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:300] or type(error).__name__


if __name__ == "__main__":
    _main(Path(sys.argv[1]), *sys.argv[2:])
