"""Ask an OpenAI-compatible server with the client ``openai``, in the engine's environment; nothing imports this file.

A job is read as JSON from stdin: ``url`` and ``requests``, each with ``kind`` (``completions`` or ``chat``), ``stream``
and the call's ``options``. For each request stdout gets ``{"prompt": [ids], "tokens": [ids]}`` for each of its choices,
or ``{"error": status, "message": text}``.
"""

import json
import sys
from typing import Any


def main() -> None:
    import openai  # which the environment of the tests does not have

    job = json.load(sys.stdin)
    client = openai.OpenAI(base_url=job["url"], api_key="none", max_retries=0)
    answers: list[Any] = []
    for request in job["requests"]:
        try:
            answers.append(ask(client, request))
        except openai.APIStatusError as error:
            answers.append({"error": error.status_code, "message": str(error)})
    json.dump(answers, sys.stdout)


def ask(client: Any, request: dict[str, Any]) -> list[dict[str, Any]]:
    create = client.completions.create if request["kind"] == "completions" else client.chat.completions.create
    options = {"temperature": 0, **request["options"]}
    options["extra_body"] = {"return_token_ids": True, **options.get("extra_body", {})}
    answer = create(**options, stream=request["stream"])
    return collect(list(answer) if request["stream"] else [answer])


def collect(parts: list[Any]) -> list[dict[str, Any]]:
    """Put the parts of a stream together, or take the only part, by the number of the choice."""
    found: dict[int, dict[str, Any]] = {}
    for part in parts:
        whole = part.model_dump()
        for choice in whole["choices"]:
            entry = found.setdefault(choice["index"], {"prompt": None, "tokens": []})
            entry["prompt"] = entry["prompt"] or choice.get("prompt_token_ids") or whole.get("prompt_token_ids")
            entry["tokens"] += choice.get("token_ids") or []
    return [found[index] for index in sorted(found)]


if __name__ == "__main__":
    main()
