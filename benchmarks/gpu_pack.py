"""The pack for a machine with a card: made here without one, opened there by `gpu_run`.

    PACK/pack.json                       PackRecord: commit, versions, SHA-256 of the files
    PACK/NETWORK/PRECISION.cxrgaze/      the bundles, compressed, without reference and pages
    PACK/NETWORK/reference.npz.xz        the float32 reference of all three, once
    PACK/NETWORK/half.npz.xz             the fp16 graph's answers, by ONNX Runtime where it was made
    PACK/wheels/                         what the card's Python may lack, and pycuda to compile

Films are phantoms: they are drawn again there from their seeds, so no image is in it.

Opening imports neither torch nor onnx.
"""

from __future__ import annotations

import argparse
import io
import lzma
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cxrgaze import command
from cxrgaze.bundles import npz
from cxrgaze.bundles.bundle import GOLDEN, GRAPH, MANIFEST, REFERENCE, Bundle, fill_bundle
from cxrgaze.bundles.manifest import Manifest, Precision
from cxrgaze.bundles.verdicts import Limits
from cxrgaze.command import Steps, say
from cxrgaze.environment import now_utc, versions
from cxrgaze.errors import IntegrityError, UsageError
from cxrgaze.evidence import gate
from cxrgaze.files import new_folder, read_verified, sha256
from cxrgaze.records import Frozen, Record, parse_record
from cxrgaze.runtime.ort import witness
from cxrgaze.spec import LOG_DENSITY, LOGITS, Head, Outputs

RECORD = "pack.json"
_STORED = (GRAPH, GOLDEN)
"""Files of a bundle that are in the pack beside its manifest."""
PRECISIONS: tuple[Precision, ...] = ("fp16", "int8", "fp32")
LIMIT_BYTES = 58 << 20
"""Of the bundles and references together."""

WHEELS = (
    "annotated-types",
    "mako",
    "markupsafe",
    "monai",
    "platformdirs",
    "polygraphy",
    "pydantic",
    "pydantic-core",
    "pydicom",
    "pytools",
    "siphash24",
    "typing-inspection",
)
"""What `gpu_run` and pycuda import and a Python with torch may lack."""
PYTHON_THERE = "3.12"
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")


class Contents(NamedTuple):
    """What of a network goes into the pack."""

    checkpoint: str
    """File name among those that ship."""
    films: int
    """Phantoms of the engine's gate, the first of the default gate's."""
    half_films: int
    """Phantoms that the fp16 graph's answers are stored of, in float32."""


NETWORKS: dict[str, Contents] = {
    "tiny": Contents("demo.safetensors", 200, 32),
    "edge": Contents("edge.safetensors", 150, 16),
}


class Packed(Frozen):
    """One network of the pack."""

    checkpoint: str
    films: int
    first_seed: int
    half_films: int
    bundles: dict[Precision, str]
    """SHA-256 of each bundle."""
    reference_sha256: str
    half_sha256: str


class PackRecord(Record):
    """What the pack is and with what it was made."""

    VERSION = 1
    WHAT = "pack's record"
    REMEDY = "run: make gpu-pack"

    schema_version: int = VERSION
    created_utc: str
    commit: str
    """Of the repository; with "+" where files differed from it."""
    versions: dict[str, str]
    networks: dict[str, Packed]
    wheels: tuple[str, ...]
    """File names."""
    wheels_left_out: str
    """Why some are missing; empty where none is."""


class Pack:
    """An opened pack.

    Raises:
        UsageError: `folder` is no pack.
        IntegrityError: its record is malformed.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / RECORD
        if not path.is_file():
            raise UsageError(f"{folder} is no pack: it has no {RECORD}; run: make gpu-pack")
        self.folder = folder
        self.record = parse_record(PackRecord, path.read_bytes(), str(path))

    def bundle(self, network: str, precision: Precision, work: Path) -> Bundle:
        """The whole bundle, its reference put back, in a folder of `work`.

        Raises:
            IntegrityError: a file was altered.
        """
        packed = self.record.networks[network]
        target = work / f"{network}-{precision}.cxrgaze"
        if not target.exists():
            with new_folder(target, MANIFEST) as folder:
                source = self.folder / network / f"{precision}.cxrgaze"
                shutil.copy(source / MANIFEST, folder)
                reference = self._unpacked(network, "reference", packed.reference_sha256)
                (folder / REFERENCE).parent.mkdir()
                for name in _STORED:
                    (folder / name).write_bytes(lzma.decompress(_xz(source / name).read_bytes()))
                (folder / REFERENCE).write_bytes(reference)
        bundle = Bundle.open(target)
        bundle.verify()
        if bundle.sha256 != packed.bundles[precision]:
            raise IntegrityError(f"{target} is not the bundle of the pack's record; make it again")
        return bundle

    def films(self, network: str, bundle: Bundle) -> gate.GateSet:
        """The phantoms of the engine's gate, drawn again."""
        packed = self.record.networks[network]
        return gate.phantom_set(bundle.manifest.spec, packed.films, packed.first_seed)

    def half(self, network: str) -> Outputs:
        """The fp16 graph's answers to the first phantoms, by ONNX Runtime where the pack was made.

        Raises:
            IntegrityError: the file was altered.
        """
        data = self._unpacked(network, "half", self.record.networks[network].half_sha256)
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            heads: tuple[Head, ...] = (LOGITS, LOG_DENSITY)
            return {head: stored[head] for head in heads}

    def _unpacked(self, network: str, name: str, digest: str) -> bytes:
        path = self.folder / network / f"{name}.npz.xz"
        data = read_verified(
            path,
            path.stat().st_size if path.is_file() else 0,
            digest,
            source="the pack's record",
            remedy="run: make gpu-pack",
        )
        return lzma.decompress(data)


def make(
    folder: Path, networks: Mapping[str, Contents], step: Steps, *, wheels: bool = True
) -> Pack:
    """Write the pack.

    Args:
        wheels: download them from the package index that pip uses.

    Raises:
        UsageError: `folder` is something else; the bundles and references are over the limit.
        CxrgazeError: as an export.
    """
    with new_folder(folder, RECORD) as new:
        packed = {name: _packed(new / name, asked, step) for name, asked in networks.items()}
        if (size := _size(new)) > LIMIT_BYTES:
            raise UsageError(
                f"the pack has {size / 2**20:.1f} MiB, expected at most "
                f"{LIMIT_BYTES / 2**20:.0f}: take fewer films"
            )
        left_out = "not asked for"
        if wheels:
            with step("download wheels"):
                left_out = _download(new / "wheels")
        record = PackRecord(
            created_utc=now_utc(),
            commit=commit(),
            versions=versions("cxrgaze", "python", "torch", "onnx", "onnxruntime", "numpy"),
            networks=packed,
            wheels=tuple(sorted(path.name for path in new.glob("wheels/*"))),
            wheels_left_out=left_out,
        )
        (new / RECORD).write_bytes(record.rendered())
    return Pack(folder)


def _packed(folder: Path, asked: Contents, step: Steps) -> Packed:
    """The folder of one network."""
    from cxrgaze.export.network_source import source_from_checkpoint
    from cxrgaze.export.options import ExportOptions, GateOptions
    from cxrgaze.export.pipeline import export
    from cxrgaze.train.checkpoint import demo_path

    source = source_from_checkpoint(demo_path().with_name(asked.checkpoint))
    films = gate.phantom_set(source.spec, asked.films)
    images = films.arrays.images
    exported: dict[Precision, Bundle] = {}
    for precision in PRECISIONS:
        say(f"{folder.name} {precision}")
        options = ExportOptions(
            precision, "tensorrt", folder / "whole", gate=GateOptions(skip=True)
        )
        exported[precision] = export(source, options, step)
    with step(f"the float32 reference, films: {asked.films}"):
        found = gate.predicted(witness(exported["fp32"].read(GRAPH)), images)
        reference = gate.stored_reference(films, found)
    with step(f"the fp16 graph's answers, films: {asked.half_films}"):
        infer = witness(exported["fp16"].read(GRAPH))
        answers = [infer(image[None]) for image in images[: asked.half_films]]
        half = npz.written(
            {head: np.concatenate([one[head] for one in answers]) for head in answers[0]}
        )
    digests: dict[Precision, str] = {}
    for precision, bundle in exported.items():
        target = folder / f"{precision}.cxrgaze"
        with step(f"the gate of the {precision} graph, on the films of the engine's"):
            manifest = _gated(bundle, films, found)
        files = {name: bundle.read(name) for name in _STORED} | {REFERENCE: reference}
        target.mkdir(parents=True)
        digests[precision] = fill_bundle(target, manifest, files).sha256
        (target / REFERENCE).unlink()
        for name in _STORED:
            _compressed(_xz(target / name), files[name])
            (target / name).unlink()
    shutil.rmtree(folder / "whole", ignore_errors=True)
    return Packed(
        checkpoint=asked.checkpoint,
        films=asked.films,
        first_seed=gate.PHANTOM_SEED,
        half_films=asked.half_films,
        bundles=digests,
        reference_sha256=_compressed(folder / "reference.npz.xz", reference),
        half_sha256=_compressed(folder / "half.npz.xz", half),
    )


def _gated(bundle: Bundle, films: gate.GateSet, reference: gate.Predicted) -> Manifest:
    """The manifest with the graph's verdict on the very films that the plan is judged on.

    A few hundred films can tell less than the default gate's thousand: *inconclusive* is likely.
    """
    manifest = bundle.manifest
    if manifest.precision == "fp32":
        return manifest  # its own reference
    candidate = gate.predicted(witness(bundle.read(GRAPH)), films.arrays.images)
    served, decision = manifest.reference_served, manifest.decision
    verdict = gate.judge(films, reference, candidate, Limits(), "graph", served, decision)
    say(f" {verdict.verdict}: {verdict.reason};")
    return manifest.model_copy(update={"gate": verdict})


def _xz(path: Path) -> Path:
    return path.with_name(f"{path.name}.xz")


def _compressed(path: Path, data: bytes) -> str:
    """SHA-256 of the file that is written."""
    small = lzma.compress(data)
    path.write_bytes(small)
    return sha256(small)


def _download(folder: Path) -> str:
    """Wheels for the card's Python, and pycuda's source; why some are missing."""
    folder.mkdir()
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--dest", str(folder)]
    there = ["--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON_THERE}"]
    there += [f"--platform={name}_x86_64" for name in _PLATFORMS]
    problems = []
    for arguments in ([*there, *WHEELS], ["--no-binary=pycuda", "pycuda"]):
        try:
            subprocess.run([*pip, *arguments], check=True, capture_output=True, timeout=300)
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode(errors="replace").strip().splitlines()[-1:]
            problems.append(said[0] if said else f"pip ended with {error.returncode}")
        except subprocess.TimeoutExpired:
            problems.append("pip took longer than 300 s")
    return "; ".join(problems)


def commit() -> str:
    """Commit of the repository that this module lies in, "+" where files differ; or "unknown"."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m cxrgaze.benchmarks.gpu_pack`."""
    parser = argparse.ArgumentParser(prog="gpu_pack", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("pack", type=Path, nargs="?", default=Path("out/gpu-pack"), metavar="PACK")
    parser.add_argument("--no-wheels", action="store_true", help="reach no package index")
    return command.execute(parser, _run, argv)


def _run(args: argparse.Namespace) -> int:
    pack = make(args.pack, NETWORKS, Steps(), wheels=not args.no_wheels)
    whole, wheels = _size(args.pack), _size(args.pack / "wheels")
    print(f"pack     {args.pack} ({(whole - wheels) / 2**20:.1f} MiB, wheels {wheels / 2**20:.1f})")
    if pack.record.wheels_left_out:
        print(f"wheels   left out: {pack.record.wheels_left_out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
