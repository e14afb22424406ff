"""Ask an OpenAI-compatible server with the client ``openai``, in the engine's environment; nothing imports this file.

Each line of stdin is a job in JSON: ``at_once`` (how many requests are under way at the same time) and ``requests``,
each with ``kind`` (``completions`` or ``chat``) and the call's ``options``; with ``hang_up``, the client closes the
connection after the answer's first piece. A job's line of stdout has a list: of each request,
``{"prompt": [ids], "tokens": [ids], "text": text, "finish": reason}`` for each choice, or
``{"error": status, "message": text}``. The argument is the server's URL.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any


def main() -> None:
    import openai  # which the environment of the tests does not have

    client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
    for line in sys.stdin:
        job = json.loads(line)
        with ThreadPoolExecutor(job["at_once"]) as pool:
            answers = list(pool.map(partial(ask, client, openai.APIStatusError), job["requests"]))
        print(json.dumps(answers), flush=True)


def ask(client: Any, refused: type[Any], request: dict[str, Any]) -> Any:
    create = client.completions.create if request["kind"] == "completions" else client.chat.completions.create
    options = {"temperature": 0, **request["options"]}
    options["extra_body"] = {"return_token_ids": True, **options.get("extra_body", {})}
    try:
        answer = create(**options)
    except refused as error:
        return {"error": error.status_code, "message": str(error)}
    if not options.get("stream"):
        return collect([answer])
    if not request.get("hang_up"):
        return collect(list(answer))
    first = next(iter(answer))
    answer.close()
    return collect([first])


def collect(parts: list[Any]) -> list[dict[str, Any]]:
    """Put the parts of a stream together, or take the only part, by the number of the choice."""
    found: dict[int, dict[str, Any]] = {}
    for part in parts:
        whole = part.model_dump()
        for choice in whole["choices"]:
            entry = found.setdefault(choice["index"], {"prompt": None, "tokens": [], "text": "", "finish": None})
            message = choice.get("message") or choice.get("delta") or {}
            entry["prompt"] = entry["prompt"] or choice.get("prompt_token_ids") or whole.get("prompt_token_ids")
            entry["tokens"] += choice.get("token_ids") or []
            entry["text"] += choice.get("text") or message.get("content") or ""
            entry["finish"] = choice["finish_reason"] or entry["finish"]
    return [found[index] for index in sorted(found)]


if __name__ == "__main__":
    main()
