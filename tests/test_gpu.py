"""Every kernel is lowered for a GPU that is not here: Triton takes what Pallas writes.

Interpreted, as on a CPU, a kernel may use what the lowering for a GPU has no rule for.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import stfuse
from models import bert
from stfuse._lower import _conv_kernel, _indexed
from tests.region_jobs import GROUPS, attention_job, fused_of, gelu_job, jobs_of
from tests.test_lower import conv_op, op_of
from tests.test_lower_kernels import CONVOLUTIONS, NAMED

# JAX has deprecated what these kernels are written for.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton:DeprecationWarning")
DEVICE = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")


@pytest.fixture
def num_kernels(monkeypatch):
    """Return a function that counts the kernels of a step, lowered for a GPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def count(fn, *arguments):
        with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=DEVICE)):
            lowered = jax.jit(fn).trace(*arguments).lower(lowering_platforms=("cuda",))
        return lowered.as_text().count("@__gpu$xla.gpu.triton")

    return count


def example_of(jobs):
    """Return specs of a request of two rows for each job."""
    return {
        job.name: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype), job.example
        )
        for job in jobs
    }


@pytest.mark.parametrize("group", GROUPS)
def test_regions(group, num_kernels):
    jobs = jobs_of(group)
    fused = fused_of(jobs)
    assert num_kernels(fused, fused.pack(), example_of(jobs))


def test_regions_as_large_as_they_may_be(num_kernels):
    jobs = [attention_job(name, 128, 2, 64, jnp.bfloat16) for name in "ab"]
    jobs += [gelu_job(name, 3000, np.float16) for name in "cd"]
    fused = fused_of(jobs)
    assert num_kernels(fused, fused.pack(), example_of(jobs)) >= 2


def test_encoders_of_unlike_depth(num_kernels):
    ids = np.zeros((1, 16), np.int32)
    jobs = [
        stfuse.Job(
            str(i),
            lambda p, x, config=config: bert.apply(config, p, x),
            bert.init(config, jax.random.key(i)),
            {"ids": ids, "mask": ids},
        )
        for i, config in enumerate((bert.TINY, bert.TINY_DEEP))
    ]
    fused = fused_of(jobs)
    assert num_kernels(fused, fused.pack(), example_of(jobs))


@pytest.mark.parametrize("row", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions(row, num_kernels):
    image, kernel, strides, padding, dilation, dims = row
    x, w = jnp.zeros((4, *image), jnp.bfloat16), jnp.zeros((4, *kernel), jnp.bfloat16)
    op = conv_op(
        np.asarray(w[0]),
        np.asarray(x[0]),
        window_strides=strides,
        padding=padding,
        rhs_dilation=dilation,
        dimension_numbers=dims,
    )
    assert num_kernels(lambda x, w: _conv_kernel.conv(op, x, w), x, w) == 1


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("sizes", NAMED.values(), ids=NAMED)
def test_products_of_named_slots(sizes, dtype, num_kernels):
    m, c, n, named, slots = sizes
    x, w = jnp.zeros((named, m, c), dtype), jnp.zeros((slots, c, n), dtype)
    op = op_of(lambda w, x: x @ w, w[0], x[0])
    index = jnp.zeros(named, jnp.int32)
    assert num_kernels(lambda *given: _indexed.dot(op, *given), x, w, index) == 1
