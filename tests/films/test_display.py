"""Windows, LUTs and percentiles against slow references, and the judgement of their outcome."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from cxrgaze.films.display import unfit
from cxrgaze.films.film import film_from_array
from cxrgaze.films.windows import without_frame

SYNTAXES = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian]
MONO = ["MONOCHROME1", "MONOCHROME2"]


def quick(examples):
    phases = (Phase.explicit, Phase.generate)  # shrinking would take minutes
    return settings(derandomize=True, max_examples=examples, deadline=None, phases=phases)


def _drawn(made, bits, signed=False, rows=40, columns=36, low=0):
    """A part of the phantom in `bits` bits, and as they are stored."""
    values = made.DRAWN[-rows:, :columns].astype(np.int64) << 8 >> 16 - bits
    values = values * (2**bits - 1 - low) // (2**bits - 1) + low
    if signed:
        values = values - 2 ** (bits - 1)
    kind = (np.int8 if signed else np.uint8) if bits <= 8 else (np.int16 if signed else np.uint16)
    return values, values.astype(kind)


def _tags(bits, signed, mono):
    return {"PixelRepresentation": int(signed), "PhotometricInterpretation": mono}


def _oriented(shown, mono):
    return 1 - shown if mono == "MONOCHROME1" else shown


def _chosen(made, modality, candidates, mono):
    """The first candidate that does not hide the film, else the percentiles."""
    for name, shown in candidates:
        if not made.hides(shown):
            return name, _oriented(shown, mono)
    return "dicom-percentile", made.percentile(-modality if mono == "MONOCHROME1" else modality)


# --- windows ------------------------------------------------------------------------------------

DEPTHS = st.integers(8, 16)
SHARES = st.sampled_from([-1.5, -0.2, 0.1, 0.3, 0.5, 0.7, 0.95, 1.4, 3.0])
WIDTHS = st.sampled_from([0.001, 0.02, 0.2, 0.5, 0.9, 1.0, 1.5, 4.0, 30.0])


@quick(30)
@given(
    bits=DEPTHS,
    signed=st.booleans(),
    mono=st.sampled_from(MONO),
    syntax=st.sampled_from(SYNTAXES),
    rows=st.integers(33, 50),
    columns=st.integers(33, 48),
    centre=SHARES,
    width=WIDTHS,
    function=st.sampled_from(["", "LINEAR", "LINEAR_EXACT", "SIGMOID"]),
    rescale=st.sampled_from([None, (1, 0), (2, -500), (0.25, 0), (-1, 4000)]),
    comma=st.booleans(),
)
def test_a_window_is_used_where_it_shows_the_film(
    made, bits, signed, mono, syntax, rows, columns, centre, width, function, rescale, comma
):
    values, stored = _drawn(made, bits, signed, rows, columns)
    slope, intercept = rescale or (1, 0)
    modality = values * float(slope) + intercept
    middle = float(modality.min() + centre * np.ptp(modality))
    middle, spread = round(middle, 2), max(round(float(width * np.ptp(modality)), 2), 1.5)
    texts = {"WindowCenter": f"{middle:.2f}", "WindowWidth": f"{spread:.2f}"}
    tags = {**_tags(bits, signed, mono), **texts}
    if function:
        tags["VOILUTFunction"] = function
    if rescale:
        tags |= {"RescaleSlope": slope, "RescaleIntercept": intercept}
    data = made.file(stored, syntax=syntax, bits=bits, **tags)
    if comma:
        for text in texts.values():
            assert data.count(text.encode()) >= 1
            data = data.replace(text.encode(), text.replace(".", ",").encode())
    film = made.film(data)
    slow = made.FUNCTIONS[function or "LINEAR"]
    shown = made.slow(values, lambda v: slow(v * slope + intercept, middle, spread))
    source, expected = _chosen(made, modality, [("dicom-window", shown)], mono)
    assert film.pixel_source == source and not film.reasons
    made.close(film, expected, 1e-5)
    said = " ".join(film.notes)
    assert ("decimal comma" in said) == comma
    assert ("window turns" in said or "window shows" in said) == (source == "dicom-percentile")


@pytest.mark.parametrize("written", ["1700,0", "1700,", "+1700,00", "1700,0\\900,5", "1700,0 "])
def test_a_decimal_comma_in_every_way_to_write_it(made, written):
    raw = written.encode() + b" " * (len(written) % 2)
    marker = "1" * len(raw)
    data = made.file(WindowCenter=marker if len(raw) < 17 else "1", WindowWidth="2200")
    film = made.film(data.replace(marker.encode(), raw))
    made.close(film, made.slow(made.STORED, lambda v: made.linear(v, 1700, 2200)))
    assert film.notes == ("the window is written with a decimal comma",)


@pytest.mark.parametrize("written", ["1,700,0 ", "1.700,0 ", "a,bcdef ", ",,      "])
def test_what_is_no_number_with_a_comma_is_no_window(made, written):
    data = made.file(WindowCenter="11111111", WindowWidth="2200")
    film = made.film(data.replace(b"11111111", written.encode()))
    assert film.pixel_source == "dicom-percentile"
    made.close(film, made.percentile(made.STORED))


def test_commas_in_the_rescale(made):
    data = made.file(RescaleSlope="2.50", RescaleIntercept="-500.25", **made.WINDOW)
    film = made.film(data.replace(b"2.50", b"2,50").replace(b"-500.25", b"-500,25"))
    slope, intercept = 2.5, -500.25
    shown = made.slow(made.STORED, lambda v: made.linear(v * slope + intercept, 1700, 2200))
    _, expected = _chosen(made, made.STORED * slope + intercept, [("", shown)], "MONOCHROME2")
    made.close(film, expected)


@pytest.mark.parametrize("mono", MONO)
def test_an_8_bit_copy_with_the_window_of_its_12_bit_source_is_seen(made, mono):
    tags = {"WindowCenter": 2048, "WindowWidth": 4096, "PhotometricInterpretation": mono}
    film = made.film(made.file(made.DRAWN, bits=8, **tags))
    drawn = made.DRAWN.astype(int)
    made.close(film, made.percentile(-drawn if mono == "MONOCHROME1" else drawn))
    assert "window" in film.notes[0] and film.pixel_source == "dicom-percentile"


@pytest.mark.parametrize("mono", MONO)
@pytest.mark.parametrize("low", [0, 150, 240])
def test_plain_8_bit_values_are_judged_too(made, mono, low):
    stored = (low + made.DRAWN.astype(int) * (255 - low) // 255).astype(np.uint8)
    film = made.film(made.file(stored, bits=8, PhotometricInterpretation=mono))
    plain = [("image-8bit", stored / 255)]
    source, expected = _chosen(made, stored.astype(int), plain, mono)
    assert film.pixel_source == source and bool(film.notes) == (source != "image-8bit")
    made.close(film, expected)


# --- the judgement ------------------------------------------------------------------------------


@quick(150)
@given(
    pairs=st.lists(
        st.tuples(
            st.sampled_from([-0.5, 0.0, 0.001, 0.05, 0.0999, 0.1, 0.3, 0.95, 0.999, 1.0, 1.7]),
            st.integers(0, 12),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_unfit_is_what_the_pixels_say(made, pairs):
    table, counts = (np.array(column) for column in zip(*pairs, strict=True))
    pixels = np.repeat(table, counts)
    assert bool(unfit(table.astype(float), counts)) == (bool(pixels.size) and made.hides(pixels))


@pytest.mark.parametrize(
    ("black", "white", "hidden"),
    [(80, 0, False), (81, 0, True), (0, 80, False), (0, 81, True), (50, 50, False), (100, 0, True)],
)
def test_the_share_of_pixels_at_an_end(black, white, hidden):
    table = np.array([0.0, 1.0, *np.linspace(0.2, 0.8, 10)])
    counts = np.array([black, white, *[(100 - black - white) // 10 + 1] * 10])
    counts[2:] = 0
    counts[2], counts[-1] = (100 - black - white + 1) // 2, (100 - black - white) // 2
    assert bool(unfit(table, counts)) == hidden


# --- VOI LUTs -----------------------------------------------------------------------------------


def _curve(length, top, gamma, falling=False):
    ramp = [round(top * (i / max(length - 1, 1)) ** gamma) for i in range(length)]
    return ramp[::-1] if falling else ramp


@quick(30)
@given(
    bits=DEPTHS,
    signed=st.booleans(),
    mono=st.sampled_from(MONO),
    syntax=st.sampled_from(SYNTAXES),
    share=st.sampled_from([0.05, 0.3, 0.7, 1.0, 1.2]),
    start=st.sampled_from([-0.2, 0.0, 0.1, 0.4]),
    said=st.integers(8, 16),
    holds=st.integers(5, 16),
    gamma=st.sampled_from([0.4, 1.0, 2.5]),
    top=st.sampled_from([1.0, 0.99, 0.7]),
    as_bytes=st.booleans(),
    falling=st.booleans(),
)
def test_a_voi_lut_spans_what_its_data_span(
    made, bits, signed, mono, syntax, share, start, said, holds, gamma, top, as_bytes, falling
):
    values, stored = _drawn(made, bits, signed)
    span = 2**bits
    first = int(values.min() + start * span)
    length = min(max(int(share * span), 2), 32767)
    if not -32768 < first <= 32767 + 32768 * (not signed) or (first < 0 and not signed):
        first = int(values.min()) + 1
    curve = _curve(length, max(round(top * (2**holds - 1)), 1), gamma, falling)
    kind = (">u2" if syntax == ExplicitVRBigEndian else "<u2") if as_bytes else "US"
    item = made.lut_item(first, curve, said, kind)
    tags = {**_tags(bits, signed, mono), "VOILUTSequence": Sequence([item])}
    centre, width = 0 if signed else span // 2, span
    tags |= {"WindowCenter": centre, "WindowWidth": width}
    film = made.film(made.file(stored, syntax=syntax, bits=bits, **tags))
    depth = made.depth_of(curve)
    through = made.slow(values, lambda v: made.lut(v, first, curve) / (2**depth - 1))
    window = made.slow(values, lambda v: made.linear(v, centre, width))
    candidates = [("dicom-voi-lut", through), ("dicom-window", window)]
    source, expected = _chosen(made, values, candidates, mono)
    assert film.pixel_source == source and not film.reasons
    made.close(film, expected, 1e-5)
    is_noted = any("VOI LUT says" in note for note in film.notes)
    if source == "dicom-voi-lut":
        assert is_noted == (depth != said)
    else:
        assert any("VOI LUT turns" in n or "VOI LUT shows" in n for n in film.notes)


@pytest.mark.parametrize("said", [10, 12, 14, 16, 0, 1, 17, 60000])
@pytest.mark.parametrize("mono", MONO)
def test_the_descriptors_depth_is_not_believed(made, said, mono):
    curve = _curve(4096, 4095, 0.7)
    tags = {"VOILUTSequence": Sequence([made.lut_item(0, curve, said)])}
    film = made.film(made.file(PhotometricInterpretation=mono, **tags))
    expected = made.slow(made.STORED, lambda v: curve[v] / 4095)
    made.close(film, _oriented(expected, mono))
    assert bool(film.notes) == (said != 12)


@pytest.mark.parametrize("entries", [4096, 3000, 65536, 2001, 1999])
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_lut_of_the_wrong_length_is_read_as_words(made, entries, syntax):
    """2,000 words under another descriptor: those there are, the last for what lies beyond."""
    curve = _curve(2000, 4095, 0.8)
    kind = ">u2" if syntax == ExplicitVRBigEndian else "<u2"
    item = made.lut_item(1000, curve, 12, kind, entries=entries)
    data = made.file(syntax=syntax, VOILUTSequence=Sequence([item]))
    film = made.film(data)
    top = 2 ** made.depth_of(curve[:entries]) - 1
    made.close(film, made.slow(made.STORED, lambda v: made.lut(v, 1000, curve[:entries]) / top))


@pytest.mark.parametrize("length", [255, 256])
@pytest.mark.parametrize("mono", MONO)
def test_bytes_are_packed_entries_at_exactly_that_length(made, length, mono):
    curve = _curve(length, 255, 0.6)
    item = made.lut_item(0, curve, 8, "u1")
    tags = {"VOILUTSequence": Sequence([item]), "PhotometricInterpretation": mono}
    film = made.film(made.file(made.DRAWN, bits=8, **tags))
    shown = made.slow(made.DRAWN, lambda v: made.lut(v, 0, curve) / 255)
    made.close(film, _oriented(shown, mono))


def _broken(made, how):
    item = made.lut_item(0, _curve(4096, 4095, 1), 12)
    if how == "no data":
        del item.LUTData
    elif how == "empty data":
        item.add_new("LUTData", "OW", b"")
    elif how == "no descriptor":
        del item.LUTDescriptor
    elif how == "short descriptor":
        item.add_new("LUTDescriptor", "US", [4096, 0])
    elif how == "empty descriptor":
        item.add_new("LUTDescriptor", "US", [])
    elif how == "all zero":
        item.add_new("LUTData", "US", [0] * 4096)
    else:
        item = Dataset()
    return item


BROKEN = [
    *("no data", "empty data", "no descriptor", "short descriptor", "empty descriptor"),
    *("all zero", "empty item"),
]


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("beside", ["window", "LUT", "nothing"])
def test_a_lut_that_cannot_be_used_gives_way_with_a_note(made, how, beside):
    items, tags = [_broken(made, how)], {}
    curve = _curve(4096, 4095, 0.7)
    if beside == "LUT":
        items.append(made.lut_item(0, curve, 12))
        expected = made.slow(made.STORED, lambda v: curve[v] / 4095)
    elif beside == "window":
        tags = made.WINDOW
        expected = made.slow(made.STORED, lambda v: made.linear(v, 1700, 2200))
    else:
        expected = made.percentile(made.STORED)
    film = made.film(made.file(VOILUTSequence=Sequence(items), **tags))
    made.close(film, expected)
    assert any("VOI LUT" in note for note in film.notes)


# --- modality -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mono", MONO)
@pytest.mark.parametrize("length", [500, 4096])
def test_a_modality_lut_comes_before_the_voi_lut(made, mono, length):
    first = _curve(length, 2999, 0.5)
    second = _curve(3000, 1023, 1.5)
    modality = made.lut_item(200, first, 12)
    modality.ModalityLUTType = "US"
    tags = {"ModalityLUTSequence": Sequence([modality]), "PhotometricInterpretation": mono}
    tags["VOILUTSequence"] = Sequence([made.lut_item(0, second, 10)])
    film = made.film(made.file(**tags))
    through = made.slow(made.STORED, lambda v: made.lut(v, 200, first))
    shown = made.slow(through, lambda v: made.lut(v, 0, second) / 1023)
    source, expected = _chosen(made, through, [("dicom-voi-lut", shown)], mono)
    assert film.pixel_source == source
    made.close(film, expected)


@pytest.mark.parametrize("how", ["no data", "empty data", "no descriptor", "empty item"])
def test_a_modality_lut_that_cannot_be_used_does_not_lose_the_film(made, how):
    """A2, A14: dropped with a note, the next thing that the film brings decides."""
    tags = {"ModalityLUTSequence": Sequence([_broken(made, how)]), **made.WINDOW}
    film = made.film(made.file(**tags))
    made.close(film, made.slow(made.STORED, lambda v: made.linear(v, 1700, 2200)))
    assert any("LUT" in note for note in film.notes)


# --- functional groups --------------------------------------------------------------------------


def _groups(window=None, rescale=None):
    group = Dataset()
    if window:
        item = Dataset()
        item.WindowCenter, item.WindowWidth = window
        group.FrameVOILUTSequence = Sequence([item])
    if rescale:
        item = Dataset()
        item.RescaleSlope, item.RescaleIntercept = rescale
        group.PixelValueTransformationSequence = Sequence([item])
    return Sequence([group])


PER, SHARED = "PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"


@pytest.mark.parametrize("window_in", [PER, SHARED, "both"])
@pytest.mark.parametrize("rescale_in", [None, PER, SHARED])
@pytest.mark.parametrize("mono", MONO)
def test_functional_groups(made, window_in, rescale_in, mono):
    """C.7.6.16: the first frame's own groups, else those of all frames."""
    slope, intercept = (2.0, -100.0) if rescale_in else (1.0, 0.0)
    window = (1700 * slope + intercept, 2200 * slope)
    groups = {name: {} for name in (PER, SHARED)}
    groups[PER if window_in == "both" else window_in]["window"] = window
    if window_in == "both":
        groups[SHARED]["window"] = (1000, 700)
    if rescale_in:
        groups[rescale_in]["rescale"] = (slope, intercept)
    tags = {name: _groups(**what) for name, what in groups.items() if what}
    film = made.film(made.file(NumberOfFrames=1, PhotometricInterpretation=mono, **tags))
    shown = made.slow(made.STORED, lambda v: made.linear(v * slope + intercept, *window))
    assert film.pixel_source == "dicom-window" and not film.reasons
    made.close(film, _oriented(shown, mono))


# --- polarity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mono", MONO)
@pytest.mark.parametrize("shape", [None, "IDENTITY", "INVERSE"])
def test_polarity_that_contradicts_itself_is_noted(made, mono, shape):
    tags = {"PhotometricInterpretation": mono, **made.WINDOW}
    if shape:
        tags["PresentationLUTShape"] = shape
    film = made.film(made.file(**tags))
    shown = made.slow(made.STORED, lambda v: made.linear(v, 1700, 2200))
    inverted = mono == "MONOCHROME1" or shape == "INVERSE"
    made.close(film, 1 - shown if inverted else shown)
    assert bool(film.notes) == ((mono, shape) == ("MONOCHROME1", "IDENTITY"))


# --- frames -------------------------------------------------------------------------------------


def _framed(inside, value, top, bottom, left, right):
    rows, columns = inside.shape
    whole = np.full((rows + top + bottom, columns + left + right), value, inside.dtype)
    whole[top : top + rows, left : left + columns] = inside
    return whole


EDGE = st.integers(0, 15)


def _lively(made):
    """A 16-bit film whose border is not constant."""
    noise = np.random.default_rng(5).integers(0, 300, made.STORED.shape).astype(np.uint16)
    return made.STORED + noise + 30000


@quick(40)
@given(
    top=EDGE,
    bottom=EDGE,
    left=EDGE,
    right=EDGE,
    value=st.sampled_from([0, 1, 30000, 65535]),
    mono=st.sampled_from([*MONO, "PNG"]),
)
def test_a_constant_frame_does_not_count(made, top, bottom, left, right, value, mono):
    inside = _lively(made)
    whole = _framed(inside, value, top, bottom, left, right)
    if mono == "PNG":
        film, sign = film_from_array(whole), 1
    else:
        film = made.film(made.file(whole, bits=16, PhotometricInterpretation=mono))
        sign = -1 if mono == "MONOCHROME1" else 1
    is_frame = inside.size < 0.995 * whole.size
    among = inside if is_frame else whole
    made.close(film, made.percentile(sign * whole.astype(int), sign * among.astype(int)), 1e-5)
    assert any("constant frame" in note for note in film.notes) == is_frame


@pytest.mark.parametrize("outer", [0, 65535])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (40, 30)])
def test_a_film_of_one_value_has_no_frame(outer, shape):
    values = np.full(shape, outer, np.uint16)
    assert np.array_equal(without_frame(values), values)


def test_a_window_that_whitens_the_film_is_not_saved_by_a_black_frame(made):
    """fo-dicom#752: the film lies above the window, its border below."""
    whole = _framed(_lively(made), 0, 30, 30, 25, 25)
    film = made.film(made.file(whole, bits=16, WindowCenter=3174, WindowWidth=2426))
    assert film.pixel_source == "dicom-percentile" and "window" in film.notes[0]
    made.close(film, made.percentile(whole.astype(int), _lively(made).astype(int)), 1e-5)


# --- shutters -----------------------------------------------------------------------------------


def _shutter_tags(kinds):
    tags = {"ShutterShape": list(kinds) if len(kinds) > 1 else kinds[0]}
    if "RECTANGULAR" in kinds:
        tags |= {"ShutterUpperHorizontalEdge": 11, "ShutterLowerHorizontalEdge": 50}
        tags |= {"ShutterLeftVerticalEdge": 6, "ShutterRightVerticalEdge": 41}
    if "CIRCULAR" in kinds:
        tags |= {"CenterOfCircularShutter": [31, 22], "RadiusOfCircularShutter": 18}
    if "POLYGONAL" in kinds:
        tags["VerticesOfThePolygonalShutter"] = [5, 24, 30, 46, 56, 24, 30, 3]
    return tags


def _distance(kinds, row, column):
    """How far a pixel, counted from 1, lies inside the shutter (C.7.6.11); negative outside."""
    inside = []
    if "RECTANGULAR" in kinds:
        inside.append(min(row - 11, 50 - row, column - 6, 41 - column))
    if "CIRCULAR" in kinds:
        inside.append(18 - ((row - 31) ** 2 + (column - 22) ** 2) ** 0.5)
    if "POLYGONAL" in kinds:
        corners = [(5, 24), (30, 46), (56, 24), (30, 3)]  # rows and columns, clockwise
        for (r0, c0), (r1, c1) in zip(corners, corners[1:] + corners[:1], strict=True):
            cross = (r1 - r0) * (column - c0) - (c1 - c0) * (row - r0)
            inside.append(-cross / ((r1 - r0) ** 2 + (c1 - c0) ** 2) ** 0.5)
    return min(inside)


SHUTTERS = [
    *(("RECTANGULAR",), ("CIRCULAR",), ("POLYGONAL",), ("RECTANGULAR", "CIRCULAR")),
    ("RECTANGULAR", "CIRCULAR", "POLYGONAL"),
]


@pytest.mark.parametrize("kinds", SHUTTERS, ids="+".join)
@pytest.mark.parametrize("mono", MONO)
def test_what_lies_outside_a_shutter_is_black(made, kinds, mono):
    """On the edge itself a pixel may be either."""
    film = made.film(
        made.file(PhotometricInterpretation=mono, **_shutter_tags(kinds), **made.WINDOW)
    )
    shown = made.slow(made.STORED, lambda v: made.linear(v, 1700, 2200))
    shown = _oriented(shown, mono)
    for (row, column), value in np.ndenumerate(film.pixels):
        distance = _distance(kinds, row + 1, column + 1)
        if distance < -1:
            assert value == 0, (row, column)
        elif distance > 1:
            assert abs(value - shown[row, column]) < 2e-6, (row, column)
    assert any("shutter" in note for note in film.notes) and not film.reasons


def test_what_lies_outside_a_shutter_does_not_move_the_percentiles(made):
    bright = made.STORED.copy()
    bright[:10], bright[50:], bright[:, :5], bright[:, 41:] = 4095, 4095, 4095, 4095
    film = made.film(made.file(bright, **_shutter_tags(["RECTANGULAR"])))
    among = made.STORED[12:48, 7:39].astype(int)
    expected = made.percentile(among)
    assert np.abs(film.pixels[12:48, 7:39] - expected).mean() < 0.05


ODD_SHUTTERS = {
    "no edges": {"ShutterShape": "RECTANGULAR"},
    "unknown": {"ShutterShape": "STAR"},
    "empty": {"ShutterShape": ""},
    "nothing left": {**_shutter_tags(["RECTANGULAR"]), "ShutterRightVerticalEdge": 2},
    "all": {
        "ShutterShape": "RECTANGULAR",
        "ShutterUpperHorizontalEdge": 0,
        "ShutterLowerHorizontalEdge": 61,
        "ShutterLeftVerticalEdge": 0,
        "ShutterRightVerticalEdge": 49,
    },
    "no radius": {"ShutterShape": "CIRCULAR", "CenterOfCircularShutter": [30, 24]},
    "two corners": {"ShutterShape": "POLYGONAL", "VerticesOfThePolygonalShutter": [1, 1, 9, 9]},
    "far away": {
        "ShutterShape": "CIRCULAR",
        "CenterOfCircularShutter": [2**30, 24],
        "RadiusOfCircularShutter": 5,
    },
}


@pytest.mark.parametrize("name", ODD_SHUTTERS)
def test_a_shutter_that_makes_no_sense_is_left_out(made, name):
    film = made.film(made.file(**ODD_SHUTTERS[name], **made.WINDOW))
    made.close(film, made.slow(made.STORED, lambda v: made.linear(v, 1700, 2200)))


# --- geometry -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "is_square"),
    [
        ({"PixelSpacing": [0.2, 0.2]}, True),
        ({"PixelSpacing": [0.143, 0.144]}, True),
        ({"PixelSpacing": [0.2, 0.4]}, False),
        ({"PixelSpacing": [0.4, 0.2]}, False),
        ({"ImagerPixelSpacing": [0.1, 0.15]}, False),
        ({"ImagerPixelSpacing": [0.15, 0.15]}, True),
        ({"PixelAspectRatio": [1, 1]}, True),
        ({"PixelAspectRatio": [200, 200]}, True),
        ({"PixelAspectRatio": [1, 2]}, False),
        ({"PixelAspectRatio": [3, 2]}, False),
        ({"PixelAspectRatio": [0, 0]}, True),
        ({"PixelSpacing": [0.2, 0.2], "ImagerPixelSpacing": [0.1, 0.4]}, True),
    ],
)
def test_pixels_that_are_not_square_are_a_reason(made, tags, is_square):
    film = made.film(made.file(**tags, **made.WINDOW))
    assert bool(film.reasons) != is_square
    assert film.shape == (60, 48)


@pytest.mark.parametrize(
    ("shape", "fits"),
    [((40, 120), True), ((120, 40), True), ((40, 124), False), ((124, 40), False)],
)
def test_an_absurd_shape_is_a_reason(shape, fits):
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    assert bool(film_from_array(pixels).reasons) != fits


# --- DCMTK --------------------------------------------------------------------------------------

DCM2PNM = shutil.which("dcm2pnm")


def _dcmtk(tmp_path, data, *options):
    (tmp_path / "a.dcm").write_bytes(data)
    command = [str(DCM2PNM), *options, "+op", str(tmp_path / "a.dcm"), str(tmp_path / "a.pgm")]
    subprocess.run(command, check=True, capture_output=True, timeout=20)
    head, size, top, pixels = (tmp_path / "a.pgm").read_bytes().split(b"\n", 3)
    if size.startswith(b"#"):
        size, top, pixels = (top + b"\n" + pixels).split(b"\n", 2)
    assert (head, top) == (b"P5", b"255")
    columns, rows = map(int, size.split())
    return np.frombuffer(pixels, np.uint8).reshape(rows, columns)


@pytest.mark.skipif(DCM2PNM is None, reason="needs dcm2pnm of DCMTK, which is not installed")
@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("mono", MONO)
@pytest.mark.parametrize("kind", ["LINEAR", "SIGMOID", "LUT"])
def test_dcmtk_shows_the_same(made, tmp_path, bits, signed, mono, kind):
    values, stored = _drawn(made, bits, signed)
    tags = _tags(bits, signed, mono)
    if kind == "LUT":
        curve = _curve(min(2**bits, 32767 if signed else 65535), 4095, 0.6)
        first = int(values.min()) + 1 if signed else 0
        item = made.lut_item(first, curve, 12, "<u2")  # more than a US of explicit VR can hold
        tags["VOILUTSequence"] = Sequence([item])
        options = ["+Wl", "1"]
    else:
        tags |= {"WindowCenter": 0 if signed else 2 ** (bits - 1), "WindowWidth": 2**bits * 0.7}
        tags["VOILUTFunction"] = kind
        options = ["+Wi", "1", "+Wfs" if kind == "SIGMOID" else "+Wfl"]
    data = made.file(stored, bits=bits, **tags)
    film = made.film(data)
    assert film.pixel_source == ("dicom-voi-lut" if kind == "LUT" else "dicom-window")
    theirs = _dcmtk(tmp_path, data, *options)
    assert np.abs(film.pixels * 255 - theirs).max() <= 1.5
