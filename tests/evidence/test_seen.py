"""Films and patients that a network has seen: by content, whatever they are called."""

from __future__ import annotations

import hashlib
import hmac
import json

import pytest

from cxrgaze.errors import DataError, ExitCode, IntegrityError, UsageError
from cxrgaze.evidence import labelled_set
from cxrgaze.evidence.labelled_set import LabelledSet
from cxrgaze.evidence.phantom import write_phantom_set
from cxrgaze.evidence.seen import Seen, read_key, require_unseen
from cxrgaze.export import cli as export_cli
from cxrgaze.train import checkpoint
from cxrgaze.train import cli as train_cli

KEY = b"0123456789abcdef-of-a-site"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_phantom_set(tmp_path_factory.mktemp("s") / "set", {"train": 4, "test": 3}).rows


def test_patients_are_hmacs_under_the_key_and_films_their_hashes(rows):
    seen = Seen.of(rows, KEY)
    assert seen.films == {row.sha256 for row in rows}
    assert seen.patients == {
        hmac.new(KEY, f"patient {row.patient}".encode(), hashlib.sha256).hexdigest() for row in rows
    }
    text = seen.rendered().decode()
    assert text.splitlines() == sorted(text.splitlines())
    assert KEY.decode() not in text and not any(row.patient in text for row in rows)
    assert Seen.parse(seen.rendered(), "f") == seen
    assert Seen.of(rows, None).patients == frozenset()


def test_what_is_shared_is_counted_under_the_same_key_alone(rows):
    train, test = ([row for row in rows if row.split == split] for split in ("train", "test"))
    renamed = [row.model_copy(update={"film": f"x/{i}.png"}) for i, row in enumerate(train)]
    again = [row.model_copy(update={"sha256": f"{i:064x}"}) for i, row in enumerate(train)]
    seen = Seen.of(train, KEY)
    assert seen.shared(Seen.of(test, KEY)) == ""
    assert seen.shared(Seen.of(renamed, None)) == "4 films"
    assert seen.shared(Seen.of(again, KEY)) == "4 patients"  # other films of the same ones
    assert seen.shared(Seen.of(again, KEY + b"2")) == ""
    assert seen.not_compared(Seen.of(again, KEY)) == ""
    assert "--identity-key" in seen.not_compared(Seen.of(again, KEY + b"2"))
    assert "--identity-key" in seen.not_compared(Seen.of(again, None))
    with pytest.raises(DataError, match="there: 4 films and 4 patients are those that the network"):
        require_unseen(seen, Seen.of(train, KEY), "there")
    assert "not recorded" in require_unseen(None, Seen.of(test, KEY), "there")


def test_joined_with_another_network(rows):
    one, two = Seen.of(rows[:3], KEY), Seen.of(rows[3:], KEY)
    assert one.joined(two) == Seen.of(rows, KEY) and one.joined(None) == one
    other = one.joined(Seen.of(rows[3:], None))
    assert other.films == Seen.of(rows, None).films and other.patients == one.patients


@pytest.mark.parametrize(
    "data", [b"film", b"film xyz", b"other 00", b"key aa\nkey bb", b"\xff\x00"]
)
def test_what_is_no_such_file_is_refused(data):
    with pytest.raises(IntegrityError, match="f"):
        Seen.parse(data, "f")


def test_a_key_has_sixteen_bytes(tmp_path):
    assert read_key(None) is None
    (tmp_path / "k").write_bytes(b"short")
    with pytest.raises(UsageError, match="5 bytes, expected 16 or more; make one with: head -c 32"):
        read_key(tmp_path / "k")
    with pytest.raises(UsageError, match="--identity-key"):
        read_key(tmp_path / "gone")
    (tmp_path / "k").write_bytes(KEY)
    assert read_key(tmp_path / "k") == KEY


@pytest.mark.long
def test_a_copied_folder_that_is_split_anew_is_caught(tmp_path, capsys):
    """Another name, origin and split: evaluation, gate and a second training see it."""
    made = write_phantom_set(tmp_path / "set", {"train": 24, "val": 8, "test": 8})
    fit = ["fit", str(made.folder), "--config", "joint", "--set", "variant=tiny"]
    fit += ["--set", "heatmap=phantom", "--set", "stages.joint.epochs=1"]
    (tmp_path / "key").write_bytes(KEY)
    key = ["--identity-key", str(tmp_path / "key")]
    assert train_cli.main([*fit, "--output", str(tmp_path / "run"), *key]) == 0
    weights = tmp_path / "run" / "joint.safetensors"
    seen = checkpoint.seen_by(weights, checkpoint.load(weights)[1])
    assert seen == Seen.of(made.rows[:32], KEY)

    swap = {"train": "test", "test": "train", "val": "val"}
    copied = [row.model_copy(update={"split": swap[row.split]}) for row in made.rows]
    info = made.info.model_copy(update={"name": "copy", "origin": "from elsewhere"})
    films = ((row.film, made.film_bytes(row)) for row in made.rows)
    copy = labelled_set.write_set(tmp_path / "copy", info, copied, made.gaze, films)

    evaluate = ["evaluate", str(weights), str(copy.folder), "--resamples", "200", *key]
    assert train_cli.main([*evaluate, "--output", str(tmp_path / "e")]) == 0
    report = json.loads((tmp_path / "e" / "report.json").read_text())
    assert report["leakage"].startswith("Its training had 24 films and 24 patients of split test")
    own = ["evaluate", str(weights), str(made.folder), "--resamples", "200"]
    assert train_cli.main([*own, "--output", str(tmp_path / "o")]) == 0
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert report["leakage"] is None
    assert any("patients were not compared" in reason for reason in report["left_out"])

    capsys.readouterr()
    export = [str(weights), "--precision", "fp16", "--output", str(tmp_path), "--no-build"]
    export += ["--films", *(str(made.folder / row.film) for row in made.rows[:2])]
    assert export_cli.main([*export, "--gate", str(copy.folder)]) == ExitCode.DATA
    assert "24 films are those that the network was trained on" in capsys.readouterr().err
    assert export_cli.main([*export, "--gate", str(made.folder)]) == ExitCode.INCONCLUSIVE
    manifest = json.loads((tmp_path / "joint-fp16.cxrgaze" / "manifest.json").read_text())
    assert "patients were not compared" in manifest["not_compared"]
    looks = (made.folder / labelled_set.LOOKS).read_text().splitlines()
    assert [json.loads(line)["what"] for line in looks] == [
        "evaluation",
        "gate of fp16, target tensorrt",
    ]

    again = ["--init", str(weights), "--output", str(tmp_path / "again")]
    start = [part if part != str(made.folder) else str(copy.folder) for part in fit]
    assert train_cli.main([*start, *again]) == ExitCode.DATA
    assert "split test: 24 films are those that" in capsys.readouterr().err
    weights.with_suffix(".seen").write_bytes(b"film 00\n")
    with pytest.raises(IntegrityError, match="joint.seen"):
        checkpoint.seen_by(weights, checkpoint.load(weights)[1])
    assert LabelledSet.open(copy.folder).rows
