#!/usr/bin/env python3
"""Talks to a running server with OpenAI's own client, and reads its metrics with Prometheus' own parser.

    openai_client.py http://127.0.0.1:8000 '[token, ...]'

The tokens are a prompt whose greedy answer has no close second. openai.sh installs what this needs.
"""

import json
import sys
import typing
import urllib.request

import openai
import pydantic
from prometheus_client.openmetrics.parser import text_string_to_metric_families

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
MORE = {"ignore_eos": True}


class Layer(pydantic.BaseModel):
    kind: typing.Literal["dense", "sparse"]
    shared: bool
    shape: tuple[typing.Literal[7168], typing.Literal[2048, 18432]] | None


def refused(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def main():
    base, prompt = sys.argv[1], json.loads(sys.argv[2])
    client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=60)
    model = client.models.list().data[0].id
    assert client.models.retrieve(model).id == model

    greedy = {"model": model, "prompt": prompt, "max_tokens": 32, "temperature": 0, "extra_body": MORE}
    whole = client.completions.create(**greedy)
    text = whole.choices[0].text
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(prompt), 32)
    streamed = list(client.completions.create(**greedy, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].text for part in streamed if part.choices) == text
    assert streamed[-1].usage.total_tokens == whole.usage.total_tokens
    stop = text[10:14]
    stopped = client.completions.create(**greedy, stop=stop).choices[0]
    assert stopped.text == text[: text.index(stop)] and stopped.finish_reason == "stop"
    probable = client.completions.create(**greedy, logprobs=2).choices[0].logprobs
    assert len(probable.tokens) == len(probable.token_logprobs) == len(probable.text_offset) == 32

    chat = {"model": model, "messages": ASK, "temperature": 0, "max_completion_tokens": 12, "extra_body": MORE}
    answer = client.chat.completions.create(**chat, logprobs=True, top_logprobs=2)
    message = answer.choices[0].message
    assert message.role == "assistant" and answer.usage.completion_tokens == 12
    content = answer.choices[0].logprobs.content
    assert len(content) == 12 and all(len(token.top_logprobs) == 2 for token in content)
    assert b"".join(bytes(token.bytes) for token in content).decode(errors="replace") == message.content
    parts = [part.choices[0] for part in client.chat.completions.create(**chat, stream=True)]
    assert "".join(part.delta.content or "" for part in parts) == message.content
    assert parts[0].delta.role == "assistant" and parts[-1].finish_reason == "length"
    # An answer goes back into the conversation as the client holds it.
    talk = [*ASK, message, {"role": "user", "content": "More"}]
    several = client.chat.completions.create(
        model=model, messages=talk, n=2, seed=1, max_tokens=5, frequency_penalty=0.5, presence_penalty=0.5,
        logit_bias={"5": -100}, top_p=0.9, user="somebody", extra_body=MORE,
    )  # fmt: skip
    assert [choice.index for choice in several.choices] == [0, 1]

    # A model without any sense, kept to a schema.
    for seed in range(3):
        drawn = {**chat, "temperature": 1, "seed": seed, "max_completion_tokens": 400}
        layer = client.chat.completions.parse(**drawn, response_format=Layer).choices[0]
        assert layer.finish_reason == "stop" and isinstance(layer.message.parsed, Layer), layer
    any_object = client.completions.create(
        model=model, prompt=prompt, max_tokens=5, extra_body={"response_format": {"type": "json_object"}}
    )
    assert any_object.choices[0].text.lstrip().startswith("{"), any_object
    broken = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "strin"}}}
    error = refused(
        openai.BadRequestError, lambda: client.chat.completions.create(**chat, response_format=broken)
    )
    assert error.param == "response_format" and "strin" in error.message, error

    error = refused(openai.BadRequestError, lambda: client.chat.completions.create(**{**chat, "temperature": 3}))
    assert error.param == "temperature" and "between 0 and 2" in error.message, error
    error = refused(openai.BadRequestError, lambda: client.completions.create(**greedy, echo=True))
    assert error.param == "echo"
    error = refused(openai.NotFoundError, lambda: client.completions.create(**{**greedy, "model": "other"}))
    assert error.code == "model_not_found"
    refused(openai.BadRequestError, lambda: client.embeddings.create(model=model, input="a"))

    with urllib.request.urlopen(f"{base}/metrics") as response:
        families = {family.name: family for family in text_string_to_metric_families(response.read().decode())}
    counted = {sample.labels["endpoint"] for sample in families["deepburn_requests"].samples}
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/embeddings"} <= counted, counted
    assert families["deepburn_request_duration_seconds"].type == "histogram"
    assert families["deepburn_new_tokens"].samples[0].value > 100
    print(f"openai {openai.__version__}: all answers as expected")


if __name__ == "__main__":
    main()
