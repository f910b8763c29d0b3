"""Settings of the whole suite: one thread, fixed seeds, no network, and tiny models built from their configs."""

import os

# Read when the libraries are imported, so they come first.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
os.environ.setdefault("MPLBACKEND", "Agg")

import ipaddress
import random
import socket

import numpy as np
import pytest
import torch
import transformers
from tiny_models import LLAMA, factory

torch.set_num_threads(1)

# Triton decides when it is imported whether kernels are interpreted; a test that runs them sets the variable again.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language  # noqa: F401

    del os.environ["TRITON_INTERPRET"]


def _is_local(family, address):
    if family not in (socket.AF_INET, socket.AF_INET6):
        return True
    host = address[0]
    try:
        return host in ("", "localhost") or ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _guarded(connect):
    def guarded(self, address, *args):
        if not _is_local(self.family, address):
            raise RuntimeError(f"A test tried to reach {address}: the suite may only use the loopback interface.")
        return connect(self, address, *args)

    return guarded


# Patched at import and not in a fixture, so that fixtures of any scope and collection itself are covered.
socket.socket.connect = _guarded(socket.socket.connect)
socket.socket.connect_ex = _guarded(socket.socket.connect_ex)


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def tiny_llama():
    """Factory of Llama language models with grouped queries."""
    return factory(
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        **LLAMA,
    )


@pytest.fixture
def tiny_gpt2():
    """Factory of GPT-2 language models: tied embeddings, dropout 0.1 while training."""
    return factory(
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config,
        vocab_size=128,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


@pytest.fixture
def tiny_bert_classifier():
    """Factory of BERT sequence classifiers with 4 labels."""
    return factory(
        transformers.BertForSequenceClassification,
        transformers.BertConfig,
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        num_labels=4,
    )


@pytest.fixture
def tiny_t5():
    """Factory of T5 encoder-decoder models."""
    return factory(
        transformers.T5ForConditionalGeneration,
        transformers.T5Config,
        vocab_size=128,
        d_model=32,
        d_ff=64,
        d_kv=8,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
