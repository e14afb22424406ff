"""The look of an inspection's page, beside that of all pages."""

from __future__ import annotations

LEVELS = 8
"""Steps of a colour from nothing to full."""

_LOOK = """
.question { padding-top: 2.25rem; }
.question + .question { margin-top: 4rem; border-top: 1px solid var(--line); }
.label { display: block; letter-spacing: .02em; }
.result { display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem 1rem; margin: 0 0 .5rem; max-width: none; }
.result .big { font: 500 clamp(2rem, 7vw, 3.25rem)/1.1 ui-serif, Georgia, Cambria, serif; color: var(--answer);
  overflow-wrap: anywhere; }
.result .long { font-size: clamp(1.25rem, 4vw, 1.75rem); }
.result .chance { font-size: 1.25rem; }
.film { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.5rem, 1fr)); gap: 1.25rem 0; margin: 2rem 0 0;
  padding: 0; list-style: none; }
.film li { position: relative; padding: 1.1rem 1rem 0 0; border-top: 2px solid var(--line); min-width: 0; }
.film li::before { content: ""; position: absolute; top: -.5rem; left: 0; width: .9rem; height: .9rem;
  border: 2px solid var(--other); border-radius: 50%; background: var(--paper); }
.film .kept { border-top-color: var(--answer); }
.film .agrees::before { border-color: var(--answer); background: var(--answer); }
.film .held { display: block; margin: .1rem 0 .5rem; font: 500 1.5rem/1.2 ui-serif, Georgia, Cambria, serif;
  overflow-wrap: anywhere; }
.film .long { font-size: 1.05rem; }
.film .agrees .held { color: var(--answer); }
.film .tag { display: block; font-size: .875rem; color: var(--answer); }
.bar { display: block; width: 100%; max-width: 9rem; height: 4px; margin-bottom: .25rem; }
.bar .track { fill: var(--line); }
.bar .fill { fill: var(--other); }
.agrees .bar .fill { fill: var(--answer); }
.signals { margin: .5rem 0; padding: 0; list-style: none; max-width: 46rem; }
.signals li { display: flex; gap: .7rem; padding: .3rem 0; overflow-wrap: anywhere; }
.signals .mark { flex: none; width: 4.75rem; font-size: .875rem; line-height: 1.7; color: var(--soft); }
.signals .for .mark { color: var(--answer); font-weight: 600; }
.signals .against .mark { color: var(--own); font-weight: 600; }
th, td { min-width: 6.5rem; max-width: 26rem; }
.map { width: 100%; table-layout: fixed; border-collapse: separate; border-spacing: 2px; font-size: .8125rem; }
.map th, .map td { min-width: 0; padding: .1rem .4rem; border: 0; overflow: hidden; white-space: nowrap;
  text-overflow: ellipsis; }
.map thead th { color: var(--soft); font-weight: 400; }
.map th:first-child { width: 4.5rem; padding-left: 0; color: var(--soft); font-weight: 400; text-align: right; }
.map td { border-radius: 2px; }
.map .answer { font-weight: 650; }
.map .own { text-decoration: underline dotted; text-underline-offset: .2em; }
.map .n { float: right; font-size: .75rem; font-weight: 400; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.25rem; margin: .4rem 0; padding: 0; list-style: none;
  font-size: .875rem; }
.legend .chip { padding: .05rem .45rem; border-radius: 2px; font-size: .8125rem; }
.legend .answer { font-weight: 650; }
.legend .own { text-decoration: underline dotted; text-underline-offset: .2em; }
fieldset { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: .75rem 0; padding: 0; border: 0;
  font-size: .875rem; }
legend { float: left; margin-right: .2rem; padding: 0; color: var(--soft); line-height: 1.75rem; }
label { display: inline-flex; gap: .35rem; align-items: center; min-height: 1.75rem; cursor: pointer; }
input { accent-color: var(--answer); margin: 0; }
.looks { display: grid; grid-template-columns: 5rem 1fr; gap: 1.1rem 0; margin: 1rem 0; }
.looks dt { color: var(--soft); font-size: .875rem; line-height: 1.9; }
.looks dd { margin: 0; min-width: 0; }
.prompt { max-width: 52rem; margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7; }
.prompt span { padding: .12em 0; border-radius: 2px; }
.prompt .special { color: var(--soft); font-size: .8em; }
.written { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 1.25rem 2rem;
  margin-top: .75rem; }
.written .time { font: 500 1.5rem/1.2 ui-serif, Georgia, Cambria, serif; }
details { margin: .6rem 0; }
summary { cursor: pointer; padding: .25rem 0; font-size: .875rem; }
footer { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid var(--line); }
@media (max-width: 40rem) {
  .film { grid-template-columns: 1fr; gap: 0; margin-left: .45rem; }
  .film li { padding: 0 0 1.1rem 1.4rem; border-top: 0; border-left: 2px solid var(--line); }
  .film li:last-child { padding-bottom: 0; }
  .film li::before { top: .25rem; left: -.55rem; }
  .film .kept { border-left-color: var(--answer); }
  .film .held { margin-bottom: .25rem; }
  .map { font-size: .75rem; }
  .map th:first-child { width: 2.5rem; }
  .map .n { display: none; }
  th, td { min-width: 4.5rem; padding-right: .5rem; }
  .looks { grid-template-columns: 1fr; gap: .25rem; }
  .looks dd { margin-bottom: .9rem; }
}
@media print { .film li { break-inside: avoid; } }
"""


def page_style(*, num_blocks: int, num_choices: int) -> str:
    """Return the rules beside those of all pages.

    Args:
        num_blocks: columns of the map, which scrolls where it is wider than the page.
        num_choices: most choices that a switch on the page has; a switch shows the panel of its checked choice.
    """
    rules = [_LOOK, f".map {{ min-width: {3 + 4 * num_blocks}rem; }}"]
    for kind, most in (("answer", 40), ("own", 40), ("other", 24)):
        for level in range(1, LEVELS + 1):
            share = round(most * level / LEVELS)
            rules.append(
                f".{kind}.s{level} {{ background: color-mix(in srgb, var(--{kind}) {share}%, var(--paper)); }}"
            )
    # A browser without :has() shows all panels, one below the other.
    rules.append("@supports selector(:has(*)) {\n.switch .panel { display: none; }")
    for choice in range(num_choices):
        rules.append(f".switch:has(.pick{choice}:checked) .panel{choice} {{ display: block; }}")
    rules.append("}")
    return "\n".join(rules) + "\n"
