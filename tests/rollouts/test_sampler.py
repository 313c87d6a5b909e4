"""Test the sampler against a plain forward over prompt + completion, one row at a time, without cache, padding or mask."""

import functools
import math
import re
import threading
import time
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtune import training
from torchtune.generation import generate
from torchtune.models.gemma2 import gemma2
from torchtune.models.llama3 import llama3
from torchtune.models.qwen2 import qwen2
from torchtune.modules.common_utils import local_kv_cache

from pidistill.errors import InputError
from pidistill.models import qwen3
from pidistill.rollouts import TorchtuneSampler, decoding, gathered_parameters
from pidistill.rollouts.decoding import attention_mask, parameter_groups, shared_beginning
from pidistill.rollouts.decoding import decoding as decode
from pidistill.rollouts.distribution import draw, sampling_logprobs
from pidistill.testing import QWEN3_HEAD_DIM, TINY_SIZES, perturb_weights, tiny_model

VOCAB = 40
PAD = 0
STOP_IDS = frozenset({1, 2, 3, 4})
PROMPTS = [[7, 8, 9, 10, 11, 12, 13], [20], [5, 31, 6], [39, 0, 17, 18]]  # ragged, one of them holding the padding id


def build(name: str, seed: int = 0) -> nn.Module:
    """A small model whose distributions differ much from token to token."""
    torch.manual_seed(seed)
    if name == "llama3":
        model = llama3(vocab_size=VOCAB, **TINY_SIZES)
    elif name == "qwen2-tied":
        model = qwen2(vocab_size=VOCAB, tie_word_embeddings=True, **TINY_SIZES)
    elif name == "qwen3":
        model = qwen3(vocab_size=VOCAB, head_dim=QWEN3_HEAD_DIM, **TINY_SIZES)
    else:
        sizes = {key: value for key, value in TINY_SIZES.items() if key != "rope_base"}
        model = gemma2(vocab_size=VOCAB, head_dim=16, sliding_window_size=48, **sizes)
    perturb_weights(model)
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            if weight.ndim == 2:  # tied embeddings of size one would repeat the last token for ever
                scales = {"layers": 1.5, "output": 3.0, "tok_embeddings": 1.0 if name in ("llama3", "qwen3") else 0.06}
                weight.mul_(scales[parameter.split(".")[0]])
        if name == "qwen2-tied":
            model.norm.scale.mul_(3.0)
    return model


@pytest.fixture(scope="module", params=["llama3", "qwen2-tied", "qwen3", "gemma2"])
def any_model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def model():
    return build("llama3")


class Talk:
    """An environment of ids: after each of a row's first turns it says something whose ids and length depend on the row."""

    def __init__(self, turns: int = 3):
        self.turns = turns
        self.heard: dict[int, list[list[int]]] = defaultdict(list)
        self.said: dict[int, list[list[int]]] = defaultdict(list)

    def __call__(self, row: int, turn: list[int]) -> list[int] | None:
        self.heard[row].append(turn)
        if len(self.heard[row]) == self.turns:
            return None
        self.said[row].append([10 + (row + i) % 20 for i in range(1 + (row + len(self.heard[row])) % 4)])
        return self.said[row][-1]


def end_row(row: int, turn: list[int]) -> None:
    return None


def sample(model, sampler, prompts=PROMPTS, *, seeds=None, group_size=1, on_turn_end=end_row, stop_ids=STOP_IDS, **kwargs):
    seeds = list(range(len(prompts) * group_size)) if seeds is None else seeds
    return sampler.sample(
        model,
        prompts,
        group_size=group_size,
        seeds=seeds,
        stop_ids=stop_ids,
        pad_id=PAD,
        on_turn_end=on_turn_end,
        **kwargs,
    )


@torch.no_grad()
def full_logits(model, prompt, completion):
    """[T, V] the logits that predict each completion token, from one plain causal forward."""
    model.eval()
    return model(torch.tensor([[*prompt, *completion]]))[0, len(prompt) - 1 : -1].float()


def full_logprobs(model, prompt, completion, temperature):
    logprobs = torch.log_softmax(full_logits(model, prompt, completion) / temperature, dim=-1)
    return logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0]


def largest_error(samples, model, temperature, group_size, prompts=PROMPTS):
    """Over the sampled tokens of all rows: |recorded log-prob − that of the plain forward|."""
    errors = []
    for row, result in enumerate(samples):
        expected = full_logprobs(model, prompts[row // group_size], result.tokens, temperature)
        mask = torch.tensor(result.policy_mask)
        errors.append((torch.tensor(result.logprobs) - expected)[mask].abs().max())
    return max(errors).item()


# ---------------------------------------------------------------------------------------------- which tokens, which log-probs


def test_greedy_is_the_argmax_of_a_full_forward(any_model):
    results = sample(any_model, TorchtuneSampler(temperature=0.0, max_new_tokens=20), stop_ids=frozenset())
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.tokens == full_logits(any_model, prompt, result.tokens).argmax(dim=-1).tolist()
        assert result.logprobs == [0.0] * 20
        assert result.stop_reason == "length"
    assert len({tuple(result.tokens) for result in results}) == len(PROMPTS)  # the model does read its prompt


@pytest.mark.parametrize("name", ["llama3", "qwen2-tied", "qwen3"])
def test_greedy_equals_torchtunes_generate(name):
    model = build(name)
    prompts = [[token or 1 for token in prompt] for prompt in PROMPTS]  # generate takes a padding id in a prompt for padding
    longest = max(map(len, prompts))
    padded = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    cache = local_kv_cache(
        model, batch_size=4, device=torch.device("cpu"), dtype=torch.float32, decoder_max_seq_len=longest + 16
    )
    with cache:
        expected, _ = generate(model, padded, max_generated_tokens=16, pad_id=PAD, temperature=1e-7)
    # The same model afterwards: torchtune's caches are gone, though not without a trace (the name stays registered).
    results = sample(model, TorchtuneSampler(temperature=0.0, max_new_tokens=16), prompts, stop_ids=frozenset())
    assert [result.tokens for result in results] == expected[:, longest:].tolist()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_logprobs_are_those_of_a_full_forward(any_model, temperature):
    talk = Talk()
    sampler = TorchtuneSampler(temperature=temperature, max_new_tokens=40)
    results = sample(any_model, sampler, group_size=3, on_turn_end=talk)
    assert any(len(said) == 2 for said in talk.said.values())  # three turns did happen
    assert largest_error(results, any_model, temperature, 3) < 1e-5


def test_temperature_and_length_of_one_call_replace_the_samplers(model):
    results = sample(model, TorchtuneSampler(max_new_tokens=30), temperature=0.7, max_new_tokens=9, stop_ids=frozenset())
    assert [len(result.tokens) for result in results] == [9] * len(PROMPTS)
    assert largest_error(results, model, 0.7, 1) < 1e-5
    assert largest_error(results, model, 1.0, 1) > 1e-2


@pytest.mark.parametrize(("top_k", "top_p"), [(5, None), (None, 0.8), (7, 0.6), (VOCAB + 1, 1.0)])
def test_truncated_logprobs_are_those_of_the_renormalised_distribution(model, top_k, top_p):
    sampler = TorchtuneSampler(temperature=1.3, top_k=top_k, top_p=top_p, max_new_tokens=12)
    for row, result in enumerate(sample(model, sampler, group_size=4, stop_ids=frozenset())):
        logits = full_logits(model, PROMPTS[row // 4], result.tokens)
        for t, (token, logprob) in enumerate(zip(result.tokens, result.logprobs, strict=True)):
            kept = kept_probs(logits[t], 1.3, top_k, top_p)
            assert math.log(kept[token] / sum(kept.values())) == pytest.approx(logprob, abs=1e-5)


def kept_probs(logits, temperature, top_k, top_p):
    """id → probability of the kept tokens, written as the definition reads."""
    probs = torch.softmax(logits / temperature, dim=-1).tolist()
    ranked = sorted(range(len(probs)), key=lambda i: -probs[i])[:top_k]
    mass, before, kept = sum(probs[i] for i in ranked), 0.0, {}
    for i in ranked:
        if before < (1.0 if top_p is None else top_p):
            kept[i] = probs[i]
        before += probs[i] / mass
    return kept


def test_truncation_is_that_of_hugging_face():
    processors = pytest.importorskip("transformers").generation.logits_process
    logits = 4 * torch.randn(200, 50, generator=torch.Generator().manual_seed(3))
    for temperature, top_k, top_p in [(1.0, 3, 0.9), (0.6, 50, 0.3), (1.5, 10, 0.999)]:
        expected = processors.TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1.0 else logits
        expected = processors.TopPLogitsWarper(top_p)(None, processors.TopKLogitsWarper(top_k)(None, expected))
        ours = sampling_logprobs(logits, temperature, top_k, top_p)
        torch.testing.assert_close(ours, torch.log_softmax(expected, dim=-1))


@pytest.mark.parametrize("top_k", [None, 6])
def test_tokens_follow_the_distribution(model, top_k):
    """Chi-square of 4,000 first tokens; the bound is 6 standard deviations of the statistic."""
    n = 4000
    results = sample(model, TorchtuneSampler(top_k=top_k, max_new_tokens=1), PROMPTS[:1], group_size=n, stop_ids=frozenset())
    counts = torch.bincount(torch.tensor([result.tokens[0] for result in results]), minlength=VOCAB).double()
    expected = n * sampling_logprobs(full_logits(model, PROMPTS[0], [0]), 1.0, top_k)[0].double().exp()
    assert (counts[expected == 0] == 0).all()
    common = expected >= 5
    rest = torch.stack([counts[~common].sum(), expected[~common].sum()])
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum() + (rest[0] - rest[1]) ** 2 / rest[1].clamp(min=1)
    degrees = common.sum()
    assert common.sum() >= 4
    assert statistic < degrees + 6 * math.sqrt(2 * degrees)


def test_the_draw_is_the_inverse_cdf_and_never_gives_a_token_of_probability_0():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    below_one = 1.0 - 2.0**-53  # the largest number that torch.rand gives in float64
    for u, expected in [(0.0, 1), (0.2499, 1), (0.2501, 3), (0.7499, 3), (0.7501, 4), (below_one, 4)]:
        for scale in (1.0, 0.01, 300.0):  # scores need not be normalised
            ids, logprobs = draw((scale * probs).log(), torch.tensor([u], dtype=torch.float64))
            assert ids.tolist() == [expected], u
            assert logprobs.item() == pytest.approx(math.log(probs[0, expected]), abs=1e-6)


@pytest.mark.parametrize("vocabulary", [1, 255, 256, 257, 1000, 5000])
def test_the_draw_by_blocks_is_the_plain_cumulative_sum(vocabulary):
    """Vocabularies that end within a block and at its edge, with whole blocks of probability 0, at 300 places of the sum."""
    generator = torch.Generator().manual_seed(vocabulary)
    scores = 4 * torch.randn(1, vocabulary, generator=generator).repeat(300, 1)
    if vocabulary > 512:
        scores[:, :300] = scores[:, 600:] = -torch.inf
    uniforms = torch.linspace(0, 1 - 2.0**-53, 300, dtype=torch.float64)
    probs = scores[0].double().softmax(-1)
    cdf = probs.cumsum(0)
    expected = [int((cdf > u * cdf[-1]).nonzero()[0]) for u in uniforms]
    ids, logprobs = draw(scores, uniforms)
    assert ids.tolist() == expected
    torch.testing.assert_close(logprobs, probs[ids].log(), rtol=0, atol=1e-6)


def test_bf16_weights_give_fp32_logprobs():
    model = build("llama3").to(torch.bfloat16)
    results = sample(model, TorchtuneSampler(max_new_tokens=12), group_size=2)
    assert largest_error(results, model, 1.0, 2) < 0.2  # two bf16 forwards that round differently
    as_bf16 = torch.tensor([x for result in results for x in result.logprobs])
    assert (as_bf16 != as_bf16.bfloat16().float()).any()


# ---------------------------------------------------------------------------------------------- rows do not see each other


def test_a_rows_tokens_depend_on_its_prompt_and_seed_alone(any_model):
    def play(prompts, seeds, group_size, **settings):
        talk = Talk(turns=2)
        # Row numbers differ between these batches, and what `Talk` says depends on them: say the same to every row.
        answer = lambda row, turn: None if talk(row, turn) is None else [21, 22, 23]  # noqa: E731
        sampler = TorchtuneSampler(max_new_tokens=24, **settings)
        return sample(any_model, sampler, prompts, seeds=seeds, group_size=group_size, on_turn_end=answer)

    seeds = [100 + row for row in range(12)]
    together = play(PROMPTS, seeds, 3)
    assert len({tuple(result.tokens) for result in together}) == 12
    for size in (1, 5):
        assert [r.tokens for r in play(PROMPTS, seeds, 3, max_batch_size=size)] == [r.tokens for r in together]
    for row in (0, 4, 11):
        (alone,) = play([PROMPTS[row // 3]], [seeds[row]], 1)
        assert alone.tokens == together[row].tokens
        torch.testing.assert_close(torch.tensor(alone.logprobs), torch.tensor(together[row].logprobs), equal_nan=True)
    backwards = play(PROMPTS[::-1], seeds[::-1], 3)
    assert [r.tokens for r in backwards[::-1]] == [r.tokens for r in together]


def test_a_longer_limit_only_continues_a_row(model):
    short, long = (sample(model, TorchtuneSampler(max_new_tokens=n), stop_ids=frozenset()) for n in (7, 90))
    assert [result.tokens[:7] for result in long] == [result.tokens for result in short]  # past a growth of the cache, too
    assert largest_error(long, model, 1.0, 1) < 1e-5


@pytest.fixture
def widths(model):
    """The [rows, columns] of every forward while the test runs, and the rows that reached the head."""
    seen, heads = [], []
    hooks = [
        model.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape))),
        model.norm.register_forward_pre_hook(lambda module, args: heads.append(tuple(args[0].shape[:2]))),
    ]
    yield seen, heads
    for hook in hooks:
        hook.remove()


def test_prompts_are_read_once_and_finished_rows_leave(model, widths):
    seen, heads = widths
    results = sample(model, TorchtuneSampler(max_new_tokens=60), group_size=8)
    lengths = [len(result.tokens) for result in results]
    assert seen[0] == (4, 7) and heads[0] == (4, 1)  # four prompts, not 32 rows; one position each
    for step, ((rows, columns), head) in enumerate(zip(seen[1:], heads[1:], strict=True), start=1):
        going_on = sum(length > step for length in lengths)
        assert (rows, columns) == head == (going_on, 1)
    assert len(seen) == max(lengths) and seen[-1][0] < 8


def test_prompts_of_like_length_are_read_together_within_a_token_budget(model, widths, monkeypatch):
    seen, _ = widths
    expected = sample(model, TorchtuneSampler(max_new_tokens=5), group_size=2, stop_ids=frozenset())
    assert seen[0] == (4, 7)
    seen.clear()
    monkeypatch.setattr(decoding, "TOKENS_PER_READ", 8)
    results = sample(model, TorchtuneSampler(max_new_tokens=5), group_size=2, stop_ids=frozenset())
    assert seen[:4] == [(2, 3), (1, 4), (1, 7), (8, 1)]  # prompts of 1 and 3 tokens, of 4, of 7; a step of all rows
    assert [result.tokens for result in results] == [result.tokens for result in expected]


def test_what_all_prompts_begin_with_is_read_once(model, widths, monkeypatch):
    seen, _ = widths
    beginning = [9, 8, 7, 6, 5, 4, 3, 2]
    prompts = [beginning + prompt for prompt in PROMPTS]
    settings = {"group_size": 3, "seeds": range(12), "on_turn_end": Talk(turns=2)}
    expected = sample(model, TorchtuneSampler(max_new_tokens=20), prompts, **settings)
    assert seen[0] == (4, 15)
    seen.clear()
    monkeypatch.setattr(decoding, "SAVED_BY_PREFIX", 24)
    settings["on_turn_end"] = Talk(turns=2)
    results = sample(model, TorchtuneSampler(max_new_tokens=20), prompts, **settings)
    assert seen[:2] == [(1, 8), (4, 7)]  # what they share, then the rest of each prompt, for a group of three once
    assert [result.tokens for result in results] == [result.tokens for result in expected]
    assert largest_error(results, model, 1.0, 3, prompts) < 1e-5
    monkeypatch.setattr(decoding, "SAVED_BY_PREFIX", 25)
    seen.clear()
    sample(model, TorchtuneSampler(max_new_tokens=20), prompts, **settings)
    assert seen[0] == (4, 15)  # it would save three times eight tokens, which is not enough


@pytest.mark.parametrize(
    "prompts, shared",
    [([[1, 2, 3]], 2), ([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2], [1, 2, 3]], 1), ([[1], [2, 1]], 0), ([[1, 2], [1, 2]], 1)],
)
def test_of_each_prompt_a_token_is_left_to_read(prompts, shared):
    assert shared_beginning(prompts) == shared


def test_positions_are_counted_from_each_rows_first_token(model):
    """Rotary attention sees only differences of positions, so no log-prob would tell; a learned embedding would."""
    positions = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["input_pos"].tolist()), with_kwargs=True
    )
    sample(model, TorchtuneSampler(max_new_tokens=2), stop_ids=frozenset())
    hook.remove()
    for read, prompt in zip(positions[0], sorted(PROMPTS, key=len), strict=True):
        assert read[: len(prompt)] == list(range(len(prompt)))
    assert positions[1] == [[len(prompt)] for prompt in PROMPTS]


def test_the_mask_shows_a_rows_own_past():
    starts, s, end = [0, 3, 1], 2, 6
    expected = [[[key <= start + query for key in range(end)] for query in range(s)] for start in starts]
    assert attention_mask(torch.tensor(starts), s, end).tolist() == expected


def test_an_observation_that_every_row_reads_is_fed_at_once(model, widths):
    seen, _ = widths
    observation = list(range(10, 17))
    every_id_ends_a_turn = frozenset(range(VOCAB))
    results = sample(
        model,
        TorchtuneSampler(max_new_tokens=10),
        on_turn_end=lambda row, turn: observation,
        stop_ids=every_id_ends_a_turn,
    )
    assert [result.tokens[1:8] for result in results] == [observation] * 4
    assert seen == [(4, 7), (4, 8)]  # the prompts; then the first token and the observation after it
    # A second observation would not leave room: the row ends with the token that it would follow.
    assert [(len(result.tokens), result.stop_reason) for result in results] == [(9, "length")] * 4
    assert largest_error(results, model, 1.0, 1) < 1e-5


def test_a_long_observation_costs_one_forward_of_its_row(model, widths):
    """Its row reads it and goes on with the others, which take one step each meanwhile."""
    seen, _ = widths
    every_id_ends_a_turn, turns = frozenset(range(VOCAB)), dict.fromkeys(range(4), 0)

    def on_turn_end(row, turn):
        turns[row] += 1
        return list(range(5, 35)) if row == 2 and turns[row] == 3 else []

    sampler = TorchtuneSampler(max_new_tokens=40)
    results = sample(model, sampler, on_turn_end=on_turn_end, stop_ids=every_id_ends_a_turn)
    assert [len(result.tokens) for result in results] == [40] * 4
    assert seen[:4] == [(4, 7), (4, 1), (4, 1), (3, 1)] and seen[4] == (1, 31)
    assert seen[5:11] == [(4, 1)] * 6 and sum(s > 1 for _, s in seen[5:]) == 0
    assert len(seen) == 2 + 39  # prompts, observation, and a step for each other token of the rows that read none
    assert largest_error(results, model, 1.0, 1) < 1e-5


def test_waiting_rows_enter_as_others_end(model, widths):
    seen, _ = widths
    results = sample(model, TorchtuneSampler(max_new_tokens=40, max_batch_size=4), group_size=6)
    lengths = sorted(len(result.tokens) for result in results)
    assert lengths[0] < 10 < lengths[-1]
    steps = [rows for rows, columns in seen if columns == 1]
    assert max(steps) == 4 and sum(steps) <= sum(lengths)
    busy = sum(steps[:-40]) / len(steps[:-40])  # until the queue is empty
    assert busy > 3.5  # batch after batch, the rows of each waiting for its longest, would be about half full
    assert largest_error(results, model, 1.0, 6) < 1e-5


# ---------------------------------------------------------------------------------------------- turns and limits


def test_forced_tokens_are_verbatim_and_turns_are_what_was_sampled(model):
    talk, stop_ids = Talk(), frozenset(range(0, VOCAB, 4))
    results = sample(model, TorchtuneSampler(max_new_tokens=240), group_size=4, on_turn_end=talk, stop_ids=stop_ids)
    for row, result in enumerate(results):
        said = iter(talk.said[row])
        expected, mask = [], []
        for turn in talk.heard[row]:
            assert turn[-1] in stop_ids and not stop_ids & set(turn[:-1])
            answer = next(said, [])
            expected += turn + answer
            mask += [True] * len(turn) + [False] * len(answer)
        assert result.stop_reason == "done" and len(talk.heard[row]) == 3
        assert result.tokens == expected and result.policy_mask == mask
        assert [math.isnan(x) for x in result.logprobs] == [not sampled for sampled in mask]
        assert all(x <= 0 for x, sampled in zip(result.logprobs, mask, strict=True) if sampled)


def test_the_length_limit_counts_sampled_and_forced_tokens(model):
    def play(limit, observation):
        return sample(
            model,
            TorchtuneSampler(max_new_tokens=limit),
            PROMPTS[:1],
            on_turn_end=lambda row, turn: observation,
            stop_ids=frozenset(range(VOCAB)),
        )[0]

    first = play(1, None)
    assert (len(first.tokens), first.stop_reason) == (1, "done")  # the last token allowed may end the episode
    for limit, length in [(1, 1), (5, 1), (6, 6), (10, 6), (11, 11)]:  # a turn is 1 token here, an observation 4
        result = play(limit, [9, 9, 9, 9])
        assert (len(result.tokens), result.stop_reason) == (length, "length"), limit
        assert result.policy_mask == [t % 5 == 0 for t in range(length)]


def test_rows_without_a_stop_end_at_the_limit_without_a_call(model):
    talk = Talk()
    results = sample(model, TorchtuneSampler(max_new_tokens=5), on_turn_end=talk, stop_ids=frozenset())
    assert [(len(r.tokens), r.stop_reason, r.policy_mask) for r in results] == [(5, "length", [True] * 5)] * 4
    assert not talk.heard


@pytest.mark.parametrize("limit", [1, 3, 8])
def test_a_turn_that_reaches_its_limit_ends_the_row(model, limit):
    """Rows are those without the limit, cut where the first turn has as many tokens and no stop."""
    play = functools.partial(sample, model, group_size=4, stop_ids=frozenset(range(10)))
    plain = play(TorchtuneSampler(max_new_tokens=40), on_turn_end=Talk())
    cut = play(TorchtuneSampler(max_new_tokens=40, max_turn_tokens=limit), on_turn_end=Talk())
    for long, short in zip(plain, cut, strict=True):
        length, turn = len(long.tokens), 0
        for t, own in enumerate(long.policy_mask):
            turn = turn + 1 if own and (t == 0 or (long.policy_mask[t - 1] and long.tokens[t - 1] >= 10)) else int(own)
            if turn == limit and long.tokens[t] >= 10:
                length = t + 1
                break
        assert short.tokens == long.tokens[:length]
        assert short.stop_reason == (long.stop_reason if length == len(long.tokens) else "turn_length")
    assert {row.stop_reason for row in cut} >= {"turn_length"}


def test_an_empty_observation_starts_the_next_turn(model):
    turns = []
    sample(
        model,
        TorchtuneSampler(max_new_tokens=4),
        PROMPTS[:1],
        on_turn_end=lambda row, turn: turns.append(turn) or [],
        stop_ids=frozenset(range(VOCAB)),
    )
    assert [len(turn) for turn in turns] == [1, 1, 1, 1]


# ---------------------------------------------------------------------------------------------- answers that take their time


@pytest.mark.parametrize("max_batch_size", [None, 3])
def test_answers_that_come_later_change_nothing(any_model, max_batch_size):
    def play(ask):
        talk, sampler = Talk(), TorchtuneSampler(max_new_tokens=40, max_batch_size=max_batch_size)
        return sample(any_model, sampler, group_size=2, on_turn_end=lambda row, turn: ask(talk, row, turn))

    with ThreadPoolExecutor(2) as threads:

        def later(talk, row, turn):
            time.sleep(0.002 * (row % 3))
            return talk(row, turn)

        at_once = play(lambda talk, row, turn: talk(row, turn))
        results = play(lambda *question: threads.submit(later, *question))
    assert [(r.tokens, r.policy_mask, r.stop_reason) for r in results] == [
        (r.tokens, r.policy_mask, r.stop_reason) for r in at_once
    ]
    assert largest_error(results, any_model, 1.0, 2) < 1e-5


def test_rows_go_on_while_one_waits(model):
    """The first row's answer comes once another has ended; a sampler that waits for it would wait for ever."""
    first, ended = Future(), []

    def on_turn_end(row, turn):
        if row == 0 and not ended:
            return first
        ended.append(row)
        if not first.done():
            first.set_result([20, 21])
        return None

    alarm = threading.Timer(30, lambda: first.done() or first.set_exception(TimeoutError("the other row did not go on")))
    alarm.start()
    results = sample(model, TorchtuneSampler(max_new_tokens=60), PROMPTS[:2], on_turn_end=on_turn_end, stop_ids=frozenset({20}))
    alarm.cancel()
    assert ended == [1, 0]
    assert [result.stop_reason for result in results] == ["done", "done"]


def test_an_error_in_an_answer_is_raised_where_it_was_awaited():
    model, failed = build("llama3"), Future()
    failed.set_exception(KeyError("environment"))
    before = model_state(model)
    with pytest.raises(KeyError, match="environment"):
        sample(model, TorchtuneSampler(max_new_tokens=60), on_turn_end=lambda row, turn: failed)
    assert model_state(model) == before


# ---------------------------------------------------------------------------------------------- the model is left as it was


def model_state(model):
    attention = [(m.kv_cache, m.cache_enabled, vars(m)["_attention_call"]) for m in model.modules() if hasattr(m, "kv_cache")]
    return attention, "unembed" in vars(model), [m.training for m in model.modules()], sorted(model.state_dict())


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = build("llama3")
    model.train()
    model.layers[0].eval()  # a part that the user froze stays frozen
    before, tokens = model_state(model), torch.tensor([PROMPTS[0]])
    logits = model(tokens)

    def on_turn_end(row, turn):
        assert not model.training and not torch.is_grad_enabled()
        if fails:
            raise KeyError("environment")

    with pytest.raises(KeyError, match="environment") if fails else nullcontext():
        sample(model, TorchtuneSampler(max_new_tokens=30), on_turn_end=on_turn_end, stop_ids=frozenset(range(0, VOCAB, 2)))
    assert model_state(model) == before
    assert [state[:2] for state in before[0]] == [(None, False)] * 2 and not before[1]
    assert torch.equal(model(tokens), logits)  # causal without a mask, as before
    assert model(tokens).requires_grad


def test_compiled_layers_run_eagerly():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = build("llama3")
    expected = sample(model, TorchtuneSampler(max_new_tokens=12))
    for layer in model.layers:
        layer.compile(backend=backend)
    assert sample(model, TorchtuneSampler(max_new_tokens=12)) == expected
    assert not graphs
    model(torch.tensor([PROMPTS[0]]))
    assert graphs  # training still runs compiled


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"temperature": -0.1}, "sampler.temperature"),
        ({"temperature": math.nan}, "sampler.temperature"),
        ({"top_p": 0.0}, "sampler.top_p"),
        ({"top_p": 1.01}, "sampler.top_p"),
        ({"top_k": 0}, "sampler.top_k"),
        ({"max_batch_size": 0}, "sampler.max_batch_size"),
        ({"max_turn_tokens": 0}, "sampler.max_turn_tokens"),
        ({"max_new_tokens": 0}, "sampler.max_new_tokens"),
    ],
)
def test_settings_out_of_range_are_refused(settings, key):
    with pytest.raises(InputError, match=re.escape(key) + r"( is |=)"):
        TorchtuneSampler(**({"max_new_tokens": 8} | settings))


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], []], {}, "prompt 1 has no tokens"),
        ([[1] * 250], {}, r"prompt 0 \(250 tokens\) plus sampler.max_new_tokens 8 exceeds .* 256 by 2"),
        ([[1, VOCAB]], {}, "prompt 0 holds id 40, but the model's vocabulary has 40 ids"),
        ([[-1]], {}, "prompt 0 holds id -1"),
        ([[1]], {"pad_id": VOCAB}, "padding holds id 40"),
        ([[1]], {"seeds": [1, 2]}, "need as many seeds, not 2"),
        ([[1]], {"temperature": -1.0}, "sampler.temperature is -1.0"),
        ([[1]], {"max_new_tokens": 0}, "sampler.max_new_tokens=0 must"),
        ([[1]], {"on_turn_end": lambda row, turn: [VOCAB]}, "observation after a turn of row 0 holds id 40"),
    ],
)
def test_wrong_requests_are_refused(model, prompts, settings, message):
    request = {"seeds": [0] * len(prompts), "pad_id": PAD, "on_turn_end": end_row, "stop_ids": frozenset(range(VOCAB))}
    with pytest.raises(InputError, match=message):
        TorchtuneSampler(max_new_tokens=8).sample(model, prompts, group_size=1, **(request | settings))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(temperature):
    model = build("llama3")
    with torch.no_grad():
        model.layers[1].mlp.w1.weight[0, 0] = math.nan
    with pytest.raises(InputError, match="not finite for 4 of 4 rows"):
        sample(model, TorchtuneSampler(temperature=temperature, max_new_tokens=8))


def test_a_model_with_caches_of_its_own_is_refused():
    model = build("llama3")
    model.setup_caches(batch_size=1, dtype=torch.float32)
    with pytest.raises(InputError, match="delete_kv_caches"):
        sample(model, TorchtuneSampler(max_new_tokens=8))
    assert model.caches_are_setup()


def test_a_batch_longer_than_a_sliding_window_is_refused():
    model = build("gemma2")
    sample(model, TorchtuneSampler(max_new_tokens=48 - 7), stop_ids=frozenset())
    with pytest.raises(InputError, match="is 49 tokens, above the model's sliding window of 48"):
        sample(model, TorchtuneSampler(max_new_tokens=49 - 7), stop_ids=frozenset())


# ---------------------------------------------------------------------------------------------- sharded models


def test_gathering_a_plain_model_does_nothing(model):
    with gathered_parameters(model):
        assert sample(model, TorchtuneSampler(max_new_tokens=3))


def test_ranks_of_a_sharded_model_sample_different_numbers_of_steps(tmp_path):
    torch.multiprocessing.spawn(_sharded_rank, args=(str(tmp_path / "store"),), nprocs=2)


def _sharded_rank(rank: int, store: str) -> None:
    """One of two processes; a forward that gathers parameters would wait for the other rank until the timeout."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    for name, reshard in (("llama3", True), ("qwen2-tied", False), ("qwen3", True)):
        _check_sharded(rank, build(name), reshard)
    torch.distributed.destroy_process_group()
    time.sleep(0.2)  # gloo's thread must end before the interpreter does


def _check_sharded(rank: int, model: nn.Module, reshard: bool) -> None:
    prompts, sampler = (PROMPTS[1:2], PROMPTS)[rank], TorchtuneSampler(max_new_tokens=(2, 14)[rank])
    expected = sample(model, sampler, prompts, group_size=2, on_turn_end=Talk())
    names = {name for name, _ in model.named_parameters()}
    conditions = [lambda name, module: training.get_shard_conditions(name, module, names_to_match=[])]
    training.shard_model(model, conditions, cpu_offload=False, reshard_after_forward=reshard)
    flags = _reshard_flags(model)
    assert flags == [reshard] * 3  # two layers and the root

    result = sample(model, sampler, prompts, group_size=2, on_turn_end=Talk())  # before the first forward of all
    assert [r.tokens for r in result] == [r.tokens for r in expected]
    torch.testing.assert_close(torch.tensor(result[0].logprobs), torch.tensor(expected[0].logprobs), equal_nan=True)
    assert {name for name, p in model.named_parameters() if isinstance(p, DTensor)} == names
    assert _reshard_flags(model) == flags

    model.train()
    model(torch.tensor(PROMPTS[:1])).logsumexp(-1).mean().backward()  # a training step between two rounds
    assert all(p.grad.full_tensor().isfinite().all() for p in model.parameters())
    assert sample(model, sampler, prompts if rank else [], group_size=2, on_turn_end=Talk()) or rank == 0

    def on_turn_end(row: int, turn: list[int]) -> None:
        raise KeyError("environment")

    with pytest.raises(KeyError, match="environment"):
        sample(model, sampler, prompts, group_size=2, on_turn_end=on_turn_end, stop_ids=frozenset(range(VOCAB)))
    assert {name for name, p in model.named_parameters() if isinstance(p, DTensor)} == names
    assert _reshard_flags(model) == flags
    assert model(torch.tensor(PROMPTS[:1])).isfinite().all()


def _reshard_flags(model: nn.Module) -> list[bool]:
    groups = [group for m in model.modules() if isinstance(m, FSDPModule) for group in parameter_groups(m)]
    return [group.post_forward_mesh_info is not None for group in groups]


def test_any_memory_layout_of_what_the_attention_returns_is_accepted(monkeypatch):
    """CUDA's memory-efficient kernel lays its result out by [row, place, head], the CPU's by [row, head, place]."""
    model, prompts = tiny_model(40), [[1, 2, 3], [4]]
    sample = functools.partial(
        TorchtuneSampler(max_new_tokens=12).sample,
        model,
        prompts,
        group_size=2,
        seeds=range(4),
        stop_ids=frozenset(),
        pad_id=0,
        on_turn_end=lambda *_: None,
    )
    expected, attend = sample(), torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: attend(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert [s.tokens for s in sample()] == [s.tokens for s in expected]


def test_a_cache_has_no_more_columns_than_a_row_can_fill():
    with decode(tiny_model(40), 90, 0) as context:
        context.reserve(2)
        context.read_prompts([list(range(1, 31))], [0, 0])
        for _ in range(60):
            context.read([0, 1], [[1], [2]])
        assert {cache._k.shape[2] for cache in context._caches} == {90}
