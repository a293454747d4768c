"""cxrgaze-train prepare: make a labelled set."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxrgaze import command

if TYPE_CHECKING:
    from cxrgaze.evidence.class_presets import Classes


def add(commands: Any) -> None:
    """Add the subcommand."""
    prepare = commands.add_parser(
        "prepare",
        help="make a labelled set from a folder of films",
        description="Check every film, leave out those that cannot or must not be read (and say "
        "so), deal patients to train, val and test, and write one folder with films, tables and "
        "hashes: the format for training, calibration, gate and evaluation.",
        epilog=command.EXIT_HELP,
    )
    prepare.add_argument("--films", type=Path, required=True, metavar="DIR")
    source = prepare.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--labels",
        type=Path,
        metavar="CSV",
        help="a table in our own style: column file (below DIR); used if there: patient, label, "
        "view, age, sex, split; or as NIH ChestX-ray14, CheXpert or VinDr-CXR publish theirs",
    )
    source.add_argument(
        "--egd",
        type=Path,
        metavar="EGD",
        help="folder of EGD-CXR 1.0.0 (master_sheet.csv, fixations.csv, eye_gaze.csv); DIR then "
        "holds the MIMIC-CXR films, DICOM or JPG",
    )
    source.add_argument(
        "--reflacx",
        type=Path,
        metavar="REFLACX",
        help="folder of REFLACX 1.0.0 (main_data/); DIR then holds the MIMIC-CXR films; films are "
        "unlabelled but for findings given by --map, 'No finding' among them",
    )
    prepare.add_argument(
        "--gaze",
        type=Path,
        metavar="CSV",
        help="with --labels, gaze of any eye tracker: columns film, reader, kind (sample or "
        "fixation), x_px, y_px (pixels of the film), duration_ms; optional sigma_x_px, sigma_y_px",
    )
    prepare.add_argument("--output", type=Path, required=True, metavar="SET")
    prepare.add_argument("--origin", default="", help="where the films come from, in a sentence")
    prepare.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="LABEL=CLASS",
        help="a label of the CSV as a class of another name; LABEL= leaves such films unlabelled, "
        "or drops a finding; may be given several times",
    )
    prepare.add_argument(
        "--classes",
        metavar="CLASSES",
        help="classes that the set shall have, in this order: names with commas between, a preset "
        "(paper), or a TOML file with [[classes]] of name, display and snomed; default: those that "
        "the labels name",
    )
    prepare.add_argument(
        "--findings",
        action="store_true",
        help="the labels of an own table are findings that do not exclude each other: label as "
        "A|B, or a column each with 1, 0, -1 (uncertain) or nothing (unknown); published tables "
        "always are",
    )
    prepare.add_argument(
        "--uncertain",
        choices=("unknown", "present", "absent"),
        default="unknown",
        help="what -1 says of a finding (default: unknown, it counts neither way)",
    )
    prepare.add_argument(
        "--blank",
        choices=("unknown", "absent"),
        default="unknown",
        help="what an empty cell says of a finding (default: unknown, it counts neither way)",
    )
    prepare.add_argument(
        "--split",
        default="train=0.7,val=0.1,test=0.2",
        metavar="SHARES",
        help="where the CSV has no split (default train=0.7,val=0.1,test=0.2)",
    )
    prepare.add_argument(
        "--seed", type=command.bounded(0, 2**31 - 1), default=0, help="of the split (default 0)"
    )
    prepare.add_argument(
        "--patient-per-film", action="store_true", help="where the CSV has no patients"
    )
    prepare.add_argument(
        "--synthetic", action="store_true", help="the films are drawings; all figures will say so"
    )
    prepare.add_argument(
        "--strip",
        action="store_true",
        help="keep of DICOM films only what their pixels need, without the patient; by default "
        "they are copied as they are",
    )
    prepare.set_defaults(run=_prepare)


def _folder_name(films: Path) -> str:
    """A folder's name, told from others of that name without its place, which is nobody's."""
    from cxrgaze.files import sha256

    place = films.resolve()
    return f"{place.name} [{sha256(os.fsencode(place))[:8]}]"


def _classes(text: str | None) -> Classes | None:
    """What `--classes` says."""
    from pydantic import ValidationError

    from cxrgaze.errors import UsageError
    from cxrgaze.evidence.class_presets import PRESETS, Classes, class_named
    from cxrgaze.files import read_toml
    from cxrgaze.records import complaint
    from cxrgaze.spec import DiseaseClass

    if text is None or text in PRESETS:
        return PRESETS[text] if text else None
    content = read_toml(Path(text)) if text.endswith(".toml") else None
    if content is not None and (set(content) != {"classes"} or not content["classes"]):
        raise UsageError(f"--classes {text}: expected [[classes]] tables and nothing else")
    try:
        if content is not None:
            named = [DiseaseClass.model_validate(one) for one in content["classes"]]
        else:
            named = [class_named(name) for name in text.split(",")]
    except ValidationError as error:
        raise UsageError(f"--classes {text}: {complaint(error)}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"--classes {text}: {error}") from error
    if len({one.name for one in named}) != len(named):
        raise UsageError(f"--classes {text}: a class is named twice")
    return Classes(tuple(named), "exclusive")


def _table(args: argparse.Namespace, classes: Classes | None, label_map: dict[str, str]) -> Any:
    """The table of labels (`label_tables.Table`)."""
    from cxrgaze.evidence.class_presets import class_named
    from cxrgaze.train import label_tables

    if not args.findings and not label_tables.is_published(args.labels):
        return label_tables.read_exclusive(args.films, args.labels)
    wanted = None
    if classes:
        names = {one.name for one in classes.classes}

        def wanted(column: str) -> bool:
            label = label_map.get(column, column)
            try:
                return bool(label) and class_named(label).name in names
            except ValueError:
                return False

    options = label_tables.FindingOptions(wanted, args.uncertain, args.blank)
    return label_tables.read_findings(args.films, args.labels, options)


def _prepare(args: argparse.Namespace) -> int:
    from cxrgaze.errors import UsageError
    from cxrgaze.evidence.labelled_set import SPLITS
    from cxrgaze.train.egd import read_egd
    from cxrgaze.train.prepare import PrepareOptions, prepare, source_of, summary
    from cxrgaze.train.reflacx import read_reflacx

    if not args.films.is_dir():
        raise UsageError(f"{args.films} is not a folder")
    if args.labels and not args.labels.is_file():
        raise UsageError(f"{args.labels} does not exist")
    if args.gaze and not (args.labels and args.gaze.is_file()):
        raise UsageError(f"--gaze {args.gaze}: expected a file, together with --labels")
    for folder in filter(None, (args.egd, args.reflacx)):
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder")
    if bad := [pair for pair in args.map if "=" not in pair]:
        raise UsageError(f"--map {bad[0]}: expected LABEL=CLASS")
    try:
        pairs = [(k, float(v)) for k, v in (pair.split("=") for pair in args.split.split(","))]
    except ValueError:
        pairs = []
    shares = dict(pairs)
    good = all(0 < share < math.inf for share in shares.values()) and len(shares) == len(pairs)
    if not shares or not good or not set(shares) <= set(SPLITS):
        raise UsageError(f"--split {args.split}: expected SPLIT=SHARE,... of {', '.join(SPLITS)}")
    label_map = dict(pair.rsplit("=", 1) for pair in args.map)
    classes = _classes(args.classes)
    if args.findings and not args.labels:
        raise UsageError("--findings is for tables given by --labels")
    if args.egd:
        source, origin = read_egd(args.egd, args.films), "EGD-CXR 1.0.0, MIMIC-CXR"
    elif args.reflacx:
        source, origin = read_reflacx(args.reflacx, args.films, label_map), "REFLACX, MIMIC-CXR"
    else:
        source = source_of(args.films, _table(args, classes, label_map), args.gaze)
        origin = _folder_name(args.films)
    options = PrepareOptions(
        output=args.output,
        origin=args.origin if args.labels and args.origin else f"{origin} {args.origin}".strip(),
        label_map=label_map,
        classes=classes,
        shares={split: shares[split] for split in SPLITS if split in shares},
        seed=args.seed,
        patient_per_film=args.patient_per_film,
        synthetic=args.synthetic,
        strip=args.strip,
    )
    labelled = prepare(source, options)
    print(summary(labelled))
    print(
        f"set      {labelled.folder} ({len(labelled.rows)} films, split "
        f"{labelled.info.split_sha256[:12]})"
    )
    return 0
