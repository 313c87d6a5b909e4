"""Test decoders of transformers in the scorer: values and gradients equal transformers' own forward over whole logits."""

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `transformers` is not installed")

from pidistill.distributed.run import Run
from pidistill.errors import InputError
from pidistill.losses.divergences import divergence
from pidistill.models.layer_masks import AttentionForm, attend
from pidistill.scoring.batch import policy_positions
from pidistill.scoring.score import score
from pidistill.scoring.tree_attention import TreeMask, flex_tree_attention
from pidistill.teachers import FrozenTeacher, TrustRegionTeacher
from pidistill.types import Divergence, ScoreRequest
from tests.support.builders import CPU, batch_of, forest, gradients, model, relative_difference
from tests.support.hf_families import FAMILIES, HYBRIDS, STATEFUL, WINDOW, decoder_of, make_config, reference_model

torch.set_num_threads(1)
DIVERGENCES = (Divergence("kl_teacher_student", "both"), Divergence("jsd", "both", beta=0.3))
REQUEST = ScoreRequest(student_grad=True, teacher_grad=True, divergences=DIVERGENCES)
CASES = [
    (name, packing)
    for name in (*FAMILIES, *STATEFUL)
    for packing in ("padded", "tree")
    if packing == "padded" or name not in HYBRIDS
]
SEED, TEMPERATURE = 1, 0.7


def plain_numbers(teacher, student, rollouts):
    """The slow obvious version: each rollout and view on its own, whole logits of transformers, log-softmax."""
    logps, targets = {"student": [], "teacher": []}, []
    for r in rollouts:
        for view, lm in (("student", student), ("teacher", teacher)):
            prompt = r.prompts.of(view)
            logits = lm(torch.tensor([prompt + r.completion]), use_cache=False).logits[0].float()
            rows = [len(prompt) + t - 1 for t in policy_positions(r)]
            logps[view].append(torch.log_softmax(logits[rows] / TEMPERATURE, -1))
        targets += [r.completion[t] for t in policy_positions(r)]
    s, t = (torch.cat(logps[view]) for view in ("student", "teacher"))
    at = torch.tensor(targets)[:, None]
    return [s.gather(1, at)[:, 0], t.gather(1, at)[:, 0], *[divergence(d, t, s) for d in DIVERGENCES]]


def weighted(parts):
    weights = torch.randn(len(parts), len(parts[0]), generator=torch.Generator().manual_seed(1))
    return sum((w * part).sum() for w, part in zip(weights, parts, strict=True))


def our_numbers(decoder, rollouts, packing, **kwargs):
    scores = score(
        decoder, batch_of(rollouts, packing=packing), kwargs.pop("request", REQUEST), temperature=TEMPERATURE, **kwargs
    )
    return [scores.student_logprobs, scores.teacher_logprobs, *scores.divergences.values()]


@pytest.mark.parametrize("name, packing", CASES)
def test_scores_and_gradients_equal_those_of_transformers(name, packing):
    reference, rollouts = reference_model(name), forest(SEED)
    assert max(len(r.prompts.teacher) + len(r.completion) for r in rollouts) > 2 * WINDOW
    decoder = decoder_of(reference)
    expected = plain_numbers(reference, reference, rollouts)
    weighted(expected).backward()
    ours = our_numbers(decoder, rollouts, packing, chunk_tokens=7)
    weighted(ours).backward()
    # Logits reach 10, where fp32 has steps of 1e-6; the recurrence of linear attention adds its own rounding.
    atol = 1e-4 if name in HYBRIDS else 4e-5
    torch.testing.assert_close(torch.stack(ours), torch.stack(expected), atol=atol, rtol=1e-5)
    theirs = {n: g for n, g in gradients(reference).items() if n in dict(decoder.named_parameters())}
    assert theirs.keys() == gradients(reference).keys()
    assert relative_difference(gradients(decoder), theirs) < 1e-5


def test_a_hybrid_is_refused_in_a_tree():
    decoder = decoder_of(reference_model("qwen3_5, hybrid"))
    with pytest.raises(InputError, match="do not know the branches of packed trees; set packing: padded"):
        our_numbers(decoder, forest(SEED), "tree")


@pytest.mark.parametrize("key", ["model", "teacher_model", "teacher_models.other"])
def test_rows_of_a_hybrid_are_padded_by_themselves_which_is_said_once(key, tmp_path, caplog):
    from omegaconf import OmegaConf

    from pidistill.scoring.packer import Packer

    nodes = {}
    for place, name in (("model", "qwen3"), (key, "qwen3_5, hybrid")):
        make_config(name).save_pretrained(tmp_path / place)
        nodes[place] = {"_component_": "pidistill.models.from_folder", "path": str(tmp_path / place)}
    run = Run(CPU, torch.float32, 0, 1, 0, tmp_path)
    cfg = OmegaConf.create({"packing": "tree"})
    for place, node in nodes.items():
        OmegaConf.update(cfg, place, node, force_add=True)
    packer = Packer(cfg, run, pad_id=0)
    assert packer.packing == "padded"
    assert caplog.text.count("rows are padded instead") == 1 and f"`{key}` has layers that carry a state" in caplog.text


@pytest.mark.parametrize("name", ["gemma2, caps", "granite, scaled logits"])
def test_a_frozen_teacher_has_its_own_cap_and_scale(name):
    """A plain Llama learns from a teacher with other logits, and the reverse; the teacher gets no gradient."""
    for student, teacher in (
        (reference_model("qwen3"), reference_model(name, 3)),
        (reference_model(name), reference_model("qwen3", 3)),
    ):
        rollouts, ours, theirs = forest(SEED), decoder_of(student), decoder_of(teacher)
        request = ScoreRequest(
            student_grad=True, teacher_grad=False, divergences=(Divergence("kl_student_teacher", "student"),)
        )
        scores = score(ours, batch_of(rollouts), request, temperature=TEMPERATURE, teacher=theirs)
        expected = plain_numbers_of(request, teacher, student, rollouts)
        torch.testing.assert_close(scores.divergences[request.divergences[0]], expected, atol=4e-5, rtol=1e-5)
        scores.divergences[request.divergences[0]].sum().backward()
        expected.sum().backward()
        assert gradients(theirs) == {}
        assert relative_difference(gradients(ours), gradients(student)) < 1e-5
        teacher.zero_grad()


def plain_numbers_of(request, teacher, student, rollouts):
    with torch.no_grad():
        teacher.requires_grad_(False)
    logps = {}
    for view, lm in (("student", student), ("teacher", teacher)):
        rows = []
        for r in rollouts:
            prompt = r.prompts.of(view)
            logits = lm(torch.tensor([prompt + r.completion]), use_cache=False).logits[0].float()
            rows.append(logits[[len(prompt) + t - 1 for t in policy_positions(r)]] / TEMPERATURE)
        logps[view] = torch.log_softmax(torch.cat(rows), -1)
    return divergence(request.divergences[0], logps["teacher"], logps["student"])


@pytest.mark.parametrize("kinds", ["torchtune student", "transformers student"])
def test_torchtune_and_transformers_teach_each_other(kinds):
    tune, other = model(0), decoder_of(reference_model("gemma3"))
    student, teacher = (tune, other) if kinds == "torchtune student" else (other, tune)
    rollouts = forest(SEED)
    request = ScoreRequest(student_grad=True, teacher_grad=False, divergences=(Divergence("kl_student_teacher", "student"),))
    together = score(student, batch_of(rollouts), request, teacher=teacher)
    alone = score(teacher, batch_of(rollouts), ScoreRequest(student_grad=False, teacher_grad=False, divergences=()))
    torch.testing.assert_close(together.teacher_logprobs, alone.teacher_logprobs, atol=2e-5, rtol=1e-5)
    together.divergences[request.divergences[0]].sum().backward()
    assert gradients(student) and gradients(teacher) == {}


def test_a_trust_region_mixes_capped_logits():
    name = "gemma2, caps"
    reference, initial = reference_model(name), reference_model(name, 3)
    teacher = TrustRegionTeacher(0.25)
    teacher.attach(lambda: decoder_of(initial))
    rollouts, request = forest(SEED), ScoreRequest(student_grad=False, teacher_grad=False, divergences=())
    ours = score(decoder_of(reference), batch_of(rollouts), request, temperature=TEMPERATURE, teacher=teacher).teacher_logprobs
    expected = []
    for r in rollouts:
        ids = torch.tensor([r.prompts.teacher + r.completion])
        with torch.no_grad():
            logits = 0.75 * initial(ids, use_cache=False).logits[0] + 0.25 * reference(ids, use_cache=False).logits[0]
        rows = [len(r.prompts.teacher) + t - 1 for t in policy_positions(r)]
        picked = torch.log_softmax(logits[rows] / TEMPERATURE, -1)
        expected += [float(picked[i, r.completion[t]]) for i, t in enumerate(policy_positions(r))]
    torch.testing.assert_close(ours, torch.tensor(expected), atol=4e-5, rtol=1e-5)


def test_a_frozen_teacher_of_the_same_weights_has_no_divergence_and_no_gradient():
    reference = reference_model("gemma2, caps")
    student, teacher = decoder_of(reference), FrozenTeacher()
    teacher.attach(lambda: decoder_of(reference))
    rollouts = forest(SEED)
    for r in rollouts:
        r.prompts.teacher[:] = r.prompts.student
    request = ScoreRequest(student_grad=True, teacher_grad=False, divergences=(Divergence("jsd", "student", beta=0.5),))
    scores = score(student, batch_of(rollouts), request, temperature=TEMPERATURE, teacher=teacher)
    scores.divergences[request.divergences[0]].sum().backward()
    assert float(scores.divergences[request.divergences[0]].abs().max()) == 0.0
    assert max(float(g.abs().max()) for g in gradients(student).values()) == 0.0


@pytest.mark.parametrize("form", ["plain", "sinks", "softcap", "softcap and sinks"])
def test_attention_equals_the_softmax_written_out_with_gradients(form):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v, sinks = draw(2, 4, 5, 8), draw(2, 2, 7, 8), draw(2, 2, 7, 8), draw(4)
    visible = torch.rand(5, 7, generator=generator) < 0.7
    visible[:, 0] = True
    made = AttentionForm(0.3, sinks if "sinks" in form else None, 2.0 if "softcap" in form else None)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1)) * 0.3
    if "softcap" in form:
        scores = 2.0 * torch.tanh(scores / 2.0)
    weights = scores.exp() * visible
    total = weights.sum(-1, keepdim=True) + (sinks.exp()[None, :, None, None] if "sinks" in form else 0.0)
    expected = (weights / total) @ v.repeat_interleave(2, 1)
    ours = attend(q, k, v, visible, made)
    single = 1e-6 if "softcap" in form else 1e-12  # a capped softmax is in fp32, as transformers has it
    torch.testing.assert_close(ours, expected, atol=single, rtol=single)
    leaves = [q, k, v] + ([sinks] if "sinks" in form else [])
    grad = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, atol=10 * single, rtol=10 * single)


@pytest.mark.parametrize("form", ["plain", "sinks", "softcap"])
def test_flex_attention_in_a_tree_equals_the_blocks(form):
    """Run without the compiler what CUDA runs compiled: windows, grouped queries, sinks and caps."""
    from torch.nn.attention.flex_attention import flex_attention

    generator = torch.Generator().manual_seed(0)
    length = 256
    q, k, v = (torch.randn(1, heads, length, 16, generator=generator) for heads in (4, 2, 2))
    ends = torch.tensor([length] * 60 + [150] * 90 + [length] * 106)  # a prompt with two completions
    positions = torch.cat([torch.arange(150), torch.arange(60, 166)])[None]
    sinks = torch.randn(4, generator=generator) if form == "sinks" else None
    made = AttentionForm(0.2, sinks, 2.0 if form == "softcap" else None)
    for rule in (None, lambda b, h, q, k: (k <= q) & (k > q - 40)):
        mask = TreeMask(ends).layer_mask(rule, positions)
        by_blocks = torch.cat(
            [attend(q[:, :, b.queries], k[:, :, b.keys], v[:, :, b.keys], b.visible, made) for b in mask.blocks], 2
        )
        assert mask.attend(torch.nn.Identity(), q, k, v, made).shape == by_blocks.shape
        torch.testing.assert_close(
            flex_tree_attention(flex_attention, q, k, v, mask.block_mask, made), by_blocks, atol=2e-6, rtol=1e-5
        )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_auxiliary_loss_is_that_of_transformers_with_its_gradient(checkpointing):
    """A row without padding; the gradient reaches the router and, without a weight, there is none."""
    from torchtune.training import set_activation_checkpointing

    reference, rollout = reference_model("qwen3_moe"), forest(SEED)[0]
    decoder = decoder_of(reference)
    if checkpointing:
        set_activation_checkpointing(decoder, auto_wrap_policy={type(layer) for layer in decoder.layers})
    request = ScoreRequest(student_grad=True, teacher_grad=False, views=("student",))
    batch = batch_of([rollout], packing="padded")
    assert score(decoder, batch, request).router_loss == 0.0
    decoder.router_loss_weight = 0.3
    ours = score(decoder, batch, request).router_loss
    ids = torch.tensor([(rollout.prompts.student + rollout.completion)[:-1]])
    theirs = 0.3 * reference(ids, use_cache=False, output_router_logits=True).aux_loss
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    plain = {n.replace("_checkpoint_wrapped_module.", ""): g for n, g in gradients(decoder).items()}
    expected = {n: g for n, g in gradients(reference).items() if g.abs().max() > 0}
    assert any("gate.weight" in name for name in expected)
    assert relative_difference({n: g for n, g in plain.items() if n in expected}, expected) < 1e-5
    with torch.no_grad():
        assert score(decoder, batch, request).router_loss == 0.0


def balance_written_out(router_logits, chosen):
    """Return experts · Σ_e (assignments to e per token) · (mean probability of e), over the tokens of all layers."""
    logits = torch.cat(router_logits).double()
    probabilities, experts = logits.softmax(-1), logits.shape[1]
    assigned = torch.zeros(experts, dtype=torch.float64)
    for row in probabilities:
        for expert in row.topk(chosen).indices:
            assigned[expert] += 1 / len(logits)
    return experts * sum(assigned[e] * probabilities[:, e].mean() for e in range(experts))


@pytest.mark.parametrize("packing", ["padded", "tree", "tree with padding"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss, sinks and window"])
def test_the_auxiliary_loss_counts_each_real_token_once(name, packing, monkeypatch):
    """Rows of several lengths, each read alone in float64; in a tree a shared beginning is read, and counted, once."""
    rollouts = forest(SEED)
    decoder, reference = decoder_of(reference_model(name)), reference_model(name).double()
    reference.set_experts_implementation("eager")
    if packing == "tree with padding":  # as on CUDA, where rows are whole blocks
        monkeypatch.setattr("pidistill.scoring.batch._row_length", lambda tokens, device: tokens + 50)
    decoder.router_loss_weight = 0.3
    batch = batch_of(rollouts, packing=packing.split()[0])
    request = ScoreRequest(student_grad=True, teacher_grad=True)
    view = batch.views.of("student", "teacher")
    assert (view.real is None) == (packing == "tree")
    ours = score(decoder, batch, request).router_loss
    sequences = [(r.prompts.of(v) + r.completion)[:-1] for v in ("student", "teacher") for r in rollouts]
    found, seen = [], set()
    for ids in sequences:
        logits = reference(torch.tensor([ids]), use_cache=False, output_router_logits=True).router_logits
        new = [i for i in range(len(ids)) if packing == "padded" or tuple(ids[: i + 1]) not in seen]
        seen |= {tuple(ids[: i + 1]) for i in new}
        found.append([layer[new] for layer in logits])
    assert view.tokens.numel() > sum(len(layers[0]) for layers in found) or packing == "tree"
    expected = 0.3 * balance_written_out([layer for layers in found for layer in layers], 2)
    torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=2e-6)
    ours.backward()
    expected.backward()
    theirs = {n: g.float() for n, g in gradients(reference).items() if g.abs().max() > 0}
    assert relative_difference({n: g for n, g in gradients(decoder).items() if n in theirs}, theirs) < 1e-5
    assert all(float(g.abs().max()) == 0.0 for n, g in gradients(decoder).items() if n not in theirs)


def test_the_auxiliary_loss_of_an_empty_batch_has_a_gradient_of_zeros():
    decoder = decoder_of(reference_model("qwen3_moe"))
    decoder.router_loss_weight = 0.3
    scores = score(decoder, batch_of([], packing="padded"), ScoreRequest(student_grad=True, teacher_grad=True))
    (-scores.student_logprobs + scores.router_loss).sum().backward()
    assert gradients(decoder)
    assert all(float(g.abs().max()) == 0.0 for g in gradients(decoder).values())


@pytest.mark.slow
@pytest.mark.parametrize("name, packing", [("gemma3", "padded"), ("gemma3", "tree"), ("gpt_oss, sinks and window", "tree")])
def test_compiled_layers_give_the_same_numbers_and_gradients(name, packing):
    """Traced by the compiler and run without its code generator, which takes minutes on a CPU."""
    reference, rollouts = reference_model(name), forest(SEED)
    found = []
    for compiled in (False, True):
        decoder = decoder_of(reference)
        for layer in decoder.layers if compiled else ():
            layer.compile(backend="eager")
        numbers = our_numbers(decoder, rollouts, packing)
        weighted(numbers).backward()
        found.append((torch.stack(numbers).detach(), gradients(decoder)))
    torch.testing.assert_close(found[1][0], found[0][0], atol=4e-5, rtol=1e-5)
    assert relative_difference(found[1][1], found[0][1]) < 1e-5
