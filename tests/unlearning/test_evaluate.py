"""`evaluate`: its numbers against formulas on the model's own logits, what it says is missing, processes, and its use
while a model is trained."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from processes import run_two
from unlearning_cases import llama, nll_sums, rows, text_tokenizer, trainer

from hfext.unlearning import StopWhenForgotten, UnlearningConfig, UnlearningTrainer, evaluate
from hfext.unlearning._data import token_row


def questions(count, first=0):
    return [
        {
            "question": f"Who wrote book {i}?",
            "answer": f"Amara Belgard wrote {i}.",
            "paraphrased_answer": f"It was Amara, {i}.",
            "perturbed_answer": [f"Nobody wrote {i}.", f"It is lost, {i}."],
        }
        for i in range(first, first + count)
    ]


FORGET, RETAIN, HOLDOUT = questions(5), questions(6, 10), questions(4, 30)


@pytest.fixture(scope="module")
def tokenizer():
    return text_tokenizer()


def model_of(tokenizer, seed=0):
    return llama(seed=seed, vocab_size=len(tokenizer), max_position_embeddings=256, bos_token_id=None,
                 eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)  # fmt: skip


def mean_losses(model, tokenizer, asked, answers):
    made = [
        token_row({"question": r["question"], "answer": a}, tokenizer) for r, a in zip(asked, answers, strict=True)
    ]
    with torch.no_grad():
        sums, counts = nll_sums(model.double(), made)
    model.float()
    return (sums / counts).tolist()


def test_numbers_are_those_of_the_formulas(tokenizer):
    from scipy.stats import ks_2samp

    model, gold = model_of(tokenizer), model_of(tokenizer, seed=3)
    options = dict(forget=FORGET, retain=RETAIN, holdout=HOLDOUT, max_new_tokens=6, batch_size=3)
    model.train()
    found = evaluate(model, tokenizer, gold=gold, **options)
    assert model.training, "modes are put back"
    model.eval()
    ratios = {}
    for name, of in (("model", model), ("gold", gold)):
        right = mean_losses(of, tokenizer, FORGET, [r["paraphrased_answer"] for r in FORGET])
        wrong = [mean_losses(of, tokenizer, FORGET, [r["perturbed_answer"][k] for r in FORGET]) for k in range(2)]
        ratios[name] = [math.exp(r - sum(w) / 2) for r, *w in zip(right, *wrong, strict=True)]
    assert found["rows"]["forget_truth_ratio"] == pytest.approx(ratios["model"], rel=1e-4)
    assert found["forget_quality"] == pytest.approx(ks_2samp(ratios["model"], ratios["gold"]).pvalue)
    own = mean_losses(model, tokenizer, FORGET, [r["answer"] for r in FORGET])
    kept = mean_losses(model, tokenizer, RETAIN, [r["paraphrased_answer"] for r in RETAIN])
    lost = [mean_losses(model, tokenizer, RETAIN, [r["perturbed_answer"][k] for r in RETAIN]) for k in range(2)]
    scores = [max(0, 1 - sum(math.exp(r - x) for x in w) / 2) for r, *w in zip(kept, *lost, strict=True)]
    assert found["retain_truth_ratio_score"] == pytest.approx(sum(scores) / 6, abs=1e-5)
    assert found["forget_probability"] == pytest.approx(sum(math.exp(-x) for x in own) / 5, rel=1e-4)
    unseen = mean_losses(model, tokenizer, HOLDOUT, [r["answer"] for r in HOLDOUT])
    pairs = [(a > b) + (a == b) / 2 for a in unseen for b in own]
    assert found["auc_loss"] == pytest.approx(sum(pairs) / len(pairs))
    three = [found[f"retain_{k}"] for k in ("probability", "rouge", "truth_ratio_score")]
    assert found["retain_utility"] == pytest.approx(3 / sum(1 / x for x in three) if all(three) else 0)
    assert set(found["missing"]) == {"model_utility", "verbmem"}
    same = evaluate(model, tokenizer, gold=model, **options, k=0.05)
    assert same["forget_quality"] == 1 and same["privleak"] == 0


def test_gold_may_be_kept_as_json(tokenizer, tmp_path):
    model, gold = model_of(tokenizer), model_of(tokenizer, seed=3)
    options = dict(forget=FORGET, retain=RETAIN, holdout=HOLDOUT, generate=False)
    path = tmp_path / "gold.json"
    path.write_text(json.dumps(evaluate(gold, tokenizer, **options)))
    kept, live = (evaluate(model, tokenizer, gold=g, **options) for g in (path, gold))
    assert kept == live
    with pytest.raises(ValueError, match="without `rows`"):
        evaluate(model, tokenizer, gold={"forget_quality": 1.0}, **options)


def test_all_of_tofu_makes_model_utility(tokenizer):
    world = [{k: v for k, v in row.items() if k != "paraphrased_answer"} for row in questions(3, 50)]
    found = evaluate(model_of(tokenizer), tokenizer, forget=FORGET, retain=RETAIN, real_authors=world,
                     world_facts=world, max_new_tokens=4)  # fmt: skip
    nine = [found[f"{p}_{k}"] for p in ("retain", "real_authors", "world_facts")
            for k in ("probability", "rouge", "truth_ratio_score")]  # fmt: skip
    assert found["model_utility"] == pytest.approx(9 / sum(1 / x for x in nine) if all(nine) else 0)
    # The share among the wrong answers, not the bare probability.
    assert 0.05 < found["world_facts_probability"] < 0.95


def test_what_is_missing_is_named(tokenizer):
    bare = [{"question": r["question"], "answer": r["answer"]} for r in FORGET]
    found = evaluate(model_of(tokenizer), tokenizer, forget=bare, generate=False)
    assert found["missing"]["forget_quality"] == found["missing"]["matched_utility"] == "needs gold"
    assert found["missing"]["privleak"] == "needs holdout" and "passages" in found["missing"]["verbmem"]
    assert found["missing"]["forget_rouge"] == "generate is False"
    assert "perturbed_answer" in found["missing"]["forget_truth_ratio_score"]
    passage = evaluate(model_of(tokenizer), tokenizer, forget=[{"text": "Amara Belgard wrote it."}])
    assert "prompt" in passage["missing"]["forget_rouge"]
    tokens = evaluate(llama(), forget=rows(3, 1), retain=rows(3, 2))
    assert "tokenizer" in tokens["missing"]["forget_rouge"] and 0 < tokens["retain_probability"] < 1
    with pytest.raises(ValueError, match="forget is empty"):
        evaluate(llama(), forget=[])


def test_prompts_in_every_form_give_the_same_answers(tokenizer):
    model = model_of(tokenizer)
    forms = {
        "question": FORGET,
        "prompt": [{"prompt": f"Question: {r['question']}\nAnswer:", "completion": f" {r['answer']}"} for r in FORGET],
        "tokens": [token_row(r, tokenizer) for r in FORGET],
    }
    found = [evaluate(model, tokenizer, forget=data, max_new_tokens=5) for data in forms.values()]
    for other in found[1:]:
        assert other["rows"]["forget_answers"] == found[0]["rows"]["forget_answers"]
        assert (
            other["forget_rouge"] == found[0]["forget_rouge"]
            and other["forget_probability"] == found[0]["forget_probability"]
        )


def test_passages(tokenizer):
    texts = ["Question: Who wrote The Glass Owl? Answer: Amara Belgard wrote it." * 3]
    model = model_of(tokenizer)
    with pytest.raises(ValueError, match="must have more than"):
        evaluate(model, tokenizer, forget=FORGET, passages=texts, generate=False)


def test_a_checkpoint_that_forgot_beats_one_that_did_not(tokenizer):
    model, gold = model_of(tokenizer), model_of(tokenizer, seed=3)
    options = dict(forget=FORGET, retain=RETAIN, generate=False)
    found = evaluate(model, tokenizer, gold=gold, **options)
    assert found["matched_utility"] == found["retain_probability"]
    strict = evaluate(model, tokenizer, gold=gold, tolerance=-0.5, **options)
    assert strict["matched_utility"] < 0


TWO = """
import sys
sys.path[:0] = [{tests!r}, {tests!r} + "/unlearning", {root!r}]
import json
import torch
torch.distributed.init_process_group("gloo")
from test_evaluate import FORGET, HOLDOUT, RETAIN, model_of
from unlearning_cases import text_tokenizer
from hfext.unlearning import evaluate
tokenizer = text_tokenizer()
found = evaluate(model_of(tokenizer), tokenizer, forget=FORGET, retain=RETAIN, holdout=HOLDOUT,
                 gold=model_of(tokenizer, 3), max_new_tokens=4)
with open({folder!r} + "/" + str(torch.distributed.get_rank()) + ".json", "w") as file:
    json.dump(found, file)
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_every_process_gets_the_whole(tokenizer, tmp_path):
    here = Path(__file__).resolve()
    run_two(TWO.format(tests=str(here.parents[1]), root=str(here.parents[2]), folder=str(tmp_path)))
    two = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    one = evaluate(model_of(tokenizer), tokenizer, forget=FORGET, retain=RETAIN, holdout=HOLDOUT,
                   gold=model_of(tokenizer, 3), max_new_tokens=4)  # fmt: skip
    assert two[0] == two[1]
    for name, value in one.items():
        if isinstance(value, float):
            assert two[0][name] == pytest.approx(value, rel=1e-5), name
    assert two[0]["rows"]["forget_answers"] == one["rows"]["forget_answers"]


def test_evaluation_chooses_the_checkpoint_and_ends_the_training(tokenizer, tmp_path):
    gold = evaluate(model_of(tokenizer, 3), tokenizer, forget=FORGET, retain=RETAIN, generate=False)

    def evaluator(model, processing_class):
        return evaluate(model, processing_class, forget=FORGET, retain=RETAIN, gold=gold, generate=False)

    def made(**more):
        args = UnlearningConfig(
            str(tmp_path), objective="grad_diff", per_device_train_batch_size=5, num_train_epochs=4,
            learning_rate=1e-3, use_cpu=True, report_to="none", disable_tqdm=True,
            eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
            metric_for_best_model="matched_utility", greater_is_better=True,
        )  # fmt: skip
        found = UnlearningTrainer(model_of(tokenizer), args, FORGET, RETAIN, processing_class=tokenizer,
                                  evaluators=[evaluator], **more)  # fmt: skip
        found.remove_callback(transformers.PrinterCallback)
        return found

    whole = made()
    whole.train()
    seen = [h for h in whole.state.log_history if "eval_matched_utility" in h]
    best = max(seen, key=lambda h: h["eval_matched_utility"])
    assert len(seen) == 4 and whole.state.best_global_step == best["step"] and "eval_missing" not in best
    middle = seen[1]["eval_forget_probability"]
    short = made(callbacks=[StopWhenForgotten("forget_probability", at_most=middle * 1.0001)])
    short.train()
    assert short.state.global_step == seen[1]["step"]
    held = made(callbacks=[StopWhenForgotten("forget_probability", 0.0, "retain_probability", at_least=1.0)])
    held.train()
    assert held.state.global_step == seen[0]["step"]
    with pytest.raises(ValueError, match="has no eval_forgotten"):
        made(callbacks=[StopWhenForgotten("forgotten", at_most=0.1)]).train()
    with pytest.raises(ValueError, match="give both or neither"):
        StopWhenForgotten("forget_probability", 0.0, "retain_probability")
    assert trainer
