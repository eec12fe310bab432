"""The promise, the walls and the plan for every reference model and its sibling."""

import jax
import numpy as np
import pytest
from flax import nnx

import stfuse
from models import mlp
from tests import cases
from tests.cases import alone, assert_bitwise, assert_same
from tests.model_cases import SIBLINGS

over_siblings = pytest.mark.parametrize("pair", SIBLINGS, ids=lambda p: p[0].name)


@pytest.fixture(scope="module", params=SIBLINGS, ids=lambda p: p[0].name)
def family(request):
    """Two jobs of a model and two of its sibling, fused once for all tests."""
    kinds = [kind for kind in request.param for _ in range(2)]
    jobs = [cases.job(kind, i % 2) for i, kind in enumerate(kinds)]
    fused = stfuse.fuse(jobs, cost="cpu")
    inputs = {job.name: kinds[i].inputs(i, 1 + i % 2) for i, job in enumerate(jobs)}
    return fused, fused.pack(), inputs, dict(zip(inputs, kinds, strict=True))


def test_a_model_beside_itself_and_its_sibling_answers_as_alone(family):
    fused, bank, inputs, kinds = family
    outputs = fused(bank, inputs)
    for name, x in inputs.items():
        assert_same(outputs[name], alone(fused.jobs[name], x), kinds[name])


@over_siblings
def test_a_model_in_a_step_of_its_own_answers_as_alone(pair):
    case = pair[0]
    fused = cases.group(case, 1)
    ((name, x),) = cases.requests(case, fused, (2,)).items()
    assert_same(fused(fused.pack(), {name: x})[name], alone(fused.jobs[name], x), case)


@over_siblings
def test_equal_models_share_every_launch(pair):
    for kind in pair:
        fused = cases.group(kind, 2)
        assert {launch.jobs for launch in fused.plan.launches} == {tuple(fused.jobs)}
        assert fused.plan.num_solo == 0
        assert fused.plan.waste == 0
        assert fused.plan.num_launches * 2 == fused.plan.num_launches_alone


def test_siblings_share_launches_too_and_keep_all_their_own(family):
    fused, *_ = family
    names, plan = tuple(fused.jobs), fused.plan
    pairs = names[:2], names[2:]
    groups = {launch.jobs for launch in plan.launches}
    assert names in groups and groups <= {*pairs, names}
    assert plan.num_solo == 0
    own = []
    for one, pair in zip(plan.species, pairs, strict=True):
        assert tuple(plan.names[i] for i in one.members) == pair
        heavy = sorted(op.name for op in one.trace.ops if op.is_heavy)
        shared = [x.primitive for x in plan.launches if set(pair) <= set(x.jobs)]
        assert sorted(shared) == heavy
        own.append(len(heavy))
    assert plan.num_launches_alone == 2 * sum(own)
    assert max(own) <= plan.num_launches < sum(own)
    for launch in plan.launches:
        assert launch.waste >= 0 if launch.jobs == names else launch.waste == 0


def test_poison_in_one_model_changes_no_bit_of_the_others(family):
    fused, bank, inputs, _ = family
    first, *others = inputs
    before = fused(bank, inputs)
    sick = jax.tree.map(
        lambda x: np.full_like(x, np.nan) if x.dtype.kind == "f" else x,
        (fused.jobs[first].params, inputs[first]),
    )
    after = fused(fused.swap(bank, first, sick[0]), {**inputs, first: sick[1]})
    for name in others:
        assert_bitwise(after[name], before[name])


def test_an_nnx_model_is_served_as_it_is_and_equals_its_linen_form():
    config = mlp.TINY
    models = [mlp.NnxMLP(config, rngs=nnx.Rngs(seed)) for seed in range(3)]
    x = np.random.default_rng(0).normal(size=(2, *config.input_shape)).astype("f4")
    jobs = [stfuse.Job.from_nnx(f"m{i}", m, x) for i, m in enumerate(models)]
    fused = stfuse.fuse(jobs, cost="cpu")
    assert fused.plan.num_launches == len(config.widths) + 1
    outputs = fused(fused.pack(), {job.name: x for job in jobs})
    for job, model in zip(jobs, models, strict=True):
        np.testing.assert_allclose(outputs[job.name], model(x), rtol=1e-5, atol=1e-5)
        params = {
            f"Dense_{i}": {"kernel": layer.kernel[...], "bias": layer.bias[...]}
            for i, layer in enumerate(model.layers)
        }
        linen = mlp.apply(config, params, x)
        np.testing.assert_allclose(outputs[job.name], linen, rtol=1e-5, atol=1e-5)
