"""Text to token ids: what the chat template writes, no BOS or EOS twice, and completions that end as turns end."""

from __future__ import annotations

import pytest

from chats import ADDS, TEMPLATES, TURN_ENDS, byte_tokenizer
from dpalign.data import text as text_of
from dpalign.data.text import (
    _with_specials,
    apart,
    assistant_tokens,
    encode_completion,
    encode_prompt_text,
    encode_text,
    joined,
    read_text,
    shared_prompt,
    template_options,
    turn_end,
)
from dpalign.errors import DPAlignError

USER, ANSWER = {"role": "user", "content": "Is the film good?"}, {"role": "assistant", "content": "the best"}
MORE = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "It is short."}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {}}}]


def ids_of(tokenizer, chat, **how):
    return tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, **how)["input_ids"]


@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize("template", TEMPLATES)
class TestChats:
    def test_a_whole_chat_is_the_templates_ids(self, template, adds):
        tokenizer = byte_tokenizer(template, adds)
        chat = [USER, ANSWER, *MORE]
        for flags in ({}, {"prepend_bos": True, "append_eos": True}):
            assert encode_text(tokenizer, read_text(chat), **flags) == ids_of(tokenizer, chat)
        expected = 1 if template in ("llama", "gemma", "mistral") else 0
        assert encode_text(tokenizer, chat, prepend_bos=True).count(tokenizer.bos_token_id) == expected

    def test_a_prompt_opens_the_answer(self, template, adds):
        tokenizer = byte_tokenizer(template, adds)
        ids = encode_prompt_text(tokenizer, [USER], prepend_bos=True)
        assert ids == ids_of(tokenizer, [USER], add_generation_prompt=True)

    @pytest.mark.parametrize("prompt", [[USER], [USER, ANSWER, MORE[0]]], ids=["one turn", "three turns"])
    def test_a_completion_is_the_whole_less_the_prompt(self, template, adds, prompt):
        tokenizer = byte_tokenizer(template, adds)
        front = ids_of(tokenizer, prompt, add_generation_prompt=True)
        whole = ids_of(tokenizer, [*prompt, ANSWER])
        for completion in ([ANSWER], "the best", [*prompt, ANSWER]):
            found = encode_completion(tokenizer, prompt, completion, prepend_bos=True, append_eos=True)
            assert found.ids == whole
            assert found.prompt_tokens == len(front)
            assert found.learned == [False] * len(front) + [True] * (len(whole) - len(front))
            learned = tokenizer.decode([i for i, yes in zip(found.ids, found.learned, strict=True) if yes])
            assert learned.strip().removesuffix("<eos>").rstrip().removesuffix(TURN_ENDS[template]) == "the best"
            assert TURN_ENDS[template] in learned  # the model learns to end its turn as the template does

    def test_an_assistants_turn_that_is_begun_stays_open(self, template, adds):
        tokenizer = byte_tokenizer(template, adds)
        begun = [USER, {"role": "assistant", "content": "the"}]
        prompt = encode_prompt_text(tokenizer, begun)
        assert tokenizer.decode(prompt).endswith("the")
        found = encode_completion(tokenizer, begun, [{"role": "assistant", "content": " best"}])
        assert found.ids == ids_of(tokenizer, [USER, ANSWER])
        assert found.ids[: found.prompt_tokens] == prompt[: found.prompt_tokens]
        assert len(prompt) - found.prompt_tokens <= 1  # at most one token is merged across the seam

    def test_the_token_that_ends_a_turn(self, template, adds):
        tokenizer = byte_tokenizer(template, adds)
        assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids(TURN_ENDS[template])


@pytest.mark.parametrize("adds", ADDS)
class TestStrings:
    def test_bos_and_eos_stand_once(self, adds):
        tokenizer = byte_tokenizer(adds=adds)
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        plain = tokenizer("good film", add_special_tokens=False).input_ids
        for text in ("good film", "<bos>good film", "good film<eos>", "<bos>good film<eos>"):
            ids = encode_text(tokenizer, text, prepend_bos=True, append_eos=True)
            assert ids == [bos, *plain, eos], text
        front, back = [bos] * (adds in ("bos", "both")), [eos] * (adds in ("eos", "both"))
        assert encode_text(tokenizer, "good film") == front + plain + back
        assert encode_text(tokenizer, "") == front + back

    def test_nothing_stands_between_prompt_and_completion(self, adds):
        tokenizer = byte_tokenizer(adds=adds)
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        prompt, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in ("good", " film"))
        found = encode_completion(tokenizer, "good", " film", prepend_bos=True, append_eos=True)
        assert found.ids == [bos, *prompt, *answer, eos]
        assert found.learned == [False] * (1 + len(prompt)) + [True] * (len(answer) + 1)
        assert encode_prompt_text(tokenizer, "good", prepend_bos=True) == [bos, *prompt]
        assert eos not in encode_prompt_text(tokenizer, "good")
        assert encode_completion(tokenizer, "", " film", prepend_bos=True).prompt_tokens == 1


class TestMessages:
    def test_sharegpt_parts_and_nulls_are_read(self):
        chat = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
        assert read_text(chat) == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
        parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"], "tool_calls": None}]
        assert read_text(parts) == [{"role": "user", "content": "ab"}]

    @pytest.mark.parametrize(
        ("value", "says"),
        [
            (7, "expected a string"),
            (["a", "b"], "expected a string"),
            ([{"content": "x"}], "no role"),
            ([{"role": "user", "content": [{"type": "image"}]}], "no text"),
            ([{"role": "user", "content": 3}], "neither text"),
        ],
    )
    def test_what_is_no_message_is_refused(self, value, says):
        with pytest.raises(DPAlignError, match=says):
            read_text(value)

    def test_a_call_without_content_does_not_teach_the_word_none(self):
        tokenizer = byte_tokenizer("qwen")
        text = tokenizer.decode(encode_completion(tokenizer, [USER], [CALL], options={"tools": TOOLS}).ids)
        assert "None" not in text and "<tool_call>" in text and "Looks." in text

    @pytest.mark.parametrize(
        ("completion", "options", "says"),
        [([CALL], {}, "does not write tool calls"), ([ANSWER], {"tools": TOOLS}, "does not write tools")],
    )
    def test_tools_that_the_template_drops_are_refused(self, completion, options, says):
        with pytest.raises(DPAlignError, match=says):
            encode_completion(byte_tokenizer("smol"), [USER], completion, options=options)

    def test_tools_may_be_json(self):
        assert template_options({"tools": '[{"a": 1}]', "chat_template_kwargs": {"x": 2}}) == {
            "tools": [{"a": 1}],
            "x": 2,
        }
        with pytest.raises(DPAlignError, match="not JSON"):
            template_options({"tools": "look"})

    def test_a_refusal_says_the_templates_words_and_no_others(self):
        with pytest.raises(DPAlignError, match="refuses these messages: Conversation roles must alternate"):
            encode_text(byte_tokenizer("mistral"), [USER, USER])
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = "{{ raise_exception('bad ' + messages[0]['content']) }}"
        with pytest.raises(DPAlignError) as caught:
            encode_text(tokenizer, [USER])
        assert "film" not in str(caught.value)
        with pytest.raises(DPAlignError, match="no chat template"):
            encode_text(byte_tokenizer(), [USER])

    def test_a_string_prompt_beside_messages_must_be_one_of_them(self):
        with pytest.raises(DPAlignError, match="two of a kind"):
            joined("Is the film good?", [ANSWER])
        with pytest.raises(DPAlignError, match="two of a kind"):
            joined("Is the play good?", [USER, ANSWER])
        assert apart(USER["content"], [USER, ANSWER]) == ([USER], [ANSWER])
        assert apart(MORE[0]["content"], [USER, ANSWER, *MORE]) == ([USER, ANSWER, MORE[0]], [MORE[1]])
        assert apart("", [USER, ANSWER]) == apart(None, [USER, ANSWER]) == ([], [USER, ANSWER])

    def test_an_answer_must_be_there(self):
        with pytest.raises(DPAlignError, match="no chat message of its own"):
            joined([USER], [USER])

    def test_a_template_that_writes_the_prompt_otherwise_alone(self):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
        with pytest.raises(DPAlignError, match="otherwise alone"):
            encode_completion(tokenizer, [USER], [ANSWER])

    def test_what_two_conversations_share(self):
        other = {"role": "assistant", "content": "the worst"}
        assert shared_prompt([USER, ANSWER], [USER, other]) == [USER]
        assert shared_prompt([USER, ANSWER], [USER, ANSWER]) == [USER]
        assert shared_prompt("a", "b") == ""

    def test_the_assistants_own_tokens(self):
        tokenizer = byte_tokenizer("chatml")
        chat = [USER, ANSWER, *MORE]
        ids, mask = encode_text(tokenizer, chat), assistant_tokens(tokenizer, chat)
        said = tokenizer.decode([i for i, yes in zip(ids, mask, strict=True) if yes])
        assert said == "the best<|im_end|>It is short.<|im_end|>"
        with pytest.raises(DPAlignError, match="generation"):
            assistant_tokens(byte_tokenizer("llama"), chat)
        with pytest.raises(DPAlignError, match="is a string"):
            assistant_tokens(tokenizer, "text")


def apart_by_reading_twice(tokenizer, text):
    """What stands around a text's own ids, found by looking for them among all."""
    ids, full = tokenizer(text, add_special_tokens=False).input_ids, tokenizer(text).input_ids
    start = next(i for i in range(len(full)) if full[i : i + len(ids)] == ids)
    return full[:start], ids, full[start + len(ids) :]


@pytest.mark.parametrize("adds", ADDS)
def test_a_string_is_read_once(adds, monkeypatch):
    tokenizer = byte_tokenizer("smol", adds)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    texts = [
        "a film",
        f"{bos}a film",
        f"a film{eos}",
        f"{bos}{bos}a{eos}{eos}",
        f"a{eos}{bos}b",
        f"{eos}a",
        " ",
        "映画 😀",
    ]
    expected = [apart_by_reading_twice(tokenizer, text) for text in texts]
    read, encoding = [], text_of._encoding
    monkeypatch.setattr(text_of, "_encoding", lambda *of: read.append(of[1]) or encoding(*of))
    with monkeypatch.context() as patched:  # by the library itself
        patched.setattr(type(tokenizer), "__call__", None)
        assert [_with_specials(tokenizer, text) for text in texts] == expected
    assert read == texts
    only = _with_specials(tokenizer, bos)  # its own, beside one that the tokenizer adds in front of it
    assert only[1] == [tokenizer.bos_token_id] and len(only[0]) == (adds in ("bos", "both"))


def cut_and_padded(tokenizer):
    """As a tokenizer.json may have it, or what somebody else's call has left behind."""
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=50)


def split_apart(tokenizer):
    tokenizer.split_special_tokens = True


def of_their_own(tokenizer):
    """A class whose call does more."""

    class Own(type(tokenizer)):
        def __call__(self, text, **options):
            return super().__call__(text.upper(), **options)

    tokenizer.__class__ = Own


@pytest.mark.parametrize("changed", [cut_and_padded, split_apart, of_their_own])
def test_a_string_is_read_as_a_call_reads_it(changed):
    """Whatever is set on the tokenizer, and also the second time."""
    tokenizer, texts = byte_tokenizer("smol", "both"), ["a film of many words", "a film<eos>", "映画 😀"]
    changed(tokenizer)
    found = [[token for part in _with_specials(tokenizer, text) for token in part] for text in [*texts, *texts]]
    assert found == [tokenizer(text).input_ids for text in texts] * 2 and min(map(len, found)) > 2
