"""A bundle: what is refused, and with which code."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest

from cxrgaze.bundles.bundle import GRAPH, MANIFEST, Bundle
from cxrgaze.bundles.manifest import FileRecord, Manifest
from cxrgaze.bundles.served import Decision
from cxrgaze.bundles.verdicts import Histogram
from cxrgaze.errors import ExitCode, IntegrityError, UsageError
from cxrgaze.runtime import cli


@pytest.fixture
def bundle(bundles, tmp_path):
    return shutil.copytree(bundles / "demo-fp16.cxrgaze", tmp_path / "demo-fp16.cxrgaze")


def _predict(bundle, films):
    return cli.main([str(bundle), str(films / "nih_00001507_002_512.png")])


def test_every_file_is_listed_with_its_hash(bundle):
    opened = Bundle.open(bundle)
    opened.verify()
    listed = {record.path for record in opened.manifest.files}
    present = {str(p.relative_to(bundle)) for p in bundle.rglob("*") if p.is_file()}
    assert present == listed | {MANIFEST}


def test_one_flipped_byte_anywhere_is_refused(bundle, films, capsys):
    rng = random.Random(0)
    for path in sorted(p for p in bundle.rglob("*") if p.is_file()):
        original = path.read_bytes()
        for _ in range(5):
            position = rng.randrange(len(original))
            flipped = bytearray(original)
            flipped[position] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            assert _predict(bundle, films) == ExitCode.INTEGRITY, (path.name, position)
        path.write_bytes(original)
    assert "altered" in capsys.readouterr().err
    assert _predict(bundle, films) == ExitCode.OK


def test_a_truncated_a_grown_and_a_missing_file_are_refused(bundle, films):
    graph = bundle / "model.onnx"
    original = graph.read_bytes()
    for data in (original[:-1], original + b"x", b""):
        graph.write_bytes(data)
        assert _predict(bundle, films) == ExitCode.INTEGRITY
    graph.unlink()
    assert _predict(bundle, films) == ExitCode.INTEGRITY


def test_a_link_is_refused_even_to_the_same_bytes(bundle, films, tmp_path):
    (bundle / "model.onnx").rename(tmp_path / "elsewhere")
    (bundle / "model.onnx").symlink_to(tmp_path / "elsewhere")
    assert _predict(bundle, films) == ExitCode.INTEGRITY
    (bundle / "model.onnx").unlink()
    (tmp_path / "elsewhere").rename(bundle / "model.onnx")
    (bundle / "reference").rename(tmp_path / "reference")
    (bundle / "reference").symlink_to(tmp_path / "reference")
    assert _predict(bundle, films) == ExitCode.INTEGRITY


def _rewrite(bundle, change):
    """A manifest with a valid digest again after `change` of its content."""
    path = bundle / MANIFEST
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_another_schema_version_is_named(bundle, films, capsys):
    _rewrite(bundle, lambda content: content.update(schema_version=Manifest.VERSION + 1))
    assert _predict(bundle, films) == ExitCode.INTEGRITY
    expected = f"schema version {Manifest.VERSION + 1}, this cxrgaze reads {Manifest.VERSION}"
    assert expected in capsys.readouterr().err


def test_a_hand_edited_manifest_is_refused(bundle, films, capsys):
    _rewrite(bundle, lambda content: content["decision"].update(temperature=2.0))
    assert _predict(bundle, films) == ExitCode.INTEGRITY
    assert "does not match its own digest" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x"])
def test_a_manifest_cannot_name_files_outside(path):
    with pytest.raises(ValueError, match="not a relative path"):
        FileRecord(path=path, size=1, sha256="0" * 64)


def test_no_bundle_says_where_one_is(bundles, tmp_path):
    with pytest.raises(UsageError, match=r"did you mean .*demo-fp16\.cxrgaze|demo-fp32"):
        Bundle.open(bundles)
    with pytest.raises(UsageError, match="does not exist"):
        Bundle.open(tmp_path / "no")


def test_a_failed_gate_never_loads(bundle, films, capsys):
    manifest = Bundle.open(bundle).manifest
    failed = manifest.gate.model_copy(update={"verdict": "fail"})
    (bundle / MANIFEST).write_bytes(manifest.model_copy(update={"gate": failed}).rendered())
    assert _predict(bundle, films) == ExitCode.INTEGRITY
    assert "gate verdict is fail" in capsys.readouterr().err


def test_a_swapped_graph_is_caught_by_spec_or_self_test(bundle, bundles, films, capsys):
    """Hashes made right again around other weights: the golden input still tells."""
    import onnx
    from onnx import numpy_helper

    from cxrgaze.files import sha256

    model = onnx.load(bundle / "model.onnx")
    for weight in model.graph.initializer:
        if weight.name.startswith("classifier.3.bias"):
            values = numpy_helper.to_array(weight)
            weight.CopyFrom(numpy_helper.from_array(values + values.dtype.type(1), weight.name))
    data = model.SerializeToString()
    (bundle / "model.onnx").write_bytes(data)
    manifest = Bundle.open(bundle).manifest
    records = tuple(
        FileRecord(path=r.path, size=len(data), sha256=sha256(data))
        if r.path == "model.onnx"
        else r
        for r in manifest.files
    )
    (bundle / MANIFEST).write_bytes(manifest.model_copy(update={"files": records}).rendered())
    assert _predict(bundle, films) == ExitCode.INCOMPATIBLE
    assert "self-test failed" in capsys.readouterr().err


def test_decision_parameters_are_checked():
    with pytest.raises(ValueError):
        Decision(temperature=0)


def test_a_bundle_of_another_preprocessing_is_incompatible(bundle, films):
    manifest = Bundle.open(bundle).manifest
    spec = manifest.spec.model_copy(update={"preprocessing": 99})
    (bundle / MANIFEST).write_bytes(manifest.model_copy(update={"spec": spec}).rendered())
    assert _predict(bundle, films) == ExitCode.INCOMPATIBLE


def test_integrity_errors_are_cxrgaze_errors(bundle):
    (bundle / MANIFEST).write_bytes(b"{")
    with pytest.raises(IntegrityError):
        Bundle.open(bundle)


def test_an_unlisted_file_is_refused(bundle, films, capsys):
    (bundle / "report" / "evil.so").write_bytes(b"")
    assert _predict(bundle, films) == ExitCode.INTEGRITY
    assert "does not belong to the bundle" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.onnx", MANIFEST])
def test_a_folder_in_place_of_a_file_is_refused(bundle, films, name):
    (bundle / name).unlink()
    (bundle / name).mkdir()
    assert _predict(bundle, films) == ExitCode.INTEGRITY


def test_a_lone_surrogate_and_a_path_that_is_too_long_are_refused(bundle, films):
    path = bundle / MANIFEST
    text = path.read_text()
    path.write_text(text.replace('"name": "demo', '"name": "\\ud800demo', 1))
    assert _predict(bundle, films) == ExitCode.INTEGRITY
    path.write_text(text)
    manifest = Bundle.open(bundle).manifest
    long = manifest.files[-1].model_copy(update={"path": "x" * 5000})
    path.write_bytes(manifest.model_copy(update={"files": (*manifest.files, long)}).rendered())
    assert _predict(bundle, films) == ExitCode.INTEGRITY


def _with_file(bundle, name, data):
    from cxrgaze.files import sha256

    (bundle / name).write_bytes(data)
    manifest = Bundle.open(bundle).manifest
    records = tuple(
        FileRecord(path=name, size=len(data), sha256=sha256(data)) if r.path == name else r
        for r in manifest.files
    )
    (bundle / MANIFEST).write_bytes(manifest.model_copy(update={"files": records}).rendered())


@pytest.mark.parametrize("kind", ["npy", "pickle", "text", "empty zip"])
def test_golden_arrays_of_another_kind_are_refused_and_never_unpickled(bundle, films, kind):
    import io
    import pickle
    import zipfile

    import numpy as np

    buffer = io.BytesIO()
    if kind == "npy":
        np.save(buffer, np.zeros(3))
    elif kind == "empty zip":
        zipfile.ZipFile(buffer, "w").close()
    data = {"pickle": pickle.dumps([1]), "text": b"hello"}.get(kind, buffer.getvalue())
    _with_file(bundle, "reference/golden.npz", data)
    assert _predict(bundle, films) == ExitCode.INTEGRITY


@pytest.mark.parametrize(
    "other",
    [(np.float64, (1, 3)), (np.float32, (1, 4)), (np.float32, (3,)), (np.float32, (2, 3))],
)
def test_arrays_of_another_type_or_shape_are_refused(bundle, other):
    opened = Bundle.open(bundle)
    right = {"logits": (np.dtype(np.float32), (1, 3))}
    assert opened.read_arrays("reference/golden.npz", right)["logits"].shape == (1, 3)
    dtype, shape = other
    with pytest.raises(IntegrityError, match=r"logits is float32 \(1, 3\), expected"):
        opened.read_arrays("reference/golden.npz", {"logits": (np.dtype(dtype), shape)})


def test_a_file_that_is_not_listed_is_not_read(bundle):
    with pytest.raises(IntegrityError, match="is not listed in manifest.json"):
        Bundle.open(bundle).read(MANIFEST)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"decision": Decision(operating_points={"nosuch": 0.5})}, "operating point of 'nosuch'"),
        ({"decision": Decision(temperatures={"normal": 2.0})}, "have one temperature"),
        ({"untaught": ("nosuch",)}, "untaught class of 'nosuch'"),
        ({"untrained": ("nosuch",)}, "untrained"),
    ],
)
def test_what_is_of_no_class_and_of_no_head_is_refused(bundle, films, capsys, change, said):
    manifest = Bundle.open(bundle).manifest
    (bundle / MANIFEST).write_bytes(manifest.model_copy(update=change).rendered())
    assert _predict(bundle, films) == ExitCode.INTEGRITY
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("what", ["parity", "self_test"])
def test_parity_and_tolerances_are_of_all_heads_of_the_network(bundle, films, capsys, what):
    def without_the_map(content):
        of = content["parity"]["outputs"] if what == "parity" else content["self_test"]["float16"]
        del of["log_density"]

    _rewrite(bundle, without_the_map)
    assert _predict(bundle, films) == ExitCode.INTEGRITY
    assert "parity or tolerances of ['logits']" in capsys.readouterr().err


def test_a_histogram_by_decade_loses_no_film():
    values = np.array([0.0, 1e-12, 0.0011, 0.0012, 0.5, 2.0, 40.0, np.nan, np.inf])
    found = Histogram.by_decade(values, -4)
    assert sum(found.counts) == len(values) and len(found.edges) == len(found.counts) + 1
    assert found.counts[0] == 2 and found.counts[-1] == 3
    (inside,) = [c for low, c in zip(found.edges, found.counts, strict=False) if low == 0.001]
    assert inside == 2 and found.edges[-1] == 10


def test_a_link_to_a_folder_is_seen(bundle, tmp_path, films):
    """D15: it was taken for a folder and passed over."""
    (tmp_path / "elsewhere").mkdir()
    (bundle / "more").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="does not belong to the bundle"):
        Bundle.open(bundle).verify()


def test_what_was_read_is_not_read_again(bundle, monkeypatch):
    """D4: whoever opens a bundle passes it on, and it remembers what was verified."""
    opened = Bundle.open(bundle)
    opened.read(GRAPH)
    read = []
    real = Bundle.read
    monkeypatch.setattr(Bundle, "read", lambda self, name: read.append(name) or real(self, name))
    opened.verify()
    assert GRAPH not in read and read
    opened.verify()
    assert len(read) == len(set(read))


def test_an_unreadable_bundle_is_an_error_of_ours(bundle, monkeypatch):
    """D13: PermissionError left the API."""

    def denied(path, limit):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("cxrgaze.bundles.bundle.read_regular", denied)
    with pytest.raises(UsageError, match="manifest.json cannot be read: Permission denied"):
        Bundle.open(bundle)
