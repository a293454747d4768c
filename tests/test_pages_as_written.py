"""Pages whose commands a reader copies, run as they are written.

A block after `<!-- file: NAME -->` is written to NAME, one after `<!-- run: PROGRAM -->` is given
to the program; a page's blocks run in its order in one folder.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("docs/own-networks.md",)
_BLOCK = re.compile(r"<!-- (file|run): (\S+) -->\n```\w+\n(.*?)```", re.DOTALL)


def _blocks(text):
    return [(kind, what, body) for kind, what, body in _BLOCK.findall(text)]


def test_every_marked_block_is_found():
    for page in PAGES:
        text = (ROOT / page).read_text()
        assert len(_blocks(text)) == text.count("<!-- run: ") + text.count("<!-- file: ") > 0


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_as_it_is_written(page, tmp_path):
    scripts = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": ""}
    for kind, what, body in _blocks((ROOT / page).read_text()):
        body = body.replace("FILMS", str(ROOT / "examples" / "films"))
        if kind == "file":
            (tmp_path / what).write_text(body)
            continue
        program = [sys.executable] if what == "python" else [what, "-e"]
        done = subprocess.run(
            [*program, "-"] if what == "python" else [*program, "-c", body],
            input=body if what == "python" else None,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=env,
        )
        assert done.returncode == 0, f"{body}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert list(tmp_path.glob("readings/*.overlay.png"))
