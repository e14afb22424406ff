"""``rim-peft app``: a local page to play with an adapter."""

from __future__ import annotations

import argparse
import atexit
import os
import signal
from threading import Event

from rim_peft.cli.console import add_adapter_argument, add_chain_arguments, add_source_arguments, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_adapter_argument(parser)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (%(default)s: this machine alone); whoever reaches it may use the model",
    )
    parser.add_argument("--port", type=_port, help="port (default: the first free one from 7860)")
    parser.add_argument(
        "--max-new-tokens", type=positive, metavar="N", help="maximum tokens of an answer (default: the recipe's)"
    )
    add_chain_arguments(parser)
    add_source_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve the page until the command is interrupted."""
    from rim_peft.app.page import import_gradio, serve

    import_gradio()  # before a base is loaded
    from rim_peft.app.playground import Playground
    from rim_peft.cli.console import load_run_of, say
    from rim_peft.inspection import Options

    options = Options(chain_tokens=args.chain_tokens, chain_template=args.chain_template)
    playground = Playground(load_run_of(args), name=args.adapter, max_new_tokens=args.max_new_tokens, options=options)
    page = serve(playground, host=args.host, port=args.port)
    say(f"{page.local_url} shows {args.adapter}. Ctrl-C ends it.")
    try:
        Event().wait()
    except (KeyboardInterrupt, SystemExit) as stop:
        # At once: the server waits for open pages, and a thread that is answering crashes when Python ends as usual.
        number = signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM
        atexit.register(os._exit, 128 + number)
        raise
    return 0


def _port(text: str) -> int:
    port = positive(text)
    if port > 65535:
        raise argparse.ArgumentTypeError(f"must be at most 65535, got {port}")
    return port
