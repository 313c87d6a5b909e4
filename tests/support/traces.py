"""Make short recorded agent episodes."""

import json
from collections.abc import Callable
from pathlib import Path

SYSTEM = {"role": "system", "content": "You are an agent."}


USER = {"role": "user", "content": "Book me a flight."}


def call(name: str, **arguments) -> dict:
    return {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": json.dumps(arguments)}}]}


def result(name: str, text: str) -> dict:
    return {"role": "tool", "name": name, "content": text}


LOOK = [call("look", city="SEA"), result("look", "found F1")]


BOOK = [call("book", flight="F1", seats=2), result("book", "done")]


BYE = [{"role": "assistant", "content": "It is booked."}, {"role": "user", "content": "Thanks! STOP"}]


def episode(task, reward, /, *turns, **more) -> dict:
    return {"task_id": task, "reward": reward, "messages": [SYSTEM, USER, *turns], **more}


def trace_writer(folder: Path) -> Callable[..., str]:
    """Return a function that writes rows to a JSONL file of ``folder``, or to a JSON file, and returns its path."""

    def to_file(*rows: dict, name: str = "traces.jsonl") -> str:
        text = json.dumps(list(rows)) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_text(text)
        return str(folder / name)

    return to_file
