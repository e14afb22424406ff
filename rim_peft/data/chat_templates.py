"""Checks of a tokenizer's chat template: an untrusted program, whose sandbox limits neither time nor memory."""

from __future__ import annotations

import json
import logging
import math
import re
import subprocess
import sys
from functools import lru_cache
from typing import Any

from jinja2 import meta, nodes
from jinja2.exceptions import TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from rim_peft.data import template_trial
from rim_peft.values import cut

logger = logging.getLogger(__name__)

MOST_CHARACTERS = 1 << 18
MOST_NUMBER = 1 << 20
"""Largest number in a template; real ones count turns and spaces."""

# A field width in a format string. A match stops at the next field, so that one pass over the text is enough.
_WIDTH = re.compile(r"%(\([^)%]*\))?[-+ #*.\d]*?\d{6}|\{[^{}]*?\d{6}")


class _Generation(Extension):
    """The tag with which transformers marks an assistant's text."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the nodes that the tag encloses."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def check_chat_template(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Refuse chat templates that take more time or memory than a chat can need.

    Two checks: the parsed template must have no large numbers, as in ``'a' * 10**10``, which Jinja computes at compile
    time; and a short chat is rendered in a separate process, once per template, to find growth at run time, such as
    nested loops.

    Args:
        source: where it comes from, for the error.

    Raises:
        ValueError: a template is too long, has a power, or a number or product above ``MOST_NUMBER``, or takes too
            much time or memory to render.
    """
    templates: Any = tokenizer.chat_template or {}
    tokens = tuple(sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()))
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        if problem := _find_problem(str(template)) or _try(str(template), tokens):
            raise ValueError(
                f"tokenizer: the chat template of {source} must only write texts, but has {problem}. Correct "
                "chat_template.jinja or tokenizer_config.json there."
            )


@lru_cache
def variables_of(template: str) -> frozenset[str]:
    """Return the names that a chat template reads from outside, such as ``messages``, ``tools``, ``enable_thinking``.

    Raises:
        TemplateSyntaxError: it is no template.
    """
    return frozenset(meta.find_undeclared_variables(_environment().parse(template)))


def _environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols", _Generation])


def _find_problem(template: str) -> str | None:
    if len(template) > MOST_CHARACTERS:
        return f"{len(template):,} characters, more than {MOST_CHARACTERS:,}"
    try:
        _check(_environment().parse(template))
    except TemplateSyntaxError:
        return None  # rendering reports it
    except RecursionError:
        return "expressions that are nested too deep"
    except _RefusedError as error:
        return str(error)
    return None


@lru_cache
def _try(template: str, tokens: tuple[tuple[str, str], ...]) -> str | None:
    """Render a short chat in a separate process, and return which limit it exceeded."""
    if not sys.executable or getattr(sys, "frozen", False):  # then sys.executable is the whole program, not Python
        _warn_untried("there is no Python to start")
        return None
    given = json.dumps({"template": template, "tokens": dict(tokens), "path": [str(path) for path in sys.path]})
    command = [sys.executable, "-I", template_trial.__file__]  # -I: import nothing from the working directory
    try:
        # This takes 0.1 s on an idle machine; the timeout is long enough for a busy one.
        status = subprocess.run(  # noqa: S603 - a program of this package
            command, input=given, text=True, capture_output=True, timeout=60
        ).returncode
    except subprocess.TimeoutExpired:
        status = -1  # as if it was killed
    except OSError as error:
        _warn_untried(str(error))
        return None
    if status == template_trial.TOO_MUCH_MEMORY:
        return f"loops or repetitions that take more than {template_trial.MAX_BYTES >> 30} GiB for three turns"
    if status == template_trial.TOO_LONG:
        return f"loops or repetitions that write over {template_trial.MAX_CHARACTERS:,} characters for three turns"
    if status < 0:
        return f"loops or repetitions that take over {template_trial.MAX_SECONDS} s for three turns"
    if status != 0:
        _warn_untried(f"its process ended with status {status}")
    return None


def _warn_untried(why: str) -> None:
    logger.warning("A chat template could not be tried in a separate process (%s): only its text is checked.", why)


class _RefusedError(Exception):
    """The template has something forbidden, named in the message."""


def _check(node: nodes.Node) -> float:
    """Check a node of a template, and return the product of its numbers, capped just above ``MOST_NUMBER``."""
    product = math.prod(_check(child) for child in node.iter_child_nodes())
    if isinstance(node, nodes.Pow):
        raise _RefusedError(f"a power in line {node.lineno}")
    if isinstance(node, nodes.Const):
        if isinstance(node.value, str) and (wide := _WIDTH.search(node.value)):
            raise _RefusedError(f"a width of {cut(wide[0], most=60)} in line {node.lineno}")
        product = abs(node.value) if isinstance(node.value, int | float) and node.value else 1
    if product > MOST_NUMBER and isinstance(node, nodes.Const | nodes.Mul):
        raise _RefusedError(f"a number above {MOST_NUMBER:,} in line {node.lineno}")
    return min(product, MOST_NUMBER + 1)
