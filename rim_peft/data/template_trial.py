"""A program that renders a chat template once, within limits on memory and time.

:mod:`rim_peft.data.chat_templates` starts it in a separate process, so that a bad template exhausts only that process.
It imports nothing from this package, because those imports take longer than the trial.
"""

from __future__ import annotations

import json
import sys
from typing import Any

MAX_SECONDS = 5
MAX_BYTES = 1 << 30
MAX_CHARACTERS = 1 << 20

TOO_MUCH_MEMORY, TOO_LONG = 3, 4
"""Exit statuses. Other errors of a template are reported when it is used."""

_CHAT = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "And 4 + 4?"},
]


def main() -> int:
    """Render the template given on standard input, and return the exit status."""
    given = json.load(sys.stdin)
    sys.path[:] = given["path"]  # the caller's path, to find Jinja
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag with which transformers marks an assistant's text."""

        tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    _limit()
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, *_, **__: json.dumps(value)
    environment.globals.update(raise_exception=raise_exception, strftime_now=lambda _: "29 Nov 2026")
    tokens = given["tokens"]
    try:
        template = environment.from_string(given["template"])
        text = template.render(messages=_CHAT, tools=None, documents=None, add_generation_prompt=True, **tokens)
    except MemoryError:
        return TOO_MUCH_MEMORY
    except Exception:
        return 0
    return TOO_LONG if len(text) > MAX_CHARACTERS else 0


def _limit() -> None:
    try:
        import resource
    except ImportError:  # Windows: only the time is limited, by the caller's timeout
        return
    for kind, bound in ((resource.RLIMIT_AS, MAX_BYTES), (resource.RLIMIT_CPU, MAX_SECONDS)):
        _, hard = resource.getrlimit(kind)
        soft = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        try:
            resource.setrlimit(kind, (soft, hard))
        except (OSError, ValueError):  # macOS cannot limit the address space
            continue


if __name__ == "__main__":
    sys.exit(main())
