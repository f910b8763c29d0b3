"""The sweep over learning rates with settings of seconds: its arithmetic, its arms, and bad input."""

import math

import pytest
from transformers import LlamaForCausalLM, Qwen3ForCausalLM

from hfext import recipe
from hfext.experiments import lr_sensitivity
from hfext.experiments._data import shared_data
from hfext.experiments.lr_sensitivity import Arm, Config, arguments, arms, make_model, sensitivities, train

TINY = dict(sizes=((16, 1),), steps=6, seeds=1, texts=4, length=16, rows=2, lrs=(1e-3, 1e-2, 1e-1))
needs_text = pytest.mark.skipif(shared_data("tinyshakespeare") is None, reason="tinyshakespeare is not there")


def test_sensitivities_by_hand():
    runs = [{"seed": seed, "loss": loss + seed, "first": 4.0} for seed in (0, 1) for loss in (1.0, 2.5, 9.0, math.nan)]
    assert sensitivities(runs) == pytest.approx([(1 + 2.5 + 4 + 4) / 4 - 1, (2 + 3.5 + 4 + 4) / 4 - 2])


def test_arms_are_remedies_and_other_optimizers():
    config = Config(remedies=("none", "qk_norm"), others=("soap", "bisam(rho=0.1,base=sgd)"))
    assert [(a.optim, a.optim_args, a.remedy) for a in arms(config)] == [
        ("adamw_torch", None, "none"),
        ("adamw_torch", None, "qk_norm"),
        ("soap", None, "none"),
        ("bisam", "rho=0.1,base=sgd", "none"),
    ]
    assert [a.name for a in arms(Config())] == list(lr_sensitivity.REMEDIES)


def test_a_remedy_changes_the_model_in_that_alone():
    plain, normed = (make_model(Arm("", "sgd", None, r), (32, 2), 65, 16, 0) for r in ("none", "qk_norm"))
    assert type(plain) is LlamaForCausalLM and type(normed) is Qwen3ForCausalLM
    shapes = [{n: p.shape for n, p in model.named_parameters()} for model in (plain, normed)]
    more = {n: shape for n, shape in shapes[1].items() if n not in shapes[0]}
    assert set(more) == {f"model.layers.{i}.self_attn.{x}_norm.weight" for i in (0, 1) for x in "qk"}
    assert {n: s for n, s in shapes[1].items() if n not in more} == shapes[0]


def test_weight_decay_does_not_depend_on_the_learning_rate(tmp_path):
    config = Config(independent_decay=0.01)
    made = [arguments(config, arms(config)[0], lr, 0, str(tmp_path)) for lr in (1e-3, 0.1)]
    assert [args.weight_decay * args.learning_rate for args in made] == pytest.approx([0.01, 0.01])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"remedies": ("qk",)}, "remedies has 'qk'"),
        ({"remedies": ()}, "nothing to train"),
        ({"sizes": ((20, 1),)}, "pairs"),
        ({"lrs": (0.1,)}, "two learning rates"),
        ({"lrs": (0.1, -1.0)}, "above 0"),
        ({"seeds": 0}, "seeds is 0"),
        ({"z_coefficient": -1.0}, "coefficient"),
        ({"optim": "adamm"}, "adamm"),
        ({"optim": "sam", "optim_args": "roh=1"}, "unknown key 'roh'"),
        ({"others": ("sam(rho=-1)",)}, "rho"),
        ({"others": ("sam(",)}, "not of the form"),
    ],
)
def test_bad_values_are_told_before_the_first_run(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)


@needs_text
def test_a_sweep_has_a_curve_a_row_and_a_plot_for_each_arm(tmp_path):
    result = lr_sensitivity.run(Config(**TINY, remedies=("none", "qk_norm"), others=("sgd",)), tmp_path)
    (rows,) = result["tables"].values()
    assert [row["arm"] for row in rows] == ["adamw_torch, none", "adamw_torch, qk_norm", "sgd"]
    assert len(result["runs"]) == 3 * 3 and result["artifacts"] == ["loss-16x1.png", "attention-16x1.png"]
    assert all((tmp_path / name).stat().st_size > 5000 for name in result["artifacts"])
    for row in rows:
        runs = [r for r in result["runs"] if r["arm"] == row["arm"]]
        kept = [min(r["loss"], r["first"]) for r in runs]
        assert row["sensitivity"] == pytest.approx(sum(kept) / 3 - min(kept), abs=1e-4)
        assert all(r["attention_logit_max"] > 0 and math.isfinite(r["output_log_z"]) for r in runs)
    evidence = result["evidence"]
    by_arm = {row["arm"]: row["sensitivity"] for row in rows}
    assert evidence["ours"] == by_arm["adamw_torch, qk_norm"] and evidence["baseline"] == by_arm["adamw_torch, none"]
    assert "evidence" not in lr_sensitivity.run(
        Config(**TINY | {"remedies": ("qk_norm+z_loss",), "lrs": (1e-3, 1e-2)}), tmp_path
    )


@needs_text
def test_logits_grow_with_the_learning_rate_and_norms_hold_them():
    config = Config(**TINY | {"steps": 40, "sizes": ((32, 1),)})
    ids, held_out, vocab = lr_sensitivity.read_characters(None)
    text = (lr_sensitivity.rows_of(ids[:10_000], config.length), held_out, vocab)
    found = {
        (remedy, lr): train(config, Arm(remedy, "adamw_torch", None, remedy), (32, 1), lr, 0, text)
        for remedy in ("none", "qk_norm")
        for lr in (0.004, 0.25)
    }
    logit = {key: run["attention_logit_max"] for key, run in found.items()}
    assert logit["none", 0.25] > 50 * logit["none", 0.004]
    assert logit["qk_norm", 0.25] < 0.1 * logit["none", 0.25]


def test_the_shipped_recipe_spans_octaves():
    _, config = recipe.load("training/proxy_diagnostics-lr-sensitivity")
    ratios = {b / a for a, b in zip(config.lrs, config.lrs[1:], strict=False)}
    assert ratios == {2.0} and len(config.lrs) >= 6 and len(config.sizes) >= 2
