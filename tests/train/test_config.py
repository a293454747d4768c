from __future__ import annotations

import pytest

from cxrgaze.errors import UsageError
from cxrgaze.train.config import load_config, preset_names, render_config


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_survives_its_own_rendering(name, tmp_path):
    config = load_config(name)
    path = tmp_path / "config.toml"
    path.write_bytes(render_config(config))
    assert load_config(str(path)) == config


def test_the_paper_preset_is_the_papers_order():
    stages = load_config("paper").stages
    assert [*stages] == ["contrastive", "encoder", "saliency", "fusion"]
    assert [stage.train for stage in stages.values()] == [
        ("dense",),
        ("dense",),
        ("skips", "decoder", "saliency"),
        ("classifier",),
    ]
    assert [stage.batch for stage in stages.values()] == [32, 16, 16, 6]
    assert all(s.optimizer == "adam" and s.learning_rate == 1e-4 for s in stages.values())


def test_the_demo_has_the_papers_stages():
    paper, demo = load_config("paper").stages, load_config("demo").stages
    assert [(n, s.loss, s.train) for n, s in paper.items()] == [
        (n, s.loss, s.train) for n, s in demo.items()
    ]


def test_a_file_changes_its_base_and_an_override_changes_the_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('base = "paper"\nseed = 4\n[stages.fusion]\nepochs = 3\n')
    config = load_config(str(path), ["seed=7", "variant=tiny", "stages.contrastive=false"])
    assert (config.seed, config.variant) == (7, "tiny")
    assert [*config.stages] == ["encoder", "saliency", "fusion"]
    assert (config.stages["fusion"].epochs, config.stages["fusion"].batch) == (3, 6)


def test_a_loss_is_replaced_whole():
    config = load_config("paper", ["stages.contrastive.loss={supcon=1.0}"])
    assert config.stages["contrastive"].loss == {"supcon": 1.0}
    assert config.not_evaluated == ("loss supcon",)
    assert load_config("paper").not_evaluated == ()


def test_a_config_says_the_heads_in_their_own_order():
    assert load_config("paper").heads == ("logits", "log_density")
    assert load_config("paper", ["heads=log_density"]).heads == ("log_density",)
    for both in ("heads=log_density,logits", "heads=['log_density', 'logits']"):
        assert load_config("paper", [both]).heads == ("logits", "log_density")


def _of_heads(preset, *heads):
    stages = {name: one.of_heads(heads) for name, one in load_config(preset).stages.items()}
    return {name: one and ([*one.loss], one.train) for name, one in stages.items()}


def test_a_stage_leaves_out_what_a_network_without_a_head_does_not_have():
    for name in preset_names():
        for stage in load_config(name).stages.values():
            assert stage.of_heads(("logits", "log_density")) == stage
    assert _of_heads("paper", "log_density") == {
        "contrastive": None,  # no class is known without the diagnosis
        "encoder": None,
        "saliency": (["saliency_kl"], ("skips", "decoder", "saliency")),
        "fusion": None,
    }
    assert _of_heads("paper", "logits") == {
        "contrastive": (["triplet"], ("dense",)),
        "encoder": (["encoder_cross_entropy"], ("dense",)),
        "saliency": None,
        "fusion": (["cross_entropy"], ("classifier",)),
    }
    alone = load_config("joint").stages["joint"].of_heads(("logits",))
    assert (alone.weighting, alone.loss) == ("sum", {"cross_entropy": 1.0})
    assert alone.train == ("dense", "classifier")


BAD = {
    "stages.fusion.loss={magic=1}": "no loss 'magic'",
    "stages.fusion.loss={triplet=1.0}": "teach the part dense alone",
    "stages.fusion.loss={triplet=1.0,cross_entropy=1.0}": "not at both",
    "stages.saliency.train=['classifier']": "teach the classifier nothing",
    "stages.fusion.train=['saliency']": "teach the saliency head nothing",
    "stages.fusion.weighting=uncertainty": "cross_entropy with saliency_kl",
    "stages.fusion.epochs=0": "greater than 0",
    "stages.fusion.surprise=1": "surprise",
    "heads=maps": "expected one or both of logits, log_density",
    "heads=": "expected one or both of logits, log_density",
    "variant=huge": "no variant 'huge'",
    "heatmap=none": "no heatmap preset",
    "canvas=[100, 64]": "multiples of 32",
    "canvas_rule=squeeze": "canvas_rule",
    "canvas=[96, 96]": "cannot be shrunk by 2",
    "stages.fusion.loss={cross_entropy=-1.0}": "must be positive",
    "name=../up": "name",
    "name=run": "the run's own record",
    'stages."../../evil".epochs=1': "stages",
    "nonsense": "expected KEY=VALUE",
    "a..b=1": "--set",
}


@pytest.mark.parametrize("override", BAD)
def test_a_bad_value_is_refused_and_named(override):
    with pytest.raises(UsageError, match=BAD[override].replace("(", r"\(")):
        load_config("paper", [override])


def test_the_authors_preprocessing_is_for_canvases_that_sample_its_frame():
    rule = "canvas_rule=cxrgazelearn"
    assert load_config("joint", [rule]).canvas_rule == "cxrgazelearn"
    assert load_config("joint", [rule, "variant=tiny", "canvas=[160, 128]"]).canvas == (160, 128)
    with pytest.raises(UsageError, match="3200x2560 over a whole number.*found 64x64"):
        load_config("joint", [rule, "variant=tiny"])


def test_a_dotted_loss_is_added_and_a_table_replaces():
    key = "stages.saliency.loss"
    added = load_config("paper", [f"{key}.saliency_cc=0.5"]).stages["saliency"].loss
    assert added == {"saliency_kl": 1.0, "saliency_cc": 0.5}
    replaced = load_config("paper", [f"{key}={{saliency_cc=0.5}}"]).stages["saliency"].loss
    assert replaced == {"saliency_cc": 0.5}


def test_no_such_config_lists_the_presets():
    with pytest.raises(UsageError, match="demo, distill, joint, mt-unet, paper"):
        load_config("nowhere.toml")


def test_bad_toml_and_circles_are_refused(tmp_path):
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(UsageError, match="not valid TOML"):
        load_config(str(tmp_path / "bad.toml"))
    circle = tmp_path / "circle.toml"
    circle.write_text(f'base = "{circle}"\n')
    with pytest.raises(UsageError, match="based on each other"):
        load_config(str(circle))
