"""The conformance kit: correct processors pass it, and for every check there is a broken one that it catches."""

import random
import secrets

import pytest
import torch
from transformers import LogitsProcessor, TopKLogitsWarper

from hfext.decoding import conformance
from hfext.decoding._conformance_generate import Recorder, draft_model, generate, prompts_of
from hfext.decoding._conformance_replays import straight
from hfext.experiments import processor_conformance

INF = float("inf")


class KeepTop(LogitsProcessor):
    """A correct filter: the k best tokens of each row, ties by token id."""

    supports_continuous_batching = True

    def __init__(self, k=3, min_tokens_to_keep=1):
        self.k, self.least = k, min_tokens_to_keep

    def counts(self, input_ids, scores):
        return [self.k] * len(scores)

    def __call__(self, input_ids, scores):
        rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        count = torch.tensor(self.counts(input_ids, scores)).clamp(min=self.least)
        return scores.masked_fill(rank >= count[:, None], -INF)


class Surprised(KeepTop):
    """A correct filter with a state per text: the more surprising its last tokens were, the more it keeps.

    The memory of the last calls is keyed by the text without its last token; of rows that share a text and not their
    scores (encoder-decoder), the row in the same place is taken.
    """

    supports_continuous_batching = False

    def __init__(self, min_tokens_to_keep=1):
        super().__init__(min_tokens_to_keep=min_tokens_to_keep)
        self.memory = {}

    def remember(self, entries):
        self.memory.update(entries)

    def recall(self, text, row):
        rows = self.memory.get(text)
        return None if not rows else rows.get(row, next(iter(rows.values())))

    def counts(self, input_ids, scores):
        entries, counts = {}, []
        for row, text in enumerate(map(tuple, input_ids.tolist())):
            parent = self.recall(text[:-1], row)
            mean = 2.0 if parent is None else 0.5 * parent[0] - 0.5 * float(parent[1][text[-1]])
            entries.setdefault(text, {})[row] = (mean, scores[row].float().log_softmax(-1))
            counts.append(1 + int(4 * min(mean, 100.0)))
        self.remember(entries)
        return counts


class PromptPenalty(LogitsProcessor):
    """A correct processor that is given the prompts: one off the score of every token of a row's own prompt."""

    supports_continuous_batching = False

    def __init__(self, prompt_ids, prompt_mask):
        self.width = prompt_ids.shape[1]
        rows = zip(prompt_ids.tolist(), prompt_mask.tolist(), strict=True)
        self.tokens = {tuple(ids): [t for t, m in zip(ids, mask, strict=True) if m] for ids, mask in rows}

    def __call__(self, input_ids, scores):
        out = scores.clone()
        for row, text in enumerate(input_ids.tolist()):
            used = sorted(set(self.tokens[tuple(text[: self.width])]))
            out[row, used] -= 1
        return out


STATEFUL = {"reads_ids": True, "stateful": True, "min_tokens_to_keep": True}
CORRECT = {
    "filter": (KeepTop, {"min_tokens_to_keep": True}),
    "stateful filter": (Surprised, STATEFUL),
    "processor of prompts": (
        PromptPenalty,
        {"filters_only": False, "keeps_best": False, "reads_ids": True, "needs_prompt_ids": True},
    ),
}


@pytest.mark.parametrize("name", CORRECT)
def test_correct_processors_pass_every_check(name):
    make, facts = CORRECT[name]
    report = conformance.run(make, **facts)
    report.raise_for_failures()
    skipped = {o.check for o in report.outcomes if o.status == "skipped"}
    assert len(skipped) == {"filter": 0, "stateful filter": 1, "processor of prompts": 7}[name], skipped


class Filter(KeepTop):
    """Keeps what `kept` says, and otherwise the best token."""

    def __init__(self, **options):
        super().__init__(**options)

    def kept(self, ids, scores):
        raise NotImplementedError

    def __call__(self, ids, scores):
        best = scores == scores.amax(-1, keepdim=True)
        return scores.masked_fill(~(self.kept(ids, scores) | best), -INF)


class Doubles(KeepTop):
    def __call__(self, ids, scores):
        return super().__call__(ids, scores).double()


class InPlace(KeepTop):
    def __call__(self, ids, scores):
        return scores.copy_(super().__call__(ids, scores))


class RawMemory(KeepTop):
    def __call__(self, ids, scores):
        return super().__call__(ids, torch.as_strided(scores, scores.shape, (scores.shape[1], 1)))


class FlatView(KeepTop):
    def __call__(self, ids, scores):
        return super().__call__(ids, scores.view(-1).view_as(scores))


class Clamped(KeepTop):
    def __init__(self):
        super().__init__(k=8)

    def __call__(self, ids, scores):
        return super().__call__(ids, scores.clamp(min=-30.0))


class NothingCertain(KeepTop):
    def __call__(self, ids, scores):
        return super().__call__(ids, scores).masked_fill(scores.softmax(-1) > 0.9999, -INF)


class BareThreshold(KeepTop):
    def __call__(self, ids, scores):
        return scores.masked_fill(scores.softmax(-1) < 0.05, -INF)


class NotTheBest(KeepTop):
    def __call__(self, ids, scores):
        return super().__call__(ids, scores).scatter(1, scores.argmax(-1, keepdim=True), -INF)


class Boosts(KeepTop):
    def __call__(self, ids, scores):
        return super().__call__(ids, scores) + 1


class Positive(Filter):
    def kept(self, ids, scores):
        return scores > 0


class NoMinimum(KeepTop):
    def __init__(self, min_tokens_to_keep=1):
        super().__init__(k=1)


class Tail(KeepTop):
    def __call__(self, ids, scores):
        return scores.masked_fill(scores < scores.topk(4).values[:, -1:], -INF)


class Capped(KeepTop):
    def __call__(self, ids, scores):
        return super().__call__(ids, scores.masked_fill(torch.arange(scores.shape[1]) >= 65536, -INF))


class TiesByRow(KeepTop):
    def __call__(self, ids, scores):
        rows = [super(TiesByRow, self).__call__(ids, row[None]) for row in scores]
        for i in range(1, len(rows), 2):
            rows[i] = super().__call__(ids, scores[[i]].flip(1)).flip(1)
        return torch.cat(rows)


class LowIds(Filter):
    def kept(self, ids, scores):
        return (torch.arange(scores.shape[1]) < scores.shape[1] // 2).expand_as(scores)


class AboveUniform(Filter):
    def kept(self, ids, scores):
        return scores.softmax(-1) > 1 / scores.shape[1]


class BatchMaximum(Filter):
    def kept(self, ids, scores):
        return scores > scores.max() - 3


class ByRow(KeepTop):
    def counts(self, ids, scores):
        return [1 + row % 3 for row in range(len(scores))]


class ByHalf(KeepTop):
    def counts(self, ids, scores):
        return [1 if 2 * row < len(scores) else 20 for row in range(len(scores))]


class ByLength(KeepTop):
    def counts(self, ids, scores):
        return [1 + ids.shape[1] % 5] * len(scores)


class LastToken(KeepTop):
    def counts(self, ids, scores):
        return (1 + ids[:, -1] % 3).tolist()


class TwoLastTokens(KeepTop):
    def counts(self, ids, scores):
        return (1 + ids[:, -2] % 3).tolist()


class NumPy(KeepTop):
    def counts(self, ids, scores):
        return [3 + int(row.numpy().max() > 1e6) for row in scores]


class Draws(KeepTop):
    def counts(self, ids, scores):
        return [int(torch.randint(1, 20, (1,)))] * len(scores)


class Unseeded(KeepTop):
    def counts(self, ids, scores):
        return [secrets.randbelow(20) + 1] * len(scores)


class Counter(KeepTop):
    calls = 0

    def counts(self, ids, scores):
        self.calls += 1
        return [1 + self.calls % 4] * len(scores)


class CopiesAreItself(Counter):
    def __deepcopy__(self, memo):
        return self


class Undeclared(LastToken):
    supports_continuous_batching = None


class MeanOfTheBatch(Surprised):
    def remember(self, entries):
        entries = {text: dict(rows) for text, rows in entries.items()}
        values = [entry[0] for rows in entries.values() for entry in rows.values()]
        mean = sum(values) / len(values)
        self.memory.update({t: {r: (mean, e[1]) for r, e in rows.items()} for t, rows in entries.items()})


class StateOfTheRow(KeepTop):
    """The usual mistake: one number for each place in the batch."""

    mean = before = None

    def counts(self, ids, scores):
        if self.mean is None or len(self.mean) != len(scores):
            self.mean = torch.full((len(scores),), 2.0)
        else:
            self.mean = 0.5 * self.mean - 0.5 * self.before.gather(1, ids[:, -1:])[:, 0]
        self.before = scores.log_softmax(-1)
        return [1 + int(4 * mean) for mean in self.mean.clamp(max=100).tolist()]


class AnyFinished(KeepTop):
    def counts(self, ids, scores):
        return [1 if (ids[:, -1:] == 0).any() else 3] * len(scores)


class FirstScoresCount(Surprised):
    def remember(self, entries):
        for text, rows in entries.items():
            self.memory.setdefault(text, rows)


class OneRowForAText(Surprised):
    def recall(self, text, row):
        rows = self.memory.get(text)
        return rows and rows[max(rows)]


READS = {"reads_ids": True, "min_tokens_to_keep": True}
PLANTED = {
    "shape_dtype_and_device_are_kept": (Doubles, {}),
    "half_precision_is_sane": (Doubles, {}),
    "inputs_are_not_modified": (InPlace, {}),
    "strided_scores_equal_contiguous_ones": (RawMemory, {}),
    "expanded_scores_equal_a_copy": (FlatView, {}),
    "forbidden_tokens_stay_forbidden": (Clamped, {}),
    "rows_with_few_finite_scores_work": (NothingCertain, {}),
    "every_row_keeps_a_token": (BareThreshold, {}),
    "the_best_token_is_kept": (NotTheBest, {}),
    "survivors_are_unchanged": (Boosts, {}),
    "a_constant_changes_nothing": (Positive, {}),
    "log_probabilities_equal_logits": (Positive, {}),
    "min_tokens_to_keep_is_honoured": (NoMinimum, {"min_tokens_to_keep": True}),
    "tiny_vocabularies_work": (Tail, {}),
    "large_vocabularies_work": (Capped, {}),
    "ties_are_deterministic": (TiesByRow, {}),
    "renaming_tokens_renames_the_result": (LowIds, {}),
    "padding_the_vocabulary_changes_nothing": (AboveUniform, {}),
    "rows_are_independent": (BatchMaximum, {}),
    "permuted_rows_give_permuted_results": (ByRow, {}),
    "left_padding_changes_nothing": (ByLength, READS),
    "a_prompt_without_ids_works": (LastToken, READS),
    "autograd_modes_agree": (NumPy, {}),
    "global_generators_are_left_alone": (Draws, {}),
    "results_are_deterministic": (Draws, {}),
    "the_facts_are_true": (LastToken, {}),
    "copies_are_independent": (CopiesAreItself, STATEFUL),
    "the_continuous_batching_flag_is_consistent": (Undeclared, READS),
    "a_batch_replays_as_its_rows": (MeanOfTheBatch, STATEFUL),
    "rows_may_change_places_at_every_step": (StateOfTheRow, STATEFUL),
    "beams_may_be_reordered_and_duplicated": (StateOfTheRow, STATEFUL),
    "finished_rows_do_not_disturb_live_ones": (AnyFinished, READS),
    "left_padded_texts_replay_as_bare_ones": (ByLength, READS),
    "rejected_drafts_leave_no_trace": (Counter, STATEFUL),
    "a_draft_model_leaves_no_trace": (FirstScoresCount, STATEFUL),
    "a_call_may_be_repeated": (StateOfTheRow, STATEFUL),
    "an_object_may_be_used_again": (StateOfTheRow, STATEFUL),
    "rows_with_one_prefix_and_different_scores_stay_apart": (OneRowForAText, STATEFUL),
    "generate_samples_several_sequences": (ByRow, {}),
    "generate_pads_as_if_alone": (ByLength, READS),
    "generate_from_encoder_inputs_as_if_alone": (OneRowForAText, STATEFUL),
    "generate_with_beams": (StateOfTheRow, STATEFUL),
    "generate_with_beams_as_if_alone": (ByHalf, {}),
    "generate_samples_with_beams": (NoMinimum, {}),
    "generate_with_prompt_lookup_equals_greedy": (StateOfTheRow, STATEFUL),
    "generate_with_a_draft_model_equals_greedy": (FirstScoresCount, STATEFUL),
    "generate_twice_equals_fresh_objects": (Counter, STATEFUL),
    "generate_follows_its_seed": (Unseeded, {}),
    "generate_makes_one_token": (TwoLastTokens, READS),
}


# Planted bugs that show as an exception.
RAISE = {
    "expanded_scores_equal_a_copy",
    "tiny_vocabularies_work",
    "a_prompt_without_ids_works",
    "autograd_modes_agree",
    "generate_makes_one_token",
}


@pytest.mark.parametrize("check", conformance.CHECKS)
def test_every_check_catches_a_planted_bug(check):
    make, facts = PLANTED[check]
    (outcome,) = conformance.run(make, checks=[check], **facts).outcomes
    assert outcome.status == "failed" and outcome.reason
    assert ("Error: " in outcome.reason) == (check in RAISE), outcome.reason


def test_there_are_at_least_25_checks_and_each_says_what_must_hold():
    assert set(PLANTED) == set(conformance.CHECKS) and len(PLANTED) >= 25
    for check in conformance.CHECKS.values():
        assert check.__doc__ and check.__doc__.endswith(".") and "\n" not in check.__doc__.strip()


def test_the_usual_stateful_mistake_is_seen_in_every_mode():
    expected = {
        "rows_may_change_places_at_every_step",
        "beams_may_be_reordered_and_duplicated",
        "rejected_drafts_leave_no_trace",
        "a_draft_model_leaves_no_trace",
        "an_object_may_be_used_again",
        "generate_with_beams",
        "generate_with_prompt_lookup_equals_greedy",
        "generate_with_a_draft_model_equals_greedy",
        "generate_twice_equals_fresh_objects",
    }
    assert {o.check for o in conformance.run(StateOfTheRow, checks=expected, **STATEFUL).failures} == expected


def test_a_row_state_that_is_right_alone_passes_where_rows_stay():
    checks = ["a_batch_replays_as_its_rows", "rows_are_independent", "generate_samples_several_sequences"]
    conformance.run(StateOfTheRow, checks=checks, **STATEFUL).raise_for_failures()


def test_states_matter_in_the_replays():
    """Otherwise the checks of stateful processors would compare constants."""
    subject = conformance.Subject(Surprised, conformance.Facts(**STATEFUL))
    texts = [(5, 9, 3) + tail for tail in ((4, 8, 6), (30, 8, 6), (60, 8, 6))]
    kept = [[int(straight(subject, text[:n], 3).isfinite().sum()) for n in range(3, len(text) + 1)] for text in texts]
    assert len({tuple(row) for row in kept}) == 3


@pytest.mark.parametrize("draft", ["prompt lookup", "model"])
def test_some_drafts_of_the_assisted_checks_are_right_and_some_wrong(draft):
    subject = conformance.Subject(KeepTop, conformance.Facts())
    prompt = [prompts_of(subject)[1]]
    if draft == "model":
        options = {"draft": draft_model(64)}
    else:
        plain = generate(subject, KeepTop(), prompts=prompt, max_new_tokens=10)
        prompt = [tuple(plain[0].tolist()) + prompt[0]]
        options = {"prompt_lookup_num_tokens": 3}
    recorder = Recorder(KeepTop())
    out = generate(subject, recorder, prompts=prompt, max_new_tokens=10, **options)[0].tolist()
    asked = [tuple(ids[0].tolist()) for ids, _, _ in recorder.calls]
    drafted = [text for text in asked if len(text) > len(prompt[0])]
    right = [text for text in drafted if text == tuple(out[: len(text)])]
    assert 0 < len(right) and (draft == "prompt lookup" or len(right) < len(drafted))


def test_reports_count_and_explain():
    checks = ["rows_are_independent", "min_tokens_to_keep_is_honoured", "ties_are_deterministic"]
    report = conformance.run(KeepTop, checks=checks, exempt={"ties_are_deterministic": "not today"})
    assert report.name == "KeepTop" and report.failures == []
    assert report.count("skipped") == 2 and report.count("passed") == 1
    assert "skipped ties_are_deterministic" in str(report) and "not today" in str(report)
    report.raise_for_failures()
    broken = conformance.run(BatchMaximum, name="mine", checks=["rows_are_independent"])
    assert str(broken).startswith("mine: 0 passed, 1 failed, 0 skipped")
    with pytest.raises(AssertionError, match=r"mine fails 1 of 1 checks\n- rows_are_independent: row 0 alone"):
        broken.raise_for_failures()
    assert broken.failures[0].requirement.startswith("A batch gives what its rows give alone")


def test_an_exception_is_a_failure_of_its_check():
    (outcome,) = conformance.run(LastToken, checks=["a_prompt_without_ids_works"], reads_ids=True).outcomes
    assert outcome.reason.startswith("IndexError")


def test_unknown_checks_and_facts_are_refused():
    with pytest.raises(KeyError, match="Did you mean 'rows_are_independent'"):
        conformance.run(KeepTop, checks=["row_are_independent"])
    with pytest.raises(KeyError, match="No check is called 'luck'"):
        conformance.run(KeepTop, exempt={"luck": "no reason"})
    with pytest.raises(TypeError, match="statefull"):
        conformance.run(KeepTop, statefull=True)


def test_the_example_of_the_docstring_and_that_a_run_leaves_the_global_generators_alone():
    states = torch.get_rng_state(), random.getstate()
    report = conformance.run(lambda **options: TopKLogitsWarper(5, **options), min_tokens_to_keep=True)
    assert report.name == "TopKLogitsWarper" and report.count("passed") == len(conformance.CHECKS)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


def test_the_experiment_shows_failures_with_numbers(tmp_path):
    config = processor_conformance.Config(names=["top_h 0.4"])
    tables = processor_conformance.run(config, tmp_path)["tables"]
    assert [row["check"] for row in tables["Failures"]] == ["generate_samples_with_beams"]
    assert all(row["expected"] != row["found"] for row in tables["Smallest examples, computed"])
    with pytest.raises(ValueError, match="Did you mean 'top_h 0.4'"):
        processor_conformance.Config(names=["top_h 0.5"])
