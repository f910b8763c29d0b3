"""The conformance report: what it runs, that it finds what is broken, and how a reason is told."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from hfext import recipe, registry
from hfext.experiments import _conformance_runs, optimizer_conformance
from hfext.experiments._conformance_runs import Job, flat, make_model, run_two, train
from hfext.experiments.optimizer_conformance import CELLS, Config, job_of, known

LOCAL = [cell.name for cell in CELLS if cell.measure is not None]


def tables(tmp_path, **fields):
    result = optimizer_conformance.run(Config(**fields), tmp_path)
    optimizers, schedules, cells, reasons, failures = result["tables"].values()
    return {row["method"]: row for row in optimizers + schedules}, cells, reasons, failures


def test_every_name_of_the_records_is_a_row(tmp_path):
    names = {m.name for family in ("optim", "schedule") for m in registry.methods(family)}
    accepted = set()
    for name in names:
        for field in ("optim", "lr_scheduler_type"):
            try:
                TrainingArguments(str(tmp_path), use_cpu=True, **{field: name})
            except ValueError as error:
                if "is not a valid" in str(error):
                    continue
            accepted.add(name)
    assert set(known()) == accepted >= {"sam", "asam", "bisam", "ignite", "mup_sam"} and "mup" not in accepted


def test_the_model_leaves_rounding_no_null_space():
    """Each gradient of a matrix has full rank, but for the sum over the vocabulary, in every update."""
    model, rows = make_model(torch.float64), _conformance_runs.data(8)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    model(**batch).loss.backward()
    for name, p in model.named_parameters():
        if p.dim() == 2:
            values = torch.linalg.svdvals(p.grad)
            assert p.shape[0] == p.shape[1]
            assert values[-2 if name.startswith("lm_head") else -1] > 1e-9 * values[0], name
    assert all(p.dtype == torch.float64 for p in model.parameters()) and model(**batch).loss.dtype == torch.float64


@pytest.mark.slow
def test_every_cell_of_every_method_is_met(tmp_path):
    rows, _, _, failures = tables(tmp_path)
    assert set(rows) == set(known()) and not failures


def test_two_passes_and_a_schedule_are_met_on_one_process(tmp_path):
    names = ["sam", *(m.name for m in known().values() if m.family == "schedule")]
    rows, cells, reasons, failures = tables(tmp_path, names=names, cells=LOCAL)
    assert set(rows) == set(names) and all(row["met"] for row in rows.values()) and not reasons and not failures
    assert rows["sam"]["resume"] == 0.0 and 0 < rows["sam"]["accumulation"] < 1e-9
    assert [cell["cell"] for cell in cells] == LOCAL


def test_a_method_that_counts_micro_batches_alike_is_found(tmp_path, monkeypatch):
    """A loss that is a mean of means: what accumulation must not be."""

    def mean_of_means(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
        return _conformance_runs.F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    monkeypatch.setattr(_conformance_runs, "loss64", mean_of_means)
    rows, _, _, failures = tables(tmp_path, names=["sam"], cells=["accumulation"])
    assert not rows["sam"]["met"] and rows["sam"]["accumulation"] > 1e-4
    assert failures == [{"method": "sam", "cell": "accumulation", "found": failures[0]["found"], "allowed": 1e-7}]


def test_reasons_and_refusals_are_told_and_other_errors_fail(tmp_path, monkeypatch):
    opted = dataclasses.replace(registry.get("sam"), opt_out=(("PEFT", "it has its reasons"),))
    monkeypatch.setattr(optimizer_conformance, "known", lambda: {"sam": opted})

    def refuse(job, folder):
        raise NotImplementedError("no state on disk\nuse adamw")

    def fail(job, folder):
        raise KeyError("exp_avg")

    cells = [dataclasses.replace(c, measure={"resume": refuse, "bf16": fail}.get(c.name, c.measure)) for c in CELLS]
    monkeypatch.setattr(optimizer_conformance, "CELLS", tuple(cells))
    rows, _, reasons, failures = tables(tmp_path, cells=["resume", "PEFT", "bf16"], optim_args={}, schedule_args={})
    row = {k: v for k, v in rows["sam"].items() if k not in ("method", "options")}
    assert row == {"PEFT": "cannot", "resume": "cannot", "bf16": "failed", "met": False}
    assert {r["cell"]: r["reason"] for r in reasons} == {
        "PEFT": "it has its reasons",
        "resume": "no state on disk use adamw",
    }
    assert [(f["cell"], f["found"]) for f in failures] == [("bf16", "KeyError: 'exp_avg'")]


def test_a_run_in_which_nothing_moves_is_no_success(tmp_path, monkeypatch):
    monkeypatch.setattr(
        optimizer_conformance,
        "train",
        lambda job, folder, model, **kwargs: train(job, folder, model, learning_rate=0.0),
    )
    rows, _, _, failures = tables(tmp_path, names=["sam"], cells=["accumulation", "PEFT"])
    assert not rows["sam"]["met"] and all("No weight moved" in f["found"] for f in failures) and len(failures) == 2


@pytest.mark.parametrize("cell, part", [("resume", "weights"), ("resume", "optimizer"), ("PEFT", "weights")])
def test_a_checkpoint_that_is_not_loaded_is_found(cell, part, tmp_path, monkeypatch):
    def forgetful(job, folder, model, resume=None, **kwargs):
        if resume is not None and part == "optimizer":
            (Path(resume) / "optimizer.pt").unlink()
        return train(job, folder, model, resume=None if part == "weights" else resume, **kwargs)

    monkeypatch.setattr(optimizer_conformance, "train", forgetful)
    rows, _, _, failures = tables(tmp_path, names=["frugal"], cells=[cell])
    assert not rows["frugal"]["met"] and len(failures) == 1
    assert rows["frugal"][cell] > 1e-6 if part == "optimizer" else "it was not loaded" in failures[0]["found"]


def test_ranks_that_differ_in_one_bit_are_found(tmp_path, monkeypatch):
    """Both are nearer to the one process than the tolerance."""

    def run_two(jobs, timeout):
        single = train(jobs["sam"], str(tmp_path), make_model(torch.float64), rows=4, accumulation=2)
        weights = flat(single.model)
        other = weights.clone()
        other[0] = torch.nextafter(other[0], torch.tensor(1.0, dtype=torch.float64))
        return {"sam": [weights, weights if same else other]}

    monkeypatch.setattr(optimizer_conformance, "run_two", run_two)
    for same in (True, False):
        rows, _, _, failures = tables(tmp_path, names=["sam"], cells=["two processes"])
        assert rows["sam"]["met"] == same
    assert failures[0]["found"].startswith("RuntimeError: The processes end with different weights, by ")


@pytest.mark.parametrize("name", ["soap", "frugal"])
def test_rarer_acts_fall_into_the_runs(name, tmp_path):
    """SOAP turns its bases and FRUGAL changes its part early enough to be seen in the weights of every cell."""
    job = job_of(Config(), registry.get(name))
    found = [flat(train(one, str(tmp_path), make_model(torch.float64)).model) for one in (job, Job(optim=name))]
    assert not torch.equal(*found)


def test_options_reach_the_runs():
    config = Config(optim_args={"sam": "rho=0.2"})
    assert job_of(config, registry.get("sam")) == Job(optim="sam", optim_args="rho=0.2")
    assert job_of(config, registry.get("sam"), 2).optim_args == "rho=0.2,sync=true"
    assert job_of(config, registry.get("asam")).optim_args is None


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"names": ["sma"]}, "Did you mean 'sam'"),
        ({"optim_args": {"sop": ""}}, "optim_args has 'sop'"),
        ({"cells": ["pft"]}, "cells has 'pft'"),
        ({"timeout": 0}, "timeout"),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_are_compared_with_one_and_an_error_stops_no_other(tmp_path):
    jobs = {"good": Job(optim="sam", optim_args="sync=true"), "bad": Job(optim="no_such"), "plain": Job()}
    found = run_two(jobs, timeout=300)
    assert found["bad"].startswith("ValueError: no_such is not a valid OptimizerNames")
    for name in ("good", "plain"):
        single = train(jobs[name], str(tmp_path), make_model(torch.float64), rows=4, accumulation=2)
        assert torch.equal(*found[name]) and (found[name][0] - flat(single.model)).abs().max() < 1e-9
    apart = run_two({"apart": Job(optim="sam")}, timeout=300)["apart"]
    assert (apart[0] - found["good"][0]).abs().max() > 1e-6  # without `sync` each process ascends by itself


def test_the_shipped_recipe_runs_everything():
    module, config = recipe.load("bench/optimizer_conformance")
    assert module is optimizer_conformance and config.names is None and config.cells is None
