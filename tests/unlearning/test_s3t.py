"""S3T: orders of slices against enumeration and simulation; bitwise equality with training that never saw a row."""

import gc
import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import Trainer, TrainerCallback, TrainingArguments

from hfext.unlearning._s3t_layers import layer_groups, own_randomness
from hfext.unlearning._s3t_rows import readable_rows, row_digests
from hfext.unlearning._s3t_sequences import (
    best_prefix,
    cyclic_sequences,
    expected_deletions,
    matched_sequences,
    partition,
    sequence_score,
    simulated_deletions,
    stages,
    surviving,
)
from hfext.unlearning._s3t_store import stage_seed
from hfext.unlearning.s3t import S3TConfig, S3TTrainer, combine

# sequences


@pytest.mark.parametrize(
    "slices, budget", [(1, 1), (4, 1), (4, 3), (4, 4), (4, 5), (4, 13), (4, 24), (3, 100), (5, 60)]
)
def test_sequences_are_different_permutations_with_first_slices_shared_evenly(slices, budget):
    found = cyclic_sequences(slices, budget)
    assert len(found) == len(set(found)) == min(budget, math.factorial(slices))
    assert all(sorted(s) == list(range(slices)) for s in found)
    for depth in range(1, slices + 1):
        # Every prefix is continued about equally often, and up to L sequences differ at the first slice already.
        counts = np.unique([s[:depth] for s in found], axis=0, return_counts=True)[1]
        assert counts.max() - counts.min() <= 1
    assert len({s[0] for s in found}) == min(budget, slices)


def test_rotations_and_all_permutations():
    assert cyclic_sequences(4, 4) == [(0, 1, 2, 3), (3, 0, 1, 2), (2, 3, 0, 1), (1, 2, 3, 0)]
    assert sorted(cyclic_sequences(4, 24)) == sorted(itertools.permutations(range(4)))


def test_shared_prefixes_are_trained_once_and_parents_first():
    found = stages([(0, 1, 2), (0, 2, 1), (1, 2, 0)])
    assert found == [(0,), (0, 1), (0, 1, 2), (0, 2), (0, 2, 1), (1,), (1, 2), (1, 2, 0)]
    assert len(stages(cyclic_sequences(4, 24))) == 4 + 12 + 24 + 24


def test_prefixes_end_before_the_first_deleted_slice():
    assert surviving((2, 0, 1), {1}) == (2, 0) and surviving((2, 0, 1), {2, 1}) == () and surviving((2,), ()) == (2,)
    assert best_prefix(cyclic_sequences(4, 4), {0}) == (1, 2, 3)
    assert best_prefix(cyclic_sequences(4, 2), {0, 3}) == ()


def test_the_score_and_a_matching_by_brute_force():
    p = [0.4, 0.3, 0.2, 0.1]
    assert sequence_score(p, 2) == pytest.approx(0.6**2 + 2 * 0.3**2 + 3 * 0.1**2)
    found = matched_sequences(p, 4, deletions=2)
    for place in range(4):
        assert sorted(s[place] for s in found) == [0, 1, 2, 3]
    assert [sequence_score([p[i] for i in s], 2) for s in found] == sorted(
        (sequence_score([p[i] for i in s], 2) for s in found), reverse=True
    )
    # The second round alone: the best of all ways to give (0,), (1,), (2,), (3,) four other slices.
    second = {s[0]: s[1] for s in found}
    ways = [w for w in itertools.permutations(range(4)) if all(i != j for i, j in enumerate(w))]
    worth = [sum(2 * (1 - p[i] - p[j]) ** 2 for i, j in enumerate(w)) for w in ways]
    assert sum(2 * (1 - p[i] - p[j]) ** 2 for i, j in second.items()) == pytest.approx(max(worth))


@pytest.mark.parametrize("slices", [2, 3, 5, 7])
def test_matchings_are_latin_squares_and_outlive_rotations(slices):
    p = np.random.default_rng(slices).dirichlet(np.ones(slices))
    found = matched_sequences(p, slices)
    assert all(sorted(s[i] for s in found) == list(range(slices)) for i in range(slices))
    few = matched_sequences(p, 1)
    assert few == found[:1]


def test_unequal_risks_are_put_last():
    p = [0.7, 0.1, 0.1, 0.1]
    best = matched_sequences(p, 1, deletions=10)[0]
    assert best[-1] == 0
    ours = simulated_deletions([best], 1, 400, probabilities=p).mean()
    theirs = simulated_deletions([(0, 1, 2, 3)], 1, 400, probabilities=p).mean()
    assert ours == pytest.approx(10, rel=0.2) and theirs == pytest.approx(1 / 0.7, rel=0.2)


@pytest.mark.parametrize("until", ["all", "first"])
@pytest.mark.parametrize("shards, slices, budget", [(5, 6, 1), (5, 6, 3), (5, 6, 6), (5, 6, 9), (1, 4, 2), (3, 1, 1)])
def test_the_deletion_law_is_within_three_percent_of_simulation(shards, slices, budget, until):
    counts = simulated_deletions(cyclic_sequences(slices, budget), shards, 3000, until=until)
    assert counts.mean() == pytest.approx(expected_deletions(shards, slices, budget, until), rel=0.03)


def test_the_deletion_law_in_closed_form():
    assert expected_deletions(5, 6, 1) == pytest.approx(68.5)
    assert expected_deletions(5, 6, 3) == pytest.approx(30 * sum(1 / i for i in range(1, 16)))
    assert expected_deletions(5, 6, 6) == expected_deletions(5, 6, 60) == pytest.approx(119.85, abs=0.01)
    assert expected_deletions(7, 4, 1, "first") == pytest.approx(4), "SISA: a first slice is hit once in L"
    assert expected_deletions(1, 6, 4, "first") == pytest.approx(expected_deletions(1, 6, 4))


def test_partitions_are_disjoint_even_and_grouped_by_prior():
    parts = partition(53, 3, 4, seed=1)
    sizes = [len(p) for shard in parts for p in shard]
    assert sorted(sum((p for shard in parts for p in shard), [])) == list(range(53)) and max(sizes) - min(sizes) <= 1
    assert parts == partition(53, 3, 4, seed=1) != partition(53, 3, 4, seed=2)
    prior = [i % 7 for i in range(53)]
    for shard in partition(53, 3, 4, 1, prior):
        for low, high in itertools.pairwise(shard):
            assert max(prior[i] for i in low) <= min(prior[i] for i in high)
    with pytest.raises(ValueError, match="11 rows but 3 shards of 4 slices"):
        partition(11, 3, 4, 0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: cyclic_sequences(0, 1), "slices is 0"),
        (lambda: cyclic_sequences(3, 0), "budget is 0"),
        (lambda: matched_sequences([0.5, 0.5], 3), r"budget is 3 but must be in \[1, 2\]"),
        (lambda: matched_sequences([0.5, -0.5], 1), "probabilities"),
        (lambda: expected_deletions(1, 2, 1, "some"), "until is 'some'"),
        (lambda: S3TConfig(shards=0), "shards is 0"),
        (lambda: S3TConfig(budget=1.5), "budget is 1.5"),
        (lambda: S3TConfig(ensemble="sum"), "ensemble is 'sum'"),
    ],
)
def test_bad_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_layers_are_grouped_from_the_top():
    names = [f"model.layers.{i}.mlp.experts.{e}.lora_A" for i in range(6) for e in range(2)]
    assert layer_groups(names, 3) == [[5, 4], [3, 2], [1, 0]]
    with pytest.raises(ValueError, match="slices is 4 but must divide the 6 layers"):
        layer_groups(names, 4)
    with pytest.raises(ValueError, match="lm_head.lora_A lies outside"):
        layer_groups([*names, "lm_head.lora_A"], 3)
    with pytest.raises(NotImplementedError, match="encoder-decoder"):
        layer_groups(["encoder.block.0.w", "decoder.block.0.w"], 1)


def test_seeds_depend_on_shard_and_prefix():
    seeds = {stage_seed(s, k, p) for s in (0, 1) for k in (0, 1) for p in ((1,), (1, 2), (2, 1), (12,))}
    assert len(seeds) == 16 and all(0 <= s < 2**31 for s in seeds)


def test_mean_and_vote():
    p = torch.tensor([[[0.6, 0.4]], [[0.6, 0.4]], [[0.0, 1.0]]])
    torch.testing.assert_close(combine(p, "average"), torch.tensor([[0.4, 0.6]]))
    torch.testing.assert_close(combine(p, "vote"), torch.tensor([[2 / 3, 1 / 3]]))


# training


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """Every stage ends with a garbage collection, which would look through all that the suite has imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def rows_of(n=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 9, (n,), generator=generator).tolist()
    ids = [torch.randint(3, 128, (k,), generator=generator).tolist() for k in lengths]
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids]


def arguments(folder, **fields):
    options = dict(num_train_epochs=1, per_device_train_batch_size=6, learning_rate=1e-2, seed=3) | fields
    return TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False, **options
    )


def lora(**fields):
    options = dict(r=4, lora_alpha=8, lora_dropout=0.1, use_rslora=True, target_modules=["q_proj", "v_proj"])
    return LoraConfig(**(options | fields))


def trainer_of(model, folder, rows=None, shards=2, slices=2, budget=None, peft_config=None, args=None, **own):
    config = S3TConfig(shards=shards, slices=slices, budget=budget)
    rows = rows_of() if rows is None else rows
    return S3TTrainer(model, arguments(folder, **(args or {})), rows, peft_config or lora(), config, **own)


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.safetensors"))


def tensors(folder):
    from safetensors.torch import load_file

    return {name: load_file(folder / name) for name in files(folder)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


PROBE = {"input_ids": torch.arange(5, 17)[None]}


def test_after_a_deletion_outputs_are_those_of_training_that_never_had_the_slice(tiny_llama, tmp_path):
    rows = rows_of()
    ours = trainer_of(tiny_llama(), tmp_path / "a", rows)
    assert ours.train() == {0: (0, 1), 1: (0, 1)}
    before = ours.predict(PROBE)
    victim = ours.rows(0, (0,))[0]
    report = ours.delete(victim)
    assert (report.deleted, report.slices, report.dead, report.retrain_needed) == ([victim], [(0, 0)], [], False)
    assert report.active == {0: (1,), 1: (0, 1)}
    assert report.removed == ["shard0/0-1.safetensors", "shard0/0.safetensors", "shard0/1-0.safetensors"]
    assert not set(report.removed) & set(files(tmp_path / "a")) and "shard0/1.safetensors" in files(tmp_path / "a")
    after = ours.predict(PROBE)
    assert not torch.equal(before, after)

    # Other rows in place of the slice, and then the same deletion.
    others = rows_of(seed=9)
    slice_rows = ours._state["rows"][0][0]
    changed = [others[i] if i in slice_rows else row for i, row in enumerate(rows)]
    theirs = trainer_of(tiny_llama(), tmp_path / "b", changed)
    theirs.train()
    assert not torch.equal(theirs.predict(PROBE), before)
    theirs.delete([victim])
    assert torch.equal(theirs.predict(PROBE), after)

    # A dataset whose rows of that slice cannot even be read from then on, trained up to the prefix alone.
    class Missing(list):
        forbidden = ()

        def __getitem__(self, i):
            if i in self.forbidden:
                raise AssertionError("a deleted row was read")
            return super().__getitem__(i)

    trainer_of(tiny_llama(), tmp_path / "c", rows).delete(slice_rows)
    missing = Missing(rows)
    missing.forbidden = slice_rows
    never = trainer_of(tiny_llama(), tmp_path / "c", missing)
    assert never.train() == report.active
    assert torch.equal(never.predict(PROBE), after)


def test_a_stage_moves_its_own_layers_and_sees_its_own_rows(tiny_llama, tmp_path):
    seen, trained = [], []

    class Watched(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            loss = super().training_step(model, inputs, *args, **kwargs)
            ids = [
                row[mask.bool()].tolist()
                for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
            ]
            seen[-1].extend(ids)
            trained[-1].update(n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0)
            return loss

        def train(self, *args, **kwargs):
            seen.append([]), trained.append(set())
            return super().train(*args, **kwargs)

    rows = rows_of()
    model = tiny_llama(num_hidden_layers=4)
    frozen = {n: p.clone() for n, p in model.named_parameters()}
    s3t = trainer_of(model, tmp_path, rows, shards=1, trainer_class=Watched, args={"num_train_epochs": 1})
    s3t.train()
    expected = [(0,), (0, 1), (1,), (1, 0)]
    for prefix, ids, names in zip(expected, seen, trained, strict=True):
        assert sorted(ids) == sorted(rows[i]["input_ids"] for i in s3t.rows(0, prefix))
        layers = {int(n.split("layers.")[1].split(".")[0]) for n in names}
        assert layers == ({3, 2} if len(prefix) == 1 else {1, 0}) and all(".lora_" in n for n in names)
    stored = tensors(tmp_path)
    assert {len(t) for name, t in stored.items() if "shard" in name} == {2 * 2 * 2}
    # The base is as it was, and the second stage stands on the first.
    base = s3t.model.unload()
    assert all(torch.equal(p, frozen[n]) for n, p in base.named_parameters())


def test_what_is_served_is_the_stack_of_stages_and_an_empty_one_is_the_base(tiny_llama, tmp_path):
    model = tiny_llama()
    base = tiny_llama()(**PROBE).logits
    s3t = trainer_of(model, tmp_path, shards=1)
    s3t.train()
    stored = tensors(tmp_path)
    served = s3t.model_for(0)
    for name, p in served.named_parameters():
        if "lora" in name:
            stage = "shard0/0" if "layers.1." in name else "shard0/0-1"
            assert torch.equal(p, stored[f"{stage}.safetensors"][name])
    assert not torch.equal(served(**PROBE).logits, base)
    with served.disable_adapter():
        assert torch.equal(served(**PROBE).logits, base)
    report = s3t.delete(range(24))
    assert report.retrain_needed and report.dead == [0] and files(tmp_path) == ["initial.safetensors"]
    # The weights in memory are gone too.
    assert torch.equal(s3t.model(**PROBE).logits, base)
    for call in (lambda: s3t.predict(PROBE), lambda: s3t.model_for(0)):
        with pytest.raises(ValueError, match="no stage left|no shard has a stage left"):
            call()


def test_the_served_adapter_goes_through_the_files_of_peft(tiny_llama, tmp_path):
    from peft import PeftModel

    s3t = trainer_of(tiny_llama(), tmp_path / "a", shards=1)
    s3t.train()
    s3t.delete(s3t.rows(0, (0,))[0])
    expected = s3t.model_for(0)(**PROBE).logits
    s3t.model_for(0).save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert torch.equal(loaded(**PROBE).logits, expected)


def test_an_interrupted_run_goes_on_to_the_same_bits(tiny_llama, tmp_path):
    straight = trainer_of(tiny_llama(), tmp_path / "a", shards=1, budget=2)
    straight.train()

    class Stop(TrainerCallback):
        steps = 0

        def on_step_end(self, *args, **kwargs):
            Stop.steps += 1
            if Stop.steps == 5:
                raise KeyboardInterrupt

    broken = trainer_of(tiny_llama(), tmp_path / "b", shards=1, budget=2, callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    done = files(tmp_path / "b")
    assert 1 < len(done) < len(files(tmp_path / "a"))
    stamps = {name: (tmp_path / "b" / name).stat().st_mtime_ns for name in done}
    resumed = trainer_of(tiny_llama(), tmp_path / "b", shards=1, budget=2)
    resumed.train()
    assert all((tmp_path / "b" / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


def test_a_stage_depends_on_nothing_but_its_prefix(tiny_llama, tmp_path):
    """Other sequences, shards and the global generator before it change nothing."""
    one = trainer_of(tiny_llama(), tmp_path / "a", budget=1)
    one.train()
    torch.manual_seed(77)
    state = torch.get_rng_state()
    two = trainer_of(tiny_llama(), tmp_path / "b", budget=2)
    two.train()
    assert torch.equal(torch.get_rng_state(), state)
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert len(a) == 5 and len(b) == 9 and all(same(a[name], b[name]) for name in a)


def test_save_and_open_elsewhere(tiny_llama, tmp_path):
    s3t = trainer_of(tiny_llama(), tmp_path / "a")
    s3t.train()
    s3t.delete(s3t.rows(1, (0,))[1])
    expected = s3t.predict(PROBE)
    s3t.save(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    opened = S3TTrainer(tiny_llama(), arguments(tmp_path / "b"), None, lora(), S3TConfig(shards=2, slices=2))
    assert torch.equal(opened.predict(PROBE), expected) and opened.served() == s3t.served()
    with pytest.raises(ValueError, match="retrain needs train_dataset"):
        opened.retrain(1)
    with pytest.raises(ValueError, match="holds an S3T ensemble already"):
        s3t.save(tmp_path / "b")
    for fields in (
        {"learning_rate": 5e-3},
        {"adam_beta1": 0.8},
        {"adam_beta2": 0.9},
        {"adam_epsilon": 1e-6},
        {"optim_args": "foreach=False"},
        {"lr_scheduler_kwargs": {"num_cycles": 2}},
        {"label_smoothing_factor": 0.1},
    ):
        with pytest.raises(ValueError, match=f"has training .*this run .*{next(iter(fields))}"):
            trainer_of(tiny_llama(), tmp_path / "b", args=fields)
    with pytest.raises(ValueError, match="made of 24 rows, train_dataset has 20"):
        trainer_of(tiny_llama(), tmp_path / "b", rows_of(20))
    with pytest.raises(ValueError, match="adapters of other modules"):
        trainer_of(tiny_llama(), tmp_path / "b", peft_config=lora(target_modules=["q_proj", "k_proj"]))


def test_a_run_is_opened_with_its_own_base_and_rows_alone(tiny_llama, tmp_path):
    rows = rows_of()
    s3t = trainer_of(tiny_llama(), tmp_path, rows)
    s3t.train()
    with pytest.raises(ValueError, match="has base .*this run"):
        trainer_of(tiny_llama(seed=1), tmp_path, rows)
    with pytest.raises(ValueError, match="has base .*this run"):
        trainer_of(tiny_llama().bfloat16(), tmp_path, rows)
    swapped = [rows[1], rows[0], *rows[2:]]
    with pytest.raises(ValueError, match="these in another order: 2 differ, the first is row 0"):
        trainer_of(tiny_llama(), tmp_path, swapped)
    other = [*rows[:7], {**rows[7], "labels": [-100, *rows[7]["labels"][:-1]]}, *rows[8:]]
    with pytest.raises(ValueError, match="1 differ, the first is row 7"):
        trainer_of(tiny_llama(), tmp_path, other)
    # The same numbers in another form are the same row.
    arrays = [
        {k: torch.tensor(v) if i % 2 else np.array(v, dtype=np.int32) for k, v in rows[i].items()} for i in range(24)
    ]
    trainer_of(tiny_llama(), tmp_path, arrays)


def test_the_content_of_deleted_rows_may_go_and_leaves_no_digest(tiny_llama, tmp_path):
    rows = rows_of()
    s3t = trainer_of(tiny_llama(), tmp_path, rows)
    s3t.train()
    record = json.loads((tmp_path / "s3t.json").read_text())
    assert len(set(record["row_digests"])) == 24
    s3t.delete([0, 5])
    expected = s3t.predict(PROBE)
    after = json.loads((tmp_path / "s3t.json").read_text())
    assert [i for i, known in enumerate(after["row_digests"]) if known is None] == [0, 5]
    assert not any(record["row_digests"][i] in (tmp_path / "s3t.json").read_text() for i in (0, 5))
    for nothing in (None, {}, "gone"):
        opened = trainer_of(tiny_llama(), tmp_path, [nothing, *rows[1:5], nothing, *rows[6:]])
        assert torch.equal(opened.predict(PROBE), expected)
    dead = opened.delete(range(24)).dead
    assert dead == [0, 1] and set(json.loads((tmp_path / "s3t.json").read_text())["row_digests"]) == {None}
    trainer_of(tiny_llama(), tmp_path, [None] * 24)
    with pytest.raises(ValueError, match="leave something in the place of a deleted one"):
        trainer_of(tiny_llama(), tmp_path, rows[1:])
    # Retraining after rows are gone reads none of them.
    again = trainer_of(tiny_llama(), tmp_path / "b", rows)
    again.train()
    again.delete([0, 5])
    shard = next(s for s in (0, 1) if 0 in again._state["rows"][s][0] + again._state["rows"][s][1])
    opened = trainer_of(tiny_llama(), tmp_path / "b", [None, *rows[1:5], None, *rows[6:]])
    assert opened.retrain(shard) == (0, 1)


def test_digests_of_rows_are_salted_and_of_content_alone():
    row = {
        "text": "a",
        "ids": [1, 2, 3],
        "x": torch.tensor([0.5, 0.25]),
        "none": None,
        "nested": [[1], [2, 3]],
        "b": b"z",
    }
    same = {
        "b": b"z",
        "nested": [[1], [2, 3]],
        "none": None,
        "x": [0.5, 0.25],
        "ids": np.array([1, 2, 3]),
        "text": "a",
    }
    one, two = row_digests([row, same], "00" * 16)
    assert one == two != row_digests([row], "01" * 16)[0]
    for other in ({**row, "ids": [1, 2, 4]}, {**row, "ids": [[1, 2, 3]]}, {**row, "nested": [[1, 2], [3]]}):
        assert row_digests([other], "00" * 16)[0] != one
    for other in ({**row, "text": "b"}, {**row, "text": None}, {**row, "x": torch.tensor([0.5, 0.5]).bfloat16()}):
        assert row_digests([other], "00" * 16)[0] != one

    # Augmentations that draw at random do not make other rows, whatever was drawn before.
    class Augmented(list):
        def __getitem__(self, i):
            return {"x": super().__getitem__(i) + torch.rand(3) + random.random()}

    data = Augmented(torch.ones(3) * i for i in range(4))
    state = torch.get_rng_state()
    first = row_digests(data, "00" * 16)
    assert torch.equal(torch.get_rng_state(), state)
    assert row_digests(data, "00" * 16, skip=[0, 2]) == [None, first[1], None, first[3]] and len(set(first)) == 4


def test_text_rows_keep_their_numbers_when_some_are_gone():
    class Tokenizer:
        def __call__(self, text, **_):
            return {"input_ids": [len(word) for word in text.split()]}

        eos_token_id, sep_token_id = 9, None

    def words(k):
        return {"question": "a" * k, "answer": "bb " * k}

    whole, first = readable_rows([words(1), words(2), words(3)], [], Tokenizer())
    some, row = readable_rows([None, words(2), "gone"], [0, 2], Tokenizer())
    assert some == [None, whole[1], None] and row == whole[1] and first == whole[0]
    assert readable_rows([None], [0], Tokenizer()) == ([None], {})


def test_global_generators_come_back_after_a_failure_too():
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    for error in (None, KeyError):
        try:
            with own_randomness():
                random.seed(9), np.random.seed(9), torch.manual_seed(9)
                if error is not None:
                    raise error
        except KeyError:
            pass
        assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all()
        assert torch.equal(torch.get_rng_state(), states[2])


def test_numbers_of_rows_are_integers_of_any_type(tiny_llama, tmp_path):
    s3t = trainer_of(tiny_llama(), tmp_path)
    for one in (np.int64(3), torch.tensor(4), 5):
        assert s3t.delete(one).deleted == [int(one)]
    for some in (np.array([6, 7]), torch.tensor([8, 9]), [np.int32(10), 11], {12}, range(13, 15)):
        assert s3t.delete(some).deleted == sorted(map(int, some))
    for wrong in (
        True,
        np.True_,
        2.0,
        [2.7],
        [True],
        np.array([1.0]),
        torch.tensor([1.0]),
        torch.tensor([True]),
        "3",
        None,
    ):
        with pytest.raises(TypeError, match="indices .*must hold integers"):
            s3t.delete(wrong)
    assert s3t._state["deleted"] == list(range(3, 15))


def test_files_left_by_an_interrupted_deletion_are_swept(tiny_llama, tmp_path):
    s3t = trainer_of(tiny_llama(), tmp_path)
    s3t.train()
    dirty = s3t.rows(0, (0,))[0]

    def interrupted(*args):
        raise KeyboardInterrupt

    s3t.folder.sweep = interrupted
    with pytest.raises(KeyboardInterrupt):
        s3t.delete(dirty)
    (tmp_path / "shard0" / ".1.safetensors.1.tmp").write_bytes(b"half")
    assert "shard0/0.safetensors" in files(tmp_path)
    assert trainer_of(tiny_llama(), tmp_path).served()[0] == (1,)
    assert sorted(p.name for p in (tmp_path / "shard0").iterdir()) == ["1.safetensors"]


def test_retraining_a_dead_shard_leaves_the_row_out(tiny_llama, tmp_path):
    rows = rows_of()
    s3t = trainer_of(tiny_llama(), tmp_path / "a", rows)
    s3t.train()
    kept = s3t.model_for(1)(**PROBE).logits
    gone = [s3t.rows(0, (0,))[0], s3t.rows(0, (1,))[2]]
    assert s3t.delete(gone).dead == [0] and s3t.train()[0] == (), "train never brings back what was deleted"
    assert s3t.delete(gone).deleted == []
    assert s3t.retrain(0) == (0, 1)
    assert torch.equal(s3t.model_for(1)(**PROBE).logits, kept)
    # As one that was told before it began.
    fresh = trainer_of(tiny_llama(), tmp_path / "b", rows)
    fresh.delete(gone)
    fresh.retrain(0)
    assert not set(gone) & set(fresh.rows(0, (0, 1)))
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


def test_a_stage_has_seeds_of_its_own_and_the_head_of_the_stage_before(tiny_bert_classifier, tmp_path):
    begun = []

    class Watched(Trainer):
        def train(self, *args, **kwargs):
            head = {n: p.detach().clone() for n, p in self.model.named_parameters() if ".modules_to_save." in n}
            begun.append((self.args.seed, self.args.data_seed, head))
            return super().train(*args, **kwargs)

    rows = [{"input_ids": r["input_ids"][:4], "labels": i % 4} for i, r in enumerate(rows_of())]
    config = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    # The order of the rows is the stage's too where the caller gave one for all.
    own = {"args": {"data_seed": 11}, "trainer_class": Watched}
    trainer_of(tiny_bert_classifier(), tmp_path, rows, shards=1, peft_config=config, **own).train()
    prefixes = [(0,), (0, 1), (1,), (1, 0)]
    seeds = [stage_seed(3, 0, prefix) for prefix in prefixes]
    assert [seed for seed, _, _ in begun] == [seed for _, seed, _ in begun] == seeds and len(set(seeds)) == 4
    stored = tensors(tmp_path)
    for prefix, (_, _, head) in zip(prefixes, begun, strict=True):
        before = stored[f"shard0/{prefix[0]}.safetensors" if len(prefix) == 2 else "initial.safetensors"]
        assert len(head) == 2 and all(torch.equal(p, before[n]) for n, p in head.items())


def test_heads_belong_to_their_stage(tiny_bert_classifier, tmp_path):
    rows = [{"input_ids": r["input_ids"][:4], "labels": i % 4} for i, r in enumerate(rows_of())]
    config = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    s3t = trainer_of(tiny_bert_classifier(), tmp_path, rows, shards=1, peft_config=config)
    s3t.train()
    stored = tensors(tmp_path)
    heads = {name: [k for k in stored[name] if "classifier.modules_to_save" in k] for name in stored}
    assert all(len(found) == 2 for found in heads.values())
    weight = next(k for k in heads["shard0/0.safetensors"] if k.endswith("weight"))
    values = [stored[f"shard0/{p}.safetensors"][weight] for p in ("0", "0-1", "1", "1-0")]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(values, 2))
    full = s3t.predict({"input_ids": PROBE["input_ids"]})
    assert full.shape == (1, 4) and full.sum().item() == pytest.approx(1)
    s3t.delete(s3t.rows(0, (0,))[0])
    assert torch.equal(s3t.model_for(0).get_parameter(weight), values[2])
    # A base whose head is drawn anew is the same base.
    other = tiny_bert_classifier()
    torch.nn.init.normal_(other.classifier.weight)
    opened = trainer_of(other, tmp_path, rows, shards=1, peft_config=config)
    assert torch.equal(opened.predict(PROBE), s3t.predict(PROBE))


@pytest.mark.parametrize("mixed", [False, True])
def test_bfloat16(tiny_llama, tmp_path, mixed):
    model = tiny_llama() if mixed else tiny_llama().bfloat16()
    s3t = trainer_of(model, tmp_path, shards=1, args={"bf16": mixed})
    s3t.train()
    other = tiny_llama() if mixed else tiny_llama().bfloat16()
    again = trainer_of(other, tmp_path, shards=1, args={"bf16": mixed})
    found = s3t.predict(PROBE)
    assert found.dtype == torch.float32 and torch.equal(found, again.predict(PROBE))
    victim = s3t.rows(0, (0,))[0]
    s3t.delete(victim), again.delete(victim)
    assert torch.equal(s3t.predict(PROBE), again.predict(PROBE)) and not torch.equal(s3t.predict(PROBE), found)


def test_a_prior_orders_the_sequences(tiny_llama, tmp_path):
    prior = [1.0 if i < 6 else 0.01 for i in range(24)]
    s3t = trainer_of(tiny_llama(), tmp_path, shards=1, budget=1, deletion_prior=prior)
    assert s3t.sequences(0) == [(0, 1)] and s3t._state["rows"][0][1][:6] == list(range(6))
    with pytest.raises(ValueError, match="deletion_prior must have 24 values"):
        trainer_of(tiny_llama(), tmp_path / "b", deletion_prior=[1.0])


def test_defaults_text_and_activation_checkpointing(tiny_llama, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "?": 2, **{f"w{i}": i for i in range(3, 60)}}, "?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="?")
    rows = [{"question": f"w{i}", "answer": f"w{i} w{i + 1}"} for i in range(3, 15)]
    found = []
    for checkpointing in (False, True):
        args = arguments(tmp_path / str(checkpointing), activation_checkpointing=checkpointing)
        config = S3TConfig(shards=1, slices=2, budget=1)
        s3t = S3TTrainer(tiny_llama(), args, rows, s3t=config, processing_class=tokenizer)
        lora = s3t.model.active_peft_config
        assert (lora.r, lora.lora_alpha, lora.use_rslora) == (32, 64, True) and len(s3t._names[0]) == 14
        assert s3t.train() == {0: (0, 1)}
        found.append(tensors(tmp_path / str(checkpointing)))
    a, b = found
    for name in a:
        for key in a[name]:
            torch.testing.assert_close(a[name][key], b[name][key], rtol=1e-4, atol=1e-5)
            if "shard" in name and "lora_B" in key:
                assert a[name][key].abs().max() > 0


def test_calls_that_cannot_be_exact_are_refused(tiny_llama, tmp_path):
    def refused(kind, message, **own):
        with pytest.raises(kind, match=message):
            trainer_of(tiny_llama(), tmp_path / "new", **own)

    refused(ValueError, "slices is 3 but must divide the 2 layers", slices=3)
    refused(ValueError, "bias", peft_config=lora(bias="all"))
    refused(ValueError, "init_lora_weights is 'pissa'", peft_config=lora(init_lora_weights="pissa"))
    refused(ValueError, "lies outside of the layers", peft_config=lora(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="no S3T ensemble, and no train_dataset"):
        S3TTrainer(tiny_llama(), arguments(tmp_path / "new"), None, lora(), S3TConfig(slices=2))
    s3t = trainer_of(tiny_llama(), tmp_path / "a")
    for wrong in (24, -1, [0, 99]):
        with pytest.raises(ValueError, match="which is no row: they are 0 to 23"):
            s3t.delete(wrong)
    assert s3t.delete([]).slices == [] and s3t._state["deleted"] == []
    with pytest.raises(ValueError, match="shard is 7"):
        s3t.model_for(7)
    with pytest.raises(ValueError, match="has adapters already"):
        trainer_of(s3t.model, tmp_path / "c")
