"""Hold wordings of the privileged block: a text around the information, and where it stands."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from pidistill.data.prompts import build_prompts
from pidistill.errors import InputError, one_line
from pidistill.privileged.prompt import DEFAULT_TEMPLATE, PrivilegedPrompt
from pidistill.tokenizers import ChatTokenizer
from pidistill.types import Example, PromptPair

Prompts = list[tuple[Example, PromptPair]]
OWN = "the config's"

# What the information is called in a wording, by the kind that the dataset gives (`dataset.privileged` or `dataset.kind`).
NOUNS = {
    "solution": "The solution",
    "answer": "The final answer",
    "calls": "What an expert did",
    "actions": "What an expert did",
    "gold_actions": "What an expert did",
    "hints": "Advice",
    "hint": "A hint",
    "document": "The text",
}
_ANSWER = "Now write your own answer, step by step."
_SOLUTION = "Now write the solution, one calculation per line, and end with the final answer."
_RETHINK = "Understand it first. Then answer step by step in your own words, as if you had found the answer alone."


@dataclass(frozen=True)
class Wording:
    """Hold a name, and what it sets of ``privileged``."""

    name: str
    template: str
    placement: str

    def applied(self, privileged: PrivilegedPrompt) -> PrivilegedPrompt:
        """Return ``privileged`` with this wording; all its other settings stay."""
        return replace(privileged, template=self.template, placement=self.placement)

    def as_yaml(self) -> str:
        """Return the lines of a config that choose this wording."""
        node = {"privileged": {"placement": self.placement, "template": self.template}}
        return yaml.safe_dump(node, sort_keys=False, allow_unicode=True, width=1000).rstrip()


def builtin_wordings(kind: str | None) -> list[Wording]:
    """Return the wordings that are tried for a kind of privileged information; an unknown kind is called "information"."""
    noun = NOUNS.get(kind or "", "Information that helps")
    plain = f"{noun}:\n{{privileged}}\n\n{_ANSWER}"
    found = [
        Wording("block, system", DEFAULT_TEMPLATE, "system_end"),
        Wording("block, user", DEFAULT_TEMPLATE, "user_end"),
        Wording("plain, system", plain, "system_end"),
        Wording("plain, user", plain, "user_end"),
        Wording("understand, user", f"{noun}:\n{{privileged}}\n\n{_RETHINK}", "user_end"),
        Wording("plain, before", f"{noun}:\n{{privileged}}", "before_user"),  # the question comes last: it is not recited
    ]
    if kind == "solution":
        found.append(Wording("rewrite, user", f"The solution is: {{privileged}}\n\n{_SOLUTION}", "user_end"))
    return found


def configured(privileged: PrivilegedPrompt) -> Wording:
    """Return the config's own wording."""
    return Wording(OWN, privileged.template, privileged.placement)


def read_wordings(path: str) -> list[Wording]:
    """Read wordings from a YAML file: a mapping from names to ``template`` and ``placement`` (user_end where it is absent)."""
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--wordings {path} cannot be read ({one_line(error)})") from error
    if not isinstance(found, Mapping) or not found:
        raise InputError(f"--wordings {path} holds no mapping from names to a template and a placement")
    return [_wording(path, name, entry) for name, entry in found.items()]


def _wording(path: str, name: Any, entry: Any) -> Wording:
    known = {"template", "placement"}
    if not isinstance(entry, Mapping) or "template" not in entry or set(entry) - known:
        raise InputError(f"--wordings {path}: {name} needs a template, may have a placement, and has nothing else")
    made = Wording(str(name), str(entry["template"]), str(entry.get("placement", "user_end")))
    try:
        made.applied(PrivilegedPrompt())
    except InputError as error:
        raise InputError(f"--wordings {path}: {name}: {error}") from error
    return made


def prompts_by_wording(
    wordings: Sequence[Wording],
    examples: Sequence[Example],
    tokenizer: ChatTokenizer,
    privileged: PrivilegedPrompt,
    **limits: int,
) -> tuple[dict[str, Prompts], list[str]]:
    """Return the prompts of the rows that fit under every wording, by wording, and what was left out, one sentence each.

    ``examples`` have what ``privileged.control`` shows in place of their own information; it is not applied to them again.
    A wording that the tokenizer or its chat template does not take is left out; the config's own is refused.
    """
    shown = replace(privileged, control=None)
    found: dict[str, Prompts] = {}
    said = []
    for wording in wordings:
        try:
            found[wording.name] = build_prompts(
                examples, tokenizer, wording.applied(shown), on_overflow="drop", **limits
            ).prompts
        except InputError as error:
            if wording.name == OWN:
                raise
            said.append(f"{wording.name} is left out: {error}.")
    fitting = set.intersection(*({example.id for example, _ in prompts} for prompts in found.values()))
    if not fitting:
        raise InputError(
            f"none of the {len(examples)} rows fits under every wording; raise tokenizer.max_seq_len, or try the config's own "
            "alone with --only-own"
        )
    if len(fitting) < len(examples):
        said.append(f"{len(examples) - len(fitting)} of {len(examples)} rows are too long under a wording and were not tried.")
    return {name: [pair for pair in prompts if pair[0].id in fitting] for name, prompts in found.items()}, said
