import pytest

from hfext.experiments import import_time
from hfext.experiments.import_time import Config


def test_the_first_interpreter_is_not_counted_and_the_bar_decides(tmp_path, monkeypatch):
    times = iter([9.0, 0.3, 0.1, 0.2])
    monkeypatch.setattr(import_time, "_measure", lambda: next(times))
    ((row,),) = import_time.run(Config(repeats=3, bar=0.25), tmp_path)["tables"].values()
    assert (row["measured"], row["least"], row["most"], row["met"]) == (0.2, 0.1, 0.3, True)

    times = iter([9.0, 0.3])
    ((row,),) = import_time.run(Config(repeats=1, bar=0.25), tmp_path)["tables"].values()
    assert row["met"] is False


def test_importing_hfext_is_cheap():
    # The first one compiles, and a busy machine only adds.
    assert min(import_time._measure() for _ in range(4)) <= Config().bar


@pytest.mark.parametrize("field, value", [("repeats", 0), ("bar", 0.0)])
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        Config(**{field: value})
