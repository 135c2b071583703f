#!/usr/bin/env bash
# One process of a run, as every launcher here starts it: environment, training, exit status.
#
#   bash launch/run.sh --config=configs/sd3_pec.py --workdir=DIR [--distributed ...]
#
# Exit status 75 (EX_TEMPFAIL of sysexits.h): it was told to stop before its end, and saved. A
# scheduler that saw 0 there would take the run for finished and never start it again.
set -uo pipefail

workdir=
for argument in "$@"; do
  case $argument in --workdir=*) workdir=${argument#*=} ;; esac
done
[ -n "$workdir" ] || { echo "launch/run.sh: --workdir=DIR is missing." >&2; exit 2; }

# Compiled programs are kept, so that a run that is started again need not compile. Only process 0
# writes them (jax/_src/compiler.py), so the directory must be one that all hosts share, as the
# run's own is. Whoever can write there runs code here: never a directory of strangers
# (docs.jax.dev/en/latest/persistent_compilation_cache.html).
beside=$(dirname "$workdir")/compilation_cache
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$beside}"

# Of the flags of the compilers only those that are no defaults in jaxlib 0.10 and libtpu 0.0.42. An
# unknown flag ends the process at once. What is set already comes last and wins.
#
# GPU: computes while weights are gathered and gradients reduced; off by default there
# (openxla.org/xla/flags_guidance, docs.jax.dev/en/latest/gpu_performance_tips.html).
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"
# GPU: JAX takes 75% of the memory unless told otherwise, which wastes 16 GB of an H100; a tenth is
# left to NCCL and the CUDA libraries (docs.nvidia.com/jax-toolbox, "GPU performance").
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"
# TPU: nothing. The latency-hiding scheduler and the fusion of asynchronous all-gathers are defaults
# (flags_guidance again). --xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true leaves the
# compiled step of shapes_pec for v5e:2x2 as it is, and --xla_tpu_scoped_vmem_limit_kib=98304 takes
# 3.6 times its temporaries. To try one: LIBTPU_INIT_ARGS=--flag=value python -m pec_jax.aot ...

# Bash would keep a SIGTERM to itself until the child ends, and as process 1 of a container it is
# the only one that gets it. The first wait returns when it comes; the next one waits for the end.
child=
trap 'signalled=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM INT
python -m pec_jax.main "$@" &
child=$!
while true; do
  signalled=
  wait "$child"
  status=$?
  [ -n "$signalled" ] || break
done

# The final evaluation is the last thing that a run writes. `find` reads the directory anew, where a
# plain test may be answered from the cache of a network file system.
if [ "$status" -eq 0 ] && ! find "$workdir/" -maxdepth 1 -name eval.json | grep -q .; then
  exit 75
fi
exit "$status"
