import time, json
from tests.recipes.runs import *
def test_try(tiny_base, tmp_path):
    for name in ("pi_distill","opsd","rl","sft","base"):
        t=time.time()
        cfg = small_config(name, tiny_base, tmp_path/name)
        run(name, cfg)
        print(name, time.time()-t)
        for r in metrics(tmp_path/name)[:2]: print(json.dumps(r))
