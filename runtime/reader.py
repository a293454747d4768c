"""`load` a bundle, get a Reader, read films."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cxrgaze.bundles.bundle import GOLDEN, GRAPH, Bundle
from cxrgaze.bundles.signature import require_signature
from cxrgaze.bundles.verdicts import differences
from cxrgaze.errors import (
    FilmError,
    GateError,
    IncompatibleError,
    IntegrityError,
    NotApplicableError,
    UsageError,
)
from cxrgaze.films.canvas import Geometry, not_applied, to_canvas
from cxrgaze.films.decode import load_film
from cxrgaze.films.film import Film, film_from_array
from cxrgaze.films.isolate import IsolatedLoader
from cxrgaze.runtime.backend import Backend, BackendOptions
from cxrgaze.runtime.backends import choose
from cxrgaze.runtime.reading import Reading, mass_in_pad
from cxrgaze.spec import IMAGE, LOG_DENSITY, LOGITS, PREPROCESSING, Outputs

MAX_BATCH = 16
LARGE_PAD_MASS = 0.2
"""Share of the predicted gaze outside the film from which a reading says so."""

Readable = Film | Path | str | NDArray[np.generic]


def load(
    bundle: Path | str,
    device: str | Backend = "auto",
    *,
    threads: int | None = None,
    public_key: Path | str | None = None,
    cache: Path | str | None = None,
    allow_host_code: bool = False,
    plan: str | None = None,
    gpu: str | None = None,
    require: Literal["pass"] | None = None,
    isolate: bool = False,
    at_once: int = 1,
) -> Reader:
    """Verify a bundle, choose a backend, test it on the golden input, and return a Reader.

    Args:
        bundle: the folder that `cxrgaze-export` made.
        device: "auto", the name of a backend (`cxrgaze.runtime.backends.BACKENDS`), or a backend of
            your own (`cxrgaze.runtime.backend.Backend`). "auto" takes a TensorRT with a plan of
            this bundle for this GPU (`cxrgaze-build`), else what docs/devices.md#choice says.
        threads: CPU threads of the backend; None leaves the choice to it.
        public_key: PEM file; a bundle that its owner did not sign is refused.
        cache: folder of plans; None is the user's own (`cxrgaze.runtime.plans.Cache`).
        allow_host_code: load a version-compatible plan, which brings code of its own for the CPU.
        plan: key of the plan to take (`cxrgaze-inspect`); None takes one that passed its gate
            before others, then one with fewer liberties, then the latest.
        gpu: index or UUID of the GPU; None is the first.
        isolate: decode the files that are read in a child process with a memory and a time limit
            (`cxrgaze.films.isolate.IsolatedLoader`), for films from strangers.
        at_once: films that threads may have inferred at the same time, for many films on a CPU:
            each takes longer, all of them less. A GPU takes one at a time.
        require: "pass" refuses what was not gated, or not with that verdict: of a plan its own
            verdict on its device counts, else the bundle's.

    Raises:
        UsageError: no bundle there, no such backend.
        IntegrityError: any file of the bundle is malformed or altered; its gate verdict is "fail";
            it is not signed by the owner of `public_key`.
        GateError: a verdict that is not the required one.
        IncompatibleError: backend or preprocessing does not fit, or the self-test failed.
        OutOfMemoryError, DeviceError: the GPU has no room, or fails.

    Example:
        >>> with load("demo-fp16.cxrgaze") as reader:
        ...     reading = reader.read("film.png")
        >>> reading.label, reading.heatmap().shape
        ('pneumonia', (1024, 1024))
    """
    opened = Bundle.open(bundle)
    if public_key is not None:
        require_signature(opened, Path(public_key))
    where = Path(cache) if cache else None
    options = BackendOptions(threads, at_once, where, allow_host_code, plan, gpu)
    backend, warnings = choose(opened, device, options)
    return Reader(opened, backend, warnings, require=require, isolate=isolate)


class Reader(contextlib.AbstractContextManager["Reader"]):
    """Reads films with one bundle on one backend; a context manager.

    Threads may share it: films are decoded and prepared in each, and inferred one batch at a time,
    or as many as the backend takes at once (`load`).
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        warnings: Sequence[str] = (),
        *,
        require: Literal["pass"] | None = None,
        isolate: bool = False,
    ) -> None:
        manifest = bundle.manifest
        if manifest.spec.preprocessing != PREPROCESSING:
            raise IncompatibleError(
                f"the bundle needs preprocessing {manifest.spec.preprocessing}, this cxrgaze has "
                f"{PREPROCESSING}; export again"
            )
        self._gate = backend.gate or manifest.gate
        if "fail" in (manifest.gate.verdict, self._gate.verdict):
            raise IntegrityError(f"{bundle.path}: its gate verdict is fail; it must not be loaded")
        if require and self._gate.verdict != require:
            raise GateError(
                f"{bundle.path} on {backend.name}: gate {self._gate.verdict} at {self._gate.level} "
                f"level ({self._gate.reason}), {require} is required"
            )
        bundle.verify(leave=(GRAPH, GOLDEN))  # these two are verified as they are loaded
        self.bundle = bundle
        self.backend = backend
        self.served = manifest.served
        """What is served of the network: heads, classes, decisions."""
        self._closed = False
        self._lock = threading.Lock()
        self._places = threading.Semaphore(backend.at_once)
        keep_stored = manifest.spec.needs_stored
        self._loader = IsolatedLoader(keep_stored=keep_stored) if isolate else None
        backend.activate(bundle)
        try:
            self._self_test()
            bundle.verify()  # the graph, where the backend runs a plan instead
        except BaseException:
            backend.deactivate()
            raise
        self.standing_warnings = (*self._standing_warnings(), *warnings, *backend.notes)

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the backend, once it has inferred what another thread gave it."""
        with self._lock, contextlib.ExitStack() as all_places:
            for _ in range(self.backend.at_once):
                all_places.enter_context(self._places)
            self._closed = True
            self.backend.deactivate()
        if self._loader:
            self._loader.close()

    def read(self, film: Readable, *, force: bool = False) -> Reading:
        """The reading of one film: a path, an array (see `film_from_array`) or a `Film`.

        Args:
            force: read it even if it is not applicable; the reading says so (`Reading.forced`).

        Raises:
            FilmError: it cannot be read.
            NotApplicableError: it can be read, but the network must not be applied to it.
        """
        return self.read_batch([film], force=force)[0]

    def read_batch(self, films: Sequence[Readable], *, force: bool = False) -> list[Reading]:
        """Readings in the order of `films`, inferred in batches of at most `MAX_BATCH`.

        Args:
            force: as in `read`.

        Raises:
            FilmError, NotApplicableError: as `read`, for the first film concerned.
        """
        if isinstance(films, (str, Path, np.ndarray)):
            raise UsageError("read_batch takes a list of films; read takes one")
        self._require_open()
        readings = []
        for start in range(0, len(films), MAX_BATCH):
            readings += self._read_some(films[start : start + MAX_BATCH], force)
        return readings

    def _film(self, given: Readable) -> Film:
        if isinstance(given, Film):
            return given
        keep_stored = self.bundle.manifest.spec.needs_stored
        if isinstance(given, np.ndarray):
            return film_from_array(given, keep_stored=keep_stored)
        if isinstance(given, str | Path):
            if self._loader:
                return self._loader.load(Path(given))
            return load_film(given, keep_stored=keep_stored)
        raise UsageError(f"expected a path, an array or a Film, found {type(given).__name__}")

    def _require_open(self) -> None:
        if self._closed:
            raise UsageError("this reader is closed; load the bundle again")

    def _read_some(self, films: Sequence[Readable], force: bool) -> list[Reading]:
        spec = self.bundle.manifest.spec
        image = np.empty((len(films), 1, spec.height, spec.width), dtype=np.float32)
        prepared = []
        for index, given in enumerate(films):
            film = self._film(given)
            if film.reasons and not force:
                raise NotApplicableError(film.reasons)
            start = time.perf_counter()
            try:
                image[index, 0], geometry = to_canvas(film, spec)
            except NotApplicableError:
                raise
            except FilmError as error:
                raise FilmError(f"{film.name}: {error}") from error
            preprocess_ms = (time.perf_counter() - start) * 1e3
            times = {"decode": film.decode_ms, "preprocess": preprocess_ms}
            prepared.append((film, geometry, times))
        with self._places:
            self._require_open()
            start = time.perf_counter()
            outputs = self.backend.infer(image)
            infer_ms = (time.perf_counter() - start) * 1e3 / len(films)
            stages = {name: ms / len(films) for name, ms in self.backend.stages_ms.items()}
        readings = []
        for index, (film, geometry, times) in enumerate(prepared):
            start = time.perf_counter()
            log_density = self._map(outputs, index)
            probabilities = self._probabilities(outputs, index)
            pad = () if log_density is None else _pad_warning(log_density, geometry)
            readings.append(
                Reading(
                    film=film.name,
                    film_sha256=film.sha256,
                    pixel_source="stored-values" if spec.needs_stored else film.pixel_source,
                    probabilities=probabilities,
                    label=self.served.label(probabilities),
                    flags=self.served.flags(probabilities),
                    operating_points=dict(self.served.points),
                    log_density=log_density,
                    geometry=geometry,
                    timings_ms={
                        **times,
                        **stages,
                        "infer": infer_ms,
                        "postprocess": (time.perf_counter() - start) * 1e3,
                    },
                    model=self._identity(),
                    forced=film.reasons,
                    warnings=(*self.standing_warnings, *self._film_warnings(film), *pad),
                )
            )
        return readings

    def _map(self, outputs: Outputs, index: int) -> NDArray[np.float32] | None:
        return outputs[LOG_DENSITY][index, 0] if LOG_DENSITY in self.served.heads else None

    def _probabilities(self, outputs: Outputs, index: int) -> dict[str, float]:
        if not self.served.classes:
            return {}
        shares = self.served.probabilities(outputs[LOGITS][index]).tolist()
        return dict(zip(self.served.classes, shares, strict=True))

    def _identity(self) -> dict[str, str]:
        manifest = self.bundle.manifest
        return {
            "bundle_sha256": self.bundle.sha256,
            "name": manifest.name,
            "variant": manifest.spec.variant,
            "model_version": manifest.spec.model_version,
            "precision": manifest.precision,
            "target": manifest.target,
            "backend": self.backend.name,
            "device": self.backend.device,
            **self.backend.identity,
            "gate": self._gate.verdict,
            "gate_level": self._gate.level,
        }

    def _standing_warnings(self) -> tuple[str, ...]:
        """What every reading of this bundle must say."""
        manifest = self.bundle.manifest
        warnings = [manifest.spec.caution] if manifest.spec.caution else []
        untaught = [f"the output {head}" for head in manifest.untrained]
        if LOGITS not in manifest.untrained:
            untaught += [f"the class {name}" for name in manifest.untaught]
        warnings += [f"nothing taught {what}: it is left out" for what in untaught]
        warnings += manifest.calibration.warnings if manifest.calibration else ()
        if self._gate.verdict != "pass":
            warnings.append(f"gate: {self._gate.verdict} ({self._gate.reason})")
        return tuple(warnings)

    def _film_warnings(self, film: Film) -> tuple[str, ...]:
        spec = self.bundle.manifest.spec
        forced = (f"read by force although {reason}" for reason in film.reasons)
        said = (*forced, *film.notes, *not_applied(film, spec))
        if spec.needs_stored or film.pixel_source == spec.pixel_source:
            return said
        source = f"pixel source is {film.pixel_source}, the network was trained on "
        return (*said, source + spec.pixel_source)

    def _self_test(self) -> None:
        manifest = self.bundle.manifest
        golden = read_golden(self.bundle)
        arithmetic = self.backend.arithmetic(manifest)
        tolerance = manifest.self_test.get(arithmetic)
        if tolerance is None:
            raise IncompatibleError(
                f"{self.backend.name} computes in {arithmetic}, for which the bundle has no "
                "self-test tolerance; export again, or choose another backend"
            )
        outputs = self.backend.infer(golden[IMAGE])
        off = {
            head: float(differences(head, outputs[head], golden[head]).max())
            for head in manifest.spec.heads
        }
        # Written so that NaN fails.
        if not all(off[head] <= tolerance[head] for head in off):
            found = ", ".join(f"{h} by {off[h]:.3g} (limit {tolerance[h]:g})" for h in off)
            raise IncompatibleError(
                f"self-test failed on {self.backend.name}: golden outputs are off, {found}; this "
                "backend does not compute this bundle's network"
            )


def read_golden(bundle: Bundle) -> dict[str, NDArray[np.float32]]:
    """The golden input (a phantom) and its fp32 outputs: image, and a head each.

    Raises:
        IntegrityError: not the arrays that the ModelSpec asks for.
    """
    spec = bundle.manifest.spec
    image = {IMAGE: (1, 1, spec.height, spec.width)}
    shapes: dict[str, tuple[int, ...]] = {
        **image,
        **{str(head): shape for head, shape in spec.shapes(1).items()},
    }
    expected = {name: (np.dtype(np.float32), shape) for name, shape in shapes.items()}
    return bundle.read_arrays(GOLDEN, expected)


def _pad_warning(log_density: NDArray[np.float32], geometry: Geometry) -> tuple[str, ...]:
    mass = mass_in_pad(log_density, geometry)
    if mass <= LARGE_PAD_MASS:
        return ()
    return (f"{100 * mass:.0f} % of the predicted gaze lies outside the film and was left out",)
