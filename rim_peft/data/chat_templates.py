"""Chat templates that come with somebody's tokenizer: programs, whose sandbox bounds neither time nor memory."""

from __future__ import annotations

import json
import logging
import math
import re
import subprocess
import sys
from functools import lru_cache
from typing import Any

from jinja2 import nodes
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

# Of a number's or a text's place in a format; stops at the next one, so that it is found in one pass.
_WIDTH = re.compile(r"%(\([^)%]*\))?[-+ #*.\d]*?\d{6}|\{[^{}]*?\d{6}")


class _Generation(Extension):
    """The tag by which transformers marks an assistant's text."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return what the tag encloses."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def check_chat_template(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Refuse chat templates that take more time or memory than a chat can need.

    Numbers as in ``'a' * 10**10``, which is computed when it is compiled, are looked for in the text; growth at run
    time, as of loops within loops, by rendering a short chat in a process of its own, once for each text.

    Args:
        tokenizer: whose templates are looked at.
        source: where it comes from.

    Raises:
        ValueError: a template is too long, has a power, or a number or a product above ``MOST_NUMBER``, or takes too
            much when it is rendered.
    """
    templates: Any = tokenizer.chat_template or {}
    tokens = tuple(sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()))
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        if problem := _find_problem(str(template)) or _try(str(template), tokens):
            raise ValueError(
                f"tokenizer: the chat template of {source} must only write texts, and has {problem}. Correct "
                "chat_template.jinja or tokenizer_config.json there."
            )


def _find_problem(template: str) -> str | None:
    if len(template) > MOST_CHARACTERS:
        return f"{len(template):,} characters, more than {MOST_CHARACTERS:,}"
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols", _Generation])
    try:
        _check(environment.parse(template))
    except TemplateSyntaxError:
        return None  # which rendering says too
    except RecursionError:
        return "expressions that are nested too deep"
    except _RefusedError as error:
        return str(error)
    return None


@lru_cache
def _try(template: str, tokens: tuple[tuple[str, str], ...]) -> str | None:
    """Render a short chat in a process of its own, and return what was too much."""
    if not sys.executable or getattr(sys, "frozen", False):  # which is then no Python, but the whole program
        _warn_untried("there is no Python to start")
        return None
    given = json.dumps({"template": template, "tokens": dict(tokens), "path": [str(path) for path in sys.path]})
    command = [sys.executable, "-I", template_trial.__file__]  # nothing of the working directory
    try:
        # Idle machines take a tenth of a second; the wait is long so that a busy one passes.
        status = subprocess.run(  # noqa: S603 - a program of this package
            command, input=given, text=True, capture_output=True, timeout=60
        ).returncode
    except subprocess.TimeoutExpired:
        status = -1  # as of one that was killed
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
    logger.warning("A chat template could not be tried in a process of its own (%s): its text alone is checked.", why)


class _RefusedError(Exception):
    """Says what a template must not have."""


def _check(node: nodes.Node) -> float:
    """Check a part of a template, and return the product of the numbers in it, as far as it matters."""
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
