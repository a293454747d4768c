"""cxrgaze-train: make the demo checkpoint. Real training data comes with a later version."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cxrgaze import command


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `cxrgaze-train`."""
    parser = command.parser("cxrgaze-train", "Train the network.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="train the demo network on phantoms",
        description="Draw phantoms, train `tiny` on both heads at once, evaluate it on held-out "
        "phantoms and write demo.safetensors and demo.json. This one command reproduces the "
        "checkpoint that ships with the package; about two minutes on one core.",
    )
    demo.add_argument("--output", type=Path, default=Path("demo-checkpoint"), metavar="DIR")
    demo.add_argument("--films", type=int, default=900, help="training phantoms (default 900)")
    demo.add_argument("--epochs", type=int, default=14, help="(default 14)")
    demo.add_argument("--seed", type=int, default=0, help="(default 0)")
    demo.add_argument(
        "--shuffle-targets",
        action="store_true",
        help="negative control: labels and gaze maps of other films; must learn nothing",
    )
    return command.execute(parser, _run, argv)


def _run(args: argparse.Namespace) -> int:
    from cxrgaze.errors import UsageError
    from cxrgaze.files import make_output_folder
    from cxrgaze.train.demo_run import train_demo
    from cxrgaze.train.fit import FitConfig

    if args.films < 64 or args.epochs < 1:
        raise UsageError("--films must be at least 64 and --epochs at least 1")
    output = make_output_folder(args.output)
    config = FitConfig(epochs=args.epochs, seed=args.seed)
    card = train_demo(
        output / "demo.safetensors", config, films=args.films, shuffle=args.shuffle_targets
    )
    easy = card.results["held_out"]
    print(f"checkpoint  {output / 'demo.safetensors'} ({card.parameters:,} parameters)")
    print(
        f"held-out phantoms (synthetic, {easy['films']}): macro AUC {easy['auc_macro']:.3f}, "
        f"CC {easy['cc']:.3f}, centre-prior CC {easy['cc_centre_prior']:.3f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
