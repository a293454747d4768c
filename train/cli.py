"""cxrgaze-train: make a labelled set, train, evaluate."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cxrgaze import command
from cxrgaze.train import prepare_cli

_SEED = command.bounded(0, 2**31 - 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `cxrgaze-train`."""
    parser = command.parser("cxrgaze-train", "Make a labelled set, train the network, evaluate it.")
    commands = parser.add_subparsers(dest="command", required=True)
    prepare_cli.add(commands)
    _add_fit(commands)
    _add_import(commands)
    _add_evaluate(commands)
    _add_compare(commands)
    _add_saliency(commands)
    _add_card(commands)
    _add_phantom(commands)
    _add_demo(commands)
    return command.execute(parser, _run, argv)


def _run(args: argparse.Namespace) -> int:
    code: int = args.run(args)
    return code


def _add_fit(commands: Any) -> None:
    fit = commands.add_parser(
        "fit",
        help="train on a labelled set",
        description="Train stage by stage on the set's split train, choose epochs, temperature and "
        "operating points on val; test is not opened. Presets: paper (the paper's multi-stage "
        "cooperative learning), joint, distill (a student, with --teacher), demo. Writes "
        "RUN/NAME.safetensors with its card NAME.json, RUN/config.toml, RUN/epochs.csv and a "
        "TensorBoard log.",
        epilog=command.EXIT_HELP,
    )
    fit.add_argument("set", type=Path, metavar="SET", help="labelled set made by prepare")
    fit.add_argument("--config", metavar="PRESET|TOML", help="(default: paper)")
    fit.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change the config, as variant=tiny, stages.fusion.epochs=5 or "
        "stages.contrastive=false; may be given several times",
    )
    fit.add_argument("--output", type=Path, required=True, metavar="RUN", help="folder of the run")
    fit.add_argument("--resume", action="store_true", help="go on with the run in RUN")
    fit.add_argument(
        "--init",
        default="random",
        metavar="random|imagenet|FILE",
        help="first weights: a cxrgaze checkpoint, or DenseNet weights under torchvision's names",
    )
    fit.add_argument(
        "--init-origin",
        default="",
        metavar="TEXT",
        help="what a FILE without a card was trained on",
    )
    fit.add_argument("--teacher", type=Path, metavar="CHECKPOINT", help="for preset distill")
    fit.add_argument(
        "--allow-leakage",
        action="store_true",
        help="take weights that may have seen the set's test films",
    )
    command.add_identity_key(fit)
    _add_statements(fit)
    fit.add_argument(
        "--allow-untaught",
        action="store_true",
        help="train although no training film has some of the classes: they are recorded, never "
        "served, and named in every reading",
    )
    fit.add_argument(
        "--accelerator", choices=("auto", "cpu", "gpu"), default="auto", help="(default auto)"
    )
    fit.add_argument(
        "--devices",
        type=command.bounded(1, 1024),
        default=1,
        metavar="N",
        help="processes on this machine, one a GPU; each takes the config's batch (default 1)",
    )
    fit.add_argument(
        "--nodes",
        type=command.bounded(1, 1024),
        default=1,
        metavar="N",
        help="machines, started by torchrun or a scheduler (default 1)",
    )
    fit.add_argument(
        "--threads",
        type=command.bounded(1, 1024),
        metavar="N",
        help="torch threads of each process; 1 gives the same weights each time (default: all)",
    )
    fit.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep preprocessed films here, for sets that do not fit into memory and for later "
        "runs (they are films: keep them where the set may be)",
    )
    fit.set_defaults(run=_fit)


def _add_import(commands: Any) -> None:
    importing = commands.add_parser(
        "import",
        help="make a checkpoint of weights of the authors' code",
        description="Read a NET.pt of CXRGazeLearn or MT-UNet, of any stage, and write it as a "
        "checkpoint with a card. The network then reads films by the authors' preprocessing: "
        "stored values of DICOM or of 16-bit images, no larger than 2560x3200. What is not used, "
        "and outputs that nothing taught, are named. Nothing is unpickled but tensors.",
        epilog="example: cxrgaze-train import run/NET/NET.pt --from cxrgazelearn "
        "--trained-on 'EGD-CXR, split of the authors' --output authors.safetensors; "
        + command.EXIT_HELP,
    )
    importing.add_argument("file", type=Path, metavar="NET.pt")
    importing.add_argument(
        "--from",
        dest="kind",
        required=True,
        choices=("cxrgazelearn", "mt-unet"),
        help="whose network it is: the paper's (variant paper), or the baseline (mt-unet)",
    )
    importing.add_argument(
        "--trained-on",
        required=True,
        metavar="TEXT",
        help="the films that it was trained on, in words; leakage is judged by it",
    )
    importing.add_argument("--output", type=Path, required=True, metavar="NAME.safetensors")
    importing.set_defaults(run=_import)


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="evaluate a checkpoint or a bundle on a labelled set",
        description="Diagnosis and gaze with intervals, beside what is said without the network "
        "(view and age, grey levels, patient number, centre prior): report.json, report.md, "
        "report.html and films.csv. Changes neither model nor set; a look at a test "
        "split is logged in SET/looks.jsonl.",
        epilog=command.EXIT_HELP,
    )
    evaluate.add_argument("model", type=Path, metavar="CHECKPOINT|BUNDLE")
    evaluate.add_argument("set", type=Path, metavar="SET")
    evaluate.add_argument(
        "--split", choices=("train", "val", "test"), default="test", help="(default test)"
    )
    evaluate.add_argument("--output", type=Path, required=True, metavar="DIR")
    evaluate.add_argument(
        "--heatmap",
        metavar="PRESET",
        help="how gaze becomes a density (default: the network's own)",
    )
    evaluate.add_argument(
        "--resamples", type=command.bounded(200, 100_000), default=2000, help="(default 2000)"
    )
    evaluate.add_argument("--seed", type=_SEED, default=0, help="of the bootstrap (default 0)")
    command.add_identity_key(evaluate)
    command.add_threads(evaluate)
    evaluate.set_defaults(run=_evaluate)


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        help="compare evaluated models on the same films",
        description="The difference in macro AUC and CC of models that were evaluated on the same "
        "films, paired, with intervals over patients; of several pairs (as seeds) their mean.",
        epilog=command.EXIT_HELP,
    )
    for name in ("base", "new"):
        compare.add_argument(
            f"--{name}",
            type=Path,
            nargs="+",
            required=True,
            metavar="DIR",
            help="reports of cxrgaze-train evaluate"
            + ("; the first is compared with the first of --base, and so on" * (name == "new")),
        )
    compare.add_argument(
        "--resamples", type=command.bounded(200, 100_000), default=5000, help="(default 5000)"
    )
    compare.add_argument("--seed", type=_SEED, default=0, help="of the bootstrap (default 0)")
    compare.set_defaults(run=_compare)


def _add_saliency(commands: Any) -> None:
    saliency = commands.add_parser(
        "saliency",
        help="compare heatmaps of any tool with the gaze of a labelled set",
        description="CC, SIM, KLD, NSS, AUC-Judd, shuffled AUC and information gain of a map a "
        "film, with intervals, beside the centre prior and what readers agree among each other: "
        "saliency.json, .csv (a row a film), .md and .html. A look at a test split is logged in "
        "SET/looks.jsonl. Example: cxrgaze-train saliency gradcam/ SET --heatmap reflacx --output "
        "REPORT, with gradcam/NAME.npy for the film NAME.dcm of SET.",
        epilog=command.EXIT_HELP,
    )
    saliency.add_argument(
        "maps",
        type=Path,
        metavar="MAPS",
        help="folder with a map a film, named as the film: NAME.npy, (H, W) numbers, or NAME.png, "
        "grey of 8 or 16 bit; of any size with the film's aspect",
    )
    saliency.add_argument("set", type=Path, metavar="SET", help="labelled set made by prepare")
    saliency.add_argument("--output", type=Path, required=True, metavar="DIR")
    saliency.add_argument(
        "--heatmap", required=True, metavar="PRESET", help="how gaze becomes a density"
    )
    saliency.add_argument(
        "--kind",
        choices=("activation", "probability", "log-density"),
        default="activation",
        help="what the maps hold: heat of any sum, a density, its natural logarithm (default "
        "activation)",
    )
    command.add_split(saliency, "--split", "test")
    saliency.add_argument(
        "--canvas",
        type=_canvas,
        default=(320, 320),
        metavar="HxW",
        help="pixels that film, gaze and map are brought to (default 320x320)",
    )
    saliency.add_argument(
        "--allow-missing",
        action="store_true",
        help="judge the films that have a map although others have none, and say so",
    )
    saliency.add_argument(
        "--resamples", type=command.bounded(200, 100_000), default=2000, help="(default 2000)"
    )
    saliency.add_argument("--seed", type=_SEED, default=0, help="of the bootstrap (default 0)")
    saliency.set_defaults(run=_saliency)


def _canvas(text: str) -> tuple[int, int]:
    """An argparse type: `HxW` in pixels."""
    side = command.bounded(8, 4096)
    height, _, width = text.partition("x")
    return side(height), side(width)


def _add_card(commands: Any) -> None:
    card = commands.add_parser(
        "card",
        help="state what only people know of a checkpoint, add evaluations, write its card anew",
        description="A checkpoint's card says what the weights are, what they were trained on and "
        "what was measured: NAME.json, to read NAME.card.md and NAME.card.html. It goes into every "
        "bundle. What nobody stated is counted and shown as not stated.",
        epilog=command.EXIT_HELP,
    )
    card.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    _add_statements(card)
    card.add_argument(
        "--evaluation",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a report of cxrgaze-train evaluate on these weights; takes the place of one on the "
        "same split; may be given several times",
    )
    card.set_defaults(run=_card)


def _add_statements(parser: Any) -> None:
    parser.add_argument(
        "--card",
        type=Path,
        metavar="TOML",
        help="what only people know, in a table [statements]: intended use, who labelled, "
        "licences, contact (examples/card.toml has all of them)",
    )


def _add_phantom(commands: Any) -> None:
    phantom = commands.add_parser(
        "phantom",
        help="draw a labelled set of phantoms",
        description="Synthetic drawings with labels and two simulated readers, for trying things. "
        "A phantom is given by its number: the same first seed draws the same set. The demo "
        "network was trained on numbers from 0: to evaluate that one, take --first-seed 500000.",
        epilog=command.EXIT_HELP,
    )
    phantom.add_argument("--output", type=Path, required=True, metavar="SET")
    phantom.add_argument("--train", type=command.bounded(0, 10**6), default=900)
    phantom.add_argument("--val", type=command.bounded(0, 10**6), default=150)
    phantom.add_argument("--test", type=command.bounded(0, 10**6), default=300)
    phantom.add_argument("--difficulty", type=float, default=0.0, help="0 (default) to 1")
    phantom.add_argument("--first-seed", type=_SEED, default=0)
    phantom.set_defaults(run=_phantom)


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="train the demo network on phantoms",
        description="Draw phantoms, train `tiny` by preset demo (the stages of preset paper), "
        "evaluate it on held-out phantoms. This one command reproduces the checkpoint that ships "
        "with the package; about two minutes on one core.",
        epilog=command.EXIT_HELP,
    )
    demo.add_argument("--output", type=Path, default=Path("demo-run"), metavar="RUN")
    demo.add_argument("--films", type=int, default=900, help="training phantoms (default 900)")
    demo.add_argument("--config", default="demo", metavar="PRESET|TOML", help="(default demo)")
    demo.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    demo.add_argument(
        "--shuffle-targets",
        action="store_true",
        help="negative control: labels and gaze maps of other films; must learn nothing",
    )
    demo.set_defaults(run=_demo)


def _fit(args: argparse.Namespace) -> int:
    from cxrgaze.errors import UsageError
    from cxrgaze.evidence.labelled_set import LabelledSet
    from cxrgaze.evidence.seen import read_key
    from cxrgaze.train.card import read_statements
    from cxrgaze.train.config import load_config
    from cxrgaze.train.fit import fit
    from cxrgaze.train.run_folder import Start, read_run
    from cxrgaze.train.stage_run import Machine

    if args.resume:
        if args.config or args.overrides or args.init != "random" or args.teacher:
            raise UsageError(
                "a resumed run takes its config and its weights from its folder: leave out "
                "--config, --set, --init and --teacher"
            )
        record = read_run(args.output)
        config, start = record.config, record.start
    else:
        config = load_config(args.config or "paper", args.overrides)
        start = Start(
            init=args.init if args.init in ("random", "imagenet") else _absolute(args.init),
            origin=args.init_origin,
            teacher=args.teacher and Path(_absolute(args.teacher)),
            allow_leakage=args.allow_leakage,
            allow_untaught=args.allow_untaught,
        )
    if start.teacher and not start.teacher.is_file():
        raise UsageError(f"--teacher {start.teacher} does not exist")
    machine = Machine(args.accelerator, args.devices, args.nodes, args.threads, args.cache)
    card = fit(
        LabelledSet.open(args.set),
        config,
        args.output,
        start=start,
        machine=machine,
        resume=args.resume,
        command=_command_of(args, "fit", _portable(args.set)),
        identity_key=read_key(args.identity_key),
        statements=read_statements(args.card),
    )
    if card:
        _print_card(args.output / f"{config.name}.safetensors", card.results["validation"], card)
    return 0


def _import(args: argparse.Namespace) -> int:
    from cxrgaze.train.card_page import NOT_RECORDED
    from cxrgaze.train.imported import import_weights

    line = ["cxrgaze-train", "import", _portable(args.file), "--from", args.kind]
    line += ["--trained-on", args.trained_on, "--output", _portable(args.output)]
    found = import_weights(
        args.file,
        args.kind,
        args.output,
        trained_on=args.trained_on,
        command=shlex.join(line),
    )
    print(f"checkpoint  {args.output} ({found.card.parameters:,} parameters)")
    print(f"dropped     {', '.join(found.dropped) or 'nothing'}")
    for head, why in found.untrained.items():
        print(f"untrained   {head}, which is not served: {why}")
    print(f"seen        {NOT_RECORDED}")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from cxrgaze.train.evaluation import EvaluationOptions, evaluate_model
    from cxrgaze.train.evaluation_report import summary

    evaluation = evaluate_model(
        EvaluationOptions(
            model=args.model,
            labelled=args.set,
            split=args.split,
            output=args.output,
            heatmap=args.heatmap,
            resamples=args.resamples,
            seed=args.seed,
            threads=args.threads,
            identity_key=args.identity_key,
        )
    )
    for line in summary(evaluation):
        print(line)
    return 0


def _compare(args: argparse.Namespace) -> int:
    from cxrgaze.train.paired_reports import compare_reports

    found = compare_reports(args.base, args.new, resamples=args.resamples, seed=args.seed)
    print(f"{found.films} films, {found.patients} patients, pairs: {found.pairs}")
    for name, interval in (("macro AUC", found.macro_auc), ("CC", found.cc)):
        if interval:
            print(f"{name}, new minus base: {interval}")
    return 0


def _saliency(args: argparse.Namespace) -> int:
    from cxrgaze.train.saliency import SaliencyOptions, compare_with_gaze
    from cxrgaze.train.saliency_report import summary

    report = compare_with_gaze(
        SaliencyOptions(
            maps=args.maps,
            labelled=args.set,
            output=args.output,
            heatmap=args.heatmap,
            split=args.split,
            kind=args.kind,
            canvas=args.canvas,
            allow_missing=args.allow_missing,
            resamples=args.resamples,
            seed=args.seed,
        )
    )
    for line in summary(report):
        print(line)
    return 0


def _card(args: argparse.Namespace) -> int:
    from cxrgaze.train import checkpoint
    from cxrgaze.train.card import read_statements, with_evaluation
    from cxrgaze.train.card_page import not_stated
    from cxrgaze.train.evaluation_record import FILE, read_evaluation

    card = checkpoint.load(args.checkpoint)[1]
    if args.card:
        card = card.model_copy(update={"statements": read_statements(args.card)})
    for path in args.evaluation:
        report = path / FILE if path.is_dir() else path
        card = with_evaluation(card, read_evaluation(report), str(report))
    checkpoint.write_card(args.checkpoint, card)
    missing, questions = not_stated(card)
    print(f"card        {args.checkpoint.with_suffix('.card.html')} (also .md)")
    print(f"not stated  {len(missing)} of {questions}: {', '.join(missing) or 'nothing'}")
    return 0


def _phantom(args: argparse.Namespace) -> int:
    from cxrgaze.errors import UsageError
    from cxrgaze.evidence.labelled_set import SPLITS
    from cxrgaze.evidence.phantom import write_phantom_set

    sizes = {split: size for split in SPLITS if (size := getattr(args, split))}
    if not sizes or not 0 <= args.difficulty <= 1:
        raise UsageError("expected at least one phantom and a difficulty from 0 to 1")
    labelled = write_phantom_set(
        args.output, sizes, difficulty=args.difficulty, first_seed=args.first_seed
    )
    print(f"set      {labelled.folder} ({len(labelled.rows)} phantoms: synthetic drawings)")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from cxrgaze.errors import UsageError
    from cxrgaze.train.config import load_config
    from cxrgaze.train.demo_run import train_demo

    if args.films < 64:
        raise UsageError("--films must be at least 64")
    config = load_config(args.config, args.overrides)
    card = train_demo(
        args.output,
        config,
        films=args.films,
        shuffle=args.shuffle_targets,
        command=_command_of(args, "demo", "--films", str(args.films))
        + (" --shuffle-targets" if args.shuffle_targets else ""),
    )
    _print_card(args.output / f"{config.name}.safetensors", card.results["held_out"], card)
    return 0


def _absolute(path: str | Path) -> str:
    """A path that a resumption from another folder finds, too."""
    return str(Path(path).resolve())


def _command_of(args: argparse.Namespace, *words: str) -> str:
    """The command line that makes this checkpoint, without what belongs to the machine."""
    line = ["cxrgaze-train", *words]
    if args.config:
        line += ["--config", _portable(args.config)]
    for text in args.overrides:
        line += ["--set", text]
    for flag, shown in (("init", _portable), ("init_origin", str), ("teacher", _portable)):
        value = getattr(args, flag, "")
        if value and value != "random":
            line += [f"--{flag.replace('_', '-')}", shown(value)]
    for flag in ("allow_leakage", "allow_untaught"):
        if getattr(args, flag, False):
            line.append(f"--{flag.replace('_', '-')}")
    return shlex.join(line)


def _portable(path: str | Path) -> str:
    """A path for a card, which travels: of an absolute one the name, the rest is this machine's."""
    return Path(path).name if Path(path).is_absolute() else str(path)


def _print_card(path: Path, figures: dict[str, Any], card: Any) -> None:
    synthetic = "phantoms (synthetic)" if card.spec.domain == "phantom" else "films"
    print(f"checkpoint  {path} ({card.parameters:,} parameters)")
    shown = [
        f"{name} {figures[key]:.3f}"
        for key, name in (
            ("auc_macro", "macro AUC"),
            ("cc", "CC"),
            ("cc_centre_prior", "centre-prior CC"),
        )
        if key in figures
    ]
    which = "held-out" if "held_out" in card.results else "validation"
    print(f"{figures['films']} {which} {synthetic}: {', '.join(shown)}")


if __name__ == "__main__":
    sys.exit(main())
