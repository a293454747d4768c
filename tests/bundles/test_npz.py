"""Arrays of foreign files are held against what is expected before they take memory."""

from __future__ import annotations

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from cxrgaze.bundles import npz
from cxrgaze.errors import IntegrityError

FLOAT = np.dtype(np.float32)
EXPECTED = {"image": (FLOAT, (2, 3)), "logits": (FLOAT, (None, 3)), "names": (FLOAT, (None, 1))}


def _stored(**arrays) -> bytes:
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)
    return data.getvalue()


def _arrays(films=4):
    rng = np.random.default_rng(0)
    shapes = {"image": (2, 3), "logits": (films, 3), "names": (films, 1)}
    return {name: rng.random(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("films", [0, 1, 4, 300])
def test_the_expected_arrays_come_back(films):
    arrays = _arrays(films)
    found = npz.read(_stored(**arrays, other=np.zeros(3)), EXPECTED, "x.npz")
    assert set(found) == set(EXPECTED)
    for name, values in arrays.items():
        assert np.array_equal(found[name], values) and found[name].flags.writeable


def test_what_is_written_comes_back():
    arrays = _arrays()
    found = npz.read(npz.written(arrays), EXPECTED, "x.npz")
    assert list(found) == list(arrays)
    assert all(np.array_equal(found[name], values) for name, values in arrays.items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": np.zeros((3, 2), np.float32)}, "image is float32"),
        ({"image": np.zeros((2, 3), np.float64)}, "image is float64"),
        ({"image": np.zeros((), np.float32)}, "image is float32"),
        ({"names": np.zeros((5, 1), np.float32)}, "names is float32"),
        ({"image": np.array([[None] * 3] * 2)}, "malformed"),
        ({"image": np.asfortranarray(np.ones((2, 3), np.float32))}, "malformed"),
    ],
)
def test_others_are_refused(change, said):
    with pytest.raises(IntegrityError, match=said):
        npz.read(_stored(**(_arrays() | change)), EXPECTED, "x.npz")


def _with_header(shape, content=b"") -> bytes:
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        member, {"descr": "<f4", "fortran_order": False, "shape": shape}
    )
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("logits.npy", member.getvalue() + content)
    return data.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        _with_header((1 << 34, 3)),
        _with_header((1 << 16, 3)),  # says more than there is
        _with_header((2, 3), bytes(1 << 28)),  # has more than it says
        _with_header((2, 3), bytes(23)),
        b"",
        b"PK",
        _stored(image=np.zeros(3)),
        _stored(**_arrays())[:200],
    ],
)
def test_a_bomb_takes_no_memory(data):
    """D5: a golden input of 5.8 MB took 5.8 GB."""
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError, match="malformed|too large"):
            npz.read(data, {"logits": (FLOAT, (None, 3))}, "x.npz")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_any_damaged_byte_gives_the_arrays_or_an_integrity_error():
    data = _stored(**_arrays())
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0x55
        try:
            found = npz.read(bytes(damaged), EXPECTED, "x.npz")
        except IntegrityError:
            continue
        assert found["logits"].shape == (4, 3)
