"""Somebody's torch module: made by their code, with weights that are never unpickled."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cxrgaze.command import say
from cxrgaze.errors import UsageError
from cxrgaze.export import from_torch
from cxrgaze.files import read_regular, sha256
from cxrgaze.train.checkpoint import read_tensors

_LIMIT = 4 << 30


def made(named: str, weights: Path) -> tuple[nn.Module, str]:
    """The module that `package.module:factory` makes, with weights, and their SHA-256.

    It runs code that is not ours, and says so first. The working folder is one of the places that
    it is looked for in.

    Raises:
        UsageError: no such code, it fails, or makes no module; weights that are not its own.
        IntegrityError: a file that holds no tensors alone.
    """
    where, _, factory = named.partition(":")
    if not where or not factory:
        raise UsageError(f"--model {named}: expected package.module:factory")
    data = read_regular(weights, _LIMIT) if weights.is_file() else b""
    if not data:
        raise UsageError(f"{weights} is no file; expected weights, safetensors or a state dict")
    tensors = read_tensors(data, str(weights))
    say(f"runs the code of {where}, which is not ours: run none that you do not trust")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = getattr(importlib.import_module(where), factory)()
    except Exception as error:  # whatever foreign code raises
        raise UsageError(f"--model {named}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not isinstance(module, nn.Module):
        raise UsageError(f"--model {named} makes {type(module).__name__}, expected a torch module")
    _load(module, tensors, weights)
    return module.eval(), sha256(data)


def _load(module: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        told = module.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise UsageError(f"{path} does not fit the module: {said[:500]}") from error
    for what, names in (
        ("lacks", told.missing_keys),
        ("has, and the module not,", told.unexpected_keys),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise UsageError(f"{path} {what} {', '.join(names[:5])}{more}; expected its state dict")


def exported(module: nn.Module, shape: tuple[int, int, int]) -> tuple[bytes, tuple[str, ...]]:
    """The module as ONNX, and what its outputs are called.

    Args:
        shape: `(C, H, W)` of an image.

    Raises:
        UsageError: it does not take such an image, gives no tensors, or cannot be exported.
    """
    image = torch.zeros(1, *shape)
    try:
        with torch.inference_mode():
            names = tuple(_named(module(image)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what tracing says of foreign code
            data = from_torch.exported(
                module, image, "input", names, lambda out: tuple(_named(out).values())
            )
    except UsageError:
        raise
    except Exception as error:  # whatever foreign code raises, and the exporter of it
        said = " ".join(str(error).split())[:500]
        raise UsageError(
            f"the module does not take an image of {shape}, or cannot be exported: {said}"
        ) from error
    return data, names


def forward(
    module: nn.Module, wanted: Sequence[str]
) -> Callable[[NDArray[np.float32]], list[NDArray[np.float32]]]:
    """What the module itself gives of an image, the outputs called `wanted`."""

    def infer(image: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        with torch.inference_mode():
            found = _named(module(torch.from_numpy(image)))
        return [found[name].float().numpy() for name in wanted]

    return infer


def _named(output: Any) -> dict[str, torch.Tensor]:
    """The tensors of an output by name."""
    if torch.is_tensor(output):
        return {"output": output}
    if isinstance(output, Mapping):
        found = {str(name): tensor for name, tensor in output.items()}
    elif isinstance(output, (tuple, list)):
        found = {f"output{number}": tensor for number, tensor in enumerate(output)}
    else:
        found = {}
    if not found or not all(torch.is_tensor(tensor) for tensor in found.values()):
        raise UsageError(
            f"the module gives {type(output).__name__}, expected a tensor, or tensors in a tuple "
            "or by name"
        )
    return found
