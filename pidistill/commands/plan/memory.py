"""Estimate the bytes of each phase of a round on each rank, part by part; the phase with the largest sum has to fit."""

from math import ceil

from pidistill.commands.plan.shape import ModelShape
from pidistill.commands.plan.workload import Setup, Workload, count_tokens
from pidistill.rollouts.decoding import TOKENS_PER_READ, grown_columns
from pidistill.scoring.head_numbers import BLOCK_ELEMENTS, CHUNK_ELEMENTS

# Python, torch and the data on a CPU; the context and the libraries' workspaces on CUDA.
_LIBRARIES_BYTES = {"cpu": 0.5 * 2**30, "cuda": 0.8 * 2**30}
# How many temporaries the head has of the rows whose numbers it makes at once; see BLOCK_ELEMENTS in scoring/head_numbers.py.
_HEAD_TEMPORARIES = 8
# Bytes per logit of each row's next-token distribution while it is drawn from: logits, in fp32, and their weights.
_LOGIT_BYTES = 12


def memory(setup: Setup, work: Workload) -> dict[str, dict[str, float]]:
    """Return the bytes per rank, by phase and part, at the phase's peak."""
    parts = {
        "rollout": _rollout_bytes(setup, work),
        "update": _update_bytes(setup, work),
        "optimizer": _optimizer_bytes(setup),
    }
    if setup.constant_passes or setup.behaviour:
        parts["teacher"] = _teacher_bytes(setup, work)
    resident = _resident_bytes(setup)
    if not work.groups:
        del parts["rollout"]
    elif setup.samples_beside:
        resident["process that samples"] = _beside_bytes(setup, parts.pop("rollout"))
    return {phase: resident | own for phase, own in parts.items()}


def peak(parts: dict[str, dict[str, float]]) -> tuple[str, float]:
    """Return the phase that needs most, and its bytes."""
    return max(((phase, sum(own.values())) for phase, own in parts.items()), key=lambda pair: pair[1])


def _resident_bytes(setup: Setup) -> dict[str, float]:
    """Return the bytes that are held in every phase; FSDP2 shards them, and with offloading the device holds no shard."""
    model, share = setup.model, 0.0 if setup.cpu_offload else 1.0 / setup.shards
    stored, teacher = setup.stored_bytes * share, setup.teacher_bytes * share
    if setup.cpu_offload and setup.ranks == 1:  # one process shards what it trains alone; all else is whole, on the device
        stored = model.weights_bytes - model.trained * model.item_bytes
        teacher = setup.teacher_bytes - setup.average_elements * model.item_bytes
    # In mixed precision and in fp32 the average is the teacher's weights themselves.
    is_teacher = setup.mixed or model.item_bytes == 4
    return {
        "libraries": _LIBRARIES_BYTES[setup.device],
        "weights": stored + model.buffers_bytes,
        "4-bit weight made whole": model.dequantizing_bytes,
        "optimizer states": model.trained * setup.state_bytes * share,
        "teacher weights": teacher,
        "moving average": setup.average_elements * (4 - (model.item_bytes if is_teacher else 0)) * share,
    }


def _beside_bytes(setup: Setup, rollout: dict[str, float]) -> float:
    """Return the bytes of a process that samples while this one trains: libraries, whole weights, and what a rollout needs."""
    model = setup.model
    own = sum(bytes_ for part, bytes_ in rollout.items() if part != "gathered weights")
    return _LIBRARIES_BYTES[setup.device] + model.weights_bytes + model.buffers_bytes + own


def _rollout_bytes(setup: Setup, work: Workload) -> dict[str, float]:
    model, prompt = setup.model, work.prompt(work.sampled_view)
    rows = min(work.sampler_rows or work.groups * work.group_size, work.groups * work.group_size)
    read_at_once = max(prompt, min(ceil(rows / work.group_size) * prompt, TOKENS_PER_READ))
    return {
        # Gathered once per rollout on every rank, beside its shard.
        "gathered weights": _gathered_bytes(setup, whole=True),
        "keys and values": rows * (cache_columns(prompt, work.completion) * model.kv_bytes + model.state_bytes),
        "prefill or step": max(read_at_once * _passing_bytes(model), rows * model.vocabulary * _LOGIT_BYTES)
        + _wide_head_bytes(setup),
    }


def cache_columns(prompt: int, completion: int) -> int:
    """Return the columns of the sampler's cache at the end: it grows whenever a row's next token finds it full.

    The last token of a completion is sampled and never read.
    """
    most = prompt + completion
    columns = grown_columns(prompt, most)
    while columns < most - 1:
        columns = grown_columns(columns + 1, most)
    return columns


def _passing_bytes(model: ModelShape) -> float:
    """Return one token's bytes in a forward without gradient: gate, up, product, and the residual beside two fp32 norms."""
    return 3 * model.widest * model.item_bytes + 3 * model.width * 4


def _gathered_bytes(setup: Setup, *, whole: bool) -> float:
    """Return a rank's full parameters: of the whole model, or of its root (embedding, head) and two layers, one fetched ahead.

    One rank alone has whole weights; but in mixed precision it gathers copies of the trained ones.
    """
    model = setup.model
    if setup.ranks == 1 and not setup.cpu_offload and not setup.mixed:
        return 0.0
    if setup.ranks == 1 and model.trained < model.parameters:
        return model.trained * model.item_bytes
    if whole or not setup.reshard:
        return model.weights_bytes
    embeddings = model.head * (1 if model.tied else 2) * model.item_bytes
    return embeddings + 2 * (model.weights_bytes - embeddings) / model.layers


def _teacher_bytes(setup: Setup, work: Workload) -> dict[str, float]:
    """Return the bytes of forwards without gradient; between an update's micro-batches the gradients are there too."""
    passes = (*setup.constant_passes, *setup.behaviour)
    forwards = [count_tokens(work, one.views, work.trained_groups).fed_at_once * _passing_bytes(one.model) for one in passes]
    return {
        "gathered weights": _gathered_bytes(setup, whole=False),
        "gradients": _gradient_bytes(setup),
        "activations": max(forwards),
        "head": _head_matrices_bytes(setup, work),
    }


def _update_bytes(setup: Setup, work: Workload) -> dict[str, float]:
    """Return the bytes of forward, head and backward of a micro-batch, beside the gradients of those before it."""
    one, model = setup.trained_pass, setup.model
    tokens = count_tokens(work, one.views, work.trained_groups)
    head_gradient = _head_gradient_bytes(setup)
    backward = tokens.fed_at_once * _backward_bytes(model, setup.checkpointing)
    gathered = _gathered_bytes(setup, whole=False)
    accumulated = _gradient_bytes(setup)
    activations = tokens.fed_at_once * _activation_bytes(model, setup.checkpointing)
    if setup.device == "cpu" and work.packing == "tree":
        activations += 4 * tokens.pairs_at_once  # the mask, an fp32 bias for each block of queries
    if tokens.micro_batches == 1:  # each layer's gradients take the place of its activations: the larger of the two counts
        accumulated, activations = (0.0, activations) if activations > accumulated else (accumulated, 0.0)
    return {
        # And their gradients, before these are scattered.
        "gathered weights": gathered * (2 if setup.ranks > 1 or setup.mixed else 1),
        "gradients": accumulated,
        "activations": activations,
        "hidden states": tokens.policy_at_once * model.width * (2 * model.item_bytes + 8),
        "head": head_gradient + max(_head_matrices_bytes(setup, work), backward),
    }


def _gradient_bytes(setup: Setup) -> float:
    return 0.0 if setup.cpu_offload else setup.model.trained * setup.trained_item_bytes / setup.shards


def _activation_bytes(model: ModelShape, checkpointing: bool) -> float:
    """Return the bytes that autograd keeps of one token: all of every layer, or only each layer's input."""
    return model.layers * model.width * model.item_bytes if checkpointing else model.saved_bytes


def _backward_bytes(model: ModelShape, checkpointing: bool) -> float:
    """Return the bytes of one token's gradients inside a layer, and with checkpointing of all that its second forward keeps."""
    return 4 * model.widest * model.item_bytes + 3 * model.width * 4 + (model.layer_saved_bytes if checkpointing else 0.0)


def _head_gradient_bytes(setup: Setup) -> float:
    """Return the bytes of the fp32 buffer for chunks, its copy in the weight's dtype, and a tied embedding's own share."""
    model = setup.model
    if not model.head_trained:
        return 0.0
    return model.head * (4 + (model.item_bytes if model.item_bytes < 4 else 0) + (model.item_bytes if model.tied else 0))


def _head_matrices_bytes(setup: Setup, work: Workload) -> float:
    """Return the bytes of a chunk's fp32 logits, all views, and a block's temporaries; in bf16, also of the copy it needs."""
    model, views = setup.model, len({view for one in setup.update for view in one.views})
    policy = count_tokens(work, ("student",), work.trained_groups).policy_at_once
    logits = views * min(work.chunk_tokens or chunk_tokens(model, views, setup.device), policy) * model.vocabulary
    block = min(BLOCK_ELEMENTS[setup.device], logits)
    copy = model.item_bytes if setup.device == "cuda" and model.item_bytes < 4 else 0
    return logits * (4 + copy) + _HEAD_TEMPORARIES * block * 4 + _wide_head_bytes(setup)


def _wide_head_bytes(setup: Setup) -> float:
    """Return the bytes of the fp32 copy of a bf16 head, which a CPU needs for fp32 logits."""
    return setup.model.head * 4.0 if setup.device == "cpu" and setup.model.item_bytes < 4 else 0.0


def chunk_tokens(model: ModelShape, views: int, device: str) -> int:
    """Return the head's own choice of the tokens whose logits exist at once."""
    return max(1, CHUNK_ELEMENTS[device] // (views * model.vocabulary))


def _optimizer_bytes(setup: Setup) -> dict[str, float]:
    """Return the bytes of the step's own copies: on CUDA torch works on all parameters together, elsewhere on one by one."""
    model = setup.model
    together = model.trained / setup.shards if setup.device == "cuda" and not setup.cpu_offload else model.head
    return {"gradients": _gradient_bytes(setup), "step": together * setup.trained_item_bytes if setup.state_bytes else 0.0}
