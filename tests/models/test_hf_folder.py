import json

import pytest

from pidistill.errors import InputError
from pidistill.models.hf_folder import INDEX, weight_files


@pytest.mark.parametrize("outside", [True, False], ids=["absolute path", "parent folder"])
def test_a_name_in_the_index_that_leaves_the_folder_is_refused(tmp_path, outside):
    other, folder = tmp_path / "other.safetensors", tmp_path / "model"
    other.write_bytes(b"x")
    folder.mkdir()
    name = str(other) if outside else "../other.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match="not a plain file name"):
        weight_files(folder)
