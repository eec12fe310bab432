"""The contract in 25 lines: fuse three tenants' models, then serve them."""

from functools import partial

import jax
import numpy as np

import stfuse
from models import cnn, mlp

jobs = []  # each: a name, a pure function, its weights, an example of its inputs
for seed, (name, model) in enumerate({"ada": cnn, "bob": cnn, "cy": mlp}.items()):
    apply_fn = partial(model.apply, model.DIGITS)
    params = model.init(model.DIGITS, jax.random.key(seed))
    jobs.append(stfuse.Job(name, apply_fn, params, np.zeros((1, 8, 8), "f4")))
inputs = {job.name: np.ones((2, 8, 8), "f4") for job in jobs}

fused = stfuse.fuse(jobs)
bank = fused.pack()
outputs = fused(bank, inputs)  # one step; each answer as its model alone gives it
print(fused.plan, {name: logits.shape for name, logits in outputs.items()}, sep="\n")

with stfuse.Engine(policy="space-time") as engine:
    for ready in [engine.add(job) for job in jobs]:
        ready.result()
    future = engine.submit("ada", inputs["ada"], deadline_s=5.0)
    print(engine.infer("bob", inputs["bob"]).argmax(-1), future.result().argmax(-1))
