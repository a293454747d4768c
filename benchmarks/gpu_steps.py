"""What is asked of a machine with a card: the steps of `gpu_run` in one table, the rarest first.

What a step needs and is not there leaves it out, by name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cxrgaze.benchmarks import energy
from cxrgaze.benchmarks.gpu_pack import NETWORKS, PRECISIONS, Pack
from cxrgaze.benchmarks.machine import Watch, machine
from cxrgaze.benchmarks.timing import latency, warm_up
from cxrgaze.bundles.bundle import GRAPH, Bundle
from cxrgaze.bundles.manifest import Precision
from cxrgaze.bundles.verdicts import compared_pixels
from cxrgaze.engines.build import BuildOptions, build, gated
from cxrgaze.environment import versions
from cxrgaze.errors import CxrgazeError, GateError, IncompatibleError
from cxrgaze.evidence import gate, metrics
from cxrgaze.files import write_atomic
from cxrgaze.runtime import device, plans, support, trt_library
from cxrgaze.runtime.host import host_platform, l4t_release
from cxrgaze.runtime.ort import heads_of, witness
from cxrgaze.runtime.reader import load
from cxrgaze.runtime.trt_library import Library
from cxrgaze.spec import HEADS, IMAGE, LOG_DENSITY, LOGITS, Infer, Outputs

BUDGET_S = 450.0
"""Seconds for all steps; what has not begun by then is left out, what runs is stopped."""
LARGEST_BATCH = 16
SAMPLES = 200
"""Films of the latency, one at a time."""
PART_S = 2.0
"""Seconds at most for each of warm-up, latency, throughput and energy."""
_ROOT = Path(__file__).resolve().parents[1]
_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"))
_PAPER_SEED = 0


class Found(NamedTuple):
    """What a step found."""

    says: tuple[str, ...]
    figures: dict[str, Any]


@dataclass
class Run:
    """Where a run reads, works and writes."""

    pack: Pack
    output: Path
    work: Path
    """Whole bundles, plans and what is compiled; gone after the run."""
    budget_s: float = BUDGET_S
    begun: float = field(default_factory=time.perf_counter)

    @property
    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget_s - (time.perf_counter() - self.begun)

    @property
    def cache(self) -> plans.Cache:
        """The plans of this run, for all its steps."""
        return plans.Cache(self.work / "plans")

    @property
    def site(self) -> Path:
        """Packages that this run compiled."""
        return self.work / "site"


class Step(NamedTuple):
    """A row of the table."""

    name: str
    what: str
    needs: tuple[str, ...]
    """Keys of `NEEDS`, or modules."""
    act: Callable[[Run], Found]
    seconds: float = 120.0
    """After which it is stopped."""


# What a step may need: why it is not here, "" where it is.


def _card(run: Run) -> str:
    return "no card here" if isinstance(device.gpus(), str) else ""


def _torch_card(run: Run) -> str:
    if not find_spec("torch"):
        return "no torch to see a card"
    import torch

    return "" if torch.cuda.is_available() else "torch sees no card"


def _cuda_provider(run: Run) -> str:
    import onnxruntime

    if _CUDA_PROVIDER in onnxruntime.get_available_providers():
        return ""
    return f"this ONNX Runtime {onnxruntime.__version__} has no {_CUDA_PROVIDER}"


_CUDA_PROVIDER = "CUDAExecutionProvider"


def _file(name: str) -> Callable[[Run], str]:
    return lambda run: "" if (_ROOT / name).is_file() else f"{name} is not here"


def _program(name: str) -> Callable[[Run], str]:
    return lambda run: "" if shutil.which(name, path=_PATH) else f"no program {name} here"


NEEDS: dict[str, Callable[[Run], str]] = {
    "a card": _card,
    "torch on a card": _torch_card,
    "ONNX Runtime's CUDA provider": _cuda_provider,
    "tests": _file("tests/runtime/test_device.py"),
    "nvcc": _program("nvcc"),
    "cc": _program("cc"),
    "pycuda's source": lambda run: (
        "" if _source_of_pycuda(run) else "pycuda's source is not in the pack"
    ),
}


def missing(need: str, run: Run) -> str:
    """Why what a step needs is not here, "" where it is."""
    if need in NEEDS:
        return NEEDS[need](run)
    return "" if find_spec(need) else f"the package {need} is not installed"


# The steps.


def facts(run: Run) -> Found:
    """The machine, its card and its libraries."""
    here = device.gpus()
    card = here if isinstance(here, str) else f"{here[0].name}, compute capability {_sm(here)}"
    about = machine()
    libraries = trt_library.versions()
    documented = [] if isinstance(here, str) else [_documented(n, here[0]) for n in libraries]
    driver = about.gpus[0].get("driver", "unknown") if about.gpus else "unknown"
    cuda = "" if isinstance(here, str) else f", CUDA {here[0].driver_cuda}"
    packages = versions("cuda-bindings", "onnx", "polygraphy", "monai", "pydantic", "nvidia-ml-py")
    return Found(
        (
            f"card: {card}",
            f"driver: {driver}{cuda}",
            f"processor: {about.cpu}, {about.cpu_count} to be used; Python {about.python}",
            "TensorRT: " + (", ".join(f"{n} {v}" for n, v in libraries.items()) or "none"),
            *documented,
        ),
        {
            "card": here if isinstance(here, str) else [vars(gpu) for gpu in here],
            "machine": about.model_dump(mode="json"),
            "packages": packages,
        },
    )


def _documented(name: str, gpu: device.Gpu) -> str:
    """What the support matrix says of an installed library and a card."""
    try:
        library = trt_library.find(name)
    except IncompatibleError as error:
        return str(error)
    return support.verdict(library, gpu, host_platform(), l4t_release())[1]


def _sm(gpus: Sequence[device.Gpu]) -> str:
    return f"{gpus[0].capability[:-1]}.{gpus[0].capability[-1]}"


def contract(provider: str, run: Run) -> Found:
    """The device layer's contract on the card, case by case.

    Raises:
        CxrgazeError: a case does not hold, or the process ended otherwise.
    """
    script = str(_ROOT / "tests" / "runtime" / "test_device.py")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(_paths(run)), "OPENBLAS_NUM_THREADS": "1"}
    done = _said([sys.executable, script, provider, "libcuda.so.1"], env)
    said: dict[str, str] = json.loads(done.splitlines()[-1])
    if "skip" in said:
        raise CxrgazeError(said["skip"])
    broken = {case: words for case, words in said.items() if words}
    if broken:
        raise CxrgazeError(
            f"{len(broken)} of {len(said)} cases do not hold: "
            + "; ".join(f"{case}: {last_line(words)}" for case, words in broken.items())
        )
    return Found((f"{provider}: all {len(said)} cases hold",), {"cases": list(said)})


def compile_pycuda(run: Run) -> Found:
    """Pycuda from its source, with the CUDA that is here.

    Raises:
        CxrgazeError: pip's last words.
    """
    wheels = run.pack.folder / "wheels"
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-index"]
    pip += ["--no-build-isolation", "--no-deps", "--target", str(run.site)]
    needed = [next(wheels.glob(f"{name}-*"), None) for name in _PYCUDA_NEEDS]
    source = _source_of_pycuda(run)
    started = time.perf_counter()
    _said([*pip, *(str(path) for path in (source, *needed) if path)], {**os.environ, "PATH": _PATH})
    seconds = time.perf_counter() - started
    return Found(
        (f"{source.name if source else 'pycuda'} compiled in {seconds:.0f} s",),
        {"seconds": seconds},
    )


_PYCUDA_NEEDS = ("pytools", "platformdirs", "siphash24", "mako", "markupsafe")


def _source_of_pycuda(run: Run) -> Path | None:
    return next((run.pack.folder / "wheels").glob("pycuda-*.tar.gz"), None)


def plan_of(network: str, precision: Precision, name: str, run: Run) -> Found:
    """A plan of a bundle of the pack, by the library called `name`: all that can be said of it."""
    bundle = run.pack.bundle(network, precision, run.work)
    films = run.pack.films(network, bundle)
    return plan_facts(bundle, trt_library.find(name), run.cache, films.arrays.images, films)


def plan_facts(
    bundle: Bundle,
    library: Library,
    cache: plans.Cache,
    images: NDArray[np.float32],
    films: gate.GateSet | None,
) -> Found:
    """Build, built precision, stages, throughput, energy, memory, parity; the gate at the end.

    Args:
        images: canvases `(n, 1, H, W)` to time.
        films: of the gate; None: no gate.

    Raises:
        BuildError, IncompatibleError: in the library's own words.
    """
    built = build(bundle, library, BuildOptions(batch=(1, 1, LARGEST_BATCH)), cache)
    record = built.record
    says = [
        f"{library.name} {library.version} built {bundle.manifest.name} in "
        f"{record.build_seconds:.1f} s, {record.plan_bytes / 1e6:.1f} MB",
        f"built precision {record.built_precision}: {record.built_precision_why}",
    ]
    figures: dict[str, Any] = {"plan": record.model_dump(mode="json")}
    with load(bundle.path, library.name, cache=cache.folder) as reader:
        backend = reader.backend
        says.append("the self-test on the golden input passed")
        expected = _answers(witness(bundle.read(GRAPH)), images[:4])
        found = _answers(backend.infer, images[:4])
        figures["to_onnxruntime"] = apart = differences(found, expected)
        figures["timed"] = times = timed(backend.infer, images, lambda: backend.stages_ms)
        figures["memory_bytes"] = dict(backend.memory_bytes)
    says += [f"4 films, {_apart(apart)} from ONNX Runtime on the same graph", *_rates(times)]
    says.append(", ".join(f"{k} {v / 1e6:.1f} MB" for k, v in figures["memory_bytes"].items()))
    if films is None:
        return Found((*says, "no gate: random weights have no accuracy to lose"), figures)
    try:
        verdict = gated(bundle, library, cache, record, films).gate
    except GateError as error:
        return Found((*says, str(error)), {**figures, "gate": str(error)})
    if verdict:
        says.append(f"gate at engine level {verdict.verdict}, {films.name}: {verdict.reason}")
        figures["gate"] = verdict.model_dump(mode="json")
    return Found(tuple(says), figures)


def paper_plan(run: Run) -> Found:
    """A plan of the paper's network with random weights: exported here, without a gate."""
    from cxrgaze.command import Steps
    from cxrgaze.export.network_source import source_from_random
    from cxrgaze.export.options import ExportOptions, GateOptions
    from cxrgaze.export.pipeline import export

    source = source_from_random("paper", _PAPER_SEED)
    asked = ExportOptions("fp16", "tensorrt", run.work / "paper", gate=GateOptions(skip=True))
    bundle = export(source, asked, Steps())
    images = gate.phantom_set(source.spec, LARGEST_BATCH).arrays.images
    return plan_facts(bundle, trt_library.find(), run.cache, images, None)


def half_of(network: str, run: Run, on: str = "cuda", films: int | None = None) -> Found:
    """A shipped network in torch on the card, in half too, beside the fp16 graph's answers.

    Args:
        films: at most so many; None: all that the pack has answers of.
    """
    from cxrgaze.train.checkpoint import demo_path
    from cxrgaze.train.checkpoint import load as load_network

    packed = run.pack.record.networks[network]
    module, card = load_network(demo_path().with_name(packed.checkpoint))
    images = gate.phantom_set(card.spec, packed.films, packed.first_seed).arrays.images
    graph = run.pack.half(network)
    count = min(len(graph[LOGITS]), films or len(graph[LOGITS]))
    stored = {head: array[:count] for head, array in graph.items()}
    return _half(module, images, count, on, stored)


def half_of_paper(run: Run, on: str = "cuda") -> Found:
    """The paper's network with random weights, likewise; there is no graph of it in the pack."""
    import torch

    from cxrgaze.export.canvases import CALIBRATION_SEED, phantom_canvases
    from cxrgaze.train.model import random_network, spec_of

    spec = spec_of(
        "paper", model_version=f"random-{_PAPER_SEED}", pixel_source="image-8bit", domain="none"
    )
    calibration = torch.from_numpy(phantom_canvases(spec, 2, CALIBRATION_SEED))
    module = random_network(spec, calibration, _PAPER_SEED)
    images = gate.phantom_set(spec, LARGEST_BATCH).arrays.images
    return _half(module, images, 2, on, None)


def _half(
    module: Any, images: NDArray[np.float32], count: int, on: str, graph: Outputs | None
) -> Found:
    """A module on a device in float32, autocast and half: differences, and what each costs."""
    import torch

    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    module = module.eval()
    answers = {"host float32": _answers(_torch(module, "cpu"), images[:count])}
    if graph is not None:
        answers["fp16 graph"] = graph
    says, times = [], {}
    ways = {"float32": False, "autocast": True, "half": False}
    for way, autocast in ways.items():
        module = module.to(on).half() if way == "half" else module.to(on)
        infer = _torch(module, on, autocast=autocast)
        answers[f"{on} {way}"] = _answers(infer, images[:count])
        if on == "cuda":
            torch.cuda.reset_peak_memory_stats()
            times[way] = timed(infer, images)
            times[way]["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
            says += [f"torch {way}: {words}" for words in _rates(times[way])]
    base = "host float32"
    pairs = [(name, base) for name in answers if name != base]
    if graph is not None:
        pairs += [(f"{on} {way}", "fp16 graph") for way in ("autocast", "half")]
    apart = {f"{a} from {b}": differences(answers[a], answers[b]) for a, b in pairs}
    says = [f"{pair}, {count} films: {_apart(one)}" for pair, one in apart.items()] + says
    return Found(tuple(says), {"films": count, "differences": apart, "timed": times})


def _torch(module: Any, on: str, *, autocast: bool = False) -> Infer:
    import torch

    kind = next(module.parameters()).dtype

    def infer(image: NDArray[np.float32]) -> Outputs:
        with torch.inference_mode(), torch.autocast(on, dtype=torch.float16, enabled=autocast):
            heads = module(torch.from_numpy(image).to(on, kind))
        return {head: tensor.float().cpu().numpy() for head, tensor in heads.items()}

    return infer


def by_cuda_provider(network: str, run: Run) -> Found:
    """A network's graphs by ONNX Runtime's CUDA provider, judged as an engine is.

    It is no backend of ours: it shows what a float16 graph loses where float16 is computed, which
    the host rounds and computes in float32.

    Raises:
        CxrgazeError: it runs elsewhere.
    """
    says: list[str] = []
    figures: dict[str, Any] = {}
    for precision in PRECISIONS:
        bundle = run.pack.bundle(network, precision, run.work)
        graph = bundle.read(GRAPH)
        films = run.pack.films(network, bundle)
        infer, left = card_session(graph)
        some = films.arrays.images[:4]
        apart = differences(_answers(infer, some), _answers(witness(graph), some))
        verdict = gate.judge_engine(bundle, films, infer)
        times = timed(infer, films.arrays.images)
        figures[precision] = {
            "to_host": apart,
            "gate": verdict.model_dump(mode="json"),
            "timed": times,
            "not_on_the_card": left,
        }
        says += [
            f"{precision}: 4 films, {_apart(apart)} from the host on the same graph",
            f"{precision}: gate {verdict.verdict}, {films.name}: {verdict.reason}",
            *(f"{precision}: {words}" for words in _rates(times)),
            *([f"{precision}: not all of it on the card: {left}"] if left else []),
        ]
    return Found(tuple(says), figures)


def card_session(graph: bytes) -> tuple[Infer, str]:
    """A graph by the CUDA provider, in its own types; why not all of it, "" where it is.

    Raises:
        CxrgazeError: it would run elsewhere.
    """
    import onnxruntime

    onnxruntime.preload_dlls()

    def opened(*, host_too: bool) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_cpu_ep_fallback", str(int(not host_too)))
        providers = [(_CUDA_PROVIDER, {"use_tf32": "0"})]
        return onnxruntime.InferenceSession(graph, options, providers=providers)

    left = ""
    try:
        session = opened(host_too=False)
    except Exception as error:
        left = last_line(str(error))
        session = opened(host_too=True)
    if (first := session.get_providers()[0]) != _CUDA_PROVIDER:
        raise CxrgazeError(f"ONNX Runtime runs it by {first}, not by {_CUDA_PROVIDER}: {left}")
    return heads_of(session), left


def polygraphy_on_plans(run: Run) -> Found:
    """Polygraphy's runner on plans of ours, beside our runner; its inspect beside our proof."""
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    library = trt_library.find("tensorrt")
    says, figures = [], {}
    for network, precision in _pairs(run.pack.record.networks):
        bundle = run.pack.bundle(network, precision, run.work)
        options = BuildOptions(batch=(1, 1, LARGEST_BATCH))
        record = build(bundle, library, options, run.cache).record
        images = run.pack.films(network, bundle).arrays.images[:4]
        with load(bundle.path, "tensorrt", cache=run.cache.folder) as reader:
            ours = _answers(reader.backend.infer, images)
        with TrtRunner(EngineFromBytes(run.cache.read(record))) as runner:
            theirs = _answers(_polygraphy(runner), images)
        name = f"{network}-{precision}"
        figures[name] = apart = differences(theirs, ours)
        plan = run.cache.plan_path(record.inputs)
        text = _inspected(run, plan, "--model-type=engine")
        write_atomic(run.output / f"{name}-plan.txt", text.encode())
        said = {kind: text.count(kind) for kind in ("Half", "FP16", "Int8", "Float", "FP32")}
        says.append(
            f"{name}: their runner from ours, 4 films, {_apart(apart)}; types named by their "
            f"inspect: {_counts(said)}; our proof: {record.built_precision}"
        )
    return Found(tuple(says), figures)


def polygraphy_on_graphs(run: Run) -> Found:
    """Polygraphy's ONNX Runtime runner beside ours, and the convolutions' types by its inspect."""
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

    says, figures = [], {}
    for network, precision in _pairs(run.pack.record.networks):
        bundle = run.pack.bundle(network, precision, run.work)
        data = bundle.read(GRAPH)
        images = run.pack.films(network, bundle).arrays.images[:4]
        with OnnxrtRunner(SessionFromOnnx(data, providers=["cpu"])) as runner:
            theirs = _answers(_polygraphy(runner), images)
        name = f"{network}-{precision}"
        apart = differences(theirs, _answers(witness(data), images))
        types = convolution_types(_inspected(run, bundle.path / GRAPH))
        macs = bundle.manifest.convolution_macs
        figures[name] = {"differences": apart, "convolutions": types, "macs": dict(macs)}
        says.append(
            f"{name}: their runner from ours, 4 films, {_apart(apart)}; convolutions by their "
            f"inspect: {_counts(types)}; our count of the work: {_shares(macs)}"
        )
    return Found(tuple(says), figures)


def _polygraphy(runner: Any) -> Infer:
    def infer(image: NDArray[np.float32]) -> Outputs:
        heads = runner.infer({IMAGE: image})
        return {head: np.array(heads[head]) for head in HEADS}

    return infer


def _inspected(run: Run, model: Path, *more: str) -> str:
    """What `polygraphy inspect model` says."""
    code = "from polygraphy.tools import main; raise SystemExit(main())"
    command = [sys.executable, "-c", code, "inspect", "model", str(model), "--show", "layers"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(_paths(run))}
    return placeless(_said([*command, *more], env), run)


def convolution_types(text: str) -> dict[str, int]:
    """Convolutions by the type of their weights, in the words of polygraphy's inspect.

    "hidden" where it gives none: weights that a node dequantizes, tensors without a known shape.
    """
    found: dict[str, int] = {}
    for node in text.split("\n    Node ")[1:]:
        if re.search(r"\[Op: Conv(Transpose)?\]", node):
            weights = re.search(r"Initializer \|.*?dtype=(\w+)", node)
            kind = weights[1] if weights else "hidden"
            found[kind] = found.get(kind, 0) + 1
    return found


def drawn_and_computed_again(run: Run) -> Found:
    """Whether this machine draws the pack's phantoms, and what its ONNX Runtime says of them."""
    says, figures = [], {}
    for network in run.pack.record.networks:
        bundle = run.pack.bundle(network, "fp32", run.work)
        films = run.pack.films(network, bundle)
        keys, stored = gate.read_reference(bundle)
        same = sum(key in set(keys) for key in films.keys)
        graph = run.pack.half(network)
        some = films.arrays.images[: min(8, len(graph[LOGITS]))]
        single = _answers(witness(bundle.read(GRAPH)), some)
        off = float(np.abs(single[LOGITS] - stored[LOGITS][: len(some)]).max())
        half_graph = run.pack.bundle(network, "fp16", run.work).read(GRAPH)
        there = {head: array[: len(some)] for head, array in graph.items()}
        apart = differences(_answers(witness(half_graph), some), there)
        figures[network] = {"same_films": same, "fp32_logits_max": off, "fp16": apart}
        says.append(
            f"{network}: {same} of {len(films.keys)} phantoms drawn bit for bit; over "
            f"{len(some)} of them fp32 logits off by {off:.2g} from the pack's reference, and the "
            f"fp16 graph's answers from the pack's: {_apart(apart)}"
        )
    return Found(tuple(says), figures)


def stand_ins(files: Sequence[str], run: Run) -> Found:
    """Tests on the stand-ins for the driver or for TensorRT: no word about a card.

    Raises:
        CxrgazeError: pytest's last words.
    """
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu"]
    pytest += ["--tb=no"]  # its last lines name what failed
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(_paths(run)),
        "OMP_NUM_THREADS": "1",
    }
    said = _said([*pytest, *(str(_ROOT / name) for name in files)], env)
    return Found((f"{', '.join(files)}: {last_line(said)}",), {})


# What steps share.


def differences(found: Outputs, wanted: Outputs) -> dict[str, float]:
    """Largest differences of both heads, of labels, and the smallest agreement CC over films.

    Log-densities are compared where the wanted one is not negligible (`compared_pixels`).
    """
    if not all(np.isfinite(array).all() for array in found.values()):
        return {"not_finite": 1.0}
    density, agreement = [], []
    for one, other in zip(found[LOG_DENSITY][:, 0], wanted[LOG_DENSITY][:, 0], strict=True):
        compared = compared_pixels(other)
        density.append(float(np.abs(one - other)[compared].max()))
        agreement.append(metrics.cc(np.exp(one), np.exp(other)))
    flips = int((found[LOGITS].argmax(1) != wanted[LOGITS].argmax(1)).sum())
    return {
        "logits_max": float(np.abs(found[LOGITS] - wanted[LOGITS]).max()),
        "log_density_max": max(density),
        "agreement_cc_min": min(agreement),
        "label_flips": flips,
    }


def timed(
    infer: Infer,
    images: NDArray[np.float32],
    stages: Callable[[], Mapping[str, float]] = lambda: {},
) -> dict[str, Any]:
    """Latency of a film, films a second in batches, energy of a film.

    Canvas in host memory to both heads in host memory.

    Args:
        images: canvases `(n, 1, H, W)`, read in turn.
        stages: milliseconds of the last call by the device's own clock.
    """

    def one(number: int) -> float:
        start = time.perf_counter()
        infer(images[number % len(images)][None])
        return (time.perf_counter() - start) * 1e3

    watch = Watch()
    settled = warm_up(lambda: one(0), PART_S)
    samples: list[float] = []
    parts: list[dict[str, float]] = []
    deadline = time.perf_counter() + PART_S
    while len(samples) < SAMPLES and (not samples or time.perf_counter() < deadline):
        samples.append(one(len(samples)))
        parts.append(dict(stages()))
    sensor = energy.find_sensor()
    spent = energy.measure(one, PART_S, sensor, idle_seconds=1.0) if sensor else "no sensor here"
    batch = np.ascontiguousarray(images[:LARGEST_BATCH])
    infer(batch)
    start, read = time.perf_counter(), 0
    while not read or time.perf_counter() < start + PART_S:
        infer(batch)
        read += len(batch)
    rate = read / (time.perf_counter() - start)
    return {
        "warm_up": settled.model_dump(mode="json"),
        "latency_ms": latency(samples).model_dump(mode="json"),
        "stages_ms": {
            name: latency([part[name] for part in parts]).model_dump(mode="json")
            for name in parts[0]
        },
        "batch": len(batch),
        "films_per_s": rate,
        "energy": spent if isinstance(spent, str) else spent.model_dump(mode="json"),
        "energy_stated": spent if isinstance(spent, str) else spent.stated,
        "conditions": watch.conditions().model_dump(mode="json"),
    }


def _rates(times: Mapping[str, Any]) -> list[str]:
    """The figures of `timed` in sentences."""

    def p50(of: Mapping[str, Any]) -> str:
        return f"{of['p50']['value']:.3f} ms"

    parts = ", ".join(f"{name} {p50(of)}" for name, of in times["stages_ms"].items())
    return [
        f"p50 {p50(times['latency_ms'])} a film{f' ({parts})' if parts else ''}, "
        f"{times['films_per_s']:.0f} films/s in batches of {times['batch']}; "
        f"energy: {times['energy_stated']}"
        + ("" if times["warm_up"]["settled"] else "; warm-up never settled")
    ]


def _answers(infer: Infer, images: NDArray[np.float32]) -> Outputs:
    """Both heads, film by film."""
    each = [infer(np.ascontiguousarray(image[None])) for image in images]
    return {head: np.concatenate([one[head] for one in each]) for head in each[0]}


def _apart(one: Mapping[str, float]) -> str:
    if "not_finite" in one:
        return "NaN or infinity"
    return (
        f"logits off by {one['logits_max']:.2g}, log-density by {one['log_density_max']:.2g}, "
        f"agreement CC {one['agreement_cc_min']:.6f}, {one['label_flips']:.0f} labels flip"
    )


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none shown"


def _shares(macs: Mapping[Any, int]) -> str:
    whole = sum(macs.values()) or 1
    return ", ".join(f"{100 * part / whole:.1f} % {name}" for name, part in macs.items())


def _pairs(networks: Iterable[str]) -> list[tuple[str, Precision]]:
    return [(network, precision) for network in networks for precision in PRECISIONS]


def _paths(run: Run) -> list[str]:
    return [str(run.site), *(path for path in sys.path if path)]


def _said(command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """What a program writes to standard output.

    Raises:
        CxrgazeError: it ended with another code than 0; its last line, and pytest's failed tests.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
        said = "; ".join([last_line(done.stderr) or last_line(done.stdout), *failed])
        raise CxrgazeError(f"{Path(command[0]).name} ended with {done.returncode}: {said}")
    return done.stdout


def placeless(text: str, run: Run) -> str:
    """What is written and may be committed, without the places of this machine."""
    home = os.path.expanduser("~")
    places = {run.work: "WORK", run.output: "OUTPUT", run.pack.folder: "PACK", _ROOT: "ROOT"}
    for place, word in (places | ({Path(home): "HOME"} if len(home) > 1 else {})).items():
        text = text.replace(str(place), word)
    return text


def last_line(text: str) -> str:
    """The last line that is not empty, at most 500 characters of it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""


STEPS: tuple[Step, ...] = (
    Step("machine", "the card, its driver, the libraries", (), facts, 60),
    Step(
        "contract-cuda-bindings",
        "the device layer's contract by cuda-bindings",
        ("tests", "pytest", "cuda", "a card"),
        partial(contract, "cuda-bindings"),
    ),
    Step("pycuda", "pycuda compiled", ("pycuda's source", "nvcc", "a card"), compile_pycuda, 180),
    Step(
        "contract-pycuda",
        "the device layer's contract by pycuda",
        ("tests", "pytest", "pycuda", "a card"),
        partial(contract, "pycuda"),
    ),
    *(
        Step(
            f"tensorrt-{network}-{precision}",
            f"a plan of {network} in {precision} by TensorRT",
            ("tensorrt", "a card"),
            partial(plan_of, network, precision, "tensorrt"),
        )
        for network, precision in _pairs(NETWORKS)
    ),
    Step(
        "tensorrt-rtx",
        "TensorRT-RTX, tried once on tiny in fp16",
        ("tensorrt_rtx", "a card"),
        partial(plan_of, "tiny", "fp16", "tensorrt_rtx"),
    ),
    *(
        Step(
            f"half-{network}",
            f"{network} in half in torch on the card, beside the fp16 graph",
            ("torch", "monai", "safetensors", "torch on a card"),
            partial(half_of, network),
        )
        for network in NETWORKS
    ),
    *(
        Step(
            f"cuda-provider-{network}",
            f"{network} by ONNX Runtime's CUDA provider, judged as an engine",
            ("ONNX Runtime's CUDA provider", "a card"),
            partial(by_cuda_provider, network),
        )
        for network in NETWORKS
    ),
    Step(
        "paper-tensorrt",
        "a plan of the paper's network, random weights, no gate",
        ("tensorrt", "torch", "monai", "onnx", "onnxsim", "a card"),
        paper_plan,
        240,
    ),
    Step(
        "half-paper",
        "the paper's network, random weights, in half in torch on the card",
        ("torch", "monai", "safetensors", "torch on a card"),
        half_of_paper,
    ),
    Step(
        "polygraphy-plans",
        "polygraphy as the witness of plans",
        ("polygraphy", "tensorrt", "a card"),
        polygraphy_on_plans,
        180,
    ),
    Step(
        "polygraphy-graphs",
        "polygraphy as the witness of graphs, on the CPU",
        ("polygraphy", "onnx"),
        polygraphy_on_graphs,
    ),
    Step("drawn-again", "the pack on this machine's CPU", (), drawn_and_computed_again),
    Step(
        "stand-in-driver",
        "the contract on the stand-in for the driver",
        ("tests", "pytest", "cuda", "cc"),
        partial(stand_ins, ("tests/runtime/test_device.py",)),
    ),
    Step(
        "stand-in-tensorrt",
        "the runner's part on the stand-in for TensorRT",
        ("tests", "pytest", "filelock", "onnxsim", "monai"),
        partial(stand_ins, ("tests/runtime/test_trt.py", "tests/benchmarks/test_gpu_run.py")),
        400,
    ),
)
"""The rarest facts first."""
