import sys, time, jax, jax.numpy as jnp, numpy as np
from examples import mixes
import stfuse
dtype=jnp.bfloat16
all_=mixes.make_mixes(mixes.SCALES["full"],dtype)
def t(run,n=20):
    run(); jax.block_until_ready(run())
    res=[]
    for _ in range(7):
        s=time.perf_counter()
        for _ in range(n): jax.block_until_ready(run())
        lat=(time.perf_counter()-s)/n
        s=time.perf_counter()
        rs=[run() for _ in range(n)]; d=(time.perf_counter()-s)/n
        jax.block_until_ready(rs)
        pip=(time.perf_counter()-s)/n
        res.append((lat,pip,d))
    return [round(float(np.median(x))*1e6) for x in zip(*res)]
for name in sys.argv[1:]:
    jobs,inputs=mixes.make_jobs(all_[name],mixes.SCALES["full"],dtype)
    F=stfuse.fuse(jobs); bank=F.pack(); st=jax.device_put(F.stack(inputs))
    low=F._step.lower(bank.stacks,st.slots,st.inputs)
    for label,opts in [("default",{}),("nocb",{"xla_gpu_enable_command_buffer":""}),("nodotmerger",{"xla_gpu_dot_merger_threshold_mb":0}),("notriton",{"xla_gpu_enable_triton_gemm":False})]:
        try:
            c=low.compile(compiler_options=opts)
            print(name,label,"latency/pipelined/dispatch us",t(lambda: c(bank.stacks,st.slots,st.inputs)), "n args",len(jax.tree.leaves((bank,st))),flush=True)
        except Exception as e: print(name,label,str(e)[:200])
