#!/usr/bin/env python3
"""Drives a running Playhouse with the official `openai` package, streaming and not: `openai_python.py URL [KEY]`."""

import sys

import openai

URL = sys.argv[1].rstrip("/")
KEY = sys.argv[2] if len(sys.argv) > 2 else "none"
CLIENT = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=120)
HAIKU = {"messages": [{"role": "user", "content": "the moon"}], "seed": 7, "max_tokens": 40}


def check(what: str, holds: bool, found: object = "") -> None:
    """Fails with what was found; asserts would vanish under -O."""
    if not holds:
        raise SystemExit(f"openai (Python): {what}: {found!r}")
    print(f"ok {what}")


def chats(model: str) -> None:
    whole = CLIENT.chat.completions.create(model=model, **HAIKU)
    text = whole.choices[0].message.content
    check("a chat has text", bool(text), whole)
    check("its usage adds up", whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens, whole.usage)
    check("its end has a reason", whole.choices[0].finish_reason in ("stop", "length"), whole)

    chunks = list(CLIENT.chat.completions.create(model=model, stream=True, stream_options={"include_usage": True}, **HAIKU))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    check("a stream has the same text", streamed == text, (streamed, text))
    check("its first chunk has the role", chunks[0].choices[0].delta.role == "assistant", chunks[0])
    check("its last chunk has the usage", chunks[-1].choices == [] and chunks[-1].usage == whole.usage, chunks[-1])

    scored = CLIENT.chat.completions.create(model=model, logprobs=True, top_logprobs=2, n=2, **HAIKU)
    check("n texts come", [choice.index for choice in scored.choices] == [0, 1], scored)
    first = scored.choices[0].logprobs.content[0]
    check("tokens have log probabilities", first.logprob <= 0 and len(first.top_logprobs) == 2, first)

    with CLIENT.chat.completions.stream(model=model, **HAIKU) as stream:
        final = stream.get_final_completion()
    check("the stream helper puts it together", final.choices[0].message.content == text, final)


def completions(model: str) -> None:
    request = {"model": model, "prompt": "the moon", "max_tokens": 8, "temperature": 0}
    whole = CLIENT.completions.create(logprobs=2, **request)
    check("a completion has text", bool(whole.choices[0].text), whole)
    check("it has log probabilities", len(whole.choices[0].logprobs.tokens) == 8, whole.choices[0].logprobs)
    streamed = "".join(chunk.choices[0].text for chunk in CLIENT.completions.create(stream=True, **request))
    check("a stream has the same text", streamed == whole.choices[0].text, streamed)
    echoed = CLIENT.completions.create(echo=True, **request)
    check("an echo has the prompt", echoed.choices[0].text == "the moon" + whole.choices[0].text, echoed)
    many = CLIENT.completions.create(**{**request, "prompt": ["the moon", "a river"]})
    check("two prompts have two texts", len(many.choices) == 2, many)


def formats(model: str) -> None:
    schema = {"type": "object", "properties": {"season": {"enum": ["spring", "autumn"]}}, "required": ["season"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "season", "schema": schema, "strict": True}}
    held = CLIENT.chat.completions.create(model=model, response_format=form, **HAIKU).choices[0].message.content
    check("a schema holds the text", held.replace(" ", "") in ('{"season":"spring"}', '{"season":"autumn"}'), held)


def responses(model: str) -> None:
    whole = CLIENT.responses.create(model=model, input="the moon", max_output_tokens=30, extra_body={"seed": 7})
    check("a response has text", bool(whole.output_text), whole)
    events = list(CLIENT.responses.create(model=model, input="the moon", max_output_tokens=30, stream=True, extra_body={"seed": 7}))
    kinds = [event.type for event in events]
    check("its stream begins and ends", (kinds[0], kinds[-1]) in (("response.created", "response.completed"), ("response.created", "response.incomplete")), kinds)
    streamed = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    check("its stream has the same text", streamed == whole.output_text, (streamed, whole.output_text))
    check("its events are numbered", [event.sequence_number for event in events] == list(range(len(events))), kinds)


def embeddings(model: str) -> None:
    made = CLIENT.embeddings.create(model=model, input=["the moon", "a river"])
    check("each text has a vector", [item.index for item in made.data] == [0, 1], made)
    length = sum(value * value for value in made.data[0].embedding)
    check("it has length 1", abs(length - 1) < 1e-3, length)


def errors(model: str) -> None:
    def refused(kind: type, **request: object) -> openai.APIStatusError:
        try:
            CLIENT.chat.completions.create(**{"model": model, **HAIKU, **request})
        except kind as error:
            return error
        raise SystemExit(f"openai (Python): {request} was not refused as {kind.__name__}")

    error = refused(openai.NotFoundError, model="nobody")
    check("an unknown model is not found", error.code == "model_not_found" and error.param == "model", error.body)
    error = refused(openai.BadRequestError, temperature=-1)
    check("a wrong temperature is named", error.param == "temperature", error.body)
    error = refused(openai.BadRequestError, messages=[{"role": "user", "content": "moon " * 5000}])
    check("a long prompt is too long", error.code == "context_length_exceeded", error.body)
    check("errors have the request's id", error.request_id is not None, error)


def main() -> None:
    model = CLIENT.models.list().data[0].id
    check("a model can be asked for by name", CLIENT.models.retrieve(model).id == model)
    for part in (chats, completions, formats, responses, embeddings, errors):
        part(model)


main()
