"""`cxrgaze-train saliency`: figures by slow loops, which map is of which film, what it refuses."""

from __future__ import annotations

import csv
import io
import itertools
import json
import subprocess
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest

from cxrgaze.errors import DataError, ExitCode
from cxrgaze.evidence import heatmaps, metrics, phantom
from cxrgaze.evidence.arrays import canvas_density, load_arrays
from cxrgaze.evidence.gaze import Gaze
from cxrgaze.evidence.labelled_set import LOOKS, LabelledSet, write_set
from cxrgaze.films.canvas import Geometry
from cxrgaze.records import parse_record
from cxrgaze.spec import NOTICE, ModelSpec
from cxrgaze.train import cli, map_files
from cxrgaze.train.film_saliency import saliency_by_film
from cxrgaze.train.map_files import find_maps, map_bytes, read_map
from cxrgaze.train.saliency import priors_of_others
from cxrgaze.train.saliency_record import FILE, SaliencyReport
from cxrgaze.train.saliency_report import summary, verdict

CANVAS = (64, 64)
PRESET = heatmaps.PRESETS["phantom"]
SHAPES = {shape: Geometry.fit(shape, CANVAS) for shape in phantom.SHAPES}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saliency") / "set"
    return phantom.write_phantom_set(folder, {"train": 6, "test": 14}, first_seed=610_000)


def _geometry(labelled, row):
    return SHAPES[cv2.imread(str(labelled.folder / row.film), cv2.IMREAD_UNCHANGED).shape]


def _truth(labelled, row):
    geometry = _geometry(labelled, row)
    return geometry.crop(canvas_density(labelled.gaze[row.film], geometry, PRESET))


def _write(labelled, folder, make, rows=None):
    """A map a film as `make(row, index)` gives it, flat in a folder."""
    folder.mkdir(parents=True)
    for index, row in enumerate(rows or labelled.rows):
        np.save(folder / f"{row.film.split('/')[-1].removesuffix('.png')}.npy", make(row, index))
    return folder


@pytest.fixture(scope="module")
def maps(labelled, tmp_path_factory):
    """The truth of a film with noise, at the very size of its area."""

    def noisy(row, index):
        truth = _truth(labelled, row).astype(np.float64)
        rng = np.random.default_rng(index)
        return truth / truth.max() + rng.uniform(0.01, 0.5, truth.shape)

    return _write(labelled, tmp_path_factory.mktemp("saliency") / "maps", noisy)


def _run(maps, labelled, output, *more):
    arguments = ["saliency", str(maps), str(labelled.folder), "--output", str(output)]
    size = "x".join(map(str, CANVAS))
    arguments += ["--heatmap", "phantom", "--canvas", size, "--resamples", "200"]
    return cli.main([*arguments, *more])


def _report(output):
    return parse_record(SaliencyReport, (output / FILE).read_bytes(), FILE)


def _table(output):
    with (output / "saliency.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def compared(maps, labelled, tmp_path_factory):
    output = tmp_path_factory.mktemp("saliency") / "out"
    assert _run(maps, labelled, output) == 0
    return output


# Slow references: the formulas of pysaliency 0.2.22, fixation by fixation.


def _slow_nss(p, fixations):
    return np.mean([(p[y, x] - p.mean()) / p.std() for x, y in fixations])


def _slow_auc(positives, negatives):
    pairs = [(float(a), b) for a in positives for b in np.asarray(negatives).tolist()]
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


def _slow_judd(p, fixations):
    return _slow_auc([p[y, x] for x, y in fixations], p.ravel())


def _slow_shuffled(p, fixations, other_films):
    """Fixations of all other images, in the sides of this one, cut to whole pixels."""
    height, width = p.shape
    negatives = [
        p[int(y * (height / other_height)), int(x * (width / other_width))]
        for points, (other_height, other_width) in other_films
        for x, y in points
    ]
    return _slow_auc([p[y, x] for x, y in fixations], negatives)


def _slow_gain(p, baseline, fixations):
    """Mean difference of log-likelihoods, in bits per fixation."""
    log_p, log_b = np.log(p / p.sum()), np.log(baseline / baseline.sum())
    return np.mean([(log_p[y, x] - log_b[y, x]) / np.log(2) for x, y in fixations])


def _slow_fixations(labelled, row):
    geometry = _geometry(labelled, row)
    found = []
    for x, y in labelled.gaze[row.film].points:
        # The centre of a pixel stays the centre of a pixel.
        column = round((x + 0.5) * geometry.width / geometry.film_width - 0.5)
        line = round((y + 0.5) * geometry.height / geometry.film_height - 0.5)
        if 0 <= column < geometry.width and 0 <= line < geometry.height:
            found.append((column, line))
    return found


def test_every_figure_equals_its_slow_reference(labelled, maps, compared):
    rows = labelled.split("test").rows
    training = labelled.split("train").rows
    whole = [
        canvas_density(labelled.gaze[row.film], _geometry(labelled, row), PRESET)
        for row in training
    ]
    prior_canvas = np.mean(whole, axis=0)
    fixations = [_slow_fixations(labelled, row) for row in rows]
    shapes = [_truth(labelled, row).shape for row in rows]
    assert len(set(shapes[:5])) == 3
    table = _table(compared)
    assert [cells["film"] for cells in table] == [row.film for row in rows]
    for index in range(5):
        row, cells = rows[index], table[index]
        geometry, truth = _geometry(labelled, row), _truth(labelled, row)
        others = [(fixations[j], shapes[j]) for j in range(len(rows)) if j != index]
        stem = row.film.split("/")[-1].removesuffix(".png")
        prior = geometry.crop(prior_canvas)
        for suffix, p in (("", np.load(maps / f"{stem}.npy")), ("_centre_prior", prior)):
            p, q = p / p.sum(), truth / truth.sum()
            slow = {
                "cc": np.corrcoef(p.ravel(), q.ravel())[0, 1],
                "sim": np.minimum(p, q).sum(),
                "kld": sum(
                    b * np.log(2.2204e-16 + b / (a + 2.2204e-16))
                    for a, b in zip(p.ravel(), q.ravel(), strict=True)
                ),
                "nss": _slow_nss(p, fixations[index]),
                "auc_judd": _slow_judd(p, fixations[index]),
                "shuffled_auc": _slow_shuffled(p, fixations[index], others),
                "information_gain": _slow_gain(p, prior, fixations[index]),
            }
            for key, value in slow.items():
                assert float(cells[key + suffix]) == pytest.approx(value, abs=2e-5), key
        single = [
            geometry.crop(
                canvas_density(labelled.gaze[row.film].select(reader=r), geometry, PRESET)
            )
            for r in phantom.READERS
        ]
        between = np.corrcoef(*(one.ravel() for one in single))[0, 1]
        assert float(cells["cc_between_readers"]) == pytest.approx(between, abs=2e-5)
        p = np.load(maps / f"{stem}.npy")
        alone = np.mean([np.corrcoef(p.ravel(), one.ravel())[0, 1] for one in single])
        assert float(cells["cc_single_reader"]) == pytest.approx(alone, abs=2e-5)


def test_a_networks_own_maps_have_the_figures_of_its_evaluation(labelled, tmp_path):
    spec = ModelSpec(
        variant="any",
        model_version="1",
        heads=("log_density",),
        height=CANVAS[0],
        width=CANVAS[1],
        pixel_source="image-8bit",
        domain="phantom",
    )
    test, train = (load_arrays(labelled.split(name), spec, PRESET) for name in ("test", "train"))
    log_density = np.random.default_rng(3).normal(-8, 1, (14, *CANVAS)).astype(np.float32)
    prior = heatmaps.centre_prior(train.densities[:, 0])
    expected = saliency_by_film(test, log_density, prior, PRESET)

    def on_film(row, index):
        inside = test.geometries[index].crop(log_density[index]).astype(np.float64)
        return inside - np.log(np.exp(inside).sum())

    folder = _write(labelled, tmp_path / "maps", on_film, labelled.split("test").rows)
    assert _run(folder, labelled, tmp_path / "out", "--kind", "log-density") == 0
    for index, cells in enumerate(_table(tmp_path / "out")):
        del expected[index]["pad_mass"]  # of a map over the film there is none
        for key, value in expected[index].items():
            assert float(cells[key]) == pytest.approx(value, abs=2e-6), key


def test_means_and_differences_are_those_of_the_table(compared):
    report, table = _report(compared), _table(compared)
    for key, of in report.figures.items():
        values = np.array([float(cells[key]) for cells in table])
        prior = np.array([float(cells[f"{key}_centre_prior"]) for cells in table])
        assert of.map.value == pytest.approx(values.mean(), abs=1e-5)
        assert of.centre_prior.value == pytest.approx(prior.mean(), abs=1e-5)
        assert of.added.value == pytest.approx((values - prior).mean(), abs=1e-5)
        rng = np.random.default_rng(5)  # one film a patient
        draws = [rng.choice(values - prior, len(table)).mean() for _ in range(4000)]
        wide = np.ptp(draws)
        assert of.added.low == pytest.approx(np.quantile(draws, 0.025), abs=0.06 * wide)
        assert of.added.high == pytest.approx(np.quantile(draws, 0.975), abs=0.06 * wide)
    assert (report.films, report.patients, report.asked) == (14, 14, 14)
    between = np.mean([float(cells["cc_between_readers"]) for cells in table])
    assert report.between_readers.value == pytest.approx(between, abs=1e-5)
    assert report.prior == "mean of the set's 6 training films with gaze"


def test_notice_and_verdict_are_in_every_output(compared, maps, labelled, tmp_path, capsys):
    assert {p.name for p in compared.iterdir()} == {
        f"saliency.{s}" for s in ("json", "csv", "md", "html")
    }
    for path in compared.iterdir():
        assert NOTICE in path.read_text(), path
    report = _report(compared)
    assert verdict(report).word == "Better than the centre prior"
    page = (compared / "saliency.md").read_text().split("\n\n")
    assert page[1].startswith("**✓ Better than the centre prior.** CC ")
    assert (
        f"difference {report.figures['cc'].added}, on 14 films of 14 patients (synthetic" in page[1]
    )
    assert "Synthetic: drawings" in (compared / "saliency.html").read_text()
    assert _run(maps, labelled, tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert out.startswith("Better than the centre prior: CC ") and NOTICE in out
    assert "information gain over the centre prior" in out and "of another reader" in out


def test_maps_of_other_films_are_worse_and_noise_is_not_shown_to_be_better(
    labelled, tmp_path, capsys
):
    rows = labelled.split("test").rows
    noise = np.random.default_rng(0)
    folder = _write(
        labelled, tmp_path / "noise", lambda row, i: noise.random(_truth(labelled, row).shape), rows
    )
    assert _run(folder, labelled, tmp_path / "worse") == 0
    report = _report(tmp_path / "worse")
    assert verdict(report).word == "Worse than the centre prior"
    assert verdict(report).tone == "bad" and report.figures["information_gain"].map.high < 0
    few = _write(labelled, tmp_path / "few", lambda row, i: _truth(labelled, row), rows[:3])
    assert _run(few, labelled, tmp_path / "open", "--allow-missing") == 0
    report = _report(tmp_path / "open")
    assert report.figures["cc"].added.low is None
    found = verdict(report)
    assert (
        found.word == "Not shown to be better than the centre prior"
        and "3 of 14 films" in found.text
    )
    assert (
        "more patients, these give no interval" in (tmp_path / "open" / "saliency.md").read_text()
    )


def test_the_same_seed_gives_the_same_figures(maps, labelled, compared, tmp_path):
    for name, seed in (("same", "0"), ("other", "1")):
        assert _run(maps, labelled, tmp_path / name, "--seed", seed) == 0
    first, same, other = (_report(p) for p in (compared, tmp_path / "same", tmp_path / "other"))
    assert (tmp_path / "same" / "saliency.csv").read_bytes() == (
        compared / "saliency.csv"
    ).read_bytes()
    known = {"created_utc", "look"}
    assert same.model_dump(exclude=known) == first.model_dump(exclude=known)
    assert other.figures["cc"].map.value == first.figures["cc"].map.value
    assert other.figures["cc"].map.low != first.figures["cc"].map.low


def test_a_look_at_test_films_is_logged_and_others_are_not(maps, labelled, tmp_path):
    folder = labelled.folder

    def looks():
        log = folder / LOOKS
        return log.read_text().splitlines() if log.is_file() else []

    before = len(looks())
    assert _run(maps, labelled, tmp_path / "train", "--split", "train") == 0
    assert len(looks()) == before and _report(tmp_path / "train").look is None
    assert _run(maps, labelled, tmp_path / "all", "--split", "all") == 0
    report = _report(tmp_path / "all")
    assert len(looks()) == before + 1 and report.look.number == before + 1 and report.films == 20
    assert json.loads(looks()[-1])["model_sha256"] == report.maps_sha256


def test_without_other_training_films_the_prior_leaves_the_patient_out(maps, labelled, tmp_path):
    assert _run(maps, labelled, tmp_path / "out", "--split", "train") == 0
    report, table = _report(tmp_path / "out"), _table(tmp_path / "out")
    assert "leave one patient out" in report.prior
    rows = labelled.split("train").rows
    whole = [canvas_density(labelled.gaze[r.film], _geometry(labelled, r), PRESET) for r in rows]
    for index, (row, cells) in enumerate(zip(rows, table, strict=True)):
        rest = heatmaps.centre_prior(d for j, d in enumerate(whole) if j != index)
        slow = metrics.cc(_geometry(labelled, row).crop(rest), _truth(labelled, row))
        assert float(cells["cc_centre_prior"]) == pytest.approx(slow, abs=2e-6)


def test_the_prior_of_others_leaves_all_films_of_the_patient_out():
    densities = np.random.default_rng(0).random((5, 4, 3)).astype(np.float32)
    patients = ["a", "b", "a", "c", "b"]
    for index, found in enumerate(priors_of_others(densities, patients)):
        others = [d for d, p in zip(densities, patients, strict=True) if p != patients[index]]
        np.testing.assert_allclose(found, heatmaps.centre_prior(others), rtol=1e-5)
    assert list(priors_of_others(densities[:2], ["a", "a"])) == [None, None]


def test_one_patient_alone_has_no_prior_and_nothing_to_compare_with(labelled, maps, tmp_path):
    one = replace(labelled.split("train"), rows=labelled.split("train").rows[:1])
    gaze = {row.film: labelled.gaze[row.film].select(reader="reader-1") for row in one.rows}
    films = [(row.film, labelled.film_bytes(row)) for row in one.rows]
    alone = write_set(tmp_path / "set", one.info, one.rows, gaze, films)
    assert _run(maps, alone, tmp_path / "out", "--split", "train") == 0
    report = _report(tmp_path / "out")
    assert verdict(report).word == "Nothing to compare with"
    assert report.figures["information_gain"].map is None
    assert report.figures["shuffled_auc"].map is None
    assert report.figures["cc"].map and report.figures["cc"].centre_prior is None
    assert any("no film has two readers" in line for line in report.left_out)
    assert any("maps of no film of the set: 19, first" in line for line in report.left_out)
    assert "left out: CC between readers" in "\n".join(summary(report))


def test_fixations_where_a_map_is_zero_are_told(labelled, tmp_path):
    def blind(row, index):
        heat = _truth(labelled, row).copy()
        heat[:, heat.shape[1] // 2 :] = 0
        return heat

    folder = _write(labelled, tmp_path / "maps", blind, labelled.split("test").rows)
    assert _run(folder, labelled, tmp_path / "out") == 0
    report, table = _report(tmp_path / "out"), _table(tmp_path / "out")
    count = sum(
        x >= _truth(labelled, row).shape[1] // 2
        for row in labelled.split("test").rows
        for x, y in _slow_fixations(labelled, row)
    )
    assert sum(float(cells["fixations_at_zero"]) for cells in table) == count
    assert any(f"at {count} fixations: the map is zero there" in line for line in report.left_out)
    assert report.figures["information_gain"].map.value < -5


def test_missing_maps_are_an_error_unless_allowed(labelled, maps, tmp_path, capsys):
    rows = labelled.split("test").rows
    some = _write(labelled, tmp_path / "some", lambda row, i: _truth(labelled, row), rows[2:])
    assert _run(some, labelled, tmp_path / "out") == ExitCode.DATA
    said = capsys.readouterr().err
    assert "2 of 14 films with gaze have no map" in said and rows[0].film in said
    assert "--allow-missing" in said and not (tmp_path / "out").exists()
    assert _run(some, labelled, tmp_path / "out", "--allow-missing") == 0
    report = _report(tmp_path / "out")
    assert (report.films, report.asked) == (12, 14)
    assert any("2 of 14 films with gaze have no map" in line for line in report.left_out)
    assert "on 12 of 14 films" in verdict(report).text
    only = _write(
        labelled,
        tmp_path / "train",
        lambda row, i: _truth(labelled, row),
        labelled.split("train").rows,
    )
    assert _run(only, labelled, tmp_path / "none", "--allow-missing") == ExitCode.DATA
    assert "14 of 14 films with gaze have no map" in capsys.readouterr().err


def test_films_without_gaze_are_left_out_and_said(labelled, maps, tmp_path, capsys):
    part = labelled.split("test")
    gaze = {row.film: labelled.gaze[row.film] for row in part.rows[:12]}
    films = [(row.film, labelled.film_bytes(row)) for row in part.rows]
    some = write_set(tmp_path / "some", part.info, part.rows, gaze, films)
    assert _run(maps, some, tmp_path / "out") == 0
    assert any(
        "2 of 14 films of split test have no gaze" in x for x in _report(tmp_path / "out").left_out
    )
    none = write_set(tmp_path / "none", part.info, part.rows, {}, films)
    assert _run(maps, none, tmp_path / "nothing") == ExitCode.DATA
    assert "no film of split test has gaze" in capsys.readouterr().err


# Which map is of which film.


def _touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


FILMS = ("p1/a.dcm", "p2/a.dcm", "p2/b.dcm", "c.png")


@pytest.mark.parametrize(
    "name", ["b.npy", "b.png", "b.dcm.npy", "p2/b.npy", "p2/b.dcm.PNG", "b.heatmap.npy"]
)
def test_a_map_is_of_the_film_that_it_is_named_after(tmp_path, name):
    found = find_maps(_touch(tmp_path, name, "d.npy", "notes.txt", "b.json"), FILMS)
    assert {film: p.relative_to(tmp_path).as_posix() for film, p in found.of_film.items()} == {
        "p2/b.dcm": name
    }
    assert found.foreign == ["d.npy"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a.npy", "b.npy"], r"several films: 1, first a\.npy \(p1/a\.dcm or p2/a\.dcm\)"),
        (["b.npy", "b.png"], r"several maps: 1, first p2/b\.dcm \(b\.npy and b\.png\)"),
        (["x.npy", "y.png"], r"no map of a film of the set \(2, first x\.npy, y\.png of others\)"),
        (["notes.txt"], r"no map of a film of the set \(none of others\)"),
    ],
)
def test_names_that_say_too_little_are_refused(tmp_path, names, said):
    with pytest.raises(DataError, match=said):
        find_maps(_touch(tmp_path, *names), FILMS)


def test_the_folders_of_the_films_tell_them_apart(tmp_path):
    found = find_maps(_touch(tmp_path, "p1/a.npy", "p2/a.npy"), FILMS)
    assert set(found.of_film) == {"p1/a.dcm", "p2/a.dcm"} and not found.foreign
    with pytest.raises(DataError, match="is no folder"):
        find_maps(tmp_path / "nowhere", FILMS)


# What a map says.

GEOMETRY = SHAPES[96, 80]
AREA = (GEOMETRY.height, GEOMETRY.width)


def _read(folder, values, kind="activation", name="m.npy", geometry=GEOMETRY):
    path = folder / name
    if name.endswith(".npy"):
        np.save(path, values)
    else:
        assert cv2.imwrite(str(path), values)
    return read_map(path, path.read_bytes(), kind, geometry)


def test_a_larger_map_is_averaged_and_a_smaller_one_is_interpolated(tmp_path):
    heat = np.random.default_rng(1).random(AREA)
    found = _read(tmp_path, np.kron(heat, np.ones((3, 3))))
    np.testing.assert_allclose(found, heat / heat.sum(), rtol=1e-6)
    ramp = np.tile(np.arange(5.0), (6, 1))
    found = _read(tmp_path, ramp)
    assert found.shape == AREA and found.sum() == pytest.approx(1)
    x = np.clip((np.arange(AREA[1]) + 0.5) * 5 / AREA[1] - 0.5, 0, 4)
    np.testing.assert_allclose(found[10], x / x.sum() / AREA[0], atol=1e-9)


def test_kinds_say_the_same_of_the_same_density(tmp_path):
    density = np.random.default_rng(2).random((96, 80))
    density /= density.sum()
    heat = _read(tmp_path, density * 7)
    np.testing.assert_allclose(_read(tmp_path, density, "probability"), heat, rtol=1e-9)
    np.testing.assert_allclose(_read(tmp_path, np.log(density), "log-density"), heat, rtol=1e-9)
    levels = np.rint(density / density.max() * 65535).astype(np.uint16)
    np.testing.assert_allclose(_read(tmp_path, levels, name="m.png"), heat, atol=1e-8)
    eight = np.rint(density / density.max() * 255).astype(np.uint8)
    np.testing.assert_allclose(_read(tmp_path, eight, name="m.png"), heat, atol=1e-5)
    with np.errstate(divide="ignore"):
        half = np.log(np.where(np.arange(80) < 40, density, 0))
    found = _read(tmp_path, half - np.log(np.exp(half).sum()), "log-density")
    assert found[:, AREA[1] // 2 + 1 :].sum() == 0


def _filled(value, shape=(96, 80)):
    heat = np.ones(shape)
    heat[0, 0] = value
    return heat


@pytest.mark.parametrize(
    ("values", "kind", "said"),
    [
        (_filled(-0.5), "activation", r"negative values, down to -0\.5"),
        (_filled(-0.5) / 7679, "probability", "negative values"),
        (_filled(np.nan), "activation", "NaN or infinity"),
        (_filled(np.inf), "probability", "NaN or infinity"),
        (_filled(np.nan), "log-density", "NaN or infinity"),
        (_filled(np.inf), "log-density", "NaN or infinity"),
        (np.full((96, 80), -np.inf), "log-density", "NaN or infinity"),
        (np.zeros((96, 80)), "activation", r"m\.npy: zero everywhere"),
        (np.ones((96, 80)), "probability", "sum 7680, expected 1"),
        (np.full((96, 80), -np.log2(7680)), "log-density", r"expected 1; heat of any sum"),
        (np.full((96, 80), 1e6), "log-density", "sum inf, expected 1"),
        (
            np.ones((80, 96)),
            "activation",
            r"80 x 96 \(H x W\), expected .* \(96 x 80\), as 80 x 67",
        ),
        (np.ones((7, 7)), "activation", "7 x 7"),
        (np.ones((0, 0)), "activation", "empty array"),
        (np.ones((1, 96, 80)), "activation", r"found float64 \(1, 96, 80\), expected real numbers"),
        (np.ones((96, 80), complex), "activation", "found complex128"),
        (np.array([[None]]), "activation", "no npy array"),
    ],
)
def test_what_is_no_map_is_refused(tmp_path, values, kind, said):
    with pytest.raises(DataError, match=said):
        _read(tmp_path, values, kind)


def test_an_aspect_within_a_pixel_is_taken(tmp_path):
    for shape in ((7, 6), (8, 6), (95, 80), (96, 81)):
        assert _read(tmp_path, np.ones(shape)).shape == AREA


def test_pictures_that_are_no_heat_are_refused(tmp_path):
    with pytest.raises(DataError, match="a picture in colour"):
        _read(tmp_path, np.full((96, 80, 3), 9, np.uint8), name="m.png")
    with pytest.raises(DataError, match="grey levels, not --kind probability"):
        _read(tmp_path, np.full((96, 80), 9, np.uint8), "probability", name="m.png")
    (tmp_path / "m.png").write_bytes((tmp_path / "m.png").read_bytes()[:60])
    for name, data in (
        ("m.png", (tmp_path / "m.png").read_bytes()),
        ("m.png", b""),
        ("m.npy", b"\x93NUMPY"),
    ):
        with pytest.raises(DataError, match="no (PNG|npy array)"):
            read_map(tmp_path / name, data, "activation", GEOMETRY)
    np.savez(tmp_path / "m.npz", np.ones((96, 80)))
    with pytest.raises(DataError, match="found an archive"):
        read_map(tmp_path / "m.npy", (tmp_path / "m.npz").read_bytes(), "activation", GEOMETRY)


def test_a_header_that_promises_too_much_is_refused(tmp_path, monkeypatch):
    header = io.BytesIO()
    what = {"descr": "<f8", "fortran_order": False, "shape": (10**7, 10**7)}
    np.lib.format.write_array_header_1_0(header, what)
    with pytest.raises(DataError, match="no npy array"):
        read_map(tmp_path / "m.npy", header.getvalue(), "activation", GEOMETRY)
    monkeypatch.setattr(map_files, "PIXEL_LIMIT", 96 * 80 - 1)
    with pytest.raises(DataError, match="no PNG: more than 7679 pixels"):
        _read(tmp_path, np.full((96, 80), 9, np.uint8), name="m.png")


def test_a_map_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.npy: cannot be opened"):
        map_bytes(tmp_path / "gone.npy")


def test_all_maps_that_cannot_be_used_are_named(labelled, tmp_path, capsys):
    rows = labelled.split("test").rows
    heat = itertools.cycle((np.zeros((96, 96)), np.ones((5, 90)), np.full((96, 96), -1.0)))
    folder = _write(labelled, tmp_path / "maps", lambda row, i: next(heat), rows)
    assert _run(folder, labelled, tmp_path / "out") == ExitCode.DATA
    said = capsys.readouterr().err
    assert "14 of 14 maps cannot be used" in said and said.count(".npy: ") == 14
    assert list((tmp_path / "out").iterdir()) == []


def test_wrong_requests_are_usage_errors(labelled, maps, tmp_path, capsys):
    assert _run(maps, labelled, tmp_path / "o", "--heatmap", "sharp") == ExitCode.USAGE
    assert "--heatmap sharp: expected one of paper" in capsys.readouterr().err
    for canvas in ("64", "x64", "64x2", "64x64x64"):
        with pytest.raises(SystemExit):
            _run(maps, labelled, tmp_path / "o", "--canvas", canvas)


def test_samples_beside_fixations_do_not_count_as_fixations(labelled, maps, compared, tmp_path):
    def with_samples(gaze):
        corner = np.full((300, 9), np.nan)
        corner[:, :3] = (1.0, 1.0, 16.0)
        kinds = (*gaze.kinds, *["sample"] * 300)
        readers = (*gaze.readers, *["reader-1"] * 300)
        return Gaze(readers, kinds, np.concatenate([gaze.values, corner]))

    gaze = {film: with_samples(one) for film, one in labelled.gaze.items()}
    films = [(row.film, labelled.film_bytes(row)) for row in labelled.rows]
    mixed = write_set(tmp_path / "set", labelled.info, labelled.rows, gaze, films)
    assert _run(maps, mixed, tmp_path / "out") == 0
    assert (tmp_path / "out" / "saliency.csv").read_bytes() == (
        compared / "saliency.csv"
    ).read_bytes()


def test_it_runs_without_torch_and_leaves_films_alone(labelled, maps, tmp_path):
    before = {p: p.read_bytes() for p in maps.iterdir()}
    arguments = [
        "saliency",
        maps,
        labelled.folder,
        "--output",
        tmp_path / "out",
        "--heatmap",
        "phantom",
    ]
    code = (
        "import sys; sys.modules['torch'] = None\n"
        f"from cxrgaze.train.cli import main; sys.exit(main({[*map(str, arguments)]!r}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert _report(tmp_path / "out").canvas == (320, 320)
    assert {p: p.read_bytes() for p in maps.iterdir()} == before
    assert LabelledSet.open(labelled.folder).info == labelled.info
