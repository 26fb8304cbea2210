"""Several adapters on one model in memory: each row computes what the merged model of its run does alone."""

from pathlib import Path

import httpx
import jax
import numpy as np
import pytest
from model_section import uniform
from running_server import serve

import maxlm
from maxlm.checkpoint.folder import find_checkpoint
from maxlm.cli import main
from maxlm.config import ModelConfig
from maxlm.config.adapters import LoraConfig, PrefixConfig, QuantizedBaseConfig
from maxlm.config.execution import ExecutionConfig
from maxlm.core.parameters import initialize
from maxlm.errors import CheckpointError, RequestError
from maxlm.export.run_folder import Adapted, write_run_folder
from maxlm.generate.request import Request
from maxlm.models.adapters.declare import declare_adapters
from maxlm.models.decoder import Decoder
from maxlm.tokenizer.codec import Tokenizer

EXECUTION = ExecutionConfig(max_length=64, activation_dtype="float32", matmul_dtype="float32")
# Ranks, scales and matrices differ.
KINDS = {
    "wide": LoraConfig(rank=4, alpha=8),
    "narrow": LoraConfig(rank=2, alpha=3, scaling="rank_stabilized", targets=("query", "layers/1/mlp/down")),
}
REFUSED = {
    "dora": (LoraConfig(rank=2, decomposed=True), "are decomposed (DoRA)"),
    "prefix": (PrefixConfig(tokens=2), "are of kind prefix"),
    "nf4": (LoraConfig(rank=2, base=QuantizedBaseConfig(kind="nf4")), "were trained on a base quantized to nf4"),
}


@pytest.fixture(scope="module")
def folder(bundle, tmp_path_factory) -> Path:
    """Runs: `base`, `other` with other weights, and adapters of `base`."""
    folder = tmp_path_factory.mktemp("adapters")
    tokenizer = Tokenizer.load(bundle.parent / "tokenizer")
    sizes = {"embed_dim": 32, "mlp_dim": 48, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    plan = Decoder(ModelConfig(**uniform(vocab_size=tokenizer.vocab_size, **sizes)), EXECUTION)
    for name, seed in (("base", 8), ("other", 9)):
        decoder = initialize(plan, jax.random.key(seed))
        decoder.embedding = decoder.embedding * 12
        write_run_folder(folder / name, decoder, tokenizer, stage="import/hf", inputs={}, metrics={})
    for name, config in (KINDS | {each: config for each, (config, _) in REFUSED.items()}).items():
        random = np.random.default_rng(len(name))
        adapters = jax.tree.map(
            lambda leaf, random=random: (0.3 * random.standard_normal(leaf.shape)).astype(np.float32),
            declare_adapters(plan, config),
        )
        adapted = Adapted(find_checkpoint(folder / "base"), adapters, config)
        write_run_folder(folder / name, decoder, tokenizer, stage="import/peft", inputs={}, metrics={}, adapted=adapted)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return maxlm.load(folder / "base", adapters={name: folder / name for name in KINDS})


def answers(model, requests, **settings):
    """Token ids and log-probabilities of requests that run at the same time."""
    with model.engine(num_slots=4) as engine:
        events = [list(stream) for stream in [engine.stream(request) for request in requests]]
    tokens = [[token for event in each for token in (*event.prompt, event.token) if token] for each in events]
    return [([token.id for token in each], [token.log_probability for token in each]) for each in tokens]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_row_computes_what_its_merged_model_does_alone(model, folder, temperature):
    prompts = [tuple(range(10 + i, 20 + 3 * i)) for i in range(2)]
    # Interleaved, so that slots are used by one adapter after the other, and more than there are slots.
    requests = [
        Request(prompt, max_new_tokens=12, temperature=temperature, seed=i, score_prompt=i == 0, adapter=adapter)
        for i, prompt in enumerate(prompts)
        for adapter in (None, "wide", "narrow")
    ]
    together = answers(model, requests)
    assert len({tuple(ids) for ids, _ in together}) == len(requests), "adapters change the answers"
    for adapter, run in ((None, "base"), ("wide", "wide"), ("narrow", "narrow")):
        alone = maxlm.load(folder / run)
        mine = [i for i, request in enumerate(requests) if request.adapter == adapter]
        expected = answers(alone, [Request(**vars(requests[i]) | {"adapter": None}) for i in mine])
        for i, (ids, log_probabilities) in zip(mine, expected):
            assert together[i][0] == ids
            found, wanted = (np.array(each, float) for each in (together[i][1], log_probabilities))
            np.testing.assert_allclose(found, wanted, atol=0 if adapter is None else 1e-5, rtol=0)


def test_model_itself_scores_without_adapters(model, folder):
    tokens = np.arange(20).reshape(2, 10)
    np.testing.assert_array_equal(model.logits(tokens), maxlm.load(folder / "base").logits(tokens))
    chat = [{"role": "user", "content": "The fox"}]
    alone = maxlm.load(folder / "wide").generate(chat, max_new_tokens=8)
    assert model.generate(chat, max_new_tokens=8, adapter="wide") == alone
    assert model.generate(chat, max_new_tokens=8) != alone
    with pytest.raises(RequestError, match="adapter 'none' is unknown; the model has wide, narrow"):
        model.generate(chat, max_new_tokens=8, adapter="none")


def test_requests_choose_an_adapter_by_the_name_of_a_model(model):
    body = {"prompt": "The quick", "max_tokens": 8, "temperature": 0}
    with serve(model) as (url, _), httpx.Client(base_url=url, timeout=60) as http:
        listed = http.get("/v1/models").json()["data"]
        assert [entry["id"] for entry in listed] == ["base", "wide", "narrow"]
        assert [entry.get("parent") for entry in listed] == [None, "base", "base"]
        assert http.get("/v1/models/narrow").json()["id"] == "narrow"
        replies = {name: http.post("/v1/completions", json=body | {"model": name}).json() for name in KINDS}
        for name, reply in replies.items():
            assert reply["model"] == name
            assert reply["choices"][0]["text"] == model.generate("The quick", max_new_tokens=8, adapter=name)[0]
        for named in ({}, {"model": "base"}):
            reply = http.post("/v1/completions", json=body | named).json()
            assert reply["model"] == "base"
            assert reply["choices"][0]["text"] == model.generate("The quick", max_new_tokens=8)[0]
        chat = {"messages": [{"role": "user", "content": "The"}], "max_tokens": 4, "model": "wide"}
        assert http.post("/v1/chat/completions", json=chat).json()["model"] == "wide"
        refused = http.post("/v1/completions", json=body | {"model": "nothing"})
        assert refused.status_code == 404
        assert refused.json()["error"]["code"] == "model_not_found"
        assert "use 'base' or 'wide' or 'narrow'" in refused.json()["error"]["message"]


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_need_a_model_of_their_own_are_refused(name, folder):
    with pytest.raises(RequestError) as error:
        maxlm.load(folder / "base", adapters={"x": folder / name})
    assert f"{folder / name}: its adapters {REFUSED[name][1]}" in str(error.value)
    assert "serve the run alone" in str(error.value)


def test_what_is_no_adapter_of_this_model_is_refused(folder, bundle, capsys):
    with pytest.raises(CheckpointError, match=r"whose weights are not those of .*other; give that model"):
        maxlm.load(folder / "other", adapters={"x": folder / "wide"})
    with pytest.raises(CheckpointError, match="has trained a whole model, and no adapters"):
        maxlm.load(folder / "base", adapters={"x": folder / "other"})
    with pytest.raises(RequestError, match="adapters need the run that they were trained on"):
        maxlm.load(bundle, adapters={"x": folder / "wide"})
    command = ["serve", str(folder / "base"), "--port", "0", "--adapter"]
    assert main([*command, f"base={folder / 'wide'}"]) == 2
    assert "two models would be named 'base'; give each a name of its own" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*command, "wide"])
    assert "'wide' is not of the form NAME=RUN" in capsys.readouterr().err
