"""Chats: which rows are one, how the model's template writes them, and where the loss is."""

import copy
import json

import pytest
from helpers import CHAT, CHATML, messages, with_template

from corda_lora import CordaError
from corda_lora.config import DataConfig
from corda_lora.data.batches import encode, encode_question
from corda_lora.data.samples import Sample, load_samples

MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ '#' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '$' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '$' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '#assistant\\n' }}{% endif %}"
)
# Turns that others follow lose their thoughts, which are in parentheses; the last gets some if it has none.
THINKING = (
    "{% for m in messages %}{{ '#' + m['role'] + '\\n' }}{% if loop.last and m['role'] == 'assistant' %}{{ '(?)' }}"
    "{% endif %}{{ m['content'].split(')')[-1] + '$\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '#assistant\\n' }}{% endif %}"
)
LLAMA2 = (  # brings its own <s>, and no mark at the end of a turn
    "{{ bos_token }}{% for m in messages %}{{ '(' + m['content'] + ') ' if m['role'] == 'user' else m['content'] }}"
    "{% endfor %}"
)
PHI3 = (  # the end of the text after the last turn, unless an answer is asked for
    "{% for m in messages %}{{ '#' + m['role'] + '\\n' + m['content'] + '$\\n' }}{% endfor %}"
    "{{ '#assistant\\n' if add_generation_prompt else eos_token }}"
)
STRICT = "{{ raise_exception('roles must alternate') }}"


def load(tmp_path, *rows, **options):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_samples(DataConfig(str(path), **options))


def parts(tokenizer, sample, end=True, max_length=999):
    """The text without and with loss, in turns."""
    encoded = encode(tokenizer, sample, max_length, end)
    runs, last = [], None
    for token, answer in zip(encoded.ids, encoded.answer, strict=True):
        if answer != last:
            runs.append([])
        runs[-1].append(token)
        last = answer
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": messages()},
        {"messages": messages(), "prompt": "another column"},
        {"conversations": messages(role="from", content="value", user="human", assistant="gpt")},
        {
            "messages": [
                {**m, "content": [{"type": "text", "text": m["content"]}], "tool_calls": None} for m in messages()
            ]
        },
    ],
)
def test_rows_that_are_chats(row, tmp_path, tokenizer):
    (sample,) = load(tmp_path, row)
    assert sample.response == "2"
    assert parts(with_template(tokenizer, CHATML), sample) == [
        "#system\nbe brief$\n#user\none?$\n#assistant\n",
        "1$",
        "\n#user\ntwo?$\n#assistant\n",
        "2$",
        "\n",
    ]


def test_loss_on_the_last_turn_alone(tmp_path, tokenizer):
    (sample,) = load(tmp_path, {"messages": messages()}, turns="last")
    found = parts(with_template(tokenizer, CHATML), sample)
    assert found[1:] == ["2$", "\n"]
    assert "1$" in found[0]


@pytest.mark.parametrize("completion", [messages(CHAT[4:]), "2"])
def test_a_list_of_messages_as_prompt(completion, tmp_path, tokenizer):
    """The loss is on the completion."""
    (sample,) = load(tmp_path, {"prompt": messages(CHAT[:4]), "completion": completion})
    assert parts(with_template(tokenizer, CHATML), sample)[1:] == ["2$", "\n"]


def test_a_prompt_and_a_completion_as_text(tmp_path, tokenizer):
    row = {"prompt": "two?", "completion": "2"}
    assert parts(tokenizer, load(tmp_path, row)[0]) == ["<s>two?", "2</s>"]
    (sample,) = load(tmp_path, row, chat=True)
    assert parts(with_template(tokenizer, CHATML), sample) == ["#user\ntwo?$\n#assistant\n", "2$", "\n"]


def test_turns_that_the_template_marks(tmp_path, tokenizer):
    (sample,) = load(tmp_path, {"messages": messages()})
    found = parts(with_template(tokenizer, MARKED), sample)
    assert found[1::2] == ["1$", "2$"]
    assert "".join(found).count("<s>") == 1
    (sample,) = load(tmp_path, {"messages": messages()}, turns="last")
    assert parts(with_template(tokenizer, MARKED), sample)[1::2] == ["2$"]


def test_a_template_that_rewrites_turns_which_others_follow(tmp_path, tokenizer):
    tokenizer = with_template(tokenizer, THINKING)
    (sample,) = load(tmp_path, {"messages": messages()})
    assert parts(tokenizer, sample)[1::2] == ["1$", "(?)2$"]
    chat = [*CHAT[:2], ("assistant", "(hm)1"), *CHAT[3:]]
    (sample,) = load(tmp_path, {"messages": messages(chat)})
    with pytest.raises(CordaError, match=r"turn 3 of a chat as it stands, or.*--turns last"):
        encode(tokenizer, sample, 999)
    (sample,) = load(tmp_path, {"messages": messages(chat)}, turns="last")
    assert parts(tokenizer, sample)[1::2] == ["(?)2$"]


def test_a_template_that_ends_the_text(tmp_path, tokenizer):
    (sample,) = load(tmp_path, {"messages": messages()})
    assert parts(with_template(tokenizer, PHI3), sample)[1::2] == ["1$", "2$\n</s>"]


def test_a_template_without_ends_of_turns(tmp_path, tokenizer):
    (sample,) = load(tmp_path, {"messages": messages(CHAT[1:3])})
    tokenizer = with_template(tokenizer, LLAMA2)
    assert parts(tokenizer, sample) == ["<s>(one?) ", "1</s>"]
    assert parts(tokenizer, sample, end=False) == ["<s>(one?) ", "1"]


def test_what_the_model_sees_before_it_answers(tmp_path, tokenizer):
    (sample,) = load(tmp_path, {"messages": messages()})
    tokenizer = with_template(tokenizer, CHATML)
    assert tokenizer.decode(encode_question(tokenizer, sample).ids).endswith("1$\n#user\ntwo?$\n#assistant\n")
    other = sample.answered("3")
    assert parts(tokenizer, other)[1:] == ["3$", "\n"]
    assert encode_question(tokenizer, other) == encode_question(tokenizer, sample)


def test_chats_cut_and_without_an_answer(tmp_path, tokenizer):
    tokenizer = with_template(tokenizer, CHATML)
    cut, question = load(tmp_path, {"messages": messages()}, {"messages": messages(CHAT[:2])})
    assert encode(tokenizer, cut, 10).targets == 0
    assert encode(tokenizer, question, 999, end=True).targets == 0
    assert question.response == ""


def test_templates_win_over_chats(tmp_path):
    (sample,) = load(
        tmp_path, {"messages": messages()}, prompt="{messages[1][content]}", response="{messages[2][content]}"
    )
    assert sample[:2] == ("one?", "1")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hello"}, "row 1 .*holds no list of messages"),
        ({"messages": ["hello"]}, r"messages\[0\] has no role"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, r"content of messages\[0\] is no text"),
        ({"messages": []}, "1 without 'messages'"),
        ({"messages": [{"role": "user", "content": None}]}, r"1 without 'messages\[0\]\[content\]'"),
    ],
)
def test_chats_of_another_form(row, message, tmp_path):
    with pytest.raises(CordaError, match=message):
        load(tmp_path, row)


def test_chats_need_a_chat_template(tmp_path, tokenizer):
    (sample,) = load(tmp_path, {"messages": messages()})
    with pytest.raises(CordaError, match="no chat template"):
        encode(tokenizer, sample, 99)
    with pytest.raises(CordaError, match=r"refuses a chat with the roles system, user, .*: roles must alternate"):
        encode(with_template(tokenizer, STRICT), sample, 99)


# --- special tokens stand once ---------------------------------------------------------------------------------------


def test_special_tokens_of_the_text_are_not_doubled(tokenizer):
    assert parts(tokenizer, Sample("<s>ab", "cd</s>", {})) == ["<s>ab", "cd</s>"]
    assert parts(tokenizer, Sample("", "<s>ab", {})) == ["<s>ab</s>"]


def test_a_tokenizer_that_closes_every_text(tokenizer):
    from tokenizers import processors

    closing = copy.deepcopy(tokenizer)
    tokens = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=tokens)
    assert closing("ab").input_ids[-1] == tokenizer.eos_token_id
    for sample in (Sample("ab", "cd", {}), Sample("", "cd", {}), Sample("ab", "", {})):
        assert encode(closing, sample, 99, end=True) == encode(tokenizer, sample, 99, end=True)
