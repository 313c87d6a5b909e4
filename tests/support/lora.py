"""Set up runs with LoRA adapters, and teachers that need no second copy of the weights."""

from omegaconf import OmegaConf
from torchtune.models.llama3 import llama3
from torchtune.training import FullModelHFCheckpointer

from tests.support.runs import run, small_config

TEACHERS = "pidistill.teachers."


LORA = {
    "model___component_": "torchtune.models.llama3.lora_llama3",
    "model__lora_attn_modules": ["q_proj", "v_proj"],
    "model__apply_lora_to_mlp": True,
    "model__lora_rank": 4,
    "model__lora_alpha": 8.0,
    "optimizer__lr": 3e-2,
}


ADAPTER_OFF = {"_component_": TEACHERS + "AdapterOffTeacher"}


FROZEN = {"_component_": TEACHERS + "FrozenTeacher"}


TRUST_REGION = {"_component_": TEACHERS + "TrustRegionTeacher", "live_share": 0.1}


def lora_run(tiny_base, folder, method="opsd", teacher=ADAPTER_OFF, prepare=None, **changes):
    return run(method, small_config(method, tiny_base, folder, teacher=teacher, **(LORA | changes)), prepare)


def plain_model(cfg_folder, folder="latest"):
    """The checkpoint's weights in a model without adapters, through torchtune's own checkpointer."""
    cfg = OmegaConf.load(cfg_folder / "config.yaml")
    of_adapters = ("_component_", "lora", "use_dora", "quantize_base")
    sizes = {key: value for key, value in cfg.model.items() if not any(part in key for part in of_adapters)}
    path = (cfg_folder / folder).resolve()
    files = [file.name for file in path.glob("*.safetensors")]
    loader = FullModelHFCheckpointer(str(path), files, model_type="LLAMA3", output_dir=str(cfg_folder / "unused"))
    model = llama3(**sizes)
    model.load_state_dict(loader.load_checkpoint()["model"])
    return model
