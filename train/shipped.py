"""The trained networks that ship with the package, by name. Imports no torch."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from cxrgaze.files import parse_json


def networks() -> dict[str, Path]:
    """The checkpoint of each by its name, in the order of their sizes."""
    folder = Path(str(files("cxrgaze.train") / "demo"))
    checkpoints = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    return {path.stem: path for path in checkpoints}


def table() -> list[dict[str, str]]:
    """Of each what is known before torch is loaded: columns by heading, sizes in MB (10⁶ bytes).

    The cards are ours and not verified here; `checkpoint.load` verifies card and weights.
    """
    return [_row(name, path) for name, path in networks().items()]


def _row(name: str, path: Path) -> dict[str, str]:
    card_path = path.with_suffix(".json")
    card: dict[str, Any] = parse_json(card_path.read_bytes(), str(card_path))
    spec = card["spec"]
    return {
        "name": name,
        "variant": spec["variant"],
        "canvas": f"{spec['height']}x{spec['width']}",
        "checkpoint": f"{path.stat().st_size / 1e6:.2f} MB",
        "trained on": card["trained_on"],
        "export": f"cxrgaze-export {name} --precision fp16",
    }
