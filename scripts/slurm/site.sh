# What differs between clusters, in one place: fill it in. Sourced before sbatch, and again inside each job.
#
#   source scripts/slurm/site.sh && sbatch scripts/slurm/pretrain.sbatch DATA RUN

ACCOUNT=""   # who pays, as `sacctmgr show associations` names it; empty: the default
PARTITION="" # where the GPUs are, as `sinfo` names it; empty: the default

# sbatch reads these, and an empty one is not the same as none
[ -z "$ACCOUNT" ] || export SBATCH_ACCOUNT="$ACCOUNT"
[ -z "$PARTITION" ] || export SBATCH_PARTITION="$PARTITION"

# What a job needs before Python, such as:
#   module load cuda/12.8
#   export NCCL_SOCKET_IFNAME=ib0
