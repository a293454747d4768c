"""The folder of a run: what it was started from, and what a resumption needs.

RUN/config.toml           the resolved config
RUN/run.json              what the run was started from; a resumed run must be the same
RUN/epochs.csv            a row an epoch: losses, validation AUC and CC, learning rate
RUN/tensorboard/          the same for TensorBoard
RUN/stages/               weights after each finished stage; the running stage's state
RUN/NAME.safetensors      the checkpoint, NAME.json its card (to read: NAME.card.html), NAME.seen
                          hashes of its films, NAME.prior their centre prior
"""

from __future__ import annotations

from pathlib import Path

from cxrgaze.errors import UsageError
from cxrgaze.evidence.labelled_set import LabelledSet
from cxrgaze.files import make_output_folder, sha256, write_atomic
from cxrgaze.records import Frozen, Record, parse_record
from cxrgaze.train.card import Statements
from cxrgaze.train.config import TrainConfig, load_config, render_config

_FRESH = {"config.toml", "run.json"}


class Start(Frozen):
    """Where weights come from."""

    init: str = "random"
    """`random`, `imagenet` or a file (`cxrgaze.train.initial`)."""
    origin: str = ""
    """What a file without a card was trained on."""
    teacher: Path | None = None
    """Checkpoint of a teacher, for losses that need one."""
    allow_leakage: bool = False
    allow_untaught: bool = False
    """Train although nothing teaches some of the classes."""


class RunRecord(Record):
    """What `run.json` holds; a run is resumed only if it is the same but for `_MAY_DIFFER`."""

    VERSION = 2
    WHAT = "record of a run"
    REMEDY = "start another run"

    schema_version: int = VERSION

    config: TrainConfig
    start: Start
    set_origin: str
    set_sha256: str
    """Over the set's tables: films with their hashes, labels and splits, and gaze."""
    weights_sha256: tuple[str, ...]
    """Of initial and teaching weights."""
    command: str
    """The command line that started the run."""
    statements: Statements = Statements()
    """What people stated of the network when they started it."""


_MAY_DIFFER = ("command", "statements")


def set_hash(labelled: LabelledSet) -> str:
    """SHA-256 over films.csv and fixations.csv."""
    tables = [labelled.folder / name for name in ("films.csv", "fixations.csv")]
    return sha256(b"\0".join(t.read_bytes() if t.is_file() else b"" for t in tables))


def open_run(run: Path, record: RunRecord, resume: bool) -> RunRecord:
    """Make the folder of a new run, or check that the one to resume is the same run.

    A folder in which no stage has begun is taken over.

    Returns:
        The record in the folder: that of the first start.

    Raises:
        UsageError: something else is there, nothing is there to resume, or it is another run.
    """
    if resume:
        before = read_run(run)
        changed = [
            name
            for name in RunRecord.model_fields
            if name not in _MAY_DIFFER and getattr(before, name) != getattr(record, name)
        ]
        if changed:
            raise UsageError(
                f"{run} was started with another {', '.join(changed)}; resume it as it was "
                f"started (its config is {run / 'config.toml'}), or start another run"
            )
        return before
    if run.exists() and {p.name for p in run.iterdir()} - _FRESH:
        raise UsageError(f"{run} is not empty; give --resume to go on, or another --output")
    make_output_folder(run)
    write_atomic(run / "config.toml", render_config(record.config))
    write_atomic(run / "run.json", record.rendered())
    return record


def read_run(run: Path) -> RunRecord:
    """What a run's folder was started from.

    Raises:
        UsageError: it holds no run. IntegrityError: its record is malformed.
    """
    path = run / "run.json"
    if not path.is_file():
        raise UsageError(f"{run} holds no run that could be resumed: it has no run.json")
    record = parse_record(RunRecord, path.read_bytes(), str(path))
    if load_config(str(run / "config.toml")) != record.config:
        raise UsageError(
            f"{run / 'config.toml'} was changed after the start; start another run with it"
        )
    return record
