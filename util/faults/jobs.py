"""The long-running scripts as small jobs: their commands, what they read, what of their output holds wall time.

{out} is the folder that a job fills; {data}, {pretrain} and the like are those of jobs that went before, left
undisturbed. A command is the same at each start, as its user would give it again.
"""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass

_TINY = "--device cpu --num_workers 0 --batch_size 8 --epochs 2 --warmup_epochs 1 --log_every 2 --save_steps 3"
_RUN = f"--output_dir {{out}}/run --resume auto {_TINY}"
_VIT = "--model vit_nano_patch8 --input_size 32 --lr 1e-3"
_MAE = f"main_pretrain.py --data_path {{data}}/data --model mae_vit_nano_patch8 --input_size 32 --eval_images 4 {_RUN}"
_FACES = (
    "datasets/prepare_toonfaces.py --out {out}/data --identities 4 --images 80 --open_identities 2 --open_images 3 "
    "--novel_identities 2 --novel_images 3 --scenes 10 --size 32"
)
_PACK = "-m util.data.pack --data_path {data}/data --out {out}/data.pack --canvas 32"
_EVAL = (
    "eval_recognition.py --ckpt {finetune}/run/checkpoint-best.pth --data_path {data}/data --output_dir {out}/run "
    "--device cpu --num_workers 0 --protocols closed_set verification --replicates 10 --negatives 100"
)


@dataclass(frozen=True)
class Job:
    """A command whose output does not depend on how often it was interrupted.

    kills: in each trial, one after the other; after the last it is let run to its end. training: it saves and says so
    when a signal stops it. own_processes: its work is done by programs that it starts itself, which outlive it. leaves:
    names of files, as patterns, that hold wall time or grow with each start; they are not compared.
    """

    name: str
    command: str
    kills: int = 3
    training: bool = False
    own_processes: bool = False
    leaves: tuple[str, ...] = ()

    def argv(self, places: dict[str, str]) -> list[str]:
        """The words of the command, with the folders of {out} and of other jobs."""
        return [word.format(**places) for word in shlex.split(self.command)]

    @property
    def needs(self) -> list[str]:
        """The jobs whose output it reads."""
        return [job.name for job in JOBS.values() if f"{{{job.name}}}" in self.command]


def _jobs() -> Iterable[Job]:
    yield Job("data", f"{_FACES} --workers 0")
    yield Job("data_workers", f"{_FACES} --workers 2")
    yield Job("folder", "datasets/prepare_folder.py --data_path {data}/data/images --out {out}/data", kills=1)
    yield Job("maps", "datasets/prepare_maps.py --data_path {data}/data --out {out}/maps --num_workers 0")
    yield Job("pack", f"{_PACK} --num_workers 0")
    yield Job("pack_workers", f"{_PACK} --num_workers 2")
    yield Job("pretrain", _MAE, training=True)
    yield Job("pretrain_workers", _MAE.replace("--num_workers 0", "--num_workers 2"), training=True)
    yield Job("simclr", f"main_simclr.py --data_path {{data}}/data {_VIT} --eval_images 4 {_RUN}", training=True)
    yield Job("linprobe", f"main_linprobe.py --data_path {{data}}/data {_VIT} --lr_grid 0.3 3 {_RUN}", training=True)
    yield Job("lora", f"main_lora.py --data_path {{data}}/data {_VIT} --rank 2 {_RUN}", training=True)
    yield Job("finetune", f"main_finetune.py --data_path {{data}}/data {_VIT} {_RUN}", training=True)
    yield Job(
        "detect",
        "main_detect.py --data_path {data}/data/scenes --model vit_nano_patch16 --input_size 64x128 --width 64 "
        f"--convs 1 --lr 1e-3 {_RUN.replace('--batch_size 8', '--batch_size 2')}",
        training=True,
    )
    yield Job("eval", _EVAL, kills=2, leaves=("report.md",))
    yield Job(
        "identify",
        "identify.py {data}/data/images --ckpt {finetune}/run/checkpoint-best.pth --finder whole "
        "--output_dir {out}/run --device cpu --batch_size 16 --num_workers 0",
        kills=2,
    )
    yield Job(
        "mask_sweep",
        "-m visualize.mask_sweep --ckpt {pretrain}/run/checkpoint-last.pth --data_path {data}/data --out {out}/run "
        "--device cpu --images 4 --mask_ratios 0.5 0.75",
        kills=1,
    )
    yield Job(
        "grid",
        "-m util.run.grid --out {out}/grid --vary seed=0,1 --command "
        f"'mae: {_MAE.replace(' --output_dir {out}/run --resume auto', '')}'",
        kills=2,
        own_processes=True,
        leaves=("output.txt", "results.csv", "results.md", "results.png"),
    )
    yield Job(
        "benchmark",
        "scripts/benchmark.py --data_path {data}/data --preset tiny --methods random_linear mae_scratch_linear "
        "--seeds 0 --out {out}/benchmark -- --device cpu --num_workers 0",
        kills=2,
        own_processes=True,
        leaves=("output.txt", "leaderboard.*", "*.png", "report.md"),
    )


JOBS = {job.name: job for job in _jobs()}
