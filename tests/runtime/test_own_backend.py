"""A stranger's backend: written against the public contract alone, and loaded as it is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest

import cxrgaze
from cxrgaze.bundles.bundle import GRAPH, Bundle
from cxrgaze.errors import IncompatibleError, UsageError
from cxrgaze.runtime.backend import Backend, BackendOptions
from cxrgaze.runtime.backends import BACKENDS, choose


class Stranger(Backend):
    """The graph in somebody's own session."""

    name = "stranger"

    def activate(self, bundle):
        self._session = onnxruntime.InferenceSession(
            bundle.read(GRAPH), providers=["CPUExecutionProvider"]
        )

    def infer(self, image):
        logits, log_density = self._session.run(None, {"image": image})
        return {"logits": logits, "log_density": log_density}

    def deactivate(self):
        self._session = None


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_strangers_backend_reads_films_as_ours_does(bundles, films, precision):
    path, film = bundles / f"demo-{precision}.cxrgaze", films / "nih_00001507_002_512.png"
    with cxrgaze.load(path, Stranger()) as reader, cxrgaze.load(path, "onnxruntime") as ours:
        reading, expected = reader.read(film), ours.read(film)
    assert reading.model["backend"] == "stranger" and reading.model["device"] == "cpu"
    assert reading.probabilities == expected.probabilities
    assert np.array_equal(reading.log_density, expected.log_density)
    assert reading.warnings == expected.warnings


class Wrong(Stranger):
    """Another network than the bundle's."""

    def infer(self, image):
        outputs = super().infer(image)
        return {**outputs, "logits": outputs["logits"][:, ::-1]}


def test_one_that_computes_something_else_fails_its_self_test(bundles):
    wrong = Wrong()
    with pytest.raises(IncompatibleError, match="self-test failed on stranger"):
        cxrgaze.load(bundles / "demo-fp32.cxrgaze", wrong)
    assert wrong._session is None


class Coarse(Stranger):
    """float32 outputs that are off as bfloat16's would be, and say so."""

    says = "bfloat16"

    def arithmetic(self, manifest):
        return self.says

    def infer(self, image):
        outputs = super().infer(image)
        return {**outputs, "logits": outputs["logits"] + np.float32(0.3)}


def test_the_self_test_allows_what_the_arithmetic_rounds(bundles):
    with cxrgaze.load(bundles / "demo-fp32.cxrgaze", Coarse()) as reader:
        assert reader.backend.name == "stranger"
    exact = Coarse()
    exact.says = "float32"
    with pytest.raises(IncompatibleError, match="self-test failed"):
        cxrgaze.load(bundles / "demo-fp32.cxrgaze", exact)
    exact.says = "float8"
    with pytest.raises(IncompatibleError, match="computes in float8, for which the bundle has no"):
        cxrgaze.load(bundles / "demo-fp32.cxrgaze", exact)


class Picky(Stranger):
    serves = {"fp16": frozenset({"cpu"})}


def test_what_it_does_not_serve_is_refused_before_it_sees_it(bundles):
    picky = Picky()
    with pytest.raises(IncompatibleError, match="stranger does not serve fp32 graphs"):
        cxrgaze.load(bundles / "demo-fp32.cxrgaze", picky)
    assert not hasattr(picky, "_session")


def test_what_no_backend_here_serves_says_what_each_lacks(bundles):
    bundle = Bundle.open(bundles / "demo-fp32.cxrgaze")
    update = {"precision": "int8", "target": "tensorrt"}
    int8 = replace(bundle, manifest=bundle.manifest.model_copy(update=update))
    with pytest.raises(IncompatibleError, match="no backend here.*onnxruntime does not serve int8"):
        choose(int8, "auto", BackendOptions())


def test_names_of_the_table_are_what_messages_and_help_texts_say(bundles, capsys):
    with pytest.raises(UsageError) as error:
        cxrgaze.load(bundles / "demo-fp32.cxrgaze", "abacus")
    assert all(name in str(error.value) for name in ("auto", *BACKENDS))
    from cxrgaze.runtime.cli import main

    with pytest.raises(SystemExit):
        main(["--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    assert all(f"{name}: {entry.what}" in help_text for name, entry in BACKENDS.items())
