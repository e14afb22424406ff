"""An HTML page that needs nothing else: its head, its policy, and the look that all pages share."""

from __future__ import annotations

import base64
import hashlib

from rim_peft.escaping import page as escape

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
{script}</body>
</html>
"""

_LOOK = """
:root { color-scheme: light dark; --paper: #fbfaf7; --raised: #ffffff; --ink: #1d1c1a; --soft: #5c5954;
  --line: #dedad2; --answer: #0f766e; --own: #b45309; --other: #78716c; --focus: #1d4ed8; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #151413; --raised: #1e1d1b; --ink: #eeebe6; --soft: #b0aaa1; --line: #3a3733;
    --answer: #2dd4bf; --own: #fbbf24; --other: #a8a29e; --focus: #93c5fd; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 5rem; max-width: 66rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.55 system-ui, sans-serif; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
h1, h2, h3 { font-family: ui-serif, Georgia, Cambria, "Times New Roman", serif; font-weight: 500; line-height: 1.25;
  text-wrap: balance; }
h1 { margin: 0; font-size: 1rem; font-style: italic; color: var(--soft); }
h2 { margin: .35rem 0 1.25rem; font-size: clamp(1.15rem, 3.2vw, 1.6rem); white-space: pre-line; max-width: 52rem; }
h3 { margin: 3rem 0 .35rem; font-size: 1.2rem; }
p { margin: .4rem 0; max-width: 46rem; }
a { color: inherit; }
bdi { unicode-bidi: isolate; }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 2px; }
.facts, .label, .note, .rest, figcaption { color: var(--soft); font-size: .875rem; }
.facts { margin: .15rem 0 0; }
nav ol { margin: 1.25rem 0 0; padding-left: 1.4rem; max-width: 46rem; }
nav li { padding: .25rem 0; overflow-wrap: anywhere; }
.box { overflow-x: auto; margin: .9rem 0; }
table { border-collapse: collapse; font-size: .875rem; }
caption { padding: .25rem 0; text-align: left; color: var(--soft); }
/* "anywhere" would let a table's columns shrink to single letters. */
th, td { padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  overflow-wrap: break-word; }
th { font-weight: 600; }
pre { margin: .5rem 0; padding: .75rem .9rem; max-height: 22rem; overflow: auto; background: var(--raised);
  border: 1px solid var(--line); border-radius: 4px; font: .8125rem/1.5 ui-monospace, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
code { font: .8125rem/1.5 ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
@media (max-width: 40rem) { body { padding: 1.25rem 1rem 3rem; } }
@media print {
  :root { --paper: #fff; --raised: #fff; --ink: #000; --soft: #333; --line: #999; }
  .box { overflow: visible; }
  pre { max-height: none; }
  tr { break-inside: avoid; }
}
"""


def render_html(title: str, body: str, *, style: str, script: str = "", images: bool = False) -> str:
    """Return a page in the look of all pages.

    Its content-security policy allows the style sheet and the script by their hashes, and nothing else.

    Args:
        title: any text; it is escaped.
        body: HTML, whose texts are escaped.
        style: rules beside those of all pages.
        script: for comforts alone: a page must be readable without it.
        images: whether the body has images, which must be in it as ``data:`` addresses.
    """
    sheet = f"{_LOOK}{style}"
    policy = [
        "default-src 'none'",
        f"style-src {_hash(sheet)}",
        *([f"script-src {_hash(script)}"] if script else []),
        *(["img-src data:"] if images else []),
        "base-uri 'none'",
        "form-action 'none'",
    ]
    return _PAGE.format(
        policy="; ".join(policy),
        title=escape(title),
        style=sheet,
        body=body,
        script=f"<script>{script}</script>\n" if script else "",
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"
