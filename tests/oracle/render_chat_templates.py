#!/usr/bin/env python3
"""Writes tests/fixtures/chat-templates/cases.json: what transformers renders for the templates beside it.

    python3 -m venv .venv
    .venv/bin/pip install transformers==5.23.0 jinja2==3.1.6
    .venv/bin/python tests/oracle/render_chat_templates.py
"""

import json
import pathlib

import jinja2
import transformers

FIXTURES = pathlib.Path(__file__).resolve().parent.parent / "fixtures"
TEMPLATES = FIXTURES / "chat-templates"


def message(role, content, **more):
    return {"role": role, "content": content, **more}


ASK = [message("user", "Hello, world!")]
TALK = [
    message("system", "  Be brief. "),
    message("user", "What is 2 + 2?\n"),
    message("assistant", "<think>easy</think>It is 4."),
    message("user", "Why <b>& 'so'</b>? 漢字 \N{GRINNING FACE}"),
]
CASES = [
    ("deepseek", ASK, True, {}),
    ("deepseek", ASK, False, {}),
    ("deepseek", ASK, True, {"thinking": True}),
    ("deepseek", ASK, True, {"thinking": False}),
    ("deepseek", TALK, True, {}),
    ("deepseek", [message("system", "One."), message("system", "Two."), *ASK], True, {}),
    ("deepseek", TALK[:3], True, {}),
    ("blocks", ASK, True, {}),
    ("blocks", ASK, False, {}),
    ("blocks", TALK, True, {}),
    ("blocks", [message("user", "a", name="Ann"), message("assistant", " b ")], True, {}),
    ("blocks", [*ASK, *ASK], True, {}),
    ("values", ASK, True, {}),
    ("values", TALK, True, {"options": {"list": ["x", "é"]}}),
    ("values", [message("user", "skip me"), message("user", "full stop"), *ASK], True, {}),
]


def main():
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(FIXTURES / "tiny-yarn")
    cases = []
    for template, messages, add_generation_prompt, variables in CASES:
        case = {
            "template": template,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "variables": variables,
        }
        try:
            case["expected"] = tokenizer.apply_chat_template(
                messages,
                chat_template=(TEMPLATES / f"{template}.jinja").read_text(),
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **variables,
            )
        except jinja2.exceptions.TemplateError as error:
            case["error"] = str(error)
        cases.append(case)
    made_with = {"transformers": transformers.__version__, "jinja2": jinja2.__version__}
    text = json.dumps({"made_with": made_with, "cases": cases}, indent=1, ensure_ascii=False)
    (TEMPLATES / "cases.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
