"""Child processes of ours: started apart from the folder that the command runs in."""

from __future__ import annotations

import sys
from pathlib import Path

_CODE = (
    "import runpy, sys; count = int(sys.argv[1]); sys.path[:0] = sys.argv[2:2 + count]; "
    "sys.argv = sys.argv[2 + count:]; "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of ours as `python -m` does, and safely so.

    `-m` would put the working folder, where the films may lie, first among the places that Python
    imports from, and run a `cv2.py` that it finds there. The child imports from where this process
    does, but for the working folder and what the environment says of Python.
    """
    here = Path.cwd().resolve()
    home = str(Path(__file__).parents[1])
    found = [p for p in sys.path if p and Path(p).is_absolute() and Path(p).resolve() != here]
    paths = [home, *(p for p in found if p != home)]
    return [sys.executable, "-I", "-c", _CODE, str(len(paths)), *paths, module, *arguments]
