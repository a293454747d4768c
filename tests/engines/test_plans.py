"""The plan cache against accidents and attacks: nothing here is ever deserialized."""

from __future__ import annotations

import argparse
import json
import os
import types

import pytest

from cxrgaze.bundles.bundle import Bundle
from cxrgaze.bundles.verdicts import Gate
from cxrgaze.engines import cli as engines_cli
from cxrgaze.errors import IncompatibleError, IntegrityError, UsageError
from cxrgaze.evidence.labelled_set import LOOKS
from cxrgaze.evidence.phantom import write_phantom_set
from cxrgaze.files import sha256
from cxrgaze.runtime import plans
from cxrgaze.runtime.plans import (
    Cache,
    PlanInputs,
    PlanRecord,
    PlanSite,
    check_header,
    read_record,
    require_fit,
)

PLAN = b"not executable" * 100
HERE = PlanSite("tensorrt", "10.3.0", "87", "linux-aarch64")


def _inputs(**changes):
    made = {
        "bundle_sha256": "a" * 64,
        "library": "tensorrt",
        "library_version": "10.3.0",
        "architecture": ("87",),
        "platform": "linux-aarch64",
        "batch": (1, 1, 1),
    }
    return PlanInputs(**(made | changes))


def _record(inputs, plan=PLAN):
    return PlanRecord(
        bundle_name="demo-fp16",
        inputs=inputs,
        plan_sha256=sha256(plan),
        plan_bytes=len(plan),
        built_precision="opaque",
        built_precision_why="a test",
        build_seconds=1.0,
        created_utc="2026-11-23T00:00:00+00:00",
        built_on={"gpu": "none"},
    )


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "plans")


@pytest.fixture
def stored(cache):
    record = _record(_inputs())
    return cache.store(record, PLAN)


def _json(cache, record):
    return cache.plan_path(record.inputs).with_suffix(".json")


def test_what_was_stored_is_found_and_read(cache, stored):
    assert cache.find(stored.inputs) == stored
    assert cache.read(stored) == PLAN
    assert cache.find(_inputs(batch=(1, 4, 8))) is None
    assert [*cache.records("a" * 64)] == [stored] and [*cache.records("b" * 64)] == []


def test_every_input_changes_the_key():
    changes = {
        "bundle_sha256": "b" * 64,
        "library": "tensorrt_rtx",
        "library_version": "10.3.1",
        "architecture": ("86",),
        "platform": "linux-x86_64",
        "batch": (1, 2, 2),
        "optimization_level": 3,
        "workspace_bytes": 1 << 30,
        "version_compatible": True,
        "hardware_compatible": True,
        "tf32": True,
    }
    assert set(changes) == set(PlanInputs.model_fields)
    keys = {_inputs(**{name: value}).key for name, value in changes.items()}
    assert len(keys) == len(changes) and _inputs().key not in keys


def test_the_folder_is_the_owners_alone(cache, tmp_path, monkeypatch):
    assert not cache.folder.exists()  # looking makes none
    cache.make()
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    for mode in (0o770, 0o707, 0o722):
        cache.folder.chmod(mode)
        with pytest.raises(IntegrityError, match="chmod 700"):
            Cache(cache.folder)
    cache.folder.chmod(0o755)
    Cache(cache.folder)  # others may look
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(IntegrityError, match="by others than you"):
        Cache(cache.folder)


def test_a_link_or_a_file_is_no_cache(cache, tmp_path):
    cache.make()
    (tmp_path / "link").symlink_to(cache.folder)
    with pytest.raises(IntegrityError, match="not a folder"):
        Cache(tmp_path / "link")
    (tmp_path / "file").write_text("")
    with pytest.raises(IntegrityError, match="not a folder"):
        Cache(tmp_path / "file")
    with pytest.raises(UsageError, match="cannot be made"):
        Cache(tmp_path / "file" / "plans").make()


def test_a_user_without_a_home_has_no_cache_unless_one_is_given(tmp_path, monkeypatch):
    def homeless():
        raise RuntimeError("no home")

    for name in ("CXRGAZE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(plans.Path, "home", homeless)
    with pytest.raises(UsageError, match="no home folder for a plan cache; give one with --cache"):
        Cache()
    assert Cache(tmp_path).folder == tmp_path


def test_the_environment_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CXRGAZE_CACHE", str(tmp_path / "here"))
    assert Cache().folder == tmp_path / "here"
    monkeypatch.delenv("CXRGAZE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Cache().folder == tmp_path / "xdg" / "cxrgaze" / "plans"


PLANS = {
    "text": b"hello",
    "truncated": PLAN[:-1],
    "trailing bytes": PLAN + b"\0",
    "one byte changed": PLAN[:-1] + b"X",
    "empty": b"",
}


@pytest.mark.parametrize("name", PLANS)
def test_an_altered_plan_is_refused(cache, stored, name):
    cache.plan_path(stored.inputs).write_bytes(PLANS[name])
    with pytest.raises(IntegrityError):
        cache.read(stored)


def test_a_plan_behind_a_link_or_gone_is_refused(cache, stored, tmp_path):
    path = cache.plan_path(stored.inputs)
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="cannot be read"):
        cache.read(stored)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="is a link"):
        cache.read(stored)


def _edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


RECORDS = {
    "another schema": (lambda c: c.update(schema_version=9), "schema version 9"),
    "unknown key": (lambda c: c.update(extra=1), "extra"),
    "a key is missing": (lambda c: c.pop("plan_sha256"), "plan_sha256"),
    "no hash": (lambda c: c.update(plan_sha256="../" * 20), "plan_sha256"),
    "negative size": (lambda c: c.update(plan_bytes=-1), "plan_bytes"),
    "inputs of another plan": (lambda c: c["inputs"].update(tf32=True), "of its name"),
    "a path as platform": (lambda c: c["inputs"].update(platform="../../etc"), "platform"),
    "an absolute path": (lambda c: c["inputs"].update(platform="/etc"), "platform"),
    "unknown library": (lambda c: c["inputs"].update(library="torch"), "library"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_an_altered_record_is_refused(cache, stored, name):
    change, message = RECORDS[name]
    _edit(_json(cache, stored), change)
    with pytest.raises(IntegrityError, match=message):
        cache.find(stored.inputs)
    (refused,) = cache.records("a" * 64)
    assert isinstance(refused, IntegrityError)


TEXTS = {
    "empty": b"",
    "no JSON": b"plan",
    "a list": b"[]",
    "duplicate keys": b'{"schema_version": 1, "schema_version": 1}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_record_that_is_no_object_is_refused(cache, stored, name):
    _json(cache, stored).write_bytes(TEXTS[name])
    with pytest.raises(IntegrityError):
        cache.find(stored.inputs)


def test_a_record_of_a_gigabyte_is_refused_before_it_is_read(cache, stored):
    with _json(cache, stored).open("r+b") as file:
        file.truncate(1 << 30)  # sparse
    with pytest.raises(IntegrityError, match="expected at most"):
        cache.find(stored.inputs)


def test_a_record_that_is_gone_is_refused(cache, stored):
    _json(cache, stored).unlink()
    with pytest.raises(IntegrityError, match="cannot be read: No such file"):
        read_record(_json(cache, stored))


def test_a_record_behind_a_link_is_refused(cache, stored, tmp_path):
    path = _json(cache, stored)
    path.rename(tmp_path / path.name)
    path.symlink_to(tmp_path / path.name)
    with pytest.raises(IntegrityError, match="is a link"):
        read_record(path)


def test_the_plan_is_used_from_the_bytes_that_were_checked(cache, stored):
    """A file swapped after the check changes nothing: `read` gives bytes, not a path."""
    plan = cache.read(stored)
    cache.plan_path(stored.inputs).write_bytes(b"swapped")
    assert sha256(plan) == stored.plan_sha256


def test_a_plan_that_fits_is_accepted():
    require_fit(_record(_inputs()), HERE)
    compatible = _record(_inputs(version_compatible=True))
    require_fit(compatible, HERE._replace(library_version="10.9.0"), allow_host_code=True)
    wide = _record(_inputs(hardware_compatible=True, architecture=("86",)))
    require_fit(wide, HERE._replace(capability="120"))


MISFITS = {
    "another version": ({}, {"library_version": "10.9.0"}),
    "another library": ({}, {"library": "tensorrt_rtx"}),
    "another GPU": ({}, {"capability": "86"}),
    "another platform": ({}, {"platform": "linux-x86_64"}),
    "an older version": ({"version_compatible": True}, {"library_version": "10.2.9"}),
    "another major version": ({"version_compatible": True}, {"library_version": "11.4.1"}),
    "a Turing": ({"hardware_compatible": True}, {"capability": "75"}),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_plan_for_something_else_is_refused_with_what_to_run(name):
    built, here = MISFITS[name]
    with pytest.raises(IncompatibleError, match=r"built for .*; here is .*cxrgaze-build demo-fp16"):
        require_fit(_record(_inputs(**built)), HERE._replace(**here), allow_host_code=True)


def test_host_code_is_refused_unless_allowed():
    record = _record(_inputs(version_compatible=True))
    assert record.has_host_code and not _record(_inputs()).has_host_code
    with pytest.raises(IncompatibleError, match="--allow-host-code"):
        require_fit(record, HERE)


def _plan(magic=b"ftrt", version=(10, 3, 0), size=500):
    return magic + bytes(20) + bytes(version) + bytes(size - 24 - len(version))


def test_the_header_of_a_plan_is_that_of_its_record():
    check_header(_plan(), _inputs())
    check_header(
        _plan(b"vtrt", (1, 7, 1, 116)),
        _inputs(library="tensorrt_rtx", library_version="1.7.1.116"),
    )


HEADERS = {
    "text": (b"#!/bin/sh\n" * 100, IntegrityError, "it is none"),
    "nothing": (b"", IntegrityError, "it is none"),
    "cut off in its header": (_plan()[:63], IntegrityError, "it is none"),
    "a prefix before the plan": (b"\x10\0\0\0" + _plan(), IntegrityError, "it is none"),
    "a plan of TensorRT-RTX": (_plan(b"vtrt"), IntegrityError, "it is none"),
    "another version": (_plan(version=(10, 9, 0)), IncompatibleError, "written by version 10.9.0"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_what_does_not_begin_like_the_plan_of_its_record_is_refused(name):
    plan, error, message = HEADERS[name]
    with pytest.raises(error, match=message):
        check_header(plan, _inputs())


BUNDLE = types.SimpleNamespace(sha256="a" * 64, path="demo-fp16.cxrgaze")


PASSED = Gate(level="engine", verdict="pass", reason="for the test")


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        ({}, {"batch": (1, 2, 2)}),  # the later one
        ({"tf32": True}, {}),
        ({"optimization_level": 0}, {}),
        ({}, {"optimization_level": 5}),
        ({"hardware_compatible": True}, {}),
        ({"version_compatible": True}, {}),
    ],
)
@pytest.mark.parametrize("clock", ["1970-01-01T00:00:00+00:00", "2026-11-24T00:00:00+00:00"])
def test_which_of_several_plans_is_taken(cache, worse, better, clock):
    """By verdict, then options, then order; the clock, which may be anything, says nothing."""
    first = cache.store(_record(_inputs(**worse)), PLAN)
    late = {"created_utc": clock}
    second = cache.store(_record(_inputs(**better)).model_copy(update=late), PLAN)
    if not worse and not better.get("optimization_level"):
        assert second.order > first.order
    assert cache.fitting(BUNDLE, HERE, allow_host_code=True) == second
    cache.store_record(first.model_copy(update={"gate": PASSED}))  # what passed goes before all
    assert cache.fitting(BUNDLE, HERE, allow_host_code=True).inputs == first.inputs


@pytest.mark.parametrize("worse", [{"tf32": True}, {"optimization_level": 0}])
def test_a_trial_does_not_replace_a_plan(cache, stored, worse):
    cache.store(_record(_inputs(**worse)), PLAN)
    assert cache.fitting(BUNDLE, HERE) == stored


def test_a_plan_can_be_asked_for_by_its_key(cache, stored):
    trial = cache.store(_record(_inputs(tf32=True)), PLAN)
    assert cache.fitting(BUNDLE, HERE, key=trial.inputs.key) == trial
    with pytest.raises(IncompatibleError, match="no plan abc of this bundle"):
        cache.fitting(BUNDLE, HERE, key="abc")


def test_a_plan_that_was_removed_is_gone(cache, stored):
    cache.remove(stored.inputs)
    cache.remove(stored.inputs)
    assert not list(cache.folder.iterdir())


def test_without_one_that_fits_all_problems_are_named(cache, stored):
    other = types.SimpleNamespace(sha256="c" * 64, path="other.cxrgaze")
    with pytest.raises(IncompatibleError, match=r"run: cxrgaze-build other.cxrgaze$"):
        cache.fitting(other, HERE)
    (cache.folder / "bad.json").write_text("{}")
    with pytest.raises(IncompatibleError, match="schema version None") as caught:
        cache.fitting(BUNDLE, HERE._replace(capability="86"))
    assert "built for tensorrt 10.3.0" in str(caught.value)
    assert cache.fitting(BUNDLE, HERE) == stored


def test_a_gate_on_a_sets_test_films_is_a_look_in_its_log(bundles, tmp_path):
    """Before the plan is run: whoever reads the log sees every look, whatever came of it."""
    bundle = Bundle.open(bundles / "demo-fp16.cxrgaze")
    folder = tmp_path / "set"
    made = write_phantom_set(folder, {"val": 3, "test": 2}, first_seed=96_000)

    def films(split, of=str(folder)):
        asked = argparse.Namespace(gate=of, gate_split=split, heatmap="phantom")
        return engines_cli._films(bundle, asked)

    assert len(films("val").keys) == 3 and not (folder / LOOKS).exists()
    assert len(films("test").keys) == 2 and len(films("all").keys) == 5
    looks = [json.loads(line) for line in (folder / LOOKS).read_text().splitlines()]
    assert len(looks) == 2
    for look in looks:
        assert look["what"] == "engine gate" and look["model"] == "demo-fp16"
        assert look["model_sha256"] == bundle.sha256
        assert look["split_sha256"] == made.info.split_sha256
