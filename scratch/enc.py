import sys, time, jax, jax.numpy as jnp, numpy as np
from examples import mixes
import stfuse
dtype=jnp.bfloat16
all_=mixes.make_mixes(mixes.SCALES["full"],dtype)
def t(run,n=20):
    run(); jax.block_until_ready(run())
    res=[]
    for _ in range(7):
        lat=dl=0
        for _ in range(n):
            s=time.perf_counter(); r=run(); dl+=time.perf_counter()-s
            jax.block_until_ready(r); lat+=time.perf_counter()-s; del r
        s=time.perf_counter()
        rs=[run() for _ in range(n)]; d=(time.perf_counter()-s)/n
        jax.block_until_ready(rs)
        pip=(time.perf_counter()-s)/n
        res.append((lat/n,dl/n,pip,d))
    return [round(float(np.median(x))*1e6) for x in zip(*res)]
name=sys.argv[1]
jobs,inputs=mixes.make_jobs(all_[name],mixes.SCALES["full"],dtype)
fns=[jax.jit(j.apply_fn) for j in jobs]; ps=[jax.device_put(j.params) for j in jobs]; xs=jax.device_put([inputs[j.name] for j in jobs])
own=lambda: [f(p,x) for f,p,x in zip(fns,ps,xs)]
print("own jits latency, dispatch | pipelined, dispatch",t(own),flush=True)
F=stfuse.fuse(jobs); bank=F.pack(); st=jax.device_put(F.stack(inputs))
print(str(F.plan).split("\n")[-4:])
low=F._step.lower(bank.stacks,st.slots,st.inputs)
for label,opts in [("default",{}),("skip_temp",{"xla_gpu_command_buffer_update_mode":"SKIP_TEMP"}),("skip_profiled",{"xla_gpu_command_buffer_update_mode":"SKIP_PROFILED"}),("skip_prof+sep",{"xla_gpu_command_buffer_update_mode":"SKIP_PROFILED","xla_gpu_temp_buffer_use_separate_color":True}),("va",{"xla_gpu_enable_command_buffer_va_remapping":True}),("conreg",{"xla_gpu_command_buffer_scheduling_mode":"CONCURRENT_REGIONS"})]:
    try:
        c=low.compile(compiler_options=opts)
        print(label,t(lambda: c(bank.stacks,st.slots,st.inputs)),flush=True)
    except Exception as e: print(label,str(e)[:250])
