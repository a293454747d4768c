"""The proof of built precision, on inspector output recorded on cards of others (recorded/)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cxrgaze.engines.precision import built_engine, judge
from cxrgaze.errors import BuildError

RECORDED = Path(__file__).parent / "recorded"


def _engine(name):
    return built_engine((RECORDED / f"{name}.json").read_text(), 1000)


CONV_3X3 = 64 * 56 * 56 * 9 * 64  # one film: 64 maps of 56 x 56, 3 x 3 kernel, 64 channels
STEM = 64 * 112 * 112 * 49 * 3


def test_work_is_counted_by_the_type_of_the_input():
    assert _engine("a100_fp16").convolution_macs_by_type == {"fp16": CONV_3X3}
    assert _engine("rtx3060_fp16_fused").convolution_macs_by_type == {"fp16": STEM + CONV_3X3}
    # Fused with a pooling, the stem shows its pooled output: a quarter of its work.
    assert _engine("a100_int8").convolution_macs_by_type == {"int8": STEM // 4 + CONV_3X3}


def test_tensorfloat_32_is_seen_in_the_name_of_the_kernel():
    assert _engine("a100_fp32").convolution_macs_by_type == {"fp32": STEM, "tf32": CONV_3X3}


def test_layers_and_weights_by_type():
    engine = _engine("a100_fp16")
    assert engine.layers == 4 and engine.device_memory_bytes == 1000
    assert engine.layers_by_type == {"fp32": 1, "fp16": 3}
    assert engine.weight_bytes_by_type == {"fp16": 36864 * 2}
    assert _engine("a100_int8").weight_bytes_by_type == {"int8": 9408 + 36864}
    fused = _engine("rtx3060_fp16_fused")
    assert fused.layers_by_type == {"fp16": 5, "unknown": 1}


VERDICTS = {
    "as promised": ("fp16", "a100_fp16", {"fp16": CONV_3X3}, "proven"),
    "asked fp16, got int8": ("fp16", "a100_int8", {"fp16": STEM + CONV_3X3}, "contradicted"),
    "asked int8, got fp16": ("int8", "a100_fp16", {"int8": CONV_3X3}, "contradicted"),
    "half of it hidden": ("fp16", "a100_fp16", {"fp16": 2 * CONV_3X3}, "opaque"),
    "fp32 that became tf32": ("fp32", "a100_fp32", {"fp32": STEM + CONV_3X3}, "contradicted"),
    "int8 for a part, as the graph says": (
        "int8",
        "a100_int8",
        {"int8": CONV_3X3, "fp16": STEM // 4},
        "proven",
    ),
    "the slack": ("fp16", "a100_fp16", {"fp16": int(CONV_3X3 / 0.951)}, "proven"),
    "beyond the slack": ("fp16", "a100_fp16", {"fp16": int(CONV_3X3 / 0.94)}, "opaque"),
    "a graph without convolutions": ("fp16", "a100_fp16", {}, "opaque"),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_the_verdict(name):
    precision, recorded, promised, verdict = VERDICTS[name]
    found = judge(precision, promised, _engine(recorded))
    assert found.verdict == verdict, found.why
    assert "convolution work" in found.why


def test_tensorfloat_32_counts_as_float32_where_it_was_allowed():
    promised = {"fp32": STEM + CONV_3X3}
    assert judge("fp32", promised, _engine("a100_fp32"), tf32=True).verdict == "proven"


def _change(name, change):
    content = json.loads((RECORDED / f"{name}.json").read_text())
    for layer in content["Layers"]:
        change(layer)
    return json.dumps(content)


def test_the_two_keys_of_tensorrt_11():
    """By its migration guide; no recording of TensorRT 11 was found."""

    def split(layer):
        for tensor in (*layer["Inputs"], *layer["Outputs"]):
            kind = "Half" if "FP16" in tensor.pop("Format/Datatype") else "Float"
            tensor |= {"Datatype": kind, "Format": "Channel major format"}

    found = built_engine(_change("a100_fp16", split), 0)
    assert found.convolution_macs_by_type == {"fp16": CONV_3X3}


SPELLINGS = {
    "Row major linear FP32": "fp32",
    "Float": "fp32",
    "Half": "fp16",
    "Channel major FP16 format where channel % 8 == 0": "fp16",
    "Row major linear BFloat16 format": "bf16",
    "Thirty-two wide channel vectorized row major INT8 format.": "int8",
    "Row major Int8 format": "int8",
    "Row major linear FP8 format": "fp8",
    "Int32": "unknown",
    "N/A due to dynamic shapes": "unknown",
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_every_spelling_of_a_type(text):
    layer = {"Name": "a", "Inputs": [{"Name": "x", "Dimensions": [1], "Format/Datatype": text}]}
    found = built_engine(json.dumps({"Layers": [layer]}), 0)
    assert found.layers_by_type == {SPELLINGS[text]: 1}


def test_dynamic_shapes_and_names_only_are_opaque_and_not_an_error():
    def dynamic(layer):
        for tensor in (*layer["Inputs"], *layer["Outputs"]):
            tensor["Dimensions"] = [-1, *tensor["Dimensions"][1:-1], -1]

    found = built_engine(_change("a100_fp16", dynamic), 0)
    assert judge("fp16", {"fp16": CONV_3X3}, found).verdict == "opaque"
    names = built_engine('{"Layers": ["Conv_0", "Conv_1"]}', 0)
    assert names.layers_by_type == {"unknown": 2}
    assert judge("fp16", {"fp16": CONV_3X3}, names).verdict == "opaque"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"Layers": 3}', "no JSON"])
def test_what_is_no_inspector_output_is_an_error(text):
    with pytest.raises(BuildError, match="not understood"):
        built_engine(text, 0)
