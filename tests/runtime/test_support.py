"""The support matrix and the facts that it is asked with; the machines are recorded facts."""

from __future__ import annotations

import pytest

from cxrgaze.runtime import host
from cxrgaze.runtime.device import Gpu
from cxrgaze.runtime.support import MATRIX, verdict
from cxrgaze.runtime.trt_library import SUPPORTED, Library

X86, ARM = "linux-x86_64", "linux-aarch64"


def _gpu(capability, cuda="13.2"):
    return Gpu("a GPU", capability, 8 << 30, capability in ("87", "110"), cuda)


def _verdict(library, version, capability, platform, l4t=None, cuda="13.2"):
    found = Library(library, version, None)
    return verdict(found, _gpu(capability, cuda), platform, l4t)


SUPPORTED_PAIRS = [
    ("tensorrt", "10.3.0", "87", ARM, "36.4.0", "12.6"),
    ("tensorrt", "10.13.3.9", "110", ARM, "38.4.0", "13.0"),
    ("tensorrt", "10.16.2.10", "87", ARM, "39.2.0", "13.2"),
    ("tensorrt", "11.4.1", "87", ARM, "39.2.2", "13.2"),
    ("tensorrt", "10.13.0", "86", X86, None, "12.4"),
    ("tensorrt", "11.4.0.106", "89", X86, None, "12.4"),
    ("tensorrt_rtx", "1.7.1.116", "120", X86, None, "13.0"),
]


@pytest.mark.parametrize("pair", SUPPORTED_PAIRS)
def test_a_documented_pair_is_named_with_its_source(pair):
    able, why = _verdict(*pair)
    assert able and "is documented for" in why and why.endswith(")")


REFUSED = {
    "TensorRT 11 on JetPack 6": (("tensorrt", "11.4.1", "87", ARM, "36.4.3"), "36.4.3"),
    "TensorRT 11.4.0 on JetPack 7.2": (("tensorrt", "11.4.0", "87", ARM, "39.2.2"), "39.2.2"),
    "TensorRT 10.3 on JetPack 7.1": (("tensorrt", "10.3.0", "110", ARM, "38.4.0"), "38.4.0"),
    "JetPack 6.0": (("tensorrt", "10.3.0", "87", ARM, "36.3.0"), "36.3.0"),
    "a server Arm": (("tensorrt", "10.13.0", "90", ARM), ARM),
    "TensorRT-RTX on a Hopper": (("tensorrt_rtx", "1.7.1", "90", X86), "capability 90"),
    "TensorRT-RTX on a Jetson": (("tensorrt_rtx", "1.7.1", "87", ARM, "36.4.0"), "36.4.0"),
    "an old driver": (("tensorrt_rtx", "1.7.1", "89", X86, None, "12.4"), "driver for CUDA 13.0"),
    "a version that we do not support": (("tensorrt", "12.0", "89", X86), "no version"),
    "a release that is not understood": (
        ("tensorrt", "10.3.0", "87", ARM, "not understood"),
        "not documented",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_documented_says_what_is_missing(name):
    pair, message = REFUSED[name]
    able, why = _verdict(*pair)
    assert not able and message in why


def test_every_row_is_within_the_versions_that_a_build_takes():
    for row in MATRIX:
        low, high = SUPPORTED[row.library]
        assert low <= row.first[:2] or row.first == (1,)
        assert row.first < row.before <= high or row.before == high[:1]


NV_TEGRA = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n"
NVPMODEL = "# comment\n< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n"
NVPMODEL += "< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n< PM_CONFIG DEFAULT=0 >\n"


def _write(root, **files):
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_facts_of_a_jetson(tmp_path):
    """As an Orin Nano has them (public recordings), under another root."""
    _write(
        tmp_path,
        etc__nv_tegra_release=NV_TEGRA,
        var__lib__nvpmodel__status="pmode:0002\n",
        proc__meminfo="MemTotal: 7802032 kB\nMemAvailable:    3111936 kB\n",
    )
    assert host.l4t_release(tmp_path) == "36.4.3"
    assert host.power_mode(tmp_path) == "2"
    (tmp_path / "etc/nvpmodel.conf").write_text(NVPMODEL)
    assert host.power_mode(tmp_path) == "2 (MAXN_SUPER)"
    assert host.available_memory_bytes(tmp_path) == 3111936 * 1024


def test_facts_that_are_not_there_are_none(tmp_path):
    assert host.l4t_release(tmp_path) is None and host.power_mode(tmp_path) is None
    assert host.available_memory_bytes(tmp_path) is None
    _write(tmp_path, etc__nv_tegra_release="something else", var__lib__nvpmodel__status="?")
    assert host.l4t_release(tmp_path) == "not understood" and host.power_mode(tmp_path) is None
