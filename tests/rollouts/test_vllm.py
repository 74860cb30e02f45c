"""The vLLM engines against stand-ins that answer as vLLM does: a small HTTP server, and a module with vLLM's names."""

import json
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from aligntune.errors import BackendError, MissingExtra
from aligntune.rollouts.base import SamplingParams
from aligntune.rollouts.vllm import VLLMColocated, VLLMServer

PROMPTS = [[5, 6], [7], [8, 9, 10]]


def completion(prompt, index):
    """Three tokens that tell prompt and choice apart, the last a stop token of even choices."""
    return [10 * prompt[0] + index, 3, 2 if index % 2 == 0 else 4]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, body, code=200):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.answer({"data": [{"id": "base"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.calls.append((self.path, body))
        if self.path in self.server.missing:
            return self.answer({"detail": "Not Found"}, 404)
        if self.path != "/v1/completions":
            return self.answer({"results": []})
        choices = []
        for index in reversed(range(body["n"])):
            tokens = completion(body["prompt"], index)
            values = [-0.5 * (i + 1) for i in range(len(tokens))]
            choices.append(
                {"index": index, "token_ids": tokens, "logprobs": {"token_logprobs": values}, "finish_reason": "stop"}
            )
        return self.answer({"choices": choices})


@pytest.fixture
def server():
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.calls, httpd.missing = [], set()
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    httpd.url = f"http://127.0.0.1:{httpd.server_address[1]}/"
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def test_server_answers_in_the_order_of_the_prompts(server, model, tmp_path):
    engine = VLLMServer(model, server.url, tmp_path)
    params = SamplingParams(max_new_tokens=3, temperature=0.7, num_generations=2, seed=40, stop_token_ids=(2,))
    rollouts = engine.generate(PROMPTS, params)
    assert rollouts.completion_ids == [[50, 3, 2], [51, 3, 4], [70, 3, 2], [71, 3, 4], [80, 3, 2], [81, 3, 4]]
    assert rollouts.finished == [True, False] * 3
    assert rollouts.log_probs == rollouts.sampler_log_probs == [[-0.5, -1.0, -1.5]] * 6
    sent = {tuple(body["prompt"]): body for path, body in server.calls if path == "/v1/completions"}
    assert [sent[tuple(p)]["seed"] for p in PROMPTS] == [40, 41, 42]
    body = sent[(7,)]
    assert body["model"] == "base"
    assert (body["n"], body["max_tokens"], body["temperature"], body["logprobs"]) == (2, 3, 0.7, 0)
    assert body["stop_token_ids"] == [2]
    assert body["ignore_eos"] is True
    assert body["return_token_ids"] is True


def test_tokens_behind_a_stop_token_are_cut_and_truncation_hides_the_tempered_log_probs(server, model, tmp_path):
    engine = VLLMServer(model, server.url, tmp_path)
    rollouts = engine.generate([[5]], SamplingParams(max_new_tokens=3, top_k=5, stop_token_ids=(3,)))
    assert rollouts.completion_ids == [[50, 3]]
    assert rollouts.log_probs is None
    assert rollouts.sampler_log_probs == [[-0.5, -1.0]]
    greedy = engine.generate([[5]], SamplingParams(max_new_tokens=3, temperature=0))
    assert greedy.sampler_log_probs == [[0.0] * 3]
    assert greedy.log_probs == [[-0.5, -1.0, -1.5]]


def test_full_weights_go_through_the_folder(server, model, tmp_path):
    engine = VLLMServer(model, server.url, tmp_path)
    with torch.no_grad():
        model.lm_head.weight.fill_(0.25)
    server.calls.clear()
    engine.update_weights()
    reload, reset = server.calls
    assert reload == ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path)}})
    assert reset[0] == "/reset_prefix_cache"
    assert (load_file(tmp_path / "model.safetensors")["lm_head.weight"] == 0.25).all()


def test_adapters_are_loaded_and_addressed_by_name(server, model, tmp_path):
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    engine = VLLMServer(adapted, server.url, tmp_path)
    folder = tmp_path / "adapter"
    assert server.calls == [("/v1/load_lora_adapter", {"lora_name": "aligntune-1", "lora_path": str(folder)})]
    assert (folder / "adapter_model.safetensors").exists()
    engine.generate([[5]], SamplingParams(max_new_tokens=3))
    assert server.calls[-1][1]["model"] == "aligntune-1"
    engine.update_weights()
    assert [(path, body["lora_name"]) for path, body in server.calls[-2:]] == [
        ("/v1/load_lora_adapter", "aligntune-2"),
        ("/v1/unload_lora_adapter", "aligntune-1"),
    ]


def test_what_the_server_lacks_is_said(server, model, tmp_path):
    server.missing.add("/collective_rpc")
    with pytest.raises(BackendError, match="how to start the server"):
        VLLMServer(model, server.url, tmp_path)
    with pytest.raises(BackendError, match="no vLLM server answers"):
        VLLMServer(model, "http://127.0.0.1:9", tmp_path)


class FakeLLM:
    """`vllm.LLM` with canned answers."""

    def __init__(self, **settings):
        self.settings, self.calls = settings, []

    def generate(self, prompts, sampling, use_tqdm, lora_request):
        self.calls.append((prompts, sampling, lora_request))
        outputs = []
        for prompt, params in zip(prompts, sampling, strict=True):
            choices = []
            for index in range(params["n"]):
                tokens = completion(prompt["prompt_token_ids"], index)
                logprobs = [{t: types.SimpleNamespace(logprob=-1.0 * i)} for i, t in enumerate(tokens)]
                choices.append(types.SimpleNamespace(index=index, token_ids=tokens, logprobs=logprobs))
            outputs.append(types.SimpleNamespace(outputs=choices[::-1]))
        return outputs

    def collective_rpc(self, method, kwargs):
        self.calls.append((method, kwargs))

    def reset_prefix_cache(self):
        self.calls.append("reset")


@pytest.fixture
def vllm(monkeypatch):
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, lambda **settings: settings
    lora = types.ModuleType("vllm.lora.request")
    lora.LoRARequest = lambda *fields: fields
    for name, value in {"vllm": module, "vllm.lora": types.ModuleType("vllm.lora"), "vllm.lora.request": lora}.items():
        monkeypatch.setitem(sys.modules, name, value)


@pytest.mark.usefixtures("vllm")
def test_colocated(model, tmp_path):
    engine = VLLMColocated(model, tmp_path, gpu_memory_utilization=0.4)
    assert engine.llm.settings["logprobs_mode"] == "processed_logprobs"
    assert engine.llm.settings["gpu_memory_utilization"] == 0.4
    rollouts = engine.generate(
        PROMPTS[:2], SamplingParams(max_new_tokens=3, num_generations=2, seed=1, stop_token_ids=(2,))
    )
    assert rollouts.completion_ids == [[50, 3, 2], [51, 3, 4], [70, 3, 2], [71, 3, 4]]
    assert rollouts.log_probs == [[0.0, -1.0, -2.0]] * 4
    engine.update_weights()
    assert engine.llm.calls[-2:] == [("reload_weights", {"weights_path": str(tmp_path)}), "reset"]


@pytest.mark.usefixtures("vllm")
def test_colocated_adapter(model, tmp_path):
    names = set(model.state_dict())
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    engine = VLLMColocated(adapted, tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == names  # the base model under its own names
    engine.update_weights()
    engine.generate([[5]], SamplingParams(max_new_tokens=3))
    assert engine.llm.calls[-1][2] == ("aligntune-2", 2, str(tmp_path / "adapter"))


def test_without_the_package_the_extra_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtra, match=r"aligntune\[vllm\]"):
        VLLMColocated(model, tmp_path)
