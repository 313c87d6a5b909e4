"""Test the small models that tests use: true Hugging Face checkpoints, seeded, not degenerate."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torchtune.models.llama3 import llama3
from torchtune.models.llama3_2 import llama3_2
from torchtune.models.qwen2 import qwen2
from torchtune.training import MODEL_KEY, FullModelHFCheckpointer

from pidistill.errors import InputError
from pidistill.privileged import PrivilegedPrompt
from pidistill.testing import QWEN3_HEAD_DIM, TINY_SIZES, tiny_hf_checkpoint, tiny_model
from pidistill.tokenizers.byte import BYTE_VOCABULARY, byte_tokenizer, byte_tokenizer_folder
from pidistill.types import Example

VOCAB_SIZE = 40
FAMILIES = {
    ("qwen2", False): ("QWEN2", qwen2, {"tie_word_embeddings": False}),
    ("qwen2", True): ("QWEN2", qwen2, {"tie_word_embeddings": True}),
    ("llama", False): ("LLAMA3", llama3, {}),
    ("llama", True): ("LLAMA3_2", llama3_2, {}),
}


@pytest.fixture
def tokens():
    return torch.randint(VOCAB_SIZE, (2, 17), generator=torch.Generator().manual_seed(1))


def torchtune_checkpointer(directory, output_dir, model_type):
    return FullModelHFCheckpointer(
        checkpoint_dir=str(directory),
        checkpoint_files=["model.safetensors"],
        output_dir=str(output_dir),
        model_type=model_type,
    )


def transformers_logits(directory, tokens):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_hf_checkpoint_gives_the_same_logits_in_torchtune_and_transformers(tmp_path, tokens, family, tied):
    directory = tiny_hf_checkpoint(tmp_path / "hub", family, tied=tied, vocab_size=VOCAB_SIZE)
    model_type, builder, arguments = FAMILIES[family, tied]
    model = builder(vocab_size=VOCAB_SIZE, **TINY_SIZES, **arguments)
    weights = torchtune_checkpointer(directory, tmp_path / "out", model_type).load_checkpoint()[MODEL_KEY]
    model.load_state_dict(weights)  # strict: every weight of the builder is in the checkpoint and none is left over
    with torch.no_grad():
        ours = model(tokens)
    theirs = transformers_logits(directory, tokens)
    assert theirs.std() > 0.5, "logits this close to each other would agree under wrong weights too"
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_hf_checkpoint_holds_the_config_keys_and_tensors_that_loaders_read(tmp_path, family, tied):
    directory = tiny_hf_checkpoint(tmp_path, family, tied=tied, vocab_size=VOCAB_SIZE)
    config = json.loads((directory / "config.json").read_text())
    assert config["hidden_size"] == TINY_SIZES["embed_dim"]
    assert config["num_attention_heads"] == TINY_SIZES["num_heads"]
    assert config["num_key_value_heads"] == TINY_SIZES["num_kv_heads"]
    assert config["tie_word_embeddings"] is tied
    tensors = load_file(directory / "model.safetensors")
    assert ("lm_head.weight" in tensors) is not tied
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    one_dimensional = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 1}
    assert len(one_dimensional) == 2 * 2 + 1 + (2 * 3 if family == "qwen2" else 0)  # norms per layer, last norm, q/k/v biases
    for name, tensor in one_dimensional.items():
        assert tensor.std() > 0.1, f"{name} is (nearly) constant: a wrong place for it would not show"


def test_qwen3_has_heads_of_its_own_width_and_large_models_are_several_files(tmp_path):
    directory = tiny_hf_checkpoint(tmp_path, "qwen3", max_shard_size="100KB", num_hidden_layers=3)
    config = json.loads((directory / "config.json").read_text())
    assert (config["head_dim"], config["num_hidden_layers"]) == (QWEN3_HEAD_DIM, 3)
    assert TINY_SIZES["embed_dim"] // TINY_SIZES["num_heads"] != QWEN3_HEAD_DIM
    listed = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(listed.values())) > 3
    norm = "model.layers.2.self_attn.q_norm.weight"
    assert load_file(directory / listed[norm])[norm].std() > 0.1


def test_seed_decides_the_weights_and_nothing_else_does(tmp_path):
    state_before = torch.random.get_rng_state()
    first = load_file(tiny_hf_checkpoint(tmp_path / "a", seed=3) / "model.safetensors")
    torch.rand(5)
    again = load_file(tiny_hf_checkpoint(tmp_path / "b", seed=3) / "model.safetensors")
    other = load_file(tiny_hf_checkpoint(tmp_path / "c", seed=4) / "model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first)
    torch.random.set_rng_state(state_before)
    tiny_model(9)
    assert torch.equal(torch.random.get_rng_state(), state_before), "making a model must not move the caller's random state"


def test_tokenizer_is_saved_next_to_the_model(tmp_path):
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    directory = tiny_hf_checkpoint(tmp_path / "bare", tokenizer=tokenizer)
    assert Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab() == {"a": 0, "b": 1}

    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="a")
    directory = tiny_hf_checkpoint(tmp_path / "fast", tokenizer=fast)
    assert PreTrainedTokenizerFast.from_pretrained(directory).get_vocab() == {"a": 0, "b": 1}


def test_hf_checkpoint_refuses_what_cannot_work(tmp_path):
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    with pytest.raises(InputError, match="3 ids and the model's embedding 2 rows; raise vocab_size"):
        tiny_hf_checkpoint(tmp_path, tokenizer=tokenizer, vocab_size=2)
    assert not list(tmp_path.glob("*.safetensors"))


def test_tiny_model_is_seeded_takes_overrides_and_uses_every_weight():
    first, again, other = tiny_model(11, seed=1), tiny_model(11, seed=1), tiny_model(11, seed=2)
    for (name, weight), same, different in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, same) and not torch.equal(weight, different), name
        if weight.ndim == 1:
            assert weight.min() >= 0.5 and weight.max() <= 1.5 and weight.std() > 0.1, name
    assert len(tiny_model(11, num_layers=1).layers) == 1
    first(torch.arange(11)[None]).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in first.parameters())


# ------------------------------------------------------------------------------------------- bytes

ANY_TEXT = "Zwölf\t漢字 🙂\r\n  e\u0301 \x00 <|im_end|> <|im_start|>user"


def test_each_byte_is_an_id_and_any_text_is_read_back(tmp_path):
    tokenizer = byte_tokenizer(str(tmp_path), max_seq_len=77)
    assert (tokenizer.vocab_size, tokenizer.max_seq_len) == (BYTE_VOCABULARY, 77) and len(tokenizer.stop_ids) == 2
    messages = [{"role": "user", "content": "2"}]
    turn = tokenizer.encode_turn(messages, {"role": "assistant", "content": ANY_TEXT})
    assert len(turn) == len(ANY_TEXT.encode()) + 1 and turn[-1] in tokenizer.stop_ids
    assert not set(turn[:-1]) & tokenizer.stop_ids, "what a message says ends no turn"
    assert tokenizer.parse_turn(turn) == {"role": "assistant", "content": ANY_TEXT}
    assert tokenizer.decode(tokenizer.encode_prompt(messages)) == "<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\n"
    assert len(set(tokenizer.encode_prompt([{"role": "user", "content": bytes(range(128)).decode()}]))) >= 128


def test_the_byte_tokenizer_writes_tools_as_text_where_it_is_told_to(tmp_path):
    function = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    tools, messages = [{"type": "function", "function": function}], [{"role": "user", "content": "2"}]
    call = {"role": "assistant", "content": "so", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
    with pytest.raises(InputError, match="set tokenizer.tool_format: action"):
        PrivilegedPrompt().build(Example("row", messages, tools=tools), byte_tokenizer(str(tmp_path)))
    tokenizer = byte_tokenizer(str(tmp_path), tool_format="action")
    assert '"add"' in tokenizer.decode(tokenizer.encode_prompt(messages, tools))
    read = tokenizer.parse_turn(tokenizer.encode_turn(messages, call, tools), tools)
    assert read["content"] == "so" and read["tool_calls"][0]["function"] == call["tool_calls"][0]["function"]


def test_the_byte_tokenizers_files_are_those_of_a_model_on_the_hub(tmp_path):
    from transformers import PreTrainedTokenizerFast

    ours, theirs = byte_tokenizer(str(tmp_path)), PreTrainedTokenizerFast.from_pretrained(byte_tokenizer_folder(tmp_path))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Zwölf 漢字 🙂"}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.encode_prompt(messages) == expected and theirs.pad_token_id == ours.pad_id
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "nothing is left aside"
