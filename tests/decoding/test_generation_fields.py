import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    SynthIDTextWatermarkingConfig,
    TemperatureLogitsWarper,
    WatermarkingConfig,
)
from transformers.utils import logging
from typer.testing import CliRunner

from hfext import decoding
from hfext.cli import app
from hfext.decoding._generation_fields import NAMES, make_samplers
from hfext.decoding.mirostat import MirostatLogitsProcessor
from hfext.decoding.top_h import TopHLogitsProcessor
from hfext.decoding.top_n_sigma import TopNSigmaLogitsProcessor


def ids(rows=2):
    return torch.randint(3, 128, (rows, 5), generator=torch.Generator().manual_seed(0))


def sample(model, seed=0, **options):
    torch.manual_seed(seed)
    return model.generate(ids(), max_new_tokens=10, **{"do_sample": True, "top_k": 0, **options})


def names_of(model, **options):
    """The samplers that `generate` builds, in their order."""
    seen = []

    def look(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        seen.extend(logits_processor)
        return input_ids

    model.generate(ids(), custom_generate=look, max_new_tokens=2, **{"do_sample": True, "top_k": 0, **options})
    return [NAMES.get(type(p), type(p).__name__) for p in seen]


@pytest.fixture
def warnings(caplog):
    """Messages of our loggers; each is given once in a process, so they are forgotten first."""
    logging.get_logger("hfext").warning_once.cache_clear()
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


def test_a_field_equals_the_processor_after_the_temperature(tiny_llama):
    model = decoding.enable(tiny_llama())
    field = sample(model, temperature=1.5, top_h_alpha=0.5)
    own = TopHLogitsProcessor(0.5, temperature=1.5)
    assert torch.equal(field, sample(model, temperature=1.5, logits_processor=[own]))
    assert not torch.equal(field, sample(model, temperature=1.5))
    mirostat = sample(model, mirostat_tau=3.0, mirostat_eta=0.5)
    assert torch.equal(mirostat, sample(model, logits_processor=[MirostatLogitsProcessor(3.0, 0.5)]))
    sigma = sample(model, top_n_sigma=1.0)
    assert torch.equal(sigma, sample(model, logits_processor=[TopNSigmaLogitsProcessor(1.0)]))


def test_without_enable_the_fields_are_refused(tiny_llama):
    with pytest.raises(ValueError, match="top_h_alpha"):
        sample(tiny_llama(), top_h_alpha=0.4)


def test_without_fields_the_list_is_the_stock_one(tiny_llama):
    model = tiny_llama()
    options = dict(temperature=0.7, top_k=9, top_p=0.9)
    assert names_of(model, **options) == ["temperature", "top_k", "top_p"]
    plain = sample(model, **options)
    assert torch.equal(plain, sample(decoding.enable(model), **options))
    stock = type(model)._get_logits_processor._hfext_original
    config = GenerationConfig(do_sample=True, **options)
    built = [type(p) for p in stock(model, config)]
    assert [type(p) for p in model._get_logits_processor(config)] == built


def test_fields_stand_between_temperature_and_the_stock_truncations(tiny_llama):
    model = decoding.enable(tiny_llama())
    options = dict(top_h_alpha=0.4, top_n_sigma=1.0, temperature=1.2, top_k=30, top_p=0.9, renormalize_logits=True)
    order = ["temperature", "top_n_sigma", "top_h_alpha", "top_k", "top_p", "LogitNormalization"]
    assert names_of(model, repetition_penalty=1.1, **options) == ["RepetitionPenaltyLogitsProcessor", *order]
    assert names_of(model, top_h_alpha=0.4, renormalize_logits=True) == ["top_h_alpha", "LogitNormalization"]
    assert names_of(model, top_h_alpha=0.4, top_p=0.9) == ["top_h_alpha", "top_p"]
    assert names_of(model, top_h_alpha=0.4) == ["top_h_alpha"]
    assert names_of(model, top_h_alpha=0.4, do_sample=False) == []
    for config in (SynthIDTextWatermarkingConfig(keys=[1, 2], ngram_len=3), WatermarkingConfig()):
        assert names_of(model, top_h_alpha=0.4, watermarking_config=config)[0] == "top_h_alpha"


def test_sampler_order_arranges_what_generate_built_and_leaves_what_it_was_given(tiny_llama):
    model = decoding.enable(tiny_llama())
    order = ["top_p", "min_p", "top_h_alpha", "temperature"]
    options = dict(temperature=1.4, top_p=0.8, top_h_alpha=0.4, sampler_order=order)
    assert names_of(model, **options) == ["top_p", "top_h_alpha", "temperature"]
    given = TopNSigmaLogitsProcessor(2.0)
    assert names_of(model, logits_processor=[given], **options) == [
        "top_n_sigma",
        "top_p",
        "top_h_alpha",
        "temperature",
    ]
    last = sample(model, temperature=1.4, top_h_alpha=0.4, sampler_order=["top_h_alpha", "temperature"])
    assert torch.equal(last, sample(model, temperature=1.4, logits_processor=[TopHLogitsProcessor(0.4)], top_h=None))


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"sampler_order": ["top_p"], "temperature": 0.5}, ValueError, "temperature is active too"),
        ({"sampler_order": ["top_p"], "top_k": 50}, ValueError, "top_k is active too"),
        ({"sampler_order": ["top_q"]}, ValueError, "Did you mean"),
        ({"sampler_order": ["top_p", "top_p"]}, ValueError, "once"),
        ({"sampler_order": "top_p"}, TypeError, "list of names"),
        ({"top_h_alpha": 1.5}, ValueError, "top_h_alpha=1.5 in the generation config: .*alpha is 1.5"),
        ({"top_h_alpha": 7.0, "do_sample": False}, ValueError, "top_h_alpha=7.0"),
        ({"mirostat_tau": -1.0}, ValueError, "tau"),
        ({"mirostat_eta": 0.1}, ValueError, "mirostat_tau is not set"),
        ({"top_n_sigma": 0}, ValueError, "n is 0"),
    ],
)
def test_bad_fields_are_named_before_a_token_is_made(tiny_llama, options, error, text):
    with pytest.raises(error, match=text):
        sample(decoding.enable(tiny_llama()), **options)


def test_a_processor_for_another_temperature_is_refused(tiny_llama):
    model = tiny_llama()
    for processor in (TopHLogitsProcessor(0.4, temperature=1.5), MirostatLogitsProcessor(temperature=1.5)):
        for temperature in (1.0, 2.0):
            with pytest.raises(ValueError, match="give both the same"):
                sample(model, temperature=temperature, logits_processor=[processor])
        sample(model, temperature=1.5, logits_processor=[processor])
        sample(model, logits_processor=[processor, TemperatureLogitsWarper(1.5)])
        with pytest.raises(ValueError, match="give both the same"):
            sample(model, logits_processor=[TemperatureLogitsWarper(1.5), processor])


def test_other_truncation_beside_mirostat_is_warned_of(tiny_llama, warnings):
    model = decoding.enable(tiny_llama())
    sample(model, mirostat_tau=3.0)
    assert "Mirostat" not in warnings.text
    sample(model, logits_processor=[MirostatLogitsProcessor()], top_p=0.9, top_k=50)
    assert "beside top_k, top_p" in warnings.text
    sample(model, top_h_alpha=0.4, top_k=50)
    assert "top_k=50 as well" in warnings.text


def test_fields_without_sampling_are_warned_of(tiny_llama, warnings):
    model = decoding.enable(tiny_llama())
    greedy = sample(model, do_sample=False, top_h_alpha=0.4)
    assert "top_h_alpha do nothing" in warnings.text
    sample(model, do_sample=False, logits_processor=[MirostatLogitsProcessor()])
    assert "MirostatLogitsProcessor do nothing" in warnings.text
    sample(model, logits_processor=[TopHLogitsProcessor(0.4)])
    assert "decides before" not in warnings.text
    sample(model, temperature=2.0, logits_processor=[TopHLogitsProcessor(0.4)])
    assert "TopHLogitsProcessor decides before generate applies temperature=2.0" in warnings.text
    assert torch.equal(greedy, sample(model, do_sample=False))


def test_a_draft_model_that_is_handed_the_samplers_uses_them_once(tiny_llama, warnings):
    model, draft = decoding.enable(tiny_llama()), tiny_llama(seed=1)
    torch.manual_seed(0)
    options = dict(do_sample=True, top_k=0, max_new_tokens=8, top_h_alpha=0.4, assistant_model=draft)
    assert model.generate(ids(1), **options).shape == (1, 13)
    assert "not used" not in warnings.text


@pytest.mark.parametrize("from_model_config", [True, False])
def test_fields_are_saved_and_loaded(tiny_llama, tmp_path, from_model_config):
    model = tiny_llama()
    model.generation_config._from_model_config = from_model_config
    decoding.enable(model)
    model.generation_config.update(
        do_sample=True, top_k=0, top_h_alpha=0.4, sampler_order=["temperature", "top_h_alpha"]
    )
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert decoding.active_fields(loaded.generation_config) == {
        "top_h_alpha": 0.4,
        "sampler_order": ["temperature", "top_h_alpha"],
    }
    assert names_of(loaded, temperature=1.3) == ["temperature", "top_h_alpha"]
    assert torch.equal(sample(loaded, temperature=1.3), sample(model, temperature=1.3))


def test_doctor_tells_what_a_saved_model_needs(tiny_llama, tmp_path):
    model = decoding.enable(tiny_llama())
    run = CliRunner()
    model.save_pretrained(tmp_path / "plain")
    found = run.invoke(app, ["doctor", str(tmp_path / "plain")])
    assert found.exit_code == 0 and "no field of hfext" in found.output
    model.generation_config.top_h_alpha = 0.4
    model.save_pretrained(tmp_path / "with")
    found = run.invoke(app, ["doctor", str(tmp_path / "with")])
    assert found.exit_code == 0 and "top_h_alpha = 0.4" in found.output and "import hfext" in found.output
    file = tmp_path / "with" / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "top_h_alpha": 7}))
    found = run.invoke(app, ["doctor", str(tmp_path / "with")])
    assert found.exit_code == 1 and "alpha is 7" in found.output
    assert run.invoke(app, ["doctor", str(tmp_path)]).exit_code == 2
    assert "There is no folder" in run.invoke(app, ["doctor", str(tmp_path / "absent")]).output
    fields = {"do_sample": True, "top_h_alpha": 0.4}
    for content, code, text in (
        ({**fields, "sampler_order": ["temperature"]}, 1, "does not name top_h_alpha"),
        ({**fields, "_from_model_config": True}, 1, "will drop these fields"),
        ({"top_h_alpha": 0.4}, 0, "act with do_sample=True"),
        ([1], 1, "holds a list"),
    ):
        file.write_text(json.dumps(content))
        found = run.invoke(app, ["doctor", str(file)])
        assert found.exit_code == code and text in found.output


def test_beams_are_counted_for_the_samplers(tiny_llama):
    model, seen = decoding.enable(tiny_llama()), []

    def look(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        seen.extend(logits_processor)
        return input_ids

    options = dict(do_sample=True, top_k=0, top_h_alpha=0.4, mirostat_tau=3.0, num_beams=4, eos_token_id=[2, 5, 7])
    model.generate(ids(), custom_generate=look, max_new_tokens=2, **options)
    assert [p.min_tokens_to_keep for p in seen] == [4, 4]
    assert seen[1].memory.rows_per_input == 4


def test_beams_leave_enough_tokens_and_peft_models_can_be_enabled(tiny_llama):
    peft = pytest.importorskip("peft")
    config = GenerationConfig(top_h_alpha=1e-6, mirostat_tau=0.01, top_n_sigma=1e-6)
    for processor in make_samplers(config, 3, 2):
        out = processor(torch.zeros(1, 2, dtype=torch.long), torch.linspace(0, 1, 50)[None])
        assert torch.isfinite(out).sum() == 2
    model = tiny_llama()
    beams = sample(decoding.enable(model), top_h_alpha=0.01, num_beams=3)
    assert beams.shape == (2, 15)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert decoding.enable(wrapped) is wrapped
    assert torch.equal(beams, sample(wrapped, top_h_alpha=0.01, num_beams=3))


def test_a_passed_processor_replaces_the_field(tiny_llama, warnings):
    model = decoding.enable(tiny_llama())
    assert names_of(model, top_h_alpha=0.9, logits_processor=LogitsProcessorList([TopHLogitsProcessor(0.2)])) == [
        "top_h_alpha"
    ]
    assert "top_h_alpha is not used" in warnings.text


def test_enable_names_what_it_cannot_use():
    with pytest.raises(TypeError, match="generation_config"):
        decoding.enable(torch.nn.Linear(2, 2))
