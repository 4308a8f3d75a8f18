"""A model that asks for one tool and then repeats what it returned: the wire of two makers."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

TOOL_ARGUMENTS = {"word": "invoice"}


@dataclass
class Model:
    """What was asked, with which credential. ``between`` runs once the tool's result is here."""

    port: int = 0
    credentials: list[str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    between: Callable[[], None] = lambda: None
    problems: list[str] = field(default_factory=list)


@contextmanager
def model_server(kind: str) -> Iterator[Model]:
    """A scripted server on the host's loopback; ``kind``: anthropic or openai."""
    model = Model()
    answer = {"anthropic": _anthropic, "openai": _openai}[kind]
    header = {"anthropic": "x-api-key", "openai": "authorization"}[kind]

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.send_error(404)

        do_GET = do_HEAD

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            model.credentials.append(self.headers[header] or "")
            model.requests.append(body)
            try:
                events = answer(model, body)
            except Exception as error:  # noqa: BLE001 - told by the test: an agent may try again and again
                model.problems.append(repr(error))
                events = []
            text = "".join(
                f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events
            ).encode()
            self.send_response(200 if events else 500)
            self.send_header("content-type", "text/event-stream")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        model.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield model
        finally:
            server.shutdown()
            thread.join()


def _anthropic(model: Model, body: dict[str, Any]) -> list[dict[str, Any]]:
    last = body["messages"][-1]["content"]
    results = [part for part in last if isinstance(part, dict) and part["type"] == "tool_result"]
    if not results and any(tool["name"].startswith("mcp__") for tool in body.get("tools", ())):
        name = next(t["name"] for t in body["tools"] if t["name"].endswith("__use"))
        block: dict[str, Any] = {"type": "tool_use", "id": "toolu_1", "name": name, "input": {}}
        delta = {"type": "input_json_delta", "partial_json": json.dumps(TOOL_ARGUMENTS)}
        return _message(block, delta, "tool_use")
    text = "nothing to do"
    if results:
        model.between()
        text = "the tool said: " + json.dumps(results[0]["content"])
    return _message({"type": "text", "text": ""}, {"type": "text_delta", "text": text}, "end_turn")


def _message(block: dict[str, Any], delta: dict[str, Any], stop: str) -> list[dict[str, Any]]:
    usage = {"input_tokens": 1, "output_tokens": 1}
    message = {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "scripted", "content": [],
        "stop_reason": None, "stop_sequence": None, "usage": usage,
    }  # fmt: skip
    return [
        {"type": "message_start", "message": message},
        {"type": "content_block_start", "index": 0, "content_block": block},
        {"type": "content_block_delta", "index": 0, "delta": delta},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": stop, "stop_sequence": None},
         "usage": usage},
        {"type": "message_stop"},
    ]  # fmt: skip


def _openai(model: Model, body: dict[str, Any]) -> list[dict[str, Any]]:
    outputs = [item for item in body["input"] if item.get("type") == "function_call_output"]
    if outputs:
        model.between()
        text = "the tool said: " + json.dumps(outputs[-1]["output"])
        item: dict[str, Any] = {
            "type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
            "content": [{"type": "output_text", "text": text, "annotations": []}],
        }  # fmt: skip
    else:
        (namespace,) = [
            tool for tool in body["tools"]
            if tool["type"] == "namespace" and tool["name"].startswith("mcp__")
        ]  # fmt: skip
        item = {
            "type": "function_call", "id": "fc_1", "call_id": "call_1", "status": "completed",
            "name": "use", "namespace": namespace["name"],
            "arguments": json.dumps(TOOL_ARGUMENTS),
        }  # fmt: skip
    usage = {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2,
             "input_tokens_details": {"cached_tokens": 0},
             "output_tokens_details": {"reasoning_tokens": 0}}  # fmt: skip
    response = {"id": "resp_1", "object": "response", "status": "completed", "output": [item],
                "usage": usage}  # fmt: skip
    return [
        {"type": "response.created", "response": {"id": "resp_1", "status": "in_progress"}},
        {"type": "response.output_item.added", "output_index": 0, "item": item},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": response},
    ]
