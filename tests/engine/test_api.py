"""The interface through the real client package."""

import json
from collections.abc import Iterator

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moestro.engine.requests import Limits
from tests.engine.serving import Running, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(Limits(running=16)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


ASK = {"model": "stub", "prompt": "hello", "max_tokens": 12, "temperature": 0}
CHAT = {"model": "stub", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, "temperature": 0}


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["stub"]


def test_a_completion_and_its_stream_say_the_same(client: openai.OpenAI) -> None:
    whole = client.completions.create(**ASK)
    parts = list(client.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].text for part in parts if part.choices) == whole.choices[0].text
    assert parts[-1].usage.total_tokens == whole.usage.total_tokens == 17
    assert whole.choices[0].finish_reason in ("length", "stop")
    assert whole.model_extra["moestro"] == {"decoding": "plain", "exact": True}


def test_chat_and_its_stream_say_the_same(client: openai.OpenAI, server: Running) -> None:
    whole = client.chat.completions.create(**CHAT)
    parts = list(client.chat.completions.create(**CHAT, stream=True))
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    direct = client.completions.create(**{**ASK, "prompt": "<user>hi\n<assistant>"})
    assert direct.choices[0].text == text


def test_parts_of_text_are_joined(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    whole = client.chat.completions.create(**{**CHAT, "messages": [{"role": "user", "content": parts}]})
    assert whole.choices[0].message.content == client.chat.completions.create(**CHAT).choices[0].message.content


def test_several_prompts_and_choices(client: openai.OpenAI) -> None:
    asked = {**ASK, "prompt": ["one", "two"], "n": 3, "temperature": 1.0, "seed": 7}
    whole = client.completions.create(**asked)
    texts = [choice.text for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == list(range(6))
    assert len(set(texts[:3])) == 3
    assert [choice.text for choice in client.completions.create(**asked).choices] == texts
    streamed = [""] * 6
    for part in client.completions.create(**asked, stream=True):
        for choice in part.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts
    first = client.completions.create(**{**asked, "prompt": "one", "n": 1})
    assert first.choices[0].text == texts[0]


def test_log_probabilities(client: openai.OpenAI) -> None:
    found = client.completions.create(**ASK, logprobs=3).choices[0]
    assert len(found.logprobs.tokens) == len(found.logprobs.token_logprobs) == 12 or found.finish_reason == "stop"
    assert all(len(top) <= 3 for top in found.logprobs.top_logprobs)
    assert found.logprobs.token_logprobs[0] == max(found.logprobs.top_logprobs[0].values())
    chat = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert chat[0].logprob == chat[0].top_logprobs[0].logprob > chat[0].top_logprobs[1].logprob
    parts = client.chat.completions.create(**CHAT, logprobs=True, stream=True)
    streamed = [entry for part in parts if part.choices[0].logprobs for entry in part.choices[0].logprobs.content]
    assert [entry.logprob for entry in streamed] == [entry.logprob for entry in chat]


def test_stop_strings_end_the_text(client: openai.OpenAI) -> None:
    text = client.completions.create(**ASK, extra_body={"ignore_eos": True}).choices[0].text
    stop = text[4:7]
    cut = client.completions.create(**ASK, stop=["never there", stop], extra_body={"ignore_eos": True}).choices[0]
    assert cut.text == text[: text.find(stop)]
    assert cut.finish_reason == "stop"


def test_token_ids_as_a_prompt(client: openai.OpenAI, server: Running) -> None:
    ids = server.engine.opened.vocabulary.encode("hello")
    by_ids = client.completions.create(**{**ASK, "prompt": ids})
    assert by_ids.choices[0].text == client.completions.create(**ASK).choices[0].text


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": 999999}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": -1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_tokens": 10**40}, "max_tokens"),
        ({"n": 10**6}, "n"),
        ({"logprobs": 257}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"stop": ["x"] * 100000}, "stop"),
        ({"stop": ["x" * 1000]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"seed": 1.5}, "seed"),
        ({"logit_bias": {"257": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 1e9}}, "logit_bias.5"),
        ({"presence_penalty": 5}, "presence_penalty"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"grammar": "root ::= root"}, "grammar"),
        ({"guided_regex": "(a*)*"}, "guided_regex"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a"] * 1000}, "prompt"),
        ({"prompt": [1, 2, 10**20]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": "x" * 2000}, None),
        ({"prompt": ""}, None),
        ({"prompt": "\ud800"}, "prompt"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"decoding": {"method": "train.switch"}}, "decoding.method"),
        ({"decoding": {"method": "serve.no_such"}}, "decoding"),
        ({"model": "gpt"}, "model"),
    ],
)
def test_what_cannot_be_done_is_refused_before_it_costs(server: Running, change: dict, param: str | None) -> None:
    before = server.engine.scheduler.stats.steps
    body = json.dumps({**ASK, **change})
    reply = httpx.post(f"{server.url}/v1/completions", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == (404 if "model" in change else 400), reply.text
    assert reply.json()["error"]["param"] == param
    assert len(reply.content) < 1000
    assert server.engine.scheduler.stats.steps == before


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hi",
        [1],
        [{"role": "user"}],
        [{"role": "root", "content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/x.png"}}]}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AAAA"}}]}],
        [{"role": "user", "content": "x", "url": "file:///etc/passwd"}],
        [{"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}],
        [{"role": "user", "content": "x"}] * 2000,
    ],
)
def test_messages_that_are_not_text_are_refused(server: Running, messages: object) -> None:
    reply = httpx.post(f"{server.url}/v1/chat/completions", json={**CHAT, "messages": messages})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"].startswith("messages")


def test_metrics_are_prometheus_text(server: Running, client: openai.OpenAI) -> None:
    client.completions.create(**ASK)
    found = {f.name: f for f in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)}
    assert found["moestro_generated_tokens"].samples[0].value >= 1
    assert sum(s.value for s in found["moestro_expert_chosen"].samples) > 0
    assert found["moestro_first_token_seconds"].type == "histogram"
    assert found["moestro_pages_total"].samples[0].value == 256


def test_the_state_shows_experts_and_the_page_needs_nothing_from_elsewhere(server: Running) -> None:
    state = httpx.get(f"{server.url}/state").json()
    assert len(state["heat"]["1"]) == 4
    assert state["model"] == "stub"
    page = httpx.get(f"{server.url}/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for path in ("/", "/page.css", "/page.js"):
        text = httpx.get(server.url + path).text
        assert "http://" not in text.replace("http://www.w3.org", "")
        assert "https://" not in text


def test_the_error_of_a_client_is_that_of_its_package(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(**{**ASK, "temperature": 50})
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**{**ASK, "model": "other"})


def test_a_fault_of_the_model_is_told_and_passes(server: Running, client: openai.OpenAI) -> None:
    forward = server.engine.opened.forward
    broken = server.engine.opened.vocabulary.encode("~")
    forward.broken = set(broken)
    other = {**ASK, "logit_bias": {str(broken[0]): -100}}
    try:
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(**{**ASK, "prompt": "a~"})
        assert caught.value.status_code == 503
        assert "retry-after" in caught.value.response.headers
        assert client.completions.create(**other).choices[0].finish_reason
    finally:
        forward.broken = set()
    assert client.completions.create(**{**ASK, "prompt": "a~"}).choices[0].finish_reason
