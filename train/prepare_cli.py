"""cxrgaze-train prepare: make a labelled set."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

from cxrgaze import command


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
        help="column file (below DIR); used if there: patient, label, view, age, sex, split",
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
        help="a label of the CSV as one of normal, heart_failure, pneumonia; LABEL= leaves such "
        "films unlabelled; may be given several times",
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


def _prepare(args: argparse.Namespace) -> int:
    from cxrgaze.errors import UsageError
    from cxrgaze.evidence.labelled_set import SPLITS
    from cxrgaze.train.egd import read_egd
    from cxrgaze.train.prepare import PrepareOptions, prepare, read_table, summary
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
    if args.egd:
        source, origin = read_egd(args.egd, args.films), "EGD-CXR 1.0.0, MIMIC-CXR"
    elif args.reflacx:
        source, origin = read_reflacx(args.reflacx, args.films, label_map), "REFLACX, MIMIC-CXR"
    else:
        source = read_table(args.films, args.labels, args.gaze)
        origin = _folder_name(args.films)
    options = PrepareOptions(
        output=args.output,
        origin=args.origin if args.labels and args.origin else f"{origin} {args.origin}".strip(),
        label_map=label_map,
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
