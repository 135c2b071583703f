#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'HELP'
Trains on a Cloud TPU VM, of one host or a whole pod slice, over ssh.

    export NAME=my-v5e-16 ZONE=us-west4-a [PROJECT=my-project] [BUCKET=my-bucket]
    bash launch/tpu_vm.sh start --config=configs/sd3_pec.py --workdir=/mnt/runs/sd3 [--config.a.b=v]
    bash launch/tpu_vm.sh logs     # of the first host, until Ctrl-C
    bash launch/tpu_vm.sh stop     # saves and stops; returns when all have ended

start copies the commit that is checked out here to every host, installs it and starts the run,
which then needs no ssh. Started again, it does nothing while the run is alive, and else resumes it.
All hosts must see --workdir: with BUCKET, that bucket is mounted on /mnt/runs; without it, choose
a directory on a file system that they share. Making the slice, and deleting it, is up to you:

    gcloud compute tpus tpu-vm create my-v5e-16 --zone=us-west4-a --accelerator-type=v5litepod-16 \
        --version=v2-alpha-tpuv5-lite --scopes=cloud-platform
HELP
}

# What each host runs. The process number is kept where a reboot clears it.
start=$(cat <<'REMOTE'
set -euo pipefail
bucket=$1; shift
if kill -0 "$(cat /tmp/pec_jax.pid 2>/dev/null)" 2>/dev/null; then echo "It runs already."; exit; fi
rm -rf ~/pec_jax && mkdir ~/pec_jax && tar -xzf ~/pec_jax.tar.gz -C ~/pec_jax && cd ~/pec_jax
if [ -n "$bucket" ] && ! mountpoint -q /mnt/runs; then
  if ! command -v gcsfuse >/dev/null; then
    key=/usr/share/keyrings/cloud.google.asc apt=https://packages.cloud.google.com/apt
    curl -fsSL $apt/doc/apt-key.gpg | sudo tee $key >/dev/null
    echo "deb [signed-by=$key] $apt gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get -qq update && sudo apt-get -qq install -y gcsfuse
  fi
  sudo install -d -o "$USER" /mnt/runs
  # A whole checkpoint is renamed, which a bucket without folders does file by file, up to a limit.
  gcsfuse --implicit-dirs --rename-dir-limit=10000 "$bucket" /mnt/runs
fi
# JAX warns that the TPU runtime is slow to start without these (jax/_src/cloud_tpu_init.py).
echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null
# The image of v5e has Python 3.10; uv brings a newer one.
python3 -m pip install --quiet --user uv
~/.local/bin/uv venv --quiet --allow-existing --python 3.12 ~/pec_jax_venv
~/.local/bin/uv pip install --quiet --python ~/pec_jax_venv/bin/python -e '.[tpu]'
source ~/pec_jax_venv/bin/activate
setsid bash launch/run.sh --distributed "$@" >>~/pec_jax.log 2>&1 </dev/null &
echo $! >/tmp/pec_jax.pid
REMOTE
)
stop=$(cat <<'REMOTE'
pid=$(cat /tmp/pec_jax.pid 2>/dev/null) && kill -TERM "$pid" 2>/dev/null || echo "It does not run."
while kill -0 "$pid" 2>/dev/null; do sleep 1; done
REMOTE
)

everywhere() { # SCRIPT [ARGUMENT...]: quoted once more, since ssh gives the remote shell one string
  local script=$1
  shift
  gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all \
    --command="bash -c $(printf '%q ' "$script" pec_jax "$@")"
}

case "${1:-}" in start | stop | logs) ;; -h | --help) usage; exit ;; *) usage >&2; exit 2 ;; esac
where=(--zone="${ZONE:?see --help}" ${PROJECT:+--project="$PROJECT"})
: "${NAME:?see --help}"
case $1 in
  start)
    cd "$(dirname "$0")/.."
    git diff --quiet HEAD || echo "Changes that are not committed are left behind." >&2
    archive=$(mktemp -d)/pec_jax.tar.gz
    trap 'rm -r "$(dirname "$archive")"' EXIT
    git archive --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$NAME:pec_jax.tar.gz" "${where[@]}" --worker=all
    everywhere "$start" "${BUCKET:-}" "${@:2}"
    ;;
  stop) everywhere "$stop" ;;
  logs)
    gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=0 \
      --command='tail -n 100 -F ~/pec_jax.log'
    ;;
esac
