import sys, time, jax, jax.numpy as jnp, numpy as np, re, collections
from examples import mixes
import stfuse
from stfuse import _rules
dtype=jnp.bfloat16
all_=mixes.make_mixes(mixes.SCALES["full"],dtype)
exec(open("scratch/enc.py").read().split("name=sys")[0].split("all_=")[1].split("\n",1)[1])
name="encoder6"
jobs,inputs=mixes.make_jobs(all_[name],mixes.SCALES["full"],dtype)
fns=[jax.jit(j.apply_fn) for j in jobs]; ps=[jax.device_put(j.params) for j in jobs]; xs=jax.device_put([inputs[j.name] for j in jobs])
own=lambda: [f(p,x) for f,p,x in zip(fns,ps,xs)]
print("lat, dispatch | pip, dispatch"); print("own",t(own),flush=True)
def kcount(c):
    e=c.as_text(); e=e[e.index("ENTRY"):]
    return len(re.findall(r" fusion\(",e)), len(re.findall(r" custom-call\(",e)), len(re.findall(r" copy\(",e))
def go(label,opts={}):
    F=stfuse.fuse(jobs); bank=F.pack(); st=jax.device_put(F.stack(inputs))
    c=F._step.lower(bank.stacks,st.slots,st.inputs).compile(compiler_options=opts)
    print(label,kcount(c),t(lambda: c(bank.stacks,st.slots,st.inputs)),flush=True)
    return F,bank,st
F,bank,st=go("default"); go("default again")
go("skip_profiled",{"xla_gpu_command_buffer_update_mode":"SKIP_PROFILED"})
g=_rules.RULES.pop("gather"); go("no gather rule"); _rules.RULES["gather"]=g
r=_rules.RULES.pop("reshape"); go("no reshape rule"); _rules.RULES["reshape"]=r
small=[i for i,x in enumerate(bank.stacks) if x.ndim<=2 and x.dtype==jnp.bfloat16]
flat=jnp.concatenate([bank.stacks[i].reshape(-1) for i in small])
big=[x for i,x in enumerate(bank.stacks) if i not in small]
shapes=[x.shape for x in bank.stacks]
def packed(flat,big,slots,inputs):
    at=0; it=iter(big); out=[]
    for i,shape in enumerate(shapes):
        if i in small:
            n=int(np.prod(shape)); out.append(jax.lax.slice_in_dim(flat,at,at+n).reshape(shape)); at+=n
        else: out.append(next(it))
    return F._step(tuple(out),slots,inputs)
for label,opts in (("packed small",{}),("packed small skip",{"xla_gpu_command_buffer_update_mode":"SKIP_PROFILED"})):
    c=jax.jit(packed).lower(flat,big,st.slots,st.inputs).compile(compiler_options=opts)
    print(label,len(big),kcount(c),t(lambda: c(flat,big,st.slots,st.inputs)),flush=True)
