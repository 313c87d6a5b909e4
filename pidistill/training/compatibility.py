"""Refuse parts that are right by themselves and train the wrong thing together."""

import inspect
from collections.abc import Sequence

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torchtune import utils
from torchtune.training.precision import PRECISION_STR_TO_DTYPE

from pidistill.components import resolve
from pidistill.config import build
from pidistill.data.load import gives_no_reward, told_later
from pidistill.data.routes import route_of
from pidistill.errors import InputError
from pidistill.losses.divergences import check_divergence
from pidistill.losses.token_weights import SkipFirst, divergences_of
from pidistill.models.adapters import has_adapters
from pidistill.models.empty import shared_empty_model
from pidistill.objectives import GRPO, SDFT, SDPO, RoutedObjective
from pidistill.objectives.base import Objective
from pidistill.rollouts import Sampler
from pidistill.scoring.mismatch import cuts_off, truncates
from pidistill.scoring.served_teacher import ServedTeacher, check_served
from pidistill.scoring.stored_teacher import StoredTeacher
from pidistill.teachers import NO_ADAPTERS, AdapterOffTeacher, EMATeacher, RoutedTeacher, SnapshotTeacher, Teacher
from pidistill.training.health import reads_rewards
from pidistill.training.keys import setting
from pidistill.types import Example, ViewName

log = utils.get_logger("INFO")

RECIPE_OF_VIEW: dict[ViewName, str] = {"teacher": "pi_distill_distributed", "student": "opsd_distributed"}


REWARD_FREE = "SDFT, OPSDUCLA, PCSD, GKD or OPD, or OPSD with reward_weight: 0"


def check_reward(cfg: DictConfig) -> None:
    """Refuse what reads a reward where the environment gives none."""
    if not gives_no_reward(cfg.get("environment")):
        return
    objective, hindsight = cfg.get("objective") or {}, cfg.get("hindsight") or {}
    by_row = objective.get("objectives") and cfg.environment.get("environments")  # see `check_routed_rewards`
    if reads_rewards(objective) and not by_row:
        reader, other = f"objective {_name(objective)} learns from", f"another objective ({REWARD_FREE})"
    elif "SignGate" in str(objective.get("token_weight")):
        reader, other = "objective.token_weight SignGate reads", "another objective.token_weight"
    elif hindsight.get("sibling"):
        reader, other = "hindsight.sibling chooses by", "hindsight.sibling=null"
    elif cfg.get("reward_shaping"):
        reader, other = "reward_shaping adds to", "reward_shaping=null"
    elif "threshold" in _parameters(cfg.get("selection")):
        reader, other = f"selection {_name(cfg.selection)} chooses by", "selection pidistill.rollouts.selections.All"
    else:
        return
    raise InputError(f"{reader} the reward, and the environment has none; set environment.reward, or {other}")


def check_routed_rewards(cfg: DictConfig, examples: Sequence[Example], objective: RoutedObjective) -> None:
    """Refuse a row whose objective learns from a reward and whose environment gives none, where its key names both."""
    node = cfg.environment
    if not node.get("environments") or not gives_no_reward(node):
        return
    silent = {str(name): gives_no_reward(part) for name, part in node.environments.items()}
    reads = {str(name): reads_rewards(part) for name, part in cfg.objective.objectives.items()}
    for example in examples:
        name = objective.name_of(example)
        place = route_of(example, node.key, silent, node.get("default"), "environment")
        if reads[name] and silent[place]:
            raise InputError(
                f"{example.id}: objective.objectives.{name} learns from the reward, and environment.environments.{place} has "
                f"none; set its reward, or another objective ({REWARD_FREE})"
            )


def _name(node: DictConfig) -> str:
    return str(node.get("_component_")).rpartition(".")[2]


def _parameters(node: DictConfig | None) -> Sequence[str]:
    return list(inspect.signature(resolve(node._component_)).parameters) if node else []


def check_method(cfg: DictConfig, objective: Objective, sampler: Sampler, teacher: Teacher, sampling_view: ViewName) -> None:
    """Refuse parts that are right by themselves and train the wrong thing together."""
    if sampler.temperature == 0:
        raise InputError(
            "sampler.temperature=0 always takes the likeliest token, and samples without probabilities cannot be trained on; "
            "set it above 0 (evaluation samples greedily by itself)"
        )
    method = cfg.objective._component_.rpartition(".")[2]
    if objective.sampling_view() != sampling_view:
        recipe = RECIPE_OF_VIEW[objective.sampling_view()]
        raise InputError(
            f"{method} trains on what the {objective.sampling_view()} view samples, and this recipe samples from the "
            f"{sampling_view} view; run {recipe}, or set another objective"
        )
    _check_teacher(cfg, objective, sampler, teacher, method)
    if objective.on_policy_frac < 1.0 and cfg.group_size != 1:
        raise InputError(
            f"objective.lmbda={objective.on_policy_frac} takes one completion per prompt from the dataset, and group_size="
            f"{cfg.group_size} samples several for every other prompt, so that lmbda would not be the sampled share of the "
            "completions; set group_size=1 and raise prompts_per_round"
        )
    if cfg.get("importance_weights") and not objective.takes_importance_weights:
        raise InputError(
            f"{method} as configured has no policy-gradient loss for importance_weights to multiply (a divergence, a "
            "supervised term, or importance weights of its own); remove importance_weights, or set another objective"
        )
    if cfg.get("mismatch_mask"):
        _check_mask(cfg, objective, sampler)
    _check_present_samples(cfg, objective, sampler)
    routes = objective.objectives if isinstance(objective, RoutedObjective) else {}
    for name, part in routes.items():
        if cfg.get("importance_weights") and isinstance(part, SDPO):
            raise InputError(
                f"objective.objectives.{name} is SDPO, which has an importance clip of its own and applies no "
                f"importance_weights; remove importance_weights, or set another objective.objectives.{name}"
            )
    parts = list(routes.values()) or [objective]
    for part in parts:
        _check_truncation(cfg, part, sampler)
        _check_skipped(part, sampler)
    _check_group(cfg, objective, method)
    if cfg.get("hindsight"):
        check_hindsight(cfg, objective, method)
    if told_later(cfg) and (cfg.get("privileged") or {}).get("control") == "none" and objective.no_pi in ("drop", "error"):
        raise InputError(
            f"privileged.control=none takes from every rollout what it brings for the teacher, and objective.no_pi="
            f"{objective.no_pi} leaves nothing to train; set objective.no_pi=rl or distill"
        )
    _check_divergences(objective, parts, method)
    _check_adapters(shared_empty_model(cfg.model), teacher)
    if hasattr(sampler, "check_model"):  # vLLM's own modules compute some models in another way
        dtype = PRECISION_STR_TO_DTYPE[setting(cfg, "compute_dtype") or setting(cfg, "dtype")]
        device = torch.device(setting(cfg, "device") or ("cuda" if torch.cuda.is_available() else "cpu"))
        if setting(cfg, "rollout_lag"):  # a process of its own samples, which sees its GPU as the first one
            device = torch.device(device.type)
        sampler.check_model(shared_empty_model(cfg.model), device, dtype)
    if isinstance(teacher, ServedTeacher):
        teacher.check_server()


def _check_teacher(cfg: DictConfig, objective: Objective, sampler: Sampler, teacher: Teacher, method: str) -> None:
    """Refuse a teacher that the method does not use or cannot sample from, and weights that the teacher does not read."""
    if not teacher.live and not objective.uses_teacher:
        raise InputError(f"{method} uses no teacher; remove `teacher`, or set objective.report_teacher_kl=True")
    if cfg.get("teacher_model") and not cfg.get("teacher_checkpointer"):
        raise InputError("teacher_model has no weights of its own; set teacher_checkpointer to its checkpoint")
    check_routed(cfg, teacher)
    stored = any(isinstance(part, StoredTeacher) for part in getattr(teacher, "teachers", {None: teacher}).values())
    if stored and objective.on_policy_frac > 0.0:
        log.warning(
            f"StoredTeacher keeps numbers of every rollout on disk, and {method} samples new ones in every round, never to be "
            "read again; set teacher._component_=pidistill.teachers.FrozenTeacher"
        )
    check_served(teacher, objective, sampler.temperature, method)
    if isinstance(teacher, EMATeacher | SnapshotTeacher) and has_own_teacher(cfg):
        follows = "averages" if isinstance(teacher, EMATeacher) else "copies"
        name = "an EMA" if isinstance(teacher, EMATeacher) else "a snapshot"
        raise InputError(f"{name} teacher {follows} the student's own weights; remove teacher_model and teacher_checkpointer")
    for key in ("teacher_model", "teacher_checkpointer"):
        if not teacher.own_weights and cfg.get(key):
            raise InputError(
                f"config key {key} is not read while the trained model is the teacher; remove it, or set "
                "teacher._component_=pidistill.teachers.FrozenTeacher"
            )
    steps = range(int(cfg.max_steps))
    if not teacher.can_sample and any(objective.samples_from_teacher_weights(step) for step in steps):
        raise InputError(
            f"{type(teacher).__name__} mixes the logits of two models and cannot sample, which {method} asks of the teacher "
            "(at alpha=0); keep objective.alpha above 0, or set another teacher"
        )


def _check_divergences(objective: Objective, parts: Sequence[Objective], method: str) -> None:
    requested = objective.score_request(0).divergences
    for request in requested:
        check_divergence(request)
    if any(not set(divergences_of(getattr(part, "token_weight", None))) <= set(requested) for part in parts):
        raise InputError(
            f"objective.token_weight compares teacher and student, and {method} as configured looks at one view; remove "
            "it, or set objective.report_teacher_kl=True"
        )


def check_routed(cfg: DictConfig, teacher: Teacher) -> None:
    """Refuse weights for names that no teacher has, and a model without its weights."""
    names = set(teacher.teachers) if isinstance(teacher, RoutedTeacher) else set()
    for key in ("teacher_models", "teacher_checkpointers"):
        for name in cfg.get(key) or {}:
            if str(name) not in names:
                raise InputError(
                    f"{key}.{name} is not read, because teacher.teachers has {', '.join(sorted(names)) or 'no entries'}; "
                    f"remove it, or add teacher.teachers.{name}"
                )
    with_weights = {str(name) for name in cfg.get("teacher_checkpointers") or {}}
    for name in sorted(with_weights):
        part = teacher.teachers[name]
        if not part.own_weights or isinstance(part, EMATeacher | SnapshotTeacher):
            raise InputError(
                f"teacher_checkpointers.{name} is not read, because {type(part).__name__} teaches with the trained model's "
                f"weights; remove it, or set teacher.teachers.{name}._component_=pidistill.teachers.FrozenTeacher"
            )
    for name in cfg.get("teacher_models") or {}:
        if str(name) not in with_weights:
            raise InputError(
                f"teacher_models.{name} has no weights of its own; set teacher_checkpointers.{name} to its checkpoint"
            )


def _check_truncation(cfg: DictConfig, objective: Objective, sampler: Sampler) -> None:
    """Refuse a top-p under which PPO's lower bound cuts fresh samples, and say what importance weights leave as it is.

    The recorded log-probs are of the truncated distribution, so that the ratio of a fresh sample is the mass that was kept.
    """
    if not cuts_off(sampler):
        _check_other_view(objective, sampler)
        return
    settings = " and ".join(f"sampler.{key}={getattr(sampler, key)}" for key in ("top_p", "top_k") if getattr(sampler, key))
    if cfg.get("importance_weights"):
        log.warning(
            f"{settings} never samples the tokens that it cuts off; importance_weights corrects for the probabilities of those "
            "that are sampled, and not for the mass of the others (1 − importance_weight_mean of each token's, about)"
        )
        return
    clips = objective.takes_importance_weights or isinstance(objective, SDPO)
    clip_low = getattr(objective, "clip", {}).get("clip_low", 0.0)
    if clips and sampler.top_p is not None and sampler.top_p < clip_low:
        correction = "set importance_weights, or " if objective.takes_importance_weights else ""
        raise InputError(
            f"sampler.top_p={sampler.top_p} is below objective.clip_low={clip_low}: the ratio of a fresh sample is the mass "
            "that top_p keeps, so that tokens of negative advantage would lose their gradient in the very first update; "
            f"{correction}raise sampler.top_p, or lower objective.clip_low"
        )


def _check_present_samples(cfg: DictConfig, objective: Objective, sampler: Sampler) -> None:
    """Refuse later updates on the same samples, and a cut distribution, where the loss has no ratio that corrects for them."""
    if not objective.needs_present_samples:
        return
    updates = int(setting(cfg, "updates_per_round"))
    if updates > 1:
        raise InputError(
            f"objective.{objective.needs_present_samples} needs samples of the present weights, and with updates_per_round="
            f"{updates} the later updates of a round train on samples of older weights; change it, or set updates_per_round=1"
        )
    if truncates(sampler):
        cut = f"top_p={sampler.top_p}" if sampler.top_k is None else f"top_k={sampler.top_k}"
        raise InputError(
            f"objective.{objective.needs_present_samples} needs samples of the whole distribution, and sampler.{cut} cuts it; "
            "change it, or set sampler.top_p and sampler.top_k to null"
        )


def _check_other_view(objective: Objective, sampler: Sampler) -> None:
    """Refuse what `_check_truncation` does where kept sets are recorded: the view that did not sample has none."""
    clip_low = getattr(objective, "clip", {}).get("clip_low", 0.0)
    if getattr(objective, "student_term", "") == "ppo" and sampler.top_p is not None and sampler.top_p < clip_low:
        raise InputError(
            f"sampler.top_p={sampler.top_p} is below objective.clip_low={clip_low}: where the student agrees with the teacher, "
            "who samples, its ratio is the mass that top_p keeps, so that tokens of negative advantage would lose their "
            "gradient in the very first update; raise sampler.top_p, lower objective.clip_low, or choose another student_term"
        )


def _check_skipped(objective: Objective, sampler: Sampler) -> None:
    """Refuse to leave out as many first tokens as an answer can have."""
    weight = getattr(objective, "token_weight", None)
    skipped = max((step.tokens for step in getattr(weight, "steps", [weight]) if isinstance(step, SkipFirst)), default=0)
    if objective.on_policy_frac > 0.0 and skipped >= sampler.max_new_tokens:
        key = "skip_first_tokens" if isinstance(objective, SDFT) else "token_weight.tokens"
        raise InputError(
            f"objective.{key}={skipped} leaves out the first tokens of an answer, and answers have at most "
            f"sampler.max_new_tokens={sampler.max_new_tokens}, so that nothing would be distilled; lower the one "
            "or raise the other"
        )


def _check_mask(cfg: DictConfig, objective: Objective, sampler: Sampler) -> None:
    if cuts_off(sampler):
        raise InputError(
            "mismatch_mask compares π/μ with 1, and with sampler.top_p or top_k this ratio is the mass that was kept; set "
            "sampler.record_kept=True, or remove mismatch_mask"
        )
    if objective.on_policy_frac < 1.0:
        raise InputError(
            f"mismatch_mask needs the sampler's log-probs, and objective.lmbda={objective.on_policy_frac} takes completions "
            "from the dataset, which nobody sampled; set lmbda: 1, or remove mismatch_mask"
        )


def _check_group(cfg: DictConfig, objective: Objective, method: str) -> None:
    """Refuse groups of one where the reward is all that teaches; say it where a teacher or demonstrations teach too."""
    if cfg.group_size != 1 or not reads_rewards(cfg.objective):
        return
    text = (
        f"group_size=1 leaves the advantage of {method} nothing to compare a rollout with, so that the reward teaches nothing; "
        "set group_size to at least 2"
    )
    if isinstance(objective, GRPO) and not cfg.get("sft_weight"):
        raise InputError(text)
    log.warning(text)


def check_hindsight(cfg: DictConfig, objective: Objective, method: str) -> None:
    if not objective.uses_teacher:
        raise InputError(f"{method} uses no teacher, and only a teacher sees what hindsight finds; remove `hindsight`")
    if cfg.privileged.get("control") == "wrong" and not cfg.hindsight.get("sibling"):
        raise InputError(
            "privileged.control=wrong shows a sibling that failed, and hindsight.sibling is null; there is no wrong feedback: "
            "set hindsight.sibling, or another privileged.control"
        )


def _check_adapters(model: nn.Module, teacher: Teacher) -> None:
    if isinstance(teacher, AdapterOffTeacher) and not has_adapters(model):
        raise InputError(NO_ADAPTERS)
    if any(getattr(module, "attn_dropout", 0) or (isinstance(module, nn.Dropout) and module.p) for module in model.modules()):
        raise InputError(
            "dropout in the training forward would score another policy than the one that sampled; set model.lora_dropout=0 "
            "and model.attn_dropout=0"
        )


def has_own_teacher(cfg: DictConfig) -> bool:
    """Return whether another model than the trained one teaches."""
    keys = ("teacher_model", "teacher_checkpointer", "teacher_models", "teacher_checkpointers")
    return any(bool(cfg.get(key)) for key in keys)


def build_objective(cfg: DictConfig) -> Objective:
    """Build `objective`, with `no_pi: distill` where another model teaches and the config does not set `no_pi`.

    Such a teacher needs no privileged information, so that every row can distil. What the config sets is kept.
    """
    node = OmegaConf.to_container(cfg.objective, resolve=True)
    if has_own_teacher(cfg):
        for part in [node, *(node.get("objectives") or {}).values()]:
            if part.get("no_pi") is None and "no_pi" in inspect.signature(resolve(part["_component_"])).parameters:
                part["no_pi"] = "distill"
    return build(node)
