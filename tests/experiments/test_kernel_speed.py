"""The benchmark of the kernels says what it would measure where there is no GPU."""

import pytest
import torch

from hfext.experiments import kernel_speed


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it measures")
def test_without_a_gpu_every_row_says_so(tmp_path):
    (rows,) = kernel_speed.run(kernel_speed.Config(), tmp_path)["tables"].values()
    assert len(rows) == len(kernel_speed.BARS) and {row["found"] for row in rows} == {"not measured"}
    assert not any("met" in row for row in rows)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="limit is 0"):
        kernel_speed.Config(limit=0)
    with pytest.raises(ValueError, match="kernels holds 'hfext-atention' but must be of"):
        kernel_speed.Config(kernels=("hfext-atention",))
