#!/bin/bash
# FSDP2 on 2 machines of 8 GPUs under Slurm, one `accelerate launch` on each. For 13B to 34B.
#   sbatch accelerate_configs/slurm.sh recipes/sft_then_dpo.py --config recipes/configs/llama2-13b.yaml --sft.gradient_accumulation_steps 4 --dpo.gradient_accumulation_steps 2
# Another configuration: CONFIG=accelerate_configs/ddp_multi_node.yaml sbatch ... More machines: sbatch --nodes 4 ...
# output_dir and the caches of datasets and the hub must be on a file system that all machines share. Before its time
# is up, and when it is pre-empted, the job saves a checkpoint and is queued again; the same command then resumes.
# Tested with stand-ins for Slurm's commands, not on a cluster.
#SBATCH --job-name=hft
##SBATCH --partition=YOUR_PARTITION
##SBATCH --account=YOUR_ACCOUNT
#SBATCH --output=slurm-%x-%j.log
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this file with sbatch}"

# The environment of all machines: uncomment what your cluster needs.
# module load cuda
# source .venv/bin/activate
# export HF_HOME=/shared/huggingface  # models and data sets, on a file system that all machines share
# export HF_HUB_OFFLINE=1             # if compute nodes have no network

export CONFIG=${CONFIG:-accelerate_configs/fsdp2_multi_node.yaml}
export MAIN_IP=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export NUM_PROCESSES=$((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-8}))
# torch's launcher forwards SIGTERM and kills after 30 seconds. Saving a large model takes longer.
export PET_SHUTDOWN_TIMEOUT=540

# The launchers are told by a file. srun answers a signal by killing all tasks at once, and scancel reaches every
# process of the step, data loaders too.
export STOP_FILE=$PWD/.stop-$SLURM_JOB_ID
rm -f "$STOP_FILE"
trap 'touch "$STOP_FILE"' USR1 TERM

srun bash -c '
  accelerate launch --config_file "$CONFIG" --num_machines "$SLURM_NNODES" --num_processes "$NUM_PROCESSES" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_IP" "$@" &
  launcher=$! told=no code=0
  trap "kill -TERM $launcher" TERM
  while kill -0 "$launcher" 2>/dev/null; do
    if [ "$told" = no ] && [ -e "$STOP_FILE" ]; then told=yes; kill -TERM "$launcher"; fi
    sleep "${POLL_SECONDS:-5}"
  done
  wait "$launcher" || code=$?
  exit "$code"' _ "$@" &
run=$! code=0
# A signal ends only the inner wait, so the exit code is that of srun.
while kill -0 "$run" 2>/dev/null; do
  sleep "${POLL_SECONDS:-5}" & wait $! || true
done
wait "$run" || code=$?
if [ -e "$STOP_FILE" ]; then
  rm -f "$STOP_FILE"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
