"""Chats, rendered by the model's own chat template: the text, and where in it the assistant speaks."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from ..config import CordaError
from .images import has_place, parts_of, processor_of, require_processor, words_of

Message = dict[str, Any]
Span = tuple[int, int]  # of characters


def render_chat(
    tokenizer: Any, messages: Sequence[Message], first: int = 0, tools: list[Any] | None = None
) -> tuple[str, list[Span]]:
    """The chat as the model's template writes it, and the spans of the assistant's turns from message `first` on.

    A span begins after what the template writes to ask for an answer, and ends with the mark that ends the turn. It is
    marked in the template itself (`{% generation %}`), or found by rendering the chat up to each turn.

    Raises:
        CordaError: the tokenizer has no chat template, the template refuses the chat, or it writes a turn in another
            way when others follow, so that the turn cannot be found.
    """
    from trl.chat_template_utils import has_generation_markers  # a second, which texts that are no chats do not need

    messages = _as_read(tokenizer, messages)
    text = _render(tokenizer, messages, tools)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if has_generation_markers(tokenizer.get_chat_template(tools=tools)):
        rendered, (spans,) = render_jinja_template(
            [list(messages)],
            tools=tools,
            chat_template=tokenizer.get_chat_template(tools=tools),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        if rendered == [text] and len(spans) == len(turns):
            for turn, (a, b) in zip(turns, spans):
                if words_of(messages[turn]).strip() not in text[a:b]:
                    raise _unclear(turn)
            return text, [span for turn, span in zip(turns, spans) if turn >= first]
    return text, [_find_turn(tokenizer, messages, i, tools, text) for i in turns if i >= first]


def render_question(tokenizer: Any, messages: Sequence[Message], tools: list[Any] | None = None) -> str:
    """The chat as the model sees it when it is to answer."""
    return _render(tokenizer, _as_read(tokenizer, messages), tools, add_generation_prompt=True)


def _as_read(tokenizer: Any, messages: Sequence[Message]) -> Sequence[Message]:
    """The messages as the model's chat template reads them: that of a vision-language model takes a list of parts.

    Raises CordaError if there are images, and the model reads none."""
    if has_place(messages):
        require_processor(tokenizer)
    if processor_of(tokenizer) is None:
        return messages
    return [message | {"content": parts_of(message)} for message in messages]


def _find_turn(tokenizer: Any, messages: Sequence[Message], i: int, tools: list[Any] | None, text: str) -> Span:
    """The span of the assistant's turn `i` in the text of the whole chat."""
    content = words_of(messages[i]).strip()
    through = _render(tokenizer, messages[: i + 1], tools)
    closing = through[through.rfind(content) + len(content) :].rstrip() if content else ""
    if i:
        question, asked = render_question(tokenizer, messages[:i], tools), words_of(messages[i - 1]).strip()
        start = _common_prefix(question, text)
        is_found = start >= question.rfind(asked) + len(asked) >= len(asked)
    else:
        start = text.find(content)
        is_found = start >= 0
    if text.startswith(through):
        end = len(through.rstrip()) if closing else len(through)
    else:  # a turn that others follow may be written in another way: without its thoughts, or the end of the text
        for ending in (closing, closing.removesuffix(tokenizer.eos_token or "").rstrip()):
            end = text.find(content + ending, max(start, 0)) + len(content + ending)
            if end >= len(content + ending):
                break
    if not is_found or not content or content not in text[start:end]:
        raise _unclear(i)
    return start, end


def _unclear(i: int) -> CordaError:
    return CordaError(
        f"the model's chat template does not write turn {i + 1} of a chat as it stands, or writes it in another way "
        "when others follow, so where its loss is cannot be told: take the loss of the last turn alone (--turns last)"
    )


def _render(tokenizer: Any, messages: Sequence[Message], tools: list[Any] | None, **options: Any) -> str:
    if not tokenizer.chat_template:
        raise CordaError(
            "the samples are chats, and the model's tokenizer has no chat template to write them with: take an "
            "instruct model, or say with templates what is used, such as --prompt '{messages[0][content]}'"
        )
    try:
        return str(tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, **options))
    except (TemplateError, TypeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        roles = ", ".join(message["role"] for message in messages[:8])
        raise CordaError(f"the model's chat template refuses a chat with the roles {roles}: {reason}") from error


def _common_prefix(a: str, b: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))
