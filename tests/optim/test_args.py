"""`optim_args`: what is said is what is meant, or an error that names the entry."""

import pytest

from hfext.optim._args import parse, split
from hfext.optim.asam import ASAMConfig
from hfext.optim.sampa import SAMPaConfig


def test_values_get_the_type_of_their_field():
    config, base, options = parse(
        "rho=1e-1, eta = 2,mode=layerwise,normalize_bias=true,end=0.5,every=2,base=sgd,base.momentum=0.9", ASAMConfig
    )
    assert (config.rho, config.eta, config.mode, config.normalize_bias, config.end, config.every) == (
        0.1,
        2.0,
        "layerwise",
        True,
        0.5,
        2,
    )
    assert base == "sgd" and options == {"momentum": "0.9"}
    assert isinstance(config.start, int)


def test_nothing_is_the_default():
    assert parse(None, ASAMConfig)[0] == parse("", ASAMConfig)[0] == ASAMConfig()


def test_lambda_is_a_keyword_in_python_alone():
    assert parse("lambda=0.3", SAMPaConfig)[0].lam == parse("lam=0.3", SAMPaConfig)[0].lam == 0.3


@pytest.mark.parametrize(
    "text, message",
    [
        ("rho", "'rho' is not of the form key=value"),
        ("rho=", "'rho=' is not of the form"),
        ("rho=1=2", "'rho=1=2' is not of the form"),
        ("rho=1,rho=2", "'rho' is given twice"),
        ("rohh=1", "unknown key 'rohh'.*Valid keys: .*base"),
        ("mod=layerwise", "Did you mean 'mode'"),
        ("rho=big", "rho is 'big' but must be"),
        ("every=1.5", "every is 1.5 but must be"),
        ("normalize_bias=3", "normalize_bias is 3 but must be"),
        ("mode=layer", "mode is 'layer' but must be one of 'elementwise', 'layerwise'"),
        ("rho=-1", "rho is -1.0 but must be >= 0"),
    ],
)
def test_bad_entries_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text, ASAMConfig)


def test_split_keeps_order_and_trims():
    assert split(" a = 1 ,, b=x ") == {"a": "1", "b": "x"}
