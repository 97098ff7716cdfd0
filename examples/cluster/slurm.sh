#!/usr/bin/env bash
# A batch as a SLURM array: every task does its share of the list, by SLURM_ARRAY_TASK_ID.
#
#   sbatch --array=1-8 slurm.sh clips.jsonl 'out/{id}.mp4' -- --codec prores
#
# A minute before the time limit, or when a more important job needs the node, dpe gets SIGTERM, ends with code 75 and is
# put into the queue again; --skip-existing then leaves out what is done.
#SBATCH --job-name=dpe
#SBATCH --array=1-8
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@60
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
manifest=$1 template=$2
shift 2

dpe batch "$manifest" --output-template "$template" --skip-existing --progress plain "$@" &
pid=$! stopped=
trap 'stopped=1; kill -TERM $pid' TERM
wait $pid
code=$?
if [ -n "$stopped" ]; then # it was `wait` that the signal ended, not yet dpe
    wait $pid
    code=$?
fi
if [ "$code" -eq 75 ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
