"""Rows of chat data sets become the text that the tokenizer's own chat template makes of them, or are refused by line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerBase

from compressor.assets import DEMO_MODEL
from compressor.errors import CalibrationError
from compressor.evaluation.text import Protocol, load_text
from compressor.model.tokenizer import encode_prompt, load_tokenizer
from compressor.pipeline.calibration import data

Row = dict[str, Any]
Template = Callable[[str], PreTrainedTokenizerBase]

# As Qwen2.5: tools, tool calls, JSON of arguments; content must be text.
TOOLS = (
    "{%- if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n"
    "{%- if message.content %}{{ '\n' + message.content }}{% endif %}"
    "{%- for call in message.tool_calls or [] %}{{ '\n<tool_call>\n' }}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}"
)
# As Llama 3.2 and SmolVLM: content is text or a list of parts, which are joined without anything between them.
PARTS = (
    "{%- for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{%- if message.content is string %}{{ message.content }}{% else %}"
    "{%- for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<|eot_id|>{% endfor %}"
)
# As Gemma 2: no system turns.
NO_SYSTEM = (
    "{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{%- for message in messages %}<start_of_turn>{{ message.role }}\n{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
)
# As Qwen3: content that is no text counts as none; arguments are text or an object.
LENIENT = (
    "{%- for message in messages %}{% set content = message.content if message.content is string else '' %}"
    "<|im_start|>{{ message.role }}\n{{ content }}"
    "{%- for call in message.tool_calls or [] %}{{ call.function.name }}: "
    "{%- if call.function.arguments is string %}{{ call.function.arguments }}{% else %}"
    "{{ call.function.arguments | tojson }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
)
# As the first DeepSeek V3: content and arguments are added to text.
ADDED = (
    "{%- for message in messages %}{{ '<' + message['role'] + '>' + message['content'] }}"
    "{%- for call in message.tool_calls or [] %}{{ call['function']['name'] + ':' + call['function']['arguments'] }}"
    "{%- endfor %}{% endfor %}"
)
# As Qwen3-Coder and GLM 4.5: each argument by itself.
ITEMS = (
    "{%- for message in messages %}<{{ message.role }}>{{ message.content }}{% for call in message.tool_calls or [] %}"
    "<{{ call.function.name }}>{% for key, value in call.function.arguments.items() %}{{ key }}={{ value }}{% endfor %}"
    "{%- endfor %}{% endfor %}"
)
# As a template that was never given anything but text.
PRINTED = (
    "{% for turn in messages %}<{{ turn.role }}>{{ turn.get('content') }}"
    "{% for call in turn.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments }}{% endfor %}{% endfor %}"
)
BARE = "{% for turn in messages %}{{ turn.get('content') }}{% endfor %}"
ARGUMENTS = {"city": "Rome", "days": None}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def call(arguments: Any = ARGUMENTS) -> Row:
    return {"id": "abcdefgh1", "type": "function", "function": {"name": "weather", "arguments": arguments}}


def calling(arguments: Any = ARGUMENTS, **content: Any) -> list[Row]:
    """A conversation in which a tool is called."""
    return [
        {"role": "user", "content": "Weather in Rome?"},
        {"role": "assistant", "tool_calls": [call(arguments)], **content},
        {"role": "tool", "content": "18 degrees", "tool_call_id": "abcdefgh1"},
        {"role": "assistant", "content": "It is warm."},
    ]


def asking(content: Any, role: str = "user") -> list[Row]:
    return [{"role": role, "content": content}, {"role": "assistant", "content": "18 degrees"}]


@pytest.fixture
def template() -> Template:
    """The demo model's tokenizer with another chat template."""

    def make(text: str) -> PreTrainedTokenizerBase:
        tokenizer = load_tokenizer(DEMO_MODEL)
        tokenizer.chat_template = text
        return tokenizer

    return make


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., str]:
    """The text of a file's only row, as the tokens have it."""

    def text(tokenizer: PreTrainedTokenizerBase, row: Row) -> str:
        path = tmp_path / "data.jsonl"
        path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
        (document,) = data.documents(str(path), 0, "all")
        decoded = tokenizer.decode(data.encode(tokenizer, document, joined=False))
        assert isinstance(decoded, str)
        return decoded

    return text


@pytest.mark.parametrize(
    ("text", "row"),
    [
        (TOOLS, {"messages": calling(content=None), "tools": [TOOL]}),
        (TOOLS, {"messages": calling(content="I ask."), "tools": [TOOL]}),
        (TOOLS, {"messages": calling(), "tools": [TOOL]}),
        (LENIENT, {"messages": calling(json.dumps(ARGUMENTS, separators=(",", ":")), content=None)}),
        (LENIENT, {"messages": calling(content=None)}),
        (ADDED, {"messages": calling('{"city":  "Rome"}', content="")}),
        (ITEMS, {"messages": calling(content=None)}),
        (PARTS, {"messages": asking([{"type": "text", "text": "Weather"}, {"type": "text", "text": " in Rome?"}])}),
        (PARTS, {"messages": asking([{"type": "text", "text": "You are short."}], "system")}),
        (NO_SYSTEM, {"messages": asking("Say None, or [{'type': 'text'}]")}),
        (TOOLS, {"messages": asking("You are short.", "developer")}),
        ("{{ documents[0].text }}{{ messages[0].content }}", {"messages": asking("hello"), "documents": [{"text": "fact"}]}),
        ("{{ enable_thinking }}{{ messages[0].content }}", {"messages": asking("hello"), "enable_thinking": False}),
    ],
)
def test_the_template_receives_the_row_as_it_is(template: Template, read: Callable[..., str], text: str, row: Row) -> None:
    tokenizer = template(text)
    options = {key: value for key, value in row.items() if key != "messages"}
    assert read(tokenizer, row) == tokenizer.apply_chat_template(row["messages"], tokenize=False, **options)


def test_a_tool_call_reads_as_the_model_will_write_it(template: Template, read: Callable[..., str]) -> None:
    assert read(template(TOOLS), {"messages": calling(content=None)[:2], "tools": [TOOL]}) == (
        "<|im_start|>system\n"
        '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}\n'
        "<|im_end|>\n"
        "<|im_start|>user\nWeather in Rome?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": null}}\n</tool_call>'
        "<|im_end|>\n"
    )


@pytest.mark.parametrize("text", [TOOLS, ITEMS])
def test_arguments_stored_as_json_text_become_an_object_where_the_template_needs_one(
    template: Template, read: Callable[..., str], text: str
) -> None:
    tokenizer = template(text)
    stored = {"messages": calling(json.dumps(ARGUMENTS), content=None)}
    assert read(tokenizer, stored) == tokenizer.apply_chat_template(calling(), tokenize=False)


@pytest.mark.parametrize("text", [ADDED, PRINTED])
def test_arguments_that_are_an_object_become_json_text_where_the_template_needs_it(
    template: Template, read: Callable[..., str], text: str
) -> None:
    assert '{"city": "Rome", "days": null}' in read(template(text), {"messages": calling(content="")[:2]})


def test_a_tool_called_without_arguments_has_none(template: Template, read: Callable[..., str]) -> None:
    assert '"arguments": {}}' in read(template(TOOLS), {"messages": calling("", content=None)})


@pytest.mark.parametrize("text", [TOOLS, NO_SYSTEM, LENIENT, ADDED, ITEMS])
@pytest.mark.parametrize("part", [{"type": "text", "text": "Weather"}, {"text": "Weather"}, "Weather"])
def test_parts_are_joined_for_a_template_that_cannot_write_them(
    template: Template, read: Callable[..., str], text: str, part: Any
) -> None:
    tokenizer = template(text)
    row = {"messages": asking([part, {"type": "text", "text": "in Rome?"}])}
    assert read(tokenizer, row) == tokenizer.apply_chat_template(asking("Weather\nin Rome?"), tokenize=False)


def test_parts_are_joined_only_in_turns_whose_parts_the_template_cannot_write(
    template: Template, read: Callable[..., str]
) -> None:
    text = (
        "{% for turn in messages %}<{{ turn.role }}>{% if turn.role == 'user' and turn.content is not string %}"
        "{% for part in turn.content %}[{{ part.text }}]{% endfor %}{% else %}{{ turn.content }}{% endif %}{% endfor %}"
    )
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]}
    assert read(template(text), row) == "<user>[a][b]<assistant>a\nb"


def test_parts_of_an_answer_are_joined_while_arguments_stay_an_object(template: Template, read: Callable[..., str]) -> None:
    tokenizer = template(ITEMS)
    turns = calling(content=None)
    stored = [*turns[:2], {**turns[2], "content": [{"type": "text", "text": "18 degrees"}]}, turns[3]]
    assert read(tokenizer, {"messages": stored}) == tokenizer.apply_chat_template(turns, tokenize=False)


def test_a_template_that_takes_nothing_but_parts_receives_them(template: Template, read: Callable[..., str]) -> None:
    text = "{% for turn in messages %}{% for part in turn.content %}[{{ part['text'] + '' }}]{% endfor %}{% endfor %}"
    parts = [{"type": "text", "text": "a"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]}
    assert read(template(text), row) == "[a][a]"


@pytest.mark.parametrize("content", ["turn.get('content')", "turn.content + ''"])
def test_a_turn_without_content_is_empty_where_the_template_would_print_none(
    template: Template, read: Callable[..., str], content: str
) -> None:
    calls = "{% for call in turn.tool_calls or [] %}<{{ call.function.name }}>{% endfor %}"
    tokenizer = template(f"{{% for turn in messages %}}{{{{ {content} }}}}{calls}{{% endfor %}}")
    assert read(tokenizer, {"messages": calling(content=None)}) == "Weather in Rome?<weather>18 degreesIt is warm."


def test_keys_of_tool_calls_that_are_null_are_not_there(template: Template, read: Callable[..., str]) -> None:
    tokenizer = template("{% for call in messages[1].tool_calls %}{{ call.function.name }}{{ call.id }}{% endfor %}")
    turns = calling(content="")
    turns[1]["tool_calls"][0]["id"] = None
    assert read(tokenizer, {"messages": turns}) == "weather"


def test_content_without_parts_is_empty(template: Template, read: Callable[..., str]) -> None:
    assert read(template(PRINTED), {"messages": asking([])}) == "<user><assistant>18 degrees"


def test_the_answer_of_a_tool_may_be_an_object(template: Template, read: Callable[..., str]) -> None:
    turns = calling(content="")
    turns[2]["content"] = {"degrees": 18}
    assert '<|im_start|>tool\n{"degrees": 18}<|im_end|>' in read(template(TOOLS), {"messages": turns})


def test_conversations_of_sharegpt_have_roles(template: Template, read: Callable[..., str]) -> None:
    tokenizer = template(TOOLS)
    turns = [("system", "Be short."), ("human", "hello"), ("gpt", "good day"), ("observation", "18"), ("chatgpt", "warm")]
    row = {"conversations": [{"from": speaker, "value": value} for speaker, value in turns]}
    roles = ("system", "user", "assistant", "tool", "assistant")
    expected = [{"role": role, "content": value} for role, (_, value) in zip(roles, turns, strict=True)]
    assert read(tokenizer, row) == tokenizer.apply_chat_template(expected, tokenize=False)


@pytest.mark.parametrize("key", ["messages", "tools"])
def test_turns_and_tools_may_be_stored_as_json_text(template: Template, read: Callable[..., str], key: str) -> None:
    tokenizer = template(TOOLS)
    row = {"messages": calling(), "tools": [TOOL]}
    expected = tokenizer.apply_chat_template(calling(), tools=[TOOL], tokenize=False)
    assert read(tokenizer, {**row, key: json.dumps(row[key])}) == expected


def test_variables_of_the_template_come_from_the_row(template: Template, read: Callable[..., str]) -> None:
    tokenizer = template("{{ mood }}: {{ messages[0].content }}")
    assert read(tokenizer, {"messages": asking("hello"), "chat_template_kwargs": {"mood": "calm"}}) == "calm: hello"


def test_the_begin_token_of_a_template_stands_once(template: Template, read: Callable[..., str]) -> None:
    tokenizer = template("{{ bos_token }}{{ messages[0].content }}")
    assert read(tokenizer, {"messages": asking("hello")}).count(tokenizer.bos_token) == 1


def test_keys_that_parquet_fills_with_null_are_not_there(tmp_path: Path, template: Template) -> None:
    tokenizer = template(TOOLS)
    plain = {"messages": [{"role": "user", "content": "hello"}], "tools": None}
    calls = calling({"city": "Rome"})
    other = [calls[0], {"role": "assistant", "tool_calls": [call({"place": "Oslo"})]}, *calls[2:]]
    rows = [plain, {"messages": calls, "tools": [TOOL]}, {"messages": other, "tools": None}]
    table = pyarrow.Table.from_pylist(json.loads(json.dumps(rows).replace('"properties": {}', '"required": []')))
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    documents = list(data.documents(str(tmp_path / "data.parquet"), 0, "all"))
    read = [tokenizer.decode(data.encode(tokenizer, document, joined=False)) for document in documents]
    assert read[0] == tokenizer.apply_chat_template(plain["messages"], tokenize=False)
    assert '"arguments": {"city": "Rome"}' in read[1]
    assert '"arguments": {"place": "Oslo"}' in read[2]


GOOD = {"messages": asking("hello")}
IMAGE = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "data:"}}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": asking(IMAGE)}, "turn 1 (user): a part of the content is of type image_url"),
        ({"messages": asking([{"type": "image"}])}, "of type image"),
        ({"messages": asking([{"type": "input_audio", "input_audio": {}}])}, "of type input_audio"),
        ({"messages": asking([{"image": "a.png", "text": "?"}])}, "of type image"),
        ({"messages": asking("<image>"), "images": ["a.png"]}, "`images` is not empty"),
        ({"messages": [{"role": "user", "content": "?", "images": ["a.png"]}]}, "holds `images`"),
        ({"messages": asking([{"type": "text", "text": None}])}, "the `text` of a part of the content is null"),
        ({"messages": asking([5])}, "a part of the content is a number"),
        ({"messages": asking(5)}, "`content` is a number"),
        ({"messages": asking({"type": "image"})}, "`content` is an object"),
        ({"messages": asking(None)}, "turn 1 (user) has no `content`"),
        ({"messages": [{"role": "user", "text": "hello"}]}, "turn 1 (user) has no `content`"),
        ({"messages": [{"content": "hello"}]}, "turn 1 has no `role`"),
        ({"messages": [{"role": 5, "content": "hello"}]}, "turn 1 has no `role`"),
        ({"messages": ["hello", *asking("hello")]}, "turn 1 is text where an object"),
        ({"messages": ["hello"]}, "`messages` is a list of text"),
        ({"messages": {"role": "user"}}, "`messages` is an object"),
        ({"messages": []}, "has no turns"),
        ({"messages": None}, "`messages` is null"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "`from` is function_call, none of"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, "by `function_call`"),
        ({"messages": [{"role": "assistant", "tool_calls": ["f"]}]}, "a tool call is text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "a tool call names no function"),
        ({"messages": [{"role": "assistant", "tool_calls": {"name": "f"}}]}, "`tool_calls` is an object"),
        ({"messages": asking("hello"), "tools": ["f"]}, "`tools` is no list of objects"),
        ({"messages": asking("hello"), "tools": "[{"}, "`tools`: not valid JSON"),
        ({"messages": asking("hello"), "documents": [5]}, "`documents` is no list of objects"),
        ({"messages": asking("hello"), "chat_template_kwargs": [1]}, "`chat_template_kwargs` is a list"),
        ({"messages": asking("hello"), "chat_template_kwargs": {"chat_template": "x"}}, "sets `chat_template`"),
        ({"messages": '[{"role": "user", }]'}, "`messages`: not valid JSON"),
    ],
)
def test_a_row_that_is_no_conversation_of_texts_is_refused_by_line(tmp_path: Path, row: Row, reason: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(row)}\n")
    with pytest.raises(CalibrationError) as caught:
        list(data.documents(str(path), 0, "calibration"))
    assert str(caught.value).startswith(f"{path}:3: ")
    assert reason in str(caught.value)
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    ("text", "turns", "reason"),
    [
        (NO_SYSTEM, asking("Be short.", "system"), "System role not supported"),
        ("{{ messages[0].nothing + 1 }}", asking("hello"), "no attribute 'nothing'"),
        ("{{ messages[0].__class__.__mro__ }}", asking("hello"), "unsafe"),
        ("{{ range(10 ** 9) | list }}", asking("hello"), "Range too big"),
        ("{% for %}", asking("hello"), "Expected an expression"),
        ("{{ messages[0].content + 1 }}", asking([{"type": "text", "text": "a"}]), "can only concatenate"),
        ("{% for turn in messages %}{{ [turn.content] }}{% endfor %}", asking(["a"]), "as Python writes them"),
        ("{{ messages[1].tool_calls }}", calling(content=""), "as Python writes them"),
        (BARE.replace("turn.get('content')", "turn.content + ''"), calling(content=None), "assistant turns without content"),
        (BARE, calling(content=None), "assistant turns without content"),
        ({"tool_use": "x"}, asking("hello"), "multiple chat templates"),
    ],
)
def test_a_row_that_the_template_cannot_write_is_refused_by_line(
    tmp_path: Path, template: Template, text: Any, turns: list[Row], reason: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n")
    tokenizer = template(text)
    with pytest.raises(CalibrationError) as caught:
        load_text(str(path), tokenizer, Protocol(4, 4, False), samples=1)
    assert str(caught.value).startswith(f"{path}:1: the tokenizer's chat template cannot write this row")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 300


def test_a_conversation_without_a_chat_template_is_refused_by_line(tmp_path: Path, template: Any) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")
    with pytest.raises(CalibrationError, match=r"data.jsonl:1: holds a conversation, and the tokenizer has no chat template"):
        load_text(str(path), template(None), Protocol(4, 4, False), samples=1)


def test_a_prompt_that_the_template_cannot_write_is_refused(template: Template) -> None:
    with pytest.raises(CalibrationError, match=r"prompt: the tokenizer's chat template fails \(no users\); leave out --chat"):
        encode_prompt(template("{{ raise_exception('no users') }}"), "hello", chat=True)
