# Sourced by the job scripts in this folder: one process group over all nodes, and back into the queue before time is up.
#
#   over_all_nodes SCRIPT FLAGS...   # torchrun on every node, a process for each GPU
#   supervise COMMAND...             # anything else
#
# Shortly before the time limit SLURM sends SIGUSR1 to the job script (#SBATCH --signal=B:USR1@SECONDS). It becomes
# SIGTERM for the training, which saves and ends, and then the job goes back into the queue, where `--resume auto` finds
# what was saved. SIGTERM, from scancel or a preemption, is passed on alike, but whether the job comes back is then for
# SLURM to say (#SBATCH --requeue).

step="" requeue=""

pass_on() {
    [ -z "$step" ] || kill -TERM "$step" 2>/dev/null || true
}

trap 'requeue=1; pass_on' USR1
trap pass_on TERM

supervise() {
    "$@" &
    step=$!
    local status=0
    wait "$step" || status=$?
    # a trapped signal ends `wait` while the step is still saving
    while kill -0 "$step" 2>/dev/null; do
        status=0
        wait "$step" || status=$?
    done
    if [ -n "$requeue" ] && [ "$status" != 0 ]; then
        echo "stopped before the time limit; job $SLURM_JOB_ID goes back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    return "$status"
}

over_all_nodes() {
    local first
    read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    # srun does not take it over from sbatch, and would bind all workers to one core
    export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
    supervise srun --kill-on-bad-exit=1 python -m torch.distributed.run \
        --nnodes="$SLURM_NNODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" --rdzv_backend=c10d \
        --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$first:$((20000 + SLURM_JOB_ID % 20000))" "$@"
}
