"""A dialogue of several turns, each answered from memory blocks, with one KV cache of the plain text."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING

from rim_peft.data.chats import Chat
from rim_peft.inference.passes import PromptCache

if TYPE_CHECKING:
    from rim_peft.inference.answerer import Answerer


class Conversation:
    """Asks an answerer turn by turn: :meth:`answer` or, for the text as it is decoded, :meth:`stream`.

    A turn's prompt is the plain text of all messages so far, as in training, where earlier turns are written as they
    are said here; they have no blocks. So every answer is the one that the same messages get as a fresh question. What
    is kept from turn to turn is the keys and values of the last prompt: those of the tokens with which the next prompt
    begins are used again, the rest is computed. A chat template that changes earlier turns leaves less to use again.

    Finish or close a stream before the next turn. Adapter and weights must not change during a conversation. Where only
    the model's own ``generate`` can decode (:func:`~rim_peft.inference.decoding.can_decode`), and for thoughts and
    exports, nothing is kept, and the text of an answer comes all at once.

    ::

        conversation = answerer.conversation([{"role": "system", "content": "Be brief."}])
        conversation.answer("Ann has 3 apples and buys 4. How many has she?")
        for piece in conversation.stream("And if she eats one?"):
            print(piece, end="", flush=True)
    """

    def __init__(self, answerer: Answerer, chat: Chat) -> None:
        """Begin with messages, which may be none.

        Args:
            chat: the messages so far, with the tools and the variables of the chat template.
        """
        self._answerer = answerer
        self._chat = chat
        self._kept = PromptCache()

    @property
    def messages(self) -> list[dict[str, str]]:
        """A copy of all messages so far."""
        return [dict(message) for message in self._chat]

    @property
    def num_kept(self) -> int:
        """Tokens of the last prompt whose keys and values were those of the turn before."""
        return self._kept.num_used

    def answer(self, text: str, *, on_cut: Callable[[str], None] | None = None) -> str:
        """Append the user's message, answer it, append the answer and return it.

        If there is no answer, because of an error or since it is empty, the user's message is taken back.

        Args:
            on_cut: called with an answer that did not end within the answerer's ``max_new_tokens``.

        Raises:
            ValueError: the message is empty, the tokenizer has no chat template or refuses the messages, or they leave
                no room for the answer in the model's positions.
        """
        before = len(self._chat)
        for _ in self.stream(text, on_cut=on_cut):
            pass
        return self._chat[-1]["content"] if len(self._chat) > before else ""

    def stream(self, text: str, *, on_cut: Callable[[str], None] | None = None) -> Generator[str, None, None]:
        """Yield an answer in pieces, each as soon as it is known; otherwise like :meth:`answer`.

        The turn is appended once the last piece has been taken; if the caller stops earlier, it is taken back.
        """
        asked = self._chat.with_messages([*self._chat, {"role": "user", "content": text}])
        (prompt,) = self._answerer.encode([asked], name="messages")
        token_ids: list[int] = []
        yield from self._pieces(prompt, token_ids)
        answer = self._answerer.read(token_ids)
        if answer:
            self._chat = asked.with_messages([*asked, {"role": "assistant", "content": answer}])
        if on_cut is not None and not self._answerer.has_ended(token_ids):
            on_cut(answer)

    def _pieces(self, prompt: Sequence[int], token_ids: list[int]) -> Iterator[str]:
        """Yield what each token adds to the text, and note the tokens; half a character waits for its other half."""
        said = text = ""
        for token in self._answerer.stream(prompt, self._kept):
            token_ids.append(token)
            text = self._answerer.read(token_ids)
            if len(text) > len(said) and text.startswith(said) and not text.endswith("\ufffd"):
                yield text[len(said) :]
                said = text
        if len(text) > len(said) and text.startswith(said):
            yield text[len(said) :]
