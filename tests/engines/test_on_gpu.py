"""What only a GPU can show; skipped, visibly, where there is none."""

from __future__ import annotations

import numpy as np
import pytest

import cxrgaze
from cxrgaze.bundles.bundle import Bundle
from cxrgaze.engines import cli
from cxrgaze.errors import ExitCode
from cxrgaze.evidence import metrics, phantom
from cxrgaze.runtime import device, host, plans, support, trt_library

pytestmark = pytest.mark.gpu


@pytest.fixture(params=trt_library.NAMES)
def library(request):
    if isinstance(found := device.gpus(), str):
        pytest.skip(f"no GPU here: {found}")
    if request.param not in trt_library.versions():
        pytest.skip(f"{request.param} is not installed here")
    return request.param


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_plan_is_built_proven_and_agrees_with_onnx_runtime(
    bundles, tmp_path, capsys, library, precision
):
    """Where it is not documented for this GPU, its own words are the skip's reason."""
    path = bundles / f"demo-{precision}.cxrgaze"
    folder = tmp_path / "plans"
    code = cli.main([str(path), "--library", library, "--batch", "1:2:4", "--cache", str(folder)])
    said = capsys.readouterr()
    gpu = device.gpus()[0]
    documented, _ = support.verdict(
        trt_library.find(library), gpu, host.host_platform(), host.l4t_release()
    )
    if not documented and code in (ExitCode.BUILD, ExitCode.INCOMPATIBLE):
        pytest.skip(f"{library} on {gpu.name}: {said.err.splitlines()[-1]}")
    assert code == 0
    (record,) = plans.Cache(folder).records(Bundle.open(path).sha256)
    assert record.built_precision in ("proven", "opaque") and record.engine is not None
    pixels = [phantom.draw(seed).pixels for seed in range(7000, 7009)]
    with cxrgaze.load(path, library, cache=folder) as reader:
        found = reader.read_batch(pixels)
    with cxrgaze.load(path, "onnxruntime") as reader:
        expected = reader.read_batch(pixels)
    for one, other in zip(found, expected, strict=True):
        assert metrics.cc(one.film_density, other.film_density) > 0.999
        assert one.probabilities == pytest.approx(other.probabilities, abs=0.02)
        assert np.isfinite(one.log_density).all()
