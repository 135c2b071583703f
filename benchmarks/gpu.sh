#!/usr/bin/env bash
# One iteration of Stable Diffusion 3.5 Medium with PEC at 512 px on one GPU of 80 GB: phases, MFU,
# peak memory, which of the libraries' kernels are taken, and torch on the same work, eager and
# compiled. Random weights of the published shapes: nothing is downloaded.
#
#   benchmarks/gpu.sh [OUT] [--config.FIELD=VALUE ...]
#
# Writes OUT/{ours,torch}.{txt,json}; OUT is by default gpu_benchmark. At most 8 minutes on one H100
# or H200: when its time is up, a part shows what it has, and the first is then already written.
# Needs a JAX with CUDA (`pip install 'pec_jax[cuda]'`), and diffusers and torch for the second part.
# PYTHON names the interpreter; CONFIG another config; RUNS the timed rounds; LIMIT the seconds of
# both parts; PARTS=torch takes one part alone.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

out=gpu_benchmark
if [[ ${1:---} != --* ]]; then
  out=$1
  shift
fi
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)

# Two libraries share the card; and the second part finds the first's programs compiled.
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/compiled}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=1

# An iteration of 8 images is long enough to be timed, and has the pieces of one of 1152. A GPU of
# 80 GB has room for all activations of four images, so that nothing is computed twice.
small=(--random --runs="${RUNS:-3}" --config="${CONFIG:-configs/sd3_pec.py}"
  --config.batch.groups=1 --config.batch.group_size=8 --config.batch.rollout_images=8
  --config.batch.decode_images=4 --config.batch.update_images=4 --config.model.remat=none)

required=() # kernels, and the peak
if nvidia-smi >/dev/null 2>&1; then
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
  # shellcheck disable=SC2016 # the names have dollars in them
  required=('--require=__cudnn$fmhaSoftmax,__cudnn$fmhaSoftmaxBackward')
  # The peaks of NVIDIA's data sheets, dense bf16, are the same for H100 SXM and H200.
  case $(nvidia-smi --query-gpu=name --format=csv,noheader) in
    *H100*HBM3* | *H200*) required+=(--peak_tflops=989) ;;
  esac
fi

# A part that is asked to end has half a minute to show what it has.
part() {
  timeout --signal=INT --kill-after=30 "$2" "$python" benchmarks/iteration.py "${small[@]}" \
    "${required[@]}" --json="$out/$1.json" "${@:3}" 2>&1 | tee "$out/$1.txt"
}

# The first part compiles everything, and takes a little more than half of the time.
limit=${LIMIT:-450} parts=${PARTS:-ours torch} status=0 SECONDS=0
[[ $parts != *torch* ]] || first=$((limit * 5 / 9))
[[ $parts != *ours* ]] || part ours "${first:-$limit}" "$@" || status=$?
[[ $parts != *torch* ]] ||
  part torch $((limit - SECONDS)) --phases=false --torch=eager,blocks "$@" || status=$?
exit "$status"
