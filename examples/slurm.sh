#!/bin/bash
# sbatch slurm.sh: train on two machines. Two minutes before the time ends, it saves and queues itself again.
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64
#SBATCH --time=24:00:00 --requeue --open-mode=append
#SBATCH --signal=B:TERM@120          # two minutes before the end, to this script

again=
trap 'again=yes; kill -TERM $run' TERM
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:29500" \
    -m sopdeploy train --recipe mine.toml --out runs/mine --resume auto &
run=$!
wait $run
[ -z "$again" ] || { wait $run; scontrol requeue "$SLURM_JOB_ID"; }
