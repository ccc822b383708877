"""Text of one record to token ids; every record by itself.

A chat is written by the tokenizer's own template, special tokens included: nothing is put together by hand, so what a
model is trained on is what `apply_chat_template(tokenize=True)` gives. A completion is what the template writes for the
whole conversation and not for its prompt alone: the turn's end belongs to it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import TemplateError
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import DPAlignError

Message = dict[str, Any]
Text = str | list[Message]  # plain, or the messages of a chat
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # of a record, that are handed to its chat template
ROLES = {"human": "user", "gpt": "assistant", "function": "tool", "observation": "tool"}  # ShareGPT's names


@dataclass(frozen=True)
class Encoded:
    """Token ids of a text, and which of them are learned."""

    ids: list[int]
    learned: list[bool]

    @property
    def prompt_tokens(self) -> int:
        """Tokens before the first that is learned."""
        return self.learned.index(True) if True in self.learned else len(self.ids)

    def cut(self, length: int) -> Encoded:
        """The first `length` tokens, to be kept."""
        return Encoded(kept(self.ids[:length]), self.learned[:length])


def kept(ids: list[int]) -> list[int]:
    """The same ids, each one object for all texts: a token of the many that are kept then takes 8 bytes."""
    return [_IDS.setdefault(token, token) for token in ids]


_IDS: dict[int, int] = {}


# What is encoded --------------------------------------------------------------------------------------


def read_text(value: Any) -> Text:
    """A string as it is; a list of messages in the form that templates read.

    ShareGPT's `from` and `value` become `role` and `content`, parts of text become one string, and no content (beside
    tool calls, say) is the empty string: templates would write Python's list, or the word None.

    Raises:
        DPAlignError: not a text, or a message that is none.
    """
    if isinstance(value, str):
        return _whole(value)
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise DPAlignError("expected a string or a list of chat messages")
    return [_read_message(message) for message in value]


def _read_message(message: Mapping[str, Any]) -> Message:
    read = {key: value for key, value in message.items() if value is not None}  # Arrow fills columns up with nulls
    if "from" in read and "role" not in read:
        read["role"] = read.pop("from")
        if "content" not in read:
            read["content"] = read.pop("value", "")
    role, content = read.get("role"), read.get("content", "")
    if not isinstance(role, str) or not role:
        raise DPAlignError("a chat message has no role: expected {'role': ..., 'content': ...}")
    if isinstance(content, list):
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
        for part in parts:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise DPAlignError(
                    "a chat message has a part that is no text: images and sounds cannot be learned here"
                )
        content = "".join(part["text"] for part in parts)
    if not isinstance(content, str):
        raise DPAlignError("the content of a chat message is neither text nor a list of text parts")
    return read | {"role": ROLES.get(role, role), "content": _whole(content)}


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DPAlignError("the text holds half of a character (a lone surrogate): it is no valid Unicode") from None
    return text


def apart(asked: Any, answer: Any) -> tuple[Text, Text]:
    """A prompt and its completion: two strings, or two lists of messages (the prompt's may be empty).

    A string answers a chat as its assistant. A completion that repeats the prompt (its messages, or a string that one
    of them says) is a whole conversation, and is split behind it.

    Raises:
        DPAlignError: a string prompt beside chat messages that do not hold it, or no answer.
    """
    prompt, completion = read_text("" if asked is None else asked), read_text(answer)
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if isinstance(prompt, str):
        said = [message["content"].strip() for message in completion[:-1]]
        if prompt.strip() and prompt.strip() not in said:
            raise DPAlignError("the prompt is a string and the answer is chat messages without it: give two of a kind")
        place = len(said) - said[::-1].index(prompt.strip()) if prompt.strip() else 0
        prompt, completion = completion[:place], completion[place:]
    elif prompt and completion[: len(prompt)] == prompt:
        completion = completion[len(prompt) :]
    if not completion:
        raise DPAlignError("the answer has no chat message of its own")
    return prompt, completion


def joined(asked: Any, answer: Any) -> Text:
    """The text that a prompt and its completion make; an assistant's turn that the prompt has begun is gone on with.

    Raises:
        DPAlignError: what `apart` refuses.
    """
    prompt, completion = apart(asked, answer)
    if isinstance(prompt, str) or isinstance(completion, str):
        return f"{prompt}{completion}"
    if prompt and prompt[-1]["role"] == completion[0]["role"] == "assistant":
        begun = completion[0] | {"content": prompt[-1]["content"] + completion[0]["content"]}
        return [*prompt[:-1], begun, *completion[1:]]
    return [*prompt, *completion]


def shared_prompt(chosen: Text, rejected: Text) -> Text:
    """The messages that two conversations begin with, at most all but the last of the shorter one; none of strings."""
    if isinstance(chosen, str) or isinstance(rejected, str):
        return ""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    return chosen[:shared]


def as_string(text: Text) -> str:
    """A text for readers that know no chats (people, a lexicon): a line `role: content` for each message."""
    return text if isinstance(text, str) else "".join(f"{m['role']}: {m['content']}\n" for m in text)


def template_options(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record hands to its chat template: `tools` (a list, or its JSON) and `chat_template_kwargs`."""
    options: dict[str, Any] = dict(record.get("chat_template_kwargs") or {})
    tools = record.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise DPAlignError("column 'tools' is a string that is not JSON") from None
    return options | {"tools": tools} if tools else options


# Ids --------------------------------------------------------------------------------------------------


def encode_text(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    *,
    prepend_bos: bool = False,
    append_eos: bool = False,
    options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a whole text: of a chat what its template writes, of a string what the tokenizer does.

    Args:
        prepend_bos, append_eos: of strings; never a second one where the text or the tokenizer has it.
    """
    if not isinstance(text, str):
        return _template_ids(tokenizer, text, options or {})
    front, ids, back = _with_specials(tokenizer, text)
    return _begin(tokenizer, front, ids, prepend_bos) + _end(tokenizer, ids, back, append_eos)


def written(tokenizer: PreTrainedTokenizerBase, text: Text, options: Mapping[str, Any] | None = None) -> str:
    """A string as it is; a chat as the tokenizer's template writes it, special tokens included.

    Raises:
        DPAlignError: there is no template, or it refuses the chat.
    """
    return text if isinstance(text, str) else _write(tokenizer, text, options or {})


def encode_prompt_text(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    *,
    prepend_bos: bool = False,
    options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids that a completion follows: the assistant's turn is opened, or the one that is begun stays open."""
    if not isinstance(prompt, str):
        return _template_ids(tokenizer, prompt, options or {}, is_prompt=True)
    front, ids, _ = _with_specials(tokenizer, prompt)  # an EOS that the tokenizer adds would end the prompt
    return _begin(tokenizer, front, ids, prepend_bos) + ids


def worded(tokenizer: PreTrainedTokenizerBase, chat: list[Message], words: str) -> list[Message]:
    """A chat with words in front: as its system message, or where its template has none, before its first words."""
    first = chat[0] if chat else {"role": "user", "content": ""}
    if first["role"] != "system" and _says_system(tokenizer):
        return [{"role": "system", "content": words.strip()}, *chat]
    return [first | {"content": f"{words.strip()}\n\n{first.get('content') or ''}"}, *chat[1:]]


def _says_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes what a system message says."""
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    try:
        return "Be kind." in _write(tokenizer, chat, {}, is_prompt=True)
    except DPAlignError:
        return False


def encode_completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Any,
    completion: Any,
    *,
    prepend_bos: bool = False,
    append_eos: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Encoded:
    """Token ids of a prompt and its completion, of which the completion's are learned.

    Strings are encoded apart, as a policy that completes the prompt sees them. Of chats it is the conversation as the
    template writes it, learned from where it goes on after the prompt.

    Raises:
        DPAlignError: a template whose prompt is not the beginning of its conversation, or what `apart` refuses.
    """
    whole, (prompt, completion) = joined(prompt, completion), apart(prompt, completion)
    if isinstance(whole, str):
        front = encode_prompt_text(tokenizer, str(prompt), prepend_bos=prepend_bos)
        _, ids, back = _with_specials(tokenizer, str(completion))
        ids = ids + _end(tokenizer, ids, back, append_eos)[len(ids) :]
        return Encoded(front + ids, [False] * len(front) + [True] * len(ids))
    options = options or {}
    ids = _template_ids(tokenizer, whole, options)
    if not prompt:
        return Encoded(ids, [True] * len(ids))
    if not _write(tokenizer, whole, options).startswith(_write(tokenizer, prompt, options, is_prompt=True)):
        raise DPAlignError("the chat template writes the prompt otherwise alone than before an answer")
    front = _template_ids(tokenizer, prompt, options, is_prompt=True)
    shared = next((i for i, (a, b) in enumerate(zip(ids, front, strict=False)) if a != b), min(len(ids), len(front)))
    return Encoded(ids, [False] * shared + [True] * (len(ids) - shared))


def assistant_tokens(
    tokenizer: PreTrainedTokenizerBase, chat: Text, options: Mapping[str, Any] | None = None
) -> list[bool]:
    """Which of a chat's tokens the assistant wrote, as the template marks them.

    Raises:
        DPAlignError: not a chat, or a template without `{% generation %}`.
    """
    if isinstance(chat, str):
        raise DPAlignError("assistant_only_loss needs chat messages, and this text is a string")
    template = str(getattr(tokenizer, "chat_template", None) or "")
    if not re.search(r"{%-?\s*generation\s*-?%}", template):
        raise DPAlignError(
            "assistant_only_loss needs a chat template that marks the assistant's words with {% generation %}: use one "
            "or prompts and completions"
        )
    out = _apply(tokenizer, chat, options or {}, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    return [bool(mark) for mark in out["assistant_masks"]]


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which the chat template ends the assistant's turn; None without a template or such a token."""
    ids: list[int] = tokenizer(_around_an_answer(tokenizer)[1], add_special_tokens=False).input_ids
    return next((token for token in ids if token in tokenizer.added_tokens_decoder), None)


def turn_lead(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes between a prompt and the words of its answer: a space, a thought that is empty."""
    return _around_an_answer(tokenizer)[0]


def _around_an_answer(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template writes before an answer's words (behind its prompt) and after them."""
    if not getattr(tokenizer, "chat_template", None):
        return "", ""
    ask, answer = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Goodbye"}
    try:
        front, whole = _write(tokenizer, [ask], {}, is_prompt=True), _write(tokenizer, [ask, answer], {})
    except DPAlignError:  # a template that wants something else than a plain chat
        return "", ""
    before, _, after = whole.removeprefix(front).rpartition("Goodbye")
    return before if whole.startswith(front) else "", after


def opening_of_a_turn(tokenizer: PreTrainedTokenizerBase, role: str = "user") -> list[int]:
    """Token ids that the chat template writes before the words of a first message."""
    before = _write(tokenizer, [{"role": role, "content": "Hello"}], {}).partition("Hello")[0]
    ids: list[int] = tokenizer(before, add_special_tokens=False).input_ids
    return ids


def cut_length(text: str, low: int, high: int) -> int:
    """Length in [low, high] at which a record's text is cut into a prompt: a fixed function of that text."""
    if low == high:
        return low
    digest = hashlib.sha256(text.encode()).digest()
    return low + int.from_bytes(digest[:4], "big") % (high - low + 1)


# Strings: the tokenizer's special tokens --------------------------------------------------------------


def _with_specials(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int], list[int]]:
    """What the tokenizer puts in front of a text, the text's own ids, and what it puts behind."""
    encoding = _encoding(tokenizer, text)
    full: list[int] = tokenizer(text).input_ids if encoding is None else encoding.ids
    if encoding is not None:  # it marks what it adds: the text is read once
        added = encoding.special_tokens_mask
        if 1 not in added:
            return [], full, []
        if 0 in added:
            first, last = added.index(0), len(added) - added[::-1].index(0)
            return full[:first], full[first:last], full[last:]
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        return [t for t in full if t == tokenizer.bos_token_id], [], [t for t in full if t != tokenizer.bos_token_id]
    for start in range(len(full) - len(ids) + 1):
        if full[start : start + len(ids)] == ids:
            return full[:start], ids, full[start + len(ids) :]
    raise DPAlignError("the tokenizer changes a text when it adds its special tokens: it cannot be used here")


def _encoding(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoding | None:
    """What the library `tokenizers` makes of a text, without places; None of a tokenizer of another kind.

    It is `tokenizer(text)` without what transformers does around it, which takes as long again.
    """
    kind: Any = type(tokenizer)
    if _is_plain(kind):
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
        backend = tokenizer.backend_tokenizer
        is_split = backend.encode_special_tokens == tokenizer.split_special_tokens
        if backend.truncation is None and backend.padding is None and is_split:
            (encoding,) = backend.encode_batch_fast([text])
            return encoding
    encodings = tokenizer(text).encodings  # and from here on nothing is cut or padded
    return encodings[0] if encodings else None


@cache
def _is_plain(kind: Any) -> bool:
    """Whether nothing but transformers' own code stands between a call and the library."""
    is_called = kind.__call__ is PreTrainedTokenizerBase.__call__ and not hasattr(kind, "_switch_to_input_mode")
    return is_called and getattr(kind, "_encode_plus", None) is PreTrainedTokenizerFast._encode_plus


def _begin(tokenizer: PreTrainedTokenizerBase, front: list[int], ids: list[int], prepend_bos: bool) -> list[int]:
    if not front and not prepend_bos:
        return front
    bos = tokenizer.bos_token_id
    if bos is None:
        return front
    if prepend_bos and bos not in front:
        front = [bos, *front]
    return [token for token in front if token != bos] if ids[:1] == [bos] else front  # the text has its own


def _end(tokenizer: PreTrainedTokenizerBase, ids: list[int], back: list[int], append_eos: bool) -> list[int]:
    eos = tokenizer.eos_token_id
    if eos is None:
        return ids + back
    own = ids[-1:] == [eos]  # the text has its own
    back = [token for token in back if token != eos or not own]
    return ids + back + [eos] * (append_eos and not own and eos not in back)


# Chats: the tokenizer's template ----------------------------------------------------------------------


def _template_ids(
    tokenizer: PreTrainedTokenizerBase, chat: list[Message], options: Mapping[str, Any], *, is_prompt: bool = False
) -> list[int]:
    ids: list[int] = _apply(tokenizer, chat, options, is_prompt=is_prompt, tokenize=True, return_dict=True)["input_ids"]
    return ids


def _write(
    tokenizer: PreTrainedTokenizerBase, chat: list[Message], options: Mapping[str, Any], *, is_prompt: bool = False
) -> str:
    return str(_apply(tokenizer, chat, options, is_prompt=is_prompt, tokenize=False))


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    chat: list[Message],
    options: Mapping[str, Any],
    *,
    is_prompt: bool = False,
    **how: Any,
) -> Any:
    """`apply_chat_template`, whose refusals become one sentence that quotes nobody."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise DPAlignError("the data holds chat messages, but the tokenizer has no chat template: give plain strings.")
    if not chat:
        raise DPAlignError("a chat has no message")
    if is_prompt:  # a turn that the assistant has begun stays open
        how["add_generation_prompt"] = chat[-1]["role"] != "assistant"
        how["continue_final_message"] = not how["add_generation_prompt"]
    try:
        written = tokenizer.apply_chat_template(chat, **options, **how)
        for name, without, rest in _dropped(chat, options):
            if tokenizer.apply_chat_template(without, **rest, **how) == written:
                raise DPAlignError(f"the chat template does not write {name}: use one that does, or leave them out")
    except DPAlignError:
        raise
    except TemplateError as error:  # its words are shown if they are the template's own
        said = f": {error.message}" if error.message and error.message in str(template) else ""
        raise DPAlignError(f"the chat template refuses these messages{said}") from None
    except Exception as error:
        raise DPAlignError(f"the chat template fails on these messages ({type(error).__name__})") from None
    return written


def _dropped(chat: list[Message], options: Mapping[str, Any]) -> list[tuple[str, list[Message], dict[str, Any]]]:
    """The chat without its tool calls, and without tools: a template that writes the same passes over them."""
    found = []
    if any(message.get("tool_calls") for message in chat):
        found.append(("tool calls", [{k: v for k, v in m.items() if k != "tool_calls"} for m in chat], dict(options)))
    if options.get("tools"):
        found.append(("tools", chat, {k: v for k, v in options.items() if k != "tools"}))
    return found
