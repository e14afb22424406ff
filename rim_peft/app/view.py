"""What the page shows, as text and HTML: everything that a model or a row says is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rim_peft.app.playground import Session, Turn
from rim_peft.escaping import page, visible
from rim_peft.inference import Readout
from rim_peft.inspection.document import Alternative, Chain
from rim_peft.inspection.signals import percent
from rim_peft.values import cut

_LONGEST = 120
"""Most characters of a text in one row."""

STYLE = """
footer { display: none !important; }
.rim h1 { margin: 0; font: italic 500 1rem/1.3 ui-serif, Georgia, Cambria, "Times New Roman", serif; color: var(--soft);
  overflow-wrap: anywhere; }
.rim h2 { margin: 0 0 .35rem; font-size: 1rem; font-weight: 600; }
.rim p { margin: .2rem 0; overflow-wrap: anywhere; }
.rim { --soft: #5c5954; --kept: #0f766e; }
.dark .rim { --soft: #b0aaa1; --kept: #2dd4bf; }
.rim .soft { color: var(--soft); font-size: .875rem; }
.rim .big { font-size: 1.35rem; font-weight: 600; }
.rim .problem { padding: .4rem .7rem; border-left: 3px solid #b45309; }
.rim table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.rim td { padding: .35rem .6rem .35rem 0; border: 0; border-top: 1px solid var(--border-color-primary);
  vertical-align: top; overflow-wrap: anywhere; }
.rim td:first-child { width: 4.5rem; color: var(--soft); }
.rim td:last-child { width: 8rem; padding-right: 0; text-align: right; white-space: nowrap; }
.rim .kept { color: var(--kept); font-weight: 600; }
.rim meter::-webkit-meter-optimum-value { background: var(--kept); }
.rim meter { width: 4.5rem; height: .6rem; vertical-align: middle; }
.rim pre { max-height: 18rem; overflow: auto; margin: .4rem 0; padding: .6rem .8rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .8125rem; border: 1px solid var(--border-color-primary); border-radius: 4px; }
@media (max-width: 40rem) { .rim meter { display: none; } .rim td:last-child { width: 4rem; } }
"""


def show_chat(session: Session) -> list[dict[str, str]]:
    """Return a chat as messages of HTML: what was there before, then each turn."""
    shown = [*session.begun]
    for turn in session.turns:
        answer = turn.answer or "(nothing)"
        shown += [
            {"role": "user", "content": turn.text},
            {"role": "assistant", "content": answer if turn.is_complete else f"{answer} …"},
        ]
    # Gradio takes texts without Markdown for HTML: it stops scripts, but would load an image.
    return [{"role": message["role"], "content": page(message["content"])} for message in shown]


def show_time(turn: Turn) -> str:
    """Return how long an answer took."""
    cut_off = "" if turn.is_complete else ". It reached the limit of tokens."
    return _panel(f'<p><span class="big">{_duration(turn.ms)}</span> {_after(turn.num_blocks)}{cut_off}</p>')


def show_readouts(readouts: Sequence[Readout]) -> str:
    """Return a row a block with its readout's text and probability; those that are the answer are emphasised."""
    rows = []
    for readout in readouts:
        chance = math.exp(sum(readout.token_log_probs))
        kind = ' class="kept"' if readout.text == readouts[-1].text else ""
        text = page(cut(readout.text, most=_LONGEST)) or "(nothing)"
        meter = f'<meter min="0" max="1" value="{chance:.3f}" aria-hidden="true"></meter>'
        rows.append(
            f"<tr><td>block {readout.block}</td><td{kind}><bdi>{text}</bdi></td><td>{meter} {percent(chance)}</td></tr>"
        )
    return _panel(f"<h2>What each block holds</h2><table>{''.join(rows)}</table>")


def show_chain(chain: Chain) -> str:
    """Return what the base wrote, with its time beside the adapter's."""
    ratio = f", {chain.ms / chain.adapter_ms:.0f} times as long" if chain.ms >= 2 * chain.adapter_ms > 0 else ""
    told = "The same answer." if chain.agrees else f"Its answer: {_quoted(chain.answer)}."
    cut_off = "" if chain.is_complete else " It reached the limit of tokens."
    return _panel(
        f'<p><span class="big">{_duration(chain.ms)}</span> for {_tokens(chain.num_tokens)}{ratio}</p>'
        f'<p class="soft">The adapter: {_duration(chain.adapter_ms)} for {_tokens(chain.adapter_tokens)} after its '
        f"blocks; each timed once.</p><pre>{page(chain.text) or '(nothing)'}</pre><p>{told}{cut_off}</p>"
    )


def show_swap(found: Alternative) -> str:
    """Return the answer with another question's blocks."""
    donor = found.donor if isinstance(found.donor, str) else found.donor[-1]["content"] if found.donor else ""
    if found.agrees:
        told = "The answer stays: it does not come from the blocks alone."
    elif found.answer is not None and found.answer == found.donor_answer:
        told = "This is the other question's answer: it comes from the blocks."
    else:
        told = "The answer changes, but is not the other question's."
    return _panel(
        f'<p><span class="big">{page(cut(found.text, most=_LONGEST)) or "(nothing)"}</span> '
        f"{percent(found.probability)}</p><p>{told}</p>"
        f'<p class="soft">The other question, answered {_quoted(found.donor_answer)}: {page(donor)}</p>'
    )


def show_problem(error: Exception) -> str:
    """Return an error as a note."""
    return _panel(f'<p class="problem" role="alert">{page(cut(str(error), most=600))}</p>')


def label(text: str) -> str:
    """Return a question as the label of an example, on one line."""
    return visible(cut(" ".join(text.split()), most=_LONGEST))


def _panel(inner: str) -> str:
    return f'<div class="rim">{inner}</div>'


def _duration(ms: float) -> str:
    """Return a time in words.

    >>> _duration(84.4), _duration(1234)
    ('84 ms', '1.2 s')
    """
    return f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.1f} s"


def _after(num_blocks: int) -> str:
    return "after 1 block" if num_blocks == 1 else f"after {num_blocks} blocks"


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def _quoted(text: str | None) -> str:
    return f"“{page(cut(text, most=_LONGEST))}”" if text else "none that can be read"
