"""Conversations as a model reads them: written out by a chat template, with each role's tokens.

A template is a Jinja text that comes with a tokenizer or in a file. The tokens of a role are the
ones of its messages' content; the headers and ends that the template writes round it belong to no
role. Where the template itself marks the assistant's part with {% generation %}, the assistant's
tokens are the ones in the marked part, as `return_assistant_tokens_mask` of transformers has it.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_fast.activations.capture.documents import Documents
from sae_fast.activations.capture.packages import capture_package

OWN_TEMPLATE = "tokenizer"  # as the name of a template: the one that the tokenizer has
ASSISTANT = "assistant"
# Some templates write today's date, by which the tokens of two days would differ.
DATE = datetime.date(2024, 7, 26)
SAMPLED_CONVERSATIONS = 64  # in which the roles are looked for

Message = Mapping[str, Any]
Span = tuple[int, int]  # of characters, from the first to behind the last

_SHARED_ROLES = {"human": "user", "gpt": ASSISTANT}  # as ShareGPT calls them
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


@dataclass(frozen=True)
class EncodedDocument:
    """The tokens of a document.

    Attributes:
        tokens: [n] int32.
        wanted: [n] bool, the tokens that become rows; None: all.
        source: [s] int32, what the encoder reads while the decoder reads the tokens; None: there is
            no decoder beside an encoder.
    """

    tokens: npt.NDArray[np.int32]
    wanted: npt.NDArray[np.bool_] | None = None
    source: npt.NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class ChatTemplate:
    """A template with the tokenizer that reads its texts.

    Attributes:
        tokenizer: of transformers.
        template: the Jinja text.
        roles: the roles whose tokens become rows; without any, all tokens do.
    """

    tokenizer: Any
    template: str
    roles: tuple[str, ...] = ()

    def recorded(self) -> dict[str, Any]:
        """Return what the tokens depend on, for the recipe of a capture."""
        digest = hashlib.sha256(self.template.encode()).hexdigest()
        return {"template": f"sha256:{digest}", "roles": list(self.roles)}

    def encode(self, conversation: Sequence[Message], number: int) -> EncodedDocument:
        """Return the tokens of a conversation; an empty one has none.

        Raises ValueError in one line, with its number in the dataset, where the template refuses it
        or the tokens of a role cannot be told.
        """
        if not conversation:
            return EncodedDocument(np.empty(0, np.int32))
        try:
            messages = [_plain(message) for message in conversation]
            text = self._written(messages)
            spans = [*self._spans(messages, text)] if self.roles else []
        except ValueError as error:
            raise ValueError(f"chat_template: conversation {number}: {error}") from error
        encoded = self.tokenizer(
            text,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=bool(self.roles),
            truncation=False,
            verbose=False,
        )
        tokens = np.array(encoded["input_ids"], np.int32)
        if not self.roles:
            return EncodedDocument(tokens)
        begins, ends = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
        wanted = np.zeros(len(tokens), np.bool_)
        for begin, end in spans:  # a token counts that has a character of the role's
            wanted |= (begins < end) & (ends > begin)
        return EncodedDocument(tokens, wanted)

    def _spans(self, messages: Sequence[Message], text: str) -> Iterator[Span]:
        """Yield the parts of the text that the roles have written."""
        of_content = set(self.roles)
        if ASSISTANT in of_content and _GENERATION.search(self.template):
            of_content.remove(ASSISTANT)
            yield from self._render(messages, marked=True)[1]
        if not of_content & {message["role"] for message in messages}:
            return
        for place, span in self._contents(messages, text):
            if messages[place]["role"] in of_content:
                yield span

    def _contents(self, messages: Sequence[Message], text: str) -> Iterator[tuple[int, Span]]:
        """Yield place and span of the content of each message that the template writes.

        The template also writes the conversation with a mark in place of each content. The text
        must be this one, with contents, or contents without the space at their ends, for the marks.
        """
        mark = "Qz"
        while mark in text:
            mark += "z"
        frame = self._written(
            [
                {**message, "content": f"{mark}{place}Q"} if _has_text(message) else message
                for place, message in enumerate(messages)
            ]
        )
        pieces = re.split(rf"{mark}(\d+)Q", frame)
        places = [int(place) for place in pieces[1::2]]
        at = len(pieces[0])
        whole = text.startswith(pieces[0]) and len(set(places)) == len(places)
        found: list[tuple[int, Span]] = []
        for place, behind in zip(places, pieces[2::2], strict=True):
            content = messages[place]["content"]
            forms = (content, content.strip(), content.lstrip(), content.rstrip())
            fitting = [form for form in forms if text.startswith(form + behind, at)]
            if not whole or not fitting:
                whole = False
                break
            found.append((place, (at, at + len(fitting[0]))))
            at += len(fitting[0]) + len(behind)
        if not whole or at != len(text):
            raise ValueError(
                "which tokens are a role's cannot be told, as the template changes the text of a "
                "message or writes it twice: leave out --roles, or keep --roles assistant with a "
                "template that has {% generation %}"
            )
        yield from found

    def _written(self, messages: Sequence[Message]) -> str:
        return self._render(messages, marked=False)[0]

    def _render(self, messages: Sequence[Message], *, marked: bool) -> tuple[str, list[Span]]:
        """Return the text of a conversation, and the parts between marks of generation."""
        rendering = capture_package("transformers.utils.chat_template_utils")
        errors = capture_package("jinja2.exceptions")
        try:
            texts, spans = rendering.render_jinja_template(
                conversations=[list(messages)],
                chat_template=self.template,
                return_assistant_tokens_mask=marked,
                **self.tokenizer.special_tokens_map,
            )
        except (errors.TemplateError, TypeError, AttributeError, KeyError, IndexError) as error:
            said = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ValueError(f"the template refuses it: {said}") from error
        return texts[0], spans[0] if marked else []


def open_chat_template(tokenizer: Any, name: str, roles: Sequence[str] = ()) -> ChatTemplate:
    """Return a tokenizer's template, or the template in a file.

    Args:
        tokenizer: of transformers.
        name: OWN_TEMPLATE, or the path of a Jinja file.
        roles: the roles whose tokens become rows, also several in one word with commas between
            them; without any, all tokens do.

    Raises:
        ValueError: in one line, where there is no template, or it is none.
    """
    if name == OWN_TEMPLATE:
        template = getattr(tokenizer, "chat_template", None)
        if isinstance(template, dict):  # several by name
            template = template.get("default")
        if not isinstance(template, str):
            raise ValueError(
                "chat_template: the tokenizer has no template of its own: give the path of a file"
            )
    else:
        try:
            template = Path(name).read_text("utf-8")
        except (OSError, UnicodeError) as error:
            raise ValueError(
                f"chat_template must be {OWN_TEMPLATE!r} or the path of a Jinja file: {error}"
            ) from error
    template = _TODAY.sub(lambda call: repr(DATE.strftime(call[2])), template)
    chosen = tuple(part for role in roles for part in role.split(",") if part)
    if chosen and not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "roles: this tokenizer does not say which characters a token stands for: a fast "
            "tokenizer is needed"
        )
    chat = ChatTemplate(tokenizer, template, chosen)
    try:
        capture_package("transformers.utils.chat_template_utils").render_jinja_template(
            conversations=[], chat_template=template
        )
    except capture_package("jinja2.exceptions").TemplateSyntaxError as error:
        raise ValueError(f"chat_template: {name} is no template: {error}") from error
    return chat


def check_roles(roles: Sequence[str], documents: Documents) -> None:
    """Raise ValueError if none of the first conversations has a message of these roles."""
    if not roles:
        return
    _, conversations = documents.read(0, SAMPLED_CONVERSATIONS)
    there = {_plain(message)["role"] for conversation in conversations for message in conversation}
    if not there & set(roles):
        raise ValueError(
            f"roles: no message of the first {len(conversations):,} conversations is of "
            f"{' or '.join(roles)}; there are {', '.join(sorted(there)) or 'no messages'}"
        )


def _plain(message: Any) -> dict[str, Any]:
    """Return a message with a role and its content, without what is not there.

    `from` and `value`, and human and gpt, are what ShareGPT calls them.
    """
    there = {key: value for key, value in dict(message or {}).items() if value is not None}
    if "role" not in there and "from" in there:
        there["role"] = _SHARED_ROLES.get(there["from"], there["from"])
        del there["from"]
        if "value" in there:
            there["content"] = there.pop("value")
    if not isinstance(there.get("role"), str):
        raise ValueError(f"a message has no role, only {', '.join(there) or 'nothing'}")
    return there


def _has_text(message: Message) -> bool:
    content = message.get("content")
    return isinstance(content, str) and bool(content.strip())
