from __future__ import annotations

import io
import threading
import time
from dataclasses import replace

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy.special import expit

import cxrgaze
from cxrgaze.bundles.bundle import GOLDEN, fill_bundle
from cxrgaze.bundles.served import Decision
from cxrgaze.errors import (
    FilmError,
    GateError,
    IncompatibleError,
    IntegrityError,
    NotApplicableError,
    UsageError,
)
from cxrgaze.evidence import metrics, phantom
from cxrgaze.films.canvas import Geometry
from cxrgaze.films.film import Film
from cxrgaze.runtime.backend import Backend
from cxrgaze.runtime.overlay import png, render, top_mass_level
from cxrgaze.runtime.reader import MAX_BATCH, Reader, read_golden
from cxrgaze.spec import HEADS


@pytest.fixture(scope="module")
def reader(bundles):
    with cxrgaze.load(bundles / "demo-fp32.cxrgaze", threads=1) as opened:
        yield opened


def test_a_phantom_is_read_right(reader):
    right = 0
    for seed in range(5000, 5040):
        drawn = phantom.draw(seed)
        reading = reader.read(drawn.pixels)
        right += reading.label == drawn.label
        assert sum(reading.probabilities.values()) == pytest.approx(1)
    assert right >= 36


def test_heatmap_is_a_density_in_pixels_of_the_film(reader):
    for shape in ((300, 200), (200, 300), (64, 64)):
        drawn = phantom.draw(7, shape=shape)
        reading = reader.read(drawn.pixels)
        heatmap = reading.heatmap()
        assert heatmap.shape == shape and heatmap.dtype == np.float32
        assert heatmap.sum() == pytest.approx(1, abs=1e-4) and heatmap.min() >= 0
        row, column = np.unravel_index(heatmap.argmax(), shape)
        x, y = reading.peak
        scale = max(shape) / 64
        assert abs(column - x) <= scale and abs(row - y) <= scale
        assert 0 <= reading.pad_mass < 0.05
        assert reading.film_density.sum() == pytest.approx(1, abs=1e-5)


def test_the_heatmap_looks_where_the_simulated_readers_look(reader):
    scores = []
    for seed in range(5000, 5020):
        drawn = phantom.draw(seed)
        points = np.rint(drawn.gaze.points).astype(int)
        inside = ((points >= 0) & (points < drawn.pixels.shape[::-1])).all(axis=1)
        scores.append(metrics.nss(reader.read(drawn.pixels).heatmap(), points[inside]))
    assert np.mean(scores) > 1.5


def test_a_batch_equals_single_readings(reader, films):
    paths = [p for p in sorted(films.iterdir()) if p.suffix in (".png", ".dcm")]
    paths += [phantom.draw(seed).pixels for seed in range(20)]  # more than one batch
    batch = reader.read_batch(paths)
    assert len(batch) == len(paths)
    for path, together in zip(paths, batch, strict=True):
        alone = reader.read(path)
        assert together.film_sha256 == alone.film_sha256
        assert np.abs(together.log_density - alone.log_density).max() < 1e-3
        assert together.label == alone.label
    assert reader.read_batch([]) == []


def test_every_reading_says_what_it_is(reader, films):
    record = reader.read(films / "dcm_RG1_J2KI_mono1_15bit.dcm").to_json()
    assert "not a medical device" in record["notice"]
    assert any("drawings" in warning for warning in record["warnings"])
    assert any("pixel source is dicom-window" in warning for warning in record["warnings"])
    assert record["model"]["bundle_sha256"] == reader.bundle.sha256
    assert set(record["timings_ms"]) == {"decode", "preprocess", "infer", "postprocess"}


def test_fp16_agrees_with_fp32_on_real_films(bundles, reader, films):
    with cxrgaze.load(bundles / "demo-fp16.cxrgaze") as half:
        for path in sorted(films.glob("*.png")):
            a, b = reader.read(path), half.read(path)
            assert metrics.cc(a.heatmap(), b.heatmap()) > 0.999
            assert not any("gate" in warning for warning in (*a.warnings, *b.warnings))


def test_not_applicable_and_unreadable_are_errors_of_their_own(reader, tmp_path):
    with pytest.raises(NotApplicableError) as caught:
        reader.read(np.zeros((80, 80), np.uint8))
    assert caught.value.reasons and caught.value.exit_code == 0
    with pytest.raises(FilmError, match="No such file"):
        reader.read(tmp_path / "no.png")


@pytest.mark.parametrize(
    "film, message",
    [
        (np.zeros((0, 0), np.float32), "expected a film"),
        (np.zeros((0, 5), np.uint8), "expected a film"),
        (None, "expected a path, an array or a Film"),
        (["a.png"], "expected a path, an array or a Film"),
    ],
)
def test_what_is_no_film_is_a_usage_error(reader, film, message):
    with pytest.raises(UsageError, match=message):
        reader.read(film)


@pytest.mark.parametrize("value", [np.nan, 200])
def test_a_film_of_the_callers_with_other_pixels_is_a_film_error(reader, value):
    film = Film(np.full((80, 80), value, np.float32), "mine", "0", "array")
    with pytest.raises(FilmError, match="mine: pixels of a film must be finite and in"):
        reader.read(film)


def test_a_path_with_nul_and_a_batch_that_is_no_list(reader):
    with pytest.raises(FilmError, match="no path"):
        reader.read("a\0b.png")
    with pytest.raises(UsageError, match="takes a list"):
        reader.read_batch("film.png")


def test_the_byte_order_of_an_array_does_not_matter(reader):
    pixels = phantom.draw(1).pixels.astype(np.uint16) * 9
    assert reader.read(pixels).probabilities == reader.read(pixels.astype(">u2")).probabilities


def test_an_unknown_backend_lists_those_that_exist(bundles):
    listed = "auto, tensorrt, tensorrt_rtx, openvino, openvino:GPU, onnxruntime"
    with pytest.raises(UsageError, match=f"choose from {listed}"):
        cxrgaze.load(bundles / "demo-fp32.cxrgaze", device="tensorrtx")


def test_a_closed_reader_says_so(bundles):
    reader = cxrgaze.load(bundles / "demo-fp32.cxrgaze")
    reader.close()
    reader.close()
    with pytest.raises(UsageError, match="closed"):
        reader.read(phantom.draw(1).pixels)


def test_operating_points_and_temperature_act(reader):
    pixels = phantom.draw(3).pixels
    plain = reader.read(pixels)
    points = {"pneumonia": 0.0, "normal": 1.0}
    decision = Decision(temperature=5.0, operating_points=points)
    original = reader.served
    reader.served = replace(original, decision=decision)
    try:
        soft = reader.read(pixels)
    finally:
        reader.served = original
    assert soft.flags == {"pneumonia": True, "normal": False}
    assert soft.operating_points == soft.to_json()["operating_points"] == points
    assert set(plain.flags) == {"normal", "heart_failure", "pneumonia"}  # the demo's own points
    assert max(soft.probabilities.values()) < max(plain.probabilities.values())
    assert soft.label == plain.label


def test_overlay_shows_film_colour_and_caption(reader):
    drawn = phantom.draw(4, shape=(400, 300))
    reading = reader.read(drawn.pixels)
    picture = render(reading, drawn.pixels.astype(np.float32) / 255)
    assert picture.dtype == np.uint8 and picture.shape[0] > 400 and picture.shape[1] >= 560
    film = picture[:400, :300].astype(int)
    saturation = film.max(axis=2) - film.min(axis=2)
    x, y = (int(v) for v in reading.peak)
    assert saturation[y - 5 : y + 5, x - 5 : x + 5].mean() > 40  # colour at the peak
    assert saturation[:20, :20].mean() < 10  # none in the corner
    assert picture[400:].max() > 200  # text


def _sorted_level(density, mass):
    ordered = np.sort(density, axis=None)[::-1].astype(np.float64)
    return float(ordered[np.searchsorted(np.cumsum(ordered), mass * ordered.sum())])


DENSITIES = {
    "noise": np.random.default_rng(0).random((50, 40)) ** 4,
    "a peak": np.pad([[1.0]], 3),
    "flat": np.full((7, 9), 0.25),
    "two levels": np.repeat([1e-9, 1.0], 8).reshape(4, 4),
    "steep": np.exp(-np.linspace(0, 80, 4000)).reshape(50, 80).astype(np.float32),
    "a map": np.random.default_rng(1).random((300, 200)).astype(np.float32) ** 9,
    "nothing": np.zeros((3, 3)),
}


@pytest.mark.parametrize("mass", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", DENSITIES)
def test_the_contour_holds_the_mass_it_says(name, mass):
    """Found by counting, it is the level that sorting finds."""
    density = DENSITIES[name]
    level = top_mass_level(density, mass)
    assert level == pytest.approx(_sorted_level(density, mass), rel=1e-5)
    if density.any():
        assert density[density >= level].sum() / density.sum() >= mass - 1e-6
        assert density[density > level].sum() / density.sum() < mass + 1e-6


def test_the_overlay_file_is_the_picture(reader):
    drawn = phantom.draw(4, shape=(401, 307))
    pixels = drawn.pixels.astype(np.float32) / 255
    reading = reader.read(drawn.pixels)
    data = np.frombuffer(png(reading, pixels), np.uint8)
    assert np.array_equal(cv2.imdecode(data, cv2.IMREAD_UNCHANGED), render(reading, pixels))
    with Image.open(io.BytesIO(data.tobytes())) as image:
        image.verify()


def test_the_colours_are_film_and_density_blended(reader):
    """Against the formula pixel by pixel: within two grey levels where no contour lies."""
    drawn = phantom.draw(5, shape=(300, 260))
    pixels = drawn.pixels.astype(np.float32) / 255
    reading = reader.read(drawn.pixels)
    density = cv2.resize(reading.film_density, (260, 300), interpolation=cv2.INTER_LINEAR)
    relative = (density / density.max())[..., None]
    colour = cv2.applyColorMap((relative * 255).astype(np.uint8), cv2.COLORMAP_VIRIDIS)
    opacity = 0.65 * np.sqrt(relative)
    expected = np.floor(pixels * 255)[..., None] * (1 - opacity) + colour * opacity
    region = (density >= top_mass_level(density)).astype(np.uint8)
    near = cv2.dilate(region, np.ones((5, 5))) != cv2.erode(region, np.ones((5, 5)))
    off = np.abs(render(reading, pixels)[:300, :260].astype(float) - np.floor(expected))[~near]
    assert off.max() <= 2 and off.mean() < 0.1


def test_geometry_of_a_reading_is_that_of_its_film(reader):
    assert reader.read(phantom.draw(2, shape=(90, 130)).pixels).geometry == Geometry.fit(
        (90, 130), (64, 64)
    )


def test_the_map_is_not_made_before_it_is_asked_for(reader):
    reading = reader.read(phantom.draw(2).pixels)
    assert "film_density" not in vars(reading)
    reading.heatmap()
    assert "film_density" in vars(reading)


class StandIn(Backend):
    """Says of every film what `golden` says, and takes its time for it by its own clock."""

    name = "stand-in"

    def __init__(self, golden):
        self.golden = golden
        self.now = 0.0

    def activate(self, bundle):
        pass

    def infer(self, image):
        self.now += 0.048
        self.stages_ms = {"h2d": 16.0, "compute": 32.0}
        return {head: np.repeat(self.golden[head], len(image), 0) for head in HEADS}

    def deactivate(self):
        pass

    def perf_counter(self):
        return self.now


class Crowded(StandIn):
    """Counts the threads that infer at the same time, and those after it was freed."""

    def __init__(self, golden, at_once):
        super().__init__(golden)
        self.at_once = at_once
        self.inside = self.most = self.late = 0
        self.freed = False
        self.counting = threading.Lock()

    def infer(self, image):
        with self.counting:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.late += self.freed
        time.sleep(0.005)
        outputs = super().infer(image)
        with self.counting:
            self.inside -= 1
        return outputs

    def deactivate(self):
        with self.counting:
            self.late += self.inside
            self.freed = True


@pytest.mark.parametrize("at_once", [1, 3])
def test_as_many_threads_infer_as_the_backend_takes(reader, golden, tmp_path, at_once):
    backend = Crowded(golden, at_once)
    made = Reader(_bundle_of(tmp_path, reader.bundle.manifest, golden), backend)
    pixels = phantom.draw(4).pixels
    closed = []

    def work():
        for _ in range(8):
            try:
                made.read(pixels)
            except UsageError as error:
                closed.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.03)
    made.close()
    made.close()
    for thread in threads:
        thread.join()
    assert backend.most == at_once and backend.late == 0
    assert closed and all("closed" in said for said in closed)


@pytest.fixture(scope="module")
def golden(reader):
    return read_golden(reader.bundle)


def _bundle_of(folder, manifest, golden):
    buffer = io.BytesIO()
    np.savez(buffer, **golden)
    return fill_bundle(folder, manifest, {GOLDEN: buffer.getvalue()})


def test_the_self_test_compares_from_one_percent_of_the_peak_on(reader, golden, tmp_path):
    """The golden map changes in one pixel, far off from what the backend says there."""
    density = golden["log_density"]
    lowest = np.unravel_index(density.argmin(), density.shape)
    border = np.float32(float(density.max()) + np.log(0.01) + 1e-5)
    for nats, is_compared in ((0.0, True), (-1e-4, False)):
        density = golden["log_density"].copy()
        density[lowest] = border + np.float32(nats)
        folder = tmp_path / str(is_compared)
        folder.mkdir()
        bundle = _bundle_of(folder, reader.bundle.manifest, {**golden, "log_density": density})
        if is_compared:
            with pytest.raises(IncompatibleError, match="self-test failed on stand-in"):
                Reader(bundle, StandIn(golden))
        else:
            Reader(bundle, StandIn(golden)).close()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("off", [1.0, np.nan])
def test_the_self_test_compares_both_heads(reader, golden, tmp_path, head, off):
    bundle = _bundle_of(tmp_path, reader.bundle.manifest, golden)
    Reader(bundle, StandIn(golden)).close()
    with pytest.raises(IncompatibleError, match=f"self-test failed on stand-in.*{head} by {off:g}"):
        Reader(bundle, StandIn({**golden, head: golden[head] + np.float32(off)}))


LEFT_OUT = {
    "a class": ({"untaught": ("normal",)}, ("the class normal",)),
    "the map": ({"untrained": ("log_density",)}, ("the output log_density",)),
    "the diagnosis": ({"untrained": ("logits",)}, ("the output logits",)),
    "the diagnosis and its class": (
        {"untrained": ("logits",), "untaught": ("normal",)},
        ("the output logits",),
    ),
    "all but one of exclusive classes": (
        {"untaught": ("normal", "pneumonia")},
        ("the class normal", "the class pneumonia"),
    ),
}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_what_nothing_taught_is_left_out_of_every_reading(reader, golden, tmp_path, what):
    changes, named = LEFT_OUT[what]
    manifest = reader.bundle.manifest.model_copy(update=changes)
    drawn = phantom.draw(4)
    with Reader(_bundle_of(tmp_path, manifest, golden), StandIn(golden)) as made:
        reading = made.read(drawn.pixels)
    record = reading.to_json()
    warned = [warning for warning in record["warnings"] if "nothing taught" in warning]
    assert warned == [f"nothing taught {one}: it is left out" for one in named]
    taught = {
        "a class": ("heart_failure", "pneumonia"),
        "the map": ("normal", "heart_failure", "pneumonia"),
    }.get(what, ())
    assert tuple(reading.probabilities) == tuple(reading.flags) == taught
    if taught:
        assert reading.label == record["label"] == max(taught, key=reading.probabilities.get)
        assert sum(reading.probabilities.values()) == pytest.approx(1)
        assert tuple(record["operating_points"]) == taught
    else:
        assert reading.label is None
        assert not {"label", "probabilities", "flags", "operating_points"} & set(record)
    has_map = what != "the map"
    assert ("peak_px" in record) == ("pad_mass" in record) == has_map
    if not has_map:
        for asked in ("film_density", "pad_mass", "peak"):
            with pytest.raises(UsageError, match="gives no map"):
                getattr(reading, asked)
        with pytest.raises(UsageError, match="gives no map"):
            reading.heatmap()
    render(reading, drawn.pixels.astype(np.float32) / 255)


def test_findings_are_sigmoids_with_flags_and_no_label(reader, golden, tmp_path):
    manifest = reader.bundle.manifest
    points = {"pneumonia": 0.0, "normal": 1.0}
    changes = {
        "spec": manifest.spec.model_copy(update={"class_kind": "findings"}),
        "decision": Decision(temperatures={"pneumonia": 2.0}, operating_points=points),
        "reference_decision": Decision(operating_points=points),
    }
    manifest = manifest.model_copy(update=changes)
    with Reader(_bundle_of(tmp_path, manifest, golden), StandIn(golden)) as made:
        reading = made.read(phantom.draw(4).pixels)
    expected = expit(golden["logits"][0] / np.array([1, 1, 2]))
    assert list(reading.probabilities.values()) == pytest.approx(expected.tolist())
    assert reading.label is None and reading.to_json()["label"] is None
    assert reading.flags == {"normal": False, "pneumonia": True}


def test_a_film_takes_its_share_of_the_time_of_its_own_batch(reader, golden, tmp_path, monkeypatch):
    backend = StandIn(golden)
    monkeypatch.setattr("cxrgaze.runtime.reader.time", backend)
    with Reader(_bundle_of(tmp_path, reader.bundle.manifest, golden), backend) as timed:
        readings = timed.read_batch([phantom.draw(1).pixels] * (MAX_BATCH + 4))
    for films, batch in ((MAX_BATCH, readings[:MAX_BATCH]), (4, readings[MAX_BATCH:])):
        for reading in batch:
            assert reading.timings_ms["infer"] == pytest.approx(48 / films)
            assert reading.timings_ms["h2d"] == pytest.approx(16 / films)
            assert reading.timings_ms["compute"] == pytest.approx(32 / films)


def test_what_a_reader_must_not_be_made_of(reader, golden, tmp_path):
    """Each beside the same reader without the fault."""
    manifest = reader.bundle.manifest
    gate, spec = manifest.gate, manifest.spec
    foreign = spec.model_copy(update={"preprocessing": spec.preprocessing + 1})
    for number, (changes, error, message) in enumerate(
        (
            ({"spec": foreign}, IncompatibleError, "needs preprocessing 2, this cxrgaze has 1"),
            ({"gate": gate.model_copy(update={"verdict": "fail"})}, IntegrityError, "is fail"),
            ({"gate": gate.model_copy(update={"verdict": "not_gated"})}, GateError, "pass is req"),
            ({"self_test": {"int8": manifest.self_test["float32"]}}, IncompatibleError, "no self-"),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        bundle = _bundle_of(folder, manifest.model_copy(update=changes), golden)
        with pytest.raises(error, match=message):
            Reader(bundle, StandIn(golden), require="pass")
    passed = manifest.model_copy(update={"gate": gate.model_copy(update={"verdict": "pass"})})
    (tmp_path / "right").mkdir()
    right = _bundle_of(tmp_path / "right", passed, golden)
    Reader(right, StandIn(golden), require="pass").close()
