"""Test `pidistill prepare gguf`: the folder holds the file's model and tokenizer, and a wrong file gets one sentence."""

import json

import gguf
import numpy as np
import pytest
import torch
from torchtune.training import MODEL_KEY

from pidistill.commands.prepare import main as prepare
from pidistill.models import HFCheckpointer, from_folder
from pidistill.tokenizers import HFChatTokenizer
from tests.support.chat_templates import QWEN25
from tests.support.hub_models import hub_folder, reference
from tests.support.tiny_tokenizers import qwen_folder

LAYERS, WIDTH = 2, 64
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in whole:
        return whole[name]
    _, _, layer, rest = name.split(".", 3)
    part, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{NAMES[part]}.{kind}"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a tiny Qwen2.5, and the same in a file whose matrices are stored in Q8_0."""
    folder = tmp_path_factory.mktemp("gguf") / "model"
    hub_folder("qwen2, tied", folder, vocab_size=640, max_position_embeddings=512)
    qwen_folder(folder)
    return folder, write_gguf(folder, folder.parent / "model.gguf")


def write_gguf(folder, file, *, leave_out=None, rope_freqs=False, parts=1):
    """Write a folder's model as a file; without one of its weights, with factors of its rotations, or as one of ``parts``."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(512)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(640)
    add_tokenizer(writer, folder)
    for name, tensor in reference(folder).state_dict().items():
        if name in ("lm_head.weight", leave_out):
            continue
        values = tensor.numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(values.astype(np.float32), kind), raw_dtype=kind)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    if rope_freqs:
        writer.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add_tokenizer(writer, folder) -> None:
    made = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = made["model"]["vocab"] | {token["content"]: token["id"] for token in made["added_tokens"]}
    tokens = {number: token for token, number in vocabulary.items()}
    control = {token["id"] for token in made["added_tokens"] if token["special"]}
    names = [tokens.get(number, f"<unused_{number}>") for number in range(640)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(names)
    writer.add_token_types([gguf.TokenType.CONTROL if i in control else gguf.TokenType.NORMAL for i in range(640)])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in made["model"]["merges"]]
    writer.add_token_merges(merges)
    writer.add_eos_token_id(vocabulary["<|im_end|>"])
    writer.add_pad_token_id(vocabulary["<|endoftext|>"])
    writer.add_chat_template(QWEN25)


def ended(words: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        prepare(["gguf", *words])
    return stop.value.code


def test_the_folder_holds_the_models_weights_and_its_tokenizer(source, tmp_path, capsys):
    folder, file = source
    made = tmp_path / "made"
    assert ended([str(file), "--output", str(made)]) == 0
    assert "dequantised from Q8_0" in capsys.readouterr().out
    weights = HFCheckpointer(str(made), str(tmp_path / "out")).load_checkpoint()[MODEL_KEY]
    expected = HFCheckpointer(str(folder), str(tmp_path / "out")).load_checkpoint()[MODEL_KEY]
    assert weights.keys() == expected.keys() == from_folder(str(made)).state_dict().keys()
    for name, tensor in weights.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), expected[name], rtol=0.02, atol=0.02 * expected[name].abs().max().item())
    ours, theirs = (HFChatTokenizer(str(path), max_seq_len=512) for path in (made, folder))
    messages = [{"role": "user", "content": "How many clips did Natalia sell?"}]
    assert ours.encode_prompt(messages) == theirs.encode_prompt(messages)


def test_wrong_files_are_one_sentence(source, tmp_path, capsys):
    folder, file = source
    (tmp_path / "text.gguf").write_text("not a model")
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:5000])
    cases = {
        str(tmp_path / "absent.gguf"): "is not a file",
        str(tmp_path / "text.gguf"): "is not a GGUF file",
        str(tmp_path / "cut.gguf"): "cannot read",
    }
    for path, sentence in cases.items():
        assert ended([path, "--output", str(tmp_path / "made")]) == 2, path
        assert sentence in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "made").exists()
    assert ended([str(file), "--output", str(folder)]) == 2
    assert "holds a model already" in capsys.readouterr().err
    assert ended([str(file), "--output", str(tmp_path / "text.gguf" / "made")]) == 2
    assert f"{tmp_path}/text.gguf is a file; choose another --output" in capsys.readouterr().err


def test_a_file_that_is_not_the_whole_model_is_refused(source, tmp_path, capsys):
    folder, _ = source
    lacking = write_gguf(folder, tmp_path / "lacking.gguf", leave_out="model.layers.1.mlp.up_proj.weight")
    scaled = write_gguf(folder, tmp_path / "scaled.gguf", rope_freqs=True)
    part = write_gguf(folder, tmp_path / "part_1.gguf", parts=3)  # the others may hold no more than the head
    sentences = {lacking: "lacks 1 of the model's weights", scaled: "scales its rotations (rope_freqs.weight)"}
    for file, sentence in (sentences | {part: "is one of 3 parts of a model"}).items():
        assert ended([str(file), "--output", str(tmp_path / "made")]) == 2
        assert sentence in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "made").exists()
