"""Estimate the seconds of each phase of a round on one rank: FLOPs and bytes of the phase over a device's rates."""

from math import ceil

from pidistill.commands.plan.devices import Device
from pidistill.commands.plan.shape import ModelShape
from pidistill.commands.plan.workload import Pass, Setup, Tokens, Workload, count_tokens, path_pairs

PHASES = ("rollout", "teacher", "forward", "head", "backward", "optimizer")
# How often an element that autograd keeps crosses the memory in a forward: written, read, and once for what is not kept.
_CROSSINGS = 3
# Passes over an fp32 [tokens, vocabulary] matrix per view: softmax and divergences, and their gradient where there is one.
_HEAD_CROSSINGS = 12
# Bytes read and written per logit of a row's next-token distribution while it is drawn from; memory.py counts those held.
_LOGIT_CROSSED_BYTES = 32


def seconds(setup: Setup, work: Workload, device: Device) -> dict[str, float]:
    """Return the seconds of one round on one rank, by phase."""
    result = dict.fromkeys(PHASES, 0.0)
    if work.groups:
        result["rollout"] = _rollout_s(setup.model, work, device)
    constants = [(one, 1, work.groups) for one in setup.behaviour]
    constants += [(one, work.updates, work.trained_groups) for one in setup.constant_passes]
    for one, times, groups in constants:
        tokens = count_tokens(work, one.views, groups)
        result["teacher"] += times * one.share * _forward_s(one.model, tokens, device)
        result["head"] += times * _head_s(one, tokens, device)
    one = setup.trained_pass
    tokens = count_tokens(work, one.views, work.trained_groups)
    result["forward"] = work.updates * _forward_s(one.model, tokens, device)
    result["head"] += work.updates * _head_s(one, tokens, device)
    result["backward"] = work.updates * _backward_s(one.model, tokens, device) + setup.checkpointing * result["forward"]
    result["optimizer"] = work.updates * _optimizer_s(setup, device)
    return result


def _forward_s(model: ModelShape, tokens: Tokens, device: Device) -> float:
    flops = 2 * model.maps * tokens.fed + attention_flops(model, tokens)
    crossed = _CROSSINGS * model.saved_bytes * tokens.fed
    return flops / device.flops_per_s + crossed / device.bytes_per_s + model.layers * device.layer_s * tokens.micro_batches


def _backward_s(model: ModelShape, tokens: Tokens, device: Device) -> float:
    """Count gradients of inputs and trained weights; attention computes its scores again: five products, not two."""
    flops = 2 * (model.maps + model.trained_maps) * tokens.fed + 2.5 * attention_flops(model, tokens)
    crossed = 2 * _CROSSINGS * model.saved_bytes * tokens.fed
    return flops / device.flops_per_s + crossed / device.bytes_per_s + 2 * model.layers * device.layer_s * tokens.micro_batches


def attention_flops(model: ModelShape, tokens: Tokens) -> float:
    return 4 * model.layers * model.heads * model.head_dim * tokens.pairs


def _head_s(one: Pass, tokens: Tokens, device: Device) -> float:
    """Count the logits of every view and, where gradient flows, the products for hidden states and for a trained head."""
    products = 2 * len(one.views) + 2 * len(one.gradient) * (1 + one.model.head_trained)
    per_view = tokens.policy / len(one.views)
    crossed = _HEAD_CROSSINGS * 4 * one.model.vocabulary * tokens.policy
    return per_view * products * one.model.head / device.flops_per_s + crossed / device.bytes_per_s


def _optimizer_s(setup: Setup, device: Device) -> float:
    """Count what is read (gradient, weight, states) and written (weight, states)."""
    model = setup.model
    per_element = 3 * setup.trained_item_bytes + 2 * setup.state_bytes
    return model.trained / setup.shards * per_element / device.bytes_per_s


def _rollout_s(model: ModelShape, work: Workload, device: Device) -> float:
    """Return the seconds of sampling: each prompt once per group, then steps that read every weight, key and value."""
    prompt, rows = work.prompt(work.sampled_view), work.groups * work.group_size
    batches = ceil(rows / (work.sampler_rows or rows))
    steps = batches * work.completion
    prefill = Tokens(work.groups * prompt, work.groups * path_pairs(0, prompt), 0, batches, 0, 0, 0)
    context = rows * (work.completion * prompt + path_pairs(0, work.completion))  # keys that all rows' steps look at
    elements = model.maps + model.head
    products = 2 * elements * rows * work.completion + 4 * model.layers * model.heads * model.head_dim * context
    weights = elements * model.item_bytes * steps
    crossed = context * model.kv_bytes + rows * work.completion * 2 * model.state_bytes  # a state is read and written
    crossed += rows * work.completion * model.vocabulary * _LOGIT_CROSSED_BYTES
    # Rows share each weight that is read, while products are computed: the slower of the two counts.
    work_s = max(products / device.thin_flops_per_s, weights / device.bytes_per_s) + crossed / device.bytes_per_s
    launches = steps * model.layers * device.layer_s
    # On a GPU launches overlap with the work; on a CPU they alternate with it.
    decode = max(launches, work_s) if device.kind == "cuda" else launches + work_s
    return _forward_s(model, prefill, device) + decode
