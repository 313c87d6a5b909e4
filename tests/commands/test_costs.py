"""Test the cost model against the modules' counts, the packer's rows, what autograd keeps, and the FLOPs that torch counts."""

import dataclasses
import random
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchtune import modules, training
from torchtune.models.llama3 import llama3
from torchtune.models.qwen2 import lora_qwen2, qwen2

from pidistill.commands.plan.devices import Device
from pidistill.commands.plan.memory import cache_columns, memory
from pidistill.commands.plan.reading import list_passes, read, setup_of
from pidistill.commands.plan.seconds import attention_flops, seconds
from pidistill.commands.plan.shape import model_shape
from pidistill.commands.plan.workload import Pass, Setup, Workload, count_tokens, micro_batches
from pidistill.distributed.run import Run
from pidistill.errors import InputError
from pidistill.models import qwen3
from pidistill.models.adapters import train_adapters_only
from pidistill.rollouts.decoding import decoding
from pidistill.scoring.batch import make_tree
from pidistill.scoring.packer import Packer, rollout_of
from pidistill.scoring.score import _forward, score
from pidistill.scoring.tree_attention import FLEX_BLOCK
from pidistill.teachers import FrozenTeacher, LiveTeacher, RoutedTeacher, TrustRegionTeacher
from pidistill.types import Divergence, Example, PromptPair, Rollout, ScoreRequest
from tests.support.builders import CPU, batch_of, random_rollouts

SIZES = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64, "intermediate_dim": 160, "max_seq_len": 256}
BUILDERS = {
    "llama": lambda: llama3(vocab_size=50, **SIZES),
    "qwen, tied": lambda: qwen2(vocab_size=50, tie_word_embeddings=True, **SIZES),
    "qwen3": lambda: qwen3(vocab_size=50, head_dim=32, **SIZES),
    "lora": lambda: lora_qwen2(["q_proj", "v_proj"], apply_lora_to_mlp=True, lora_rank=4, lora_alpha=8, vocab_size=50, **SIZES),
}
BOTH = ("student", "teacher")
FAST = Device("fast", "cuda", flops_per_s=1e14, thin_flops_per_s=1e14, bytes_per_s=1e12, layer_s=0.0, memory_bytes=2**36)


def on_meta(name: str, dtype: torch.dtype = torch.float32):
    with training.set_default_dtype(dtype), torch.device("meta"):
        return BUILDERS[name]()


def workload(**changes) -> Workload:
    lengths = {"student": 5, "teacher": 9, "shared": 3, "completion": 4, "group_size": 3, "groups": 4, "trained_groups": 4}
    return Workload(**(lengths | {"micro_batch_tokens": 40} | changes))


def setup(name: str = "llama", **changes) -> Setup:
    model = model_shape(on_meta(name))
    return Setup(**({"model": model, "update": (Pass(model, BOTH, BOTH),), "device": "cpu"} | changes))


# ---------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("name", BUILDERS)
def test_parameters_are_those_of_the_model(name):
    shape, model = model_shape(on_meta(name)), BUILDERS[name]()
    train_adapters_only(model)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.head == 50 * 64 and shape.tied == ("tied" in name) and shape.head_trained == (name != "lora")
    assert memory(setup(name), workload())["optimizer"]["weights"] == shape.parameters * 4 + shape.buffers_bytes
    assert shape.buffers_bytes == sum(b.numel() * b.element_size() for b in model.buffers())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BUILDERS)
def test_activations_are_what_autograd_keeps_of_a_packed_row(name, dtype, checkpointing):
    """A real forward of a tree, every tensor that autograd saves counted once, parameters and buffers left out."""
    shape = model_shape(on_meta(name, dtype))
    with training.set_default_dtype(dtype):
        model = BUILDERS[name]()
    train_adapters_only(model)
    if checkpointing:
        training.set_activation_checkpointing(model, auto_wrap_policy={modules.TransformerSelfAttentionLayer})
    view = packer(4096).batch(rollouts(workload())).views.of(*BOTH)
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        _forward(model, view, lambda h, w: h)
    measured = sum(x.untyped_storage().nbytes() for x in kept.values()) / view.tokens.numel()
    if checkpointing:
        predicted = shape.layers * shape.width * shape.item_bytes
    else:
        predicted = shape.saved_bytes
    head = 3 * 4 * shape.width  # norm before the head: "hidden states" of the memory table, and ids
    assert 0.8 * predicted - head <= measured <= predicted + head + 32


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_flops_are_those_that_torch_counts(name):
    tokens = 64
    shape, model = model_shape(on_meta(name)), BUILDERS[name]()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the fused one is not counted on a CPU
        model(torch.zeros(1, tokens, dtype=torch.long))
    work = workload(student=tokens, teacher=tokens, shared=tokens, completion=1, group_size=1, packing="padded")
    counted = count_tokens(work, ("student",), 1)
    whole_square = 2 * attention_flops(shape, counted) * tokens / (tokens + 1)  # torch does not see that it is causal
    assert counter.get_total_flops() == 2 * (shape.maps + shape.head) * tokens + whole_square


# ---------------------------------------------------------------------------------------------- tokens


def rollouts(work: Workload) -> list[Rollout]:
    """Real ids with the lengths of ``work``: groups and completions differ from their first token on."""
    fresh = iter(range(10**6))

    def ids(n: int) -> list[int]:
        return [next(fresh) % 50 for _ in range(n)]

    result = []
    for group in range(work.trained_groups):
        head = [group, *ids(work.shared - 1)] if work.shared else []
        student = head + [20 + group][: work.student - work.shared] + ids(max(0, work.student - work.shared - 1))
        teacher = head + [30 + group][: work.teacher - work.shared] + ids(max(0, work.teacher - work.shared - 1))
        pair = PromptPair(student, teacher, has_privileged=True)
        for member in range(work.group_size):
            completion = [40 + member, *ids(work.completion - 1)]
            result.append(
                Rollout(Example("x", []), pair, completion, [True] * len(completion), None, "student", group, "done", [])
            )
    return result


def packer(budget: int, packing: str = "tree") -> Packer:
    run = Run(CPU, torch.float32, 0, 1, 0, Path("."))
    return Packer(OmegaConf.create({"packing": packing, "micro_batch_tokens": budget}), run, pad_id=0)


WORKLOADS = {
    "question first": {"student": 5, "shared": 5},
    "question last": {"student": 6, "teacher": 11, "shared": 2},
    "nothing shared": {"shared": 0},
    "no privileged information": {"student": 5, "teacher": 5, "shared": 5},
    "one member": {"group_size": 1, "trained_groups": 5},
    "a rollout beyond the budget": {"micro_batch_tokens": 10},
    "all at once": {"micro_batch_tokens": 10_000},
}


@pytest.mark.parametrize("views", [BOTH, ("student",), ("teacher",)])
@pytest.mark.parametrize("packing", ["tree", "padded"])
@pytest.mark.parametrize("case", WORKLOADS)
def test_tokens_are_those_of_the_packer(case, packing, views):
    work = workload(packing=packing, **WORKLOADS[case])
    packed = packer(work.micro_batch_tokens, packing)
    lists = list(packed.micro_batches(rollouts(work)))
    batches = [packed.batch(items) for items in lists]
    counted = count_tokens(work, views, work.trained_groups)
    fed = [batch.views.of(*views).tokens.numel() for batch in batches]
    assert micro_batches(work, work.trained_groups) == tuple(
        (len(items), len({rollout_of(item).group for item in items})) for items in lists
    )
    assert (counted.fed, counted.fed_at_once, counted.micro_batches) == (sum(fed), max(fed), len(lists))
    assert counted.policy == sum(batch.targets.numel() for batch in batches) * len(views)
    assert counted.policy_at_once == max(batch.targets.numel() for batch in batches) * len(views)


@pytest.mark.parametrize("seed", range(40))
def test_micro_batches_of_random_rounds_are_those_of_the_packer(seed):
    draw = random.Random(seed)
    student, teacher, completion = (draw.randint(1, most) for most in (12, 20, 9))
    work = workload(
        student=student,
        teacher=teacher,
        shared=draw.randint(0, min(student, teacher) - 1),
        completion=completion,
        group_size=draw.randint(1, 6),
        trained_groups=draw.randint(1, 9),
        micro_batch_tokens=draw.choice([1, 20, 50, 100, 300, 8192]),
        packing=draw.choice(["tree", "padded"]),
        views=draw.choice([BOTH, ("student",), ("teacher",)]),
    )
    packed = packer(work.micro_batch_tokens, work.packing)
    lists = list(packed.micro_batches(rollouts(work), work.views))
    assert [n for n, _ in micro_batches(work, work.trained_groups)] == [len(items) for items in lists]
    fed = [packed.batch(items).views.of(*work.views).tokens.numel() for items in lists]
    counted = count_tokens(work, work.views, work.trained_groups)
    assert (counted.fed, counted.fed_at_once) == (sum(fed), max(fed))


# ---------------------------------------------------------------------------------------------- forwards


REQUESTS = [
    ScoreRequest(student_grad, teacher_grad, views, divergences)
    for student_grad in (False, True)
    for teacher_grad in (False, True)
    for views in (BOTH, ("student",), ("teacher",))
    for divergences in (
        (),
        (Divergence("kl_student_teacher", grad="student"),),
        (Divergence("kl_student_teacher", grad="none"),),
    )
    if views == BOTH or not divergences
]


@pytest.mark.parametrize("teacher", [LiveTeacher, FrozenTeacher, TrustRegionTeacher])
@pytest.mark.parametrize("request_", REQUESTS, ids=str)
def test_forwards_of_the_plan_are_those_that_the_scorer_runs(request_, teacher):
    """Each forward of the trained model and of the teacher's own weights, in order, with the views that it reads."""
    trained, frozen, own = BUILDERS["llama"](), BUILDERS["llama"](), teacher()
    own.attach(lambda: frozen)
    items = random_rollouts(3)
    read = []
    for name, module in (("trained", trained), ("teacher", frozen)):
        module.register_forward_pre_hook(lambda _, args, name=name: read.append((name, args[0].shape[0] // len(items))))
    score(trained, batch_of(items, packing="padded"), request_, teacher=own)
    shapes = {"trained": model_shape(on_meta("llama")), "teacher": model_shape(on_meta("qwen3"))}
    names = {shape: name for name, shape in shapes.items()}
    planned = list_passes(request_, own, shapes["trained"], {"": shapes["teacher"]} if own.own_weights else {})
    assert [(names[one.model], len(one.views)) for one in planned] == read


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
def test_forwards_of_several_teachers_are_those_that_the_scorer_runs(request_):
    """Two teachers with weights of their own, one of them mixed with the trained model, and the trained model itself."""
    modules = {"trained": BUILDERS["llama"](), "a": BUILDERS["llama"](), "b": BUILDERS["llama"]()}
    own = RoutedTeacher("domain", {"a": FrozenTeacher(), "b": TrustRegionTeacher(), "live": LiveTeacher()})
    own.attach(lambda teacher, name: modules[name])
    items, read = random_rollouts(3), []
    for item, name in zip(items, own.teachers, strict=True):
        item.example = Example(name, [], data={"domain": name})
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda _, args, name=name: read.append(name))
    score(modules["trained"], batch_of(items, packing="padded"), request_, teacher=own)
    shapes = {name: dataclasses.replace(model_shape(on_meta("llama")), parameters=n) for n, name in enumerate(modules)}
    names = {shape: name for name, shape in shapes.items()}
    planned = list(list_passes(request_, own, shapes["trained"], {name: shapes[name] for name in "ab"}))
    assert [names[one.model] for one in planned] == read
    shares = [one.share for one in planned if one.model is not shapes["trained"]]
    assert shares == [pytest.approx(1 / 3)] * len(shares)


def test_tree_tokens_are_distinct_prefixes_and_pairs_their_lengths():
    """The definition: a node of the tree is a prefix, and sees one key per token of it."""
    work = workload(micro_batch_tokens=10_000)
    sequences = [(r.prompts.of(view) + r.completion)[:-1] for view in BOTH for r in rollouts(work)]
    prefixes = {tuple(sequence[:n]) for sequence in sequences for n in range(1, len(sequence) + 1)}
    counted = count_tokens(work, BOTH, work.trained_groups)
    assert counted.fed == len(prefixes) == len(make_tree(sequences).tokens)
    assert counted.pairs == sum(map(len, prefixes)) + FLEX_BLOCK * counted.fed


# ---------------------------------------------------------------------------------------------- memory and time


@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_memory_grows_with_the_budget_and_with_nothing_else_of_the_round(packing):
    work = workload(packing=packing, groups=64, trained_groups=64)
    budgets = [dataclasses.replace(work, micro_batch_tokens=n) for n in (64, 128, 512)]
    sizes = [sum(memory(setup(), budget)["update"].values()) for budget in budgets]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    more = [memory(setup(), workload(packing=packing, trained_groups=n))["update"] for n in (32, 64)]
    assert more[0] == more[1]


def test_ranks_divide_what_is_sharded_and_gather_the_whole_model_to_sample():
    model = setup().model
    for ranks in (2, 4):
        parts = memory(setup(ranks=ranks, teacher_bytes=model.weights_bytes, average_elements=model.trained), workload())
        assert parts["optimizer"]["weights"] == model.parameters * 4 / ranks + model.buffers_bytes
        assert parts["optimizer"]["optimizer states"] == model.trained * 8 / ranks
        assert parts["optimizer"]["gradients"] == model.trained * 4 / ranks
        assert parts["optimizer"]["teacher weights"] == model.parameters * 4 / ranks
        assert parts["optimizer"]["moving average"] == 0  # in fp32 it is the teacher's weights themselves
        assert parts["rollout"]["gathered weights"] == model.parameters * 4


def test_replicas_hold_the_shards_of_as_many_ranks_as_are_in_one_of_them():
    sharded = {"teacher_bytes": setup().model.weights_bytes, "average_elements": setup().model.trained}
    assert memory(setup(ranks=8, replicas=4, **sharded), workload()) == memory(setup(ranks=2, **sharded), workload())


def test_a_process_that_samples_beside_the_training_has_its_own_weights_and_caches_in_every_phase():
    alone, beside = memory(setup(device="cpu"), workload()), memory(setup(device="cpu", samples_beside=True), workload())
    rollout = alone["rollout"]
    own = rollout["libraries"] + rollout["weights"] + rollout["keys and values"] + rollout["prefill or step"]
    assert beside == {phase: parts | {"process that samples": own} for phase, parts in alone.items() if phase != "rollout"}
    mixed = memory(setup(device="cpu", samples_beside=True, mixed=True), workload())  # it reads weights in the forward's dtype
    assert mixed["update"]["process that samples"] == own


@pytest.mark.parametrize(
    "trains, samples, beside",
    [
        ("cpu", None, True), ("cpu", "cpu", True), ("cpu", "cuda:1", False),
        ("cuda", "cuda:0", True), ("cuda:0", "cuda", True), ("cuda", "cuda:1", False), (None, "cuda:0", True),
    ],
)  # fmt: skip
def test_a_lag_is_read_from_the_config_unless_another_device_samples(trains, samples, beside):
    devices = {"device": trains, "rollout_device": samples}
    cfg = read("tiny/pi_distill", ["rollout_lag=1", "~device", *(f"{k}={v}" for k, v in devices.items() if v)])
    assert setup_of(cfg, ranks=1, device=(trains or "cuda").partition(":")[0]).samples_beside is beside
    with pytest.raises(InputError, match="rollout_device=gpu must be cpu, cuda or cuda:N"):
        setup_of(read("tiny/pi_distill", ["rollout_lag=1", "rollout_device=gpu"]), ranks=1, device="cpu")
    assert not setup_of(read("tiny/pi_distill", []), ranks=1, device="cpu").samples_beside


def test_keys_and_values_are_those_of_the_rows_sampled_at_once():
    work = workload(groups=4, group_size=3, sampler_rows=6)
    # rows, columns (the longest a row can become, below the 64 more that growth asks for), keys and values, layers,
    # kv heads x head dim, fp32
    expected = 6 * (5 + 4) * 2 * 2 * (2 * 16) * 4
    assert memory(setup(), work)["rollout"]["keys and values"] == expected


@pytest.mark.parametrize("prompt, completion", [(350, 512), (5, 4), (3, 70), (64, 65), (1, 1), (90, 300), (257, 129)])
def test_the_cache_has_the_columns_that_the_sampler_gives_it(prompt, completion):
    """A real sampler reads the prompt and then every token but the last, one at a time."""
    model = llama3(vocab_size=50, **(SIZES | {"num_layers": 1, "max_seq_len": 1024}))
    with torch.no_grad(), decoding(model, prompt + completion, 0) as context:
        context.reserve(1)
        context.read_prompts([[1] * prompt], [0])
        for _ in range(completion - 1):
            context.read([0], [[1]])
        assert cache_columns(prompt, completion) == context._caches[0]._k.shape[2]


def test_adapters_and_checkpointing_save_what_they_say():
    work = workload(micro_batch_tokens=4096, groups=32, trained_groups=32)
    full, lora = memory(setup(), work), memory(setup("lora"), work)
    assert lora["optimizer"]["optimizer states"] < 0.2 * full["optimizer"]["optimizer states"]
    kept = setup().model
    work = dataclasses.replace(work, groups=512, trained_groups=512)
    without, with_ = (memory(setup(checkpointing=on), work)["update"]["activations"] for on in (False, True))
    assert (without - with_) / (kept.saved_bytes - 2 * 64 * 4) == count_tokens(work, BOTH, 512).fed_at_once


def test_time_is_linear_in_the_round_and_the_tree_is_cheaper():
    one, two = (seconds(setup(), workload(groups=n, trained_groups=n, micro_batch_tokens=10**9), FAST) for n in (512, 1024))
    for phase in ("forward", "head", "backward"):
        assert two[phase] == pytest.approx(2 * one[phase], rel=0.05)
    again = seconds(setup(), workload(groups=512, trained_groups=512, updates=3, micro_batch_tokens=10**9), FAST)
    assert again == pytest.approx({phase: one[phase] * (1 if phase == "rollout" else 3) for phase in one})
    padded = seconds(setup(), workload(groups=512, trained_groups=512, packing="padded", micro_batch_tokens=10**9), FAST)
    assert padded["forward"] > one["forward"]
    assert padded["head"] == one["head"]
