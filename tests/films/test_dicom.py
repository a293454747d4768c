"""DICOM: real containers of one film, and synthetic ones against slow references."""

from __future__ import annotations

import io
import math
import warnings
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
)

from cxrgaze.errors import FilmError, NotApplicableError
from cxrgaze.evidence import phantom
from cxrgaze.films import dicom
from cxrgaze.films.canvas import to_canvas
from cxrgaze.films.decode import film_from_bytes, load_film
from cxrgaze.spec import DiseaseClass, ModelSpec

SPEC = ModelSpec(
    variant="paper",
    model_version="t",
    classes=tuple(DiseaseClass(name=n, display=n, snomed="0") for n in ("normal", "pneumonia")),
    height=640,
    width=512,
    pixel_source="image-8bit",
    domain="none",
)
DRAWN = phantom.draw(3, shape=(60, 48)).pixels
STORED = DRAWN.astype(np.uint16) * 12 + 300  # uses 12 bits: 300 to 3360


def _file(pixels=STORED, *, syntax=ExplicitVRLittleEndian, bits=12, drop=(), **tags) -> bytes:
    """A DX For Presentation file with `tags`, without the attributes in `drop`."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = "2.25.1"
    meta.ImplementationClassUID = "2.25.2"
    ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    meta.FileMetaInformationVersion = b"\0\1"
    meta.FileMetaInformationGroupLength = 0  # filled in by the writer
    ds.SOPClassUID = meta.MediaStorageSOPClassUID
    ds.SOPInstanceUID = "2.25.1"
    ds.Modality, ds.BodyPartExamined, ds.ViewPosition = "DX", "CHEST", "PA"
    ds.PatientName, ds.PatientID = "Mustermann^Erika", "SECRET-4711"
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.SamplesPerPixel = 1
    ds.Rows, ds.Columns = pixels.shape[:2]
    ds.BitsAllocated = 8 * pixels.dtype.itemsize
    ds.BitsStored, ds.HighBit, ds.PixelRepresentation = bits, bits - 1, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of these files are wrong on purpose
        for name, value in tags.items():
            setattr(ds, name, value)
    for name in drop:
        delattr(ds, name)
    ds.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    buffer = io.BytesIO()
    little, implicit = syntax != ExplicitVRBigEndian, syntax == ImplicitVRLittleEndian
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of these files are wrong on purpose
        ds.preamble = b"\0" * 128
        pydicom.dcmwrite(buffer, ds, implicit_vr=implicit, little_endian=little)
    return buffer.getvalue()


def _film(data: bytes):
    return film_from_bytes(data, "f.dcm")


# --- slow references, pixel by pixel, from the text of PS3.3 ---------------------------------


def _linear(x, c, w):
    """C.11.2.1.2.1 with ymin 0 and ymax 1."""
    if x <= c - 0.5 - (w - 1) / 2:
        return 0.0
    if x > c - 0.5 + (w - 1) / 2:
        return 1.0
    return (x - (c - 0.5)) / (w - 1) + 0.5


def _linear_exact(x, c, w):
    """C.11.2.1.3.2."""
    if x <= c - w / 2:
        return 0.0
    if x > c + w / 2:
        return 1.0
    return (x - c) / w + 0.5


def _sigmoid(x, c, w):
    """C.11.2.1.3.1."""
    return 1 / (1 + math.exp(-4 * (x - c) / w))


def _lut(x, first, data):
    """C.11.1.1.1 and C.11.2.1.1: below the first, the first entry; beyond the last, the last."""
    return data[min(max(int(x) - first, 0), len(data) - 1)]


def _slow(stored, function):
    flat = [function(int(v)) for v in stored.ravel()]
    return np.array(flat).reshape(stored.shape)


def _close(film, expected, tolerance=1e-6):
    assert film.pixels.dtype == np.float32
    assert np.abs(film.pixels - expected).max() <= tolerance


def _percentile(stored):
    """Ramp between the 0.5 and 99.5 percentiles, each a value that occurs."""
    ordered = sorted(int(v) for v in stored.ravel())
    n = len(ordered)
    low, high = (next(v for i, v in enumerate(ordered, 1) if i / n >= p) for p in (0.005, 0.995))
    return _slow(stored, lambda v: min(max((v - low) / (high - low), 0), 1))


# --- windows and look-up tables ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "slow"),
    [(None, _linear), ("LINEAR", _linear), ("LINEAR_EXACT", _linear_exact), ("SIGMOID", _sigmoid)],
)
@pytest.mark.parametrize("mono1", [False, True])
def test_windows(function, slow, mono1):
    tags = {"WindowCenter": 1700, "WindowWidth": 2200}
    if function:
        tags["VOILUTFunction"] = function
    if mono1:
        tags["PhotometricInterpretation"] = "MONOCHROME1"
    film = _film(_file(**tags))
    expected = _slow(STORED, lambda v: slow(v, 1700, 2200))
    assert film.pixel_source == "dicom-window"
    _close(film, 1 - expected if mono1 else expected)


def test_the_first_of_several_windows_counts():
    film = _film(_file(WindowCenter=[1700, 900], WindowWidth=[2200, 100]))
    _close(film, _slow(STORED, lambda v: _linear(v, 1700, 2200)))


def test_the_first_of_several_window_functions_counts():
    tags = {"WindowCenter": [1700, 900], "WindowWidth": [2200, 100]}
    film = _film(_file(**tags, VOILUTFunction=["SIGMOID", "LINEAR"]))
    _close(film, _slow(STORED, lambda v: _sigmoid(v, 1700, 2200)))


@pytest.mark.parametrize("slope, intercept", [(2.5, -500.0), (-1.0, 4095.0)])
def test_rescale_comes_before_the_window(slope, intercept):
    centre = 1700 * slope + intercept
    tags = dict(RescaleSlope=slope, RescaleIntercept=intercept, WindowCenter=centre)
    film = _film(_file(**tags, WindowWidth=3000))
    _close(film, _slow(STORED, lambda v: _linear(v * slope + intercept, centre, 3000)))


@pytest.mark.parametrize(
    "centre, width",
    [(1700, 0), (1700, -5), (1700, 0.5), (90000, 100), (-9000, 10), (1e300, 1e300)],
)
def test_an_absurd_window_gives_way_to_the_percentile_window_and_says_so(centre, width):
    film = _film(_file(WindowCenter=centre, WindowWidth=width))
    assert film.pixel_source == "dicom-percentile" and "window" in film.notes[0]
    _close(film, _percentile(STORED))


@pytest.mark.parametrize("inverse", [{}, {"PhotometricInterpretation": "MONOCHROME1"}])
def test_no_window_is_the_stated_percentile_window(inverse):
    stored = 4095 - STORED if inverse else STORED
    film = _film(_file(stored, **inverse))
    assert film.pixel_source == "dicom-percentile"
    _close(film, _percentile(STORED))


def _lut_item(first, data, bits, as_bytes=False):
    item = Dataset()
    item.LUTDescriptor = [len(data) % 65536, first, bits]
    values = np.asarray(data, np.uint16)
    if as_bytes:
        item.add_new("LUTData", "OW", values.tobytes())
    else:
        item.add_new("LUTData", "US", values.tolist())
    return item


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("mono1", [False, True])
def test_voi_lut_sequence_wins_over_a_window(as_bytes, bits, mono1):
    top = 2**bits - 1
    curve = [round(top * (i / 2999) ** 0.6) for i in range(3000)]
    tags = dict(VOILUTSequence=Sequence([_lut_item(350, curve, bits, as_bytes)]))
    tags |= dict(WindowCenter=1000, WindowWidth=50)
    if mono1:
        tags["PhotometricInterpretation"] = "MONOCHROME1"
    film = _film(_file(**tags))
    expected = _slow(STORED, lambda v: _lut(v, 350, curve) / top)
    assert film.pixel_source == "dicom-voi-lut"
    _close(film, 1 - expected if mono1 else expected)


def test_modality_lut_sequence_comes_first_and_wins_over_rescale():
    curve = [min(i * i // 2000, 4095) for i in range(4096)]
    item = _lut_item(0, curve, 12)
    item.ModalityLUTType = "US"
    tags = dict(ModalityLUTSequence=Sequence([item]), RescaleSlope=9, RescaleIntercept=9)
    film = _film(_file(**tags, WindowCenter=2000, WindowWidth=4000))
    _close(film, _slow(STORED, lambda v: _linear(_lut(v, 0, curve), 2000, 4000)))


def test_a_voi_lut_with_a_negative_first_value():
    signed = STORED.astype(np.int16) - 2000
    curve = list(range(0, 4096, 2))
    item = _lut_item(0, curve, 12)
    item.add_new("LUTDescriptor", "SS", [len(curve), -1500, 12])
    film = _film(_file(signed, PixelRepresentation=1, VOILUTSequence=Sequence([item])))
    _close(film, _slow(signed, lambda v: _lut(v, -1500, curve) / 4095))


def test_big_endian_words_of_a_lut():
    curve = [round(4095 * (i / 2999) ** 0.6) for i in range(3000)]
    item = _lut_item(350, curve, 12)
    item.add_new("LUTData", "OW", np.asarray(curve, ">u2").tobytes())
    swapped = STORED.astype(">u2")
    film = _film(_file(swapped, syntax=ExplicitVRBigEndian, VOILUTSequence=Sequence([item])))
    _close(film, _slow(STORED, lambda v: _lut(v, 350, curve) / 4095))


@pytest.mark.parametrize("entries", [255, 256])
def test_packed_8_bit_lut_entries(entries):
    curve = [round(255 * (i / (entries - 1)) ** 0.6) for i in range(entries)]
    item = _lut_item(0, curve, 8)
    item.add_new("LUTData", "OW", bytes(curve) + b"\0" * (entries % 2))
    film = _film(_file(DRAWN, bits=8, VOILUTSequence=Sequence([item])))
    _close(film, _slow(DRAWN, lambda v: _lut(v, 0, curve) / 255))


@pytest.mark.parametrize("bits", [0, 1, 17, 60000])
def test_a_lut_of_impossible_depth_has_that_of_its_data(bits):
    item = _lut_item(0, list(range(4096)), bits)
    film = _film(_file(VOILUTSequence=Sequence([item])))
    _close(film, _slow(STORED, lambda v: v / 4095))
    assert film.pixel_source == "dicom-voi-lut" and "has data of 12" in film.notes[0]


@pytest.mark.parametrize("data", [[], [1, 2]])
def test_a_lut_that_cannot_be_used_leaves_it_to_the_next(data):
    item = _lut_item(0, [1, 2, 3], 12)
    item.add_new("LUTDescriptor", "US", data)
    film = _film(_file(VOILUTSequence=Sequence([item]), WindowCenter=1700, WindowWidth=2200))
    _close(film, _slow(STORED, lambda v: _linear(v, 1700, 2200)))
    assert film.pixel_source == "dicom-window" and "VOI LUT is incomplete" in film.notes[0]


# --- inversion -----------------------------------------------------------------------------------

WINDOW = {"WindowCenter": 1700, "WindowWidth": 2200}


@pytest.mark.parametrize(
    ("photometric", "shape", "inverted"),
    [
        ("MONOCHROME2", "IDENTITY", False),
        ("MONOCHROME2", "INVERSE", True),
        ("MONOCHROME1", "INVERSE", True),
        ("MONOCHROME1", None, True),
    ],
)
def test_inverted_once(photometric, shape, inverted):
    tags = {"PhotometricInterpretation": photometric, **WINDOW}
    if shape:
        tags["PresentationLUTShape"] = shape
    film = _film(_file(**tags))
    plain = _slow(STORED, lambda v: _linear(v, 1700, 2200))
    _close(film, 1 - plain if inverted else plain)


def test_inversion_does_not_depend_on_content():
    """By the nominal range: a patch of another film inverts the same way."""
    tags = {"PhotometricInterpretation": "MONOCHROME1", **WINDOW}
    whole = _film(_file(**tags)).pixels
    part = _film(_file(np.ascontiguousarray(STORED[10:50, 5:45]), **tags)).pixels
    assert np.array_equal(whole[10:50, 5:45], part)


# --- bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian]
)
def test_overlay_bits_of_10_bit_films_are_dropped(syntax):
    stored = STORED // 4  # 10 bits
    rng = np.random.default_rng(0)
    dirty = stored | (rng.integers(0, 64, stored.shape).astype(np.uint16) << 10)
    tags = {"WindowCenter": 425, "WindowWidth": 550}
    film = _film(_file(dirty, syntax=syntax, bits=10, **tags))
    _close(film, _slow(stored, lambda v: _linear(v, 425, 550)))


def test_a_high_bit_above_the_stored_bits():
    stored = STORED // 4
    film = _film(_file(stored << 4 | 7, bits=10, HighBit=13, WindowCenter=425, WindowWidth=550))
    _close(film, _slow(stored, lambda v: _linear(v, 425, 550)))


def test_signed_values_keep_their_sign_without_their_unused_bits():
    signed = STORED.astype(np.int16) - 2000
    dirty = (signed.view(np.uint16) & 0x0FFF).view(np.int16)  # sign only in bit 11
    tags = {"WindowCenter": -300, "WindowWidth": 2200, "PixelRepresentation": 1}
    film = _film(_file(dirty, **tags))
    _close(film, _slow(signed, lambda v: _linear(v, -300, 2200)))


def test_8_bits_without_a_window_are_the_8_bit_image():
    film = _film(_file(DRAWN, bits=8))
    assert film.pixel_source == "image-8bit"
    _close(film, DRAWN / 255)
    inverted = _film(_file(255 - DRAWN, bits=8, PhotometricInterpretation="MONOCHROME1"))
    _close(inverted, DRAWN / 255)


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_signed_8_bits_without_a_window_use_the_whole_grey_scale(photometric):
    stored = DRAWN if photometric == "MONOCHROME2" else 255 - DRAWN
    signed = (stored.astype(np.int16) - 128).astype(np.int8)
    tags = {"PixelRepresentation": 1, "PhotometricInterpretation": photometric}
    _close(_film(_file(signed, bits=8, **tags)), DRAWN / 255)


def test_8_bits_in_words_of_16_are_the_8_bit_image_and_9_bits_are_not():
    words = DRAWN.astype(np.uint16)
    film = _film(_file(words, bits=8))
    assert film.pixel_source == "image-8bit"
    _close(film, DRAWN / 255)
    nine = _film(_file(2 * words, bits=9))
    assert nine.pixel_source == "dicom-percentile"
    _close(nine, _percentile(DRAWN))


@pytest.mark.parametrize("slope", [1, 0.5])
def test_8_bits_with_a_rescale_are_no_display_values(slope):
    film = _film(_file(DRAWN, bits=8, RescaleSlope=slope, RescaleIntercept=-7))
    assert film.pixel_source == "dicom-percentile"
    _close(film, _percentile(DRAWN))
    assert np.abs(film.pixels - DRAWN / 255).max() > 0.01


# --- padding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("value", "limit"), [(4095, None), (4000, 4095), (4095, 4000), (0, None)])
def test_padding_is_black_and_does_not_move_the_window(photometric, value, limit):
    padded = np.full((80, 70), value, np.uint16)
    padded[10:70, 11:59] = STORED
    tags = {"PixelPaddingValue": value, "PhotometricInterpretation": photometric}
    if limit is not None:
        tags["PixelPaddingRangeLimit"] = limit
        padded[:5] = limit
    film = _film(_file(padded, **tags))
    inside = film.pixels[10:70, 11:59]
    alone = _film(_file(PhotometricInterpretation=photometric)).pixels
    assert np.array_equal(inside, alone)
    outside = film.pixels.copy()
    outside[10:70, 11:59] = 0
    assert not outside.any()


# --- headers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tags",
    [
        {},
        {"PixelSpacing": [0, 0]},
        {"PixelSpacing": ["0.000", "0.000"]},
        {"PixelSpacing": [-1, 0.1]},
        {"PixelSpacing": [1e9, 1e9]},
        {"PixelSpacing": "0.2"},
        {"PixelSpacing": None},
    ],
)
def test_missing_zero_and_lying_spacing_is_survived(tags):
    assert _film(_file(**tags, **WINDOW)).spacing_mm is None


def test_spacing_prefers_the_calibrated_one():
    film = _film(_file(PixelSpacing=[0.1, 0.2], ImagerPixelSpacing=[0.3, 0.3], **WINDOW))
    assert film.spacing_mm == (0.1, 0.2)
    zero = _film(_file(PixelSpacing=[0, 0], ImagerPixelSpacing=[0.3, 0.3], **WINDOW))
    assert zero.spacing_mm == (0.3, 0.3)


def test_a_dirty_header_without_type_2_attributes_is_read():
    """Like a real CR without patient, study and view attributes (docs/dicom.md#dirty-headers)."""
    drop = ["PatientName", "PatientID", "BodyPartExamined", "ViewPosition", "Modality"]
    film = _film(_file(drop=[*drop, "SOPInstanceUID"], **WINDOW))
    assert not film.reasons
    _close(film, _slow(STORED, lambda v: _linear(v, 1700, 2200)))


@pytest.mark.parametrize(
    "drop", ["SamplesPerPixel", "PixelRepresentation", "HighBit", "BitsStored"]
)
def test_a_missing_pixel_attribute_is_survived(drop):
    film = _film(_file(drop=[drop], **WINDOW))
    _close(film, _slow(STORED, lambda v: _linear(v, 1700, 2200)))


def test_a_missing_photometric_interpretation_is_noted():
    film = _film(_file(drop=["PhotometricInterpretation"], **WINDOW))
    _close(film, _slow(STORED, lambda v: _linear(v, 1700, 2200)))
    assert "MONOCHROME2 was assumed" in film.notes[0]


VIEW = Dataset()
VIEW.CodeMeaning = "left lateral"

REASONS = {
    "lateral": ({"ViewPosition": "LL"}, "lateral view"),
    "lateral by orientation": ({"PatientOrientation": ["P", "F"], "ViewPosition": ""}, "lateral"),
    "lateral by code": ({"ViewCodeSequence": Sequence([VIEW]), "ViewPosition": ""}, "lateral"),
    "another body part": ({"BodyPartExamined": "HAND"}, "body part is not the chest"),
    "another modality": ({"Modality": "CT", "SOPClassUID": CTImageStorage}, "modality"),
    "raw values": ({"SOPClassUID": DigitalXRayImageStorageForProcessing}, "raw detector values"),
    "burned-in text": (
        {"SOPClassUID": SecondaryCaptureImageStorage, "BurnedInAnnotation": "YES"},
        "burned-in text",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_not_applicable_with_its_reason(name):
    tags, reason = REASONS[name]
    film = _film(_file(**tags, **WINDOW))
    assert len(film.reasons) == 1 and reason in film.reasons[0]


@pytest.mark.parametrize(
    "tags",
    [
        {"ViewPosition": "AP"},
        {"BodyPartExamined": "Chest PA"},
        {"BodyPartExamined": "THORAX"},
        {"SOPClassUID": SecondaryCaptureImageStorage},
        {"BurnedInAnnotation": "YES"},
        {"PatientOrientation": ["L", "F"]},
        {"Modality": "CR"},
    ],
)
def test_what_is_no_reason(tags):
    assert not _film(_file(**tags, **WINDOW)).reasons


def test_multi_frame_is_not_applicable():
    two = np.concatenate([STORED, STORED])
    film = _film(_file(two, Rows=60, NumberOfFrames=2, **WINDOW))
    assert film.reasons == ("multi-frame: 2 frames, expected one",)
    assert film.shape == (60, 48)


def test_colour_is_not_applicable():
    rgb = np.dstack([DRAWN, DRAWN // 2, DRAWN // 4])
    tags = dict(SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0)
    film = _film(_file(rgb, bits=8, **tags))
    assert "colour image" in film.reasons[0] and film.shape == (60, 48)


def test_force_reads_it_anyway_and_says_so(bundles, tmp_path):
    import cxrgaze

    (tmp_path / "lateral.dcm").write_bytes(_file(ViewPosition="LL", **WINDOW))
    with cxrgaze.load(bundles / "demo-fp32.cxrgaze") as reader:
        with pytest.raises(NotApplicableError, match="lateral view"):
            reader.read(tmp_path / "lateral.dcm")
        reading = reader.read(tmp_path / "lateral.dcm", force=True)
    assert "lateral view" in reading.forced[0]
    assert any(w.startswith("read by force although lateral") for w in reading.warnings)
    assert reading.to_json()["forced"]


MALFORMED = {
    "spacing in letters": ("PixelSpacing", "DS", b"abc\\de "),
    "spacing with commas": ("PixelSpacing", "DS", b"0,143\\0,143"),
    "empty spacings": ("PixelSpacing", "DS", b"\\ "),
    "frames in letters": ("NumberOfFrames", "IS", b"one "),
    "photometric in lower case": ("PhotometricInterpretation", "CS", b"monochrome2 "),
    "a high bit beyond the word": ("HighBit", "US", b"\xff\xff"),
    "orientation": ("PatientOrientation", "CS", b"\\"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_attribute_does_not_lose_the_film(name):
    keyword, vr, raw = MALFORMED[name]
    data = _file(**WINDOW)
    dataset = pydicom.dcmread(io.BytesIO(data))
    tag = pydicom.datadict.tag_for_keyword(keyword)
    element = pydicom.dataelem.RawDataElement(
        pydicom.tag.Tag(tag), vr, len(raw), raw, 0, False, True, True
    )
    dataset._dict[pydicom.tag.Tag(tag)] = element
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    film = _film(buffer.getvalue())
    assert not film.reasons and film.spacing_mm is None
    if keyword != "HighBit":
        _close(film, _slow(STORED, lambda v: _linear(v, 1700, 2200)))


# --- hostile and broken files -------------------------------------------------------------------


def test_a_30000_by_30000_header_is_refused_before_memory_is_taken():
    data = _file(Rows=30000, Columns=30000)
    with pytest.raises(FilmError, match="30000 x 30000 pixels"):
        _film(data)


def test_a_deflate_bomb_is_refused_before_it_inflates(monkeypatch):
    """600 MiB of zeros in a PixelData that deflates to half a megabyte."""
    honest = _file(syntax=DeflatedExplicitVRLittleEndian)
    meta_end = (
        132 + 12 + pydicom.dcmread(io.BytesIO(honest)).file_meta.FileMetaInformationGroupLength
    )
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    zeros = bytes(1 << 20)
    body = b"".join(deflater.compress(zeros) for _ in range(600)) + deflater.flush()
    monkeypatch.setattr(zlib, "decompress", None)  # the unbounded call must not be reached
    with pytest.raises(FilmError, match="inflates to more than 512 MiB"):
        _film(honest[:meta_end] + body)


def test_messages_do_not_quote_the_header(capsys):
    broken = [
        _file(**WINDOW)[:-1000],
        _file(BitsStored=99),
        _file(BitsAllocated=7),
        _file(Rows=0),
        _file()[:200],
    ]
    for data in broken:
        with pytest.raises(FilmError) as caught:
            _film(data)
        error: BaseException | None = caught.value
        while error:  # no chained cause may quote it either
            assert "Mustermann" not in str(error) and "4711" not in str(error)
            error = error.__cause__
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert "Mustermann" not in "".join(capsys.readouterr())


def test_a_file_without_preamble_is_read_by_its_suffix():
    data = _file(syntax=ImplicitVRLittleEndian, **WINDOW)
    meta = pydicom.dcmread(io.BytesIO(data)).file_meta.FileMetaInformationGroupLength
    _close(_film(data[132 + 12 + meta :]), _film(data).pixels)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_file(STORED.astype(np.uint32), bits=32), "32 bits allocated, expected 8 or 16"),
        (_file(drop=["Rows"]), "not a DICOM image: it has no pixel data"),
        (_file().replace(b".1.2.1\0", b".1.2.9\0"), "transfer syntax .*1.2.9.* is not read"),
        (_file()[: _file().index(b"\xe0\x7f\x10\0")], "cut short, or without pixel data"),
    ],
    ids=["words of 32 bits", "no picture", "an unknown transfer syntax", "cut before its pixels"],
)
def test_what_is_no_film_is_said(data, message):
    with pytest.raises(FilmError, match=message):
        _film(data)


def test_a_text_file_called_dcm_is_refused():
    with pytest.raises(FilmError):
        _film(b"just text, no DICOM at all" * 20)


# --- the real containers ------------------------------------------------------------------------

LOSSLESS = ("mono2_deflated", "mono2_implicit", "mono2_j2klossless", "mono2_rle", "mono2_jpegls")
NO_WINDOW = LOSSLESS[:4]


def _rg1(shared: Path, name: str) -> Path:
    return shared / "cxr" / f"dcm_rg1q_12b_{name}.dcm"


def _raw(path: Path) -> np.ndarray:
    return dicom.stored_values(pydicom.dcmread(path), "x")


def test_lossless_containers_agree_bit_for_bit(shared):
    expected = _raw(_rg1(shared, "mono2_implicit"))
    for name in LOSSLESS:
        assert np.array_equal(_raw(_rg1(shared, name)), expected), name
    complement = _raw(_rg1(shared, "mono1_jpegll"))
    assert np.array_equal(4095 - complement, expected)


def _canvas(film):
    return to_canvas(film, SPEC)[0]


def test_the_same_film_gives_the_same_canvas(shared):
    plain = [_canvas(load_film(_rg1(shared, name))) for name in NO_WINDOW]
    assert all(np.array_equal(plain[0], other) for other in plain[1:])
    a, b = (load_film(_rg1(shared, name)) for name in ("mono2_jpegls", "mono1_jpegll"))
    assert a.pixel_source == b.pixel_source == "dicom-window"
    # Their windows are mirrored; LINEAR is off centre by half a value: 1 / (width - 1).
    assert np.abs(_canvas(a) - _canvas(b)).max() <= 1 / 3749 + 1e-6
    forced = [
        _canvas(load_film(_rg1(shared, name), window=(2000, 3000)))
        for name in (*LOSSLESS, "mono1_jpegll")
    ]
    assert all(np.array_equal(forced[0], other) for other in forced[1:])


def test_lossy_containers_stay_within_a_bound(shared):
    jpeg = load_film(shared / "cxr/dcm_nih_00001968_003_monochrome2_jpeg.dcm")
    png = load_film(shared / "cxr/nih_00001968_003_512.png")
    assert jpeg.pixel_source == png.pixel_source
    difference = np.abs(_canvas(jpeg) - _canvas(png))
    assert difference.max() <= 25 / 255 + 1e-6  # docs/dicom.md#lossy-films
    jpegls = load_film(shared / "cxr/dcm_nih_00005638_000_monochrome1_jpegls.dcm")
    png = load_film(shared / "cxr/nih_00005638_000_512.png")
    assert np.array_equal(jpegls.pixels, png.pixels)
    # RG1 is lossy JPEG 2000; its 5 x 5 mean is stored losslessly with the same window.
    whole, mean = (
        _canvas(load_film(shared / "cxr" / name))
        for name in ("dcm_RG1_J2KI_mono1_15bit.dcm", "dcm_rg1q_15b_mono1_explicit.dcm")
    )
    assert np.abs(whole - mean).mean() < 0.01


def test_the_shared_films_are_read(shared):
    paths = [p for p in sorted((shared / "cxr").iterdir()) if p.suffix in (".png", ".dcm")]
    assert len(paths) == 61
    for path in paths:
        assert not load_film(path).reasons, path
