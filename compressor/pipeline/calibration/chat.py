"""Check rows of chat data sets and prepare them for a chat template (see compressor.pipeline.calibration.chat_template).

A row keeps all keys of its turns. It passes `tools` and `documents` (each a list, or a list as JSON text), `enable_thinking`,
and the variables in `chat_template_kwargs` to the template. Only two things are rewritten:

* ShareGPT's keys `from` and `value` become `role` and `content`, and its speakers become roles (see `SPEAKERS`).
* Keys whose value is null are left out of turns, parts of content and tool calls, as transformers does for turns.

Parts that are not text (images, audio, video) are refused.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from compressor.errors import CalibrationError
from compressor.reading import elide, parse_json

Turn = dict[str, Any]

SPEAKERS = {
    **{name: name for name in ("system", "developer", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool", "function_response": "tool"},
}
ROLES = {"human": "user", "gpt": "assistant"}  # role names that no template knows
MEDIA = tuple(name + plural for name in ("image", "video", "audio") for plural in ("", "s"))
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING = ("reasoning_content", "reasoning", "thinking")
JSON_NAMES = {str: "text", dict: "an object", list: "a list", bool: "a boolean", type(None): "null"}


@dataclass(frozen=True)
class Conversation:
    """One row of a chat data set."""

    turns: list[Turn]
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of `apply_chat_template`
    where: str = "conversation"  # file and line, for error messages


def json_name(value: object) -> str:
    """Return the name of a value's type for error messages: `text`, `an object`, `a number`."""
    return JSON_NAMES.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def without_nulls(value: Any) -> Any:
    """Return data without the keys whose value is null, at every depth.

    Arrow (Parquet, the hub's data sets) gives all rows the keys of all other rows and fills them with null.
    """
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def make_conversation(turns: list[Any], row: dict[str, Any], where: str) -> Conversation:
    """Check a row of a chat data set.

    Args:
        turns: Value of the row's column that holds the conversation.
        row: All columns of the row.
        where: Prefix of error messages: file and line.

    Raises:
        CalibrationError: a turn, a part of its content, a tool call or an option cannot be given to a template.
    """
    if not turns:
        raise CalibrationError(f"{where}: the conversation has no turns; leave the row out")
    checked = [_turn(turn, f"{where}: turn {number}") for number, turn in enumerate(turns, 1)]
    media = next((name for name in MEDIA if row.get(name)), None)
    if media is not None:
        raise CalibrationError(f"{where}: `{media}` is not empty, and only text can be read; leave the row out")
    return Conversation(checked, _options(row, where), where)


def _turn(turn: Any, where: str) -> Turn:
    """Check a turn and return it with the keys `role` and `content`, without nulls."""
    if not isinstance(turn, dict):
        raise CalibrationError(f"{where} is {json_name(turn)} where an object with role and content is needed; correct it")
    given = {key: value for key, value in turn.items() if value is not None}
    role = given.get("role")
    if role is None and "from" in given:
        speaker = given.pop("from")
        role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise CalibrationError(
                f"{where}: `from` is {elide(speaker, 40)}, none of {', '.join(SPEAKERS)}; name one of these"
            )
    if not isinstance(role, str) or not role:
        raise CalibrationError(f"{where} has no `role`; name the speaker")
    where = f"{where} ({elide(role, 20)})"
    if "content" not in given and "value" in given:
        given["content"] = given.pop("value")
    media = next((name for name in MEDIA if given.get(name)), None)
    if media is not None:
        raise CalibrationError(f"{where} holds `{media}`, and only text can be read; leave the row out")
    if "function_call" in given:
        raise CalibrationError(f"{where} calls a tool by `function_call`; write it as `tool_calls`")
    made = {**given, "role": ROLES.get(role, role)}
    if "tool_calls" in given:
        made["tool_calls"] = _tool_calls(given["tool_calls"], where)
    if "content" in given:
        made["content"] = _content(given["content"], role, where)
    elif not made.get("tool_calls") and not any(made.get(key) for key in REASONING):
        raise CalibrationError(f"{where} has no `content`; leave the row out")
    return made


def _content(content: Any, role: str, where: str) -> Any:
    """Check the content of a turn. An empty list becomes the empty text."""
    if isinstance(content, list):
        return [_part(part, where) for part in content] or ""
    if not isinstance(content, str) and not (isinstance(content, dict) and role == "tool"):
        raise CalibrationError(f"{where}: `content` is {json_name(content)} where text is needed; correct it")
    return content


def _part(part: Any, where: str) -> Any:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise CalibrationError(f"{where}: a part of the content is {json_name(part)} where text is needed; correct it")
    part = {key: value for key, value in part.items() if value is not None}
    kind = part.get("type", "text")
    if kind not in TEXT_PARTS or any(part.get(name) for name in MEDIA):
        what = kind if kind not in TEXT_PARTS else next(name for name in MEDIA if part.get(name))
        raise CalibrationError(
            f"{where}: a part of the content is of type {elide(what, 40)}, and only text can be read; leave the row out"
        )
    if not isinstance(part.get("text"), str):
        raise CalibrationError(
            f"{where}: the `text` of a part of the content is {json_name(part.get('text'))}; leave the row out"
        )
    return part


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Check tool calls. Name and arguments are in `function`, as in OpenAI's format, or in the call itself."""
    if not isinstance(calls, list):
        raise CalibrationError(f"{where}: `tool_calls` is {json_name(calls)} where a list is needed; correct it")
    made = []
    for given in calls:
        if not isinstance(given, dict):
            raise CalibrationError(f"{where}: a tool call is {json_name(given)} where an object is needed; correct it")
        call = {key: value for key, value in given.items() if value is not None}
        if isinstance(call.get("function"), dict):
            call["function"] = {key: value for key, value in call["function"].items() if value is not None}
        if not isinstance(called_function(call).get("name"), str):
            raise CalibrationError(f"{where}: a tool call names no function; correct it")
        made.append(call)
    return made


def called_function(call: dict[str, Any]) -> dict[str, Any]:
    """Return the object in a tool call that holds `name` and `arguments`."""
    function = call.get("function", call)
    return function if isinstance(function, dict) else {}


def _options(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the arguments that a row passes to the template in addition to its turns."""
    options: dict[str, Any] = {}
    for name in ("tools", "documents"):
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            value = parse_json(value, f"{where}: `{name}`", CalibrationError, "correct it")
        if value:
            if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
                raise CalibrationError(f"{where}: `{name}` is no list of objects; correct it")
            options[name] = value
    if isinstance(row.get("enable_thinking"), bool):
        options["enable_thinking"] = row["enable_thinking"]
    variables = row.get("chat_template_kwargs")
    if isinstance(variables, str) and variables.strip():
        variables = parse_json(variables, f"{where}: `chat_template_kwargs`", CalibrationError, "correct it")
    if not variables:
        return options
    if not isinstance(variables, dict):
        raise CalibrationError(f"{where}: `chat_template_kwargs` is {json_name(variables)} where an object is needed")
    own = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    taken = next((name for name in variables if name in own or name == "messages"), None)
    if taken is not None:
        raise CalibrationError(
            f"{where}: `chat_template_kwargs` sets `{taken}`, which is no variable of a template; remove it"
        )
    return {**options, **variables}
