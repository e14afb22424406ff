"""What the app does, without its page: answer turn by turn, read out blocks, write chains, swap blocks."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

from rim_peft.data.chats import Chat, Question, as_chat
from rim_peft.data.examples import has_content
from rim_peft.evaluation.answers import AnswerReader
from rim_peft.inference import BlockAnswerer, Readout
from rim_peft.inference.conversation import Conversation
from rim_peft.inspection.alternatives import Asked, Donor, ReadAnswer, find_donor, swap_blocks, write_chain
from rim_peft.inspection.document import Alternative, Chain
from rim_peft.inspection.inspecting import Options, answer_reader, block_answerer, find_task
from rim_peft.run import Run
from rim_peft.run.rows import first_questions

logger = logging.getLogger(__name__)

_NUM_QUESTIONS = 64
"""Rows of the task that are read: the first ones are examples, all may lend their blocks."""


@dataclass(frozen=True)
class Turn:
    """A question with its answer.

    Attributes:
        question: as the model got it: a text, or all messages up to the user's.
        num_blocks: blocks after the prompt.
        answer: the model's text.
        ms: milliseconds from the question to the last token.
        is_complete: whether the answer ended within the limit of tokens.
    """

    question: Question
    num_blocks: int
    answer: str
    ms: float
    is_complete: bool

    @property
    def text(self) -> str:
        """What the user wrote."""
        return self.question if isinstance(self.question, str) else self.question[-1]["content"]

    @property
    def messages(self) -> Chat:
        """The dialogue up to the answer; without a turn that got none."""
        asked = Chat([_user(self.question)]) if isinstance(self.question, str) else as_chat(self.question)
        return asked.with_messages([*asked, _assistant(self.answer)] if self.answer else asked[:-1])


class Session:
    """One visitor's chat. It is not a dataclass, since Gradio would copy one with all that it holds.

    Attributes:
        begun: messages before the first turn, such as the system's.
        turns: the turns so far.
        conversation: keeps the KV cache from turn to turn; None after a question that stood alone.
    """

    def __init__(self, begun: Chat | None = None) -> None:
        self.begun = Chat([]) if begun is None else begun
        self.turns: list[Turn] = []
        self.conversation: Conversation | None = None

    @property
    def messages(self) -> Chat:
        """The dialogue that the next turn continues."""
        return self.turns[-1].messages if self.turns else self.begun


class Playground:
    """An adapter to play with. Calls from several threads wait for one another: a chain disables the adapter meanwhile.

    Attributes:
        name: the adapter's name on the page.
        questions: questions of the adapter's task; none if its rows cannot be read.
    """

    def __init__(
        self,
        run: Run,
        *,
        name: str = "",
        max_new_tokens: int | None = None,
        options: Options | None = None,
        questions: Sequence[Question] | None = None,
    ) -> None:
        """Take an adapter.

        Args:
            name: the adapter's name on the page.
            max_new_tokens: most tokens of an answer, EOS included; the recipe's by default.
            options: how the base is asked for a chain, and its most tokens (``chain_template``, ``chain_tokens``).
            questions: questions instead of the task's.

        Raises:
            ValueError: it is an export, or its adapter does not answer after blocks.
        """
        self.name = name
        self._run = run
        self._max_new_tokens = max_new_tokens
        self._options = options or Options()
        self._task = find_task(run)
        self._lock = Lock()
        self.num_blocks = self._answerer(None).num_blocks
        self.questions = list(questions) if questions is not None else _task_questions(run)

    @property
    def can_continue(self) -> bool:
        """Whether a question can continue a dialogue, which needs a chat template."""
        return bool(getattr(self._run.tokenizer, "chat_template", None))

    @property
    def is_chat(self) -> bool:
        """Whether the adapter was trained on dialogues, as far as its task's questions tell."""
        return self.can_continue and any(not isinstance(question, str) for question in self.questions)

    def ask(self, session: Session, text: str, *, num_blocks: int, continues: bool = False) -> Turn:
        """Answer a question and append the turn.

        Args:
            continues: whether the question continues the dialogue; otherwise it is asked as a question of its own, in
                the prompt template of the training.

        Raises:
            ValueError: the text is empty, leaves no room for the answer, or the tokenizer has no chat template.
        """
        if not has_content(text):
            raise ValueError("question: must not be empty, got no text. Write one.")
        answerer = self._answerer(num_blocks)
        asked = session.messages.with_messages([*session.messages, _user(text)])
        question: Question = asked if continues else text
        cut: list[str] = []
        with self._lock:
            start = time.perf_counter()
            if continues:
                answer = _conversation(session, answerer).answer(text, on_cut=cut.append)
            else:
                session.conversation = None
                (answer,) = answerer.answer([text], batch_size=1, on_cut=cut.append)
            ms = 1000 * (time.perf_counter() - start)
        session.turns.append(Turn(question, answerer.num_blocks, answer, ms, not cut))
        return session.turns[-1]

    def read(self, turn: Turn) -> list[Readout]:
        """Read out every block of a turn's question.

        Raises:
            ValueError: the base cannot run branching rows.
        """
        with self._lock:
            return self._answerer(turn.num_blocks).read_blocks([turn.question])[0]

    def write_chain(self, turn: Turn) -> Chain:
        """Let the base write its reasoning about a turn's question, and time both ways.

        Raises:
            ValueError: the chain has no room in the base's positions.
        """
        answerer = self._answerer(turn.num_blocks)
        asked, options = self._asked(answerer, turn), self._options
        with self._lock:
            return write_chain(answerer, asked, template=options.chain_template, max_new_tokens=options.chain_tokens)

    def swap(self, turn: Turn, other: str = "") -> Alternative:
        """Answer a turn's question with the blocks of another question.

        Args:
            other: the other question, whose prompt must have as many tokens; if empty, one of the task's is searched.

        Raises:
            ValueError: no other question has as many tokens, or the model's blocks cannot be exchanged.
        """
        answerer = self._answerer(turn.num_blocks)
        asked = self._asked(answerer, turn)
        others = [_instead(turn.question, other)] if other.strip() else self.questions
        prompts = answerer.tokenize(others, name="donor")
        lengths = sorted({len(prompt) for prompt in prompts})
        fitting = [pair for pair in zip(others, prompts, strict=True) if len(pair[1]) == len(asked.prompt)]
        fitting = [pair for pair in fitting if list(pair[1]) != list(asked.prompt)]
        if not fitting:
            raise ValueError(
                f"donor: must be another question whose prompt has {len(asked.prompt)} tokens as well, since keys hold "
                f"their positions, got {_counted(lengths)}. Write one with as many tokens."
            )
        with self._lock:
            donor: Donor = find_donor(answerer, asked, fitting, self._reader)
            return swap_blocks(answerer, asked, donor)

    def start(self, session: Session, index: int) -> tuple[Session, str]:
        """Return what a user writes to ask one of the ``questions``, and the chat before it: a text needs none."""
        question = self.questions[index]
        if isinstance(question, str):
            return session, question
        chat = as_chat(question)
        return Session(chat.with_messages(chat[:-1])), chat[-1]["content"]

    def _answerer(self, num_blocks: int | None) -> BlockAnswerer:
        return block_answerer(self._run, num_blocks=num_blocks, max_new_tokens=self._max_new_tokens)

    def _asked(self, answerer: BlockAnswerer, turn: Turn) -> Asked:
        read = self._reader(turn.question)
        (prompt,) = answerer.encode([turn.question])
        return Asked(turn.question, prompt, read(turn.answer), read)

    def _reader(self, question: Question) -> ReadAnswer:
        return answer_reader(AnswerReader(self._run.tokenizer, self._run.templates), self._task, question)


def _conversation(session: Session, answerer: BlockAnswerer) -> Conversation:
    """Return the session's conversation, or begin one with its messages if other blocks are asked for."""
    kept = session.conversation
    if kept is None or not session.turns or session.turns[-1].num_blocks != answerer.num_blocks:
        said = session.messages
        kept = answerer.conversation(said, tools=said.tools, chat_template_kwargs=said.chat_template_kwargs)
    session.conversation = kept
    return kept


def _task_questions(run: Run) -> list[Question]:
    """Return questions of the task's rows; none, with the reason in the log, if they cannot be read."""
    try:
        path = run.recipe.data.path if run.recipe is not None else None
        found = first_questions(run.task(), path, limit=_NUM_QUESTIONS)
    except (ValueError, OSError, ImportError) as error:
        logger.warning("no examples are shown: %s", error)
        return []
    if found is None:
        logger.warning("no examples are shown: the task's source has neither test nor validation rows.")
    return found or []


def _instead(question: Question, text: str) -> Question:
    """Return another question in the place of a turn's own."""
    if isinstance(question, str):
        return text
    chat = as_chat(question)
    return chat.with_messages([*chat[:-1], _user(text)])


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _counted(lengths: Sequence[int]) -> str:
    if not lengths:
        return "no other question"
    span = str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    return f"prompts of {span} tokens"
