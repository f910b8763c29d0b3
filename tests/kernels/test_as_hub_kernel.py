"""The attention kernel as transformers loads one from the Hub: by its id, through the functions of flash_attn.

The `kernels` package that transformers 5.23 asks for is not on PyPI yet; a stub in its place hands over the package.
"""

import pytest
import torch
import transformers
from attention_cases import causal
from transformers.integrations import hub_kernels

PAD = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])


@pytest.fixture
def from_the_hub(monkeypatch):
    import hfext_attention

    asked = []

    def get_kernel(repo_id, **kwargs):
        asked.append(repo_id)
        return hfext_attention

    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda *a, **kw: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", get_kernel)
    monkeypatch.setattr(transformers.modeling_utils, "is_kernels_available", lambda *a, **kw: True, raising=False)
    return asked


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2", "GptOss"])
def test_transformers_finds_what_it_calls(name, from_the_hub):
    eager = causal(name, "eager").to(torch.bfloat16)
    config = eager.config
    repo = f"hfext/hfext-attention-{name.lower()}"  # each is loaded once in a process
    model = type(eager)._from_config(config, attn_implementation=repo, dtype=torch.bfloat16).eval()
    model.load_state_dict(eager.state_dict())
    assert from_the_hub == [repo]
    ids = torch.randint(3, 96, PAD.shape) * PAD
    with torch.no_grad():
        a, b = (m(ids, attention_mask=PAD).logits.float()[PAD.bool()] for m in (eager, model))
    assert (a - b).abs().max() <= 0.03 * a.abs().max()
    out = model.generate(ids, attention_mask=PAD, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert out.shape == (2, 11)
