"""Token scores against sums written out, and rows that do not feel their batch, padding, order or process."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_two
from transformers import EvalPrediction, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hfext.metrics import _token_scores
from hfext.metrics._compute_metrics import answer_metrics
from hfext.metrics._membership import loss
from hfext.metrics._shards import all_rows, own_rows
from hfext.metrics._token_scores import label_log_probs, score_rows, token_scores
from hfext.metrics.min_k import min_k

ORDERS = {"renyi": [0.5, 1, 2, math.inf], "modified": [0.5, 1, 2], "clamp": 0.0}


def some_rows(count=7, vocab=128, seed=0):
    g = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        ids = g.integers(3, vocab, 5 + 4 * (i * 5 % count)).tolist()
        prompt = i % 3
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def test_each_score_is_its_sum_over_the_vocabulary():
    logits, labels = torch.randn(2, 4, 6) * 2, torch.tensor([[5, 1, -100, 3], [-100, -100, 0, -100]])
    found = token_scores(logits, labels, **ORDERS)
    assert [len(x) for x in found.log_p] == [2, 1]
    for row, entry, position, y in [(0, 0, 0, 1), (0, 1, 2, 3), (1, 0, 1, 0)]:
        z = logits[row, position].double().numpy()
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        rest = np.arange(6) != y
        q, py = p[rest], p[y]
        expected = {"log_p": np.log(py), "mean": (p * np.log(p)).sum(), "correct": p.argmax() == y}
        expected["std"] = np.sqrt((p * np.log(p) ** 2).sum() - expected["mean"] ** 2)
        for name, value in expected.items():
            assert getattr(found, name)[row][entry].item() == pytest.approx(value, abs=1e-12)
        entropies = {0.5: 2 * np.log(np.sqrt(p).sum()), 1: -(p * np.log(p)).sum(), 2: -np.log((p**2).sum())}
        for a, value in {**entropies, math.inf: -np.log(p.max())}.items():
            assert found.renyi[a][row][entry].item() == pytest.approx(value, abs=1e-12)
        for a in (0.5, 2):
            b = abs(1 - a)
            value = -((1 - py) * py**b - (1 - py) + (q * (1 - q) ** b).sum() - q.sum()) / b
            assert found.modified[a][row][entry].item() == pytest.approx(value, abs=1e-12)
        value = -(1 - py) * np.log(py) - (q * np.log(1 - q)).sum()
        assert found.modified[1][row][entry].item() == pytest.approx(value, abs=1e-12)


def test_small_pieces_give_the_same(monkeypatch):
    logits, labels = torch.randn(3, 9, 11), torch.randint(0, 11, (3, 9))
    whole, reduced = token_scores(logits, labels, **ORDERS), label_log_probs(logits, labels)
    monkeypatch.setattr(_token_scores, "_ENTRIES", 23)
    torch.testing.assert_close(vars(token_scores(logits, labels, **ORDERS)), vars(whole), rtol=0, atol=1e-14)
    torch.testing.assert_close(label_log_probs(logits, labels), reduced, rtol=0, atol=0)


def test_impossible_tokens_and_a_certain_distribution_are_finite():
    logits = torch.tensor([[[0.0, -math.inf, -math.inf], [1e4, 0.0, -1e4], [0.0, 0.0, 0.0]]])
    found = token_scores(logits, torch.tensor([[0, 0, 0]]), **{**ORDERS, "clamp": 1e-10})
    for values in (found.mean, found.std, *found.renyi.values(), *found.modified.values()):
        assert values[0].isfinite().all() and (values[0].abs() < 1e-3).all()
    exact = token_scores(logits, torch.tensor([[0, 0, 0]]), **ORDERS)
    for values in (*exact.renyi.values(), *exact.modified.values()):
        torch.testing.assert_close(values[0], torch.zeros(2, dtype=torch.float64))


def test_bf16_logits_are_summed_in_float64():
    logits, labels = torch.randn(2, 5, 128).bfloat16(), torch.randint(0, 128, (2, 5))
    found, expected = token_scores(logits, labels, **ORDERS), token_scores(logits.double(), labels, **ORDERS)
    assert found.log_p[0].dtype == torch.float64
    torch.testing.assert_close(vars(found), vars(expected), rtol=0, atol=0)


@pytest.mark.parametrize("factory", ["tiny_llama", "tiny_gpt2"])
def test_rows_do_not_feel_batch_padding_or_order(factory, request):
    model, rows = request.getfixturevalue(factory)(), some_rows()
    alone = [
        token_scores(model(torch.tensor([r["input_ids"]])).logits, torch.tensor([r["labels"]]), **ORDERS) for r in rows
    ]
    backwards = range(len(rows) - 1, -1, -1)
    for batch_size, order in [(1, range(len(rows))), (3, backwards), (8, [3, 0, 6, 1, 5, 2, 4])]:
        found = score_rows(model, [rows[i] for i in order], batch_size, **ORDERS)
        for place, i in enumerate(order):
            for name in ("log_p", "mean", "std"):
                torch.testing.assert_close(
                    getattr(found, name)[place], getattr(alone[i], name)[0], rtol=1e-5, atol=1e-5
                )
            for name in ("renyi", "modified"):
                for a, values in getattr(found, name).items():
                    torch.testing.assert_close(values[place], getattr(alone[i], name)[a][0], rtol=1e-5, atol=1e-5)


def test_loss_is_the_models_own_and_the_mode_comes_back(tiny_gpt2):
    model, row = tiny_gpt2().train(), some_rows()[3]
    model.transformer.h[0].eval()
    modes = [m.training for m in model.modules()]
    found = score_rows(model, [row])
    assert [m.training for m in model.modules()] == modes
    own = model.eval()(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
    assert -found.log_p[0].mean().item() == pytest.approx(own.item(), rel=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_bad_rows_and_options_are_named(tiny_llama):
    model, ids = tiny_llama(), [5, 6, 7]
    for row, message in [
        ({"input_ids": ids, "labels": [5, -100, -100]}, "Row 1 has no scored token"),
        ({"input_ids": ids, "labels": [5, 6]}, "Row 1 has 3 input_ids and 2 labels"),
        ({"input_ids": [], "labels": []}, "Row 1 has 0 input_ids"),
        ({"input_ids": ids, "labels": [5, 6, 128]}, r"in \[0, 128\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            score_rows(model, [{"input_ids": ids, "labels": ids}, row])
    good = [{"input_ids": ids, "labels": ids}]
    for options, message in [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"renyi": [0]}, "renyi has the order 0"),
        ({"modified": [math.inf]}, "modified has the order inf"),
        ({"clamp": 0.5}, "clamp is 0.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            score_rows(model, good, **options)
    assert len(score_rows(model, [])) == 0
    with pytest.raises(ValueError, match="must be .rows, T, V. and .rows, T."):
        token_scores(torch.randn(2, 3, 5), torch.zeros(2, 4, dtype=torch.long))


def test_the_stock_trainer_gathers_log_probs_and_not_logits(tiny_llama, tmp_path):
    model, shapes = tiny_llama(), []
    sets = {"forget": some_rows(7), "retain": some_rows(4, seed=1)}

    def compute_metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return answer_metrics(prediction)

    def collate(some):
        return _token_scores.batch_of(some, torch.device("cpu"))

    args = TrainingArguments(str(tmp_path), per_device_eval_batch_size=3, report_to="none", use_cpu=True)
    trainer = Trainer(
        model,
        args,
        eval_dataset=sets,
        data_collator=collate,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=label_log_probs,
    )
    found = trainer.evaluate()
    for name, rows in sets.items():
        log_p = score_rows(model, rows).log_p
        expected = {
            "probability": torch.stack([x.mean().exp() for x in log_p]).mean().item(),
            "loss_per_row": loss(log_p).mean().item(),
            "min_k": min_k(log_p).mean().item(),
        }
        for key, value in expected.items():
            assert found[f"eval_{name}_{key}"] == pytest.approx(value, rel=1e-5)
    assert shapes == [(len(rows), max(len(r["input_ids"]) for r in rows)) for rows in sets.values()]


def test_metrics_of_whole_logits_are_refused():
    with pytest.raises(ValueError, match="preprocess_logits_for_metrics=label_log_probs"):
        answer_metrics(EvalPrediction(np.zeros((2, 3, 5)), np.zeros((2, 3), dtype=int)))


def test_rows_over_processes_come_back_in_order(monkeypatch):
    for world in (1, 2, 3, 5):
        shares = []
        for rank in range(world):
            monkeypatch.setattr("hfext.metrics._shards._world", lambda rank=rank, world=world: (rank, world))
            shares.append(own_rows(7))
        assert len({len(share) for share in shares}) == 1

        def gather(parts, _, shares=shares):
            parts[:] = shares

        monkeypatch.setattr("torch.distributed.all_gather_object", gather)
        assert all_rows(shares[-1], 7) == list(range(7))


TWO_PROCESSES = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r}); sys.path.insert(0, {above!r})
from test_token_scores import *
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
model = two_process_model()
torch.save([vars(score_rows(model, some_rows(n), 2, **ORDERS)) for n in (1, 7)], {folder!r} + f"/{{rank}}.pt")
torch.distributed.destroy_process_group()
"""


def two_process_model():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, **size))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_equal_one(tmp_path):
    here = Path(__file__).parent
    run_two(TWO_PROCESSES.format(tests=str(here), above=str(here.parent), folder=str(tmp_path)))
    model = two_process_model()
    one = [vars(score_rows(model, some_rows(n), 2, **ORDERS)) for n in (1, 7)]
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), one, rtol=1e-5, atol=1e-5)
