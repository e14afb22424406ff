"""Talk to an adapter in the terminal: answers appear as they are decoded, with the time to their first text.

    python examples/chat.py ADAPTER_FOLDER [--num-blocks K] [--system TEXT] [--max-new-tokens N]

/reset begins the conversation again, /blocks N answers after N blocks (0: at once) from here on. Ctrl-C ends an answer,
Ctrl-D or /quit the program. The conversation keeps its KV cache: "kept" counts the prompt's tokens that were not
computed again.
"""

import argparse
import time
from collections.abc import Sequence
from contextlib import closing

from rim_peft.escaping import visible
from rim_peft.inference import Conversation
from rim_peft.run import load_run


def say(conversation: Conversation, text: str) -> None:
    """Print an answer as it is decoded, then its times; an interrupted turn is taken back."""
    started, first = time.perf_counter(), None
    cut: list[str] = []
    try:
        with closing(conversation.stream(text, on_cut=cut.append)) as pieces:
            for piece in pieces:
                first = first or time.perf_counter() - started
                print(visible(piece), end="", flush=True)
    except KeyboardInterrupt:
        print("\n[stopped: this turn is not part of the conversation]")
        return
    seconds = time.perf_counter() - started
    times = f"first text after {1000 * (first or seconds):.0f} ms, all after {1000 * seconds:.0f} ms"
    print(f"\n[{times}, kept {conversation.num_kept}{', cut at --max-new-tokens' if cut else ''}]")


class Dialogue:
    """A conversation, and the commands that change it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.run = load_run(args.adapter)
        self.max_new_tokens = args.max_new_tokens
        self.system = [{"role": "system", "content": args.system}] if args.system else []
        self.answerer = self.run.answerer(num_blocks=args.num_blocks, max_new_tokens=args.max_new_tokens)
        self.conversation = self.answerer.conversation(self.system)

    def take(self, line: str) -> None:
        """Follow a command, or answer.

        Raises:
            ValueError: there is no such number of blocks, or the conversation leaves no room for an answer.
        """
        name, _, value = line.partition(" ")
        if name == "/reset":
            self.conversation = self.answerer.conversation(self.system)
        elif name == "/blocks":
            if not value.strip().isdecimal():
                raise ValueError(f"/blocks: must be followed by a number of blocks, got {value!r}. Type /blocks 4.")
            self.answerer = self.run.answerer(num_blocks=int(value), max_new_tokens=self.max_new_tokens)
            # What was said stays; the first prompt of another answerer is computed from its beginning.
            self.conversation = self.answerer.conversation(self.conversation.messages)
        elif name.startswith("/"):
            print("[commands: /reset, /blocks N, /quit]")
        elif name:
            say(self.conversation, line)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read lines until the end of the input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="output folder of a training on a base with a chat template")
    parser.add_argument("--num-blocks", "--blocks", type=int, help="blocks after each prompt (default: the adapter's)")
    parser.add_argument("--system", help="the system's message")
    parser.add_argument("--max-new-tokens", type=int, help="most tokens of an answer (default: the recipe's)")
    args = parser.parse_args(arguments)
    try:
        dialogue = Dialogue(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    while True:
        try:
            line = input(f"{dialogue.answerer.num_blocks} blocks> ").strip()
            if line == "/quit":
                return
            dialogue.take(line)
        except EOFError:
            return
        except KeyboardInterrupt:
            print()  # no answer was being written: a new line to type on
        except ValueError as error:
            print(f"[{error}]")


if __name__ == "__main__":
    main()
