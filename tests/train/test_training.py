"""Learning, its negative control, the shipped checkpoint, and the loss."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cxrgaze.errors import DataError, ExitCode, IntegrityError, UsageError
from cxrgaze.evidence import heatmaps, phantom
from cxrgaze.evidence.arrays import load_arrays
from cxrgaze.train import checkpoint, cli
from cxrgaze.train.figures import point_figures

PRESET = heatmaps.PRESETS["phantom"]
HELD_OUT_SEED = 50_000  # no training run uses it


@pytest.fixture(scope="module")
def demo():
    return checkpoint.load(checkpoint.demo_path())


@pytest.fixture(scope="module")
def sets(tmp_path_factory, demo):
    """Fresh phantoms: training ones for the prior, held-out easy and hard ones."""
    folder = tmp_path_factory.mktemp("sets")
    spec = demo[1].spec
    train = phantom.write_phantom_set(folder / "train", {"train": 150})
    easy = phantom.write_phantom_set(folder / "easy", {"test": 200}, first_seed=HELD_OUT_SEED)
    hard = phantom.write_phantom_set(
        folder / "hard", {"test": 300}, difficulty=phantom.HARD, first_seed=2 * HELD_OUT_SEED
    )
    return {
        k: load_arrays(v, spec, PRESET) for k, v in dict(train=train, easy=easy, hard=hard).items()
    }


@pytest.fixture(scope="module")
def prior(sets):
    return heatmaps.centre_prior(sets["train"].densities[:, 0])


def test_the_demo_network_is_good_on_phantoms_it_never_saw(demo, sets, prior):
    found = point_figures(demo[0], sets["easy"], prior, PRESET, demo[1].served)
    assert found["auc_macro"] >= 0.95
    assert found["cc"] >= found["cc_centre_prior"] + 0.12
    assert found["cc"] > found["cc_between_readers"]
    assert found["pad_mass"] < 0.02


def test_the_hard_level_has_something_to_lose(demo, sets, prior):
    found = point_figures(demo[0], sets["hard"], prior, PRESET, demo[1].served)
    assert 0.87 <= found["auc_macro"] <= 0.93


def test_the_card_reports_what_the_checkpoint_does(demo):
    network, card = demo
    assert card.parameters == sum(p.numel() for p in network.parameters())
    assert "synthetic" in card.results["note"] and card.spec.domain == "phantom"
    assert card.results["held_out"]["cc_centre_prior"] > 0.5
    assert checkpoint.demo_path().stat().st_size < 5_000_000
    assert card.command.startswith("cxrgaze-train demo")


SHORT = (
    "stages.contrastive.epochs=4",
    "stages.encoder.epochs=10",
    "stages.saliency.epochs=6",
    "stages.fusion.epochs=3",
)


def _short_run(tmp_path, *more):
    """The stages of preset paper at `tiny` from nothing, at one thread."""
    output = tmp_path / "run"
    arguments = ["demo", "--films", "480", "--output", str(output), *more]
    arguments += [part for text in SHORT for part in ("--set", text)]
    assert cli.main(arguments) == ExitCode.OK
    return checkpoint.load(output / "demo.safetensors")[1].results["held_out"]


@pytest.mark.slow
def test_a_short_run_learns_both_heads(tmp_path):
    found = _short_run(tmp_path)
    assert found["auc_macro"] >= 0.95
    assert found["cc"] >= found["cc_centre_prior"] + 0.12


@pytest.mark.slow
def test_shuffled_targets_teach_nothing(tmp_path):
    found = _short_run(tmp_path, "--shuffle-targets")
    assert 0.35 <= found["auc_macro"] <= 0.65
    assert found["cc"] <= found["cc_centre_prior"] + 0.05


def test_targets_sum_to_one_over_the_film_and_move_with_the_geometry(sets):
    arrays = sets["easy"]
    for index in range(20):
        geometry = arrays.geometries[index]
        target = arrays.densities[index, 0]
        assert geometry.crop(target).sum() == pytest.approx(1, abs=1e-4)
        assert target.sum() == pytest.approx(1, abs=1e-4)
        gaze = arrays.gaze[index]
        weights = gaze.values[:, 2]
        centre = (geometry.to_canvas(gaze.points) * weights[:, None]).sum(0) / weights.sum()
        rows, columns = np.indices(target.shape)
        found = ((columns * target).sum(), (rows * target).sum())
        assert np.abs(np.array(found) - centre).max() < 2  # border truncation moves it a little


@pytest.mark.slow
def test_the_shipped_edge_network_reads_phantoms(tmp_path):
    path = checkpoint.demo_path().with_name("edge.safetensors")
    assert path.stat().st_size < 10_000_000
    network, card = checkpoint.load(path)
    assert card.spec.variant == "edge" and card.parameters < 5_000_000
    assert "synthetic" in card.results["note"] and card.results["held_out"]["cc_centre_prior"] > 0.5
    fresh = phantom.write_phantom_set(tmp_path / "set", {"test": 45}, first_seed=HELD_OUT_SEED)
    arrays = load_arrays(fresh, card.spec, PRESET)
    found = point_figures(network, arrays, None, PRESET, card.served)
    assert found["auc_macro"] >= 0.95 and found["cc"] >= found["cc_between_readers"]


def test_other_classes_are_refused(tmp_path, demo):
    labelled = phantom.write_phantom_set(tmp_path / "set", {"train": 2})
    spec = demo[1].spec.model_copy(update={"classes": demo[1].spec.classes[:2]})
    with pytest.raises(DataError, match="the network's are exclusive: .'normal', 'heart_failure'"):
        load_arrays(labelled, spec, PRESET)


@pytest.fixture
def copied(tmp_path):
    for suffix in (".safetensors", ".json", ".seen", ".prior"):
        source = checkpoint.demo_path().with_suffix(suffix)
        (tmp_path / f"c{suffix}").write_bytes(source.read_bytes())
    return tmp_path / "c.safetensors"


def test_an_altered_checkpoint_is_refused(copied):
    data = bytearray(copied.read_bytes())
    data[-1] ^= 1
    copied.write_bytes(data)
    with pytest.raises(IntegrityError, match="SHA-256 differs"):
        checkpoint.load(copied)


def _edit_card(path, change):
    card = json.loads(path.with_suffix(".json").read_text())
    change(card)
    path.with_suffix(".json").write_text(json.dumps(card))


CARDS = {
    "schema": (lambda c: c.update(schema_version=7), "schema version 7"),
    "variant": (lambda c: c["spec"].update(variant="huge"), "variant 'huge'"),
    "another network": (lambda c: c["spec"].update(variant="paper"), "is missing"),
    "unknown key": (lambda c: c.update(extra=1), "extra"),
    "canvas": (lambda c: c["spec"].update(height=65), "multiples of 32"),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_that_does_not_fit_is_refused(copied, name):
    change, message = CARDS[name]
    _edit_card(copied, change)
    with pytest.raises(IntegrityError, match=message):
        checkpoint.load(copied)


def test_missing_files_are_named(copied):
    copied.with_suffix(".json").unlink()
    with pytest.raises(UsageError, match=r"c\.json does not exist"):
        checkpoint.load(copied)


@pytest.mark.slow
def test_the_one_command_makes_the_shipped_checkpoint(tmp_path):
    """Bit for bit on the machine and torch that made it; elsewhere as good."""
    assert cli.main(["demo", "--output", str(tmp_path)]) == 0
    made, shipped = (
        checkpoint.load(p)[1] for p in (tmp_path / "demo.safetensors", checkpoint.demo_path())
    )
    assert made.command == shipped.command
    for key in ("auc_macro", "cc"):
        assert made.results["held_out"][key] == pytest.approx(
            shipped.results["held_out"][key], abs=0.02
        )
