"""Test that a packed tree is the padded rows in another arrangement: same numbers, same gradients, fewer tokens."""

import dataclasses
import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torchtune import modules, training
from torchtune.models.gemma2 import gemma2

import pidistill.scoring.tree_attention as tree_attention_module
from pidistill.distributed.run import Run
from pidistill.errors import InputError
from pidistill.models import qwen3
from pidistill.scoring.batch import make_tree
from pidistill.scoring.packer import Packer
from pidistill.scoring.score import score
from pidistill.scoring.tree_attention import FLEX_BLOCK, TreeMask, read_trees, tree_attention
from pidistill.testing import QWEN3_HEAD_DIM, TINY_SIZES, perturb_weights
from pidistill.types import Divergence, RolloutAdvantage, ScoreRequest
from tests.support.builders import CPU, VOCABULARY, batch_of, forest, gradients, model, random_rollouts, relative_difference

REQUEST = ScoreRequest(
    student_grad=True,
    teacher_grad=True,
    divergences=(Divergence("kl_teacher_student", "both"), Divergence("jsd", "student", beta=0.3)),
)


def numbers_and_gradients(module, rollouts, packing, request=REQUEST):
    scores = score(module, batch_of(rollouts, packing=packing), request)
    numbers = [scores.student_logprobs, scores.teacher_logprobs, *scores.divergences.values()]
    weights = torch.randn(len(numbers), len(numbers[0]), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sum((w.to(x.dtype) * x).sum() for w, x in zip(weights, numbers, strict=True)).backward()
    found = gradients(module)
    module.zero_grad()
    return torch.stack([*numbers, scores.student_entropy, scores.teacher_entropy]).detach(), found


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("query_block", [256, 5])
def test_tree_and_padded_rows_give_the_same_numbers_and_gradients(seed, query_block, monkeypatch):
    """Over ragged random forests: groups, views, turns, forks, several trees in a row."""
    monkeypatch.setattr(tree_attention_module, "_QUERY_BLOCK", query_block)
    module, rollouts = model(seed), forest(seed)
    packed, packed_gradients = numbers_and_gradients(module, rollouts, "tree")
    padded, padded_gradients = numbers_and_gradients(module, rollouts, "padded")
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=2e-5)
    assert relative_difference(packed_gradients, padded_gradients) < 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_qwen3_attends_to_trees_as_well(seed):
    """An attention module of ours, which must leave the mask to what :func:`read_trees` puts there."""
    torch.manual_seed(seed)
    module, rollouts = qwen3(vocab_size=VOCABULARY, head_dim=QWEN3_HEAD_DIM, **TINY_SIZES), forest(seed)
    perturb_weights(module)
    packed, packed_gradients = numbers_and_gradients(module, rollouts, "tree")
    padded, padded_gradients = numbers_and_gradients(module, rollouts, "padded")
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=2e-5)
    assert relative_difference(packed_gradients, padded_gradients) < 1e-5
    assert any(name.endswith("q_norm.scale") for name in packed_gradients)


def test_activation_checkpointing_repeats_the_layers_as_trees():
    """The backward calls the layers again, long after the forward."""
    rollouts, plain, checkpointed = forest(1), model(1), model(1)
    training.set_activation_checkpointing(checkpointed, auto_wrap_policy={modules.TransformerSelfAttentionLayer})
    (numbers, ours), (others, theirs) = (numbers_and_gradients(m, rollouts, "tree") for m in (plain, checkpointed))
    torch.testing.assert_close(numbers, others, rtol=0, atol=0)
    assert relative_difference({k.replace("_checkpoint_wrapped_module.", ""): g for k, g in theirs.items()}, ours) < 1e-6


def test_a_row_may_be_longer_than_the_model_reads():
    """Positions follow the path: only the longest path must fit."""
    module, rollouts = model(0, max_seq_len=48), [r for seed in range(6) for r in forest(seed)]
    assert batch_of(rollouts).views.of("student", "teacher").tokens.shape[1] > 300
    packed, padded = (numbers_and_gradients(module, rollouts, packing)[0] for packing in ("tree", "padded"))
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=2e-5)
    assert module.max_seq_len == 48


@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_a_batch_without_rollouts_has_a_zero_loss_with_a_gradient(packing):
    module = model(0)
    scores = score(module, batch_of([], packing=packing), REQUEST)
    scores.student_logprobs.sum().backward()
    assert scores.student_logprobs.shape == (0,) and all(g.abs().max() == 0 for g in gradients(module).values())
    assert gradients(module)


def test_an_attention_that_trees_do_not_know_is_refused():
    gemma = gemma2(vocab_size=20, num_layers=1, num_heads=2, head_dim=8, num_kv_heads=1, embed_dim=16, intermediate_dim=16,
                   max_seq_len=32)  # fmt: skip
    with pytest.raises(InputError, match="Gemma2Attention attends in a way .* set packing: padded"):
        read_trees(gemma)
    with pytest.raises(InputError, match="no attention dropout, and the model has 0.1; set model.attn_dropout=0"):
        read_trees(model(0, attn_dropout=0.1))


@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_a_sequence_longer_than_the_model_reads_is_refused(packing):
    rollouts = forest(0)
    depth = max(len(r.prompts.teacher) + len(r.completion) - 1 for r in rollouts)
    score(model(0, max_seq_len=depth), batch_of(rollouts, packing=packing), REQUEST)
    with pytest.raises((InputError, ValueError), match=f"max_seq_len.*{depth - 1}"):
        score(model(0, max_seq_len=depth - 1), batch_of(rollouts, packing=packing), REQUEST)


# ------------------------------------------------------------------------------------------------- trees


@pytest.mark.parametrize("seed", range(20))
def test_a_tree_is_a_trie_depth_first(seed):
    draw = random.Random(seed)
    sequences = [[draw.randrange(3) for _ in range(draw.randint(1, 9))] for _ in range(draw.randint(1, 12))]
    tree = make_tree(sequences)
    nodes = {tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)}
    assert len(tree.tokens) == len(nodes)
    for sequence, columns in zip(sequences, tree.columns, strict=True):
        assert [tree.tokens[c] for c in columns] == sequence
        assert [tree.positions[c] for c in columns] == list(range(len(sequence)))
        # Of all columns, the last token sees those of its own sequence.
        last = columns[-1]
        assert [k for k in range(len(tree.tokens)) if k <= last < tree.ends[k]] == columns


def random_mask(seed: int, multiple: int = 1) -> TreeMask:
    draw = random.Random(seed)
    prompts = [[draw.randrange(5) for _ in range(draw.randint(1, 120))] for _ in range(3)]
    sequences = [draw.choice(prompts) + [draw.randrange(5) for _ in range(draw.randint(1, 90))] for _ in range(12)]
    ends = make_tree(sequences).ends
    ends += [column + 1 for column in range(len(ends), -(-len(ends) // multiple) * multiple)]
    return TreeMask(torch.tensor(ends))


def attention_and_gradients(attend, qkv, grad):
    leaves = [x.clone().requires_grad_() for x in qkv]
    out = attend(*leaves)
    return [out, *torch.autograd.grad(out, leaves, grad)]


def dense_attention(mask):
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask.dense())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("query_block", [1, 64, 256])
def test_attention_by_blocks_is_dense_masked_attention(seed, query_block, monkeypatch):
    monkeypatch.setattr(tree_attention_module, "_QUERY_BLOCK", query_block)
    mask = random_mask(seed)
    torch.manual_seed(seed)
    q, k, v, grad = (torch.randn(1, 2, len(mask.ends), 8, dtype=torch.float64) for _ in range(4))
    ours = attention_and_gradients(lambda q, k, v: tree_attention(q, k, v, mask), (q, k, v), grad)
    for a, b in zip(ours, attention_and_gradients(dense_attention(mask), (q, k, v), grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_the_block_mask_of_flex_attention_is_the_dense_mask(seed):
    """Its blocks against those that flex attention finds by looking at every pair, and its forward (no backward on CPU)."""
    mask = random_mask(seed, FLEX_BLOCK)
    length, dense = len(mask.ends), mask.dense()
    looked_at = create_block_mask(lambda b, h, q, k: dense[q, k], None, None, length, length, device="cpu")
    assert torch.equal(mask.block_mask.to_dense(), looked_at.to_dense())
    for kind in ("kv", "full_kv", "q", "full_q"):  # the backward goes by queries
        assert chosen(mask.block_mask, kind) == chosen(looked_at, kind)
    torch.manual_seed(seed)
    q, k, v = (torch.randn(1, 2, length, 16) for _ in range(3))
    ours = flex_attention(q, k, v, block_mask=mask.block_mask)
    torch.testing.assert_close(ours, dense_attention(mask)(q, k, v), rtol=1e-5, atol=1e-5)


def chosen(block_mask, kind: str) -> list[set[int]]:
    counts, indices = (getattr(block_mask, f"{kind}_{name}")[0, 0].tolist() for name in ("num_blocks", "indices"))
    return [set(row[:count]) for count, row in zip(counts, indices, strict=True)]


# ------------------------------------------------------------------------------------------------- micro-batches


class Ranks(Run):
    """As one of two ranks: what the other one has is given."""

    other_lists = 0

    def max(self, value):
        return max(value, self.other_lists)


def packer(budget: int, packing: str = "tree", other_lists: int = 0) -> Packer:
    run = Ranks(CPU, torch.float32, 0, 2, 0, Path("unused"))
    object.__setattr__(run, "other_lists", other_lists)
    return Packer(OmegaConf.create({"packing": packing, "micro_batch_tokens": budget}), run, pad_id=0)


@pytest.mark.parametrize("packing", ["tree", "padded"])
@pytest.mark.parametrize("views", [("student",), ("student", "teacher")])
@pytest.mark.parametrize("budget", [1, 60, 150, 10_000])
def test_micro_batches_hold_everything_once_and_stay_within_the_budget(packing, views, budget):
    rollouts = [r for seed in range(5) for r in forest(seed)]
    cut = list(packer(budget, packing).micro_batches(rollouts, views))
    assert [id(r) for chunk in cut for r in chunk] == [id(r) for r in rollouts]
    sizes = [batch_of(chunk, packing=packing).views.of(*views).tokens.numel() for chunk in cut]
    assert all(size <= budget or len(chunk) == 1 for size, chunk in zip(sizes, cut, strict=True))
    if budget == 10_000:
        assert len(cut) == 1
    if budget == 1:
        assert len(cut) == len(rollouts)


def test_a_rank_with_less_work_spreads_it_over_as_many_lists():
    rollouts = forest(2) + forest(5)
    assert len(list(packer(10_000).micro_batches(rollouts))) == 1
    spread = list(packer(10_000, other_lists=3).micro_batches(rollouts))
    sizes = [batch_of(chunk).views.of("student", "teacher").tokens.numel() for chunk in spread]
    assert len(spread) == 3 and sum(map(len, spread)) == len(rollouts) and max(sizes) < 2 * min(sizes)
    assert list(map(len, packer(10_000, other_lists=4).micro_batches(rollouts[:2]))) == [1, 1, 0, 0]
    assert list(packer(100).micro_batches([])) == [[]]


def test_groups_move_whole_to_the_rank_that_has_less():
    pairs = [(r, RolloutAdvantage(float(i))) for i, r in enumerate(random_rollouts(12, group_size=2))]
    shares = [[pair for pair in pairs if pair[0].group < 5], [pair for pair in pairs if pair[0].group == 5]]
    moved = both_ranks(lambda p, rank: p.balanced(shares[rank]))
    assert sorted(pair[0].example.id for share in moved for pair in share) == sorted(pair[0].example.id for pair in pairs)
    assert all(pair[1].advantage == float(pair[0].example.id.split()[1]) for share in moved for pair in share)
    # What stays is the same object: a teacher's memory of it holds.
    assert all(any(pair[0] is own[0] for own in shares[0]) for pair in moved[0]) and moved[1][0][0] is shares[1][0][0]
    groups = [{pair[0].group for pair in share} for share in moved]
    assert groups[0].isdisjoint(groups[1]) and min(map(len, groups)) >= 2
    even = [[pair for pair in pairs if pair[0].group % 2 == rank] for rank in (0, 1)]
    tokens = [sum(len(r.completion) for r, _ in share) for share in even]
    assert max(tokens) < 1.1 * sum(tokens) / 2  # the case below is one that stays
    assert both_ranks(lambda p, rank: p.balanced(even[rank])) == even
    # Three equal groups on two ranks: no other way is better.
    equal = [(dataclasses.replace(pairs[0][0], group=group), pairs[0][1]) for group in range(3)]
    dealt = [[equal[0], equal[2]], [equal[1]]]
    stayed = both_ranks(lambda p, rank: p.balanced(dealt[rank]))
    assert all(a[0] is b[0] for ours, theirs in zip(stayed, dealt, strict=True) for a, b in zip(ours, theirs, strict=True))


def both_ranks(call):
    """Two threads as two ranks, whose `gather` meets."""
    barrier, boxes = threading.Barrier(2), {}

    class Meeting(Run):
        def gather(self, items):
            boxes[self.rank] = items
            barrier.wait(timeout=20)
            both = pickle.loads(pickle.dumps([boxes[0], boxes[1]]))  # as a gather between processes
            barrier.wait(timeout=20)
            return both[0] + both[1]

    packers = [Packer(OmegaConf.create({}), Meeting(CPU, torch.float32, rank, 2, 0, Path("unused")), 0) for rank in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(call, packers, (0, 1)))


def test_an_empty_micro_batch_has_every_field_that_an_objective_reads():
    batch = packer(10).batch([])
    assert batch.advantages.shape == batch.kl_advantages.shape == batch.snis_weights.shape == (0,)
