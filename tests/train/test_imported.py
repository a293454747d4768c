"""Weights of the authors' code: their names, their forward pass, and what is refused.

Names, shapes and forward passes are written here from docs/method.md, apart from the import.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cxrgaze.command import Steps
from cxrgaze.errors import DataError, IntegrityError, UsageError
from cxrgaze.evidence import heatmaps, phantom
from cxrgaze.evidence.arrays import load_arrays
from cxrgaze.evidence.labelled_set import LabelledSet, SetInfo
from cxrgaze.export import pipeline
from cxrgaze.export.network_source import source_from_checkpoint
from cxrgaze.export.options import ExportOptions, GateOptions
from cxrgaze.films.canvas import load_for, to_canvas
from cxrgaze.train import card_page, checkpoint, cli, imported, model
from cxrgaze.train.config import load_config
from cxrgaze.train.distill import taught
from cxrgaze.train.fit import fit
from cxrgaze.train.mt_unet import MTUNetVariant
from cxrgaze.train.origin import check_leakage
from cxrgaze.train.run_folder import Start


class Names:
    """Random tensors by the authors' names, in float16's numbers so that files stay small."""

    def __init__(self, seed=0):
        self.tensors = {}
        self._random = torch.Generator().manual_seed(seed)

    def _add(self, name, *shape, scale=1.0, shift=0.0):
        values = torch.rand(shape, generator=self._random) * 2 - 1
        self.tensors[name] = (values * scale + shift).half().float()

    def conv(self, name, out, into, size, bias=True):
        self._add(f"{name}.weight", out, into, size, size, scale=(3 / (into * size**2)) ** 0.5)
        if bias:
            self._add(f"{name}.bias", out, scale=0.2)

    def linear(self, name, out, into, bias=True):
        self._add(f"{name}.weight", out, into, scale=(3 / into) ** 0.5)
        if bias:
            self._add(f"{name}.bias", out, scale=0.2)

    def norm(self, name, channels):
        self._add(f"{name}.weight", channels, scale=0.5, shift=1)
        self._add(f"{name}.bias", channels, scale=0.3)
        self._add(f"{name}.running_mean", channels, scale=0.3)
        self._add(f"{name}.running_var", channels, scale=0.4, shift=1)
        self.tensors[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def double(self, name, out, into):
        for at, channels in ((0, into), (3, out)):
            self.conv(f"{name}.{at}", out, channels, 3)
            self.norm(f"{name}.{at + 1}", out)

    def up(self, name, out, into):
        self.conv(f"{name}.1", out, into, 3)
        self.norm(f"{name}.2", out)

    def heads(self, width, seen):
        self.linear("out_classification.linear_1", 64, seen)
        self.linear("out_classification.linear_2", 3, 64)
        self.conv("out_conv_image.conv2d", width, width, 3)
        self.norm("out_conv_image.BatchNorm2d", width)
        self.conv("out_conv_image.conv_last", 1, width, 1)
        self.tensors["dummy_tensor"] = torch.tensor(0)
        self.tensors["lg_sigma_class"] = torch.tensor(0.1)


class Sizes(NamedTuple):
    """Channels of the levels, of the DenseNet's stem, what a dense layer adds, layers a block."""

    widths: tuple[int, ...]
    stem: int
    growth: int
    layers: tuple[int, ...]
    reduction: int


WHOLE = Sizes((64, 128, 256, 512, 1024), 64, 32, (6, 12, 48, 32), 16)
FEW = Sizes((8, 12, 16, 16, 24), 8, 4, (2, 1, 1, 2), 4)


def _cxrgazelearn(sizes):
    names = Names()
    widths, channels = sizes.widths, sizes.stem
    for level, (into, out) in enumerate(zip((1, *widths), widths, strict=False), 1):
        for at, given in (("1", into), ("2", out)):
            names.conv(f"Conv{level}.0.conv{at}", out, given, 3)
            names.norm(f"Conv{level}.0.bn{at}", out)
        names.conv(f"Conv{level}.0.conv_shortcut", out, into, 3)
        squeezed = out // sizes.reduction
        names.linear(f"Conv{level}.1.fc.0", squeezed, out, bias=False)
        names.linear(f"Conv{level}.1.fc.2", out, squeezed, bias=False)
    names.conv("model.features.conv0", channels, 3, 7, bias=False)
    names.norm("model.features.norm0", channels)
    for block, layers in enumerate(sizes.layers, 1):
        for layer in range(1, layers + 1):
            path = f"model.features.denseblock{block}.denselayer{layer}"
            names.norm(f"{path}.norm1", channels)
            names.conv(f"{path}.conv1", 4 * sizes.growth, channels, 1, bias=False)
            names.norm(f"{path}.norm2", 4 * sizes.growth)
            names.conv(f"{path}.conv2", sizes.growth, 4 * sizes.growth, 3, bias=False)
            channels += sizes.growth
        if block < 4:
            names.norm(f"model.features.transition{block}.norm", channels)
            names.conv(
                f"model.features.transition{block}.conv", channels // 2, channels, 1, bias=False
            )
            channels //= 2
    names.norm("model.features.norm5", channels)
    names.linear("model.classifier", 3, channels)
    names.conv("conv", 64, 3, 1)
    deep = channels
    for level in (5, 4, 3, 2, 1):
        out = widths[max(level - 2, 0)]
        names.up(f"Up{level}", out, deep)
        names.double(f"Up_conv{level}", out, widths[level - 1] + out)
        deep = out
    names.heads(widths[0], channels + widths[0])
    return names.tensors


def _mt_unet(sizes):
    names, widths = Names(1), sizes.widths
    for level, (into, out) in enumerate(zip((1, *widths), widths, strict=False), 1):
        names.double(f"Conv{level}", out, into)
    for level in (5, 4, 3, 2):
        deep, out = widths[level - 1], widths[level - 2]
        names.up(f"Up{level}", out, deep)
        names.double(f"Up_conv{level}", out, 2 * out)
    names.heads(widths[0], widths[0] + widths[-1])
    return names.tensors


class Slow:
    """Their forward pass on a state dict, step by step."""

    def __init__(self, tensors, layers):
        self.t, self.layers = tensors, layers

    def conv(self, x, name, **options):
        return F.conv2d(x, self.t[f"{name}.weight"], self.t.get(f"{name}.bias"), **options)

    def norm(self, x, name):
        of = {k: self.t[f"{name}.{k}"] for k in ("weight", "bias", "running_mean", "running_var")}
        of = {k: v.double()[None, :, None, None] for k, v in of.items()}
        scaled = (x.double() - of["running_mean"]) / (of["running_var"] + 1e-5).sqrt()
        return (scaled * of["weight"] + of["bias"]).float()

    def double(self, x, name):
        for at in (0, 3):
            x = self.norm(self.conv(x, f"{name}.{at}", padding=1), f"{name}.{at + 1}").clamp(min=0)
        return x

    def residual(self, x, name):
        block, shortcut = f"{name}.0", self.conv(x, f"{name}.0.conv_shortcut", padding=1)
        x = self.norm(self.conv(x, f"{block}.conv1", padding=1), f"{block}.bn1").clamp(min=0)
        x = self.norm(self.conv(x, f"{block}.conv2", padding=1), f"{block}.bn2") + shortcut
        x = x.clamp(min=0)
        squeezed = (x.mean((2, 3)) @ self.t[f"{name}.1.fc.0.weight"].T).clamp(min=0)
        share = 1 / (1 + torch.exp(-(squeezed @ self.t[f"{name}.1.fc.2.weight"].T)))
        return x * share[:, :, None, None]

    def dense(self, image):
        """The last block's output, and the features of the diagnosis."""
        at = "model.features"
        x = self.conv(torch.cat([image] * 3, 1), f"{at}.conv0", stride=2, padding=3)
        x = F.max_pool2d(self.norm(x, f"{at}.norm0").clamp(min=0), 3, stride=2, padding=1)
        for block, layers in enumerate(self.layers, 1):
            for layer in range(1, layers + 1):
                path = f"{at}.denseblock{block}.denselayer{layer}"
                new = self.conv(self.norm(x, f"{path}.norm1").clamp(min=0), f"{path}.conv1")
                new = self.norm(new, f"{path}.norm2").clamp(min=0)
                x = torch.cat([x, self.conv(new, f"{path}.conv2", padding=1)], 1)
            if block < 4:
                path = f"{at}.transition{block}"
                x = self.conv(self.norm(x, f"{path}.norm").clamp(min=0), f"{path}.conv")
                x = F.avg_pool2d(x, 2)
        return x, self.norm(x, f"{at}.norm5").clamp(min=0).mean((2, 3))

    def decoded(self, x, skips):
        for level, skip in skips:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = self.norm(self.conv(x, f"Up{level}.1", padding=1), f"Up{level}.2").clamp(min=0)
            x = self.double(torch.cat([skip, x], 1), f"Up_conv{level}")
        return x

    def heads(self, x, features):
        for layer in ("linear_1", "linear_2"):
            weight, bias = (self.t[f"out_classification.{layer}.{k}"] for k in ("weight", "bias"))
            features = features @ weight.T + bias
            features = features.clamp(min=0) if layer == "linear_1" else features
        x = self.conv(x, "out_conv_image.conv2d", padding=1)
        x = self.norm(x, "out_conv_image.BatchNorm2d").clamp(min=0)
        x = self.conv(x, "out_conv_image.conv_last").double()
        shares = x.exp() / x.exp().sum((2, 3), keepdim=True)
        return features, shares.log()

    def cxrgazelearn(self, image):
        skips, x = [], image
        for level in range(1, 6):
            x = self.residual(x if level == 1 else F.max_pool2d(x, 2), f"Conv{level}")
            skips.insert(0, (level, x))
        deep, pooled = self.dense(image)
        x = self.decoded(deep, skips)
        return self.heads(x, torch.cat([pooled, x.mean((2, 3))], 1))

    def mt_unet(self, image):
        levels = []
        for level in range(1, 6):
            x = F.max_pool2d(levels[-1], 2) if levels else image
            levels.append(self.double(x, f"Conv{level}"))
        skips = [(level, levels[level - 2]) for level in (5, 4, 3, 2)]
        x = self.decoded(levels[-1], skips)
        return self.heads(x, torch.cat([levels[-1].mean((2, 3)), x.mean((2, 3))], 1))


KINDS = {"cxrgazelearn": (_cxrgazelearn, Slow.cxrgazelearn), "mt-unet": (_mt_unet, Slow.mt_unet)}
UNUSED = {"cxrgazelearn": 6, "mt-unet": 2}


def _compared(folder, kind, sizes):
    """A file of random tensors, and its import whose outputs are theirs."""
    write, slow = KINDS[kind]
    theirs = write(sizes)
    torch.save(theirs, folder / "NET.pt")
    found = _import(folder, kind)
    assert len(found.dropped) == UNUSED[kind] and not found.untrained
    network, card = checkpoint.load(folder / "net.safetensors")
    assert card == found.card and card.untrained == ()
    assert len(network.state_dict()) == len(theirs) - UNUSED[kind]
    image = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        logits, log_density = slow(Slow(theirs, sizes.layers), image)
        ours = network(image)
    for answers in (logits, log_density):  # they say something of the image
        assert (answers[0] - answers[1]).abs().max() > 1e-3 * answers.abs().max()
    assert (ours["logits"] - logits).abs().max() < 1e-4 * logits.abs().max()
    assert (ours["log_density"] - log_density).abs().max() < 1e-3
    return theirs, card


@pytest.fixture
def small(monkeypatch):
    """Networks of a few thousand weights in the place of theirs, on their canvas."""
    few, canvas = FEW, dict(height=640, width=512)
    dual = dict(init_features=few.stem, growth_rate=few.growth, block_config=few.layers)
    dual |= dict(skip_channels=few.widths, se_reduction=few.reduction)
    monkeypatch.setitem(model.VARIANTS, "paper", model.Variant(**canvas, **dual))
    unet = MTUNetVariant(channels=few.widths, **canvas)
    monkeypatch.setitem(model.VARIANTS, "mt-unet", unet)


@pytest.mark.parametrize("kind", KINDS)
def test_their_file_gives_the_outputs_of_their_forward_pass(small, tmp_path, kind):
    _compared(tmp_path, kind, FEW)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "entries", "parameters", "unused"),
    [("cxrgazelearn", 1419, 66_637_380, 6_020 + 1), ("mt-unet", 169, 34_632_836, 2)],
)
def test_their_whole_file_does_too(tmp_path, kind, entries, parameters, unused):
    theirs, card = _compared(tmp_path, kind, WHOLE)
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    learnt = [t for n, t in theirs.items() if not n.endswith(buffers)]
    assert len(theirs) == entries and card.parameters == parameters
    assert sum(t.numel() for t in learnt) == parameters + unused


def _import(folder, kind="cxrgazelearn", name="net.safetensors", trained_on="a test"):
    return imported.import_weights(
        folder / "NET.pt", kind, folder / name, trained_on=trained_on, command="the command"
    )


def _small_file(kind):
    """A random state dict of a small network under the import's names, with some not used."""
    variant = imported.KINDS[kind].variant
    spec = model.spec_of(variant, model_version="", pixel_source="stored-values", domain="none")
    torch.manual_seed(5)
    tensors = {}
    for name, tensor in model.network_of(spec).state_dict().items():
        drawn = torch.rand(tensor.shape) + 0.5 if tensor.is_floating_point() else tensor
        tensors[imported.KINDS[kind].theirs(name)] = drawn
    return tensors | {"dummy_tensor": torch.tensor(0), "lg_sigma_class": torch.tensor(0.0)}


def _saved(folder, tensors, kind="cxrgazelearn", **how):
    torch.save(tensors, folder / "NET.pt", **how)
    return _import(folder, kind)


def test_the_card_says_where_the_weights_come_from(small, tmp_path):
    found = _saved(tmp_path, _small_file("cxrgazelearn"))
    digest = imported.sha256((tmp_path / "NET.pt").read_bytes())
    card = checkpoint.read_card(tmp_path / "net.safetensors")
    assert found.dropped == ("dummy_tensor", "lg_sigma_class")
    assert (card.name, card.trained_on, card.command) == ("net", "a test", "the command")
    spec = card.spec
    assert (spec.variant, spec.domain) == ("paper", "clinical")
    assert (spec.canvas, spec.pixel_source) == ("cxrgazelearn", "stored-values")
    assert card.config["imported"] == "cxrgazelearn" and card.config["file_sha256"] == digest
    (origin,) = card.lineage
    assert (origin.trained_on, origin.weights_sha256) == ("a test", digest)
    page = (tmp_path / "net.card.html").read_text()
    assert "leakage cannot be excluded" in page and card.seen_sha256 == ""


def test_a_card_with_a_record_of_films_does_not_doubt_it():
    card = checkpoint.read_card(checkpoint.demo_path())
    for seen, doubted in ((card.seen_sha256, False), ("", True)):
        told = card.model_copy(update={"seen_sha256": seen})
        for page in card_page.pages(told, "demo").values():
            assert (b"cannot be excluded" in page) == doubted


def test_leakage_is_judged_by_what_they_were_trained_on(small, tmp_path):
    torch.save(_small_file("cxrgazelearn"), tmp_path / "NET.pt")
    info = SetInfo.model_validate(
        dict(name="egd", origin="EGD-CXR 1.0.0, MIMIC-CXR", domain="clinical", classes=())
        | dict(split_sha256="0" * 64)
    )
    for words, leaks in (("EGD-CXR, the authors' split", True), ("a hospital", False)):
        lineage = _import(tmp_path, trained_on=words).card.lineage
        if leaks:
            with pytest.raises(DataError, match="with another split"):
                check_leakage(info, lineage)
        else:
            check_leakage(info, lineage)


STAGES = {
    "final": (lambda tensors: None, ()),
    "KL": (lambda tensors: _other_classifier(tensors), ("logits",)),
    "Classfication": (
        lambda tensors: (_other_classifier(tensors), _begin(tensors)),
        ("logits", "log_density"),
    ),
    "CL": (
        lambda tensors: (_other_classifier(tensors), _begin(tensors), _wrapped(tensors)),
        ("logits", "log_density"),
    ),
}


def _other_classifier(tensors):
    tensors["out_classification.linear_1.weight"] = torch.rand(64, 1024)


def _begin(tensors):
    for name, value in (("weight", 1.0), ("bias", 0.0)):
        tensors[f"out_conv_image.BatchNorm2d.{name}"].fill_(value)


def _wrapped(tensors):
    for name in [name for name in tensors if name.startswith("model.")]:
        tensors["model.module." + name[len("model.") :]] = tensors.pop(name)


@pytest.mark.parametrize("stage", STAGES)
def test_a_file_of_every_stage_is_taken_as_far_as_it_fits(small, tmp_path, stage):
    change, untrained = STAGES[stage]
    tensors = _small_file("cxrgazelearn")
    plain = dict(tensors)
    change(tensors)
    found = _saved(tmp_path, tensors)
    network, card = checkpoint.load(tmp_path / "net.safetensors")
    assert card.untrained == untrained == tuple(found.untrained)
    assert card.served.heads == tuple(h for h in card.spec.heads if h not in untrained)
    assert card.results["untrained"] == dict(found.untrained)
    for name, tensor in network.state_dict().items():
        if not name.startswith("classifier.") or "logits" not in untrained:
            assert torch.equal(tensor, plain[imported.KINDS["cxrgazelearn"].theirs(name)])
    before = (tmp_path / "net.safetensors").read_bytes()
    _import(tmp_path)
    assert (tmp_path / "net.safetensors").read_bytes() == before  # what begins at random too


@pytest.mark.parametrize("kind", imported.KINDS)
@pytest.mark.parametrize("how", ["whole", "legacy"])
def test_wrapped_files_and_old_formats_are_read(small, tmp_path, kind, how):
    tensors = _small_file(kind)
    if how == "whole":
        tensors = {f"module.{name}": tensor for name, tensor in tensors.items()}
    found = _saved(tmp_path, tensors, kind, _use_new_zipfile_serialization=how == "whole")
    assert len(found.dropped) == 2


def _with(change):
    def write(path):
        tensors = _small_file("cxrgazelearn")
        change(tensors)
        torch.save(tensors, path)

    return write


def _packed(path):
    torch.save(_small_file("cxrgazelearn") | {"dummy_tensor": torch.zeros(10**6)}, path)
    packed = io.BytesIO()
    with zipfile.ZipFile(path) as plain:
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in plain.namelist():
                archive.writestr(name, plain.read(name))
    path.write_bytes(packed.getvalue())


def _evil(path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (path.with_name("executed"),))

    torch.save({"a": Evil()}, path)


FIRST, LAST = "Conv1.0.conv1.weight", "out_conv_image.conv_last.bias"
REFUSED = {
    "missing": (
        _with(lambda t: (t.pop(FIRST), t.pop(LAST))),
        f"{FIRST} is missing; {LAST} is missing",
    ),
    "foreign": (_with(lambda t: t.update(extra=t[LAST], more=t[LAST])), "extra .*; more is not"),
    "other shape": (
        _with(lambda t: t.update({FIRST: torch.zeros(4, 1, 3, 3)})),
        f"{FIRST} has shape",
    ),
    "no number": (_with(lambda t: t[LAST].fill_(torch.nan)), "has NaN or infinite"),
    "twice": (_with(lambda t: t.update({"model.module.x": t[LAST], "model.x": t[LAST]})), "twice"),
    "sparse": (_with(lambda t: t.update(x=torch.eye(3).to_sparse())), "plain tensors"),
    "without numbers": (_with(lambda t: t.update(x=torch.empty(3, device="meta"))), "plain"),
    "complex": (_with(lambda t: t.update(x=torch.zeros(2, dtype=torch.cfloat))), "plain"),
    "a list": (lambda path: torch.save([torch.zeros(2)], path), "expected a state dict"),
    "nested": (lambda path: torch.save({"net": {}}, path), "expected a state dict"),
    "empty": (lambda path: path.write_bytes(b""), "no tensors"),
    "no archive": (lambda path: path.write_bytes(b"PK junk"), "no tensors"),
    "packed": (_packed, "which torch does not write"),
    "evil": (_evil, "no tensors"),
    "a link": (lambda path: path.symlink_to(checkpoint.demo_path()), "is a link"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_their_file_is_refused_with_all_that_is_wrong(small, tmp_path, case):
    write, said = REFUSED[case]
    write(tmp_path / "NET.pt")
    with pytest.raises(IntegrityError, match=said):
        _import(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["NET.pt"]


def test_a_file_of_the_other_network_is_refused(small, tmp_path):
    torch.save(_small_file("mt-unet"), tmp_path / "NET.pt")
    with pytest.raises(IntegrityError, match="no state dict of cxrgazelearn .* another --from"):
        _import(tmp_path)


def test_a_file_that_is_too_large_is_refused(small, tmp_path, monkeypatch):
    torch.save(_small_file("mt-unet"), tmp_path / "NET.pt")
    monkeypatch.setattr(imported, "_LIMIT", 1000)
    with pytest.raises(IntegrityError, match="expected at most 1000"):
        _import(tmp_path, "mt-unet")


def test_what_cannot_be_carried_out_is_a_usage_error(small, tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        _import(tmp_path)
    torch.save(_small_file("mt-unet"), tmp_path / "NET.pt")
    for change, said in (
        (dict(name="net.pt"), "expected NAME.safetensors"),
        (dict(trained_on=" "), "--trained-on is empty"),
    ):
        with pytest.raises(UsageError, match=said):
            _import(tmp_path, "mt-unet", **change)


def test_the_command_names_what_is_dropped_and_untrained(small, tmp_path, capsys):
    tensors = _small_file("cxrgazelearn")
    _other_classifier(tensors)
    torch.save(tensors, tmp_path / "NET.pt")
    out = tmp_path / "n.safetensors"
    line = ["import", str(tmp_path / "NET.pt"), "--from", "cxrgazelearn", "--output", str(out)]
    assert cli.main([*line, "--trained-on", "EGD-CXR, theirs"]) == 0
    said = capsys.readouterr().out
    assert "dropped     dummy_tensor, lg_sigma_class" in said
    assert "untrained   logits, which is not served: its classifier is of another stage" in said
    assert "leakage cannot be excluded" in said
    card = json.loads(out.with_suffix(".json").read_text())
    assert card["command"] == (
        "cxrgaze-train import NET.pt --from cxrgazelearn --trained-on 'EGD-CXR, theirs' "
        "--output n.safetensors"
    )


@pytest.mark.long
@pytest.mark.parametrize("kind", imported.KINDS)
def test_an_imported_network_becomes_a_bundle_of_its_own_preprocessing(small, tmp_path, kind):
    _saved(tmp_path, KINDS[kind][0](FEW), kind)
    source = source_from_checkpoint(tmp_path / "net.safetensors")
    options = ExportOptions("fp32", "tensorrt", tmp_path, gate=GateOptions(skip=True))
    manifest = pipeline.export(source, options, Steps()).manifest
    assert manifest.spec == source.spec and manifest.spec.canvas == "cxrgazelearn"
    assert manifest.parity.verdict == "pass"
    assert manifest.provenance.trained_on == "a test"


def test_a_network_is_trained_and_taught_on_canvases_of_stored_values(tmp_path):
    films = tmp_path / "films"
    films.mkdir()
    lines = ["file,label,patient"]
    for seed in range(12):
        drawn = phantom.draw(seed, shape=(700, 600))
        cv2.imwrite(str(films / f"{seed}.png"), drawn.pixels.astype(np.uint16) * 99)
        lines.append(f"{seed}.png,{drawn.label},p{seed}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    line = ["prepare", "--films", str(films), "--labels", str(tmp_path / "labels.csv")]
    line += ["--output", str(tmp_path / "set"), "--split", "train=0.6,val=0.4"]
    assert cli.main([*line, "--classes", "paper"]) == 0
    labelled = LabelledSet.open(tmp_path / "set")
    asked = ["variant=tiny", "canvas=[160, 128]", "canvas_rule=cxrgazelearn", "heads=logits"]
    epochs = ["stages.joint.epochs=1", "name=taught"]
    start = Start(allow_untaught=True)
    card = fit(labelled, load_config("joint", [*asked, *epochs]), tmp_path / "run", start=start)
    spec = card.spec
    assert (spec.canvas, spec.pixel_source) == ("cxrgazelearn", "stored-values")
    arrays = load_arrays(labelled, spec, heatmaps.PRESETS["paper"])
    for name, image in zip(arrays.films, arrays.images, strict=True):
        film = load_for(spec, tmp_path / "set" / name)
        assert np.array_equal(image[0], to_canvas(film, spec)[0])
    teacher, _ = checkpoint.load(tmp_path / "run" / "taught.safetensors")
    seen = taught(arrays, labelled, spec, teacher, spec).teacher_logits
    with torch.inference_mode():
        expected = teacher(torch.from_numpy(arrays.images))["logits"]
    assert np.abs(seen - expected.numpy()).max() < 1e-5
    flat = phantom.write_phantom_set(tmp_path / "flat", {"train": 2})
    with pytest.raises(DataError, match="2 of 2 films cannot be used.*not applicable: image-8bit"):
        load_arrays(flat, spec, heatmaps.PRESETS["paper"])


def test_a_run_that_goes_on_says_that_the_preprocessing_changes(small, tmp_path, capsys):
    from cxrgaze.train import initial

    card = _saved(tmp_path, _small_file("mt-unet"), "mt-unet").card
    own = card.spec.model_copy(update={"canvas": "pad"})
    for spec, told in ((card.spec, False), (own, True)):
        network = model.network_of(spec)
        before = initial.start(network, spec, str(tmp_path / "net.safetensors"))
        assert before.origins[0].trained_on == "a test"
        assert before.heads == set(spec.heads)
        said = capsys.readouterr().err
        assert ("--set canvas_rule=cxrgazelearn keeps its own" in said) == told
    assert np.isfinite(network(torch.rand(1, 1, 64, 64))["logits"].detach().numpy()).all()
