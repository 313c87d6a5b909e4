"""`pidistill probe`: measure, before any training, which wording of the privileged information helps this model.

pidistill probe qwen2_5/0.5B_pi_distill --rows 32
pidistill probe my_config.yaml --wordings my_wordings.yaml --temperature 1.0

The student answers some rows without privileged information, and the teacher with it, under the config's own wording and under
several others. The table says for each: success (by the config's reward, and by the reward's flexible rule where it has one),
what the privileged information adds to the student's success (gain), length, how many answers were cut off, how many give the
information away, and how far teacher and student are apart on the student's own answers (KL, in nats per token). The wording
with the best success is recommended, with the lines to paste. `--after 32` shows as well what the teacher makes of answers that
the student has begun, as it does where a method corrects the student's own answers. The file probe/probe.json in output_dir
holds the numbers of the wordings that are measured so far.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pidistill.commands.common import config_parser, exit_on_input_error, parse_with_overrides
from pidistill.commands.plan.reading import KEYS, merged
from pidistill.commands.probe.measure import Measured, Probe
from pidistill.commands.probe.wordings import OWN, Wording, builtin_wordings, configured, prompts_by_wording, read_wordings
from pidistill.config import build
from pidistill.data.load import check_models, gives_no_reward, gives_privileged, load_privileged
from pidistill.distributed.run import Run
from pidistill.errors import InputError, escape_controls
from pidistill.privileged.prompt import PrivilegedPrompt
from pidistill.tokenizers import ChatTokenizer, as_chat_tokenizer
from pidistill.training.collector import build_collector
from pidistill.training.keys import EVALUATION_KEYS, setting
from pidistill.training.load import load_initial
from pidistill.training.run_folder import RESUME
from pidistill.training.start import cleanup, start
from pidistill.types import Example

REQUIRED = ("output_dir", "model", "tokenizer", "checkpointer", "dataset", "environment", "sampler")
TRUNCATED_TOO_OFTEN = 0.2
FEW_ROWS = 16
NUMBERS = "probe.json"
OTHER_TEACHERS = ("teacher_checkpointer", "teacher_checkpointers")
NOT_THE_TEACHER = "The model of {key} is not sampled: the teacher here is the trained model itself with the information."


def parser() -> argparse.ArgumentParser:
    made = config_parser("probe", __doc__)
    made.add_argument("--rows", type=int, default=32, help="rows with privileged information that are tried")
    made.add_argument("--wordings", help="a YAML file of wordings: name: {template: ..., placement: ...}")
    made.add_argument("--only-own", action="store_true", help="leave out the built-in wordings")
    made.add_argument("--temperature", type=float, default=0.0, help="of the samples; 0 is greedy")
    made.add_argument(
        "--after", type=int, help="also let the teacher go on from this many first tokens of the student's answer"
    )
    made.add_argument("--no-kl", action="store_true", help="leave out the divergences")
    made.add_argument("--json", action="store_true", help="print the numbers as JSON")
    return made


def main(argv: list[str]) -> None:
    with exit_on_input_error():
        arguments = parse_with_overrides(parser(), argv)
        if arguments.rows < 1 or not 0 <= arguments.temperature < float("inf"):
            raise InputError(
                f"--rows {arguments.rows} must be at least 1, and --temperature {arguments.temperature} at least 0"
            )
        if arguments.after is not None and arguments.after < 1:
            raise InputError(f"--after {arguments.after} must be at least 1; leave it out to skip that measurement")
        found = probe(arguments)
        if arguments.json:
            print(json.dumps(found.as_json(), ensure_ascii=False))
        else:
            found.show()
        cleanup()
    sys.exit(0)


class Found:
    """Hold the student's numbers, those of every wording, the recommendation, and what was left out, one sentence each."""

    def __init__(
        self, student: Measured, wordings: list[tuple[Wording, Measured]], seconds: float, cut_by: str, left_out: Sequence[str]
    ) -> None:
        self.student, self.wordings, self.seconds = student, wordings, seconds
        self.cut_by, self.left_out = cut_by, left_out  # the keys that bound a completion
        self.wording, self.measured = max(wordings, key=lambda pair: _rank(pair[1]))
        self.gain = self.measured.best - student.best

    def as_json(self) -> dict:
        return {
            "student": vars(self.student),
            "wordings": {wording.name: vars(wording) | vars(measured) for wording, measured in self.wordings},
            "recommended": self.wording.name,
            "advice": self.advice(),
            "seconds": self.seconds,
        }

    def advice(self) -> list[str]:
        """Return what the numbers say, one sentence each."""
        own, best = self.wordings[0][1], self.measured
        rows = f"{best.rows} row{'' if best.rows == 1 else 's'}"
        said = [f"Recommended: {self.wording.name}, with success {best.best:.2f} of {rows} (student {self.student.best:.2f})."]
        if self.gain <= 0:
            too_often = max(best.truncated, self.student.truncated) > TRUNCATED_TOO_OFTEN
            nothing = "This teacher has nothing to teach; change the privileged information."
            said = [
                f"No wording helps: the best, {self.wording.name}, has success {best.best:.2f} of {rows} and the student "
                f"alone {self.student.best:.2f}. {'Answers are cut off, so that this says little.' if too_often else nothing}"
            ]
        elif self.wordings[0][0] != self.wording and own.best < best.best:
            chance = _chance(own, best)
            may_be = f"; of {rows} a difference of up to {chance:.2f} may be chance" if best.best - own.best < chance else ""
            said.append(f"The config's own wording has {own.best:.2f}{may_be}.")
        chance = _chance(self.student, best)
        if self.gain < chance and (self.gain > 0 or best.rows < FEW_ROWS):
            said.append(f"Of {rows} a difference of up to {min(chance, 1.0):.2f} may be chance; raise --rows.")
        if best.after is not None:
            said.append(
                f"Where the student has begun the answer ({best.after_rows} of {rows}, in which it was not over by then), this "
                f"teacher is right in {best.after:.2f}; methods on the student's own answers (OPSD, SDFT) have it so."
            )
        if best.flexible is not None and best.flexible > best.success:
            said.append(
                f"Only {best.success:.2f} are written in the format that the reward counts; choose a reward format that counts "
                "what the model writes, or say the format in the wording."
            )
        for name, measured in (("student", self.student), (self.wording.name, best)):
            if measured.truncated > TRUNCATED_TOO_OFTEN:
                said.append(
                    f"{measured.truncated:.0%} of the answers of {name} are cut off before they end; raise {self.cut_by}."
                )
        return [*said, *self.left_out]

    def show(self) -> None:
        console = Console(width=None if sys.stdout.isatty() else 140)
        console.print(self._table())
        for sentence in self.advice():
            console.print(escape_controls(sentence), markup=False, highlight=False)
        if self.gain > 0:
            console.print("\nTo paste into the config:\n", markup=False)
            console.print(self.wording.as_yaml(), markup=False, highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        flexible = self.student.flexible is not None
        table = Table(title=f"{self.student.rows} rows, {self.seconds:.0f} s", show_edge=False)
        names = ["wording", "success", *(["flexible"] if flexible else []), "gain", "tokens", "cut off", "leaks"]
        names += ["after"] if self.measured.after is not None else []
        names += ["kl(T||S)", "kl(S||T)", "kl(T||S) by quarter"]
        for name in names:
            table.add_column(name, justify="left" if name == "wording" else "right")
        for name, measured in [("student alone", self.student), *((w.name, m) for w, m in self.wordings)]:
            best = "*" if name == self.wording.name else ""
            gain = "" if measured is self.student else f"{measured.best - self.student.best:+.2f}"
            cells = [name + best, f"{measured.success:.2f}", *([_number(measured.flexible)] if flexible else []), gain]
            cells += [f"{measured.tokens:.0f}", f"{measured.truncated:.2f}", _number(measured.leaks)]
            cells += [_number(measured.after)] if self.measured.after is not None else []
            cells += [_number(measured.kl_teacher_student), _number(measured.kl_student_teacher)]
            table.add_row(*cells, " ".join(map(_number, measured.kl_quarters)) or "–")
        return table


def probe(arguments: argparse.Namespace) -> Found:
    """Sample and score what the command's words ask for."""
    began = time.perf_counter()
    cfg, run = _start(arguments)
    if gives_no_reward(cfg.environment):
        raise InputError(
            "probe compares wordings by their success, and the environment has no reward; set environment.reward, or read the "
            "answers of a short run with rollout_log_steps"
        )
    tokenizer = as_chat_tokenizer(build(cfg.tokenizer))
    limits = {"max_seq_len": check_models(cfg, tokenizer), "max_new_tokens": int(cfg.sampler.max_new_tokens)}
    if arguments.after is not None and arguments.after >= limits["max_new_tokens"]:
        raise InputError(
            f"--after {arguments.after} leaves the teacher nothing to write of sampler.max_new_tokens "
            f"{limits['max_new_tokens']}; lower --after or raise sampler.max_new_tokens"
        )
    privileged = load_privileged(cfg, tokenizer)
    tried = _wordings(arguments, cfg, privileged)
    examples, left_out = _rows(cfg, privileged, tokenizer, arguments.rows, run.seed)
    prompts, refused = prompts_by_wording(tried, examples, tokenizer, privileged, **limits)
    wordings = [wording for wording in tried if wording.name in prompts]
    left_out += refused + [NOT_THE_TEACHER.format(key=key) for key in OTHER_TEACHERS if cfg.get(key)]
    sampler = build(cfg.sampler)
    collect = build_collector(cfg, sampler, tokenizer)
    each = 1 if arguments.after is None else 2
    with tqdm(total=len(prompts[OWN]) * (1 + each * len(wordings)), unit="rollout", disable=not run.is_main) as bar:
        bar.set_description("loading")
        shared = Probe(
            model=load_initial(cfg, run),
            tokenizer=tokenizer,
            sampler=sampler,
            collect=collect,
            run=run,
            threshold=float(setting(cfg, "eval_success_threshold")),
            temperature=arguments.temperature,
            micro_batch_rows=8,
            chunk=int(cfg.sampler.get("max_batch_size") or 64),
            progress=bar.update,
        )
        bar.set_description("student")
        rollouts, lost = shared.sample(prompts[OWN], "student", privileged)
        left_out += _lost("the student", lost)
        student = shared.measure(rollouts, privileged)
        # What came with an environment's answers was read under the config's own wording, and has no divergence under others.
        comparable = [rollout for rollout in rollouts if not rollout.teacher_reads]
        found = []
        for wording in wordings:
            bar.set_description(wording.name)
            own = wording.applied(privileged)
            sampled, lost = shared.sample(prompts[wording.name], "teacher", own)
            left_out += _lost(wording.name, lost)
            measured = shared.measure(sampled, own)
            if arguments.after is not None:
                measured = shared.with_after(measured, rollouts, prompts[wording.name], own, arguments.after)
            if not arguments.no_kl:
                scored = rollouts if own.template == privileged.template else comparable
                measured = shared.with_divergences(measured, scored, prompts[wording.name])
            found.append((wording, measured))
            so_far = Found(student, found, time.perf_counter() - began, _cut_by(cfg), left_out)
            if run.is_main:  # after every wording: a probe that is stopped leaves what it has measured
                (run.output_dir / NUMBERS).write_text(json.dumps(so_far.as_json(), ensure_ascii=False), encoding="utf-8")
    return so_far


def _lost(name: str, dropped: Mapping[str, int]) -> list[str]:
    reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.items())
    return [f"{sum(dropped.values())} rollouts of {name} have no reward and are not counted ({reasons})."] if reasons else []


def _cut_by(cfg: DictConfig) -> str:
    return "sampler.max_new_tokens" + (" or sampler.max_turn_tokens" if cfg.sampler.get("max_turn_tokens") else "")


def _start(arguments: argparse.Namespace) -> tuple[DictConfig, Run]:
    cfg = merged(arguments.config, arguments.overrides)
    for key in (
        RESUME,
        "domains",
        "views",
        "eval_cluster_key",
        "eval_kind_key",
    ):  # of a run or an evaluation, which the probe's own table does not need
        cfg.pop(key, None)
    if cfg.get("output_dir"):
        cfg.output_dir = str(Path(cfg.output_dir) / "probe")  # beside a run, never in its files
    return cfg, start(cfg, (KEYS | EVALUATION_KEYS) - {RESUME}, REQUIRED)


def _wordings(arguments: argparse.Namespace, cfg: DictConfig, privileged: PrivilegedPrompt) -> list[Wording]:
    """Return the config's own wording, then the user's, then the built-in ones, each once."""
    kind = cfg.dataset.get("privileged") or cfg.dataset.get("kind")
    own = read_wordings(arguments.wordings) if arguments.wordings else []
    if any(wording.name == OWN for wording in own):
        raise InputError(f"--wordings {arguments.wordings}: the name {OWN!r} is taken; choose another")
    found = [configured(privileged), *own]
    names = {wording.name for wording in found}
    found += [] if arguments.only_own else [wording for wording in builtin_wordings(kind) if wording.name not in names]
    texts: set[tuple[str, str]] = set()
    return [w for w in found if (key := (w.template, w.placement)) not in texts and not texts.add(key)]


def _rows(
    cfg: DictConfig, privileged: PrivilegedPrompt, tokenizer: ChatTokenizer, count: int, seed: int
) -> tuple[list[Example], list[str]]:
    """Return up to ``count`` random rows with privileged information, of `eval_dataset` where there is one, and a sentence.

    Where the environment gives it with its answers, rows need none of their own.
    """
    key = "eval_dataset" if cfg.get("eval_dataset") else "dataset"
    every = privileged.apply_control(list(build(cfg[key])), tokenizer)
    rows = every if gives_privileged(cfg.environment) else [example for example in every if example.privileged]
    if not rows:
        later = "; what `hindsight` writes after the rollouts cannot be probed" if cfg.get("hindsight") else ""
        raise InputError(f"no row of `{key}` has privileged information{later}; check `{key}` and privileged.control")
    without = len(every) - len(rows)
    said = [f"{without} of {len(every)} rows of `{key}` have no privileged information and were not tried."] if without else []
    chosen = random.Random(seed).sample(range(len(rows)), min(count, len(rows)))
    return [rows[index] for index in sorted(chosen)], said


def _chance(student: Measured, teacher: Measured) -> float:
    """Return two standard errors of the difference of two shares, each with one right and one wrong row added to its rows."""
    shares = [((one.best * one.rows + 1) / (one.rows + 2), one.rows) for one in (student, teacher)]
    return 2 * math.sqrt(sum(share * (1 - share) / rows for share, rows in shares))


def _rank(measured: Measured) -> tuple[float, float, float]:
    """Order wordings: more success, then fewer answers cut off, then a teacher that is closer to the student."""
    divergence = math.inf if measured.kl_teacher_student is None else measured.kl_teacher_student
    return measured.best, -measured.truncated, -divergence


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
