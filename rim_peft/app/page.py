"""The page itself, by Gradio, which is imported only here and only when a page is built."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from rim_peft.app.playground import Playground, Session
from rim_peft.app.view import STYLE, label, show_chain, show_chat, show_problem, show_readouts, show_swap, show_time
from rim_peft.escaping import page
from rim_peft.run import load_run

_NUM_EXAMPLES = 6
_FONT = ("system-ui", "sans-serif")
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)
"""Gradio's page needs inline scripts and ``eval``; nothing comes from or goes to another host."""


class Events:
    """What happens on the page, as plain functions: values of its inputs → values of its outputs."""

    def __init__(self, playground: Playground) -> None:
        self.playground = playground

    def ask(self, session: Session, text: str, num_blocks: float, continues: bool) -> Iterator[tuple[Any, ...]]:
        """Yield chat, text box, time and readouts: after the answer, then after the readouts; other panels empty."""
        try:
            turn = self.playground.ask(session, text, num_blocks=int(num_blocks), continues=continues)
        except ValueError as error:
            yield session, show_chat(session), text, show_problem(error), "", "", ""
            return
        yield session, show_chat(session), "", show_time(turn), "", "", ""
        readouts = _shown(lambda: show_readouts(self.playground.read(turn)))
        yield session, show_chat(session), "", show_time(turn), readouts, "", ""

    def write_chain(self, session: Session) -> str:
        """Return what the base writes about the last question."""
        return _shown(lambda: show_chain(self.playground.write_chain(_last_turn(session))))

    def swap(self, session: Session, other: str) -> str:
        """Return the answer to the last question with another question's blocks."""
        return _shown(lambda: show_swap(self.playground.swap(_last_turn(session), other)))

    def choose(self, session: Session, index: int) -> tuple[Any, ...]:
        """Return the chat and the text of an example."""
        session, text = self.playground.start(session, index)
        return session, show_chat(session), text

    def clear(self) -> tuple[Any, ...]:
        """Return an empty chat and empty panels."""
        return Session(), [], "", "", "", "", ""

    def examples(self) -> list[str]:
        """Return the labels of the examples."""
        questions = self.playground.questions[:_NUM_EXAMPLES]
        return [label(question if isinstance(question, str) else question[-1]["content"]) for question in questions]


def build_page(playground: Playground) -> Any:
    """Return the page as ``gradio.Blocks``; start it with :func:`serve`, which adds style and policy.

    Raises:
        ImportError: Gradio is not installed.
    """
    gr = import_gradio()
    events = Events(playground)
    most = playground.num_blocks
    panel = partial(gr.HTML, apply_default_css=False)
    with gr.Blocks(title=f"rim-peft: {playground.name}", analytics_enabled=False) as built:
        session = gr.State(Session())
        panel(f'<div class="rim">{_heading(playground)}</div>')
        with gr.Row():
            with gr.Column(scale=3):
                plain = {"render_markdown": False, "latex_delimiters": [], "allow_file_downloads": False, "buttons": []}
                chat = gr.Chatbot(label="Chat", height=340, feedback_options=None, **plain)
                text = gr.Textbox(label="Question", placeholder="Ask, then press Enter", lines=1, max_lines=6)
                with gr.Row():
                    send = gr.Button("Ask", variant="primary", min_width=100)
                    clear = gr.Button("Clear", min_width=100)
            with gr.Column(scale=2):
                time, readouts = panel(), panel()  # on a phone right below the question
                num_blocks = gr.Slider(
                    1, 2 * most, value=most, step=1, label="Blocks", info=f"The adapter was trained with {most}."
                )
                continues = gr.Checkbox(
                    value=playground.is_chat,
                    label="Continue the dialogue",
                    info="Otherwise each question stands alone.",
                    visible=playground.can_continue,
                )
                write = gr.Button("Let the base write its reasoning")
                chain = panel()
                other = gr.Textbox(
                    label="Another question, whose blocks are swapped in",
                    info="If the answer becomes that question's, it comes from the blocks.",
                    placeholder="Leave it empty to take one of the task's",
                )
                swap = gr.Button("Swap the blocks")
                swapped = panel()
        examples = _examples(gr, events)
        shown = [session, chat, text, time, readouts, chain, swapped]
        options: dict[str, Any] = {"concurrency_limit": None}
        inputs = [session, text, num_blocks, continues]
        asking = gr.on([text.submit, send.click], events.ask, inputs, shown, api_name="ask", **options)
        write.click(events.write_chain, session, chain, api_name="write_chain", **options)
        gr.on([other.submit, swap.click], events.swap, [session, other], swapped, api_name="swap", **options)
        # An answer that is on its way would come back into the empty chat.
        gr.on([clear.click, chat.clear], events.clear, None, shown, api_name="clear", cancels=[asking], **options)
        if examples is not None:
            examples.click(events.choose, [session, examples], [session, chat, text], api_name="choose", **options)
    return built


def serve(playground: Playground, *, host: str | None = "127.0.0.1", port: int | None = None) -> Any:
    """Start a page's server in the background, and return the page; ``local_url`` is its address, ``close()`` ends it.

    Args:
        host: address to listen on; Gradio's choice if None, as a Space needs it.
        port: port; the first free one from 7860 by default.

    Raises:
        ImportError: Gradio is not installed.
        OSError: the port is in use, or the address is not this machine's.
    """
    built = build_page(playground)
    gr = import_gradio()
    try:
        built.launch(
            server_name=host,
            server_port=port,
            theme=_theme(gr),
            css=STYLE,
            footer_links=[],
            run_history=False,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            max_file_size=1,  # nothing is uploaded
            prevent_thread_lock=True,
            quiet=True,
            # A Space is shown in a frame of the Hub, which the policy refuses.
            app_kwargs={"middleware": [(restrict, (), {})]} if host is not None else None,
        )
    except OSError as error:
        if "empty port" not in str(error):
            raise
        wanted = "ports from 7860" if port is None else f"port {port}"
        raise OSError(
            f"port: must be free on an address of this machine, got {wanted} on {host}. End what listens there, or "
            "give another port or host."
        ) from error
    return built


def launch(adapter: str, *, revision: str | None = None) -> None:
    """Show an adapter, as a Space does, until the process ends.

    Args:
        adapter: folder or Hub id.
        revision: branch, tag or commit of the adapter on the Hub.

    Raises:
        ImportError: Gradio is not installed.
        OSError: the adapter or its base cannot be found.
        ValueError: the adapter does not answer after blocks.
    """
    import_gradio()
    serve(Playground(load_run(adapter, revision=revision), name=adapter), host=None).block_thread()


def restrict(app: Callable[..., Any]) -> Callable[..., Any]:
    """Return an ASGI app whose pages may load nothing from other hosts."""

    async def restricted(scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"content-security-policy", _POLICY.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await app(scope, receive, with_policy)

    return restricted


def import_gradio() -> Any:
    """Import Gradio with its telemetry off.

    Raises:
        ImportError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the app needs Gradio: pip install 'rim-peft[app]'") from error
    return gradio


def _theme(gr: Any) -> Any:
    """Return colours and fonts of all pages; Gradio's own are too pale for small texts and on its first button."""
    theme = gr.themes.Base(primary_hue="teal", neutral_hue="stone", font=_FONT, font_mono=("ui-monospace", "monospace"))
    button = {f"button_primary_background_fill{state}": "*primary_700" for state in ("", "_dark")}
    return theme.set(body_text_color_subdued="*neutral_500", **button)


def _examples(gr: Any, events: Events) -> Any:
    labels = events.examples()
    if not labels:
        return None
    return gr.Dataset(
        components=[gr.Textbox(visible=False)], samples=[[text] for text in labels], type="index", label="Examples"
    )


def _heading(playground: Playground) -> str:
    blocks = "1 memory block" if playground.num_blocks == 1 else f"{playground.num_blocks} memory blocks"
    return (
        f"<h1>{page(playground.name)}</h1><p>It reasons in {blocks}, in one pass, and then answers. Beside the answer "
        "stands what each block held.</p>"
    )


def _last_turn(session: Session) -> Any:
    if not session.turns:
        raise ValueError("question: must be asked first, but the chat is empty. Ask one.")
    return session.turns[-1]


def _shown(show: Callable[[], str]) -> str:
    """Return a panel, or the error in its place."""
    try:
        return show()
    except ValueError as error:
        return show_problem(error)
