"""Profile a fused mix: kernels by time."""
import sys, os, glob, gzip, json, collections, re, time
import jax, numpy as np
from examples import mixes
import stfuse
def kernels(run, out, n=10):
    run()
    d=f"/tmp/prof_{out}"
    with jax.profiler.trace(d):
        for _ in range(n): r=run()
        jax.block_until_ready(r)
    f=sorted(glob.glob(d+"/**/*.trace.json.gz",recursive=True))[-1]
    ev=json.load(gzip.open(f))["traceEvents"]
    names={e["pid"]:e["args"].get("name","") for e in ev if e.get("ph")=="M" and e.get("name")=="process_name"}
    tids={(e["pid"],e["tid"]):e["args"].get("name","") for e in ev if e.get("ph")=="M" and e.get("name")=="thread_name"}
    tot=collections.Counter(); cnt=collections.Counter()
    for e in ev:
        if e.get("ph")=="X" and "GPU" in names.get(e["pid"],"") and "Stream" in tids.get((e["pid"],e["tid"]),""):
            tot[e["name"]]+=e["dur"]; cnt[e["name"]]+=1
    print(out,"total kernel us/call",sum(tot.values())/n,"kernels/call",sum(cnt.values())/n)
    for k,v in tot.most_common(25): print(f"  {v/n:8.1f} us {cnt[k]/n:6.1f}x {k[:100]}")
def hlo(compiled,out):
    t=compiled.as_text()
    open(os.environ.get("OUT","/tmp")+f"/{out}.hlo","w").write(t)
    entry=t[t.index("ENTRY"):]
    c=collections.Counter(re.findall(r"= [^ ]+ ([a-z\-]+)\(",entry))
    print(out,"entry ops",dict(c))
import jax.numpy as jnp
def main():
    dtype=jnp.bfloat16
    all_=mixes.make_mixes(mixes.SCALES["full"],dtype)
    for name in sys.argv[1:]:
        jobs,inputs=mixes.make_jobs(all_[name],mixes.SCALES["full"],dtype)
        F=stfuse.fuse(jobs); bank=F.pack(); st=jax.device_put(F.stack(inputs))
        print(name, str(F.plan).split("\n")[-14:])
        c=F._step.lower(bank.stacks,st.slots,st.inputs).compile()
        hlo(c,name)
        run=lambda: F.step(bank,st).leaves
        kernels(run,name)
main()
