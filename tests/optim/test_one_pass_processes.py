"""FRUGAL, SOAP and AdamR on two processes (gloo) against one, from one start of both."""

import pytest
import torch
from optim_training import flat, gpt2, language_data, run_training
from processes import run_two

import hfext  # noqa: F401

pytestmark = pytest.mark.multiprocess

# Signs and divisions by small roots magnify rounding, so all is float64. SOAP's rotated sides are shorter than a batch
# has tokens: else rounding decides on the basis of a factor's null space.
CASES = {
    "block": ("frugal", "density=0.3,update_gap=2,order=random"),
    "columns": ("frugal", "density=0.3,update_gap=2,projection=columns"),
    "randk": ("frugal", "density=0.3,update_gap=2,projection=randk"),
    "galore": ("frugal", "density=0.3,update_gap=2,projection=galore"),
    "random": ("frugal", "density=0.3,update_gap=2,projection=galore,basis=random"),
    "soap": ("soap", "precondition_frequency=1,max_precond_dim=64"),
    "adamr": ("adamr", "lambda=0.3"),
}


def trained(case, out, **options):
    name, optim_args = CASES[case]
    kwargs = dict(max_steps=5, learning_rate=1e-3, data=language_data(32, 32), max_grad_norm=1.0)
    return run_training(gpt2(dtype=torch.float64), name, optim_args, out, **kwargs, **options)


SCRIPT = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {here!r})
from test_one_pass_processes import CASES, trained
from optim_training import flat
torch.set_num_threads(1)
torch.manual_seed(1000 + int(__import__("os").environ["RANK"]))  # what is drawn must not depend on this
found = {{}}
for case in CASES:
    job = trained(case, {out!r} + "/" + case, per_device_train_batch_size=4)
    state = job.optimizer.state_dict()["state"]
    drawn = [x for s in state.values() for k, x in sorted(s.items()) if torch.is_tensor(x)]
    mine = torch.cat([flat(job.model), *(x.flatten().double() for x in drawn)])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    found[case] = {{"weights": flat(job.model), "same": torch.equal(*both)}}
straight = trained("randk", {out!r} + "/s", per_device_train_batch_size=4, save_strategy="steps", save_steps=3)
dist.barrier()
resumed = trained("randk", {out!r} + "/r", per_device_train_batch_size=4, resume={out!r} + "/s/checkpoint-3")
found["resumed"] = torch.equal(flat(straight.model), flat(resumed.model))
if dist.get_rank() == 0:
    torch.save(found, {out!r} + "/found.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    here = __file__.rpartition("/")[0]
    run_two(SCRIPT.format(out=str(out), here=here))
    return torch.load(out / "found.pt", weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_both_processes_have_the_same_weights_parts_and_moments(case, two):
    assert two[case]["same"]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case, two, tmp_path):
    single = trained(case, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert (two[case]["weights"] - flat(single.model)).abs().max() <= 1e-7


def test_resume_is_bitwise_with_two_processes(two):
    assert two["resumed"]
