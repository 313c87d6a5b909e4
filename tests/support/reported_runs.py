"""Write folders as runs leave them, small and with hostile texts, for the tests of `pidistill report`, `watch` and `export`."""

import json
from pathlib import Path
from typing import Any

HOSTILE = "</script><img src=x onerror=alert(1)> \x1b[31m \u202egnp.exe \ud800 \x00 &lt; {{ 7*7 }} 漢字"
VALUES = ("sampled_logprobs", "student_logprobs", "teacher_logprobs", "kl_teacher_student", "student_entropy")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def metrics_rows(steps: int = 6) -> list[dict[str, Any]]:
    rows = [{"step": 0, "eval_student_success": 0.0, "eval_teacher_success": 0.5, "eval_privileged_gain": 0.5}]
    for step in range(1, steps + 1):
        numbers = {"loss": 1 / step, "reward_mean": step / 10, "kl_teacher_student_nats": 0.2 / step, "entropy_nats": 0.5}
        rows.append({"step": step, "round": step - 1, "tokens_per_s": 900.0, "time_rollout_s": 0.5} | numbers)
    rows[3]["alarms"] = {"truncated": "step 3: all are cut"}
    return rows


def rollout_row(step: int, number: int, tokens: int = 6, text: str = "word") -> dict[str, Any]:
    """Return a rollout of two turns with a tool's answer of two tokens between them; every number is its own."""
    texts = [f"{text}{i} " for i in range(tokens + 2)]
    policy = [1] * (tokens // 2) + [0, 0] + [1] * (tokens - tokens // 2)
    values = {name: [-0.001 * (i + 1) * (k + 1) * (number + 1) for i in range(tokens)] for k, name in enumerate(VALUES)}
    return {
        "step": step, "round": step - 1, "example": f"row {number}", "group": number, "sampled_by": "student",
        "stop_reason": "length" if number % 3 == 0 else "done", "leak": number % 4 == 0, "student_prompt": f"ask {number}",
        "teacher_prompt": f"hint {number} ask {number}", "privileged": f"hint {number}",
        "turns": [{"role": "assistant", "calls": ["look({})"]}, {"role": "tool", "name": "look"}, {"role": "assistant"}],
        "policy_tokens": tokens, "tokens": texts, "policy": policy, "values": values | {"advantage": [0.5] * tokens},
        "reward": float(number % 2), "task_reward": float(number % 2), "reward_parts": {"right": float(number % 2)},
        "turn_rewards": [0.0, float(number % 2)], "success": number % 2 == 1,
    }  # fmt: skip


def write_run(folder: Path, *, rollouts: int = 8, beta: float = 1.0, text: str = "word", tokens: int = 6) -> Path:
    """Write a run of six steps with an evaluation of its own in a folder below."""
    write_rows(folder / "metrics.jsonl", metrics_rows())
    write_rows(folder / "training_rollouts.jsonl", [rollout_row(i % 6 + 1, i, tokens, text) for i in range(rollouts)])
    pair = [{"step": 2, "row": 0, "example": "row 0", "view": view, "reward": 1.0, "text": f"{view} says {text}"}
            for view in ("student", "teacher")]  # fmt: skip
    write_rows(folder / "rollouts.jsonl", pair)
    (folder / "config.yaml").write_text(f"output_dir: {folder}\nobjective:\n  beta: {beta}\nseed: 0\nmax_steps: 6\n")
    results = {
        "student": {"samples": 2, "rollouts": 8, "success": 0.25, "success_interval": [0.1, 0.4], "pass@2": float("nan")}
    }
    (folder / "latest").symlink_to("step_6")
    write_evaluation(folder / "evaluate", results, "../step_6")
    return folder


def write_evaluation(folder: Path, results: dict[str, Any], weights: str | None = None, config: str | None = None) -> None:
    """Write an evaluation of the checkpoint folder ``config``, which led to ``weights``; None is a file that is absent."""
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    if weights is not None:
        (folder / "checkpoint.json").write_text(json.dumps({"weights": weights}))
    if config is not None:
        (folder / "config.yaml").write_text(f"checkpointer: {{checkpoint_dir: {config}}}\n")
