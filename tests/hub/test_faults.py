"""A fault of every kind at every request of an upload and a download: the old state or the new one, no third.

`times=1` is a passing fault, `times=99` one that stays. No message, log or output may hold the token, which the faulty
server repeats in its answers.
"""

import logging
import traceback

import pytest
import torch
from offline_hub import TOKEN
from safetensors.torch import save_file

import hfext
from hfext import hub as api

PUSH = {
    "create": ("POST", "/api/repos/create"),
    "base": ("GET", "/api/models/org/base"),
    "info": ("GET", "/api/models/user/thing"),
    "card": ("POST", "/api/validate-yaml"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/info/lfs/objects/batch"),
    "upload": ("PUT", "/lfs/"),
    "commit": ("POST", "/commit/"),
}
FETCH = {
    "info": ("GET", "/api/models/user/thing"),
    "head": ("HEAD", "/resolve/"),
    "get": ("GET", "/resolve/"),
    "weights": ("GET", "model.safetensors"),
}
REFUSALS, PASSING = ("401", "403", "404"), ("drop", "500", "429")
UP = [(r, k) for r in PUSH for k in (*PASSING, "drop_after", *REFUSALS, "truncate")] + [("upload", "garble")]
DOWN = [(r, k) for r in FETCH for k in (*PASSING, *REFUSALS, "truncate", "garble")]


def cases(pairs):
    """By default a fault stays, and one of those that are retried passes; the whole matrix is slow."""
    for request, kind in pairs:
        for times, name in ((99, "stays"), (1, "passes")):
            slow = kind in ("401", "404") if times == 99 else kind not in ("drop", "429")
            marks = (pytest.mark.slow,) if slow else ()
            yield pytest.param(request, kind, times, id=f"{request}-{kind}-{name}", marks=marks)


def test_there_are_enough_cases():
    by_default = [case for case in [*cases(UP), *cases(DOWN)] if not case.marks]
    assert len(UP) + len(DOWN) >= 60 and len(by_default) >= 60


@pytest.fixture
def silent(capfd, caplog):
    """Nothing that was written or logged holds the token."""
    caplog.set_level(logging.DEBUG)
    yield
    out = capfd.readouterr()
    assert TOKEN not in out.out + out.err + caplog.text


def told(error):
    """All of what a user sees of an error: its text, and the chain that Python prints."""
    return str(error) + "".join(traceback.format_exception(error))


@pytest.mark.parametrize("request_, kind, times", cases(UP))
def test_an_upload(server, folder, silent, request_, kind, times):
    server.add("org/base", {"README.md": "---\nlicense: mit\n---\n"})
    (folder / "note.txt").write_text("old")
    hfext.push_to_hub(folder, "user/thing")
    old = server.files("user/thing")
    assert b"license: mit" in old["README.md"]
    (folder / "note.txt").write_text("new")
    save_file({"weight": torch.arange(400.0)}, folder / "model.safetensors")
    new = {**old, "note.txt": b"new", "model.safetensors": (folder / "model.safetensors").read_bytes()}
    server.fail(*PUSH[request_], kind, times=times)
    try:
        hfext.push_to_hub(folder, "user/thing")
    except OSError as error:
        said = told(error)
        assert TOKEN not in said and (
            "user/thing was not changed" in said or "may have been changed" in said or request_ == "base"
        )
        assert times == 99 or kind not in PASSING  # what passes is tried again
        seen = server.files("user/thing")
        # Where no answer came back from the commit, nobody can know; it says so or is right.
        assert seen == old or ("may have been changed" in said and seen == new)
    else:
        unknown = {**new, "README.md": server.files("user/thing")["README.md"]}
        assert server.files("user/thing") in (new, unknown if request_ == "base" and kind in REFUSALS else new)
    server.faults.clear()
    hfext.push_to_hub(folder, "user/thing")
    assert server.files("user/thing") == new


@pytest.mark.parametrize("request_, kind, times", cases(DOWN))
def test_a_download(server, folder, silent, request_, kind, times):
    hfext.push_to_hub(folder, "user/thing")
    whole = server.files("user/thing")
    server.fail(*FETCH[request_], kind, times=times)
    try:
        found = api.fetch("user/thing")
    except (OSError, ValueError) as error:
        assert "user/thing" in str(error) and TOKEN not in told(error)
        assert times == 99 or kind not in PASSING
    else:
        assert {name: (found / name).read_bytes() for name in whole} == whole
    server.faults.clear()
    found = api.fetch("user/thing")
    assert {name: (found / name).read_bytes() for name in whole} == whole


@pytest.mark.parametrize("request_", ["create", "info", "preupload", "batch", "upload", "commit"])
def test_the_time_that_the_hub_names_is_waited(server, folder, request_):
    hfext.push_to_hub(folder, "user/thing", commit_message="first")
    save_file({"weight": torch.arange(500.0)}, folder / "model.safetensors")
    server.slept.clear()
    server.retry_after = "7"
    server.fail(*PUSH[request_], "429", times=2)
    hfext.push_to_hub(folder, "user/thing")
    assert len([seconds for seconds in server.slept if seconds >= 7]) == 2 and server.commits("user/thing") == 2


def test_an_hour_is_not_waited_but_said(server, folder):
    server.retry_after = "3600"
    server.fail("POST", "/api/repos/create", "429", times=9)
    with pytest.raises(OSError, match="was not changed.*429"):
        hfext.push_to_hub(folder, "user/thing")
    assert max(server.slept, default=0) < 3600 and server.repos == {}


def test_a_branch_and_a_pull_request_fail_alike(server, folder):
    hfext.push_to_hub(folder, "user/thing")
    (folder / "note.txt").write_text("new")
    server.fail("POST", "/branch/", "403", times=9)
    with pytest.raises(OSError, match="was not changed"):
        hfext.push_to_hub(folder, "user/thing", revision="mine")
    assert "mine" not in server.repos["user/thing"]["refs"]
    server.fail("POST", "/commit/", "drop_after")
    with pytest.raises(OSError, match="was not changed, but a pull request may be open"):
        hfext.push_to_hub(folder, "user/thing", create_pr=True)
    assert server.commits("user/thing") == 1 and server.repos["user/thing"]["pulls"] == 1


def test_a_token_of_ones_own_is_used_and_not_shown(server, folder, silent):
    own = "hf_anotherOne"
    hfext.push_to_hub(folder, "user/thing", token=own)
    assert server.tokens == {own, ""}  # the check of a card's YAML needs none
    server.fail("POST", "/commit/", "403", times=9)
    (folder / "note.txt").write_text("new")
    with pytest.raises(OSError) as caught:
        hfext.push_to_hub(folder, "user/thing", token=own)
    assert own not in told(caught.value) and "[token]" in told(caught.value)
    server.tokens.clear()
    hfext.hub.fetch("user/thing", token=False)
    assert server.tokens == {""}
