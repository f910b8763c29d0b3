import socket

import huggingface_hub.constants as constants
import pytest
import torch
from offline_hub import TOKEN, OfflineHub
from safetensors.torch import save_file

from hfext import hub as api


@pytest.fixture
def server(monkeypatch, tmp_path):
    with OfflineHub() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("time.sleep", hub.slept.append)
        # The clients that the libraries keep, with the address of the server before.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        asked, look_up = [], socket.getaddrinfo

        def getaddrinfo(host, *args, **kwargs):
            asked.append(host)
            return look_up(host, *args, **kwargs)

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield hub
        assert set(asked) <= {"127.0.0.1"}, "a name was looked up"


@pytest.fixture
def folder(tmp_path):
    """A small artifact: one large file, three small ones."""
    made = tmp_path / "thing"
    made.mkdir()
    save_file({"weight": torch.arange(300.0)}, made / "model.safetensors")
    (made / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    api.save_record(made, ["bisam"], "org/base", "finetune", {"rho": 0.05})
    return made
