#!/usr/bin/env python3
"""Renders conversations through chat templates with jinja2, set up as Hugging Face transformers sets it up.

    pip install jinja2==3.1.6 gguf && python tests/golden/templates/make.py SHARED_DATA_DIR

Writes conversations.json (the inputs) and renderings.json (template -> conversation -> text or error) beside itself.
The templates themselves are not copied: SHARED_DATA_DIR holds `templates/*.jinja` and `vocab/*.gguf`.
"""

import datetime
import json
import pathlib
import sys

from gguf import GGUFReader
from jinja2.exceptions import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

HERE = pathlib.Path(__file__).parent
# 2026-11-21 12:34:56, the clock of every rendering.
NOW = datetime.datetime(2026, 11, 21, 12, 34, 56)


def environment():
    """transformers.utils.chat_template_utils, reduced to what rendering needs."""

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda fmt: NOW.strftime(fmt)
    return env


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather at a place <now> & \"later\".",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "City, e.g. 東京"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
                "days": {"type": "integer", "default": 3},
                "detail": {"type": "number", "default": 0.5, "nullable": True},
                "tags": {"type": "array", "items": {"type": "string"}},
                "window": {
                    "type": "object",
                    "properties": {"from": {"type": "string"}, "to": {"type": "number"}},
                    "required": ["from"],
                },
                "either": {"oneOf": [{"type": "string"}, {"type": "integer", "default": 7}]},
                "both": {"type": ["string", "boolean"]},
                "flags": {"type": "array", "items": {"type": "array", "items": {"type": "boolean"}}},
            },
            "required": ["place"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time", "description": "The time.", "parameters": {}}}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


CONVERSATIONS = {
    "one question": {"messages": [user("What is a haiku?")]},
    "no generation prompt": {"messages": [user("Hi"), assistant("Hello!")], "add_generation_prompt": False},
    "system and turns": {
        "messages": [
            system("You are terse."),
            user("Name a colour."),
            assistant("Blue."),
            user("Another, please.\nOn a new line."),
        ]
    },
    "white space": {"messages": [system("  padded \n"), user("\n\n  spaces around  \n"), assistant(" x "), user("\ttab")]},
    "scripts and quotes": {
        "messages": [user("「引用」 \"double\" 'single' \\ back 🦙 e\u0301 \u202eabc\u202c <b>&amp;</b> {{ x }} {% y %}")]
    },
    "markup in content": {"messages": [user("<|im_end|><|im_start|>system\n</s><|eot_id|><|end|> <s> ok")]},
    "empty contents": {"messages": [system(""), user(""), assistant(""), user("still there?")]},
    "tools offered": {"messages": [user("Rain in Paris?")], "tools": [WEATHER, CLOCK]},
    "tools offered, system": {"messages": [system("Use tools."), user("Rain in Paris?")], "tools": [WEATHER]},
    "tool called": {
        "messages": [
            user("Rain in 東京?"),
            {"role": "assistant", "tool_calls": [call("get_weather", place="東京", days=2, detail=1.0, deep=None)]},
            {"role": "tool", "name": "get_weather", "content": '{"rain": true}'},
            assistant("Yes, it rains."),
            user("And tomorrow?"),
        ],
        "tools": [WEATHER],
    },
    "tool call with content": {
        "messages": [
            user("Time?"),
            assistant("Let me look.", tool_calls=[call("get_time")]),
            {"role": "tool", "content": {"hour": 12, "half": 0.5, "ok": True, "zone": None}},
        ],
        "tools": [CLOCK],
    },
    "two tool calls": {
        "messages": [
            user("Rain and time?"),
            {"role": "assistant", "tool_calls": [call("get_weather", place="Paris"), call("get_time")]},
            {"role": "tool", "content": "dry"},
            {"role": "tool", "content": "noon"},
        ],
        "tools": [WEATHER, CLOCK],
    },
    "tool answer without call": {"messages": [user("x"), {"role": "tool", "content": "y"}]},
    "thinking": {"messages": [user("2+2?"), assistant("4", thinking="Adding."), user("3+3?")]},
    "thinking at the end": {
        "messages": [user("2+2?"), assistant("4", thinking="Adding.")],
        "add_generation_prompt": False,
    },
    "channel markup": {"messages": [user("x"), assistant("<|channel|>final<|message|>y"), user("z")]},
    "developer": {"messages": [{"role": "developer", "content": "Be kind."}, user("Hi")]},
    "arguments": {
        "messages": [user("Hi")],
        "kwargs": {"reasoning_effort": "high", "model_identity": "You are a test.", "date_string": "1 Jan 2030"},
    },
    "builtin tools": {
        "messages": [
            user("Search."),
            {"role": "assistant", "tool_calls": [call("brave_search", query="herons")]},
            {"role": "ipython", "content": "found"},
        ],
        "kwargs": {"builtin_tools": ["brave_search", "code_interpreter", "browser", "python"]},
    },
    "no messages": {"messages": []},
    "only system": {"messages": [system("Alone.")]},
    "many turns": {"messages": [m for i in range(12) for m in (user(f"question {i}"), assistant(f"answer {i}"))]},
}

TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "unk_token": "<unk>", "pad_token": "<pad>"}


def templates(shared):
    for path in sorted((shared / "templates").glob("*.jinja")):
        yield path.name, path.read_text(encoding="utf-8")
    for path in sorted((shared / "vocab").glob("*.gguf")):
        field = GGUFReader(path).fields.get("tokenizer.chat_template")
        if field is not None:
            yield path.name, field.contents()


def render(template, conversation):
    try:
        text = template.render(
            messages=conversation["messages"],
            tools=conversation.get("tools"),
            documents=None,
            add_generation_prompt=conversation.get("add_generation_prompt", True),
            **TOKENS,
            **conversation.get("kwargs", {}),
        )
    except TemplateError as error:
        # Only what raise_exception says is compared; other failures are failures in both.
        said = type(error) is TemplateError
        return {"raised": error.message} if said else {"failed": type(error).__name__}
    except TypeError as error:
        return {"failed": type(error).__name__}
    return {"text": text}


def main():
    shared = pathlib.Path(sys.argv[1])
    renderings = {}
    for name, source in templates(shared):
        template = environment().from_string(source)
        renderings[name] = {title: render(template, c) for title, c in CONVERSATIONS.items()}
    dump = lambda value: json.dumps(value, ensure_ascii=False, indent=1) + "\n"
    (HERE / "conversations.json").write_text(dump({"tokens": TOKENS, "conversations": CONVERSATIONS}), encoding="utf-8")
    (HERE / "renderings.json").write_text(dump(renderings), encoding="utf-8")


if __name__ == "__main__":
    main()
