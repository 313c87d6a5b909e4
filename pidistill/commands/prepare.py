"""`pidistill prepare gsm8k`: write GSM8K as published into a parquet file in verl's layout, with privileged information.

pidistill prepare gsm8k --source gsm8k_train.jsonl --output data/gsm8k_train.parquet
pidistill prepare gsm8k --source openai/gsm8k --split test --output data/gsm8k_test.parquet --privileged answer

`pidistill prepare gguf FILE --output FOLDER` makes a model folder from a GGUF file.

A row of the file: `data_source`, `prompt` (messages), `ability`, `reward_model` (`style`, `ground_truth`), and `extra_info`
with `split`, `index`, `question`, `answer` (both as published), `privileged_context` (what the teacher sees; null with
`--privileged none`) and `demonstration` (the worked solution in the format that the question asks for). Prompts are those of
`pidistill.data.gsm8k_dataset`, id for id, when `pidistill.data.qa_dataset` reads the file:

    dataset:
      _component_: pidistill.data.qa_dataset
      source: data/gsm8k_train.parquet
      question_key: prompt
      answer_key: reward_model.ground_truth
      completion_key: extra_info.demonstration
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from pidistill.commands.common import Parser, exit_on_input_error
from pidistill.data.builders import GSM8K_INSTRUCTIONS, gsm8k_dataset
from pidistill.errors import InputError, one_line
from pidistill.types import Example

_ROLE_AND_TEXT = [{"role": datasets.Value("string"), "content": datasets.Value("string")}]
# The types are named, so that a file without privileged information has the same columns as one with it.
FEATURES = datasets.Features(
    {
        "data_source": datasets.Value("string"),
        "prompt": _ROLE_AND_TEXT,
        "ability": datasets.Value("string"),
        "reward_model": {"style": datasets.Value("string"), "ground_truth": datasets.Value("string")},
        "extra_info": {
            "split": datasets.Value("string"),
            "index": datasets.Value("int64"),
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "privileged_context": datasets.Value("string"),
            "demonstration": datasets.Value("string"),
        },
    }
)


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="pidistill prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("dataset", choices=("gsm8k",))
    made.add_argument("--source", default="openai/gsm8k", help="a file with the columns question and answer, or the Hub name")
    made.add_argument("--output", required=True, help="the parquet file; one that exists is replaced")
    made.add_argument("--privileged", choices=("solution", "answer", "none"), default="solution", help="what the teacher sees")
    made.add_argument("--answer-format", choices=tuple(GSM8K_INSTRUCTIONS), default="boxed", help="what the question asks for")
    made.add_argument("--system-prompt", help="a system message in front of every question")
    made.add_argument("--split", default="train", help="of the Hub dataset; written into every row")
    made.add_argument("--max-rows", type=int, help="only the first rows")
    return made


def main(argv: list[str]) -> None:
    if argv[:1] == ["gguf"]:
        from pidistill.commands.prepare_gguf import main as prepare_gguf

        prepare_gguf(argv[1:])
    arguments = parser().parse_args(argv)
    with exit_on_input_error():
        print(prepare_gsm8k(arguments))
    sys.exit(0)


def prepare_gsm8k(arguments: argparse.Namespace) -> str:
    """Write the file; returns the line that says so."""
    output = Path(arguments.output)
    if output.suffix != ".parquet":
        raise InputError(f"--output {output} must end in .parquet, because qa_dataset recognises a format by the file's name")
    examples = gsm8k_dataset(
        arguments.source,
        privileged=arguments.privileged,
        answer_format=arguments.answer_format,
        system_prompt=arguments.system_prompt,
        split=arguments.split,
        max_rows=arguments.max_rows,
    )
    rows = [_row(i, example, arguments.split) for i, example in enumerate(examples)]
    write_parquet(output, rows)
    return f"{output}: {len(rows):,} rows, privileged information: {arguments.privileged}"


def _row(index: int, example: Example, split: str) -> dict[str, Any]:
    return {
        "data_source": "openai/gsm8k",
        "prompt": example.messages,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": example.reference},
        "extra_info": {
            "split": split,
            "index": index,
            "question": example.data["question"],
            "answer": example.data["answer"],
            "privileged_context": example.privileged,
            "demonstration": example.completion[0]["content"],
        },
    }


def write_parquet(output: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the file aside and move it into place: it is whole, or there is none."""
    aside = output.with_name(f".{output.name}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(list(rows), features=FEATURES).to_parquet(str(aside))
        os.replace(aside, output)
    except OSError as error:
        raise InputError(f"--output {output} cannot be written ({one_line(error)}); name another file") from error
