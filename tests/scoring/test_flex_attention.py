"""Test that flex attention is compiled, whatever comes to it: what is not compiled of it holds all scores of a row."""

import warnings

import pytest
import torch

from pidistill.errors import InputError
from pidistill.models.layer_masks import AttentionForm
from pidistill.scoring import tree_attention
from pidistill.scoring.tree_attention import TreeMask, flex_tree_attention


@pytest.fixture
def counted_graphs(monkeypatch):
    """Let flex attention be compiled on a CPU into graphs that run as they are, and count them; dense scores fail the test."""
    graphs, compiler = [], torch.compile
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)  # no gradient on a CPU
    count = lambda graph, inputs: graphs.append(graph) or graph  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, **options, backend=count))
    tree_attention._compiled_flex_attention.cache_clear()
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="flex_attention called without torch.compile")
        yield graphs
    tree_attention._compiled_flex_attention.cache_clear()
    torch._dynamo.reset()


def run_flex(heads: int, length: int = 256, *, gradient: bool = False, form: AttentionForm | None = None) -> None:
    q, k, v = (torch.zeros(1, n, length, 16, requires_grad=gradient) for n in (heads, 1, 1))
    mask = TreeMask(torch.full((length,), length))
    with torch.set_grad_enabled(gradient):
        flex = tree_attention._compiled_flex_attention()
        flex_tree_attention(flex, q, k, v, mask.block_mask, form or AttentionForm())


def test_flex_attention_is_compiled_for_more_variants_than_torchs_own_limit(counted_graphs):
    """As of several models, with and without gradient; torch stops at 8 and makes dense scores from then on."""
    for heads in range(2, 11):
        run_flex(heads, gradient=heads % 2 == 0)
    assert len(counted_graphs) == 9


def test_the_gradient_through_a_cap_is_compiled_as_a_whole(counted_graphs):
    run_flex(2, gradient=True, form=AttentionForm(0.2, torch.zeros(2), 3.0))
    assert len(counted_graphs) == 1


def test_where_flex_attention_cannot_be_compiled_one_sentence_names_the_packing(counted_graphs, monkeypatch):
    monkeypatch.setattr(tree_attention, "_FLEX_VARIANTS", 1)
    run_flex(2)
    with pytest.raises(InputError, match=r"could not compile flex attention for packed trees \(.*\); set packing=padded"):
        run_flex(4)
