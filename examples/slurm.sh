#!/bin/bash
# Trains on two machines with eight GPUs each. The run folder must be on a file system that all machines share.
# Two minutes before the time limit the job receives SIGTERM, saves a checkpoint, and is queued again to resume.
#
# sbatch examples/slurm.sh
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --time=04:00:00
#SBATCH --signal=B:TERM@120 --open-mode=append

run=runs/big
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
if [ -d "$run/checkpoints" ]; then
    options="--resume $run"
else
    options="--config configs/shakespeare-gpu.toml --data shakespeare --out $run"
fi

srun --kill-on-bad-exit=1 bash -c "exec accelerate launch --config_file configs/accelerate/multi-node.yaml \
    --machine_rank \$SLURM_NODEID --main_process_ip $first train.py $options" &
trap 'kill -TERM $!; wait; scontrol requeue $SLURM_JOB_ID' TERM
wait
